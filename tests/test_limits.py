"""Limits: own quantiles, growth shared between series, return levels."""

import math

import numpy as np
import pytest

from fleetcast.drift.seasonal.limits import (
    GROWTH_CAP,
    MARGINS,
    PRIOR_GROWTH,
    growth,
    own_quantiles,
    return_level,
    series_limits,
    shared_growth,
)
from fleetcast.drift.seasonal.statistics import CAPS, FLOORS, N_STATISTICS, STATISTICS

PRIOR = np.array([PRIOR_GROWTH[item.name] for item in STATISTICS], np.float32)


def test_every_statistic_has_a_prior() -> None:
    assert set(PRIOR_GROWTH) == {item.name for item in STATISTICS}
    assert all(1 <= value < GROWTH_CAP for value in PRIOR_GROWTH.values())


def test_limits_lie_between_floor_and_cap_and_stay_unknown_where_nothing_is_known() -> None:
    own = np.stack([np.zeros(N_STATISTICS), np.full(N_STATISTICS, 1e6), np.full(N_STATISTICS, np.nan)])

    found = series_limits(own.astype(np.float32), np.ones(N_STATISTICS, np.float32), np.full(3, 21))

    assert (found[0] == FLOORS).all()
    margins = np.array([MARGINS.get(item.name, 1) for item in STATISTICS], np.float32)
    assert (found[1] == np.minimum(CAPS, np.float32(1e6) * margins)).all()
    assert np.isnan(found[2]).all()


def test_below_five_days_limits_are_as_much_wider_as_days_are_missing() -> None:
    own, shared = np.full((5, N_STATISTICS), 0.5, np.float32), np.ones(N_STATISTICS, np.float32)
    needs_support = np.array([not item.stands_alone for item in STATISTICS])

    found = series_limits(own, shared, np.array([3, 4, 5, 21, 30]))[:, needs_support]

    assert found[0] == pytest.approx(found[2] * 5 / 3)
    assert found[1] == pytest.approx(found[2] * 5 / 4)
    assert (found[2] == found[3]).all() and (found[3] == found[4]).all()


def test_growth_compares_each_block_with_the_others() -> None:
    left_out = np.tile(np.repeat([4.0, 4.0, 8.0], 300), (N_STATISTICS, 1, 1)).astype(np.float32)
    folds = np.repeat([0, 1, 2], 300)[None]

    ratios = growth(left_out, folds)

    assert ratios.shape == (3, N_STATISTICS)
    assert ratios[2] == pytest.approx(2.0) and ratios[0] == pytest.approx(0.5)


def test_a_small_fleet_leans_on_the_prior_and_a_large_one_on_itself() -> None:
    few = np.full((3, N_STATISTICS), 4.0, np.float32)
    many = np.full((3000, N_STATISTICS), 4.0, np.float32)

    assert shared_growth(np.full((3, N_STATISTICS), np.nan, np.float32)) == pytest.approx(PRIOR)
    assert (np.abs(shared_growth(few) - PRIOR) < np.abs(shared_growth(few) - 4)).all()
    assert shared_growth(many) == pytest.approx(4.0, abs=0.04)
    assert (shared_growth(np.full((3000, N_STATISTICS), 1e9, np.float32)) == GROWTH_CAP).all()


def test_own_quantiles_leave_out_half_hours_that_were_not_judged() -> None:
    left_out = np.full((N_STATISTICS, 1, 400), np.nan, np.float32)
    left_out[0, 0, :200] = np.arange(200)

    found = own_quantiles(left_out)

    assert found[0, 0] == 198 and np.isnan(found[0, 1:]).all()


def test_a_return_level_is_passed_once_in_its_time() -> None:
    # Given maxima of a known Gumbel law
    generator = np.random.default_rng(9)
    maxima = generator.gumbel(2.0, 0.5, 200_000).astype(np.float32)

    level = return_level(maxima, 30.0)

    assert level == pytest.approx(2.0 - 0.5 * math.log(-math.log(1 - 1 / 30)), abs=0.01)
    assert (maxima > level).mean() == pytest.approx(1 / 30, rel=0.05)


@pytest.mark.parametrize(
    ("maxima", "level"), [([], 0.0), ([3.0], 3.0), ([math.nan, 2.0], 2.0), ([2.0, 2.0], 2.0)]
)
def test_too_few_maxima_give_what_they_give(maxima: list[float], level: float) -> None:
    assert return_level(np.array(maxima, np.float32), 30.0) == pytest.approx(level)
