"""`make run` for a while: memory, file handles and CPU share of each process, sampled.

    .venv/bin/python -m benchmarks.live_soak [--minutes 60]

Prints a table and writes `results/live_soak_DATE.json`. Flat means: the last quarter of the time
needs no more than the second one did, but for what a growing window of data explains.
"""

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.loop_harness import free_port
from benchmarks.results_file import ROOT, write_results
from fleetcast.clock import monotonic, sleep

NAMES = {
    "tft_inference_daemon": "inference daemon",
    "adaptive_retraining_daemon": "retraining daemon",
    "local_agent": "agent",
}
SAMPLE_S = 10.0


def name_of(process: psutil.Process) -> str:
    """Return which of the three a process is."""
    words = " ".join(process.cmdline())
    return next((name for part, name in NAMES.items() if part in words), "")


def sample(children: Sequence[psutil.Process]) -> dict[str, tuple[float, int, float]]:
    """Return memory in MB, handles and CPU seconds by name."""
    found = {}
    for child in children:
        times = child.cpu_times()
        memory_mb = child.memory_info().rss / 1e6
        found[name_of(child)] = (memory_mb, child.num_fds(), times.user + times.system)
    return found


def summary(samples: Sequence[dict[str, tuple[float, int, float]]], span_s: float) -> dict[str, Any]:
    """Return start, second and last quarter of each process."""
    quarter = max(1, len(samples) // 4)
    figures: dict[str, Any] = {}
    for name in samples[0]:
        memory = [item[name][0] for item in samples]
        handles = [item[name][1] for item in samples]
        figures[name] = {
            "memory_mb_second_quarter": round(statistics.mean(memory[quarter : 2 * quarter]), 1),
            "memory_mb_last_quarter": round(statistics.mean(memory[-quarter:]), 1),
            "handles_second_quarter": max(handles[quarter : 2 * quarter]),
            "handles_last_quarter": max(handles[-quarter:]),
            "cpu_percent_of_a_core": round(100 * (samples[-1][name][2] - samples[0][name][2]) / span_s, 2),
        }
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Run, sample, print."""
    parser = argparse.ArgumentParser(prog="benchmarks.live_soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default: %(default)s)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fleetcast-soak-") as folder:
        command = [sys.executable, "-m", "fleetcast.live", "--folder", folder, "--port", str(free_port())]
        live = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            sleep(45)  # start-up and the first forecasts
            children = psutil.Process(live.pid).children()
            samples, began_s = [sample(children)], monotonic()
            while monotonic() - began_s < 60 * options.minutes:
                sleep(SAMPLE_S)
                samples.append(sample(children))
            figures = summary(samples, monotonic() - began_s)
        finally:
            live.send_signal(signal.SIGINT)
            live.wait(60)
        stored_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    for name, values in figures.items():
        print(f"{name:<18} " + "  ".join(f"{key} {value}" for key, value in values.items()))
    path = write_results(
        "live_soak", {"minutes": options.minutes, "stored_bytes": stored_bytes, "processes": figures}
    )
    print(f"written {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
