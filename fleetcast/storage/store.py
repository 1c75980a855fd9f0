"""DataBuffer: the memory of the product, in daily Parquet files that lose nothing.

Owns: the buffer's interface as `spec.md` prints it (append, flush, windows, export, statistics), the
folder's lock, opening and closing its two kinds of rows together. Does not know: HTTP, how bins close,
models. The files are described in `docs/formats.md`.
"""

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa

from fleetcast.clock import DAY_MS, Clock, SystemClock, from_ms, to_ms
from fleetcast.errors import BadData, FleetcastError
from fleetcast.ingest.records import Accepted, RecordRules, accept, accept_columns
from fleetcast.locks import OwnerLock
from fleetcast.schema import RecordBatch, Rejection, SettledForecasts
from fleetcast.settings import BufferSettings
from fleetcast.storage.days import Drops, list_days
from fleetcast.storage.daystore import DayStore
from fleetcast.storage.log import encode_batch, encode_nothing
from fleetcast.storage.reader import DayReader, buffer_stats, export_records
from fleetcast.storage.retention import Retention
from fleetcast.storage.tables import (
    METRICS,
    PREDICTIONS,
    batch_of_table,
    cells,
    choose,
    columns_of_frame,
    in_order,
    merge,
    settled_of_table,
    stored_schema,
    table_of_settled,
    times_ms,
)
from fleetcast.storage.upkeep import UpkeepPace
from fleetcast.storage.writer import Step, no_step

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

LOCK_NAME = ".owner.lock"
_END_OF_TIME_MS = 2**53
_NO_ROWS = encode_nothing(METRICS.schema)
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
        pace: UpkeepPace | None = None,
        on_step: Step = no_step,
    ) -> None:
        """Remember where the buffer is.

        Args:
            settings: where given, its `retention_days` holds.
            clock: decides what "today" is.
            expire: False keeps every day and accepts records of any age (the data clock).
            pace, on_step: how often the days are tidied, and what a test does between two steps.
        """
        self._folder = Path(buffer_dir)
        self._settings = settings or BufferSettings(retention_days=retention_days)
        self._clock = clock or SystemClock()
        self._expires = expire
        self._pace, self._on_step = pace, on_step
        self._records = DayReader(self._folder, METRICS)
        self._forecasts = DayReader(self._folder, PREDICTIONS)
        self._opening = threading.Lock()
        self._owned: _Owned | None = None

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
        for size, accepted in self._check(records):
            self.append_batch(accepted.batch)
            n_accepted += len(accepted.batch)
            n_ignored += accepted.ignored_text_fields
            rejections += [Rejection(r.index + n_seen, r.field, r.reason) for r in accepted.rejections]
            n_seen += size
            self._flush_if_due()
        if rejections:
            first = rejections[0]
            why = f"{first.field} {first.reason}".strip()
            logger.warning("rejected records count=%d first=%d: %s", len(rejections), first.index, why)
        return AppendReport(n_accepted, tuple(rejections), n_ignored)

    def append_batch(self, batch: RecordBatch) -> None:
        """Make checked records durable; calls of several threads share one fdatasync.

        Raises:
            AlreadyRunning: another process writes this buffer.
            StorageFull, StorageBroken: none of them is kept.
        """
        if len(batch):
            owned = self._own()
            owned.metrics.append_payload(encode_batch(batch), len(batch), batch.metrics)
            owned.note_time(int(batch.timestamps_ms.max()))

    def probe(self) -> None:
        """Write a frame without rows to the log: durable on the way that records take, and seen by no reader.

        Raises:
            StorageFull, StorageBroken: records cannot be stored now, either.
        """
        self._own().metrics.append_payload(_NO_ROWS, 0)

    def append_predictions(self, rows: SettledForecasts) -> None:
        """Make settled forecasts durable; the same (origin, horizon, server, metric) is one row."""
        if len(rows):
            self._own().predictions.append(table_of_settled(rows))

    def flush(self) -> None:
        """Move every accepted record into its day file."""
        for store in self._stores:
            store.flush()

    @property
    def pending_s(self) -> float:
        """How long the oldest record that is not yet in its day file has waited, 0.0 if none does."""
        return self._owned.metrics.pending_s if self._owned else 0.0

    @property
    def retention_notice(self) -> str:
        """What a smaller retention is going to delete, and when; "" while none waits."""
        return self._owned.retention.notice if self._owned else ""

    def maintain(self, now: datetime) -> None:
        """Do what is due at `now`: flush, compact, seal, expire. Call it about every second."""
        for store in self._stores:
            store.maintain(now, expires=self._expires)

    def forget(self, drops: Drops, now: datetime) -> bool:
        """Take one step towards days without some servers; return whether nothing of them is left.

        Call it with the same `drops` until it returns True; after a crash, begin again: what was
        rewritten is recognised.

        Args:
            drops: names, each with the time (ms) before which rows of it go.
        Raises:
            StorageFull, StorageBroken: call it again later.
        """
        owned = self._own()
        is_done = [store.forget(drops, now) for store in self._stores]
        if not all(is_done):
            return False
        owned.newest_ms = self._records.newest_ms()
        return True

    def open(self) -> Self:
        """Take ownership now instead of at the first append; recovers what a crash left.

        Raises:
            AlreadyRunning: another process writes this buffer.
            CannotStart, StorageFull, StorageBroken: the folder cannot be written.
            UnknownFormat: the log was written by a newer version.
        """
        self._own()
        return self

    def check_ownership(self) -> None:
        """Make sure that this process still is the folder's only writer; without ownership, do nothing.

        Raises:
            OwnershipLost: it is not; nothing more may be written.
        """
        if self._owned is not None:
            self._owned.lock.check()

    def close(self) -> None:
        """Flush and give the ownership up."""
        with self._opening:
            owned, self._owned = self._owned, None
        if owned is None:
            return
        with contextlib.ExitStack() as steps:  # each step is taken, whatever the others raise
            steps.callback(owned.lock.release)
            steps.callback(owned.metrics.close)
            steps.callback(owned.predictions.close)

    @property
    def _stores(self) -> tuple[DayStore, ...]:
        return (self._owned.metrics, self._owned.predictions) if self._owned else ()

    def _own(self) -> "_Owned":
        with self._opening:
            if self._owned is None:
                self._owned = self._take_over()
            return self._owned

    def _take_over(self) -> "_Owned":
        lock = OwnerLock(self._folder / LOCK_NAME, f"the buffer {self._folder}", self._folder).acquire()

        def guard() -> None:
            if not lock.is_in_place:
                lock.check()

        retention = Retention(self._folder, self._settings)
        try:
            metrics, predictions = (
                DayStore(self._folder, kind, self._settings, self._pace, self._on_step, guard, retention)
                for kind in (METRICS, PREDICTIONS)
            )
            metrics.open()
            predictions.open()
            owned = _Owned(lock, metrics, predictions, retention, self._records.newest_ms())
        except BaseException:
            lock.release()
            raise
        logger.info("buffer opened folder=%s newest_ms=%s", self._folder, owned.newest_ms)
        return owned

    def leave_out(self, servers: Callable[[], Container[str]]) -> Self:
        """Pass over the rows of these servers wherever rows of all servers are read; return self.

        Args:
            servers: their names at the moment of reading, or `exclusions.AllBut`. `read_server` still finds
                each of them.
        """
        self._records.left_out = self._forecasts.left_out = servers
        return self

    def get_training_window(self, days: int = 30, include_today: bool = False) -> "pd.DataFrame":
        """Return the records of the last `days` whole UTC days, and of today if asked.

        Returns:
            timestamp, server_name and metrics, ordered by day, server and time.
        """
        today_ms = to_ms(self._clock.now()) // DAY_MS * DAY_MS
        end_ms = today_ms + (DAY_MS if include_today else 0)
        tables = [table for _, table in self._records.read(today_ms - days * DAY_MS, end_ms)]
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
        return export_records(self._records, Path(path), start_ms, end_ms, resolution_s)

    def iter_batches(
        self, start_ms: int, end_ms: int, metrics: Sequence[str] | None = None
    ) -> Iterator[RecordBatch]:
        """Yield records with start <= time < end: day by day, sorted by server and time inside.

        A large day comes in several batches, each with all its rows of the servers in it.
        """
        for _, table in self._records.read(start_ms, end_ms, metrics):
            yield batch_of_table(table)

    def iter_by_bins(
        self, start_ms: int, end_ms: int, bin_ms: int, metrics: Sequence[str] | None = None
    ) -> Iterator[RecordBatch]:
        """Yield the same records, day by day: all that a server has of a bin in one batch, in any order."""
        for _, table in self._records.read_by_bins(start_ms, end_ms, bin_ms, metrics):
            yield batch_of_table(table)

    def iter_bins(
        self, start_ms: int, end_ms: int, bin_ms: int, metrics: Sequence[str] | None = None
    ) -> Iterator[RecordBatch]:
        """Yield the means of the bins of the same records, each at the start of its bin.

        They are `bin_means` of what `iter_batches` yields, sooner where a sealed day has kept them.
        """
        for _, table in self._records.read_bins(start_ms, end_ms, bin_ms, metrics):
            yield batch_of_table(table)

    def read_newest(self, start_ms: int, end_ms: int, bin_ms: int) -> RecordBatch | None:
        """Return each server's newest value of each metric, at its time, of the rest of a sealed day.

        None where the day has not kept them, or goes on after `end_ms`: `iter_batches` has the records.
        """
        table = self._records.read_newest(start_ms, end_ms, bin_ms)
        return None if table is None else batch_of_table(table)

    def read_server(
        self, server_name: str, start_ms: int, end_ms: int, metrics: Sequence[str]
    ) -> RecordBatch:
        """Return the records of one server with start <= time < end, sorted by time."""
        return batch_of_table(self._records.read_server(server_name, start_ms, end_ms, metrics))

    def has_server(self, server_name: str) -> bool:
        """Return whether a record or a settled forecast of a server is stored."""
        readers = (self._records, self._forecasts)
        return any(len(reader.read_server(server_name, 0, _END_OF_TIME_MS, [])) for reader in readers)

    def newest_names(self, days: int = 1, bin_ms: int = DAY_MS) -> list[str]:
        """Return the servers of the newest days of records, sorted.

        Args:
            bin_ms: sooner if it is the length of the bins whose means sealed days keep.
        """
        newest_ms = self._records.newest_ms()
        if newest_ms is None:
            return []
        end_ms = newest_ms // DAY_MS * DAY_MS + DAY_MS
        batches = self.iter_bins(end_ms - days * DAY_MS, end_ms, bin_ms, [])
        return sorted({name for batch in batches for name in batch.server_names})

    def read_server_predictions(self, server_name: str, start_ms: int, end_ms: int) -> SettledForecasts:
        """Return the settled forecasts of one server with start <= target < end."""
        return settled_of_table(self._forecasts.read_server(server_name, start_ms, end_ms))

    def read_predictions(self, start_ms: int, end_ms: int, horizon: int | None = None) -> SettledForecasts:
        """Return settled forecasts with start <= target < end, sorted by target."""
        tables = []
        for _, table in self._forecasts.read(start_ms, end_ms):
            if horizon is not None:
                table = choose(table, cells(table.column("horizon"), np.int32) == horizon)
            tables.append(table)
        whole = merge(tables, PREDICTIONS)
        order = np.argsort(times_ms(whole, "target"), kind="stable")
        return settled_of_table(in_order(whole, order))

    @property
    def folder(self) -> Path:
        """Return the folder of the buffer, absolute."""
        return self._folder.resolve()

    @property
    def exists(self) -> bool:
        """Whether the folder holds anything."""
        return self._folder.is_dir() and any(self._folder.iterdir())

    def describe(self) -> str:
        """Name the folder for people, and say where there is no buffer in it."""
        return f"{self.folder}" if self.exists else f"{self.folder} (there is no buffer)"

    def metric_names(self) -> list[str]:
        """Return the metrics of all records, sorted, from footers and the log."""
        return self._records.metric_names(0, _END_OF_TIME_MS)

    def first_day(self) -> date | None:
        """Return the oldest day that has files; a later one than before means that days were dropped."""
        return min(list_days(self._folder, METRICS), default=None)

    def newest_record_time(self) -> datetime | None:
        """Return the newest time of all records, None for an empty buffer."""
        newest_ms = self._owned.newest_ms if self._owned else self._records.newest_ms()
        return None if newest_ms is None else from_ms(newest_ms)

    def oldest_record_time(self) -> datetime | None:
        """Return the oldest time of all records, None for an empty buffer."""
        oldest_ms = self._records.oldest_ms()
        return None if oldest_ms is None else from_ms(oldest_ms)

    def get_stats(self) -> dict[str, Any]:
        """Return counts as `spec.md` prints them; those of settled forecasts under `predictions`."""
        return {
            **buffer_stats(self._folder, METRICS),
            "predictions": buffer_stats(self._folder, PREDICTIONS),
        }

    def _flush_if_due(self) -> None:
        """Flush; a failure is no failure of the append, whose records are durable in the log."""
        try:
            if self._owned is not None and self._owned.metrics.is_flush_due:
                self.flush()
        except FleetcastError as error:
            logger.error("buffer cannot flush now, the records stay in the log error=%s", error)

    def _check(self, records: Any) -> Iterator[tuple[int, Accepted]]:
        """Yield the size of each portion of `records` and what was accepted of it."""
        now = self._clock.now() if self._expires else SystemClock().now()
        rules = RecordRules.at(now, self._settings, expires=self._expires)
        if hasattr(records, "columns") and hasattr(records, "iloc"):
            columns = columns_of_frame(records)
            for start in range(0, len(records), _APPEND_ROWS):
                portion = {name: cells[start : start + _APPEND_ROWS] for name, cells in columns.items()}
                yield len(portion["timestamp"]), accept_columns(portion, rules, _APPEND_ROWS)
            return
        if isinstance(records, (str, bytes, Mapping)) or not isinstance(records, Iterable):
            wanted = "records must be an iterable of mappings or a DataFrame"
            raise BadData(f"{wanted}, got {type(records).__name__}")
        rest = iter(records)
        while rows := list(islice(rest, _APPEND_ROWS)):
            yield len(rows), accept([_as_in_a_frame(row) for row in rows], rules, _APPEND_ROWS)


def _as_in_a_frame(record: object) -> object:
    """Return a record with None for NaN, as pandas writes what is absent (`to_dict("records")`)."""
    if not isinstance(record, Mapping):
        return record
    return {
        name: None if isinstance(cell, float) and math.isnan(cell) else cell for name, cell in record.items()
    }


@dataclass
class _Owned:
    """What the one process that writes the folder holds."""

    lock: OwnerLock
    metrics: DayStore
    predictions: DayStore
    retention: Retention
    newest_ms: int | None  # newest time of all records
    _noting: threading.Lock = field(default_factory=threading.Lock)

    def note_time(self, time_ms: int) -> None:
        """Take the time of a durable record into account; any thread may call."""
        with self._noting:
            self.newest_ms = time_ms if self.newest_ms is None else max(self.newest_ms, time_ms)
