"""Forecasts as series for Prometheus: what `GET /metrics/forecasts` says, and remote-write sends.

Owns: names and labels of these series, and which servers have them; they are made once a sweep and shared
by all who ask. How far a forecast looks ahead is a label (`lead`): Prometheus refuses samples of
the future, so every value is one of now. `note` and `note_settled` belong to the thread that sweeps;
`pieces` and `requests` are safe from any thread. Does not know: how forecasts are made, HTTP, the text
format.
"""

import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast.clock import monotonic, to_ms
from fleetcast.errors import FleetcastError
from fleetcast.prometheus.outgoing import Family, Labels, write_requests
from fleetcast.schema import QUANTILES, FleetForecast, Floats32, SettledForecasts
from fleetcast.serving.board import SIGNIFICANT_DIGITS
from fleetcast.serving.past import AccuracyQuestion, Past
from fleetcast.serving.roster import Fleet
from fleetcast.settings import ExportSettings

logger = logging.getLogger(__name__)

VMANOMALY = "vmanomaly"
_OLD_BINS = 3  # without a sweep for so long, "in an hour" would not be an hour from now
_RATIO_S = 3600.0  # a day's errors change slowly, and reading them takes time
_YHAT = ("yhat_lower", "yhat", "yhat_upper")  # of p10, p50, p90
JOB = "fleetcast_forecasts"  # as the documented scrape job is called


@dataclass(frozen=True, slots=True, eq=False)
class _Noted:
    """What one sweep leaves for export; arrays are (server, metric, lead, quantile), NaN = none."""

    origin_ms: int
    server_names: tuple[str, ...]  # in order, those with series
    ahead: Floats32  # made now
    due: Floats32  # made `lead` ago, for the newest closed bin
    actual: Floats32  # (server, metric) of that bin
    n_left_out: int  # servers that match and have no series


@dataclass(slots=True, eq=False)
class _Made:
    """What was made of a sweep, shared by all who ask."""

    noted: _Noted
    is_old: bool
    families: list[Family]
    pieces: list[bytes] | None = None


class Export:
    """Keeps the newest forecasts of the chosen servers, as text and for remote-write."""

    def __init__(self, settings: ExportSettings, fleet: Fleet, horizons: Sequence[int], past: Past) -> None:
        self._is_wanted = re.compile(settings.servers, re.DOTALL).fullmatch
        self._names = settings.names
        self._fleet = fleet
        self._past = past
        self._horizons = sorted(set(horizons))
        self._metrics, self._bin_ms = fleet.history.metrics, fleet.history.bin_ms
        n_values = len(self._metrics) * len(self._horizons) * len(QUANTILES)
        self._max_servers = settings.max_series // (2 * n_values + len(self._metrics))
        self.on_news: Callable[[], None] = lambda: None  # set by the daemon
        self._settled: SettledForecasts | None = None
        self._noted = self._choose((), 0)
        self._lock = threading.Lock()  # one writes: others wait for it and share it
        self._made: _Made | None = None
        self._ratios: list[Family] = []
        self._ratios_at = float("-inf")

    def note_settled(self, rows: SettledForecasts) -> None:
        """Take what was forecast for a bin that has closed; `note` follows."""
        self._settled = rows

    def note(self, forecast: FleetForecast) -> None:
        """Keep what a sweep says of the chosen servers."""
        noted = self._choose(forecast.server_names, forecast.origin_ms)
        place = {name: row for row, name in enumerate(forecast.server_names)}
        rows = [place[name] for name in noted.server_names]
        steps = [horizon - 1 for horizon in self._horizons]
        noted.ahead[...] = forecast.quantiles[rows][:, :, steps]
        self._fill_due(noted)
        self._settled = None
        self._noted = noted
        self.on_news()

    def pieces(self) -> list[bytes]:
        """Return the text of now in pieces, the same list until the next sweep."""
        with self._lock:
            made = self._made_now()
            if made.pieces is None:
                made.pieces = [piece for family in made.families for piece in family.pieces()]
            return made.pieces

    def requests(self) -> Iterator[bytes]:
        """Yield what is to be sent by remote-write now."""
        with self._lock:
            families = self._made_now().families
        return write_requests(families, to_ms(self._fleet.clock.now()), (("job", JOB),))

    def _made_now(self) -> "_Made":
        """Return the families of now; caller holds the lock."""
        noted, is_old = self._noted, self._is_old(self._noted)
        if self._made is None or (self._made.noted, self._made.is_old) != (noted, is_old):
            self._made = _Made(noted, is_old, list(self._families(noted, is_old=is_old)))
        return self._made

    def _choose(self, server_names: Sequence[str], origin_ms: int) -> _Noted:
        """Return room for the first servers by name: no restart changes the choice, and no silent server."""
        matching = sorted(filter(self._is_wanted, server_names))
        chosen = tuple(matching[: self._max_servers])
        shape = (len(chosen), len(self._metrics), len(self._horizons), len(QUANTILES))
        ahead, due = (np.full(shape, np.nan, np.float32) for _ in range(2))
        actual = np.full(shape[:2], np.nan, np.float32)
        return _Noted(origin_ms, chosen, ahead, due, actual, len(matching) - len(chosen))

    def _fill_due(self, noted: _Noted) -> None:
        settled = self._settled
        if settled is None:
            return
        places = np.stack(
            [
                _places(settled.server_name, noted.server_names),
                _places(settled.metric, self._metrics),
                _places(settled.horizon, self._horizons),
            ]
        )
        is_due = (settled.target_ms == noted.origin_ms) & (places >= 0).all(axis=0)
        settled, (rows, columns, leads) = settled.where(is_due), places[:, is_due]
        noted.due[rows, columns, leads] = np.stack([settled.p10, settled.p50, settled.p90], axis=1)
        noted.actual[rows, columns] = settled.actual

    def _is_old(self, noted: _Noted) -> bool:
        closed_ms = noted.origin_ms + self._bin_ms
        return to_ms(self._fleet.clock.now()) - closed_ms > _OLD_BINS * self._bin_ms

    def _families(self, noted: _Noted, *, is_old: bool) -> Iterator[Family]:
        text = "servers that match export.servers and have no series, for export.max_series"
        yield _gauge("fleetcast_forecasts_left_out", text, {(): noted.n_left_out})
        if not noted.server_names:
            return
        closed_s = (noted.origin_ms + self._bin_ms) / 1000
        text = "end of the bin that the newest forecasts start from; long ago: they are left out"
        yield _gauge("fleetcast_forecast_origin_timestamp_seconds", text, {(): closed_s})
        if is_old:
            return
        yield from self._error_ratios()
        rows: list[Labels] = [(("server", name),) for name in noted.server_names]
        cells = self._cells("metric", QUANTILES)
        text = "forecast made now for `lead` from now"
        yield Family("fleetcast_forecast", text, rows, cells, noted.ahead, SIGNIFICANT_DIGITS)
        text = "forecast made `lead` ago for the newest closed bin"
        if self._names != VMANOMALY:
            yield Family("fleetcast_forecast_due", text, rows, cells, noted.due, SIGNIFICANT_DIGITS)
            return
        cells = self._cells("for")
        for place, name in enumerate(_YHAT):
            of_quantile = f"{text}, p{QUANTILES[place] * 100:.0f}"
            yield Family(name, of_quantile, rows, cells, noted.due[..., place], SIGNIFICANT_DIGITS)
        cells = [(("for", name),) for name in self._metrics]
        yield Family("y", "mean of the newest closed bin", rows, cells, noted.actual, SIGNIFICANT_DIGITS)

    def _cells(self, label: str, quantiles: Sequence[float] = ()) -> list[Labels]:
        """Return the labels of each of a server's values (metric, lead[, quantile])."""
        cells: list[Labels] = []
        for metric in self._metrics:
            for lead in map(self._lead, self._horizons):
                of_both = ((label, metric), ("lead", lead))
                of_all = [(*of_both, ("quantile", str(quantile))) for quantile in quantiles]
                cells += of_all or [of_both]
        return cells

    def _lead(self, horizon: int) -> str:
        """Return how far a horizon is ahead, as Prometheus writes a duration."""
        seconds = horizon * self._bin_ms // 1000
        unit, name = next(
            (unit, name) for unit, name in ((3600, "h"), (60, "m"), (1, "s")) if not seconds % unit
        )
        return f"{seconds // unit}{name}"

    def _error_ratios(self) -> list[Family]:
        """Return the fleet's errors of a day over those of repeating the last value; read once an hour."""
        if monotonic() - self._ratios_at >= _RATIO_S:
            try:
                metrics = self._past.accuracy(AccuracyQuestion())["metrics"]
            except (FleetcastError, OSError) as error:  # no reason to keep the forecasts back
                logger.warning("forecast errors not exported error=%s", error)
                return []
            found: dict[Labels, float] = {
                (("metric", metric), ("lead", self._lead(int(horizon)))): of_both["ratio"]
                for metric, by_horizon in metrics.items()
                for horizon, of_both in by_horizon.items()
                if of_both["ratio"] is not None
            }
            text = "error of forecasts settled within a day over that of repeating the last value"
            self._ratios = [_gauge("fleetcast_forecast_error_ratio", text, found)] if found else []
            self._ratios_at = monotonic() if found else float("-inf")  # of a new fleet: look again
        return self._ratios


def _places(values: NDArray[Any], known: Sequence[Any]) -> NDArray[np.int64]:
    """Return the place of each value in `known`; -1 for what other settings knew."""
    place = {value: number for number, value in enumerate(known)}
    return np.fromiter((place.get(value, -1) for value in values.tolist()), np.int64, len(values))


def _gauge(name: str, text: str, samples: Mapping[Labels, float]) -> Family:
    """Return a family of few samples by their labels."""
    return Family(name, text, [()], list(samples), np.array([[*samples.values()]], np.float64))
