"""Bins → model arrays and back: what the network sees of a window, and what its answer means.

Owns: the network's input variables on the compact grid; the trainer and the server call the
same `encode`. numpy only. Does not know: networks, servers, metric names, clocks.

One window is one series (server, metric) up to an origin bin.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetcast.bins import DAY_BINS, RECENT_BINS
from fleetcast.forecast.gridshape import COARSE_PAST, COARSE_WIDTH, DAY_MS, FINE_PAST, GridShape
from fleetcast.forecast.scaling import Scale, is_log_scaled, masked_mean, masked_std, plausible, to_z
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
    values = plausible(_full_length(history, shape.history_bins))
    is_log = is_log_scaled(values, is_percent)
    z = to_z(values, is_log)
    scale = Scale.measure(z, is_log, is_percent, min_history_bins)
    lags = _Lags(z, scale, shape)
    day = scale.normalised(z[:, -DAY_BINS:])
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


def _full_length(history: Floats32, n_bins: int) -> Floats32:
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
        self.profile = scale.normalised(profile.astype(np.float32))
        self.day_ago = scale.normalised(self.day_ago)
        self.week_ago = scale.normalised(self.week_ago)


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


def _carried(steps: Floats32) -> Floats32:
    """Fill unknown steps (window, step) with the last known one before, else the next one after."""
    seen = np.isfinite(steps)
    index = np.where(seen, np.arange(steps.shape[1]), -1)
    newest = np.maximum.accumulate(index, axis=1)
    first = np.argmax(seen, axis=1)[:, None]
    return np.nan_to_num(np.take_along_axis(steps, np.where(newest < 0, first, newest), axis=1))


def _either(*choices: Floats32) -> Floats32:
    """Return the first choice that is known, 0 (the last value) where none is."""
    chosen = choices[0].copy()
    for other in choices[1:]:
        _fill(chosen, other)
    return np.nan_to_num(chosen)


def _hours(end_bin_ms: Longs, offsets: Floats32, bin_ms: int) -> tuple[Floats32, Floats32]:
    """Return sine and cosine of the time of day at bins `offsets` after the origin."""
    phase = (end_bin_ms % DAY_MS)[:, None] / DAY_MS + offsets[None] * (bin_ms / DAY_MS)
    return np.sin(2 * np.pi * phase).astype(np.float32), np.cos(2 * np.pi * phase).astype(np.float32)


def _past(day: Floats32, lags: _Lags, end_bin_ms: Longs, shape: GridShape) -> Floats32:
    value = _compact_past(day)
    offsets = _compact_past(np.arange(1 - DAY_BINS, 1, dtype=np.float32)[None])[0]
    sine, cosine = _hours(end_bin_ms, offsets, shape.bin_ms)
    profile = _compact_past(lags.profile[:, :DAY_BINS])
    day_ago = _compact_past(lags.day_ago[:, :DAY_BINS])
    seen = np.isfinite(value).astype(np.float32)
    columns = [_carried(value), seen, sine, cosine, _either(day_ago, profile), _either(profile)]
    return np.stack(columns, axis=-1)


def _ahead(lags: _Lags, end_bin_ms: Longs, shape: GridShape) -> Floats32:
    day_ago, week_ago, profile = (
        _compact_ahead(bins[:, DAY_BINS:], shape) for bins in (lags.day_ago, lags.week_ago, lags.profile)
    )
    smooth = _compact_ahead(_smoothed(lags.day_ago, shape.horizon_bins), shape)
    centres = ((shape.knot_starts + shape.knot_ends) / 2).astype(np.float32)
    sine, cosine = _hours(end_bin_ms, centres, shape.bin_ms)
    log_horizon = np.broadcast_to(np.log(centres) / 2 - 1, sine.shape).astype(np.float32)
    columns = [
        sine,
        cosine,
        _either(day_ago, profile),
        _either(smooth, profile),
        _either(week_ago, profile),
        _either(profile),
        log_horizon,
    ]
    return np.stack(columns, axis=-1)


def _smoothed(day_ago: Floats32, horizon_bins: int) -> Floats32:
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
