"""How long does `fleetcast import` take for a fleet's month, in how much memory, and is anything there twice?

    .venv/bin/python -m benchmarks.ingest.import_history [--servers 300] [--days 30]

Makes a Prometheus that scraped the fleet every minute (blocks by promtool, not measured), starts the real
daemon, imports, and kills the import (SIGKILL) half-way; a second one goes on. Then the same records from one
Parquet file and one CSV file, each into a daemon of its own. Memory is the largest resident size, read five
times a second. `of_steps` counts the bins of the fleet's month; those at its start that fall out of the
window while the blocks are made are not asked for. `caught_up_s` is how long the daemon then takes until no
closed bin waits.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from benchmarks.ingest.parts.recorded_prometheus import Scrapes, backfill, missing_programs, serve
from benchmarks.programs import ROOT, InferenceDaemon
from benchmarks.results_file import write_results
from data_buffer import DataBuffer
from fleetcast.clock import SystemClock
from fleetcast.files import read_json

STEP_S = 300
POLL_S = 0.2
READY_LIMIT_S = 900


class Run:
    """One import as a process; what it took."""

    def __init__(self, folder: Path, daemon: InferenceDaemon, *words: str) -> None:
        command = [sys.executable, "-m", "fleetcast", "import", *words, "--daemon-url", daemon.url]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._began_s = time.monotonic()
        self._process = subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.PIPE)
        self._peaks: dict[int, int] = {}
        self._cpu_s = 0.0

    def watch(self, pids: Mapping[str, int], kill_when: "Any" = lambda: False) -> dict[str, Any]:
        """Wait for the end, or kill it; return wall and CPU seconds and peaks of memory."""
        peaks = dict.fromkeys(("import", *pids), 0)
        was_killed = False
        while self._process.poll() is None:
            for name, pid in {"import": self._process.pid, **pids}.items():
                try:
                    process = psutil.Process(pid)
                    peaks[name] = max(peaks[name], process.memory_info().rss)
                    if name == "import":
                        self._cpu_s = sum(process.cpu_times()[:2])
                except psutil.NoSuchProcess:
                    continue
            if not was_killed and kill_when():
                self._process.kill()
                was_killed = True
            time.sleep(POLL_S)
        assert was_killed or self._process.returncode == 0, self._process.returncode
        peaks_mb = {f"{name}_mb": round(size / 1e6) for name, size in peaks.items()}
        wall_s = round(time.monotonic() - self._began_s, 1)
        return {"wall_s": wall_s, "import_cpu_s": round(self._cpu_s, 1), **peaks_mb}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", type=int, default=300)
    parser.add_argument("--days", type=int, default=30)
    options = parser.parse_args(argv)
    if missing := missing_programs():
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        return 1
    folder = Path(tempfile.mkdtemp(prefix="fleetcast-import-"))
    try:
        print(write_results("import_history", _measure(folder, options.servers, options.days)))
    finally:
        shutil.rmtree(folder)
    return 0


def _measure(folder: Path, n_servers: int, days: int) -> dict[str, Any]:
    end_s = int(SystemClock().now().timestamp()) // STEP_S * STEP_S
    scrapes = Scrapes(n_servers, end_s - days * 86_400, end_s)
    figures: dict[str, Any] = {"servers": n_servers, "days": days, "samples": scrapes.n_samples}
    blocks = folder / "blocks"
    blocks.mkdir()
    began_s = time.monotonic()
    backfill(blocks, scrapes)
    figures["making_the_blocks_s"] = round(time.monotonic() - began_s, 1)
    figures["prometheus"] = _from_prometheus(folder, blocks, days, n_servers)
    frame = stored(folder / "prometheus")
    figures["parquet_mb"] = _size_mb(folder / "month.parquet", frame)
    figures["parquet"] = _from_file(folder, "parquet", len(frame))
    figures["csv_mb"] = _size_mb(folder / "month.csv", frame)
    figures["csv"] = _from_file(folder, "csv", len(frame))
    return figures


def _from_prometheus(folder: Path, blocks: Path, days: int, n_servers: int) -> dict[str, Any]:
    state = folder / "prometheus"
    state.mkdir()
    with serve(blocks) as (url, pid), InferenceDaemon(state) as daemon:
        words = ("prometheus", "--url", url, "--days", str(days))
        pids = {"daemon": daemon.process.pid, "prometheus": pid}
        first = Run(state, daemon, *words).watch(pids, lambda: _days_done(state) >= days / 2)
        at_kill = _days_done(state)
        second = Run(state, daemon, *words).watch(pids)
        caught_up_s = _wait_caught_up(daemon)
    frame = stored(state)
    n_twice = len(frame) - len(frame.drop_duplicates(["server_name", "timestamp"]))
    expected = n_servers * days * 86_400 // STEP_S
    told = {"records": len(frame), "of_steps": expected, "twice": n_twice, "days_done_at_the_kill": at_kill}
    return {**told, "killed": first, "went_on": second, "caught_up_s": caught_up_s}


def _days_done(state: Path) -> float:
    for path in state.glob("fleetcast_import_*.json"):
        found = read_json(path)
        return round((found["done_to"] - found["start"]) / 86_400_000, 2)
    return 0.0


def _from_file(folder: Path, kind: str, n_rows: int) -> dict[str, Any]:
    state = folder / kind
    state.mkdir()
    with InferenceDaemon(state) as daemon:
        path = str(folder / f"month.{kind}")
        took = Run(state, daemon, kind, path).watch({"daemon": daemon.process.pid})
        caught_up_s = _wait_caught_up(daemon)
    found = len(stored(state))
    assert found == n_rows, (found, n_rows)
    return {"records": found, **took, "caught_up_s": caught_up_s}


def _wait_caught_up(daemon: InferenceDaemon) -> float:
    began_s = time.monotonic()
    while daemon.status()["backlog"] and time.monotonic() - began_s < READY_LIMIT_S:
        time.sleep(POLL_S)
    return round(time.monotonic() - began_s, 1)


def stored(state: Path) -> pd.DataFrame:
    """Return what the buffer of a folder holds, in the order of time, then server."""
    frame = DataBuffer(state / "data_buffer").get_training_window(days=366, include_today=True)
    return frame.sort_values(["timestamp", "server_name"], ignore_index=True)


def _size_mb(path: Path, frame: pd.DataFrame) -> float:
    frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(path, index=False)
    return round(path.stat().st_size / 1e6, 1)


if __name__ == "__main__":
    raise SystemExit(main())
