"""Columns of several bodies, or of several batches of one, as one.

Owns: which columns can be put together so that each record is judged as it would be alone.
Does not know: the rules for records.
"""

from collections.abc import Hashable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from fleetcast.ingest.record_columns import NO_NAME, CodedNames, Column, NotNumbers, RowsOf, cell


def layout_of(raw: Sequence[object]) -> Hashable:
    """Return what raw records of several requests must have in common to be joined."""
    if not isinstance(raw, RowsOf):
        return list
    return tuple((name, _kind(column)) for name, column in raw.columns.items())


def joined_rows(parts: Sequence[Sequence[object]]) -> Sequence[object]:
    """Return the records of parts of one layout, in their order."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if not isinstance(first, RowsOf):
        return list(chain.from_iterable(parts))
    columns = [part.columns for part in parts if isinstance(part, RowsOf)]
    return RowsOf({name: joined_column([one[name] for one in columns]) for name in first.columns})


def joined_column(parts: Sequence[Any]) -> Column:
    """Return one column of all parts; each part is of the same class, or numbers in two forms."""
    if len(parts) < 2:
        return parts[0] if parts else ()
    first = parts[0]
    if isinstance(first, CodedNames):
        starts = np.cumsum([0, *(len(part.names) for part in parts)])
        codes = [
            np.where(p.codes == NO_NAME, NO_NAME, p.codes + s) for p, s in zip(parts, starts, strict=False)
        ]
        return CodedNames([n for part in parts for n in part.names], np.concatenate(codes).astype(np.int32))
    if isinstance(first, NotNumbers):
        return NotNumbers(first.kind, np.concatenate([part.is_there for part in parts]))
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate(parts)
    if all(isinstance(part, list) for part in parts):
        return list(chain.from_iterable(parts))
    return [cell("", part, place) for part in parts for place in range(len(part))]


def _kind(column: Column) -> Hashable:
    if isinstance(column, np.ndarray):
        return column.dtype.str
    if isinstance(column, NotNumbers):
        return NotNumbers, column.kind
    return type(column).__name__
