"""`make run`: three real processes that start in order, show a forecast, and end in order."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from programs import free_port, wait_for

from fleetcast.forecast.registry import Registry
from fleetcast.schema import HistoryWindow

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow

QUICK = "[bins]\nbin_s = 1\nclose_grace_s = 0.2\n"


def _start(folder: Path, port: int) -> "subprocess.Popen[str]":
    flags = ["--status", "1", "--folder", str(folder), "--port", str(port)]
    return subprocess.Popen(
        [sys.executable, "-m", "fleetcast.live", *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def _until(process: "subprocess.Popen[str]", pattern: str, limit_s: float = 60) -> list[str]:
    assert process.stdout is not None
    seen: list[str] = []
    deadline = time.monotonic() + limit_s
    while not (seen and re.search(pattern, seen[-1])):
        assert time.monotonic() < deadline, seen
        line = process.stdout.readline()
        assert line, seen
        seen.append(line)
    return seen


def test_it_shows_a_forecast_of_this_machine_and_ctrl_c_ends_all_three_in_order(tmp_path: Path) -> None:
    (tmp_path / "fleetcast.toml").write_text(QUICK)
    process = _start(tmp_path, free_port())
    try:
        _until(process, r": cpu \S+ %, fallback, until \d\d:\d\dZ")
        children = psutil.Process(process.pid).children()
        assert len(children) == 3

        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)

        endings = re.findall(r"^ending (\w+): exit code (\d+)$", rest, re.MULTILINE)
        assert endings == [("agent", "0"), ("retraining", "0"), ("inference", "0")]
        assert process.returncode == 0
        assert not any(child.is_running() for child in children)
    finally:
        process.kill()
    assert {"fleetcast.toml", "data_buffer", "drift_metrics.json", "inference_daemon.log"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_nothing_is_left_behind_when_the_terminal_itself_dies(tmp_path: Path) -> None:
    with _start(tmp_path, free_port()) as process:
        _until(process, r"^live on ")
        children = psutil.Process(process.pid).children()

        process.kill()

    wait_for("the three to end by themselves", lambda: not any(child.is_running() for child in children), 30)


def test_a_hangup_ends_nothing_and_an_output_that_is_gone_ends_all_in_order(tmp_path: Path) -> None:
    (tmp_path / "fleetcast.toml").write_text(QUICK)
    with _start(tmp_path, free_port()) as process:
        _until(process, r"^live on ")
        process.send_signal(signal.SIGHUP)
        _until(process, r"signal SIGHUP ends nothing")
        console = tmp_path / "retraining.console"
        wait_for("the last daemon to take signals", lambda: "daemon started" in console.read_text(), 60)
        assert process.stdout is not None

        process.stdout.close()  # as when its terminal is closed
        assert process.wait(60) == 0

    for program in ("inference", "retraining"):
        assert "reason=signal SIGTERM" in (tmp_path / f"{program}.console").read_text()
    assert "agent ends" in (tmp_path / "agent.console").read_text()


def test_a_daemon_that_cannot_start_is_shown_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "fleetcast.toml").write_text("[bins]\nbin_s = 7\n")
    process = _start(tmp_path, free_port())

    output, _ = process.communicate(timeout=60)

    assert process.returncode == 3
    assert "inference ended with exit code 2" in output
    assert "bins.bin_s must divide a day" in output


def test_its_own_settings_let_the_shipped_base_forecast_the_first_closed_bin(tmp_path: Path) -> None:
    from fleetcast.live import OWN_SETTINGS
    from fleetcast.settings import load_settings
    from tft_inference_daemon import _load_model

    config = tmp_path / "fleetcast.toml"
    config.write_text(OWN_SETTINGS)
    settings = load_settings(config, environ={})
    base = Registry(tmp_path / "none", ROOT / "models").base()
    assert base is not None
    model = _load_model(settings, base.model_path)  # refuses other bins
    values = np.full((1, 1, 12), np.nan, dtype=np.float32)
    values[..., -1] = 40.0
    window = HistoryWindow(("a",), ("cpu_pct",), values, 0, settings.bins.bin_s * 1000)

    assert np.isfinite(model.predict(window)).all()
    assert settings.bins.close_grace_s < 5


def test_other_bins_than_the_base_was_made_for_are_a_problem_in_the_line(tmp_path: Path) -> None:
    (tmp_path / "fleetcast.toml").write_text(QUICK)
    process = _start(tmp_path, free_port())
    try:
        _until(process, r"problem: No model serves: the shipped base model is not used.* 96 bins of 300 s")
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def test_a_second_loop_says_that_one_runs_and_leaves_its_files_alone(tmp_path: Path) -> None:
    (tmp_path / "fleetcast.toml").write_text(QUICK)
    with _start(tmp_path, free_port()) as first:
        _until(first, r"^live on ")
        consoles = {path: path.read_bytes() for path in tmp_path.glob("*.console")}

        second = _start(tmp_path, free_port())
        output, _ = second.communicate(timeout=60)

        first.send_signal(signal.SIGINT)
        first.communicate(timeout=60)
    assert second.returncode == 4
    assert f"the live loop of {tmp_path} is already held by pid {first.pid}" in output
    assert len(consoles) == 3
    assert all(path.read_bytes().startswith(text) for path, text in consoles.items())


@pytest.mark.parametrize("answer", [b"", b'HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{"status":"ready"}'])
def test_a_port_that_a_stranger_has_is_named_and_its_answers_are_not_believed(
    tmp_path: Path, answer: bytes
) -> None:
    def talk(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                with server.accept()[0] as connection:
                    connection.recv(65_536)
                    connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Thread(target=talk, args=(server,), daemon=True).start()
        process = _start(tmp_path, port)
        output, _ = process.communicate(timeout=60)
        server.shutdown(socket.SHUT_RDWR)

    assert process.returncode == 3
    assert f"port {port} cannot be used: Address already in use; another program has it" in output
    assert "live on" not in output
    assert not list(tmp_path.glob("*.console"))


def test_a_port_that_another_loop_has_is_told_with_its_pid_and_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "fleetcast.toml").write_text(QUICK)
    port = free_port()
    with _start(tmp_path / "one", port) as first:
        _until(first, r"^live on ")
        second = _start(tmp_path / "two", port)
        output, _ = second.communicate(timeout=60)
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=60)

    assert second.returncode == 3
    assert re.search(r"a fleetcast daemon has it: pid \d+, buffer .*data_buffer", output)


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop"])
def test_something_else_in_a_console_files_place_stops_nothing(tmp_path: Path, kind: str) -> None:
    console = tmp_path / "inference.console"
    if kind == "fifo":
        os.mkfifo(console)
    elif kind == "folder":
        console.mkdir()
    else:
        console.symlink_to(console)
    (tmp_path / "fleetcast.toml").write_text("[bins]\nbin_s = 7\n")

    output, _ = _start(tmp_path, free_port()).communicate(timeout=60)

    assert "bins.bin_s must divide a day" in output
