"""How a program logs: configured once, in `main`, to a rotating file and stderr.

Owns: handlers and the line format. Control characters in messages are escaped, so that no
record sent by a client can forge a log line.
"""

import logging
import logging.handlers
import sys
from pathlib import Path

from fleetcast.clock import utc_struct_time
from fleetcast.errors import CannotStart
from fleetcast.settings import LoggingSettings

_FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s"
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


class _OneLineFormatter(logging.Formatter):
    """UTC times; a message is one line, a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        record.message = record.getMessage().translate(_ESCAPES)
        record.asctime = self.formatTime(record, self.datefmt)
        line = self.formatMessage(record)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def configure_logging(path: Path | None, settings: LoggingSettings) -> None:
    """Send the log to stderr and, where `path` is given, to a rotating file.

    Raises:
        CannotStart: the log file cannot be opened.
    """

    formatter = _OneLineFormatter(_FORMAT, datefmt="%Y-%m-%dT%H:%M:%S")
    formatter.converter = utc_struct_time
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if path is not None:
        try:
            handlers.append(
                logging.handlers.RotatingFileHandler(
                    path,
                    maxBytes=settings.file_max_bytes,
                    backupCount=settings.file_count - 1,
                    encoding="utf-8",
                )
            )
        except OSError as error:
            raise CannotStart(f"cannot open the log file {path}: {error.strerror}") from error
    root = logging.getLogger()
    root.handlers[:] = handlers
    for handler in handlers:
        handler.setFormatter(formatter)
    root.setLevel(settings.level)
    logging.captureWarnings(capture=True)
