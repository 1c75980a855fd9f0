"""The decision to retrain: drift, then quiet period, then safeguards.

Owns: `RetrainingDecisionEngine` (users import it from `adaptive_retraining_daemon.py`, where the
limits in force stand), the order of the steps with their reasons, the age of a training and the
back-off after failed ones. Values in, values out. Does not know: files (`state`), processes, how
drift or load was measured.

A training's age is what the Clock says, but never more than this boot of the machine has seen
pass since (where both are known): a clock set forward must not make a training old. A clock
set back must not block for ever: an entry in the future is treated as made now, once.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from fleetcast import clock as clocks
from fleetcast.clock import DAY_MS, Clock, SystemClock, Uptime
from fleetcast.errors import BadData, quote
from fleetcast.schema import SafeguardCheck
from fleetcast.setting import override
from fleetcast.settings import DecisionSettings

logger = logging.getLogger(__name__)

INITIAL, DRIFT, FOLLOW_UP, LEARNING, ORDERED = "initial", "drift", "follow_up", "learning", "ordered"
OVERDUE, NONE = "max_days_without_training", "none"
FUTURE_TOLERANCE = timedelta(minutes=5)
DAY_S = DAY_MS / 1000
WEEK_S = 7 * DAY_S
LEFT_FOR_DRIFT = 2  # trainings of a week that a learning one must leave
KEPT_STAMPS = 1000
FIRST_BACKOFF_S = 15 * 60.0
LONGEST_BACKOFF_S = 6 * 3600.0
_SHOWN = ("per", "dss", "fds", "anomaly_rate", "combined_score")


@dataclass(frozen=True, slots=True)
class TrainingStamp:
    """One training that ran to a verdict."""

    at: datetime  # by the Clock
    promoted: bool
    uptime: Uptime | None = None  # None: under the data clock, or recorded elsewhere
    attempt: str | None = None  # which one it was; None: recorded by hand
    is_counted: bool = True  # by the safeguards; a training that a person forced is not

    def age_s(self, now: datetime, uptime: Uptime | None) -> float:
        """Return seconds since the training; never negative."""
        age = (now - self.at).total_seconds()
        if uptime and self.uptime and uptime.boot == self.uptime.boot:
            age = min(age, uptime.seconds - self.uptime.seconds)
        return max(0.0, age)


@dataclass(frozen=True, slots=True)
class TrainingLog:
    """All trainings that ran to a verdict, newest first."""

    stamps: tuple[TrainingStamp, ...] = ()
    total_promoted: int = 0
    installed_at: datetime | None = None

    @property
    def last(self) -> TrainingStamp | None:
        """Return the newest training, promoted or not."""
        return self.stamps[0] if self.stamps else None

    def with_training(self, stamp: TrainingStamp) -> "TrainingLog":
        """Return the log with one more training."""
        return replace(
            self,
            stamps=(stamp, *self.stamps)[:KEPT_STAMPS],
            total_promoted=self.total_promoted + stamp.promoted,
        )

    def in_order(self) -> "TrainingLog":
        """Return the log sorted by time, after entries were added late."""
        return replace(self, stamps=tuple(sorted(self.stamps, key=lambda stamp: stamp.at, reverse=True)))

    def without_future(self, now: datetime) -> "TrainingLog":
        """Return the log with entries of the future moved to `now`; itself where there are none."""
        latest = now + FUTURE_TOLERANCE
        installed_at = now if self.installed_at and self.installed_at > latest else self.installed_at
        stamps = tuple(replace(s, at=now) if s.at > latest else s for s in self.stamps)
        if stamps == self.stamps and installed_at == self.installed_at:
            return self
        return replace(self, stamps=stamps, installed_at=installed_at)

    def anchor(self, now: datetime, uptime: Uptime | None) -> "TrainingLog":
        """Return the log with entries of other boots tied to this one's uptime, at first sight.

        From then on this boot knows how much time has passed for them, too.
        """
        if uptime is None or all(s.uptime and s.uptime.boot == uptime.boot for s in self.stamps):
            return self
        return replace(
            self,
            stamps=tuple(
                stamp
                if stamp.uptime and stamp.uptime.boot == uptime.boot
                else replace(stamp, uptime=Uptime(uptime.boot, uptime.seconds - stamp.age_s(now, uptime)))
                for stamp in self.stamps
            ),
        )

    def ages_s(self, now: datetime, uptime: Uptime | None) -> Iterator[float]:
        """Yield the age of every training that the safeguards count."""
        return (stamp.age_s(now, uptime) for stamp in self.stamps if stamp.is_counted)

    def without_training_s(self, now: datetime) -> float | None:
        """Return how long there was no training, from the installation where there never was one."""
        since = self.last.at if self.last else self.installed_at
        return None if since is None else max(0.0, (now - since).total_seconds())


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to leave the trainer alone after it failed: wall time, doubling, bounded."""

    failures: int = 0
    since: datetime | None = None  # by the system's clock
    length_s: float = 0.0

    def after_failure(self, wall_now: datetime) -> "Backoff":
        """Return the back-off after one more failure in a row.

        >>> from datetime import UTC
        >>> now = datetime(2026, 1, 15, tzinfo=UTC)
        >>> Backoff().after_failure(now).after_failure(now).length_s / 60
        30.0
        """
        doubled = FIRST_BACKOFF_S * 2.0 ** min(self.failures, 20)
        return Backoff(self.failures + 1, wall_now, min(doubled, LONGEST_BACKOFF_S))

    def pause(self, wall_now: datetime, length_s: float) -> "Backoff":
        """Return a pause that is no failure: the count of failures stays."""
        return Backoff(self.failures, wall_now, length_s)

    def without_future(self, wall_now: datetime) -> "Backoff":
        """Return the back-off, begun now if it began in the future (the clock stepped back)."""
        if self.since is None or self.since <= wall_now + FUTURE_TOLERANCE:
            return self
        return replace(self, since=wall_now)

    def remaining_s(self, wall_now: datetime) -> float:
        """Return how much longer to wait."""
        if self.since is None:
            return 0.0
        elapsed_s = max(0.0, (wall_now - self.since).total_seconds())
        return max(0.0, self.length_s - elapsed_s)


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
                raise BadData(f"{name} must be a number >= 0, got {quote(value)}")


@dataclass(frozen=True, slots=True)
class OrderedTraining:
    """A training that a person asks for: the time is theirs to choose, so drift and quiet are not asked."""

    reason: str
    is_forced: bool = False  # the safeguards are not asked either


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
    """Return every safeguard with its value; the last one asks for a training, the others can refuse one."""
    ages_s = list(log.ages_s(now, uptime))
    since_last_h = min(ages_s) / 3600 if ages_s else None
    in_week = sum(age < WEEK_S for age in ages_s)
    waiting_min = backoff.remaining_s(wall_now) / 60
    idle_s = log.without_training_s(now)
    idle_days = None if idle_s is None else idle_s / DAY_S
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
    learning: str = "",
) -> Decision:
    """Decide; the reason of a refusal is the first step that failed.

    Args:
        collecting: why drift cannot be judged yet, or "".
        follow_up: why the last training asks for a follow-up, or "".
        learning: why a training would pay although nothing drifted, or "".
    Raises:
        BadData: `drift_metrics` is not what `DriftMonitor.calculate_drift_metrics` returns.
    """
    asked_by = {check.name: check for check in safeguards}
    rule, reason = _demand(drift_metrics, asked_by[OVERDUE], follow_up, initial_due=initial_due)
    blocking = _blocking(safeguards)
    if rule == NONE and learning and not collecting:
        # a refusal does not begin with "not a quiet period": it must not start the deadline for quiet
        why_not = "" if is_quiet_period else "it waits for a quiet period"
        why_not = why_not or (_refusal(blocking) if blocking else _why_not_learn(asked_by))
        told = f"{reason}; {learning}, refused: {why_not}" if why_not else f"{learning}; {reason}"
        return Decision(not why_not, LEARNING, told, safeguards)
    if rule == NONE:
        return Decision(False, rule, f"collecting: {collecting}" if collecting else reason, safeguards)
    if not is_quiet_period:
        return Decision(False, rule, f"not a quiet period; {reason}", safeguards)
    if blocking:
        return Decision(False, rule, f"{_refusal(blocking)}; {reason}", safeguards)
    return Decision(True, rule, reason, safeguards)


def decide_order(ordered: OrderedTraining, safeguards: tuple[SafeguardCheck, ...]) -> Decision:
    """Decide about a training by order: only the safeguards may refuse it, and not one that is forced."""
    blocking = None if ordered.is_forced else _blocking(safeguards)
    reason = f"{_refusal(blocking)}; {ordered.reason}" if blocking else ordered.reason
    return Decision(blocking is None, ORDERED, reason, safeguards)


def _blocking(safeguards: tuple[SafeguardCheck, ...]) -> SafeguardCheck | None:
    return next((check for check in safeguards if not check.passed and check.name != OVERDUE), None)


def _demand(
    drift_metrics: Mapping[str, Any], overdue: SafeguardCheck, follow_up: str, *, initial_due: bool
) -> tuple[str, str]:
    needs = drift_metrics.get("needs_retraining") if isinstance(drift_metrics, Mapping) else None
    if not isinstance(needs, bool):
        raise BadData(
            "drift_metrics must hold needs_retraining: true or false, "
            f"as DriftMonitor.calculate_drift_metrics() returns, got {quote(drift_metrics)}"
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


def _why_not_learn(safeguards: Mapping[str, SafeguardCheck]) -> str:
    """Return why no learning training may start, "" where one may: it comes after drift, and seldom."""
    since_h = safeguards["min_hours_between_training"].value
    if since_h is not None and since_h * 3600 < WEEK_S:
        return f"{since_h / 24:.1f} days since the last training, at least {WEEK_S / DAY_S:g} needed"
    week = safeguards["max_trainings_per_week"]
    left = week.limit - (week.value or 0) - 1
    if left < LEFT_FOR_DRIFT:
        return f"it would leave {max(0, left):g} trainings of the week for drift, {LEFT_FOR_DRIFT} needed"
    return ""


class RetrainingDecisionEngine:
    """Decides whether to train now: drift, then quiet period, then safeguards.

    Guarantees: no training within `min_hours_between_training` of another, no more than
    `max_trainings_per_week` in 7 days, whatever the order of calls and however the clock jumps
    (see `fleetcast.retraining.decision`). Keeps no file: its owner saves `log` and `backoff`.

    >>> engine = RetrainingDecisionEngine()
    >>> engine.record_training()
    >>> engine.should_retrain({"needs_retraining": True})["should_retrain"]
    False
    """

    def __init__(
        self,
        min_hours_between_training: float = 6,
        max_days_without_training: float = 30,
        max_trainings_per_week: int = 3,
        *,
        clock: Clock | None = None,
        wall_clock: Clock | None = None,
        uptime: Callable[[], Uptime | None] | None = None,
    ) -> None:
        SafeguardLimits(min_hours_between_training, max_days_without_training, max_trainings_per_week)
        self.min_hours_between_training = min_hours_between_training
        self.max_days_without_training = max_days_without_training
        self.max_trainings_per_week = max_trainings_per_week
        self._wall_clock = wall_clock or SystemClock()
        self.use_clock(clock or SystemClock(), uptime)
        self.log = TrainingLog()
        self.backoff = Backoff()

    def use_clock(self, clock: Clock, uptime: Callable[[], Uptime | None] | None = None) -> None:
        """Take "now" from `clock`; the machine's uptime runs beside the system's clock only."""
        is_system = isinstance(clock, SystemClock)
        self._clock = clock
        self._uptime = uptime or (clocks.uptime if is_system else lambda: None)

    @property
    def limits(self) -> SafeguardLimits:
        """Return the limits in force; each can be assigned to."""
        return SafeguardLimits(
            self.min_hours_between_training, self.max_days_without_training, self.max_trainings_per_week
        )

    def override(self, settings: DecisionSettings) -> None:
        """Replace each limit by the setting of its name where that is given."""
        for name, limit in override(asdict(self.limits), settings).items():
            setattr(self, name, limit)

    def should_retrain(
        self,
        drift_metrics: Mapping[str, Any],
        is_quiet_period: bool = True,
        *,
        initial_due: bool = False,
        learning_due: bool = False,
    ) -> dict[str, Any]:
        """Return {"should_retrain", "reason", "safeguards"}; a refusal's reason is the first failing step.

        Args:
            learning_due: a training would pay although nothing drifted.
        """
        learning = "learning: a training would pay" if learning_due else ""
        return self.decide(
            drift_metrics, is_quiet_period, initial_due=initial_due, learning=learning
        ).as_dict()

    def decide(
        self,
        drift_metrics: Mapping[str, Any],
        is_quiet_period: bool,
        *,
        initial_due: bool,
        collecting: str = "",
        follow_up: str = "",
        learning: str = "",
        ordered: OrderedTraining | None = None,
    ) -> Decision:
        """Return the decision with the rule behind it; see `decide` for the reasons that are given."""
        self.settle()
        now, wall_now = self._clock.now(), self._wall_clock.now()
        found = check_safeguards(self.log, self.backoff, self.limits, now, wall_now, self._uptime())
        if ordered is not None:
            return decide_order(ordered, found)
        return decide(
            drift_metrics,
            found,
            is_quiet_period=is_quiet_period,
            initial_due=initial_due,
            collecting=collecting,
            follow_up=follow_up,
            learning=learning,
        )

    def trainings_in_week(self) -> int:
        """Return how many trainings of the last 7 days the safeguards count."""
        return sum(age_s < WEEK_S for age_s in self.log.ages_s(self._clock.now(), self._uptime()))

    def trainings_left(self) -> int:
        """Return how many trainings the last 7 days leave."""
        return max(0, self.max_trainings_per_week - self.trainings_in_week())

    def settle(self) -> None:
        """Adjust the record to the clocks: no entry of the future, every age known to this boot."""
        now = self._clock.now()
        settled = self.log.without_future(now)
        if settled is not self.log:
            logger.warning("the clock stepped back: trainings of the future now count as made now")
        self.log = settled.anchor(now, self._uptime())
        self.backoff = self.backoff.without_future(self._wall_clock.now())

    def record_training(
        self, promoted: bool = True, *, attempt: str | None = None, is_counted: bool = True
    ) -> None:
        """Note that a training ran to a verdict just now, promoted or not."""
        stamp = TrainingStamp(self._clock.now(), promoted, self._uptime(), attempt, is_counted)
        self.log = self.log.with_training(stamp)
        self.backoff = Backoff()

    def record_failure(self) -> None:
        """Note that a training failed just now: 15 minutes of back-off, doubling to 6 hours."""
        self.backoff = self.backoff.after_failure(self._wall_clock.now())

    def record_pause(self, seconds: float) -> None:
        """Start no training for a while; this is no failure."""
        self.backoff = self.backoff.pause(self._wall_clock.now(), seconds)
