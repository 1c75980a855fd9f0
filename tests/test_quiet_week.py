"""A fleet that is never under the fixed limits still gets its trainings."""

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fleetcast.clock import iso_z
from fleetcast.retraining.quiet import BUSY, LOAD, QuietWeek, load_of
from fleetcast.schema import QuietVerdict
from fleetcast.settings import DecisionSettings

START = datetime(2026, 3, 2, tzinfo=UTC)
LIMITS = {"fleet_cpu_percent": 60.0, "fleet_mem_percent": 70.0}


def verdict(mem: float, *, is_host_quiet: bool = True) -> QuietVerdict:
    measured: dict[str, float | None] = {"fleet_cpu_percent": 30.0, "fleet_mem_percent": mem}
    is_quiet = mem < 70 and is_host_quiet
    return QuietVerdict(
        is_quiet, "quiet" if is_quiet else "the fleet is busy", measured, LIMITS, is_host_quiet
    )


def mem_at(hour: int) -> float:
    """Return a memory use of 77 to 91 %, lowest at night."""
    return 77.0 + 7.0 * (1 + (-1 if hour % 24 < 8 else 1))


def line(hour: int, mem: float | None = None, reason: str = "no drift") -> dict[str, Any]:
    mem = mem_at(hour) if mem is None else mem
    quiet = {"measured": {"fleet_mem_percent": mem, "fleet_cpu_percent": 30.0}, "limits": LIMITS}
    return {"at": iso_z(START + timedelta(hours=hour)), "quiet": quiet, "reason": reason}


def week(folder: Path, lines: list[dict[str, Any]], own: DecisionSettings | None = None) -> QuietWeek:
    path = folder / "decisions.jsonl"
    half = len(lines) // 2
    for name, part in (("decisions.jsonl.1", lines[:half]), ("decisions.jsonl", lines[half:])):
        path.with_name(name).write_text("".join(json.dumps(item) + "\n" for item in part))
    return QuietWeek(own or DecisionSettings(), path)


def note(own: QuietWeek, hour: int, mem: float, reason: str) -> None:
    own.note_line(at(hour).timestamp(), line(hour, mem, reason))


def at(hour: float) -> datetime:
    return START + timedelta(hours=hour)


def test_after_a_busy_week_the_lowest_quarter_is_quiet_and_the_rest_is_not(tmp_path: Path) -> None:
    own = week(tmp_path, [line(hour) for hour in range(168)])
    night, noon = own.judge(verdict(77.0), at(168)), own.judge(verdict(91.0), at(168))
    assert (night.is_quiet, noon.is_quiet) == (True, False)
    assert night.reason == "quiet for this fleet: load 1.10 of its limits, lowest quarter of its week 1.10"
    assert (night.limits[LOAD], night.measured[LOAD]) == (pytest.approx(1.1), pytest.approx(1.1))
    assert noon.reason == "the fleet is busy"


def test_less_than_a_week_is_no_week(tmp_path: Path) -> None:
    own = week(tmp_path, [line(hour) for hour in range(150)])
    assert own.judge(verdict(77.0), at(150)) == verdict(77.0)


def test_a_fleet_that_was_quiet_once_keeps_the_fixed_limits(tmp_path: Path) -> None:
    own = week(tmp_path, [line(hour, 60.0 if hour == 90 else None) for hour in range(168)])
    assert own.judge(verdict(77.0), at(168)) == verdict(77.0)
    assert own.judge(verdict(60.0), at(168)).reason == "quiet"


def test_a_fleet_is_not_waited_for_longer_than_the_deadline(tmp_path: Path) -> None:
    waiting = f"{BUSY}; drift"
    own = week(tmp_path, [line(hour, reason=waiting if hour > 150 else "no drift") for hour in range(168)])
    assert not own.judge(verdict(91.0), at(168)).is_quiet
    late = own.judge(verdict(91.0), at(175))
    assert late.is_quiet
    assert late.reason == "waited 24.0 h for a quiet fleet, at most 24 h"
    assert not own.judge(verdict(91.0, is_host_quiet=False), at(175)).is_quiet, "the host always counts"


def test_a_check_that_asks_for_nothing_ends_the_waiting(tmp_path: Path) -> None:
    own = week(tmp_path, [line(hour, reason=f"{BUSY}; drift") for hour in range(168)])
    note(own, 168, 91.0, reason="no drift")
    assert not own.judge(verdict(91.0), at(169)).is_quiet


def test_the_setting_turns_it_off(tmp_path: Path) -> None:
    own = week(tmp_path, [line(h) for h in range(168)], DecisionSettings(quiet_window="fixed"))
    assert own.judge(verdict(77.0), at(168)) == verdict(77.0)


def test_a_restart_knows_the_same_week(tmp_path: Path) -> None:
    lines = [line(hour) for hour in range(190)]
    running = week(tmp_path, lines[:100])
    for hour in range(100, 190):
        note(running, hour, mem_at(hour), reason="no drift")
    restarted = week(tmp_path, lines)
    for mem in (77.0, 80.0, 91.0):
        assert running.judge(verdict(mem), at(190)) == restarted.judge(verdict(mem), at(190))


def test_lines_that_are_no_decisions_are_left_out(tmp_path: Path) -> None:
    odd: list[dict[str, Any]] = [{"at": "never"}, {"quiet": 3}, {"at": iso_z(START), "quiet": None}]
    own = week(tmp_path, [*odd, *(line(hour) for hour in range(168))])
    assert own.judge(verdict(77.0), at(168)).is_quiet
    assert load_of({"measured": {}, "limits": None}) is None


ODD: dict[str, Any] = {
    "a number too long": {
        **line(100),
        "quiet": {"measured": {"fleet_mem_percent": 10**400}, "limits": LIMITS},
    },
    "no number": {**line(100), "quiet": {"measured": {"fleet_mem_percent": math.nan}, "limits": LIMITS}},
    "a limit too long": {
        **line(100),
        "quiet": {"measured": {"fleet_mem_percent": 80.0}, "limits": {"fleet_mem_percent": 10**400}},
    },
    "before all time": {**line(100), "at": "0001-01-01T00:00:00+14:00"},
    "after all time": {**line(100), "at": "9999-12-31T23:59:59-14:00"},
    "of the future, busy": {**line(100, reason=BUSY), "at": "2036-03-02T00:00:00Z"},
}


@pytest.mark.parametrize("odd", ODD)
def test_a_damaged_line_changes_neither_the_week_nor_the_deadline(tmp_path: Path, odd: str) -> None:
    waiting = f"{BUSY}; drift"
    lines = [line(hour, reason=waiting if hour > 150 else "no drift") for hour in range(168)]
    own = week(tmp_path, [*lines, ODD[odd]])
    assert own.judge(verdict(77.0), at(168)).is_quiet
    note(own, 168, 91.0, reason=waiting)
    assert own.judge(verdict(91.0), at(175)).reason == "waited 24.0 h for a quiet fleet, at most 24 h"


def test_a_clock_that_was_set_back_leaves_no_wait_that_ends_in_the_future(tmp_path: Path) -> None:
    waiting = f"{BUSY}; drift"
    own = week(tmp_path, [line(hour) for hour in range(168)])
    note(own, 10_000, 91.0, reason=waiting)  # for one check the clock was a year ahead
    note(own, 168, 91.0, reason=waiting)
    assert own.waiting_since_s(at(168)) == at(168).timestamp()
    assert own.judge(verdict(91.0), at(192)).reason == "waited 24.0 h for a quiet fleet, at most 24 h"
