"""Which of a model's weights a training moves, and which series they forecast afterwards.

Owns: when a change is learned by a specialist and when by the fleet's model, and which series a
specialist keeps. Does not know: how weights are trained, the gate's rule, files.

A training that is told what changed moves the weights of a specialist alone: a copy of the fleet's
weights at first, later its own. The fleet's weights, and with them the forecasts of every series
that did not change, stay as they are, bit for bit. Told of more than a share of the fleet, or of
nothing, a training moves the fleet's weights. docs/decisions/specialist.md has the figures.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fleetcast.model.forecaster import Forecaster
from fleetcast.model.holdout import HoldOut, Losses
from fleetcast.model.sampler import ChangedSeries
from fleetcast.model.traingrid import TrainingGrid
from fleetcast.schema import Series

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scope:
    """What one training is about."""

    is_special: bool  # it moves the specialist's weights, not the fleet's
    shown: tuple[ChangedSeries, ...]  # whose new behaviour a batch shows
    series: frozenset[Series]  # the specialist's


def scope_of(
    grid: TrainingGrid,
    changed: Sequence[ChangedSeries],
    known: Sequence[ChangedSeries],
    start: Forecaster | None,
    largest_share: float,
) -> Scope:
    """Decide what a training moves.

    Args:
        changed: what it is told has changed; nothing = a training of the whole fleet.
        known: earlier changes, too, of the series a specialist forecasts already.
        start: what it continues.
        largest_share: of the series, beyond which a change is the fleet's.
    """
    held = _held(grid, start)
    told = frozenset((grid.server_names[item.server], grid.metrics[item.metric]) for item in changed)
    n_series = len(grid.server_names) * len(grid.metrics)
    if start is None or not told or len(held | told) > largest_share * n_series:
        return Scope(False, tuple(changed), held)
    return Scope(True, (*changed, *_earlier(grid, held - told, known)), held | told)


def _held(grid: TrainingGrid, start: Forecaster | None) -> frozenset[Series]:
    """Return the specialist's series that are still recorded."""
    if start is None or start.specialist is None:
        return frozenset()
    servers, metrics = set(grid.server_names), set(grid.metrics)
    return frozenset(pair for pair in start.specialist.series if pair[0] in servers and pair[1] in metrics)


def _earlier(
    grid: TrainingGrid, series: frozenset[Series], known: Sequence[ChangedSeries]
) -> list[ChangedSeries]:
    """Return the specialist's other series since they changed; all along where nobody knows when."""
    since = {(item.server, item.metric): item.since_bin for item in known}
    places = [
        (grid.server_names.index(server), grid.metrics.index(metric)) for server, metric in sorted(series)
    ]
    return [ChangedSeries(*place, since.get(place, 0)) for place in places]


def pruned(model: Forecaster, hold_out: HoldOut, own: Losses, fleet: Losses) -> tuple[Forecaster, Losses]:
    """Return a model whose specialist keeps only the series it forecasts better, and what it costs.

    Args:
        own: what the model's forecasts cost; fleet: what they would by the fleet's weights alone.
            Series of which the held-out tail holds no window stay as they are.
    """
    if model.specialist is None:
        return model, own
    known = np.isfinite(fleet.pinball) & np.isfinite(own.pinball)
    gain = np.where(known, fleet.pinball - own.pinball, 0.0).sum(axis=0)  # (server, metric)
    is_lost = hold_out.places(model.specialist.series) & (gain <= 0) & known.any(axis=0)
    kept = model.specialist.series - hold_out.names(is_lost)
    logger.info("specialist keeps series=%d of=%d", len(kept), len(model.specialist.series))
    specialist = replace(model.specialist, series=kept) if kept else None
    losses = replace(
        own,
        pinball=np.where(is_lost, fleet.pinball, own.pinball),
        errors=np.where(is_lost[..., None], fleet.errors, own.errors),
    )
    return Forecaster(model.description, model.weights, specialist), losses
