"""Why a series is in alarm: which statistic, since about when, from what to what."""

import numpy as np
import pytest
from rhythm_fleet import BIN_MS, DAY, START_MS, usual_reference

from fleetcast.drift.seasonal.detector import change_bin, newest_levels, worst_statistic
from fleetcast.drift.seasonal.season import LAGS_H, N_CODES, Traits
from fleetcast.drift.seasonal.statistics import FAMILIES, INDEX, N_STATISTICS, BinCodes, RunningSums


def sums_of(codes: np.ndarray) -> RunningSums:
    """Running sums of one series that saw these codes."""
    sums = RunningSums(np.zeros((1, 288), np.int16), 4, 48)
    rest = np.zeros((1, 1), np.int16)
    no = np.zeros((1, 1), np.bool_)
    for_lags = np.zeros((len(LAGS_H), 1, 1), np.int16)
    traits = Traits(np.zeros((1, 1), np.float32), rest, rest, rest, no, rest, for_lags)
    moved = np.zeros((2, 1, 1), np.int16)
    for code in codes:
        own = np.array([[code]], np.uint8)
        sums.add(BinCodes(own, own, own, traits, moved, np.zeros(1, np.int64)))
    return sums


@pytest.mark.parametrize("changed", [3, 12, 30])
def test_the_change_is_where_the_day_splits_best(changed: int) -> None:
    generator = np.random.default_rng(changed)
    codes = np.concatenate([generator.integers(0, 30, 48 - changed), generator.integers(28, 49, changed)])

    assert abs(change_bin(sums_of(codes), 0, INDEX["shape_3h"]) - changed) <= 2


def test_an_absent_past_leaves_the_newest_bin() -> None:
    assert change_bin(sums_of(np.array([5])), 0, INDEX["shape_3h"]) == 1


def test_the_worst_statistic_is_of_the_family_that_is_held() -> None:
    found = np.zeros(N_STATISTICS, np.float32)
    found[INDEX["shape_3h"]], found[INDEX["outside_3h"]] = 3.0, 2.0
    held = np.zeros(len(FAMILIES), np.float32)
    held[FAMILIES.index("anomaly_rate")] = 1.5

    assert worst_statistic(found, np.ones(N_STATISTICS, np.float32), held) == INDEX["outside_3h"]


def test_usual_and_actual_are_means_of_the_newest_hours_in_native_units() -> None:
    reference = usual_reference()
    end_ms = START_MS + 20 * DAY * BIN_MS
    newest = np.full((DAY // 8, reference.n_series), np.nan, np.float32)
    newest[-3:, 2] = [70, 72, 74]

    usual, actual = newest_levels(reference, newest, end_ms, np.array([2, 3]))

    assert actual[0] == 72 and np.isnan(actual[1])
    profile = reference.shape.profiles[2]
    assert usual[0] == pytest.approx(float(profile[-12:].mean()), abs=0.01)
    assert N_CODES > 2
