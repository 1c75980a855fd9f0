"""The rolling array: cells stay where their bin is, whatever is moved, grown or forgotten."""

import numpy as np
import pytest

from fleetcast.serving.history import BinGrid

BIN = 300_000


def put(grid: BinGrid, row: int, bin_number: int, value: float) -> None:
    grid.put(np.array([row], dtype=np.int32), np.array([bin_number * BIN]), np.array([[value]]))


def test_a_young_grid_shows_only_the_bins_it_has() -> None:
    grid = BinGrid(1, BIN, keep_bins=10)
    assert grid.view(3).shape == (3, 1, 0)
    grid.advance(5 * BIN)
    put(grid, 0, 5, 1.0)
    grid.advance(7 * BIN)
    put(grid, 0, 7, 3.0)
    np.testing.assert_array_equal(grid.view(1)[0, 0], np.array([1.0, np.nan, 3.0], dtype=np.float32))


def test_it_never_shows_more_than_it_keeps() -> None:
    grid = BinGrid(1, BIN, keep_bins=4)
    for number in range(2000):
        grid.advance(number * BIN)
        put(grid, 0, number, float(number))
    assert grid.view(1)[0, 0].tolist() == [1996.0, 1997.0, 1998.0, 1999.0]


@pytest.mark.parametrize("jump", [1, 3, 95, 96, 97, 400])
def test_a_jump_keeps_what_is_young_enough(jump: int) -> None:
    grid = BinGrid(1, BIN, keep_bins=300)
    for number in range(290):
        grid.advance(number * BIN)
        put(grid, 0, number, float(number))
    grid.advance((289 + jump) * BIN)
    put(grid, 0, 289 + jump, 7.0)
    shown = grid.view(1)[0, 0]
    known = {289 + jump - (len(shown) - 1 - i): v for i, v in enumerate(shown.tolist()) if not np.isnan(v)}
    expected = {n: float(n) for n in range(290) if n > 289 + jump - 300} | {289 + jump: 7.0}
    assert known == expected


def test_cells_out_of_reach_are_dropped() -> None:
    grid = BinGrid(1, BIN, keep_bins=3)
    grid.advance(10 * BIN)
    put(grid, 0, 11, 1.0)
    put(grid, 0, 7, 1.0)
    assert grid.view(1).size == 0
    put(grid, 0, 8, 2.0)
    assert grid.view(1)[0, 0, 0] == 2.0


def test_rows_are_made_as_needed_and_empty() -> None:
    grid = BinGrid(1, BIN, keep_bins=3)
    grid.advance(0)
    put(grid, 500, 0, 5.0)
    assert np.isnan(grid.view(501)[:500]).all()
    assert grid.view(501)[500, 0, 0] == 5.0


def test_kept_rows_move_up_in_order() -> None:
    grid = BinGrid(1, BIN, keep_bins=3)
    grid.advance(0)
    for row in range(5):
        put(grid, row, 0, float(row))
    grid.keep_rows(np.array([1, 4], dtype=np.int32))
    assert grid.view(2)[:, 0, 0].tolist() == [1.0, 4.0]
    assert np.isnan(grid.view(5)[2:]).all()
