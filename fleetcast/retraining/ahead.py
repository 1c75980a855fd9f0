"""The quiet window ahead: a training may wait, once, for an hour that our own forecast calls clearly quieter.

Owns: which hour is clearly quieter, how far forecasts of the fleet's load were off, and since when a
training waits. Does not know: how the fleet is forecast (the inference daemon says it in `/status`,
`inquiry` reads it), drift, safeguards. Asked last, of trainings that would start now.

**Clearly quieter.** The mean CPU (of a fleet that sends none: memory) that is expected of an hour must be
below what is measured now, and below what is expected of the hour that has begun, by more than
`LEAST_POINTS`, by more than `LEAST_SHARE` of it, and by more than forecasts of that hour were off: four of
five in the last week, and the newest three (a fleet that has just changed is forecast badly). Memory must
not be expected higher than now by `LEAST_POINTS`, nor at its limit. docs/decisions/quiet-window.md.

**Once.** The hour is fixed when a training first waits. The training starts earlier where newer forecasts
call no hour until then quieter by `GO_ON_POINTS`, and never later. It does not wait again until a training
has started, or none was asked for within the deadline. Where the fleet turns out busy then, its load is
ignored past the deadline.

No file is kept: what was measured, expected and waited for stands in `decisions.jsonl`.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from fleetcast.clock import from_ms, iso_z, parse_plain_utc
from fleetcast.retraining.decision import INITIAL, LEARNING, NONE, ORDERED, WEEK_S, Decision
from fleetcast.retraining.inquiry import CPU, FLEET_AHEAD, MEM, FleetAhead, finite, fleet_ahead
from fleetcast.retraining.quiet import FIXED, MEASURED, QuietWeek, load_of, past_checks
from fleetcast.schema import Floats, QuietVerdict
from fleetcast.settings import DecisionSettings

LOOK_S = 8 * 3600.0
STALE_S, EARLY_S = 1800.0, 900.0  # since the first hour began; until it begins
LEAST_POINTS, LEAST_SHARE = 2.0, 0.1
GO_ON_POINTS = 1.0
RELIED, NEWEST, MIN_COMPARED = 0.8, 3, 24
WAITS = "it waits for a quieter hour"  # how such a refusal begins
STARTED = "started"  # the outcome of a check that started a training
_SPACING_S, _SAID_EVERY_S = 60.0, 3300.0
_SHORT = {CPU: "cpu", MEM: "mem"}


@dataclass(frozen=True, slots=True)
class Ahead:
    """What the look ahead found."""

    forecast: FleetAhead = field(default_factory=FleetAhead)
    why: str = ""  # in words; "" = there was nothing to ask
    since_s: float | None = None  # seconds since 1970 from which a training waits
    until_s: float | None = None  # that it waits for at the latest; None: it need not wait

    def as_json(self) -> dict[str, Any]:
        """Return what stands in `decisions.jsonl`."""
        times = {"since": self.since_s, "until": self.until_s}
        return {
            FLEET_AHEAD: self.forecast.as_json(),
            "why": self.why,
            **{name: iso_z(_time(at_s)) for name, at_s in times.items() if at_s is not None},
        }


@dataclass(frozen=True, slots=True)
class Postponed:
    """A training that waits, or has waited, for its hour."""

    since_s: float
    until_s: float
    asked_s: float  # when a training was last asked for
    rule: str  # that asked for it at first


def may_wait(decision: Decision) -> bool:
    """Return whether a training that would start now may wait: not a fleet's first, nor a person's."""
    return decision.should_retrain and decision.rule not in (INITIAL, ORDERED)


class QuietAhead:
    """Remembers what was expected of the fleet and what came, and lets a training wait. Not thread safe.

    The week that relaxes the limits of a quiet period is remembered along with it.
    """

    def __init__(self, settings: DecisionSettings, decisions: Path) -> None:
        """Read nothing yet.

        Args:
            decisions: the file of decisions; it and the older one beside it hold what is remembered.
        """
        self._is_on = settings.quiet_ahead == "on" and settings.quiet_window != FIXED
        self._deadline_s = settings.quiet_deadline_hours * 3600
        self._week = QuietWeek(settings, decisions)
        self._decisions: Path | None = decisions  # None: read
        self._times: list[float] = []  # of the checks of a week, rising
        self._measured: dict[str, list[float]] = {CPU: [], MEM: []}  # by metric, NaN = not
        self._said: list[FleetAhead] = []  # about one an hour
        self._postponed: Postponed | None = None

    def judge(self, quiet: QuietVerdict, now: datetime) -> QuietVerdict:
        """Return the verdict as the week relaxes it; quiet past the deadline of a training that waited."""
        quiet = self._week.judge(quiet, now)
        if not self._is_on:
            return quiet
        self._read(now.timestamp())
        waits = self._postponed
        load = load_of({"measured": quiet.measured, "limits": quiet.limits})
        is_owed = waits is not None and waits.rule != LEARNING  # one that is not urgent waits on
        if waits is None or not is_owed or quiet.is_quiet or not quiet.is_host_quiet or not load or load < 1:
            return quiet
        waited_s = now.timestamp() - waits.since_s
        if waited_s < self._deadline_s:
            return quiet
        told = f"waited {waited_s / 3600:.1f} h, first for a quieter hour, then for a quiet fleet"
        return replace(quiet, is_quiet=True, reason=f"{told}, at most {self._deadline_s / 3600:g} h")

    def ask(
        self, decision: Decision, now: datetime, quiet: QuietVerdict, forecast: FleetAhead, *, is_asked: bool
    ) -> tuple[Decision, Ahead]:
        """Return the decision, refused where the training should wait, and what the look ahead found.

        Args:
            quiet: the verdict that the decision rests on.
            is_asked: whether this decision may wait at all.
        """
        if not is_asked or not may_wait(decision):
            return decision, Ahead(forecast)
        found = self.look(now, quiet, forecast, self._week.waiting_since_s(now))
        if found.until_s is None:
            return decision, found
        return replace(decision, should_retrain=False, reason=f"{found.why}; {decision.reason}"), found

    def look(
        self, now: datetime, quiet: QuietVerdict, forecast: FleetAhead, waiting_since_s: float | None = None
    ) -> Ahead:
        """Return whether a training that would start now should wait.

        Args:
            quiet: the verdict that let it pass.
            waiting_since_s: from when it waited for a quiet fleet until now; None: it did not.
        """
        now_s, found = now.timestamp(), Ahead(forecast)
        if not self._is_on:
            return found
        self._read(now_s)
        waits = self._postponed
        if waits and not waits.since_s <= now_s < waits.until_s:
            told = f"it waited since {_clock(waits.since_s)} for the hour of {_clock(waits.until_s)}"
            return replace(found, why=f"{told}, and waits only once")
        why = forecast.missing or _why_unusable(forecast, now_s)
        if why:
            return replace(found, why=why)
        since_s = waits.since_s if waits else min(now_s, waiting_since_s or now_s)
        latest_s = waits.until_s if waits else min(now_s + LOOK_S, since_s + self._deadline_s)
        hour = self._quieter_hour(now_s, latest_s, quiet, forecast, is_waiting=waits is not None)
        if isinstance(hour, str):
            return replace(found, why=hour)
        until_s = waits.until_s if waits else forecast.start_of(hour.step)
        told = f"{WAITS}, until {_clock(until_s)} UTC at the latest: {hour.told}"
        return replace(found, why=told, since_s=since_s, until_s=until_s)

    def note(self, at: datetime, line: Mapping[str, Any]) -> None:
        """Take in one check, as its line of `decisions.jsonl` has it."""
        self._read(at.timestamp())
        self._week.note_line(at.timestamp(), line)
        self._note(at.timestamp(), line)

    def _read(self, now_s: float) -> None:
        """Take in the decisions that are still kept; skip lines that hold none, or are of the future."""
        if self._decisions is None:
            return
        path, self._decisions = self._decisions, None
        for at_s, line in past_checks(path, now_s):
            self._note(at_s, line)

    def _note(self, at_s: float, line: Mapping[str, Any]) -> None:
        said = line.get("ahead")
        said = said if isinstance(said, Mapping) else {}
        self._forget_later(at_s)
        self._note_wait(at_s, line, said)
        if self._times and at_s < self._times[-1] + _SPACING_S:
            return
        quiet = line.get("quiet")
        measured = quiet.get("measured") if isinstance(quiet, Mapping) else None
        measured = measured if isinstance(measured, Mapping) else {}
        self._times.append(at_s)
        for metric, values in self._measured.items():
            values.append(finite(measured.get(MEASURED[metric])))
        forecast = fleet_ahead(said)
        if not forecast.missing and (
            not self._said or forecast.start_s >= self._said[-1].start_s + _SAID_EVERY_S
        ):
            self._said.append(forecast)
        self._forget(at_s)

    def _note_wait(self, at_s: float, line: Mapping[str, Any], said: Mapping[str, Any]) -> None:
        waits, is_asked = self._postponed, line.get("rule") != NONE
        since_s, until_s = _seconds(said.get("since")), _seconds(said.get("until"))
        if line.get("outcome") == STARTED:
            self._postponed = None
        elif waits is not None and is_asked:
            self._postponed = replace(waits, asked_s=max(waits.asked_s, at_s))
        elif waits is not None and at_s - waits.asked_s >= max(self._deadline_s, LOOK_S):
            self._postponed = None
        elif waits is None and until_s is not None and since_s is not None and since_s <= at_s:
            until_s = min(until_s, at_s + LOOK_S, since_s + self._deadline_s)
            if at_s < until_s:
                self._postponed = Postponed(since_s, until_s, at_s, str(line.get("rule")))

    def _forget_later(self, at_s: float) -> None:
        """Forget what is of the future: the clock was set back."""
        if not self._times or self._times[-1] <= at_s:
            return
        kept = bisect.bisect_right(self._times, at_s)
        for values in (self._times, *self._measured.values()):
            del values[kept:]
        self._said = [said for said in self._said if said.start_s <= at_s + EARLY_S]
        if self._postponed is not None and self._postponed.since_s > at_s:
            self._postponed = None

    def _forget(self, now_s: float) -> None:
        gone = bisect.bisect_left(self._times, now_s - WEEK_S)
        for values in (self._times, *self._measured.values()):
            del values[:gone]
        self._said = [said for said in self._said if said.start_s >= now_s - WEEK_S - LOOK_S]

    def _quieter_hour(
        self, now_s: float, latest_s: float, quiet: QuietVerdict, forecast: FleetAhead, *, is_waiting: bool
    ) -> "_Hour | str":
        """Return the quietest of the hours that are clearly quieter than now, or why there is none."""
        metric = next((name for name in (CPU, MEM) if _is_known(quiet, forecast, name)), None)
        if metric is None:
            return "no forecast of what is measured of the fleet's load"
        # the hours of a newer forecast begin at other minutes than the one that is waited for
        last_s = latest_s + forecast.step_s - 1 if is_waiting else latest_s
        steps = [step for step in range(1, forecast.n_steps) if now_s < forecast.start_of(step) <= last_s]
        if not steps:
            return "no whole hour is forecast before the training has to start"
        expected = forecast.means[metric]
        measured = finite(quiet.measured.get(MEASURED[metric]))
        margins, n_compared = self._margins(metric, forecast.step_s, steps, now_s)
        if n_compared < MIN_COMPARED:
            return f"{n_compared} forecasts of such hours were compared with what came, {MIN_COMPARED} needed"
        level = min(measured, expected[0])
        less = {step: max(margins[step], LEAST_POINTS, LEAST_SHARE * level) for step in steps}
        if is_waiting:  # a smaller promise keeps it waiting than made it wait
            less = dict.fromkeys(steps, GO_ON_POINTS)
        clear = [step for step in steps if expected[step] < level - less[step]]
        kept = [step for step in clear if _keeps_memory(quiet, forecast, step)]
        best = min(kept or clear or steps, key=lambda step: (expected[step], step))
        told = f"mean {_SHORT[metric]} {measured:.1f} % now, {expected[best]:.1f} % expected from "
        told += f"{_clock(forecast.start_of(best))} on"
        if not clear:
            return f"no hour is clearly quieter: {told}, {less[best]:.1f} points less needed"
        if not kept:
            return f"{told}, but with mem {forecast.means[MEM][best]:.1f} %"
        return _Hour(best, told)

    def _margins(
        self, metric: str, step_s: float, steps: Sequence[int], now_s: float
    ) -> tuple[dict[int, float], int]:
        """Return by how many points forecasts of each step were off, and how many at least were compared."""
        times, values = np.array(self._times), np.array(self._measured[metric])
        is_known = np.isfinite(values)
        times, sums = times[is_known], np.concatenate([[0.0], np.cumsum(values[is_known])])
        margins, n_compared = {}, []
        for step in steps:
            said = [
                (item.start_of(step), item.means[metric][step])
                for item in self._said
                if item.step_s == step_s and len(item.means.get(metric, ())) > step
            ]
            errors = _errors(np.array(said).reshape(-1, 2), step_s, times, sums, now_s)
            n_compared.append(len(errors))
            newest = max(errors[-NEWEST:], default=math.inf)
            margins[step] = max(float(np.quantile(errors, RELIED)), newest) if len(errors) else math.inf
        return margins, min(n_compared)


@dataclass(frozen=True, slots=True)
class _Hour:
    step: int
    told: str


def _errors(said: Floats, step_s: float, times: Floats, sums: Floats, now_s: float) -> Floats:
    """Return how far forecasts of whole hours were off, by the time of the hour.

    Args:
        said: (forecast, 2) start of the hour, mean.
        times: (check,) rising.
        sums: (check + 1,) of what was measured.
    """
    said = said[said[:, 0] + step_s <= now_s]
    first, last = np.searchsorted(times, said[:, 0]), np.searchsorted(times, said[:, 0] + step_s)
    is_measured = last > first
    means = (sums[last] - sums[first])[is_measured] / (last - first)[is_measured]
    return np.asarray(np.abs(means - said[is_measured, 1]))


def _is_known(quiet: QuietVerdict, forecast: FleetAhead, metric: str) -> bool:
    return metric in forecast.means and math.isfinite(finite(quiet.measured.get(MEASURED[metric])))


def _keeps_memory(quiet: QuietVerdict, forecast: FleetAhead, step: int) -> bool:
    """Return whether memory is not clearly higher than now in an hour, nor reaches its limit."""
    if not _is_known(quiet, forecast, MEM):
        return True
    measured, expected = finite(quiet.measured[MEASURED[MEM]]), forecast.means[MEM]
    limit = quiet.limits.get(MEASURED[MEM], math.inf)
    return expected[step] <= min(measured, expected[0]) + LEAST_POINTS and (
        expected[step] < limit or measured >= limit
    )


def _why_unusable(forecast: FleetAhead, now_s: float) -> str:
    age_s = now_s - forecast.start_s
    if age_s > STALE_S:
        return f"the newest forecast of the fleet is {age_s / 60:.0f} minutes old"
    if age_s < -EARLY_S:
        return f"the newest forecast of the fleet begins {-age_s / 60:.0f} minutes from now"
    return ""


def _seconds(text: object) -> float | None:
    try:
        return parse_plain_utc(text).timestamp() if isinstance(text, str) else None
    except (ValueError, OverflowError):
        return None


def _time(at_s: float) -> datetime:
    return from_ms(int(at_s * 1000))


def _clock(at_s: float) -> str:
    return f"{_time(at_s):%Y-%m-%d %H:%M}"
