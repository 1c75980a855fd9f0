"""The answer to `GET /predictions/current`, JSON or Arrow, encoded in pieces while it is read.

Owns: the shape of that document, and of the table. Between sweeps only the forecasts' numbers are kept. A
request for the whole fleet gets a document that encodes a server when it is read so far; the newest encoded
servers are kept, so that answers that are read at one time share them. `current` and `stale` change between
sweeps, so a new request tells them anew when that is cheap; what is costly to look up may be as old as some
look-ups took.
Does not know: how forecasts are made, HTTP.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache, partial
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from fleetcast.clock import HOUR_MS, Clock, from_ms, iso_z, monotonic
from fleetcast.errors import FleetcastError, quote
from fleetcast.ingest.rules import to_significant
from fleetcast.schema import (
    SOURCE_FALLBACK,
    SOURCE_MODEL,
    SOURCE_NOT_FORECAST,
    SOURCE_WARMING_UP,
    Flags,
    FleetForecast,
    Floats32,
    Longs,
)
from fleetcast.serving.roster import PresentServers, Roster, is_of, meant
from fleetcast.storage.tables import TIME, bits, column_of, texts

SIGNIFICANT_DIGITS = 5  # a forecast is not more precise than that; 10,000 servers are 70 MB of digits
UNCHANGED_S = 5.0  # staleness comes with time alone
_CHEAP_S = 0.005
_COST_FACTOR = 20.0  # costly joins may take 1/20 of the time at most
_BATCH_SERVERS = 128  # of an Arrow table: half a megabyte, some milliseconds
_SHARED_SERVERS = 512  # encoded forecasts that are kept for other readers: about 5 MB
_LOAD = ("cpu_pct", "mem_pct")  # of which the fleet's means are told
_QUANTILE_NAMES = ("p10", "p50", "p90")
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_NO_FORECAST = b'"forecast":null,"timestamps":[],"source":"%b","sources":{}'


class TooManyServers(FleetcastError):
    """Raised when a document would hold more servers than one may."""


class UnknownServer(FleetcastError):
    """Raised when a request names a server that sent nothing within `gone_after_s`."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model in service as clients see it."""

    version: str
    trained_at: str
    is_base: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the plain form the HTTP interface answers with."""
        return {"version": self.version, "trained_at": self.trained_at, "base": self.is_base}


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """What one sweep expects of each server at most, within its horizon."""

    rows: Mapping[str, int]  # by server
    metrics: tuple[str, ...]
    peaks: Floats32  # (server, metric) the highest p90; NaN = no forecast
    origin_ms: int | None = None
    fleet: Mapping[str, Any] | None = None  # its means hour by hour, as `/status` tells them


@dataclass(frozen=True, slots=True, eq=False)
class _Numbers:
    """What one sweep said, as arrays."""

    metrics: tuple[str, ...]
    quantiles: Floats32  # (server, metric, horizon, quantile)
    is_whole: Flags  # (server, metric) no number of them is missing
    origin_ms: int
    bin_ms: int


@dataclass(frozen=True, slots=True, eq=False)
class _Sweep:
    """The forecasts of one sweep, encoded server by server when they are asked for."""

    model: ModelInfo | None
    rows: Mapping[str, int]  # of each server with a forecast
    is_model: Flags  # (server, metric)
    forecast: Callable[[int], bytes]  # of a row
    metric_sources: Mapping[int, bytes]  # of a row; servers with the same ones share them
    timestamps: bytes = b""  # the same for every server
    metrics: Collection[str] = ()  # that are forecast where a server sends them; none = not known
    numbers: "_Numbers | None" = None
    outlook: Outlook = Outlook({}, (), np.empty((0, 0), np.float32))
    turn: threading.Lock = field(default_factory=threading.Lock)  # many readers at once would starve the rest

    def pieces(self, name: str, source: str) -> tuple[bytes, ...]:
        """Return a server's forecast, its time steps and its sources, not joined."""
        row = self.rows.get(name)
        if row is None:
            return (_NO_FORECAST % source.encode(),)
        with self.turn:
            forecast = self.forecast(row)
        return forecast, self.timestamps, source.encode(), self.metric_sources[row]

    def told_at(self, now: datetime) -> dict[str, Any]:
        """Return what stands before the servers."""
        return {"timestamp": iso_z(now), "model": self.model.as_dict() if self.model else None}

    def source(self, name: str, sent: Collection[str]) -> str:
        """Return where the forecast of a server that sent these metrics comes from, or why it has none."""
        row = self.rows.get(name)
        if row is not None:
            return _source(self.is_model[row].any())
        is_due = not self.metrics or any(metric in self.metrics for metric in sent)
        return SOURCE_WARMING_UP if is_due else SOURCE_NOT_FORECAST


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """One document of many servers; each reader gets its pieces as far as it has read."""

    head: bytes
    present: PresentServers
    rows: Sequence[int]
    sweep: _Sweep

    def __iter__(self) -> Iterator[bytes]:
        yield self.head
        yield from _server_pieces(self.present, self.rows, self.sweep, only_current=False)
        yield b"}}"


@dataclass(frozen=True, slots=True)
class _Joined:
    """One whole document and what it was made of."""

    document: Iterable[bytes]
    changes: tuple[int, int]
    made_at: float
    cost_s: float


class PredictionBoard:
    """Publishes sweeps and answers requests; every method is safe from any thread."""

    def __init__(
        self, roster: Roster, clock: Clock, max_servers: int = 20_000, metrics: Collection[str] = ()
    ) -> None:
        """Publish nothing yet.

        Args:
            max_servers: most servers with forecasts in one document.
            metrics: those that are forecast where a server sends them; none: a sweep says it.
        """
        self._max_servers = max_servers
        self._roster = roster
        self._clock = clock
        self._sweep = replace(_NO_SWEEP, metrics=metrics)
        self._n_sweeps = 0
        self._joined: dict[bool, _Joined] = {}
        self._narrowing = threading.Lock()  # forty at once would only take turns, and the event loop last
        self._lock = threading.Lock()  # one join at a time: others wait for it and share it

    def publish(self, forecast: FleetForecast, model: ModelInfo | None) -> None:
        """Let a sweep be the answer from the next request on; its arrays must not change any more."""
        present = self._roster.servers(self._clock.now())
        silent = {
            name for name, is_stale in zip(present.server_names, present.is_stale, strict=True) if is_stale
        }
        sweep = _prepare(forecast, model)
        self._sweep = replace(sweep, outlook=replace(sweep.outlook, fleet=fleet_means(forecast, silent)))
        self._n_sweeps += 1
        self._joined = {}  # frees the sweep before at once, not at the next request

    @property
    def model(self) -> ModelInfo | None:
        """Return the model of the newest sweep."""
        return self._sweep.model

    @property
    def outlook(self) -> Outlook:
        """Return what the newest sweep expects."""
        return self._sweep.outlook

    def source(self, server_name: str, sent: Collection[str]) -> str:
        """Return where the forecast of a server that sent these comes from, as the document says it."""
        return self._sweep.source(server_name, sent)

    def document(
        self,
        servers: Sequence[str] = (),
        share: tuple[int, int] | None = None,
        *,
        only_current: bool = False,
    ) -> Iterable[bytes]:
        """Return the JSON document in pieces, narrowed to `servers` where any are given.

        What is read of a whole fleet's forecasts, or of a share, is encoded while it is read.

        Args:
            share: (which, of how many): the servers of one of so many equal shares, always the same ones.
        Raises:
            UnknownServer: one of them is not in the fleet.
            TooManyServers: the whole fleet, or the share, does not fit; never of current values alone.
        """
        if servers or share:
            with self._narrowing:
                return self._join(servers, only_current, share)
        with self._lock:
            joined = self._joined.get(only_current)
            if joined is None or not self._is_fresh(joined):
                joined = self._join_all(only_current)
                self._joined[only_current] = joined
        return joined.document

    def table(
        self,
        servers: Sequence[str] = (),
        share: tuple[int, int] | None = None,
        *,
        only_current: bool = False,
    ) -> Iterator[bytes]:
        """Return the same as an Arrow IPC stream, a row a server and metric; a fleet of any size.

        Raises:
            UnknownServer: one of `servers` is not in the fleet.
        """
        now = self._clock.now()
        sweep, present = self._sweep, self._roster.servers(now)
        with self._narrowing:
            rows = _rows_of(present, servers, share)
        return _arrow_pieces(sweep.told_at(now), present, rows, sweep, only_current=only_current)

    def _is_fresh(self, joined: _Joined) -> bool:
        n_sweeps, changes = joined.changes
        if n_sweeps != self._n_sweeps:
            return False
        age_s = monotonic() - joined.made_at
        if changes == self._roster.changes:
            return age_s < UNCHANGED_S
        return joined.cost_s > _CHEAP_S and age_s < _COST_FACTOR * joined.cost_s

    def _join_all(self, only_current: bool) -> _Joined:
        started = monotonic()
        changes = (self._n_sweeps, self._roster.changes)
        document = self._join((), only_current)
        return _Joined(document, changes, monotonic(), monotonic() - started)

    def _join(
        self, servers: Sequence[str], only_current: bool, share: tuple[int, int] | None = None
    ) -> Iterable[bytes]:
        now = self._clock.now()
        sweep, present = self._sweep, self._roster.servers(now)
        rows = _rows_of(present, servers, share)
        if not servers and len(rows) > self._max_servers and not only_current:
            n = 2 * -(-len(present.server_names) // self._max_servers)
            raise TooManyServers(
                f"{len(rows)} servers are too many for one document, at most {self._max_servers}",
                hint=f"ask for shares, ?shard=0/{n} to ?shard={n - 1}/{n}, for ?server= or Arrow",
            )
        head = msgspec.json.encode(sweep.told_at(now))[:-1] + b',"predictions":{'
        if not servers and not only_current:
            return Document(head, present, rows, sweep)
        return [head, *_server_pieces(present, rows, sweep, only_current=only_current), b"}}"]


def _rows_of(present: PresentServers, servers: Sequence[str], share: tuple[int, int] | None) -> Sequence[int]:
    """Return the places of the servers that are asked for; raises UnknownServer."""
    names = present.server_names
    if not servers:
        return [row for row, name in enumerate(names) if share is None or is_of(name, *share)]
    row_of = {name: row for row, name in enumerate(names)}
    servers = [meant(name, row_of) for name in servers]
    missing = [name for name in servers if name not in row_of]
    if missing:
        raise UnknownServer(
            f"unknown server {quote(missing[0])}",
            hint="it sent nothing yet, or nothing for so long that it counts as gone",
        )
    return list(dict.fromkeys(row_of[name] for name in servers))


def _server_pieces(
    present: PresentServers, rows: Sequence[int], sweep: _Sweep, *, only_current: bool
) -> Iterator[bytes]:
    encoder = msgspec.json.Encoder()
    comma = b""
    for row in rows:
        name, cells = present.server_names[row], present.values[row]
        columns = np.flatnonzero(~np.isnan(cells))  # of 512 metrics of a fleet, a server has a few
        current = {
            present.metrics[column]: value
            for column, value in zip(columns.tolist(), cells[columns].tolist(), strict=True)
        }
        source = sweep.source(name, current)
        yield comma + encoder.encode(name) + b':{"current":' + encoder.encode(current) + b","
        if only_current:
            yield b'"source":"' + source.encode() + b'"'
        else:
            yield from sweep.pieces(name, source)
        yield b',"stale":true}' if present.is_stale[row] else b',"stale":false}'
        comma = b","


_Found = tuple[
    Longs, Longs, Flags
]  # (row,) server and metric in the newest sweep, and whether it has a forecast
_LIST = pa.list_(pa.float32())
_CURRENT_FIELDS = (
    ("server_name", pa.string()), ("metric", pa.string()), ("current", pa.float64()),
    ("source", pa.string()), ("stale", pa.bool_()),
)  # fmt: skip
_FORECAST_FIELDS = (
    ("start", TIME),  # of the first bin ahead
    ("step_s", pa.float64()),
    *((name, _LIST) for name in _QUANTILE_NAMES),
)


def _arrow_pieces(
    told: Mapping[str, Any],
    present: PresentServers,
    rows: Sequence[int],
    sweep: _Sweep,
    *,
    only_current: bool,
) -> Iterator[bytes]:
    """Yield an Arrow IPC stream; what `_encode_server` leaves out is null here."""
    fields = _CURRENT_FIELDS if only_current else _CURRENT_FIELDS + _FORECAST_FIELDS
    schema = pa.schema(fields, metadata={name: msgspec.json.encode(value) for name, value in told.items()})
    yield schema.serialize().to_pybytes()
    for start in range(0, len(rows), _BATCH_SERVERS):
        part = np.array(rows[start : start + _BATCH_SERVERS])
        places, of_metric = np.nonzero(~np.isnan(present.values[part]))  # (row,) each
        part = part[places]
        found = _places(present, part, of_metric, sweep)
        columns = _current_columns(present, part, of_metric, sweep, found)
        if not only_current:
            columns += _forecast_columns(sweep.numbers, found)
        yield pa.RecordBatch.from_arrays(columns, schema=schema).serialize().to_pybytes()
    yield _END_OF_STREAM


def _current_columns(
    present: PresentServers, servers: Longs, metrics: Longs, sweep: _Sweep, found: _Found
) -> list[Any]:
    """Return what `_CURRENT_FIELDS` names, of rows that are a server and a metric each."""
    rows, columns, has_forecast = found
    sources = np.full(len(rows), None, dtype=object)
    columns_due = [place for place, name in enumerate(present.metrics) if name in sweep.metrics]
    unknown = present.values[servers[rows < 0]][:, columns_due]
    is_due = np.isfinite(unknown).any(axis=1) | (not sweep.metrics)
    sources[rows < 0] = np.where(is_due, SOURCE_WARMING_UP, SOURCE_NOT_FORECAST)
    is_model = sweep.is_model[rows[has_forecast], columns[has_forecast]]
    sources[has_forecast] = np.where(is_model, SOURCE_MODEL, SOURCE_FALLBACK)
    names = [present.server_names[row] for row in servers.tolist()]
    metric_names = [present.metrics[column] for column in metrics.tolist()]
    return [
        *(texts(column).cast(pa.string()) for column in (names, metric_names)),
        column_of(present.values[servers, metrics], pa.float64()),
        texts(sources).cast(pa.string()),
        pa.Array.from_buffers(pa.bool_(), len(rows), [None, bits(present.is_stale[servers])]),
    ]


def _forecast_columns(numbers: _Numbers | None, found: _Found) -> list[Any]:
    """Return what `_FORECAST_FIELDS` names; null where nothing was said."""
    rows, columns, has_forecast = found
    if numbers is None:
        return [pa.nulls(len(rows), kind) for _, kind in _FORECAST_FIELDS]
    n_rows, validity = len(rows), bits(has_forecast)
    ends = np.cumsum(has_forecast * numbers.quantiles.shape[2])
    offsets = pa.py_buffer(np.concatenate([[0], ends]).astype(np.int32))
    said = numbers.quantiles[rows[has_forecast], columns[has_forecast]]  # (row, horizon, quantile)
    lists = [column_of(said[..., place].reshape(-1), pa.float32()) for place in range(len(_QUANTILE_NAMES))]
    return [
        column_of(np.full(n_rows, numbers.origin_ms + numbers.bin_ms), TIME, validity),
        column_of(np.full(n_rows, numbers.bin_ms / 1000), pa.float64(), validity),
        *(pa.Array.from_buffers(_LIST, n_rows, [validity, offsets], children=[child]) for child in lists),
    ]


def _places(present: PresentServers, servers: Longs, metrics: Longs, sweep: _Sweep) -> _Found:
    """Return where in the newest sweep a server's metric stands, and whether it has a forecast there."""
    rows = np.array([sweep.rows.get(present.server_names[row], -1) for row in servers.tolist()], np.int64)
    if sweep.numbers is None or not len(rows):
        return rows, rows, np.zeros(len(rows), np.bool_)
    column_of = {name: column for column, name in enumerate(sweep.numbers.metrics)}
    columns = np.array([column_of.get(name, -1) for name in present.metrics], np.int64)[metrics]
    is_known = (rows >= 0) & (columns >= 0)
    return rows, columns, is_known & sweep.numbers.is_whole[rows, columns]


def _prepare(forecast: FleetForecast, model: ModelInfo | None) -> _Sweep:
    """Return what is needed to tell a sweep; servers without any forecast are left out."""
    encoder = msgspec.json.Encoder()
    quantiles, metrics = forecast.quantiles, forecast.metrics
    steps = np.arange(1, quantiles.shape[2] + 1)
    targets = [iso_z(from_ms(forecast.origin_ms + int(step) * forecast.bin_ms)) for step in steps]
    timestamps = b',"timestamps":' + encoder.encode(targets) + b',"source":"'
    is_whole = np.asarray(np.isfinite(quantiles).all(axis=(2, 3)))  # (server, metric)
    is_model = np.asarray(is_whole & forecast.sources)
    shared: dict[tuple[bytes, bytes], bytes] = {}
    metric_sources = {}
    for row in np.flatnonzero(is_whole.any(axis=1)).tolist():
        told = {metrics[column]: _source(is_model[row, column]) for column in np.flatnonzero(is_whole[row])}
        key = is_whole[row].tobytes(), is_model[row].tobytes()
        metric_sources[row] = shared.setdefault(key, b'","sources":' + encoder.encode(told))
    rows = {name: row for row, name in enumerate(forecast.server_names)}
    outlook = Outlook(rows, metrics, np.fmax.reduce(quantiles[..., 2], axis=2), forecast.origin_ms)
    # no method of the sweep: that would be a cycle, and its arrays would wait for the collector
    encode = lru_cache(_SHARED_SERVERS)(partial(_encode_server, quantiles, metrics, is_whole))
    return _Sweep(
        model,
        {forecast.server_names[row]: row for row in metric_sources},
        is_model,
        encode,
        metric_sources,
        timestamps,
        metrics,
        _Numbers(metrics, quantiles, is_whole, forecast.origin_ms, forecast.bin_ms),
        outlook,
    )


def _encode_server(quantiles: Floats32, metrics: Sequence[str], is_whole: Flags, row: int) -> bytes:
    """Return one server's forecast; at most a tenth of a millisecond, for the sake of other threads."""
    columns = np.flatnonzero(is_whole[row]).tolist()
    digits = to_significant(  # (metric, quantile, horizon)
        quantiles[row, columns].transpose(0, 2, 1).astype(np.float64), SIGNIFICANT_DIGITS
    ).tolist()
    by_metric = {
        metrics[column]: dict(zip(_QUANTILE_NAMES, of_metric, strict=True))
        for column, of_metric in zip(columns, digits, strict=True)
    }
    return b'"forecast":' + msgspec.json.encode(by_metric)


def _no_forecast(row: int) -> bytes:
    raise KeyError(row)


_NO_SWEEP = _Sweep(None, {}, np.empty((0, 0), np.bool_), _no_forecast, {})


def fleet_means(forecast: FleetForecast, silent: Collection[str] = ()) -> dict[str, Any] | None:
    """Return the mean p50 of CPU and memory over the servers, hour by hour; None without such forecasts.

    Args:
        silent: servers that are left out.
    """
    per_hour = max(1, HOUR_MS // forecast.bin_ms)
    n_hours = forecast.quantiles.shape[2] // per_hour
    is_live = np.array([name not in silent for name in forecast.server_names], np.bool_)
    found: dict[str, Any] = {}
    for metric in (name for name in _LOAD if name in forecast.metrics and n_hours):
        medians = forecast.quantiles[is_live, forecast.metrics.index(metric), : n_hours * per_hour, 1]
        medians = medians[np.isfinite(medians).all(axis=1)]
        if len(medians):
            means = medians.mean(axis=0, dtype=np.float64).reshape(n_hours, per_hour).mean(axis=1)
            found[metric] = np.round(means, 2).tolist()
    if not found:
        return None
    start = iso_z(from_ms(forecast.origin_ms + forecast.bin_ms))
    return {"start": start, "step_s": per_hour * forecast.bin_ms / 1000, **found}


def _source(is_model: np.bool_) -> str:
    return SOURCE_MODEL if is_model else SOURCE_FALLBACK
