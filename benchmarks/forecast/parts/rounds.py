"""Every forecaster on the same windows, walked through the test days in the order of time.

Owns: the walk, the naive forecasts, how settled forecasts feed back. Does not know: how a forecaster
was trained, how scores are made of sums.

Feedback begins with nothing at the first test day and knows at each origin what has settled by then.
Here it gets a forecast every `every` bins; in a daemon it gets one every bin.

How forecasts are scored: relative MAE, WAPE, MASE, pinball, coverage, per metric and horizon.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fleetcast.bins import DAY_BINS, HISTORY_BINS
from fleetcast.forecast.encoding import is_percent
from fleetcast.forecast.experts.layer import ExpertLayer
from fleetcast.forecast.naive import NaiveForecaster
from fleetcast.schema import QUANTILES, Floats, Floats32, HistoryWindow
from fleetcast.training.grid import TrainingGrid

# name → bins ahead (from, to), of 5-minute bins
HORIZONS: Mapping[str, tuple[int, int]] = {
    "5min": (1, 1),
    "1h": (12, 12),
    "8h": (96, 96),
    "mean_1h": (1, 12),
    "mean_8h": (1, 96),
}
_MIN_RELATIVE = 1e-3  # a geometric mean over servers must not be ruled by one exact zero


@dataclass
class Sums:
    """Sums of one forecaster's losses over windows, (server, metric, horizon)."""

    absolute: Floats
    pinball: Floats
    covered: Floats
    has_quantiles: bool = False

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "Sums":
        """Return sums over no windows."""
        return cls(np.zeros(shape), np.zeros(shape), np.zeros(shape))

    def add(self, quantiles: Floats32, actual: Floats32, known: NDArray[np.bool_]) -> None:
        """Add one origin's forecasts (server, metric, horizon, quantile); a point forecast has one."""
        self.has_quantiles = quantiles.shape[-1] == len(QUANTILES)
        middle = quantiles[..., quantiles.shape[-1] // 2]
        self.absolute += np.where(known, np.abs(middle - actual), 0.0)
        if not self.has_quantiles:
            return
        missed, levels = actual[..., None] - quantiles, np.array(QUANTILES)
        losses = np.maximum(levels * missed, (levels - 1) * missed).mean(axis=-1)
        self.pinball += np.where(known, losses, 0.0)
        is_covered = (actual >= quantiles[..., 0]) & (actual <= quantiles[..., -1])
        self.covered += is_covered & known


def scores(
    sums: Mapping[str, Sums], counts: Floats, sizes: Floats, steps: Floats, metrics: tuple[str, ...]
) -> dict[str, dict[str, dict[str, dict[str, float | None]]]]:
    """Return forecaster → metric → horizon → score; None where it has no meaning.

    Args:
        sums: by forecaster; "last" must be among them.
        counts: (server, metric, horizon) windows scored.
        sizes: the same shape, summed |actual|.
        steps: (server, metric) mean |step| from bin to bin in training, MASE's unit.
    """
    return {
        name: {
            metric: {
                horizon: _cell(side, sums["last"], counts, sizes, steps, index, slice(start - 1, stop))
                for horizon, (start, stop) in HORIZONS.items()
            }
            for index, metric in enumerate(metrics)
        }
        for name, side in sums.items()
    }


def _cell(
    side: Sums, last: Sums, counts: Floats, sizes: Floats, steps: Floats, metric: int, bins: slice
) -> dict[str, float | None]:
    here = (slice(None), metric, bins)
    n_server = counts[here].sum(axis=1)
    total = float(n_server.sum())
    error = side.absolute[here].sum(axis=1)
    naive = last.absolute[here].sum(axis=1)
    usable = (n_server > 0) & (naive > 0)
    ratios = np.maximum(error[usable] / naive[usable], _MIN_RELATIVE)
    scaled = (n_server > 0) & (steps[:, metric] > 0)
    mase = error[scaled] / n_server[scaled] / steps[scaled, metric]
    size = float(sizes[here].sum())
    return {
        "relative_mae": _rounded(np.exp(np.log(ratios).mean())) if usable.any() else None,
        "wape": _rounded(error.sum() / size) if size > 0 else None,
        "mase": _rounded(np.median(mase)) if scaled.any() else None,
        "pinball": _rounded(side.pinball[here].sum() / total) if total and side.has_quantiles else None,
        "coverage": _rounded(side.covered[here].sum() / total) if total and side.has_quantiles else None,
    }


def _rounded(value: float) -> float:
    return round(float(value), 4)


HORIZON, SETTLED = 96, (1, 12, 96)
OURS, OURS_FED = "ours", "ours_feedback"


class Forecasts(Protocol):
    """Anything that forecasts a window."""

    def predict(self, window: HistoryWindow) -> Floats32: ...


@dataclass(frozen=True)
class Walk:
    """Which origins are visited, and which of them are scored."""

    start: int  # first origin, in bins of the grid
    stop: int  # every target lies before it
    every: int  # bins between two origins
    scored_every: int  # origins between two that are scored

    @property
    def origins(self) -> NDArray[np.int64]:
        """Return the origins, oldest first."""
        return np.arange(self.start, self.stop - HORIZON, self.every)


def measured(
    grid: TrainingGrid, model: Forecasts, peers: Mapping[str, Forecasts], walk: Walk, split: int
) -> dict[str, Any]:
    """Return the scores of every forecaster on the servers of a grid.

    Args:
        split: bins before it are training days: what the naive choice and MASE's unit are made from.
    """
    shape = (*grid.values.shape[:2], HORIZON)
    prefers_yesterday = _prefers_yesterday(grid.values[:, :, :split])
    naive = NaiveForecaster(HORIZON)
    served = _Served(grid)
    names = ("last", "yesterday", "better", "fallback", *peers, OURS, OURS_FED)
    sums = {name: Sums.empty(shape) for name in names}
    counts, sizes = np.zeros(shape), np.zeros(shape)
    cannot: dict[str, NDArray[np.bool_]] = {}  # (metric,) that a peer never forecasts
    for number, origin in enumerate(walk.origins.tolist()):
        window = _window(grid, origin)
        ours = model.predict(window)
        fed = served.serve(origin, ours)
        if number % walk.scored_every:
            continue
        last = np.repeat(grid.values[:, :, origin, None], HORIZON, axis=2)
        yesterday = _yesterday(grid, origin)
        forecasts: dict[str, Floats32] = {
            "last": last[..., None],
            "yesterday": yesterday[..., None],
            "better": np.where(prefers_yesterday, yesterday, last)[..., None],
            "fallback": naive.predict(window),
            **{name: peer.predict(window) for name, peer in peers.items()},
            OURS: ours,
            OURS_FED: fed,
        }
        actual = grid.values[:, :, origin + 1 : origin + 1 + HORIZON]
        known = np.isfinite(actual)
        for name, forecast in forecasts.items():  # the same windows for each forecaster
            can = np.isfinite(forecast).any(axis=(0, 2, 3))  # (metric,)
            cannot.setdefault(name, np.ones(len(can), np.bool_))
            cannot[name] &= ~can
            known &= np.isfinite(forecast).all(axis=-1) | ~can[:, None]
        counts += known
        sizes += np.where(known, np.abs(actual), 0.0)
        for name, forecast in forecasts.items():
            sums[name].add(np.nan_to_num(forecast), actual, known)
    steps = np.nan_to_num(_mean(np.abs(np.diff(grid.values[:, :, :split], axis=2))))
    table: dict[str, Any] = dict(scores(sums, counts, sizes, steps, grid.metrics))
    for name in peers:
        never = [metric for metric, is_so in zip(grid.metrics, cannot[name], strict=True) if is_so]
        table[name] |= dict.fromkeys(never, None)
    return table


class _Served:
    """The expert layer over a grid: learns from each bin as it closes, serves one origin after the other."""

    def __init__(self, grid: TrainingGrid) -> None:
        self._grid = grid
        self._layer = ExpertLayer(np.array([is_percent(metric) for metric in grid.metrics]), SETTLED)
        self._rows = np.arange(len(grid.server_names))
        self._closed = -1  # newest bin that was settled

    def serve(self, origin: int, quantiles: Floats32) -> Floats32:
        """Return the forecasts of one origin as clients get them."""
        for number in range(max(self._closed, origin - HORIZON) + 1, origin + 1):
            self._layer.settle(number, self._rows, self._grid.values[:, :, number])
        self._closed = origin
        experts = self._layer.experts(_window(self._grid, origin).values, DAY_BINS, HORIZON)
        return self._layer.serve(self._rows, origin, experts, quantiles)


def _window(grid: TrainingGrid, origin: int) -> HistoryWindow:
    values = grid.values[:, :, max(0, origin + 1 - HISTORY_BINS) : origin + 1]
    end_ms = grid.start_ms + origin * grid.bin_ms
    return HistoryWindow(grid.server_names, grid.metrics, values, end_ms, grid.bin_ms)


def _yesterday(grid: TrainingGrid, origin: int) -> Floats32:
    return grid.values[:, :, origin + 1 - DAY_BINS : origin + 1 - DAY_BINS + HORIZON]


def _prefers_yesterday(past: Floats32) -> NDArray[np.bool_]:
    """Return where same time yesterday beat the last value on the training days."""
    better = np.zeros((*past.shape[:2], HORIZON), np.bool_)
    for horizon in range(1, HORIZON + 1):
        actual = past[:, :, DAY_BINS:]
        by_yesterday = _mean(np.abs(actual - past[:, :, :-DAY_BINS]))
        by_last = _mean(np.abs(actual - past[:, :, DAY_BINS - horizon : -horizon]))
        better[..., horizon - 1] = by_yesterday < by_last
    return better


def _mean(values: Floats32) -> NDArray[np.float64]:
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis=-1, dtype=np.float64)
    return np.asarray(total / np.maximum(known.sum(axis=-1), 1))
