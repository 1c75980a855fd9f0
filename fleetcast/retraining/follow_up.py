"""Further trainings after one that drift asked for: it is found within hours, and hours are little.

Owns: when a change that was trained on is worth another training, as more of the new behaviour is
known. Does not know: safeguards and quiet periods, which hold as for any.

Its series are not judged meanwhile (they have no reference yet), so nothing else would ask.
docs/decisions/follow-up-training.md has the figures.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fleetcast.clock import HOUR_MS, from_ms, parse_plain_utc, to_ms
from fleetcast.errors import CorruptFile
from fleetcast.files import read_json
from fleetcast.retraining.decision import DRIFT, FOLLOW_UP
from fleetcast.retraining.state import REJECTED, VERDICTS, Attempt

_GROWTH = 3.0  # another training is due once this many times as much is known of the change
_ENOUGH_SHARE = 0.5  # of the hours asked for: what saw less learned little, whatever its verdict
_WORTH = 0.9  # the loss on what changed, as a share of the one before, up to which more is to be learned
_RESERVED = 1  # trainings of a week that are left to new changes
_LATEST_DAYS = 14.0


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
        hours: of the changed series' new behaviour that are worth a training; 0 = none is followed.
        changed_loss: of the last verdict, on the changed series, as a share of what served before.
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
    if last.outcome == REJECTED:  # the changes are still to be learned, however much of them was seen
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


def drifting_before(context: Path, attempt_id: str | None = None) -> tuple[Mapping[str, Any], ...]:
    """Return what a context file named as drifting; nothing where it is of another attempt."""
    try:
        content = read_json(context)
    except (FileNotFoundError, CorruptFile):
        return ()
    entries = content.get("drifting")
    if attempt_id not in (None, content.get("attempt_id")) or not isinstance(entries, list):
        return ()
    return tuple(item for item in entries if isinstance(item, dict))
