"""What a training is given: its export as a grid of bins, and what the daemon says of the attempt.

    {"attempt_id": str, "drifting": [{"server": str, "metric": str,
                                      "changed_ms": int or "since": ISO 8601}, ...],
     "known_changes": [the same, ...]}   what changed before, and is no news to the model

is `training_context.json`, beside the data. `changed_ms` (ms since 1970, when the series changed) goes
before `since` (when it was noticed); an entry with neither is assumed to have changed a day before the
data end. The file is optional, and advice only: wrong entries are skipped with a warning.

Owns: reading the parquet export (raw rows or bins) into (server, metric, bin), with bounded
memory and by the same `bin_means` the server uses; of too many servers a sample; reading the context.
Does not know: who writes them, windows, models, gates.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fleetcast import files
from fleetcast.bins import bin_means, most_servers, sample_servers
from fleetcast.clock import DAY_MS, SystemClock, parse_plain_utc, to_ms
from fleetcast.errors import BadData, CorruptFile
from fleetcast.files import name_regular
from fleetcast.schema import ChangedSeries, Codes, Floats, Floats32, Longs

logger = logging.getLogger(__name__)

MAX_CELLS = 2_000_000_000  # 8 GB of float32
CONTEXT_FILE = "training_context.json"
MAX_DAYS = 100  # older rows are left out: one row of 1970 must not make a grid of 50 years
# how long ago a series changed that is named without a time: drift is noticed within a day
_UNKNOWN_AGE_MS = DAY_MS


@dataclass(frozen=True, slots=True, eq=False)
class TrainingGrid:
    """Bin means of a fleet on one time axis."""

    server_names: tuple[str, ...]
    metrics: tuple[str, ...]
    values: Floats32  # (server, metric, bin) native units, NaN = no record
    start_ms: int
    bin_ms: int

    @property
    def n_bins(self) -> int:
        """Return the length of the time axis."""
        return int(self.values.shape[2])

    @property
    def end_ms(self) -> int:
        """Return the end of the newest bin."""
        return self.start_ms + self.n_bins * self.bin_ms

    @property
    def span_s(self) -> float:
        """Return the length of the time axis in seconds."""
        return self.n_bins * self.bin_ms / 1000

    def bin_of(self, moment_ms: int) -> int:
        """Return the index of the bin that holds a time; it may lie outside the grid."""
        return (moment_ms - self.start_ms) // self.bin_ms

    @classmethod
    def read(
        cls,
        path: Path,
        metrics: tuple[str, ...],
        bin_ms: int,
        max_cells: int = MAX_CELLS,
        wanted: Iterable[str] = (),
    ) -> Self:
        """Read an export.

        Args:
            path: parquet with `timestamp`, `server_name` and metric columns, in any order.
            metrics: the columns wanted; absent ones are left out.
            max_cells: of servers with more (server, metric, bin) cells a sample is read.
            wanted: servers that are in a sample first.
        Raises:
            BadData: the file is not of this shape, or holds no wanted metric.
        """
        try:
            with name_regular(path) as name, pq.ParquetFile(name) as source:
                return cls._read(_Export(path, source, metrics), bin_ms, max_cells, wanted)
        except (pa.ArrowException, OSError, CorruptFile) as error:
            raise BadData(f"{path} cannot be read as parquet: {error}") from error

    @classmethod
    def _read(cls, export: "_Export", bin_ms: int, max_cells: int, wanted: Iterable[str]) -> Self:
        spans = [export.time_span(group) for group in range(export.n_groups)]
        newest = max((span[1] for span in spans), default=-1)
        oldest = max(min((span[0] for span in spans), default=0), newest - MAX_DAYS * DAY_MS)
        start = oldest // bin_ms * bin_ms
        n_bins = max(0, newest // bin_ms - start // bin_ms + 1)
        everyone = export.server_names()
        most = most_servers(max_cells, len(export.metrics), n_bins)
        names = tuple(sorted(sample_servers(everyone, wanted, most, newest // DAY_MS)))
        if len(names) < len(everyone):
            logger.info("a sample of the servers is read servers=%d of=%d", len(names), len(everyone))
        shape = (len(names), len(export.metrics), n_bins)
        values = np.full(shape, np.nan, np.float32)
        codes_of = {name: code for code, name in enumerate(names)}
        for codes, times, rows in _complete_bins(export.groups(codes_of), spans, bin_ms):
            code, bin_start, means = bin_means(codes, times, rows, bin_ms)
            kept = bin_start >= start
            values[code[kept], :, (bin_start[kept] - start) // bin_ms] = means[kept]
        return cls(names, export.metrics, values, start, bin_ms)


_Rows = tuple[Codes, Longs, Floats]  # server codes (row,), times (row,), values (row, metric)


def _complete_bins(groups: Iterator[_Rows], spans: list[tuple[int, int]], bin_ms: int) -> Iterator[_Rows]:
    """Yield the rows of bins to which no later row group adds, so that memory stays bounded."""
    pending: list[_Rows] = []
    for number, rows in enumerate(groups):
        pending.append(rows)
        later = min((span[0] for span in spans[number + 1 :]), default=None)
        joined = _join(pending)
        limit = None if later is None else later // bin_ms * bin_ms
        is_complete = np.ones(len(joined[1]), np.bool_) if limit is None else joined[1] < limit
        if is_complete.any():
            yield _choose(joined, is_complete)
        pending = [] if is_complete.all() else [_choose(joined, ~is_complete)]


def _join(pending: list[_Rows]) -> _Rows:
    if len(pending) == 1:
        return pending[0]
    codes, times, values = zip(*pending, strict=True)
    return np.concatenate(codes), np.concatenate(times), np.concatenate(values)


def _choose(rows: _Rows, mask: Any) -> _Rows:
    return rows[0][mask], rows[1][mask], rows[2][mask]


class _Export:
    """The parquet file, one row group at a time."""

    def __init__(self, path: Path, source: pq.ParquetFile, metrics: tuple[str, ...]) -> None:
        schema = source.schema_arrow
        self.path, self._source = path, source
        self._latest_ms = to_ms(SystemClock().now()) + DAY_MS  # one row of 2262 must not be the whole grid
        missing = [name for name in ("timestamp", "server_name") if name not in schema.names]
        if missing:
            raise BadData(
                f"{path} has no column {' and no '.join(missing)}; it has {', '.join(schema.names)}"
            )
        there = [name for name in metrics if name in schema.names]
        self.metrics = tuple(name for name in there if _is_number(schema, name))
        for name in sorted(set(there) - set(self.metrics)):
            logger.warning(
                "column left out: it holds no numbers file=%s column=%s type=%s",
                *(path, name, schema.field(name).type),
            )
        if not self.metrics:
            raise BadData(
                f"{path} holds none of the metrics {', '.join(metrics)}; it has {', '.join(schema.names)}",
                hint="name the metrics to forecast in bins.forecast_metrics",
            )

    @property
    def n_groups(self) -> int:
        """Return how many row groups there are."""
        return int(self._source.metadata.num_row_groups)

    def time_span(self, group: int) -> tuple[int, int]:
        """Return the oldest and the newest time of a row group."""
        times = _milliseconds(self._source.read_row_group(group, columns=["timestamp"]).column(0))
        is_ahead = times > self._latest_ms
        if is_ahead.any():
            logger.warning("rows of the future left out file=%s count=%d", self.path, is_ahead.sum())
        known = times[(times >= 0) & ~is_ahead]
        return (int(known.min()), int(known.max())) if len(known) else (2**62, -1)

    def server_names(self) -> tuple[str, ...]:
        """Return the distinct names, sorted."""
        names: set[str] = set()
        for group in range(self.n_groups):
            column = self._source.read_row_group(group, columns=["server_name"]).column(0)
            names.update(str(name) for name in column.unique().to_pylist() if name is not None)
        return tuple(sorted(names))

    def groups(self, codes_of: dict[str, int]) -> Iterator[_Rows]:
        """Yield the rows of every row group; rows without a time or a server are dropped."""
        for group in range(self.n_groups):
            table = self._source.read_row_group(group, columns=["timestamp", "server_name", *self.metrics])
            times = _milliseconds(table.column("timestamp"))
            names = table.column("server_name").cast(pa.string()).combine_chunks().dictionary_encode()
            if isinstance(names, pa.ChunkedArray):
                names = names.combine_chunks()
            lookup = np.array(
                [codes_of.get(str(name), -1) for name in names.dictionary.to_pylist()] + [-1], np.int32
            )
            codes = lookup[names.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
            columns = [table.column(metric).cast(pa.float64()).to_numpy() for metric in self.metrics]
            kept = (codes >= 0) & (times >= 0) & (times <= self._latest_ms)
            values = np.stack(columns, axis=1)[kept] if columns else np.empty((0, 0))
            values[~np.isfinite(values)] = np.nan
            yield codes[kept], times[kept], values


def _is_number(schema: pa.Schema, name: str) -> bool:
    kind = schema.field(name).type
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind))


def _milliseconds(column: pa.ChunkedArray) -> Longs:
    """Return times in ms since 1970, -1 where there is none."""
    if not pa.types.is_timestamp(column.type):
        raise BadData(f"column timestamp must hold times, got {column.type}")
    unit = pa.timestamp("ms", tz=column.type.tz)
    numbers = column.cast(unit, safe=False).cast(pa.int64()).fill_null(-1)
    return np.asarray(numbers.to_numpy(), np.int64)


@dataclass(frozen=True)
class TrainingContext:
    """The attempt a training belongs to, and what drifted; empty without a file."""

    attempt_id: str | None = None
    drifting: tuple[Mapping[str, Any], ...] = ()
    known: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def find(cls, data: Path, attempt_id: str | None) -> "TrainingContext":
        """Return the context beside the data or in the working directory.

        Args:
            attempt_id: the attempt this process was started for; a context of another one is
                a leftover and says nothing about this data.
        """
        for path in (data.parent / CONTEXT_FILE, Path(CONTEXT_FILE)):
            try:
                content = files.read_json(path)
            except FileNotFoundError:
                continue
            except (CorruptFile, OSError) as error:
                logger.warning("training context ignored reason=%s", error)
                continue
            return cls._parse(content, attempt_id, path)
        return cls(attempt_id)

    @classmethod
    def _parse(cls, content: Mapping[str, Any], attempt_id: str | None, path: Path) -> "TrainingContext":
        own_id = content.get("attempt_id")
        if attempt_id is not None and own_id is not None and own_id != attempt_id:
            logger.warning("training context ignored file=%s is of attempt=%s", path, own_id)
            return cls(attempt_id)
        drifting, known = (_entries(content.get(name)) for name in ("drifting", "known_changes"))
        return cls(attempt_id or (own_id if isinstance(own_id, str) else None), drifting, known)

    def wanted_servers(self) -> list[str]:
        """Return the servers that must be in a sample of the fleet, the worst first."""
        return [str(item.get("server")) for item in self.drifting]

    def changed_series(self, grid: TrainingGrid) -> tuple[ChangedSeries, ...]:
        """Return the drifting series of a grid, each once, with the bin of its (first) change."""
        oldest: dict[tuple[int, int], ChangedSeries] = {}
        for item in _find_changes(self.drifting, grid):
            known = oldest.get((item.server, item.metric))
            if known is None or item.since_bin < known.since_bin:
                oldest[item.server, item.metric] = item
        return tuple(oldest.values())

    def all_changes(self, grid: TrainingGrid) -> tuple[ChangedSeries, ...]:
        """Return every change known of a grid's series, each series with its newest."""
        newest = {(item.server, item.metric): item for item in _find_changes(self.known, grid)}
        newest |= {(item.server, item.metric): item for item in self.changed_series(grid)}
        return tuple(newest.values())


def _entries(content: object) -> tuple[Mapping[str, Any], ...]:
    return tuple(item for item in content if isinstance(item, dict)) if isinstance(content, list) else ()


def _find_changes(entries: Iterable[Mapping[str, Any]], grid: TrainingGrid) -> Iterator[ChangedSeries]:
    servers = {name: index for index, name in enumerate(grid.server_names)}
    metrics = {name: index for index, name in enumerate(grid.metrics)}
    absent = []
    for item in entries:
        server, metric = servers.get(str(item.get("server"))), metrics.get(str(item.get("metric")))
        since_bin = _since_bin(item, grid)
        if server is None or metric is None or since_bin is None:
            absent.append(item)
            continue
        yield ChangedSeries(server, metric, since_bin)
    if absent:
        logger.warning(
            "changed series ignored: not in the data count=%d first=%.200s", len(absent), absent[0]
        )


def _since_bin(item: Mapping[str, Any], grid: TrainingGrid) -> int | None:
    """Return the bin a change began in, None where that is no time before the data's end."""
    try:
        since_bin = grid.bin_of(_changed_ms(item, grid))
    except (ValueError, OverflowError):
        return None
    return max(0, since_bin) if since_bin < grid.n_bins else None


def _changed_ms(item: Mapping[str, Any], grid: TrainingGrid) -> int:
    """Return when a series changed; ValueError where the entry holds no time."""
    changed_ms, since = item.get("changed_ms"), item.get("since")
    if changed_ms is not None:
        if isinstance(changed_ms, bool) or not isinstance(changed_ms, int | float):
            raise ValueError(f"changed_ms {changed_ms!r} is no number")
        return int(changed_ms)
    return grid.end_ms - _UNKNOWN_AGE_MS if since is None else to_ms(parse_plain_utc(str(since)))
