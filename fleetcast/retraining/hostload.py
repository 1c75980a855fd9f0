"""How busy this host is with other people's work, before a training takes its share.

Owns: psutil for the retraining daemon. Does not know: how busy is too busy.

Load of others = 1-minute load of the system minus the cores our own processes used since the
last measurement: this daemon, everything it started, and those it is told about.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import psutil

from fleetcast.clock import monotonic, sleep

FIRST_SAMPLE_S = 0.2  # without an earlier measurement there is nothing to take the difference to
OLDEST_SAMPLE_S = 900.0
BYTES_PER_GB = 1e9


@dataclass(frozen=True, slots=True)
class HostLoad:
    """One measurement of a host."""

    load_1m: float
    own_cores: float
    cores: int
    available_gb: float

    @property
    def load_of_others(self) -> float:
        """Return the load that is not ours; never negative."""
        return max(0.0, self.load_1m - self.own_cores)


class HostProbe:
    """Measures this host again and again. Not thread safe."""

    def __init__(
        self,
        cpu_seconds: Callable[[Iterable[int]], dict[tuple[int, float], float]] | None = None,
        wall_s: Callable[[], float] = monotonic,
        pause: Callable[[float], None] = sleep,
    ) -> None:
        self._cpu_seconds = cpu_seconds or cpu_seconds_of
        self._wall_s = wall_s
        self._pause = pause
        self._last: dict[tuple[int, float], float] = {}
        self._last_at_s: float | None = None

    def measure(self, own_pids: Iterable[int]) -> HostLoad:
        """Return the load now; `own_pids` and all their children are our own."""
        own_pids = tuple(own_pids)
        if self._last_at_s is None or self._wall_s() - self._last_at_s > OLDEST_SAMPLE_S:
            self._last, self._last_at_s = self._cpu_seconds(own_pids), self._wall_s()
            self._pause(FIRST_SAMPLE_S)
        used = self._cpu_seconds(own_pids)
        now_s = self._wall_s()
        elapsed_s = max(now_s - self._last_at_s, 1e-3)
        # a process that is new since then has used all its seconds since then
        own_s = sum(max(0.0, seconds - self._last.get(key, 0.0)) for key, seconds in used.items())
        self._last, self._last_at_s = used, now_s
        return HostLoad(
            load_1m=psutil.getloadavg()[0],
            own_cores=own_s / elapsed_s,
            cores=psutil.cpu_count() or 1,
            available_gb=psutil.virtual_memory().available / BYTES_PER_GB,
        )


def cpu_seconds_of(pids: Iterable[int]) -> dict[tuple[int, float], float]:
    """Return the CPU seconds of this process, of `pids` and of all their children.

    Keyed by pid and start time: a number used again is another process.
    """
    used = {}
    for pid in {None, *pids}:
        try:
            root = psutil.Process(pid)
            family = [root, *root.children(recursive=True)]
        except psutil.Error:
            continue
        for process in family:
            try:
                times = process.cpu_times()
                used[process.pid, process.create_time()] = times.user + times.system
            except psutil.Error:  # it ended meanwhile
                continue
    return used
