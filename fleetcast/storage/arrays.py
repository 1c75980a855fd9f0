"""Arrow columns from and to numpy arrays, without pandas.

Owns: numbers, times and text in columns. `pa.array`, `pa.scalar` and `to_numpy` import pandas where
it is installed, which costs a program 0.4 s and 40 MB; buffers do not, and are not copied.
Does not know: which columns a table has.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fleetcast.schema import Floats, Longs

TIME = pa.timestamp("ms", tz="UTC")
TEXT = pa.dictionary(pa.int32(), pa.string())
NUMBER = pa.float64()
Flags = NDArray[np.bool_]
_NUMPY_TYPES = {NUMBER: np.float64, TIME: np.int64, pa.int64(): np.int64, pa.int32(): np.int32}


def column_of(values: NDArray[Any], kind: pa.DataType, validity: pa.Buffer | None = None) -> pa.Array:
    """Return numbers or times as an Arrow column, uncopied where the type is the same.

    `pa.array` would import pandas first, which costs 0.4 s and 40 MB in a program without it.
    """
    data = np.ascontiguousarray(values, dtype=_NUMPY_TYPES[kind])
    return pa.Array.from_buffers(kind, len(data), [validity, pa.py_buffer(data)])


def nulls_for_nan(values: Floats) -> pa.Array:
    """Return an Arrow column with null for NaN; it shares the memory of `values`."""
    is_present = ~np.isnan(values)
    validity = None if is_present.all() else _bits(is_present)
    return column_of(values, NUMBER, validity)


def texts(values: Sequence[str | None] | NDArray[np.object_]) -> pa.Array:
    """Return a text column."""
    place = {value: code for code, value in enumerate(dict.fromkeys(values))}
    codes = np.fromiter((place[value] for value in values), np.int32, len(values))
    return coded_texts(list(place), codes)


def coded_texts(names: Sequence[str | None], codes: NDArray[np.int32]) -> pa.Array:
    """Return a text column of codes into distinct names; None is null."""
    encoded = [b"" if name is None else name.encode() for name in names]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    data = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    dictionary = pa.Array.from_buffers(pa.string(), len(names), data)
    validity = None
    if None in names:
        validity = _bits(np.array([name is not None for name in names], dtype=np.bool_)[codes])
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


def chosen(table: pa.Table, is_chosen: Flags) -> pa.Table:
    """Return the rows of a table that are chosen."""
    mask = pa.Array.from_buffers(pa.bool_(), len(is_chosen), [None, _bits(is_chosen)])
    return table.filter(mask)


def in_order(table: pa.Table, places: Longs) -> pa.Table:
    """Return the rows of a table at `places`."""
    return table.take(column_of(places, pa.int64()))


def _bits(flags: Flags) -> pa.Buffer:
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
