"""When trainings ran, and how long ago that is on clocks that jump: values, no I/O.

Owns: the age of a training, the back-off after failed ones. Does not know: the limits
(`safeguards`), files (`state`).

A training's age is what the Clock says, but never more than this boot of the machine has seen
pass since (where both are known): a clock set forward must not make a training old. A clock
set back must not block for ever: an entry in the future is treated as made now, once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from fleetcast.clock import Uptime

FUTURE_TOLERANCE = timedelta(minutes=5)
WEEK_S = 7 * 86_400.0
KEPT_STAMPS = 1000
FIRST_BACKOFF_S = 15 * 60.0
LONGEST_BACKOFF_S = 6 * 3600.0


@dataclass(frozen=True, slots=True)
class TrainingStamp:
    """One training that ran to a verdict."""

    at: datetime  # by the Clock
    promoted: bool
    uptime: Uptime | None = None  # None: under the data clock, or recorded elsewhere
    attempt: str | None = None  # which one it was; None: recorded by hand

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

    def anchored(self, now: datetime, uptime: Uptime | None) -> "TrainingLog":
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
        """Yield the age of every training."""
        return (stamp.age_s(now, uptime) for stamp in self.stamps)

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
        """Return a pause that is nobody's failure: the count of failures stays."""
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
