"""The layout of a retraining check: `--once` text, `decisions.jsonl`, the log, figures for alerts.

Owns: the layout of all four, and which drifting series and broken sensors the log has named already
(each once, when it begins and when it ends; after a restart again). Does not know: how anything in
a check was measured or decided.
"""

import json
import logging
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from fleetcast.alerts.engine import CheckFigures
from fleetcast.clock import iso_z, parse_plain_utc
from fleetcast.drift.report import DriftReport
from fleetcast.drift.seasonal.detector import TOO_FEW_DAYS, EnoughDays
from fleetcast.promotion.audit import Standing
from fleetcast.promotion.evidence import Verdict
from fleetcast.retraining.ahead import STARTED as STARTED
from fleetcast.retraining.ahead import Ahead
from fleetcast.retraining.decision import Decision, RetrainingDecisionEngine, safeguards_json
from fleetcast.schema import QuietVerdict

logger = logging.getLogger(__name__)

MOST_LINES = 20  # a check
NOTHING, ADVISED, BESIDE, TRAINING = "nothing", "advised", "beside", "training"  # and STARTED
PAUSED = "paused"  # by a person


@dataclass(frozen=True, slots=True)
class RetrainingCheck:
    """What was measured, decided and done."""

    at: datetime  # by the Clock
    report: DriftReport
    quiet: QuietVerdict
    decision: Decision
    initial_missing: str  # what an initial training lacks; "" = it is due, or not asked any more
    action: str
    action_detail: str = ""
    attempt_id: str | None = None
    learning: str = ""  # why a training would pay although nothing drifted, or ""
    standing: Standing = field(default_factory=Standing)  # what a person ordered and did not lift
    bake: Verdict | None = None  # how the model in service stands beside the one before it
    problems: tuple[str, ...] = ()  # of the inference daemon
    ahead: Ahead = field(default_factory=Ahead)  # what the next hours promise

    def with_action(self, action: str, detail: str, attempt_id: str | None = None) -> "RetrainingCheck":
        """Return the check with what was done about it."""
        return replace(self, action=action, action_detail=detail, attempt_id=attempt_id)

    def as_json(self) -> dict[str, Any]:
        """Return the line of `decisions.jsonl`: inputs, rule, outcome."""
        decision = self.decision
        return {
            "at": iso_z(self.at),
            "drift": self.report.known_metrics(),
            "drift_status": self.report.status,
            "model_version": self.report.model_version,
            "initial_missing": self.initial_missing,
            "learning": self.learning,
            "quiet": asdict(self.quiet),
            "ahead": self.ahead.as_json(),
            "safeguards": safeguards_json(decision.safeguards),
            "rule": decision.rule,
            "should_retrain": decision.should_retrain,
            "reason": decision.reason,
            "outcome": self.action,
            "outcome_detail": self.action_detail,
            "attempt_id": self.attempt_id,
            **({"held_by": self.standing.held.by} if self.standing.held else {}),
            **({"paused_until": self.standing.paused.until} if self.standing.paused else {}),
        }

    def as_line(self) -> str:
        """Return that line as it is written."""
        return json.dumps(self.as_json(), allow_nan=False)

    def as_text(self) -> str:
        """Return what `--once` prints."""
        lines = [self.report.as_text(), "", f"Quiet period: {'yes' if self.quiet.is_quiet else 'no'}"]
        lines[-1] += "" if self.quiet.is_quiet else f" ({self.quiet.reason})"
        for name, value in self.quiet.measured.items():
            limit = self.quiet.limits.get(name)
            shown = "not measured" if value is None else f"{value:.2f}"
            lines.append(f"  {name:<22} {shown:>12}" + ("" if limit is None else f"  limit {limit:g}"))
        if self.ahead.why:
            lines.append(f"Hours ahead: {self.ahead.why}")
        lines += ["", "Safeguards"]
        for check in self.decision.safeguards:
            form = ".0f" if check.unit == "trainings" else ".2f"
            shown = "none yet" if check.value is None else format(check.value, form)
            mark = "ok" if check.passed else "reached"
            lines.append(f"  {check.name:<27} {shown:>9}  limit {check.limit:g} {check.unit}  {mark}")
        if self.initial_missing:
            lines.append(f"  initial training: not yet, {self.initial_missing}")
        if self.problems:
            lines += ["", "Inference daemon", *(f"  {text}" for text in self.problems)]
        if self.standing.held:
            held = self.standing.held
            lines += ["", f"Held since {held.since} by {held.by}: no training puts a model into service"]
        if self.standing.paused:
            paused = self.standing.paused
            lines += ["", f"Trainings are paused until {paused.until} by {paused.by}: {paused.why}"]
        if self.bake and self.standing.bake:
            bake = self.standing.bake
            lines += ["", f"Bake of {bake.version} beside {bake.against}: {self.bake.why}"]
        answer = "retrain" if self.decision.should_retrain else "do not retrain"
        lines += ["", f"Decision: {answer} ({self.decision.reason})"]
        if self.action_detail:
            lines.append(self.action_detail)
        return "\n".join(lines)


class DriftLog:
    """Compares each report with the one before, and logs the difference."""

    def __init__(self) -> None:
        self._drifting: set[tuple[str, str]] = set()
        self._events: set[tuple[str, str, str | None]] = set()
        self._waiting: EnoughDays | None = None

    def note(self, report: DriftReport) -> None:
        """Log what began and what ended."""
        verdict = report.verdict
        if verdict is None:
            return
        drifting = {(item.server_name, item.metric): item.sentence() for item in verdict.drifting}
        begun = [sentence for key, sentence in drifting.items() if key not in self._drifting]
        for sentence in begun[:MOST_LINES]:
            logger.info("series in alarm: %s", sentence)
        ended = len(self._drifting - drifting.keys())
        if len(begun) > MOST_LINES or ended:
            logger.info(
                "series in alarm=%d begun=%d ended=%d of compared=%d",
                *(len(drifting), len(begun), ended, verdict.n_compared),
            )
        events = {(item.kind, item.server_name, item.metric) for item in verdict.events}
        for kind, server, metric in sorted(events - self._events, key=str)[:MOST_LINES]:
            logger.warning(
                "data quality, not drift: kind=%s server=%s metric=%s", kind, server, metric or "all"
            )
        self._drifting, self._events = set(drifting), events
        self._note_waiting(verdict.enough_days)

    def _note_waiting(self, waiting: EnoughDays | None) -> None:
        if waiting is not None and waiting != self._waiting:
            logger.info(
                "series not compared=%d reason=%s %s", waiting.n_series, TOO_FEW_DAYS, waiting.sentence()
            )
        self._waiting = waiting


def alert_figures(check: RetrainingCheck, engine: RetrainingDecisionEngine) -> CheckFigures:
    """Return what alerts are made of."""
    marks = (check.standing.held, check.standing.paused)
    back, cooldown = check.standing.taken_back, check.standing.cooldown
    why = cooldown.why if cooldown else ""
    return CheckFigures(
        drift_score=check.report.metrics.get("combined_score"),
        training_failures=engine.backoff.failures,
        trainings_7d=engine.trainings_in_week(),
        held_since=min((parse_plain_utc(mark.since) for mark in marks if mark), default=None),
        error_ratio=check.report.served_error.as_json()["fleet"],
        taken_back=(parse_plain_utc(back[0]), why) if back else None,
    )
