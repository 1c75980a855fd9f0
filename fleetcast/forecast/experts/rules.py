"""Forecasts of the experts that need no training (last value, usual day, analogues); not the network.

Owns: the scale on which forecasts are mixed, the rules (last value, yesterday, the usual day, analogues,
trend), and their order. numpy only. Does not know: evidence, models, files.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetcast.forecast.experts.analogues import analogue_forecast
from fleetcast.forecast.experts.trend import Trend, find_trend
from fleetcast.forecast.naive import last_known, same_time_yesterday
from fleetcast.schema import Floats, Floats32, Longs

RULES = ("last", "yesterday", "usual", "near", "far")
USUAL_DAYS = 7
RANGE_MARGIN = 0.1  # of the known range: how far beyond it an analogue may go
YOUNG_BINS = 24
YOUNG_HALF, LEAST_HALF = (0.5, 0.1), (0.05, 0.005)  # of a percent, of a rate's logarithm
STEP_SPREAD = 1.25  # standard deviation over mean absolute value, of a normal distribution
NORMAL_90 = 1.2816
RATE_UNIT = 0.02  # of a rate's usual size: what a movement must be to matter
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class RuleForecasts:
    """The rules' forecasts of some series from one origin, on the mixing scale."""

    median: Floats32  # (rule, series, horizon), the last value where a rule has nothing to say
    below: Floats32  # (series, horizon) from the analogues' median to their low side, NaN = none
    above: Floats32
    lowest: Floats32  # (series,) of the known past
    highest: Floats32
    least_half: Floats32  # (series, horizon) of an interval that claims to know something
    trend: Trend  # native units

    def of(self, series: Longs, places: Longs) -> "RuleForecasts":
        """Return the forecasts of some series at some horizons, by their places."""
        by_horizon = (self.below, self.above, self.least_half)
        below, above, least = (values[np.ix_(series, places)] for values in by_horizon)
        median = self.median[np.ix_(np.arange(len(self.median)), series, places)]
        ends = self.lowest[series], self.highest[series]
        return RuleForecasts(median, below, above, *ends, least, self.trend.of(series))


def to_scale(values: Floats32, is_percent: Flags) -> Floats32:
    """Return values (series, ...) on the mixing scale: rates by their logarithm, log(1 + 100 |x|).

    In native units a hundredth of yesterday's burst would outweigh all of a quiet rate.
    """
    scaled = np.array(values, np.float32)
    rates = scaled[~is_percent]
    scaled[~is_percent] = np.copysign(np.log1p(np.float32(100) * np.abs(rates)), rates)
    return scaled


def from_scale(scaled: Floats32, is_percent: Flags) -> Floats32:
    """Undo `to_scale`.

    >>> kinds = np.array([True, False])
    >>> from_scale(to_scale(np.array([[40.0], [2.5]], np.float32), kinds), kinds).round(3).tolist()
    [[40.0], [2.5]]
    """
    values = np.array(scaled, np.float32)
    logs = values[~is_percent]
    values[~is_percent] = np.copysign(np.expm1(np.minimum(np.abs(logs), 80)) / np.float32(100), logs)
    return values


def rule_forecasts(history: Floats32, is_percent: Flags, day_bins: int, n_horizon: int) -> RuleForecasts:
    """Forecast series by every rule.

    Args:
        history: (series, bin) native units, NaN = no record; the last column is the origin.
        is_percent: (series,)
        day_bins: bins in a day.
    """
    native, n_known = carry_forward(history)
    z = to_scale(native, is_percent)
    now = last_known(z)[:, None]
    median = np.empty((len(RULES), len(z), n_horizon), np.float32)
    median[0] = now
    median[1] = same_time_yesterday(z, day_bins, n_horizon)
    median[2] = usual_day(z, day_bins, n_horizon)
    analogues = analogue_forecast(np.nan_to_num(z), n_known, n_horizon)
    lowest, highest = np.fmin.reduce(z, axis=1), np.fmax.reduce(z, axis=1)
    margin = RANGE_MARGIN * (highest - lowest)
    median[3:] = np.clip(analogues.median, (lowest - margin)[:, None], (highest + margin)[:, None])
    median = np.where(np.isfinite(median), median, now)
    below = (analogues.median - analogues.low).mean(axis=0)
    above = (analogues.high - analogues.median).mean(axis=0)
    size = np.abs(np.nan_to_num(native[:, -day_bins:])).mean(axis=1)
    unit = np.where(is_percent, 1.0, RATE_UNIT * size + 1e-6).astype(np.float32)
    least = _least_half(z[:, -day_bins:], n_known, is_percent, n_horizon)
    return RuleForecasts(median, below, above, lowest, highest, least, find_trend(native, unit))


def _least_half(day: Floats32, n_known: Longs, is_percent: Flags, n_horizon: int) -> Floats32:
    """Return (series, horizon) the least that half an interval may be wide.

    A series of the first two hours has shown little: its half is that of a random walk of its steps so
    far, and never less than `YOUNG_HALF`. Later a quarter of a step is enough, and `LEAST_HALF`.
    """
    steps = np.abs(np.nan_to_num(np.diff(day, axis=1)))
    step = steps.sum(axis=1) / np.maximum(np.minimum(n_known, day.shape[1]) - 1, 1)
    leads = np.sqrt(np.arange(1, n_horizon + 1))
    young = np.maximum(NORMAL_90 * STEP_SPREAD * step[:, None] * leads, _by_kind(YOUNG_HALF, is_percent))
    grown = np.maximum(0.25 * step[:, None], _by_kind(LEAST_HALF, is_percent))
    return np.asarray(np.where((n_known < YOUNG_BINS)[:, None], young, grown), np.float32)


def _by_kind(halves: tuple[float, float], is_percent: Flags) -> Floats:
    return np.where(is_percent, *halves)[:, None]


def usual_day(z: Floats32, day_bins: int, n_horizon: int) -> Floats32:
    """Return (series, horizon) the median of the last days at the target's time of day, NaN = unknown."""
    columns = z.shape[1] - 1 + np.arange(1, n_horizon + 1)
    days = []
    for day in range(-(-n_horizon // day_bins), USUAL_DAYS + 1):
        places = columns - day * day_bins
        values = z[:, np.maximum(places, 0)]
        values[:, places < 0] = np.nan
        days.append(values)
    ordered = np.sort(np.stack(days), axis=0)  # (day, series, horizon), NaN last
    count = np.isfinite(ordered).sum(axis=0)[None]
    low, high = np.maximum(count - 1, 0) // 2, np.maximum(count, 1) // 2
    middle = np.take_along_axis(ordered, low, 0) + np.take_along_axis(ordered, np.minimum(high, low + 1), 0)
    return np.asarray(np.where(count > 1, middle / 2, np.take_along_axis(ordered, low, 0))[0], np.float32)


def carry_forward(history: Floats32) -> tuple[Floats32, Longs]:
    """Fill gaps with the value before them; return that and the bins since the first value.

    >>> filled, known = carry_forward(np.array([[np.nan, 3.0, np.nan, 5.0]], np.float32))
    >>> filled.tolist(), known.tolist()
    ([[nan, 3.0, 3.0, 5.0]], [3])
    """
    n_bins = history.shape[1]
    is_known = np.isfinite(history)
    if is_known.all():
        return history, np.full(len(history), n_bins)
    place = np.maximum.accumulate(np.where(is_known, np.arange(n_bins), 0), axis=1)
    first = np.where(is_known.any(axis=1), np.argmax(is_known, axis=1), n_bins)
    return np.take_along_axis(history, place, axis=1), n_bins - first
