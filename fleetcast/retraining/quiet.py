"""The verdict on a quiet period: the fleet's load, this host's load, and the fleet's own week.

Owns: the load of this host (psutil), the verdict with every number it rests on, and the week that
relaxes it. Does not know: the fleet's limits, which are edited in
`adaptive_retraining_daemon.py`, `check_quiet_period()`; how the fleet's load is asked for (`inquiry`).

**This host.** Load of others = 1-minute load of the system minus the cores that our own processes
used since the last measurement: this daemon, its children, and the processes that the caller names.

**A busy fleet.** Some fleets are never under the fixed limits. Load = the larger of mean CPU and
mean memory, each over its fixed limit: below 1 the fixed gate is open. Where it was never open for a
week, the lowest quarter of that week counts as quiet, and after a deadline the fleet's load is
ignored. The gate of this host always holds. No file is kept: the week stands in `decisions.jsonl`.
Measured on a recorded fleet at 89 % memory (docs/decisions/quiet-window.md): fixed gate open in 0 %
of the checks, the lowest quarter of the week in 25 %, longest wait 13 h.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from fleetcast.clock import monotonic, parse_plain_utc, sleep
from fleetcast.errors import CorruptFile
from fleetcast.files import read_json_lines
from fleetcast.retraining.decision import WEEK_S
from fleetcast.retraining.inquiry import CPU, MEM, FleetLoad, finite
from fleetcast.schema import QuietVerdict
from fleetcast.settings import DecisionSettings

logger = logging.getLogger(__name__)

FIRST_SAMPLE_S = 0.2  # the first measurement has no earlier one to take the difference to
OLDEST_SAMPLE_S = 900.0
BYTES_PER_GB = 1e9
FIXED = "fixed"  # of the setting quiet_window
SPACING_S = 300.0  # a check this soon after the last one adds nothing to the picture of a week
MIN_CHECKS = 84  # one every two hours; fewer give no picture of a week
QUARTILE = 0.25
LOAD = "fleet_load_of_limits"
BUSY = "not a quiet period"  # how a refusal for the fleet's or the host's load begins
MEASURED = {CPU: "fleet_cpu_percent", MEM: "fleet_mem_percent"}  # as a check's line has the fleet's means


@dataclass(frozen=True, slots=True)
class HostLoad:
    """One measurement of this host."""

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


def quiet_verdict(
    fleet: FleetLoad,
    host: HostLoad,
    limits: Mapping[str, float],
    settings: DecisionSettings,
    *,
    is_fleet_quiet: bool,
) -> QuietVerdict:
    """Join the fleet's answer and the host's into one verdict.

    Args:
        limits: `quiet_cpu_percent` and `quiet_mem_percent`, as compared for `is_fleet_quiet`.
    """
    cpu_limit, mem_limit = limits["quiet_cpu_percent"], limits["quiet_mem_percent"]
    load_limit, memory_limit = settings.host_load_per_core * host.cores, settings.host_min_available_gb
    is_idle, has_memory = host.load_of_others < load_limit, host.available_gb >= memory_limit
    means = (("cpu", fleet.cpu_percent, cpu_limit), ("mem", fleet.mem_percent, mem_limit))
    sent = (f"mean {name} {mean:.1f} % (limit {limit:g})" for name, mean, limit in means if mean is not None)
    steps = (
        (not fleet.away, f"the inference daemon cannot be asked: {fleet.away}"),
        (fleet.live_servers != 0, "no live server to measure"),
        (is_fleet_quiet, f"the fleet is busy: {', '.join(sent)}"),
        (is_idle, f"the host is busy: load of others {host.load_of_others:.2f}, limit {load_limit:.2f}"),
        (has_memory, f"the host has {host.available_gb:.1f} GB available, {memory_limit:g} needed"),
    )
    failed = next((why for passed, why in steps if not passed), "")
    return QuietVerdict(
        is_quiet=not failed,
        reason=failed or "quiet",
        measured={
            "live_servers": fleet.live_servers,
            "fleet_cpu_percent": fleet.cpu_percent,
            "fleet_mem_percent": fleet.mem_percent,
            "host_load_1m": host.load_1m,
            "host_own_cores": host.own_cores,
            "host_load_of_others": host.load_of_others,
            "host_available_gb": host.available_gb,
        },
        limits={
            "fleet_cpu_percent": cpu_limit,
            "fleet_mem_percent": mem_limit,
            "host_load_of_others": load_limit,
            "host_available_gb": memory_limit,
        },
        is_host_quiet=is_idle and has_memory,
    )


class QuietWeek:
    """Remembers a week of checks and relaxes a verdict by it. Not thread safe."""

    def __init__(self, settings: DecisionSettings, decisions: Path) -> None:
        """Read nothing yet.

        Args:
            decisions: the file of decisions; it and the older one beside it hold the week.
        """
        self._settings = settings
        self._decisions: Path | None = decisions  # None: read
        self._load_at: dict[float, float] = {}  # seconds since 1970 -> load, by time
        self._waiting_since_s: float | None = None

    def waiting_since_s(self, now: datetime) -> float | None:
        """Return since when a training waits for a quiet fleet, in seconds since 1970; None: none does."""
        self._read(now.timestamp())
        return self._waiting_since_s

    def note_line(self, at_s: float, line: Mapping[str, Any]) -> None:
        """Take in one check, as its line of `decisions.jsonl` has it."""
        self._read(at_s)
        quiet = line.get("quiet")
        measured = load_of(quiet) if isinstance(quiet, Mapping) else None
        self._note(at_s, measured, is_waiting=str(line.get("reason")).startswith(BUSY))

    def judge(self, quiet: QuietVerdict, now: datetime) -> QuietVerdict:
        """Return the verdict; quiet too where a busy fleet is as quiet as it gets, or past the deadline."""
        load = load_of({"measured": quiet.measured, "limits": quiet.limits})
        if quiet.is_quiet or load is None or load < 1 or not quiet.is_host_quiet:
            return quiet
        self._read(now.timestamp())
        if not self._applies(now.timestamp()):
            return quiet
        level = self._lowest_quartile()
        measured, limits = {**quiet.measured, LOAD: load}, {**quiet.limits, LOAD: level}
        relative = replace(quiet, measured=measured, limits=limits)
        if load <= level:
            reason = (
                f"quiet for this fleet: load {load:.2f} of its limits, lowest quarter of its week {level:.2f}"
            )
            return replace(relative, is_quiet=True, reason=reason)
        waited_h = self._waited_h(now.timestamp())
        deadline_h = self._settings.quiet_deadline_hours
        if waited_h >= deadline_h:
            reason = f"waited {waited_h:.1f} h for a quiet fleet, at most {deadline_h:g} h"
            return replace(relative, is_quiet=True, reason=reason)
        return relative

    def _read(self, now_s: float) -> None:
        """Take in the decisions that are still kept; skip lines that hold none, or are of the future."""
        if self._decisions is None:
            return
        path, self._decisions = self._decisions, None
        for at_s, line in past_checks(path, now_s):
            self.note_line(at_s, line)

    def _applies(self, now_s: float) -> bool:
        """Return whether the fixed gate was watched for a week and never open."""
        if self._settings.quiet_window == FIXED:
            return False
        self._forget(now_s)
        watched = len(self._load_at) >= MIN_CHECKS and now_s - next(iter(self._load_at)) >= 0.95 * WEEK_S
        return watched and all(load >= 1 for load in self._load_at.values())

    def _lowest_quartile(self) -> float:
        ordered = sorted(self._load_at.values())
        return ordered[math.ceil(QUARTILE * len(ordered)) - 1]

    def _waited_h(self, now_s: float) -> float:
        return 0.0 if self._waiting_since_s is None else (now_s - self._waiting_since_s) / 3600

    def _note(self, at_s: float, load: float | None, *, is_waiting: bool) -> None:
        while self._load_at and next(reversed(self._load_at)) > at_s:  # the clock was set back
            self._load_at.popitem()
        if self._waiting_since_s is not None:
            self._waiting_since_s = min(self._waiting_since_s, at_s)
        if not is_waiting:
            self._waiting_since_s = None
        elif self._waiting_since_s is None:
            self._waiting_since_s = at_s
        if load is not None and at_s - next(reversed(self._load_at), -math.inf) >= SPACING_S:
            self._load_at[at_s] = load

    def _forget(self, now_s: float) -> None:
        for at_s in [at_s for at_s in self._load_at if at_s < now_s - WEEK_S]:
            del self._load_at[at_s]


def past_checks(decisions: Path, now_s: float) -> list[tuple[float, dict[str, Any]]]:
    """Return the checks until now that `decisions.jsonl` still holds, with their times, by time.

    Args:
        now_s: seconds since 1970, as the times are; a later check is of a clock that was wrong.
    """
    lines: list[dict[str, Any]] = []
    for place in (decisions.with_name(f"{decisions.name}.1"), decisions):
        try:
            lines += read_json_lines(place)
        except (CorruptFile, OSError) as error:
            logger.warning("earlier decisions cannot be read: %s", error)
    known = [(at_s, line) for line in lines if (at_s := _seconds(line.get("at"))) is not None]
    return sorted((item for item in known if item[0] <= now_s), key=lambda item: item[0])


def load_of(quiet: Mapping[str, Any]) -> float | None:
    """Return the fleet's load over its fixed limits; None where it was not measured.

    >>> load_of({"measured": {"fleet_cpu_percent": 30.0}, "limits": {"fleet_cpu_percent": 60.0}})
    0.5
    """
    measured, limits = quiet.get("measured"), quiet.get("limits")
    if not isinstance(measured, Mapping) or not isinstance(limits, Mapping):
        return None
    pairs = [(finite(measured.get(name)), finite(limits.get(name))) for name in MEASURED.values()]
    shares = [value / limit for value, limit in pairs if math.isfinite(value) and limit > 0]
    return max(shares, default=None)


def _seconds(text: object) -> float | None:
    try:
        return parse_plain_utc(str(text)).timestamp()
    except (ValueError, OverflowError):
        return None
