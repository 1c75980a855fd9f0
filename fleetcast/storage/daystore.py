"""DayStore: rows of one kind on their way from the log into their days.

Owns: the log, when it becomes parts, and what is done with damage in it. Does not know: how a day is
written (`writer`), read (`reader`) or kept (`upkeep`), or what its rows mean.

Guarantees: a row is durable when `append` returns, and every reader sees it once from then on, whatever
crashes in between. One process at a time may own the folder; `DataBuffer` sees to that.
"""

import logging
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

import pyarrow as pa

from fleetcast.clock import monotonic
from fleetcast.errors import CorruptFile, FleetcastError, UnknownFormat
from fleetcast.files import fsync_dir, storage_error
from fleetcast.settings import BufferSettings
from fleetcast.storage.days import Drops, Quarantine, split_by_day
from fleetcast.storage.log import (
    Segment,
    SegmentContent,
    WriteAheadLog,
    decode_payloads,
    encode_table,
    read_segment,
    segments,
)
from fleetcast.storage.reader import log_folder
from fleetcast.storage.retention import MonthsUpkeep, Retention
from fleetcast.storage.tables import METRICS, TableKind, merge
from fleetcast.storage.upkeep import DayUpkeep, UpkeepPace
from fleetcast.storage.writer import DayWriter, Step, no_step

logger = logging.getLogger(__name__)

SEGMENT_CELLS_MAX = 2**22  # a segment is read back as one table of its rows times all its columns
PART_ROWS = (
    1_000  # of a part that costs about as much CPU as its rows in the log (benchmarks/buffer/buffer.py)
)
LARGE_FLEET_S = 60.0  # longest wait of that many rows
_LEAD_S = 15.0  # a publication begins so long before the wait is over, as it may wait for a join itself
RETRY_S = 5.0  # after a failure; a full disk needs no attempt per second


def publish_after_s(settings: BufferSettings, n_rows: int) -> float:
    """Return how old the oldest of so many rows in the log gets before they become parts.

    >>> [publish_after_s(BufferSettings(), n_rows) for n_rows in (999, 1_000, 10_000)]
    [285.0, 45.0, 0.0]
    """
    if n_rows >= settings.publish_records:
        return 0.0
    wait_s = settings.publish_s if n_rows < PART_ROWS else min(settings.publish_s, LARGE_FLEET_S)
    return wait_s - min(_LEAD_S, wait_s / 4)


class DayStore:
    """The owner of one kind's rows; `append` is thread safe, the others may be called from any thread."""

    def __init__(
        self,
        folder: Path,
        kind: TableKind,
        settings: BufferSettings,
        pace: UpkeepPace | None = None,
        on_step: Step = no_step,
        guard: Callable[[], None] = lambda: None,
        retention: Retention | None = None,
    ) -> None:
        """Remember what to keep where; `guard` raises where the folder is not this process's any more."""
        self.kind = kind
        self._guard = guard
        self._folder = folder
        self._settings = settings
        self._step = on_step
        self._quarantine = Quarantine(folder / "quarantine")
        self._writer = DayWriter(folder, kind, self._quarantine, on_step)
        self._upkeep = DayUpkeep(
            folder,
            self._writer,
            kind,
            partial((retention or Retention(folder, settings)).expiry, folder, kind),
            pace or UpkeepPace(),
            self._settle,
            on_step,
        )
        self._months = None
        if kind is METRICS:
            self._months = MonthsUpkeep(
                folder,
                self._writer,
                settings.archive_after_days,
                (pace or UpkeepPace()).archive_interval_s,
                on_step,
                self._upkeep.look_at_means,
            )
        self._structure = threading.RLock()  # held while days change; never while appending
        self._pending = threading.Lock()
        self._n_pending = self._segment_rows = 0
        self._segment_columns: set[str] = set()
        self._pending_since = 0.0
        self._log: WriteAheadLog | None = None
        self._retry_at = 0.0
        self._drops: Drops = {}  # whose rows the log does not hold any more

    @property
    def pending_s(self) -> float:
        """How long the oldest row in the log, durable but not yet in its day, has waited; 0.0: none."""
        with self._pending:
            return monotonic() - self._pending_since if self._n_pending else 0.0

    def open(self) -> None:
        """Take over the folder: clean up after a crash, make parts of what the log still holds.

        Raises:
            UnknownFormat: the log was written by a newer version.
            StorageFull, StorageBroken, CannotStart: the folder cannot be written.
        """
        folder = log_folder(self._folder, self.kind)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(folder, error) from error
        self._writer.recover()
        numbers = [segment.number for segment in segments(folder)]
        self._log = WriteAheadLog(folder, max([self._writer.newest_number(), *numbers]) + 1, self._guard)
        if self._months:
            self._months.load()
        self._upkeep.load()
        self._apply_segments(self._log.rotate())

    def append(self, table: pa.Table) -> None:
        """Make rows durable; see `append_payload`."""
        self.append_payload(encode_table(table), len(table), table.column_names)

    def append_payload(self, payload: bytes, n_rows: int, columns: Collection[str] = ()) -> None:
        """Make encoded rows (`log.py`) durable; readers see them when this returns.

        Args:
            columns: names of the rows' metrics. One row of 500 of them in a segment of many rows of one
                metric made its table 3.4 GB large.
        Raises:
            StorageFull, StorageBroken: none of them is kept.
        """
        assert self._log is not None, "open() comes first"
        if self._would_be_wide(n_rows, columns):
            self._log.rotate()
        self._log.append(payload)
        with self._pending:
            if self._n_pending == 0:
                self._pending_since = monotonic()
            self._n_pending += n_rows

    def _would_be_wide(self, n_rows: int, columns: Collection[str]) -> bool:
        """Note rows of the open segment; return whether they had better begin the next one."""
        with self._pending:
            names, rows = self._segment_columns.union(columns), self._segment_rows + n_rows
            is_wide = self._segment_rows > 0 and rows * len(names) > SEGMENT_CELLS_MAX
            self._segment_columns, self._segment_rows = (set(columns), n_rows) if is_wide else (names, rows)
        return is_wide

    @property
    def is_flush_due(self) -> bool:
        """Whether the log has waited long enough, or is long enough, to become parts."""
        n_rows = self._n_pending
        age_s = monotonic() - self._pending_since
        return n_rows > 0 and age_s >= publish_after_s(self._settings, n_rows)

    def flush(self) -> int:
        """Move every row of the log into its day; return how many rows moved."""
        if self._log is None:
            return 0
        self._guard()
        with self._structure:
            with self._pending:  # before the rotation: a row counted too late costs an empty flush
                self._n_pending = self._segment_rows = 0
                self._segment_columns = set()
            return self._apply_segments(self._log.rotate())

    def maintain(self, now: datetime, *, expires: bool) -> None:
        """Do what is due: flush, compact, seal, expire. Cheap when nothing is."""
        if self._log is None or monotonic() < self._retry_at:
            return
        self._guard()
        with self._retry_later():
            # rows that came late for a day that is about to be sealed belong in its file
            if self.is_flush_due or (self._n_pending and self._upkeep.day_to_seal(now)):
                self.flush()
            with self._structure:
                self._upkeep.run(now, expires=expires)
                if self._months:
                    self._months.run(now)

    def forget(self, drops: Drops, now: datetime) -> bool:
        """Take one step towards days without the rows of some servers; return whether none has any.

        Args:
            drops: see `DayUpkeep.forget`.
        Raises:
            StorageFull, StorageBroken: call it again.
        """
        if self._log is None or monotonic() < self._retry_at:
            return False
        self._guard()
        with self._retry_later():
            if drops != self._drops:
                self.flush()
                self._drops = dict(drops)
            with self._structure:
                is_done = self._months is None or self._months.forget(drops)
                is_done = is_done and self._upkeep.forget(drops, now)
        return is_done

    @contextmanager
    def _retry_later(self) -> Iterator[None]:
        """Where it fails, let nothing of the upkeep be tried for a while."""
        try:
            yield
        except (FleetcastError, OSError) as error:
            self._retry_at = monotonic() + RETRY_S
            if isinstance(error, OSError):
                raise storage_error(self._folder, error) from error
            raise

    def close(self) -> None:
        """Flush, stop a running sealing, give up the log."""
        if self._log is None:
            return
        try:
            self.flush()
        finally:
            self._upkeep.stop()
            if self._months:
                self._months.stop()
            self._log.close()
            self._log = None

    def _settle(self) -> None:
        """Make it durable that applied segments are gone.

        Until then a power cut can bring one back, which does no harm while its parts have its number.
        So this is due before parts are joined, and where a segment only changed older parts; not at
        every flush, where a sync of the folder is a fifth of the cost.
        """
        folder = log_folder(self._folder, self.kind)
        try:
            fsync_dir(folder)
        except OSError as error:
            raise storage_error(folder, error) from error

    def _apply_segments(self, end: int) -> int:
        """Make parts of all segments with a number below `end`; the log writes to newer ones."""
        n_rows = 0
        for segment in segments(log_folder(self._folder, self.kind)):
            if segment.number >= end:
                continue
            try:
                content = read_segment(segment.path)
            except (
                OSError,
                CorruptFile,
            ) as error:  # must not cost the other segments; the next flush tries again
                logger.error("cannot read a log segment path=%s error=%s", segment.path, error)
                continue
            n_rows += self._apply(segment, content)
        return n_rows

    def _apply(self, segment: Segment, content: SegmentContent) -> int:
        """Add one closed segment's rows to their days, then delete it."""
        table = merge([self._rows(segment, content)], self.kind)
        self._step("segment read")
        by_day = split_by_day(table, self.kind)
        is_numbered = True
        for day, rows in by_day.items():
            is_numbered &= self._writer.add(day, rows, segment.number)
            self._upkeep.note_change(day)
        try:
            segment.path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(segment.path, error) from error
        if not is_numbered:
            self._settle()
        self._step("segment removed")
        if len(table):
            logger.info(
                "buffer flushed kind=%s rows=%d days=%d segment=%d",
                self.kind.name,
                len(table),
                len(by_day),
                segment.number,
            )
        return len(table)

    def _rows(self, segment: Segment, content: SegmentContent) -> pa.Table:
        """Return the rows of a segment; what cannot be read goes to the quarantine."""
        if content.is_newer_format:
            raise UnknownFormat(
                segment.path, "written by a newer version", hint="run that version, or move it away"
            )
        for damage in content.damages:
            self._quarantine.keep_bytes(f"{self.kind.name}-{segment.path.name}-{damage.offset}", damage.data)
        if content.torn_bytes:
            logger.warning(
                "dropped an unfinished frame segment=%s size_bytes=%d", segment.path, content.torn_bytes
            )

        def keep(payload: bytes, error: Exception) -> None:
            logger.error("undecodable frame segment=%s error=%s", segment.path, error)
            self._quarantine.keep_bytes(f"{self.kind.name}-{segment.path.name}-frame", payload)

        return decode_payloads(content.payloads, self.kind, keep)
