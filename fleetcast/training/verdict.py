"""A candidate beside what serves: losses on what was held out, verdict, errors, baseline.

Owns: which sides are compared, and what of a candidate goes on after the verdict. Does not know:
the rule (`gate`), what is held out (`holdout`), how a candidate was trained.

The baseline a training leaves behind: the newest days it saw, and the errors to expect now.

Owns: which days and which errors go into it. Does not know: what a baseline is used for, how
a model was trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fleetcast.bins import RECENT_BINS
from fleetcast.clock import DAY_MS
from fleetcast.drift.literal.baseline import Baseline
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.drift.seasonal.renewal import learn_reference
from fleetcast.drift.seasonal.settled import ReadForecasts, read_grid
from fleetcast.forecast.naive import NaiveForecaster
from fleetcast.forecast.predictor import Forecaster
from fleetcast.forecast.registry import Version
from fleetcast.schema import ChangedSeries, Floats32, Longs
from fleetcast.settings import DriftSettings, Settings
from fleetcast.training.gate import GateVerdict, judge
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.holdout import HoldOut, Losses, mean_errors
from fleetcast.training.specialists import route


def trained_baseline(
    grid: TrainingGrid,
    changed: tuple[ChangedSeries, ...],
    days: float,
    version_id: str,
    in_service: Losses,
    hold_out: HoldOut,
) -> Baseline:
    """Sketch the newest days, a changed series since its change, with the errors to expect.

    Args:
        in_service: what the forecasts that serve from now on cost on the windows of `hold_out`.
    """
    n_bins = min(grid.n_bins, round(days * DAY_MS / grid.bin_ms))
    first = grid.n_bins - n_bins
    values = _since_changes(grid.values[:, :, first:], first, changed)
    start_ms = grid.start_ms + first * grid.bin_ms
    sketch = Baseline.from_grid(values, start_ms, grid.bin_ms, grid.server_names, grid.metrics, version_id)
    by_metric, by_series = mean_errors(in_service)
    series_errors = np.full(grid.values.shape[:2], np.nan, np.float32)
    series_errors[hold_out.servers] = by_series
    horizons: Longs = np.array(hold_out.horizons, np.int64)
    return replace(sketch, error_horizons=horizons, error_mae=by_metric, series_error_mae=series_errors)


def _since_changes(values: Floats32, first_bin: int, changed: tuple[ChangedSeries, ...]) -> Floats32:
    """Return a copy without what changed series were before; an hour of values stays at least."""
    kept = values.copy()
    for item in changed:
        before = max(0, item.since_bin - first_bin)
        if np.isfinite(kept[item.server, item.metric, before:]).sum() >= RECENT_BINS:
            kept[item.server, item.metric, :before] = np.nan
    return kept


CANDIDATE, SERVING, FALLBACK = "candidate", "serving", "fallback"


@dataclass(frozen=True)
class Champion:
    """A version that can serve, loaded."""

    version: Version
    model: Forecaster


@dataclass(frozen=True, eq=False)
class Challenger:
    """What became of a candidate."""

    model: Forecaster  # each series forecast by the better weights
    verdict: GateVerdict
    errors: Mapping[str, Any]  # mean |p50 - actual| by side, metric and horizon
    baseline: Baseline  # of its data


def judge_challenger(
    model: Forecaster,
    serving: Champion | None,
    grid: TrainingGrid,
    held_from: Longs,
    changed: tuple[ChangedSeries, ...],
    settings: Settings,
    *,
    is_special: bool,
) -> Challenger:
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
        chosen = route(model, hold_out, sides[CANDIDATE], fleet, settings.trainer.seed, is_new=is_special)
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
    return Challenger(model, verdict, errors, baseline)


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


def training_reference(
    grid: TrainingGrid, changed: Sequence[ChangedSeries], read: ReadForecasts, settings: DriftSettings
) -> Reference:
    """Learn the reference that goes with a model: its training's data, and the errors known so far.

    The errors are those of the models that were in service on those days, as settled: what users
    got. A first model has none yet; the statistic that needs them begins when they are renewed.

    Args:
        changed: what is known to have changed; the days before do not count.
        read: settled forecasts one bin ahead.
    """
    changed_ms = np.full(grid.values.shape[:2], np.nan)
    for item in changed:
        changed_ms[item.server, item.metric] = grid.start_ms + item.since_bin * grid.bin_ms
    settled = read_grid(read, grid.server_names, grid.metrics, (grid.start_ms, grid.end_ms), grid.bin_ms)
    return learn_reference(replace(settled, values=grid.values), settings, changed_ms)
