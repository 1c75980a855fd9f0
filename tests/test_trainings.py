"""The record of trainings: a kill at any point forgets none and counts none twice."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from adaptive_retraining_daemon import RetrainingDecisionEngine
from fleetcast.clock import BIN_EPOCH, FakeClock, to_ms
from fleetcast.errors import (
    CannotStart,
    CorruptFile,
    FleetcastError,
    SettingsError,
    StorageFull,
    UnknownFormat,
)
from fleetcast.files import write_json
from fleetcast.forecast.registry import ATTEMPT_LOCK, Registry
from fleetcast.locks import OwnerLock
from fleetcast.retraining.attempts import Attempts, Step
from fleetcast.retraining.decision import Decision
from fleetcast.retraining.state import Attempt, RetrainingState, load_state, save_state
from fleetcast.retraining.trainings import Trainings

STATE = Path("retraining_state.json")
CHECKPOINTS = Path("checkpoints")
DRIFT = Decision(True, "drift", "drift: dss 0.300", ())


class NoProcess(Attempts):
    """Attempts whose process is played by the test."""

    def __init__(self) -> None:
        super().__init__(Registry(CHECKPOINTS), timeout_s=60.0, nice=0)
        self.lives = True
        self.spawns = 0
        self.at_spawn: Callable[[], None] = lambda: None

    def spawn(self, attempt: Attempt, steps: Any) -> Attempt:
        self.spawns += 1
        self.at_spawn()
        return replace(attempt, pid=4_000_000)

    def is_running(self, attempt: Attempt) -> bool:
        return self.lives


class Daemon:
    """One life of the retraining daemon, as far as trainings go."""

    def __init__(self, clock: FakeClock, mode: str = "system") -> None:
        self.clock = clock
        self.engine = RetrainingDecisionEngine(clock=clock, wall_clock=clock)
        self.attempts = NoProcess()
        self.trainings = Trainings(self.engine, self.attempts, STATE, mode, clock)

    def start(self) -> Attempt | None:
        return self.trainings.start(DRIFT, None, [Step(["true"], {})], {"drifting": []})


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    monkeypatch.chdir(tmp_path)
    return FakeClock()


@pytest.fixture
def daemon(clock: FakeClock) -> Daemon:
    own = Daemon(clock)
    own.trainings.take_over()
    own.trainings.note()
    return own


def verdict(attempt_id: str, promoted: bool, **more: Any) -> str:
    """Leave what the trainer leaves; a promoted version is there and intact."""
    version = f"v-{attempt_id}"
    if promoted:
        contents = {"model.ckpt": b"m", "baseline.npz": b"b"}
        Registry(CHECKPOINTS).add(version, contents, {"created_at": "2026-01-15T10:10:00Z", "promoted": True})
    (CHECKPOINTS / "attempts").mkdir(parents=True, exist_ok=True)
    content = {
        "promoted": promoted,
        "version": version,
        "why": "better" if promoted else "not better",
        **more,
    }
    write_json(CHECKPOINTS / "attempts" / f"{attempt_id}.json", content)
    return version


def test_an_attempt_is_written_down_before_anything_starts(daemon: Daemon) -> None:
    seen = []
    daemon.attempts.at_spawn = lambda: seen.append(load_state(STATE).running)
    started = daemon.start()
    assert started is not None
    assert seen == [replace(started, pid=None)]
    assert json.loads(Path("training_context.json").read_text()) == {"attempt_id": started.id, "drifting": []}
    assert load_state(STATE).running == started


@pytest.mark.parametrize(
    ("figures", "is_followed"), [(0.8, True), (0.95, False), (None, False), ("x", False)]
)
def test_what_the_gate_found_decides_whether_a_training_is_followed(
    daemon: Daemon, figures: Any, is_followed: bool
) -> None:
    # Given a training for drift that saw a day of a change
    changed_ms = to_ms(daemon.clock.now() - timedelta(hours=24))
    told = {"drifting": [{"server": "web-1", "metric": "cpu_pct", "changed_ms": changed_ms}]}
    started = daemon.trainings.start(DRIFT, None, [Step(["true"], {})], told)
    assert started is not None
    verdict(started.id, True, figures={"changed": {"ratio": figures}})
    daemon.attempts.lives = False
    daemon.trainings.note()
    # When two more days are known of it
    daemon.clock.advance(hours=48)
    left = daemon.engine.trainings_left()
    # Then another training is due if that one learned much, also after a restart
    assert left == 2
    assert bool(daemon.trainings.follow_up(24, left)) == is_followed
    again = Daemon(daemon.clock)
    again.trainings.take_over()
    assert bool(again.trainings.follow_up(24, left)) == is_followed


@pytest.mark.parametrize(("promoted", "history"), [(True, 1), (False, 0)])
def test_a_verdict_counts_and_only_a_promoted_one_enters_the_history(
    daemon: Daemon, promoted: bool, history: int
) -> None:
    started = daemon.start()
    assert started is not None
    version = verdict(started.id, promoted)
    daemon.clock.advance(minutes=10)
    assert daemon.trainings.note() is None, "it still runs"
    daemon.attempts.lives = False
    ended = daemon.trainings.note()
    assert ended is not None
    assert (ended.outcome, ended.version) == ("promoted" if promoted else "rejected", version)
    found = json.loads(STATE.read_text())
    assert found["last_training_time"] == "2026-01-15T10:10:00"
    assert len(found["training_history"]) == found["total_trainings"] == history
    assert not daemon.engine.should_retrain({"needs_retraining": True})["should_retrain"]


@pytest.mark.parametrize("dies", ["before the spawn", "while it runs", "before the end is noted"])
def test_the_next_daemon_counts_a_training_once_whenever_the_first_died(daemon: Daemon, dies: str) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    if dies == "before the spawn":
        daemon.attempts.at_spawn = die
        with pytest.raises(KeyboardInterrupt):
            daemon.start()
    else:
        daemon.start()
    running = load_state(STATE).running
    assert running is not None
    daemon.attempts.release()
    following = Daemon(daemon.clock)
    following.attempts.lives = dies == "while it runs"
    if dies != "before the spawn":
        verdict(running.id, promoted=True)
    following.trainings.take_over()
    following.trainings.note()
    following.attempts.lives = False
    following.trainings.note()
    following.trainings.note()
    state = load_state(STATE)
    assert state.running is None
    assert len(state.log.stamps) == state.log.total_promoted == (0 if dies == "before the spawn" else 1)
    assert state.backoff.failures == 0


def test_a_training_that_could_not_be_started_is_a_failure_and_frees_the_lock(daemon: Daemon) -> None:
    def full() -> None:
        raise StorageFull("no space")

    daemon.attempts.at_spawn = full
    with pytest.raises(FleetcastError, match="no space"):
        daemon.start()
    assert daemon.trainings.running is None
    assert daemon.engine.backoff.failures == 1
    assert daemon.attempts.why_not_free() == ""


def test_somebody_faster_is_no_failure(daemon: Daemon) -> None:
    with OwnerLock(CHECKPOINTS / ATTEMPT_LOCK, "another"):
        assert daemon.start() is None
        assert daemon.trainings.why_not_free() == f"a training attempt is running (pid {os.getpid()})"
    assert daemon.engine.backoff.failures == 0


@pytest.mark.parametrize(
    ("exit_code", "outcome", "minutes", "failures"),
    [(1, "failed", 15, 1), (5, "not_enough_data", 60, 0), (4, "busy", 15, 0)],
)
def test_an_end_without_a_verdict_pauses_as_its_kind_asks(
    daemon: Daemon, exit_code: int, outcome: str, minutes: float, failures: int
) -> None:
    started = daemon.start()
    assert started is not None
    (CHECKPOINTS / "runs").mkdir(parents=True, exist_ok=True)
    write_json(CHECKPOINTS / "runs" / f"{started.id}.json", {"exit_code": exit_code, "tail": []})
    daemon.attempts.lives = False
    ended = daemon.trainings.note()
    assert ended is not None
    assert ended.outcome == outcome
    backoff = load_state(STATE).backoff
    assert (backoff.remaining_s(daemon.clock.now()) / 60, backoff.failures) == (minutes, failures)
    assert load_state(STATE).log.stamps == ()


def test_a_training_started_by_hand_counts(daemon: Daemon, caplog: pytest.LogCaptureFixture) -> None:
    verdict("20260115T093000Z-beef", promoted=False)
    daemon.trainings.note()
    assert [stamp.at.isoformat() for stamp in daemon.engine.log.stamps] == ["2026-01-15T09:30:00+00:00"]
    assert "did not start attempt=20260115T093000Z-beef" in caplog.text
    daemon.trainings.note()
    assert len(daemon.engine.log.stamps) == 1


def test_trainings_by_hand_are_sorted_into_the_history(daemon: Daemon) -> None:
    daemon.engine.record_training()
    verdict("20260114T093000Z-beef", promoted=True)
    verdict("not-a-time", promoted=True)
    daemon.trainings.note()
    times = [stamp.at for stamp in daemon.engine.log.stamps]
    assert times == sorted(times, reverse=True)
    assert len(times) == 3


def test_a_damaged_state_is_set_aside_and_its_trainings_are_found_again(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    for day in ("12", "13", "14"):
        verdict(f"202601{day}T100000Z-beef", promoted=day == "13")
    STATE.write_text('{"training_history": [')
    own = Daemon(clock)
    own.trainings.take_over()
    own.trainings.note()
    assert [path.read_text() for path in Path().glob("*.damaged-*")] == ['{"training_history": [']
    safeguards = own.engine.should_retrain({"needs_retraining": True})["safeguards"]
    assert safeguards["max_trainings_per_week"]["value"] == 4, "three found, and one taken as made now"
    assert safeguards["min_hours_between_training"]["passed"] is False
    assert any(record.levelno == logging.ERROR for record in caplog.records)


def test_a_state_of_another_version_stops_the_start(clock: FakeClock) -> None:
    STATE.write_text('{"format": 99}')
    with pytest.raises(UnknownFormat):
        Daemon(clock).trainings.take_over()
    assert STATE.read_text() == '{"format": 99}'


@pytest.mark.parametrize("takes_over", [True, False])
def test_a_state_made_under_the_other_clock_is_refused_with_a_hint(
    clock: FakeClock, takes_over: bool
) -> None:
    save_state(STATE, RetrainingState(clock_mode="data"))
    trainings = Daemon(clock).trainings
    with pytest.raises(SettingsError, match=r"made under --clock data \(start with --clock data"):
        trainings.take_over() if takes_over else trainings.look()


def test_looking_changes_nothing(clock: FakeClock) -> None:
    STATE.write_text("{")
    with pytest.raises(CorruptFile):
        Daemon(clock).trainings.look()
    assert [path.name for path in Path().iterdir()] == ["retraining_state.json"]


def test_the_installation_is_dated_by_the_first_check_that_knows_the_time(clock: FakeClock) -> None:
    started, clock.time = clock.time, BIN_EPOCH
    own = Daemon(clock, mode="data")
    own.trainings.take_over()
    own.trainings.note()
    assert own.engine.log.installed_at is None, "no record yet: the data clock stands at 1970"
    clock.time = started
    own.trainings.note()
    clock.advance(days=1)
    own.trainings.note()
    assert own.engine.log.installed_at == started == clock.now() - timedelta(days=1)


@pytest.mark.parametrize(
    "name", ["retraining_state.json", "decisions.jsonl", "training_context.json", "retraining_metrics.prom"]
)
def test_a_folder_in_the_place_of_a_file_is_told_before_anything_starts(clock: FakeClock, name: str) -> None:
    Path(name).mkdir()
    own = Daemon(clock)
    with pytest.raises(CannotStart, match=f"{name} must be a file, it is a folder"):
        own.trainings.take_over()
    with pytest.raises(CannotStart, match=f"{name} must be a file, it is a folder"):
        own.start()
    assert own.attempts.spawns == 0
