"""Cycles over real history, ledger and buffer: what is settled, forecast, kept and skipped."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from data_buffer import DataBuffer
from fleetcast.clock import FakeClock, to_ms
from fleetcast.errors import StorageFull
from fleetcast.schema import ClosedBin, FleetForecast, Floats32, HistoryWindow, RecordBatch, SettledForecasts
from fleetcast.serving.board import ModelInfo, PredictionBoard
from fleetcast.serving.corrector import Corrector
from fleetcast.serving.history import BinHistory
from fleetcast.serving.ledger import Ledger, Settlement
from fleetcast.serving.model_loader import Champion
from fleetcast.serving.roster import Fleet, Roster
from fleetcast.serving.sweep import Sweeper
from fleetcast.serving.telemetry import Telemetry
from fleetcast.settings import BinSettings, ForecastSettings

BIN_S = 300
GRACE_S = BinSettings.close_grace_s
METRICS = ("cpu_pct", "mem_pct")


class Model:
    """Forecasts cpu_pct as a constant for servers with two bins of history; may fail."""

    metrics = ("cpu_pct",)

    def __init__(self, value: float = 77.0) -> None:
        self.value = value
        self.error: Exception | None = None

    def predict(self, window: HistoryWindow) -> Floats32:
        if self.error:
            raise self.error
        made = np.full((*window.values.shape[:2], 4, 3), np.nan, dtype=np.float32)
        made[np.isfinite(window.values[:, 0]).sum(axis=1) >= 2, 0] = self.value
        return made


@dataclass
class Service:
    """The model in service, as a sweep sees it."""

    champion: Champion | None = None
    n_notices: int = 0
    n_waits_left: int = 0  # while it loads

    def notice(self) -> None:
        self.n_notices += 1

    def wait(self, timeout_s: float) -> bool:
        self.n_waits_left -= 1
        return self.n_waits_left < 0


class World:
    """A daemon's main thread without the daemon."""

    def __init__(self, folder: Path, *, every_bin: bool = True) -> None:
        self.folder = folder
        self.clock = FakeClock()
        self.start = self.clock.now()
        self.buffer = DataBuffer(folder)
        self.service = Service()
        self.settings = ForecastSettings(horizon_bins=4, settle_horizons=(1, 3))
        self.build(every_bin)

    def build(self, every_bin: bool) -> None:
        bins = BinSettings(forecast_metrics=METRICS)
        self.history = BinHistory(bins, self.settings)
        self.roster = Roster(self.settings)
        self.ledger = Ledger(self.folder, self.settings.settle_horizons, BIN_S * 1000)
        self.board = PredictionBoard(self.roster, self.clock)
        self.telemetry = Telemetry(CollectorRegistry(), self.clock)
        self.sweeper = Sweeper(
            Fleet(self.history, self.roster, self.clock, self.settings, is_data_clock=every_bin),
            self.buffer,
            self.ledger,
            self.service,  # type: ignore[arg-type]
            Corrector(self.folder, self.history, self.settings.settle_horizons),
            self.board,
            self.telemetry,
        )

    @property
    def errors(self) -> list[str]:
        return [f"{error['part']}: {error['error']}" for error in self.telemetry.errors.newest_first()]

    def feed(self, *rows: tuple[str, float, float]) -> None:
        """Take rows of (server, bin, cpu); the clock stands where the bin before the newest has closed."""
        names = tuple(dict.fromkeys(row[0] for row in rows))
        batch = RecordBatch(
            names,
            np.array([names.index(row[0]) for row in rows], dtype=np.int32),
            np.array([to_ms(self.start) + round(row[1] * BIN_S * 1000) for row in rows], dtype=np.int64),
            {"cpu_pct": np.array([row[2] for row in rows])},
        )
        self.buffer.append_batch(batch)
        self.roster.add(batch)
        self.history.add(batch, self.clock.now())
        newest = self.start + timedelta(seconds=BIN_S * int(max(row[1] for row in rows)) + GRACE_S)
        self.clock.time = max(self.clock.time, newest)

    def settled(self) -> list[tuple[int, int, str, float, float, str | None]]:
        """(origin bin, horizon, server, p50, actual, version) of every stored row."""
        rows = self.buffer.read_predictions(0, 2**50)
        origins = (rows.origin_ms - to_ms(self.start)) // (BIN_S * 1000)
        columns = (origins, rows.horizon, rows.server_name, rows.p50, rows.actual, rows.model_version)
        return sorted(zip(*(column.tolist() for column in columns), strict=True))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.buffer.close()


def test_every_closed_bin_is_forecast_and_settled_oldest_first(world: World) -> None:
    world.feed(*(("a", number, 10.0 * number) for number in range(5)))
    world.sweeper.cycle()
    assert world.settled() == [
        (0, 1, "a", 0.0, 10.0, None),
        (0, 3, "a", 0.0, 30.0, None),
        (1, 1, "a", 10.0, 20.0, None),
        (2, 1, "a", 20.0, 30.0, None),
    ]
    counts = world.ledger.counts()
    assert (counts.opened, counts.settled, counts.expired, counts.open) == (8, 4, 0, 4)
    assert world.sweeper.counts.sweeps == 4


def test_a_bin_waits_until_its_forecast_is_stored(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.feed(*(("a", number, 10.0) for number in range(3)))
    seen, publish = [], world.board.publish

    def note(forecast: FleetForecast, info: ModelInfo | None) -> None:
        seen.append(world.sweeper.backlog)
        publish(forecast, info)

    monkeypatch.setattr(world.board, "publish", note)
    assert world.sweeper.backlog == 2  # the clock stands before the end of the third
    world.sweeper.cycle()
    assert (seen, world.sweeper.backlog) == ([2, 1], 0)


def test_nothing_due_is_a_cycle_without_effect(world: World) -> None:
    world.sweeper.cycle()
    world.feed(("a", 0, 1.0))
    world.sweeper.cycle()
    assert world.sweeper.counts.sweeps == 0
    assert b'"warming_up"' in b"".join(world.board.document())


def test_with_the_system_clock_the_newest_bin_is_forecast_and_the_others_count_as_skipped(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, every_bin=False)
    world.feed(*(("a", number, 10.0 * number) for number in range(5)))
    world.sweeper.cycle()
    assert (world.sweeper.counts.sweeps, world.sweeper.counts.bins_skipped) == (1, 3)
    world.feed(("a", 5, 50.0))
    world.sweeper.cycle()
    assert world.settled() == [(3, 1, "a", 30.0, 40.0, None)]
    world.buffer.close()


def test_the_model_forecasts_what_it_knows_and_the_fallback_the_rest(world: World) -> None:
    world.service.champion = Champion(Model(), ModelInfo("v1", "2026-01-15T10:00:00Z", False))
    world.feed(("a", 0, 1.0), ("a", 1, 2.0), ("new", 1, 5.0), ("a", 2, 3.0), ("new", 2, 5.0))
    world.sweeper.cycle()
    world.feed(("a", 3, 4.0), ("new", 3, 6.0))
    world.sweeper.cycle()
    assert (1, 1, "a", 77.0, 3.0, "v1") in world.settled()
    assert (1, 1, "new", 5.0, 5.0, None) in world.settled()
    document = b"".join(world.board.document(["a"]))
    assert b'"version":"v1"' in document
    assert b'"source":"model"' in document


def test_clients_get_corrected_forecasts_and_the_models_own_are_settled_beside_them(world: World) -> None:
    world.service.champion = Champion(Model(77.0), ModelInfo("v1", "2026-01-15T10:00:00Z", False))
    for number in range(150):
        world.feed(("a", number, 10.0))
        world.sweeper.cycle()
    rows = world.buffer.read_predictions(0, 2**50)
    newest = np.flatnonzero((rows.horizon == 1) & (rows.origin_ms == rows.origin_ms.max()))[0]
    assert rows.model_version[newest] == "v1"
    assert (rows.model_p50[newest], rows.actual[newest]) == (77.0, 10.0)
    assert 10.0 <= rows.p50[newest] < 50.0


def test_a_model_that_fails_costs_no_forecast(world: World) -> None:
    model = Model()
    model.error = RuntimeError("no memory")
    world.service.champion = Champion(model, ModelInfo("v1", "2026-01-15T10:00:00Z", False))
    world.feed(("a", 0, 1.0), ("a", 1, 2.0), ("a", 2, 3.0))
    world.sweeper.cycle()
    assert world.settled() == [(0, 1, "a", 1.0, 2.0, None)]
    assert world.errors[0] == "model: no memory"


@pytest.mark.parametrize("error", [TypeError("surprise"), IndexError(), AssertionError("ours")])
def test_whatever_a_model_raises_it_costs_no_forecast_and_is_told(world: World, error: Exception) -> None:
    model = Model()
    model.error = error
    world.service.champion = Champion(model, ModelInfo("v1", "2026-01-15T10:00:00Z", False))
    world.feed(("a", 0, 1.0), ("a", 1, 2.0), ("a", 2, 3.0))
    world.sweeper.cycle()
    assert world.settled() == [(0, 1, "a", 1.0, 2.0, None)]
    assert "the model v1 failed" in world.sweeper.problems[0]
    model.error = None
    world.feed(("a", 3, 3.0))
    world.sweeper.cycle()
    assert world.sweeper.problems == []


def test_a_model_that_forecasts_nothing_of_a_grown_fleet_is_a_problem(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model()
    model.metrics = ("latency_ms",)
    model.predict = lambda window: np.full((*window.values.shape[:2], 4, 3), np.nan, np.float32)  # type: ignore[method-assign]
    world.service.champion = Champion(model, ModelInfo("v1", "2026-01-15T10:00:00Z", False))
    world.feed(*(("a", number, 1.0) for number in range(22)))
    world.sweeper.cycle()
    assert world.sweeper.problems == []  # an hour and a half: no model need know it
    world.feed(*(("a", number, 1.0) for number in range(22, 30)))
    world.sweeper.cycle()
    (problem,) = world.sweeper.problems
    assert "the model v1 forecast no series" in problem and "it knows latency_ms" in problem
    assert [line.levelname for line in caplog.records if problem in line.message] == ["WARNING"]


@pytest.mark.parametrize("step", ["learn", "mix", "save"])
def test_an_expert_layer_that_fails_costs_no_forecast_and_no_actual(
    world: World, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_args: object, **_named: object) -> None:
        raise IndexError("surprise")

    monkeypatch.setattr(world.sweeper._corrector, step, fail)
    world.feed(("a", 0, 1.0), ("a", 1, 2.0), ("a", 2, 3.0))
    world.sweeper.cycle()
    assert world.settled() == [(0, 1, "a", 1.0, 2.0, None)]
    assert set(world.errors) == {"feedback: surprise"}


def test_a_bin_that_cannot_be_settled_does_not_stand_before_the_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle, n_calls = world.ledger.settle, 0

    def fail_once(closed: ClosedBin) -> Settlement:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2:
            raise KeyError("surprise")
        return settle(closed)

    monkeypatch.setattr(world.ledger, "settle", fail_once)
    world.feed(*(("a", number, 10.0 * number) for number in range(5)))
    world.sweeper.cycle()
    assert [row[:2] for row in world.settled()] == [(0, 3), (1, 1), (2, 1)]
    assert world.errors == ["ledger: 'surprise'"]


def test_a_model_that_comes_into_service_forecasts_the_newest_bin_at_once(tmp_path: Path) -> None:
    world = World(tmp_path, every_bin=False)
    world.feed(("a", 0, 1.0), ("a", 1, 2.0), ("a", 2, 3.0))
    world.sweeper.cycle()
    assert b'"fallback"' in b"".join(world.board.document())
    for version in ("v1", "v2"):  # the second one, too
        model = Model(70.0 if version == "v1" else 80.0)
        world.service.champion = Champion(model, ModelInfo(version, "2026-01-15T10:00:00Z", False))
        world.sweeper.cycle()
        assert world.board.model == world.service.champion.info
        assert b'"source":"model"' in b"".join(world.board.document())
    n_sweeps = world.sweeper.counts.sweeps
    world.sweeper.cycle()
    assert world.sweeper.counts.sweeps == n_sweeps == 3
    world.buffer.close()


def test_under_recorded_time_only_the_first_model_forecasts_a_bin_again(world: World) -> None:
    world.feed(("a", 0, 1.0), ("a", 1, 2.0), ("a", 2, 3.0))
    world.sweeper.cycle()
    for version, n_sweeps in (("v1", 3), ("v2", 3)):
        world.service.champion = Champion(Model(), ModelInfo(version, "2026-01-15T10:00:00Z", False))
        world.sweeper.cycle()
        assert world.sweeper.counts.sweeps == n_sweeps


@pytest.mark.parametrize("with_model", [False, True])
def test_the_first_forecast_of_a_server_has_an_honest_interval_whoever_makes_it(
    world: World, with_model: bool
) -> None:
    if with_model:
        info = ModelInfo("v1", "2026-01-15T10:00:00Z", False)
        world.service.champion = Champion(Model(100.0), info)  # its three quantiles are one
    world.feed(("a", 0, 100.0), ("a", 1, 100.0), ("a", 2, 100.0))
    world.sweeper.cycle()
    answer = json.loads(b"".join(world.board.document()))["predictions"]["a"]
    assert answer["source"] == ("model" if with_model else "fallback")
    forecast = answer["forecast"]["cpu_pct"]
    for p10, p90 in zip(forecast["p10"], forecast["p90"], strict=True):
        assert p90 - p10 > 1.0


def test_a_gap_settles_nothing_falsely_and_blocks_nothing(world: World) -> None:
    world.feed(("a", 0, 1.0), ("a", 1, 2.0))
    world.sweeper.cycle()
    world.feed(("a", 361, 50.0), ("a", 362, 51.0), ("a", 363, 52.0))
    world.sweeper.cycle()
    assert world.settled() == [(0, 1, "a", 1.0, 2.0, None), (361, 1, "a", 50.0, 51.0, None)]
    counts = world.ledger.counts()
    assert counts.opened == counts.settled + counts.expired + counts.open
    assert counts.expired == 3


def test_a_server_that_disappears_and_returns_is_settled_only_where_it_sent(world: World) -> None:
    for number in range(14):
        rows = [("a", number, 1.0)] + ([("b", number, 2.0)] if number in (0, 1, 2, 10, 11, 12, 13) else [])
        world.feed(*rows)
        world.sweeper.cycle()
    targets = {origin + horizon for origin, horizon, server, *_ in world.settled() if server == "b"}
    assert targets == {1, 2, 10, 11, 12}


def test_a_full_disk_delays_settling_and_opening_and_loses_neither(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.feed(("a", 0, 1.0), ("a", 1, 2.0))
    world.sweeper.cycle()

    def refuse(rows: SettledForecasts) -> None:
        raise StorageFull("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(world.buffer, "append_predictions", refuse)
        world.feed(("a", 2, 3.0), ("a", 3, 4.0))
        world.sweeper.cycle()
        world.sweeper.cycle()
    assert world.settled() == []
    assert set(world.errors) == {"ledger: no space left"}
    assert world.sweeper.counts.last_origin_ms == to_ms(world.start) + 2 * BIN_S * 1000
    world.sweeper.cycle()
    assert [row[:3] for row in world.settled()] == [(0, 1, "a"), (1, 1, "a")]
    assert world.ledger.counts().opened == 6


def test_a_silent_fleet_lets_its_forecasts_expire_after_a_day(world: World) -> None:
    world.feed(("a", 0, 1.0), ("a", 1, 2.0))
    world.sweeper.cycle()
    world.history.close(to_ms(world.start) + BIN_S * 1000)
    world.clock.advance(hours=23)
    world.sweeper.cycle()
    assert world.ledger.counts().expired == 0
    world.clock.advance(hours=2)
    world.sweeper.cycle()
    assert world.ledger.counts().expired == 2


def test_a_stop_is_obeyed_between_two_bins(world: World) -> None:
    world.feed(*(("a", number, 1.0) for number in range(10)))
    answers = iter([False, False, True])
    world.sweeper.cycle(lambda: next(answers))
    assert world.sweeper.counts.sweeps == 2
    assert not world.sweeper.is_at_work


def test_recorded_time_waits_for_a_model_that_is_being_loaded(world: World) -> None:
    world.service.n_waits_left = 3
    world.feed(("a", 0, 1.0), ("a", 1, 1.0))
    world.sweeper.cycle()
    assert world.service.n_waits_left == -1
    assert world.sweeper.counts.sweeps == 1


def test_a_stop_does_not_wait_for_a_model(world: World) -> None:
    world.service.n_waits_left = 1000
    world.feed(("a", 0, 1.0), ("a", 1, 1.0))
    world.sweeper.cycle(lambda: True)
    assert world.service.n_waits_left == 999
    assert world.sweeper.counts.sweeps == 0


def test_late_records_reach_the_window_from_the_buffer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.feed(("a", 0, 1.0), ("a", 1, 2.0), ("a", 2, 3.0))
    world.sweeper.cycle()
    world.feed(("late", 0, 9.0))
    monkeypatch.setattr("fleetcast.serving.sweep.monotonic", lambda: float("inf"))
    world.sweeper.cycle()
    window = next(world.history.parts(to_ms(world.start) + BIN_S * 1000, 99))
    assert window.server_names == ("a", "late")
    assert window.values[1, 0, 0] == 9.0


def test_a_large_fleet_is_forecast_in_chunks_that_join_without_a_seam(world: World) -> None:
    names = [f"s{i:04d}" for i in range(600)]
    world.feed(*((name, number, float(i)) for i, name in enumerate(names) for number in (0, 1)))
    world.sweeper.cycle()
    world.feed(*((name, 2, 0.0) for name in names))
    world.sweeper.cycle()
    settled = world.settled()
    assert [(row[2], row[3]) for row in settled] == [(name, float(i)) for i, name in enumerate(names)]


def actuals(world: World) -> dict[tuple[int, str], float]:
    """(target bin, server) -> actual of every forecast made one bin ahead; each key is one row."""
    rows = world.buffer.read_predictions(0, 2**50, 1)
    targets = ((rows.target_ms - to_ms(world.start)) // (BIN_S * 1000)).tolist()
    found = list(zip(targets, rows.server_name.tolist(), strict=True))
    assert len(set(found)) == len(found)
    return dict(zip(found, rows.actual.tolist(), strict=True))


def test_an_actual_is_the_mean_of_all_that_is_stored_though_one_sender_is_ahead(world: World) -> None:
    for number in range(6):
        world.feed(("a", number, 10.0))
        world.clock.time = world.start + timedelta(seconds=BIN_S * number + 280)
        if number < 5:
            world.feed(("a", number + 1.0, 10.0))  # one agent's clock is ahead
        world.clock.time = world.start + timedelta(seconds=BIN_S * number + 290)
        world.sweeper.cycle()
        world.feed(("a", number + 0.9, 74.0))
        world.sweeper.cycle()
    assert set(actuals(world).values()) == {42.0}


def test_rows_that_arrive_soon_after_the_close_replace_the_settled_ones(world: World) -> None:
    world.feed(("a", 0, 10.0), ("b", 0, 1.0), ("a", 1, 10.0), ("a", 2, 10.0))
    world.sweeper.cycle()
    assert actuals(world) == {(1, "a"): 10.0}
    before = world.ledger.counts()
    # When rows of the closed bin come, of a server that sent before and of one that did not
    world.feed(("a", 1.5, 74.0), ("b", 1.5, 8.0))
    world.feed(("a", 3, 10.0))  # the next bin closes: corrections come first, whatever the pause
    world.sweeper.cycle()
    assert actuals(world) == {(1, "a"): 42.0, (1, "b"): 8.0, (2, "a"): 10.0}
    assert world.sweeper.counts.rows_corrected == 2
    counts = world.ledger.counts()
    assert counts.settled - before.settled == 2, "a corrected forecast counts once"
    assert counts.opened == counts.settled + counts.expired + counts.open


def test_rows_that_arrive_later_are_stored_and_counted_only(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.feed(*(("a", number, 10.0) for number in range(6)))
    world.sweeper.cycle()
    world.feed(("a", 1.5, 74.0))
    monkeypatch.setattr("fleetcast.serving.sweep.monotonic", lambda: float("inf"))
    world.sweeper.cycle()
    assert actuals(world)[(1, "a")] == 10.0
    assert world.history.late_rows == 1


def test_a_kill_between_a_late_row_and_its_correction_loses_neither(world: World) -> None:
    from fleetcast.inference import restore

    world.feed(("a", 0, 10.0), ("a", 1, 10.0), ("a", 2, 10.0))
    world.sweeper.cycle()
    world.feed(("a", 1.5, 74.0))  # acknowledged; the process dies before it is worked off
    world.build(every_bin=True)
    restore(world.buffer, world.sweeper._fleet, world.ledger)
    world.feed(("a", 3, 10.0))
    world.sweeper.cycle()
    assert actuals(world) == {(1, "a"): 42.0, (2, "a"): 10.0}
    counts = world.ledger.counts()
    assert counts.opened == counts.settled + counts.expired + counts.open


def test_history_from_long_ago_makes_no_forecast_and_is_in_the_window(tmp_path: Path) -> None:
    world = World(tmp_path, every_bin=False)
    world.clock.advance(hours=3)
    world.feed(*(("a", number, 10.0 * number) for number in range(4)))
    world.sweeper.cycle()
    assert world.history.taken_bin_ms == to_ms(world.start) + 2 * BIN_S * 1000
    world.feed(("b", 3, 1.0), ("a", 4, 40.0))  # the newest one was left open: rows may still come
    world.sweeper.cycle()
    assert not world.history.awaits_refresh
    world.sweeper.cycle()
    assert (world.sweeper.counts.sweeps, world.sweeper.counts.bins_skipped) == (0, 5)
    counts = world.ledger.counts()
    assert (counts.opened, counts.due) == (0, 0)
    assert world.ledger.resume_bin_ms == to_ms(world.start) + 4 * BIN_S * 1000
    (part,) = world.history.parts(world.history.taken_bin_ms or 0, 9)
    assert part.values[0, 0].tolist() == [0.0, 10.0, 20.0, 30.0, 40.0]
    world.buffer.close()


@pytest.mark.parametrize(("bins_late", "sweeps"), [(3, 1), (4, 1), (5, 0)])
def test_a_forecast_is_made_as_long_as_any_of_it_is_yet_to_come(
    tmp_path: Path, bins_late: int, sweeps: int
) -> None:
    world = World(tmp_path, every_bin=False)
    world.feed(("a", 0, 1.0), ("a", 1, 1.0))
    world.clock.time = world.start + timedelta(seconds=BIN_S * (1 + bins_late))
    world.sweeper.cycle()
    world.sweeper.cycle()
    assert world.history.taken_bin_ms == to_ms(world.start) + BIN_S * 1000
    assert world.sweeper.counts.sweeps == (1 if bins_late < 5 else 0) == sweeps
    world.buffer.close()


def test_history_that_comes_in_is_forecast_once_it_is_all_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elapsed_s = [1000.0]
    monkeypatch.setattr("fleetcast.serving.sweep.monotonic", lambda: elapsed_s[0])
    world = World(tmp_path, every_bin=False)
    world.clock.advance(seconds=5 * BIN_S + GRACE_S + 20)
    for number in range(2):
        world.feed(("a", number, 1.0), ("a", number + 1, 1.0))
        world.sweeper.cycle()
    assert (world.history.taken_bin_ms, world.sweeper.counts.sweeps) == (to_ms(world.start) + BIN_S * 1000, 0)
    elapsed_s[0] += 61.0  # it goes on and on: clients must not wait for its end
    world.feed(("a", 2, 1.0), ("a", 3, 1.0))
    world.sweeper.cycle()
    assert world.sweeper.counts.sweeps == 1
    world.sweeper.cycle()
    assert world.history.taken_bin_ms == to_ms(world.start) + 3 * BIN_S * 1000
    assert world.sweeper.counts.sweeps == 2
    world.buffer.close()


def test_a_fleet_that_comes_back_settles_what_was_open_before_it_forecasts_again(tmp_path: Path) -> None:
    world = World(tmp_path, every_bin=False)
    world.feed(*(("a", number, 10.0 * number) for number in range(3)))
    world.sweeper.cycle()
    opened = world.ledger.counts().opened
    world.clock.advance(hours=3)
    world.feed(*(("a", number, 10.0 * number) for number in range(2, 6)))
    world.sweeper.cycle()
    world.sweeper.cycle()
    counts = world.ledger.counts()
    assert (counts.opened, counts.settled, counts.open) == (opened, 2, 0)
    assert counts.opened == counts.settled + counts.expired + counts.open
    world.buffer.close()


def test_a_model_that_comes_after_bins_of_no_use_makes_no_forecast_and_no_error(tmp_path: Path) -> None:
    world = World(tmp_path, every_bin=False)
    world.feed(*(("a", number, 10.0 * number) for number in range(3)))
    world.sweeper.cycle()
    world.clock.advance(hours=3)
    world.feed(*(("a", number, 10.0 * number) for number in range(2, 6)))
    world.sweeper.cycle()
    n_sweeps = world.sweeper.counts.sweeps
    world.service.champion = Champion(Model(), ModelInfo("v1", "2026-01-15T10:00:00Z", False))
    world.sweeper.cycle()
    assert world.sweeper.counts.sweeps == n_sweeps
    # and the first bin that is of use again is forecast by it
    newest = int((world.clock.now() - world.start).total_seconds() // BIN_S)
    world.feed(("a", newest, 1.0), ("a", newest + 1, 1.0))
    world.sweeper.cycle()
    assert world.board.model == world.service.champion.info
    world.buffer.close()
