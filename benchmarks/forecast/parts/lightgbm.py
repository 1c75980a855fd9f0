"""LightGBM as a peer: one global model per quantile over lag features.

Owns: its features and its training. It is given what helped our own model: windows are measured
from their last value in spreads of their last day (`fleetcast.forecast.encoding`), and the exact
values a day and a week before each target. All servers, metrics and horizons share one model;
horizons between the knots are interpolated. Not installed: `available()` is False, its column n/a.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast.bins import RECENT_BINS
from fleetcast.forecast.encoding import (
    Scale,
    clip_implausible,
    is_log_scaled,
    is_percent,
    masked_mean,
    masked_std,
    to_z,
)
from fleetcast.schema import QUANTILES, Floats32, HistoryWindow, Longs
from fleetcast.training.grid import TrainingGrid

HORIZON, DAY, WEEK, HISTORY = 96, 288, 2016, 2304
KNOTS = np.array([*range(1, 13), 18, 24, 36, 48, 60, 72, 84, 96])  # every bin to 1 h
_LAGS = (1, 2, 3, 4, 5, 11, 23, 35, 71, 143, 287)  # bins before the last value; that one is 0
_MEANS, _SPREADS = (3, 6, 12, 36, 72, 144, 288), (12, 72)  # bins
_TREES, _LEAVES, _RATE, _LEAST_IN_LEAF = 150, 63, 0.1, 100
_DAY_MS = 86_400_000


def available() -> bool:
    """Return whether lightgbm is installed and loads; its library needs libgomp of the system."""
    try:
        import lightgbm  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


class LightGbm:
    """One booster per quantile."""

    def __init__(self, grid: TrainingGrid, n_window: int, seed: int, threads: int = 1) -> None:
        """Train on windows drawn uniformly from the grid.

        Args:
            n_window: windows drawn; each gives one row per knot.
        """
        import lightgbm

        self._metrics = grid.metrics
        rows, targets = _training_rows(grid, n_window, seed)
        options = {
            **{"objective": "quantile", "learning_rate": _RATE, "num_leaves": _LEAVES, "verbosity": -1},
            **{"min_data_in_leaf": _LEAST_IN_LEAF, "feature_fraction": 0.8, "bagging_fraction": 0.8},
            **{"bagging_freq": 1, "num_threads": threads, "seed": seed, "deterministic": True},
        }
        data = lightgbm.Dataset(rows, targets, free_raw_data=False, params={"verbosity": -1})
        self._boosters: list[Any] = [
            lightgbm.train({**options, "alpha": level}, data, num_boost_round=_TREES) for level in QUANTILES
        ]
        self._threads = threads

    def predict(self, window: HistoryWindow) -> Floats32:
        """Return quantiles (server, metric, horizon, quantile) in native units."""
        n_server, n_metric, n_bins = window.values.shape
        history = window.values.reshape(n_server * n_metric, n_bins)
        metrics = np.tile(np.arange(n_metric), n_server)
        ends = np.full(len(history), window.end_bin_ms, np.int64)
        rows, scale = _features(_full(history), ends, metrics, self._metrics, window.bin_ms)
        answers = [booster.predict(rows, num_threads=self._threads) for booster in self._boosters]
        at_knots = np.sort(np.stack(answers, axis=-1).reshape(len(history), len(KNOTS), -1), axis=-1)
        weights = np.stack([np.interp(np.arange(1, HORIZON + 1), KNOTS, row) for row in np.eye(len(KNOTS))])
        between = np.einsum("nkq,kh->nhq", at_knots, weights).astype(np.float32)
        return scale.native(between).reshape(n_server, n_metric, HORIZON, len(QUANTILES))


def _training_rows(grid: TrainingGrid, n_window: int, seed: int) -> tuple[Floats32, Floats32]:
    """Return features (row, feature) and targets (row,) in spreads, where the target is known."""
    random = np.random.default_rng(seed)
    series = grid.values.reshape(-1, grid.n_bins)
    n_metric = len(grid.metrics)
    chosen = random.integers(len(series), size=2 * n_window)
    origins = random.integers(DAY, grid.n_bins - HORIZON, size=2 * n_window)
    recent = series[chosen[:, None], origins[:, None] + np.arange(1 - RECENT_BINS, 1)]
    kept = np.flatnonzero(np.isfinite(recent).all(axis=1))[:n_window]
    chosen, origins = chosen[kept], origins[kept]
    columns = origins[:, None] + np.arange(1 - HISTORY, 1)
    history = np.where(columns < 0, np.nan, series[chosen[:, None], np.maximum(columns, 0)])
    ends = grid.start_ms + origins.astype(np.int64) * grid.bin_ms
    rows, scale = _features(history.astype(np.float32), ends, chosen % n_metric, grid.metrics, grid.bin_ms)
    targets = scale.targets(series[chosen[:, None], origins[:, None] + KNOTS]).reshape(-1)
    known = np.isfinite(targets)
    return rows[known], targets[known]


def _full(history: Floats32) -> Floats32:
    if history.shape[1] >= HISTORY:
        return history[:, -HISTORY:]
    values = np.full((len(history), HISTORY), np.nan, np.float32)
    values[:, HISTORY - history.shape[1] :] = history
    return values


def _features(
    history: Floats32, ends_ms: Longs, metric: NDArray[Any], names: tuple[str, ...], bin_ms: int
) -> tuple[Floats32, Scale]:
    """Return features (window * knot, feature); NaN = unknown, which LightGBM takes as it is."""
    percent = np.array([is_percent(name) for name in names])[metric]
    values = clip_implausible(history)
    is_log = is_log_scaled(values, percent)
    z = to_z(values, is_log)
    scale = Scale.measure(z, is_log, percent, 1)
    z = scale.normalise(z)
    fixed = [
        metric,
        *(z[:, -1 - lag] for lag in _LAGS),
        *(masked_mean(z[:, -width:], 1) for width in _MEANS),
        *(masked_std(z[:, -width:]) for width in _SPREADS),
        np.fmin.reduce(z[:, -DAY:], axis=1),
        np.fmax.reduce(z[:, -DAY:], axis=1),
        z[:, -1 - DAY],
        masked_mean(np.abs(np.diff(z[:, -DAY:], axis=1)), 1),
        np.log(scale.spread),
        np.log1p(np.abs(scale.origin)),
    ]
    n_knot = len(KNOTS)
    shared = np.repeat(np.stack(fixed, axis=1).astype(np.float32), n_knot, axis=0)
    hours = (ends_ms[:, None] + KNOTS[None] * bin_ms) % _DAY_MS / _DAY_MS * 2 * np.pi
    days = np.stack([z[:, HISTORY - 1 + KNOTS - days * DAY] for days in range(1, 8)])  # (day, window, knot)
    around = np.arange(-3, 4)[:, None, None] + (HISTORY - 1 + KNOTS - DAY)[None, None]
    near = np.moveaxis(z[:, np.minimum(around[:, 0], HISTORY - 1)], 1, 0)  # (offset, window, knot)
    ahead = [
        *(days[0], days[6], _mean_of(days), _mean_of(near)),
        *(np.sin(hours), np.cos(hours), np.broadcast_to(np.log(KNOTS), hours.shape)),
    ]
    own = np.stack([item.reshape(-1) for item in ahead], axis=1).astype(np.float32)
    return np.concatenate([shared, own], axis=1), scale


def _mean_of(stack: Floats32) -> Floats32:
    """Return the mean over the first axis of what is known."""
    known = np.isfinite(stack)
    total = np.where(known, stack, np.float32(0)).sum(axis=0)
    return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan).astype(np.float32)
