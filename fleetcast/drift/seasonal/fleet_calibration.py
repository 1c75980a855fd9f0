"""What an unchanged fleet does as a whole, learned from the days left out of its reference.

Owns: the factor that makes the fleet's verdict as rare as asked, and the rate it showed. Pure
maths. Does not know: single series' limits (`limits`), the newest values.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetcast.drift.seasonal.learning import STEPS_PER_DAY
from fleetcast.drift.seasonal.limits import return_level
from fleetcast.drift.seasonal.quorum import (
    QuorumRule,
    family_ratios,
    fleet_ratios,
    held_over,
    share_of,
    worst_ratio,
)
from fleetcast.schema import Floats32

MONTH_DAYS = 30.0
EPISODE_DAYS = 1.0  # alarms closer than this are one


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
) -> FleetCalibration:
    """Judge the fleet on days left out and set the factor.

    Args:
        series: rows of `limits` that `left_out`, (statistic, series, step), is about: whole servers.
        false_alarms_per_month: how often an unchanged fleet may call for a training, > 0.
    """
    per_day = min(STEPS_PER_DAY, left_out.shape[2])
    ratios = family_ratios(left_out, limits[series])
    held = held_over(ratios, rule.hold_bins(per_day))
    alarms = held.max(axis=0) > 1
    is_compared = np.isfinite(limits[series]).any(axis=1)
    sustained = share_of(alarms, rule.sustained_bins(per_day))
    worst = worst_ratio(fleet_ratios(held, sustained, int(is_compared.sum()), n_metrics, rule))
    n_days = worst.size // per_day if per_day else 0
    if not n_days or not is_compared.any():
        return FleetCalibration(false_alarms_per_month, 1.0, 0.0, 0, 0.0)
    maxima = worst[: n_days * per_day].reshape(n_days, per_day).max(axis=1)
    factor = max(1.0, return_level(maxima, MONTH_DAYS / false_alarms_per_month))
    starts = np.flatnonzero(worst / factor > 1)
    n_alarms = int((np.diff(starts, prepend=-per_day * 10) > EPISODE_DAYS * per_day).sum())
    share = float(alarms[is_compared].mean())
    return FleetCalibration(false_alarms_per_month, factor, float(n_days), n_alarms, share)
