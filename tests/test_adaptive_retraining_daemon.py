"""The retraining daemon's cycle on a real buffer: what it measures, decides, writes and starts."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from settled_rows import BIN_MS, START_MS
from small_fleet import SmallFleet, quiet_answers, settings, shifted_from
from told_daemon import Told

import adaptive_retraining_daemon as program
from adaptive_retraining_daemon import AdaptiveRetrainingDaemon
from fleetcast.clock import FakeClock, from_ms
from fleetcast.errors import AlreadyRunning, BadData, ExitCode
from fleetcast.files import read_json
from fleetcast.locks import OwnerLock
from fleetcast.retraining.state import RetrainingState, save_state
from fleetcast.settings import Settings

ROOT = Path(__file__).parents[1]
FILES = {"drift_metrics.json", "retraining_state.json", "decisions.jsonl"}


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallFleet]:
    """A fleet with a model in service and two hours of its forecasts, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shutil.copy(ROOT / "tests" / "data" / "stand_in_trainer.py", tmp_path / "tft_trainer.py")
    own = SmallFleet(tmp_path)
    own.grow(700)
    own.serve()
    own.grow(48)
    yield own
    own.buffer.close()
    Path("stand_in.txt").write_text("done")


@pytest.fixture
def told(fleet: SmallFleet) -> Iterator[Told]:
    with Told() as daemon:
        daemon.answers = quiet_answers(fleet.version)
        yield daemon


def daemon(
    told: Told, own: Settings | None = None, clock: FakeClock | None = None
) -> AdaptiveRetrainingDaemon:
    return AdaptiveRetrainingDaemon(daemon_url=told.url, settings=own or settings(), clock=clock)


def metrics() -> dict[str, Any]:
    return read_json(Path("drift_metrics.json"))


def state() -> dict[str, Any]:
    return read_json(Path("retraining_state.json"))


def decisions() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("decisions.jsonl").read_text().splitlines()]


def trained(own: AdaptiveRetrainingDaemon, order: str) -> dict[str, Any]:
    """Run a cycle that starts a training, let it end, return the attempt."""
    Path("stand_in.txt").write_text(order)
    with own.ownership():
        check = own.run_check_cycle()
        assert check.action == "started", check.as_text()
        assert own.wait_for_training(time.monotonic() + 60) is not None
    attempt = state()["attempts"][0]
    assert isinstance(attempt, dict)
    return attempt


def test_an_unchanged_fleet_is_measured_reported_and_left_alone(fleet: SmallFleet, told: Told) -> None:
    check = daemon(told).run_check_cycle()
    assert (check.report.status, check.decision.rule, check.action) == ("ready", "none", "nothing")
    assert {path.name for path in Path().iterdir()} >= FILES
    found = metrics()
    assert found["recommendation"] == "OK"
    assert found["window"]["pairs"] == 120
    assert found["model_version"] == fleet.version == found["baseline"]["version"]
    assert found["per_by_horizon"].keys() == {"1", "12"}
    (line,) = decisions()
    assert (line["outcome"], line["should_retrain"], line["rule"]) == ("nothing", False, "none")
    assert line["quiet"]["measured"]["fleet_cpu_percent"] == 20.0
    assert state()["last_decision"]["safeguards"].keys() == line["safeguards"].keys()


def test_the_first_cycle_of_an_empty_folder_writes_its_files_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check = AdaptiveRetrainingDaemon(daemon_url="http://127.0.0.1:9").run_check_cycle()
    assert check.report.status == "collecting"
    assert check.initial_missing == f"no records in {tmp_path / 'data_buffer'} (there is no buffer)"
    assert check.decision.reason == f"collecting: {check.report.status_reason}"
    assert check.initial_missing in check.decision.reason, "what is missing, not that something is"
    assert metrics()["recommendation"] is None
    assert "drift_score{" not in Path("retraining_metrics.prom").read_text()
    assert not check.quiet.is_quiet
    assert {path.name for path in tmp_path.iterdir()} >= FILES
    assert not (tmp_path / "data_buffer").exists()


def test_a_restart_between_any_two_cycles_gives_the_same_metrics(fleet: SmallFleet, told: Told) -> None:
    running = daemon(told, settings(retraining={"mode": "advise"}))
    for n_bins, value in ((1, None), (7, None), (30, shifted_from(55)), (1, shifted_from(55)), (90, None)):
        fleet.grow(n_bins, *([value] if value else []))
        running.run_check_cycle()
        of_running = metrics()
        daemon(told, settings(retraining={"mode": "advise"})).run_check_cycle()
        for key in ("current_metrics", "served_error"):
            assert metrics()[key] == of_running[key]


@pytest.mark.slow
def test_drift_starts_a_training_whose_new_model_restarts_the_window(fleet: SmallFleet, told: Told) -> None:
    fleet.grow(60, shifted_from(48))
    own = daemon(told)
    attempt = trained(own, "promoted")
    assert (attempt["rule"], attempt["outcome"], attempt["exit_code"]) == ("drift", "promoted", 0)
    assert attempt["version"] == fleet.registry.current_id()
    context = read_json(Path("training_context.json"))
    assert context["attempt_id"] == attempt["id"]
    assert {item["server"] for item in context["drifting"]} == {"web-02"}
    since = [datetime.fromisoformat(item["since"]).timestamp() * 1000 for item in context["drifting"]]
    assert all(abs((since_ms - START_MS) / BIN_MS - 48) <= 3 for since_ms in since)
    assert state()["total_trainings"] == len(state()["training_history"]) == 1
    told.answers = quiet_answers(attempt["version"])
    check = own.run_check_cycle()
    assert (check.report.status, check.report.n_pairs) == ("collecting", 0)
    assert check.decision.rule == "none"


@pytest.mark.slow
def test_a_rejected_training_counts_and_its_baseline_keeps_the_same_drift_from_being_judged_twice(
    fleet: SmallFleet, told: Told
) -> None:
    new_level = shifted_from(48)
    fleet.grow(60, new_level, new_level)  # a forecaster that follows: the distribution alone drifts
    own = daemon(told, settings(clock={"mode": "data"}))
    attempt = trained(own, "rejected")
    assert attempt["outcome"] == "rejected"
    assert fleet.registry.current_id() == fleet.version, "the old model serves on"
    assert (state()["training_history"], state()["total_trainings"]) == ([], 0)
    assert state()["last_training_time"] is not None
    assert own.run_check_cycle().report.status == "collecting", "the window restarts with the baseline"
    fleet.grow(60, new_level, new_level)
    check = own.run_check_cycle()
    assert check.report.baseline is not None
    assert check.report.baseline.version == attempt["version"]
    assert (check.report.status, check.report.needs_retraining) == ("ready", False)


@pytest.mark.slow
def test_a_crashed_trainer_backs_off_and_the_reason_says_so(fleet: SmallFleet, told: Told) -> None:
    fleet.grow(60, shifted_from(48))
    own = daemon(told)
    assert trained(own, "crash")["why"].endswith("out of luck")
    check = own.run_check_cycle()
    assert check.decision.reason.startswith("the last training failed, 15 min to wait; drift")
    assert state()["backoff"]["failures"] == 1


@pytest.mark.slow
def test_the_first_training_needs_data_and_a_quiet_host_but_no_quiet_fleet(
    fleet: SmallFleet, told: Told
) -> None:
    shutil.rmtree("checkpoints")
    told.answers = quiet_answers(None, cpu=95.0)
    attempt = trained(daemon(told), "promoted")
    assert (attempt["rule"], attempt["outcome"]) == ("initial", "promoted")


def test_a_busy_host_blocks_the_first_training(fleet: SmallFleet, told: Told) -> None:
    shutil.rmtree("checkpoints")
    check = daemon(told, settings(decision={"host_min_available_gb": 1e6})).run_check_cycle()
    assert check.decision.rule == "initial"
    assert check.decision.reason.startswith("not a quiet period")


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (quiet_answers("x", cpu=60.0), "the fleet is busy: mean cpu 60.0 % (limit 60)"),
        ({"/predictions/current": {"predictions": {}}}, "no live server to measure"),
        ({"/predictions/current": {"detail": "?"}}, "the inference daemon cannot be asked"),
    ],
)
def test_drift_waits_for_a_quiet_period(
    fleet: SmallFleet, told: Told, answers: dict[str, Any], reason: str
) -> None:
    fleet.grow(60, shifted_from(48))
    told.answers = {**answers, "/status": {"model": {"version": fleet.version}}}
    own = daemon(told)
    assert own.check_quiet_period() is False
    check = own.run_check_cycle()
    assert check.decision.reason.startswith("not a quiet period; drift")
    assert check.quiet.reason.startswith(reason)
    assert state()["last_decision"]["not_quiet"] == check.quiet.reason
    assert state()["attempts"] == []


@pytest.mark.parametrize(
    ("cpu", "mem", "limits", "is_quiet"),
    [
        (59.9, 69.9, {}, True),
        (60.0, 10.0, {}, False),
        (10.0, 70.0, {}, False),
        (75.0, 10.0, {"quiet_cpu_percent": 80.0}, True),
        (50.0, 10.0, {"quiet_cpu_percent": 40.0}, False),
        (10.0, 75.0, {"quiet_mem_percent": 80.0}, True),
        (10.0, 50.0, {"quiet_mem_percent": 40.0}, False),
        (10.0, 75.0, {"quiet_cpu_percent": 80.0}, False),
        (75.0, 10.0, {"quiet_mem_percent": 80.0}, False),
    ],
)
def test_a_quiet_limit_that_is_set_counts_and_otherwise_the_literal_does(
    fleet: SmallFleet, told: Told, cpu: float, mem: float, limits: dict[str, float], is_quiet: bool
) -> None:
    told.answers = quiet_answers(fleet.version, cpu=cpu, mem=mem)
    own = daemon(told, settings(decision=limits))
    assert own.check_quiet_period() is is_quiet
    assert own.quiet.limits["fleet_cpu_percent"] == limits.get("quiet_cpu_percent", 60.0)
    assert own.quiet.limits["fleet_mem_percent"] == limits.get("quiet_mem_percent", 70.0)


def test_advise_decides_and_trains_nothing(fleet: SmallFleet, told: Told) -> None:
    fleet.grow(60, shifted_from(48))
    check = daemon(told, settings(retraining={"mode": "advise"})).run_check_cycle()
    assert (check.decision.should_retrain, check.action) == (True, "advised")
    assert not Path("training_context.json").exists()
    assert state()["attempts"] == []


def test_beside_a_running_daemon_a_check_writes_nothing(fleet: SmallFleet, told: Told) -> None:
    fleet.grow(60, shifted_from(48))
    before = {path: path.stat().st_mtime_ns for path in Path().iterdir()}
    with OwnerLock(Path(program.LOCK_FILE), "another"):
        check = daemon(told).run_check_cycle()
    assert (check.decision.should_retrain, check.action) == (True, "beside")
    assert f"another retraining daemon (pid {os.getpid()}) is running" in check.as_text()
    after = {path: path.stat().st_mtime_ns for path in Path().iterdir() if path.name != program.LOCK_FILE}
    assert after == before


def test_a_second_running_daemon_is_refused_by_pid(fleet: SmallFleet, told: Told) -> None:
    with (
        OwnerLock(Path(program.LOCK_FILE), "another"),
        pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}"),
    ):
        daemon(told).run()


def test_the_version_the_inference_daemon_serves_counts_not_the_newest_on_disk(
    fleet: SmallFleet, told: Told
) -> None:
    told.answers = quiet_answers("some-other-version")
    assert daemon(told).run_check_cycle().report.n_pairs == 0
    told.answers = {**quiet_answers(None)}
    assert daemon(told).run_check_cycle().report.n_pairs == 120


def test_a_damaged_baseline_means_collecting_and_a_warning(
    fleet: SmallFleet, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path("checkpoints/baseline.npz").resolve()
    path.write_bytes(path.read_bytes()[:100])
    check = daemon(told).run_check_cycle()
    assert (check.report.status, check.report.status_reason) == ("collecting", "no baseline")
    assert "no baseline can be used" in caplog.text


def test_under_the_data_clock_now_is_the_newest_record(fleet: SmallFleet, told: Told) -> None:
    check = daemon(told, settings(clock={"mode": "data"})).run_check_cycle()
    assert check.at == from_ms(START_MS + 47 * BIN_MS)
    assert state()["clock_mode"] == "data"
    assert state()["installed_at"] == "2026-01-15T11:55:00"


def test_thirty_days_without_training_ask_for_one(fleet: SmallFleet, told: Told) -> None:
    clock = FakeClock(from_ms(START_MS))
    own = daemon(told, settings(retraining={"mode": "advise"}), clock)
    assert own.run_check_cycle().action == "nothing"
    clock.advance(days=31)
    check = own.run_check_cycle()
    assert (check.decision.rule, check.action) == ("max_days_without_training", "advised")


@pytest.mark.parametrize(
    ("interval", "message"), [(0, "must be > 0"), (-5, "must be > 0"), (float("nan"), "> 0")]
)
def test_an_interval_that_is_none_is_refused(interval: float, message: str) -> None:
    with pytest.raises(BadData, match=message):
        AdaptiveRetrainingDaemon(check_interval=interval)


def test_the_constructor_takes_the_printed_arguments_by_position() -> None:
    own = AdaptiveRetrainingDaemon("http://localhost:8000", 300, "./data_buffer", "tft_trainer.py")
    assert own._settings == Settings()


def test_run_checks_until_a_signal_and_leaves_in_good_order(fleet: SmallFleet, told: Told) -> None:
    own = AdaptiveRetrainingDaemon(daemon_url=told.url, check_interval=0.2, settings=settings())
    threading.Timer(1.5, os.kill, args=(os.getpid(), signal.SIGTERM)).start()
    assert own.run() == ExitCode.OK
    assert len(decisions()) >= 2
    own.run_check_cycle()  # as the printed snippet does after run()


# the program


def once(told: Told, *flags: str) -> int:
    Path("own.toml").write_text(
        '[clock]\nmode = "data"\n[drift]\nbasis = "literal"\nwindow_size = 120\n'
        "min_pairs = 60\nmin_span_s = 3600.0\n"
        "[decision]\nhost_load_per_core = 1000.0\nhost_min_available_gb = 0.0\n"
        "[retraining]\ntraining_nice = 0\n"
    )
    return program.main(["--once", "--daemon-url", told.url, "--config", "own.toml", *flags])


def test_once_prints_every_number_and_the_decision(
    fleet: SmallFleet, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    told.answers["/status"]["problems"] = ["No model serves: the shipped base is made for other bins"]
    assert once(told) == 0
    shown = capsys.readouterr().out
    for text in (
        "Inference daemon\n  No model serves: the shipped base is made for other bins",
        "Prediction error rate (PER)",
        "Distribution shift score (DSS)",
        "Feature drift score (FDS)",
        "Anomaly rate",
        "Combined score",
        "Quiet period: yes",
        "fleet_cpu_percent             20.00  limit 60",
        "host_load_of_others",
        "min_hours_between_training",
        "limit 3 trainings",
        "Decision: do not retrain (no drift",
    ):
        assert text in shown, text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "code"), [("promoted", 0), ("rejected", 0), ("not enough", 0), ("crash", 1)]
)
def test_once_waits_for_its_training_and_fails_only_with_it(
    fleet: SmallFleet, told: Told, capsys: pytest.CaptureFixture[str], order: str, code: int
) -> None:
    fleet.grow(60, shifted_from(48))
    Path("stand_in.txt").write_text(order)
    (Path("tft_trainer.py")).write_text(
        (ROOT / "tests/data/stand_in_trainer.py")
        .read_text()
        .replace('"--checkpoint-dir"', '"--config")\n    parser.add_argument("--checkpoint-dir"', 1)
    )
    assert once(told) == code
    assert f": {state()['attempts'][0]['outcome']}." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--interval", "-1"], 2, "retraining.interval_s must be >= 0.1, got -1.0"),
        (["--daemon-url", "localhost"], 2, "must look like http://"),
        (["--config", "missing.toml"], 2, "missing.toml does not exist"),
    ],
)
def test_bad_settings_are_exit_2_and_say_what_would_be_right(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert program.main(["--once", *flags]) == code
    assert message in capsys.readouterr().err


def test_once_with_neither_a_daemon_nor_a_buffer_is_exit_6_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--once", "--daemon-url", "http://127.0.0.1:9", "--data-buffer-dir", "mistyped"]
    assert program.main(flags) == ExitCode.COULD_NOT_LOOK == 6
    where = f"no buffer in {tmp_path / 'mistyped'}, and http://127.0.0.1:9 does not answer"
    assert where in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "missing", [("--data-buffer-dir", "elsewhere"), ("--daemon-url", "http://127.0.0.1:9")]
)
def test_once_looks_where_there_is_a_daemon_or_a_buffer(
    fleet: SmallFleet, told: Told, missing: tuple[str, str]
) -> None:
    assert once(told, *missing) == 0


def test_once_in_another_folder_than_the_daemons_names_both_and_leaves_nothing_behind(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told.answers = quiet_answers("v1")
    told.answers["/status"]["buffer"] = {"folder": "/var/lib/fleetcast/data_buffer"}
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    assert program.main(["--once", "--daemon-url", told.url]) == 0
    shown = capsys.readouterr().out
    assert f"Looked at {other / 'data_buffer'} (there is no buffer) and {told.url} (it keeps" in shown
    assert "/var/lib/fleetcast/data_buffer: see --data-buffer-dir" in shown
    assert "no buffer here: only checked, nothing trained or written" in shown
    assert list(other.iterdir()) == []


def test_the_other_clock_mode_is_exit_2_with_a_hint(
    fleet: SmallFleet, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    save_state(Path("retraining_state.json"), RetrainingState(clock_mode="data"))
    assert once(told, "--clock", "system") == 2
    assert "start with --clock data" in capsys.readouterr().err


def test_export_writes_the_bins_of_the_last_days(
    fleet: SmallFleet, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    import pandas as pd

    assert program.main(["--export", "export.parquet", "--clock", "data"]) == 0
    frame = pd.read_parquet("export.parquet")
    assert len(frame) == 3 * 748
    assert "2244 rows of the last 30 days written to export.parquet" in capsys.readouterr().out
