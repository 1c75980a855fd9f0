"""Which series a training without a known change should see more of: the badly forecast ones.

Owns: how well what serves forecast every series lately, next to the fallback. Does not know: how
windows are drawn, networks, files.
"""

from dataclasses import replace

import numpy as np

from fleetcast.forecast.gridshape import GridShape
from fleetcast.schema import Floats, Longs
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.holdout import HoldOut, Losses, Predictor

_MAX_WINDOWS = 3_000  # forecast to find out: a CPU second of a model of width 32
_BEST, _WORST = 0.5, 3.0  # shares of the fallback's loss beyond which nothing is told apart


def series_weights(
    model: Predictor,
    fallback: Predictor,
    grid: TrainingGrid,
    shape: GridShape,
    held_from: Longs,
    recent_bins: int,
    seed: int,
) -> Floats:
    """Return how much more often to draw each series, (server, metric), 1 on average.

    The weight is the square of the model's loss as a share of the fallback's, on the newest
    `recent_bins` before the held-out tail: a series whose dynamics changed is forecast worse than
    by repetition (1.2 to 1.5), one the model knows at 0.6 to 0.8. A fleet of more than 150 servers
    is looked at in a sample; series that nothing is known about count as the average.

    Args:
        held_from: (server, metric) the first bin that must not be looked at.
    """
    seen = replace(grid, values=grid.values[:, :, : int(held_from.min())])
    first = np.full(held_from.shape, max(1, seen.n_bins - recent_bins), np.int64)
    lately = HoldOut(seen, shape, first, (), fallback, (1,), seed, max_windows=_MAX_WINDOWS)
    share = _shares(lately.losses(model), lately.losses(fallback))
    known = np.isfinite(share)
    weights = np.ones(held_from.shape)
    if known.any():
        squares = np.clip(np.where(known, share, 1.0), _BEST, _WORST) ** 2
        weights[lately.servers] = np.where(known, squares / squares[known].mean(), 1.0)
    return np.asarray(weights / weights.mean())


def _shares(ours: Losses, naive: Losses) -> Floats:
    """Return one side's loss as a share of the other's (server, metric), NaN where unknown."""
    known = np.isfinite(ours.pinball) & np.isfinite(naive.pinball)
    sums = [np.where(known, side.pinball, 0.0).sum(axis=0) for side in (ours, naive)]
    return np.where(sums[1] > 0, sums[0] / np.maximum(sums[1], 1e-9), np.nan)
