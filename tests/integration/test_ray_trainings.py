"""A training on another machine: a Ray cluster of two nodes on this machine, one of which has a CPU."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_tft_trainer import fleet, verdicts
from test_training_elsewhere import due_fleet

from fleetcast.forecast.predictor import Forecaster
from fleetcast.forecast.registry import Registry

cluster_utils = pytest.importorskip("ray.cluster_utils", reason="requirements-cluster.txt is not installed")
ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MEMORY = 200 * 2**20  # of a node's object store
SMALL = """
[bins]
forecast_metrics = ["cpu_pct", "mem_pct"]
[trainer]
base_epochs = 4
steps_per_epoch = 60
incremental_batch_size = 32
"""


class Trainer:
    """A trainer in a folder of its own, as the daemon starts it."""

    def __init__(self, folder: Path, address: str) -> None:
        folder.mkdir()
        self.folder = folder
        (folder / "fleetcast.toml").write_text(SMALL)
        fleet().to_parquet(folder / "data.parquet")
        own = {"FLEETCAST_FORECAST_RAY_ADDRESS": address, "FLEETCAST_RETRAINING_ENGINE": "ray"}
        self._log = folder / "log"
        with self._log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "tft_trainer.py"), "--data", "data.parquet", "--incremental"],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(own if address else {})},
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_for(self, words: str) -> None:
        wait_until(lambda: words in self.said or self.process.poll() is not None, lambda: self.said)
        assert words in self.said, self.said

    def weights(self) -> dict[str, Any]:
        """Return what it trained, once it ended well."""
        assert self.process.wait(180) == 0, self.said
        registry = Registry(self.folder / "checkpoints")
        (version_id,) = registry.version_ids()
        assert [verdict["version"] for verdict in verdicts(self.folder)] == [version_id]
        return dict(Forecaster.load(registry.version(version_id).model_path).weights)


def wait_until(is_so: Callable[[], bool], said: Callable[[], str] = str, limit_s: float = 120) -> None:
    end = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < end, said()
        time.sleep(0.1)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Start a head without a CPU, which the daemon's machine is, and a node that has one."""
    made = cluster_utils.Cluster(
        initialize_head=True,
        connect=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": MEMORY},
    )
    node = made.add_node(num_cpus=1, object_store_memory=MEMORY)
    yield made, node
    ray.shutdown()
    made.shutdown()


def test_the_other_node_trains_and_whatever_is_killed_one_model_comes_of_it(
    cluster: Any, tmp_path: Path
) -> None:
    made, node = cluster
    expected = Trainer(tmp_path / "here", "").weights()
    # the other node trains, and the weights are the same to the bit
    there = Trainer(tmp_path / "there", made.address)
    found = there.weights()
    assert "a training begins on another machine" in there.said
    assert f"node={node.node_id[:12]}" in there.said
    assert "there | epoch trained epoch=4/4" in there.said
    assert "instead" not in there.said
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    # the trainer is killed: the training ends with it, and nothing is left
    killed = Trainer(tmp_path / "killed", made.address)
    killed.wait_for("there | epoch trained epoch=1/4")
    assert ray.available_resources().get("CPU", 0) == 0
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait()
    wait_until(lambda: ray.available_resources().get("CPU", 0) == 1)
    assert Registry(killed.folder / "checkpoints").version_ids() == []
    # the node is killed: the trainer trains, as there is no other one
    lost = Trainer(tmp_path / "lost", made.address)
    lost.wait_for("there | epoch trained epoch=1/4")
    made.remove_node(node, allow_graceful=False)
    again = lost.weights()
    assert "trained on this machine instead reason=the training was lost with" in lost.said
    assert "; no machine of the Ray cluster has 1 CPU" in lost.said
    for name, array in expected.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_without_a_cluster_a_training_runs_here(tmp_path: Path) -> None:
    away = Trainer(tmp_path / "away", "127.0.0.1:9")
    away.weights()
    assert "instead reason=the Ray cluster at 127.0.0.1:9 did not answer" in away.said


def test_a_check_of_the_daemon_trains_there_and_without_the_head_here(cluster: Any, tmp_path: Path) -> None:
    # Given a fleet that is due for its first training
    made, node = cluster
    folder = tmp_path / "fleet"
    due_fleet(folder)
    settings = (folder / "fleetcast.toml").read_text().replace("steps_per_epoch = 30", "steps_per_epoch = 60")
    (folder / "fleetcast.toml").write_text(settings)
    program = str(ROOT / "adaptive_retraining_daemon.py")
    log = folder / "log"
    # When the daemon checks, and the head is lost in the training
    with log.open("wb") as stream:
        daemon = subprocess.Popen(
            [sys.executable, program, "--once", "--engine", "ray", "--daemon-url", "http://127.0.0.1:9"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "FLEETCAST_FORECAST_RAY_ADDRESS": made.address},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: "there | epoch trained epoch=1/" in log.read_text(), log.read_text)
        assert f"node={node.node_id[:12]}" in log.read_text()
        ray.shutdown()
        made.remove_node(made.head_node, allow_graceful=False)
        # Then the training ends here, with its verdict
        assert daemon.wait(150) == 0, log.read_text()
    finally:
        daemon.kill()
        daemon.wait()
    assert "trained on this machine instead reason=" in log.read_text()
    (verdict,) = verdicts(folder)
    assert Registry(folder / "checkpoints").version_ids() == [verdict["version"]]
