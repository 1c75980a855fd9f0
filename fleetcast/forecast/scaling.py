"""How a window's values are measured, and how an answer is read back.

Owns: the unit of a window, (z - z_last) / s with z = x for percents and for series below zero,
log(1 + 100 x) for other rates, z_last the last known value and s the last day's spread; the
inverse; the bounds of an answer. Does not know: grids, networks.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fleetcast.bins import DAY_BINS, RECENT_BINS
from fleetcast.schema import Floats32

INPUT_LIMIT = 20.0  # spreads; further out a value says no more than "far"
_PERCENT_FLOOR, _LOG_FLOOR, _LINEAR_FLOOR_SHARE = 0.5, 0.1, 0.02  # smallest spread: points, log units, share
_VALUE_LIMIT = 1e30  # native units; float32 must hold 100 times this
_LOG_LIMIT = float(np.log1p(100 * _VALUE_LIMIT))


@dataclass(frozen=True, slots=True, eq=False)
class Scale:
    """The units of a batch of windows; every array (window,) and finite."""

    origin: Floats32  # z of the last known value
    spread: Floats32  # s, > 0
    is_log: NDArray[np.bool_]
    low: Floats32  # bounds of an answer, in z
    high: Floats32
    is_usable: NDArray[np.bool_]  # False: too little history for a forecast

    @classmethod
    def measure(
        cls, z: Floats32, is_log: NDArray[np.bool_], is_percent: NDArray[np.bool_], min_history_bins: int
    ) -> Self:
        """Measure windows.

        Args:
            z: (window, bin) as `to_z` returns it; the last column is the origin bin.
            min_history_bins: values of the last day a usable window has at least.
        """
        day = z[:, -DAY_BINS:]
        seen = np.isfinite(day)
        spread = _spread(day, seen, is_percent, is_log)
        low, high = _bounds(z, spread, seen, is_percent, is_log)
        return cls(
            origin=_last_known(day, seen),
            spread=spread,
            is_log=is_log,
            low=low,
            high=high,
            is_usable=seen[:, -RECENT_BINS:].any(axis=1) & (seen.sum(axis=1) >= min_history_bins),
        )

    def normalised(self, z: Floats32) -> Floats32:
        """Return z (window, step) in spreads from the origin; NaN stays."""
        apart = (z - self.origin[:, None]) / self.spread[:, None]
        return np.asarray(np.clip(apart, -INPUT_LIMIT, INPUT_LIMIT), np.float32)

    def targets(self, future: Floats32) -> Floats32:
        """Return what followed (window, horizon), native, in the unit of the answer; NaN = unknown."""
        return self.normalised(to_z(plausible(future), self.is_log))

    def native(self, answer: Floats32) -> Floats32:
        """Return an answer (window, horizon, quantile) in native units, within the bounds."""
        z = answer * self.spread[:, None, None] + self.origin[:, None, None]
        z = np.clip(z, self.low[:, None, None], self.high[:, None, None])
        z[self.is_log] = np.expm1(z[self.is_log]) / np.float32(100)
        return np.asarray(z, np.float32)


def is_percent(metric: str) -> bool:
    """Return whether a metric is measured in points of a hundred."""
    return metric.endswith("_pct")


def plausible(values: Floats32) -> Floats32:
    """Return a copy with what is no number as NaN and what is beyond any metric cut off."""
    clean = np.clip(values, -_VALUE_LIMIT, _VALUE_LIMIT, dtype=np.float32)
    clean[~np.isfinite(values)] = np.nan
    return np.asarray(clean)


def is_log_scaled(values: Floats32, is_percent: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which windows (window, bin) are measured on the log scale."""
    return np.asarray(~is_percent & ~(np.fmin.reduce(values, axis=1) < 0))


def to_z(values: Floats32, is_log: NDArray[np.bool_]) -> Floats32:
    """Return native values (window, bin) on the scale of their window."""
    z = np.array(values, np.float32)
    z[is_log] = np.log1p(np.float32(100) * np.maximum(z[is_log], np.float32(0)))
    return z


def masked_mean(values: Floats32, axis: int) -> Floats32:
    """Return the mean of the values that are not NaN, NaN where there is none."""
    seen = np.isfinite(values)
    counts = seen.sum(axis=axis)
    sums = np.where(seen, values, np.float32(0)).sum(axis=axis, dtype=np.float64)
    return np.asarray(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan), np.float32)


def masked_std(values: Floats32) -> Floats32:
    """Return the spread of (window, bin) around its mean; 0 where there is no value."""
    seen = np.isfinite(values)
    apart = np.where(seen, values - masked_mean(values, 1)[:, None], np.float32(0)).astype(np.float64)
    return np.asarray(np.sqrt((apart**2).sum(axis=1) / np.maximum(seen.sum(axis=1), 1)), np.float32)


def _last_known(day: Floats32, seen: NDArray[np.bool_]) -> Floats32:
    newest = day.shape[1] - 1 - np.argmax(seen[:, ::-1], axis=1)
    newest_value: Floats32 = np.nan_to_num(day[np.arange(len(day)), newest])
    return newest_value


def _spread(
    day: Floats32, seen: NDArray[np.bool_], is_percent: NDArray[np.bool_], is_log: NDArray[np.bool_]
) -> Floats32:
    largest = np.nan_to_num(np.fmax.reduce(np.abs(day), axis=1))
    linear = np.maximum(_LINEAR_FLOOR_SHARE * largest, 1e-6)
    floor = np.where(is_percent, _PERCENT_FLOOR, np.where(is_log, _LOG_FLOOR, linear))
    return np.asarray(np.maximum(masked_std(day), floor), np.float32)


def _bounds(
    z: Floats32,
    spread: Floats32,
    day_seen: NDArray[np.bool_],
    is_percent: NDArray[np.bool_],
    is_log: NDArray[np.bool_],
) -> tuple[Floats32, Floats32]:
    """Return how far an answer may go: the known range and a margin, wider on young series.

    Without it the 90 % quantile of a quiet rate explodes when the logarithm is undone.
    """
    smallest = np.nan_to_num(np.fmin.reduce(z, axis=1))
    largest = np.nan_to_num(np.fmax.reduce(z, axis=1))
    is_young = day_seen.mean(axis=1) < 0.5
    margin = 0.25 * (largest - smallest) + spread * np.where(is_young, 4.0, 1.0)
    # on the log scale a margin is a factor: of a wide range it would be tens of times the maximum
    margin = np.where(is_log, np.minimum(margin, np.where(is_young, 1.5, 0.5)), margin)
    low = smallest - margin
    low = np.where((is_percent | is_log) & (smallest >= 0), np.maximum(low, 0.0), low)
    high = largest + margin
    high = np.where(is_percent & (largest <= 100.0), np.minimum(high, 100.0), high)
    high = np.where(is_log, np.minimum(high, _LOG_LIMIT), high)
    return low.astype(np.float32), high.astype(np.float32)
