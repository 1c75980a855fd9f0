"""A training that saw only hours of a change is followed as more is known, as long as it pays."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fleetcast.clock import plain_utc, to_ms
from fleetcast.retraining.order import drifting_before
from fleetcast.retraining.state import Attempt
from fleetcast.retraining.trainings import follow_up

CHANGE = datetime(2026, 3, 2, 9, tzinfo=UTC)


def attempt(after_h: float = 4.0, **changes: Any) -> Attempt:
    fields = {"rule": "drift", "outcome": "promoted", **changes}
    started = plain_utc(CHANGE + timedelta(hours=after_h))
    return Attempt("a1", reason="", started_at=started, **fields)


@pytest.fixture
def context(tmp_path: Path) -> Path:
    path = tmp_path / "training_context.json"
    earlier = CHANGE - timedelta(hours=2)
    drifting = [
        {"server": "a", "metric": "cpu_pct", "changed_ms": to_ms(earlier)},
        {"server": "b", "metric": "cpu_pct", "changed_ms": to_ms(CHANGE)},
        {"server": "b", "metric": "mem_pct", "changed_ms": to_ms(CHANGE + timedelta(hours=3))},
    ]
    path.write_text(json.dumps({"attempt_id": "a1", "drifting": drifting}))
    return path


def at(after_h: float) -> datetime:
    return CHANGE + timedelta(hours=after_h)


def test_it_is_due_once_a_day_of_the_middle_change_is_known(context: Path) -> None:
    assert follow_up([attempt()], context, at(23.9), 24) == ""
    assert follow_up([attempt()], context, at(24), 24) == (
        "follow-up: 24 h known of the change of 2026-03-02 09:00, trained on 4"
    )
    assert follow_up([attempt()], context, at(14 * 24 + 1), 24) == "", "too late to be worth one of its own"


@pytest.mark.parametrize("after_h", [4.0, 40.0])
def test_a_rejected_one_is_followed_a_day_later_however_much_it_saw(context: Path, after_h: float) -> None:
    rejected = [attempt(after_h, outcome="rejected")]

    assert follow_up(rejected, context, at(after_h + 23.9), 24) == ""
    assert follow_up(rejected, context, at(after_h + 24), 24) == (
        "follow-up: 24 h since a rejected training for drift"
    )
    assert follow_up(rejected, context, at(after_h + 14 * 24 + 1), 24) == ""
    again = [attempt(after_h, outcome="rejected", rule="follow_up")]
    assert follow_up(again, context, at(after_h + 48), 24) == "", "once is enough"


@pytest.mark.parametrize("rule", ["drift", "follow_up"])
def test_one_that_learned_much_is_followed_once_three_times_as_much_is_known(
    context: Path, rule: str
) -> None:
    done = [attempt(25, rule=rule)]

    def asked(known_h: float, changed_loss: float | None = 0.8, left: int = 2) -> str:
        return follow_up(done, context, at(known_h), 24, changed_loss=changed_loss, left=left)

    assert asked(74.9) == ""
    assert asked(75) == "follow-up: 75 h known of the change of 2026-03-02 09:00, trained on 25"
    assert asked(14 * 24 + 1) == ""
    assert asked(75, changed_loss=0.91) == "", (
        "little was learned: the model knew it, or it cannot be learned"
    )
    assert asked(75, changed_loss=None) == "", "how much was learned is unknown"
    assert asked(75, left=1) == "", "the last one of a week is left to the next change"


def test_a_hurried_training_is_followed_whatever_it_learned_and_by_the_last_of_a_week(context: Path) -> None:
    assert follow_up([attempt(11.9)], context, at(36), 24, changed_loss=0.99, left=1)
    assert follow_up([attempt(11.9)], context, at(35), 24) == "", "three times as much is not known yet"
    assert follow_up([attempt(12)], context, at(36), 24, changed_loss=0.99) == ""
    assert follow_up([attempt(12)], context, at(36), 24, changed_loss=0.8)


@pytest.mark.parametrize(
    "attempts",
    [
        [],
        [attempt(rule="initial")],
        [attempt(outcome="failed")],
        [attempt(25, outcome="running"), attempt()],
        [attempt(30, rule="follow_up"), attempt()],
    ],
    ids=["none", "initial", "failed", "running", "done"],
)
def test_only_the_newest_attempt_with_a_verdict_on_drift_is_followed(
    context: Path, attempts: list[Attempt]
) -> None:
    assert follow_up(attempts, context, at(31), 24) == ""


def test_the_setting_turns_it_off_and_a_lost_context_too(context: Path) -> None:
    assert follow_up([attempt()], context, at(30), 0) == ""
    context.write_text("{")
    assert follow_up([attempt()], context, at(30), 24) == ""
    context.write_text(json.dumps({"attempt_id": "another", "drifting": [{"changed_ms": 1}]}))
    assert follow_up([attempt()], context, at(30), 24) == ""
    context.unlink()
    assert follow_up([attempt()], context, at(30), 24) == ""


def test_what_the_training_before_was_told_is_known(context: Path) -> None:
    assert [item["server"] for item in drifting_before(context)] == ["a", "b", "b"]
