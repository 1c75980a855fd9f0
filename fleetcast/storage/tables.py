"""Arrow tables of one kind: their columns, their key, and how rows of one key merge.

Owns: the two kinds (metrics, predictions), the canonical form of a table (sorted by the key columns,
unique by them), and the way between tables, numpy arrays, DataFrames and the types of `schema`.
Does not know: files.

`pa.array`, `pa.scalar` and `to_numpy` import pandas where it is installed, which costs a program
0.4 s and 40 MB. Arrow buffers do not, and are not copied.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fleetcast.errors import BadData
from fleetcast.ingest.rules import REQUIRED
from fleetcast.schema import Floats, Longs, RecordBatch, SettledForecasts

TIME = pa.timestamp("ms", tz="UTC")
TEXT = pa.dictionary(pa.int32(), pa.string())
NUMBER = pa.float64()
Flags = NDArray[np.bool_]
_NUMPY_TYPES = {
    NUMBER: np.float64,
    TIME: np.int64,
    pa.int64(): np.int64,
    pa.int32(): np.int32,
    pa.float32(): np.float32,
}


def column_of(values: NDArray[Any], kind: pa.DataType, validity: pa.Buffer | None = None) -> pa.Array:
    """Return numbers or times as an Arrow column, uncopied where the type is the same.

    `pa.array` would import pandas first, which costs 0.4 s and 40 MB in a program without it.
    """
    data = np.ascontiguousarray(values, dtype=_NUMPY_TYPES[kind])
    return pa.Array.from_buffers(kind, len(data), [validity, pa.py_buffer(data)])


def nulls_for_nan(values: Floats) -> pa.Array:
    """Return an Arrow column with null for NaN; it shares the memory of `values`."""
    is_present = ~np.isnan(values)
    validity = None if is_present.all() else bits(is_present)
    return column_of(values, NUMBER, validity)


def texts(values: Sequence[str | None] | NDArray[np.object_]) -> pa.Array:
    """Return a text column."""
    place = {value: code for code, value in enumerate(dict.fromkeys(values))}
    codes = np.fromiter((place[value] for value in values), np.int32, len(values))
    return text_of_codes(list(place), codes)


def text_of_codes(names: Sequence[str | None], codes: NDArray[np.int32]) -> pa.Array:
    """Return a text column of codes into distinct names; None is null."""
    encoded = [b"" if name is None else name.encode() for name in names]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    data = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    dictionary = pa.Array.from_buffers(pa.string(), len(names), data)
    validity = None
    if None in names:
        validity = bits(np.array([name is not None for name in names], dtype=np.bool_)[codes])
    return pa.DictionaryArray.from_arrays(column_of(codes, pa.int32(), validity), dictionary)


def times_ms(table: pa.Table, column: str) -> Longs:
    """Return a time column as milliseconds since 1970."""
    times: Longs = cells(table.column(column).cast(pa.int64()), np.int64)
    return times


def floats(column: pa.ChunkedArray) -> Floats:
    """Return a number column with NaN for null."""
    values: Floats = cells(column.cast(NUMBER), np.float64)
    if column.null_count == 0:
        return values
    return np.where(_is_present(column), values, np.nan)


def cells(column: pa.ChunkedArray | pa.Array, kind: type[np.generic]) -> NDArray[Any]:
    """Return a column of fixed-width values as an array, unshared only if it has several chunks.

    What a null holds is undefined.
    """
    arrays = [
        np.frombuffer(chunk.buffers()[1], kind, chunk.offset + len(chunk))[chunk.offset :]
        for chunk in _chunks(column)
    ]
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=kind)


def codes_of(column: pa.ChunkedArray) -> tuple[list[str | None], NDArray[np.int32]]:
    """Return the names of a text column and the code of each row; the last name is None if rows are null."""
    if len(column) == 0:
        return [], np.zeros(0, dtype=np.int32)
    array = column.unify_dictionaries().combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    names: list[str | None] = array.dictionary.to_pylist()
    codes = cells(array.indices, np.int32)
    if array.null_count:
        return [*names, None], np.where(_is_present(array), codes, np.int32(len(names)))
    return names, codes


def choose(table: pa.Table, is_chosen: Flags) -> pa.Table:
    """Return the rows of a table that are chosen."""
    mask = pa.Array.from_buffers(pa.bool_(), len(is_chosen), [None, bits(is_chosen)])
    return table.filter(mask)


def in_order(table: pa.Table, places: Longs) -> pa.Table:
    """Return the rows of a table at `places`."""
    return table.take(column_of(places, pa.int64()))


def bits(flags: Flags) -> pa.Buffer:
    """Return flags as Arrow keeps them, eight to a byte."""
    return pa.py_buffer(np.packbits(flags, bitorder="little"))


def _is_present(column: pa.ChunkedArray | pa.Array) -> Flags:
    """Return which cells are not null."""
    found = []
    for chunk in _chunks(column):
        bits = chunk.buffers()[0]
        if bits is None:
            found.append(np.ones(len(chunk), dtype=np.bool_))
        else:
            flags = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
            found.append(flags[chunk.offset : chunk.offset + len(chunk)].astype(np.bool_))
    return np.concatenate(found) if found else np.zeros(0, dtype=np.bool_)


def _chunks(column: pa.ChunkedArray | pa.Array) -> list[pa.Array]:
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return [chunk for chunk in chunks if len(chunk)]


_KEY_LIMIT = 2**62


class NotThisKind(ValueError):
    """Raised when a table read from disk lacks a column of its kind or holds other types."""


@dataclass(frozen=True)
class TableKind:
    """What the rows of one kind of day file are."""

    name: str  # day files are `<name>_YYYY-MM-DD.parquet`
    time_column: str  # decides the day
    key: tuple[str, ...]  # unique; rows are sorted by these columns in this order
    columns: tuple[tuple[str, pa.DataType], ...]  # always there
    has_metrics: bool  # any further column is a metric; those merge value by value
    added: tuple[str, ...] = ()  # numbers that older files lack; absent there

    @property
    def schema(self) -> pa.Schema:
        """Return the columns every table of this kind has."""
        return pa.schema(self.columns)

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Return the names of the text columns."""
        return tuple(name for name, kind in self.columns if kind == TEXT)


METRICS = TableKind(
    name="metrics",
    time_column="timestamp",
    key=("server_name", "timestamp"),
    columns=(("timestamp", TIME), ("server_name", TEXT)),
    has_metrics=True,
)
BINS = replace(METRICS, name="bins")  # the means of a sealed day of records, at the starts of their bins
PREDICTIONS = TableKind(
    name="predictions",
    time_column="target",
    key=("server_name", "metric", "horizon", "origin"),
    columns=(
        ("origin", TIME),
        ("target", TIME),
        ("horizon", pa.int32()),
        ("server_name", TEXT),
        ("metric", TEXT),
        ("p10", NUMBER),
        ("p50", NUMBER),
        ("p90", NUMBER),
        ("actual", NUMBER),
        ("model_version", TEXT),
        ("model_p50", NUMBER),
    ),
    has_metrics=False,
    added=("model_p50",),
)


def canonical(table: pa.Table, kind: TableKind, columns: Sequence[str] | None = None) -> pa.Table:
    """Return `table` with the columns and types of `kind`; absent numbers are null.

    Args:
        columns: metrics to keep; None keeps all. Columns that are no numbers are left out.
    Raises:
        NotThisKind: a column of the kind is missing or cannot be read as its type.
    """
    if is_canonical(table.schema, kind):
        if columns is None or not kind.has_metrics:
            return table
        fixed = kind.schema.names
        return table.select([name for name in table.column_names if name in fixed or name in columns])
    fields: list[tuple[str, pa.ChunkedArray]] = []
    for name, wanted in kind.columns:
        if name not in table.column_names and name in kind.added:
            fields.append((name, pa.chunked_array([pa.nulls(len(table), NUMBER)])))
            continue
        if name not in table.column_names:
            raise NotThisKind(f"column {name} is missing")
        fields.append((name, _as_type(name, table.column(name), wanted)))
    if kind.has_metrics:
        fixed = kind.schema.names
        names = [name for name in table.column_names if name not in fixed]
        for name in sorted(names if columns is None else set(names) & set(columns)):
            if _is_number(table.schema.field(name).type):
                fields.append((name, _absent_as_null(table.column(name))))
    return pa.table(dict(fields))


def is_canonical(schema: pa.Schema, kind: TableKind) -> bool:
    """Whether a table of this schema needs no conversion (ours hold nulls, never NaN)."""
    fixed = dict(kind.columns)
    types = dict(zip(schema.names, schema.types, strict=True))
    return fixed.keys() <= types.keys() and all(
        found == fixed.get(name, NUMBER) for name, found in types.items() if kind.has_metrics or name in fixed
    )


def merge(tables: Sequence[pa.Table], kind: TableKind) -> pa.Table:
    """Return canonical tables as one, sorted by key, one row per key.

    Later tables (and later rows) win: value by value among metrics, else the whole row.
    """
    whole = concatenate(tables, kind)
    keys = key_ranks(whole, kind)
    if bool((keys[1:] > keys[:-1]).all()):
        return whole
    order = np.argsort(keys, kind="stable")  # merges the sorted runs that parts are
    keys = keys[order]
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    lasts = np.append(starts[1:], len(keys)) - 1
    taken = in_order(whole, order[lasts])
    if len(starts) == len(keys) or not kind.has_metrics:
        return taken
    for place, name in enumerate(whole.column_names):
        if name not in kind.schema.names:
            values = floats(whole.column(name))[order]
            taken = taken.set_column(place, name, nulls_for_nan(_last_present(values, starts)))
    return taken


def concatenate(tables: Sequence[pa.Table], kind: TableKind) -> pa.Table:
    """Return canonical tables one after the other, in one chunk; absent columns are null."""
    if not tables:
        return pa.Table.from_batches([], schema=kind.schema)
    is_alike = all(table.schema.equals(tables[0].schema) for table in tables)
    whole = pa.concat_tables(tables, promote_options="none" if is_alike else "default")
    return whole.unify_dictionaries().combine_chunks()


def in_pieces(tables: Iterable[pa.Table], least: int) -> Iterator[pa.Table]:
    """Yield the rows of tables of one schema in tables of at least so many, but for the last."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= least:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def key_ranks(table: pa.Table, kind: TableKind) -> Longs:
    """Return one number per row that orders and identifies rows as the key does."""
    ranks = np.zeros(len(table), dtype=np.int64)
    span = 1
    for name in kind.key:
        column, width = _column_ranks(table.column(name))
        if span * width >= _KEY_LIMIT:  # decades of times of many servers: number what occurs
            ranks, span = _renumber(ranks)
            column, width = _renumber(column)
        ranks = ranks * width + column
        span *= width
    return ranks


def union_schema(kind: TableKind, schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Return the columns of all schemas: the fixed ones first, metrics sorted."""
    fixed = kind.schema
    fields = {field.name: field for schema in schemas for field in schema}
    return pa.schema([*fixed, *(fields[name] for name in sorted(fields) if name not in fixed.names)])


def stored_schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema as stored: plain strings, so that pandas shows text, not categories."""
    return pa.schema([(field.name, pa.string() if field.type == TEXT else field.type) for field in schema])


def fill(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return `table` with all columns of `schema`, absent ones as nulls."""
    columns = [
        table.column(field.name) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def has_key(table: pa.Table, others: pa.Table, kind: TableKind) -> Flags:
    """Return which rows of `table` have a key that `others` has too."""
    keys = list(kind.key)
    both = pa.concat_tables([table.select(keys), others.select(keys)]).unify_dictionaries()
    ranks = key_ranks(both, kind)
    found: Flags = np.isin(ranks[: len(table)], ranks[len(table) :])
    return found


def _last_present(values: Floats, starts: NDArray[np.int64]) -> Floats:
    """Return the last value of each group that is not NaN."""
    places = np.where(np.isnan(values), -1, np.arange(len(values)))
    last = np.maximum.reduceat(places, starts)
    return np.where(last >= 0, values[last], np.nan)


def _column_ranks(column: pa.ChunkedArray) -> tuple[Longs, int]:
    """Return non-negative order-preserving numbers of a column and how many there may be."""
    if len(column) == 0:
        return np.zeros(0, dtype=np.int64), 1
    if pa.types.is_dictionary(column.type):
        names, codes = codes_of(column)
        texts = [str(name) for name in names]
        place = {text: rank for rank, text in enumerate(sorted(set(texts)))}
        ranks = np.fromiter((place[text] for text in texts), np.int64, len(texts))
        return ranks[codes], len(place)
    numbers = cells(column.cast(pa.int64()), np.int64)
    low, high = int(numbers.min()), int(numbers.max())
    if high - low >= _KEY_LIMIT:  # a foreign file's times; the difference could overflow
        return _renumber(numbers)
    return numbers - low, high - low + 1


def _renumber(numbers: Longs) -> tuple[Longs, int]:
    """Return the rank of each number among those that occur, and how many they are."""
    distinct, ranks = np.unique(numbers, return_inverse=True)
    return ranks.astype(np.int64), len(distinct)


def _as_type(name: str, column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    if name in ("p10", "p50", "p90", "actual", "model_p50"):
        return _absent_as_null(column)
    try:
        if wanted == TEXT:
            column = _as_text(column)
        elif wanted == TIME and pa.types.is_timestamp(column.type) and column.type.tz is None:
            column = column.cast(pa.timestamp("ms"), safe=False).cast(TIME)
        else:
            column = column.cast(wanted, safe=not pa.types.is_timestamp(column.type))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise NotThisKind(f"column {name} is {column.type}, not {wanted}") from error
    if name != "model_version" and column.null_count:
        raise NotThisKind(f"column {name} has empty cells")
    return column


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if column.type == TEXT:
        return column
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.string()).dictionary_encode()


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind))


def _absent_as_null(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not _is_number(column.type):
        raise NotThisKind(f"expected numbers, got {column.type}")
    return pa.chunked_array([nulls_for_nan(floats(column.cast(NUMBER)))])


Cells = Sequence[Any] | NDArray[Any]
_NO_TIME = np.iinfo(np.int64).min


def table_of_batch(batch: RecordBatch) -> pa.Table:
    """Return records as a canonical table, in the order they came."""
    metrics = sorted(batch.metrics)
    servers = text_of_codes(batch.server_names, batch.server_codes)
    columns = [
        column_of(batch.timestamps_ms, TIME),
        servers,
        *(nulls_for_nan(batch.metrics[name]) for name in metrics),
    ]
    return pa.Table.from_arrays(columns, schema=_schema(tuple(metrics)))


def batch_of_table(table: pa.Table) -> RecordBatch:
    """Return the rows of a canonical metrics table."""
    every_name, codes = codes_of(table.column("server_name"))
    used, codes_of_used = np.unique(codes, return_inverse=True)
    names = [name for name in table.column_names if name not in REQUIRED]
    return RecordBatch(
        server_names=tuple(str(every_name[code]) for code in used.tolist()),
        server_codes=codes_of_used.astype(np.int32),
        timestamps_ms=times_ms(table, "timestamp"),
        metrics={name: floats(table.column(name)) for name in names},
    )


def table_of_settled(rows: SettledForecasts) -> pa.Table:
    """Return settled forecasts as a table."""
    columns = {
        "origin": column_of(rows.origin_ms, TIME),
        "target": column_of(rows.target_ms, TIME),
        "horizon": column_of(rows.horizon, pa.int32()),
        "server_name": texts(rows.server_name),
        "metric": texts(rows.metric),
        "p10": column_of(rows.p10, NUMBER),
        "p50": column_of(rows.p50, NUMBER),
        "p90": column_of(rows.p90, NUMBER),
        "actual": column_of(rows.actual, NUMBER),
        "model_version": texts(rows.model_version),
        "model_p50": column_of(rows.model_p50, NUMBER),
    }
    return pa.table(columns)


def settled_of_table(table: pa.Table) -> SettledForecasts:
    """Return the rows of a canonical predictions table."""
    objects = {name: _objects(table.column(name)) for name in PREDICTIONS.text_columns}
    p50, own = floats(table.column("p50")), floats(table.column("model_p50"))
    return SettledForecasts(
        origin_ms=times_ms(table, "origin"),
        target_ms=times_ms(table, "target"),
        horizon=cells(table.column("horizon"), np.int32),
        server_name=objects["server_name"],
        metric=objects["metric"],
        p10=floats(table.column("p10")),
        p50=p50,
        p90=floats(table.column("p90")),
        actual=floats(table.column("actual")),
        model_version=objects["model_version"],
        model_p50=np.where(np.isnan(own), p50, own),  # stored before there was feedback
    )


def columns_of_frame(frame: Any) -> dict[str, Cells]:
    """Return the columns of a DataFrame as `records.accept_columns` takes them.

    Raises:
        BadData: it has no `timestamp` or no `server_name`, or two columns of one name.
    """
    names = [str(name) for name in frame.columns]
    missing = [name for name in REQUIRED if name not in names]
    if missing or len(set(names)) < len(names):
        problem = f"lacks {' and '.join(missing)}" if missing else "has two columns of one name"
        raise BadData(f"a DataFrame of records {problem}; its columns are {', '.join(names)}")
    return {name: _cells(frame.iloc[:, place]) for place, name in enumerate(names)}


@lru_cache(maxsize=256)
def _schema(metrics: tuple[str, ...]) -> pa.Schema:
    """Return the schema of a table of these metrics; a fleet sends few different ones."""
    return pa.schema([*METRICS.schema, *((name, NUMBER) for name in metrics)])


def _cells(series: Any) -> Cells:
    """Return one DataFrame column; pandas' missing values are None, NaN or the missing time."""
    if series.dtype.kind == "M":
        times = series.dt.tz_localize("UTC") if series.dt.tz is None else series.dt.tz_convert("UTC")
        numbers: Longs = times.astype("datetime64[ms, UTC]").astype("int64").to_numpy()
        return np.where(series.isna().to_numpy(), _NO_TIME, numbers)
    if series.dtype.kind in "fiu":
        return np.asarray(series.to_numpy(dtype=np.float64, na_value=np.nan))
    missing = series.isna().to_numpy()
    return [None if gone else cell for cell, gone in zip(series.tolist(), missing, strict=True)]


def _objects(column: pa.ChunkedArray) -> Any:
    """Return text cells as objects (None for null), each distinct text made once."""
    names, codes = codes_of(column)
    return np.array(names, dtype=np.object_)[codes]
