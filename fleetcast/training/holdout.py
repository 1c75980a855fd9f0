"""The held-out evidence: the newest bins of every series, and what forecasts of them cost.

Owns: which bins no training sees, which of their windows are forecast, the losses. Does not know:
the rule (`gate`), how a model is trained, versions, files.

Held out are the newest bins of every series: the tail. A series that just changed would leave
nothing to learn from, so its tail is a share of what came after the change; the others keep a
tail long enough for the whole horizon. Both sides forecast the same windows, spread so that the
expert layer can be replayed over them (`served`). Where a model has no forecast, clients get the
fallback, so the fallback's loss counts there.

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
from fleetcast.forecast.experts.layer import SPARSE_EVERY
from fleetcast.forecast.naive import NaiveForecaster
from fleetcast.schema import QUANTILES, ChangedSeries, Floats, Floats32, HistoryWindow, Longs, Series
from fleetcast.training.grid import TrainingGrid

CHANGED_TAIL_SHARE = 0.4  # of the bins since a change
MIN_TAIL_BINS = 6
_MAX_SERVERS, _MIN_ORIGINS, _MAX_ORIGINS = 150, 12, 48
_CHANGED_ORIGINS = 48  # more of them, for the series that changed alone
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
    replayed_series: int = 200  # that the expert layer is replayed over; 0 = it is not


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """What one side's forecasts cost; NaN where nothing is known or nothing was asked."""

    pinball: Floats  # (origin, server, metric)
    errors: Floats  # (origin, server, metric, horizon) |p50 - actual| in native units
    is_finite: bool
    origins: Longs  # (origin,) bins, ascending; both sides of a comparison have the same
    # (origin, replayed server, metric, horizon, quantile) native units, the fallback's where a side has none
    quantiles: Floats32 | None = None


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
        self._grid, self._shape, self._seed = grid, shape, sample.seed
        self.fallback = NaiveForecaster(shape.horizon_bins)
        self.horizons = tuple(horizons)
        names = {server for server, _ in sample.always}
        wanted = {row for row, server in enumerate(grid.server_names) if server in names}
        wanted |= {item.server for item in changed}
        self.servers = _choose_servers(len(grid.server_names), wanted, sample.seed)
        self.first_held: Longs = first_held[self.servers]
        is_changed = np.zeros(first_held.shape, np.bool_)
        for item in changed:
            is_changed[item.server, item.metric] = True
        self.is_changed: NDArray[np.bool_] = is_changed[self.servers]
        self.replayed: Longs = self._choose_replayed(sample)
        self._choose_origins(int(first_held.min()), sample.max_windows)
        self._steps = _usual_steps(grid, self.servers)

    @property
    def grid(self) -> TrainingGrid:
        """Return the bins, held out or not."""
        return self._grid

    @property
    def horizon_bins(self) -> int:
        """Return how far ahead the sides forecast."""
        return self._shape.horizon_bins

    def _choose_replayed(self, sample: Sample) -> Longs:
        """Return the rows of `servers` that the layer is replayed over: the changed ones, then others."""
        asked = sample.replayed_series
        count = max(1, asked // len(self._grid.metrics)) if asked else 0
        drawn = np.random.default_rng(sample.seed).permutation(len(self.servers))
        has_changed = np.asarray(self.is_changed.any(axis=1))[drawn]
        return np.sort(np.concatenate([drawn[has_changed], drawn[~has_changed]])[:count])

    def _choose_origins(self, oldest: int, max_windows: int) -> None:
        """Spread origins over the whole tail, and more over the short one of what changed."""
        n_window = len(self.servers) * len(self._grid.metrics)
        count = max(_MIN_ORIGINS, min(_MAX_ORIGINS, max_windows // n_window))
        none = np.empty(0, np.int64)
        self._common = self.spread(oldest - 1, self._grid.n_bins - 1, count)
        own = int(self.first_held[self.is_changed].min()) if self.is_changed.any() else oldest
        more = self.spread(own - 1, self._grid.n_bins - 1, _CHANGED_ORIGINS)
        self._of_changed = more if self.is_changed.any() else none
        steady = self.spread(oldest - 1, self._grid.n_bins - 1, _MAX_ORIGINS)
        self._of_replay = steady if len(self.replayed) else none
        self.origins: Longs = np.unique(np.concatenate([self._common, self._of_changed, self._of_replay]))

    def spread(self, start: int, stop: int, count: int) -> Longs:
        """Return about `count` origins in [start, stop), one at random in each of as many equal parts.

        At a steady stride every job by timetable would be met at the same few of its minutes. Every other
        origin suits the expert layer's memory of the far horizons, which skips bins (counted from 1970).
        """
        if stop - start <= count:
            return np.arange(start, stop, dtype=np.int64)
        edges = np.linspace(start, stop, count + 1)
        chosen = np.floor(np.random.default_rng(self._seed).uniform(edges[:-1], edges[1:])).astype(np.int64)
        off = (self._grid.start_ms // self._grid.bin_ms + chosen[::2]) % SPARSE_EVERY
        chosen[::2] -= np.where(chosen[::2] - off >= start, off, 0)
        return np.unique(chosen)

    def rows_at(self, origin: int) -> Longs:
        """Return which rows of `servers` are forecast from an origin."""
        if origin in self._common:
            return np.arange(len(self.servers))
        chosen = np.zeros(len(self.servers), np.bool_)
        if origin in self._of_changed:
            chosen |= self.is_changed.any(axis=1)
        if origin in self._of_replay:
            chosen[self.replayed] = True
        return np.flatnonzero(chosen)

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
        n_origin, shape = len(self.origins), self.is_changed.shape
        pinball = np.full((n_origin, *shape), np.nan)
        errors = np.full((n_origin, *shape, len(self.horizons)), np.nan)
        kept = np.full(
            (n_origin, len(self.replayed), shape[1], self.horizon_bins, len(QUANTILES)), np.nan, np.float32
        )
        is_finite = True
        for place, origin in enumerate(self.origins.tolist()):
            rows = self.rows_at(origin)
            window = self.window(origin, rows)
            forecast = predictor.predict(window)
            is_finite &= bool((np.isfinite(forecast).all(axis=-1) | np.isnan(forecast).all(axis=-1)).all())
            quantiles = np.where(np.isnan(forecast), self.fallback.predict(window), forecast)
            pinball[place, rows], errors[place, rows] = self.window_losses(quantiles, origin, rows)
            if origin not in self._common:  # its other windows are for the replay alone
                is_left = ~self.is_changed | (origin not in self._of_changed)
                pinball[place, is_left], errors[place, is_left] = np.nan, np.nan
            _, from_, to = np.intersect1d(rows, self.replayed, return_indices=True)
            kept[place, to] = quantiles[from_]
        return Losses(pinball, errors, is_finite, self.origins, kept)

    def window_losses(self, quantiles: Floats32, origin: int, rows: Longs) -> tuple[Floats, Floats]:
        """Return what forecasts cost, (row, metric), and their errors by horizon.

        Args:
            quantiles: (row, metric, horizon, quantile).
        """
        missed = self._future(origin, rows)[..., None] - quantiles
        levels = np.array(QUANTILES)
        pinball = np.maximum(levels * missed, (levels - 1) * missed).mean(axis=-1)
        weights = np.where(np.isfinite(pinball), self._shape.bin_weights(), 0.0)
        total = weights.sum(axis=-1)
        mean = np.where(
            total > 0, (np.nan_to_num(pinball) * weights).sum(axis=-1) / np.maximum(total, 1e-9), np.nan
        )
        at = [horizon - 1 for horizon in self.horizons]
        return mean / self._steps[rows], np.abs(missed[..., at, 1])

    def window(self, origin: int, rows: Longs) -> HistoryWindow:
        """Return what a forecast of some rows from an origin may know."""
        grid, servers = self._grid, self.servers[rows]
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
        is_held = (bins < self._grid.n_bins) & (bins >= self.first_held[rows][..., None])
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
