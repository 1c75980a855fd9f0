"""Which series a specialist forecasts in the end: those it surely forecasts better."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle_fleet import SHAPE, grid
from test_specialist_scope import CHANGED, model, specialist

from fleetcast.forecast.checkpoint import Specialist
from fleetcast.forecast.naive import NaiveForecaster
from fleetcast.forecast.predictor import Forecaster
from fleetcast.training.holdout import HoldOut, Losses, Sample, first_held_bins
from fleetcast.training.specialists import route

FLEET = grid()
NAMED = (("web-1", "cpu_pct"), ("web-2", "mem_pct"))
OLDER = {(3, 0): ("web-3", "cpu_pct")}


@pytest.fixture(scope="module")
def hold_out() -> HoldOut:
    torch.set_num_threads(1)
    first = first_held_bins(FLEET, CHANGED, 0.1, 288)
    return HoldOut(FLEET, SHAPE, first, CHANGED, (1, 12, 96), Sample(1))


@pytest.fixture(scope="module")
def fleet(hold_out: HoldOut) -> Losses:
    return hold_out.losses(NaiveForecaster(96))


def costing(fleet: Losses, shares: dict[tuple[int, int], float], noise: float = 0.0) -> Losses:
    """Return losses that are shares of the fleet's, by (server, metric), window by window."""
    pinball = fleet.pinball.copy()
    random = np.random.default_rng(1)
    for (row, column), share in shares.items():
        pinball[:, row, column] *= share + noise * random.normal(0, 1, len(pinball))
    return replace(fleet, pinball=pinball)


def series_of(model: Forecaster) -> list[set[tuple[str, str]]]:
    return [set(item.changed_ms) for item in model.specialists]


def route_new(
    hold_out: HoldOut,
    fleet: Losses,
    shares: dict[tuple[int, int], float],
    *,
    noise: float = 0.0,
    older: tuple[Specialist, ...] = (),
) -> tuple[Forecaster, Losses]:
    """Route a specialist whose series are NAMED and costs these shares of the fleet's weights."""
    everywhere = costing(fleet, {**shares, **dict.fromkeys(OLDER, 1.5)}, noise)
    named = {(1, 0), (2, 1), *OLDER}
    own = costing(fleet, {place: share for place, share in shares.items() if place in named}, noise)

    class Played(HoldOut):
        def losses(self, predictor: object) -> Losses:
            return everywhere

    hold_out.__class__ = Played
    try:
        return route(model(*older, specialist(*NAMED)), hold_out, own, fleet, 1, is_new=True)
    finally:
        hold_out.__class__ = HoldOut


def test_a_named_series_goes_to_the_specialist_where_it_is_better_and_back_where_not(
    hold_out: HoldOut, fleet: Losses
) -> None:
    routed, losses = route_new(hold_out, fleet, {(1, 0): 0.9, (2, 1): 1.1})
    assert series_of(routed) == [{NAMED[0]}]
    np.testing.assert_allclose(losses.pinball[:, 1, 0], 0.9 * fleet.pinball[:, 1, 0])
    np.testing.assert_array_equal(losses.pinball[:, 2, 1], fleet.pinball[:, 2, 1])


def test_a_gain_that_time_does_not_bear_out_is_none(hold_out: HoldOut, fleet: Losses) -> None:
    assert series_of(route_new(hold_out, fleet, {(1, 0): 0.99, (2, 1): 0.8}, noise=0.5)[0]) == [{NAMED[1]}]


def test_no_gain_no_specialist(hold_out: HoldOut, fleet: Losses) -> None:
    routed, losses = route_new(hold_out, fleet, {})
    assert series_of(routed) == []
    np.testing.assert_array_equal(losses.pinball, fleet.pinball)


def test_a_new_specialist_that_gains_nothing_leaves_an_older_one_as_it_is(
    hold_out: HoldOut, fleet: Losses
) -> None:
    before = specialist(*OLDER.values())
    routed, losses = route_new(hold_out, fleet, {(3, 0): 0.7, (1, 0): 1.2}, older=(before,))
    assert series_of(routed) == [set(OLDER.values())]
    np.testing.assert_allclose(losses.pinball[:, 3, 0], 0.7 * fleet.pinball[:, 3, 0])
    np.testing.assert_array_equal(losses.pinball[:, 1, 0], fleet.pinball[:, 1, 0])


def test_a_series_that_nobody_named_joins_where_it_is_far_better(hold_out: HoldOut, fleet: Losses) -> None:
    routed, losses = route_new(
        hold_out, fleet, {(1, 0): 0.8, (2, 1): 0.8, (5, 0): 0.7, (0, 1): 0.95, (3, 1): 1.3}
    )
    assert series_of(routed) == [{*NAMED, ("web-5", "cpu_pct")}]
    (made,) = routed.specialists
    assert made.changed_ms["web-5", "cpu_pct"] in {made.changed_ms[pair] for pair in NAMED}
    np.testing.assert_allclose(losses.pinball[:, 5, 0], 0.7 * fleet.pinball[:, 5, 0])
    np.testing.assert_array_equal(losses.pinball[:, 3, 1], fleet.pinball[:, 3, 1])


def test_an_older_specialist_loses_what_the_fleet_forecasts_better(hold_out: HoldOut, fleet: Losses) -> None:
    both = model(specialist(("web-0", "cpu_pct"), ("web-3", "cpu_pct")), specialist(("web-5", "cpu_pct")))
    own = costing(fleet, {(0, 0): 0.9, (3, 0): 1.2, (5, 0): 0.99})
    routed, losses = route(both, hold_out, own, fleet, 1, is_new=False)
    assert series_of(routed) == [{("web-0", "cpu_pct")}, {("web-5", "cpu_pct")}]
    np.testing.assert_array_equal(losses.pinball[:, 3, 0], fleet.pinball[:, 3, 0])


def test_a_routedwithout_specialists_is_what_it_was(hold_out: HoldOut, fleet: Losses) -> None:
    plain: Forecaster = model()
    routed, losses = route(plain, hold_out, fleet, fleet, 1, is_new=False)
    assert routed is plain
    assert losses is fleet
