"""kill -9 around a training: of the trainer, of the retraining daemon, of all daemons at once.

Every try begins in a copy of one prepared folder: 52 h of a small fleet, so that the initial
training is due. The kill comes at a random moment of the attempt; then the daemons start again
and everything on disk has to add up.
"""

import os
import random
import shutil
import signal
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.parts.feed import START, Feeder, Fleet, Tally, count_records
from benchmarks.programs import InferenceDaemon, Program, wait_for
from data_buffer import DataBuffer
from fleetcast.clock import monotonic, sleep
from fleetcast.errors import BadCheckpoint
from fleetcast.files import read_json, read_json_lines
from fleetcast.forecast.registry import ATTEMPT_LOCK, TRAINER_LOCK, Registry
from fleetcast.locks import is_locked

PREPARED_HOURS = 52
PREPARED_STEPS = PREPARED_HOURS * 60
TRAINING_LIMIT_S = 90.0  # a whole training of this size takes about 10 s
SMALL = """\
[paths]
models_dir = "no_models"
[trainer]
base_epochs = 1
epochs = 1
steps_per_epoch = 4
batch_size = 16
hidden_size = 16
threads = 1
[decision]
host_load_per_core = 1000.0
host_min_available_gb = 0.1
[retraining]
request_timeout_s = 1.0
"""
TRAINER, DAEMON, EVERYTHING = "trainer", "daemon", "everything"


def prepare(folder: Path, fleet: Fleet) -> Path:
    """Fill a folder with settings and `PREPARED_HOURS` of records; return it."""
    folder.mkdir(parents=True)
    (folder / "fleetcast.toml").write_text(SMALL, encoding="utf-8")
    buffer = DataBuffer(str(folder / "data_buffer"), expire=False)
    for hour in range(PREPARED_HOURS):
        buffer.append([r for step in range(60 * hour, 60 * hour + 60) for r in fleet.records(step)])
    buffer.flush()
    buffer.maintain(START + timedelta(hours=PREPARED_HOURS))
    buffer.close()
    return folder


class RetrainingDaemon(Program):
    """The retraining daemon with checks twice a second."""

    def __init__(self, folder: Path, url: str = "http://127.0.0.1:9", *flags: str) -> None:
        super().__init__(
            "adaptive_retraining_daemon.py", folder,
            "--clock", "data", "--interval", "0.5", "--daemon-url", url, *flags,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Return the state file; {} before there is one."""
        try:
            return read_json(self.folder / "retraining_state.json")
        except FileNotFoundError:
            return {}

    def attempts(self) -> list[dict[str, Any]]:
        """Return all attempts, newest first."""
        return list(self.state().get("attempts", []))

    def is_training(self) -> bool:
        """Whether the newest attempt runs and its process was made."""
        return any(a["outcome"] == "running" and a["pid"] for a in self.attempts())

    def is_idle(self) -> bool:
        """Whether there was an attempt and every one has ended."""
        attempts = self.attempts()
        return bool(attempts) and all(a["outcome"] != "running" for a in attempts)


def kill_around_training(folder: Path, target: str, n_kills: int, *, seed: int = 3) -> Tally:
    """Kill `target` at `n_kills` random moments of an attempt, each in a folder of its own."""
    chance = random.Random(f"{seed} {target}")
    fleet = Fleet(n_servers=3)
    prepared = prepare(folder / "prepared", fleet)
    total = Tally()
    for number in range(n_kills):
        work = folder / f"{target}-{number:02d}"
        shutil.copytree(prepared, work, symlinks=True)
        delay_s = chance.uniform(0.0, 9.0)
        if target == EVERYTHING:
            _one_kill_of_all(work, fleet, delay_s, total)
        else:
            _one_kill(work, target, delay_s, total)
        shutil.rmtree(work)
    return total


def _one_kill(work: Path, target: str, delay_s: float, total: Tally) -> None:
    with RetrainingDaemon(work) as daemon:
        wait_for("a training", daemon.is_training)
        sleep(delay_s)
        if target == TRAINER:
            kill_all(training_processes(work))
        else:
            daemon.kill()
            daemon.start()
        began_s = monotonic()
        wait_for(f"the end of the attempt\n{daemon.output}", daemon.is_idle, TRAINING_LIMIT_S)
        total.recovered_s.append(monotonic() - began_s)
        assert daemon.stop() == 0, daemon.output
    _check_trainings(work, daemon, total)


def _one_kill_of_all(work: Path, fleet: Fleet, delay_s: float, total: Tally) -> None:
    inference = InferenceDaemon(work, "--clock", "data")
    n_steps = PREPARED_STEPS + 60
    with inference, RetrainingDaemon(work, inference.url) as daemon:
        feeder = Feeder(fleet, inference.url, PREPARED_STEPS, n_steps, pause_s=0.05)
        feeder.start()
        wait_for("a training", daemon.is_training)
        sleep(delay_s)
        inference.kill()
        daemon.kill()
        kill_all(training_processes(work))
        began_s = monotonic()
        inference.start()
        daemon.start()
        wait_for(f"the end of the attempt\n{daemon.output}", daemon.is_idle, TRAINING_LIMIT_S)
        total.recovered_s.append(monotonic() - began_s)
        wait_for("the rest of the replay", lambda: not feeder.is_alive(), 120)
        assert not feeder.failure, feeder.failure
        assert daemon.stop() == 0, daemon.output
        assert inference.stop() == 0, inference.output
    total.acknowledged += feeder.tally.acknowledged
    count_records(work, fleet, n_steps, total)
    _check_trainings(work, daemon, total)


def training_processes(work: Path) -> list[psutil.Process]:
    """Return supervisor, exporter and trainer that work in this folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = " ".join(process.info["cmdline"] or ())
        is_ours = process.info["cwd"] == str(work) or str(work) in words
        if is_ours and any(name in words for name in ("retraining.supervisor", "tft_trainer.py", "--export")):
            found.append(process)
    return found


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL each of them that is still there."""
    for process in processes:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _check_trainings(work: Path, daemon: RetrainingDaemon, total: Tally) -> None:
    """Count as lost an uncounted training, as doubled one counted twice, as wrong what does not fit."""
    state = daemon.state()
    attempts = state["attempts"]
    started = {path.stem for path in (work / "checkpoints" / "runs").glob("*.*")}
    total.lost += len(started - {attempt["id"] for attempt in attempts})
    verdicts = [a for a in attempts if a["outcome"] in ("promoted", "rejected")]
    total.lost += max(0, len(verdicts) - len(state["trainings"]))
    total.doubled += max(0, len(state["trainings"]) - len(verdicts))
    failed = [a for a in attempts if a["outcome"] == "failed"]
    total.lost += bool(failed and not verdicts) and state["backoff"]["failures"] < 1
    promoted = [a for a in attempts if a["outcome"] == "promoted"]
    total.wrong += state["total_trainings"] != len(promoted)
    total.wrong += len(list(read_json_lines(work / "decisions.jsonl"))) == 0
    total.wrong += any(is_locked(work / "checkpoints" / name) for name in (ATTEMPT_LOCK, TRAINER_LOCK))
    total.wrong += not _is_servable(work, promoted)


def _is_servable(work: Path, promoted: list[dict[str, Any]]) -> bool:
    """Whether every version there is whole, and a promoted one is in service."""
    registry = Registry(work / "checkpoints")
    current = registry.current()
    try:
        for version_id in registry.version_ids():
            registry.version(version_id).verify()
    except BadCheckpoint:
        return False
    if not promoted:
        return True
    return current is not None and current.id == promoted[0]["version"]
