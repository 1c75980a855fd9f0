"""What every test may rely on: a process whose signals, log, umask and environment are as they were.

`make test` has two workers (`-n 2 --dist loadgroup`). The tests of a file share one, so that its fixtures are
made once; so do all tests of `tests/contract/`, whose commands as printed need port 8000.
"""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)  # before the hook that reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which tests must run in one worker."""
    contract = Path(__file__).parent / "contract"
    for item in items:
        group = "port 8000" if contract in item.path.parents else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


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
