"""The day files of a folder: parts of rows sorted by key, and consistent snapshots of one day.

Owns: `<kind>_YYYY-MM-DD.parquet` as a sealed file or as a folder of parts, how all parts of a day are
opened at one instant while a writer swaps them, the file name of a part, Parquet options, damage
inside a file. Only `OpenPart` and `write_part` touch Parquet. Does not know: the log.

A part is named `part-<number>-<rows>.parquet`: the number is that of the newest log segment in it,
so replaying a segment twice writes the same name; the row count saves opening it to count.
"""

import contextlib
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fleetcast.clock import BIN_EPOCH, DAY_MS
from fleetcast.errors import CorruptFile
from fleetcast.files import fsync_file, name_regular, storage_error
from fleetcast.storage.tables import (
    Flags,
    NotThisKind,
    TableKind,
    canonical,
    choose,
    codes_of,
    concatenate,
    fill,
    is_canonical,
    stored_schema,
    times_ms,
)

logger = logging.getLogger(__name__)

COLUMNS_FILE = "00-columns.parquet"  # sorts first: readers of the folder take their columns from it
FORMAT_VERSION = 1
_META_FORMAT = "fleetcast.format"
_META_NUMBER = "fleetcast.segment"
_META_SEAL = "fleetcast.seal"
_PART_NAME = re.compile(r"part-(\d{12})-(\d+)\.parquet")
_PART_GROUP_ROWS = 32_768
_SEALED_GROUP_ROWS = 131_072
_SEALED_ZSTD_LEVEL = 9
_THREADS_ROWS = 50_000  # below, starting threads costs more than it saves
READ_ERRORS = (pa.ArrowException, OSError, CorruptFile, NotThisKind, KeyError, ValueError)


class PartName(NamedTuple):
    """What the file name of a part says; a tuple, because each flush compares a day's names."""

    number: int
    n_rows: int

    @property
    def text(self) -> str:
        """Return the file name."""
        return f"part-{self.number:012d}-{self.n_rows}.parquet"

    @classmethod
    def parse(cls, text: str) -> "PartName | None":
        """Return the part of this file name, None for a foreign file.

        >>> PartName.parse("part-000000000007-180.parquet")
        PartName(number=7, n_rows=180)
        """
        match = _PART_NAME.fullmatch(text)
        return cls(int(match[1]), int(match[2])) if match else None


def write_part(
    path: Path,
    tables: Iterator[pa.Table],
    kind: TableKind,
    schema: pa.Schema,
    number: int,
    *,
    is_sealed: bool = False,
    notes: Callable[[], Mapping[str, str]] | None = None,
) -> int:
    """Write canonical tables, in order, to a new durable file; return the number of rows.

    Args:
        notes: asked for more key-value metadata when all rows are written; each table is then one row group.
    Raises:
        StorageFull, StorageBroken: nothing is left at `path`.
    """
    written = stored_schema(schema)
    options = _options(kind, schema, is_sealed)
    group_rows = _SEALED_GROUP_ROWS if is_sealed else _PART_GROUP_ROWS
    n_rows = 0
    try:
        with path.open("xb") as stream, pq.ParquetWriter(stream, written, **options) as writer:
            writer.add_key_value_metadata(_metadata(number, is_sealed))
            for table in tables:
                size = len(table) if notes else group_rows
                writer.write_table(fill(table, schema).cast(written), row_group_size=size)
                n_rows += len(table)
            if notes:
                writer.add_key_value_metadata(dict(notes()))
        fsync_file(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise storage_error(path, error) from error
    return n_rows


def _metadata(number: int, is_sealed: bool) -> dict[str, str]:
    said = {_META_FORMAT: str(FORMAT_VERSION), _META_NUMBER: str(number)}
    return {**said, _META_SEAL: secrets.token_hex(16)} if is_sealed else said


class OpenPart:
    """An open part (or sealed file): it stays readable when its name is gone.

    Damage costs only the row group it lies in; `n_damaged_groups` counts them.
    """

    def __init__(self, path: Path, name: PartName | None, kind: TableKind) -> None:
        """Open `path`, which is only used now; raises one of `READ_ERRORS`."""
        self._kind = kind
        self._label = str(path)
        with name_regular(path) as name_of_open_file:
            self._file = pq.ParquetFile(
                pa.OSFile(name_of_open_file),
                read_dictionary=list(kind.text_columns),
                page_checksum_verification=True,
            )
            status = Path(name_of_open_file).stat()
        metadata = self._file.metadata
        said = metadata.metadata or {}
        self._said = said
        # of a file without one: a day that is written again has another time
        own = f"{status.st_size}-{status.st_mtime_ns}"
        self.seal = self.note(_META_SEAL) or own  # of a sealed file: no other content has the same
        version = int(said.get(_META_FORMAT.encode(), b"0"))
        if version > FORMAT_VERSION:
            raise NotThisKind(f"format {version} is newer than {FORMAT_VERSION}")
        self.is_ours = version > 0
        self.number = name.number if name else int(said.get(_META_NUMBER.encode(), b"0"))
        self.n_rows: int = metadata.num_rows
        self.n_damaged_groups = 0
        self.column_names: list[str] = self._file.schema_arrow.names
        found = self._file.schema_arrow
        self._schema = found if is_canonical(found, kind) else canonical(found.empty_table(), kind).schema
        self._is_large = self.n_rows > _THREADS_ROWS

    def note(self, name: str) -> str:
        """Return a key-value entry of its metadata, "" where it has none."""
        return bytes(self._said.get(name.encode(), b"")).decode(errors="replace")

    @property
    def n_groups(self) -> int:
        """Return how many row groups it has."""
        return int(self._file.metadata.num_row_groups)

    @property
    def schema(self) -> pa.Schema:
        """Return the canonical schema of what it holds."""
        return self._schema

    def time_range_ms(self) -> tuple[int, int] | None:
        """Return the oldest and newest time from the footer, None where it says nothing."""
        metadata = self._file.metadata
        if not self.is_ours:  # a foreign file may count in other units
            return None
        place = self.column_names.index(self._kind.time_column)
        lows, highs = [], []
        for group in range(metadata.num_row_groups):
            statistics = metadata.row_group(group).column(place).statistics
            if statistics is None or not statistics.has_min_max:
                return None
            lows.append(statistics.min_raw)
            highs.append(statistics.max_raw)
        return (min(lows), max(highs)) if lows else None

    def may_hold(self, start_ms: int, end_ms: int) -> bool:
        """Whether it can hold a row with start <= time < end."""
        span = self.time_range_ms()
        return span is None or (span[0] < end_ms and span[1] >= start_ms)

    def name_range(self) -> tuple[str, str] | None:
        """Return the first and last server from the footer, None where it says nothing."""
        ranges = self.name_ranges()
        known = [names for names in ranges if names is not None]
        if len(known) < len(ranges) or not known:
            return None
        return min(first for first, _ in known), max(last for _, last in known)

    def groups(self, names: tuple[str, str] | None) -> list[int]:
        """Return the row groups that can hold servers of this (inclusive) range of names."""
        ranges = enumerate(self.name_ranges())
        if names is None:
            return [group for group, _ in ranges]
        return [group for group, own in ranges if own is None or (own[1] >= names[0] and own[0] <= names[1])]

    def name_ranges(self) -> list[tuple[str, str] | None]:
        """Return the first and last server of each row group; None where the footer does not say."""
        metadata = self._file.metadata
        place = self.column_names.index(self._kind.key[0])
        found: list[tuple[str, str] | None] = []
        for group in range(metadata.num_row_groups):
            statistics = metadata.row_group(group).column(place).statistics
            is_known = statistics is not None and statistics.has_min_max
            found.append((statistics.min, statistics.max) if is_known else None)
        return found

    def tables(
        self, columns: Sequence[str] | None = None, groups: Sequence[int] | None = None
    ) -> Iterator[pa.Table]:
        """Yield its row groups as canonical tables; a damaged one is skipped, counted and logged.

        Args:
            columns: metrics to read; None reads all, an empty one the key columns only.
        """
        wanted = self._columns(columns)
        for group in range(self._file.metadata.num_row_groups) if groups is None else groups:
            try:
                table = self._file.read_row_group(group, columns=wanted, use_threads=self._is_large)
                yield canonical(table, self._kind, columns)
            except READ_ERRORS as error:
                self.n_damaged_groups += 1
                logger.warning(
                    "skipped a damaged row group file=%s group=%d error=%s", self._label, group, error
                )

    def _columns(self, columns: Sequence[str] | None) -> list[str] | None:
        if columns is None:
            return None
        return [*self._kind.schema.names, *(name for name in columns if name in self.column_names)]


def _options(kind: TableKind, schema: pa.Schema, is_sealed: bool) -> dict[str, object]:
    common: dict[str, object] = {
        "version": "2.6",
        "store_schema": False,
        "write_page_checksum": True,
        "write_statistics": [kind.key[0], kind.time_column],
    }
    if not is_sealed:
        return {**common, "compression": "lz4", "use_dictionary": list(kind.text_columns)}
    times = [field.name for field in schema if pa.types.is_timestamp(field.type)]
    return {
        **common,
        "compression": "zstd",
        "compression_level": _SEALED_ZSTD_LEVEL,
        "use_dictionary": [field.name for field in schema if field.name not in times],
        "column_encoding": dict.fromkeys(times, "DELTA_BINARY_PACKED"),
    }


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
                days.append(datetime.strptime(match[1] + "+0000", "%Y-%m-%d%z").date())
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
