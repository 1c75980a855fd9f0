"""The trend: a leak, a fill or a ramp that is going on, and how far to believe that it will.

Owns: finding the line a series climbs or falls along since its last bend, when such a line counts as a
trend, and how far ahead it is followed. numpy only. Does not know: the network, other experts, files.

A trend here is a *straight line with white noise on it*: rising CPU of a busy morning, steps and queues
that drain look steep, but what is left of them beside the line is much larger than the noise from point
to point. On recorded VMs that separates: lines that pass are one origin in 400, all others were never
worth following (docs/decisions/expert-layer.md).

1. The last 36 hours as medians of 3 bins; what lies before the last sudden jump is left out, so a leak
   that is freed each night starts anew.
2. A line that bends once: level until the bend, then a slope; the bend with the least squares.
3. It counts when the slope is 8 standard errors from 0, lasts 3 hours, the newest points lie on the
   line, and the points scatter around it no more than from one to the next (1.25 times).
4. It is followed for at most as long as it lasts already, times the share of such moves that came true
   in this series before (`belief`, 1 where nothing of the kind was seen). Its interval reaches from an end
   after a ninth of its age to no end within nine times its age.
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from fleetcast.schema import Floats, Floats32, Longs

POINT_BINS = 3  # bins in a point: the median of three drops a lone spike
WINDOW_POINTS = 144  # 36 hours of 5-minute bins
_LEAST_AGE = 8  # points since the bend
CLEAR_ERRORS, CLEAR_AGE_BINS, CLEAR_NOISE, CLEAR_SCATTER = 8.0, 36, 1.25, 0.3
LOOSE_ERRORS, LOOSE_AGE_BINS, LOOSE_SCATTER = 5.0, 12, 0.4  # what counts as seen before
_ON_THE_LINE, _NEWEST_POINTS, _NEWEST_ERRORS = 3.5, 4, 2.6
# a trend of age a goes on for more than r with probability a / (a + r): nine in ten for another ninth of
# their age, one in two for their age again, one in ten for nine times their age
REACHES = (1 / 9, 1.0, 9.0)
_BEND_ERROR = 0.02  # of a slope: what not knowing the bend adds to its error
_BIN_SCATTER = 1.49  # of a bin over that of medians of three, normal noise
_JUMP_NOISE, _JUMP_RANGE = 8.0, 0.25  # a sudden jump: times the noise, and share of the window's range
_BEND = 0.5  # of a bin's move: what a bend inside a point adds to the scatter
_FLAT = 1e-9

Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Trend:
    """The line of each series; all arrays (series,), native units per bin."""

    slope: Floats
    level: Floats  # of the line, now
    scatter: Floats  # standard deviation around the line
    age_bins: Floats
    is_clear: Flags
    is_loose: Flags  # looks like a trend, clear or not

    def move(self, lead_bins: int, reach: float = REACHES[1]) -> Floats:
        """Return how far the line goes in `lead_bins`, from its level now, `reach` times its age at most."""
        return np.asarray(self.slope * np.minimum(lead_bins, reach * self.age_bins))

    def spread(self, lead_bins: int) -> Floats:
        """Return the standard deviation of a bin around the line, the error of the slope included."""
        n_point = np.maximum(self.age_bins / POINT_BINS, 1.0)
        slope_error = self.scatter * np.sqrt(12.0 / n_point**3) / POINT_BINS
        slope_error += _BEND_ERROR * np.abs(self.slope)
        return np.asarray(np.hypot(_BIN_SCATTER * self.scatter, slope_error * lead_bins))

    def of(self, series: Longs) -> "Trend":
        """Return the lines of some series."""
        return Trend(*(getattr(self, item.name)[series] for item in fields(self)))


def find_trend(history: Floats32, unit: Floats32) -> Trend:
    """Find the line each series is on.

    Args:
        history: (series, bin) native units, gaps carried forward, NaN before the first value; the
            last column is now.
        unit: (series,) what a movement must be to matter, in native units (1 point of a percent).
    """
    points, is_known = _points(history)
    noise, first = _noise_and_start(points, is_known)
    weights = (is_known & (np.arange(WINDOW_POINTS) >= first[:, None])).astype(np.float64)
    slope, level, scatter, error, age, newest = _bent_line(np.where(is_known, points, 0.0), weights)
    level = level + slope * (POINT_BINS // 2) / POINT_BINS  # a point stands for its middle bin
    scatter = np.maximum(scatter, np.maximum(0.5 * noise, 1e-3 * unit))
    moved = np.abs(slope) * age
    errors = np.abs(slope) / np.maximum(error * scatter, _FLAT)
    share = scatter / np.maximum(moved, _FLAT)
    is_on_line = np.abs(history[:, -1] - level) < _ON_THE_LINE * scatter + 0.1 * unit
    is_on_line &= np.abs(newest) < _NEWEST_ERRORS * scatter / np.sqrt(_NEWEST_POINTS) + 0.1 * unit
    is_clear = (errors >= CLEAR_ERRORS) & (age * POINT_BINS >= CLEAR_AGE_BINS) & (share < CLEAR_SCATTER)
    least = np.maximum(0.1 * unit, _BEND * np.abs(slope) / POINT_BINS)
    is_clear &= is_on_line & (moved > 1.5 * unit) & (scatter <= np.maximum(CLEAR_NOISE * noise, least))
    is_loose = (errors >= LOOSE_ERRORS) & (age * POINT_BINS >= LOOSE_AGE_BINS) & (share < LOOSE_SCATTER)
    return Trend(slope / POINT_BINS, level, scatter, age * POINT_BINS, is_clear, is_loose | is_clear)


def _points(history: Floats32) -> tuple[Floats, Flags]:
    """Return (series, point) medians of three bins, newest last, and which are known."""
    n_series, n_bins = history.shape
    wanted = POINT_BINS * WINDOW_POINTS
    recent = np.full((n_series, wanted), np.nan)
    recent[:, -min(n_bins, wanted) :] = history[:, -min(n_bins, wanted) :]
    triples = recent.reshape(n_series, WINDOW_POINTS, POINT_BINS)
    low, middle, high = triples[..., 0], triples[..., 1], triples[..., 2]
    medians = np.maximum(np.minimum(low, middle), np.minimum(np.maximum(low, middle), high))
    return medians, np.isfinite(medians)


def _noise_and_start(points: Floats, is_known: Flags) -> tuple[Floats, NDArray[np.intp]]:
    """Return the noise from point to point, and the first point after the last sudden jump."""
    steps = np.diff(points, axis=1)
    sizes = np.sort(np.abs(steps), axis=1)  # NaN last
    n_step = np.isfinite(sizes).sum(axis=1)
    rows = np.arange(len(points))
    median = sizes[rows, np.maximum(n_step - 1, 0) // 2]
    noise = np.where(n_step > 0, median, 0.0) / (0.6745 * np.sqrt(2.0))  # of a normal distribution
    ends = np.where(is_known, points, np.nan)
    reach = np.fmax.reduce(ends, axis=1) - np.fmin.reduce(ends, axis=1)
    least = np.maximum(_JUMP_NOISE * noise, _JUMP_RANGE * np.nan_to_num(reach))
    is_jump = np.nan_to_num(np.abs(steps)) > np.maximum(least, _FLAT)[:, None]
    last = points.shape[1] - 1 - np.argmax(is_jump[:, ::-1], axis=1)
    return noise, np.where(is_jump.any(axis=1), last, 0)


def _bent_line(points: Floats, weights: Floats) -> tuple[Floats, Floats, Floats, Floats, Floats, Floats]:
    """Fit level, bend and slope; every bend is tried, the least squares win.

    Returns:
        slope per point, the line's level now, the scatter around it, the slope's standard error over
        the scatter, points since the bend, and the mean of the newest residuals; each (series,).
    """
    ages = np.arange(_LEAST_AGE, WINDOW_POINTS + 1, dtype=np.float64)
    ramps = np.maximum(0.0, np.arange(WINDOW_POINTS) - (WINDOW_POINTS - ages)[:, None])  # (bend, point)
    count = np.maximum(weights.sum(axis=1), 1.0)
    mean = (weights * points).sum(axis=1) / count
    centred = weights * (points - mean[:, None])
    on_ramp, ramp_squares = weights @ ramps.T, weights @ (ramps * ramps).T  # (series, bend)
    spread = ramp_squares - on_ramp**2 / count[:, None]
    together = centred @ ramps.T
    gain = np.where(spread > _FLAT, together**2 / np.maximum(spread, _FLAT), 0.0)
    best, rows = np.argmax(gain, axis=1), np.arange(len(points))
    spread = np.maximum(spread[rows, best], _FLAT)
    slope = together[rows, best] / spread
    start = mean - slope * on_ramp[rows, best] / count
    left = np.maximum((centred**2).sum(axis=1) - gain[rows, best], 0.0)
    scatter = np.sqrt(left / np.maximum(count - 3, 1.0))
    newest = slice(WINDOW_POINTS - _NEWEST_POINTS, WINDOW_POINTS)
    line = start[:, None] + slope[:, None] * ramps[best, newest]
    residual = ((points[:, newest] - line) * weights[:, newest]).sum(axis=1)
    residual /= np.maximum(weights[:, newest].sum(axis=1), 1.0)
    age = np.minimum(ages[best], count)
    return slope, start + slope * ramps[best, -1], scatter, 1 / np.sqrt(spread), age, residual
