"""RetrainingDecisionEngine: whether to train now.

Owns: the record of trainings a decision rests on, and the clocks behind it. The order of the
steps is `safeguards.decide`; the limits in force stand in `adaptive_retraining_daemon.py`,
from where this class is imported by its users. Does not know: files, processes.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from fleetcast import clock as clocks
from fleetcast.clock import Clock, SystemClock, Uptime
from fleetcast.retraining.safeguards import Decision, SafeguardLimits, check_safeguards, decide
from fleetcast.retraining.training_log import WEEK_S, Backoff, TrainingLog, TrainingStamp
from fleetcast.settings import DecisionSettings

logger = logging.getLogger(__name__)


class RetrainingDecisionEngine:
    """Decides whether to train now: drift, then quiet period, then safeguards.

    Guarantees: no training within `min_hours_between_training` of another, no more than
    `max_trainings_per_week` in 7 days, whatever the order of calls and however the clock jumps
    (see `fleetcast.retraining.training_log`). Keeps no file: its owner saves `log` and `backoff`.

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

    def override(self, settings: DecisionSettings) -> None:
        """Let the settings that are given go before the arguments."""
        for limit in fields(SafeguardLimits):
            chosen = getattr(settings, limit.name)
            if chosen is not None:
                setattr(self, limit.name, chosen)

    def should_retrain(
        self, drift_metrics: Mapping[str, Any], is_quiet_period: bool = True, *, initial_due: bool = False
    ) -> dict[str, Any]:
        """Return {"should_retrain", "reason", "safeguards"}; a refusal's reason is the first failing step."""
        return self.decide(drift_metrics, is_quiet_period, initial_due=initial_due).as_dict()

    def decide(
        self,
        drift_metrics: Mapping[str, Any],
        is_quiet_period: bool,
        *,
        initial_due: bool,
        collecting: str = "",
        follow_up: str = "",
    ) -> Decision:
        """Return the decision with the rule behind it.

        Args:
            collecting: why drift cannot be judged yet, or "".
            follow_up: why the last training is to be followed by another, or "".
        """
        self.settle()
        now, wall_now = self._clock.now(), self._wall_clock.now()
        limits = SafeguardLimits(
            self.min_hours_between_training, self.max_days_without_training, self.max_trainings_per_week
        )
        found = check_safeguards(self.log, self.backoff, limits, now, wall_now, self._uptime())
        return decide(
            drift_metrics,
            found,
            is_quiet_period=is_quiet_period,
            initial_due=initial_due,
            collecting=collecting,
            follow_up=follow_up,
        )

    def trainings_left(self) -> int:
        """Return how many trainings the last 7 days leave."""
        in_week = sum(age_s < WEEK_S for age_s in self.log.ages_s(self._clock.now(), self._uptime()))
        return max(0, self.max_trainings_per_week - in_week)

    def settle(self) -> None:
        """Take note of what the clocks say now: no entry of the future, every age known to this boot."""
        now = self._clock.now()
        settled = self.log.without_future(now)
        if settled is not self.log:
            logger.warning("trainings of the future are taken as made now: the clock stepped back")
        self.log = settled.anchored(now, self._uptime())
        self.backoff = self.backoff.without_future(self._wall_clock.now())

    def record_training(self, promoted: bool = True, *, attempt: str | None = None) -> None:
        """Note that a training ran to a verdict just now, promoted or not."""
        stamp = TrainingStamp(self._clock.now(), promoted, self._uptime(), attempt)
        self.log = self.log.with_training(stamp)
        self.backoff = Backoff()

    def record_failure(self) -> None:
        """Note that a training failed just now: 15 minutes of back-off, doubling to 6 hours."""
        self.backoff = self.backoff.after_failure(self._wall_clock.now())

    def record_pause(self, seconds: float) -> None:
        """Start no training for a while; this is no failure."""
        self.backoff = self.backoff.pause(self._wall_clock.now(), seconds)
