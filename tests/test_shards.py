"""Shards: the same forecasts to the bit, whatever happens to the processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fleetcast.forecast.predictor import Forecaster, set_threads
from fleetcast.schema import Floats32, HistoryWindow
from fleetcast.serving import shards as module
from fleetcast.serving.board import ModelInfo
from fleetcast.serving.model_loader import Champion
from fleetcast.serving.shard import PartForecast, SharedArrays, arrays_of, forecast_part, said_by
from fleetcast.serving.shards import OneProcess, Shards
from fleetcast.settings import Settings

ROOT = Path(__file__).parents[1]
BASE = (ROOT / "models" / "last.ckpt").resolve()
METRICS = Settings().bins.forecast_metrics
BIN_MS, HORIZON = 300_000, 96
Said = list[tuple[HistoryWindow, PartForecast]]


@pytest.fixture(scope="module")
def champion() -> Champion:
    set_threads(1)  # as a shard does: with other threads sums are rounded in another order
    return Champion(Forecaster.load(BASE), ModelInfo("base", "2026-01-15T10:00:00Z", True), path=BASE)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Shards]]:
    """Start shards, and end them after the test."""
    started: list[Shards] = []
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    def begin(n: int = 2, run: str = module.MODULE, *, is_ready: bool = True) -> Shards:
        own = Settings()
        started.append(Shards(replace(own, forecast=replace(own.forecast, shards=n)), [run]))
        started[-1].start()
        if is_ready:
            wait_until_ready(started[-1], n)
        return started[-1]

    yield begin
    for one in started:
        one.stop()


def wait_until_ready(shards: Shards, n: int) -> None:
    end = time.monotonic() + 60
    while shards.report()["ready"] < n:
        assert time.monotonic() < end, "shards are not ready"
        shards.look_after()
        time.sleep(0.05)


def parts(*names: str, n_parts: int = 7, n_bins: int = 600) -> list[HistoryWindow]:
    """Return parts of three servers each, the last one with the given names."""
    found = []
    for number in range(n_parts):
        random = np.random.default_rng(number)
        values = random.uniform(5, 95, (3, len(METRICS), n_bins)).astype(np.float32)
        values[0, 1, :300] = np.nan
        servers = names if names and number == n_parts - 1 else tuple(f"s{number}-{k}" for k in range(3))
        found.append(HistoryWindow(servers, METRICS, values[: len(servers)], 288 * 20_000 * BIN_MS, BIN_MS))
    return found


def assert_same(found: Said, expected: Said) -> None:
    assert [part.server_names for part, _ in found] == [part.server_names for part, _ in expected]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        mine, other = arrays_of(ours), arrays_of(theirs)
        assert mine.keys() == other.keys()
        for name, array in mine.items():
            assert array.dtype == other[name].dtype
            np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_any_number_of_shards_says_the_same_to_the_bit(
    start: Callable[..., Shards], champion: Champion, n: int
) -> None:
    shards, alone = start(n), OneProcess(HORIZON)
    for model, with_rules in ((champion, True), (champion, False), (None, True)):
        expected = list(alone.forecasts(iter(parts()), model, with_rules=with_rules))
        assert_same(list(shards.forecasts(iter(parts()), model, with_rules=with_rules)), expected)
    assert list(shards.forecasts(iter([]), champion, with_rules=True)) == []
    assert shards.report() == {"wanted": n, "ready": n, "restarts": 0}


def test_a_killed_shard_costs_no_forecast_and_is_started_again(
    start: Callable[..., Shards], champion: Champion
) -> None:
    shards = start(2)
    expected = list(OneProcess(HORIZON).forecasts(iter(parts()), champion, with_rules=True))
    victim = shards._shards[1]
    os.kill(victim.pid, signal.SIGSTOP)
    answers = shards.forecasts(iter(parts()), champion, with_rules=True)
    found = [next(answers)]
    assert victim.item is not None, "it has a part in hand"
    os.kill(victim.pid, signal.SIGKILL)
    found += answers
    assert_same(found, expected)
    wait_until_ready(shards, 2)
    assert shards.report()["restarts"] == 1
    assert victim.pid not in {shard.pid for shard in shards._shards}


def test_while_no_shard_is_there_the_daemon_forecasts_itself(
    start: Callable[..., Shards], champion: Champion
) -> None:
    shards = start(2)
    for shard in shards._shards:
        os.kill(shard.pid, signal.SIGKILL)
    found = list(shards.forecasts(iter(parts()), champion, with_rules=True))
    assert_same(found, list(OneProcess(HORIZON).forecasts(iter(parts()), champion, with_rules=True)))
    not_begun = start(2, is_ready=False)
    assert_same(list(not_begun.forecasts(iter(parts()), champion, with_rules=True)), found)


def test_a_part_that_ends_every_shard_goes_without_and_is_told(
    start: Callable[..., Shards], champion: Champion
) -> None:
    shards = start(2, "poisoned_shard")
    *others, (_, poisoned) = shards.forecasts(iter(parts("poison")), champion, with_rules=True)
    expected = list(OneProcess(HORIZON).forecasts(iter(parts()), champion, with_rules=True))
    assert_same(others, expected[:-1])
    assert (poisoned.model, poisoned.rules) == (None, None)
    assert "2 shards ended over 1 servers: exit code 9" in str(poisoned.model_failure)
    assert shards.report()["restarts"] == 2


def test_a_shard_that_does_not_answer_is_killed(
    start: Callable[..., Shards], champion: Champion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANSWER_LIMIT_S", 0.5)
    shards = start(1, "poisoned_shard")
    ((_, said),) = shards.forecasts(iter(parts("sleep", n_parts=1)), champion, with_rules=False)
    assert shards.report()["restarts"] == 1
    assert said.model is not None  # no shard was there any more


def test_a_model_that_a_shard_cannot_load_is_still_in_the_daemons_memory(
    start: Callable[..., Shards], champion: Champion, tmp_path: Path
) -> None:
    lost = replace(champion, path=tmp_path / "gone.ckpt")
    found = list(start(1).forecasts(iter(parts()), lost, with_rules=True))
    assert_same(found, list(OneProcess(HORIZON).forecasts(iter(parts()), champion, with_rules=True)))


def test_long_names_do_not_fill_a_channel(start: Callable[..., Shards], champion: Champion) -> None:
    shards = start(1)
    os.kill(shards._shards[0].pid, signal.SIGSTOP)
    names = tuple(f"{chr(0x20000) * 118}{number}" for number in range(3))
    large = [replace(part, server_names=names * 100) for part in parts(n_parts=1)]  # more JSON than it holds
    large = [replace(part, values=np.tile(part.values, (100, 1, 1))) for part in large]
    answers = shards.forecasts(iter(large), champion, with_rules=False)
    shards._look(None)
    shards._give(module._Sweep(iter(large), champion, with_rules=False))  # does not block
    os.kill(shards._shards[0].pid, signal.SIGCONT)
    assert next(answers)[1].model is not None


def test_a_shard_that_hangs_before_it_is_ready_is_noticed(
    start: Callable[..., Shards], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "START_LIMIT_S", 0.3)
    monkeypatch.setattr(module, "_MISSING_S", 0.2)
    shards = start(1, is_ready=False)
    os.kill(shards._shards[0].pid, signal.SIGSTOP)
    time.sleep(0.5)
    assert "0 of 1 shards are ready" in shards.problem
    shards.look_after()
    assert shards.report()["restarts"] == 1


def test_a_stop_waits_for_no_hung_shard(
    start: Callable[..., Shards], champion: Champion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STOPPING_S", 0.2)
    shards = start(2)
    shards.is_stopping = lambda: True
    for shard in shards._shards:
        os.kill(shard.pid, signal.SIGSTOP)
    began = time.monotonic()
    assert len(list(shards.forecasts(iter(parts()), champion, with_rules=False))) == 7
    assert time.monotonic() - began < 20


def test_shards_that_cannot_be_started_leave_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_given: object, **_named: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    own = Settings()
    shards = Shards(replace(own, forecast=replace(own.forecast, shards=3)))
    monkeypatch.setattr(module.subprocess, "Popen", fail)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        shards._pause.reset()
        shards.start()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert shards.report() == {"wanted": 3, "ready": 0, "restarts": 0}


def test_shards_that_end_together_are_started_again_together(start: Callable[..., Shards]) -> None:
    shards = start(4)
    for shard in shards._shards:
        os.kill(shard.pid, signal.SIGKILL)
    time.sleep(0.3)
    shards.look_after()
    assert shards.report()["restarts"] == 4
    assert shards._pause.left_s <= 1.0


def test_answers_of_a_sweep_that_was_given_up_are_not_taken_for_another_ones(
    start: Callable[..., Shards], champion: Champion
) -> None:
    shards = start(2)
    next(shards.forecasts(iter(parts()), champion, with_rules=True))
    other = [replace(part, values=part.values[..., ::-1]) for part in parts()]
    expected = list(OneProcess(HORIZON).forecasts(iter(other), champion, with_rules=True))
    assert_same(list(shards.forecasts(iter(other), champion, with_rules=True)), expected)


def test_shards_end_with_the_daemon(start: Callable[..., Shards]) -> None:
    shards = start(2)
    pids = [shard.pid for shard in shards._shards]
    for pid in pids:
        os.kill(pid, signal.SIGTERM)  # what systemd sends to all; the daemon may still be at work
    time.sleep(0.2)
    shards.look_after()
    assert shards.report() == {"wanted": 2, "ready": 2, "restarts": 0}
    shards.stop()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_fails_in_one_process_costs_itself_only(champion: Champion) -> None:
    class Broken:
        metrics = METRICS

        def predict(self, _window: HistoryWindow) -> Floats32:
            raise ValueError("no weights")

    said = forecast_part(parts()[0], Broken(), HORIZON, with_rules=True)
    assert said.rules is not None
    assert str(said.model_failure) == "no weights"
    of_no_bins = replace(parts()[0], values=np.empty((3, len(METRICS), 0), np.float32))
    assert forecast_part(of_no_bins, None, HORIZON, with_rules=True).rules_failure is not None


@given(
    st.lists(
        hnp.arrays(
            st.sampled_from([np.float32, np.float64, np.bool_, np.int64]),
            hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5),
        ),
        max_size=5,
    )
)
def test_arrays_come_out_of_shared_memory_as_they_went_in(given_arrays: list[np.ndarray]) -> None:
    block = os.memfd_create("test")
    try:
        ours, theirs = SharedArrays(block), SharedArrays(block)
        small = {"first": np.arange(3)}
        theirs.get(ours.put(small))  # both have it mapped before it grows
        arrays = {str(number): array for number, array in enumerate(given_arrays)}
        arrays["large"] = np.arange(2000.0)
        found = theirs.get(ours.put(arrays))
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
    finally:
        os.close(block)


def test_nothing_said_is_nothing_sent() -> None:
    assert arrays_of(PartForecast()) == {}
    said = said_by({}, {"model": "no memory"})
    assert (said.model, said.rules, said.rules_failure) == (None, None, None)
    assert str(said.model_failure) == "no memory"


def test_the_engine_of_this_machine_touches_no_ray(start: Callable[..., Shards]) -> None:
    shards = start(1)
    (pid,) = {shard.pid for shard in shards._shards}
    assert "/ray/" not in Path(f"/proc/{pid}/maps").read_text()
    code = (
        "import sys, fleetcast.inference, fleetcast.serving.shard, tft_inference_daemon\n"
        "print([name for name in ('ray', 'obstore', 'confluent_kafka') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
