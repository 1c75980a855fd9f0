"""The forecasts of a loop replay: made for many bins at once, read like the buffer's.

Owns: running a model over stretches of bins, and `read_predictions` as the drift monitor asks it.
What was forecast before the replay is the fallback's: the last value, version None, as in a
fleet whose first training is yet to come. Does not know: when to train.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self

import numpy as np

from benchmarks.loop.parts.fleet import ReplayFleet
from fleetcast.bins import RECENT_BINS
from fleetcast.clock import from_ms
from fleetcast.forecast.encoding import decode, encode, is_percent
from fleetcast.forecast.predictor import Forecaster
from fleetcast.schema import QUANTILES, Floats32, Longs, SettledForecasts

HORIZONS = (1, 12, 96)
_WINDOWS_AT_ONCE = 256


def last_values(values: Floats32) -> Floats32:
    """Return the newest known value of the last hour at every bin, (..., bin)."""
    found = values.copy()
    for _ in range(RECENT_BINS - 1):
        gaps = np.isnan(found[..., 1:])
        found[..., 1:][gaps] = found[..., :-1][gaps]
    return found


def forecast_stretch(model: Forecaster, fleet: ReplayFleet, start: int, end: int, every: int = 1) -> Floats32:
    """Forecast from every origin bin, or every few, in [start, end).

    Returns:
        (server, metric, bin, horizon, quantile) at HORIZONS, NaN where the model has none.
    """
    grid, shape = fleet.grid, model.description.grid
    n_metric = len(grid.metrics)
    series = grid.values.reshape(-1, grid.n_bins)
    percents = np.array([is_percent(name) for name in grid.metrics])
    slots = np.array([model.description.slot(name) for name in grid.metrics], np.int64)
    rows, origins = (
        part.ravel() for part in np.meshgrid(np.arange(len(series)), np.arange(start, end, every))
    )
    out = np.full((len(series), end - start, len(HORIZONS), len(QUANTILES)), np.nan, np.float32)
    look_back = np.arange(1 - shape.history_bins, 1)
    networks = model.networks(grid.server_names, grid.metrics).ravel()[rows]
    for row, origin, network in _passes(rows, origins, networks):
        columns = origin[:, None] + look_back
        history = series[row[:, None], np.maximum(columns, 0)]
        history[columns < 0] = np.nan
        metric = row % n_metric
        arrays = encode(history, grid.start_ms + origin * grid.bin_ms, percents[metric], shape)
        answer = model.answer(arrays, slots[metric], network)
        quantiles = decode(answer, arrays.scale, shape)
        quantiles[~arrays.scale.is_usable] = np.nan
        out[row, origin - start] = quantiles[:, [horizon - 1 for horizon in HORIZONS]]
    return out.reshape(len(grid.server_names), n_metric, end - start, len(HORIZONS), len(QUANTILES))


def _passes(rows: Longs, origins: Longs, networks: Longs) -> Iterator[tuple[Longs, Longs, int]]:
    """Yield windows as one pass takes them, with the network they go through."""
    for network in np.unique(networks).tolist():
        chosen = np.flatnonzero(networks == network)
        for first in range(0, len(chosen), _WINDOWS_AT_ONCE):
            part = chosen[first : first + _WINDOWS_AT_ONCE]
            yield rows[part], origins[part], network


@dataclass(eq=False)
class ReplayRecord:
    """Everything forecast so far; `newest` is the last closed bin."""

    fleet: ReplayFleet
    quantiles: Floats32  # (server, metric, origin bin, horizon, quantile)
    version_of: Longs  # (origin bin,) index in `versions`
    versions: list[str | None] = field(default_factory=lambda: [None])
    newest: int = -1

    @classmethod
    def begun(cls, fleet: ReplayFleet) -> Self:
        """Return the record at the replay's beginning."""
        grid = fleet.grid
        quantiles = np.full((*grid.values.shape, len(HORIZONS), len(QUANTILES)), np.nan, np.float32)
        quantiles[:, :, : fleet.begin] = last_values(grid.values)[:, :, : fleet.begin, None, None]
        return cls(fleet, quantiles, np.zeros(grid.n_bins, np.int64), newest=fleet.begin - 1)

    def note(self, start: int, quantiles: Floats32, version: str) -> None:
        """Take in what `version` forecast from the origins `start` on, and close those bins."""
        if version not in self.versions:
            self.versions.append(version)
        end = start + quantiles.shape[2]
        # where the model has no forecast the fallback serves, as in the daemon
        fallback = last_values(self.fleet.grid.values[:, :, max(0, start - RECENT_BINS) : end])
        fallback = fallback[:, :, -quantiles.shape[2] :, None, None]
        self.quantiles[:, :, start:end] = np.where(np.isfinite(quantiles), quantiles, fallback)
        self.version_of[start:end] = self.versions.index(version)
        self.newest = end - 1

    def newest_record_time(self) -> datetime:
        """Return the time of the newest record."""
        return from_ms(self.fleet.grid.start_ms + self.newest * self.fleet.grid.bin_ms)

    def read_predictions(self, start_ms: int, end_ms: int, horizon: int | None = None) -> SettledForecasts:
        """Return what is settled, by target time, half open; see `DataBuffer.read_predictions`."""
        grid = self.fleet.grid
        first = max(0, -(-(start_ms - grid.start_ms) // grid.bin_ms))
        end = min(self.newest + 1, -(-(end_ms - grid.start_ms) // grid.bin_ms))
        wanted = HORIZONS if horizon is None else (horizon,)
        parts = [self._settled(max(first, bins), end, bins) for bins in wanted]
        joined = [np.concatenate([part[column] for part in parts]) for column in range(10)]
        return SettledForecasts(*joined)

    def _settled(self, first: int, end: int, horizon: int) -> list[np.ndarray]:
        """Return the columns of one horizon with targets in [first, end), oldest first."""
        grid, n_bins = self.fleet.grid, max(0, end - first)
        actual = grid.values[:, :, first : first + n_bins].transpose(2, 0, 1)  # (bin, server, metric)
        made = self.quantiles[:, :, first - horizon : first - horizon + n_bins, HORIZONS.index(horizon)]
        made = made.transpose(2, 0, 1, 3)
        settled = np.isfinite(actual) & np.isfinite(made[..., 1])
        bins, servers, metrics = np.nonzero(settled)
        target = first + bins
        names = np.array(grid.server_names, object)
        known = np.array(self.versions, object)
        return [
            grid.start_ms + (target - horizon) * grid.bin_ms,
            grid.start_ms + target * grid.bin_ms,
            np.full(len(bins), horizon, np.int32),
            names[servers],
            np.array(grid.metrics, object)[metrics],
            *(made[settled][:, column].astype(np.float64) for column in range(len(QUANTILES))),
            actual[settled].astype(np.float64),
            known[self.version_of[target - horizon]],
        ]
