"""A restart: what the buffer brings back, and where the sweeps go on."""

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from data_buffer import DataBuffer
from fleetcast.clock import FakeClock, to_ms
from fleetcast.inference import begin_account, restore
from fleetcast.schema import FleetForecast, RecordBatch
from fleetcast.serving.history import BinHistory
from fleetcast.serving.ledger import Ledger
from fleetcast.serving.roster import Fleet, Roster
from fleetcast.settings import BinSettings, BufferSettings, ForecastSettings

BIN = 300_000
NOW = datetime.fromisoformat("2026-01-15T10:00:00Z")
T0 = to_ms(NOW)


def batch(name: str, start_ms: int, n_rows: int, step_ms: int = 60_000) -> RecordBatch:
    times = start_ms + np.arange(n_rows, dtype=np.int64) * step_ms
    values = np.arange(n_rows, dtype=np.float64)
    return RecordBatch((name,), np.zeros(n_rows, dtype=np.int32), times, {"cpu_pct": values, "fans": values})


class World:
    """The parts that a restart fills, over one folder."""

    def __init__(self, folder: Path) -> None:
        settings = BufferSettings(retention_days=3650)
        self.buffer = DataBuffer(folder, settings=settings, clock=FakeClock(NOW), expire=False)
        self.ledger = Ledger(folder, (1,), BIN)
        forecast = ForecastSettings(gone_after_s=86_400.0)
        self.roster = Roster(forecast)
        self.history = BinHistory(BinSettings(forecast_metrics=("cpu_pct",)), forecast)
        self.fleet = Fleet(self.history, self.roster, FakeClock(NOW), forecast, is_data_clock=True)

    def restore(self) -> int | None:
        return restore(self.buffer, self.fleet, self.ledger)


def forecast(origin_ms: int) -> FleetForecast:
    quantiles = np.ones((1, 1, 1, 3), dtype=np.float32)
    return FleetForecast(origin_ms, BIN, ("a",), ("cpu_pct",), quantiles, np.zeros((1, 1), dtype=bool), None)


def test_an_empty_buffer_restores_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert world.restore() is None
    assert world.history.due(NOW) == []


def test_with_a_new_ledger_the_newest_bin_is_open_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.buffer.append_batch(batch("a", T0, 23))
    assert world.restore() == T0 + 3 * BIN
    assert world.history.due(NOW + timedelta(hours=1)) == [T0 + 4 * BIN]
    assert world.history.close(T0 + 4 * BIN).values.tolist() == [[21.0]]
    assert next(world.history.parts(T0 + 4 * BIN, 99)).values[0, 0].tolist() == [2.0, 7.0, 12.0, 17.0, 21.0]
    world.buffer.close()


def test_sweeps_go_on_after_the_last_origin_of_the_ledger(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.buffer.append_batch(batch("a", T0, 23))
    world.ledger.open(forecast(T0 + BIN))
    world = World(tmp_path)
    assert world.restore() == T0 + BIN
    assert world.history.due(NOW + timedelta(hours=1)) == [T0 + 2 * BIN, T0 + 3 * BIN, T0 + 4 * BIN]


def test_the_roster_knows_every_metric_of_the_last_day(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.buffer.append_batch(batch("a", T0, 10))
    world.buffer.append_batch(batch("gone", T0 - 2 * 86_400_000, 10))
    world.restore()
    present = world.roster.servers(NOW + timedelta(minutes=10))
    assert present.server_names == ("a",)
    assert set(present.metrics) == {"cpu_pct", "fans"}
    assert world.history.n_servers == 2


def test_records_that_arrive_while_restoring_count_once(tmp_path: Path) -> None:
    world = World(tmp_path)
    stored = batch("a", T0, 23)
    world.buffer.append_batch(stored)
    world.history.add(stored)  # the same records, seen live before the restore began
    world.restore()
    assert world.history.due(NOW + timedelta(hours=1)) == [T0 + 4 * BIN]
    assert world.history.close(T0 + 4 * BIN).values.tolist() == [[21.0]]
    corrected = world.history.refresh(world.buffer.iter_batches)
    assert [(one.bin_ms - T0) // BIN for one in corrected] == [2, 3], "older bins are past their correction"
    assert [one.values.tolist() for one in corrected] == [[[12.0]], [[17.0]]]
    assert next(world.history.parts(T0 + 4 * BIN, 99)).values[0, 0].tolist() == [2.0, 7.0, 12.0, 17.0, 21.0]


def test_eight_days_come_back_and_nothing_older(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.buffer.append_batch(batch("a", T0 - 12 * 86_400_000, 12 * 288 + 1, step_ms=BIN))
    world.restore()
    assert next(world.history.parts(T0 - BIN, 99)).values.shape == (1, 1, 2304)


def test_a_stop_ends_the_restore_early(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.buffer.append_batch(batch("a", T0, 10))
    restore(world.buffer, world.fleet, world.ledger, lambda: True)
    assert world.history.n_servers == 0


def test_a_daemon_that_ends_before_its_first_forecast_goes_on_with_its_first_bin(tmp_path: Path) -> None:
    world = World(tmp_path)
    begin_account(world.buffer, world.ledger, world.history)
    world.buffer.append_batch(batch("a", T0, 13))  # and then it is killed, before its first sweep
    world.buffer.close()
    for _ in range(2):
        world = World(tmp_path)
        begin_account(world.buffer, world.ledger, world.history)  # only a new account begins
        assert world.restore() == T0 - BIN
        assert world.history.due(NOW + timedelta(hours=1)) == [T0, T0 + BIN, T0 + 2 * BIN]
        world.buffer.close()


def test_records_of_before_the_account_are_history_and_those_after_it_are_not(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.buffer.append_batch(batch("a", T0, 13))
    begin_account(world.buffer, world.ledger, world.history)
    world.buffer.append_batch(batch("a", T0 + 13 * 60_000, 10))
    world.buffer.close()
    world = World(tmp_path)
    assert world.restore() == T0 + BIN
    assert world.history.due(NOW + timedelta(hours=1)) == [T0 + 2 * BIN, T0 + 3 * BIN, T0 + 4 * BIN]
    world.buffer.close()
