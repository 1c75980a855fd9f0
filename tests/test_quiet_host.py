"""The load of others: system load less what our own processes use."""

import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import psutil
import pytest

from fleetcast.retraining.quiet import HostProbe, cpu_seconds_of


class Scripted:
    """CPU seconds and wall time as a test tells them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, load: float) -> None:
        self.used: dict[tuple[int, float], float] = {(1, 0.0): 100.0}
        self.now_s = 0.0
        self.pauses: list[float] = []
        self.asked: list[tuple[int, ...]] = []
        monkeypatch.setattr(psutil, "getloadavg", lambda: (load, 9.0, 9.0))

    def probe(self) -> HostProbe:
        def pause(seconds: float) -> None:
            self.pauses.append(seconds)
            self.pass_(seconds, cores=0.5)

        return HostProbe(self.seconds, lambda: self.now_s, pause)

    def seconds(self, pids: Iterable[int]) -> dict[tuple[int, float], float]:
        self.asked.append(tuple(pids))
        return dict(self.used)

    def pass_(self, seconds: float, cores: float) -> None:
        self.now_s += seconds
        self.used = {key: value + cores * seconds for key, value in self.used.items()}


def test_a_first_measurement_takes_a_short_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Scripted(monkeypatch, load=2.0)
    found = world.probe().measure([7])
    assert world.pauses == [0.2]
    assert (found.own_cores, found.load_of_others) == (pytest.approx(0.5), pytest.approx(1.5))
    assert world.asked == [(7,), (7,)]


def test_later_ones_cover_the_time_since_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Scripted(monkeypatch, load=2.0)
    probe = world.probe()
    probe.measure([])
    world.pass_(300.0, cores=1.25)
    assert probe.measure([]).own_cores == pytest.approx(1.25)
    assert len(world.pauses) == 1


def test_a_process_that_began_meanwhile_used_all_its_seconds_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = Scripted(monkeypatch, load=2.0)
    probe = world.probe()
    probe.measure([])
    world.pass_(100.0, cores=0.0)
    world.used[2, 5.0] = 150.0
    assert probe.measure([]).own_cores == pytest.approx(1.5)


def test_a_sample_that_is_too_old_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Scripted(monkeypatch, load=2.0)
    probe = world.probe()
    probe.measure([])
    world.pass_(4000.0, cores=0.0)
    probe.measure([])
    assert len(world.pauses) == 2


def test_real_processes_are_found_with_their_children_and_the_dead_are_left_out() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    found = {pid for pid, _ in cpu_seconds_of([2**22 + 7])}
    assert {os.getpid(), child.pid} <= found
    assert child.stdin is not None
    child.stdin.close()
    child.wait()
    assert child.pid not in {pid for pid, _ in cpu_seconds_of([])}


def test_a_real_host_has_cores_and_memory() -> None:
    found: Any = HostProbe().measure([])
    assert found.cores >= 1
    assert found.available_gb > 0
    assert found.load_of_others >= 0
