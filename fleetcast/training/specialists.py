"""Which series the specialists of a candidate forecast, by what was held out.

Owns: the choice between a specialist and the fleet's weights, series by series. Does not know:
how weights were trained, whether the candidate may serve (`gate`).

A series that a training was told of goes to the specialist that was made for it where its loss is
lower in 9 of 10 resamples of time; where too little is held out to say, where it is lower. So does
a series that nobody named, where its loss is lower by a tenth and in 19 of 20: what changed on
some servers has often changed on others that no limit was passed by. An older specialist loses
a series that the fleet's weights forecast better.
"""

import logging
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fleetcast.forecast.predictor import Forecaster
from fleetcast.schema import Series
from fleetcast.training.gate import CONFIDENCE, MIN_BLOCKS, compare
from fleetcast.training.holdout import HoldOut, Losses
from fleetcast.training.scope import without

logger = logging.getLogger(__name__)

UNTOLD_LOSS = 0.9  # of that by the fleet's weights, for a series that nobody named
UNTOLD_CONFIDENCE = 0.95

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Routed:
    """A candidate that forecasts each series by the better weights, and what that costs."""

    model: Forecaster
    losses: Losses


def routed(
    model: Forecaster, hold_out: HoldOut, own: Losses, fleet: Losses, seed: int, *, is_new: bool
) -> Routed:
    """Choose the weights of each series; those that nothing is held out of stay as they are.

    Args:
        own: what the model's forecasts cost; fleet: what they would by the fleet's weights alone.
        is_new: whether the last specialist was just made.
    """
    if not model.specialists:
        return Routed(model, own)
    older = model.specialists[:-1] if is_new else model.specialists
    lost = _outdone(hold_out, own, fleet, {pair for item in older for pair in item.changed_ms})
    if not is_new:
        return Routed(_without(model, lost), _taken(own, fleet, hold_out.places(lost)))
    made = model.specialists[-1]
    lost |= _unsure(hold_out, own, fleet, made.changed_ms.keys(), seed)
    alone = hold_out.losses(Forecaster(model.description, made.weights))
    special = {pair for item in model.specialists for pair in item.changed_ms}
    gained = _surely_better(hold_out, alone, fleet, special, seed)
    logger.info(
        "specialist made told=%d kept=%d untold=%d",
        *(len(made.changed_ms), len(made.changed_ms.keys() - lost), len(gained)),
    )
    since_ms = sorted(made.changed_ms.values())[len(made.changed_ms) // 2]
    wider = replace(made, changed_ms={**made.changed_ms, **dict.fromkeys(gained, since_ms)})
    model = Forecaster(model.description, model.weights, (*older, wider))
    losses = _taken(_taken(own, fleet, hold_out.places(lost)), alone, hold_out.places(gained))
    return Routed(_without(model, lost), losses)


def _outdone(hold_out: HoldOut, own: Losses, fleet: Losses, series: Set[Series]) -> set[Series]:
    """Return the series whose loss is no lower than by the fleet's weights."""
    known = np.isfinite(fleet.pinball) & np.isfinite(own.pinball)
    gain = np.where(known, fleet.pinball - own.pinball, 0.0).sum(axis=0)  # (server, metric)
    return set(hold_out.names(hold_out.places(series) & (gain <= 0) & known.any(axis=0)))


def _unsure(hold_out: HoldOut, own: Losses, fleet: Losses, series: Set[Series], seed: int) -> set[Series]:
    """Return the series whose loss is not surely lower; too little to judge by is not held against it."""
    lost = _outdone(hold_out, own, fleet, series)
    for name, place in _each(hold_out, hold_out.places(series)):
        found = compare(own, fleet, place, seed)
        is_judged = found.blocks >= MIN_BLOCKS and found.confidence is not None
        if is_judged and found.confidence is not None and found.confidence < CONFIDENCE:
            lost.add(name)
    return lost


def _surely_better(
    hold_out: HoldOut, alone: Losses, fleet: Losses, special: Set[Series], seed: int
) -> set[Series]:
    """Return the series that nobody named and that the new weights forecast far better."""
    gained = set()
    for name, place in _each(hold_out, ~hold_out.places(special)):
        found = compare(alone, fleet, place, seed)
        if found.ratio is None or found.confidence is None or found.blocks < MIN_BLOCKS:
            continue
        if found.ratio <= UNTOLD_LOSS and found.confidence >= UNTOLD_CONFIDENCE:
            gained.add(name)
    return gained


def _each(hold_out: HoldOut, places: Bools) -> Iterator[tuple[Series, Bools]]:
    """Yield the chosen series one by one: its name, and its place alone."""
    for row, column in np.argwhere(places).tolist():
        place = np.zeros_like(places)
        place[row, column] = True
        (name,) = hold_out.names(place)
        yield name, place


def _without(model: Forecaster, lost: set[Series]) -> Forecaster:
    return Forecaster(model.description, model.weights, without(model.specialists, lost))


def _taken(losses: Losses, side: Losses, places: Bools) -> Losses:
    """Return losses with another side's in some places (server, metric)."""
    return replace(
        losses,
        pinball=np.where(places, side.pinball, losses.pinball),
        errors=np.where(places[..., None], side.errors, losses.errors),
    )
