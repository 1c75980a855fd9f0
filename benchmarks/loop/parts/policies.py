"""When to retrain, six ways: never, by the calendar, by drift, and told the truth.

Owns: the policies of the loop replay. The two that look at drift are the product: `DriftSource`,
`DriftMonitor`, `RetrainingDecisionEngine`, the quiet limits. No training waits for a quieter hour here: the
record holds three horizons (`quiet_hours` measures that). Does not know: how training is done.
"""

from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from adaptive_retraining_daemon import RetrainingDecisionEngine
from benchmarks.loop.parts.fleet import BIN_MS, DAY, ReplayFleet
from benchmarks.loop.parts.record import ReplayRecord
from drift_monitor import DriftMonitor
from fleetcast.clock import DAY_MS, DataClock, from_ms, iso_z, plain_utc, to_ms
from fleetcast.drift.evidence import DriftSource
from fleetcast.drift.seasonal.detector import READY
from fleetcast.forecast.registry import Registry, new_version_id
from fleetcast.retraining.decision import LEARNING
from fleetcast.retraining.inquiry import CPU, MEM, FleetLoad
from fleetcast.retraining.order import CONTEXT_FILE, training_context
from fleetcast.retraining.quiet import HostLoad, QuietWeek, quiet_verdict
from fleetcast.retraining.report import NOTHING, RetrainingCheck
from fleetcast.retraining.state import PROMOTED, REJECTED, Attempt, Verdict
from fleetcast.retraining.trainings import DataSpan, data_span, follow_up, learning
from fleetcast.schema import Floats32, QuietVerdict
from fleetcast.setting import override
from fleetcast.settings import CALIBRATED, DecisionSettings, Settings
from fleetcast.training.grid import TrainingGrid

NEVER, WEEKLY, DAILY, LITERAL, OURS, ORACLE = "never", "weekly", "daily", "literal", "ours", "oracle"
POLICIES = (NEVER, WEEKLY, DAILY, LITERAL, OURS, ORACLE)
UNSPECIALISED = "ours_unspecialised"  # ours, but every training moves the fleet's weights: run if asked for
ALL_POLICIES = (*POLICIES, UNSPECIALISED)
CHECK_BINS = 12  # an hour of data time between two looks
CRON_BIN = 3 * 12  # 03:00 UTC
ORACLE_AFTER = (72, 288, 864)  # bins after a change: at 6 h, 24 h and 72 h, each with more to see
IDLE_HOST = HostLoad(load_1m=0.0, own_cores=0.0, cores=2, available_gb=64.0)

Context = dict[str, Any]  # the content of training_context.json


class Policy(Protocol):
    """Asked every CHECK_BINS; answers with the context of a training, or None."""

    def wants(self, end: int) -> Context | None:
        """Say whether to train on everything before bin `end`."""

    def trained(self, verdict: Verdict) -> None:
        """Hear how a training ended."""


class Never:
    """Trains never."""

    def wants(self, end: int) -> Context | None:
        return None

    def trained(self, verdict: Verdict) -> None:
        pass


@dataclass
class Cron:
    """Trains every so many days at 03:00, whatever the data do."""

    fleet: ReplayFleet
    every_days: int

    def wants(self, end: int) -> Context | None:
        days, rest = divmod(end - self.fleet.begin - CRON_BIN, DAY)
        return {} if rest == 0 and days and days % self.every_days == 0 else None

    def trained(self, verdict: Verdict) -> None:
        pass


class Oracle:
    """Knows what changed and when; trains at ORACLE_AFTER with exactly that context."""

    def __init__(self, fleet: ReplayFleet) -> None:
        self._fleet = fleet
        self._due = sorted(
            (c[0].since_bin + after, i) for i, c in enumerate(fleet.changes) for after in ORACLE_AFTER
        )

    def wants(self, end: int) -> Context | None:
        told = None
        while self._due and self._due[0][0] <= end:
            told = self._due.pop(0)[1]
        if told is None:
            return None
        grid = self._fleet.grid
        drifting = [
            {
                "server": grid.server_names[item.server],
                "metric": grid.metrics[item.metric],
                "since": iso_z(from_ms(grid.start_ms + item.since_bin * BIN_MS)),
            }
            for item in self._fleet.changes[told]
        ]
        return {"rule": "told", "drifting": drifting}

    def trained(self, verdict: Verdict) -> None:
        pass


class Engine:
    """The product: drift monitor, quiet limits, decision engine with its safeguards, data clock."""

    def __init__(self, record: ReplayRecord, registry: Registry, settings: Settings, folder: Path) -> None:
        self._record, self._limits = record, settings.decision
        self._source = DriftSource(record, registry, settings.drift, BIN_MS, folder)
        self._clock = DataClock(record.newest_record_time)
        self._monitor = DriftMonitor(settings.drift.window_size, settings=settings.drift, clock=self._clock)
        self._engine = RetrainingDecisionEngine(clock=self._clock, wall_clock=self._clock)
        self._engine.record_training()  # the initial one
        self._week = QuietWeek(self._limits, folder / "decisions.jsonl")
        self._context = folder / CONTEXT_FILE
        self._attempts: list[Attempt] = []  # newest first
        self._changed_loss: float | None = None  # of the newest
        self._served_loss: float | None = None  # of the newest learning training
        self._training_days = settings.retraining.training_days
        self.in_alarm = self.checks = 0

    def wants(self, end: int) -> Context | None:
        now = self._clock.now()
        evidence = self._source.evidence(may_renew=True)
        self._monitor.observe(evidence)
        report, quiet = (
            self._monitor.report(),
            self._week.judge(fleet_verdict(self._record.fleet.grid, end, self._limits), now),
        )
        hours = self._limits.follow_up_hours if report.basis == CALIBRATED else 0.0
        learns = self._limits.learning == "on" and report.basis == CALIBRATED and report.status == READY
        decision = self._engine.decide(
            report.current_metrics(),
            quiet.is_quiet,
            initial_due=False,
            collecting=report.status_reason,
            follow_up=follow_up(
                self._attempts,
                self._context,
                now,
                hours,
                changed_loss=self._changed_loss,
                left=self._engine.trainings_left(),
            ),
            learning=self._learning(now) if learns else "",
        )
        self._week.note_line(now.timestamp(), {"quiet": asdict(quiet), "reason": decision.reason})
        self.checks += 1
        self.in_alarm += report.needs_retraining
        if not decision.should_retrain:
            return None
        check = RetrainingCheck(now, report, quiet, decision, "", NOTHING)
        context = training_context(check, evidence, self._source, self._context)
        attempt = Attempt(new_version_id(now), decision.rule, decision.reason, plain_utc(now))
        self._attempts = [attempt, *self._attempts]
        return {"attempt_id": attempt.id, **context}

    def trained(self, verdict: Verdict) -> None:
        self._engine.record_training(verdict.promoted)
        self._changed_loss = verdict.changed_loss
        if self._attempts[0].rule == LEARNING:
            self._served_loss = verdict.served_loss
        outcome = PROMOTED if verdict.promoted else REJECTED
        self._attempts[0] = replace(self._attempts[0], outcome=outcome)

    def _learning(self, now: datetime) -> str:
        """Return why a training would pay although nothing drifted, or ""."""
        oldest_ms = max(self._record.fleet.grid.start_ms, to_ms(now) - self._training_days * DAY_MS)
        return learning(
            self._attempts,
            data_span(self._source.last_trained),
            DataSpan(oldest_ms, to_ms(now)),
            served_loss=self._served_loss,
        )


def fleet_verdict(grid: TrainingGrid, end: int, settings: DecisionSettings | None = None) -> QuietVerdict:
    """Apply the specification's limits to the newest bin before `end`; the host counts as idle."""
    own = settings or DecisionSettings()
    newest = dict(zip(grid.metrics, grid.values[:, :, end - 1].T, strict=True))
    means = [_mean(newest.get(name)) for name in (CPU, MEM)]
    fleet = FleetLoad(len(grid.server_names), *means)
    limits = override({"quiet_cpu_percent": 60.0, "quiet_mem_percent": 70.0}, own)
    cpu_limit, mem_limit = limits.values()
    is_quiet = fleet.avg_cpu < cpu_limit and fleet.avg_mem < mem_limit
    return quiet_verdict(fleet, IDLE_HOST, limits, own, is_fleet_quiet=is_quiet)


def _mean(values: Floats32 | None) -> float | None:
    known = np.empty(0) if values is None else values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None
