"""The decision to retrain, as a function of values: drift, then quiet, then safeguards.

Owns: the order of the steps, the safeguards' checks and the reasons. Pure.
Does not know: clocks, files, how drift or load was measured.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from fleetcast.clock import Uptime
from fleetcast.errors import BadData
from fleetcast.retraining.training_log import WEEK_S, Backoff, TrainingLog
from fleetcast.schema import SafeguardCheck

INITIAL, DRIFT, FOLLOW_UP = "initial", "drift", "follow_up"
OVERDUE, NONE = "max_days_without_training", "none"
_SHOWN = ("per", "dss", "fds", "anomaly_rate", "combined_score")


@dataclass(frozen=True, slots=True)
class SafeguardLimits:
    """The limits as the constructor of the engine takes them."""

    min_hours_between_training: float
    max_days_without_training: float
    max_trainings_per_week: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value < float("inf"):
                raise BadData(f"{name} must be a number >= 0, got {value!r}")


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to train now, by which rule, and every safeguard."""

    should_retrain: bool
    rule: str  # what asks for a training; NONE: nothing does
    reason: str
    safeguards: tuple[SafeguardCheck, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the three keys of `RetrainingDecisionEngine.should_retrain`."""
        return {
            "should_retrain": self.should_retrain,
            "reason": self.reason,
            "safeguards": safeguards_json(self.safeguards),
        }


def safeguards_json(safeguards: tuple[SafeguardCheck, ...]) -> dict[str, dict[str, Any]]:
    """Return the safeguards by name, each with value, limit, unit and whether it passed."""
    return {
        check.name: {key: value for key, value in asdict(check).items() if key != "name"}
        for check in safeguards
    }


def check_safeguards(
    log: TrainingLog,
    backoff: Backoff,
    limits: SafeguardLimits,
    now: datetime,
    wall_now: datetime,
    uptime: Uptime | None,
) -> tuple[SafeguardCheck, ...]:
    """Return every safeguard with its value; the last is a demand, not a hindrance."""
    ages_s = list(log.ages_s(now, uptime))
    since_last_h = min(ages_s) / 3600 if ages_s else None
    in_week = sum(age < WEEK_S for age in ages_s)
    waiting_min = backoff.remaining_s(wall_now) / 60
    idle_s = log.without_training_s(now)
    idle_days = None if idle_s is None else idle_s / 86_400
    hours, per_week = limits.min_hours_between_training, limits.max_trainings_per_week
    days = limits.max_days_without_training
    return (
        SafeguardCheck(
            "min_hours_between_training",
            since_last_h,
            hours,
            since_last_h is None or since_last_h >= hours,
            "h",
        ),
        SafeguardCheck("max_trainings_per_week", in_week, per_week, in_week < per_week, "trainings"),
        SafeguardCheck("failure_backoff", waiting_min, 0, waiting_min <= 0, "min left"),
        SafeguardCheck(OVERDUE, idle_days, days, idle_days is None or idle_days < days, "days"),
    )


def decide(
    drift_metrics: Mapping[str, Any],
    safeguards: tuple[SafeguardCheck, ...],
    *,
    is_quiet_period: bool,
    initial_due: bool,
    collecting: str = "",
    follow_up: str = "",
) -> Decision:
    """Decide; the reason of a refusal is the first step that failed.

    Args:
        collecting: why drift cannot be judged yet, or "".
        follow_up: why the last training is to be followed by another, or "".
    Raises:
        BadData: `drift_metrics` is not what `DriftMonitor.calculate_drift_metrics` returns.
    """
    asked_by = {check.name: check for check in safeguards}
    rule, reason = _demand(drift_metrics, asked_by[OVERDUE], follow_up, initial_due=initial_due)
    blocking = next((c for c in safeguards if not c.passed and c.name != OVERDUE), None)
    if rule == NONE:
        return Decision(False, rule, f"collecting: {collecting}" if collecting else reason, safeguards)
    if not is_quiet_period:
        return Decision(False, rule, f"not a quiet period; {reason}", safeguards)
    if blocking:
        return Decision(False, rule, f"{_refusal(blocking)}; {reason}", safeguards)
    return Decision(True, rule, reason, safeguards)


def _demand(
    drift_metrics: Mapping[str, Any], overdue: SafeguardCheck, follow_up: str, *, initial_due: bool
) -> tuple[str, str]:
    needs = drift_metrics.get("needs_retraining") if isinstance(drift_metrics, Mapping) else None
    if not isinstance(needs, bool):
        raise BadData(
            "drift_metrics must hold needs_retraining: true or false, "
            f"as DriftMonitor.calculate_drift_metrics() returns, got {drift_metrics!r}"
        )
    shown = ", ".join(f"{name} {drift_metrics[name]:.3f}" for name in _SHOWN if name in drift_metrics)
    if initial_due:
        return INITIAL, "initial training: no model was trained on this fleet yet"
    if needs:
        return DRIFT, f"drift: {shown}" if shown else "drift"
    if follow_up:
        return FOLLOW_UP, follow_up
    if not overdue.passed:
        return OVERDUE, f"{overdue.value:.1f} days without training, limit {overdue.limit:g}"
    return NONE, f"no drift: {shown}" if shown else "no drift"


def _refusal(check: SafeguardCheck) -> str:
    if check.name == "min_hours_between_training":
        return f"{check.value:.2f} h since the last training, at least {check.limit:g} h apart"
    if check.name == "max_trainings_per_week":
        return f"{check.value} trainings in the last 7 days, limit {check.limit}"
    return f"the last training failed, {check.value:.0f} min to wait"
