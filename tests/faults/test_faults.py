"""The faults of docs/reliability.md in short form: the same scenarios as `make faults`, few times each."""

from pathlib import Path

import pytest

from benchmarks.faults.faults import SCENARIOS, Scenario, repeated, try_out
from benchmarks.faults.reliability_tables import Result, table

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "scenario", [s for s in SCENARIOS if s.short_times], ids=lambda scenario: scenario.fault
)
@pytest.mark.timeout(600)
def test_nothing_is_lost_doubled_or_wrong_after(scenario: Scenario, tmp_path: Path) -> None:
    result = try_out(scenario, tmp_path, scenario.short_times)

    if result.why == "needs root":
        pytest.skip("needs root")
    assert result.why == ""
    assert (result.lost, result.doubled, result.wrong) == (0, 0, 0)


def test_every_fault_is_tried_at_least_twenty_times_where_chance_decides_the_moment() -> None:
    by_chance = [s for s in SCENARIOS if "kill -9" in s.fault]

    assert len(by_chance) == 4
    assert all(scenario.times >= 20 for scenario in by_chance)


def test_a_scenario_that_cannot_finish_is_shown_as_such_and_not_as_clean(tmp_path: Path) -> None:
    def fails(_folder: Path) -> None:
        raise AssertionError("waited 60 s in vain for: a training")

    result = try_out(Scenario("a fault", repeated(fails), 3, 1), tmp_path, 3)  # type: ignore[arg-type]

    assert not result.is_clean
    assert "in vain" in table([result])


def test_what_was_lost_is_printed_in_bold() -> None:
    row = Result("a fault", 20, lost=2, recovered_s=[0.5, 1.5]).as_row()

    assert row == "| a fault | 20 | **2** | 0 | 0 | 1.0 s (worst 1.5 s) |"


def test_the_counts_can_see_a_loss_a_double_and_a_change(tmp_path: Path) -> None:
    """The accountant itself: a buffer that is short of a row, has one twice, and one changed."""
    import pandas as pd

    from benchmarks.faults.parts.feed import Fleet, Tally, count_records

    fleet = Fleet(n_servers=2)
    frame = pd.DataFrame([record for step in range(3) for record in fleet.records(step)])
    frame["timestamp"] = pd.to_datetime(frame["timestamp"]).dt.as_unit("ms")
    frame.loc[2, "cpu_pct"] += 0.01
    damaged = pd.concat([frame.iloc[1:], frame.iloc[[3]]], ignore_index=True)
    (tmp_path / "data_buffer").mkdir()
    damaged.to_parquet(tmp_path / "data_buffer" / "metrics_2026-01-05.parquet")

    tally = Tally()
    count_records(tmp_path, fleet, 3, tally)

    assert (tally.lost, tally.doubled, tally.wrong) == (1, 1, 1)
