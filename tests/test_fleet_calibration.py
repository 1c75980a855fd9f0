"""The fleet's calibration: a factor that makes verdicts as rare as asked."""

import numpy as np

from fleetcast.drift.seasonal.limits import calibrate
from fleetcast.drift.seasonal.quorum import QuorumRule
from fleetcast.drift.seasonal.statistics import INDEX, N_STATISTICS

LIMITS = np.ones((8, N_STATISTICS), np.float32)
SERIES = np.arange(8)
DAYS = np.full(8, 21)


def left_out(days: int = 20) -> np.ndarray:
    return np.full((N_STATISTICS, 8, days * 48), 0.1, np.float32)


def test_a_calm_fleet_needs_no_factor() -> None:
    found = calibrate(SERIES, left_out(), LIMITS, 1, QuorumRule(), 1.0, DAYS)

    assert (found.factor, found.alarms, found.days) == (1.0, 0, 20.0)
    assert found.shown_per_month == 0


def test_days_on_which_the_fleet_moved_together_raise_the_factor_until_they_are_rare() -> None:
    restless = left_out()
    for day in (3, 8, 15):
        restless[INDEX["shape_3h"], :, day * 48 : day * 48 + 6] = 3.0

    strict = calibrate(SERIES, restless, LIMITS, 1, QuorumRule(), 1.0, DAYS)
    lax = calibrate(SERIES, restless, LIMITS, 1, QuorumRule(), 8.0, DAYS)

    assert strict.factor > lax.factor >= 1
    assert strict.shown_per_month <= lax.shown_per_month


def test_days_on_which_three_servers_changed_alike_raise_the_factor_too() -> None:
    alike, each_its_own = left_out(), left_out()
    for day in (3, 8, 15):
        hours = slice(day * 48, day * 48 + 6)
        alike[INDEX["shape_3h"], :3, hours] = 3.0
        for series, name in enumerate(("shape_3h", "outside_3h", "innovation_3h")):
            each_its_own[INDEX[name], series, hours] = 3.0
    rule = QuorumRule(quorum=0.5, sustained_quorum=0.5)

    assert calibrate(SERIES, alike, LIMITS, 1, rule, 1.0, DAYS).factor > 1
    assert calibrate(SERIES, each_its_own, LIMITS, 1, rule, 1.0, DAYS).factor == 1


def test_episodes_within_a_day_count_once() -> None:
    restless = left_out()
    for hour in (0, 6, 12):
        restless[INDEX["shape_3h"], :, 480 + 2 * hour : 480 + 2 * hour + 4] = 3.0

    found = calibrate(SERIES, restless, LIMITS, 1, QuorumRule(), 1000.0, DAYS)

    assert found.alarms == 1 and found.shown_per_month == 1.5


def test_a_fleet_that_is_not_compared_is_calibrated_to_nothing() -> None:
    unknown = np.full((8, N_STATISTICS), np.nan, np.float32)

    found = calibrate(SERIES, left_out(), unknown, 1, QuorumRule(), 1.0, DAYS)

    assert (found.factor, found.days) == (1.0, 0.0)
    assert found.shown_per_month == 0.0
