"""Claims about what is held out and which candidates may serve."""

import numpy as np
import pytest

from fleetcast.model.gate import GateVerdict, HoldOut, Losses, held_from, judge, mean_errors
from fleetcast.model.gridshape import GridShape
from fleetcast.model.sampler import ChangedSeries
from fleetcast.model.traingrid import TrainingGrid
from fleetcast.schema import HistoryWindow
from fleetcast.serving.fallback import NaiveForecaster

SHAPE = GridShape(300_000, 96)
N_BIN = 4000


def grid(n_server: int = 6) -> TrainingGrid:
    random = np.random.default_rng(0)
    steps = random.normal(0, 1, (n_server, 2, N_BIN)).cumsum(axis=2)
    values = np.clip(50 + steps, 1, 99).astype(np.float32)
    names = tuple(f"web-{index}" for index in range(n_server))
    return TrainingGrid(names, ("cpu_pct", "mem_pct"), values, 0, 300_000)


class Oracle:
    """Knows the future, and adds an error."""

    def __init__(self, fleet: TrainingGrid, error: float = 0.0, on: tuple[str, ...] | None = None) -> None:
        self._fleet, self._error = fleet, error
        self._on = fleet.server_names if on is None else on

    def predict(self, window: HistoryWindow) -> np.ndarray:
        origin = window.end_bin_ms // 300_000
        rows = [self._fleet.server_names.index(name) for name in window.server_names]
        bins = np.minimum(np.arange(origin + 1, origin + 97), N_BIN - 1)
        future = self._fleet.values[rows][..., bins]
        noise = np.random.default_rng(origin).normal(0, 1, future.shape) * self._error
        is_on = np.isin(window.server_names, self._on)[:, None, None]
        return np.repeat((future + noise * is_on)[..., None], 3, axis=-1).astype(np.float32)


def verdict(
    fleet: TrainingGrid, candidate: object, serving: object, changed: tuple[ChangedSeries, ...] = ()
) -> GateVerdict:
    hold_out = HoldOut(
        fleet, SHAPE, held_from(fleet, changed, 0.1, 288), changed, NaiveForecaster(96), (1, 12, 96), 1
    )
    return judge(hold_out.losses(candidate), hold_out.losses(serving), hold_out.is_changed, 1)  # type: ignore[arg-type]


def test_the_tail_is_a_share_of_the_data_and_at_most_a_day() -> None:
    assert (held_from(grid(), (), 0.02, 288) == N_BIN - 80).all()
    assert (held_from(grid(), (), 0.1, 288) == N_BIN - 288).all()


def test_a_changed_series_keeps_most_of_what_came_after_its_change_for_training() -> None:
    first = held_from(grid(), (ChangedSeries(2, 1, N_BIN - 60), ChangedSeries(3, 0, N_BIN - 2)), 0.1, 288)
    assert first[2, 1] == N_BIN - 24
    assert first[3, 0] == N_BIN - 6
    assert first[2, 0] == N_BIN - 288


def test_a_better_candidate_serves() -> None:
    fleet = grid()
    answer = verdict(fleet, Oracle(fleet, 0.5), Oracle(fleet, 1.0))
    assert answer.promoted
    assert answer.figures["unchanged"]["ratio"] == pytest.approx(0.5, abs=0.05)
    assert answer.figures["changed"] == {"windows": 0, "ratio": None, "confidence": None}


def test_a_worse_and_an_equal_candidate_do_not() -> None:
    fleet = grid()
    for error in (1.0, 2.0):
        answer = verdict(fleet, Oracle(fleet, error), Oracle(fleet, 1.0))
        assert not answer.promoted
        assert answer.why.startswith("not better")


def test_a_gain_that_rests_on_chance_is_no_gain() -> None:
    # Given two sides that differ only by luck: 40 pairs of seeds, a 10 % rule
    random = np.random.default_rng(4)
    shape = (12, 6, 2)
    promoted = 0
    for _ in range(40):
        ours, theirs = (Losses(random.gamma(2, 1, shape), np.ones((*shape, 3)), True) for _ in range(2))
        promoted += judge(ours, theirs, np.zeros((6, 2), np.bool_), 1).promoted
    assert promoted <= 10


def test_learning_a_change_does_not_buy_the_right_to_harm_the_others() -> None:
    fleet = grid()
    changed = tuple(ChangedSeries(0, metric, N_BIN - 100) for metric in (0, 1))
    others = fleet.server_names[1:]
    better_there = Oracle(fleet, 0.2, on=fleet.server_names[:1])
    assert verdict(fleet, better_there, Oracle(fleet, 0.5), changed).promoted

    class Harmful:
        def predict(self, window: HistoryWindow) -> np.ndarray:
            return Oracle(fleet, 0.2, on=fleet.server_names[:1]).predict(window) + (
                Oracle(fleet, 0.55, on=others).predict(window) - Oracle(fleet).predict(window)
            )

    answer = verdict(fleet, Harmful(), Oracle(fleet, 0.5), changed)
    assert not answer.promoted
    assert answer.why.startswith("harms")


def test_a_gain_on_the_others_does_not_count_for_a_change() -> None:
    fleet = grid()
    changed = tuple(ChangedSeries(0, metric, N_BIN - 100) for metric in (0, 1))
    answer = verdict(fleet, Oracle(fleet, 1.0, on=fleet.server_names[:1]), Oracle(fleet, 1.0), changed)
    assert not answer.promoted
    assert answer.figures["unchanged"]["ratio"] == 0.0


def test_what_the_model_does_not_forecast_counts_as_the_fallback_s() -> None:
    class Silent:
        def predict(self, window: HistoryWindow) -> np.ndarray:
            return np.full((len(window.server_names), 2, 96, 3), np.nan, np.float32)

    fleet = grid()
    answer = verdict(fleet, Silent(), NaiveForecaster(96))
    assert answer.figures["unchanged"]["ratio"] == 1.0
    assert not answer.promoted


def test_forecasts_that_are_no_numbers_never_serve() -> None:
    class Broken:
        def predict(self, window: HistoryWindow) -> np.ndarray:
            forecast = NaiveForecaster(96).predict(window)
            forecast[0, 0, 5, 1] = np.inf
            return forecast

    fleet = grid()
    answer = verdict(fleet, Broken(), Oracle(fleet, 50.0))
    assert not answer.promoted
    assert answer.why == "its forecasts are not finite"


def test_a_tail_without_values_judges_nobody() -> None:
    fleet = grid()
    fleet.values[:, :, -288:] = np.nan
    answer = verdict(fleet, Oracle(fleet), Oracle(fleet, 1.0))
    assert not answer.promoted
    assert "no window to judge by" in answer.why


def test_only_held_out_bins_are_judged() -> None:
    # Given a candidate that is perfect before the tail and wrong inside it
    fleet = grid()
    hold_out = HoldOut(fleet, SHAPE, held_from(fleet, (), 0.1, 288), (), NaiveForecaster(96), (1,), 1)

    class KnowsThePast(Oracle):
        def predict(self, window: HistoryWindow) -> np.ndarray:
            forecast = super().predict(window)
            origin = window.end_bin_ms // 300_000
            in_tail = np.arange(origin + 1, origin + 97) >= N_BIN - 288
            forecast[:, :, ~in_tail] = 1e6
            return forecast

    assert np.nanmax(hold_out.losses(KnowsThePast(fleet)).pinball) == 0.0


def test_errors_are_means_of_absolute_errors_by_metric_and_horizon() -> None:
    fleet = grid()
    hold_out = HoldOut(fleet, SHAPE, held_from(fleet, (), 0.1, 288), (), NaiveForecaster(96), (1, 12), 1)

    class Off(Oracle):
        def predict(self, window: HistoryWindow) -> np.ndarray:
            return super().predict(window) + np.float32(2.0)

    table, by_series = mean_errors(hold_out.losses(Off(fleet)))
    np.testing.assert_allclose(table, 2.0, rtol=1e-4)
    np.testing.assert_allclose(by_series, 2.0, rtol=1e-4)
    assert table.shape == (2, 2)


def test_a_large_fleet_is_judged_by_a_sample_that_holds_the_changed() -> None:
    fleet = grid(2)
    values = np.broadcast_to(fleet.values[:1], (400, 2, N_BIN))
    large = TrainingGrid(tuple(map(str, range(400))), fleet.metrics, values, 0, 300_000)
    changed = tuple(ChangedSeries(index, 0, N_BIN - 90) for index in (7, 399))
    hold_out = HoldOut(
        large, SHAPE, held_from(large, changed, 0.1, 288), changed, NaiveForecaster(96), (1,), 1
    )
    assert len(hold_out.servers) == 150
    assert {7, 399} <= set(hold_out.servers.tolist())
    assert hold_out.is_changed.sum() == 2


def test_an_idle_series_does_not_outweigh_the_fleet() -> None:
    # Given five disks at work and one that does nothing, forecast as almost nothing
    fleet = grid()
    idle = fleet.values.copy()
    idle[5] = 0.0
    disks = TrainingGrid(fleet.server_names, ("disk_io_mb_s", "net_in_mb_s"), idle, 0, 300_000)

    class Almost(Oracle):
        def predict(self, window: HistoryWindow) -> np.ndarray:
            forecast = super().predict(window)
            forecast[-1] += np.float32(0.01)
            return forecast

    at_work = fleet.server_names[:5]
    assert verdict(disks, Almost(disks, 0.5, on=at_work), Oracle(disks, 1.0, on=at_work)).promoted
