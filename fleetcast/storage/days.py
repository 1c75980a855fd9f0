"""The day files of a folder: which there are, and consistent snapshots of one day.

Owns: `<kind>_YYYY-MM-DD.parquet` as a sealed file or as a folder of parts, `<kind>_YYYY-MM.parquet` as what
holds the days that have neither, how all parts of a day are opened at one instant while a writer swaps
them, the quarantine (`data_buffer/quarantine/`), where damaged bytes and foreign files are kept for people
to look at, which rows are of servers that are being forgotten.
Does not know: Parquet (`parts`), the log.
"""

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fleetcast.clock import BIN_EPOCH, DAY_MS
from fleetcast.files import fsync_dir
from fleetcast.storage.parts import READ_ERRORS, OpenPart, PartName, PartRows
from fleetcast.storage.tables import (
    Flags,
    TableKind,
    choose,
    codes_of,
    concatenate,
    in_order,
    times_ms,
)

logger = logging.getLogger(__name__)

COLUMNS_FILE = "00-columns.parquet"  # sorts first: readers of the folder take their columns from it


def servers_between(table: pa.Table, kind: TableKind, first: str | None, last: str | None) -> pa.Table:
    """Return the rows of servers from `first` to `last`; None is no bound."""
    if first is None or last is None or len(table) == 0:
        return table
    names, codes = codes_of(table.column(kind.key[0]))
    wanted = np.array([first <= str(name) <= last for name in names], dtype=np.bool_)
    return choose(table, wanted[codes])


def whole_servers(tables: Iterator[pa.Table], kind: TableKind) -> Iterator[pa.Table]:
    """Yield sorted tables cut anew, so that no server is spread over two of them."""
    held: pa.Table | None = None
    for table in tables:
        if len(table) == 0:
            continue
        if held is None:
            held = table
            continue
        _, codes = codes_of(held.column(kind.key[0]))
        others = np.flatnonzero(codes != codes[-1])
        n_ready = int(others[-1]) + 1 if len(others) else 0
        if n_ready:
            yield held.slice(0, n_ready)
        held = concatenate([held.slice(n_ready), table], kind)
    if held is not None:
        yield held


Drops = Mapping[str, int]  # servers that are being forgotten: their rows from before this time (ms) go


def is_forgotten(table: pa.Table, kind: TableKind, drops: Drops) -> Flags:
    """Return which rows are of a server in `drops` and from before its time."""
    names, codes = codes_of(table.column("server_name"))
    never = -(2**62)
    ends = np.array([drops.get(name, never) if name else never for name in names], dtype=np.int64)
    return np.asarray(times_ms(table, kind.time_column) < ends[codes])


def without_forgotten(tables: Iterable[pa.Table], kind: TableKind, drops: Drops) -> Iterator[pa.Table]:
    """Yield the tables without those rows; none that is left empty."""
    for table in tables:
        kept = choose(table, ~is_forgotten(table, kind, drops)) if drops else table
        if len(kept):
            yield kept


def holds_forgotten(part: OpenPart, kind: TableKind, drops: Drops) -> bool:
    """Whether a part has such a row; only row groups that can hold one of the servers are read."""
    span = part.time_range_ms()
    if not drops or (span is not None and span[0] >= max(drops.values())):
        return False
    groups = sorted({group for name in drops for group in part.groups((name, name))})
    return any(is_forgotten(table, kind, drops).any() for table in part.tables([], groups))


DAYS_NOTE = "fleetcast.days"
_HELD_ROWS = 524_288  # of days of a month that are read together
_NO_FILE = (errno.ELOOP, errno.ENXIO)  # opening a link to itself, or a socket
_RETRIES = 50  # each one means that the writer swapped the day just then


def day_path(folder: Path, kind: TableKind, day: date) -> Path:
    """Return the public path of a day."""
    return folder / f"{kind.name}_{day.isoformat()}.parquet"


def day_of_ms(milliseconds: int) -> date:
    """Return the UTC day of a time.

    >>> day_of_ms(86_400_000)
    datetime.date(1970, 1, 2)
    """
    return (BIN_EPOCH + timedelta(days=milliseconds // DAY_MS)).date()


def day_start_ms(day: date) -> int:
    """Return the first millisecond of a UTC day."""
    return (day - BIN_EPOCH.date()).days * DAY_MS


def split_by_day(table: pa.Table, kind: TableKind) -> dict[date, pa.Table]:
    """Return the rows of each UTC day, oldest first; their order stays."""
    numbers = times_ms(table, kind.time_column) // DAY_MS
    if len(numbers) and numbers.min() == numbers.max():
        return {day_of_ms(int(numbers[0]) * DAY_MS): table}
    return {
        day_of_ms(number * DAY_MS): choose(table, numbers == number) for number in np.unique(numbers).tolist()
    }


def list_days(folder: Path, kind: TableKind) -> list[date]:
    """Return the days that have a file or folder, or lie in a month, oldest first."""
    days = _dates(folder, rf"{kind.name}_(\d{{4}}-\d\d-\d\d)\.parquet", "")
    for month in list_months(folder, kind):
        found = open_month(month_path(folder, kind, month), kind)
        days.update(found.days if found else ())
    return sorted(days)


def list_months(folder: Path, kind: TableKind) -> list[date]:
    """Return the first days of the months that have a file, oldest first."""
    return sorted(_dates(folder, rf"{kind.name}_(\d{{4}}-\d\d)\.parquet", "-01"))


def month_path(folder: Path, kind: TableKind, day: date) -> Path:
    """Return the path of the archived month of a day."""
    return folder / f"{kind.name}_{day:%Y-%m}.parquet"


def _dates(folder: Path, pattern: str, end: str) -> set[date]:
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return set()
    found = set()
    for name in names:
        if match := re.fullmatch(pattern, name):
            with contextlib.suppress(ValueError):  # like 2026-02-30
                found.add(date.fromisoformat(match[1] + end))
    return found


class MonthFile:
    """An archived month, open: one sealed file, sorted by server and time, with the rows of many days.

    The note `fleetcast.days` is JSON: of each day its number, rows, oldest and newest time, and seal. Not
    thread safe: days that follow each other are read together, and held.
    """

    def __init__(self, path: Path, kind: TableKind) -> None:
        """Open `path`; raises one of `READ_ERRORS`, or TypeError where the note is none."""
        self.part = OpenPart(path, None, kind)
        self._kind = kind
        self.days: dict[date, PartRows] = {}
        for day, (number, n_rows, oldest, newest, seal) in json.loads(self.part.note(DAYS_NOTE)).items():
            self.days[date.fromisoformat(day)] = PartRows(number, n_rows, (oldest, newest), seal)
        self._held: dict[date, list[pa.Table]] = {}
        self._held_of: Any = None  # the columns and row groups of what is held

    def day(self, day: date) -> OpenPart:
        """Return one of its days as a sealed file."""
        return self.part.narrow(partial(self._tables_of, day), self.days[day])

    def others(self, days: Collection[date]) -> OpenPart:
        """Return the rows of all days but some as one part."""
        facts = [own for day, own in self.days.items() if day not in days]
        edges = [edge for own in facts for edge in own.span_ms] or [0]
        number = max((own.number for own in facts), default=0)
        rows = PartRows(number, sum(own.n_rows for own in facts), (min(edges), max(edges)), self.part.seal)
        return self.part.narrow(partial(self._tables_without, days), rows)

    def _tables_without(
        self, days: Collection[date], columns: Sequence[str] | None, groups: Sequence[int] | None
    ) -> Iterator[pa.Table]:
        numbers = [day_start_ms(day) // DAY_MS for day in days]
        for table in self.part.tables(columns, groups):
            yield choose(table, ~np.isin(times_ms(table, self._kind.time_column) // DAY_MS, numbers))

    def _tables_of(
        self, day: date, columns: Sequence[str] | None, groups: Sequence[int] | None
    ) -> Iterator[pa.Table]:
        asked = (columns and tuple(columns), groups and tuple(groups), columns is None, groups is None)
        if asked != self._held_of or day not in self._held:
            self._held = {}
            for other in sorted(own for own in self.days if own >= day):
                if self._held and sum(self.days[own].n_rows for own in (*self._held, other)) > _HELD_ROWS:
                    break
                self._held[other] = []
            for table in self.part.tables(columns, groups):
                self._hold(table)
            self._held_of = asked
        yield from self._held[day]

    def _hold(self, table: pa.Table) -> None:
        """Hold the rows of a row group by day."""
        numbers = times_ms(table, self._kind.time_column) // DAY_MS
        by_day = in_order(table, np.argsort(numbers, kind="stable"))
        distinct, counts = np.unique(numbers, return_counts=True)
        for number, size, end in zip(distinct, counts, np.cumsum(counts), strict=True):
            day = day_of_ms(int(number) * DAY_MS)
            if day in self._held:
                self._held[day].append(by_day.slice(int(end - size), int(size)))


def open_month(path: Path, kind: TableKind) -> MonthFile | None:
    """Return an archived month, None where there is none or it cannot be read."""
    try:
        return MonthFile(path, kind)
    except FileNotFoundError:
        return None
    except (*READ_ERRORS, TypeError) as error:
        logger.warning("skipped an unreadable month path=%s error=%s", path, error)
        return None


def part_names(path: Path) -> list[PartName]:
    """Return the parts in a day's folder, oldest first; none if it is a sealed file or missing."""
    try:
        names = [entry.name for entry in os.scandir(path)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself is no folder, either
            return []
        raise
    return sorted(name for text in names if (name := PartName.parse(text)) is not None)


class DaySnapshot:
    """All parts of one day, open, as they were together at one instant."""

    def __init__(
        self, parts: list[OpenPart], *, is_sealed: bool = False, damaged: tuple[str, ...] = ()
    ) -> None:
        self.parts = parts
        self.is_sealed = is_sealed
        self.damaged = damaged  # names of files that could not be opened as parts

    @property
    def n_rows(self) -> int:
        """Return the rows of all parts."""
        return sum(part.n_rows for part in self.parts)


class Days:
    """Opens the days of one kind in one folder; an archived month is opened once while it stays the same."""

    def __init__(self, folder: Path, kind: TableKind) -> None:
        self._folder = folder
        self._kind = kind
        self._month: tuple[Path, MonthFile] | None = None

    def open(self, day: date) -> DaySnapshot:
        """Open a day as it is at one instant; a day that does not exist has no parts.

        A day's own file or folder wins over the month: it is newer, or the same.
        """
        path = day_path(self._folder, self._kind, day)
        for _ in range(_RETRIES):
            try:
                snapshot = _try_open(path, self._kind)
            except FileNotFoundError:  # a part went away: the day was swapped, look at the new one
                if path.exists():
                    continue
                month = self._open_month(day)  # a day goes only after its month is there
                return DaySnapshot([month.day(day)] if month else [], is_sealed=month is not None)
            except OSError as error:
                if error.errno not in _NO_FILE:
                    raise
                logger.warning("skipped an unreadable file path=%s error=%s", path, error)
                return DaySnapshot([], is_sealed=True, damaged=(path.name,))
            if snapshot is not None:
                return snapshot
        logger.warning("gave up opening a day that changes all the time path=%s", path)
        return DaySnapshot([], damaged=(path.name,))

    def _open_month(self, day: date) -> MonthFile | None:
        """Return the month that holds a day."""
        path = month_path(self._folder, self._kind, day)
        if self._month is None or self._month[0] != path or not _is_same(path, self._month[1].part.status):
            month = open_month(path, self._kind)
            self._month = (path, month) if month else None
        return self._month[1] if self._month and day in self._month[1].days else None


def open_day(folder: Path, kind: TableKind, day: date) -> DaySnapshot:
    """Open one day; see `Days.open`."""
    return Days(folder, kind).open(day)


def _try_open(path: Path, kind: TableKind) -> DaySnapshot | None:
    """Return the day, None where it was swapped meanwhile."""
    with _descriptor(path) as descriptor:
        status = os.fstat(descriptor)
        if not stat.S_ISDIR(status.st_mode):
            part = _open_part(Path(f"/proc/self/fd/{descriptor}"), path, None, kind)
            return DaySnapshot([part] if part else [], is_sealed=True, damaged=() if part else (path.name,))
        # paths through the descriptor stay those of this folder when another takes its name
        inside = Path(f"/proc/self/fd/{descriptor}")
        names = [entry.name for entry in inside.iterdir()]
        parsed = sorted(name for text in names if (name := PartName.parse(text)) is not None)
        parts = [_open_part(inside / name.text, path / name.text, name, kind) for name in parsed]
        if not _is_same(path, status):
            return None  # swapped, and its listing may have been taken while it was being deleted
    damaged = tuple(name.text for name, part in zip(parsed, parts, strict=True) if part is None)
    return DaySnapshot([part for part in parts if part is not None], damaged=damaged)


@contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open_part(path: Path, shown: Path, name: PartName | None, kind: TableKind) -> OpenPart | None:
    try:
        return OpenPart(path, name, kind)
    except FileNotFoundError:
        raise
    except READ_ERRORS as error:
        logger.warning("skipped an unreadable file path=%s error=%s", shown, error)
        return None


def _is_same(path: Path, status: os.stat_result) -> bool:
    try:
        now = path.stat()
    except OSError:
        return False
    return (now.st_dev, now.st_ino) == (status.st_dev, status.st_ino)


def folder_bytes(path: Path) -> int:
    """Return the bytes of a file, or of the files directly in a folder."""
    try:
        if not path.is_dir():
            return path.stat().st_size
        return sum(entry.stat().st_size for entry in path.iterdir() if entry.is_file())
    except OSError:  # gone, or a link to itself
        return 0


def is_own_file(text: str) -> bool:
    """Whether a file in a day's folder is one of ours."""
    return text == COLUMNS_FILE or PartName.parse(text) is not None


MAX_BYTES = 64 * 2**20


class Quarantine:
    """Keeps damaged bytes; beyond `max_bytes` the oldest are deleted.

    Keeping is best effort: a full disk must not stop the repair that it is part of.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self.n_kept = 0

    def keep_bytes(self, name: str, data: bytes) -> None:
        """Keep bytes cut out of a file."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._free_name(name).write_bytes(data[: self._max_bytes])
        except OSError as error:
            logger.error("cannot keep damaged bytes name=%s size_bytes=%d error=%s", name, len(data), error)
        self._note(name, len(data))

    def keep_file(self, path: Path) -> None:
        """Keep a damaged or foreign file under a second name; the caller removes the first."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            target = self._free_name(f"{path.parent.name}.{path.name}")
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)
            fsync_dir(self.folder)
            self._note(path.name, target.stat().st_size)
        except OSError as error:
            logger.error("cannot keep a damaged file path=%s error=%s", path, error)

    def _free_name(self, name: str) -> Path:
        return self.folder / f"{name.lstrip('.')}.{secrets.token_hex(4)}"

    def _note(self, name: str, size_bytes: int) -> None:
        self.n_kept += 1
        logger.warning("quarantined name=%s size_bytes=%d folder=%s", name, size_bytes, self.folder)
        self._stay_bounded()

    def _stay_bounded(self) -> None:
        """Delete the oldest until the rest fits; the newest stays in any case."""
        try:
            kept = sorted(
                (entry.stat().st_ctime_ns, entry) for entry in self.folder.iterdir() if entry.is_file()
            )
            excess = sum(path.stat().st_size for _, path in kept) - self._max_bytes
            for _, path in kept[:-1]:
                if excess <= 0:
                    break
                excess -= path.stat().st_size
                path.unlink()
        except OSError as error:  # a person tidies up meanwhile, or the disk is full
            logger.warning("cannot bound the quarantine folder=%s error=%s", self.folder, error)
