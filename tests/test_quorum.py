"""From series to a fleet's verdict: support, quorum, and the specification's scale."""

import numpy as np
import pytest

from fleetcast.drift.seasonal.quorum import (
    COMBINED_THRESHOLD,
    THRESHOLDS,
    WEIGHTS,
    QuorumRule,
    by_family,
    combined_ratio,
    common_ratios,
    fleet_ratios,
    held_fleet,
    limit_ratios,
    running_minimum,
    running_share,
    scale_scores,
    worst_ratio,
)
from fleetcast.drift.seasonal.statistics import FAMILIES, INDEX, N_STATISTICS
from fleetcast.errors import BadData

RULE = QuorumRule()
NONE = np.zeros(4, np.float32)  # no statistic is common to several servers


def ratios_of(series: list[float], n_families: int = 4) -> np.ndarray:
    return np.tile(np.array(series, np.float32), (n_families, 1))


def test_a_long_window_counts_only_while_the_newest_hours_are_unusual_too() -> None:
    found = np.zeros((N_STATISTICS, 3), np.float32)
    found[INDEX["higher_24h"]] = 2.0
    found[INDEX["shape_3h"]] = [0.0, 0.3, 0.9]

    ratios = by_family(limit_ratios(found, np.ones((3, N_STATISTICS), np.float32)))

    assert ratios[FAMILIES.index("fds")] == pytest.approx([0, 0.5, 1.5])


def test_new_dynamics_need_less_of_the_newest_hours_and_some_windows_nothing() -> None:
    found = np.zeros((N_STATISTICS, 2), np.float32)
    found[INDEX["rougher_24h"], 0] = found[INDEX["smoother_24h"], 1] = 2.0
    found[INDEX["shape_24h"]] = 2.0
    found[INDEX["shape_3h"], 0] = 0.3

    ratios = limit_ratios(found, np.ones((2, N_STATISTICS), np.float32))

    assert ratios[INDEX["rougher_24h"], 0] == pytest.approx(0.3 / 0.25)
    assert ratios[INDEX["shape_24h"]] == pytest.approx([0.3 / 0.6, 0])
    assert ratios[INDEX["smoother_24h"], 1] == 2.0


def test_what_was_not_judged_counts_as_nothing() -> None:
    found = np.full((N_STATISTICS, 1), np.nan, np.float32)

    assert (by_family(limit_ratios(found, np.full((1, N_STATISTICS), np.nan, np.float32))) == 0).all()


def test_at_the_quorum_the_fleet_is_at_its_limit() -> None:
    # Given 12 servers of one metric; more than a quarter is four of them
    three = ratios_of([2.0] * 3 + [0.1] * 9)
    four = ratios_of([2.0] * 4 + [0.1] * 8)
    no = np.zeros(12, np.float32)

    assert fleet_ratios(three, NONE, no, 12, 1, RULE) == pytest.approx(0.1)
    assert fleet_ratios(four, NONE, no, 12, 1, RULE) == pytest.approx(2.0)


def test_fewer_are_enough_when_they_stay() -> None:
    series = ratios_of([2.0, 1.5] + [0.1] * 10)
    sustained = np.array([0.8, 0.75] + [0.0] * 10, np.float32)

    assert fleet_ratios(series, NONE, sustained, 12, 1, RULE) == pytest.approx(1.5)
    assert fleet_ratios(series, NONE, sustained / 3, 12, 1, RULE).max() < 0.7


def test_one_server_never_moves_a_fleet_of_several() -> None:
    # Given three servers with four metrics each, all metrics of one far off
    alone = ratios_of([9.0] * 4 + [0.2] * 8)
    both = ratios_of([9.0] * 4 + [1.2] + [0.2] * 7)
    sustained = np.ones(12, np.float32)

    assert fleet_ratios(alone, NONE, sustained, 12, 4, RULE).max() < 1
    assert fleet_ratios(both, NONE, sustained, 12, 4, RULE).min() > 1


def alike(n_servers: int, carried: dict[str, int], n_metrics: int = 1) -> np.ndarray:
    """(statistic, series) ratios in which each statistic carries some servers, others than the one before."""
    found = np.full((N_STATISTICS, n_servers * n_metrics), 0.2, np.float32)
    first = 0
    for name, count in carried.items():
        found[INDEX[name], first * n_metrics : (first + count) * n_metrics : n_metrics] = 1.5
        first += count
    return found


@pytest.mark.parametrize(
    ("n_servers", "carried", "is_common"),
    [
        (40, {"higher_24h": 4}, True),
        (40, {"higher_24h": 3}, False),
        (40, {"higher_24h": 3, "lower_24h": 3}, False),
        (10, {"higher_24h": 3}, True),
        (10, {"higher_24h": 2}, False),
        (2, {"higher_24h": 2}, False),
    ],
)
def test_servers_that_change_alike_are_enough_where_as_many_others_are_not(
    n_servers: int, carried: dict[str, int], is_common: bool
) -> None:
    all_compared, days = np.ones(n_servers, np.bool_), np.full(n_servers, 21)

    common = common_ratios(alike(n_servers, carried), days, all_compared, 1, RULE)

    assert bool(common.max() > 1) is is_common
    held, no = ratios_of([1.5] * 6 + [0.2] * 34), np.zeros(40, np.float32)
    whole = fleet_ratios(held, np.full(4, common.max(), np.float32), no, 40, 1, RULE)
    assert bool(whole.max() > 1) is is_common, "six of forty are no quorum by themselves"


def test_metrics_of_one_server_count_once_and_only_compared_servers_make_the_share() -> None:
    one_server = np.full((N_STATISTICS, 5 * 4), 0.2, np.float32)
    one_server[INDEX["higher_24h"], :4] = 3.0
    assert common_ratios(one_server, np.full(20, 21), np.ones(20, np.bool_), 4, RULE).max() < 1

    few, days = alike(100, {"higher_24h": 3}), np.full(100, 21)
    few_compared = np.arange(100) < 30
    assert common_ratios(few, days, few_compared, 1, RULE).max() > 1
    assert common_ratios(few, days, np.ones(100, np.bool_), 1, RULE).max() < 1
    assert common_ratios(few, days, few_compared, 1, QuorumRule(common_quorum=1.0)).max() == 0


def test_a_young_series_has_to_be_further_off_to_be_a_witness() -> None:
    three, all_compared = alike(10, {"higher_24h": 3}), np.ones(10, np.bool_)

    by_days = [common_ratios(three, np.full(10, days), all_compared, 1, RULE).max() for days in (5, 14, 21)]

    assert by_days == pytest.approx([1.5 / np.sqrt(21 / 5), 1.5 / np.sqrt(1.5), 1.5])


def test_a_single_server_is_its_own_fleet() -> None:
    assert fleet_ratios(ratios_of([3.0]), NONE, np.zeros(1, np.float32), 1, 1, RULE) == pytest.approx(3.0)


def test_a_fleet_of_which_nothing_is_compared_is_silent() -> None:
    assert (fleet_ratios(ratios_of([5.0, 5.0]), NONE, np.zeros(2, np.float32), 0, 1, RULE) == 0).all()


def test_the_thresholds_mean_at_the_limit() -> None:
    scores = scale_scores(np.ones(4, np.float32), THRESHOLDS)

    assert scores == pytest.approx(dict(THRESHOLDS))
    assert scale_scores(np.full(4, 0.5, np.float32), THRESHOLDS)["dss"] == pytest.approx(0.10)


def test_the_combined_score_can_ask_before_any_metric_does() -> None:
    almost = np.full(4, 0.95, np.float32)

    assert combined_ratio(almost, THRESHOLDS, WEIGHTS, COMBINED_THRESHOLD) > 1
    assert worst_ratio(almost) > 1
    assert worst_ratio(np.array([0.9, 0.1, 0.1, 0.1], np.float32)) < 1


def test_a_series_is_held_until_it_was_over_for_long_enough() -> None:
    assert running_minimum(np.array([2.0, 0.5, 3.0, 4.0], np.float32), 2).tolist() == [0, 0.5, 0.5, 3]
    assert running_minimum(np.array([2.0], np.float32), 1).tolist() == [2]


def test_a_fleet_drifts_when_it_lasts_or_is_far_over_its_limit() -> None:
    lasts = np.array([[0.5, 1.2, 1.2, 1.2, 1.4, 0.9]], np.float32)
    at_once = np.array([[0.5, 2.4, 0.5, 0.5, 0.5, 0.5]], np.float32)

    assert (held_fleet(lasts, 3) > 1).ravel().tolist() == [False, False, False, True, True, False]
    assert (held_fleet(at_once, 3) > 1).ravel().tolist() == [False, True, False, False, False, False]
    assert RULE.fleet_hold_bins(288) == 24 and RULE.fleet_hold_bins(96) == 8


def test_the_share_in_alarm_counts_the_last_steps() -> None:
    alarms = np.array([True, True, False, True])

    assert running_share(alarms, 2).tolist() == [0.5, 1.0, 0.5, 0.5]
    assert running_share(alarms, 8)[-1] == 3 / 8


@pytest.mark.parametrize(
    "wrong",
    [
        {"quorum": 1.5},
        {"sustained_quorum": -0.1},
        {"sustained_h": 0.0},
        {"hold_h": -1.0},
        {"fleet_hold_h": -1.0},
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BadData, match=next(iter(wrong))):
        QuorumRule(**wrong)
