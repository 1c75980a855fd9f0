"""An attempt as real processes: how each end is understood, by the daemon that began it or a later one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from odd_files import KINDS, put

from fleetcast.files import read_json, write_json
from fleetcast.forecast.registry import ATTEMPT_LOCK, Registry
from fleetcast.locks import OwnerLock, is_locked
from fleetcast.retraining.attempts import Attempts, Step
from fleetcast.retraining.state import Attempt

ROOT = Path(__file__).parents[1]
STAND_IN = ROOT / "tests" / "data" / "stand_in_trainer.py"
FOLDER = Path("checkpoints")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty folder; end what a failed test may have left running."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield
    (tmp_path / "stand_in.txt").write_text("done")
    for path in (tmp_path / "checkpoints" / "pids").glob("*"):
        pid = int(path.name)
        if Path(f"/proc/{pid}").exists():
            os.killpg(pid, signal.SIGKILL)


def attempts(timeout_s: float = 60.0) -> Attempts:
    return Attempts(Registry(FOLDER), timeout_s=timeout_s, nice=0)


def steps(script: Path = STAND_IN) -> list[Step]:
    command = [sys.executable, str(script), "--data", "export.parquet", "--incremental", "--epochs", "5"]
    return [Step(command, {})]


def begun(order: str, own: Attempts, version_before: str | None = None) -> Attempt:
    Path("stand_in.txt").write_text(order)
    attempt = Attempt("20260115T100000Z-aaaa", "drift", "", "2026-01-15T10:00:00", version_before)
    assert own.reserve()
    spawned = own.spawn(attempt, steps())
    (FOLDER / "pids").mkdir(exist_ok=True)
    (FOLDER / "pids" / str(spawned.pid)).touch()
    return spawned


def until(is_true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait for another process; fails when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            pytest.fail("it did not happen in time")
        time.sleep(0.02)


def ended(order: str, timeout_s: float = 60.0) -> Attempt:
    own = attempts(timeout_s)
    attempt = begun(order, own)
    until(lambda: not own.is_running(attempt), timeout_s + 30.0)
    return own.conclude(attempt)


@pytest.mark.parametrize(
    ("order", "outcome", "exit_code", "why"),
    [
        ("promoted", "promoted", 0, "told so"),
        ("rejected", "rejected", 0, "told so"),
        ("crash", "failed", 1, "exit 1: RuntimeError: out of luck"),
        ("not enough", "not_enough_data", 5, "not enough data: data span 1.0 h"),
        ("silent", "failed", 0, "exit 0 without a verdict"),
        ("promised", "failed", 0, "promoted, but the version cannot be used"),
        ("promoted without a word", "promoted", -9, "the trainer ended before its verdict"),
    ],
)
def test_each_end_is_understood(order: str, outcome: str, exit_code: int, why: str) -> None:
    found = ended(order)
    assert (found.outcome, found.exit_code) == (outcome, exit_code)
    assert found.why.startswith(why)
    if outcome in ("promoted", "rejected"):
        assert found.version in Registry(FOLDER).version_ids()


def test_a_trainer_that_hangs_is_killed_at_the_limit() -> None:
    found = ended("hang", timeout_s=3.0)
    assert (found.outcome, found.why) == ("failed", "killed after 3 s")


@pytest.mark.slow
def test_a_trainer_that_prints_a_gigabyte_fills_neither_disk_nor_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    found = ended("gigabyte", timeout_s=200.0)
    assert found.outcome == "failed"
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 2_000_000
    assert len(caplog.records) < 2_100


def test_a_trainer_beside_another_is_busy_and_no_failure() -> None:
    with OwnerLock(FOLDER / "trainer.lock", "by hand"):
        assert attempts().why_not_free() == f"a trainer is running (pid {os.getpid()})"
        found = ended("promoted")
    assert (found.outcome, found.exit_code) == ("busy", 4)


def test_the_lock_is_held_from_before_the_start_until_the_end() -> None:
    own = attempts()
    assert own.reserve()
    assert is_locked(FOLDER / ATTEMPT_LOCK)
    own.release()
    assert not is_locked(FOLDER / ATTEMPT_LOCK)


def test_nobody_starts_a_second_attempt_beside_one() -> None:
    first, second = attempts(), attempts()
    attempt = begun("wait", first)
    assert not second.reserve()
    assert second.why_not_free().startswith("a training attempt is running")
    Path("stand_in.txt").write_text("rejected")
    until(lambda: not first.is_running(attempt))
    assert first.conclude(attempt).outcome == "rejected"
    assert second.reserve()
    second.release()


def test_a_later_daemon_adopts_what_an_earlier_one_began() -> None:
    earlier = attempts()
    attempt = begun("wait", earlier)
    earlier.release()  # as if it had died: the attempt's own processes hold the lock
    later = attempts()
    assert later.is_running(attempt)
    Path("stand_in.txt").write_text("promoted")
    until(lambda: not later.is_running(attempt))
    found = later.conclude(attempt)
    assert (found.outcome, found.exit_code) == ("promoted", 0)
    assert earlier._process is not None
    earlier._process.wait()


def test_a_supervisor_killed_with_its_trainer_is_a_failure() -> None:
    own = attempts()
    attempt = begun("wait", own)
    until(lambda: is_locked(FOLDER / "trainer.lock"))
    assert attempt.pid is not None
    os.kill(attempt.pid, signal.SIGKILL)
    until(lambda: not own.is_running(attempt))
    found = own.conclude(attempt)
    assert (found.outcome, found.exit_code) == ("failed", None)
    until(lambda: not is_locked(FOLDER / "trainer.lock"))


def test_an_attempt_that_was_never_spawned_is_no_failure() -> None:
    attempt = Attempt("20260115T100000Z-aaaa", "drift", "", "2026-01-15T10:00:00")
    own = attempts()
    assert not own.is_running(attempt)
    assert own.conclude(attempt).outcome == "interrupted"


def test_a_version_that_was_there_before_is_not_taken_for_the_attempts() -> None:
    found = ended("promoted")
    other = attempts()
    attempt = replace(begun("silent", other), version_before=found.version)
    until(lambda: not other.is_running(attempt))
    write_json(FOLDER / "attempts" / f"{attempt.id}.json", {"exit_code": 0})
    assert other.conclude(attempt).outcome == "failed"


def test_the_output_is_copied_to_the_log_line_by_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    ended("rejected")
    assert "training attempt=20260115T100000Z-aaaa | stand-in: rejected, data False" in caplog.messages


def test_a_damaged_verdict_or_result_counts_as_absent() -> None:
    own = attempts()
    attempt = begun("rejected", own)
    until(lambda: not own.is_running(attempt))
    (FOLDER / "attempts" / f"{attempt.id}.json").write_text("{")
    (FOLDER / "runs" / f"{attempt.id}.json").write_text("[1]")
    assert own.conclude(attempt).outcome == "failed"


def test_old_runs_are_deleted() -> None:
    runs = FOLDER / "runs"
    runs.mkdir(parents=True)
    for number in range(120):
        (runs / f"20250101T{number:06d}Z-0000.log").touch()
    ended("silent")
    assert len(list(runs.glob("*.log"))) == 50
    assert read_json(runs / "20260115T100000Z-aaaa.json")["exit_code"] == 0


ORPHAN = """
import os, time
if os.fork() == 0:
    os.setsid()  # a session of its own, as a daemon has
    if os.fork() == 0:
        open("orphan", "w").write(str(os.getpid()))
        time.sleep(600)
    os._exit(0)
while not os.path.exists("orphan") or not open("orphan").read():
    time.sleep(0.02)
"""


def test_a_process_that_a_training_left_behind_stops_no_later_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    Path("leaves_orphan.py").write_text(ORPHAN)
    own = attempts()
    assert own.reserve()
    attempt = Attempt("20260115T100000Z-aaaa", "drift", "", "2026-01-15T10:00:00")
    attempt = own.spawn(attempt, steps(Path("leaves_orphan.py").absolute()))
    until(lambda: not own.is_running(attempt))
    own.conclude(attempt)
    orphan = int(Path("orphan").read_text())
    try:
        assert own.why_not_free() == ""
        assert own.reserve(), "the next training can start"
        own.release()
        until(lambda: not Path(f"/proc/{orphan}").exists(), 5.0)
        assert "left behind" in caplog.text
    finally:
        if Path(f"/proc/{orphan}").exists():
            os.kill(orphan, signal.SIGKILL)


def test_a_stuck_lock_is_said_with_the_process_that_holds_it(caplog: pytest.LogCaptureFixture) -> None:
    # Given a process that inherited the lock from an attempt of an earlier release
    lock = OwnerLock(FOLDER / ATTEMPT_LOCK, "an attempt").acquire()
    sleeper = subprocess.Popen(["sleep", "600"], pass_fds=lock.filenos())
    lock.release()
    own = attempts(timeout_s=0.0)
    try:
        # When a training is due, twice
        assert own.why_not_free().startswith(f"a training attempt is running (pid {sleeper.pid}, for 0.0 h")
        own.why_not_free()
    finally:
        sleeper.kill()
        sleeper.wait()
    # Then the log names it, as an error
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 1
    assert f"pid={sleeper.pid}" in said[0]
    assert "sleep 600" in said[0]
    assert own.why_not_free() == ""


def test_a_deleted_lock_file_lets_no_second_attempt_start() -> None:
    first, second = attempts(), attempts()
    assert first.reserve()
    (FOLDER / ATTEMPT_LOCK).unlink()
    assert not second.reserve()
    assert second.why_not_free().startswith("a training attempt is running")
    first.release()
    assert second.reserve()
    second.release()


@pytest.mark.parametrize("kind", KINDS)
def test_something_else_in_the_place_of_an_attempt_s_log_or_result_holds_no_one_up(kind: str) -> None:
    runs = FOLDER / "runs"
    for suffix in ("log", "json"):
        put(kind, runs / f"20260115T100000Z-aaaa.{suffix}")
    own = attempts()
    attempt = begun("crash", own)
    own.follow(attempt)
    until(lambda: own._process is None or own._process.poll() is not None)
    own.follow(attempt)
    assert own.conclude(attempt).outcome == "failed"
