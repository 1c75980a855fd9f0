"""Trainings as the state file counts them, follow-ups, and finding a running one after a restart.

Owns: the order of writing around a training: written down, started, ended, counted, each in one
atomic write of `retraining_state.json`, so that after a kill at any point the next daemon neither
forgets a training nor counts it twice. Owns also when a training for drift is followed by another,
and when one without drift would pay. Does not know: safeguards and quiet periods, which hold for
these as for any training.

**Follow-ups.** Drift is found within hours, when too little of the new behaviour has been seen to
learn it well. Until the changed series have a reference of their own, the detector does not judge
them, so nothing else would ask for another training. docs/decisions/follow-up-training.md has the
figures.

**Learning.** A fleet shows more of itself every week, and no drift says so. A training that nothing
drifted for is tried after a week of new data, and again as long as such trainings bring clients
something; each that brings nothing doubles the wait. docs/decisions/learning-training.md.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fleetcast.clock import BIN_EPOCH, DAY_MS, HOUR_MS, Clock, from_ms, parse_plain_utc, plain_utc, to_ms
from fleetcast.errors import CannotStart, FleetcastError
from fleetcast.files import append_line, write_json
from fleetcast.forecast.registry import Version, new_version_id
from fleetcast.promotion.orders import Order
from fleetcast.retraining.attempts import Attempts, Step
from fleetcast.retraining.decision import (
    DRIFT,
    FOLLOW_UP,
    LEARNING,
    Decision,
    RetrainingDecisionEngine,
    safeguards_json,
)
from fleetcast.retraining.order import CONTEXT_FILE, drifting_before
from fleetcast.retraining.quiet import BUSY as NOT_QUIET
from fleetcast.retraining.report import RetrainingCheck
from fleetcast.retraining.state import (
    BUSY,
    FAILED,
    INTERRUPTED,
    NOT_ENOUGH_DATA,
    PROMOTED,
    REJECTED,
    STATE_FILE,
    VERDICTS,
    Attempt,
    RetrainingState,
    check_clock_mode,
    load_state,
    read_verdict,
    save_state,
    state_at_start,
    with_unknown,
)
from fleetcast.retraining.telemetry import TEXTFILE, RetrainingTelemetry

logger = logging.getLogger(__name__)

DECISIONS_FILE = "decisions.jsonl"
DECISIONS_MAX_BYTES = 5_000_000  # and one older file of this size
NOT_ENOUGH_PAUSE_S = 3600.0
BUSY_PAUSE_S = 900.0
_GROWTH = 3.0  # another training is due once this many times as much is known of the change
_ENOUGH_SHARE = 0.5  # of the hours asked for: a training that saw less learned little
_WORTH = 0.9  # the loss on what changed, as a share of the one before, up to which another pays
_RESERVED = 1  # trainings of a week that are left to new changes
_LATEST_DAYS = 14.0
_LEARN_DAYS = 7.0  # of new data that are worth a training
_LONGEST_LEARN_DAYS = 28.0  # after learning trainings that brought nothing
_YOUNG_GROWTH = 1.5  # the history of a young fleet over what its last training saw


@dataclass(frozen=True, slots=True)
class DataSpan:
    """A stretch of records, in data time."""

    start_ms: int
    end_ms: int

    @property
    def days(self) -> float:
        """Return its length."""
        return max(0, self.end_ms - self.start_ms) / DAY_MS


class Trainings:
    """Remembers, starts and counts trainings. Only the owner of the state may change anything."""

    def __init__(
        self,
        engine: RetrainingDecisionEngine,
        attempts: Attempts,
        path: Path,
        clock_mode: str,
        clock: Clock,
        on_end: Callable[[Attempt], None] = lambda _ended: None,
    ) -> None:
        """Remember the parts.

        Args:
            on_end: takes a training that has ended, before it counts; where it fails, the next
                `note` tries again.
        """
        self._on_end = on_end
        self._engine = engine
        self._attempts = attempts
        self._path = path
        self._clock_mode = clock_mode
        self._clock = clock
        self._state = RetrainingState()
        self._telemetry = RetrainingTelemetry(path.with_name(TEXTFILE), attempts.folder)

    @property
    def running(self) -> Attempt | None:
        """Return the training whose end was not noted yet."""
        return self._state.running

    @property
    def pids(self) -> tuple[int, ...]:
        """Return the processes whose load is our own."""
        return (self.running.pid,) if self.running and self.running.pid else ()

    def follow_up(self, hours: float, left: int) -> str:
        """Return why the last training is to be followed by another, or ""; see `follow_up`."""
        attempts, context = self._state.attempts, self._path.with_name(CONTEXT_FILE)
        verdict = read_verdict(self._attempts.folder, attempts[0].id) if attempts else None
        loss = verdict.changed_loss if verdict else None
        return follow_up(attempts, context, self._clock.now(), hours, changed_loss=loss, left=left)

    def learning(self, last: DataSpan | None, history: DataSpan | None) -> str:
        """Return why a training would pay although nothing drifted, or ""; see `learning`."""
        attempts = self._state.attempts
        done = next((a for a in attempts if a.rule == LEARNING and a.outcome in VERDICTS), None)
        verdict = read_verdict(self._attempts.folder, done.id) if done else None
        return learning(attempts, last, history, served_loss=verdict.served_loss if verdict else None)

    def take_over(self) -> None:
        """Become the owner: read the state, adopt a training that still runs.

        Raises:
            CannotStart: a file that a check writes cannot be written; see `require_files`.
        """
        require_files(self._path.parent)
        self._use(state_at_start(self._path, self._clock_mode, self._clock.now()))
        if self.running:
            is_running = self._attempts.is_running(self.running)
            logger.info("training found attempt=%s is_running=%s", self.running.id, is_running)

    def look(self) -> None:
        """Read the state without owning it."""
        state = load_state(self._path)
        check_clock_mode(self._path, state, self._clock_mode)
        self._use(state)

    def note(self) -> Attempt | None:
        """Note what happened since the last look; return a training that has ended."""
        now = self._clock.now()
        if self._engine.log.installed_at is None and now > BIN_EPOCH:
            self._engine.log = replace(self._engine.log, installed_at=now)
        attempt = self.running
        if attempt is not None and self._attempts.is_running(attempt):
            self._attempts.follow(attempt)
            return None
        ended = None
        if attempt is not None:
            ended = replace(self._attempts.conclude(attempt), ended_at=plain_utc(now))
            self._on_end(ended)
            self._count(ended)
            self._state = self._state.with_attempt(ended)
        self._use(with_unknown(self._current(), self._attempts.folder))
        if ended is not None:
            self._save()
            logger.info(
                "training ended attempt=%s outcome=%s version=%s exit_code=%s why=%s",
                *(ended.id, ended.outcome, ended.version, ended.exit_code, ended.why),
            )
        return ended

    def attempt_of(self, order_id: str) -> Attempt | None:
        """Return the training that an order became; one that never began does not count."""
        found = (attempt for attempt in self._state.attempts if attempt.order == order_id)
        return next((attempt for attempt in found if attempt.outcome != INTERRUPTED), None)

    def why_not_free(self) -> str:
        """Return which training runs at the moment, or ""."""
        if self.running:
            return f"a training is running (attempt {self.running.id})"
        return self._attempts.why_not_free()

    def start(
        self,
        decision: Decision,
        version_before: str | None,
        steps: Sequence[Step],
        context: Mapping[str, Any],
        order: Order | None = None,
    ) -> Attempt | None:
        """Start a training; None if another process was faster.

        Args:
            order: the person's order behind it, if one is.
        Raises:
            FleetcastError: it could not be started, which counts as a failed training.
            CannotStart: its check could not be written down, which counts as none.
        """
        require_files(self._path.parent)
        if not self._attempts.reserve():
            return None
        now = self._clock.now()
        attempt = Attempt(
            new_version_id(now), decision.rule, decision.reason, plain_utc(now), version_before=version_before
        )
        if order is not None:
            attempt = replace(attempt, order=order.id, is_forced=order.force)
        try:
            self._remember(attempt)  # before anything starts: a training is never uncounted
            write_json(Path(CONTEXT_FILE), {"attempt_id": attempt.id, **context})
            spawned = self._attempts.spawn(attempt, steps)
        except FleetcastError as error:
            self._attempts.release()
            self._engine.record_failure()
            failed = replace(attempt, outcome=FAILED, ended_at=plain_utc(now), why=str(error))
            self._state = self._state.with_attempt(failed)
            raise
        logger.info("training started attempt=%s rule=%s pid=%s", spawned.id, spawned.rule, spawned.pid)
        self._remember(spawned)
        return spawned

    def note_check(self, check: RetrainingCheck) -> None:
        """Add a line to `decisions.jsonl`; write the state with the newest decision."""
        append_line(self._path.with_name(DECISIONS_FILE), check.as_line(), max_bytes=DECISIONS_MAX_BYTES)
        decision = {
            "at": plain_utc(check.at),
            "should_retrain": check.decision.should_retrain,
            "rule": check.decision.rule,
            "reason": check.decision.reason,
            "outcome": check.action,
            "not_quiet": check.quiet.reason if check.decision.reason.startswith(NOT_QUIET) else "",
            "safeguards": safeguards_json(check.decision.safeguards),
        }
        self._state = replace(self._state, last_decision=decision)
        self._save()
        self._telemetry.write(check, self._current())

    def _count(self, ended: Attempt) -> None:
        """Let an ended training count for the safeguards."""
        if ended.outcome in VERDICTS:
            is_counted = not ended.is_forced
            self._engine.record_training(ended.outcome == PROMOTED, attempt=ended.id, is_counted=is_counted)
        elif ended.outcome == FAILED:
            self._engine.record_failure()
        elif ended.outcome == NOT_ENOUGH_DATA:
            self._engine.record_pause(NOT_ENOUGH_PAUSE_S)
        elif ended.outcome == BUSY:
            self._engine.record_pause(BUSY_PAUSE_S)

    def _remember(self, attempt: Attempt) -> None:
        self._state = self._state.with_attempt(attempt)
        self._save()

    def _save(self) -> None:
        save_state(self._path, self._current())

    def _current(self) -> RetrainingState:
        return replace(self._state, log=self._engine.log, backoff=self._engine.backoff)

    def _use(self, state: RetrainingState) -> None:
        self._state = state
        self._engine.log, self._engine.backoff = state.log, state.backoff


def require_files(folder: Path) -> None:
    """Refuse to train where a check could not be written down.

    Raises:
        CannotStart: something else stands where a file has to be, or the decisions take no more lines.
    """
    for name in (STATE_FILE, DECISIONS_FILE, CONTEXT_FILE, TEXTFILE):
        path = folder / name
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "something else"
            hint = "move it away: the daemon makes the file itself"
            raise CannotStart(f"{path.absolute()} must be a file, it is {what}", hint=hint)
    path = folder / DECISIONS_FILE
    if path.exists() and not os.access(path, os.R_OK | os.W_OK):
        hint = "give it to the user of the daemon"
        raise CannotStart(f"{path.absolute()} must be readable and writable, it is not", hint=hint)


def follow_up(
    attempts: Sequence[Attempt],
    context: Path,
    now: datetime,
    hours: float,
    *,
    changed_loss: float | None = None,
    left: int = 3,
) -> str:
    """Return why a training is due, or "".

    Args:
        attempts: newest first.
        context: `training_context.json` of the last attempt.
        hours: of the changed series' new behaviour that are worth a training; 0 = never.
        changed_loss: of the last verdict, on the changed series, as a share of the champion's.
        left: trainings that the week has left.
    """
    last = next((attempt for attempt in attempts if attempt.outcome in VERDICTS), None)
    if hours <= 0 or last is None or last is not attempts[0] or last.rule not in (DRIFT, FOLLOW_UP):
        return ""
    drifting = drifting_before(context, last.id)
    changed = [item["changed_ms"] for item in drifting if isinstance(item.get("changed_ms"), int)]
    if not changed:
        return ""
    started_ms = to_ms(parse_plain_utc(last.started_at))
    if last.outcome == REJECTED:  # the changes are not learned yet, however much of them was seen
        waited_h = (to_ms(now) - started_ms) / HOUR_MS
        is_due = last.rule == DRIFT and hours <= waited_h <= _LATEST_DAYS * 24
        return f"follow-up: {waited_h:.0f} h since a rejected training for drift" if is_due else ""
    # the middle one: of many slow changes the newest is always a few hours old
    middle_ms = sorted(changed)[len(changed) // 2]
    seen_h = (started_ms - middle_ms) / HOUR_MS
    known_h = (to_ms(now) - middle_ms) / HOUR_MS
    is_first = last.rule == DRIFT and seen_h < _ENOUGH_SHARE * hours
    is_worth_it = is_first or (left > _RESERVED and changed_loss is not None and changed_loss <= _WORTH)
    if not is_worth_it or not max(hours, _GROWTH * seen_h) <= known_h <= _LATEST_DAYS * 24:
        return ""
    since = f"{from_ms(middle_ms):%Y-%m-%d %H:%M}"
    return f"follow-up: {known_h:.0f} h known of the change of {since}, trained on {seen_h:.0f}"


def data_span(version: Version | None) -> DataSpan | None:
    """Return the data that a version was trained on and judged by; None where that is not known."""
    if version is None or version.data_start_ms is None or version.data_end_ms is None:
        return None
    return DataSpan(version.data_start_ms, version.data_end_ms)


def learning(
    attempts: Sequence[Attempt],
    last: DataSpan | None,
    history: DataSpan | None,
    *,
    served_loss: float | None = None,
) -> str:
    """Return why a training would pay although nothing drifted, or "".

    Args:
        attempts: newest first.
        last: the data of the last training that ran to a verdict.
        history: what a training would be given now.
        served_loss: of the last learning training that ran to a verdict, as a share of the champion's.
    """
    if last is None or history is None:
        return ""
    new_days = (history.end_ms - last.end_ms) / DAY_MS
    if new_days < _LEARN_DAYS:
        return ""
    if history.days >= max(_LEARN_DAYS, _YOUNG_GROWTH * last.days):
        return f"learning: {history.days:.0f} days known, the last training saw {last.days:.0f}"
    outcomes = [item.outcome for item in attempts if item.rule == LEARNING and item.outcome in VERDICTS]
    if not outcomes:
        return f"learning: {new_days:.0f} days of new data, and it was never tried what they bring"
    in_vain = next((n for n, outcome in enumerate(outcomes) if outcome == PROMOTED), len(outcomes))
    if not in_vain:
        brought = "" if served_loss is None else f": loss {served_loss:.3f} of the one before"
        return f"learning: {new_days:.0f} days of new data, and the last such training paid{brought}"
    wait_days = min(_LEARN_DAYS * 2.0**in_vain, _LONGEST_LEARN_DAYS)
    if new_days < wait_days:
        return ""
    return f"learning: {new_days:.0f} days of new data, after {in_vain} such trainings in vain"
