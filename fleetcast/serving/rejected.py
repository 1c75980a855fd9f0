"""Rejected records, kept for people to look at: `data_buffer/quarantine.jsonl`.

Owns: the file, one JSON line per rejected record: `received_at`, `index`, `field`, `reason`,
`record` (cut to 2,000 characters). Bounded: past half of `max_bytes` it moves to
`quarantine.jsonl.1` and starts again. No program reads it back: a line lost to a full disk is
only counted.
"""

import json
import logging
import threading
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from fleetcast import files
from fleetcast.clock import iso_z
from fleetcast.errors import StorageBroken, StorageFull
from fleetcast.schema import Rejection

logger = logging.getLogger(__name__)

FILE_NAME = "quarantine.jsonl"
RECORD_MAX_CHARS = 2000


class RejectedRecords:
    """The bounded quarantine file; safe from any thread."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.path = folder / FILE_NAME
        self._half_bytes = max_bytes // 2
        self._lock = threading.Lock()
        self.lost = 0  # records the disk did not take

    def keep(self, raw: Sequence[object], rejections: Sequence[Rejection], received_at: datetime) -> None:
        """Append the rejected ones of `raw`."""
        stamp = iso_z(received_at)
        lines: list[str] = []
        n_bytes = 0
        for rejection in rejections:
            line = _line(stamp, rejection, raw[rejection.index])
            n_bytes += len(line.encode()) + 1
            if n_bytes > self._half_bytes:  # one request must not push out more than it can show
                break
            lines.append(line)
        with self._lock:
            try:
                files.append_line(self.path, "\n".join(lines), max_bytes=self._half_bytes)
            except (StorageFull, StorageBroken) as error:
                if not self.lost:
                    logger.warning("rejected records cannot be kept: %s", error)
                self.lost += len(rejections)


def _line(stamp: str, rejection: Rejection, record: object) -> str:
    shown: Any = record
    text = _text(record)
    if len(text) > RECORD_MAX_CHARS:
        shown = text[:RECORD_MAX_CHARS]
    entry = {"received_at": stamp, **rejection.as_dict(), "record": shown}
    try:
        return msgspec.json.encode(entry, enc_hook=repr).decode()
    except (UnicodeEncodeError, TypeError, ValueError, RecursionError):  # lone surrogates, odd keys
        return json.dumps({**entry, "record": text[:RECORD_MAX_CHARS]})


def _text(record: object) -> str:
    try:
        return ascii(record)
    except RecursionError:
        return f"<{type(record).__name__} nested too deeply>"
