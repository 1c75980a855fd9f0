import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fleetcast import loop
from fleetcast.errors import DaemonAway, OwnershipLost
from fleetcast.loop import Stop, run_every
from fleetcast.workers import Workers

ROOT = Path(__file__).parents[1]


class Wall:
    """Wall time that passes only in `Stop.wait` and in cycles."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(loop, "monotonic", lambda: self.now_s)

    def stop_after(self, ticks: int) -> "Ticks":
        return Ticks(self, ticks)


class Ticks(Stop):
    """A stop that comes after a number of waits and lets time pass instead of waiting."""

    def __init__(self, wall: Wall, ticks: int) -> None:
        super().__init__()
        self._wall = wall
        self._left = ticks

    def wait(self, timeout_s: float) -> bool:
        self._wall.now_s += timeout_s
        self._left -= 1
        return self._left < 0


def test_the_first_cycle_runs_at_once_and_the_next_at_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = Wall(monkeypatch)
    times: list[float] = []
    assert run_every(lambda: times.append(wall.now_s), 5.0, wall.stop_after(3)) is True
    assert times == [100.0, 105.0, 110.0]


def test_a_long_wait_says_every_minute_that_it_is_alive_and_checks_no_more_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wall = Wall(monkeypatch)
    cycles: list[float] = []
    alive: list[float] = []

    run_every(
        lambda: cycles.append(wall.now_s),
        150.0,
        wall.stop_after(6),
        alive=lambda: alive.append(wall.now_s),
    )

    assert cycles == [100.0, 250.0]
    assert alive == [100.0, 100.0, 160.0, 220.0, 250.0, 310.0, 370.0]


def test_missed_ticks_are_skipped_and_the_rhythm_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = Wall(monkeypatch)
    times: list[float] = []

    def slow_once() -> None:
        times.append(wall.now_s)
        if len(times) == 1:
            wall.now_s += 12.0

    run_every(slow_once, 5.0, wall.stop_after(3))
    assert times == [100.0, 115.0, 120.0]


def test_a_failing_cycle_is_tried_again_and_success_forgets_the_failures(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes = iter(
        [DaemonAway("away"), ValueError("bug"), None, DaemonAway("away"), DaemonAway("away"), None]
    )

    def cycle() -> None:
        error = next(outcomes)
        if error:
            raise error

    assert run_every(cycle, 1.0, Wall(monkeypatch).stop_after(6), max_failures=3) is True
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "cycle failed error=away failures=1",
        "cycle failed failures=2",
        "cycle failed error=away failures=1",
        "cycle failed error=away failures=2",
    ]
    assert caplog.records[1].exc_info is not None


def test_too_many_failures_in_a_row_end_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def cycle() -> None:
        calls.append(1)
        raise DaemonAway("away")

    assert run_every(cycle, 1.0, Wall(monkeypatch).stop_after(99), max_failures=4) is False
    assert len(calls) == 4


def test_a_requested_stop_keeps_its_first_reason() -> None:
    stop = Stop()
    assert not stop.is_requested
    assert not stop.wait(0.0)
    stop.request("signal SIGTERM")
    stop.request("second thoughts")
    assert stop.wait(10.0)
    assert stop.reason == "signal SIGTERM"


def test_a_request_from_another_thread_wakes_the_waiting_loop() -> None:
    stop = Stop()
    thread = threading.Thread(target=stop.request, args=("other thread",))
    thread.start()
    assert stop.wait(30.0)
    thread.join()


def test_a_signal_is_noted_and_does_not_raise() -> None:
    stop = Stop()
    stop.install()
    signal.raise_signal(signal.SIGTERM)
    assert stop.wait(10.0)
    assert stop.reason == "signal SIGTERM"


def test_the_second_signal_ends_the_process_at_once_with_128_plus_its_number() -> None:
    code = (
        "import os, signal\nfrom fleetcast.loop import Stop\n"
        "stop = Stop(); stop.install()\n"
        "os.kill(os.getpid(), signal.SIGTERM); assert stop.is_requested\n"
        "os.kill(os.getpid(), signal.SIGINT); stop.wait(30)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, env={**os.environ})
    assert done.returncode == 128 + signal.SIGINT


def test_waking_ends_one_wait_and_requests_nothing() -> None:
    stop = Stop()
    stop.wake()
    stop.wake()
    assert stop.wait(30.0) is False
    stop.wake()
    assert not stop.is_requested  # a look in passing takes no wake away
    assert stop.wait(30.0) is False
    stop.wake()
    stop.request("done")
    assert stop.wait(30.0)
    assert stop.reason == "done"


def test_cycles_that_were_woken_do_not_move_the_rhythm(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = Wall(monkeypatch)
    times: list[float] = []

    class Woken(Ticks):
        def wait(self, timeout_s: float) -> bool:
            return super().wait(min(timeout_s, 1.0))

    run_every(lambda: times.append(wall.now_s), 5.0, Woken(wall, 8))
    assert times == [100.0, 101.0, 102.0, 103.0, 104.0, 105.0, 106.0, 107.0]


def test_a_step_that_fails_pauses_longer_each_time_and_is_told_until_it_is_well(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now_s, told, is_broken = 100.0, [], True
    monkeypatch.setattr("fleetcast.workers.monotonic", lambda: now_s)
    workers = Workers(lambda name, error: told.append((name, str(error))))
    step = workers.step("sweep")
    tries = []

    def work() -> None:
        tries.append(now_s - 100.0)
        if is_broken:
            raise TypeError("surprise")

    for _ in range(160):
        step.run(work)
        now_s += 1.0
    assert tries == [0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 63.0, 123.0]
    assert workers.failures() == {"sweep": 8}
    assert workers.problems() == ["sweep failed 8 times in a row, it begins again in 23 s: surprise"]
    assert told[0] == ("sweep", "surprise")
    assert "TypeError: surprise" in caplog.text  # with its traceback

    is_broken = False
    now_s += 30.0
    assert step.run(work)
    assert workers.problems() == []
    assert workers.failures() == {"sweep": 8}


def test_a_lost_folder_ends_the_loop_whatever_the_step() -> None:
    def lose() -> None:
        raise OwnershipLost("the buffer", "moved")

    with pytest.raises(OwnershipLost):
        Workers().step("sweep").run(lose)


@pytest.mark.parametrize("error", [SystemExit(), KeyboardInterrupt(), MemoryError(), KeyError("x")])
def test_whatever_ends_a_thread_it_begins_again_until_its_work_is_done(error: BaseException) -> None:
    workers, tries = Workers(), []

    def work() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise error

    thread = workers.thread("follower", work)
    thread.start()
    assert thread.join(30)
    assert len(tries) == 2
    assert workers.failures() == {"follower": 1}
    assert "follower failed once, it was begun again" in workers.problems()[0]
    workers.look_after()
    assert not thread.is_alive  # its work is done


def test_a_thread_that_is_gone_is_noticed() -> None:
    release, workers = threading.Event(), Workers()
    thread = workers.thread("follower", lambda: print(release.wait(30)))
    thread.start()
    real, thread._thread = thread._thread, threading.Thread(target=print)  # as if it had died
    workers.look_after()
    assert thread.is_alive and thread._thread is not real
    assert workers.failures() == {"follower": 1}
    release.set()
    assert thread.join(30)
