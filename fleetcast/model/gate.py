"""Whether a candidate may go into service: it must beat what serves, on data it never saw.

Owns: which data are held out, the comparison, the rule. Does not know: how a model is trained,
versions, files.

Held out are the newest bins of every series: the tail. A series that just changed would have
nothing left to be learnt from, so its tail is a share of what came after the change; the others
keep a tail long enough for the whole horizon. Both sides forecast the same windows, and where a
model has no forecast the fallback serves, so the fallback is what counts there.

The loss of a window is the pinball loss over its known bins (weighted as in training), in units
of its series' usual step from one hour to the next. The rule: on the series that changed (all,
where none is known to have) the candidate's loss is lower, and stays lower in 9 of 10 resamples
of (server, hours) blocks; on the others it is at most 2 % higher.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fleetcast.model.gridshape import GridShape
from fleetcast.model.sampler import ChangedSeries
from fleetcast.model.scaling import is_percent
from fleetcast.model.traingrid import TrainingGrid
from fleetcast.model.windows import RECENT_BINS
from fleetcast.schema import QUANTILES, Floats, Floats32, HistoryWindow, Longs

CHANGED_TAIL_SHARE = 0.4  # of the bins since a change
MIN_TAIL_BINS = 6
MAX_HARM = 1.02
CONFIDENCE = 0.9
_MAX_ORIGINS, _MAX_SERVERS, _BLOCK_ORIGINS = 48, 150, 4
_RESAMPLES = 1000
_PERCENT_STEP, _QUIET_SHARE = 0.5, 0.25  # smallest steps: points, share of the metric's median


class Predictor(Protocol):
    """Anything that forecasts a window: a model or the fallback."""

    def predict(self, window: HistoryWindow) -> Floats32: ...


@dataclass(frozen=True)
class GateVerdict:
    """The answer with its figures, as the manifest keeps them."""

    promoted: bool
    why: str
    figures: Mapping[str, Any]


def held_from(grid: TrainingGrid, changed: Sequence[ChangedSeries], share: float, longest_bins: int) -> Longs:
    """Return the first held-out bin of every series, (server, metric)."""
    tail = max(MIN_TAIL_BINS, min(round(share * grid.n_bins), longest_bins))
    first = np.full(grid.values.shape[:2], grid.n_bins - tail, np.int64)
    for item in changed:
        own = round(CHANGED_TAIL_SHARE * (grid.n_bins - item.since_bin))
        first[item.server, item.metric] = grid.n_bins - max(MIN_TAIL_BINS, min(own, tail))
    return first


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """What one side's forecasts cost; NaN where nothing is known."""

    pinball: Floats  # (origin, server, metric)
    errors: Floats  # (origin, server, metric, horizon) |p50 - actual| in native units
    is_finite: bool


class HoldOut:
    """The windows both sides are judged by."""

    def __init__(
        self,
        grid: TrainingGrid,
        shape: GridShape,
        first_held: Longs,
        changed: Sequence[ChangedSeries],
        fallback: Predictor,
        horizons: Sequence[int],
        seed: int,
    ) -> None:
        """Choose the windows.

        Args:
            first_held: (server, metric), as `held_from` returns it.
            horizons: whose errors are reported, in bins.
        """
        self._grid, self._shape, self._fallback = grid, shape, fallback
        self.horizons = tuple(horizons)
        self.servers = _chosen_servers(len(grid.server_names), changed, seed)
        self._first_held = first_held[self.servers]
        oldest, newest = int(first_held.min()) - 1, grid.n_bins - 2
        count = min(_MAX_ORIGINS, newest - oldest + 1)
        self._origins = np.unique(np.linspace(oldest, newest, count).round().astype(np.int64))
        self.is_changed = np.zeros(first_held.shape, np.bool_)
        for item in changed:
            self.is_changed[item.server, item.metric] = True
        self.is_changed = self.is_changed[self.servers]
        self._steps = _usual_steps(grid, self.servers)

    def losses(self, predictor: Predictor) -> Losses:
        """Forecast every window and compare with what followed."""
        rows = [self._window_losses(predictor, int(origin)) for origin in self._origins]
        return Losses(
            pinball=np.stack([row[0] for row in rows]),
            errors=np.stack([row[1] for row in rows]),
            is_finite=all(row[2] for row in rows),
        )

    def _window_losses(self, predictor: Predictor, origin: int) -> tuple[Floats, Floats, bool]:
        window = self._window(origin)
        served = predictor.predict(window)
        is_finite = bool((np.isfinite(served).all(axis=-1) | np.isnan(served).all(axis=-1)).all())
        quantiles = np.where(np.isnan(served), self._fallback.predict(window), served)
        actual = self._future(origin)
        missed = actual[..., None] - quantiles
        levels = np.array(QUANTILES)
        pinball = np.maximum(levels * missed, (levels - 1) * missed).mean(axis=-1)
        weights = np.where(np.isfinite(pinball), self._shape.bin_weights(), 0.0)
        total = weights.sum(axis=-1)
        mean = np.where(
            total > 0, (np.nan_to_num(pinball) * weights).sum(axis=-1) / np.maximum(total, 1e-9), np.nan
        )
        at = [horizon - 1 for horizon in self.horizons]
        return mean / self._steps, np.abs(missed[..., at, 1]), is_finite

    def _window(self, origin: int) -> HistoryWindow:
        grid = self._grid
        oldest = max(0, origin + 1 - self._shape.history_bins)
        return HistoryWindow(
            tuple(grid.server_names[index] for index in self.servers),
            grid.metrics,
            grid.values[self.servers, :, oldest : origin + 1],
            grid.start_ms + origin * grid.bin_ms,
            grid.bin_ms,
        )

    def _future(self, origin: int) -> Floats32:
        """Return the held-out bins of the horizon (server, metric, horizon), NaN for the others."""
        bins = np.arange(origin + 1, origin + 1 + self._shape.horizon_bins)
        values = self._grid.values[self.servers][..., np.minimum(bins, self._grid.n_bins - 1)]
        is_held = (bins < self._grid.n_bins) & (bins >= self._first_held[..., None])
        return np.asarray(np.where(is_held, values, np.nan), np.float32)


def judge(candidate: Losses, serving: Losses, is_changed: NDArray[np.bool_], seed: int) -> GateVerdict:
    """Decide by paired losses on the same windows."""
    known = np.isfinite(candidate.pinball) & np.isfinite(serving.pinball)
    groups = {"changed": known & is_changed, "unchanged": known & ~is_changed}
    figures: dict[str, Any] = {
        name: _compared(candidate.pinball, serving.pinball, mask, seed) for name, mask in groups.items()
    }
    if not candidate.is_finite:
        return GateVerdict(False, "its forecasts are not finite", figures)
    deciding = "changed" if groups["changed"].any() else "unchanged"
    if not groups[deciding].any():
        return GateVerdict(False, "the held-out tail holds no window to judge by", figures)
    ratio, confidence = figures[deciding]["ratio"], figures[deciding]["confidence"]
    what = f"loss on {deciding} series is {ratio:.3f} of what serves, confidence {confidence:.2f}"
    if ratio >= 1 or confidence < CONFIDENCE:
        return GateVerdict(False, f"not better: {what}, needed < 1 and {CONFIDENCE}", figures)
    harm = figures["unchanged"]["ratio"]
    if deciding == "changed" and harm is not None and harm > MAX_HARM:
        return GateVerdict(False, f"harms: loss on unchanged series is {harm:.3f}, limit {MAX_HARM}", figures)
    return GateVerdict(True, f"better: {what}", figures)


def mean_errors(losses: Losses) -> tuple[Floats, Floats]:
    """Return mean |p50 - actual|: (metric, horizon), and at the first horizon (server, metric)."""
    return _nan_mean(losses.errors, (0, 1)), _nan_mean(losses.errors[..., 0], (0,))


def _compared(candidate: Floats, serving: Floats, mask: NDArray[np.bool_], seed: int) -> dict[str, Any]:
    """Return the ratio of two sides' losses, and how sure it is that the candidate's is lower."""
    n_window = int(mask.sum())
    if not n_window:
        return {"windows": 0, "ratio": None, "confidence": None}
    ours, theirs = _block_sums(candidate, mask), _block_sums(serving, mask)
    total = float(theirs.sum())
    ratio = float(ours.sum()) / total if total > 0 else 1.0
    draws = np.random.default_rng(seed).multinomial(
        len(ours), np.full(len(ours), 1 / len(ours)), size=_RESAMPLES
    )
    confidence = float((draws @ ours < draws @ theirs).mean())
    return {"windows": n_window, "ratio": round(ratio, 4), "confidence": round(confidence, 3)}


def _block_sums(losses: Floats, mask: NDArray[np.bool_]) -> Floats:
    """Return the summed losses of (server, consecutive origins) blocks that hold a window."""
    kept = np.where(mask, losses, 0.0).sum(axis=2)  # (origin, server)
    starts = np.arange(0, len(kept), _BLOCK_ORIGINS)
    sums, counts = np.add.reduceat(kept, starts, axis=0), np.add.reduceat(mask.sum(axis=2), starts, axis=0)
    return np.asarray(sums[counts > 0])


def _nan_mean(values: Floats, axes: tuple[int, ...]) -> Floats:
    known = np.isfinite(values)
    counts = known.sum(axis=axes)
    return np.where(counts > 0, np.where(known, values, 0.0).sum(axis=axes) / np.maximum(counts, 1), np.nan)


def _chosen_servers(n_server: int, changed: Sequence[ChangedSeries], seed: int) -> Longs:
    """Return the servers judged: those that changed and others, at random, up to a bound."""
    random = np.random.default_rng(seed)
    first = random.permutation(sorted({item.server for item in changed}))
    rest = random.permutation([index for index in range(n_server) if index not in set(first.tolist())])
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
