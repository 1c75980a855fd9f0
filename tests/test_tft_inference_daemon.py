"""The program's start: flags, refusals and exit codes."""

import socket
from pathlib import Path

import pytest

import tft_inference_daemon
from fleetcast.errors import ExitCode
from fleetcast.locks import OwnerLock


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_wrong_setting_is_named_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEETCAST_SERVER_PROT", "8001")
    flags = ["--port", "70000", "--clock", "sundial", "--config", "none.toml"]
    assert tft_inference_daemon.main(flags) == ExitCode.BAD_SETTINGS
    said = capsys.readouterr().err
    for part in ("server.port must be <= 65535", "clock.mode must be one of system, data", "none.toml",
                 "FLEETCAST_SERVER_PORT"):  # fmt: skip
        assert part in said
    assert list(Path.cwd().iterdir()) == []


def test_a_wrong_flag_is_usage() -> None:
    with pytest.raises(SystemExit) as ended:
        tft_inference_daemon.main(["--prot", "8001"])
    assert ended.value.code == ExitCode.BAD_SETTINGS


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "example.org", "::"])
def test_without_a_key_only_loopback_is_served(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tft_inference_daemon.main(["--host", host]) == ExitCode.BAD_SETTINGS
    assert "set TFT_API_KEY" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_loopback_needs_no_key(host: str) -> None:
    options = tft_inference_daemon._parser(None).parse_args(["--host", host])
    assert tft_inference_daemon._settings(options).server.host == host


def test_with_a_key_every_address_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFT_API_KEY", "0123456789abcdef")
    options = tft_inference_daemon._parser(None).parse_args(["--host", "0.0.0.0"])
    assert tft_inference_daemon._settings(options).server.host == "0.0.0.0"


def test_a_taken_port_is_exit_3_and_gives_the_buffer_up(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert tft_inference_daemon.main(["--port", str(port)]) == ExitCode.CANNOT_START
    assert f"port {port}" in capsys.readouterr().err
    with OwnerLock(Path("data_buffer/.owner.lock"), "the buffer"):
        pass


def test_a_buffer_in_use_is_exit_4_naming_the_owner(capsys: pytest.CaptureFixture[str]) -> None:
    with OwnerLock(Path("data_buffer/.owner.lock"), "the buffer") as lock:
        assert tft_inference_daemon.main([]) == ExitCode.ALREADY_RUNNING
        pid = lock.path.read_text().strip()
    assert f"pid {pid}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_exit_3(capsys: pytest.CaptureFixture[str]) -> None:
    Path("data_buffer").write_text("not a folder")
    assert tft_inference_daemon.main(["--port", "1"]) == ExitCode.CANNOT_START
    assert "data_buffer" in capsys.readouterr().err


def test_another_clock_than_the_folders_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    from fleetcast.serving.ledger import Ledger

    Path("data_buffer").mkdir()
    Ledger(Path("data_buffer"), (1,), 300_000, "data")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert tft_inference_daemon.main(["--port", str(port)]) == ExitCode.BAD_SETTINGS
    assert "--clock data" in capsys.readouterr().err


def test_a_short_key_is_refused_where_others_can_reach_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFT_API_KEY", "0123456789abcde")
    assert tft_inference_daemon.main(["--host", "0.0.0.0"]) == 2
    assert "TFT_API_KEY has 15 characters, at least 16 are safe" in capsys.readouterr().err
