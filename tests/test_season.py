"""The rhythm of a day: local time, medians and spreads per slot, whatever is missing."""

import numpy as np
import pytest

from fleetcast.clock import DAY_MS
from fleetcast.drift.seasonal.season import (
    DayClock,
    day_grid,
    medians,
    slot_medians,
    slot_spreads,
    upper_quantile,
    weekday_medians,
)
from fleetcast.errors import BadData

CLOCK = DayClock(300_000)
HOUR_MS = 3_600_000


def test_utc_bins_start_at_midnight_and_slots_are_quarters() -> None:
    bins = CLOCK.local_bins(DAY_MS, 288)

    assert bins[0] == 288
    assert CLOCK.slots(bins)[[0, 2, 3, 287]].tolist() == [0, 0, 1, 95]
    assert set(CLOCK.weekdays(bins)) == {1}


def test_local_time_follows_the_summer_time_of_its_zone() -> None:
    berlin = DayClock(300_000, "Europe/Berlin")
    before, after = 1_774_738_800_000, 1_774_746_000_000  # 2026-03-28 23:00 and 2026-03-29 01:00 UTC

    assert berlin.local_bins(before, 1)[0] % 288 == 0
    assert berlin.local_bins(after, 1)[0] % 288 == 3 * 12


@pytest.mark.parametrize("bin_ms", [0, -300_000, 7_000, 3 * HOUR_MS])
def test_a_bin_that_does_not_divide_a_day_well_is_refused(bin_ms: int) -> None:
    with pytest.raises(BadData, match="must divide a day"):
        DayClock(bin_ms)


@pytest.mark.parametrize("zone", ["Mars/Olympus", "", "../../etc/passwd"])
def test_an_unknown_zone_is_refused_with_an_example(zone: str) -> None:
    with pytest.raises(BadData, match="Europe/Berlin"):
        DayClock(300_000, zone)


def test_medians_leave_out_what_is_missing_and_equal_numpys() -> None:
    values = np.random.default_rng(1).normal(size=(6, 9)).astype(np.float32)
    values[0, :4] = np.nan
    values[1, 0] = np.nan
    values[2] = np.nan

    found = medians(values)

    assert np.isnan(found[2])
    rest = [0, 1, 3, 4, 5]
    assert np.allclose(found[rest], np.nanmedian(values[rest], axis=1))


def test_high_quantiles_are_values_that_occur() -> None:
    values = np.array([[3, 1, np.nan, 2], [np.nan] * 4], np.float32)

    assert upper_quantile(values, 1.0)[0] == 3
    assert upper_quantile(values, 0.5)[0] == 2
    assert np.isnan(upper_quantile(values, 0.5)[1])


def test_days_are_laid_out_locally_with_gaps_where_nothing_is() -> None:
    grid = day_grid(np.array([[1, 2, 3]], np.float32), np.array([287, 288, 290]), 288)

    assert grid.shape == (1, 2, 288)
    assert grid[0, 0, 287] == 1 and grid[0, 1, 0] == 2 and grid[0, 1, 2] == 3
    assert np.isnan(grid).sum() == 2 * 288 - 3


def test_a_profile_is_the_median_of_its_time_of_day_and_shrugs_off_one_wild_day() -> None:
    rhythm = np.sin(2 * np.pi * np.arange(288) / 288).astype(np.float32)
    days = np.repeat(rhythm[None, None], 7, axis=1)
    days[0, 3] = 1e6

    profile = slot_medians(days, CLOCK)[0]

    assert np.abs(profile - rhythm[1::3]).max() < 0.08


def test_weekdays_get_their_own_profile_and_absent_ones_the_general_one() -> None:
    days = np.zeros((1, 14, 288), np.float32)
    weekdays = np.arange(14) % 7
    days[0, weekdays == 5] = 9
    kept = weekdays != 6

    profiles = weekday_medians(days[:, kept], weekdays[kept], CLOCK)

    assert (profiles[0, 5] == 9).all() and (profiles[0, :5] == 0).all()
    assert (profiles[0, 6] == 0).all()


def test_a_quiet_hour_keeps_a_part_of_the_days_spread() -> None:
    residuals = np.random.default_rng(2).normal(0, 1, (1, 10, 288)).astype(np.float32)
    residuals[0, :, 100:180] = 0

    spreads = slot_spreads(residuals, CLOCK)[0]

    assert spreads.min() > 0.15
    assert 0.7 < np.median(spreads) < 0.95
