"""The retraining daemon as a process: signals, deaths, adoption, and what it imports."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from small_fleet import SmallFleet, quiet_answers
from told_daemon import Told

from benchmarks.programs import Program, wait_for
from fleetcast.files import read_json
from fleetcast.locks import is_locked, read_pid
from fleetcast.retraining.state import load_state

ROOT = Path(__file__).parents[2]
DAEMON = "adaptive_retraining_daemon.py"
CONFIG = """
[clock]
mode = "data"
[decision]
min_hours_between_training = 0.0
max_trainings_per_week = 1000000
host_load_per_core = 1000.0
host_min_available_gb = 0.0
[retraining]
request_timeout_s = 60.0
training_nice = 0
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A fleet with data enough for its first training, and a trainer that does as it is told."""
    shutil.copy(ROOT / "tests" / "data" / "stand_in_trainer.py", tmp_path / "tft_trainer.py")
    (tmp_path / "fleetcast.toml").write_text(CONFIG)
    fleet = SmallFleet(tmp_path)
    fleet.grow(700)
    fleet.buffer.close()
    yield tmp_path
    tell(tmp_path, "done")
    wait_for("the last attempt to end", lambda: not is_training(tmp_path))


@pytest.fixture
def told() -> Iterator[Told]:
    with Told() as daemon:
        daemon.answers = quiet_answers(None)
        yield daemon


def daemon(folder: Path, url: str, *flags: str, interval: float = 0.2) -> Program:
    environ = {"PYTHONPATH": str(ROOT)}  # for the stand-in, which is not where the package is
    return Program(DAEMON, folder, "--daemon-url", url, "--interval", str(interval), *flags, environ=environ)


def tell(folder: Path, order: str) -> None:
    """Tell the stand-in trainer what to do, in one step."""
    (folder / "order.tmp").write_text(order)
    (folder / "order.tmp").replace(folder / "stand_in.txt")


def is_training(folder: Path) -> bool:
    return is_locked(folder / "checkpoints" / "attempt.lock")


def is_at_work(folder: Path) -> bool:
    return is_locked(folder / "checkpoints" / "trainer.lock")


def state(folder: Path) -> dict[str, Any]:
    return read_json(folder / "retraining_state.json")


def outcomes(folder: Path) -> list[str]:
    with suppress(FileNotFoundError):
        return [attempt["outcome"] for attempt in state(folder)["attempts"]]
    return []


@pytest.mark.slow
def test_the_checks_go_on_while_a_training_runs_and_its_progress_is_in_the_log(
    folder: Path, told: Told
) -> None:
    tell(folder, "wait")
    with daemon(folder, told.url) as running:
        wait_for("the trainer", lambda: is_at_work(folder))
        lines = (folder / "decisions.jsonl").read_text().count("\n")
        wait_for(
            "three more checks", lambda: (folder / "decisions.jsonl").read_text().count("\n") >= lines + 3
        )
        decision = json.loads((folder / "decisions.jsonl").read_text().splitlines()[-1])
        assert (decision["outcome"], decision["rule"]) == ("training", "initial")
        tell(folder, "rejected")
        wait_for("the verdict", lambda: "rejected" in outcomes(folder))
        wait_for("its line", lambda: "outcome=rejected" in (folder / "retraining_daemon.log").read_text())
        assert " | stand-in: wait, data True" in (folder / "retraining_daemon.log").read_text()
        assert running.stop() == 0


@pytest.mark.slow
def test_a_stop_waits_for_no_training_and_leaves_the_training_to_the_next_start(
    folder: Path, told: Told
) -> None:
    tell(folder, "wait")
    with daemon(folder, told.url, interval=300) as first:
        wait_for("the trainer", lambda: is_at_work(folder))
        assert first.stop(limit_s=20.0) == 0
    assert is_at_work(folder), "a running training is not wasted"
    assert outcomes(folder) == ["running"]
    with daemon(folder, told.url, "--mode", "advise") as second:
        wait_for("the adoption", lambda: "training found" in second.output)
        tell(folder, "promoted")
        wait_for("the verdict", lambda: outcomes(folder) == ["promoted"])
        assert second.stop() == 0
    assert (state(folder)["total_trainings"], len(state(folder)["trainings"])) == (1, 1)


@pytest.mark.slow
def test_a_training_that_ends_while_nobody_looks_is_counted_once(folder: Path, told: Told) -> None:
    tell(folder, "wait")
    with daemon(folder, told.url) as first:
        wait_for("the trainer", lambda: is_at_work(folder))
        first.kill()
    tell(folder, "promoted")
    wait_for("the end", lambda: not is_training(folder))
    for _ in range(2):
        assert daemon(folder, told.url, "--once", "--mode", "advise").run() == 0
    assert outcomes(folder) == ["promoted"]
    assert state(folder)["total_trainings"] == 1


def test_a_stop_is_not_held_up_by_an_inference_daemon_that_hangs(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with daemon(folder, url) as running:
            connection, _ = silent.accept()
            with connection:
                assert running.stop(limit_s=20.0) == 0, "its answer would be waited for a minute"


def test_a_second_daemon_is_refused_and_once_beside_it_only_looks(folder: Path, told: Told) -> None:
    told.answers = {}
    with daemon(folder, told.url, "--mode", "advise", interval=300) as running:
        wait_for("the first check", lambda: (folder / "drift_metrics.json").exists())
        wait_for("its end", lambda: (folder / "retraining_metrics.prom").exists())
        second = daemon(folder, told.url)
        assert second.run() == 4
        assert f"pid {running.process.pid}" in second.output
        before = {path: path.stat().st_mtime_ns for path in folder.glob("*.json*")}
        log = (folder / "retraining_daemon.log").read_bytes()
        assert daemon(folder, told.url, "--once").run() == 0
        assert "only checked, nothing trained or written" in second.output
        assert {path: path.stat().st_mtime_ns for path in folder.glob("*.json*")} == before
        assert (folder / "retraining_daemon.log").read_bytes() == log


def test_a_folder_that_cannot_be_written_is_exit_3(tmp_path: Path) -> None:
    (tmp_path / ".retraining_daemon.lock").mkdir()
    failed = daemon(tmp_path, "http://127.0.0.1:9")
    assert failed.run() == 3
    assert "cannot open .retraining_daemon.lock" in failed.output


@pytest.mark.slow
def test_whoever_is_killed_at_whatever_moment_every_training_is_counted_once(
    folder: Path, told: Told
) -> None:
    chance = random.Random(11)
    for _ in range(8):
        tell(folder, chance.choice(["wait", "rejected", "promised"]))
        with daemon(folder, told.url) as running:
            if chance.random() < 0.75:
                wait_for("an attempt", lambda: is_training(folder) or is_backing_off(folder))
            time.sleep(chance.uniform(0.0, 3.0))
            victims = chance.choice([["daemon"], ["trainer"], ["supervisor"], ["daemon", "trainer"]])
            for victim in victims:
                kill(victim, folder, running)
            tell(folder, "rejected")
            time.sleep(chance.uniform(0.0, 1.0))
            running.kill()
        forget_the_back_off(folder)
    wait_for("the last attempt to end", lambda: not is_training(folder))
    assert daemon(folder, told.url, "--once", "--mode", "advise").run() == 0
    found = load_state(folder / "retraining_state.json")
    left = {path.stem for path in (folder / "checkpoints" / "attempts").glob("*.json")}
    broken = {attempt.id for attempt in found.attempts if attempt.outcome == "failed"}
    counted = [stamp.attempt for stamp in found.log.stamps]
    assert sorted(counted) == sorted(left - broken), "each verdict once, and no other"
    assert len(found.attempts) >= 3
    assert not any(attempt.is_running for attempt in found.attempts)
    for path in folder.glob("*.json"):
        json.loads(path.read_text())


def kill(victim: str, folder: Path, running: Program) -> None:
    """SIGKILL one process of the pair, if it lives at this moment."""
    pid = running.process.pid if victim == "daemon" else None
    if victim == "trainer" and is_at_work(folder):
        pid = read_pid(folder / "checkpoints" / "trainer.lock")
    if victim == "supervisor" and is_training(folder):
        with suppress(FileNotFoundError):
            pid = next((a["pid"] for a in state(folder)["attempts"] if a["outcome"] == "running"), None)
    if pid:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_backing_off(folder: Path) -> bool:
    """Whether this daemon found that the last round's attempt had failed."""
    with suppress(FileNotFoundError):
        return bool(state(folder)["backoff"]["failures"])
    return False


def forget_the_back_off(folder: Path) -> None:
    """The test has no 15 minutes."""
    with suppress(FileNotFoundError):
        known = state(folder)
        known["backoff"] = {"failures": 0, "since": None, "length_s": 0.0}
        (folder / "retraining_state.json").write_text(json.dumps(known))


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["adaptive_retraining_daemon.py", "--help"], {"torch", "scipy", "pandas", "pyarrow"}),
        (["adaptive_retraining_daemon.py", "--once"], {"torch", "scipy.stats", "pandas"}),
        (["drift_monitor.py", "--help"], {"torch", "scipy", "pandas", "pyarrow"}),
        (["drift_monitor.py"], {"torch", "scipy.stats", "pandas"}),
    ],
)
def test_a_check_does_not_wait_for_what_it_does_not_need(
    tmp_path: Path, arguments: list[str], absent: set[str]
) -> None:
    (tmp_path / "data_buffer" / "log").mkdir(parents=True)  # an empty buffer: there is somewhere to look
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / arguments[0]), *arguments[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "fleetcast.errors" in imported
    assert absent.isdisjoint(imported)
