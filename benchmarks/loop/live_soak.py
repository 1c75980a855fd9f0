"""`make run` for a while: memory, file handles and CPU share of each process, sampled.

    .venv/bin/python -m benchmarks.loop.live_soak [--minutes 60] [--attach PID]

Prints a table and writes `results/live_soak_DATE.json` (`live_attached_DATE.json` when it only watches
a `make run` that is under way). Flat means: the last quarter of the time needs no more than the second
one did, and the last half hour's line through the memory does not rise.
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

from benchmarks.results_file import ROOT, write_results
from fleetcast.clock import SystemClock, monotonic, sleep
from fleetcast.demo.harness import free_port

NAMES = {
    "tft_inference_daemon": "inference daemon",
    "adaptive_retraining_daemon": "retraining daemon",
    "local_agent": "agent",
}
SAMPLE_S = 10.0
HALF_AN_HOUR_S = 1800.0
Sample = dict[str, tuple[float, int, float]]  # by name: memory in MB, handles, CPU seconds so far


def name_of(process: psutil.Process) -> str:
    """Return which of the three a process is."""
    words = " ".join(process.cmdline())
    return next((name for part, name in NAMES.items() if part in words), "")


def sample(children: Sequence[psutil.Process]) -> Sample:
    """Return memory in MB, handles and CPU seconds by name."""
    found = {}
    for child in children:
        times = child.cpu_times()
        memory_mb = child.memory_info().rss / 1e6
        found[name_of(child)] = (memory_mb, child.num_fds(), times.user + times.system)
    return found


def slope_mb_per_hour(memory_mb: Sequence[float], sample_s: float = SAMPLE_S) -> float:
    """Return the slope of the least-squares line through the last half hour.

    >>> slope_mb_per_hour([100.0, 100.5, 101.0], sample_s=1800.0)
    1.0
    """
    last = memory_mb[-(int(HALF_AN_HOUR_S / sample_s) + 1) :]
    hours = [number * sample_s / 3600 for number in range(len(last))]
    return round(statistics.linear_regression(hours, last).slope, 2) if len(last) > 1 else 0.0


def summary(samples: Sequence[Sample], span_s: float) -> dict[str, Any]:
    """Return of each process the second and last quarter, the slope, and one sample per minute."""
    quarter = max(1, len(samples) // 4)
    per_minute = int(60 / SAMPLE_S)
    figures: dict[str, Any] = {}
    for name in samples[0]:
        memory = [item[name][0] for item in samples]
        handles = [item[name][1] for item in samples]
        figures[name] = {
            "memory_mb_second_quarter": round(statistics.mean(memory[quarter : 2 * quarter]), 1),
            "memory_mb_last_quarter": round(statistics.mean(memory[-quarter:]), 1),
            "memory_mb_per_hour_last_half_hour": slope_mb_per_hour(memory),
            "handles_second_quarter": max(handles[quarter : 2 * quarter]),
            "handles_last_quarter": max(handles[-quarter:]),
            "cpu_percent_of_a_core": round(100 * (samples[-1][name][2] - samples[0][name][2]) / span_s, 2),
            "memory_mb_each_minute": [round(value, 1) for value in memory[::per_minute]],
        }
    return figures


def watched(live: psutil.Process, minutes: float) -> dict[str, Any]:
    """Sample the three processes that `make run` started, and sum up."""
    children = live.children()
    samples, began_s = [sample(children)], monotonic()
    while monotonic() - began_s < 60 * minutes:
        sleep(SAMPLE_S)
        samples.append(sample(children))
    return summary(samples, monotonic() - began_s)


def started_and_watched(minutes: float) -> dict[str, Any]:
    """Start `make run` in an empty folder, watch it, stop it."""
    with tempfile.TemporaryDirectory(prefix="fleetcast-soak-") as folder:
        command = [sys.executable, "-m", "fleetcast.live", "--folder", folder, "--port", str(free_port())]
        live = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            sleep(45)  # start-up and the first forecasts
            figures = watched(psutil.Process(live.pid), minutes)
        finally:
            live.send_signal(signal.SIGINT)
            live.wait(60)
        stored_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {"stored_bytes": stored_bytes, "processes": figures}


def main(argv: Sequence[str] | None = None) -> int:
    """Run or attach, sample, print."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="benchmarks.loop.live_soak", description=about)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default: %(default)s)")
    parser.add_argument("--attach", type=int, metavar="PID", help="watch this `fleetcast.live` instead")
    options = parser.parse_args(argv)
    if options.attach:
        live = psutil.Process(options.attach)
        began: dict[str, Any] = {
            "minutes_before": round((SystemClock().now().timestamp() - live.create_time()) / 60, 1)
        }
        figures = began | {"processes": watched(live, options.minutes)}
    else:
        figures = started_and_watched(options.minutes)
    for name, values in figures["processes"].items():
        print(f"{name:<18} " + "  ".join(f"{key} {value}" for key, value in values.items()))
    name = "live_attached" if options.attach else "live_soak"
    path = write_results(name, {"minutes": options.minutes} | figures)
    print(f"written {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
