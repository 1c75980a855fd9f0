"""`retraining_state.json`: what the retraining daemon must not forget.

Owns: the file's format and its atomic writing; what happens to a damaged file; the verdicts that trainers
leave (`checkpoints/attempts/<id>.json`), those of trainings that the state does not know (started by
hand, or before the file was lost) included. Does not know: what the entries
mean for a decision (`decision`) or a process (`attempts`).

Keys for people, as `spec.md` prints them: `last_training_time` (of the last training that ran
to a verdict: what the 6-hour safeguard counts from), `training_history` and `total_trainings`
(promoted ones), UTC without offset. Keys of our own: `format`, `trainings` (every verdict, with
microseconds and uptime), `backoff`, `installed_at`, `clock_mode`, `attempts`, `attempts_ended` (by
outcome, those no longer listed included), `last_decision`.
A file with the first three keys only is accepted (as another version of the product wrote it).
"""

import logging
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fleetcast import files
from fleetcast.clock import Uptime, from_ms, parse_plain_utc, plain_utc
from fleetcast.errors import CorruptFile, SettingsError, UnknownFormat
from fleetcast.forecast.registry import ATTEMPTS_FOLDER
from fleetcast.retraining.decision import Backoff, TrainingLog, TrainingStamp

logger = logging.getLogger(__name__)

STATE_FILE = "retraining_state.json"
FORMAT = 1
KEPT_ATTEMPTS = 50
_ID_TIME = "%Y%m%dT%H%M%SZ"

RUNNING, PROMOTED, REJECTED, HELD = "running", "promoted", "rejected", "held"
FAILED, NOT_ENOUGH_DATA, BUSY, INTERRUPTED = "failed", "not_enough_data", "busy", "interrupted"
OUTCOMES = (PROMOTED, REJECTED, HELD, FAILED, NOT_ENOUGH_DATA, BUSY, INTERRUPTED)
VERDICTS = (PROMOTED, REJECTED, HELD)  # held: it passed the gate, and a person holds new models back


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
    order: str | None = None  # a person's, that asked for it
    is_forced: bool = False

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
    n_ended: Mapping[str, int] = field(default_factory=dict)  # attempts by outcome, also those forgotten
    last_decision: Mapping[str, Any] | None = None

    @property
    def running(self) -> Attempt | None:
        """Return the attempt whose end the daemon has not noted yet."""
        return next((attempt for attempt in self.attempts if attempt.is_running), None)

    def with_attempt(self, attempt: Attempt) -> "RetrainingState":
        """Return the state with this attempt replaced, by its id, or added as the newest; its end counts."""
        before = next((item for item in self.attempts if item.id == attempt.id), None)
        n_ended = Counter(self.n_ended)
        if not attempt.is_running and (before is None or before.is_running):
            n_ended[attempt.outcome] += 1
        if before is not None:
            changed = tuple(attempt if item.id == attempt.id else item for item in self.attempts)
        else:
            changed = (attempt, *self.attempts)[:KEPT_ATTEMPTS]
        return replace(self, attempts=changed, n_ended=dict(n_ended))


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
            "attempts": [_attempt_json(attempt) for attempt in state.attempts],
            "attempts_ended": state.n_ended,
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
        **({} if stamp.is_counted else {"is_counted": False}),
    }


def _attempt_json(attempt: Attempt) -> dict[str, Any]:
    """Return an attempt; what only an ordered one has is left out elsewhere, for older releases."""
    of_orders = ("order", "is_forced")
    return {name: value for name, value in asdict(attempt).items() if value or name not in of_orders}


def _parse(raw: Mapping[str, Any]) -> RetrainingState:
    history = [parse_plain_utc(text) for text in raw.get("training_history") or []]
    stamps = [_stamp(item) for item in raw.get("trainings") or []]
    if "trainings" not in raw:  # a foreign file knows promoted trainings only
        last = raw.get("last_training_time")
        times = {*history, *([parse_plain_utc(last)] if last else [])}
        stamps = [TrainingStamp(at, promoted=True) for at in sorted(times, reverse=True)]
    installed, backoff = raw.get("installed_at"), raw.get("backoff") or {}
    attempts = tuple(_attempt(item) for item in raw.get("attempts") or [])
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
        attempts=attempts,
        n_ended=_n_ended(raw.get("attempts_ended"), attempts),
        last_decision=raw.get("last_decision"),
    )


def _stamp(raw: Mapping[str, Any]) -> TrainingStamp:
    boot = _text_or_none(raw["boot"])
    uptime = Uptime(boot, float(raw["uptime_s"])) if boot else None
    attempt = _text_or_none(raw.get("attempt"))
    is_counted = raw.get("is_counted") is not False
    return TrainingStamp(parse_plain_utc(raw["at"]), raw["promoted"] is True, uptime, attempt, is_counted)


def _attempt(raw: Mapping[str, Any]) -> Attempt:
    attempt = Attempt(**raw)
    if attempt.outcome not in (RUNNING, *OUTCOMES) or not isinstance(attempt.id, str):
        raise ValueError(f"attempt {attempt.id!r} has outcome {attempt.outcome!r}")
    return attempt


def _n_ended(raw: Mapping[str, Any] | None, attempts: Iterable[Attempt]) -> dict[str, int]:
    """Return how many attempts ended, by outcome; an older file knows those that it lists."""
    if raw is None:
        return dict(Counter(attempt.outcome for attempt in attempts if not attempt.is_running))
    if any(type(count) is not int or count < 0 for count in raw.values()):
        raise ValueError(f"attempts_ended holds numbers, not {raw!r}")
    return dict(raw)


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


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a training ended: an attempt that got as far as a challenger."""

    attempt_id: str
    promoted: bool
    version: str
    why: str
    at: datetime
    changed_loss: float | None = None  # on the series that changed, as a share of the champion's
    served_loss: float | None = None  # of what clients get, on the unchanged series, as such a share
    passed_gate: bool = False  # and not promoted: a person holds new models back


def read_verdict(checkpoint_dir: Path, attempt_id: str) -> Verdict | None:
    """Return the verdict on one attempt; None where there is none, or no challenger was made."""
    path = checkpoint_dir / ATTEMPTS_FOLDER / f"{attempt_id}.json"
    try:
        raw = files.read_json(path)
        promoted, version, why = raw.get("promoted"), raw.get("version"), raw.get("why")
        if not isinstance(promoted, bool) or not isinstance(version, str):
            return None
        figures, has_passed = raw.get("figures"), raw.get("passed_gate") is True
        losses = (_ratio(figures, "changed"), _ratio(figures, "served", "unchanged"))
        return Verdict(attempt_id, promoted, version, str(why or ""), _made_at(path), *losses, has_passed)
    except FileNotFoundError:
        return None
    except (CorruptFile, OSError) as error:
        logger.warning("verdict unreadable error=%s", error)
        return None


def new_verdicts(checkpoint_dir: Path, known: Container[str]) -> Iterator[Verdict]:
    """Yield the verdicts on attempts that are not known, oldest first."""
    for path in sorted((checkpoint_dir / ATTEMPTS_FOLDER).glob("*.json")):
        if path.stem not in known and not path.name.startswith("."):
            verdict = read_verdict(checkpoint_dir, path.stem)
            if verdict is not None:
                yield verdict


def _ratio(figures: object, *names: str) -> float | None:
    """Return the ratio of a comparison that the gate's figures hold, None where it is not there."""
    for name in (*names, "ratio"):
        figures = figures.get(name) if isinstance(figures, dict) else None
    return float(figures) if isinstance(figures, int | float) and not isinstance(figures, bool) else None


def _made_at(path: Path) -> datetime:
    """Return when an attempt was made: by its id, which is in the Clock's time, else by its file."""
    try:
        return datetime.strptime(path.stem.split("-")[0], _ID_TIME).replace(tzinfo=UTC)
    except ValueError:
        return from_ms(path.stat().st_mtime_ns // 1_000_000)
