"""What the test of a bake finds, and how soon, on made differences of two models' hourly losses.

    python -m benchmarks.loop.bake_power

Two tests beside each other: the product's (`fleetcast/promotion/evidence.py`: the mean of four processes
with fixed bounds), and one that divides each difference by twice the root mean square of those before it.
Without a difference, independent and persistent hours; with one, how many of 24-hour bakes end in
a rollback, and after how many hours. Seconds; the seed is fixed.
"""

import argparse
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.results_file import write_results
from fleetcast.promotion.evidence import Limits, log_e
from fleetcast.schema import Floats

REAL_SD = 0.0114  # of an hour's difference between two real models
LIMITS = Limits()
SCALE_BLOCKS = 6
Test = Callable[[Floats], Floats]


def main(argv: Sequence[str] | None = None) -> int:
    """Print both tables, write the JSON."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(argv)
    rng = np.random.default_rng(11)
    tests: dict[str, Test] = {"fixed bounds": log_e, "scaled": log_e_scaled}
    rows = [*_null(rng, tests), *_harm(rng, tests)]
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(write_results("bake_power", {"rows": rows}))
    return 0


def log_e_scaled(differences: Floats) -> Floats:
    """Return the process whose scale is what differences were before."""
    before = np.cumsum(np.square(differences))[SCALE_BLOCKS - 1 : -1]
    scale = 2 * np.sqrt(before / np.arange(SCALE_BLOCKS, len(differences)))
    return log_e(differences[SCALE_BLOCKS:] / np.maximum(scale, 1e-9), bounds=(1.0,))


def _null(rng: np.random.Generator, tests: dict[str, Test]) -> list[dict[str, object]]:
    """Return how often a week without a difference is called, without a margin, at e >= 100."""
    rows: list[dict[str, object]] = []
    for lag_1 in (0.0, 0.5, 0.8):
        races = persistent(rng, 2000, 168, lag_1) * REAL_SD
        for name, test in tests.items():
            called = np.mean([test(race).max() >= np.log(100) for race in races])
            rows.append({"case": f"no difference, lag-1 {lag_1:g}", "test": name, "called": f"{called:.2%}"})
    return rows


def _harm(rng: np.random.Generator, tests: dict[str, Test]) -> list[dict[str, object]]:
    """Return how many bakes of 24 hours end in a rollback, and the median hour."""
    rows: list[dict[str, object]] = []
    needed = np.log(2 / LIMITS.alpha)
    for sd in (REAL_SD, 0.03):
        for harm in (0.0, 0.02, 0.03, 0.05, 0.1, 0.2):
            races = persistent(rng, 400, LIMITS.bake_hours, 0.2) * sd + harm - LIMITS.max_harm
            for name, test in tests.items():
                shift = LIMITS.bake_hours - len(test(races[0]))
                hours = [_first(test(race), needed) + shift for race in races]
                found = [hour for hour in hours if hour <= LIMITS.bake_hours]
                median = f"{np.median(found):.0f} h" if found else "-"
                case = f"difference {harm:g}, sd {sd:g}"
                share = f"{len(found) / len(hours):.1%}"
                rows.append({"case": case, "test": name, "taken back": share, "median": median})
    return rows


def _first(logs: Floats, needed: float) -> int:
    over = logs >= needed
    return int(np.argmax(over)) + 1 if over.any() else 10**6


def persistent(rng: np.random.Generator, n_race: int, n_hour: int, lag_1: float) -> Floats:
    """Return (race, hour) normal numbers of deviation 1, each correlated with the one before."""
    noise = rng.normal(size=(n_race, n_hour)) * np.sqrt(1 - lag_1**2)
    found = np.empty_like(noise)
    found[:, 0] = rng.normal(size=n_race)
    for hour in range(1, n_hour):
        found[:, hour] = lag_1 * found[:, hour - 1] + noise[:, hour]
    return found


if __name__ == "__main__":
    raise SystemExit(main())
