"""Claims about what is held out, and what forecasts of it cost."""

import numpy as np
from oracle_fleet import N_BIN, SHAPE, Oracle, grid, verdict

from fleetcast.forecast.naive import NaiveForecaster
from fleetcast.schema import ChangedSeries, HistoryWindow
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.holdout import HoldOut, Sample, first_held_bins, mean_errors


def test_the_tail_is_a_share_of_the_data_and_at_most_a_day() -> None:
    assert (first_held_bins(grid(), (), 0.02, 288) == N_BIN - 80).all()
    assert (first_held_bins(grid(), (), 0.1, 288) == N_BIN - 288).all()


def test_a_changed_series_keeps_most_of_what_came_after_its_change_for_training() -> None:
    first = first_held_bins(
        grid(), (ChangedSeries(2, 1, N_BIN - 60), ChangedSeries(3, 0, N_BIN - 2)), 0.1, 288
    )
    assert first[2, 1] == N_BIN - 24
    assert first[3, 0] == N_BIN - 6
    assert first[2, 0] == N_BIN - 288


def test_what_the_model_does_not_forecast_counts_as_the_fallback_s() -> None:
    class Silent:
        def predict(self, window: HistoryWindow) -> np.ndarray:
            return np.full((len(window.server_names), 2, 96, 3), np.nan, np.float32)

    fleet = grid()
    answer = verdict(fleet, Silent(), NaiveForecaster(96))
    assert answer.figures["unchanged"]["ratio"] == 1.0
    assert not answer.promoted


def test_only_held_out_bins_are_judged() -> None:
    # Given a candidate that is perfect before the tail and wrong inside it
    fleet = grid()
    hold_out = HoldOut(fleet, SHAPE, first_held_bins(fleet, (), 0.1, 288), (), (1,), Sample(1))

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
    hold_out = HoldOut(fleet, SHAPE, first_held_bins(fleet, (), 0.1, 288), (), (1, 12), Sample(1))

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
    hold_out = HoldOut(large, SHAPE, first_held_bins(large, changed, 0.1, 288), changed, (1,), Sample(1))
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
