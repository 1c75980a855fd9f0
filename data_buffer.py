"""DataBuffer: the memory of the product, in daily Parquet files that lose nothing.

Owns: append, flush, windows, export, statistics and retention of metric records and of settled
forecasts, in one folder. Does not know: HTTP, bins as they close, models.

Constructing and reading takes no lock, creates nothing and sees every acknowledged record; the
first append takes the folder's lock, and from then on this process is its only writer.

    python data_buffer.py [--config FILE]     print the statistics
"""

import argparse
import logging
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetcast.batches import (
    batch_of_table,
    columns_of_frame,
    settled_of_table,
    table_of_batch,
    table_of_settled,
)
from fleetcast.bufferstats import buffer_stats
from fleetcast.clock import Clock, SystemClock, from_ms, to_ms
from fleetcast.dayfiles import DAY_MS
from fleetcast.dayreader import DayReader
from fleetcast.daystore import DayStore
from fleetcast.errors import BadData, FleetcastError
from fleetcast.export import export_records
from fleetcast.files import OwnerLock
from fleetcast.records import Accepted, RecordRules, accept, accept_columns
from fleetcast.schema import RecordBatch, Rejection, SettledForecasts
from fleetcast.settings import BufferSettings, load_settings
from fleetcast.tables import METRICS, PREDICTIONS, merged, stored_schema

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

_APPEND_ROWS = 20_000  # records of one iterable that are checked and written together
_LOCK_NAME = ".owner.lock"


@dataclass(frozen=True, slots=True)
class AppendReport:
    """What became of the records of one `append`; the accepted ones are durable."""

    accepted: int
    rejections: tuple[Rejection, ...]
    ignored_text_fields: int


class DataBuffer:
    """Accumulates records in `buffer_dir`; see `docs/formats.md` for the files.

    Guarantees: an append is durable when it returns and is never lost or doubled; records of one
    (server_name, timestamp) are one row, the last value of each metric wins; readers of any
    process never fail and never see half a day. Appending and reading are thread safe.
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
        """Remember where the buffer is; nothing is created or locked.

        Args:
            settings: where given, its `retention_days` holds.
            clock: decides what "today" is and when a day is over.
            expire: False keeps every day and accepts records of any age (the data clock).
        """
        self._folder = Path(buffer_dir)
        self._settings = settings or BufferSettings(retention_days=retention_days)
        self._clock = clock or SystemClock()
        self._expires = expire
        self._metrics = DayReader(self._folder, METRICS)
        self._predictions = DayReader(self._folder, PREDICTIONS)
        self._lock = OwnerLock(self._folder / _LOCK_NAME, f"the buffer {self._folder}")
        self._opening = threading.Lock()
        self._stores: dict[str, DayStore] = {}
        self._newest_ms: int | None = None

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
            if self._stores and self._stores["metrics"].is_flush_due:
                self.flush()
        if rejections:
            first = rejections[0]
            logger.warning(
                "rejected records count=%d first=%s: %s", len(rejections), first.field, first.reason
            )
        return AppendReport(n_accepted, tuple(rejections), n_ignored)

    def append_batch(self, batch: RecordBatch) -> None:
        """Make checked records durable; calls of several threads share one fdatasync.

        Raises:
            AlreadyRunning: another process writes this buffer.
            StorageFull, StorageBroken: none of them is kept.
        """
        if len(batch) == 0:
            return
        self._store("metrics").append(table_of_batch(batch))
        newest_ms = int(batch.timestamps_ms.max())
        with self._opening:
            self._newest_ms = newest_ms if self._newest_ms is None else max(self._newest_ms, newest_ms)

    def append_predictions(self, rows: SettledForecasts) -> None:
        """Make settled forecasts durable; the same (origin, horizon, server, metric) is one row."""
        if len(rows):
            self._store("predictions").append(table_of_settled(rows))

    def flush(self) -> None:
        """Move every accepted record into its day file."""
        for store in self._stores.values():
            store.flush()

    def maintain(self, now: datetime) -> None:
        """Do what is due at `now`: flush, compact, seal, expire. Call it about every second."""
        for store in self._stores.values():
            store.maintain(now, expires=self._expires)

    def open(self) -> None:
        """Take ownership now instead of at the first append; recovers what a crash left."""
        with self._opening:
            self._open()

    def close(self) -> None:
        """Flush and give the ownership up."""
        try:
            for store in self._stores.values():
                store.close()
        finally:
            self._stores = {}
            self._lock.release()

    def get_training_window(self, days: int = 30, include_today: bool = False) -> "pd.DataFrame":
        """Return the records of the last `days` whole UTC days, and of today if asked.

        Returns:
            timestamp, server_name and metrics, ordered by day, server and time.
        """
        import pyarrow as pa  # not needed by --help

        today_ms = to_ms(self._clock.now()) // DAY_MS * DAY_MS
        end_ms = today_ms + DAY_MS if include_today else today_ms
        tables = [table for _, table in self._metrics.read(today_ms - days * DAY_MS, end_ms)]
        whole = pa.concat_tables(tables or [METRICS.schema.empty_table()], promote_options="default")
        frame: pd.DataFrame = whole.cast(stored_schema(whole.schema)).to_pandas(split_blocks=True)
        return frame

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
        start_ms = end_ms - round(days * DAY_MS)
        return export_records(self._metrics, Path(path), start_ms, end_ms, resolution_s)

    def iter_batches(
        self, start_ms: int, end_ms: int, metrics: Sequence[str] | None = None
    ) -> Iterator[RecordBatch]:
        """Yield records with start <= time < end: day by day, sorted by server and time inside.

        A large day comes in several batches, each with all its rows of the servers in it.
        """
        for _, table in self._metrics.read(start_ms, end_ms, metrics):
            yield batch_of_table(table)

    def read_predictions(self, start_ms: int, end_ms: int, horizon: int | None = None) -> SettledForecasts:
        """Return settled forecasts with start <= target < end, sorted by target."""
        import pyarrow.compute as pc

        tables = []
        for _, table in self._predictions.read(start_ms, end_ms):
            tables.append(table if horizon is None else table.filter(pc.field("horizon") == horizon))
        whole = merged(tables, PREDICTIONS)
        order = np.argsort(whole.column("target").cast("int64").to_numpy(), kind="stable")
        return settled_of_table(whole.take(order))

    def newest_record_time(self) -> datetime | None:
        """Return the newest time of all records, None for an empty buffer."""
        newest_ms = self._newest_ms if self._stores else self._metrics.newest_ms()
        return None if newest_ms is None else from_ms(newest_ms)

    def oldest_record_time(self) -> datetime | None:
        """Return the oldest time of all records, None for an empty buffer."""
        oldest_ms = self._metrics.oldest_ms()
        return None if oldest_ms is None else from_ms(oldest_ms)

    def get_stats(self) -> dict[str, Any]:
        """Return counts as `spec.md` prints them; settled forecasts under `predictions`."""
        return {
            **buffer_stats(self._folder, METRICS),
            "predictions": buffer_stats(self._folder, PREDICTIONS),
        }

    def _store(self, kind: str) -> DayStore:
        if not self._stores:
            self.open()
        return self._stores[kind]

    def _open(self) -> None:
        """Take the lock and open both stores; the caller holds `_opening`."""
        if self._stores:
            return
        self._lock.acquire()
        try:
            stores = {
                kind.name: DayStore(self._folder, kind, self._settings) for kind in (METRICS, PREDICTIONS)
            }
            for store in stores.values():
                store.open()
            self._newest_ms = self._metrics.newest_ms()
        except BaseException:
            self._lock.release()
            raise
        self._stores = stores
        logger.info(
            "buffer opened folder=%s newest=%s", self._folder, self._newest_ms and from_ms(self._newest_ms)
        )

    def _checked(self, records: Any) -> Iterator[tuple[int, Accepted]]:
        """Yield the size of each portion of `records` and what was accepted of it."""
        rules = RecordRules.at(
            self._clock.now() if self._expires else SystemClock().now(), self._settings, expires=self._expires
        )
        if hasattr(records, "columns") and hasattr(records, "iloc"):
            columns = columns_of_frame(records)
            for start in range(0, len(records), _APPEND_ROWS):
                portion = {name: cells[start : start + _APPEND_ROWS] for name, cells in columns.items()}
                yield len(portion["timestamp"]), accept_columns(portion, rules)
            return
        if isinstance(records, (str, bytes, Mapping)) or not isinstance(records, Iterable):
            wanted = "records must be an iterable of mappings or a DataFrame"
            raise BadData(f"{wanted}, got {type(records).__name__}")
        rest = iter(records)
        while portion_of_rows := list(islice(rest, _APPEND_ROWS)):
            yield len(portion_of_rows), accept(portion_of_rows, rules)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the statistics of the buffer."""
    parser = argparse.ArgumentParser(description="Print what the data buffer holds.")
    parser.add_argument("--data-buffer-dir", help="folder of the buffer (default: ./data_buffer)")
    parser.add_argument("--config", type=Path, help="settings file (default: ./fleetcast.toml, if present)")
    options = parser.parse_args(argv)
    try:
        settings = load_settings(options.config, {"paths.data_buffer_dir": options.data_buffer_dir})
        stats = DataBuffer(settings.paths.data_buffer_dir, settings=settings.buffer).get_stats()
    except FleetcastError as error:
        print(f"data_buffer: {error}", file=sys.stderr)
        return int(error.exit_code)
    print(f"buffer       {settings.paths.data_buffer_dir}")
    for title, counts in (("records", stats), ("predictions", stats["predictions"])):
        span = counts["date_range"]
        days = f"{span['start']} to {span['end']}" if span["start"] else "no day yet"
        print(
            f"{title:<12} {counts['total_records']:,} rows in {counts['file_count']} day files,"
            f" {days}, {counts['disk_usage_mb']} MB"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
