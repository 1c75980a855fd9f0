"""What a replay was worth: errors relative to repeating the last value, and time to recover.

Owns: the definitions of the figures of `loop_replay.py`. numpy only. Does not know: policies.

*Error* at a horizon: per series the mean |p50 - actual| over every third origin of the replay,
divided by that of the last value on the same forecasts; over series the geometric mean.
*Recovered* after a change: the first bin from which on the changed series' errors at 1 h are as near
to the oracle's as to those of the policy that never trains, in every 24 h that follow up to a week
after the change; hours in which the oracle gains nothing say nothing. The three are compared on the
same hours, so that easy ones are no recovery.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.loop.parts.fleet import DAY, ReplayFleet
from benchmarks.loop.parts.record import HORIZONS, last_values
from fleetcast.schema import ChangedSeries, Floats, Floats32

NAMES = {1: "5min", 12: "1h", 96: "8h"}
SCORED_EVERY = 3  # origin bins: a quarter of an hour
LOOK_AHEAD = DAY  # bins over which "recovered" is judged
WATCHED = 7 * DAY  # bins after a change in which a policy may recover
LOOK_EVERY = 6


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
    since = np.full(fleet.grid.values.shape[:2], fleet.grid.n_bins)
    for item in (item for changed in fleet.changes for item in changed):
        since[item.server, item.metric] = min(since[item.server, item.metric], item.since_bin)
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


def recovery_hours(
    fleet: ReplayFleet, by_policy: Mapping[str, Floats32], never: str, oracle: str
) -> dict[str, list[float | None]]:
    """Return hours from each set of changes to recovered errors; None = not within a week.

    Args:
        by_policy: p50 (server, metric, origin, horizon).
    """
    at_1h = {name: error_pair(fleet, p50[..., 1], HORIZONS[1]) for name, p50 in by_policy.items()}
    found: dict[str, list[float | None]] = {name: [] for name in by_policy}
    for changed in fleet.changes:
        begin = changed[0].since_bin - fleet.begin
        end = min(begin + WATCHED, fleet.grid.n_bins - fleet.begin - LOOK_AHEAD)
        spans = [slice(start, start + LOOK_AHEAD) for start in range(begin, end, LOOK_EVERY)]
        ratios = {
            name: np.array([_ratio(*pair, changed, span) for span in spans]) for name, pair in at_1h.items()
        }
        for name in by_policy:
            place = _recovered(ratios[name], ratios[never], ratios[oracle])
            found[name].append(None if place is None else place * LOOK_EVERY * 24 / DAY)
    return found


def _recovered(own: Floats, never: Floats, oracle: Floats) -> int | None:
    """Return the place from which on a policy is as near to the oracle as to never; None for nowhere."""
    says = oracle < never
    is_near = ~says | (own <= (never + oracle) / 2)
    far = np.flatnonzero(~is_near)
    first = int(far[-1]) + 1 if len(far) else 0
    return first if says[first:].any() else None


def _ratio(ours: Floats, naive: Floats, changed: Sequence[ChangedSeries], span: slice) -> float:
    """Return the mean over series of the ratio of errors in a span of origins."""
    rows = ([item.server for item in changed], [item.metric for item in changed])
    sums, others = np.nansum(ours[rows][:, span], axis=1), np.nansum(naive[rows][:, span], axis=1)
    return float(np.mean(sums[others > 0] / others[others > 0])) if (others > 0).any() else float("nan")
