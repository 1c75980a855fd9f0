"""Where the time comes from: the only owner of `datetime.now` and `time.*`.

Owns: "now" for decisions (`Clock.now`) and elapsed wall time (`monotonic`).
Does not know: what the time is used for. Safeguards and bins take a `Clock`;
intervals, timeouts and back-off are wall time whatever the clock mode.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

DAY_MS = 86_400_000
HOUR_MS = 3_600_000

BIN_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Clock(Protocol):
    """Source of "now": an aware UTC `datetime`."""

    def now(self) -> datetime: ...


class SystemClock:
    """The host's clock."""

    def now(self) -> datetime:
        return datetime.now(UTC)


class DataClock:
    """A clock that stands at the newest record, so that recorded months run at any speed.

    Before the first record it stands at 1970-01-01, which no safeguard mistakes for progress.
    """

    def __init__(self, newest_record_time: Callable[[], datetime | None]) -> None:
        self._newest_record_time = newest_record_time

    def now(self) -> datetime:
        return self._newest_record_time() or BIN_EPOCH


class FakeClock:
    """A clock that tests move by hand."""

    def __init__(self, start: datetime = datetime(2026, 1, 15, 10, 0, tzinfo=UTC)) -> None:
        self.time = start

    def now(self) -> datetime:
        return self.time

    def advance(self, **kwargs: float) -> None:
        """Move by `timedelta(**kwargs)`; negative steps the clock back."""
        self.time += timedelta(**kwargs)


def monotonic() -> float:
    """Return wall seconds that never step back, for intervals and timeouts."""
    return time.monotonic()


@dataclass(frozen=True, slots=True)
class Uptime:
    """Seconds this boot of the machine has run; two of one boot can be compared across processes."""

    boot: str
    seconds: float


def uptime() -> Uptime | None:
    """Return the machine's uptime (Linux: CLOCK_MONOTONIC counts from boot), None where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return Uptime(boot, time.monotonic())


def sleep(seconds: float) -> None:
    """Block this thread for `seconds` of wall time."""
    time.sleep(seconds)


def utc_struct_time(seconds: float | None = None) -> time.struct_time:
    """Return the UTC calendar of seconds since 1970, for the log's formatter."""
    return time.gmtime(seconds)


def to_ms(moment: datetime) -> int:
    """Return milliseconds since 1970 of an aware time.

    >>> to_ms(datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC))
    1000
    """
    return (moment - BIN_EPOCH) // timedelta(milliseconds=1)


def from_ms(milliseconds: int) -> datetime:
    """Return the aware UTC time of milliseconds since 1970.

    >>> from_ms(1000).isoformat()
    '1970-01-01T00:00:01+00:00'
    """
    return BIN_EPOCH + timedelta(milliseconds=int(milliseconds))


def plain_utc(moment: datetime) -> str:
    """Return a time as the state files print it: UTC, seconds, no offset.

    >>> plain_utc(datetime(2025, 10, 17, 14, 23, 15, 999, tzinfo=UTC))
    '2025-10-17T14:23:15'
    """
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S")


def parse_plain_utc(text: str) -> datetime:
    """Return the aware time of a `plain_utc` string (an offset, where present, is honoured)."""
    moment = datetime.fromisoformat(text)
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def iso_z(moment: datetime) -> str:
    """Return a time as the HTTP interface prints it.

    >>> iso_z(datetime(2026, 1, 15, 10, 0, 5, tzinfo=UTC))
    '2026-01-15T10:00:05Z'
    """
    utc = moment.astimezone(UTC)
    text = utc.isoformat(timespec="milliseconds" if utc.microsecond else "seconds")
    return text.replace("+00:00", "Z")
