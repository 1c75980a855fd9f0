"""A training may wait, once, for an hour that the forecast calls clearly quieter; never past the deadline."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetcast.clock import iso_z
from fleetcast.retraining.ahead import LOOK_S, MIN_COMPARED, WAITS, Ahead, QuietAhead, may_wait
from fleetcast.retraining.decision import (
    DRIFT,
    FOLLOW_UP,
    INITIAL,
    LEARNING,
    NONE,
    ORDERED,
    OVERDUE,
    Decision,
)
from fleetcast.retraining.inquiry import FLEET_AHEAD, FleetAhead, fleet_ahead
from fleetcast.schema import QuietVerdict
from fleetcast.settings import DecisionSettings

START = datetime(2026, 3, 2, tzinfo=UTC)
LIMITS = {"fleet_cpu_percent": 60.0, "fleet_mem_percent": 70.0}
FLAT = (40.0,) * 8
DROP = (40.0, 38.0, 30.0, 12.0, 10.0, 14.0, 30.0, 40.0)  # the quietest hour is the fifth


def at(hour: float) -> datetime:
    return START + timedelta(hours=hour)


def verdict(cpu: float | None = 40.0, mem: float | None = 50.0, *, is_quiet: bool = True) -> QuietVerdict:
    return QuietVerdict(is_quiet, "", {"fleet_cpu_percent": cpu, "fleet_mem_percent": mem}, LIMITS)


def said(hour: float, cpu: Any = FLAT, mem: Any = None, step_s: float = 3600.0) -> FleetAhead:
    lists = {"cpu_pct": cpu, "mem_pct": mem}
    known = {name: list(own) for name, own in lists.items() if own is not None}
    return fleet_ahead({FLEET_AHEAD: {"start": iso_z(at(hour)), "step_s": step_s, **known}})


def line(
    quiet: QuietVerdict, ahead: Ahead, rule: str = NONE, outcome: str = "nothing", **more: Any
) -> dict[str, Any]:
    return {"quiet": {"measured": quiet.measured}, "ahead": ahead.as_json(), "rule": rule,
            "outcome": outcome, **more}  # fmt: skip


def taught(hours: int = 48, cpu: float = 40.0, off: float = 0.0, **parts: Any) -> QuietAhead:
    """Return one that saw a flat fleet and forecasts of it, until now (START)."""
    own = QuietAhead(DecisionSettings(**parts), Path("no decisions"))
    for check in range(4 * hours):
        hour = check / 4 - hours
        expected = said(hour, (cpu + off,) * 8, (50.0,) * 8)
        own.note(at(hour), line(verdict(cpu), Ahead(expected)))
    return own


def waits_at(own: QuietAhead, hour: float, forecast: FleetAhead, quiet: QuietVerdict | None = None) -> Ahead:
    """Check once while drift asks for a training, as the daemon does."""
    quiet = quiet or verdict()
    found = own.look(at(hour), quiet, forecast)
    outcome = "nothing" if found.until_s is not None else "started"
    own.note(at(hour), line(quiet, found, DRIFT, outcome))
    return found


def test_a_training_waits_for_the_quietest_hour_and_says_so() -> None:
    decision = Decision(True, DRIFT, "drift: per 0.300", ())
    forecast = said(0, DROP, (50.0,) * 8)
    told, found = taught().ask(decision, at(0), verdict(), forecast, is_asked=True)
    assert found.until_s == at(4).timestamp()
    assert found.why == (
        "it waits for a quieter hour, until 2026-03-02 04:00 UTC at the latest: "
        "mean cpu 40.0 % now, 10.0 % expected from 2026-03-02 04:00 on"
    )
    assert (told.should_retrain, told.rule) == (False, DRIFT)
    assert told.reason == f"{found.why}; drift: per 0.300"
    assert json.loads(json.dumps(found.as_json()))["until"] == "2026-03-02T04:00:00Z"


NEVER_QUIETER = "no hour is clearly quieter: mean cpu 40.0 % now, "
BUT = "mean cpu 40.0 % now, "
CASES = {
    "flat": (said(0), verdict(), f"{NEVER_QUIETER}40.0 % expected from 2026-03-02 01:00 on, 4.0 points less"),
    "a tenth less": (said(0, (40, *[36.5] * 7)), verdict(), f"{NEVER_QUIETER}36.5 %"),
    "it falls already": (said(0, (12, *[11.0] * 7)), verdict(), f"{NEVER_QUIETER}11.0 %"),
    "a spike is over at once": (said(0, (8, *[7.5] * 7)), verdict(58.0), "no hour is clearly quieter"),
    "quiet at this moment": (said(0, DROP), verdict(11.0), "no hour is clearly quieter: mean cpu 11.0 % now"),
    "memory rises": (said(0, DROP, (50, *[53.0] * 7)), verdict(),
                     f"{BUT}10.0 % expected from 2026-03-02 04:00 on, but with mem 53.0 %"),
    "memory at its limit": (said(0, DROP, (69, *[70.5] * 7)), verdict(mem=69.0), f"{BUT}10.0 %"),
    "nothing is said": (fleet_ahead({}), verdict(), "the inference daemon says nothing of the hours ahead"),
    "stale": (said(-0.75, DROP), verdict(), "the newest forecast of the fleet is 45 minutes old"),
    "of the future": (said(0.5, DROP), verdict(), "the newest forecast of the fleet begins 30 min"),
    "only memory is forecast": (said(0, None, DROP), verdict(mem=None), "no forecast of what is measured"),
    "nothing is measured": (said(0, DROP), verdict(None, None), "no forecast of what is measured"),
    "long hours": (said(0, DROP, step_s=7200.0), verdict(), "0 forecasts of such hours were compared"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_otherwise_it_starts_now_and_says_why_it_does_not_wait(case: str) -> None:
    forecast, quiet, why = CASES[case]
    decision = Decision(True, DRIFT, "drift", ())
    same, found = taught().ask(decision, at(0), quiet, forecast, is_asked=True)
    assert same is decision
    assert found.until_s is None
    assert found.why.startswith(why), found.why


def test_a_fleet_that_sends_memory_only_waits_for_less_memory() -> None:
    found = taught().look(at(0), verdict(cpu=None), said(0, None, (50, 48, 20, 20, 20, 20, 20, 20)))
    assert found.why.endswith("mean mem 50.0 % now, 20.0 % expected from 2026-03-02 02:00 on")


@pytest.mark.parametrize(
    ("off", "waits"), [(0.0, True), (15.0, True), (-15.0, True), (31.0, False), (-31.0, False)]
)
def test_a_drop_counts_only_beyond_what_such_forecasts_were_off(off: float, waits: bool) -> None:
    found = taught(off=off).look(at(0), verdict(), said(0, DROP))
    assert (found.until_s is not None) is waits, found.why


def test_a_fleet_that_has_just_changed_is_not_believed_to_change_back() -> None:
    """Three hours ago the mean CPU rose from 10 to 40; the forecasts go on promising 10."""
    own = taught(72, cpu=10.0)
    for check in range(12):
        hour = check / 4
        own.note(at(hour), line(verdict(40.0), Ahead(said(hour, (40.0, *[10.0] * 7)))))
    found = own.look(at(3), verdict(40.0), said(3, (40.0, *[10.0] * 7)))
    assert found.until_s is None
    assert found.why.endswith("30.0 points less needed")


def test_without_a_day_of_comparisons_it_starts_now() -> None:
    found = taught(20).look(at(0), verdict(), said(0, DROP))
    assert found.until_s is None
    assert found.why == f"13 forecasts of such hours were compared with what came, {MIN_COMPARED} needed"


@pytest.mark.parametrize(
    "parts", [{"quiet_ahead": "off"}, {"quiet_window": "fixed"}, {"quiet_deadline_hours": 0.0}]
)
def test_it_can_be_turned_off(parts: dict[str, Any]) -> None:
    own = taught(**parts)
    assert own.look(at(0), verdict(), said(0, DROP)).until_s is None
    assert own.judge(verdict(90.0, is_quiet=False), at(100)) == verdict(90.0, is_quiet=False)


def test_the_time_spent_waiting_for_a_quiet_fleet_counts_against_the_deadline() -> None:
    own, forecast = taught(), said(0, DROP)
    late = own.look(at(0), verdict(), forecast, at(-21.5).timestamp())
    assert late.until_s == at(2).timestamp(), "30 % at 02:00: the best that is left"
    assert own.look(at(0), verdict(), forecast, at(-30).timestamp()).why == (
        "no whole hour is forecast before the training has to start"
    )


def test_it_waits_once_and_starts_at_that_hour_whatever_is_promised_next() -> None:
    own = taught()
    for quarter in range(16):
        assert waits_at(own, quarter / 4, said(quarter / 4, DROP)).until_s == at(4).timestamp()
    found = waits_at(own, 4, said(4, DROP))
    assert found.until_s is None
    assert found.why == (
        "it waited since 2026-03-02 00:00 for the hour of 2026-03-02 04:00, and waits only once"
    )
    assert waits_at(own, 12, said(12, DROP)).until_s, "a training started: another may wait"


def test_it_starts_earlier_where_no_quieter_hour_is_left() -> None:
    own = taught()
    assert waits_at(own, 0, said(0, DROP)).until_s
    assert waits_at(own, 1, said(1, (40, 38.8, 38.9, 38.9, 5, 5, 5, 5))).until_s, (
        "a smaller promise is enough"
    )
    assert waits_at(own, 2, said(2, (40, 39.5, 39.5, 1, 1, 1, 1, 1))).until_s is None, (
        "later hours are too late"
    )


def test_a_drift_that_comes_and_goes_does_not_wait_again_within_the_deadline() -> None:
    own = taught()
    first = waits_at(own, 0, said(0, DROP))
    assert first.until_s
    for hour in (1, 9):
        own.note(at(hour), line(verdict(), Ahead(), NONE))
    again = own.look(at(10), verdict(), said(10, DROP))
    assert again.until_s is None and "waits only once" in again.why
    own.note(at(24.5), line(verdict(), Ahead(), NONE))
    assert own.look(at(25), verdict(), said(25, DROP)).until_s == at(29).timestamp(), "a day without drift"


def test_a_drift_that_stands_for_days_behind_a_pause_does_not_wait_again() -> None:
    own = taught()
    assert waits_at(own, 0, said(0, DROP)).until_s
    for hour in range(1, 60):
        own.note(at(hour), line(verdict(), Ahead(said(hour, DROP)), DRIFT, "paused"))
    assert own.look(at(60), verdict(), said(60, DROP)).until_s is None


@pytest.mark.parametrize("hour", [-30.0, -1.0, 5.0, 1000.0])
def test_a_clock_that_jumps_ends_the_wait(hour: float) -> None:
    own = taught()
    assert waits_at(own, 0, said(0, DROP)).until_s
    assert own.look(at(hour), verdict(), said(hour, DROP)).until_s is None


def test_a_restart_remembers_since_when_it_waits(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    own, lines = taught(), []
    for check in range(4 * 48):
        hour = check / 4 - 48
        expected = Ahead(said(hour, FLAT, (50.0,) * 8))
        lines.append({"at": iso_z(at(hour)), **line(verdict(), expected)})
    found = own.look(at(0), verdict(), said(0, DROP))
    lines.append({"at": iso_z(at(0)), **line(verdict(), found, DRIFT)})
    odd: list[Any] = [{"at": iso_z(at(0.1)), "ahead": 3, "quiet": 4, "rule": 5}, {"at": "never"}]
    path.write_text("".join(json.dumps(item) + "\n" for item in [*lines, *odd]) + '{"torn')
    again = QuietAhead(DecisionSettings(), path)
    found = again.look(at(1), verdict(), said(1, DROP))
    assert (found.since_s, found.until_s) == (at(0).timestamp(), at(4).timestamp())
    assert again.look(at(4), verdict(), said(4, DROP)).until_s is None


def test_a_line_that_was_written_by_hand_cannot_make_it_wait_longer() -> None:
    own, far = taught(), iso_z(at(24 * 300))
    waits = {"since": iso_z(at(0)), "until": far}
    own.note(at(0), {"ahead": waits, "rule": DRIFT})
    found = own.look(at(1), verdict(), said(1, (40, *[5.0] * 7)))
    assert found.until_s == at(0).timestamp() + LOOK_S
    for since in (iso_z(at(50)), "soon", 7, None):
        other = taught()
        other.note(at(0), {"ahead": {"since": since, "until": far}, "rule": DRIFT})
        assert other.look(at(1), verdict(), said(1, DROP)).until_s == at(5).timestamp(), since


def test_where_the_promised_hour_is_busy_the_deadline_holds() -> None:
    own, busy = taught(), verdict(90.0, is_quiet=False)
    assert waits_at(own, 0, said(0, DROP)).until_s
    for hour in range(4, 24):
        assert own.judge(busy, at(hour)) is busy
        own.note(at(hour), line(busy, Ahead(), DRIFT))
    late = own.judge(busy, at(24))
    assert (late.is_quiet, late.reason) == (
        True, "waited 24.0 h, first for a quieter hour, then for a quiet fleet, at most 24 h"
    )  # fmt: skip
    loud = QuietVerdict(False, "the host is busy", busy.measured, LIMITS, is_host_quiet=False)
    assert own.judge(loud, at(24)) is loud, "the host always counts"
    away = QuietVerdict(False, "the inference daemon cannot be asked", {}, LIMITS)
    assert own.judge(away, at(24)) is away
    assert taught().judge(busy, at(24)) is busy, "without having waited the fixed limits hold"
    learning = taught()
    learning.note(at(0), line(verdict(), learning.look(at(0), verdict(), said(0, DROP)), LEARNING))
    assert learning.judge(busy, at(50)) is busy, "one that is not urgent waits on"


@pytest.mark.parametrize(
    ("rule", "waits"),
    [(DRIFT, True), (FOLLOW_UP, True), (LEARNING, True), (OVERDUE, True), (INITIAL, False), (ORDERED, False)],
)
def test_a_first_training_and_an_ordered_one_never_wait(rule: str, waits: bool) -> None:
    decision = Decision(True, rule, "", ())
    assert may_wait(decision) is waits
    own = taught()
    asked, _ = own.ask(decision, at(0), verdict(), said(0, DROP), is_asked=True)
    assert asked.should_retrain is not waits
    assert own.ask(decision, at(0), verdict(), said(0, DROP), is_asked=False)[0] is decision
    assert not may_wait(Decision(False, rule, "", ()))


number = st.floats(0, 100, allow_nan=False)
hours = st.lists(number, min_size=2, max_size=12)
checks = st.lists(
    st.tuples(hours, st.one_of(st.none(), hours), number, number, st.sampled_from([0.1, 0.5, 1.0, 3.0, 9.0])),
    min_size=1,
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(checks=checks, deadline=st.sampled_from([0.0, 3.0, 8.0, 24.0]), off=st.sampled_from([0.0, 10.0]))
def test_it_never_waits_past_the_deadline_or_for_a_busier_hour(
    checks: list[Any], deadline: float, off: float
) -> None:
    own, hour, seen = taught(off=off, quiet_deadline_hours=deadline), 0.0, set()
    for expected, mem, cpu, now_mem, step in checks:
        mem = None if mem is None or len(mem) != len(expected) else mem
        found = own.look(at(hour), verdict(cpu, now_mem), said(hour, expected, mem))
        if found.until_s is None:
            break
        place = int((found.until_s - at(hour).timestamp()) / 3600)
        seen.add(found.until_s)
        assert found.why.startswith(WAITS)
        assert found.until_s <= at(min(8.0, deadline)).timestamp()
        assert min(expected[1 : place + 3]) < cpu, "never for an hour that is expected to be busier than now"
        own.note(at(hour), line(verdict(cpu, now_mem), found, DRIFT))
        hour += step
    assert hour <= min(8.0, deadline) + 9.0, "one check after its hour, at the latest, it starts"
    assert len(seen) <= 1, "one hour, fixed at first"
    if hour >= min(8.0, deadline):
        assert own.look(at(hour), verdict(), said(hour, DROP)).until_s is None or not seen


def test_a_wait_that_is_long_over_does_not_call_a_busy_fleet_quiet(tmp_path: Path) -> None:
    times = {"since": "0001-01-01T00:00:00Z", "until": "9999-12-31T23:59:59Z"}
    path = tmp_path / "decisions.jsonl"
    path.write_text(json.dumps({"at": iso_z(at(-1)), "rule": DRIFT, "ahead": times}) + "\n")
    busy = verdict(90.0, is_quiet=False)
    assert QuietAhead(DecisionSettings(), path).judge(busy, at(0)) == busy


def test_a_clock_that_was_wrong_for_one_check_does_not_end_what_is_remembered() -> None:
    own = taught()
    own.note(at(10_000), line(verdict(), Ahead(said(10_000)), DRIFT))
    for check in range(4 * 40):
        own.note(at(check / 4), line(verdict(), Ahead(said(check / 4, mem=(50.0,) * 8))))
    found = own.look(at(40), verdict(), said(40, DROP))
    assert found.until_s == at(44).timestamp(), found.why
