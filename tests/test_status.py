"""Recorded time stands still while a sweep is due or a training runs."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from fleetcast.clock import FakeClock, sleep, to_ms
from fleetcast.locks import OwnerLock
from fleetcast.schema import RecordBatch
from fleetcast.serving import status
from fleetcast.serving.history import BinHistory
from fleetcast.serving.roster import Fleet, Roster
from fleetcast.serving.status import FileCounts, StatusReport, TrainingProbe
from fleetcast.serving.telemetry import Telemetry
from fleetcast.settings import BinSettings, ForecastSettings, PathSettings, Settings
from fleetcast.workers import Workers


def report_of(folder: Path, fleet: Fleet, sweeper: Any) -> StatusReport:
    """The report as far as it decides about waiting; other parts are not asked."""
    other: Any = None
    settings = Settings(paths=PathSettings(checkpoint_dir=str(folder)))
    telemetry = Telemetry(CollectorRegistry(), fleet.clock)
    return StatusReport(settings, fleet, other, other, other, sweeper, telemetry)


def fleet_of(clock: FakeClock, *, is_data_clock: bool) -> Fleet:
    forecast = ForecastSettings()
    history = BinHistory(BinSettings(), forecast)
    return Fleet(history, Roster(forecast), clock, forecast, is_data_clock)


def two_bins(clock: FakeClock) -> RecordBatch:
    times = np.array([to_ms(clock.now()), to_ms(clock.now()) + 300_000])
    return RecordBatch(("a",), np.zeros(2, dtype=np.int32), times, {"cpu_pct": np.ones(2)})


def test_records_wait_from_the_moment_a_bin_is_due_until_its_sweep_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall = iter(range(100))
    monkeypatch.setattr(status, "monotonic", lambda: float(next(wall)))
    clock, sweeper = FakeClock(), SimpleNamespace(is_at_work=False)
    fleet = fleet_of(clock, is_data_clock=True)
    report = report_of(tmp_path, fleet, sweeper)
    assert not report.is_held()
    start_ms = to_ms(clock.now())
    fleet.add(two_bins(clock))
    clock.advance(seconds=330)  # the end of the first bin, and the grace
    assert report.is_held()
    sweeper.is_at_work = True
    fleet.history.close(start_ms)
    assert report.is_held()
    sweeper.is_at_work = False
    assert not report.is_held()
    with OwnerLock(tmp_path / "trainer.lock", "the training"):
        assert report.is_held()
    assert not report.is_held()


def test_with_the_system_clock_records_never_wait(tmp_path: Path) -> None:
    fleet = fleet_of(FakeClock(), is_data_clock=False)
    fleet.add(two_bins(FakeClock()))
    with OwnerLock(tmp_path / "trainer.lock", "the training"):
        assert not report_of(tmp_path, fleet, SimpleNamespace(is_at_work=True)).is_held()


@pytest.mark.parametrize("name", ["attempt.lock", "trainer.lock"])
def test_a_training_is_seen_by_either_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    wall = iter(range(100))
    monkeypatch.setattr(status, "monotonic", lambda: float(next(wall)))
    is_training = TrainingProbe(tmp_path)
    assert not is_training()
    with OwnerLock(tmp_path / name, "the training"):
        assert is_training()
    assert not is_training()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_locks_are_asked_about_at_most_every_tenth_of_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, ...]] = []

    def is_locked(*paths: Path) -> bool:
        asked.append(paths)
        return False

    monkeypatch.setattr(status, "is_locked", is_locked)
    monkeypatch.setattr(status, "monotonic", lambda: 5.0)
    is_training = TrainingProbe(tmp_path)
    for _ in range(10):
        is_training()
    assert len(asked) == 1


def test_counting_large_files_keeps_nobody_waiting_and_is_done_once_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(status, "monotonic", lambda: now[0])
    monkeypatch.setattr(status, "_STATS_WAIT_S", 0.05)
    may_end, started = threading.Event(), []
    may_end.set()

    def count() -> dict[str, Any]:
        started.append(len(started))
        assert may_end.wait(10)
        now[0] += 30  # it takes half a minute
        return {"total_records": len(started)}

    counts = FileCounts(count, Workers(), pytest.fail)
    assert counts.newest() == {"total_records": 1}  # the first is waited for
    now[0] += 590  # a little less than 20 times as long as it took
    assert counts.newest() == {"total_records": 1}
    assert len(started) == 1
    now[0] += 20
    may_end.clear()
    asked = [threading.Thread(target=counts.newest) for _ in range(5)]
    for thread in asked:
        thread.start()
    for thread in asked:
        thread.join(10)
        assert not thread.is_alive()
    assert counts.newest() == {"total_records": 1}  # the one before, while it counts
    assert len(started) == 2
    may_end.set()
    monkeypatch.setattr(status, "_STATS_WAIT_S", 10)
    assert counts.newest() == {"total_records": 2}


def test_a_count_that_fails_is_told_and_the_counts_before_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [{"total_records": 7}, OSError("the disk is away")]
    told: list[Exception] = []
    monkeypatch.setattr(status, "_STATS_S", 0.0)
    monkeypatch.setattr(status, "_STATS_REST", 0)

    def count() -> dict[str, Any]:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        found: dict[str, Any] = answer
        return found

    counts = FileCounts(count, Workers(), told.append)
    assert [counts.newest(), counts.newest()] == [{"total_records": 7}] * 2
    assert [str(error) for error in told] == ["the disk is away"]


def test_askers_and_the_loop_that_looks_after_threads_start_a_count_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread that is being started is neither gone nor to be waited for yet."""
    begin = threading.Thread.start

    def begin_late(thread: threading.Thread) -> None:
        if thread.name == "file counts":
            sleep(0.2)
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", begin_late)
    started: list[int] = []
    found: list[dict[str, Any]] = []
    failures: list[tuple[str, BaseException]] = []
    workers = Workers(lambda name, error: failures.append((name, error)))

    def count() -> dict[str, Any]:
        started.append(len(started))
        return {"total_records": 7}

    counts = FileCounts(count, workers, pytest.fail)
    asked = [threading.Thread(target=lambda: found.append(counts.newest())) for _ in range(5)]
    for thread in asked:
        begin(thread)
    while any(thread.is_alive() for thread in asked):
        workers.look_after()
    assert (found, started, failures) == ([{"total_records": 7}] * 5, [0], [])
