"""Claims about which windows a training sees."""

import numpy as np
import pytest

from fleetcast.errors import NotEnoughData
from fleetcast.forecast.encoding import GridShape
from fleetcast.schema import ChangedSeries
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.sampler import WindowMix, WindowSampler

SHAPE = GridShape(300_000, 96)
N_BIN = 3000
REPLAY = WindowMix()


def grid(n_server: int = 4) -> TrainingGrid:
    """Return a fleet whose values tell the bin they stand in."""
    values = np.broadcast_to(np.arange(N_BIN, dtype=np.float32), (n_server, 2, N_BIN)).copy()
    names = tuple(f"web-{index}" for index in range(n_server))
    return TrainingGrid(names, ("cpu_pct", "mem_pct"), values, 0, 300_000)


def sampler(fleet: TrainingGrid, held: int = 288, mix: WindowMix = REPLAY, seed: int = 1) -> WindowSampler:
    return WindowSampler(fleet, SHAPE, np.full((len(fleet.server_names), 2), N_BIN - held), mix, seed)


def origins(windows: WindowSampler, size: int = 400) -> tuple[np.ndarray, np.ndarray]:
    return windows._windows(size)


def test_no_target_lies_in_the_held_out_tail() -> None:
    batch = sampler(grid()).batch(400, [1, 2])
    scale = batch.arrays.scale
    values = batch.targets * scale.spread[:, None] + scale.origin[:, None]
    known = np.isfinite(values)
    assert known.any(axis=1).all()
    # clipped targets are nearer to the origin, so the bound holds for them, too
    assert values[known].max() < N_BIN - 288 + 0.5


def test_no_origin_lies_in_the_held_out_tail_of_its_own_series() -> None:
    fleet = grid()
    held = np.full((4, 2), N_BIN - 288)
    held[1, 0] = N_BIN - 12
    windows = WindowSampler(fleet, SHAPE, held, WindowMix((ChangedSeries(1, 0, N_BIN - 40),), 0.5), 3)
    series, origin = origins(windows)
    assert (origin < held.reshape(-1)[series]).all()
    assert (origin[series == 2] >= N_BIN - 288).any()  # the changed series' newest hours are learnt


def test_the_changed_share_comes_from_changed_series_after_their_change() -> None:
    mix = WindowMix((ChangedSeries(2, 1, 2500), ChangedSeries(3, 0, 2600)), 0.35)
    series, origin = origins(sampler(grid(), mix=mix))
    first = slice(0, 140)
    assert set(series[first].tolist()) == {5, 6}
    assert (origin[first][series[first] == 5] >= 2500).all()
    assert (origin[first][series[first] == 6] >= 2600).all()


def test_a_changed_metric_is_replayed_as_often_as_its_change() -> None:
    # Given a change of cpu_pct alone
    mix = WindowMix((ChangedSeries(2, 0, 2500),), 0.3)
    series, origin = origins(sampler(grid(), mix=mix))
    alike = slice(120, 240)
    assert set(series[alike].tolist()) == {0, 2, 4, 6}
    assert origin[alike].min() < 1000
    assert set((series[240:] % 2).tolist()) == {0, 1}


def test_replay_is_told_from_what_is_to_be_learnt() -> None:
    # Given a change of series 5, which replay may meet, too
    mix = WindowMix((ChangedSeries(2, 1, 2000),), 0.25)
    windows = sampler(grid(), mix=mix)
    series, origin = origins(windows, 4000)
    is_replay = windows._is_replay(series, origin)
    assert not is_replay[:1000].any()
    after_change = (series == 5) & (origin >= 2000)
    assert after_change[1000:].any()
    np.testing.assert_array_equal(is_replay[1000:], ~after_change[1000:])


def test_the_recent_share_comes_from_the_newest_days() -> None:
    series, origin = origins(sampler(grid(), mix=WindowMix(recent_share=0.5, recent_bins=288)))
    assert (origin[:200] >= N_BIN - 288 - 288).all()
    assert origin[200:].min() < N_BIN - 1000
    assert len(np.unique(series)) == 8


def test_the_recent_are_drawn_by_their_weights() -> None:
    # Given series 5 weighing as much as the seven others together, and series 2 nothing
    weights = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 6.0], [1.0, 1.0]])
    mix = WindowMix(recent_share=0.5, recent_bins=288, recent_weights=weights)
    series, _ = origins(sampler(grid(), mix=mix), 4000)
    counts = np.bincount(series[:2000], minlength=8) / 2000
    assert counts[2] == 0.0
    assert counts[5] == pytest.approx(0.5, abs=0.04)
    assert np.bincount(series[2000:], minlength=8).min() > 150  # replay knows no weights


def test_a_change_without_a_window_to_learn_from_is_replaced_by_replay() -> None:
    # Given a series that changed and has been silent since
    fleet = grid()
    fleet.values[0, 0, 2000:] = np.nan
    mix = WindowMix((ChangedSeries(0, 0, 2300),), 0.5)
    series, _ = origins(sampler(fleet, mix=mix), 100)
    assert len(series) == 100


def test_a_change_inside_the_tail_is_no_training_matter() -> None:
    mix = WindowMix((ChangedSeries(0, 0, N_BIN - 10),), 0.5)
    series, _ = origins(sampler(grid(), mix=mix), 100)
    assert len(series) == 100


def test_the_same_seed_draws_the_same_batches() -> None:
    first, second = sampler(grid(), seed=5), sampler(grid(), seed=5)
    for _ in range(2):
        left, right = first.batch(32, [1, 2]), second.batch(32, [1, 2])
        np.testing.assert_array_equal(left.arrays.past, right.arrays.past)
        np.testing.assert_array_equal(left.targets, right.targets)
    assert not np.array_equal(first.batch(32, [1, 2]).targets, left.targets, equal_nan=True)


def test_some_windows_are_young_and_some_metrics_unknown() -> None:
    batch = sampler(grid()).batch(2000, [7, 9])
    assert set(batch.metric_slots.tolist()) == {0, 7, 9}
    assert 0.02 < (batch.metric_slots == 0).mean() < 0.1
    week_share = batch.arrays.static[:, -1]
    assert (week_share == 0).mean() > 0.05


def test_a_grid_without_a_window_says_so() -> None:
    fleet = grid()
    fleet.values[:] = np.nan
    with pytest.raises(NotEnoughData, match="held-out"):
        sampler(fleet).batch(8, [1, 2])


def test_a_grid_shorter_than_the_history_is_padded() -> None:
    fleet = grid()
    short = TrainingGrid(fleet.server_names, fleet.metrics, fleet.values[:, :, :600], 0, 300_000)
    batch = WindowSampler(short, SHAPE, np.full((4, 2), 540), WindowMix(), 1).batch(64, [1, 2])
    assert np.isfinite(batch.arrays.past).all()
