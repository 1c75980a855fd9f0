"""The trainings of one fleet: what the state file remembers, kept in step with what runs.

Owns: the order of writing around a training, so that whoever dies at whatever point, the next
daemon neither forgets it nor counts it twice: written down, started, ended, counted, each in one
atomic write of `retraining_state.json`. Does not know: when to train.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from fleetcast.clock import BIN_EPOCH, Clock, plain_utc
from fleetcast.errors import FleetcastError
from fleetcast.files import append_line, write_json
from fleetcast.forecast.registry import new_version_id, read_verdict
from fleetcast.retraining import state as states
from fleetcast.retraining.attempts import Attempts, Step
from fleetcast.retraining.decision import Backoff, Decision, TrainingLog, safeguards_json
from fleetcast.retraining.follow_up import follow_up
from fleetcast.retraining.order import CONTEXT_FILE
from fleetcast.retraining.report import RetrainingCheck
from fleetcast.retraining.state import (
    Attempt,
    RetrainingState,
    check_clock_mode,
    load_state,
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


class TrainingRecord(Protocol):
    """What is asked of RetrainingDecisionEngine."""

    log: TrainingLog
    backoff: Backoff

    def record_training(self, promoted: bool = True, *, attempt: str | None = None) -> None: ...

    def record_failure(self) -> None: ...

    def record_pause(self, seconds: float) -> None: ...


class Trainings:
    """Remembers, starts and counts trainings. Only the owner of the state may change anything."""

    def __init__(
        self,
        record: TrainingRecord,
        attempts: Attempts,
        path: Path,
        clock_mode: str,
        clock: Clock,
    ) -> None:
        self._record = record
        self._attempts = attempts
        self._path = path
        self._clock_mode = clock_mode
        self._clock = clock
        self._state = RetrainingState()
        self._telemetry = RetrainingTelemetry(path.with_name(TEXTFILE))

    @property
    def running(self) -> Attempt | None:
        """Return the training whose end was not noted yet."""
        return self._state.running

    def follow_up(self, hours: float, left: int) -> str:
        """Return why the last training is to be followed by another, or ""; see `follow_up`."""
        attempts, context = self._state.attempts, self._path.with_name(CONTEXT_FILE)
        verdict = read_verdict(self._attempts.folder, attempts[0].id) if attempts else None
        loss = verdict.changed_loss if verdict else None
        return follow_up(attempts, context, self._clock.now(), hours, changed_loss=loss, left=left)

    def take_over(self) -> None:
        """Become the owner: read the state, adopt a training that still runs."""
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
        if self._record.log.installed_at is None and now > BIN_EPOCH:
            self._record.log = replace(self._record.log, installed_at=now)
        attempt = self.running
        if attempt is not None and self._attempts.is_running(attempt):
            self._attempts.follow(attempt)
            return None
        ended = None
        if attempt is not None:
            ended = replace(self._attempts.conclude(attempt), ended_at=plain_utc(now))
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

    def why_not_free(self) -> str:
        """Return who trains at the moment, or ""."""
        if self.running:
            return f"a training is running (attempt {self.running.id})"
        return self._attempts.why_not_free()

    def start(
        self,
        decision: Decision,
        version_before: str | None,
        steps: Sequence[Step],
        context: Mapping[str, Any],
    ) -> Attempt | None:
        """Start a training; None if somebody else was faster.

        Raises:
            FleetcastError: it could not be started; that counts as a failed one.
        """
        if not self._attempts.reserve():
            return None
        now = self._clock.now()
        attempt = Attempt(
            new_version_id(now), decision.rule, decision.reason, plain_utc(now), version_before=version_before
        )
        try:
            self._remember(attempt)  # before anything starts: a training is never uncounted
            write_json(Path(CONTEXT_FILE), {"attempt_id": attempt.id, **context})
            spawned = self._attempts.spawn(attempt, steps)
        except FleetcastError as error:
            self._attempts.release()
            self._record.record_failure()
            failed = replace(attempt, outcome=states.FAILED, ended_at=plain_utc(now), why=str(error))
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
            "safeguards": safeguards_json(check.decision.safeguards),
        }
        self._state = replace(self._state, last_decision=decision)
        self._save()
        self._telemetry.write(check, self._current())

    def _count(self, ended: Attempt) -> None:
        """Let an ended training count for the safeguards."""
        if ended.outcome in states.VERDICTS:
            self._record.record_training(ended.outcome == states.PROMOTED, attempt=ended.id)
        elif ended.outcome == states.FAILED:
            self._record.record_failure()
        elif ended.outcome == states.NOT_ENOUGH_DATA:
            self._record.record_pause(NOT_ENOUGH_PAUSE_S)
        elif ended.outcome == states.BUSY:
            self._record.record_pause(BUSY_PAUSE_S)

    def _remember(self, attempt: Attempt) -> None:
        self._state = self._state.with_attempt(attempt)
        self._save()

    def _save(self) -> None:
        save_state(self._path, self._current())

    def _current(self) -> RetrainingState:
        return replace(self._state, log=self._record.log, backoff=self._record.backoff)

    def _use(self, state: RetrainingState) -> None:
        self._state = state
        self._record.log, self._record.backoff = state.log, state.backoff
