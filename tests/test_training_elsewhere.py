"""A training on another machine: the same weights as here, and whatever happens there, no half model."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle_fleet import grid
from test_specialist_scope import model
from test_tft_trainer import SMALL, fleet, verdicts

import adaptive_retraining_daemon
import tft_trainer
from data_buffer import DataBuffer
from fleetcast.errors import BadCheckpoint, ClusterAway, NotEnoughData, TrainingLost
from fleetcast.forecast.registry import TRAINER_LOCK, Registry, Version
from fleetcast.locks import is_locked
from fleetcast.schema import ChangedSeries
from fleetcast.settings import Settings
from fleetcast.training import elsewhere
from fleetcast.training.challenger import Training
from fleetcast.training.elsewhere import Job, read_job, train_elsewhere, train_job
from fleetcast.training.verdict import Champion

ROOT = Path(__file__).parents[1]


def job(*changed: ChangedSeries, is_fresh: bool = False) -> Job:
    own = Settings()
    own = replace(own, trainer=replace(own.trainer, steps_per_epoch=2, hidden_size=8, batch_size=8))
    start = None if is_fresh else Champion(Version("v1", Path("v1"), {}, is_base=True), model())
    return Job(grid(3), changed, own, start, 1, "20260108T080000Z-0001", "2026-01-08T08:00:00Z")


def content(one: Job) -> bytes:
    stream = io.BytesIO()
    one.write(stream)
    return stream.getvalue()


@pytest.fixture
def becomes(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Say what becomes of trainings elsewhere."""
    monkeypatch.setattr(elsewhere, "MODULE", "fake_cluster_process")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return lambda mode: monkeypatch.setenv("FAKE_CLUSTER", mode)


@pytest.mark.parametrize(
    "one",
    [job(), job(is_fresh=True), job(ChangedSeries(1, 0, 3000))],
    ids=["continued", "fresh", "specialist"],
)
def test_a_job_as_bytes_gives_the_checkpoint_that_it_gives_here(one: Job, tmp_path: Path) -> None:
    read = read_job(content(one))
    assert (read.grid.server_names, read.changed) == (one.grid.server_names, one.changed)
    assert read.settings.trainer == one.settings.trainer
    assert read.settings.forecast == one.settings.forecast
    training = Training(one.grid, one.changed, one.settings, one.start, one.epochs)
    expected = training.train(one.version_id, one.trained_at, tmp_path / "state").weights
    found = elsewhere.Forecaster.from_bytes(train_job(content(one)), Path("found")).weights
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("mode", "error", "said"),
    [
        ("away", ClusterAway, "no room"),
        ("killed", ClusterAway, r"ended before the training did \(signal 9\)"),
        ("failed", TrainingLost, "broken auto 1 CPU"),
        ("short", NotEnoughData, "few days"),
        ("torn", BadCheckpoint, "did not arrive whole"),
        ("old", BadCheckpoint, "it is the model "),
    ],
)
def test_what_is_no_model_of_this_job_is_an_error_that_says_why(
    becomes: Callable[[str], None], mode: str, error: type[Exception], said: str
) -> None:
    becomes(mode)
    with pytest.raises(error, match=said):
        train_elsewhere(job())


def test_a_process_without_ray_is_a_cluster_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "MODULE", "no_module_of_this_name")
    with pytest.raises(ClusterAway, match="exit code 1"):
        train_elsewhere(job())


@pytest.mark.parametrize(("mode", "code"), [("trained", 0), ("away", 0), ("failed", 1)])
def test_the_trainer_keeps_its_lock_and_judges_what_comes_back(
    becomes: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    code: int,
) -> None:
    # Given the first training of a fleet, on Ray
    monkeypatch.chdir(tmp_path)
    Path("fleetcast.toml").write_text(SMALL)
    fleet().to_parquet("data.parquet")
    monkeypatch.setenv("FLEETCAST_RETRAINING_ENGINE", "ray")
    becomes(mode)
    held, run = [], subprocess.run

    def watch(*given: Any, **options: Any) -> Any:
        lock = tmp_path / "checkpoints" / TRAINER_LOCK
        held.append(is_locked(lock))
        return run(*given, **options)

    monkeypatch.setattr(elsewhere.subprocess, "run", watch)
    # When it ends
    assert tft_trainer.main(["--data", "data.parquet", "--incremental"]) == code
    # Then no other trainer could begin meanwhile, and one verdict came of it
    assert held == [True]
    (verdict,) = verdicts(tmp_path)
    versions = Registry(tmp_path / "checkpoints").version_ids()
    assert versions == ([verdict["version"]] if code == 0 else [])
    said = {"away": "trained on this machine instead reason=no room", "trained": "node=there", "failed": ""}
    assert said[mode] in capsys.readouterr().err
    assert mode != "failed" or verdict["why"].startswith("broken")


def test_a_training_from_scratch_stays_here_since_it_resumes_after_a_kill(
    becomes: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fleetcast.toml").write_text(SMALL)
    fleet().to_parquet("data.parquet")
    monkeypatch.setenv("FLEETCAST_RETRAINING_ENGINE", "ray")
    becomes("failed")
    assert tft_trainer.main(["--data", "data.parquet"]) == 0


def test_an_engine_that_is_not_installed_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fleetcast.program.find_spec", lambda _name: None)
    assert adaptive_retraining_daemon.main(["--once", "--engine", "ray"]) == 2
    said = capsys.readouterr().err
    assert "retraining.engine is ray, and Ray is not installed" in said
    assert "requirements-cluster.txt" in said


REFUSE_RAY = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ray":
            open({marker!r}, "w").close()
            raise AssertionError("Ray is imported")
sys.meta_path.insert(0, Refuse())
"""


def due_fleet(folder: Path) -> None:
    """Make a daemon's folder, with a fleet that is due for its first training."""
    folder.mkdir()
    easy = "[decision]\nhost_load_per_core = 1000.0\nhost_min_available_gb = 0.0\n"
    (folder / "fleetcast.toml").write_text(SMALL + easy)
    buffer = DataBuffer(folder / "data_buffer")
    start = f"{datetime.now(UTC) - timedelta(hours=80):%Y-%m-%dT%H:00:00Z}"
    rows = fleet(start=start).assign(timestamp=lambda rows: rows.timestamp.astype(str))
    buffer.append(rows.to_dict("records"))
    buffer.flush()
    buffer.close()


@pytest.mark.slow
def test_a_local_check_and_its_training_touch_no_ray_in_any_process(tmp_path: Path) -> None:
    # Given a hook in every Python of this environment, and a fleet that is due for its first training
    marker, hooks, folder = tmp_path / "touched", tmp_path / "hooks", tmp_path / "fleet"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(REFUSE_RAY.format(marker=str(marker)))
    due_fleet(folder)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(hooks), str(ROOT)])}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *words]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    # When the daemon checks and trains, each in processes of their own
    program = str(ROOT / "adaptive_retraining_daemon.py")
    done = run(
        program, "--once", "--clock", "data", "--engine", "local", "--daemon-url", "http://127.0.0.1:9"
    )
    # Then none of them touched Ray; with `--engine ray` the hook sees it
    assert verdicts(folder), done
    assert not marker.exists()
    assert run("-c", "import fleetcast.cluster.ray_actors").returncode == 1
    assert marker.exists()
