"""The baseline a training leaves behind: the newest days it saw, and the errors to expect now.

Owns: which days and which errors go into it. Does not know: what a baseline is used for, how
a model was trained.
"""

from dataclasses import replace

import numpy as np

from fleetcast.bins import RECENT_BINS
from fleetcast.drift.literal.baseline import Baseline
from fleetcast.schema import Floats32, Longs
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.holdout import HoldOut, Losses, mean_errors
from fleetcast.training.sampler import ChangedSeries

_DAY_MS = 86_400_000


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
    n_bins = min(grid.n_bins, round(days * _DAY_MS / grid.bin_ms))
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
