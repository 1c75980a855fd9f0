"""A reference by the settings: of a fleet of any size, minding when single series changed.

Owns: how settings become a reference, learning large fleets in parts, and what a known change
leaves of a series. Does not know: where bins come from, files.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fleetcast.drift.seasonal.quorum import QuorumRule
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.drift.seasonal.reference_merge import merged
from fleetcast.drift.seasonal.season import DAY_MS, DayClock
from fleetcast.drift.seasonal.settled import ReadForecasts, read_grid
from fleetcast.drift_settings import DriftSettings
from fleetcast.schema import Floats, Floats32, Longs

if TYPE_CHECKING:
    from fleetcast.training.grid import TrainingGrid
    from fleetcast.training.sampler import ChangedSeries

SERVERS_AT_ONCE = 500  # some 2 GB of passing arrays at 30 days of 4 metrics


def quorum_rule(settings: DriftSettings) -> QuorumRule:
    """Return how many series make a fleet's drift."""
    return QuorumRule(quorum=settings.quorum, sustained_quorum=settings.sustained_quorum)


def learned_reference(
    values: Floats32,
    server_names: tuple[str, ...],
    metrics: tuple[str, ...],
    start_ms: int,
    bin_ms: int,
    settings: DriftSettings,
    *,
    errors: Floats32 | None = None,
    changed_ms: Floats | None = None,
) -> Reference:
    """Learn a reference from the newest `reference_days` of a grid.

    Args:
        values, errors: (server, metric, bin) as `Reference.fit` takes them.
        changed_ms: (server, metric) when a series is known to have changed, NaN = never. Its days
            count from the next midnight on.
    """
    n_bins = values.shape[2]
    first = max(0, n_bins - settings.reference_days * DAY_MS // bin_ms)
    start_ms += first * bin_ms
    values = values[:, :, first:]
    errors = None if errors is None else errors[:, :, first:]
    changes = np.full(values.shape[:2], np.nan) if changed_ms is None else changed_ms
    clock = DayClock(bin_ms, settings.timezone)
    starts = start_days(changes, start_ms, clock)
    learned: Reference | None = None
    step = max(1, -(-len(server_names) // SERVERS_AT_ONCE))
    for offset in range(step):  # every step-th server: each part is a fleet in small
        rows = slice(offset, None, step)
        part = Reference.fit(
            values[rows],
            server_names[rows],
            metrics,
            start_ms,
            bin_ms,
            errors=None if errors is None else errors[rows],
            changed_ms=_midnights(starts[rows], start_ms, clock),
            timezone=settings.timezone,
            rule=quorum_rule(settings),
            false_alarms_per_month=settings.false_alarms_per_month,
            min_days=settings.min_reference_days,
        )
        part = replace(part, start_days=np.maximum(part.start_days, starts[rows].ravel()))
        learned = part if learned is None else merged(learned, part)
    assert learned is not None, "there is at least one part"
    return learned


def training_reference(
    grid: "TrainingGrid", changed: "Sequence[ChangedSeries]", read: ReadForecasts, settings: DriftSettings
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
    return learned_reference(
        grid.values,
        grid.server_names,
        grid.metrics,
        grid.start_ms,
        grid.bin_ms,
        settings,
        errors=settled.errors,
        changed_ms=changed_ms,
    )


def start_days(changed_ms: Floats, start_ms: int, clock: DayClock) -> Longs:
    """Return the first whole local day after each change, counted from that of `start_ms`; 0 = never.

    >>> clock = DayClock(300_000)
    >>> start_days(np.array([np.nan, -5.0, 1.0, DAY_MS * 2.0]), 0, clock).tolist()
    [0, 0, 1, 2]
    """
    since = (changed_ms - start_ms + _into_day(start_ms, clock)) / DAY_MS
    days = np.where(np.nan_to_num(changed_ms, nan=-np.inf) <= start_ms, 0.0, np.ceil(since))
    return np.asarray(np.nan_to_num(days, nan=0.0), np.int64)


def change_times(reference: Reference) -> Floats:
    """Return (server, metric): the midnight before which a series was another, NaN = never."""
    starts = reference.start_days.reshape(len(reference.server_names), -1)
    return _midnights(starts, reference.start_ms, reference.clock)


def _midnights(starts: Longs, start_ms: int, clock: DayClock) -> Floats:
    first_ms = start_ms - _into_day(start_ms, clock)
    return np.asarray(np.where(starts > 0, first_ms + starts * float(DAY_MS), np.nan))


def _into_day(start_ms: int, clock: DayClock) -> int:
    """Return how far into its local day a time is."""
    return int(clock.local_bins(start_ms, 1)[0]) % clock.bins_per_day * clock.bin_ms
