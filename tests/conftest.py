"""What every test may rely on: a process whose signals, log, umask and environment are as they were."""

import logging
import os
import signal
from collections.abc import Iterator

import pytest


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
