"""Whether it is a quiet period: the fleet's means and the host's load, with every number named.

Owns: reading the fleet's load out of `/predictions/current?fields=current`, and the verdict.
Does not know: the fleet's limits (they stand in `check_quiet_period()`, to be edited there), HTTP.

How busy this host is with other people's work, before a training takes its share.

Owns: psutil for the retraining daemon. Does not know: how busy is too busy.

Load of others = 1-minute load of the system minus the cores our own processes used since the
last measurement: this daemon, everything it started, and those it is told about.

A quiet window for fleets that are never under the fixed limits: relative to their own week.

Owns: the fleet's load at the checks of the last week, whether the fixed gate was ever open in it,
when a busy fleet counts as quiet for itself, and the deadline after which it is not waited for
any longer. It keeps no file: the week stands in `decisions.jsonl`. Does not know: the host, whose
own gate always holds; how load is measured.

Load = the larger of mean CPU and mean memory, each over its fixed limit: below 1 the fixed gate
is open. Measured on a recorded fleet at 89 % memory (docs/decisions/quiet-window.md): fixed gate
open in 0 % of checks, the lowest quartile of the week in 25 %, longest wait 13 h.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from fleetcast.clock import monotonic, parse_plain_utc, sleep
from fleetcast.errors import DaemonAway
from fleetcast.files import read_json_lines
from fleetcast.schema import QuietVerdict
from fleetcast.settings import DecisionSettings

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


FIXED, AUTO = "fixed", "auto"
WEEK_S = 7 * 86_400.0
SPACING_S = 300.0  # a check this soon after the last one says nothing new about a week
MIN_CHECKS = 84  # two a day of each hour or so; fewer are no picture of a week
QUARTILE = 0.25
LOAD = "fleet_load_of_limits"
BUSY = "not a quiet period"  # how a refusal for the fleet's or the host's load begins
_METRICS = ("fleet_cpu_percent", "fleet_mem_percent")


@dataclass(frozen=True, slots=True)
class _Look:
    at_s: float
    load: float


class QuietWeek:
    """Remembers a week of checks and relaxes a verdict by it. Not thread safe."""

    def __init__(self, settings: DecisionSettings, decisions: Path) -> None:
        """Read nothing yet.

        Args:
            decisions: the file of decisions; it and the older one beside it hold the week.
        """
        self._settings = settings
        self._decisions: Path | None = decisions  # None: read
        self._looks: list[_Look] = []  # by time
        self._waiting_since_s: float | None = None

    def note(self, at: datetime, quiet: QuietVerdict, *, reason: str) -> None:
        """Take in one check."""
        self._read()
        measured = load_of({"measured": quiet.measured, "limits": quiet.limits})
        self._note(at.timestamp(), measured, is_waiting=reason.startswith(BUSY))

    def judge(self, quiet: QuietVerdict, now: datetime) -> QuietVerdict:
        """Return the verdict, quiet also where this fleet is as quiet as it gets, or was waited for."""
        load = load_of({"measured": quiet.measured, "limits": quiet.limits})
        if quiet.is_quiet or load is None or load < 1 or not quiet.is_host_quiet:
            return quiet
        self._read()
        if not self._applies(now.timestamp()):
            return quiet
        level = self._lowest_quartile()
        told = replace(quiet, measured={**quiet.measured, LOAD: load}, limits={**quiet.limits, LOAD: level})
        if load <= level:
            reason = (
                f"quiet for this fleet: load {load:.2f} of its limits, lowest quarter of its week {level:.2f}"
            )
            return replace(told, is_quiet=True, reason=reason)
        waited_h = self._waited_h(now.timestamp())
        deadline_h = self._settings.quiet_deadline_hours
        if waited_h >= deadline_h:
            reason = f"waited {waited_h:.1f} h for a quiet fleet, at most {deadline_h:g} h"
            return replace(told, is_quiet=True, reason=reason)
        return told

    def _read(self) -> None:
        """Take in the decisions that are still kept; what is no decision is left out."""
        if self._decisions is None:
            return
        path, self._decisions = self._decisions, None
        lines = [*read_json_lines(path.with_name(f"{path.name}.1")), *read_json_lines(path)]
        known = [(at_s, line) for line in lines if (at_s := _seconds(line.get("at"))) is not None]
        for at_s, line in sorted(known, key=lambda item: item[0]):
            quiet = line.get("quiet")
            measured = load_of(quiet) if isinstance(quiet, Mapping) else None
            self._note(at_s, measured, is_waiting=str(line.get("reason")).startswith(BUSY))

    def _applies(self, now_s: float) -> bool:
        """Whether the fixed gate was watched for a week and never open."""
        if self._settings.quiet_window == FIXED:
            return False
        self._forget(now_s)
        watched = len(self._looks) >= MIN_CHECKS and now_s - self._looks[0].at_s >= 0.95 * WEEK_S
        return watched and all(look.load >= 1 for look in self._looks)

    def _lowest_quartile(self) -> float:
        ordered = sorted(look.load for look in self._looks)
        return ordered[math.ceil(QUARTILE * len(ordered)) - 1]

    def _waited_h(self, now_s: float) -> float:
        return 0.0 if self._waiting_since_s is None else (now_s - self._waiting_since_s) / 3600

    def _note(self, at_s: float, load: float | None, *, is_waiting: bool) -> None:
        if not is_waiting:
            self._waiting_since_s = None
        elif self._waiting_since_s is None:
            self._waiting_since_s = at_s
        if load is not None and (not self._looks or at_s - self._looks[-1].at_s >= SPACING_S):
            self._looks.append(_Look(at_s, load))

    def _forget(self, now_s: float) -> None:
        del self._looks[: bisect_left(self._looks, now_s - WEEK_S, key=lambda look: look.at_s)]


def load_of(quiet: Mapping[str, Any]) -> float | None:
    """Return the fleet's load over its fixed limits; None where it was not measured.

    >>> load_of({"measured": {"fleet_cpu_percent": 30.0}, "limits": {"fleet_cpu_percent": 60.0}})
    0.5
    """
    measured, limits = quiet.get("measured"), quiet.get("limits")
    if not isinstance(measured, Mapping) or not isinstance(limits, Mapping):
        return None
    pairs = [(measured.get(name), limits.get(name)) for name in _METRICS]
    shares = [
        float(value) / float(limit)
        for value, limit in pairs
        if isinstance(value, int | float) and isinstance(limit, int | float) and limit > 0
    ]
    return max(shares, default=None)


def _seconds(text: object) -> float | None:
    try:
        return parse_plain_utc(str(text)).timestamp()
    except ValueError:
        return None


CPU, MEM = "cpu_pct", "mem_pct"


class FleetMean(float):
    """A mean over the fleet that notes the limit it is compared with.

    So the literal in `check_quiet_period()` is what decides and what is reported, also after
    somebody edited it. A limit from the settings goes before the literal. A metric that was
    not measured (NaN) is below every limit: it does not block.

    >>> mean = FleetMean(75.0)
    >>> mean < 60.0, mean.limit
    (False, 60.0)
    >>> FleetMean(math.nan) < 60.0
    True
    """

    limit: float | None = None
    limit_by_setting: float | None = None

    @classmethod
    def of(cls, value: float | None, limit_by_setting: float | None) -> "FleetMean":
        """Return the mean, or one that was not measured."""
        mean = cls(math.nan if value is None else value)
        mean.limit_by_setting = limit_by_setting
        return mean

    def __lt__(self, limit: float) -> bool:
        self.limit = limit if self.limit_by_setting is None else self.limit_by_setting
        return not self.is_measured or float(self) < self.limit

    @property
    def is_measured(self) -> bool:
        """Whether the fleet sends the metric."""
        return not math.isnan(self)


@dataclass(frozen=True, slots=True)
class FleetLoad:
    """Means over the live servers; None = no live server sends it."""

    live_servers: int | None = None
    cpu_percent: float | None = None
    mem_percent: float | None = None
    away: str = ""  # why the inference daemon could not be asked


def fleet_load(document: Mapping[str, Any]) -> FleetLoad:
    """Return the load out of the answer of `/predictions/current`.

    Raises:
        DaemonAway: the answer has another shape.
    """
    predictions = document.get("predictions")
    if not isinstance(predictions, Mapping):
        raise DaemonAway("the inference daemon's predictions have another shape: no `predictions`")
    current: list[Mapping[str, Any]] = [
        server["current"]
        for server in predictions.values()
        if isinstance(server, Mapping)
        and isinstance(server.get("current"), Mapping)
        and server.get("stale") is not True
    ]
    return FleetLoad(len(current), _mean(current, CPU), _mean(current, MEM))


def _mean(current: list[Mapping[str, Any]], metric: str) -> float | None:
    values = [
        float(value)
        for server in current
        if isinstance(value := server.get(metric), int | float) and math.isfinite(value)
    ]
    return sum(values) / len(values) if values else None


def quiet_verdict(
    fleet: FleetLoad,
    means: Mapping[str, FleetMean],
    host: HostLoad,
    *,
    is_fleet_quiet: bool,
    settings: DecisionSettings,
) -> QuietVerdict:
    """Join the fleet's answer and the host's into one verdict.

    Args:
        means: "cpu" and "mem", after the comparison that made `is_fleet_quiet`.
    """
    load_limit, memory_limit = settings.host_load_per_core * host.cores, settings.host_min_available_gb
    is_idle, has_memory = host.load_of_others < load_limit, host.available_gb >= memory_limit
    steps = (
        (not fleet.away, f"the inference daemon cannot be asked: {fleet.away}"),
        (fleet.live_servers != 0, "no live server to measure"),
        (is_fleet_quiet, f"the fleet is busy: {_shown(means)}"),
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
            **{f"fleet_{name}_percent": mean.limit for name, mean in means.items() if mean.limit is not None},
            "host_load_of_others": load_limit,
            "host_available_gb": memory_limit,
        },
        is_host_quiet=is_idle and has_memory,
    )


def _shown(means: Mapping[str, FleetMean]) -> str:
    return ", ".join(
        f"mean {name} {mean:.1f} %" + ("" if mean.limit is None else f" (limit {mean.limit:g})")
        for name, mean in means.items()
        if mean.is_measured
    )
