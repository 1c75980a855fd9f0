"""A training that nothing drifted for: when it would pay, and what the engine lets through."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from adaptive_retraining_daemon import RetrainingDecisionEngine
from fleetcast.clock import DAY_MS, FakeClock, to_ms
from fleetcast.retraining.state import Attempt, RetrainingState, load_state, read_verdict, save_state
from fleetcast.retraining.trainings import DataSpan, learning
from fleetcast.settings import DecisionSettings

HEALTHY = {"per": 0.02, "needs_retraining": False}
DRIFT = {"per": 0.2, "needs_retraining": True}
NOW_MS = to_ms(datetime(2026, 3, 2, tzinfo=UTC))


def span(days: float, ago: float = 0.0) -> DataSpan:
    """Return so many days that ended so many days ago."""
    end_ms = NOW_MS - round(ago * DAY_MS)
    return DataSpan(end_ms - round(days * DAY_MS), end_ms)


def attempts(*outcomes: str, rule: str = "learning") -> list[Attempt]:
    """Return attempts, newest first."""
    return [
        Attempt(f"a{number}", rule, "", "2026-02-01T00:00:00", outcome=outcome)
        for number, outcome in enumerate(outcomes)
    ]


def engine_at(clock: FakeClock, **limits: float) -> RetrainingDecisionEngine:
    return RetrainingDecisionEngine(**limits, clock=clock, wall_clock=clock)  # type: ignore[arg-type]


def test_a_week_of_new_data_is_tried_once() -> None:
    assert learning([], span(30, ago=6.9), span(30)) == ""
    assert learning([], span(30, ago=7), span(30)) == (
        "learning: 7 days of new data, and it was never tried what they bring"
    )
    assert learning(attempts("promoted", rule="drift"), span(30, ago=7), span(30)), "drift is another matter"


def test_one_that_paid_is_followed_a_week_later() -> None:
    done = attempts("promoted", "rejected", "rejected")
    assert learning(done, span(30, ago=7), span(30), served_loss=0.988) == (
        "learning: 7 days of new data, and the last such training paid: loss 0.988 of the one before"
    )


@pytest.mark.parametrize(("in_vain", "days"), [(1, 14), (2, 28), (5, 28)])
def test_each_one_in_vain_doubles_the_wait_up_to_four_weeks(in_vain: int, days: int) -> None:
    done = attempts(*["rejected"] * in_vain, "promoted")
    assert learning(done, span(30, ago=days - 0.1), span(30)) == ""
    assert learning(done, span(30, ago=days), span(30)).endswith(f"after {in_vain} such trainings in vain")


def test_failed_and_running_ones_say_nothing_about_what_they_bring() -> None:
    done = attempts("failed", "running", "not_enough_data", "promoted")
    assert "paid" in learning(done, span(30, ago=7), span(30))


def test_a_young_fleet_learns_again_when_it_knows_half_as_much_again_whatever_came_before() -> None:
    done = attempts("rejected")
    assert learning(done, span(2, ago=7), span(9)) == "learning: 9 days known, the last training saw 2"
    assert learning(done, span(20, ago=7), span(27)) == ""
    assert learning(done, span(2, ago=6), span(8)) == "", "not before a week"


def test_without_a_training_or_records_nothing_is_learned() -> None:
    assert learning([], None, span(30)) == ""
    assert learning([], span(30, ago=7), None) == ""


def test_without_drift_the_answer_is_no_as_printed_and_learning_has_its_own_keyword() -> None:
    engine = engine_at(FakeClock())
    assert engine.should_retrain(HEALTHY)["should_retrain"] is False
    assert engine.should_retrain(HEALTHY, is_quiet_period=True)["reason"] == "no drift: per 0.020"
    asked = engine.should_retrain(HEALTHY, learning_due=True)
    assert asked["should_retrain"] is True
    assert asked["reason"] == "learning: a training would pay; no drift: per 0.020"
    assert engine.should_retrain(DRIFT, learning_due=True)["reason"] == "drift: per 0.200"


def test_it_waits_for_quiet_without_starting_the_deadline_of_a_busy_fleet() -> None:
    decision = engine_at(FakeClock()).should_retrain(HEALTHY, False, learning_due=True)
    assert decision["should_retrain"] is False
    assert decision["reason"].startswith("no drift")
    assert decision["reason"].endswith("refused: it waits for a quiet period")


def test_a_week_without_any_training_lies_before_it() -> None:
    clock = FakeClock()
    engine = engine_at(clock)
    engine.record_training()
    for _ in range(27):  # every six hours of a week
        clock.advance(hours=6)
        assert not engine.should_retrain(HEALTHY, learning_due=True)["should_retrain"]
    assert "6.8 days since the last training" in engine.should_retrain(HEALTHY, learning_due=True)["reason"]
    clock.advance(hours=6)
    assert engine.should_retrain(HEALTHY, learning_due=True)["should_retrain"]
    engine.record_training(promoted=False)
    assert not engine.should_retrain(HEALTHY, learning_due=True)["should_retrain"], "one in seven days"


@pytest.mark.parametrize(("per_week", "may"), [(0, False), (1, False), (2, False), (3, True), (7, True)])
def test_two_trainings_of_the_week_stay_for_drift(per_week: int, may: bool) -> None:
    engine = engine_at(FakeClock(), max_trainings_per_week=per_week)
    decision = engine.should_retrain(HEALTHY, learning_due=True)
    assert decision["should_retrain"] is may
    if per_week in (1, 2):
        assert f"leave {per_week - 1} trainings of the week for drift, 2 needed" in decision["reason"]


def test_after_a_failure_it_waits_as_any_training_does() -> None:
    engine = engine_at(FakeClock())
    engine.record_failure()
    assert "the last training failed" in engine.should_retrain(HEALTHY, learning_due=True)["reason"]


def test_while_drift_cannot_be_judged_nothing_is_learned() -> None:
    decision = engine_at(FakeClock()).decide(
        HEALTHY, True, initial_due=False, collecting="2 h needed", learning="learning: more"
    )
    assert (decision.should_retrain, decision.reason) == (False, "collecting: 2 h needed")


def test_thirty_days_without_training_go_first() -> None:
    clock = FakeClock()
    engine = engine_at(clock)
    engine.record_training()
    clock.advance(days=30)
    found = engine.decide(HEALTHY, True, initial_due=False, learning="learning: more")
    assert (found.should_retrain, found.rule) == (True, "max_days_without_training")


def test_the_setting_is_on_unless_it_is_turned_off() -> None:
    assert DecisionSettings().learning == "on"


def test_a_restart_and_a_state_file_of_an_older_program_know_what_was_learned(tmp_path: Path) -> None:
    # Given a state with a learning training that was killed, and one that was rejected before
    path = tmp_path / "retraining_state.json"
    done = (*attempts("interrupted", "rejected"), *attempts("promoted", rule="drift"))
    save_state(path, RetrainingState(attempts=tuple(replace(a, id=f"{a.id}{a.rule}") for a in done)))
    found = load_state(path).attempts
    assert learning(found, span(30, ago=13), span(30)) == ""
    assert learning(found, span(30, ago=14), span(30))
    # When the file holds no attempts at all, as an older program wrote it
    old = {key: value for key, value in json.loads(path.read_text()).items() if key != "attempts"}
    path.write_text(json.dumps(old))
    assert learning(load_state(path).attempts, span(30, ago=7), span(30))


def test_the_verdict_tells_what_clients_gained_and_an_older_one_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "attempts"
    folder.mkdir()
    verdict = {"promoted": True, "version": "v", "figures": {"changed": {"ratio": None}}}
    (folder / "a.json").write_text(json.dumps(verdict))
    told = {**verdict, "figures": {"served": {"unchanged": {"ratio": 0.98}}}}
    (folder / "b.json").write_text(json.dumps(told))
    old, new = read_verdict(tmp_path, "a"), read_verdict(tmp_path, "b")
    assert old is not None and old.served_loss is None
    assert new is not None and (new.served_loss, new.changed_loss) == (0.98, None)
