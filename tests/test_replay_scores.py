"""Claims about the figures of a loop replay: what an error of 0.5 and ten hours mean."""

import numpy as np
import pytest

from benchmarks.loop.parts.fleet import BIN_MS, DAY, ReplayFleet
from benchmarks.loop.parts.record import HORIZONS
from benchmarks.loop.parts.scores import daily_errors, errors, mean_with_interval, recovery_hours
from fleetcast.schema import ChangedSeries
from fleetcast.training.grid import TrainingGrid

BEGIN, DAYS = DAY, 10
CHANGED = BEGIN + DAY


def fleet() -> ReplayFleet:
    values = np.random.default_rng(3).normal(50, 10, (2, 1, (1 + DAYS) * DAY)).astype(np.float32)
    changes = ((ChangedSeries(0, 0, CHANGED),),)
    return ReplayFleet("test", TrainingGrid(("a", "b"), ("cpu_pct",), values, 0, BIN_MS), BEGIN, changes)


def p50_with(share_of_error: float, scene: ReplayFleet, from_bin: int = BEGIN) -> np.ndarray:
    """Return forecasts that miss by that share of what the last value misses, from a bin on."""
    values = scene.grid.values
    origins = np.arange(BEGIN, scene.grid.n_bins)
    p50 = np.empty((2, 1, len(origins), len(HORIZONS)), np.float32)
    for place, horizon in enumerate(HORIZONS):
        actual = values[:, :, np.minimum(origins + horizon, scene.grid.n_bins - 1)]
        share = np.where(origins >= from_bin, share_of_error, 1.0)
        p50[..., place] = actual + share * (values[:, :, origins] - actual)
    return p50


def test_half_the_error_of_the_last_value_is_an_error_of_a_half_at_every_horizon() -> None:
    scene = fleet()
    found = errors(scene, p50_with(0.5, scene))
    for group in ("all", "changed", "others"):
        assert found[group] == pytest.approx({"5min": 0.5, "1h": 0.5, "8h": 0.5, "mean": 0.5}, abs=1e-3)


def test_changed_series_count_from_their_change_on() -> None:
    scene = fleet()
    found = errors(scene, p50_with(0.5, scene, from_bin=CHANGED))
    assert found["changed"]["1h"] == pytest.approx(0.5, abs=1e-3)
    assert found["all"]["1h"] == pytest.approx(0.55, abs=0.02)  # the first of ten days at 1


@pytest.mark.parametrize("late_h", [0, 12, 40])
def test_recovery_is_counted_from_the_change_to_errors_near_their_later_level(late_h: int) -> None:
    # Given errors at 0.4 of the last value's from some hours after the change on, and at 1 before
    scene = fleet()
    hours = recovery_hours(scene, p50_with(0.4, scene, from_bin=CHANGED + 12 * late_h))
    # Then it recovered then; six hours may hold a fifth of the old errors and be near the later level
    assert hours[0] is not None
    assert max(0, late_h - 2) <= hours[0] <= late_h


def test_errors_that_fall_late_are_no_recovery() -> None:
    scene = fleet()
    assert recovery_hours(scene, p50_with(0.4, scene, from_bin=CHANGED + 3 * DAY + 36)) == [None]


def test_each_day_has_its_own_error() -> None:
    scene = fleet()
    daily = daily_errors(scene, p50_with(0.5, scene, from_bin=BEGIN + 2 * DAY))
    assert daily == pytest.approx([1.0] * 2 + [0.5] * 8, abs=1e-3)


def test_a_mean_over_runs_has_an_interval_only_where_there_are_several() -> None:
    assert mean_with_interval([0.5]) == (0.5, None)
    assert mean_with_interval([None]) == (None, None)
    mean, half = mean_with_interval([0.4, 0.5, 0.6])
    assert mean == pytest.approx(0.5)
    assert half == pytest.approx(4.303 * 0.1 / np.sqrt(3), abs=1e-4)
