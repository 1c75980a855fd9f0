"""Bins → model arrays and back: what the network sees of a window, and what its answer means.

Owns: the network's input variables, the compact grid, the unit of a window; the trainer and the
server call the same `encode`. numpy only. Does not know: networks, servers, clocks.

A window is one series (server, metric) up to an origin bin. The network sees it on a compact grid:
the past day as 44 means of 6 bins and 24 single bins, the future as 12 bins and then wider knots,
between which the answer is interpolated. That is 3-4 times cheaper than bin by bin and more
accurate at equal cost (measured on recorded VMs). The grid is counted in bins, so that any bin
length and any horizon has one; only the daily lags are counted in days.

The unit of a window is (z - z_last) / s. z is x for percents and for series below zero,
log(1 + 100 x) for other rates; z_last is the last known value, s the last day's spread.
"""

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fleetcast.bins import DAY_BINS, HISTORY_BINS, RECENT_BINS
from fleetcast.clock import DAY_MS
from fleetcast.schema import Floats32, Longs

PAST_REALS = ("value", "seen", "hour_sin", "hour_cos", "day_ago", "profile")
AHEAD_REALS = ("hour_sin", "hour_cos", "day_ago", "day_ago_smooth", "week_ago", "profile", "log_horizon")
STATIC_REALS = (
    "hour_mean",
    "day_mean",
    "log_spread",
    "hour_spread",
    "log_level",
    "roughness",
    "season_error",
    "seen_share",
    "day_ago_share",
    "week_ago_share",
)
_ANSWER_LIMIT = np.float32(1e6)  # spreads; an answer is bounded by the series' range afterwards
_WEEK_DAYS = 7
_SMOOTH_BINS = 6  # each side's half: a day-ago value is smoothed over half an hour of 5-minute bins
FINE_PAST, COARSE_PAST, COARSE_WIDTH = 24, 44, 6  # bins, steps, bins per step: 288 bins
FINE_AHEAD, MAX_COARSE_AHEAD = 12, 28
# the next bin, the other fine ones, the rest: the weight of a knot, shared by its bins (a measured recipe)
_NEXT_WEIGHT, _FINE_WEIGHT, _COARSE_WEIGHT = 8.0, 2.0, 1.0
INPUT_LIMIT = 20.0  # spreads; further out a value says no more than "far"
_PERCENT_FLOOR, _LOG_FLOOR, _LINEAR_FLOOR_SHARE = 0.5, 0.1, 0.02  # smallest spread: points, log units, share
_VALUE_LIMIT = 1e30  # native units; float32 must hold 100 times this
_LOG_LIMIT = float(np.log1p(100 * _VALUE_LIMIT))


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
        if not (shape.bin_ms > 0 and 0 < shape.horizon_bins < 10_000 and 0 < shape.history_bins <= 10_000):
            raise ValueError(f"{shape} is no grid")
        return shape


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

    def normalise(self, z: Floats32) -> Floats32:
        """Return z (window, step) in spreads from the origin; NaN stays."""
        apart = (z - self.origin[:, None]) / self.spread[:, None]
        return np.asarray(np.clip(apart, -INPUT_LIMIT, INPUT_LIMIT), np.float32)

    def targets(self, future: Floats32) -> Floats32:
        """Return what followed (window, horizon), native, in the unit of the answer; NaN = unknown."""
        return self.normalise(to_z(clip_implausible(future), self.is_log))

    def native(self, answer: Floats32) -> Floats32:
        """Return an answer (window, horizon, quantile) in native units, within the bounds."""
        z = answer * self.spread[:, None, None] + self.origin[:, None, None]
        z = np.clip(z, self.low[:, None, None], self.high[:, None, None])
        z[self.is_log] = np.expm1(z[self.is_log]) / np.float32(100)
        return np.asarray(z, np.float32)


def is_percent(metric: str) -> bool:
    """Return whether a metric is measured in points of a hundred."""
    return metric.endswith("_pct")


def clip_implausible(values: Floats32) -> Floats32:
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


@dataclass(frozen=True, slots=True, eq=False)
class ModelArrays:
    """Windows as the network takes them, and the scale its answer is read with; all finite."""

    past: Floats32  # (window, past step, PAST_REALS)
    ahead: Floats32  # (window, knot, AHEAD_REALS)
    static: Floats32  # (window, STATIC_REALS)
    scale: Scale

    def __len__(self) -> int:
        return len(self.static)


def encode(
    history: Floats32,
    end_bin_ms: Longs,
    is_percent: NDArray[np.bool_],
    shape: GridShape,
    min_history_bins: int = RECENT_BINS,
) -> ModelArrays:
    """Turn histories into model arrays.

    Args:
        history: (window, bin) native units, NaN = no record; the last column is the origin bin.
        end_bin_ms: (window,) start of the origin bin.
        is_percent: (window,) whether the metric is measured in points of a hundred.
        min_history_bins: values of the last day a usable window has at least.
    """
    values = clip_implausible(_pad(history, shape.history_bins))
    is_log = is_log_scaled(values, is_percent)
    z = to_z(values, is_log)
    scale = Scale.measure(z, is_log, is_percent, min_history_bins)
    lags = _Lags(z, scale, shape)
    day = scale.normalise(z[:, -DAY_BINS:])
    return ModelArrays(
        past=_past(day, lags, end_bin_ms, shape),
        ahead=_ahead(lags, end_bin_ms, shape),
        static=_static(day, lags, scale),
        scale=scale,
    )


def decode(answer: Floats32, scale: Scale, shape: GridShape) -> Floats32:
    """Turn the network's answer into quantiles in native units.

    Args:
        answer: (window, knot, quantile), units of `scale`
    Returns:
        (window, horizon, quantile), finite, non-decreasing on the last axis, within what the
        last days make plausible.
    """
    ordered = np.sort(np.clip(np.nan_to_num(answer), -_ANSWER_LIMIT, _ANSWER_LIMIT), axis=-1)
    weights = shape.interpolation()  # (knot, horizon)
    between = np.matmul(ordered.transpose(0, 2, 1), weights)  # (window, quantile, horizon)
    return scale.native(np.ascontiguousarray(between.transpose(0, 2, 1)))


def _pad(history: Floats32, n_bins: int) -> Floats32:
    """Return exactly `n_bins` columns, the newest last."""
    if history.shape[1] == n_bins:
        return history
    values = np.full((len(history), n_bins), np.nan, np.float32)
    kept = history[:, -n_bins:]
    if kept.shape[1]:
        values[:, -kept.shape[1] :] = kept
    return values


class _Lags:
    """The same series one day, one week and on average over the days before, past and ahead.

    Arrays (window, position), normalised, NaN = unknown; positions run from the oldest bin of
    the past day to the last bin of the horizon. An unknown day is replaced by the one before.
    """

    def __init__(self, z: Floats32, scale: Scale, shape: GridShape) -> None:
        season, n_position = shape.season_bins, DAY_BINS + shape.horizon_bins
        empty = np.full((len(z), n_position), np.nan, np.float32)
        self.day_ago, self.week_ago = empty.copy(), empty
        total = np.zeros((len(z), n_position), np.float32)
        counts = np.zeros((len(z), n_position), np.int16)
        length = z.shape[1]
        first = length - DAY_BINS  # column of position 0
        for days in range(1, _WEEK_DAYS + 1 + -(-shape.horizon_bins // season)):
            # the positions whose value `days` ago lies within the history
            start, stop = max(0, days * season - first), min(n_position, days * season + length - first)
            if start >= stop:
                continue
            lagged = z[:, first + start - days * season : first + stop - days * season]
            known = np.isfinite(lagged)
            _fill(self.day_ago[:, start:stop], lagged)
            if days % _WEEK_DAYS == 0:
                _fill(self.week_ago[:, start:stop], lagged)
            total[:, start:stop] += np.where(known, lagged, np.float32(0))
            counts[:, start:stop] += known
        profile = np.where(counts > 0, total / np.maximum(counts, 1), np.float32(np.nan))
        self.profile = scale.normalise(profile.astype(np.float32))
        self.day_ago = scale.normalise(self.day_ago)
        self.week_ago = scale.normalise(self.week_ago)


def _fill(target: Floats32, source: Floats32) -> None:
    np.copyto(target, source, where=np.isnan(target))


def _compact_past(bins: Floats32) -> Floats32:
    """Return the past day (window, bin) on the compact grid (window, step)."""
    coarse = bins[:, : COARSE_PAST * COARSE_WIDTH].reshape(len(bins), COARSE_PAST, COARSE_WIDTH)
    return np.concatenate([masked_mean(coarse, 2), bins[:, -FINE_PAST:]], axis=1)


def _compact_ahead(bins: Floats32, shape: GridShape) -> Floats32:
    """Return the horizon (window, bin) on the knots (window, knot), each the mean of its bins."""
    seen = np.isfinite(bins)
    starts = shape.knot_starts - 1
    sums = np.add.reduceat(np.where(seen, bins, np.float32(0)), starts, axis=1)
    counts = np.add.reduceat(seen.astype(np.float32), starts, axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(np.nan)).astype(np.float32)


def _carry(steps: Floats32) -> Floats32:
    """Fill unknown steps (window, step) with the last known one before, else the next one after."""
    seen = np.isfinite(steps)
    index = np.where(seen, np.arange(steps.shape[1]), -1)
    newest = np.maximum.accumulate(index, axis=1)
    first = np.argmax(seen, axis=1)[:, None]
    return np.nan_to_num(np.take_along_axis(steps, np.where(newest < 0, first, newest), axis=1))


def _first_known(*choices: Floats32) -> Floats32:
    """Return the first choice that is known, 0 (the last value) where none is."""
    chosen = choices[0].copy()
    for other in choices[1:]:
        _fill(chosen, other)
    return np.nan_to_num(chosen)


def _time_of_day(end_bin_ms: Longs, offsets: Floats32, bin_ms: int) -> tuple[Floats32, Floats32]:
    """Return sine and cosine of the time of day at bins `offsets` after the origin."""
    phase = (end_bin_ms % DAY_MS)[:, None] / DAY_MS + offsets[None] * (bin_ms / DAY_MS)
    return np.sin(2 * np.pi * phase).astype(np.float32), np.cos(2 * np.pi * phase).astype(np.float32)


def _past(day: Floats32, lags: _Lags, end_bin_ms: Longs, shape: GridShape) -> Floats32:
    value = _compact_past(day)
    offsets = _compact_past(np.arange(1 - DAY_BINS, 1, dtype=np.float32)[None])[0]
    sine, cosine = _time_of_day(end_bin_ms, offsets, shape.bin_ms)
    profile = _compact_past(lags.profile[:, :DAY_BINS])
    day_ago = _compact_past(lags.day_ago[:, :DAY_BINS])
    seen = np.isfinite(value).astype(np.float32)
    columns = [_carry(value), seen, sine, cosine, _first_known(day_ago, profile), _first_known(profile)]
    return np.stack(columns, axis=-1)


def _ahead(lags: _Lags, end_bin_ms: Longs, shape: GridShape) -> Floats32:
    day_ago, week_ago, profile = (
        _compact_ahead(bins[:, DAY_BINS:], shape) for bins in (lags.day_ago, lags.week_ago, lags.profile)
    )
    smooth = _compact_ahead(_smooth(lags.day_ago, shape.horizon_bins), shape)
    centres = ((shape.knot_starts + shape.knot_ends) / 2).astype(np.float32)
    sine, cosine = _time_of_day(end_bin_ms, centres, shape.bin_ms)
    log_horizon = np.broadcast_to(np.log(centres) / 2 - 1, sine.shape).astype(np.float32)
    columns = [
        sine,
        cosine,
        _first_known(day_ago, profile),
        _first_known(smooth, profile),
        _first_known(week_ago, profile),
        _first_known(profile),
        log_horizon,
    ]
    return np.stack(columns, axis=-1)


def _smooth(day_ago: Floats32, horizon_bins: int) -> Floats32:
    """Return the centred running mean of the bins a day before the horizon."""
    around = day_ago[:, DAY_BINS - _SMOOTH_BINS :]
    padded = np.concatenate([around, np.full((len(around), _SMOOTH_BINS), np.nan, np.float32)], axis=1)
    seen = np.isfinite(padded)
    sums = np.cumsum(np.where(seen, padded, np.float32(0)), axis=1, dtype=np.float64)
    counts = np.cumsum(seen, axis=1)
    width = 2 * _SMOOTH_BINS
    sums = sums[:, width:] - sums[:, :-width]
    counts = counts[:, width:] - counts[:, :-width]
    mean = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return mean[:, :horizon_bins].astype(np.float32)


def _static(day: Floats32, lags: _Lags, scale: Scale) -> Floats32:
    hour, day_ago = day[:, -RECENT_BINS:], lags.day_ago[:, :DAY_BINS]
    columns = [
        masked_mean(hour, 1),
        masked_mean(day, 1),
        np.clip(np.log(scale.spread), -7, 7) / 3,
        masked_std(hour),
        np.clip(np.log1p(np.abs(scale.origin)), 0, 10) / 3,
        masked_mean(np.abs(np.diff(day, axis=1)), 1),
        masked_mean(np.abs(day - day_ago), 1),
        np.isfinite(day).mean(axis=1),
        np.isfinite(lags.day_ago[:, DAY_BINS:]).mean(axis=1),
        np.isfinite(lags.week_ago[:, DAY_BINS:]).mean(axis=1),
    ]
    return np.nan_to_num(np.stack(columns, axis=-1).astype(np.float32))
