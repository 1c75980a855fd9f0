"""Arrow tables of one kind: their columns, their key, and how rows of one key merge.

Owns: the two kinds (metrics, predictions), the canonical form of a table, merging.
Does not know: files. Rows are sorted by the key columns and unique by them after `merged`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fleetcast.schema import Floats, Longs
from fleetcast.storage.arrays import (
    NUMBER,
    TEXT,
    TIME,
    Flags,
    cells,
    codes_of,
    floats,
    in_order,
    nulls_for_nan,
)

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


def merged(tables: Sequence[pa.Table], kind: TableKind) -> pa.Table:
    """Return canonical tables as one, sorted by key, one row per key.

    Later tables (and later rows) win: value by value among metrics, else the whole row.
    """
    whole = concatenated(tables, kind)
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


def concatenated(tables: Sequence[pa.Table], kind: TableKind) -> pa.Table:
    """Return canonical tables one after the other, in one chunk; absent columns are null."""
    if not tables:
        return pa.Table.from_batches([], schema=kind.schema)
    is_alike = all(table.schema.equals(tables[0].schema) for table in tables)
    whole = pa.concat_tables(tables, promote_options="none" if is_alike else "default")
    return whole.unify_dictionaries().combine_chunks()


def key_ranks(table: pa.Table, kind: TableKind) -> Longs:
    """Return one number per row that orders and identifies rows as the key does."""
    ranks = np.zeros(len(table), dtype=np.int64)
    span = 1
    for name in kind.key:
        column, width = _column_ranks(table.column(name))
        if span * width >= _KEY_LIMIT:  # decades of times of many servers: number what occurs
            ranks, span = _renumbered(ranks)
            column, width = _renumbered(column)
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


def filled(table: pa.Table, schema: pa.Schema) -> pa.Table:
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
        return _renumbered(numbers)
    return numbers - low, high - low + 1


def _renumbered(numbers: Longs) -> tuple[Longs, int]:
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
