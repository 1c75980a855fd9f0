"""Claims about the calendar and the oracle of a loop replay, and about its injected changes."""

from pathlib import Path

import numpy as np

from benchmarks.loop.parts.fleet import BIN_MS, DAY, SEED, ReplayFleet, injected
from benchmarks.loop.parts.policies import CHECK_BINS, Cron, Engine, Oracle
from benchmarks.loop.parts.record import ReplayRecord
from fleetcast.forecast.registry import Registry
from fleetcast.schema import ChangedSeries
from fleetcast.settings import Settings
from fleetcast.training.grid import TrainingGrid

METRICS = ("cpu_pct", "mem_pct", "disk_io_mb_s")
BEGIN, DAYS = 2 * DAY, 22


def grid() -> TrainingGrid:
    values = np.random.default_rng(SEED).gamma(2.0, 5.0, (4, 3, (2 + DAYS) * DAY)).astype(np.float32)
    return TrainingGrid(("a", "b", "c", "d"), METRICS, values, 0, BIN_MS)


def asked(policy: Cron | Oracle, n_bins: int) -> list[int]:
    ends = range(BEGIN + CHECK_BINS, n_bins + 1, CHECK_BINS)
    return [end - BEGIN for end in ends if policy.wants(end) is not None]


def test_the_cron_jobs_train_at_three_in_the_morning() -> None:
    fleet = ReplayFleet("test", grid(), BEGIN, ())
    daily = asked(Cron(fleet, 1), fleet.grid.n_bins)
    assert daily == [day * DAY + 36 for day in range(1, DAYS)]
    assert asked(Cron(fleet, 7), fleet.grid.n_bins) == [day * DAY + 36 for day in (7, 14, 21)]


def test_the_oracle_trains_six_hours_a_day_and_three_after_each_change_and_names_it() -> None:
    changed = ChangedSeries(1, 2, BEGIN + DAY)
    fleet = ReplayFleet("test", grid(), BEGIN, ((changed,),))
    assert asked(Oracle(fleet), fleet.grid.n_bins) == [DAY + 72, 2 * DAY, 4 * DAY]
    context = Oracle(fleet).wants(BEGIN + 3 * DAY)
    assert context is not None
    assert context["drifting"] == [{"server": "b", "metric": "disk_io_mb_s", "since": "1970-01-04T00:00:00Z"}]


def test_injected_changes_are_the_same_in_every_run_and_leave_the_bins_before_them_alone() -> None:
    first, second = injected(grid(), BEGIN), injected(grid(), BEGIN)
    np.testing.assert_array_equal(first.grid.values, second.grid.values)
    begins = [changed[0].since_bin for changed in first.changes]
    assert len(begins) == 3 and begins == sorted(begins)
    np.testing.assert_array_equal(first.grid.values[:, :, : begins[0]], grid().values[:, :, : begins[0]])
    for changed in first.changes:
        assert len(changed) == 6 and len({item.since_bin for item in changed}) == 1
        for item in changed:
            before = grid().values[item.server, item.metric, item.since_bin :]
            assert (first.grid.values[item.server, item.metric, item.since_bin :] != before).any()


def test_the_engine_without_a_reference_looks_and_asks_for_nothing(tmp_path: Path) -> None:
    fleet = ReplayFleet("test", grid(), BEGIN, ())
    record = ReplayRecord.begun(fleet)
    record.note(BEGIN, np.zeros((4, 3, CHECK_BINS, 3, 3), np.float32), "v1")
    engine = Engine(record, Registry(tmp_path / "checkpoints"), Settings(), tmp_path)
    assert engine.wants(BEGIN + CHECK_BINS) is None
    assert (engine.checks, engine.in_alarm) == (1, 0)
