"""The day files of a folder: which there are, and consistent snapshots of one day.

Owns: `<kind>_YYYY-MM-DD.parquet` as a sealed file or as a folder of parts, how all parts of a day are
opened at one instant while a writer swaps them, which rows are of servers that are being forgotten.
Does not know: Parquet (`parts`), the log.
"""

import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa

from fleetcast.clock import BIN_EPOCH, DAY_MS
from fleetcast.storage.parts import READ_ERRORS, OpenPart, PartName
from fleetcast.storage.tables import (
    Flags,
    TableKind,
    choose,
    codes_of,
    concatenate,
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
    """Return the days that have a file or folder, oldest first; foreign names are not looked at."""
    pattern = re.compile(rf"{kind.name}_(\d{{4}}-\d\d-\d\d)\.parquet")
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    days = []
    for name in names:
        if match := pattern.fullmatch(name):
            try:
                days.append(date.fromisoformat(match[1]))
            except ValueError:  # like 2026-02-30
                continue
    return sorted(days)


def part_names(path: Path) -> list[PartName]:
    """Return the parts in a day's folder, oldest first; none if it is a sealed file or missing."""
    try:
        names = [entry.name for entry in os.scandir(path)]
    except (FileNotFoundError, NotADirectoryError):
        return []
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


def open_day(folder: Path, kind: TableKind, day: date) -> DaySnapshot:
    """Open a day as it is at one instant; a day that does not exist has no parts."""
    path = day_path(folder, kind, day)
    for _ in range(_RETRIES):
        try:
            snapshot = _try_open(path, kind)
        except FileNotFoundError:  # a part went away: the day was swapped, look at the new one
            if not path.exists():
                return DaySnapshot([])
            continue
        if snapshot is not None:
            return snapshot
    logger.warning("gave up opening a day that changes all the time path=%s", path)
    return DaySnapshot([], damaged=(path.name,))


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
    except FileNotFoundError:
        return False
    return (now.st_dev, now.st_ino) == (status.st_dev, status.st_ino)


def folder_bytes(path: Path) -> int:
    """Return the bytes of a file, or of the files directly in a folder."""
    try:
        if not path.is_dir():
            return path.stat().st_size
        return sum(entry.stat().st_size for entry in path.iterdir() if entry.is_file())
    except (FileNotFoundError, NotADirectoryError):
        return 0


def is_own_file(text: str) -> bool:
    """Whether a file in a day's folder is one of ours."""
    return text == COLUMNS_FILE or PartName.parse(text) is not None
