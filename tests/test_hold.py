"""Recorded time stands still while a sweep is due or a training runs."""

from pathlib import Path

import numpy as np
import pytest

from fleetcast.clock import FakeClock, to_ms
from fleetcast.files import OwnerLock
from fleetcast.schema import RecordBatch
from fleetcast.serving import sweep
from fleetcast.serving.history import BinHistory
from fleetcast.serving.sweep import DataHold, TrainingProbe
from fleetcast.settings import BinSettings, ForecastSettings


def test_records_wait_from_the_moment_a_bin_is_due_until_its_sweep_is_done() -> None:
    clock = FakeClock()
    history = BinHistory(BinSettings(), ForecastSettings())
    state = {"sweeping": False, "training": False}
    held = DataHold(history, clock, lambda: state["sweeping"], lambda: state["training"])
    assert not held()
    times = np.array([to_ms(clock.now()), to_ms(clock.now()) + 300_000])
    history.add(RecordBatch(("a",), np.zeros(2, dtype=np.int32), times, {"cpu_pct": np.ones(2)}))
    assert held()
    state["sweeping"] = True
    history.close(int(times[0]))
    assert held()
    state["sweeping"] = False
    assert not held()
    state["training"] = True
    assert held()


@pytest.mark.parametrize("name", ["attempt.lock", "trainer.lock"])
def test_a_training_is_seen_by_either_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    wall = iter(range(100))
    monkeypatch.setattr(sweep, "monotonic", lambda: float(next(wall)))
    is_training = TrainingProbe(tmp_path)
    assert not is_training()
    with OwnerLock(tmp_path / name, "the training"):
        assert is_training()
    assert not is_training()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_locks_are_asked_about_at_most_every_tenth_of_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def is_locked(path: Path) -> bool:
        asked.append(path)
        return False

    monkeypatch.setattr(sweep, "is_locked", is_locked)
    monkeypatch.setattr(sweep, "monotonic", lambda: 5.0)
    is_training = TrainingProbe(tmp_path)
    for _ in range(10):
        is_training()
    assert len(asked) == 2
