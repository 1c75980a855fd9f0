"""What people order of the retraining daemon: a training now, no trainings until a time, no new models."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import test_adaptive_retraining_daemon as cycles
from small_fleet import SmallFleet, quiet_answers, settings, shifted_from
from test_adaptive_retraining_daemon import daemon, decisions, state
from told_daemon import Told

from fleetcast.clock import SystemClock
from fleetcast.errors import StorageFull
from fleetcast.files import append_line
from fleetcast.forecast.registry import Registry
from fleetcast.promotion import audit as audits
from fleetcast.promotion import orders
from fleetcast.promotion.audit import Entry
from fleetcast.promotion.desk import Desk
from fleetcast.promotion.orders import Order, new_order
from fleetcast.retraining.state import load_state, save_state

fleet, told = cycles.fleet, cycles.told  # fixtures


def desk() -> Desk:
    return Desk(Registry(Path("checkpoints")))


def order(kind: str, **more: Any) -> Order:
    return new_order(kind, "because", "ann", SystemClock().now(), **more)


def give(kind: str, **more: Any) -> Order:
    given = order(kind, **more)
    desk().give(given)
    return given


def outcome(given: Order) -> Entry:
    found = desk().audit.outcome(given.id)
    assert found is not None
    return found


def pause() -> None:
    give("pause", until=(SystemClock().now() + timedelta(days=1)).isoformat())


def test_an_ordered_training_needs_no_drift_and_no_quiet_fleet_and_counts(
    fleet: SmallFleet, told: Told
) -> None:
    told.answers = quiet_answers(fleet.version, cpu=99.0)
    given = give("train-now")
    attempt = cycles.trained(daemon(told), "promoted")
    assert (attempt["rule"], attempt["order"]) == ("ordered", given.id)
    assert attempt["reason"] == "ann ordered it: because"
    ended = outcome(given)
    assert (ended.phase, ended.attempt) == ("done", attempt["id"])
    assert not orders.any_waiting(Path("checkpoints"))
    # Then a second one meets the safeguards
    again = give("train-now")
    check = daemon(told).run_check_cycle()
    assert check.action == "nothing"
    assert outcome(again).phase == "refused"
    assert "h since the last training, at least 6 h apart" in outcome(again).why
    assert decisions()[-1]["rule"] == "ordered"


def test_a_forced_training_is_neither_refused_nor_counted_and_the_audit_says_so(
    fleet: SmallFleet, told: Told
) -> None:
    own = daemon(told)
    own.engine.record_training(True)
    with own.ownership():
        own._trainings._save()
    given = give("train-now", force=True)
    attempt = cycles.trained(daemon(told), "promoted")
    assert attempt["is_forced"] is True
    assert outcome(given).is_forced
    stamps = load_state(Path("retraining_state.json")).log.stamps
    assert [stamp.is_counted for stamp in stamps if stamp.attempt == attempt["id"]] == [False]
    assert state()["total_trainings"] >= 1
    again = daemon(told)
    again.run_check_cycle()
    assert again.engine.trainings_left() == 3 - sum(stamp.is_counted for stamp in stamps)


def test_a_pause_starts_no_training_until_it_is_over(fleet: SmallFleet, told: Told) -> None:
    fleet.grow(60, shifted_from(48))
    pause()
    check = daemon(told).run_check_cycle()
    assert (check.decision.rule, check.action) == ("drift", "paused")
    assert "trainings are paused until" in check.as_text()
    assert decisions()[-1]["outcome"] == "paused"
    assert "paused_until" in decisions()[-1]
    assert "fleetcast_retraining_paused 1.0" in Path("retraining_metrics.prom").read_text()
    given = give("train-now")
    daemon(told).run_check_cycle()
    assert outcome(given).phase == "refused"
    assert "trainings are paused" in outcome(given).why
    give("resume")
    assert cycles.trained(daemon(told), "rejected")["rule"] == "drift"


def test_a_forced_training_starts_in_a_pause_but_none_in_advise_mode(fleet: SmallFleet, told: Told) -> None:
    pause()
    given = give("train-now", force=True)
    check = daemon(told, settings(retraining={"mode": "advise"})).run_check_cycle()
    assert check.action == "advised"
    assert (outcome(given).phase, outcome(given).why) == ("refused", "advise mode: nothing is trained")
    give("train-now", force=True)
    assert cycles.trained(daemon(told), "rejected")["rule"] == "ordered"


@pytest.mark.parametrize("is_spawned", [True, False])
def test_a_daemon_that_dies_around_the_start_trains_once(
    fleet: SmallFleet, told: Told, is_spawned: bool
) -> None:
    # Given a daemon that died between the intent and the end of an order
    given = give("train-now")
    desk().begin_training(given)
    if is_spawned:
        cycles.trained(daemon(told), "rejected")
        path = Path("retraining_state.json")
        known = load_state(path)
        line = next(e for e in desk().audit.entries() if e.order == given.id and e.phase == "done")
        orders.submit(Path("checkpoints"), given)  # its file had not gone yet
        audit = desk().audit.path
        kept = [
            text for text in audit.read_text().splitlines() if '"done"' not in text or line.id not in text
        ]
        audit.write_text("".join(f"{text}\n" for text in kept))
        save_state(path, known)
    # When the next one looks
    Path("stand_in.txt").write_text("rejected")
    own = daemon(told)
    with own.ownership():
        check = own.run_check_cycle()
        assert (check.action == "started") != is_spawned
        own.wait_for_training()
    # Then one training was started for it, in one pair of lines
    assert [attempt.get("order") for attempt in state()["attempts"]] == [given.id]
    lines = [entry for entry in desk().audit.entries() if entry.order == given.id]
    assert [entry.phase for entry in lines] == ["intent", "done"]
    assert len({entry.id for entry in lines}) == 1
    assert not orders.any_waiting(Path("checkpoints"))


def test_a_training_that_a_hold_kept_out_of_service_is_no_rejected_one(fleet: SmallFleet, told: Told) -> None:
    give("hold")
    give("train-now")
    attempt = cycles.trained(daemon(told), "held")
    assert (attempt["outcome"], attempt["why"]) == ("held", "told so")
    assert fleet.registry.current_id() == fleet.version
    assert state()["training_history"] == []
    check = daemon(told).run_check_cycle()
    assert "no training puts a model into service" in check.as_text()
    assert "fleetcast_retraining_held 1.0" in Path("retraining_metrics.prom").read_text()


def test_a_training_without_a_model_is_in_the_audit_once(fleet: SmallFleet, told: Told) -> None:
    give("train-now")
    attempt = cycles.trained(daemon(told), "crash")
    found = [entry for entry in desk().audit.entries() if entry.attempt == attempt["id"]]
    assert [(entry.event, entry.phase) for entry in found] == [("train-now", "done"), ("training", "note")]
    assert found[-1].why.endswith("out of luck")


def test_the_end_of_a_training_waits_for_a_full_disk(
    fleet: SmallFleet, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    give("train-now")
    Path("stand_in.txt").write_text("crash")
    own = daemon(told)
    with own.ownership():
        assert own.run_check_cycle().action == "started"

        def full(path: Path, line: str, **more: int) -> None:
            if path.name == audits.AUDIT:
                raise StorageFull("no space to write")
            append_line(path, line, **more)

        with monkeypatch.context() as patched:
            patched.setattr("fleetcast.files.append_line", full)
            with pytest.raises(StorageFull):
                own.wait_for_training()
        assert state()["attempts"][0]["outcome"] == "running"
        ended = own.wait_for_training()
    assert ended is not None
    assert ended.outcome == "failed"
    assert [e.event for e in desk().audit.entries() if e.attempt == ended.id] == ["train-now", "training"]


def test_orders_of_others_are_carried_out_at_each_check(fleet: SmallFleet, told: Told) -> None:
    given = order("hold")
    orders.submit(Path("checkpoints"), given)
    daemon(told).run_check_cycle()
    assert outcome(given).phase == "done"
    assert desk().standing().held is not None


def test_beside_a_running_daemon_no_order_is_taken_up(fleet: SmallFleet, told: Told) -> None:
    given = give("train-now")
    with daemon(told).ownership():
        check = daemon(told).run_check_cycle()
    assert check.action == "beside"
    assert desk().audit.outcome(given.id) is None
    assert orders.any_waiting(Path("checkpoints"))


def test_a_state_of_an_older_release_is_read_and_an_unordered_attempt_is_written_as_before(
    fleet: SmallFleet, told: Told
) -> None:
    fleet.grow(60, shifted_from(48))
    attempt = cycles.trained(daemon(told), "rejected")
    assert not {"order", "is_forced"} & attempt.keys()
    known = load_state(Path("retraining_state.json"))
    assert known.attempts[0] == replace(known.attempts[0], order=None, is_forced=False)
