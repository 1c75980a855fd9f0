"""The layout of a drift report: as text, and as `drift_metrics.json`.

Owns: the layout of the report and of the file (format: docs/formats.md), and how a drifting
series is named there. Does not know: how the figures were computed, which of them decide.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from fleetcast.clock import from_ms, iso_z
from fleetcast.drift.evidence import DriftEvidence
from fleetcast.drift.literal.baseline import Baseline
from fleetcast.drift.literal.series import RelativeErrors, SeriesDrift, geometric_mean
from fleetcast.drift.literal.window import PairWindow
from fleetcast.drift.seasonal.detector import (
    COLLECTING,
    TOO_FEW_DAYS,
    DriftingSeries,
    DriftVerdict,
    EnoughDays,
    until,
)
from fleetcast.settings import CALIBRATED, LITERAL

MOST_NAMED = 10  # series in the report
MOST_EVENTS = 50
OK = "OK"
RETRAIN = "RETRAIN NOW"
IN_ORDER = "neither the model nor what clients get is in alarm by error"
STALE_NOT_FELT = "the model is stale; clients do not feel it: the experts make up for it"
STALE_AND_FELT = "the model is stale, and clients feel it: the last value would serve them as well"
FRESH_BUT_FELT = "the model is not stale, but the last value would serve clients as well"
_NAMES = {
    "per": "Prediction error rate (PER)",
    "dss": "Distribution shift score (DSS)",
    "fds": "Feature drift score (FDS)",
    "anomaly_rate": "Anomaly rate",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftReport:
    """One check of the drift window: the evidence, the scores, what they say."""

    metrics: Mapping[str, float | None]  # per, dss, fds, anomaly_rate, combined_score: those that decide
    needs_retraining: bool
    exceeded: tuple[str, ...]  # scores over their threshold
    thresholds: Mapping[str, float]  # by the same names as metrics
    weights: Mapping[str, float]
    trends: Mapping[str, str | None]
    status: str
    status_reason: str
    n_pairs: int  # rows of the window
    window_size: int  # the setting
    model_version: str | None = None  # in service
    has_baseline: bool = False
    baseline: Baseline | None = None  # None: the caller gave plain numbers, or nothing
    evidence: DriftEvidence | None = None  # None: the caller gave the rows
    not_compared: Mapping[str, str] = field(default_factory=dict)
    per_by_horizon: Mapping[int, float] = field(default_factory=dict)
    relative_errors: Mapping[int, RelativeErrors] = field(default_factory=dict)  # by bins ahead
    top: tuple[SeriesDrift, ...] = ()
    literal: Mapping[str, float | None] = field(default_factory=dict)  # the same names as metrics
    basis: str = LITERAL
    verdict: DriftVerdict | None = None  # of the seasonal detector
    waiting_for: str = ""  # why the seasonal detector can give no verdict, or ""

    @property
    def drifting(self) -> tuple[DriftingSeries, ...]:
        """Return the series in alarm by the seasonal detector, worst first."""
        return self.verdict.drifting if self.verdict else ()

    @property
    def served_error(self) -> "ServedError":
        """Return what clients get beside what the model says, one bin ahead."""
        names = {(item.server_name, item.metric) for item in self.drifting}
        names |= {(item.server, item.metric) for item in self.top if item.is_drifting}
        return ServedError(self.relative_errors, frozenset(names), is_stale="per" in self.exceeded)

    def current_metrics(self) -> dict[str, Any]:
        """Return the six keys of `calculate_drift_metrics`, where what is not known yet counts as 0."""
        known = {name: value or 0.0 for name, value in self.metrics.items()}
        return {**known, "needs_retraining": self.needs_retraining}

    def known_metrics(self) -> dict[str, Any]:
        """Return the same keys as files and people read them: None for what is not known yet."""
        return {**self.metrics, "needs_retraining": self.needs_retraining}

    @property
    def recommendation(self) -> str | None:
        """Return what to do; None while nothing can be said."""
        if self.status == COLLECTING:
            return None
        return RETRAIN if self.needs_retraining else OK

    def as_json(self, made_at: datetime) -> dict[str, Any]:
        """Return the content of `drift_metrics.json`."""
        is_seasonal = self.basis == CALIBRATED
        top = [drifting_json(item) for item in self.drifting[:MOST_NAMED]]
        return {
            "current_metrics": self.known_metrics(),
            "trends": dict(self.trends),
            "recommendation": self.recommendation,
            "status": self.status,
            "status_reason": self.status_reason,
            "basis": self.basis,
            "literal_metrics": dict(self.literal or self.metrics),
            "calibrated": self._seasonal_json() if is_seasonal else None,
            "thresholds": dict(self.thresholds),
            "weights": dict(self.weights),
            "per_by_horizon": {str(horizon): value for horizon, value in self.per_by_horizon.items()},
            "served_error": self.served_error.as_json(),
            "top_drifting": top if is_seasonal else [series_json(item) for item in self.top],
            "not_compared": dict(self.not_compared),
            "window": self._window_json(),
            "baseline": self._baseline_json(),
            "model_version": self.model_version,
            "made_at": iso_z(made_at),
        }

    def _window(self) -> PairWindow | None:
        """Return the window where its pairs carry times."""
        return self.evidence.window if self.evidence and len(self.evidence.window) else None

    def _size(self) -> int:
        """Return how many pairs a full window holds for this fleet."""
        return self.evidence.window.size if self.evidence else self.window_size

    def _window_json(self) -> dict[str, Any]:
        window = self._window()
        start, end = window.times_ms if window else (None, None)
        return {
            "window_size": self.window_size,
            "size": self._size(),
            "pairs": self.n_pairs,
            "servers": window.n_servers if window else 0,
            "start": _time(start),
            "end": _time(end),
            "span_s": window.span_ms / 1000 if window else 0.0,
        }

    def _baseline_json(self) -> dict[str, Any] | None:
        if not self.has_baseline:
            return None
        saved = self.baseline
        return {
            "version": saved.version if saved else None,
            "start": _time(saved.start_ms if saved else None),
            "end": _time(saved.end_ms if saved else None),
            "servers": len(saved.server_names) if saved else 0,
        }

    def _seasonal_json(self) -> dict[str, Any]:
        verdict, evidence = self.verdict, self.evidence
        if verdict is None or evidence is None:
            return {"waiting_for": self.waiting_for}
        reference = verdict.reference
        days = reference.n_days[reference.is_compared]
        new = {"server is new": len(evidence.unknown_servers)} if evidence.unknown_servers else {}
        return {
            "waiting_for": self.waiting_for,
            "compared_series": verdict.n_compared,
            "series_in_alarm": len(verdict.drifting),
            "alarm_share": verdict.alarm_share,
            "sustained_share": verdict.sustained_share,
            "not_compared": {**verdict.not_compared, **new},
            "enough_days": _enough_days_json(verdict.enough_days),
            "false_alarms_per_month": {
                "target": reference.fleet.false_alarms_per_month,
                "shown": reference.fleet.shown_per_month,
                "days_judged": reference.fleet.days,
            },
            "reference": {
                "version": evidence.reference_version,
                "start": _time(reference.start_ms),
                "end": _time(reference.end_ms),
                "median_days": float(np.median(days)) if len(days) else 0.0,
                "timezone": reference.timezone,
            },
            "data_quality": [
                {
                    "kind": event.kind,
                    "server": event.server_name,
                    "metric": event.metric,
                    "since": _time(event.since_ms),
                }
                for event in verdict.events[:MOST_EVENTS]
            ],
        }

    def as_text(self) -> str:
        """Return the report for people."""
        lines = ["DRIFT REPORT", *self._context_lines(), ""]
        for name, title in _NAMES.items():
            limit = f"limit {self.thresholds[name]:5.1%}"
            lines.append(f"  {title:<31} {_shown(self.metrics[name], '7.1%')}  {limit}  {self._mark(name)}")
        combined, limit = self.metrics["combined_score"], f"limit {self.thresholds['combined_score']:5.2f}"
        mark = self._mark("combined_score")
        lines.append(f"  {'Combined score':<31} {_shown(combined, '7.4f')}  {limit}  {mark}")
        lines += [*self._basis_lines(), *self._series_lines(), *self.served_error.lines(), ""]
        lines.append(f"Recommendation: {self.recommendation or f'none yet ({self.status_reason})'}")
        return "\n".join(line.rstrip() for line in lines)

    def _mark(self, name: str) -> str:
        if self.metrics[name] is None:
            return ""
        return f"{'over' if name in self.exceeded else 'ok':<4}  {self.trends.get(name) or ''}"

    def _context_lines(self) -> list[str]:
        window = self._window()
        lines = [f"Status: {self.status}" + (f" ({self.status_reason})" if self.status_reason else "")]
        times = _range(*window.times_ms) if window else ""
        lines.append(f"Window: {self.n_pairs} of {self._size()} pairs{times}")
        if self.has_baseline:
            saved = self.baseline
            name = (saved.version if saved else "") or "given by the caller"
            lines.append(f"Baseline: {name}" + (_range(saved.start_ms, saved.end_ms) if saved else ""))
        if self.model_version:
            lines.append(f"Model: {self.model_version}")
        return lines

    def _basis_lines(self) -> list[str]:
        if self.basis != CALIBRATED:
            return []
        literal = ", ".join(f"{name} {_shown(self.literal[name], '.3f').strip()}" for name in _NAMES)
        scale = "  Scores are calibrated: at the limit = as unusual as unchanged data get."
        return ["", scale, f"  Literal, reported only: {literal}", *self._seasonal_lines()]

    def _seasonal_lines(self) -> list[str]:
        verdict, evidence = self.verdict, self.evidence
        if verdict is None or evidence is None:
            return []
        reference = verdict.reference
        days, fleet = reference.n_days[reference.is_compared], reference.fleet
        median = f"{np.median(days):.0f}" if len(days) else "no"
        lines = [
            f"  {len(verdict.drifting)} of {verdict.n_compared} compared series in alarm; "
            f"reference of {median} days",
            f"  false alarms a month: {fleet.false_alarms_per_month:g} meant, "
            f"{fleet.shown_per_month:.1f} on {fleet.days:.0f} days left out",
        ]
        for item in verdict.drifting[:MOST_NAMED]:
            lines.append(f"  {item.sentence()}, since {_time(item.changed_ms)}")
        lines += self._not_compared_lines(verdict, len(evidence.unknown_servers))
        for event in verdict.events[:MOST_NAMED]:
            name = f"{event.server_name} {event.metric}" if event.metric else event.server_name
            lines.append(f"  data quality, not drift: {name}: {event.kind} since {_time(event.since_ms)}")
        return lines

    @staticmethod
    def _not_compared_lines(verdict: DriftVerdict, n_new: int) -> list[str]:
        waiting = verdict.enough_days
        lines = []
        for why, n in verdict.not_compared.items():
            when = f", {waiting.sentence()}" if why == TOO_FEW_DAYS and waiting else ""
            lines.append(f"  not compared: {n} series, {why}{when}")
        if n_new:
            lines.append(f"  not compared: {n_new} new servers, {until(verdict.new_server_ms)}")
        return lines

    def _series_lines(self) -> list[str]:
        lines = []
        if self.per_by_horizon:
            shown = ", ".join(f"{horizon}: {per:.1%}" for horizon, per in self.per_by_horizon.items())
            lines.append(f"  PER by horizon in bins: {shown}")
        for item in self.top:
            ratio = "" if item.error_ratio is None else f", error x{item.error_ratio:.1f}"
            mark = "drifts" if item.is_drifting else "within its limits"
            lines.append(
                f"  {item.server} {item.metric}: {mark}, score {item.score:.2f}"
                f" (shift {item.shift:.1f} std{ratio})"
            )
        lines += [f"  not compared: {metric}: {why}" for metric, why in self.not_compared.items()]
        return ["", *lines] if lines else []


def _shown(value: float | None, form: str) -> str:
    return "not yet" if value is None else format(value, form)


@dataclass(frozen=True, slots=True)
class ServedError:
    """Errors as shares of the last value's: of what clients got, and of the model alone.

    The model's tells whether it is stale; that of what clients got tells whether it matters. From 1.0 on
    clients would get less error from the last value.
    """

    by_horizon: Mapping[int, RelativeErrors]
    in_alarm: frozenset[tuple[str, str]]  # (server, metric)
    is_stale: bool  # the model's error is over its limit

    def as_json(self) -> dict[str, Any]:
        """Return `served_error` of `drift_metrics.json`."""
        one = self._one_ahead()
        alarm = one.of(self.in_alarm)
        return {
            "fleet": geometric_mean(one.served.values()),
            "by_metric": {name: geometric_mean([ratios]) for name, ratios in one.served.items()},
            "by_horizon": {
                str(horizon): geometric_mean(errors.served.values())
                for horizon, errors in self.by_horizon.items()
            },
            "in_alarm": geometric_mean(alarm.served.values()),
            "series": one.n_series,
            "model": {
                "fleet": geometric_mean(one.model.values()),
                "by_metric": {name: geometric_mean([ratios]) for name, ratios in one.model.items()},
                "by_horizon": {
                    str(horizon): geometric_mean(errors.model.values())
                    for horizon, errors in self.by_horizon.items()
                },
                "in_alarm": geometric_mean(alarm.model.values()),
            },
            "says": self.says(),
        }

    def says(self) -> str:
        """Return whether the model is stale and whether it matters to clients, in words; "" = not known."""
        one = self._one_ahead()
        asked = one.of(self.in_alarm) if self.is_stale and one.of(self.in_alarm).n_series else one
        served = geometric_mean(asked.served.values())
        if served is None:
            return ""
        if self.is_stale:
            return STALE_AND_FELT if served >= 1 else STALE_NOT_FELT
        return FRESH_BUT_FELT if served >= 1 else IN_ORDER

    def lines(self) -> list[str]:
        """Return the report's lines."""
        one = self._one_ahead()
        groups = {"fleet": one, "series in alarm": one.of(self.in_alarm)}
        lines = [
            f"  {name}: clients get {served:.2f}, the model alone {model:.2f}"
            for name, errors in groups.items()
            if (served := geometric_mean(errors.served.values())) is not None
            and (model := geometric_mean(errors.model.values())) is not None
        ]
        if not lines:
            return []
        return ["", "  Error one bin ahead as a share of the last value's", *lines, f"  {self.says()}"]

    def _one_ahead(self) -> RelativeErrors:
        return self.by_horizon.get(1, RelativeErrors((), {}, {}))


def drifting_json(item: DriftingSeries) -> dict[str, Any]:
    """Return one series in alarm as `drift_metrics.json` and `training_context.json` name it."""
    return {
        "server": item.server_name,
        "metric": item.metric,
        "score": item.ratio,
        "is_drifting": True,
        "family": item.family,
        "statistic": item.statistic,
        "says": item.says,
        "usual": item.usual,
        "actual": None if math.isnan(item.actual) else item.actual,
        "in_alarm_since": _time(item.since_ms),
        "since": _time(item.changed_ms),
        "changed_ms": item.changed_ms,
    }


def series_json(item: SeriesDrift) -> dict[str, Any]:
    """Return a series as the literal four see it, the way both files name it."""
    return {
        "server": item.server,
        "metric": item.metric,
        "score": item.score,
        "is_drifting": item.is_drifting,
        "shift_std": item.shift,
        "error_ratio": item.error_ratio,
        "ks": item.ks,
        "values": item.n_values,
    }


def _enough_days_json(waiting: EnoughDays | None) -> dict[str, Any] | None:
    if waiting is None:
        return None
    return {
        "series": waiting.n_series,
        "first": _time(waiting.first_ms),
        "last": _time(waiting.last_ms),
        "says": waiting.sentence(),
    }


def _time(milliseconds: int | None) -> str | None:
    return None if milliseconds is None else iso_z(from_ms(milliseconds))


def _range(start_ms: int, end_ms: int) -> str:
    return f", {_time(start_ms)} to {_time(end_ms)}"
