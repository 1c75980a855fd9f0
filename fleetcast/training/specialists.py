"""Which series the specialists of a candidate forecast, by what was held out.

Owns: the choice between a specialist and the fleet's weights, series by series. Does not know:
how weights were trained, whether the candidate may serve (`gate`).

A series that a training was told of goes to the specialist that was made for it where its loss is
lower in 9 of 10 resamples of time; where too little is held out to say, where it is lower. So does
a series that nobody named, where its loss is lower by a tenth and in 19 of 20: what changed on
some servers has often changed on others that no limit was passed by. An older specialist loses
a series that the fleet's weights forecast better.

Which of a model's weights a training moves, and which series they forecast afterwards.

Owns: when a change is learned by a specialist and when by the fleet's model, and from which weights.
Does not know: how weights are trained, which series a specialist forecasts in the end (`routing`).

A training that is told what changed makes a specialist: weights for the series that changed,
a copy of those that served most of them, and trained on. All other weights, and with them the
forecasts of every other series, stay as they are. Told of more than a share of the fleet, or of
nothing, or with as many specialists as a model may hold, a training moves the fleet's weights.
docs/decisions/specialist.md has the figures.
"""

import logging
from collections.abc import Container, Iterator, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fleetcast.forecast.predictor import MOST_SPECIALISTS, Forecaster, Specialist, Weights
from fleetcast.schema import ChangedSeries, Series
from fleetcast.training.gate import CONFIDENCE, MIN_BLOCKS, compare
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.holdout import HoldOut, Losses


@dataclass(frozen=True, eq=False)
class Scope:
    """What one training moves."""

    shown: tuple[ChangedSeries, ...]  # whose new behaviour a batch shows
    begun: Weights | None  # what it starts from; None = fresh
    kept: tuple[Specialist, ...] = ()  # the others, with the series they still forecast
    changed_ms: dict[Series, int] | None = None  # of the specialist that is made; None = the fleet's training

    @property
    def is_special(self) -> bool:
        """Whether a specialist is trained, and not the fleet's weights."""
        return self.changed_ms is not None


def choose_scope(
    grid: TrainingGrid, changed: Sequence[ChangedSeries], start: Forecaster | None, largest_share: float
) -> Scope:
    """Decide what a training moves.

    Args:
        changed: what it is told has changed; nothing = a training of the whole fleet.
        start: what it continues.
        largest_share: of the series, beyond which a change is the fleet's.
    """
    if start is None:
        return Scope(tuple(changed), None)
    told = {
        (grid.server_names[item.server], grid.metrics[item.metric]): grid.start_ms
        + item.since_bin * grid.bin_ms
        for item in changed
    }
    held = _recorded(grid, start.specialists)
    others = without(held, told)
    n_special = len(told.keys() | {pair for item in held for pair in item.changed_ms})
    is_small = n_special <= largest_share * len(grid.server_names) * len(grid.metrics)
    if told and is_small and len(others) < MOST_SPECIALISTS:
        return Scope(tuple(changed), _most_used(start, held, told), others, told)
    earlier = (_places(grid, item) for item in others)
    return Scope((*changed, *(place for places in earlier for place in places)), start.weights, held)


def _told(grid: TrainingGrid, changed: Sequence[ChangedSeries]) -> dict[Series, int]:
    names, metrics = grid.server_names, grid.metrics
    begin_ms, bin_ms = grid.start_ms, grid.bin_ms
    return {
        (names[item.server], metrics[item.metric]): begin_ms + item.since_bin * bin_ms for item in changed
    }


def _recorded(grid: TrainingGrid, specialists: Sequence[Specialist]) -> tuple[Specialist, ...]:
    """Return the specialists for the series that are still recorded."""
    known = {(server, metric) for server in grid.server_names for metric in grid.metrics}
    gone = {pair for item in specialists for pair in item.changed_ms if pair not in known}
    return without(specialists, gone)


def without(specialists: Sequence[Specialist], series: Container[Series]) -> tuple[Specialist, ...]:
    """Return specialists without some series; one without any is none."""
    left = (
        replace(item, changed_ms={pair: ms for pair, ms in item.changed_ms.items() if pair not in series})
        for item in specialists
    )
    return tuple(item for item in left if item.changed_ms)


def _most_used(start: Forecaster, specialists: Sequence[Specialist], told: dict[Series, int]) -> Weights:
    """Return the weights that forecast most of the series told of."""
    counts = [sum(pair in item.changed_ms for pair in told) for item in specialists]
    by_fleet = len(told) - sum(counts)
    if not counts or by_fleet >= max(counts):
        return start.weights
    return specialists[int(np.argmax(counts))].weights


def _places(grid: TrainingGrid, specialist: Specialist) -> list[ChangedSeries]:
    return [
        ChangedSeries(
            grid.server_names.index(server), grid.metrics.index(metric), max(0, grid.bin_of(changed_ms))
        )
        for (server, metric), changed_ms in sorted(specialist.changed_ms.items())
    ]


logger = logging.getLogger(__name__)

UNTOLD_LOSS = 0.9  # of that by the fleet's weights, for a series that nobody named
UNTOLD_CONFIDENCE = 0.95

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Routed:
    """A candidate that forecasts each series by the better weights, and what that costs."""

    model: Forecaster
    losses: Losses


def route(
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
