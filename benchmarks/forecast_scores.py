"""How forecasts are scored: relative MAE, WAPE, MASE, pinball, coverage, per metric and horizon."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetcast.schema import QUANTILES, Floats, Floats32

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
