"""`retraining_state.json`: what the retraining daemon must not forget.

Owns: the file's format and its atomic writing; what happens to a damaged file; trainings that the
state does not know (started by hand, or before the file was lost). Does not know: what the entries
mean for a decision (`decision`) or a process (`attempts`).

Keys for people, as `spec.md` prints them: `last_training_time` (of the last training that ran
to a verdict: what the 6-hour safeguard counts from), `training_history` and `total_trainings`
(promoted ones), UTC without offset. Keys of our own: `format`, `trainings` (every verdict, with
microseconds and uptime), `backoff`, `installed_at`, `clock_mode`, `attempts`, `last_decision`.
A file with the first three keys only is accepted (as another version of the product wrote it).
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fleetcast import files
from fleetcast.clock import Uptime, parse_plain_utc, plain_utc
from fleetcast.errors import CorruptFile, SettingsError, UnknownFormat
from fleetcast.forecast.registry import new_verdicts
from fleetcast.retraining.decision import Backoff, TrainingLog, TrainingStamp

logger = logging.getLogger(__name__)

STATE_FILE = "retraining_state.json"
FORMAT = 1
KEPT_ATTEMPTS = 50

RUNNING, PROMOTED, REJECTED = "running", "promoted", "rejected"
FAILED, NOT_ENOUGH_DATA, BUSY, INTERRUPTED = "failed", "not_enough_data", "busy", "interrupted"
OUTCOMES = (PROMOTED, REJECTED, FAILED, NOT_ENOUGH_DATA, BUSY, INTERRUPTED)
VERDICTS = (PROMOTED, REJECTED)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One started training."""

    id: str
    rule: str
    reason: str
    started_at: str  # by the Clock, plain UTC
    version_before: str | None = None
    pid: int | None = None  # of the supervising process; None: not known to have been spawned
    outcome: str = RUNNING
    ended_at: str | None = None
    exit_code: int | None = None
    version: str | None = None
    why: str = ""

    @property
    def is_running(self) -> bool:
        """Whether the daemon has not noted its end yet."""
        return self.outcome == RUNNING


@dataclass(frozen=True, slots=True)
class RetrainingState:
    """Everything that survives a restart."""

    log: TrainingLog = field(default_factory=TrainingLog)
    backoff: Backoff = field(default_factory=Backoff)
    clock_mode: str | None = None  # None: never run
    attempts: tuple[Attempt, ...] = ()  # newest first
    last_decision: Mapping[str, Any] | None = None

    @property
    def running(self) -> Attempt | None:
        """Return the attempt whose end the daemon has not noted yet."""
        return next((attempt for attempt in self.attempts if attempt.is_running), None)

    def with_attempt(self, attempt: Attempt) -> "RetrainingState":
        """Return the state with this attempt replaced, by its id, or added as the newest."""
        if any(item.id == attempt.id for item in self.attempts):
            changed = tuple(attempt if item.id == attempt.id else item for item in self.attempts)
        else:
            changed = (attempt, *self.attempts)[:KEPT_ATTEMPTS]
        return replace(self, attempts=changed)


def load_state(path: Path) -> RetrainingState:
    """Return the state in `path`; a fresh one where there is no file.

    Raises:
        CorruptFile, UnknownFormat: with what to do.
    """
    try:
        raw = files.read_json(path)
    except FileNotFoundError:
        return RetrainingState()
    if raw.get("format", FORMAT) != FORMAT:
        raise UnknownFormat(path, f"state format {raw['format']!r}", hint=f"this program reads {FORMAT}")
    try:
        return _parse(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFile(path, f"not a retraining state: {error!r}") from error


def save_state(path: Path, state: RetrainingState) -> None:
    """Replace the file in one durable step."""
    log, backoff = state.log, state.backoff
    files.write_json(
        path,
        {
            "last_training_time": plain_utc(log.last.at) if log.last else None,
            "training_history": [plain_utc(stamp.at) for stamp in log.stamps if stamp.promoted],
            "total_trainings": log.total_promoted,
            "timezone": "UTC",
            "format": FORMAT,
            "installed_at": None if log.installed_at is None else plain_utc(log.installed_at),
            "clock_mode": state.clock_mode,
            "trainings": [_stamp_json(stamp) for stamp in log.stamps],
            "backoff": {
                "failures": backoff.failures,
                "since": None if backoff.since is None else backoff.since.isoformat(),
                "length_s": backoff.length_s,
            },
            "attempts": [asdict(attempt) for attempt in state.attempts],
            "last_decision": state.last_decision,
        },
    )


def _stamp_json(stamp: TrainingStamp) -> dict[str, Any]:
    return {
        "at": stamp.at.isoformat(),
        "promoted": stamp.promoted,
        "boot": stamp.uptime.boot if stamp.uptime else None,
        "uptime_s": stamp.uptime.seconds if stamp.uptime else None,
        "attempt": stamp.attempt,
    }


def _parse(raw: Mapping[str, Any]) -> RetrainingState:
    history = [parse_plain_utc(text) for text in raw.get("training_history") or []]
    stamps = [_stamp(item) for item in raw.get("trainings") or []]
    if "trainings" not in raw:  # a foreign file knows promoted trainings only
        last = raw.get("last_training_time")
        times = {*history, *([parse_plain_utc(last)] if last else [])}
        stamps = [TrainingStamp(at, promoted=True) for at in sorted(times, reverse=True)]
    installed, backoff = raw.get("installed_at"), raw.get("backoff") or {}
    return RetrainingState(
        log=TrainingLog(
            tuple(stamps),
            int(raw.get("total_trainings") or 0),
            parse_plain_utc(installed) if installed else None,
        ),
        backoff=Backoff(
            int(backoff.get("failures") or 0),
            _moment(backoff.get("since")),
            float(backoff.get("length_s") or 0.0),
        ),
        clock_mode=_text_or_none(raw.get("clock_mode")),
        attempts=tuple(_attempt(item) for item in raw.get("attempts") or []),
        last_decision=raw.get("last_decision"),
    )


def _stamp(raw: Mapping[str, Any]) -> TrainingStamp:
    boot = _text_or_none(raw["boot"])
    uptime = Uptime(boot, float(raw["uptime_s"])) if boot else None
    attempt = _text_or_none(raw.get("attempt"))
    return TrainingStamp(parse_plain_utc(raw["at"]), raw["promoted"] is True, uptime, attempt)


def _attempt(raw: Mapping[str, Any]) -> Attempt:
    attempt = Attempt(**raw)
    if attempt.outcome not in (RUNNING, *OUTCOMES) or not isinstance(attempt.id, str):
        raise ValueError(f"attempt {attempt.id!r} has outcome {attempt.outcome!r}")
    return attempt


def _moment(text: str | None) -> datetime | None:
    return parse_plain_utc(text) if text else None


def _text_or_none(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r}")
    return value


def state_at_start(path: Path, clock_mode: str, now: datetime) -> RetrainingState:
    """Return the state in `path` for its owner.

    A damaged file is set aside, and one training counts as ended now: better one late training than
    one too many. `with_unknown` finds the trainings again that left a verdict.

    Raises:
        SettingsError: the state was made under the other clock.
        UnknownFormat: another version of the program wrote it.
    """
    try:
        state = load_state(path)
    except UnknownFormat:
        raise
    except CorruptFile as error:
        aside = path.with_name(f"{path.name}.damaged-{plain_utc(now).replace(':', '')}")
        files.publish(path, aside)
        logger.error("state set aside as %s, safeguards start with a training now: %s", aside, error)
        state = RetrainingState(log=TrainingLog().with_training(TrainingStamp(now, promoted=False)))
    check_clock_mode(path, state, clock_mode)
    return replace(state, clock_mode=clock_mode)


def check_clock_mode(path: Path, state: RetrainingState, clock_mode: str) -> None:
    """Refuse a state whose times mean something else.

    Raises:
        SettingsError: with what to do.
    """
    if state.clock_mode not in (None, clock_mode):
        raise SettingsError(
            [f"clock.mode is {clock_mode}, but {path} was made under --clock {state.clock_mode}"],
            hint=f"start with --clock {state.clock_mode}, or in another folder",
        )


def with_unknown(state: RetrainingState, checkpoint_dir: Path) -> RetrainingState:
    """Return the state with every training that left a verdict counted; itself where none is new."""
    known = {stamp.attempt for stamp in state.log.stamps if stamp.attempt}
    known |= {attempt.id for attempt in state.attempts}
    log = state.log
    for verdict in new_verdicts(checkpoint_dir, known):
        logger.warning(
            "training counted that this daemon did not start attempt=%s promoted=%s",
            verdict.attempt_id,
            verdict.promoted,
        )
        log = log.with_training(
            TrainingStamp(verdict.at, verdict.promoted, attempt=verdict.attempt_id)
        ).in_order()
    return state if log is state.log else replace(state, log=log)
