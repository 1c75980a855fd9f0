"""The Kolmogorov-Smirnov statistic against a sketch: a reference as evenly spaced quantiles.

Owns: that formula. Its cost is one sort of the window in single precision; the reference's length
does not enter. Exact to one step of the sketch (1/1000 for the 1,001 points a baseline keeps).
Does not know: thresholds.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def sketched_ks(window: NDArray[Any], quantiles: NDArray[Any]) -> float:
    """Return the largest gap between the window's distribution and the sketched one.

    Args:
        window: finite values, in any order.
        quantiles: non-decreasing, at levels evenly spaced from 0 to 1, at least two.

    >>> sketched_ks(np.arange(0.0, 1.0, 0.1), np.linspace(0, 1, 11))
    0.1
    >>> sketched_ks(np.full(5, 2.0), np.linspace(0, 1, 11))
    1.0
    """
    if not len(window) or len(quantiles) < 2:
        return 0.0
    ordered = np.sort(window.astype(np.float32))
    points = quantiles.astype(np.float32)
    steps = len(points) - 1
    # equal quantiles are an atom: its levels span from the first of them to the last
    upper = (np.searchsorted(points, points, side="right") - 1) / steps
    lower = np.searchsorted(points, points, side="left") / steps
    lower[points == points[0]] = 0.0
    at_or_below = np.searchsorted(ordered, points, side="right") / len(ordered)
    below = np.searchsorted(ordered, points, side="left") / len(ordered)
    gap = max(np.abs(at_or_below - upper).max(), np.abs(below - lower).max())
    return round(float(gap), 12)
