"""What a training moves: a specialist for what changed, or the fleet's weights."""

from pathlib import Path

import pytest
from oracle_fleet import grid

from fleetcast.forecast.checkpoint import MOST_SPECIALISTS, Specialist
from fleetcast.forecast.predictor import Forecaster
from fleetcast.schema import ChangedSeries
from fleetcast.training.specialists import choose_scope

FLEET = grid()  # six servers, cpu_pct and mem_pct
CHANGED = (ChangedSeries(1, 0, 3900), ChangedSeries(2, 1, 3950))
SINCE_MS = 3900 * 300_000


def model(*specialists: Specialist) -> Forecaster:
    plain = Forecaster.load(Path(__file__).parent / "data" / "model_format_1.ckpt")
    return Forecaster(plain.description, plain.weights, specialists)


def specialist(*series: tuple[str, str], by: float = 0.5) -> Specialist:
    weights = model().weights
    bias = weights["output_layer.bias"] + by
    return Specialist({**weights, "output_layer.bias": bias}, dict.fromkeys(series, SINCE_MS))


def test_a_change_is_learned_by_a_specialist_from_the_weights_of_the_fleet() -> None:
    start = model()
    found = choose_scope(FLEET, CHANGED, start, 0.5)
    assert found.makes_specialist
    assert found.shown == CHANGED
    assert found.changed_ms == {("web-1", "cpu_pct"): SINCE_MS, ("web-2", "mem_pct"): 3950 * 300_000}
    assert found.begun is start.weights
    assert found.kept == ()


def test_the_same_change_again_goes_on_from_its_specialist() -> None:
    known = specialist(("web-1", "cpu_pct"), ("web-2", "mem_pct"))
    found = choose_scope(FLEET, CHANGED, model(known), 0.5)
    assert found.begun is known.weights
    assert found.kept == (), "its series are all told again"


def test_another_change_gets_one_of_its_own_and_leaves_the_first_as_it_is() -> None:
    known = specialist(("web-4", "cpu_pct"), ("web-1", "cpu_pct"))
    start = model(known)
    found = choose_scope(FLEET, CHANGED, start, 0.5)
    assert found.begun is start.weights or found.begun is known.weights
    assert [item.changed_ms for item in found.kept] == [{("web-4", "cpu_pct"): SINCE_MS}]
    assert found.kept[0].weights is known.weights


@pytest.mark.parametrize("told", [(), CHANGED])
def test_without_a_model_there_is_nothing_to_specialise(told: tuple[ChangedSeries, ...]) -> None:
    found = choose_scope(FLEET, told, None, 0.5)
    assert (found.makes_specialist, found.begun, found.shown) == (False, None, told)


def test_told_of_nothing_or_of_much_the_fleet_is_trained() -> None:
    start = model(specialist(("web-4", "cpu_pct"), ("gone", "cpu_pct")))
    calendar = choose_scope(FLEET, (), start, 0.5)
    assert not calendar.makes_specialist
    assert calendar.begun is start.weights
    assert calendar.shown == (ChangedSeries(4, 0, 3900),), "what a specialist knows is shown to the fleet"
    assert [set(item.changed_ms) for item in calendar.kept] == [{("web-4", "cpu_pct")}], (
        "the gone is left out"
    )
    many = tuple(ChangedSeries(row, column, 3900) for row in range(3) for column in range(2))
    assert choose_scope(FLEET, many, model(), 0.5).makes_specialist
    assert not choose_scope(FLEET, many, start, 0.5).makes_specialist, (
        "with the specialist's it is more than half"
    )
    assert not choose_scope(FLEET, CHANGED, model(), 0.0).makes_specialist, "0 turns it off"


def test_with_as_many_specialists_as_there_may_be_the_fleet_learns() -> None:
    full = [specialist((f"web-{row}", "mem_pct")) for row in (0, 3, 4, 5)]
    assert len(full) == MOST_SPECIALISTS
    found = choose_scope(FLEET, CHANGED, model(*full), 1.0)
    assert not found.makes_specialist
    assert len(found.shown) == len(CHANGED) + MOST_SPECIALISTS
    again = (ChangedSeries(0, 1, 3900),)
    assert choose_scope(FLEET, again, model(*full), 1.0).makes_specialist, "one that goes on is not one more"
