"""The calibrated side of one drift check: scores, who carries them, how far to trust them.

Owns: its values, its part of `drift_metrics.json` and its lines of the report.
Does not know: the literal metrics, which basis is in force.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetcast.clock import from_ms, iso_z
from fleetcast.drift.literal.scores import trend
from fleetcast.drift.seasonal.drift_verdict import READY, DriftingSeries, DriftVerdict
from fleetcast.drift.seasonal.follower import SeasonalEvidence
from fleetcast.drift.seasonal.quorum import THRESHOLDS
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.drift.seasonal.statistics import FAMILIES
from fleetcast.schema import Floats32

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
