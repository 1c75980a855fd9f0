"""Claims about the compact grid."""

import numpy as np
import pytest

from fleetcast.forecast.encoding import GridShape

MINUTES_5 = 300_000


def test_five_minute_bins_and_eight_hours_give_the_measured_grid() -> None:
    shape = GridShape(MINUTES_5, 96)
    assert (shape.n_past, shape.n_knots, shape.season_bins) == (68, 26, 288)
    assert shape.knot_ends.tolist() == [*range(1, 13), *range(18, 97, 6)]


@pytest.mark.parametrize("horizon", [1, 5, 12, 13, 96, 97, 480, 2016])
def test_knots_cover_every_bin_of_any_horizon_once(horizon: int) -> None:
    shape = GridShape(MINUTES_5, horizon)
    covered = [
        list(range(start, end + 1)) for start, end in zip(shape.knot_starts, shape.knot_ends, strict=True)
    ]
    assert [bin_ for knot in covered for bin_ in knot] == list(range(1, horizon + 1))
    assert shape.n_knots <= 40


@pytest.mark.parametrize("horizon", [1, 12, 96, 2016])
def test_bins_are_interpolated_with_weights_that_sum_to_one(horizon: int) -> None:
    weights = GridShape(MINUTES_5, horizon).interpolation()
    assert weights.shape == (GridShape(MINUTES_5, horizon).n_knots, horizon)
    np.testing.assert_allclose(weights.sum(axis=0), 1.0, rtol=1e-6)
    assert (weights >= 0).all()


def test_a_straight_line_through_the_knots_is_a_straight_line_through_the_bins() -> None:
    shape = GridShape(MINUTES_5, 96)
    centres = (shape.knot_starts + shape.knot_ends) / 2
    line = centres @ shape.interpolation()
    np.testing.assert_allclose(line[:93], np.arange(1, 94), rtol=1e-6)  # flat beyond the last centre


def test_the_next_bin_counts_most_and_a_knot_shares_its_weight() -> None:
    weights = GridShape(MINUTES_5, 96).bin_weights()
    assert weights[:2].tolist() == [8.0, 2.0]
    assert weights[12:18].sum() == pytest.approx(1.0)


def test_a_shape_survives_a_checkpoint() -> None:
    shape = GridShape(60_000, 480)
    assert GridShape.from_config(shape.as_config()) == shape
