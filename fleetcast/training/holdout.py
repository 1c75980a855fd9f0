"""The held-out evidence: the newest bins of every series, and what forecasts of them cost.

Owns: which bins no training sees, which of their windows are forecast, the losses. Does not know:
the rule (`gate`), how a model is trained, versions, files.

Held out are the newest bins of every series: the tail. A series that just changed would leave
nothing to learn from, so its tail is a share of what came after the change; the others keep a
tail long enough for the whole horizon. Both sides forecast the same windows. Where a model has no
forecast, clients get the fallback, so the fallback's loss counts there.

The loss of a window is the pinball loss over its known bins (weighted as in training), in units
of its series' usual step from one hour to the next.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fleetcast.bins import RECENT_BINS
from fleetcast.forecast.encoding import GridShape, is_percent
from fleetcast.forecast.naive import NaiveForecaster
from fleetcast.schema import QUANTILES, ChangedSeries, Floats, Floats32, HistoryWindow, Longs, Series
from fleetcast.training.grid import TrainingGrid

CHANGED_TAIL_SHARE = 0.4  # of the bins since a change
MIN_TAIL_BINS = 6
_MAX_SERVERS, _MIN_ORIGINS, _MAX_ORIGINS = 150, 12, 48
_CHANGED_ORIGINS = 24  # more of them, for the series that changed alone
_PERCENT_STEP, _QUIET_SHARE = 0.5, 0.25  # smallest steps: points, share of the metric's median


class Predictor(Protocol):
    """Anything that forecasts a window: a model, the fallback, an oracle."""

    def predict(self, window: HistoryWindow) -> Floats32: ...


def first_held_bins(
    grid: TrainingGrid, changed: Sequence[ChangedSeries], share: float, longest_bins: int
) -> Longs:
    """Return the first held-out bin of every series, (server, metric)."""
    tail = max(MIN_TAIL_BINS, min(round(share * grid.n_bins), longest_bins))
    first = np.full(grid.values.shape[:2], grid.n_bins - tail, np.int64)
    for item in changed:
        own = round(CHANGED_TAIL_SHARE * (grid.n_bins - item.since_bin))
        first[item.server, item.metric] = grid.n_bins - max(MIN_TAIL_BINS, min(own, tail))
    return first


@dataclass(frozen=True)
class Sample:
    """Which part of a large fleet's tail is forecast."""

    seed: int
    max_windows: int = 12_000  # about as many: 4 CPU seconds of a model of width 32
    always: Set[Series] = frozenset()  # no server of these series is left out


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """What one side's forecasts cost; NaN where nothing is known or nothing was asked."""

    pinball: Floats  # (origin, server, metric)
    errors: Floats  # (origin, server, metric, horizon) |p50 - actual| in native units
    is_finite: bool
    origins: Longs  # (origin,) bins, ascending; both sides of a comparison have the same


class HoldOut:
    """The windows that both sides forecast; `fallback` fills in where a side has no forecast."""

    def __init__(
        self,
        grid: TrainingGrid,
        shape: GridShape,
        first_held: Longs,
        changed: Sequence[ChangedSeries],
        horizons: Sequence[int],
        sample: Sample,
    ) -> None:
        """Choose the windows.

        Args:
            first_held: (server, metric), as `first_held_bins` returns it.
            changed: no server of these is left out either.
            horizons: whose errors are reported, in bins.
        """
        self._grid, self._shape = grid, shape
        self.fallback = NaiveForecaster(shape.horizon_bins)
        self.horizons = tuple(horizons)
        names = {server for server, _ in sample.always}
        wanted = {row for row, server in enumerate(grid.server_names) if server in names}
        wanted |= {item.server for item in changed}
        self.servers = _choose_servers(len(grid.server_names), wanted, sample.seed)
        self._first_held = first_held[self.servers]
        is_changed = np.zeros(first_held.shape, np.bool_)
        for item in changed:
            is_changed[item.server, item.metric] = True
        self.is_changed: NDArray[np.bool_] = is_changed[self.servers]
        self._choose_origins(int(first_held.min()), sample.max_windows)
        self._steps = _usual_steps(grid, self.servers)

    def _choose_origins(self, oldest: int, max_windows: int) -> None:
        """Spread origins over the whole tail, and more over the short one of what changed."""
        n_window = len(self.servers) * len(self._grid.metrics)
        count = max(_MIN_ORIGINS, min(_MAX_ORIGINS, max_windows // n_window))
        self._common = self._spread(oldest, count)
        own = int(self._first_held[self.is_changed].min()) if self.is_changed.any() else oldest
        more = self._spread(own, _CHANGED_ORIGINS) if self.is_changed.any() else self._common
        self.origins: Longs = np.union1d(self._common, more)

    def _spread(self, first_held: int, count: int) -> Longs:
        """Return up to `count` origins from the last bin before the tail on."""
        oldest, newest = first_held - 1, self._grid.n_bins - 2
        count = min(count, newest - oldest + 1)
        return np.unique(np.linspace(oldest, newest, count).round().astype(np.int64))

    def places(self, series: Set[Series]) -> NDArray[np.bool_]:
        """Return where some series are among the forecast ones, (server, metric)."""
        names = [self._grid.server_names[row] for row in self.servers]
        metrics = self._grid.metrics
        return np.array([[(name, metric) in series for metric in metrics] for name in names], np.bool_)

    def names(self, chosen: NDArray[np.bool_]) -> frozenset[Series]:
        """Return the (server, metric) names of the chosen places."""
        grid, rows = self._grid, np.argwhere(chosen).tolist()
        return frozenset((grid.server_names[self.servers[row]], grid.metrics[column]) for row, column in rows)

    def losses(self, predictor: Predictor) -> Losses:
        """Forecast every window and compare with what followed."""
        rows = [self._origin_losses(predictor, int(origin)) for origin in self.origins]
        return Losses(
            pinball=np.stack([row[0] for row in rows]),
            errors=np.stack([row[1] for row in rows]),
            is_finite=all(row[2] for row in rows),
            origins=self.origins,
        )

    def _origin_losses(self, predictor: Predictor, origin: int) -> tuple[Floats, Floats, bool]:
        """Return one origin's losses, of every server or of what changed alone."""
        if origin in self._common:
            return self._window_losses(predictor, origin, np.arange(len(self.servers)))
        rows = np.flatnonzero(self.is_changed.any(axis=1))
        few, few_errors, is_finite = self._window_losses(predictor, origin, rows)
        pinball = np.full(self.is_changed.shape, np.nan)
        errors = np.full((*pinball.shape, len(self.horizons)), np.nan)
        pinball[rows], errors[rows] = few, few_errors
        pinball[~self.is_changed] = np.nan
        errors[~self.is_changed] = np.nan
        return pinball, errors, is_finite

    def _window_losses(self, predictor: Predictor, origin: int, rows: Longs) -> tuple[Floats, Floats, bool]:
        window = self._window(origin, self.servers[rows])
        forecast = predictor.predict(window)
        is_finite = bool((np.isfinite(forecast).all(axis=-1) | np.isnan(forecast).all(axis=-1)).all())
        quantiles = np.where(np.isnan(forecast), self.fallback.predict(window), forecast)
        missed = self._future(origin, rows)[..., None] - quantiles
        levels = np.array(QUANTILES)
        pinball = np.maximum(levels * missed, (levels - 1) * missed).mean(axis=-1)
        weights = np.where(np.isfinite(pinball), self._shape.bin_weights(), 0.0)
        total = weights.sum(axis=-1)
        mean = np.where(
            total > 0, (np.nan_to_num(pinball) * weights).sum(axis=-1) / np.maximum(total, 1e-9), np.nan
        )
        at = [horizon - 1 for horizon in self.horizons]
        return mean / self._steps[rows], np.abs(missed[..., at, 1]), is_finite

    def _window(self, origin: int, servers: Longs) -> HistoryWindow:
        grid = self._grid
        oldest = max(0, origin + 1 - self._shape.history_bins)
        return HistoryWindow(
            tuple(grid.server_names[index] for index in servers),
            grid.metrics,
            grid.values[servers, :, oldest : origin + 1],
            grid.start_ms + origin * grid.bin_ms,
            grid.bin_ms,
        )

    def _future(self, origin: int, rows: Longs) -> Floats32:
        """Return the held-out bins of the horizon (server, metric, horizon), NaN for the others."""
        bins = np.arange(origin + 1, origin + 1 + self._shape.horizon_bins)
        values = self._grid.values[self.servers[rows]][..., np.minimum(bins, self._grid.n_bins - 1)]
        is_held = (bins < self._grid.n_bins) & (bins >= self._first_held[rows][..., None])
        return np.asarray(np.where(is_held, values, np.nan), np.float32)


def mean_errors(losses: Losses) -> tuple[Floats, Floats]:
    """Return mean |p50 - actual|: (metric, horizon), and at the first horizon (server, metric)."""
    return _nan_mean(losses.errors, (0, 1)), _nan_mean(losses.errors[..., 0], (0,))


def _nan_mean(values: Floats, axes: tuple[int, ...]) -> Floats:
    known = np.isfinite(values)
    counts = known.sum(axis=axes)
    return np.where(counts > 0, np.where(known, values, 0.0).sum(axis=axes) / np.maximum(counts, 1), np.nan)


def _choose_servers(n_server: int, wanted: Set[int], seed: int) -> Longs:
    """Return the servers to judge by: the wanted ones and others, at random, up to a bound."""
    random = np.random.default_rng(seed)
    first = random.permutation(sorted(wanted))
    rest = random.permutation([index for index in range(n_server) if index not in wanted])
    half = _MAX_SERVERS // 2
    n_rest = min(len(rest), max(half, _MAX_SERVERS - len(first)))
    chosen = np.concatenate([first[: _MAX_SERVERS - n_rest], rest[:n_rest]])
    return np.sort(chosen).astype(np.int64)


def _usual_steps(grid: TrainingGrid, servers: Longs) -> Floats:
    """Return what a series usually moves in an hour (server, metric), never 0.

    A series that hardly moves is measured by a share of what its metric moves elsewhere: an idle
    disk must not outweigh the fleet by a forecast of almost nothing.
    """
    values = grid.values[servers].astype(np.float64)
    moves = np.nan_to_num(_nan_mean(np.abs(values[..., RECENT_BINS:] - values[..., :-RECENT_BINS]), (2,)))
    usual = [np.median(column[column > 0]) if (column > 0).any() else 1.0 for column in moves.T]
    percent = np.array([is_percent(metric) for metric in grid.metrics])
    floor = np.where(percent, _PERCENT_STEP, _QUIET_SHARE * np.array(usual))
    return np.maximum(moves, floor)
