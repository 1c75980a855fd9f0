"""The fleet of the loop replay: recorded bins, as they were or with new dynamics from known times on.

Owns: which bins are history and which are replayed, when and where dynamics are injected.
Everything random is seeded here. Does not know: models, policies.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from benchmarks.forecast.parts.new_dynamics import inject
from fleetcast.bins import bin_means
from fleetcast.clock import to_ms
from fleetcast.schema import ChangedSeries, Longs
from fleetcast.sources.recording import Cut, load_recording, parse_formula
from fleetcast.training.grid import TrainingGrid

BIN_MS, DAY, DAY_MS = 300_000, 288, 86_400_000
HISTORY_DAYS, REPLAY_DAYS, SERVERS = 28, 28, 10
CHANGED_WEEKS = 3  # one set of changes in each of the first weeks; the last week shows the end state
PER_KIND = 2  # series of each kind per set: 6 of 30 with three metrics
SEED = 20261123
NATURAL, INJECTED = "natural", "injected"


@dataclass(frozen=True, eq=False)
class ReplayFleet:
    """One scene: bins of history and replay on one axis, and what is known to have changed."""

    name: str
    grid: TrainingGrid
    begin: int  # first bin of the replay
    changes: tuple[tuple[ChangedSeries, ...], ...]  # sets of one moment each, by time

    def changed_since(self) -> Longs:
        """Return (server, metric) the bin of a series' first change, past the end where it has none."""
        since = np.full(self.grid.values.shape[:2], self.grid.n_bins)
        for item in (item for changed in self.changes for item in changed):
            since[item.server, item.metric] = min(since[item.server, item.metric], item.since_bin)
        return since

    def until(self, end: int, days: int) -> TrainingGrid:
        """Return the newest `days` before bin `end`: what a training is given."""
        start = max(0, end - days * DAY)
        values = self.grid.values[:, :, start:end]
        return replace(self.grid, values=values, start_ms=self.grid.start_ms + start * BIN_MS)


def recorded_grid(data: Path, maps: Sequence[str], servers: slice, days: int) -> TrainingGrid:
    """Read some servers, in the order of their names, as 5-minute bins from the first UTC midnight on."""
    formulas = [parse_formula(text) for text in maps]
    names = sorted(set(pq.read_table(data, columns=["server_name"])["server_name"].unique().to_pylist()))
    cut = Cut(servers=frozenset(names[servers]), days=float(days + 1))
    recording = load_recording(data, formulas, cut).compact()
    start_ms = -(-to_ms(recording.first) // DAY_MS) * DAY_MS
    metrics = tuple(recording.metrics)
    values = np.stack([recording.metrics[name] for name in metrics], axis=1)
    codes, bins, means = bin_means(recording.server_codes, recording.timestamps_ms, values, BIN_MS)
    place = (bins - start_ms) // BIN_MS
    inside = (place >= 0) & (place < days * DAY)
    grid = np.full((len(recording.server_names), len(metrics), days * DAY), np.nan, np.float32)
    grid[codes[inside], :, place[inside]] = means[inside]
    return TrainingGrid(recording.server_names, metrics, grid, start_ms, BIN_MS)


def natural(grid: TrainingGrid, begin: int, regimes: Path | None) -> ReplayFleet:
    """Return the fleet as recorded; listed changes of its series are known to the oracle alone."""
    found: dict[int, list[ChangedSeries]] = {}
    for row in pd.read_csv(regimes).to_dict("records") if regimes else []:
        if row["server_name"] not in grid.server_names or row["metric"] not in grid.metrics:
            continue
        refined = row.get("change_time_refined_utc")
        when = pd.Timestamp(refined if isinstance(refined, str) else row["change_time_utc"])
        since = grid.bin_of(int(when.timestamp() * 1000))
        if begin <= since < grid.n_bins:
            server, metric = grid.server_names.index(row["server_name"]), grid.metrics.index(row["metric"])
            found.setdefault(since, []).append(ChangedSeries(server, metric, since))
    return ReplayFleet(NATURAL, grid, begin, tuple(tuple(found[since]) for since in sorted(found)))


def injected(grid: TrainingGrid, begin: int, seed: int = SEED) -> ReplayFleet:
    """Return the fleet with new dynamics that repeat, from one moment of each of the first weeks on."""
    changes = []
    for week, since in enumerate(moments(grid, begin, seed)):
        changed = inject(grid, since, PER_KIND, seed + week)
        grid = changed.grid
        changes.append(changed.changed)
    return ReplayFleet(INJECTED, grid, begin, tuple(changes))


def moments(grid: TrainingGrid, begin: int, seed: int) -> list[int]:
    """Return the bins of the changes, one in each of the first weeks, drawn by seed."""
    drawn = np.random.default_rng(seed).integers(0, 7 * DAY, CHANGED_WEEKS).tolist()
    found = [begin + week * 7 * DAY + moment for week, moment in enumerate(drawn)]
    return [since for since in found if since < grid.n_bins - DAY]
