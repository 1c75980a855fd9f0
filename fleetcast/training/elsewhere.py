"""A training on another machine: a job as bytes, the pure function of it, and the process that carries both.

Owns: what a job holds, `train_job` (a job's bytes in, a checkpoint's bytes out, on any machine, the same to
the bit as here), the process that speaks to the cluster, and what its answer means. Does not know: Ray
(`fleetcast.cluster.ray_actors`, only ever that process), locks, the gate, files of versions.

A job is an `.npz`, never pickled: `values` (server, metric, bin), `model` (the bytes of the checkpoint that
is continued, none for fresh weights) and `told` (JSON: names, times, settings). An answer is a line of JSON,
then the checkpoint: {"node": str, "sha256": str}; without one it is {"away": why} or
{"failed": why, "exit_code": int}. Job and answer are files in memory without a name, so that a kill leaves
nothing behind.
"""

import hashlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fleetcast.errors import BadCheckpoint, ClusterAway, ExitCode, NotEnoughData, TrainingLost
from fleetcast.forecast.predictor import Forecaster
from fleetcast.forecast.registry import Version
from fleetcast.program import child_environment
from fleetcast.schema import ChangedSeries
from fleetcast.settings import DecisionSettings, ForecastSettings, Settings, TrainerSettings
from fleetcast.training.challenger import Training
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.verdict import Champion

logger = logging.getLogger(__name__)

MODULE = "fleetcast.cluster.ray_actors"  # only ever a process of its own: nothing here imports Ray
ROOM_S = 600.0  # that a training waits for a free CPU; then it runs here
_BASE_BYTES = 1_200_000_000  # Python, torch and Lightning, with their peak while they load
_COPIES = 4  # of the values at once: as they travelled, as the archive is read, and what sampling makes
_PARTS = {"forecast": ForecastSettings, "trainer": TrainerSettings, "decision": DecisionSettings}


@dataclass(frozen=True, eq=False)
class Job:
    """Everything that a training's weights depend on."""

    grid: TrainingGrid
    changed: tuple[ChangedSeries, ...]
    settings: Settings
    start: Champion | None
    epochs: int
    version_id: str
    trained_at: str

    @property
    def memory_bytes(self) -> int:
        """Return how much memory a machine must have for it."""
        return _BASE_BYTES + _COPIES * self.grid.values.nbytes

    def write(self, stream: BinaryIO) -> None:
        """Write the bytes that `read_job` reads."""
        grid, start = self.grid, self.start
        told = {
            "server_names": grid.server_names,
            "metrics": grid.metrics,
            "start_ms": grid.start_ms,
            "bin_ms": grid.bin_ms,
            "changed": [astuple(item) for item in self.changed],
            "settings": {part: asdict(getattr(self.settings, part)) for part in _PARTS},
            "start": [start.version.id, start.version.is_base] if start else None,
            **{name: getattr(self, name) for name in ("epochs", "version_id", "trained_at")},
        }
        model = start.model.to_bytes() if start else b""
        arrays = {"model": np.frombuffer(model, np.uint8), "told": _as_array(told)}
        np.savez(stream, values=grid.values, **arrays)


def _as_array(told: Mapping[str, Any]) -> Any:
    return np.frombuffer(json.dumps(told).encode(), np.uint8)


def _own(told: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}


def read_job(content: bytes) -> Job:
    """Undo `Job.write`; of the settings only what a training needs is there."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        told = json.loads(arrays["told"].tobytes())
        values, model = arrays["values"], arrays["model"].tobytes()
    names = tuple(told["server_names"]), tuple(told["metrics"])
    parts = {
        part: kind(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
        )
        for part, kind in _PARTS.items()
        for own in (told["settings"][part],)
    }
    start = None
    if told["start"]:
        version_id, is_base = told["start"]
        version = Version(version_id, Path(version_id), {}, is_base)
        start = Champion(version, Forecaster.from_bytes(model, Path(version_id)))
    return Job(
        TrainingGrid(*names, values, told["start_ms"], told["bin_ms"]),
        tuple(ChangedSeries(*item) for item in told["changed"]),
        Settings(**parts),
        start,
        told["epochs"],
        told["version_id"],
        told["trained_at"],
    )


def train_job(content: bytes) -> bytes:
    """Return the checkpoint of a job.

    Raises:
        NotEnoughData, BadCheckpoint: as `Training` does.
    """
    job = read_job(content)
    training = Training(job.grid, job.changed, job.settings, job.start, job.epochs)
    with tempfile.TemporaryDirectory() as place:
        model = training.train(job.version_id, job.trained_at, Path(place) / "state")
    return model.to_bytes()


def train_elsewhere(job: Job, room_s: float = ROOM_S) -> Forecaster:
    """Return the model of a job that another machine carried out; wait for as long as that takes.

    The process that speaks to the cluster ends with this one, and the training with it.

    Args:
        room_s: how long to wait for a free CPU.
    Raises:
        ClusterAway: no machine can do it, or each that began was lost; nothing trains any more.
        TrainingLost: it failed there, as it would here.
        NotEnoughData: the same, for want of data.
        BadCheckpoint: what came back is no model, or not this one.
    """
    retraining = job.settings.retraining
    request = {
        "address": job.settings.forecast.ray_address,
        "cpus": job.settings.trainer.threads,
        "memory_bytes": job.memory_bytes,
        "nice": retraining.training_nice,
        "room_s": room_s,
        "level": job.settings.logging.level,
    }
    ours, theirs = os.memfd_create("fleetcast-job"), os.memfd_create("fleetcast-trained")
    with os.fdopen(ours, "w+b") as sent, os.fdopen(theirs, "w+b") as received:
        job.write(sent)
        sent.flush()
        command = [sys.executable, "-m", MODULE, "train", json.dumps(request), str(ours), str(theirs)]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, env=child_environment(), pass_fds=(ours, theirs)
            )
        except OSError as error:
            raise ClusterAway(f"the process that speaks to Ray cannot be started: {error}") from error
        received.seek(0)
        content = received.read()
    return _model_of(job, content, done.returncode)


def _model_of(job: Job, content: bytes, code: int) -> Forecaster:
    """Return the model that an answer holds; raise what it says instead."""
    line, _, checkpoint = content.partition(b"\n")
    if code == -signal.SIGALRM:
        raise ClusterAway(f"the Ray cluster at {job.settings.forecast.ray_address} did not answer")
    if code or not line:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise ClusterAway(f"the process that speaks to Ray ended before the training did ({how})")
    told = json.loads(line)
    if "away" in told:
        raise ClusterAway(told["away"])
    if "failed" in told:
        is_short = told["exit_code"] == ExitCode.NOT_ENOUGH_DATA
        raise NotEnoughData(told["failed"]) if is_short else TrainingLost(told["failed"])
    place = Path(f"{job.version_id} (trained on {told['node']})")
    if hashlib.sha256(checkpoint).hexdigest() != told["sha256"]:
        raise BadCheckpoint(place, "it did not arrive whole")
    model = Forecaster.from_bytes(checkpoint, place)
    if model.version != job.version_id:
        raise BadCheckpoint(place, f"it is the model {model.version}")
    logger.info("trained on another machine node=%s size_bytes=%d", told["node"], len(checkpoint))
    return model
