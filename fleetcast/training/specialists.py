"""Which weights a training moves, and which series they forecast afterwards.

Owns: when a change is learned by a specialist and when by the fleet's weights, from which weights
a training starts, and the choice between specialist and fleet, series by series. Does not know:
how weights are trained, whether the challenger may serve (`gate`).

Before the training, `choose_scope`. A training that is given the list of changed series makes a
specialist: weights for the named series, copied from those that forecast most of them and trained
on. All other weights, and with them the forecasts of every other series, stay as they are. A
training moves the fleet's weights instead when no series is named, when the named ones are more
than a share of the fleet, or when the model holds as many specialists as it may.
docs/decisions/specialist.md has the figures.

After the training, `route`. A named series goes to its new specialist where the loss is lower in 9
of 10 resamples of time; where too little is held out to say, where the loss is lower. An unnamed
series joins where its loss is lower by a tenth and in 19 of 20 resamples: a change on some servers
has often happened on others, too, without passing a limit there. An older specialist loses a
series that the fleet's weights forecast better.
"""

import logging
from collections.abc import Container, Iterator, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fleetcast.forecast.checkpoint import MOST_SPECIALISTS, Specialist, series_of
from fleetcast.forecast.predictor import Forecaster
from fleetcast.forecast.selection import Weights
from fleetcast.schema import ChangedSeries, Series
from fleetcast.training.gate import CONFIDENCE, MIN_BLOCKS, compare
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.holdout import HoldOut, Losses

logger = logging.getLogger(__name__)

UNNAMED_LOSS = 0.9  # of that by the fleet's weights, for a series that was not named
UNNAMED_CONFIDENCE = 0.95

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Scope:
    """What one training moves."""

    shown: tuple[ChangedSeries, ...]  # whose new behaviour a batch shows
    begun: Weights | None  # what it starts from; None = fresh
    kept: tuple[Specialist, ...] = ()  # the others, with the series they still forecast
    changed_ms: dict[Series, int] | None = None  # of the new specialist; None = the fleet's training

    @property
    def makes_specialist(self) -> bool:
        """Whether a specialist is trained, and not the fleet's weights."""
        return self.changed_ms is not None


def choose_scope(
    grid: TrainingGrid, changed: Sequence[ChangedSeries], start: Forecaster | None, largest_share: float
) -> Scope:
    """Decide what a training moves.

    Args:
        changed: the named series; none = a training of the whole fleet.
        start: the model that the training continues.
        largest_share: of the series, beyond which a change is the fleet's.
    """
    if start is None:
        return Scope(tuple(changed), None)
    named = {
        (grid.server_names[item.server], grid.metrics[item.metric]): grid.start_ms
        + item.since_bin * grid.bin_ms
        for item in changed
    }
    held = _drop_unrecorded(grid, start.specialists)
    others = _drop_series(held, named)
    n_series = len(named.keys() | series_of(held))
    is_small = n_series <= largest_share * len(grid.server_names) * len(grid.metrics)
    if named and is_small and len(others) < MOST_SPECIALISTS:
        return Scope(tuple(changed), _most_used_weights(start, held, named), others, named)
    earlier = (_places(grid, item) for item in others)
    return Scope((*changed, *(place for places in earlier for place in places)), start.weights, held)


def _drop_unrecorded(grid: TrainingGrid, specialists: Sequence[Specialist]) -> tuple[Specialist, ...]:
    """Return specialists without the series that are no longer recorded."""
    known = {(server, metric) for server in grid.server_names for metric in grid.metrics}
    return _drop_series(specialists, series_of(specialists) - known)


def _drop_series(specialists: Sequence[Specialist], series: Container[Series]) -> tuple[Specialist, ...]:
    """Return specialists without some series; one without any is none."""
    left = (
        replace(item, changed_ms={pair: ms for pair, ms in item.changed_ms.items() if pair not in series})
        for item in specialists
    )
    return tuple(item for item in left if item.changed_ms)


def _most_used_weights(
    start: Forecaster, specialists: Sequence[Specialist], named: dict[Series, int]
) -> Weights:
    """Return the weights that forecast most of the named series."""
    counts = [sum(pair in item.changed_ms for pair in named) for item in specialists]
    by_fleet = len(named) - sum(counts)
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


def route(
    model: Forecaster, hold_out: HoldOut, own: Losses, fleet: Losses, seed: int, *, is_new: bool
) -> tuple[Forecaster, Losses]:
    """Choose the weights of each series; a series without held-out windows stays where it is.

    Args:
        own: what the model's forecasts cost; fleet: what they would by the fleet's weights alone.
        is_new: whether the last specialist was just made.
    Returns:
        the model that forecasts each series by the better weights, and what its forecasts cost.
    """
    if not model.specialists:
        return model, own
    older = model.specialists[:-1] if is_new else model.specialists
    lost = _no_better(hold_out, own, fleet, series_of(older))
    if not is_new:
        return _without(model, lost), _replace(hold_out, own, fleet, lost)
    made = model.specialists[-1]
    lost |= _not_surely_better(hold_out, own, fleet, made.changed_ms.keys(), seed)
    alone = hold_out.losses(Forecaster(model.description, made.weights))
    gained = _far_better(hold_out, alone, fleet, series_of(model.specialists), seed)
    logger.info(
        "specialist made named=%d kept=%d unnamed=%d",
        *(len(made.changed_ms), len(made.changed_ms.keys() - lost), len(gained)),
    )
    since_ms = sorted(made.changed_ms.values())[len(made.changed_ms) // 2]
    wider = replace(made, changed_ms={**made.changed_ms, **dict.fromkeys(gained, since_ms)})
    model = Forecaster(model.description, model.weights, (*older, wider))
    losses = _replace(hold_out, _replace(hold_out, own, fleet, lost), alone, gained)
    return _without(model, lost), losses


def _no_better(hold_out: HoldOut, own: Losses, fleet: Losses, series: Set[Series]) -> set[Series]:
    """Return the series whose loss is no lower than by the fleet's weights."""
    known = np.isfinite(fleet.pinball) & np.isfinite(own.pinball)
    gain = np.where(known, fleet.pinball - own.pinball, 0.0).sum(axis=0)  # (server, metric)
    return set(hold_out.names(hold_out.places(series) & (gain <= 0) & known.any(axis=0)))


def _not_surely_better(
    hold_out: HoldOut, own: Losses, fleet: Losses, series: Set[Series], seed: int
) -> set[Series]:
    """Return the series whose loss is not surely lower; too little evidence does not count against one."""
    lost = _no_better(hold_out, own, fleet, series)
    for name, place in _one_by_one(hold_out, hold_out.places(series)):
        found = compare(own, fleet, place, seed)
        if found.blocks >= MIN_BLOCKS and found.confidence is not None and found.confidence < CONFIDENCE:
            lost.add(name)
    return lost


def _far_better(
    hold_out: HoldOut, alone: Losses, fleet: Losses, excluded: Set[Series], seed: int
) -> set[Series]:
    """Return the series outside `excluded` that the new weights forecast far better."""
    gained = set()
    for name, place in _one_by_one(hold_out, ~hold_out.places(excluded)):
        found = compare(alone, fleet, place, seed)
        if found.ratio is None or found.confidence is None or found.blocks < MIN_BLOCKS:
            continue
        if found.ratio <= UNNAMED_LOSS and found.confidence >= UNNAMED_CONFIDENCE:
            gained.add(name)
    return gained


def _one_by_one(hold_out: HoldOut, places: Bools) -> Iterator[tuple[Series, Bools]]:
    """Yield the chosen series one by one: its name, and its place alone."""
    for row, column in np.argwhere(places).tolist():
        place = np.zeros_like(places)
        place[row, column] = True
        (name,) = hold_out.names(place)
        yield name, place


def _without(model: Forecaster, lost: set[Series]) -> Forecaster:
    return Forecaster(model.description, model.weights, _drop_series(model.specialists, lost))


def _replace(hold_out: HoldOut, losses: Losses, side: Losses, series: Set[Series]) -> Losses:
    """Return losses with another side's for some series."""
    places, quantiles = hold_out.places(series), losses.quantiles
    if quantiles is not None and side.quantiles is not None:
        own = places[hold_out.replayed][..., None, None]
        quantiles = np.where(own, side.quantiles, quantiles)
    return replace(
        losses,
        pinball=np.where(places, side.pinball, losses.pinball),
        errors=np.where(places[..., None], side.errors, losses.errors),
        quantiles=quantiles,
    )
