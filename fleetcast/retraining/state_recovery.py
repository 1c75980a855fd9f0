"""The retraining state at a start: read, or rebuilt from what trainings left behind.

Owns: what happens to a damaged state file, and trainings the state does not know (started by
hand, or before the file was lost). Does not know: limits.
"""

import logging
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from fleetcast import files
from fleetcast.clock import plain_utc
from fleetcast.errors import CorruptFile, SettingsError, UnknownFormat
from fleetcast.forecast.verdicts import verdicts_besides
from fleetcast.retraining.state import RetrainingState, load_state
from fleetcast.retraining.training_log import TrainingLog, TrainingStamp

logger = logging.getLogger(__name__)


def state_at_start(path: Path, clock_mode: str, now: datetime) -> RetrainingState:
    """Return the state in `path` for its owner.

    A damaged file is set aside, and a training is taken to have ended now: better one late
    training than one too many. Those that left a verdict are found again (`with_unknown`).

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
    for verdict in verdicts_besides(checkpoint_dir, known):
        logger.warning(
            "training counted that this daemon did not start attempt=%s promoted=%s",
            verdict.attempt_id,
            verdict.promoted,
        )
        log = log.with_training(
            TrainingStamp(verdict.at, verdict.promoted, attempt=verdict.attempt_id)
        ).in_order()
    return state if log is state.log else replace(state, log=log)
