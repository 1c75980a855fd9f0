"""Fleets in which something changes, and the moments a training then runs at.

Owns: reading the list of real changes, choosing the moments. Does not know: trainings, errors.

New dynamics put into recorded series: what a model of the old ones cannot know. Seeded.

Three kinds, as one release on several servers would bring them. Servers of a kind share the
period and have a phase and a size of their own (or each its own period, with `own_periods`):

    sawtooth  cpu_pct climbs for 1 to 3 hours by 25-50 points, drops, climbs again
    leak      mem_pct grows for 5 to 12 hours by 30-60 points until the process is restarted
    bursts    a rate jumps to 20-60 times its usual level for 2 to 4 bins, every 30 to 90 minutes

Climbs differ by 5 % in length; bursts keep a timetable, as scheduled jobs do, and differ by 20 %
in size. All is added to what was recorded, so the recorded noise stays; gaps stay gaps.
"""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from fleetcast.clock import from_ms, iso_z
from fleetcast.forecast.encoding import is_percent
from fleetcast.schema import ChangedSeries, Floats, Floats32
from fleetcast.training.grid import TrainingGrid

BINS_PER_HOUR = 12
CPU_WORDS, MEMORY_WORDS = ("cpu",), ("mem",)
_PERIOD_HOURS = {"sawtooth": (1.0, 3.0), "leak": (5.0, 12.0), "bursts": (0.5, 1.5)}
_POINTS = {"sawtooth": (25.0, 50.0), "leak": (30.0, 60.0)}
_NORMALISED = "_norm01"  # a share of one instead of points of a hundred


@dataclass(frozen=True)
class Injected:
    """A fleet with new dynamics, and which series have them since when, by kind."""

    grid: TrainingGrid
    changed: tuple[ChangedSeries, ...]
    kinds: tuple[str, ...]  # of `changed`, in order


def inject(
    grid: TrainingGrid, since_bin: int, per_kind: int, seed: int, *, own_periods: bool = False
) -> Injected:
    """Return the fleet with `per_kind` series of each kind changed from `since_bin` on.

    Raises:
        ValueError: fewer servers record such a metric.
    """
    random = np.random.default_rng(seed)
    values = grid.values.copy()
    changed, kinds = [], []
    for kind, metric in _places(grid.metrics):
        able = np.flatnonzero(np.isfinite(grid.values[:, metric, since_bin:]).mean(axis=1) > 0.5)
        if len(able) < per_kind:
            raise ValueError(f"{kind}: {len(able)} servers record {grid.metrics[metric]}, need {per_kind}")
        rhythm = _Rhythm.drawn(kind, random)
        for server in random.choice(able, per_kind, replace=False).tolist():
            rhythm = _Rhythm.drawn(kind, random) if own_periods else rhythm
            series = values[server, metric]
            series[since_bin:] = _with(kind, series, since_bin, grid.metrics[metric], rhythm, random)
            changed.append(ChangedSeries(server, metric, since_bin))
            kinds.append(kind)
    return Injected(replace(grid, values=values), tuple(changed), tuple(kinds))


@dataclass(frozen=True)
class _Rhythm:
    """How often something happens, and for how long (bursts)."""

    period_bins: float
    length_bins: int

    @classmethod
    def drawn(cls, kind: str, random: np.random.Generator) -> "_Rhythm":
        low, high = _PERIOD_HOURS[kind]
        return cls(random.uniform(low, high) * BINS_PER_HOUR, int(random.integers(2, 5)))


def _places(metrics: Sequence[str]) -> list[tuple[str, int]]:
    """Return each kind with the metric it happens to, where the fleet sends one."""
    cpu = [index for index, name in enumerate(metrics) if name.startswith(CPU_WORDS)]
    memory = [index for index, name in enumerate(metrics) if name.startswith(MEMORY_WORDS)]
    rates = [index for index in range(len(metrics)) if index not in (*cpu, *memory)]
    found = (("sawtooth", cpu), ("leak", memory), ("bursts", rates))
    return [(kind, indices[0]) for kind, indices in found if indices]


def _with(
    kind: str,
    series: Floats32,
    since_bin: int,
    metric: str,
    rhythm: _Rhythm,
    random: np.random.Generator,
) -> Floats32:
    """Return the bins from `since_bin` on with the new dynamics added."""
    own = series[since_bin:].astype(np.float64)
    unit = 0.01 if metric.endswith(_NORMALISED) else 1.0
    top = 100.0 * unit if is_percent(metric) or metric.endswith(_NORMALISED) else np.inf
    if kind == "bursts":
        added = _bursts(len(own), rhythm, random) * _usual(series[:since_bin], unit)
    else:
        added = _climbs(len(own), rhythm, random) * random.uniform(*_POINTS[kind]) * unit
    return np.asarray(np.clip(own + added, 0.0, top), np.float32)


def _climbs(n_bins: int, rhythm: _Rhythm, random: np.random.Generator) -> Floats:
    """Return a wave that climbs from 0 to 1 and drops, each climb about 5 % longer or shorter than usual."""
    wave: list[float] = []
    while len(wave) < 2 * n_bins + 2:
        length = max(3, round(rhythm.period_bins * random.normal(1.0, 0.05)))
        wave.extend((np.arange(length) / length).tolist())
    start = int(random.integers(n_bins))
    return np.array(wave[start : start + n_bins])


def _bursts(n_bins: int, rhythm: _Rhythm, random: np.random.Generator) -> Floats:
    """Return 0, and the size of a burst while there is one."""
    size, added = random.uniform(20, 60), np.zeros(n_bins)
    place = float(random.uniform(0, rhythm.period_bins))
    while place < n_bins:
        added[int(place) : int(place) + rhythm.length_bins] = size * random.uniform(0.8, 1.2)
        place += max(rhythm.length_bins + 1, rhythm.period_bins)
    return added


def _usual(before: Floats32, unit: float) -> float:
    """Return what a rate usually is, never nothing."""
    known = before[np.isfinite(before)]
    return float(max(np.median(known), 0.2 * known.mean(), 0.05 * unit)) if len(known) else 0.05 * unit


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
