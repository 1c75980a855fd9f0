"""DataBuffer: the memory of the product, in daily Parquet files that lose nothing.

Owns: the buffer's interface as `spec.md` prints it: append, flush, windows, export, statistics.
Does not know: HTTP, how bins close, models. The files are described in `docs/formats.md`.

    python data_buffer.py [--data-buffer-dir DIR] [--config FILE]     print the statistics
"""

import argparse
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetcast.clock import DAY_MS, Clock, SystemClock, from_ms, to_ms
from fleetcast.errors import BadData, ExitCode, FleetcastError, StorageBroken
from fleetcast.ingest.records import Accepted, RecordRules, accept, accept_columns
from fleetcast.program import run_program
from fleetcast.schema import RecordBatch, Rejection, SettledForecasts
from fleetcast.settings import BufferSettings, load_settings

if TYPE_CHECKING:
    import pandas as pd

    from fleetcast.storage.store import BufferOwner

logger = logging.getLogger(__name__)

_APPEND_ROWS = 20_000  # records of one iterable that are checked and written together


@dataclass(frozen=True, slots=True)
class AppendReport:
    """What became of the records of one `append`; the accepted ones are durable."""

    accepted: int
    rejections: tuple[Rejection, ...]
    ignored_text_fields: int


class DataBuffer:
    """Accumulates records in `buffer_dir`.

    Guarantees: an append is durable when it returns and is never lost or doubled; records of one
    (server_name, timestamp) are one row, the last value of each metric wins; readers of any
    process never fail, never see half a day and see every durable record. Constructing and
    reading takes no lock and creates nothing; the first append takes the folder's lock, and from
    then on this process is its only writer. Thread safe.
    """

    def __init__(
        self,
        buffer_dir: str | Path = "./data_buffer",
        retention_days: int = BufferSettings.retention_days,
        *,
        settings: BufferSettings | None = None,
        clock: Clock | None = None,
        expire: bool = True,
    ) -> None:
        """Remember where the buffer is.

        Args:
            settings: where given, its `retention_days` holds.
            clock: decides what "today" is.
            expire: False keeps every day and accepts records of any age (the data clock).
        """
        # pyarrow is imported here, so that --help of every program that has a buffer answers at once
        from fleetcast.storage.reader import BufferReader

        self._folder = Path(buffer_dir)
        self._settings = settings or BufferSettings(retention_days=retention_days)
        self._clock = clock or SystemClock()
        self._expires = expire
        self._reader = BufferReader(self._folder)
        self._opening = threading.Lock()
        self._owner: BufferOwner | None = None

    def append(self, records: "Iterable[Mapping[str, Any]] | pd.DataFrame") -> AppendReport:
        """Check records and make the good ones durable; flushes by itself when that is due.

        Raises:
            BadData: `records` is no iterable of mappings and no DataFrame, or a frame without
                `timestamp` and `server_name`.
            AlreadyRunning: another process writes this buffer.
            StorageFull, StorageBroken: the records of this call not yet written are not kept.
        """
        n_accepted = n_ignored = n_seen = 0
        rejections: list[Rejection] = []
        for size, accepted in self._checked(records):
            self.append_batch(accepted.batch)
            n_accepted += len(accepted.batch)
            n_ignored += accepted.ignored_text_fields
            rejections += [Rejection(r.index + n_seen, r.field, r.reason) for r in accepted.rejections]
            n_seen += size
            self._flush_if_due()
        if rejections:
            logger.warning("rejected records count=%d first=%s", len(rejections), rejections[0])
        return AppendReport(n_accepted, tuple(rejections), n_ignored)

    def append_batch(self, batch: RecordBatch) -> None:
        """Make checked records durable; calls of several threads share one fdatasync.

        Raises:
            AlreadyRunning: another process writes this buffer.
            StorageFull, StorageBroken: none of them is kept.
        """
        if len(batch):
            self.open().append_batch(batch)

    def append_predictions(self, rows: SettledForecasts) -> None:
        """Make settled forecasts durable; the same (origin, horizon, server, metric) is one row."""
        if len(rows):
            self.open().append_predictions(rows)

    def flush(self) -> None:
        """Move every accepted record into its day file."""
        if self._owner is not None:
            self._owner.flush()

    @property
    def pending_s(self) -> float:
        """How long the oldest record that is not yet in its day file has waited, 0.0 if none does."""
        return self._owner.pending_s if self._owner else 0.0

    def maintain(self, now: datetime) -> None:
        """Do what is due at `now`: flush, compact, seal, expire. Call it about every second."""
        if self._owner is not None:
            self._owner.maintain(now)

    def open(self) -> "BufferOwner":
        """Take ownership now instead of at the first append; recovers what a crash left."""
        from fleetcast.storage.store import BufferOwner

        with self._opening:
            if self._owner is None:
                self._owner = BufferOwner(self._folder, self._settings, expires=self._expires)
            return self._owner

    def close(self) -> None:
        """Flush and give the ownership up."""
        with self._opening:
            owner, self._owner = self._owner, None
        if owner is not None:
            owner.close()

    def get_training_window(self, days: int = 30, include_today: bool = False) -> "pd.DataFrame":
        """Return the records of the last `days` whole UTC days, and of today if asked.

        Returns:
            timestamp, server_name and metrics, ordered by day, server and time.
        """
        today_ms = to_ms(self._clock.now()) // DAY_MS * DAY_MS
        return self._reader.frame(today_ms - days * DAY_MS, today_ms + (DAY_MS if include_today else 0))

    def export_training_data(
        self,
        path: str | Path,
        days: float = 30,
        resolution_s: float | None = None,
        *,
        until: datetime | None = None,
    ) -> int:
        """Write the newest `days` of records to one Parquet file, day by day in little memory.

        Args:
            resolution_s: write means of bins of this length instead of raw records.
            until: the end, not included; None = up to now.
        Returns:
            the number of rows written.
        """
        end_ms = to_ms(self._clock.now()) + 1 if until is None else to_ms(until)
        return self._reader.export(Path(path), end_ms - round(days * DAY_MS), end_ms, resolution_s)

    def iter_batches(
        self, start_ms: int, end_ms: int, metrics: Sequence[str] | None = None
    ) -> Iterator[RecordBatch]:
        """Yield records with start <= time < end: day by day, sorted by server and time inside.

        A large day comes in several batches, each with all its rows of the servers in it.
        """
        return self._reader.batches(start_ms, end_ms, metrics)

    def read_predictions(self, start_ms: int, end_ms: int, horizon: int | None = None) -> SettledForecasts:
        """Return settled forecasts with start <= target < end, sorted by target."""
        return self._reader.predictions(start_ms, end_ms, horizon)

    def newest_record_time(self) -> datetime | None:
        """Return the newest time of all records, None for an empty buffer."""
        newest_ms = self._reader.newest_ms() if self._owner is None else self._owner.newest_ms
        return None if newest_ms is None else from_ms(newest_ms)

    def oldest_record_time(self) -> datetime | None:
        """Return the oldest time of all records, None for an empty buffer."""
        oldest_ms = self._reader.oldest_ms()
        return None if oldest_ms is None else from_ms(oldest_ms)

    def get_stats(self) -> dict[str, Any]:
        """Return counts as `spec.md` prints them; those of settled forecasts under `predictions`."""
        return self._reader.stats()

    def _flush_if_due(self) -> None:
        """Flush; a failure is no failure of the append, whose records are durable in the log."""
        try:
            if self._owner is not None and self._owner.is_flush_due:
                self._owner.flush()
        except FleetcastError as error:
            logger.error("buffer cannot flush now, the records stay in the log error=%s", error)

    def _checked(self, records: Any) -> Iterator[tuple[int, Accepted]]:
        """Yield the size of each portion of `records` and what was accepted of it."""
        now = self._clock.now() if self._expires else SystemClock().now()
        rules = RecordRules.at(now, self._settings, expires=self._expires)
        if hasattr(records, "columns") and hasattr(records, "iloc"):
            from fleetcast.storage.tables import columns_of_frame

            columns = columns_of_frame(records)
            for start in range(0, len(records), _APPEND_ROWS):
                portion = {name: cells[start : start + _APPEND_ROWS] for name, cells in columns.items()}
                yield len(portion["timestamp"]), accept_columns(portion, rules)
            return
        if isinstance(records, (str, bytes, Mapping)) or not isinstance(records, Iterable):
            wanted = "records must be an iterable of mappings or a DataFrame"
            raise BadData(f"{wanted}, got {type(records).__name__}")
        rest = iter(records)
        while rows := list(islice(rest, _APPEND_ROWS)):
            yield len(rows), accept(rows, rules)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the statistics of the buffer."""
    parser = argparse.ArgumentParser(description="Print what the data buffer holds.")
    parser.add_argument("--data-buffer-dir", help="folder of the buffer (default: ./data_buffer)")
    parser.add_argument("--config", type=Path, help="settings file (default: ./fleetcast.toml, if present)")
    options = parser.parse_args(argv)
    return run_program("data_buffer", lambda: _print_stats(options.config, options.data_buffer_dir))


def _print_stats(config: Path | None, folder: str | None) -> int:
    settings = load_settings(config, {"paths.data_buffer_dir": folder})
    try:
        stats = DataBuffer(settings.paths.data_buffer_dir, settings=settings.buffer).get_stats()
    except OSError as error:  # a folder that may not be read
        raise StorageBroken(str(error)) from error
    print(f"buffer       {settings.paths.data_buffer_dir}")
    for title, counts in (("records", stats), ("predictions", stats["predictions"])):
        span = counts["date_range"]
        days = f"{span['start']} to {span['end']}" if span["start"] else "no day yet"
        print(
            f"{title:<12} {counts['total_records']:,} rows in {counts['file_count']} day files,"
            f" {days}, {counts['disk_usage_mb']} MB"
        )
    return ExitCode.OK


if __name__ == "__main__":
    raise SystemExit(main())
