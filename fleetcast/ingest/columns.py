"""Columns of raw cells: read as numbers, times, names or text, and joined over several bodies.

Owns: which cells of a column are certainly good, and which columns can be joined so that each
record is judged as it would be alone. Does not know: why a cell is not good (`rules` looks at those
again, one record at a time).
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import chain
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from fleetcast.clock import from_ms
from fleetcast.ingest.rules import (
    REQUIRED,
    RecordRules,
    is_metric_name,
    parse_timestamp_ms,
)
from fleetcast.schema import Codes, Floats, Longs

NO_TIME = int(np.iinfo(np.int64).min)  # what a missing time is, in pandas' int64 too
NO_NAME = -1
_REPEATED_MAX, _REPEATED_CHARS = 2048, 256  # of names that are kept for the next post: 64 MB at the very most
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class CodedNames:
    """A column of text as codes into distinct values; NO_NAME = absent."""

    names: Sequence[object]
    codes: Codes

    def __len__(self) -> int:
        return len(self.codes)

    def __iter__(self) -> Iterator[object]:
        return (None if code == NO_NAME else self.names[code] for code in self.codes.tolist())

    def __getitem__(self, place: int) -> Any:
        code = int(self.codes[place])
        return None if code == NO_NAME else self.names[code]


@dataclass(frozen=True, slots=True, eq=False)
class NotNumbers:
    """A column of a kind of values that no metric can have."""

    kind: str
    is_there: Flags  # False = absent, which any record may be

    def __len__(self) -> int:
        return len(self.is_there)

    def __iter__(self) -> Iterator[object]:
        return (self[place] for place in range(len(self)))

    def __getitem__(self, place: int) -> Any:
        return _Value(self.kind) if self.is_there[place] else None


class _Value:
    """Stands for one value of a column of NotNumbers in a message."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __repr__(self) -> str:
        return f"<{self._kind}>"


Column = Sequence[Any] | NDArray[Any] | CodedNames | NotNumbers


def cell(name: str, column: Column, place: int) -> object:
    """Return one cell as a record holds it."""
    value = column[place]
    if not isinstance(column, np.ndarray) or column.dtype == np.object_:
        return value
    if name == "timestamp":
        return _moment(int(value))
    return None if np.isnan(value) else value.item()


def _moment(time_ms: int) -> object:
    """Return a time as a record holds it; one beyond the calendar stays a number."""
    try:
        return None if time_ms == NO_TIME else from_ms(time_ms)
    except OverflowError:
        return time_ms


def cell_kinds(column: Column) -> frozenset[type]:
    """Return the types of the cells; a numeric array needs no such look and has none."""
    if isinstance(column, CodedNames):
        return frozenset((str,))
    if isinstance(column, NotNumbers):
        return frozenset((_Value,))
    if isinstance(column, np.ndarray) and column.dtype != np.object_:
        return frozenset()
    return frozenset(map(type, column))


def is_text(kinds: frozenset[type]) -> bool:
    """Whether a column of such cells holds text and nothing else."""
    return str in kinds and kinds <= {str, type(None)}


def text_cells(column: Column) -> Flags:
    """Return which cells of a text column are not absent."""
    if isinstance(column, CodedNames):
        return np.not_equal(column.codes, NO_NAME)
    return np.fromiter((value is not None for value in column), np.bool_, len(column))


def numbers(column: Column, kinds: frozenset[type]) -> tuple[Floats, Flags]:
    """Return the cells as floats (absent = NaN) and which of them are plain numbers or absent."""
    if isinstance(column, np.ndarray) and column.dtype.kind in "fiu":
        values = column.astype(np.float64)
        return values, ~np.isinf(values)
    if isinstance(column, NotNumbers):
        return np.full(len(column), np.nan), ~column.is_there
    if kinds <= {float, int, type(None)}:
        try:
            values = np.array(column, dtype=np.float64)  # None becomes NaN
        except OverflowError:  # an integer beyond a double: the exact look will name it
            return _numbers_one_by_one(column)
        is_number = np.isfinite(values)
        n_absent = len(values) - int(is_number.sum())
        if n_absent == (column.count(None) if isinstance(column, (tuple, list)) else 0):
            return values, np.ones(len(values), dtype=np.bool_)
        if type(None) not in kinds:
            return values, is_number
    return _numbers_one_by_one(column)


def _numbers_one_by_one(column: Column) -> tuple[Floats, Flags]:
    values = np.full(len(column), np.nan)
    is_number = np.zeros(len(column), dtype=np.bool_)
    for place, value in enumerate(column):
        if value is None:
            is_number[place] = True
        elif type(value) is float or (type(value) is int and abs(value) < 2**63):
            values[place] = value
            is_number[place] = bool(np.isfinite(values[place]))
    return values, is_number


def plain_metrics(columns: Mapping[str, Column], rules: RecordRules) -> tuple[dict[str, Floats], Flags]:
    """Return the metrics given as arrays of doubles, and which rows have no bad cell in them.

    What `numbers` and `RecordRules.in_range` say column by column, of all of them at once.
    """
    names = [name for name, column in columns.items() if _is_plain(name, column)]
    n_rows = len(columns["timestamp"])
    if not names:
        return {}, np.ones(n_rows, dtype=np.bool_)
    cells: Floats = np.array([columns[name] for name in names])
    low, high = np.array([rules.bounds(name) for name in names]).T[:, :, np.newaxis]
    is_bad = (cells < low) | (cells > high)  # an absent cell is neither
    return dict(zip(names, cells, strict=True)), np.logical_not(is_bad.any(axis=0))


def _is_plain(name: str, column: Column) -> bool:
    is_array = isinstance(column, np.ndarray) and column.dtype == np.float64
    return is_array and name not in REQUIRED and is_metric_name(name)


def times_ms(column: Column) -> Longs:
    """Return ms since 1970, NO_TIME where a cell is no time; each distinct text is read once."""
    if isinstance(column, np.ndarray):
        return column.astype(np.int64)
    return _look_up(column, (str, datetime), _time_of, NO_TIME)


def server_codes(column: Column, known: dict[str, int], rules: RecordRules) -> Codes:
    """Return the code of each usable name, NO_NAME for the other cells; `known` grows by new names."""

    def code_of(sent: object) -> int:
        name = rules.server_name(sent)
        return NO_NAME if name is None else known.setdefault(name, len(known))

    if not isinstance(column, CodedNames):
        repeated = None if known else _repeated_names(column, rules)
        if repeated is None:
            return _look_up(column, (str,), code_of, NO_NAME).astype(np.int32)
        known.update(repeated[0])
        return repeated[1]
    names = column.names
    is_used = np.bincount(column.codes + 1, minlength=len(names) + 1)[1:] > 0
    repeated = None if known or not is_used.all() else _repeated_names(names, rules)
    if repeated is None:
        some = zip(names, is_used.tolist(), strict=True)
        codes = np.array([code_of(name) if used else NO_NAME for name, used in some], dtype=np.int32)
    else:
        known.update(repeated[0])
        codes = repeated[1]
    return np.append(codes, np.int32(NO_NAME))[column.codes]  # the last one is NO_NAME's


def _repeated_names(sent: Any, rules: RecordRules) -> tuple[dict[str, int], Codes] | None:
    """Return the code of each usable name, and of each cell, as found when the same cells came before.

    None for cells that are not all short texts, and for more than are worth keeping.
    """
    try:
        if len(sent) <= _REPEATED_MAX and max(map(len, sent), default=0) <= _REPEATED_CHARS:
            return _read_names(tuple(sent), rules.is_domain_cut, rules.is_lower_case)
    except TypeError:  # a cell that is no text
        pass
    return None


@lru_cache(maxsize=64)  # senders' posts name the same servers again and again
def _read_names(
    sent: tuple[object, ...], is_domain_cut: bool, is_lower_case: bool
) -> tuple[dict[str, int], Codes]:
    rules = RecordRules(None, is_domain_cut=is_domain_cut, is_lower_case=is_lower_case)
    names = [rules.server_name(cell) for cell in sent]
    places = {name: code for code, name in enumerate(dict.fromkeys(n for n in names if n is not None))}
    codes = np.array([NO_NAME if name is None else places[name] for name in names], dtype=np.int32)
    codes.flags.writeable = False
    return places, codes


def _time_of(value: Any) -> int:
    try:
        return parse_timestamp_ms(value)
    except ValueError:
        return NO_TIME


def _look_up(column: Column, kinds: tuple[type, ...], read: Callable[[Any], int], other: int) -> Longs:
    """Return what `read` gives for each distinct cell; only cells of `kinds` are sure to be hashable."""
    try:
        distinct = dict.fromkeys(column)
        if all(isinstance(value, kinds) for value in distinct):
            known: Mapping[Any, int] = {value: read(value) for value in distinct}
            return np.fromiter(map(known.__getitem__, column), np.int64, len(column))
    except TypeError:  # a cell that is no text at all
        pass
    known = {value: read(value) for value in column if isinstance(value, kinds)}
    found = (known.get(value, other) if isinstance(value, kinds) else other for value in column)
    return np.fromiter(found, np.int64, len(column))


class RowsOf(Sequence[dict[str, object]]):
    """Columns seen as the records they hold, made when asked for."""

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["timestamp"])

    @overload
    def __getitem__(self, place: int) -> dict[str, object]: ...
    @overload
    def __getitem__(self, place: slice) -> list[dict[str, object]]: ...
    def __getitem__(self, place: int | slice) -> dict[str, object] | list[dict[str, object]]:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        return {name: cell(name, column, place) for name, column in self.columns.items()}


def layout_of(raw: Sequence[object]) -> Hashable:
    """Return what raw records of several requests must have in common to be joined."""
    if not isinstance(raw, RowsOf):
        return list
    return tuple((name, _kind(column)) for name, column in raw.columns.items())


def join_rows(parts: Sequence[Sequence[object]]) -> Sequence[object]:
    """Return the records of parts of one layout, in their order."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if not isinstance(first, RowsOf):
        return list(chain.from_iterable(parts))
    columns = [part.columns for part in parts if isinstance(part, RowsOf)]
    return RowsOf({name: join_column([one[name] for one in columns]) for name in first.columns})


def join_column(parts: Sequence[Any]) -> Column:
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
