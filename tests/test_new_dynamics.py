"""Claims about the changes that incremental trainings are measured on."""

import numpy as np
import pytest

from benchmarks.forecast.parts.new_dynamics import inject, moments
from benchmarks.forecast.parts.training_rounds import TestDays, relative
from fleetcast.schema import ChangedSeries, HistoryWindow
from fleetcast.training.grid import TrainingGrid

N_BIN, SINCE = 3000, 2000
METRICS = ("cpu_pct", "mem_pct", "disk_write_mb_s")


def grid(n_server: int = 5) -> TrainingGrid:
    values = np.full((n_server, 3, N_BIN), 10.0, np.float32)
    values[:, :, 2500:2510] = np.nan
    return TrainingGrid(tuple(f"web-{i}" for i in range(n_server)), METRICS, values, 0, 300_000)


def test_only_the_named_series_change_and_only_from_the_moment_on() -> None:
    fleet = grid()
    injected = inject(fleet, SINCE, 2, 7)
    moved = np.nan_to_num(injected.grid.values) != np.nan_to_num(fleet.values)
    assert not moved[:, :, :SINCE].any()
    named = {(item.server, item.metric) for item in injected.changed}
    assert {tuple(pair) for pair in np.argwhere(moved.any(axis=2)).tolist()} == named
    assert injected.kinds == ("sawtooth", "sawtooth", "leak", "leak", "bursts", "bursts")
    assert [item.metric for item in injected.changed] == [0, 0, 1, 1, 2, 2]
    assert all(item.since_bin == SINCE for item in injected.changed)
    np.testing.assert_array_equal(np.isnan(injected.grid.values), np.isnan(fleet.values))
    assert np.nanmax(injected.grid.values[:, :2]) <= 100.0


def test_the_same_seed_changes_the_same_series_alike() -> None:
    first, second, other = (inject(grid(), SINCE, 2, seed) for seed in (7, 7, 8))
    assert first.changed == second.changed
    np.testing.assert_array_equal(first.grid.values, second.grid.values)
    assert first.changed != other.changed


def test_series_of_a_kind_share_their_period_unless_asked_otherwise() -> None:
    def drops(own_periods: bool) -> list[int]:
        injected = inject(grid(), SINCE, 5, 3, own_periods=own_periods)
        waves = [injected.grid.values[item.server, 0, SINCE:2500] for item in injected.changed[:5]]
        return [int((np.diff(wave) < -10).sum()) for wave in waves]

    assert max(drops(False)) - min(drops(False)) <= 2
    assert max(drops(True)) - min(drops(True)) > 2


def test_too_few_servers_are_named() -> None:
    with pytest.raises(ValueError, match="sawtooth: 5 servers record cpu_pct, need 6"):
        inject(grid(), SINCE, 6, 1)


def test_trainings_run_where_most_changes_lie_behind() -> None:
    changes = [ChangedSeries(index, 0, since) for index, since in enumerate((100, 1000, 1100, 1150, 5000))]
    # When a training runs 864 bins after a change, and looks at changes 432 to 864 bins old
    found = moments(changes, 500, 6000, 864, 2)
    # Then the three that lie together are one scene, the early one is none, the late one another
    assert found == [(1864, tuple(changes[1:4])), (5864, (changes[4],))]


def test_errors_are_relative_to_repeating_the_last_value() -> None:
    # Given a ramp of one a bin: h bins ahead the last value is h off
    values = np.broadcast_to(np.arange(N_BIN, dtype=np.float32), (2, 1, N_BIN)).copy()
    fleet = TrainingGrid(("a", "b"), ("cpu_pct",), values, 0, 300_000)
    days = TestDays.after(fleet, 2000, 2, 5)

    class HalfOff:
        def predict(self, window: HistoryWindow) -> np.ndarray:
            ahead = window.values[:, :, -1:] + 0.5 * np.arange(1, 97, dtype=np.float32)
            return np.repeat(ahead[..., None], 3, axis=-1)

    naive, half = days.errors(None), days.errors(HalfOff())
    np.testing.assert_allclose(naive["1h"], 12.0)
    np.testing.assert_allclose(half["1h"], 6.0)
    everything = np.ones((2, 1), np.bool_)
    assert relative(half["1h"], naive["1h"], everything) == 0.5
    assert relative(half["1h"], naive["1h"], ~everything) is None
    assert days.origins.min() == 1999
    assert days.origins.max() + 96 < 2000 + 2 * 288
