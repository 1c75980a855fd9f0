"""What every test may rely on: a process whose signals, log, umask and environment are as they were.

`make test` has two workers. The tests of a file share one, so that its fixtures are made once; so do all
tests of `tests/contract/`, whose commands as printed need port 8000. (`--dist loadgroup` would do it with
marks, but not with pytest 9.2: pytest-xdist issue 1386.)
"""

import logging
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from test_console import Terminal
    from test_inference import World

CONTRACT = "tests/contract/"


class _Files(LoadFileScheduling):  # type: ignore[misc]  # untyped
    """Gives a worker whole files, and one worker all of `tests/contract/`."""

    def _split_scope(self, nodeid: str) -> str:
        return CONTRACT if nodeid.startswith(CONTRACT) else str(super()._split_scope(nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Files:
    """Choose which worker runs what."""
    return _Files(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Let a worker tell of a failed test whose text has lone surrogates: it can send UTF-8 alone."""
    return _utf8((yield))


def _utf8(value: Any) -> Any:
    """Return what a report holds, with each lone surrogate as its escape."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_utf8(key): _utf8(entry) for key, entry in value.items()}
    return [_utf8(entry) for entry in value] if isinstance(value, list | tuple) else value


@pytest.fixture(autouse=True)
def unchanged_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a program's `main` sets up once per process, and hide the caller's settings."""
    for name in list(os.environ):
        if name.startswith(("FLEETCAST_", "TFT_")):
            monkeypatch.delenv(name)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    root = logging.getLogger()
    level, log_handlers = root.level, root.handlers[:]
    umask = os.umask(0o022)
    os.umask(umask)
    yield
    os.umask(umask)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for handler in set(root.handlers) - set(log_handlers):
        handler.close()
    root.handlers[:] = log_handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["World"]:
    """A whole service in this process, in a folder that is the working directory."""
    from test_inference import World  # here: most tests need none

    monkeypatch.chdir(tmp_path)
    own = World(tmp_path).start()
    yield own
    own.end()


@pytest.fixture
def terminal(world: "World", capsys: pytest.CaptureFixture[str]) -> "Terminal":
    """What runs commands against that service."""
    from test_console import Terminal

    return Terminal(str(world.client.base_url), capsys)
