"""Fleets in which something changes, and the moments a training then runs at.

Owns: reading the list of real changes, choosing the moments. Does not know: trainings, errors.
"""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from benchmarks.new_dynamics import inject
from fleetcast.clock import from_ms, iso_z
from fleetcast.schema import ChangedSeries
from fleetcast.training.grid import TrainingGrid

BIN_MS, DAY = 300_000, 288


@dataclass(frozen=True, eq=False)
class Scene:
    """A fleet, what changed in it, and when a training runs."""

    name: str
    grid: TrainingGrid
    changed: tuple[ChangedSeries, ...]
    kinds: tuple[str, ...]  # of `changed`
    now_bin: int


def scenes(grid: TrainingGrid, options: argparse.Namespace) -> list[Scene]:
    """Return what the options of `incremental.py` ask for: injected changes, then recorded ones."""
    known = (options.skip_days + options.train_days) * DAY
    later = round(options.after_hours * 12)
    found = []
    for seed in range(options.seeds):
        injected = inject(grid, known, options.per_kind, options.seed + seed, own_periods=options.own_periods)
        name = f"injected, seed {options.seed + seed}"
        found.append(Scene(name, injected.grid, injected.changed, injected.kinds, known + later))
    if options.changes:
        changes = _listed(Path(options.changes), grid)
        last = grid.n_bins - DAY  # a day at least is left to test on
        for now_bin, group in moments(changes, known, last, later, options.rounds):
            name = f"recorded, {iso_z(from_ms(grid.start_ms + now_bin * BIN_MS))}"
            found.append(Scene(name, grid, group, ("recorded",) * len(group), now_bin))
    return found


def _listed(path: Path, grid: TrainingGrid) -> list[ChangedSeries]:
    """Return the listed changes of this fleet's series, oldest first."""
    servers = {name: index for index, name in enumerate(grid.server_names)}
    metrics = {name: index for index, name in enumerate(grid.metrics)}
    with path.open() as stream:
        rows = [
            row
            for row in csv.DictReader(stream)
            if row["server_name"] in servers and row["metric"] in metrics
        ]
    changes = []
    for row in rows:
        moment = datetime.fromisoformat(row.get("change_time_refined_utc") or row["change_time_utc"])
        since = grid.bin_of(int(moment.timestamp() * 1000))
        changes.append(ChangedSeries(servers[row["server_name"]], metrics[row["metric"]], since))
    return sorted(changes, key=lambda item: item.since_bin)


def moments(
    changes: Sequence[ChangedSeries], first: int, last: int, later: int, rounds: int
) -> list[tuple[int, tuple[ChangedSeries, ...]]]:
    """Return the moments that have most changes behind them: at least half of `later`, at most 3 days."""
    left, found = [item for item in changes if item.since_bin >= first], []
    while left and len(found) < rounds:
        moments = {item.since_bin + later for item in left if item.since_bin + later < last}
        groups = {
            now: tuple(item for item in left if later // 2 <= now - item.since_bin <= max(later, 3 * DAY))
            for now in sorted(moments)
        }
        if not groups:
            break
        now = max(groups, key=lambda moment: len(groups[moment]))
        found.append((now, groups[now]))
        left = [item for item in left if item not in groups[now]]
    return sorted(found, key=lambda item: item[0])
