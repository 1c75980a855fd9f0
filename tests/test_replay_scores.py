"""Claims about the figures of a loop replay: what an error of 0.5 and ten hours mean."""

import numpy as np
import pytest

from benchmarks.loop.parts.fleet import BIN_MS, DAY, ReplayFleet
from benchmarks.loop.parts.record import HORIZONS
from benchmarks.loop.parts.scores import errors, recovery_hours
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


def test_recovery_is_counted_from_the_change_to_errors_half_way_to_the_oracles() -> None:
    scene = fleet()
    by_policy = {
        "never": p50_with(1.0, scene),
        "oracle": p50_with(0.4, scene, from_bin=CHANGED + 72),
        "late": p50_with(0.4, scene, from_bin=CHANGED + 4 * DAY),
    }
    found = recovery_hours(scene, by_policy, "never", "oracle")
    assert found["never"] == [None]
    assert found["oracle"][0] is not None and found["oracle"][0] <= 6
    # the next 24 hours may hold a sixth of the old errors and be half way still
    assert found["late"][0] is not None and 76 <= found["late"][0] <= 96


def test_where_the_oracle_gains_nothing_no_recovery_is_claimed() -> None:
    scene = fleet()
    same = p50_with(0.7, scene)
    assert recovery_hours(scene, {"never": same, "oracle": same}, "never", "oracle") == {
        "never": [None],
        "oracle": [None],
    }


def test_errors_that_rise_again_within_the_week_are_no_recovery_yet() -> None:
    scene = fleet()
    good, bad = p50_with(0.4, scene, from_bin=CHANGED), p50_with(1.0, scene)
    relapse = good.copy()
    again = slice(CHANGED - BEGIN + 3 * DAY, CHANGED - BEGIN + 4 * DAY)
    relapse[:, :, again] = bad[:, :, again]
    found = recovery_hours(scene, {"never": bad, "oracle": good, "own": relapse}, "never", "oracle")
    assert found["own"][0] is not None and 72 <= found["own"][0] <= 96
