"""How large a statistic may get, and how many may be, before unchanged data would not explain it.

Owns: limits per series from days left out of their reference, with strength shared between
series; return levels of daily maxima; the factor that makes the fleet's verdict as rare as asked,
and the rate it showed. Pure maths. Does not know: what a statistic measures, the newest values.

A series' own high quantile is multiplied by what the fleet's series showed a block of unseen
days to add to it: few or restless reference days give wide limits by themselves. A small fleet
leans on what recorded fleets showed.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetcast.drift.seasonal.learning import FOLDS, STEPS_PER_DAY
from fleetcast.drift.seasonal.quorum import (
    QuorumRule,
    by_family,
    common_ratios,
    fleet_ratios,
    held_fleet,
    limit_ratios,
    running_minimum,
    running_share,
    worst_ratio,
    youth,
)
from fleetcast.drift.seasonal.season import upper_quantile
from fleetcast.drift.seasonal.statistics import CAPS, FLOORS, STATISTICS
from fleetcast.schema import Floats32, Longs

OWN_QUANTILE = 0.995  # of the half hours of days left out
SHARED_QUANTILE = 0.95  # of the growth from known to unseen blocks
KNOWN_SHARE_OF_FLOOR = 0.7
PRIOR_WEIGHT = 30  # blocks; what a fleet of ten series has of its own
GROWTH_CAP = 9.0
EULER = 0.5772156649
# Measured on the development half of three recorded fleets (docs/decisions/drift-quality.md).
PRIOR_GROWTH = {
    "innovation_3h": 1.8,
    "error_3h": 1.8,
    "error_24h": 1.5,
    "restless_24h": 2.5,
    "rougher_24h": 1.2,
    "smoother_24h": 1.4,
    "shape_3h": 1.5,
    "shape_24h": 1.5,
    "below_24h": 1.6,
    "above_24h": 1.6,
    "higher_24h": 1.4,
    "lower_24h": 1.1,
    "rhythm_down_24h": 1.6,
    "shifted_24h": 1.4,
    "outside_3h": 1.0,
    "wider_24h": 2.2,
    "calmer_24h": 1.3,
}
# Wider than an unseen block asks for, where a statistic alone made most alarms on unchanged series: a
# third of them goes, detection hardly changes. Narrower where it made none. Measured there, too.
MARGINS = {"error_24h": 1.2, "shape_3h": 1.2, "smoother_24h": 1.1, "rougher_24h": 0.8}
# Nothing but its limit holds back a statistic that stands alone, and one week says little of the next.
_STANDS_ALONE = np.array([item.stands_alone for item in STATISTICS])
_MARGINS = np.array([MARGINS.get(item.name, 1.0) for item in STATISTICS], np.float32)
_PRIOR = np.array([PRIOR_GROWTH[statistic.name] for statistic in STATISTICS], np.float32)
SURE_DAYS = 5  # the limits of a series with fewer days behind it are as much wider as days are missing
MONTH_DAYS = 30.0
EPISODE_DAYS = 1.0  # alarms closer than this are one


def own_quantiles(left_out: Floats32) -> Floats32:
    """Return (series, statistic): the high end of each statistic on days left out, NaN if unknown."""
    return np.asarray(upper_quantile(left_out, OWN_QUANTILE).T, np.float32)


def growth(left_out: Floats32, folds: Longs) -> Floats32:
    """Return (series x block, statistic): high end of an unseen block over that of the others.

    Args:
        left_out: (statistic, series, step).
        folds: (series, step) block of each step, -1 = none.
    """
    out = []
    for fold in range(FOLDS):
        in_fold = folds == fold
        unseen = upper_quantile(np.where(in_fold, left_out, np.nan), OWN_QUANTILE)
        known = upper_quantile(np.where(in_fold | (folds < 0), np.nan, left_out), OWN_QUANTILE)
        out.append(unseen / np.fmax(known, KNOWN_SHARE_OF_FLOOR * FLOORS[:, None]))
    return np.asarray(np.concatenate(out, axis=1).T, np.float32)


def shared_growth(ratios: Floats32) -> Floats32:
    """Return (statistic,): the growth that all but a few unseen blocks stay within.

    The fewer blocks are known, the more the growth of recorded fleets counts.

    Args:
        ratios: (block, statistic) of this fleet, NaN = unknown.
    """
    n = np.isfinite(ratios).sum(axis=0)
    own = np.where(n > 0, upper_quantile(ratios.T, SHARED_QUANTILE), _PRIOR)
    share = n / (n + PRIOR_WEIGHT)
    return np.asarray(np.clip(share * own + (1 - share) * _PRIOR, 1, GROWTH_CAP), np.float32)


def series_limits(own: Floats32, shared: Floats32, n_days: Longs) -> Floats32:
    """Return (series, statistic) limits; NaN where a statistic is unknown.

    Args:
        n_days: (series,) days behind each series.
    """
    young = youth(n_days)
    widened = own * shared * _MARGINS * np.where(_STANDS_ALONE, young[:, None], 1)
    few = np.maximum(SURE_DAYS / np.maximum(n_days, 1), 1)[:, None]
    return np.asarray(np.minimum(np.maximum(widened, FLOORS), CAPS) * few, np.float32)


def return_level(daily_maxima: Floats32, days: float) -> float:
    """Return the level that daily maxima pass once in `days`: Gumbel, by moments.

    >>> round(return_level(np.array([0.2, 0.3, 0.25, 0.2, 0.35], np.float32), 30.0), 3)
    0.403
    """
    known = daily_maxima[np.isfinite(daily_maxima)].astype(np.float64)
    if len(known) < 2:
        return float(known.max()) if len(known) else 0.0
    scale = float(known.std(ddof=1)) * math.sqrt(6) / math.pi
    place = float(known.mean()) - EULER * scale
    return place - scale * math.log(-math.log(1 - 1 / max(days, 1.0001)))


@dataclass(frozen=True)
class FleetCalibration:
    """How rare the fleet's verdict is on data that did not change."""

    false_alarms_per_month: float  # the target it was calibrated to
    factor: float  # >= 1: what fleet ratios are divided by
    days: float  # days left out that were judged
    alarms: int  # verdicts on them, with the factor
    series_alarm_share: float  # mean share of series in alarm on them

    @property
    def shown_per_month(self) -> float:
        """Return the rate of verdicts on days left out."""
        return self.alarms / self.days * MONTH_DAYS if self.days else 0.0


def calibrate(
    series: NDArray[np.int64],
    left_out: Floats32,
    limits: Floats32,
    n_metrics: int,
    rule: QuorumRule,
    false_alarms_per_month: float,
    n_days: Longs,
) -> FleetCalibration:
    """Judge the fleet on days left out and set the factor.

    Args:
        series: rows of `limits` that `left_out`, (statistic, series, step), is about: whole servers.
        false_alarms_per_month: how often an unchanged fleet may call for a training, > 0.
        n_days: days behind each row of `limits`.
    """
    per_day = min(STEPS_PER_DAY, left_out.shape[2])
    ratios, hold = limit_ratios(left_out, limits[series]), rule.hold_bins(per_day)
    held = running_minimum(by_family(ratios), hold)
    alarms = held.max(axis=0) > 1
    is_compared = np.asarray(np.isfinite(limits[series]).any(axis=1))
    common = by_family(
        running_minimum(common_ratios(ratios, n_days[series], is_compared, n_metrics, rule), hold)
    )
    sustained = running_share(alarms, rule.sustained_bins(per_day))
    fleet = fleet_ratios(held, common, sustained, int(is_compared.sum()), n_metrics, rule)
    worst = worst_ratio(held_fleet(fleet, rule.fleet_hold_bins(per_day)))
    n_left_out = worst.size // per_day if per_day else 0
    if not n_left_out or not is_compared.any():
        return FleetCalibration(false_alarms_per_month, 1.0, 0.0, 0, 0.0)
    maxima = worst[: n_left_out * per_day].reshape(n_left_out, per_day).max(axis=1)
    factor = max(1.0, return_level(maxima, MONTH_DAYS / false_alarms_per_month))
    starts = np.flatnonzero(worst / factor > 1)
    n_alarms = int((np.diff(starts, prepend=-per_day * 10) > EPISODE_DAYS * per_day).sum())
    share = float(alarms[is_compared].mean())
    return FleetCalibration(false_alarms_per_month, factor, float(n_left_out), n_alarms, share)
