"""What a replay was worth: errors relative to repeating the last value, and time to recover.

Owns: the definitions of the figures of `loop_replay.py`. numpy only. Does not know: policies.

*Error* at a horizon: per series the mean |p50 - actual| over every third origin of the replay,
divided by that of the last value on the same forecasts; over series the geometric mean.
*Recovered* after a change: the first hour from which the changed series' errors at 5 minutes, over six
hours, are at most 1.3 times their later level: that from the third to the seventh day after the change.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.loop.parts.fleet import DAY, ReplayFleet
from benchmarks.loop.parts.record import HORIZONS, last_values
from fleetcast.schema import ChangedSeries, Floats, Floats32

NAMES = {1: "5min", 12: "1h", 96: "8h"}
SCORED_EVERY = 3  # origin bins: a quarter of an hour
HOUR, SPAN = 12, 72  # bins
LATER = (3 * DAY, 7 * DAY)  # bins after a change: its later level
RECOVERED = 1.3  # times the later level
# 97.5 % quantiles of the t distribution for 1, 2, 3 ... degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def error_pair(fleet: ReplayFleet, p50: Floats32, horizon: int) -> tuple[Floats, Floats]:
    """Return |p50 - actual| and |last value - actual|, (server, metric, origin); NaN where unknown.

    Args:
        p50: (server, metric, origin) at this horizon.
    """
    grid = fleet.grid
    origins = np.arange(fleet.begin, grid.n_bins)
    targets = origins + horizon
    actual = grid.values[:, :, np.minimum(targets, grid.n_bins - 1)].astype(np.float64)
    last = last_values(grid.values)[:, :, origins]
    known = np.isfinite(actual) & np.isfinite(last) & np.isfinite(p50) & (targets < grid.n_bins)
    known &= (origins - fleet.begin) % SCORED_EVERY == 0
    ours, naive = np.abs(p50 - actual), np.abs(last - actual)
    return np.where(known, ours, np.nan), np.where(known, naive, np.nan)


def relative(ours: Floats, naive: Floats, chosen: NDArray[np.bool_]) -> float | None:
    """Return the geometric mean over the chosen (server, metric) of the ratio of mean errors."""
    sums, others = np.nansum(ours[chosen], axis=-1), np.nansum(naive[chosen], axis=-1)
    usable = others > 0
    if not usable.any():
        return None
    return round(float(np.exp(np.log(np.maximum(sums[usable] / others[usable], 1e-3)).mean())), 4)


def errors(fleet: ReplayFleet, p50: Floats32) -> dict[str, Any]:
    """Return the errors by horizon: of all series, of changed ones from their change on, of the others."""
    since = fleet.changed_since()
    has_changed = since < fleet.grid.n_bins
    is_after = np.arange(fleet.begin, fleet.grid.n_bins) >= since[..., None]
    table: dict[str, Any] = {"all": {}, "changed": {}, "others": {}}
    for place, horizon in enumerate(HORIZONS):
        ours, naive = error_pair(fleet, p50[..., place], horizon)
        name = NAMES[horizon]
        table["all"][name] = relative(ours, naive, np.ones_like(has_changed))
        after = (np.where(is_after, ours, np.nan), np.where(is_after, naive, np.nan))
        table["changed"][name] = relative(*after, has_changed)
        table["others"][name] = relative(ours, naive, ~has_changed)
    for group in table.values():
        known = [value for value in group.values() if value is not None]
        group["mean"] = round(float(np.exp(np.log(known).mean())), 4) if known else None
    return table


def recovery_hours(fleet: ReplayFleet, p50: Floats32) -> list[float | None]:
    """Return hours from each set of changes to recovered errors; None = not before the later level begins.

    Args:
        p50: (server, metric, origin, horizon).
    """
    pair = error_pair(fleet, p50[..., 0], HORIZONS[0])
    found: list[float | None] = []
    for changed in fleet.changes:
        begin = changed[0].since_bin - fleet.begin
        later = _ratio(*pair, changed, slice(begin + LATER[0], begin + LATER[1]))
        starts = range(begin, begin + LATER[0], HOUR)
        errors = [_ratio(*pair, changed, slice(start, start + SPAN)) for start in starts]
        good = np.flatnonzero(np.array(errors) <= RECOVERED * later)
        found.append(float(good[0]) if len(good) else None)
    return found


def daily_errors(fleet: ReplayFleet, p50: Floats32) -> list[float | None]:
    """Return the error of each day of the replay: the geometric mean over series and horizons."""
    pairs = [error_pair(fleet, p50[..., place], horizon) for place, horizon in enumerate(HORIZONS)]
    everything = np.ones(fleet.grid.values.shape[:2], np.bool_)
    found: list[float | None] = []
    for begin in range(0, p50.shape[2], DAY):
        day = slice(begin, begin + DAY)
        known = [relative(own[..., day], naive[..., day], everything) for own, naive in pairs]
        values = [value for value in known if value is not None]
        found.append(round(float(np.exp(np.log(values).mean())), 4) if values else None)
    return found


def _ratio(ours: Floats, naive: Floats, changed: Sequence[ChangedSeries], span: slice) -> float:
    """Return the mean over series of the ratio of errors in a span of origins."""
    rows = ([item.server for item in changed], [item.metric for item in changed])
    sums, others = np.nansum(ours[rows][:, span], axis=1), np.nansum(naive[rows][:, span], axis=1)
    return float(np.mean(sums[others > 0] / others[others > 0])) if (others > 0).any() else float("nan")


def mean_with_interval(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Return the mean of the known values and the half of its 95 % interval; None = cannot be told.

    >>> mean_with_interval([0.4, None, 0.6])
    (0.5, 1.2706)
    """
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return None, None
    mean = round(float(known.mean()), 4)
    if len(known) == 1:
        return mean, None
    student = STUDENT[min(len(known) - 2, len(STUDENT) - 1)]
    return mean, round(float(student * known.std(ddof=1) / np.sqrt(len(known))), 4)
