"""What a drift check found, as one value, as text for people and as `drift_metrics.json`.

Owns: the layout of the report and of the file (format: docs/formats.md).
Does not know: how the figures were computed.

The calibrated side of one drift check: scores, who carries them, how far to trust them.

Owns: its values, its part of `drift_metrics.json` and its lines of the report.
Does not know: the literal metrics, which basis is in force.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self

import numpy as np

from fleetcast.clock import from_ms, iso_z
from fleetcast.drift.literal.baseline import Baseline
from fleetcast.drift.literal.scores import trend
from fleetcast.drift.literal.series import SeriesDrift
from fleetcast.drift.literal.window import PairWindow
from fleetcast.drift.seasonal.detector import READY, DriftingSeries, DriftVerdict
from fleetcast.drift.seasonal.follower import SeasonalEvidence
from fleetcast.drift.seasonal.quorum import THRESHOLDS
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.drift.seasonal.statistics import FAMILIES
from fleetcast.schema import Floats32
from fleetcast.settings import CALIBRATED, LITERAL

MOST_NAMED = 10  # series in the report
MOST_EVENTS = 50


@dataclass(frozen=True, slots=True)
class CalibratedReading:
    """What the season-matched detector found; without a reference all scores are 0."""

    scores: Mapping[str, float]  # per, dss, fds, anomaly_rate on the specification's scale
    combined: float
    trends: Mapping[str, str]
    waiting_for: str = ""  # why it can give no verdict, or ""
    verdict: DriftVerdict | None = None
    reference: Reference | None = None
    version: str | None = None
    unknown_servers: tuple[str, ...] = ()

    @property
    def drifting(self) -> tuple[DriftingSeries, ...]:
        """Return the series in alarm, worst first."""
        return self.verdict.drifting if self.verdict else ()

    def as_json(self) -> dict[str, Any]:
        """Return the `calibrated` part of `drift_metrics.json`."""
        reference, verdict = self.reference, self.verdict
        if reference is None or verdict is None:
            return {"waiting_for": self.waiting_for}
        days = reference.n_days[reference.is_compared]
        return {
            "waiting_for": self.waiting_for,
            "compared_series": verdict.n_compared,
            "series_in_alarm": len(verdict.drifting),
            "alarm_share": verdict.alarm_share,
            "sustained_share": verdict.sustained_share,
            "not_compared": {
                **verdict.not_compared,
                **({"server is new": len(self.unknown_servers)} if self.unknown_servers else {}),
            },
            "false_alarms_per_month": {
                "target": reference.fleet.false_alarms_per_month,
                "shown": reference.fleet.shown_per_month,
                "days_judged": reference.fleet.days,
            },
            "reference": {
                "version": self.version,
                "start": iso_z(from_ms(reference.start_ms)),
                "end": iso_z(from_ms(reference.end_ms)),
                "median_days": float(np.median(days)) if len(days) else 0.0,
                "timezone": reference.timezone,
            },
            "data_quality": [
                {
                    "kind": event.kind,
                    "server": event.server_name,
                    "metric": event.metric,
                    "since": iso_z(from_ms(event.since_ms)),
                }
                for event in verdict.events[:MOST_EVENTS]
            ],
        }

    def lines(self) -> list[str]:
        """Return its part of the report for people."""
        reference, verdict = self.reference, self.verdict
        if reference is None or verdict is None:
            return []
        days = reference.n_days[reference.is_compared]
        median = f"{np.median(days):.0f}" if len(days) else "no"
        out = [
            f"  {len(verdict.drifting)} of {verdict.n_compared} compared series in alarm; "
            f"reference of {median} days",
            f"  false alarms a month: {reference.fleet.false_alarms_per_month:g} meant, "
            f"{reference.fleet.shown_per_month:.1f} on {reference.fleet.days:.0f} days left out",
        ]
        for item in verdict.drifting[:MOST_NAMED]:
            out.append(f"  {item.sentence()}, since {iso_z(from_ms(item.changed_ms))}")
        out += [f"  not compared: {n} series, {why}" for why, n in verdict.not_compared.items()]
        if self.unknown_servers:
            out.append(f"  not compared: {len(self.unknown_servers)} new servers")
        for event in verdict.events[:MOST_NAMED]:
            name = f"{event.server_name} {event.metric}" if event.metric else event.server_name
            out.append(
                f"  data quality, not drift: {name}: {event.kind} since {iso_z(from_ms(event.since_ms))}"
            )
        return out


def calibrated_reading(
    seasonal: SeasonalEvidence,
    limits: Mapping[str, float],
    weights: Mapping[str, float],
    min_days: int,
) -> CalibratedReading:
    """Read the detector's state on the specification's scale.

    The scale stays the specification's when a threshold is edited, so that a threshold twice as
    high asks for twice the calibrated limit.

    Args:
        limits: of per, dss, fds, anomaly_rate and combined_score, as they are in force.
        weights: of the four.
    """
    drift = seasonal.drift
    if drift is None:
        none = dict.fromkeys(FAMILIES, 0.0)
        return CalibratedReading(none, 0.0, dict.fromkeys(FAMILIES, "stable"), seasonal.missing)
    verdict = drift.check(THRESHOLDS, weights, limits["combined_score"])
    reference = drift.reference
    waiting = "" if verdict.status == READY else _why_waiting(reference, min_days)
    return CalibratedReading(
        scores=verdict.scores,
        combined=verdict.combined,
        trends=_trends(seasonal.ratios, limits),
        waiting_for=waiting,
        verdict=verdict,
        reference=reference,
        version=seasonal.version,
        unknown_servers=seasonal.unknown_servers,
    )


def _why_waiting(reference: Reference, min_days: int) -> str:
    if reference.is_compared.any():
        return "not enough bins of the newest hours yet"
    return f"{int(reference.n_days.max(initial=0))} days known of any series, {min_days} needed"


def _trends(ratios: Sequence[Floats32], limits: Mapping[str, float]) -> dict[str, str]:
    """Compare the older half of the last hours with the newer."""
    middle = len(ratios) // 2
    if not middle:
        return dict.fromkeys(FAMILIES, "stable")
    older, newer = (np.mean(half, axis=0) for half in (ratios[:middle], ratios[middle:]))
    return {
        name: trend(THRESHOLDS[name] * float(older[row]), THRESHOLDS[name] * float(newer[row]), limits[name])
        for row, name in enumerate(FAMILIES)
    }


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
        "in_alarm_since": iso_z(from_ms(item.since_ms)),
        "since": iso_z(from_ms(item.changed_ms)),
        "changed_ms": item.changed_ms,
    }


OK = "OK"
RETRAIN = "RETRAIN NOW"
_NAMES = {
    "per": "Prediction error rate (PER)",
    "dss": "Distribution shift score (DSS)",
    "fds": "Feature drift score (FDS)",
    "anomaly_rate": "Anomaly rate",
}


@dataclass(frozen=True, slots=True)
class WindowFacts:
    """Which data a check looked at; times are None where pairs carry none."""

    window_size: int  # the setting
    size: int  # pairs a full window holds for this fleet
    pairs: int
    servers: int = 0
    start_ms: int | None = None
    end_ms: int | None = None
    span_s: float = 0.0

    @classmethod
    def of(cls, pairs: PairWindow | None, n_rows: int, window_size: int) -> Self:
        """Describe a window; None stands for `n_rows` rows without times."""
        if pairs is None or not len(pairs):
            return cls(window_size, pairs.size if pairs is not None else window_size, n_rows)
        return cls(
            window_size=window_size,
            size=pairs.size,
            pairs=len(pairs),
            servers=pairs.n_servers,
            start_ms=int(pairs.target_ms[0]),
            end_ms=int(pairs.target_ms[-1]) + pairs.bin_ms,
            span_s=pairs.span_ms / 1000,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the plain form for JSON."""
        return {
            "window_size": self.window_size,
            "size": self.size,
            "pairs": self.pairs,
            "servers": self.servers,
            "start": _time(self.start_ms),
            "end": _time(self.end_ms),
            "span_s": self.span_s,
        }


@dataclass(frozen=True, slots=True)
class BaselineFacts:
    """Which reference a check used; all None for one that a caller gave as plain numbers."""

    version: str | None = None
    start_ms: int | None = None
    end_ms: int | None = None
    servers: int = 0

    @classmethod
    def of(cls, saved: Baseline | None) -> Self:
        """Describe a saved baseline."""
        if saved is None:
            return cls()
        return cls(saved.version, saved.start_ms, saved.end_ms, len(saved.server_names))

    def as_dict(self) -> dict[str, Any]:
        """Return the plain form for JSON."""
        return {
            "version": self.version,
            "start": _time(self.start_ms),
            "end": _time(self.end_ms),
            "servers": self.servers,
        }


@dataclass(frozen=True, slots=True)
class DriftReport:
    """One check of the drift window."""

    metrics: Mapping[str, float]  # per, dss, fds, anomaly_rate, combined_score
    needs_retraining: bool
    exceeded: tuple[str, ...]  # scores over their threshold
    thresholds: Mapping[str, float]  # by the same names as metrics
    weights: Mapping[str, float]
    trends: Mapping[str, str]
    status: str
    status_reason: str
    window: WindowFacts
    baseline: BaselineFacts | None
    model_version: str | None
    not_compared: Mapping[str, str]
    per_by_horizon: Mapping[int, float] = field(default_factory=dict)
    top: tuple[SeriesDrift, ...] = ()
    literal: Mapping[str, float] = field(default_factory=dict)  # the same names as metrics
    calibrated: CalibratedReading | None = None  # None: the literal metrics decide

    @property
    def basis(self) -> str:
        """Return which scores decide."""
        return LITERAL if self.calibrated is None else CALIBRATED

    def current_metrics(self) -> dict[str, Any]:
        """Return the six keys of `calculate_drift_metrics`."""
        return {**self.metrics, "needs_retraining": self.needs_retraining}

    def as_json(self, made_at: datetime) -> dict[str, Any]:
        """Return the content of `drift_metrics.json`."""
        return {
            "current_metrics": self.current_metrics(),
            "trends": dict(self.trends),
            "recommendation": RETRAIN if self.needs_retraining else OK,
            "status": self.status,
            "status_reason": self.status_reason,
            "basis": self.basis,
            "literal_metrics": dict(self.literal or self.metrics),
            "calibrated": self.calibrated.as_json() if self.calibrated else None,
            "thresholds": dict(self.thresholds),
            "weights": dict(self.weights),
            "per_by_horizon": {str(horizon): value for horizon, value in self.per_by_horizon.items()},
            "top_drifting": self._top_json(),
            "not_compared": dict(self.not_compared),
            "window": self.window.as_dict(),
            "baseline": self.baseline.as_dict() if self.baseline else None,
            "model_version": self.model_version,
            "made_at": iso_z(made_at),
        }

    def _top_json(self) -> list[dict[str, Any]]:
        if self.calibrated is None:
            return [series_json(item) for item in self.top]
        return [drifting_json(item) for item in self.calibrated.drifting[:MOST_NAMED]]

    def as_text(self) -> str:
        """Return the report for people."""
        lines = ["DRIFT REPORT", *self._context_lines(), ""]
        for name, title in _NAMES.items():
            mark = "over" if name in self.exceeded else "ok"
            trend = self.trends.get(name, "stable")
            lines.append(
                f"  {title:<31} {self.metrics[name]:7.1%}  limit {self.thresholds[name]:5.1%}"
                f"  {mark:<4}  {trend}"
            )
        combined, limit = self.metrics["combined_score"], self.thresholds["combined_score"]
        mark = "over" if "combined_score" in self.exceeded else "ok"
        lines.append(f"  {'Combined score':<31} {combined:7.4f}  limit {limit:5.2f}  {mark}")
        lines += [*self._basis_lines(), *self._series_lines(), ""]
        lines.append(f"Recommendation: {RETRAIN if self.needs_retraining else OK}")
        return "\n".join(lines)

    def _context_lines(self) -> list[str]:
        window = self.window
        lines = [f"Status: {self.status}" + (f" ({self.status_reason})" if self.status_reason else "")]
        lines.append(
            f"Window: {window.pairs} of {window.size} pairs" + _range(window.start_ms, window.end_ms)
        )
        if self.baseline:
            name = self.baseline.version or "given by the caller"
            lines.append(f"Baseline: {name}" + _range(self.baseline.start_ms, self.baseline.end_ms))
        if self.model_version:
            lines.append(f"Model: {self.model_version}")
        return lines

    def _basis_lines(self) -> list[str]:
        if self.calibrated is None:
            return []
        literal = ", ".join(f"{name} {self.literal[name]:.3f}" for name in _NAMES)
        scale = "  Scores are calibrated: at the limit = as unusual as unchanged data get."
        return ["", scale, f"  Literal, reported only: {literal}", *self.calibrated.lines()]

    def _series_lines(self) -> list[str]:
        lines = []
        if self.per_by_horizon:
            shown = ", ".join(f"{horizon}: {per:.1%}" for horizon, per in self.per_by_horizon.items())
            lines.append(f"  PER by horizon in bins: {shown}")
        for item in self.top if self.calibrated is None else ():
            ratio = "" if item.error_ratio is None else f", error x{item.error_ratio:.1f}"
            mark = "drifts" if item.is_drifting else "within its limits"
            lines.append(
                f"  {item.server} {item.metric}: {mark}, score {item.score:.2f}"
                f" (shift {item.shift:.1f} std{ratio})"
            )
        lines += [f"  not compared: {metric}: {why}" for metric, why in self.not_compared.items()]
        return ["", *lines] if lines else []


def series_json(item: SeriesDrift) -> dict[str, Any]:
    """Return one series as `drift_metrics.json` and `training_context.json` name it."""
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


def _time(milliseconds: int | None) -> str | None:
    return None if milliseconds is None else iso_z(from_ms(milliseconds))


def _range(start_ms: int | None, end_ms: int | None) -> str:
    if start_ms is None or end_ms is None:
        return ""
    return f", {_time(start_ms)} to {_time(end_ms)}"
