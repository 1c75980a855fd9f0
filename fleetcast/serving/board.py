"""The answer to `GET /predictions/current`, encoded in pieces while it is read.

Owns: the shape of that document. Between sweeps only the forecasts' numbers are kept. A request for the whole
fleet gets a document that encodes a server when it is read so far; the newest encoded servers are kept, so
that answers that are read at one time share them. `current` and `stale` change between sweeps, so a new
request tells them anew when that is cheap; what is costly to look up may be as old as some look-ups took.
Does not know: how forecasts are made, HTTP.
"""

import re
import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import msgspec
import numpy as np

from fleetcast.clock import HOUR_MS, Clock, from_ms, iso_z, monotonic
from fleetcast.errors import FleetcastError
from fleetcast.ingest.rules import RecordRules, to_significant
from fleetcast.schema import SOURCE_FALLBACK, SOURCE_MODEL, SOURCE_WARMING_UP, Flags, FleetForecast, Floats32
from fleetcast.serving.roster import PresentServers, Roster

SIGNIFICANT_DIGITS = 5  # a forecast is not more precise than that; 10,000 servers are 70 MB of digits
UNCHANGED_S = 5.0  # staleness comes with time alone
_CHEAP_S = 0.005
_COST_FACTOR = 20.0  # costly joins may take 1/20 of the time at most
_SHARED_SERVERS = 512  # encoded forecasts that are kept for other readers: about 5 MB
_LOAD = ("cpu_pct", "mem_pct")  # of which the fleet's means are told
_NAMES = RecordRules(None)
_QUANTILE_NAMES = ("p10", "p50", "p90")
_WARMING_UP = b'"forecast":null,"timestamps":[],"source":"' + SOURCE_WARMING_UP.encode() + b'","sources":{}'


class TooManyServers(FleetcastError):
    """Raised when a document would hold more servers than one may."""


class BadShare(FleetcastError):
    """Raised when a request names no share of the fleet."""


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
class _Sweep:
    """The forecasts of one sweep, encoded server by server when they are asked for."""

    model: ModelInfo | None
    rows: Mapping[str, int]  # of each server with a forecast
    is_model: Flags  # (server, metric)
    forecast: Callable[[int], bytes]  # of a row
    metric_sources: Mapping[int, bytes]  # of a row; servers with the same ones share them
    timestamps: bytes = b""  # the same for every server
    outlook: Outlook = Outlook({}, (), np.empty((0, 0), np.float32))
    turn: threading.Lock = field(default_factory=threading.Lock)  # many readers at once would starve the rest

    def pieces(self, name: str) -> tuple[bytes, ...]:
        """Return a server's forecast, its time steps and its sources, not joined."""
        row = self.rows.get(name)
        if row is None:
            return (_WARMING_UP,)
        with self.turn:
            forecast = self.forecast(row)
        return forecast, self.timestamps, self.source(name).encode(), self.metric_sources[row]

    def source(self, name: str) -> str:
        """Return where a server's forecast comes from."""
        row = self.rows.get(name)
        return SOURCE_WARMING_UP if row is None else _source(self.is_model[row].any())


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

    def __init__(self, roster: Roster, clock: Clock, max_servers: int = 20_000) -> None:
        """Publish nothing yet.

        Args:
            max_servers: most servers with forecasts in one document.
        """
        self._max_servers = max_servers
        self._roster = roster
        self._clock = clock
        self._sweep = _NO_SWEEP
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

    def source(self, server_name: str) -> str:
        """Return where a server's forecast comes from, as the document says it."""
        return self._sweep.source(server_name)

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
        if servers:
            row_of = {name: row for row, name in enumerate(present.server_names)}
            servers = [name if name in row_of else _NAMES.server_name(name) or name for name in servers]
            missing = [name for name in servers if name not in row_of]
            if missing:
                raise UnknownServer(
                    f"unknown server {missing[0]!r}",
                    hint="it sent nothing yet, or nothing for so long that it counts as gone",
                )
            rows = list(dict.fromkeys(row_of[name] for name in servers))
        else:
            names = present.server_names
            rows = [row for row, name in enumerate(names) if share is None or _is_of(name, *share)]
            if len(rows) > self._max_servers and not only_current:
                n = 2 * -(-len(names) // self._max_servers)
                raise TooManyServers(
                    f"{len(rows)} servers are too many for one document, at most {self._max_servers}",
                    hint=f"ask for shares, ?shard=0/{n} to ?shard={n - 1}/{n}, or for ?server=",
                )
        told = {"timestamp": iso_z(now), "model": sweep.model.as_dict() if sweep.model else None}
        head = msgspec.json.encode(told)[:-1] + b',"predictions":{'
        if not servers and not only_current:
            return Document(head, present, rows, sweep)
        return [head, *_server_pieces(present, rows, sweep, only_current=only_current), b"}}"]


def share_of(text: str | None, servers: Sequence[str] = ()) -> tuple[int, int] | None:
    """Return which share of how many `K/N` asks for.

    >>> share_of("3/16")
    (3, 16)

    Raises:
        BadShare: it names none, or servers are named beside it.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise BadShare(f"no share of the fleet: {text[:50]!r}", hint="?shard=K/N, K from 0 to N - 1")
    if servers:
        raise BadShare("?shard= and ?server= exclude each other")
    return int(found[1]), int(found[2])


def _is_of(server_name: str, which: int, of: int) -> bool:
    """Return whether a server belongs to one of so many equal shares of the fleet."""
    return zlib.crc32(server_name.encode("utf-8", "surrogatepass")) % of == which


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
        yield comma + encoder.encode(name) + b':{"current":' + encoder.encode(current) + b","
        if only_current:
            yield b'"source":"' + sweep.source(name).encode() + b'"'
        else:
            yield from sweep.pieces(name)
        yield b',"stale":true}' if present.is_stale[row] else b',"stale":false}'
        comma = b","


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
