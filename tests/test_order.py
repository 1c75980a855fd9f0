"""What a training is told: the documented command line, and what drifts since when."""

import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from settled_rows import BIN_MS, RowStore
from test_drift_series import CHANGE, START_MS, baseline, changed, daily, store_of, window_of

from drift_monitor import DriftMonitor
from fleetcast.drift.evidence import DriftEvidence, DriftSource
from fleetcast.forecast.registry import Registry
from fleetcast.retraining.decision import Decision
from fleetcast.retraining.order import export_end, trainer_command, training_context, training_steps
from fleetcast.retraining.report import NOTHING, RetrainingCheck
from fleetcast.schema import QuietVerdict
from fleetcast.settings import DriftSettings, Settings

ROOT = Path(__file__).parents[1]
PRINTED = ["tft_trainer.py", "--data", "training_data_incremental.parquet", "--incremental", "--epochs", "5"]
NOW = datetime(2026, 1, 18, tzinfo=UTC)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_command_is_the_printed_one_with_our_interpreter() -> None:
    Path("tft_trainer.py").touch()
    assert trainer_command(Settings(), ROOT, None) == [sys.executable, *PRINTED]


def test_installed_elsewhere_the_trainer_beside_the_program_is_run() -> None:
    assert trainer_command(Settings(), ROOT, None)[1] == str(ROOT / "tft_trainer.py")


def test_with_no_file_of_that_name_the_installed_trainer_is_run_and_only_under_its_own_name() -> None:
    nowhere, other = Path("elsewhere"), replace(Settings().retraining, training_script="my_trainer.py")
    assert trainer_command(Settings(), nowhere, None)[1] == str(ROOT / "tft_trainer.py")
    assert trainer_command(replace(Settings(), retraining=other), nowhere, None)[1] == "my_trainer.py"


def test_further_flags_come_only_where_settings_are_not_the_defaults() -> None:
    Path("tft_trainer.py").touch()
    settings = replace(
        Settings(),
        paths=replace(Settings().paths, checkpoint_dir="elsewhere"),
        retraining=replace(Settings().retraining, training_epochs=2),
    )
    command = trainer_command(settings, ROOT, Path("own.toml"))
    assert command[2:] == [*PRINTED[1:-1], "2", "--checkpoint-dir", "elsewhere", "--config", "own.toml"]


def test_the_export_comes_first_and_is_done_by_a_child_too() -> None:
    export, train = training_steps(Settings(), ROOT / "adaptive_retraining_daemon.py", None)
    assert export.argv[1:] == [
        str(ROOT / "adaptive_retraining_daemon.py"),
        "--export",
        "training_data_incremental.parquet",
    ]
    assert export.env["FLEETCAST_RETRAINING_TRAINING_DAYS"] == "30"
    assert export.env["FLEETCAST_TRAINER_MAX_CELLS"] == "70000000"
    assert train.env == {}
    elsewhere = replace(Settings(), paths=replace(Settings().paths, data_buffer_dir="/srv/buffer"))
    for step in training_steps(elsewhere, ROOT / "adaptive_retraining_daemon.py", None):
        assert step.env["FLEETCAST_PATHS_DATA_BUFFER_DIR"] == "/srv/buffer"
    for step in training_steps(Settings(), ROOT / "adaptive_retraining_daemon.py", Path("own.toml")):
        assert step.argv[-2:] == ["--config", "own.toml"]


def test_the_trainer_is_told_where_to_train_and_the_export_is_made_here() -> None:
    on_ray = replace(Settings(), retraining=replace(Settings().retraining, engine="ray"))
    export, train = training_steps(on_ray, ROOT / "adaptive_retraining_daemon.py", None)
    assert train.env == {"FLEETCAST_RETRAINING_ENGINE": "ray"}
    assert "FLEETCAST_RETRAINING_ENGINE" not in export.env


def context(store: RowStore, *, with_baseline: bool = True, rule: str = "drift") -> dict[str, object]:
    source = DriftSource(store, Registry(Path("checkpoints")), DriftSettings(), BIN_MS)
    evidence = DriftEvidence(window_of(store), "v1", baseline() if with_baseline else None)
    monitor = DriftMonitor(settings=DriftSettings(basis="literal"))
    monitor.observe(evidence)
    quiet, decision = QuietVerdict(True, ""), Decision(True, rule, "", ())
    check = RetrainingCheck(NOW, monitor.report(), quiet, decision, "", NOTHING)
    return training_context(check, evidence, source)


def test_the_drifting_series_are_named_with_the_time_they_changed() -> None:
    (found,) = context(store_of(changed))["drifting"]  # type: ignore[misc]
    assert (found["server"], found["metric"]) == ("b", "cpu_pct")
    assert found["score"] > 1
    since = datetime.fromisoformat(found["since"])
    assert abs(since.timestamp() * 1000 - (START_MS + CHANGE * BIN_MS)) <= 3 * BIN_MS


def test_a_learning_training_is_for_the_whole_fleet_and_its_reference_knows_what_changed() -> None:
    (drifting,) = context(store_of(changed))["drifting"]  # type: ignore[misc]
    found = context(store_of(changed), rule="learning")
    assert found["drifting"] == []
    assert found["known_changes"] == [{name: drifting[name] for name in ("server", "metric", "changed_ms")}]


def test_nobody_is_named_where_nothing_drifts_or_nothing_is_known() -> None:
    assert context(store_of(daily))["drifting"] == []
    assert context(store_of(changed), with_baseline=False)["drifting"] == []


def test_an_export_ends_now_or_just_after_the_newest_record_of_the_data_clock() -> None:
    assert export_end("system", NOW) is None
    assert export_end("data", None) is None
    assert export_end("data", NOW) == NOW.replace(microsecond=1000)
