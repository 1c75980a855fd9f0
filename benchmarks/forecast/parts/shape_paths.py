"""The shapes an operator knows by sight, without noise and with it.

Owns: the paths of every shape, when the part that is judged as a trend ends, and what was recorded.
numpy only, seeded. Does not know: models, the expert layer, scores.

A path is in points of a percent, one value a bin of 5 minutes. `NOW` is the first origin that is judged.
Every shape runs through each seed with a start level, a pace and a history of its own; the noises
share the path.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fleetcast.schema import Floats, Floats32

HOUR, DAY = 12, 288  # bins
ORIGINS = tuple(range(0, 66, 5))  # bins after NOW
N_HORIZON = 96
NOW = 8 * DAY - 1
N_BINS = NOW + ORIGINS[-1] + N_HORIZON + 1
CLOCK = 172  # bins since midnight at NOW: a quarter past two in the afternoon
NOISES = (0.0, 0.5, 2.0)
_TIME = np.arange(N_BINS) - NOW  # bins after NOW

Random = np.random.Generator


@dataclass(frozen=True, eq=False)
class Case:
    """One series."""

    shape: str
    seed: int
    noise: float  # points, standard deviation
    path: Floats  # (bin,) without noise
    trend: tuple[int, int] | None  # bins after NOW, first and last, between which it is a trend
    recorded: Floats32  # (bin,) with noise, NaN before its history


def make_cases(shapes: Sequence[str], seeds: int, noises: Sequence[float] = NOISES) -> list[Case]:
    """Return every shape with every seed and noise."""
    cases = []
    for number, shape in enumerate(SHAPES):
        for seed in range(seeds if shape in shapes else 0):
            random = np.random.default_rng([number, seed])
            path, trend = SHAPES[shape](random, seed)
            bare = Case(shape, seed, 0.0, path, trend, np.empty(0, np.float32))
            history = int(random.integers(5 * DAY, 8 * DAY))
            cases += [_record(bare, noise, history, random) for noise in noises]
    return cases


def _record(case: Case, noise: float, history: int, random: Random) -> Case:
    values = np.clip(case.path + noise * random.standard_normal(N_BINS), 0, 100)
    recorded = np.round(values, 2).astype(np.float32)
    recorded[: NOW - history] = np.nan
    return replace(case, noise=noise, recorded=recorded)


Path = tuple[Floats, tuple[int, int] | None]


def _leak(random: Random, seed: int) -> Path:
    pace = random.uniform(0.5, 3.0) / HOUR
    age = (4, 8, 15, 30)[seed % 4] * HOUR - 10 * (seed % 4 == 3)
    now = random.uniform(max(30.0, 5 + pace * age), max(84.0, 6 + pace * age))
    start = now - pace * age
    path = np.clip(start + pace * np.maximum(0, _TIME + age), 0, 100)
    return path, (-age, int((100 - now) / pace))


def _fill(random: Random, seed: int) -> Path:
    pace, age = random.uniform(3, 10) / HOUR, int(random.uniform(2, 6) * HOUR)
    start = random.uniform(5, 25)
    ceiling = min(start + pace * (age + random.uniform(2, 10) * HOUR), random.uniform(80, 98))
    path = np.minimum(start + pace * np.maximum(0, _TIME + age), ceiling)
    return path, (-age, int((ceiling - start) / pace) - age)


def _fall(random: Random, seed: int) -> Path:
    pace, age = random.uniform(0.5, 3.0) / HOUR, int(random.uniform(4, 20) * HOUR)
    start = random.uniform(60, 95)
    floor = random.uniform(2, 15)
    path = np.maximum(start - pace * np.maximum(0, _TIME + age), floor)
    return path, (-age, int((start - floor) / pace) - age)


def _freed_nightly(random: Random, seed: int) -> Path:
    pace, free = random.uniform(0.8, 3.0) / HOUR, int(random.uniform(0, 5) * HOUR)
    since = (_TIME + CLOCK - free) % DAY
    path = random.uniform(10, 25) + pace * since
    age = (CLOCK - free) % DAY
    return path, (-age, DAY - age - 1)


def _saw_tooth(random: Random, seed: int) -> Path:
    period = int(np.round(4 * 51 ** ((seed % 4 + random.uniform(0, 1)) / 4)))  # 20 minutes to 17 hours
    height = random.uniform(10, 50)
    return random.uniform(5, 40) + height * ((_TIME + random.integers(period)) % period) / period, None


def _sine(random: Random, seed: int) -> Path:
    period = (DAY, 6 * HOUR, DAY, 12 * HOUR)[seed % 4]
    angle = 2 * np.pi * (_TIME / period + random.uniform())
    return random.uniform(35, 55) + random.uniform(5, 25) * np.sin(angle), None


def _sine_on_trend(random: Random, seed: int) -> Path:
    path, _ = _sine(random, seed)
    climb = random.uniform(0.08, 0.2) * _TIME / HOUR
    return np.clip(path + climb, 0, 100), None


def _steps(random: Random, seed: int) -> Path:
    levels = random.uniform(10, 85, N_BINS)
    starts = random.uniform(size=N_BINS) < 1.5 / DAY  # three in two days
    return levels[np.cumsum(starts)], None


def _bursts(random: Random, seed: int) -> Path:
    every = (HOUR, 4 * HOUR, DAY, 30)[seed % 4]
    width, height = random.integers(2, max(3, every // 4)), random.uniform(15, 50)
    is_burst = (_TIME + random.integers(every)) % every < min(width, 3 * HOUR)
    return random.uniform(5, 40) + height * is_burst, None


def _flat(random: Random, seed: int) -> Path:
    return np.full(N_BINS, random.uniform(5, 90)), None


def _swap(random: Random, seed: int) -> Path:
    """Return a server that gets the load of another: a daily rhythm, then another's level and rhythm."""
    angle = 2 * np.pi * (_TIME / DAY + random.uniform())
    own = random.uniform(15, 35) + random.uniform(3, 10) * np.sin(angle)
    other = random.uniform(50, 75) + random.uniform(5, 15) * np.sin(angle + random.uniform(1, 3))
    moment = -random.uniform(-3, 30) * HOUR
    return np.where(moment > _TIME, *((own, other) if seed % 2 else (other, own))), None


def _plateau(random: Random, seed: int) -> Path:
    """Return a climb that ended before NOW; those that end after it are fills."""
    pace, age = random.uniform(1.0, 3.0) / HOUR, int(random.uniform(8, 20) * HOUR)
    end = int((-5, -3, -1.5, -0.5)[seed % 4] * HOUR)
    start = random.uniform(5, 30)
    path = start + pace * np.clip(_TIME + age, 0, age + end)
    return path, (-age, end)


SHAPES: dict[str, Callable[[Random, int], Path]] = {
    "leak": _leak,
    "fill": _fill,
    "fall": _fall,
    "freed nightly": _freed_nightly,
    "plateau": _plateau,
    "saw-tooth": _saw_tooth,
    "sine": _sine,
    "sine on a trend": _sine_on_trend,
    "steps": _steps,
    "bursts": _bursts,
    "flat": _flat,
    "swap": _swap,
}
