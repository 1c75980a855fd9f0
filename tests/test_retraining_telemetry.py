"""`retraining_metrics.prom`: what it says, how it counts, and what of it `/metrics` repeats."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_seasonal_monitor import changed_grid, report_of

from fleetcast.clock import FakeClock
from fleetcast.drift.report import DriftReport
from fleetcast.drift.seasonal.detector import COLLECTING, READY
from fleetcast.retraining.decision import Decision, TrainingLog, TrainingStamp
from fleetcast.retraining.report import NOTHING, RetrainingCheck
from fleetcast.retraining.state import (
    FAILED,
    KEPT_ATTEMPTS,
    OUTCOMES,
    PROMOTED,
    Attempt,
    RetrainingState,
    load_state,
    save_state,
)
from fleetcast.retraining.telemetry import MAX_BYTES, PREFIX, RetrainingTelemetry, read_textfile
from fleetcast.schema import QuietVerdict, SafeguardCheck

NOW = datetime(2026, 1, 15, 10, 0, tzinfo=UTC)
SCORES = {"per": 0.08, "dss": 0.25, "fds": 0.1, "anomaly_rate": 0.01, "combined_score": 0.129}
LIMITS = {"per": 0.1, "dss": 0.2, "fds": 0.15, "anomaly_rate": 0.05, "combined_score": 0.12}
REPORT = DriftReport(
    metrics=SCORES,
    needs_retraining=True,
    exceeded=("dss",),
    thresholds=LIMITS,
    weights={},
    trends={},
    status=READY,
    status_reason="",
    n_pairs=840,
    window_size=1000,
    per_by_horizon={1: 0.08, 96: 0.3},
)
CHECK = RetrainingCheck(
    NOW,
    REPORT,
    QuietVerdict(is_quiet=True, reason=""),
    Decision(
        True, "drift", "dss over its limit", (SafeguardCheck("min_hours_between_training", 7.0, 6, True),)
    ),
    "",
    NOTHING,
)


def _attempt(number: int, outcome: str) -> Attempt:
    return Attempt(f"a{number}", "drift", "", "2026-01-15T09:00:00", outcome=outcome)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "retraining_metrics.prom"


def _samples(path: Path) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(path.read_text())
    return {
        (sample.name.removeprefix(PREFIX), "".join(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def test_scores_stand_beside_their_thresholds(path: Path) -> None:
    RetrainingTelemetry(path, path.parent, FakeClock(NOW)).write(CHECK, RetrainingState())

    found = _samples(path)
    for name in SCORES:
        assert found["drift_score", name] == SCORES[name]
        assert found["drift_threshold", name] == LIMITS[name]
    assert found["drift_basis_info", "literal"] == 1
    assert found["prediction_error_ratio", "1"] == 0.08
    assert found["prediction_error_ratio", "96"] == 0.3
    assert found["needs_retraining", ""] == found["drift_ready", ""] == found["quiet_period", ""] == 1
    assert found["safeguard_passed", "min_hours_between_training"] == 1
    assert found["window_pairs", ""] == 840
    assert found["last_check_timestamp_seconds", ""] == NOW.timestamp()


def test_with_the_calibrated_basis_the_literal_scores_and_the_false_alarms_stand_beside(
    path: Path, tmp_path: Path
) -> None:
    report = report_of(tmp_path, changed_grid())

    RetrainingTelemetry(path, path.parent, FakeClock(NOW)).write(
        replace(CHECK, report=report), RetrainingState()
    )

    found = _samples(path)
    assert found["drift_score", "dss"] == report.metrics["dss"]
    assert found["drift_literal_score", "dss"] == report.literal["dss"] != report.metrics["dss"]
    assert found["drift_basis_info", "calibrated"] == 1
    assert {found["error_of_last_value_ratio", side] for side in ("served", "model")} == {
        report.served_error.as_json()["fleet"]
    }
    assert (found["drift_series_in_alarm", ""], found["drift_series_compared", ""]) == (6, 10)
    assert (found["drift_false_alarms_per_month", "target"], found["data_quality_events", ""]) == (1, 0)


def test_what_is_not_known_is_left_out_rather_than_zero(path: Path) -> None:
    report = replace(REPORT, status=COLLECTING, per_by_horizon={})

    RetrainingTelemetry(path, path.parent, FakeClock(NOW)).write(
        replace(CHECK, report=report), RetrainingState()
    )

    found = _samples(path)
    assert found["drift_ready", ""] == 0
    assert {"prediction_error_ratio", "last_training_timestamp_seconds"}.isdisjoint(name for name, _ in found)


def test_attempts_are_counted_when_they_end_and_each_outcome_is_there_from_the_start(path: Path) -> None:
    state = RetrainingState()
    for number, outcome in enumerate((PROMOTED, FAILED, FAILED), start=1):
        state = state.with_attempt(_attempt(number, "running"))
        state = state.with_attempt(_attempt(number, outcome)).with_attempt(_attempt(number, outcome))
    state = state.with_attempt(_attempt(4, "running"))

    RetrainingTelemetry(path, path.parent, FakeClock(NOW)).write(CHECK, state)

    found = _samples(path)
    assert {outcome: found["attempts_total", outcome] for outcome in OUTCOMES} == {
        **dict.fromkeys(OUTCOMES, 0.0), FAILED: 2.0, PROMOTED: 1.0,
    }  # fmt: skip
    assert found["attempt_running", ""] == 1


def test_no_restart_makes_a_counter_fall_though_the_state_forgets_attempts(path: Path) -> None:
    state = RetrainingState()
    for number in range(KEPT_ATTEMPTS + 10):
        state = state.with_attempt(_attempt(number, FAILED))
    save_state(path.with_name("state.json"), state)

    restarted = load_state(path.with_name("state.json"))
    RetrainingTelemetry(path, path.parent, FakeClock(NOW)).write(CHECK, restarted)

    assert len(restarted.attempts) == KEPT_ATTEMPTS
    assert _samples(path)["attempts_total", FAILED] == KEPT_ATTEMPTS + 10


def test_a_state_of_the_release_before_counts_the_attempts_that_it_lists(path: Path) -> None:
    state = RetrainingState().with_attempt(_attempt(1, FAILED)).with_attempt(_attempt(2, "running"))
    older = path.with_name("state.json")
    save_state(older, state)
    raw = json.loads(older.read_text())
    del raw["attempts_ended"]
    older.write_text(json.dumps(raw))

    assert load_state(older).n_ended == {FAILED: 1}


def test_trainings_of_seven_days_are_a_gauge(path: Path) -> None:
    ages_days = (0.0, 3.0, 6.99, 7.0, 20.0)
    stamps = tuple(TrainingStamp(NOW - timedelta(days=age), promoted=False) for age in ages_days)

    RetrainingTelemetry(path, path.parent, FakeClock(NOW)).write(
        CHECK, RetrainingState(log=TrainingLog(stamps))
    )

    assert _samples(path)["trainings_7d", ""] == 3


def test_free_disk_is_told_where_checkpoints_will_be_and_where_the_state_is(path: Path) -> None:
    RetrainingTelemetry(path, path.parent / "not" / "yet", FakeClock(NOW)).write(CHECK, RetrainingState())

    found = _samples(path)
    free = shutil.disk_usage(path.parent).free
    for folder in ("checkpoints", "state"):
        assert found["free_disk_bytes", folder] == pytest.approx(free, rel=0.2)


def test_promotions_and_the_last_training_come_from_the_log(path: Path) -> None:
    log = TrainingLog((TrainingStamp(NOW, promoted=True),), total_promoted=9)

    RetrainingTelemetry(path, path.parent, FakeClock(NOW)).write(CHECK, RetrainingState(log=log))

    found = _samples(path)
    assert found["promotions_total", ""] == 9
    assert found["last_training_timestamp_seconds", ""] == NOW.timestamp()


def test_a_disk_that_does_not_take_it_costs_numbers_and_no_check(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    RetrainingTelemetry(tmp_path / "gone" / "x.prom", tmp_path, FakeClock(NOW)).write(
        CHECK, RetrainingState()
    )

    assert "metrics not written" in caplog.text


def test_the_inference_daemon_repeats_the_file_as_it_is(path: Path) -> None:
    RetrainingTelemetry(path, path.parent, FakeClock(NOW)).write(CHECK, RetrainingState())

    assert read_textfile(path) == path.read_bytes()


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (b"", b""),
        (b"up 1\nprocess_open_fds 3\n", b""),
        (b"fleetcast_retraining_window_pairs 1\nforeign 2\n", b"fleetcast_retraining_window_pairs 1\n"),
        (b"\xff\xfe\x00", b""),
        (b"fleetcast_retraining_x 1\n" * MAX_BYTES, b""),
    ],
)
def test_a_foreign_or_damaged_file_cannot_break_a_scrape(path: Path, content: bytes, shown: bytes) -> None:
    path.write_bytes(content)

    assert read_textfile(path) == shown


def test_no_file_is_no_samples(path: Path) -> None:
    assert read_textfile(path) == b""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say(path: Path) -> None:
    state = RetrainingState().with_attempt(_attempt(1, FAILED))
    RetrainingTelemetry(path, path.parent, FakeClock(NOW)).write(CHECK, state)

    command = ["promtool", "check", "metrics"]
    done = subprocess.run(command, input=path.read_bytes(), capture_output=True, check=False)

    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_a_pipe_in_the_place_of_the_textfile_does_not_block_a_scrape(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert read_textfile(tmp_path / "pipe") == b""
