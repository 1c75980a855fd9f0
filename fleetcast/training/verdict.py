"""What a training leaves behind: verdict, baseline, reference.

Owns: which sides are compared on the held-out tails, which days and errors the baseline holds,
and from which data the drift reference is learned. Does not know: the rule (`gate`), what is held
out (`holdout`), how a challenger was trained, how drift is measured.

Baseline and reference describe the newest data whatever the verdict is: of a rejected challenger
too, so that the same drift is not judged twice.
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
from fleetcast.drift.seasonal.settled import read_grid
from fleetcast.forecast.checkpoint import series_of
from fleetcast.forecast.predictor import Forecaster
from fleetcast.forecast.registry import Version
from fleetcast.schema import ChangedSeries, Floats32, Longs, ReadForecasts
from fleetcast.settings import DriftSettings, Settings
from fleetcast.training.gate import GateVerdict, Sides, judge
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.holdout import HoldOut, Losses, Sample, mean_errors
from fleetcast.training.served import served_losses
from fleetcast.training.specialists import route

# the sides, as the manifest names them
CHALLENGER, CHAMPION, FALLBACK = "candidate", "serving", "fallback"


@dataclass(frozen=True)
class Champion:
    """A version that may serve, loaded."""

    version: Version
    model: Forecaster


@dataclass(frozen=True, eq=False)
class Challenger:
    """A trained model after its verdict."""

    model: Forecaster  # each series forecast by the better weights
    verdict: GateVerdict
    compared_with: str  # the champion's version, or the fallback
    errors: Mapping[str, Any]  # mean |p50 - actual| by side, metric and horizon
    served_errors: Mapping[str, Any]  # the same of what clients get; empty where the models' own goes out
    baseline: Baseline  # of its data, with the errors to expect if the verdict is followed
    baseline_if_held: Baseline  # the same, if a person holds it back and the champion stays


def judge_challenger(
    model: Forecaster,
    champion: Champion | None,
    grid: TrainingGrid,
    first_held: Longs,
    changed: tuple[ChangedSeries, ...],
    settings: Settings,
    *,
    has_new_specialist: bool,
) -> Challenger:
    """Judge a model against the champion (None: the fallback) on the held-out tails.

    Args:
        first_held: (server, metric) the first bin that the training did not see.
        changed: the series named to the training: these decide.
        has_new_specialist: whether its last specialist was just made, and nothing else.
    """
    seed = settings.trainer.seed
    is_layered = settings.forecast.feedback == "on"  # else clients get what the models say
    always = series_of(model.specialists)
    sample = Sample(seed, always=always) if is_layered else Sample(seed, always=always, replayed_series=0)
    horizons = settings.forecast.settle_horizons
    hold_out = HoldOut(grid, model.description.grid, first_held, changed, horizons, sample)
    sides = {CHALLENGER: hold_out.losses(model), FALLBACK: hold_out.losses(hold_out.fallback)}
    if champion:
        sides[CHAMPION] = hold_out.losses(champion.model)
    if model.specialists:
        is_plain = has_new_specialist and champion is not None and not champion.model.specialists
        fleet = sides[CHAMPION] if is_plain else hold_out.losses(Forecaster(model.description, model.weights))
        model, sides[CHALLENGER] = route(
            model, hold_out, sides[CHALLENGER], fleet, seed, is_new=has_new_specialist
        )
    # a fleet's first model has to beat both the shipped base and the fallback
    is_first = champion is not None and champion.version.is_base
    served = served_losses(hold_out, sides) if is_layered else {}
    verdict = judge(
        _against(sides, is_first=is_first),
        hold_out.is_changed,
        grid.metrics,
        seed,
        _against(served, is_first=is_first) if served else None,
    )
    sketch = training_baseline(grid, changed, settings.drift.baseline_days, model.version)
    in_service = sides[CHALLENGER] if verdict.promoted else _opponent(sides)
    return Challenger(
        model,
        verdict,
        champion.version.id if champion else FALLBACK,
        _error_tables(sides, grid.metrics, hold_out.horizons),
        _error_tables(served, grid.metrics, hold_out.horizons),
        with_errors(sketch, in_service, hold_out),
        with_errors(sketch, _opponent(sides), hold_out),
    )


def _opponent(sides: Mapping[str, Losses]) -> Losses:
    return sides.get(CHAMPION, sides[FALLBACK])


def _against(sides: Mapping[str, Losses], *, is_first: bool) -> Sides:
    return Sides(sides[CHALLENGER], _opponent(sides), sides[FALLBACK] if is_first else None)


def _error_tables(
    sides: Mapping[str, Losses], metrics: tuple[str, ...], horizons: tuple[int, ...]
) -> dict[str, Any]:
    return {name: _error_table(side, metrics, horizons) for name, side in sides.items()}


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


def training_baseline(
    grid: TrainingGrid, changed: tuple[ChangedSeries, ...], days: float, version_id: str
) -> Baseline:
    """Sketch the newest days, a changed series since its change; the errors to expect are not in it."""
    n_bins = min(grid.n_bins, round(days * DAY_MS / grid.bin_ms))
    first = grid.n_bins - n_bins
    values = _since_changes(grid.values[:, :, first:], first, changed)
    start_ms = grid.start_ms + first * grid.bin_ms
    return Baseline.from_grid(values, start_ms, grid.bin_ms, grid.server_names, grid.metrics, version_id)


def with_errors(sketch: Baseline, in_service: Losses, hold_out: HoldOut) -> Baseline:
    """Return a baseline with the errors to expect.

    Args:
        in_service: what the forecasts of the model in service from now on cost on `hold_out`.
    """
    by_metric, by_series = mean_errors(in_service)
    shape = (len(sketch.server_names), len(sketch.metrics))
    series_errors = np.full(shape, np.nan, np.float32)
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


def training_reference(
    grid: TrainingGrid, changed: Sequence[ChangedSeries], read: ReadForecasts, settings: DriftSettings
) -> Reference:
    """Learn the drift reference of a training's data and of the errors known so far.

    The errors are those of the forecasts that clients got on those days, as settled. Before a first
    model there are none; the statistic that needs them begins when the reference is renewed.

    Args:
        changed: known changes; the days before a change do not count.
        read: settled forecasts one bin ahead.
    """
    changed_ms = np.full(grid.values.shape[:2], np.nan)
    for item in changed:
        changed_ms[item.server, item.metric] = grid.start_ms + item.since_bin * grid.bin_ms
    settled = read_grid(read, grid.server_names, grid.metrics, (grid.start_ms, grid.end_ms), grid.bin_ms)
    return learn_reference(replace(settled, values=grid.values), settings, changed_ms)
