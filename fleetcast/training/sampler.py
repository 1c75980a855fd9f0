"""Which windows a training step sees.

Owns: drawing windows from a training grid, vectorised: replay of the whole range, newest days,
series that drifted since their change, young fleets. Does not know: networks, files.

The kind of a window follows from where its newest bin lies. Targets in the held-out tail are
masked, so no step ever sees a value the gate judges by.
Source of the mix (measured on injected dynamics): of uniform windows of 30 days 0.7 % are changed
ones, and a training learns almost nothing from them. It learns a change that fills a quarter to a
half of its batches, and forgets the rest with less than half replay.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetcast.bins import DAY_BINS, RECENT_BINS
from fleetcast.errors import NotEnoughData
from fleetcast.forecast.encoding import GridShape, ModelArrays, encode, is_percent
from fleetcast.schema import ChangedSeries, Floats, Floats32, Longs
from fleetcast.training.grid import TrainingGrid

YOUNG_SHARE = 0.2  # windows whose history is cut short, so that young fleets are forecast, too
UNKNOWN_SHARE = 0.05  # windows whose metric is called unknown
_MAX_DRAWS = 50
_MIN_TARGETS = 3  # bins ahead a window must know: a change of minutes ago has no more

_Draw = Callable[[int], tuple[Longs, Longs]]


@dataclass(frozen=True)
class WindowMix:
    """What shares of a batch are drawn from where; the rest replays the whole range."""

    changed: tuple[ChangedSeries, ...] = ()
    changed_share: float = 0.0
    recent_share: float = 0.0
    recent_bins: int = 0
    recent_weights: Floats | None = (
        None  # (server, metric) how often a series is among the recent; None = equal
    )


@dataclass(frozen=True, slots=True, eq=False)
class TrainingBatch:
    """Windows with what followed them."""

    arrays: ModelArrays
    metric_slots: Longs  # (window,)
    targets: Floats32  # (window, horizon) normalised, NaN = unknown or held out
    is_replay: NDArray[np.bool_]  # (window,) drawn neither for a change nor for being recent


class WindowSampler:
    """Draws batches; the same seed draws the same batches.

    Raises:
        NotEnoughData: no window can be drawn (`count_trainable` tells beforehand).
    """

    def __init__(
        self, grid: TrainingGrid, shape: GridShape, held_from: Longs, mix: WindowMix, seed: int
    ) -> None:
        """Prepare to draw.

        Args:
            held_from: (server, metric) the first bin no window may see.
        """
        self._series = grid.values.reshape(-1, grid.n_bins)
        self._n_metric = len(grid.metrics)
        self._is_percent = np.array([is_percent(metric) for metric in grid.metrics])
        self._start_ms, self._bin_ms = grid.start_ms, grid.bin_ms
        self._shape, self._held_from, self._mix = shape, held_from.reshape(-1), mix
        self._random = np.random.default_rng(seed)
        changed = [
            (item.server * self._n_metric + item.metric, max(0, item.since_bin))
            for item in mix.changed
            if item.since_bin < held_from[item.server, item.metric] - 1
        ]
        self._changed = np.array(changed, np.int64).reshape(-1, 2)
        self._since = np.full(len(self._series), grid.n_bins)  # (series,) the bin of its change
        self._since[self._changed[:, 0]] = self._changed[:, 1]
        weights = np.ones(len(self._series)) if mix.recent_weights is None else mix.recent_weights
        self._recent = np.cumsum(weights)  # (series,) ascending

    @property
    def random_state(self) -> str:
        """Return where the draws stand, as JSON; set it to draw the same batches again."""
        return json.dumps(self._random.bit_generator.state)

    @random_state.setter
    def random_state(self, state: str) -> None:
        self._random.bit_generator.state = json.loads(state)

    def batch(self, size: int, slots: Sequence[int]) -> TrainingBatch:
        """Draw one batch.

        Args:
            slots: the network's slot of each metric of the grid.
        """
        series, origins = self._windows(size)
        n_history = self._shape.history_bins
        values = self._take(series, origins, 1 - n_history, self._shape.horizon_bins + 1)
        history, future = values[:, :n_history], values[:, n_history:]
        self._cut_short(history)
        metrics = series % self._n_metric
        end_ms = self._start_ms + origins * self._bin_ms
        arrays = encode(history, end_ms, self._is_percent[metrics], self._shape)
        known = np.asarray(slots, np.int64)[metrics]
        is_unknown = self._random.random(size) < UNKNOWN_SHARE
        slots_seen, targets = np.where(is_unknown, 0, known), arrays.scale.targets(future)
        return TrainingBatch(arrays, slots_seen, targets, self._is_replay(series, origins))

    def _windows(self, size: int) -> tuple[Longs, Longs]:
        """Draw series and origins, the changed ones first."""
        draws = (self._draw_changed, self._draw_alike, self._draw_recent, self._draw_any)
        drawn = [self._draw(count, draw) for count, draw in zip(self._counts(size), draws, strict=True)]
        return np.concatenate([item[0] for item in drawn]), np.concatenate([item[1] for item in drawn])

    def _counts(self, size: int) -> tuple[int, int, int, int]:
        """Return how many windows of a batch are changed, alike, recent, any."""
        n_changed = round(size * self._mix.changed_share) if len(self._changed) else 0
        n_alike = min(n_changed, size - n_changed)
        n_recent = round((size - n_changed - n_alike) * self._mix.recent_share)
        return n_changed, n_alike, n_recent, size - n_changed - n_alike - n_recent

    def _is_replay(self, series: Longs, origins: Longs) -> NDArray[np.bool_]:
        """Return which windows of a batch only keep alive what was known before."""
        n_changed, n_alike, n_recent, n_any = self._counts(len(series))
        drawn_as = np.repeat([False, True, False, True], [n_changed, n_alike, n_recent, n_any])
        return np.asarray(drawn_as & (origins < self._since[series]))

    def _draw(self, size: int, draw: _Draw) -> tuple[Longs, Longs]:
        """Return `size` usable windows of one kind; where that kind has none, of any."""
        series, origins = np.empty(0, np.int64), np.empty(0, np.int64)
        for attempt in range(2 * _MAX_DRAWS):
            if len(series) >= size:
                break
            drawn = (draw if attempt < _MAX_DRAWS else self._draw_any)(2 * size)
            usable = self._is_usable(*drawn)
            series = np.concatenate([series, drawn[0][usable]])
            origins = np.concatenate([origins, drawn[1][usable]])
        if len(series) < size:
            raise NotEnoughData("no trainable window before the held-out tail")
        return series[:size], origins[:size]

    def _draw_any(self, size: int) -> tuple[Longs, Longs]:
        return self._origins(self._random.integers(len(self._series), size=size), self._held_from)

    def _draw_recent(self, size: int) -> tuple[Longs, Longs]:
        series = np.searchsorted(self._recent, self._random.random(size) * self._recent[-1], side="right")
        return self._origins(series, np.minimum(self._mix.recent_bins, self._held_from))

    def _origins(self, series: Longs, n_bins: Longs) -> tuple[Longs, Longs]:
        """Return series with one of the newest `n_bins` (series,) before their held-out tails."""
        ago = (self._random.random(len(series)) * n_bins[series]).astype(np.int64)
        return series, self._held_from[series] - 1 - ago

    def _draw_changed(self, size: int) -> tuple[Longs, Longs]:
        chosen = self._changed[self._random.integers(len(self._changed), size=size)]
        span = self._held_from[chosen[:, 0]] - 1 - chosen[:, 1]
        return chosen[:, 0], chosen[:, 1] + (self._random.random(size) * span).astype(np.int64)

    def _draw_alike(self, size: int) -> tuple[Longs, Longs]:
        """Draw replay of the metrics that changed, on any server.

        Else most windows of such a metric would be changed ones, and what the metric does
        elsewhere would be forgotten (cpu_pct: 7 % worse on unchanged servers).
        """
        series, _ = self._draw_changed(size)
        servers = self._random.integers(len(self._series) // self._n_metric, size=size)
        return self._origins(servers * self._n_metric + series % self._n_metric, self._held_from)

    def _is_usable(self, series: Longs, origins: Longs) -> NDArray[np.bool_]:
        """Return which windows have a recent value, an hour of values, and something to learn."""
        day = np.isfinite(self._take(series, origins, 1 - DAY_BINS, 1))
        ahead = np.isfinite(self._take(series, origins, 1, self._shape.horizon_bins + 1))
        is_forecast = day[:, -RECENT_BINS:].any(axis=1) & (day.sum(axis=1) >= RECENT_BINS)
        return np.asarray(is_forecast & (ahead.sum(axis=1) >= min(_MIN_TARGETS, ahead.shape[1])))

    def _take(self, series: Longs, origins: Longs, start: int, stop: int) -> Floats32:
        """Return bins [start, stop) relative to the origins, NaN outside and in the held-out tail."""
        columns = origins[:, None] + np.arange(start, stop)
        values: Floats32 = self._series[series[:, None], np.clip(columns, 0, self._series.shape[1] - 1)]
        values[(columns < 0) | (columns >= self._held_from[series][:, None])] = np.nan
        return values

    def _cut_short(self, history: Floats32) -> None:
        """Forget the older part of some histories, in place."""
        n_bins = history.shape[1]
        is_young = self._random.random(len(history)) < YOUNG_SHARE
        ages = np.exp(self._random.uniform(np.log(RECENT_BINS), np.log(n_bins), len(history)))
        is_old = np.arange(n_bins, 0, -1)[None] > ages[:, None]
        history[is_young[:, None] & is_old] = np.nan
