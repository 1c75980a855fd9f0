"""Parquet as it is written and read here: parts of rows sorted by key, and sealed files.

Owns: the file name of a part, Parquet options, damage inside a file. Only this
file touches Parquet. Does not know: how parts make a day (`days`), the log.

A part is named `part-<number>-<rows>.parquet`: the number is that of the newest log segment in it,
so replaying a segment twice writes the same name; the row count saves opening it to count.
"""

import contextlib
import copy
import logging
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from fleetcast.errors import CorruptFile
from fleetcast.files import fsync_file, name_regular, publish, storage_error, temp_beside
from fleetcast.storage.tables import (
    METRICS,
    NUMBER,
    NotThisKind,
    TableKind,
    canonical,
    fill,
    in_pieces,
    is_canonical,
    stored_schema,
)

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_META_FORMAT = "fleetcast.format"
_META_NUMBER = "fleetcast.segment"
_META_SEAL = "fleetcast.seal"
_PART_NAME = re.compile(r"part-(\d{12})-(\d+)\.parquet")
_EXPORT_ROWS = 65_536  # rows of a row group of an export, at least, but for the last
_PART_GROUP_ROWS = 32_768
_SEALED_GROUP_ROWS = 131_072
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
    rest = iter(tables)
    start = list(islice(rest, 1))
    chosen = encodings_by_trial(start[0], schema) if is_sealed and start else {}
    options = _sealed_options(kind, schema, chosen) if is_sealed else _open_options(kind)
    group_rows = 0 if notes else _SEALED_GROUP_ROWS if is_sealed else _PART_GROUP_ROWS
    return _write(path, chain(start, rest), schema, options, group_rows, _metadata(number, is_sealed), notes)


def write_month(
    path: Path,
    tables: Iterator[pa.Table],
    kind: TableKind,
    schema: pa.Schema,
    number: int,
    notes: Callable[[], Mapping[str, str]],
) -> int:
    """Write an archived month as `write_part` writes a sealed day, smaller for more CPU; return its rows."""
    rest = iter(tables)
    start = list(islice(rest, 1))
    options = _sealed_options(kind, schema, _archive_encodings(start[0], schema) if start else {})
    whole = {"data_page_size": _ARCHIVE_PAGE_BYTES, "dictionary_pagesize_limit": _ARCHIVE_PAGE_BYTES}
    said = _metadata(number, is_sealed=True)
    return _write(path, chain(start, rest), schema, {**options, **whole}, 0, said, notes)


def _write(
    path: Path,
    tables: Iterator[pa.Table],
    schema: pa.Schema,
    options: Mapping[str, Any],
    group_rows: int,
    said: Mapping[str, str],
    notes: Callable[[], Mapping[str, str]] | None,
) -> int:
    """Write a file; with no `group_rows` each table is a row group."""
    written = stored_schema(schema)
    n_rows = 0
    try:
        with path.open("xb") as stream, pq.ParquetWriter(stream, written, **options) as writer:
            writer.add_key_value_metadata(dict(said))
            for table in tables:
                writer.write_table(fill(table, schema).cast(written), row_group_size=group_rows or len(table))
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


Source = Callable[[Sequence[str] | None, Sequence[int] | None], Iterator[pa.Table]]


class PartRows(NamedTuple):
    """What is known of the rows of a file that stand for a part of their own."""

    number: int
    n_rows: int
    span_ms: tuple[int, int]  # oldest and newest time
    seal: str


class OpenPart:
    """An open part (or sealed file): it stays readable when its name is gone.

    Damage costs only the row group it lies in; `n_damaged_groups` counts them.
    """

    def __init__(self, path: Path, name: PartName | None, kind: TableKind) -> None:
        """Open `path`, which is only used now; raises one of `READ_ERRORS`."""
        self._kind = kind
        self._label = str(path)
        self._source: Source | None = None
        self._facts: PartRows | None = None
        self._whole: OpenPart | None = None  # never itself: a cycle would keep its file open
        with name_regular(path) as name_of_open_file:
            self._file = pq.ParquetFile(
                pa.OSFile(name_of_open_file),
                read_dictionary=list(kind.text_columns),
                page_checksum_verification=True,
            )
            self.status = status = Path(name_of_open_file).stat()
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
        self._is_canonical = is_canonical(found, kind)
        self._schema = found if self._is_canonical else canonical(_without_rows(found), kind).schema
        self._is_large = self.n_rows > _THREADS_ROWS

    def narrow(self, source: "Source", facts: PartRows) -> "OpenPart":
        """Return this file as one that holds some of its rows only; its footer may name servers of others.

        Args:
            source: yields the rows of some row groups, as `tables` does.
        """
        own = copy.copy(self)
        own._source, own._facts, own._whole = source, facts, self
        own.number, own.n_rows, own.seal, own.n_damaged_groups = facts.number, facts.n_rows, facts.seal, 0
        return own

    @property
    def is_narrow(self) -> bool:
        """Whether it is some rows of a file that holds others, too."""
        return self._facts is not None

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
        if self._facts is not None:
            return self._facts.span_ms
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

    def lies_in(self, start_ms: int, end_ms: int) -> bool:
        """Whether the footer says of all its rows that start <= time < end."""
        span = self.time_range_ms()
        return span is not None and start_ms <= span[0] and span[1] < end_ms

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
        """Return the first and last server of each row group; None where the footer names none, as in a
        foreign file whose names are numbers.
        """
        metadata = self._file.metadata
        place = self.column_names.index(self._kind.key[0])
        found: list[tuple[str, str] | None] = []
        for group in range(metadata.num_row_groups):
            statistics = metadata.row_group(group).column(place).statistics
            is_known = statistics is not None and statistics.has_min_max
            ends = (statistics.min, statistics.max) if is_known else ()
            found.append((ends[0], ends[1]) if ends and all(isinstance(end, str) for end in ends) else None)
        return found

    def tables(
        self, columns: Sequence[str] | None = None, groups: Sequence[int] | None = None
    ) -> Iterator[pa.Table]:
        """Yield its row groups as canonical tables; a damaged one is skipped, counted and logged.

        Args:
            columns: metrics to read; None reads all, an empty one the key columns only.
        """
        if self._source is not None:
            assert self._whole is not None
            yield from self._source(columns, groups)
            self.n_damaged_groups = self._whole.n_damaged_groups
            return
        wanted = self._columns(columns)
        for group in range(self._file.metadata.num_row_groups) if groups is None else groups:
            try:
                table = self._file.read_row_group(group, columns=wanted, use_threads=self._is_large)
                yield table if self._is_canonical else canonical(table, self._kind, columns)
            except READ_ERRORS as error:
                self.n_damaged_groups += 1
                logger.warning(
                    "skipped a damaged row group file=%s group=%d error=%s", self._label, group, error
                )

    def _columns(self, columns: Sequence[str] | None) -> list[str] | None:
        if columns is None:
            return None
        return [*self._kind.schema.names, *(name for name in columns if name in self.column_names)]


def _without_rows(schema: pa.Schema) -> pa.Table:
    return pa.Table.from_batches([], schema=schema)  # `empty_table` would import pandas


def _common_options(kind: TableKind) -> dict[str, Any]:
    return {
        "version": "2.6",
        "store_schema": False,
        "write_page_checksum": True,
        "write_statistics": [kind.key[0], kind.time_column],
    }


def _open_options(kind: TableKind) -> dict[str, Any]:
    return {**_common_options(kind), "compression": "lz4", "use_dictionary": list(kind.text_columns)}


def _sealed_options(kind: TableKind, schema: pa.Schema, chosen: "Mapping[str, Encoding]") -> dict[str, Any]:
    """Return the options of a sealed file; a column without a choice has a dictionary, a time deltas."""
    times = [field.name for field in schema if pa.types.is_timestamp(field.type)]
    forms = {name: DICTIONARY.form for name in schema.names}
    forms |= dict.fromkeys(times, "DELTA_BINARY_PACKED") | {name: own.form for name, own in chosen.items()}
    return {
        **_common_options(kind),
        "compression": "zstd",
        "compression_level": {name: chosen.get(name, DICTIONARY).level for name in schema.names},
        "use_dictionary": [name for name, form in forms.items() if form == DICTIONARY.form],
        "column_encoding": {name: form for name, form in forms.items() if form != DICTIONARY.form},
    }


class Encoding(NamedTuple):
    """How a sealed column is written: the encoding of its pages, and the level of zstd."""

    form: str
    level: int


DICTIONARY = Encoding("RLE_DICTIONARY", 9)
_PLAIN = Encoding("PLAIN", 9)
_SPLIT = Encoding("BYTE_STREAM_SPLIT", 9)  # wins where numbers are not rounded
_STRONG = Encoding("PLAIN", 15)  # four times the CPU of `_PLAIN`
_STRONG_CELLS = 80_000  # of a day are written so: 0.04 CPU s more, beside 0.33 for the start of the child
_STRONG_ROWS = 65_536  # of the first row group, at most: a day of a larger one has many
_ARCHIVE_DICTIONARY = Encoding("RLE_DICTIONARY", 19)  # three times the CPU of level 9
_ARCHIVE_PAGE_BYTES = 2**24  # a column of a row group in one page, its dictionary in another
_TRIAL_SHARE = 4  # of the first row group's rows: all of them share what a dictionary costs
_TRIAL_ROWS = (1_024, 32_768)  # at least and at most, in `_TRIAL_PIECES` stretches
_TRIAL_PIECES = 4


def encodings_by_trial(table: pa.Table, schema: pa.Schema) -> dict[str, Encoding]:
    """Return how each column of numbers gets smallest, as tried on some rows of a table.

    Only the columns that gain most by it, up to `_STRONG_CELLS`, are compressed at the costly level.
    """
    names = [name for name in table.column_names if schema.field(name).type == NUMBER]
    if not names or not len(table):
        return {}
    some = _some_rows(table.select(names))
    cheap = (DICTIONARY, _PLAIN, _SPLIT)
    sizes = {each: _trial_sizes(some, each) for each in cheap}
    chosen = {name: min(cheap, key=lambda each: sizes[each][name]) for name in names}
    n_strong = _STRONG_CELLS // len(table) if len(table) <= _STRONG_ROWS else 0
    if n_strong:
        strong = _trial_sizes(some, _STRONG)
        gains = {name: sizes[chosen[name]][name] - strong[name] for name in names}
        by_gain = sorted(names, key=lambda name: gains[name], reverse=True)
        chosen |= {name: _STRONG for name in by_gain[:n_strong] if gains[name] > 0}
    return chosen


def _archive_encodings(table: pa.Table, schema: pa.Schema) -> dict[str, Encoding]:
    """Return how each column of numbers gets smallest in a file that is written once, as tried on a table."""
    names = [name for name in table.column_names if schema.field(name).type == NUMBER]
    if not names or not len(table):
        return {}
    sizes = {each: _trial_sizes(table.select(names), each) for each in (_ARCHIVE_DICTIONARY, _STRONG, _SPLIT)}
    return {name: min(sizes, key=lambda each: sizes[each][name]) for name in names}


def _some_rows(table: pa.Table) -> pa.Table:
    """Return rows of a few stretches of a table: servers lie one after the other, and differ."""
    least, most = _TRIAL_ROWS
    n_rows = min(max(len(table) // _TRIAL_SHARE, least), most)
    if n_rows >= len(table):
        return table
    step, size = len(table) // _TRIAL_PIECES, n_rows // _TRIAL_PIECES
    return pa.concat_tables([table.slice(place * step, size) for place in range(_TRIAL_PIECES)])


def _trial_sizes(table: pa.Table, encoding: Encoding) -> dict[str, int]:
    """Return the bytes of each column of numbers, written so."""
    sink = pa.BufferOutputStream()
    options = _sealed_options(METRICS, table.schema, dict.fromkeys(table.column_names, encoding))
    with pq.ParquetWriter(sink, table.schema, **{**options, "write_statistics": False}) as writer:
        writer.write_table(table.combine_chunks())
    group = pq.read_metadata(pa.BufferReader(sink.getvalue())).row_group(0)
    columns = [group.column(place) for place in range(group.num_columns)]
    return {column.path_in_schema: column.total_compressed_size for column in columns}


def write_export(path: Path, tables: Iterator[pa.Table], schema: pa.Schema) -> int:
    """Write tables to a file at `path` as a whole or not at all; return the number of rows.

    Raises:
        StorageFull, StorageBroken: a file that was at `path` before is untouched.
    """
    temp = temp_beside(path)
    written = stored_schema(schema)
    dictionary: Sequence[str] = [name for name in schema.names if name != "timestamp"]
    n_rows = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(temp, written, compression="zstd", use_dictionary=dictionary) as writer:
            for table in in_pieces((fill(table, schema).cast(written) for table in tables), _EXPORT_ROWS):
                writer.write_table(table)
                n_rows += len(table)
        fsync_file(temp)
        publish(temp, path)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # usually it became `path`
            temp.unlink()
    return n_rows
