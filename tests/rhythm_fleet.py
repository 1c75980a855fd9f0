"""A made fleet with a daily rhythm, its own noise and a seed: what unchanged data look like."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from fleetcast.drift.seasonal.detector import SeasonalDetector
from fleetcast.drift.seasonal.reference import Reference, ReferenceOptions
from fleetcast.drift.seasonal.settled import FleetGrid
from fleetcast.schema import Floats

BIN_MS = 300_000
DAY = 288
START_MS = 1_767_225_600_000  # 2026-01-01 00:00 UTC
SERVERS = ("app-1", "app-2", "app-3", "db-1", "db-2")
METRICS = ("cpu_pct", "mem_pct")
REFERENCE_DAYS = 14

Grid = NDArray[np.float32]


@cache
def _made(days: int, seed: int, n_servers: int) -> Grid:
    generator = np.random.default_rng(seed)
    grid = np.empty((n_servers, len(METRICS), days * DAY), np.float32)
    clock = 2 * np.pi * np.arange(days * DAY) / DAY
    for server in range(n_servers):
        for metric in range(len(METRICS)):
            noise = np.zeros(days * DAY)
            steps = generator.normal(0, 1, days * DAY)
            for place in range(1, days * DAY):
                noise[place] = 0.7 * noise[place - 1] + steps[place]
            rhythm = 10 * np.sin(clock + server + 2 * metric)
            grid[server, metric] = 40 + 5 * server + rhythm + 1.5 * noise
    return grid


def made_grid(days: int = REFERENCE_DAYS + 3, seed: int = 1, n_servers: int = len(SERVERS)) -> Grid:
    """Return (server, metric, bin) from START_MS on; a fresh copy."""
    return _made(days, seed, n_servers).copy()


def fleet_grid(
    values: Grid,
    server_names: tuple[str, ...] = SERVERS,
    metrics: tuple[str, ...] = METRICS,
    start_ms: int = START_MS,
    errors: Grid | None = None,
) -> FleetGrid:
    """Return values as a grid of a fleet, of which no forecast errors are known unless given."""
    errors = np.full_like(values, np.nan) if errors is None else errors
    return FleetGrid(server_names, metrics, start_ms, BIN_MS, values, errors)


def fitted(
    grid: Grid,
    options: ReferenceOptions | None = None,
    *,
    errors: Grid | None = None,
    changed_ms: Floats | None = None,
) -> Reference:
    """Learn a reference of the made fleet from the start of a grid."""
    names = (SERVERS[: grid.shape[0]], METRICS[: grid.shape[1]])
    return Reference.fit(fleet_grid(grid, *names, errors=errors), options, changed_ms)


@cache
def usual_reference() -> Reference:
    """Return the reference of the made fleet's first two weeks."""
    return fitted(made_grid()[:, :, : REFERENCE_DAYS * DAY])


def replay(drift: SeasonalDetector, grid: Grid, start_ms: int = START_MS, errors: Grid | None = None) -> None:
    """Give a detector a stretch of bins, (server, metric, bin) in the reference's order."""
    for index in range(grid.shape[2]):
        missed = None if errors is None else errors[:, :, index]
        drift.update(grid[:, :, index], start_ms + index * BIN_MS, missed)


def following(
    grid: Grid, first_day: int = REFERENCE_DAYS - 3, reference: Reference | None = None
) -> SeasonalDetector:
    """Return a detector that has seen a grid from a day on."""
    drift = SeasonalDetector(reference or usual_reference())
    replay(drift, grid[:, :, first_day * DAY :], START_MS + first_day * DAY * BIN_MS)
    return drift
