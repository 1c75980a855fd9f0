"""A recording of a fleet: rows of a Parquet file or folder, in the order of their time.

Owns: reading, mapping columns to metrics, cutting and time shift. Does not know: where the records
are sent. A recording is held in memory: 12 bytes per row plus 8 per metric and row.

The grammar of `--map`, for example `cpu_pct=cpu_r_norm01*100`:

    MAP    = METRIC | METRIC "=" TERM { "+" TERM }
    TERM   = COLUMN [ "*" FACTOR ]
    METRIC = a lower-case name as the daemon takes it: [a-z][a-z0-9_]*
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetcast.clock import DAY_MS, from_ms, iso_z, to_ms
from fleetcast.errors import BadData, CorruptFile, SettingsError, quote
from fleetcast.files import name_regular
from fleetcast.schema import Codes, Floats, Longs

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

METRIC_NAME = re.compile(r"[a-z][a-z0-9_]*")
TIME_COLUMN = "timestamp"
SERVER_COLUMN = "server_name"


@dataclass(frozen=True)
class Formula:
    """One metric as a weighted sum of columns; it is absent where one of them is."""

    metric: str
    terms: tuple[tuple[str, float], ...]  # (column, factor)

    def evaluate(self, column: Callable[[str], Floats]) -> Floats:
        """Return the metric, given each column (NaN = absent)."""
        name, factor = self.terms[0]
        total = column(name) * factor
        for name, factor in self.terms[1:]:
            total = total + column(name) * factor
        return total


def parse_formula(text: str) -> Formula:
    """Return the formula that a `--map` argument means.

    >>> parse_formula("disk_io_mb_s=disk_read_mb_s+disk_write_mb_s")
    Formula(metric='disk_io_mb_s', terms=(('disk_read_mb_s', 1.0), ('disk_write_mb_s', 1.0)))
    >>> parse_formula("cpu_pct=cpu_r_norm01*100").terms
    (('cpu_r_norm01', 100.0),)
    >>> parse_formula("mem_pct").terms
    (('mem_pct', 1.0),)

    Raises:
        SettingsError: it is no formula; the message says what would be one.
    """
    metric, _, right = text.partition("=")
    metric = metric.strip()
    if not METRIC_NAME.fullmatch(metric):
        right = "a metric is named [a-z][a-z0-9_]*"
        raise SettingsError([f"--map {quote(text)}: {right}, got {quote(metric)}"])
    if "=" not in text:
        right = metric
    return Formula(metric, tuple(_parse_term(term, text) for term in right.split("+")))


def _parse_term(term: str, text: str) -> tuple[str, float]:
    column, _, factor_text = term.partition("*")
    column = column.strip()
    try:
        factor = float(factor_text) if "*" in term else 1.0
    except ValueError:
        factor = math.nan
    if not column or not math.isfinite(factor):
        raise SettingsError(
            [f"--map {quote(text)}: expected COLUMN or COLUMN*FACTOR, got {quote(term.strip())}"],
            hint="for example cpu_pct=cpu_r_norm01*100 or io=read+write*0.5",
        )
    return column, factor


def check_distinct(formulas: Sequence[Formula]) -> None:
    """Refuse two formulas for one metric: the later would silently win."""
    names = [formula.metric for formula in formulas]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise SettingsError([f"--map gives {name} twice" for name in doubled])


@dataclass(frozen=True)
class Cut:
    """Which part of a file to read; None means all of it."""

    servers: frozenset[str] | None = None
    start: datetime | None = None
    days: float | None = None


@dataclass(frozen=True, eq=False)
class Recording:
    """Rows in the order of time, then server; NaN = absent."""

    server_names: tuple[str, ...]
    server_codes: Codes  # (row,)
    timestamps_ms: Longs  # (row,) non-decreasing
    metrics: dict[str, Floats]  # each (row,)

    def __len__(self) -> int:
        return len(self.timestamps_ms)

    @property
    def first(self) -> datetime:
        """Return the time of the first row."""
        return from_ms(int(self.timestamps_ms[0]))

    @property
    def last(self) -> datetime:
        """Return the time of the last row."""
        return from_ms(int(self.timestamps_ms[-1]))

    def shift(self, by: timedelta) -> "Recording":
        """Return the same rows at other times."""
        return replace(self, timestamps_ms=self.timestamps_ms + by // timedelta(milliseconds=1))

    def compact(self) -> "Recording":
        """Return the same rows without the names that no row uses."""
        used, codes = np.unique(self.server_codes, return_inverse=True)
        names = tuple(self.server_names[code] for code in used)
        return replace(self, server_names=names, server_codes=codes.astype(np.int32))

    def batches(self, batch_s: float, max_records: int) -> Iterator[slice]:
        """Yield runs of rows of one `batch_s` of data time each, none longer than `max_records`."""
        steps = self.timestamps_ms // max(1, round(batch_s * 1000))
        edges = np.flatnonzero(np.diff(steps)) + 1
        for first, end in zip([0, *edges.tolist()], [*edges.tolist(), len(self)], strict=True):
            for start in range(first, end, max_records):
                yield slice(start, min(start + max_records, end))

    def records(self, rows: slice) -> list[dict[str, Any]]:
        """Return rows as the daemon takes them; absent values are left out."""
        found: list[dict[str, Any]] = [
            {TIME_COLUMN: iso_z(from_ms(moment)), SERVER_COLUMN: self.server_names[code]}
            for moment, code in zip(
                self.timestamps_ms[rows].tolist(), self.server_codes[rows].tolist(), strict=True
            )
        ]
        for name, values in self.metrics.items():
            for record, value in zip(found, values[rows].tolist(), strict=True):
                if value == value:  # not NaN
                    record[name] = value
        return found


def load_recording(path: Path, formulas: Sequence[Formula] = (), cut: Cut | None = None) -> Recording:
    """Read a recording; without formulas every numeric column is a metric of its own name.

    Raises:
        BadData: the file is missing, is no Parquet, lacks a column, or has no such rows.
    """
    cut = cut or Cut()
    table = _read(path, formulas)
    times = _times_ms(table, path)
    names, codes = _servers(table, path)
    columns = formulas or _own_columns(table, path)
    metrics = {formula.metric: formula.evaluate(lambda name: _floats(table, name)) for formula in columns}
    wanted = np.any([np.isfinite(values) for values in metrics.values()], axis=0)
    wanted &= _inside(times, names, codes, cut)
    if not wanted.any():
        raise BadData(f"{path} holds no such rows: {_describe(times, names, cut)}")
    order = np.flatnonzero(wanted)
    order = order[np.lexsort((codes[order], times[order]))]
    return Recording(
        names,
        codes[order],
        times[order],
        {name: np.where(np.isfinite(v[order]), v[order], np.nan) for name, v in metrics.items()},
    )


def _read(path: Path, formulas: Sequence[Formula]) -> "pa.Table":
    import pyarrow.dataset as ds  # here: --help answers without it
    from pyarrow.lib import ArrowException

    try:
        data = ds.dataset([str(file) for file in _files(path)], format="parquet")
        needed = [TIME_COLUMN, SERVER_COLUMN, *(name for f in formulas for name, _ in f.terms)]
        missing = sorted(set(needed) - set(data.schema.names))
        if missing:
            have = ", ".join(data.schema.names)
            raise BadData(f"{path} has no column {', '.join(missing)}", hint=f"it has {have}")
        return data.to_table(columns=list(dict.fromkeys(needed)) if formulas else None)
    except FileNotFoundError as error:
        raise BadData(f"{path} does not exist") from error
    except (ArrowException, OSError, CorruptFile) as error:
        raise BadData(f"{path} cannot be read as Parquet: {error}") from error


def _files(path: Path) -> list[Path]:
    """Return the file, or the readable ones of a folder in the order of their names.

    Raises:
        FileNotFoundError: there is none.
        CorruptFile, ArrowException: it is one that cannot be read.
    """
    if not path.is_dir():
        _check(path)
        return [path]
    found = []
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
        if hidden or file.is_dir():
            continue
        try:
            _check(file)
            found.append(file)
        except (OSError, CorruptFile, ValueError) as error:
            logger.warning("skipped an unreadable file of the recording path=%s error=%s", file, error)
    if not found:
        raise BadData(f"{path} holds no Parquet file that can be read")
    return found


def _check(path: Path) -> None:
    import pyarrow.parquet as pq

    with name_regular(path) as name:
        pq.read_schema(name)


def _times_ms(table: "pa.Table", path: Path) -> Longs:
    import pyarrow as pa

    column = table[TIME_COLUMN]
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if not (pa.types.is_timestamp(column.type) or is_text):
        raise BadData(f"{path}: {TIME_COLUMN} must be a timestamp or ISO 8601 text, is {column.type}")
    try:
        if is_text:
            column = column.cast(pa.timestamp("ms", "UTC"))
        times = column.cast(pa.timestamp("ms", column.type.tz), safe=False).cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise BadData(f"{path}: {TIME_COLUMN} cannot be read: {error}") from error
    if times.null_count:
        raise BadData(f"{path}: {TIME_COLUMN} is absent in {times.null_count} rows")
    return np.asarray(times.to_numpy(), dtype=np.int64)


def _servers(table: "pa.Table", path: Path) -> tuple[tuple[str, ...], Codes]:
    import pyarrow as pa

    column = table[SERVER_COLUMN]
    if column.null_count:
        raise BadData(f"{path}: {SERVER_COLUMN} is absent in {column.null_count} rows")
    encoded = column.cast(pa.string()).combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.unify_dictionaries().combine_chunks()
    found = np.asarray(encoded.dictionary.to_pylist(), dtype=object)
    by_name = np.argsort(found)
    rank = np.empty(len(found), dtype=np.int32)
    rank[by_name] = np.arange(len(found), dtype=np.int32)
    return tuple(found[by_name]), rank[encoded.indices.to_numpy()]


def _own_columns(table: "pa.Table", path: Path) -> list[Formula]:
    import pyarrow as pa

    names = [
        field.name
        for field in table.schema
        if (pa.types.is_floating(field.type) or pa.types.is_integer(field.type))
        and METRIC_NAME.fullmatch(field.name)
    ]
    if not names:
        raise BadData(f"{path} has no numeric column with a metric's name", hint="name them with --map")
    return [Formula(name, ((name, 1.0),)) for name in names]


def _floats(table: "pa.Table", name: str) -> Floats:
    import pyarrow as pa

    try:
        return np.asarray(table[name].cast(pa.float64()).to_numpy(), dtype=np.float64)
    except pa.ArrowInvalid as error:
        raise BadData(f"column {name} is not numeric: {error}") from error


def _inside(
    times: Longs, names: tuple[str, ...], codes: Codes, cut: Cut
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    wanted = np.ones(len(times), dtype=bool)
    if cut.servers is not None:
        unknown = sorted(cut.servers - set(names))
        if unknown:
            raise BadData(f"no such server: {', '.join(unknown)}", hint=f"there are {json.dumps(names[:20])}")
        wanted &= np.array([name in cut.servers for name in names])[codes]
    start_ms = to_ms(cut.start) if cut.start else int(times[wanted].min(initial=times.max(initial=0)))
    wanted &= times >= start_ms
    if cut.days is not None:
        wanted &= times < start_ms + round(cut.days * DAY_MS)
    return wanted


def _describe(times: Longs, names: tuple[str, ...], cut: Cut) -> str:
    if not len(times):
        return "it is empty"
    have = f"it has {len(names)} servers from {from_ms(times.min())} to {from_ms(times.max())}"
    return f"asked for start={cut.start} days={cut.days}; {have}"
