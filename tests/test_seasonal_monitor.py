"""DriftMonitor with the calibrated basis: the verdict, its words, and what must not change it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rhythm_fleet import BIN_MS, DAY, METRICS, SERVERS, START_MS, Grid, fitted, fleet_grid, made_grid
from seasonal_store import FIRST_TEST_BIN, VERSION, registry_with, rows_of, source_of, store_of
from settled_rows import RowStore, joined

from drift_monitor import DriftMonitor
from fleetcast.clock import DAY_MS, FakeClock
from fleetcast.drift.report import DriftReport
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.retraining.decision import DRIFT, Decision
from fleetcast.retraining.order import known_changes, training_context
from fleetcast.retraining.report import NOTHING, RetrainingCheck
from fleetcast.schema import ChangedSeries, QuietVerdict, SettledForecasts
from fleetcast.settings import DriftSettings
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.verdict import training_reference

END = FIRST_TEST_BIN + 2 * DAY
CHANGE = FIRST_TEST_BIN + DAY
AN_HOUR = DriftSettings(window_size=60, min_pairs=60, min_span_s=3600.0)
NEXT = "20260117T000000Z-bbbb"


def changed_grid(by: float = 30.0) -> Grid:
    grid = made_grid()
    grid[:3, :, CHANGE:] += by
    return grid


def monitor_of(folder: Path, store: RowStore, own: DriftSettings | None = None) -> DriftMonitor:
    own = own or DriftSettings()
    evidence = source_of(folder, store, settings=own).evidence(VERSION)
    monitor = DriftMonitor(settings=own, clock=FakeClock())
    monitor.observe(evidence)
    return monitor


def report_of(folder: Path, grid: Grid) -> DriftReport:
    return monitor_of(folder, store_of(grid, END)).report()


def test_unchanged_data_are_no_drift_whatever_the_literal_four_say(tmp_path: Path) -> None:
    report = monitor_of(tmp_path, store_of(made_grid(), END), AN_HOUR).report()
    assert (report.basis, report.status, report.needs_retraining) == ("calibrated", "ready", False)
    assert all(report.metrics[name] < limit for name, limit in report.thresholds.items())
    assert report.literal["dss"] > report.thresholds["dss"], "an hour never looks like a week"


def test_changed_servers_are_drift_and_are_named_with_the_time_and_the_levels(tmp_path: Path) -> None:
    monitor = monitor_of(tmp_path, store_of(changed_grid(), END))
    assert monitor.calculate_drift_metrics()["needs_retraining"] is True
    monitor.save_metrics(tmp_path / "drift_metrics.json")
    found = json.loads((tmp_path / "drift_metrics.json").read_text())
    assert (found["basis"], found["recommendation"]) == ("calibrated", "RETRAIN NOW")
    assert found["literal_metrics"].keys() == found["thresholds"].keys()
    assert {item["server"] for item in found["top_drifting"]} == set(SERVERS[:3])
    for item in found["top_drifting"]:
        assert abs(item["changed_ms"] - (START_MS + CHANGE * BIN_MS)) <= 3 * BIN_MS
        assert item["actual"] - item["usual"] == pytest.approx(30, abs=3)
    assert found["calibrated"]["false_alarms_per_month"].keys() == {"target", "shown", "days_judged"}
    assert found["calibrated"]["compared_series"] == 10
    report = monitor.generate_report()
    for text in (
        "Literal, reported only",
        "app-1 cpu_pct",
        "times the limit",
        "false alarms a month: 1 meant",
    ):
        assert text in report, report


def test_a_higher_threshold_is_less_sensitive_on_the_same_scale(tmp_path: Path) -> None:
    store = store_of(changed_grid(), END)
    usual = monitor_of(tmp_path, store).report()
    ratio = usual.metrics["dss"] / 0.20
    assert ratio > 1 and "dss" in usual.exceeded
    above, below = (
        monitor_of(tmp_path, store, DriftSettings(dss_threshold=0.20 * ratio * share)).report()
        for share in (1.01, 0.99)
    )
    assert above.metrics == below.metrics == usual.metrics
    assert "dss" not in above.exceeded and "dss" in below.exceeded


def test_literal_basis_decides_by_the_literal_four_only(tmp_path: Path) -> None:
    monitor = monitor_of(tmp_path, store_of(made_grid(), END), replace(AN_HOUR, basis="literal"))
    report = monitor.report()
    assert (report.basis, report.verdict) == ("literal", None)
    assert report.metrics == report.literal
    assert report.needs_retraining


def test_a_young_reference_collects_and_says_how_much_is_missing(tmp_path: Path) -> None:
    registry_with(tmp_path, fitted(made_grid()[:, :, : 2 * DAY]))
    report = monitor_of(tmp_path, store_of(changed_grid(), END)).report()
    assert (report.status, report.needs_retraining) == ("collecting", False)
    assert report.status_reason == "2 of 3 days known of any series, until about 2026-01-17 00:00Z"
    assert report.metrics["dss"] is None, "not looked at yet"


def test_three_days_are_enough_to_find_what_changes_much_and_no_alarm_for_what_does_not(
    tmp_path: Path,
) -> None:
    three_days = fitted(made_grid()[:, :, FIRST_TEST_BIN - 3 * DAY : FIRST_TEST_BIN])
    for folder, grid, drifts in (("a", made_grid(), False), ("b", changed_grid(), True)):
        registry_with(tmp_path / folder, three_days)
        report = monitor_of(tmp_path / folder, store_of(grid, END)).report()
        assert (report.status, report.needs_retraining) == ("ready", drifts)


def test_what_is_not_compared_says_until_when(tmp_path: Path) -> None:
    grid = made_grid()
    grid[2, 1, : FIRST_TEST_BIN - DAY] = np.nan
    registry_with(tmp_path, fitted(grid[:, :, :FIRST_TEST_BIN]))
    monitor = monitor_of(tmp_path, store_of(grid, END - 12))
    when = "2026-01-17"  # two more days than the reference has, the second of them not over yet
    found = monitor.report().as_json(FakeClock().now())["calibrated"]
    assert found["not_compared"] == {"too few days in the reference": 1}
    assert found["enough_days"] == {
        "series": 1,
        "first": f"{when}T00:00:00Z",
        "last": f"{when}T00:00:00Z",
        "says": f"until about {when} 00:00Z",
    }
    said = f"not compared: 1 series, too few days in the reference, until about {when} 00:00Z"
    assert said in monitor.generate_report()


def test_the_trend_rises_while_the_fleet_moves_away(tmp_path: Path) -> None:
    report = monitor_of(tmp_path, store_of(changed_grid(), CHANGE + 60)).report()
    assert report.trends["fds"] == report.trends["anomaly_rate"] == "increasing", report.as_text()


def test_one_broken_server_is_named_and_starts_nothing(tmp_path: Path) -> None:
    grid = made_grid()
    grid[0, :, CHANGE:] = grid[0, :, CHANGE:] * 3 + 500
    report = report_of(tmp_path, grid)
    assert {item.server_name for item in report.drifting} == {SERVERS[0]}
    assert report.needs_retraining is False, report.as_text()


def test_an_outage_and_a_frozen_sensor_are_data_quality_not_drift(tmp_path: Path) -> None:
    grid = made_grid()
    grid[1:3, :, END - 30 :] = np.nan
    grid[3, 0, END - 150 :] = grid[3, 0, END - 150]
    report = report_of(tmp_path, grid)
    assert not report.needs_retraining
    events = report.as_json(FakeClock().now())["calibrated"]["data_quality"]
    assert [(event["kind"], event["server"]) for event in events] == [
        ("outage", SERVERS[1]),
        ("outage", SERVERS[2]),
        ("frozen", SERVERS[3]),
    ]
    assert "data quality, not drift" in report.as_text()


def missed_on_changed(grid: Grid, first_bin: int, last_bin: int) -> SettledForecasts:
    """Return rows whose forecasts know nothing of the change."""
    rows = rows_of(grid, first_bin, last_bin)
    changed = np.isin(rows.server_name.astype(str), SERVERS[:3]) & (
        rows.target_ms >= START_MS + CHANGE * BIN_MS
    )
    rows.p50[changed] -= 30
    return rows


def test_after_a_rejected_training_the_same_drift_is_not_judged_again(tmp_path: Path) -> None:
    grid = changed_grid()
    store = RowStore(missed_on_changed(grid, FIRST_TEST_BIN, END))
    first = monitor_of(tmp_path, store).report()
    assert first.needs_retraining
    changed = [
        ChangedSeries(
            SERVERS.index(item.server_name),
            METRICS.index(item.metric),
            (item.changed_ms - START_MS) // BIN_MS,
        )
        for item in first.drifting
    ]
    trained_on = TrainingGrid(SERVERS, METRICS, grid[:, :, :END], START_MS, BIN_MS)
    reference = training_reference(trained_on, changed, store.read_predictions, DriftSettings())
    assert {item["changed_ms"] - START_MS for item in known_changes(reference)} <= {15 * DAY_MS, 16 * DAY_MS}
    assert len(known_changes(reference)) == 6
    registry_with(tmp_path, reference, NEXT, end_bin=END)  # its baseline holds, VERSION serves on
    store.add(missed_on_changed(grid, END, END + DAY))  # the model that stays is as wrong as before
    second = monitor_of(tmp_path, store).report()
    assert second.evidence is not None
    assert second.evidence.reference_version == NEXT
    assert (second.status, second.needs_retraining) == ("ready", False)


def test_update_after_observe_is_literal_again(tmp_path: Path) -> None:
    monitor = monitor_of(tmp_path, store_of(made_grid(), END))
    monitor.update({"cpu_pct": 50.0}, {"cpu_pct": 50.0})
    assert monitor.report().basis == "literal"


# properties


def verdict_of(folder: Path, store: RowStore) -> tuple[bool, list[tuple[str, str]]]:
    report = monitor_of(folder, store).report()
    return report.needs_retraining, sorted((s.server_name, s.metric) for s in report.drifting)


@pytest.mark.parametrize("is_changed", [False, True])
def test_the_order_of_servers_and_metrics_does_not_change_the_verdict(
    tmp_path: Path, is_changed: bool
) -> None:
    grid = changed_grid() if is_changed else made_grid()
    rows = rows_of(grid, FIRST_TEST_BIN, END)
    shuffled = rows.where(np.random.default_rng(4).permutation(len(rows)))
    backwards = fitted_backwards()
    registry_with(tmp_path / "b", backwards)
    one = verdict_of(tmp_path / "a", RowStore(rows))
    assert verdict_of(tmp_path / "b", RowStore(shuffled)) == one
    assert one[0] is is_changed


@pytest.mark.parametrize("n_changed", [0, 3])
def test_a_training_is_told_what_is_near_an_alarm_only_while_the_fleet_drifts(
    tmp_path: Path, n_changed: int
) -> None:
    # Given a series that moved half as far as an alarm needs, and servers that changed far more, or none
    grid = made_grid()
    grid[:n_changed, :, CHANGE:] += 12
    grid[3, 0, CHANGE:] += 6
    source = source_of(tmp_path, store_of(grid, CHANGE + DAY // 3))
    evidence = source.evidence(VERSION)
    monitor = DriftMonitor(settings=DriftSettings(), clock=FakeClock())
    monitor.observe(evidence)
    quiet, decision = QuietVerdict(True, ""), Decision(True, DRIFT, "", ())
    check = RetrainingCheck(FakeClock().now(), monitor.report(), quiet, decision, "", NOTHING)

    named = training_context(check, evidence, source)["drifting"]

    near = [item for item in named if not item["is_drifting"]]
    assert {item["server"] for item in named if item["is_drifting"]} == set(SERVERS[:n_changed])
    assert [(item["server"], item["in_alarm_since"]) for item in near] == [(SERVERS[3], None)] * bool(
        n_changed
    )
    assert all(item["changed_ms"] and item["score"] <= 1 for item in near)


def fitted_backwards() -> Reference:
    grid = made_grid()[::-1, ::-1, :FIRST_TEST_BIN]
    return Reference.fit(fleet_grid(np.ascontiguousarray(grid), SERVERS[::-1], METRICS[::-1]))


@pytest.mark.parametrize("is_changed", [False, True])
def test_other_units_do_not_change_the_verdict(tmp_path: Path, is_changed: bool) -> None:
    grid = changed_grid() if is_changed else made_grid()
    scaled = grid * np.array([1000.0, 0.001], np.float32)[None, :, None]
    registry_with(tmp_path / "b", fitted(scaled[:, :, :FIRST_TEST_BIN]))
    assert verdict_of(tmp_path / "b", store_of(scaled, END)) == verdict_of(
        tmp_path / "a", store_of(grid, END)
    )


@given(seed=st.integers(0, 2**31), is_changed=st.booleans())
@settings(max_examples=4, deadline=None)
def test_rows_doubled_or_lost_do_not_change_the_verdict(
    tmp_path_factory: pytest.TempPathFactory, seed: int, is_changed: bool
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    chance = np.random.default_rng(seed)
    rows = rows_of(changed_grid() if is_changed else made_grid(), FIRST_TEST_BIN, END)
    kept = rows.where(chance.random(len(rows)) > 0.05)
    doubled = joined(kept, kept.where(chance.random(len(kept)) < 0.1))
    assert verdict_of(folder, RowStore(doubled))[0] is is_changed


def test_the_days_of_the_reference_themselves_never_alarm(tmp_path: Path) -> None:
    store = RowStore(rows_of(made_grid(), 0, DAY))
    source = source_of(tmp_path, store)
    for bin_now in range(DAY, 8 * DAY, DAY // 4):
        store.add(rows_of(made_grid(), bin_now, bin_now + DAY // 4))
        detector = source.evidence(VERSION).detector
        assert detector is not None
        assert not detector.check().needs_retraining
