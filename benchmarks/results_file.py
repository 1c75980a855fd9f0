"""Where figures go: a dated JSON per benchmark, with the machine they were measured on."""

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fleetcast.clock import SystemClock, plain_utc
from fleetcast.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")


def machine() -> dict[str, Any]:
    """Return what figures depend on."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load_1_min": round(os.getloadavg()[0], 2),
    }


def revision() -> str:
    """Return the commit the figures belong to; with a mark where files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def write_results(name: str, figures: Mapping[str, Any]) -> Path:
    """Write `results/NAME_DATE.json`; a second run of the day replaces it."""
    now = SystemClock().now()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}_{now:%Y-%m-%d}.json"
    head = {"measured_at": plain_utc(now), "revision": revision(), "machine": machine()}
    write_json(path, head | dict(figures))
    return path


def todays_results(name: str) -> dict[str, Any]:
    """Return what `write_results` wrote today, empty if nothing."""
    path = RESULTS / f"{name}_{SystemClock().now():%Y-%m-%d}.json"
    return read_json(path) if path.exists() else {}
