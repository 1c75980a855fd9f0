"""Does the newest day fit the usual day better when that is moved by some hours?

Owns: the day's template of every series and what each bin says for and against each lag. A bin
counts for at most the distance between the two templates there, whatever its value: a spike, an
outage or a new level says nothing about the time of day. Integers, so that sums over a window are
exact. numpy only. Does not know: windows, limits, alarms.
"""

import numpy as np
from numpy.typing import NDArray

from fleetcast.schema import Floats32, Longs

PLACE_STEPS = 1024  # integers per range
PLACE_CAP = 14.0  # ranges from the centre: evidence stays within 16 bits
ABSENT_PLACE = np.iinfo(np.int16).min
LAGS_H = tuple(range(1, 24))

Shorts = NDArray[np.int16]


def places(values: Floats32, centres: Floats32, ranges: Floats32) -> Shorts:
    """Return values (series, bin) about their centre in 1 / PLACE_STEPS of the range."""
    with np.errstate(over="ignore"):
        about = (values - centres[:, None]) / ranges[:, None]
    about = np.clip(about, -PLACE_CAP, PLACE_CAP) * PLACE_STEPS
    return np.asarray(np.where(np.isfinite(about), np.rint(about), ABSENT_PLACE), np.int16)


def lag_bins(bins_per_day: int) -> Longs:
    """Return (lag,): the bins of the day that each lag is long."""
    return np.asarray(np.rint(np.array(LAGS_H) * bins_per_day / 24), np.int64)


def evidence(template: Shorts, values: Shorts, day_bins: Longs) -> Shorts:
    """Return (lag, series, bin): how much nearer a value is to the moved template than to its own.

    Args:
        template: (series, bin of day), as `places`.
        values: (series, bin), as `places`.
        day_bins: (bin,) bin of the day of each.
    """
    bins_per_day = template.shape[1]
    wide, present = values.astype(np.int32), values != ABSENT_PLACE
    own = np.abs(wide - template[:, day_bins])
    out = np.empty((len(LAGS_H), *values.shape), np.int16)
    for row, lag in enumerate(lag_bins(bins_per_day)):
        out[row] = np.where(present, own - np.abs(wide - template[:, (day_bins - lag) % bins_per_day]), 0)
    return out


def distances(template: Shorts) -> Floats32:
    """Return (series, lag): mean distance of a bin from the template moved by each lag."""
    wide = template.astype(np.int32)
    moved = [np.abs(wide - np.roll(wide, lag, axis=1)).mean(axis=1) for lag in lag_bins(wide.shape[1])]
    return np.asarray(np.stack(moved, axis=1), np.float32)
