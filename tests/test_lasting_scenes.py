"""Claims about the scenes of new dynamics that do not repeat: seeded, and nothing else moves."""

import numpy as np
import pytest

from benchmarks.loop.parts.fleet import BIN_MS, DAY, SEED
from benchmarks.loop.parts.lasting import LASTING, LEAKS, MOVED, WALKS, lasting
from fleetcast.training.grid import TrainingGrid

METRICS = ("cpu_pct", "mem_pct", "disk_io_mb_s")
BEGIN, DAYS = 2 * DAY, 22
NAMES = tuple("abcdefghij")


def grid() -> TrainingGrid:
    random = np.random.default_rng(SEED)
    values = random.gamma(2.0, 5.0, (len(NAMES), 3, (2 + DAYS) * DAY)).astype(np.float32)
    values[3, :, 3000:3100] = np.nan
    return TrainingGrid(NAMES, METRICS, values, 0, BIN_MS)


@pytest.mark.parametrize("name", LASTING)
def test_only_the_named_series_change_and_only_from_their_change_on(name: str) -> None:
    recorded, scene = grid(), lasting(name, grid(), BEGIN)
    moved = np.nan_to_num(scene.grid.values) != np.nan_to_num(recorded.values)
    named = {(item.server, item.metric) for changed in scene.changes for item in changed}
    assert {tuple(pair) for pair in np.argwhere(moved.any(axis=2)).tolist()} == named
    before = np.arange(recorded.n_bins) < scene.changed_since()[..., None]
    assert not (moved & before).any()
    np.testing.assert_array_equal(np.isnan(scene.grid.values), np.isnan(recorded.values))
    assert np.nanmin(scene.grid.values) >= 0 and np.nanmax(scene.grid.values[:, :2]) <= 100
    assert len(scene.changes) == 3 and all(scene.changes)


@pytest.mark.parametrize("name", LASTING)
def test_the_same_seed_draws_the_same_scene_and_another_draws_another(name: str) -> None:
    first, second, other = (lasting(name, grid(), BEGIN, seed) for seed in (SEED, SEED, SEED + 100))
    np.testing.assert_array_equal(first.grid.values, second.grid.values)
    assert first.changes == second.changes
    assert first.changes != other.changes


def test_leaks_climb_by_half_a_point_to_three_an_hour() -> None:
    quiet = grid()
    quiet.values[:, 1] = 10.0
    scene = lasting(LEAKS, quiet, BEGIN)
    for item in scene.changes[0]:
        climb = np.diff(scene.grid.values[item.server, 1, item.since_bin : item.since_bin + 8 * 12])
        assert item.metric == 1
        assert climb.min() >= 0.5 / 12 - 1e-3 and climb.max() <= 3 / 12 + 1e-3


def test_a_walk_moves_by_small_steps_and_never_leaves_its_walls() -> None:
    quiet = grid()
    quiet.values[:, 0] = 5.0
    scene = lasting(WALKS, quiet, BEGIN)
    item = scene.changes[0][0]
    walk = scene.grid.values[item.server, 0, item.since_bin :]
    assert walk.min() >= 5.0 and walk.max() <= 65.0
    assert np.abs(np.diff(walk)).max() < 10


def test_a_moved_service_is_felt_where_it_went_and_no_longer_where_it_was() -> None:
    recorded, scene = grid(), lasting(MOVED, grid(), BEGIN)
    cpu = [item for item in scene.changes[0] if item.metric == 0]
    means = [
        np.nanmean(scene.grid.values[item.server, 0, item.since_bin : item.since_bin + DAY])
        / np.nanmean(recorded.values[item.server, 0, item.since_bin : item.since_bin + DAY])
        for item in cpu
    ]
    assert len(cpu) == 2
    assert min(means) < 0.4 and max(means) > 1.5
