"""How long a POST of 20 records takes: with nothing else to do, during sweeps, during reloads.

    .venv/bin/python -m benchmarks.ingest.feed_latency [--seconds 15]

One real daemon per phase, fed over loopback by one keep-alive connection that sends 20 records,
waits 20 ms and sends again; every answer is durable (fdatasync). A second connection keeps the
fleet's bins closing, at most five a second, from 7 hours ago on: older bins get no forecast. So sweeps of the
real network (random weights, hidden 32) follow each other. `sweeping_share` says how much of the time a
sweep was running. On shared cores these are upper bounds.
"""

import argparse
import http.client
import itertools
import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.programs import InferenceDaemon, wait_for
from benchmarks.results_file import write_results
from fleetcast.clock import iso_z
from fleetcast.forecast.registry import Registry

PAUSE_S = 0.02
HISTORY_BINS = 300
BACKLOG = timedelta(hours=7)  # how long ago bins begin to close; a forecast made 8 hours late is of no use
BIN = timedelta(minutes=5)
CLOSE_PAUSE_S = 0.2
METRICS = ("cpu_pct", "mem_pct", "disk_io_mb_s", "latency_ms")


@dataclass(frozen=True)
class Phase:
    """One question."""

    name: str
    n_servers: int  # that are swept again and again; 0 = no sweeps
    reloads: bool = False


PHASES = (
    Phase("idle", 0),
    Phase("sweeps of 20 servers", 20),
    Phase("sweeps of 1,000 servers", 1000),
    Phase("sweeps of 20 servers and reloads", 20, reloads=True),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run every phase, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="length of each phase")
    options = parser.parse_args(argv)
    rows = []
    for phase in PHASES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(phase, Path(folder), options.seconds))
        print("  ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
    print(write_results("feed_latency", {"seconds_per_phase": options.seconds, "phases": rows}))
    return 0


def run(phase: Phase, folder: Path, seconds: float) -> dict[str, Any]:
    """Measure one phase."""
    promote(folder, 0)
    with InferenceDaemon(folder) as daemon:
        wait_for("the model", lambda: daemon.status()["model"]["version"] is not None)
        fleet = Fleet(daemon, phase.n_servers)
        fleet.give_history()
        before, swept_s = daemon.status(), sweep_seconds(daemon)
        numbers = itertools.count(1)
        renew = partial(promote, folder) if phase.reloads else id
        with (
            Repeating(fleet.close_a_bin, pause_s=CLOSE_PAUSE_S),
            Repeating(lambda: renew(next(numbers)), pause_s=1.0),
        ):
            started = time.monotonic()
            latencies_ms = probe(daemon, fleet.moment, seconds)
            took_s = time.monotonic() - started
        after = daemon.status()
        n_sweeps = after["sweep"]["count"] - before["sweep"]["count"]
        swept_s = sweep_seconds(daemon) - swept_s
    return {
        "phase": phase.name,
        "requests": len(latencies_ms),
        "p50_ms": round(float(np.quantile(latencies_ms, 0.5)), 2),
        "p99_ms": round(float(np.quantile(latencies_ms, 0.99)), 2),
        "max_ms": round(max(latencies_ms), 2),
        "sweeps": n_sweeps,
        "mean_sweep_s": round(swept_s / max(1, n_sweeps), 3),
        "sweeping_share": round(min(1.0, swept_s / took_s), 2),
        "reloaded": after["model"]["version"] != before["model"]["version"],
    }


def probe(daemon: InferenceDaemon, moment: Callable[[], datetime], seconds: float) -> list[float]:
    """Send 20 records again and again; return each answer's time in ms."""
    link = http.client.HTTPConnection("127.0.0.1", daemon.port)
    latencies_ms = []
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        number += 1
        moment_text = iso_z(moment() + timedelta(milliseconds=number % 290_000))
        body = json.dumps(
            {"records": [record(f"probe-{i:02d}", moment_text, float(number % 90)) for i in range(20)]}
        )
        began = time.perf_counter()
        link.request("POST", "/feed/data", body)
        answer = link.getresponse()
        content = answer.read()
        latencies_ms.append((time.perf_counter() - began) * 1000)
        assert answer.status == 200, content
        time.sleep(PAUSE_S)
    link.close()
    return latencies_ms


class Fleet:
    """Servers whose bins close one after the other, as fast as they are forecast."""

    def __init__(self, daemon: InferenceDaemon, n_servers: int, n_history: int = HISTORY_BINS) -> None:
        self._daemon = daemon
        self._n_history = n_history
        self._names = [f"server-{i:04d}" for i in range(n_servers)]
        now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        self._bin_start = now - BACKLOG - n_history * BIN
        self._rng = np.random.default_rng(7)

    def moment(self) -> datetime:
        """Return the start of the newest closed bin: records of the open one would keep it from closing."""
        return self._bin_start - BIN

    def give_history(self) -> None:
        """Send one record per server and bin for a day and some."""
        for _ in range(self._n_history if self._names else 0):
            self._send()

    def close_a_bin(self) -> None:
        """Open the next bin, which closes the one before, and wait for its sweep."""
        if not self._names:
            time.sleep(0.1)
            return
        count = self._daemon.status()["sweep"]["count"]
        self._send()
        wait_for("the sweep", lambda: self._daemon.status()["sweep"]["count"] > count)

    def _send(self) -> None:
        self._bin_start += BIN
        text = iso_z(self._bin_start)
        values = np.round(50 + 20 * self._rng.standard_normal(len(self._names)).clip(-2, 2), 2)
        self._daemon.client.post_records(
            [record(name, text, float(value)) for name, value in zip(self._names, values, strict=True)]
        )


class Repeating(threading.Thread):
    """Does something over and over while its block runs."""

    def __init__(self, action: Callable[[], object], pause_s: float) -> None:
        super().__init__(daemon=True)
        self._action = action
        self._pause_s = pause_s
        self._is_over = threading.Event()

    def run(self) -> None:
        """Repeat until the block ends."""
        while not self._is_over.is_set():
            self._action()
            self._is_over.wait(self._pause_s)

    def __enter__(self) -> "Repeating":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.join()


def record(name: str, moment: str, value: float) -> dict[str, Any]:
    """Return one record with four metrics."""
    return {"timestamp": moment, "server_name": name, **dict.fromkeys(METRICS, value)}


def promote(folder: Path, number: int) -> None:
    """Put a model of the real network with random weights into service."""
    Registry(folder / "checkpoints").promote(store(folder, number))


def store(folder: Path, number: int) -> str:
    """Store a model of the real network with random weights; return its version."""
    import torch

    from fleetcast.forecast.checkpoint import ModelDescription
    from fleetcast.forecast.encoding import GridShape
    from fleetcast.forecast.network import NetworkConfig
    from fleetcast.forecast.predictor import Forecaster
    from fleetcast.training.network import as_arrays, build

    torch.manual_seed(number)
    version = f"20260115T{100000 + number:06d}Z-0000"
    grid = GridShape(bin_ms=300_000, horizon_bins=96)
    config = NetworkConfig.for_grid(grid, 32)
    now = iso_z(datetime.now(UTC))
    model = Forecaster(
        ModelDescription(version, now, METRICS, grid, config), as_arrays(build(config).state_dict())
    )
    registry = Registry(folder / "checkpoints")
    if version not in registry.version_ids():
        contents = {"model.ckpt": model.to_bytes(), "baseline.npz": b""}
        registry.add(version, contents, {"created_at": now, "parent": None, "promoted": True})
    return version


def sweep_seconds(daemon: InferenceDaemon) -> float:
    """Return the time all sweeps took since the start."""
    link = http.client.HTTPConnection("127.0.0.1", daemon.port)
    link.request("GET", "/metrics")
    lines = link.getresponse().read().decode().splitlines()
    link.close()
    return next(float(line.split()[1]) for line in lines if line.startswith("fleetcast_sweep_seconds_sum"))


if __name__ == "__main__":
    raise SystemExit(main())
