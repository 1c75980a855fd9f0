"""Why a series is in alarm, since about when, from what to what, and why others are not judged.

Pure functions over a detector's state. Does not know: when alarms begin and end.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast.drift.seasonal.learning import MIN_DAYS
from fleetcast.drift.seasonal.quorum import SUPPORT
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.drift.seasonal.residuals import ABSENT
from fleetcast.drift.seasonal.running_sums import RunningSums
from fleetcast.drift.seasonal.sensors import SensorWatch
from fleetcast.drift.seasonal.statistics import FAMILY_OF, INDEX, IS_SHORT, NEEDS_SUPPORT
from fleetcast.schema import Floats, Floats32

_BY_SIZE = tuple(INDEX[name] for name in ("wider_24h", "calmer_24h"))
_BY_MOVES = tuple(INDEX[name] for name in ("innovation_3h", "restless_24h", "rougher_24h", "smoother_24h"))


def worst_statistic(statistics: Floats32, limits: Floats32, held: Floats32) -> int:
    """Return the index of the statistic that carries one series' alarm.

    Args:
        statistics, limits: (statistic,) of that series.
        held: (family,) its held ratios.
    """
    ratios = np.nan_to_num(statistics / limits, nan=0.0)
    supported = np.where(NEEDS_SUPPORT, np.minimum(ratios, ratios[IS_SHORT].max() / SUPPORT), ratios)
    return int(np.where(held.argmax() == FAMILY_OF, supported, -1.0).argmax())


def change_bin(sums: RunningSums, series: int, statistic: int) -> int:
    """Return how many bins before now the newest day of a series splits best into before and after.

    The largest excursion of the cumulated deviations from their mean (CUSUM), in standard errors
    of that place, of what the statistic looks at. 1 = only the newest bin is different.
    """
    ring: NDArray[Any] = sums.values
    if statistic in _BY_SIZE:
        ring = sums.size
    elif statistic in _BY_MOVES:
        ring = sums.innovations
    elif statistic == INDEX["error_3h"]:
        ring = sums.errors
    newest = sums.newest(ring, sums.long)[:, series].astype(np.float64)
    known = sums.newest(sums.values, sums.long)[:, series] != ABSENT
    if ring.dtype == np.uint8:
        known &= newest != ABSENT
    places = np.flatnonzero(known)
    if len(places) < 2:
        return 1
    kept = newest[places]
    n = np.arange(1, len(kept))
    path = np.abs(np.cumsum(kept - kept.mean())[:-1]) / np.sqrt(n * (len(kept) - n))
    return int(len(newest) - places[int(path.argmax()) + 1])


def newest_levels(
    reference: Reference, newest: Floats32, end_ms: int, chosen: NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """Return what is usual for the newest hours of some series and what they were, native units.

    Args:
        newest: (bin, series) values up to `end_ms`, oldest first, NaN = absent.
        chosen: rows of the series asked for.
    """
    if not len(chosen):
        return np.empty(0), np.empty(0)
    clock, bins = reference.clock, len(newest)
    local_bins = clock.local_bins(end_ms - bins * reference.bin_ms, bins)
    usual = reference.shape.rows(chosen).expected(clock, local_bins).astype(np.float64)
    own = newest[:, chosen].astype(np.float64)
    known = np.isfinite(own)
    n = known.sum(axis=0)
    actual = np.where(known, own, 0).sum(axis=0) / np.maximum(n, 1)
    return usual.mean(axis=1), np.where(n > 0, actual, np.nan)


def why_not_compared(
    reference: Reference, judged: NDArray[np.bool_], watch: SensorWatch, is_young: bool
) -> dict[str, int]:
    """Return why -> how many series are not judged; no entry where there is none."""
    unjudged = ~reference.is_compared
    short = unjudged & (reference.n_days < MIN_DAYS)
    unknown = unjudged & ~short
    out = np.repeat(watch.is_out, len(reference.metrics))
    rest = ~judged & ~short & ~unknown
    reasons = {
        "too few days in the reference": short,
        "reference without limits": unknown,
        "server is silent": rest & out,
        "sensor stands still": rest & ~out & watch.is_frozen,
    }
    last = "window not full yet" if is_young else "too few values in the window"
    reasons[last] = rest & ~out & ~watch.is_frozen
    return {reason: int(mask.sum()) for reason, mask in reasons.items() if mask.any()}
