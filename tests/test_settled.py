"""Settled forecasts as a grid."""

import numpy as np
from rhythm_fleet import BIN_MS, METRICS, SERVERS, START_MS, made_grid
from seasonal_store import rows_of
from settled_rows import RowStore, joined

from fleetcast.drift.seasonal.settled import bins_at_once, read_grid, settled_grid

SPAN = (START_MS, START_MS + 40 * BIN_MS)


def test_rows_come_to_lie_on_their_server_metric_and_bin() -> None:
    grid = made_grid()[:, :, :40]
    found = settled_grid(rows_of(grid, 0, 40), SERVERS, METRICS, SPAN, BIN_MS)
    assert np.array_equal(found.values, grid)
    assert np.allclose(found.errors, 0.5, atol=1e-5)


def test_names_and_times_that_were_not_asked_for_are_left_out() -> None:
    grid = made_grid()[:, :, :60]
    names = (SERVERS[3], "never heard of")
    found = settled_grid(rows_of(grid, 0, 60), names, METRICS[1:], SPAN, BIN_MS)
    assert np.array_equal(found.values[0, 0], grid[3, 1, :40])
    assert np.isnan(found.values[1]).all()


def test_errors_are_a_models_never_the_fallbacks() -> None:
    grid = made_grid()[:, :, :40]
    rows = joined(
        rows_of(grid, 0, 20, version=None), rows_of(grid, 20, 30, version="old"), rows_of(grid, 30, 40)
    )
    of_any = settled_grid(rows, SERVERS, METRICS, SPAN, BIN_MS)
    assert np.isfinite(of_any.values).all()
    assert np.flatnonzero(np.isfinite(of_any.errors[0, 0])).tolist() == list(range(20, 40))
    of_old = settled_grid(rows, SERVERS, METRICS, SPAN, BIN_MS, version="old")
    assert np.flatnonzero(np.isfinite(of_old.errors[0, 0])).tolist() == list(range(20, 30))


def test_other_horizons_are_no_part_of_it() -> None:
    rows = rows_of(made_grid(), 0, 40)
    rows.horizon[:] = 12
    assert np.isnan(settled_grid(rows, SERVERS, METRICS, SPAN, BIN_MS).values).all()


def test_a_long_stretch_is_read_piece_by_piece() -> None:
    grid = made_grid()
    store = RowStore(rows_of(grid, 0, 40))
    found = read_grid(store.read_predictions, SERVERS, METRICS, SPAN, BIN_MS)
    assert np.array_equal(found.values, grid[:, :, :40])
    assert store.reads == [SPAN]
    assert bins_at_once(40_000) * 40_000 <= 1_100_000
    assert bins_at_once(10**9) == 12


def test_nothing_asked_is_nothing_found() -> None:
    store = RowStore(rows_of(made_grid(), 0, 40))
    found = read_grid(store.read_predictions, SERVERS, METRICS, (START_MS, START_MS), BIN_MS)
    assert found.values.shape == (len(SERVERS), len(METRICS), 0)
