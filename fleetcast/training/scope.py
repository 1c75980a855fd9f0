"""Which of a model's weights a training moves, and which series they forecast afterwards.

Owns: when a change is learned by a specialist and when by the fleet's model, and from which weights.
Does not know: how weights are trained, which series a specialist forecasts in the end (`routing`).

A training that is told what changed makes a specialist: weights for the series that changed,
a copy of those that served most of them, and trained on. All other weights, and with them the
forecasts of every other series, stay as they are. Told of more than a share of the fleet, or of
nothing, or with as many specialists as a model may hold, a training moves the fleet's weights.
docs/decisions/specialist.md has the figures.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fleetcast.forecast.checkpoint import MOST_SPECIALISTS, Specialist, Weights
from fleetcast.forecast.predictor import Forecaster
from fleetcast.schema import Series
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.sampler import ChangedSeries


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


def scope_of(
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
