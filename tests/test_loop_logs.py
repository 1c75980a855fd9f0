import logging
import os
import re
import signal
import time
import warnings
from pathlib import Path

import pytest
from odd_files import put

from fleetcast.errors import CannotStart
from fleetcast.loop import Stop, configure_logging
from fleetcast.settings import LoggingSettings

logger = logging.getLogger("fleetcast.test")
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (\w+) fleetcast\.test: (.*)")


def test_a_line_goes_to_the_file_and_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(tmp_path / "x.log", LoggingSettings())
    logger.info("buffer flushed records=%d", 10)
    lines = [(tmp_path / "x.log").read_text().strip(), capsys.readouterr().err.strip()]
    assert lines[0] == lines[1]
    match = LINE.fullmatch(lines[0])
    assert match is not None
    assert match.groups() == ("INFO", "buffer flushed records=10")


def test_a_level_below_the_setting_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(None, LoggingSettings(level="WARNING"))
    logger.info("quiet")
    logger.warning("loud")
    assert "quiet" not in (text := capsys.readouterr().err)
    assert "loud" in text


@pytest.mark.parametrize("evil", ["a\nb", "a\r\nb", "a\x1b[31mb", "a\x00b", "a\x85b", "a\u2028b", "a\x7fb"])
def test_no_text_can_forge_a_second_line_or_steer_a_terminal(
    evil: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(None, LoggingSettings())
    logger.warning("rejected server=%s", evil)
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1
    assert text[:-1].isprintable()


def test_a_traceback_follows_on_lines_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(None, LoggingSettings())
    try:
        raise ValueError("boom")
    except ValueError:
        logger.exception("cycle failed")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("cycle failed")
    assert lines[-1] == "ValueError: boom"


def test_the_file_rotates_and_keeps_the_stated_number(tmp_path: Path) -> None:
    configure_logging(tmp_path / "x.log", LoggingSettings(file_max_bytes=10_000, file_count=3))
    for _ in range(600):
        logger.info("x" * 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.log", "x.log.1", "x.log.2"]
    assert all(path.stat().st_size <= 10_000 for path in tmp_path.iterdir())


def test_configuring_twice_does_not_double_lines(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(None, LoggingSettings())
    configure_logging(None, LoggingSettings())
    logger.info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_torch_speaks_of_trouble_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("torch"), "propagate", True)  # an imported torch keeps its lines
    monkeypatch.setattr(logging.getLogger("torch.nn"), "propagate", True)
    configure_logging(None, LoggingSettings())
    logging.getLogger("torch._subclasses.fake_tensor").info("cache_misses: 0")
    logging.getLogger("torch.nn").warning("a deprecated call")
    text = capsys.readouterr().err
    assert "cache_misses" not in text
    assert "a deprecated call" in text


def test_a_log_file_that_cannot_be_opened_is_a_failed_start(tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match="cannot open the log file"):
        configure_logging(tmp_path / "no" / "x.log", LoggingSettings())


def test_warnings_of_libraries_land_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(None, LoggingSettings())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = logging._showwarning  # type: ignore[attr-defined]  # pytest put its own there
        warnings.warn("old interface", UserWarning, stacklevel=1)
    text = capsys.readouterr().err
    assert "WARNING py.warnings" in text
    assert "old interface" in text


def test_the_log_follows_its_name_when_logrotate_moves_it_and_a_hangup_ends_nothing(tmp_path: Path) -> None:
    log = tmp_path / "own.log"
    configure_logging(log, LoggingSettings())
    logging.getLogger("x").info("first")
    log.rename(tmp_path / "own.log.1")
    stop = Stop()
    stop.install()
    os.kill(os.getpid(), signal.SIGHUP)
    began = time.monotonic()

    assert not stop.wait(0.2)

    assert time.monotonic() - began >= 0.2, "it is no reason to work earlier either"
    logging.getLogger("x").info("second")
    assert "signal SIGHUP ends nothing" in log.read_text()
    assert "second" in log.read_text()
    assert "second" not in (tmp_path / "own.log.1").read_text()


@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "loop"])
def test_a_log_file_that_is_none_is_said_and_no_hang(tmp_path: Path, kind: str) -> None:
    put(kind, tmp_path / "daemon.log")
    with pytest.raises(CannotStart, match=r"cannot open the log file .*daemon\.log"):
        configure_logging(tmp_path / "daemon.log", LoggingSettings())
