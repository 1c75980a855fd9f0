"""Claims about the trainer as a program: its flags, its verdicts, what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import tft_trainer
from data_buffer import DataBuffer
from fleetcast.drift.literal.baseline import Baseline
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.files import write_json
from fleetcast.forecast.predictor import Forecaster
from fleetcast.forecast.registry import REFERENCE_FILE, TRAINER_LOCK, Registry
from fleetcast.locks import OwnerLock
from fleetcast.training import fit

ROOT = Path(__file__).parents[1]
SMALL = """
[paths]
models_dir = "no_models"
[bins]
forecast_metrics = ["cpu_pct", "mem_pct"]
[trainer]
hidden_size = 8
base_epochs = 2
epochs = 1
steps_per_epoch = 30
batch_size = 32
incremental_batch_size = 32
learning_rate = 0.01
"""


def fleet(n_hour: float = 80, *, start: str = "2026-01-05T00:00:00Z", seed: int = 0) -> pd.DataFrame:
    """Return three servers in 5-minute rows, noise around a level: now and yesterday mislead."""
    random = np.random.default_rng(seed)
    n_bin = int(n_hour * 12)
    times = pd.Timestamp(start) + pd.to_timedelta(np.arange(n_bin) * 300, unit="s")
    rows = []
    for index in range(3):
        rows.append(
            pd.DataFrame(
                {
                    "timestamp": times,
                    "server_name": f"web-{index}",
                    "cpu_pct": 40 + 10 * index + random.normal(0, 5, n_bin),
                    "mem_pct": 50 + random.normal(0, 8, n_bin),
                }
            )
        )
    return pd.concat(rows, ignore_index=True)


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleetcast.toml").write_text(SMALL)
    return tmp_path


def verdicts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "checkpoints/attempts").glob("*.json"))]


def test_help_needs_neither_torch_nor_pandas() -> None:
    code = (
        "import sys, tft_trainer\n"
        "try: tft_trainer.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = ('torch', 'pandas', 'pyarrow', 'lightning', 'scipy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--incremental" in done.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--data FILE is needed"),
        (["--data", "absent.parquet"], "absent.parquet is not a file"),
        (["--rollback", "--incremental"], "--rollback stands alone"),
        (["--data", "x", "--config", "absent.toml"], "absent.toml does not exist"),
    ],
)
def test_wrong_usage_says_what_would_be_right(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str], workplace: Path
) -> None:
    assert tft_trainer.main(flags) == 2
    assert said in capsys.readouterr().err
    assert not (workplace / "checkpoints").exists()


def test_epochs_below_one_are_refused() -> None:
    with pytest.raises(SystemExit) as end:
        tft_trainer.main(["--data", "x", "--epochs", "0"])
    assert end.value.code == 2


def test_a_second_trainer_exits_4_and_names_the_first(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet().to_parquet("data.parquet")
    with OwnerLock(workplace / "checkpoints" / TRAINER_LOCK, "a trainer"):
        assert tft_trainer.main(["--data", "data.parquet"]) == 4
    assert f"pid {os.getpid()}" in capsys.readouterr().err


def test_too_little_data_exits_5_and_leaves_its_reason(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet(40).to_parquet("data.parquet")
    assert tft_trainer.main(["--data", "data.parquet"]) == 5
    assert "h of 48 h" in capsys.readouterr().err
    (verdict,) = verdicts(workplace)
    assert verdict["exit_code"] == 5
    assert "of 48 h" in verdict["why"]
    assert "promoted" not in verdict
    assert Registry(workplace / "checkpoints").version_ids() == []


def test_data_without_a_forecast_metric_fails_with_what_it_has(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet().rename(columns={"cpu_pct": "a", "mem_pct": "b"}).to_parquet("data.parquet")
    assert tft_trainer.main(["--data", "data.parquet"]) == 1
    assert "it has timestamp, server_name, a, b" in capsys.readouterr().err


def test_rolling_back_without_a_model_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert tft_trainer.main(["--rollback"]) == 1
    assert "nothing to roll back" in capsys.readouterr().err


@pytest.mark.slow
def test_a_base_then_an_increment_then_a_rollback(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Given a fleet that neither now nor yesterday forecasts
    fleet().to_parquet("data.parquet")
    registry = Registry(workplace / "checkpoints")
    # When asked to continue a model where there is none
    monkeypatch.setenv("TFT_ATTEMPT_ID", "20260108T080000Z-0001")
    assert tft_trainer.main(["--data", "data.parquet", "--incremental", "--epochs", "1"]) == 0
    # Then a base was trained, beat the fallback and serves
    base = registry.current()
    assert base is not None
    assert base.manifest["kind"] == "base"
    assert base.parent is None
    assert base.manifest["training"]["epochs"] == 2
    assert base.manifest["verdict"]["compared_with"] == "fallback"
    assert base.manifest["attempt_id"] == "20260108T080000Z-0001"
    assert base.manifest["data_range"] == {"start": "2026-01-05T00:00:00Z", "end": "2026-01-08T08:00:00Z"}
    base.verify()
    assert Forecaster.load(base.model_path).version == base.id
    (verdict,) = verdicts(workplace)
    assert (verdict["promoted"], verdict["version"], verdict["exit_code"]) == (True, base.id, 0)
    assert verdict["why"].startswith("better: ")
    # and its baseline is in force, with the errors to expect
    in_force = registry.baseline_in_force()
    assert in_force is not None
    assert (
        Reference.load(in_force.reference_path).server_names
        == Baseline.load(in_force.baseline_path).server_names
    )
    in_force.verify(REFERENCE_FILE)
    baseline = Baseline.load(in_force.baseline_path)
    assert (baseline.version, baseline.metrics, len(baseline.server_names)) == (
        base.id,
        ("cpu_pct", "mem_pct"),
        3,
    )
    assert np.isfinite(baseline.error_mae[:, 0]).all()

    # When it is continued on later data with a metric it has not seen
    (workplace / "fleetcast.toml").write_text(SMALL.replace('"mem_pct"', '"mem_pct", "disk_io_mb_s"'))
    later = fleet(120, seed=1)
    later["disk_io_mb_s"] = later.cpu_pct / 10
    later.to_parquet("data.parquet")
    monkeypatch.setenv("TFT_ATTEMPT_ID", "20260110T000000Z-0002")
    assert tft_trainer.main(["--data", "data.parquet", "--incremental", "--epochs", "1"]) == 0
    # Then there is a second version with the first as parent, promoted or not, and the first is untouched
    newest = registry.version(registry.version_ids()[-1])
    assert newest.parent == base.id
    assert newest.manifest["kind"] == "incremental"
    assert newest.manifest["training"]["epochs"] == 1
    assert newest.manifest["verdict"]["compared_with"] == base.id
    assert newest.manifest["metrics"] == ["cpu_pct", "mem_pct", "disk_io_mb_s"]
    base.verify()
    in_force = registry.baseline_in_force()
    assert in_force is not None
    assert in_force.id == newest.id
    assert registry.current_id() == (newest.id if newest.is_promoted else base.id)

    # When the second is in service and rolled back
    registry.promote(newest.id)
    monkeypatch.delenv("TFT_ATTEMPT_ID")
    assert tft_trainer.main(["--rollback"]) == 0
    assert base.id in capsys.readouterr().out
    assert registry.current_id() == base.id
    assert not (workplace / "lightning_logs").exists()
    assert {path.name for path in workplace.iterdir()} == {"checkpoints", "data.parquet", "fleetcast.toml"}


@pytest.mark.slow
def test_a_sample_leaves_the_drift_reference_of_the_other_servers(workplace: Path) -> None:
    # Given a model, and a drift reference, of six servers, of which one is not in the buffer any more
    rows = pd.concat([fleet(), fleet(seed=1).replace({"server_name": r"web"}, "db", regex=True)])
    rows.to_parquet("data.parquet")
    buffer = DataBuffer(workplace / "data_buffer", expire=False)
    buffer.append(rows[(rows.server_name != "db-2") & (rows.timestamp >= "2026-01-07")].to_dict("records"))
    buffer.close()
    assert tft_trainer.main(["--data", "data.parquet", "--epochs", "1"]) == 0
    # When the next training holds five of them
    write_json(workplace / "training_context.json", {"drifting": [{"server": "web-1", "metric": "cpu_pct"}]})
    (workplace / "fleetcast.toml").write_text(SMALL + "max_cells = 10_000\n")
    assert tft_trainer.main(["--data", "data.parquet", "--incremental", "--epochs", "1"]) == 0
    # Then the server that drifts is one of the five, and what was known of the others is known still
    in_force = Registry(workplace / "checkpoints").baseline_in_force()
    assert in_force is not None
    trained_on = set(Baseline.load(in_force.baseline_path).server_names)
    assert len(trained_on) == 5
    assert "web-1" in trained_on
    known = set(Reference.load(in_force.reference_path).server_names)
    assert known == trained_on | (set(rows.server_name) - {"db-2"})


@pytest.mark.slow
def test_a_trainer_that_cannot_beat_what_serves_is_not_promoted_and_says_so(workplace: Path) -> None:
    # Given noise: no model can beat the fallback by much, and two steps teach nothing
    frame = fleet()
    random = np.random.default_rng(5)
    for metric in ("cpu_pct", "mem_pct"):
        frame[metric] = 50 + random.normal(0, 0.01, len(frame)).cumsum()
    frame.to_parquet("data.parquet")
    (workplace / "fleetcast.toml").write_text(
        SMALL.replace("steps_per_epoch = 30", "steps_per_epoch = 1").replace(
            "base_epochs = 2", "base_epochs = 1"
        )
    )
    assert tft_trainer.main(["--data", "data.parquet"]) == 0
    (verdict,) = verdicts(workplace)
    registry = Registry(workplace / "checkpoints")
    assert verdict["promoted"] is False
    assert verdict["why"].startswith("not better")
    assert registry.current_id() is None
    in_force = registry.baseline_in_force()
    assert in_force is not None
    assert in_force.id == verdict["version"]


@pytest.mark.slow
def test_a_killed_trainer_leaves_what_was_and_goes_on_where_it_stood(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a trainer in the third of its epochs
    fleet().to_parquet("data.parquet")
    (workplace / "fleetcast.toml").write_text(SMALL.replace("base_epochs = 2", "base_epochs = 6"))
    command = [sys.executable, str(ROOT / "tft_trainer.py"), "--data", "data.parquet"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "epoch trained epoch=2/6" in line:
            break
    # When it is killed
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    # Then nothing serves, nothing half-written has a name, and the lock is free
    registry = Registry(workplace / "checkpoints")
    assert registry.version_ids() == []
    assert registry.current_id() is None
    assert verdicts(workplace) == []
    with OwnerLock(workplace / "checkpoints" / TRAINER_LOCK, "a trainer"):
        pass
    # When it is started again
    told: list[str] = []
    monkeypatch.setattr(fit.logger, "info", lambda text, *given: told.append(text % given))
    assert tft_trainer.main(["--data", "data.parquet"]) == 0
    # Then it resumes from its state file, and leaves no state
    assert told[0].startswith("training resumes epoch=")
    assert len(told) in (5, 6)  # that line, and four or five of the six epochs
    assert not (workplace / "checkpoints" / tft_trainer.BASE_STATE_FILE).exists()
    assert len(registry.version_ids()) == 1


@pytest.mark.slow
def test_a_change_moves_only_what_changed_and_the_shipped_base_is_trained_like_one(workplace: Path) -> None:
    # Given a base that is shipped, and the first training of a fleet whose clients get the model's own
    # forecasts: the expert layer follows a change like this one by itself, and no training beats that
    with (workplace / "fleetcast.toml").open("a") as config:
        config.write('[forecast]\nfeedback = "off"\n')
    fleet(90, seed=3).to_parquet("data.parquet")
    assert tft_trainer.main(["--data", "data.parquet", "--checkpoint-dir", "no_models"]) == 0
    base_id = Registry(workplace / "no_models").current_id()
    registry = Registry(workplace / "checkpoints", workplace / "no_models")
    fleet().to_parquet("data.parquet")
    assert tft_trainer.main(["--data", "data.parquet", "--incremental", "--epochs", "1"]) == 0
    first = registry.version(registry.version_ids()[-1])
    assert (first.parent, first.manifest["kind"]) == (base_id, "incremental")
    assert first.manifest["training"]["epochs"] == 2, "as long as a base"
    registry.promote(first.id)

    # When one series changes for good and the context of a training names it
    later = fleet(110)
    is_changed = (later.server_name == "web-1") & (later.timestamp >= pd.Timestamp("2026-01-08T14:00:00Z"))
    later.loc[is_changed, "cpu_pct"] = 95.0
    later.to_parquet("data.parquet")
    told = {"server": "web-1", "metric": "cpu_pct", "since": "2026-01-08T14:00:00Z"}
    (workplace / "training_context.json").write_text(json.dumps({"drifting": [told]}))
    assert tft_trainer.main(["--data", "data.parquet", "--incremental", "--epochs", "2"]) == 0

    # Then the fleet's weights are what they were, and the series has weights of its own
    newest = registry.version(registry.version_ids()[-1])
    before, after = Forecaster.load(first.model_path), Forecaster.load(newest.model_path)
    for name, weights in before.weights.items():
        assert bool((after.weights[name] == weights).all()), name
    (own,) = after.specialists
    assert list(own.changed_ms) == [("web-1", "cpu_pct")]
    assert newest.manifest["specialists"] == [[["web-1", "cpu_pct"]]]
    assert newest.manifest["verdict"]["figures"]["unchanged"]["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert newest.is_promoted, newest.manifest["verdict"]["why"]
