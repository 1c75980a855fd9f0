"""New dynamics that do not repeat: what neither yesterday nor the last week has shown.

Owns: four scenes of the loop replay, added to what was recorded, so the recorded noise stays and gaps
stay gaps. Seeded. Does not know: when a training runs, scores.

    leaks    memory climbs by 0.5 to 3 points an hour: one until it is full, two that are freed after
             8 to 36 hours and begin again, each time at another rate, after 2 to 40 hours
    regimes  cpu moves up by 10 to 40 points for 6 to 72 hours, then elsewhere (two servers); a rate is
             multiplied by white noise whose size changes as often (two servers)
    walks    cpu becomes a random walk of 0.3 to 1.5 points a bin between its walls (two servers)
    moved    the load of one server stands on another from then on, in every metric; the first idles
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.loop.parts.fleet import (
    CHANGED_WEEKS,
    DAY,
    INJECTED,
    NATURAL,
    SEED,
    ReplayFleet,
    injected,
    moments,
    natural,
)
from fleetcast.forecast.encoding import is_percent
from fleetcast.schema import ChangedSeries, Floats, Floats32, Longs
from fleetcast.training.grid import TrainingGrid

LEAKS, REGIMES, WALKS, MOVED = "leaks", "regimes", "walks", "moved"
LASTING = (LEAKS, REGIMES, WALKS, MOVED)
HOUR = 12  # bins
_ROOM, _LEAST_RATE = 50.0, 0.02  # of recorded medians: percent, MB/s
_STREAMS = {LEAKS: 1, REGIMES: 2, WALKS: 3, MOVED: 4}  # so that scenes of one seed draw independently

Random = np.random.Generator
Shape = Callable[[Floats, Random], Floats]  # (own values, random) -> new values


def scene_fleet(
    name: str, grid: TrainingGrid, begin: int, seed: int = SEED, regimes: Path | None = None
) -> ReplayFleet:
    """Return the fleet as recorded, with new dynamics that repeat, or with one of `LASTING`."""
    if name == NATURAL:
        return natural(grid, begin, regimes)
    return injected(grid, begin, seed) if name == INJECTED else lasting(name, grid, begin, seed)


def lasting(name: str, grid: TrainingGrid, begin: int, seed: int = SEED) -> ReplayFleet:
    """Return the fleet with one of `LASTING` begun at one moment of each of the first weeks."""
    random = np.random.default_rng([seed, _STREAMS[name]])
    values, changes = grid.values.copy(), []
    order = random.permutation(len(grid.server_names))  # a server changes once, while there are enough
    for week, since in enumerate(moments(grid, begin, seed)):
        servers = np.roll(order, -week * (len(order) // CHANGED_WEEKS))
        before = values.copy()
        if name == MOVED:
            _move(values, int(servers[0]), int(servers[1]), since, random)
        else:
            for metric, shape in _shapes(name, grid.metrics):
                server = _first_able(grid, servers, metric, since)
                servers = servers[servers != server]
                own = values[server, metric, since:].astype(np.float64)
                top = 100.0 if is_percent(grid.metrics[metric]) else np.inf
                values[server, metric, since:] = np.clip(shape(own, random), 0.0, top)
        moved = np.nan_to_num(values) != np.nan_to_num(before)
        found = np.argwhere(moved.any(axis=2)).tolist()
        changes.append(tuple(ChangedSeries(server, metric, since) for server, metric in found))
    return ReplayFleet(name, replace(grid, values=values), begin, tuple(changes))


def _first_able(grid: TrainingGrid, servers: Longs, metric: int, since: int) -> int:
    """Return the first server where the change can show: a percent has room above, a rate is not nothing."""
    usual = np.nanmedian(grid.values[servers, metric, since:], axis=1)
    is_able = usual < _ROOM if is_percent(grid.metrics[metric]) else usual > _LEAST_RATE
    return int(servers[np.argmax(is_able)])


def _shapes(name: str, metrics: tuple[str, ...]) -> list[tuple[int, Shape]]:
    """Return what happens to which metric, one server each."""
    memory = next((place for place, metric in enumerate(metrics) if metric.startswith("mem")), 0)
    rate = next((place for place, metric in enumerate(metrics) if not is_percent(metric)), 0)
    found: dict[str, list[tuple[int, Shape]]] = {
        LEAKS: [(memory, _leak), (memory, _freed_leaks), (memory, _freed_leaks)],
        REGIMES: [(0, _levels), (0, _levels), (rate, _variances), (rate, _variances)],
        WALKS: [(0, _walk), (0, _walk)],
    }
    return found[name]


def _leak(own: Floats, random: Random) -> Floats:
    """Climb until it is full; what was recorded is felt less and less."""
    return own + random.uniform(0.5, 3.0) / HOUR * np.arange(len(own))


def _freed_leaks(own: Floats, random: Random) -> Floats:
    added, place = np.zeros(len(own)), 0
    while place < len(own):
        length = int(random.uniform(8, 36) * HOUR)
        climb = random.uniform(0.5, 3.0) / HOUR * np.arange(length)
        added[place : place + length] = climb[: len(own) - place]
        place += length + int(random.uniform(2, 40) * HOUR)
    return own + added


def _regimes(n_bins: int, low: float, high: float, random: Random) -> Floats:
    """Return a level for 6 to 72 hours, then another."""
    levels, place = np.empty(n_bins), 0
    while place < n_bins:
        length = int(random.uniform(6, 72) * HOUR)
        levels[place : place + length] = random.uniform(low, high)
        place += length
    return levels


def _levels(own: Floats, random: Random) -> Floats:
    return own + _regimes(len(own), 10.0, 40.0, random)


def _variances(own: Floats, random: Random) -> Floats:
    size = _regimes(len(own), 0.1, 0.8, random)
    return own * np.exp(size * random.standard_normal(len(own)))


def _walk(own: Floats, random: Random) -> Floats:
    """Add a walk between 0 and 60 points; at a wall it turns."""
    free = random.uniform(20, 40) + (random.uniform(0.3, 1.5) * random.standard_normal(len(own))).cumsum()
    return own + np.abs((free + 60) % 120 - 60)


def _move(values: Floats32, giver: int, taker: int, since: int, random: Random) -> None:
    """Move what stands above a server's quiet level (its 5th percentile of the last week) to another."""
    for metric in range(values.shape[1]):
        past = values[giver, metric, max(0, since - 7 * DAY) : since]
        floor = float(np.nanpercentile(past, 5)) if np.isfinite(past).any() else 0.0
        own = values[giver, metric, since:].copy()
        load = np.nan_to_num(np.maximum(own - floor, 0.0))
        top = 100.0 if np.nanmax(values[:, metric]) <= 100.0 else np.inf
        idle = floor * (1 + 0.02 * random.standard_normal(len(own)))
        values[giver, metric, since:] = np.where(np.isfinite(own), np.maximum(idle, 0.0), np.nan)
        values[taker, metric, since:] = np.minimum(values[taker, metric, since:] + load, top)
