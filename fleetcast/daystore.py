"""DayStore: rows of one kind on their way from the log to sealed day files.

Owns: when the log becomes parts, when parts are compacted, when a day is sealed or expires.
Does not know: how a day is written (`daywriter`), read (`dayreader`) or what its rows mean.

Guarantees: a row is durable when `append` returns and every reader sees it once from then on,
whatever crashes in between. One process at a time may own the folder (its `OwnerLock`).
"""

import logging
import threading
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa

from fleetcast.clock import monotonic, to_ms
from fleetcast.daybuild import Step, hidden_name, no_step
from fleetcast.dayfiles import DAY_MS, day_of_ms, day_start_ms, folder_bytes, list_days, part_names
from fleetcast.dayreader import decode_frame, encode_frame, log_folder
from fleetcast.daywriter import DayWriter
from fleetcast.errors import FleetcastError, UnknownFormat
from fleetcast.files import fsync_dir, storage_error
from fleetcast.parts import READ_ERRORS
from fleetcast.quarantine import Quarantine
from fleetcast.sealing import SealProcess
from fleetcast.settings import BufferSettings
from fleetcast.tables import TableKind, merged, times_ms
from fleetcast.wal import Segment, WriteAheadLog, read_segment, segments

logger = logging.getLogger(__name__)

COMPACT_PARTS = 60
COMPACT_INTERVAL_S = 3600.0
SEAL_GRACE = timedelta(minutes=10)  # by the owner's clock, for late rows
SEAL_QUIET_S = 60.0  # wall time without a new part, before the first sealing
RESEAL_QUIET_S = 600.0  # the same after a failure
EXPIRE_INTERVAL_S = 60.0
RETRY_S = 5.0


@dataclass(slots=True)
class OpenDay:
    """What the store remembers of a day that is a folder of parts; times are wall seconds."""

    changed_at: float
    n_new_parts: int = 0
    compacted_at: float = 0.0
    seal_after: float = 0.0


class DayStore:
    """The owner of one kind's rows; `append` is thread safe, the others may be called from any thread."""

    def __init__(
        self, folder: Path, kind: TableKind, settings: BufferSettings, on_step: Step = no_step
    ) -> None:
        self.kind = kind
        self._folder = folder
        self._settings = settings
        self._step = on_step
        self._quarantine = Quarantine(folder / "quarantine")
        self._writer = DayWriter(folder, kind, self._quarantine, on_step)
        self._structure = threading.RLock()  # held while days change; never while appending
        self._pending = threading.Lock()
        self._n_pending = 0
        self._pending_since = 0.0
        self._log: WriteAheadLog | None = None
        self._open_days: dict[date, OpenDay] = {}
        self._sealer: SealProcess | None = None
        self._expire_at = 0.0
        self._retry_at = 0.0

    @property
    def n_pending(self) -> int:
        """Rows that are durable in the log but not yet in their day."""
        return self._n_pending

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
        days = list_days(self._folder, self.kind)
        paths = [self._writer.path(day) for day in days]
        numbers = [name.number for path in paths for name in part_names(path)]
        numbers += [segment.number for segment in segments(folder)]
        self._log = WriteAheadLog(folder, max(numbers, default=0) + 1)
        now = monotonic()
        for day, path in zip(days, paths, strict=True):
            if path.is_dir():
                self._open_days[day] = OpenDay(now, len(part_names(path)), now)
        self._apply_segments()

    def append(self, table: pa.Table) -> None:
        """Make rows durable; they are seen by readers when this returns.

        Raises:
            StorageFull, StorageBroken: none of them is kept.
        """
        assert self._log is not None, "open() comes first"
        self._log.append(encode_frame(table))
        with self._pending:
            if self._n_pending == 0:
                self._pending_since = monotonic()
            self._n_pending += len(table)

    @property
    def is_flush_due(self) -> bool:
        """Whether the log has waited long enough, or is long enough, to become parts."""
        if self._n_pending == 0:
            return False
        age_s = monotonic() - self._pending_since
        return self._n_pending >= self._settings.flush_records or age_s >= self._settings.flush_interval_s

    def flush(self) -> int:
        """Move every row of the log into its day; return how many rows moved."""
        if self._log is None:
            return 0
        with self._structure:
            with self._pending:  # before the rotation: a row counted too late costs an empty flush
                self._n_pending = 0
            self._log.rotate()
            return self._apply_segments()

    def maintain(self, now: datetime, *, expires: bool) -> None:
        """Do what is due: flush, compact, seal, expire. Cheap when nothing is."""
        if self._log is None or monotonic() < self._retry_at:
            return
        try:
            if self.is_flush_due:
                self.flush()
            with self._structure:
                self._compact_due()
                self._seal_due(now)
                if expires and monotonic() >= self._expire_at:
                    self._expire(now)
        except FleetcastError:
            self._retry_at = monotonic() + RETRY_S  # a full disk needs no attempt per second
            raise

    def close(self) -> None:
        """Flush, stop a running sealing, give up the log."""
        if self._log is None:
            return
        try:
            self.flush()
        finally:
            if self._sealer is not None:
                self._sealer.stop()
                self._sealer = None
            self._log.rotate()
            self._log = None

    def _apply_segments(self) -> int:
        assert self._log is not None
        n_rows = 0
        for segment in segments(log_folder(self._folder, self.kind)):
            if segment.number != self._log.open_number:
                n_rows += self._apply(segment)
        return n_rows

    def _apply(self, segment: Segment) -> int:
        """Add one closed segment's rows to their days, then delete it."""
        table = merged(self._read(segment), self.kind)
        self._step("segment read")
        days = times_ms(table, self.kind.time_column) // DAY_MS
        for number in np.unique(days).tolist():
            day = day_of_ms(number * DAY_MS)
            self._writer.add(day, table.filter(pa.array(days == number)), segment.number)
            self._note_change(day)
        try:
            segment.path.unlink(missing_ok=True)
            fsync_dir(segment.path.parent)
        except OSError as error:
            raise storage_error(segment.path, error) from error
        self._step("segment removed")
        if len(table):
            logger.info(
                "buffer flushed kind=%s rows=%d days=%d segment=%d",
                self.kind.name,
                len(table),
                len(np.unique(days)),
                segment.number,
            )
        return len(table)

    def _read(self, segment: Segment) -> list[pa.Table]:
        """Return the rows of a segment; what cannot be read goes to the quarantine."""
        content = read_segment(segment.path)
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
        tables = []
        for place, payload in enumerate(content.payloads):
            try:
                tables.append(decode_frame(payload, self.kind))
            except READ_ERRORS as error:
                self._quarantine.keep_bytes(f"{self.kind.name}-{segment.path.name}-frame{place}", payload)
                logger.error("undecodable frame segment=%s place=%d error=%s", segment.path, place, error)
        return tables

    def _note_change(self, day: date) -> None:
        now = monotonic()
        state = self._open_days.setdefault(day, OpenDay(now, 0, now))
        state.changed_at = now
        state.n_new_parts += 1

    def _compact_due(self) -> None:
        now = monotonic()
        for day, state in self._open_days.items():
            is_old = state.n_new_parts > 1 and now - state.compacted_at >= COMPACT_INTERVAL_S
            if state.n_new_parts >= COMPACT_PARTS or is_old:
                if self._writer.compact(day):
                    logger.info("buffer compacted kind=%s day=%s", self.kind.name, day)
                state.n_new_parts = 0
                state.compacted_at = now

    def _seal_due(self, now: datetime) -> None:
        if self._sealer is not None:
            if not self._sealer.is_running:
                self._finish_seal(self._sealer)
                self._sealer = None
            return
        wall = monotonic()
        over = to_ms(now - SEAL_GRACE)
        for day, state in sorted(self._open_days.items()):
            is_over = day_start_ms(day) + DAY_MS <= over
            if is_over and wall - state.changed_at >= SEAL_QUIET_S and wall >= state.seal_after:
                target = hidden_name(self._writer.path(day))
                self._sealer = SealProcess(self._folder, self.kind.name, day, target)
                self._step("seal started")
                return

    def _finish_seal(self, process: SealProcess) -> None:
        state = self._open_days[process.day]
        sealed = process.result()
        if sealed is None:
            state.seal_after = monotonic() + RESEAL_QUIET_S
            return
        if list(sealed.parts) != part_names(self._writer.path(process.day)):
            sealed.path.unlink(missing_ok=True)  # late rows came meanwhile: seal again later
            return
        self._writer.put_sealed(process.day, sealed.path)
        del self._open_days[process.day]
        logger.info(
            "buffer sealed kind=%s day=%s rows=%d size_bytes=%d",
            self.kind.name,
            process.day,
            sealed.n_rows,
            folder_bytes(self._writer.path(process.day)),
        )

    def _expire(self, now: datetime) -> None:
        self._expire_at = monotonic() + EXPIRE_INTERVAL_S
        oldest = (now - timedelta(days=self._settings.retention_days)).date()
        for day in list_days(self._folder, self.kind):
            if day < oldest:
                self._remove(day, "older than the retention")

    def _remove(self, day: date, why: str) -> None:
        if self._sealer is not None and self._sealer.day == day:
            self._sealer.stop()
            self._sealer = None
        self._writer.remove(day)
        self._open_days.pop(day, None)
        logger.info("buffer expired kind=%s day=%s why=%s", self.kind.name, day, why)
