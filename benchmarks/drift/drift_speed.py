"""What does one drift check cost? Literal and season-matched, beside other libraries.

    python -m benchmarks.drift.drift_speed [--servers 10000]

Literal: the Kolmogorov-Smirnov statistic of 14 columns against a reference kept sorted, with
1,000 and 100,000 new rows against 100,000. Season-matched: one new bin of a whole fleet and the
verdict. Ratios are the figures to read on shared cores: each is the best of several runs, in
process CPU time. `make bench-peers` gives each library an environment of its own and then runs
this file, which runs itself there with --peer NAME; one that is not installed is n/a.

One drift check of other libraries, as their documents show it; imported only where installed.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]  # (row, column)


def _scipy(reference: Rows, window: Rows) -> Callable[[], Any]:
    from scipy import stats

    return lambda: [stats.ks_2samp(window[:, j], reference[:, j]) for j in range(reference.shape[1])]


def _evidently(reference: Rows, window: Rows) -> Callable[[], Any]:
    import pandas as pd
    from evidently import Dataset, Report
    from evidently.presets import DataDriftPreset

    names = [f"c{j}" for j in range(reference.shape[1])]
    base = Dataset.from_pandas(pd.DataFrame(reference, columns=names))
    new = Dataset.from_pandas(pd.DataFrame(window, columns=names))
    return lambda: Report([DataDriftPreset()]).run(new, base)


def _alibi_detect(reference: Rows, window: Rows) -> Callable[[], Any]:
    from alibi_detect.cd import KSDrift

    detector = KSDrift(reference, p_val=0.05)
    return lambda: detector.predict(window)


def _nannyml(reference: Rows, window: Rows) -> Callable[[], Any]:
    import nannyml
    import pandas as pd

    names = [f"c{j}" for j in range(reference.shape[1])]
    detector = nannyml.UnivariateDriftCalculator(
        column_names=names, continuous_methods=["kolmogorov_smirnov"], chunk_number=1
    )
    detector.fit(pd.DataFrame(reference, columns=names))
    new = pd.DataFrame(window, columns=names)
    return lambda: detector.calculate(new)


def _river(reference: Rows, window: Rows) -> Callable[[], Any]:
    """Feed one ADWIN per column the window, value by value: it keeps no reference."""
    from river import drift

    streams = window.T.tolist()

    def check() -> int:
        detectors = [drift.ADWIN() for _ in streams]
        for detector, values in zip(detectors, streams, strict=True):
            for value in values:
                detector.update(value)
        return sum(detector.n_detections for detector in detectors)

    return check


def version_of(name: str) -> str:
    """Return the version of an installed library."""
    return importlib.metadata.version(name.replace("_", "-"))


PEER_CHECKS: dict[str, Callable[[Rows, Rows], Callable[[], Any]]] = {
    "scipy": _scipy,
    "evidently": _evidently,
    "alibi_detect": _alibi_detect,
    "nannyml": _nannyml,
    "river": _river,
}


COLUMNS = 14
REFERENCE_ROWS = 100_000
SIZES = (1_000, 100_000)
PEERS = ("scipy", "evidently", "alibi_detect", "nannyml", "river")
SEED = 7
REPEATS = 7
LIMITS_MS = {1_000: 5.0, 100_000: 60.0}
FLEET_LIMIT_MS = 1_000.0
MEMORY_LIMIT_MB = 120.0
FLEET_METRICS = ("cpu_pct", "mem_pct", "disk_io_mb_s", "latency_ms")
FITTED_SERVERS = 40  # a fleet's reference is made of copies of these: only its size matters here
BIN_MS, DAY = 300_000, 288


def best_ms(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Return the least process CPU time of several runs."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return 1000 * min(times)


def columns(rows: int, seed: int) -> np.ndarray[Any, Any]:
    """Return (column, row) of skewed values, each column contiguous."""
    generator = np.random.default_rng(seed)
    return generator.gamma(2.0, 3.0, (COLUMNS, rows))


def literal_ms(rows: int) -> float:
    """Return the time of the literal statistic of every column."""
    from fleetcast.drift.literal.scores import ks_statistic

    reference, window = np.sort(columns(REFERENCE_ROWS, SEED), axis=1), columns(rows, SEED + 1)
    return best_ms(lambda: [ks_statistic(own, base) for own, base in zip(window, reference, strict=True)])


def sketched_ms(rows: int) -> float:
    """Return the same against 1,001 quantiles of the reference: what a baseline keeps and a check reads."""
    from fleetcast.drift.literal.scores import ks_statistic

    quantiles = np.quantile(columns(REFERENCE_ROWS, SEED), np.linspace(0, 1, 1001), axis=1).T
    window = columns(rows, SEED + 1)
    return best_ms(lambda: [ks_statistic(own, base) for own, base in zip(window, quantiles, strict=True)])


def fleet_figures(n_servers: int) -> dict[str, float]:
    """Return the times of one bin and one verdict of a fleet, and of learning a reference."""
    from fleetcast.drift.seasonal.detector import SeasonalDetector
    from fleetcast.drift.seasonal.reference import Reference
    from fleetcast.drift.seasonal.season import Shape
    from fleetcast.drift.seasonal.settled import FleetGrid
    from fleetcast.drift.seasonal.statistics import Books

    generator = np.random.default_rng(SEED)
    clock = np.sin(2 * np.pi * np.arange(15 * DAY) / DAY)
    shape = (FITTED_SERVERS, len(FLEET_METRICS), 15 * DAY)
    grid = (50 + 10 * clock + generator.normal(0, 2, shape)).astype(np.float32)
    names = tuple(f"s{row}" for row in range(FITTED_SERVERS))
    began = time.process_time()
    learned = grid[:, :, : 14 * DAY]
    errors = np.full_like(learned, np.nan)
    small = Reference.fit(FleetGrid(names, FLEET_METRICS, 0, BIN_MS, learned, errors))
    fit_ms = 1000 * (time.process_time() - began) / small.n_series
    copies = -(-n_servers // FITTED_SERVERS)
    per_series = ("pull", "n_days", "start_days", "still_limits", "limits")
    reference = replace(
        small,
        server_names=tuple(f"s{row}" for row in range(copies * FITTED_SERVERS)),
        shape=Shape.stack([small.shape] * copies),
        books=Books.stack([small.books] * copies),
        **{name: np.concatenate([getattr(small, name)] * copies) for name in per_series},
    )
    drift = SeasonalDetector(reference)
    places = iter(range(13 * DAY, 15 * DAY))

    def update() -> None:
        place = next(places)
        drift.update(np.tile(grid[:, :, place], (copies, 1)), place * BIN_MS)

    def check() -> None:
        update()
        drift.check()

    for _ in range(DAY):  # windows are full: each new bin lets an old one go
        update()

    return {"servers": len(reference.server_names), "check_ms": best_ms(check), "fit_ms_per_series": fit_ms}


def memory_mb() -> float:
    """Return the peak memory of a fresh process that makes one literal check of 1,000 rows.

    It is handed the sketch, as a monitor loads it: making one from 100,000 rows is training's work.
    """
    code = (
        "import sys, numpy as np\n"
        "from fleetcast.drift.literal.scores import ks_statistic\n"
        "base = np.load(sys.argv[1], allow_pickle=False)\n"
        "window = np.random.default_rng(8).gamma(2.0, 3.0, (len(base), 1000))\n"
        "[ks_statistic(own, ref) for own, ref in zip(window, base, strict=True)]\n"
        "lines = open('/proc/self/status').read().splitlines()\n"
        "print(next(int(line.split()[1]) / 1024 for line in lines if line.startswith('VmHWM')))\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sketch.npy"
        np.save(path, np.quantile(columns(REFERENCE_ROWS, SEED), np.linspace(0, 1, 1001), axis=1).T)
        command = [sys.executable, "-c", code, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def peak_mb() -> float:
    """Return this process's peak memory; ru_maxrss would be its parent's where that was larger."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def peer_figures(name: str) -> dict[str, Any]:
    """Return the times of a library's check of the same columns, by rows, and the process's peak.

    Run in its environment. The peak is after the smaller check; a small check is run three times.
    """

    reference, times, peak = columns(REFERENCE_ROWS, SEED).T, {}, 0.0
    for rows in SIZES:
        check = PEER_CHECKS[name](reference, columns(rows, SEED + 1).T)
        times[str(rows)] = best_ms(check, 3 if rows == SIZES[0] else 1)
        peak = peak or peak_mb()
    return {"version": version_of(name), "check_ms": times, "peak_mb": peak}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--servers", type=int, default=10_000)
    parser.add_argument("--peer", choices=PEERS, help="measure only this library, print JSON")
    options = parser.parse_args(argv)
    if options.peer:
        print(json.dumps(peer_figures(options.peer)))
        return 0
    from benchmarks.drift.peer_environments import measured
    from benchmarks.results_file import write_results

    ours = {str(rows): {"exact_ms": literal_ms(rows), "sketch_ms": sketched_ms(rows)} for rows in SIZES}
    fleet, memory = fleet_figures(options.servers), memory_mb()
    peers = {name: measured(name) for name in PEERS}
    for rows in SIZES:
        own = ours[str(rows)]
        target = f"target {LIMITS_MS[rows]:.0f}"
        both = f"exact {own['exact_ms']:.1f} ms, sketch {own['sketch_ms']:.1f} ms"
        print(f"{rows:>7} rows x {COLUMNS}: {both} ({target})")
        for name, found in peers.items():
            print(f"          {name:<14} {_beside(found, rows, own['sketch_ms'])}")
    size = f"{fleet['servers']:.0f} x {len(FLEET_METRICS)}"
    print(f"fleet of {size}: {fleet['check_ms']:.0f} ms a bin and verdict")
    print(f"learning: {fleet['fit_ms_per_series']:.1f} ms a series; peak of a check {memory:.0f} MB")
    figures = {
        "literal": ours,
        "fleet": fleet,
        "check_peak_mb": memory,
        "fleet_peak_mb": peak_mb(),
        "peers": peers,
    }
    print(f"figures in {write_results('drift_speed', figures)}")
    is_fast = all(ours[str(rows)]["sketch_ms"] <= LIMITS_MS[rows] for rows in SIZES)
    return 0 if is_fast and fleet["check_ms"] <= FLEET_LIMIT_MS and memory <= MEMORY_LIMIT_MB else 1


def _beside(found: dict[str, Any], rows: int, own_ms: float) -> str:
    if "why" in found:
        return f"n/a: {found['why']}"
    other = found["check_ms"][str(rows)]
    return f"{other:.0f} ms, {other / own_ms:.0f} x; peak {found['peak_mb']:.0f} MB ({found['version']})"


if __name__ == "__main__":
    raise SystemExit(main())
