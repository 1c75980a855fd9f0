"""The detector as a whole: what it must find, what it must let pass, and what must not matter."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rhythm_fleet import (
    BIN_MS,
    DAY,
    METRICS,
    REFERENCE_DAYS,
    SERVERS,
    START_MS,
    Grid,
    fitted,
    fleet_grid,
    following,
    made_grid,
    replay,
    usual_reference,
)

from fleetcast.drift.seasonal.detector import NEAR, DriftVerdict, SeasonalDetector
from fleetcast.drift.seasonal.quorum import QuorumRule, by_family, limit_ratios
from fleetcast.drift.seasonal.reference import Reference, ReferenceOptions
from fleetcast.drift.seasonal.season import ABSENT, innovations, moves, traits
from fleetcast.drift.seasonal.statistics import BinCodes, statistics, sums_over
from fleetcast.errors import BadData

CHANGE = (REFERENCE_DAYS + 1) * DAY  # bin of the change in tests that make one
FEW_RUNS = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def changed_grid(servers: slice = slice(None), by: float = 12.0) -> Grid:
    grid = made_grid()[:, :, : CHANGE + 8 * 12]
    grid[servers, :, CHANGE:] += by
    return grid


def essence(verdict: DriftVerdict) -> tuple[object, ...]:
    """What a verdict says, without the order of servers and metrics."""
    carriers = frozenset((item.server_name, item.metric, item.statistic) for item in verdict.drifting)
    return verdict.needs_retraining, verdict.status, carriers, verdict.n_compared


def test_an_unchanged_fleet_is_ready_and_asks_for_nothing() -> None:
    verdict = following(made_grid()).check()

    assert verdict.status == "ready"
    assert not verdict.needs_retraining
    assert verdict.n_compared == len(SERVERS) * len(METRICS)
    assert verdict.not_compared == {} and verdict.events == ()


def test_identical_data_never_alarm() -> None:
    # Given very days the reference was made from, every hour of them
    grid, reference = made_grid(), usual_reference()
    drift = SeasonalDetector(reference)

    for place in range(8 * DAY, REFERENCE_DAYS * DAY):
        drift.update(grid[:, :, place], START_MS + place * BIN_MS)
        if place % 12 == 0:
            assert not drift.check().needs_retraining, place


def test_a_level_change_of_the_fleet_is_drift_and_says_who_since_when_from_what_to_what() -> None:
    verdict = following(changed_grid()).check()

    assert verdict.needs_retraining
    assert set(verdict.drifting_servers()) == set(SERVERS)
    for item in verdict.drifting:
        change_ms = START_MS + CHANGE * BIN_MS
        assert abs(item.changed_ms - change_ms) <= 2 * 3_600_000
        assert change_ms <= item.since_ms < change_ms + 6 * 3_600_000
        assert 10 < item.actual - item.usual < 14


def test_one_changed_server_is_named_but_moves_no_fleet() -> None:
    verdict = following(changed_grid(slice(0, 1))).check()

    assert verdict.drifting_servers() == ("app-1",)
    assert not verdict.needs_retraining
    assert max(verdict.scores["dss"] / 0.20, verdict.scores["fds"] / 0.15) < 1


def test_a_change_of_two_servers_that_lasts_is_drift() -> None:
    # Given two of five servers changed for a day: under the instant quorum, over the sustained one
    grid = made_grid()
    grid[:2, 0, CHANGE:] += 12

    assert following(grid).check(combined_threshold=9.0).needs_retraining


@pytest.mark.parametrize(
    ("kind", "families"),
    [
        ("wider", {"anomaly_rate", "dss", "per"}),
        ("turned", {"fds", "dss", "anomaly_rate"}),
        ("order", {"per"}),
    ],
)
def test_what_means_hide_is_found(kind: str, families: set[str]) -> None:
    # Given the same mean: twice the noise, the rhythm six hours late, or the values in another order
    grid = made_grid()
    usual = usual_reference()
    part = grid[:, :, CHANGE : CHANGE + DAY]
    if kind == "wider":
        bins = usual.clock.local_bins(START_MS + CHANGE * BIN_MS, DAY)
        profile = usual.shape.usual_values(usual.clock, bins).reshape(part.shape)
        part[:] = profile + 3 * (part - profile)
    elif kind == "turned":
        part[:] = grid[:, :, CHANGE - DAY // 4 : CHANGE + DAY - DAY // 4].copy()
    else:
        part[:] = np.sort(part.reshape(*part.shape[:2], -1, 72), axis=-1).reshape(part.shape)

    drift = following(grid[:, :, : CHANGE + DAY])
    found = {item.family for item in drift.check().drifting}

    assert found & families
    assert drift.check().needs_retraining


def test_a_job_of_five_minutes_that_moves_is_found_and_one_that_is_left_out_is_not() -> None:
    # Given a quiet disk but for one job a day, at 02:30; from the change on at 08:30, or never
    grid = np.abs(np.random.default_rng(5).normal(0, 0.05, made_grid().shape)).astype(np.float32)
    grid[:, :, 30::DAY] = 20
    moved, missing = grid.copy(), grid.copy()
    for other in (moved, missing):
        other[:, :, CHANGE + 30 :: DAY] = 0.05
    moved[:, :, CHANGE + 30 + DAY // 4 :: DAY] = 20
    reference = fitted(grid[:, :, : REFERENCE_DAYS * DAY])

    def in_alarm(other: np.ndarray) -> set[str]:
        seen = following(other[:, :, : CHANGE + DAY], reference=reference).check().drifting
        return {item.statistic for item in seen}

    assert in_alarm(moved) == {"shifted_24h"}
    assert in_alarm(grid) == in_alarm(missing) == set()


def test_a_server_that_goes_silent_is_an_event_and_no_drift() -> None:
    grid = made_grid()[:, :, : CHANGE + DAY]
    grid[1, :, CHANGE:] = np.nan

    verdict = following(grid).check()

    assert [(event.kind, event.server_name, event.since_ms) for event in verdict.events] == [
        ("outage", "app-2", START_MS + CHANGE * BIN_MS)
    ]
    assert not verdict.drifting and not verdict.needs_retraining
    assert verdict.not_compared == {"server is silent": len(METRICS)}


def test_sensors_that_stop_moving_are_events_and_no_drift() -> None:
    grid = made_grid()[:, :, : CHANGE + DAY]
    grid[:, 0, CHANGE:] = 99.0

    drift = following(grid)
    verdict = drift.check()

    assert {(event.kind, event.metric) for event in verdict.events} == {("frozen", "cpu_pct")}
    assert not verdict.drifting and not verdict.needs_retraining
    assert verdict.not_compared == {"sensor stands still": len(SERVERS)}


def test_a_setting_of_more_days_is_why_a_younger_reference_does_not_judge() -> None:
    young = fitted(made_grid()[:, :, : 7 * DAY], ReferenceOptions(min_days=10))

    verdict = SeasonalDetector(young, min_days=10).check()

    assert verdict.not_compared == {"too few days in the reference": len(SERVERS) * len(METRICS)}
    assert verdict.enough_days is not None
    assert verdict.enough_days.last_ms == START_MS + 10 * DAY * BIN_MS


def test_a_series_near_its_limit_is_found_with_its_change_and_changes_nothing() -> None:
    # Given three servers far off, and one series that moved half as far at the same time
    grid = changed_grid(slice(0, 3))
    grid[3, 0, CHANGE:] += 6
    drift = following(grid)
    before = essence(drift.check())

    (found,) = drift.near(10)

    assert (found.server_name, found.metric) == (SERVERS[3], METRICS[0])
    assert NEAR <= found.ratio <= 1
    assert abs(found.changed_ms - (START_MS + CHANGE * BIN_MS)) <= 3 * BIN_MS
    assert drift.near(0) == ()
    grid[:3] = made_grid()[:3, :, : grid.shape[2]]
    assert following(grid).near(10) == (), "nothing else is off in that way"
    assert essence(drift.check()) == before


def test_nothing_is_judged_before_a_window_is_filled() -> None:
    drift = SeasonalDetector(usual_reference())
    assert drift.check().status == "collecting"

    replay(drift, made_grid()[:, :, :12], START_MS)

    verdict = drift.check()
    assert verdict.status == "collecting" and not verdict.needs_retraining
    assert verdict.not_compared == {"window not full yet": len(SERVERS) * len(METRICS)}


def test_bin_by_bin_equals_a_whole_stretch_at_once() -> None:
    # Given half a week with gaps, followed bin by bin
    reference, grid = usual_reference(), changed_grid()
    grid[2, 1, CHANGE - 400 : CHANGE - 300] = np.nan
    first = (REFERENCE_DAYS - 2) * DAY
    drift = following(grid)

    # When the same bins are summed at once
    clock, books = reference.clock, reference.books
    part = grid[:, :, first:].reshape(-1, grid.shape[2] - first)
    bins = clock.local_bins(START_MS + first * BIN_MS, part.shape[1])
    own = traits(reference.shape, clock, bins, part)
    unknown = np.full((len(part), 2), np.nan, np.float32)
    novel = innovations(own.scores, unknown[:, 0], reference.pull)
    codes = books.values.codes(own.scores)
    coded = (codes, books.innovations.codes(novel), np.full_like(codes, ABSENT))
    kept = BinCodes(*coded, own, moves(own.scores, unknown), bins % DAY)
    at_once = statistics(sums_over(kept, 1, DAY // 8, DAY), books, DAY // 8, DAY)

    # Then the newest statistics are the same numbers
    ratios = by_family(limit_ratios(at_once, reference.limits))[:, :, -drift.rule.hold_bins(DAY) :]
    assert np.array_equal(drift.held_ratios(), ratios.min(axis=2))


def test_a_restart_between_any_two_bins_changes_no_score() -> None:
    grid = changed_grid(slice(0, 3))
    ran_through = following(grid, REFERENCE_DAYS - 4)

    first = grid.shape[2] - ran_through.memory_bins
    restarted = SeasonalDetector(usual_reference())
    replay(restarted, grid[:, :, first:], START_MS + first * BIN_MS)

    before, after = ran_through.check(), restarted.check()
    assert before.scores == after.scores and before.combined == after.combined
    assert before.drifting == after.drifting and before.events == after.events
    assert before.sustained_share == after.sustained_share


@FEW_RUNS
@given(order=st.permutations(range(len(SERVERS))), turn=st.booleans())
def test_the_order_of_servers_and_metrics_does_not_matter(order: list[int], turn: bool) -> None:
    grid = changed_grid(slice(0, 2))
    columns = [1, 0] if turn else [0, 1]
    shuffled = np.ascontiguousarray(grid[order][:, columns])
    names = (tuple(SERVERS[row] for row in order), tuple(METRICS[column] for column in columns))
    reference = Reference.fit(fleet_grid(shuffled[:, :, : REFERENCE_DAYS * DAY], *names))
    straight = fitted(grid[:, :, : REFERENCE_DAYS * DAY])

    one = following(shuffled, reference=reference).check()
    other = following(grid, reference=straight).check()

    assert essence(one) == essence(other)
    assert one.scores == pytest.approx(other.scores)


@FEW_RUNS
@given(factor=st.sampled_from([1e-3, 0.5, 1024.0, 1e6]))
def test_the_unit_does_not_matter(factor: float) -> None:
    grid = changed_grid(slice(0, 2))
    other = (grid * np.float32(factor)).astype(np.float32)

    scaled = following(other, reference=fitted(other[:, :, : REFERENCE_DAYS * DAY])).check()

    plain = following(grid, reference=fitted(grid[:, :, : REFERENCE_DAYS * DAY])).check()
    assert essence(scaled) == essence(plain)
    assert scaled.scores == pytest.approx(plain.scores, rel=0.05)


def test_neither_unit_nor_order_matters_to_a_moved_day() -> None:
    # Given the rhythm of every series six hours late, in two units and two orders
    grid = made_grid()[:, :, : CHANGE + DAY]
    grid[:, :, CHANGE:] = grid[:, :, CHANGE - DAY // 4 : -DAY // 4].copy()
    other = np.ascontiguousarray(grid[::-1]) * np.float32(1024)
    names = (SERVERS[::-1], METRICS)
    reference = Reference.fit(fleet_grid(other[:, :, : REFERENCE_DAYS * DAY], *names))

    one = following(grid, reference=fitted(grid[:, :, : REFERENCE_DAYS * DAY])).check()
    two = following(other, reference=reference).check()

    assert essence(one) == essence(two) and one.needs_retraining
    assert two.scores == pytest.approx(one.scores)


@FEW_RUNS
@given(seed=st.integers(0, 2**16), share=st.sampled_from([0.02, 0.1, 0.2]), changed=st.booleans())
def test_lost_bins_do_not_change_the_verdict(seed: int, share: float, changed: bool) -> None:
    grid = changed_grid() if changed else made_grid()[:, :, : CHANGE + 96]
    lost = np.random.default_rng(seed).random(grid.shape) < share
    thinned = np.where(lost, np.float32(np.nan), grid)

    assert following(thinned).check().needs_retraining is changed


def test_missing_bins_between_updates_count_as_absent() -> None:
    grid = made_grid()
    grid[:, :, CHANGE : CHANGE + 40] = np.nan
    through = following(grid[:, :, : CHANGE + 100])

    jumped = SeasonalDetector(usual_reference())
    first = (REFERENCE_DAYS - 2) * DAY
    for part in (range(first, CHANGE), range(CHANGE + 40, CHANGE + 100)):
        for place in part:
            jumped.update(grid[:, :, place], START_MS + place * BIN_MS)

    assert through.check().scores == jumped.check().scores


def test_forecast_errors_twice_as_large_are_drift_where_errors_are_known() -> None:
    # Given a reference with two weeks of forecast errors, and values that do not change
    grid = made_grid()
    errors = np.abs(np.random.default_rng(5).normal(0, 1, grid.shape)).astype(np.float32)
    reference = fitted(grid[:, :, : REFERENCE_DAYS * DAY], errors=errors[:, :, : REFERENCE_DAYS * DAY])
    first = (REFERENCE_DAYS - 2) * DAY

    def judged(factor: float) -> DriftVerdict:
        drift = SeasonalDetector(reference)
        replay(drift, grid[:, :, first:], START_MS + first * BIN_MS, factor * errors[:, :, first:])
        return drift.check()

    assert not judged(1.0).needs_retraining
    assert judged(4.0).needs_retraining
    assert {item.statistic for item in judged(4.0).drifting} <= {"error_3h", "error_24h"}


def test_hostile_bins_are_refused_and_hostile_values_are_absent() -> None:
    drift = SeasonalDetector(usual_reference())
    values = np.full((len(SERVERS), len(METRICS)), np.inf, np.float32)
    drift.update(values, START_MS)
    assert drift.check().n_compared == 0

    with pytest.raises(BadData, match="time order"):
        drift.update(values, START_MS)
    with pytest.raises(BadData, match="multiple of 300000"):
        drift.update(values, START_MS + BIN_MS + 1)
    with pytest.raises(BadData, match="server, metric"):
        drift.update(values[:, :1], START_MS + BIN_MS)


def test_a_saved_reference_gives_the_same_verdict(tmp_path: Path) -> None:
    usual_reference().save(tmp_path / "reference.npz")
    loaded = Reference.load(tmp_path / "reference.npz")

    one = following(changed_grid(slice(0, 2)), reference=loaded).check()

    other = following(changed_grid(slice(0, 2))).check()
    assert one.scores == other.scores and one.drifting == other.drifting


@pytest.mark.parametrize(("common_quorum", "drifts"), [(0.08, True), (1.0, False)])
def test_a_tenth_of_a_fleet_that_changes_alike_is_drift_within_hours(
    common_quorum: float, drifts: bool
) -> None:
    # Given thirty servers, of which three rise by their daily swing
    names = tuple(f"app-{number}" for number in range(30))
    grid = made_grid(REFERENCE_DAYS + 2, n_servers=30)[:, :, : CHANGE + DAY // 4]
    grid[:3, :, CHANGE:] += 20
    reference = Reference.fit(fleet_grid(grid[:, :, : REFERENCE_DAYS * DAY], names))
    drift = SeasonalDetector(reference, QuorumRule(common_quorum=common_quorum))

    replay(drift, grid[:, :, REFERENCE_DAYS * DAY :], START_MS + REFERENCE_DAYS * DAY * BIN_MS)

    verdict = drift.check()
    assert set(verdict.drifting_servers()) == set(names[:3])
    assert verdict.needs_retraining is drifts


def test_a_stricter_quorum_asks_for_more_of_the_fleet() -> None:
    grid = changed_grid(slice(0, 2))
    strict = SeasonalDetector(usual_reference(), QuorumRule(quorum=0.5, sustained_quorum=0.5))
    first = (REFERENCE_DAYS - 2) * DAY
    replay(strict, grid[:, :, first:], START_MS + first * BIN_MS)

    assert following(grid).check().needs_retraining
    assert not strict.check().needs_retraining
    assert dataclasses.asdict(strict.rule)["quorum"] == 0.5
