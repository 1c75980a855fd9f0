"""A candidate beside what serves: losses on what was held out, verdict, errors, baseline.

Owns: which sides are compared, and what of a candidate goes on after the verdict. Does not know:
the rule (`gate`), what is held out (`holdout`), how a candidate was trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetcast.drift.literal.baseline import Baseline
from fleetcast.forecast.naive import NaiveForecaster
from fleetcast.forecast.predictor import Forecaster
from fleetcast.forecast.versions import Version
from fleetcast.schema import Longs
from fleetcast.settings import Settings
from fleetcast.training.gate import GateVerdict, judge
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.holdout import HoldOut, Losses, mean_errors
from fleetcast.training.sampler import ChangedSeries
from fleetcast.training.specialists import routed
from fleetcast.training.trained_baseline import trained_baseline

CANDIDATE, SERVING, FALLBACK = "candidate", "serving", "fallback"


@dataclass(frozen=True)
class Served:
    """A version that can serve, loaded."""

    version: Version
    model: Forecaster


@dataclass(frozen=True, eq=False)
class Judgement:
    """What became of a candidate."""

    model: Forecaster  # each series forecast by the better weights
    verdict: GateVerdict
    errors: Mapping[str, Any]  # mean |p50 - actual| by side, metric and horizon
    baseline: Baseline  # of its data


def judged(
    model: Forecaster,
    serving: Served | None,
    grid: TrainingGrid,
    held_from: Longs,
    changed: tuple[ChangedSeries, ...],
    settings: Settings,
    *,
    is_special: bool,
) -> Judgement:
    """Judge a candidate against what serves (None: the fallback) on the held-out tails.

    Args:
        is_special: whether its last specialist was just made, and nothing else.
        held_from: (server, metric) the first bin that the training did not see.
        changed: what the training was told has changed: these series decide.
    """
    fallback = NaiveForecaster(model.description.grid.horizon_bins)
    specialised = {pair for item in model.specialists for pair in item.changed_ms}
    hold_out = HoldOut(
        grid,
        model.description.grid,
        held_from,
        changed,
        fallback,
        settings.forecast.settle_horizons,
        settings.trainer.seed,
        specialised=specialised,
    )
    sides = {CANDIDATE: hold_out.losses(model), FALLBACK: hold_out.losses(fallback)}
    if serving:
        sides[SERVING] = hold_out.losses(serving.model)
    if model.specialists:
        is_plain = is_special and serving is not None and not serving.model.specialists
        fleet = sides[SERVING] if is_plain else hold_out.losses(Forecaster(model.description, model.weights))
        chosen = routed(model, hold_out, sides[CANDIDATE], fleet, settings.trainer.seed, is_new=is_special)
        model, sides[CANDIDATE] = chosen.model, chosen.losses
    opponent = sides[SERVING] if serving else sides[FALLBACK]
    # a fleet's first model has to beat both the shipped base and the fallback
    is_first = serving is not None and serving.version.is_base
    verdict = judge(
        sides[CANDIDATE],
        opponent,
        hold_out.is_changed,
        grid.metrics,
        settings.trainer.seed,
        sides[FALLBACK] if is_first else None,
    )
    errors = {name: _error_table(side, grid.metrics, hold_out.horizons) for name, side in sides.items()}
    in_service = sides[CANDIDATE] if verdict.promoted else opponent
    days = settings.drift.baseline_days
    baseline = trained_baseline(grid, changed, days, model.version, in_service, hold_out)
    return Judgement(model, verdict, errors, baseline)


def _error_table(
    side: Losses, metrics: tuple[str, ...], horizons: tuple[int, ...]
) -> dict[str, dict[str, float | None]]:
    table, _ = mean_errors(side)
    return {
        metric: {
            str(horizon): None if np.isnan(table[row, column]) else round(float(table[row, column]), 5)
            for column, horizon in enumerate(horizons)
        }
        for row, metric in enumerate(metrics)
    }
