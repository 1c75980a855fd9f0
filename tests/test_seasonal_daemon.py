"""The retraining daemon with the default basis, on a real buffer: from settled rows to the decision."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from rhythm_fleet import BIN_MS, DAY, START_MS, fitted, made_grid, usual_reference
from seasonal_store import FIRST_TEST_BIN, SERVERS, VERSION, Grid, registry_with, rows_of
from small_fleet import quiet_answers, settings
from test_seasonal_monitor import END, changed_grid
from told_daemon import Told

from adaptive_retraining_daemon import AdaptiveRetrainingDaemon
from data_buffer import DataBuffer
from drift_monitor import main
from fleetcast.clock import HOUR_MS, from_ms, iso_z
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.errors import FleetcastError
from fleetcast.files import read_json
from fleetcast.retraining.report import RetrainingCheck

ROOT = Path(__file__).parents[1]


def lay_out(folder: Path, grid: Grid, reference: Reference, end_bin: int = FIRST_TEST_BIN) -> None:
    """Leave behind what a fleet, its inference daemon and a trainer would have."""
    registry = registry_with(folder, reference, end_bin=end_bin)
    registry.promote(VERSION)
    with_owner = DataBuffer(folder / "data_buffer", expire=False)
    newest = {"timestamp": iso_z(from_ms(START_MS + END * BIN_MS)), "server_name": SERVERS[0], "cpu_pct": 1.0}
    with_owner.append([newest])
    with_owner.append_predictions(rows_of(grid, FIRST_TEST_BIN, END))
    with_owner.close()


def checked(told: Told, **parts: dict[str, Any]) -> RetrainingCheck:
    drift = {"basis": "calibrated", "window_size": 1000, "min_pairs": 300}
    drift |= parts.pop("drift", {})
    own = settings(drift=drift, **{"retraining": {"mode": "advise"}, **parts})
    daemon = AdaptiveRetrainingDaemon(daemon_url=told.url, settings=own)
    with daemon.ownership():
        check = daemon.run_check_cycle()
        daemon.wait_for_training(time.monotonic() + 60)
    return check


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def test_a_changed_fleet_asks_for_a_training_that_is_told_who_changed_when(folder: Path) -> None:
    lay_out(folder, changed_grid(), usual_reference())
    shutil.copy(ROOT / "tests" / "data" / "stand_in_trainer.py", folder / "tft_trainer.py")
    (folder / "stand_in.txt").write_text("not enough")
    with Told() as told:
        told.answers = quiet_answers(VERSION)
        advised = checked(told)
        assert (advised.decision.rule, advised.action) == ("drift", "advised")
        found = read_json(Path("drift_metrics.json"))
        assert (found["basis"], found["recommendation"]) == ("calibrated", "RETRAIN NOW")
        assert checked(told).report.current_metrics() == advised.report.current_metrics(), "a restart"
        assert checked(told, retraining={"mode": "auto"}).action == "started"
    context = read_json(Path("training_context.json"))
    assert context["basis"] == "calibrated"
    assert {item["server"] for item in context["drifting"]} == set(SERVERS[:3])
    since = {item["changed_ms"] for item in context["drifting"]}
    assert max(since) - min(since) <= 3 * BIN_MS


def test_a_calm_fleet_is_left_alone_and_the_figure_can_be_drawn(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out(folder, made_grid(), usual_reference())
    with Told() as told:
        told.answers = quiet_answers(VERSION)
        check = checked(told)
    assert (check.report.status, check.decision.rule) == ("ready", "none")
    assert check.decision.reason.startswith("no drift: per")
    assert main(["--plot", "out.png"]) == 0
    assert "Literal, reported only" in capsys.readouterr().out
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")


def test_a_calm_fleet_learns_a_week_of_new_data_once_and_not_where_that_is_turned_off(folder: Path) -> None:
    lay_out(folder, made_grid(), usual_reference(), end_bin=END - 7 * DAY)
    shutil.copy(ROOT / "tests" / "data" / "stand_in_trainer.py", folder / "tft_trainer.py")
    (folder / "stand_in.txt").write_text("not enough")
    with Told() as told:
        told.answers = quiet_answers(VERSION)
        off = checked(told, decision={"learning": "off"})
        assert (off.decision.rule, off.decision.should_retrain, off.learning) == ("none", False, "")
        told.answers = quiet_answers(VERSION, cpu=90.0)
        waiting = checked(told)
        assert (waiting.decision.rule, waiting.decision.should_retrain) == ("learning", False)
        told.answers = quiet_answers(VERSION)
        started = checked(told, retraining={"mode": "auto"})
    assert (started.decision.rule, started.action) == ("learning", "started")
    assert not started.report.needs_retraining
    assert read_json(Path("drift_metrics.json"))["recommendation"] == "OK"
    context = read_json(Path("training_context.json"))
    assert (context["rule"], context["drifting"]) == ("learning", [])
    line = json.loads(Path("decisions.jsonl").read_text().splitlines()[-1])
    assert line["learning"].startswith("learning: 7 days of new data")
    assert line["reason"].startswith(line["learning"])
    attempt = read_json(Path("retraining_state.json"))["attempts"][0]
    assert (attempt["rule"], attempt["outcome"]) == ("learning", "not_enough_data")


def day_of_checks(cpu: float, until_ms: int) -> str:
    """Return lines of `decisions.jsonl`: two days in which forecasts of a steady fleet came true."""
    lines = []
    for at_ms in range(until_ms - 48 * HOUR_MS, until_ms, HOUR_MS // 2):
        measured = {"fleet_cpu_percent": cpu, "fleet_mem_percent": 30.0}
        said = {"start": iso_z(from_ms(at_ms)), "step_s": 3600.0, "cpu_pct": [cpu] * 8, "mem_pct": [30.0] * 8}
        line = {"at": iso_z(from_ms(at_ms)), "quiet": {"measured": measured}, "ahead": {"fleet_ahead": said}}
        lines.append(json.dumps({**line, "rule": "none", "reason": "no drift"}))
    return "\n".join(lines) + "\n"


def test_drift_waits_for_a_quieter_hour_over_restarts_and_starts_with_it(folder: Path) -> None:
    lay_out(folder, changed_grid(), usual_reference())
    shutil.copy(ROOT / "tests" / "data" / "stand_in_trainer.py", folder / "tft_trainer.py")
    (folder / "stand_in.txt").write_text("not enough")
    now_ms = START_MS + END * BIN_MS
    Path("decisions.jsonl").write_text(day_of_checks(50.0, now_ms))
    hours = {"step_s": 3600.0, "cpu_pct": [50, 45, 20, *[50] * 5], "mem_pct": [30.0] * 8}
    auto = {"retraining": {"mode": "auto"}}
    with Told() as told:
        told.answers = quiet_answers(VERSION, cpu=50.0)
        status = told.answers["/status"]
        status["fleet_ahead"] = {**hours, "start": iso_z(from_ms(now_ms))}
        literal = checked(told, drift={"basis": "literal"})
        assert literal.ahead.why == "", "the specification's rule waits for nothing"
        first = checked(told, **auto)
        assert (first.decision.rule, first.action) == ("drift", "nothing")
        until = f"{from_ms(now_ms + 2 * HOUR_MS):%Y-%m-%d %H:%M}"
        told_in_words = (
            f"it waits for a quieter hour, until {until} UTC at the latest: mean cpu 50.0 % now, 20.0 %"
        )
        assert first.decision.reason.startswith(told_in_words)
        assert "; drift: per" in first.decision.reason
        assert f"Hours ahead: {told_in_words}" in first.as_text()
        line = json.loads(Path("decisions.jsonl").read_text().splitlines()[-1])
        assert line["reason"] == first.decision.reason
        assert line["ahead"]["until"] == iso_z(from_ms(now_ms + 2 * HOUR_MS))
        assert line["ahead"]["fleet_ahead"] == {
            **status["fleet_ahead"],
            "cpu_pct": [50.0, 45.0, 20.0, *[50.0] * 5],
        }
        assert checked(told, **auto).decision.reason == first.decision.reason, "a restart"
        off = checked(told, decision={"quiet_ahead": "off"}, retraining={"mode": "advise"})
        assert off.decision.should_retrain
        del status["fleet_ahead"]
        started = checked(told, **auto)
    assert started.action == "started", "without a forecast it is as it was"
    assert started.ahead.why == "the inference daemon says nothing of the hours ahead"


def test_a_wait_that_cannot_be_written_down_does_not_begin_again(folder: Path) -> None:
    lay_out(folder, changed_grid(), usual_reference())
    now_ms = START_MS + END * BIN_MS
    decisions = Path("decisions.jsonl")
    decisions.write_text(day_of_checks(50.0, now_ms))
    hours = {"start": iso_z(from_ms(now_ms)), "step_s": 3600.0}
    drift = {"basis": "calibrated", "window_size": 1000, "min_pairs": 300}
    with Told() as told:
        told.answers = quiet_answers(VERSION, cpu=50.0)
        status = told.answers["/status"]
        status["fleet_ahead"] = {**hours, "cpu_pct": [50, 45, 20, *[50] * 5]}
        own = settings(drift=drift, retraining={"mode": "advise"})
        daemon = AdaptiveRetrainingDaemon(daemon_url=told.url, settings=own)
        with daemon.ownership():
            assert daemon.check_quiet_period()  # what is remembered is read
            decisions.rename("kept")
            decisions.mkdir()
            with pytest.raises(FleetcastError, match=r"decisions\.jsonl"):
                daemon.run_check_cycle()
            decisions.rmdir()
            status["fleet_ahead"] = {**hours, "cpu_pct": [50, 45, 20, 50, 50, 10, 50, 50]}
            check = daemon.run_check_cycle()
    assert check.ahead.as_json()["until"] == iso_z(from_ms(now_ms + 2 * HOUR_MS)), check.ahead.why


def test_while_it_collects_nobody_says_the_model_is_well(folder: Path) -> None:
    lay_out(folder, changed_grid(), fitted(made_grid()[:, :, : 2 * DAY]))
    with Told() as told:
        told.answers = quiet_answers(VERSION)
        check = checked(told, decision={"host_load_per_core": 1000.0})
    assert check.decision.reason.startswith("collecting: "), check.decision.reason
    line = json.loads(Path("decisions.jsonl").read_text())
    assert (line["drift_status"], line["should_retrain"]) == ("collecting", False)
