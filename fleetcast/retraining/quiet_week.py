"""A quiet window for fleets that are never under the fixed limits: relative to their own week.

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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fleetcast.clock import parse_plain_utc
from fleetcast.files import read_json_lines
from fleetcast.schema import QuietVerdict
from fleetcast.settings import DecisionSettings

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

    def judged(self, quiet: QuietVerdict, now: datetime) -> QuietVerdict:
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
