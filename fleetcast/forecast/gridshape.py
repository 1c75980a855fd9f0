"""The compact grid on which a model sees a window.

Owns: which bins of the past and of the horizon share a step. The past day is seen as 44 means
of 6 bins and 24 bins, the future as 12 bins and then wider knots, between which the answer is
interpolated: 3-4 times cheaper than bin by bin and more accurate at equal cost (measured on
recorded VMs). Counted in bins, so that any bin length and any horizon has a grid; only the
daily lags are counted in days. Does not know: values.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fleetcast.bins import HISTORY_BINS
from fleetcast.schema import Floats32, Longs

DAY_MS = 86_400_000
FINE_PAST, COARSE_PAST, COARSE_WIDTH = 24, 44, 6  # bins, steps, bins per step: 288 bins
FINE_AHEAD, MAX_COARSE_AHEAD = 12, 28
# the next bin, the other fine ones, the rest: the weight of a knot, shared by its bins (a measured recipe)
_NEXT_WEIGHT, _FINE_WEIGHT, _COARSE_WEIGHT = 8.0, 2.0, 1.0


@dataclass(frozen=True)
class GridShape:
    """The compact grid of a model; part of its checkpoint."""

    bin_ms: int
    horizon_bins: int
    history_bins: int = HISTORY_BINS

    @property
    def season_bins(self) -> int:
        """Return the bins of a day."""
        return max(1, DAY_MS // self.bin_ms)

    @property
    def n_past(self) -> int:
        """Return the encoder's steps."""
        return COARSE_PAST + FINE_PAST

    @property
    def knot_ends(self) -> Longs:
        """Return the last bin ahead of each decoder knot; the last one is the horizon."""
        fine = min(FINE_AHEAD, self.horizon_bins)
        rest = self.horizon_bins - fine
        width = max(COARSE_WIDTH, -(-rest // MAX_COARSE_AHEAD))
        coarse = np.minimum(fine + np.arange(1, -(-rest // width) + 1) * width, self.horizon_bins)
        return np.concatenate([np.arange(1, fine + 1), coarse]).astype(np.int64)

    @property
    def n_knots(self) -> int:
        """Return the decoder's steps."""
        return len(self.knot_ends)

    @property
    def knot_starts(self) -> Longs:
        """Return the first bin ahead of each decoder knot."""
        return np.concatenate([[1], self.knot_ends[:-1] + 1]).astype(np.int64)

    def interpolation(self) -> Floats32:
        """Return weights (knot, horizon): a bin lies between the centres of two knots."""
        centres = (self.knot_starts + self.knot_ends) / 2
        horizons = np.arange(1, self.horizon_bins + 1)
        return np.stack([np.interp(horizons, centres, row) for row in np.eye(self.n_knots)]).astype(
            np.float32
        )

    def bin_weights(self) -> Floats32:
        """Return how much each bin of the horizon counts in losses, (horizon,)."""
        starts, ends = self.knot_starts, self.knot_ends
        knots = np.where(ends == 1, _NEXT_WEIGHT, np.where(ends <= FINE_AHEAD, _FINE_WEIGHT, _COARSE_WEIGHT))
        lengths = ends - starts + 1
        return np.repeat(knots / lengths, lengths).astype(np.float32)

    def as_config(self) -> dict[str, int]:
        """Return plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GridShape":
        """Return the shape a checkpoint was made with; KeyError, TypeError and ValueError on junk."""
        shape = cls(**{name: int(config[name]) for name in ("bin_ms", "horizon_bins", "history_bins")})
        if not (shape.bin_ms > 0 and 0 < shape.horizon_bins < 10_000 and 0 < shape.history_bins < 100_000):
            raise ValueError(f"{shape} is no grid")
        return shape
