"""What a start costs: CPU seconds of the two checks, and when the inference daemon accepts its first post.

    .venv/bin/python -m benchmarks.ingest.cold_start [--runs 7] [--no-bytecode]

`adaptive_retraining_daemon.py --once` and `drift_monitor.py` run to their end, in a folder with a small
buffer (three servers, three days of 5-minute bins, settled forecasts, a version in service) and in an
empty one; the figure is user + system time of the process. Of the daemon it is the time from just before
exec until `POST /feed/data` answers 200, asked every few milliseconds, beside the CPU time it had used
by then: on shared cores the time on the clock is an upper bound. Each case runs once uncounted, so that
bytecode is compiled as in an installation; with `--no-bytecode` every start compiles our files again.
Each case runs once more under `-X importtime`, for the sums by package.
"""

import argparse
import dataclasses
import http.client
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.programs import ROOT, free_port
from benchmarks.results_file import write_results
from fleetcast.clock import SystemClock, from_ms, iso_z, to_ms
from fleetcast.drift.literal.baseline import Baseline
from fleetcast.forecast.registry import Registry
from fleetcast.schema import SettledForecasts
from fleetcast.storage.store import DataBuffer

SERVERS, METRICS = ("web-01", "web-02", "web-03"), ("cpu_pct", "mem_pct")
BIN_MS = 300_000
HISTORY_BINS, SETTLED_BINS = 740, 120
VERSION = "20260115T080000Z-aaaa"
AWAY = "http://127.0.0.1:9"  # nothing listens there: the checks cost the same everywhere
CHECKS = (("adaptive_retraining_daemon.py", "--once", "--daemon-url", AWAY), ("drift_monitor.py",))
DAEMON = "tft_inference_daemon.py"
STEP_S = 0.003
START_LIMIT_S = 60.0
SHOWN = 8  # packages
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s*([\w.]+)")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case, print medians, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each case")
    parser.add_argument("--no-bytecode", action="store_true", help="keep no compiled files of ours")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        starts = Starts(Path(folder), keeps_bytecode=not options.no_bytecode)
        rows = starts.measure(options.runs)
    for row in rows:
        print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    name = "cold_start_no_bytecode" if options.no_bytecode else "cold_start"
    print(write_results(name, {"runs": options.runs, "cases": rows}))
    return 0


class Starts:
    """The folders and the environment that programs start in."""

    def __init__(self, folder: Path, *, keeps_bytecode: bool) -> None:
        self._folder = folder
        self._fleet = folder / "fleet"
        make_fleet(self._fleet)
        self._code = folder / "code"  # a copy: compiled files that lie in a checkout would be read
        for name in (*ROOT.glob("*.py"), ROOT / "fleetcast", ROOT / "models"):
            copy_code(name, self._code / name.name)
        kept = {
            name: text for name, text in os.environ.items() if not name.startswith(("TFT_", "FLEETCAST_"))
        }
        kept.pop("PYTHONDONTWRITEBYTECODE", None)
        own = {"PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
        self._environ = kept | (own if keeps_bytecode else {"PYTHONDONTWRITEBYTECODE": "1"})

    def measure(self, n_runs: int) -> list[dict[str, Any]]:
        """Return a row for each case."""
        rows: list[dict[str, Any]] = []
        for has_fleet in (True, False):
            for command in CHECKS:
                rows.append(self._measure(command, has_fleet, n_runs, self._check))
            rows.append(self._measure((DAEMON,), has_fleet, n_runs, self._first_post))
        return rows

    def _measure(
        self,
        command: Sequence[str],
        has_fleet: bool,
        n_runs: int,
        run: Callable[[Sequence[str], Path], Mapping[str, float]],
    ) -> dict[str, Any]:
        run([sys.executable, str(self._code / command[0]), *command[1:]], self._place(has_fleet))  # uncounted
        found = [
            run([sys.executable, str(self._code / command[0]), *command[1:]], self._place(has_fleet))
            for _ in range(n_runs)
        ]
        watched = [sys.executable, "-X", "importtime", str(self._code / command[0]), *command[1:]]
        place = self._place(has_fleet)
        run(watched, place)
        medians = {name: round(statistics.median(one[name] for one in found), 2) for name in found[0]}
        spread = {f"{name}_all": sorted(round(one[name], 2) for one in found) for name in found[0]}
        where = "small buffer" if has_fleet else "empty folder"
        return {"program": " ".join(command[:2]), "folder": where, **medians, **spread, **imports(place)}

    def _place(self, has_fleet: bool) -> Path:
        """Return a fresh folder: what a run writes is not there for the next one."""
        place = self._folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        if has_fleet:
            shutil.copytree(self._fleet, place, symlinks=True)
        else:
            place.mkdir()
        return place

    def _start(self, command: Sequence[str], place: Path) -> "subprocess.Popen[bytes]":
        with (place / "stderr").open("wb") as told:
            return subprocess.Popen(
                command, cwd=place, env=self._environ, stdout=subprocess.DEVNULL, stderr=told
            )

    def _check(self, command: Sequence[str], place: Path) -> dict[str, float]:
        """Run a check to its end."""
        process = self._start(command, place)
        _pid, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        expected = 0 if (place / "data_buffer").exists() else 6
        told = (place / "stderr").read_text()
        assert process.returncode == expected, f"exit code {process.returncode}: {told or 'without a word'}"
        return {"cpu_s": used.ru_utime + used.ru_stime}

    def _first_post(self, command: Sequence[str], place: Path) -> dict[str, float]:
        """Start the daemon, post until it accepts, end it."""
        port = free_port()
        started = time.perf_counter()
        process = self._start([*command, "--port", str(port)], place)
        try:
            while not is_accepted(port):
                assert process.poll() is None, (place / "stderr").read_text()
                assert time.perf_counter() - started < START_LIMIT_S, "no post was accepted"
                time.sleep(STEP_S)
            took_s, cpu_s = time.perf_counter() - started, cpu_seconds(process.pid)
        finally:
            process.kill()
            process.wait()
        return {"first_post_s": took_s, "cpu_s": cpu_s}


def copy_code(source: Path, target: Path) -> None:
    """Copy a file or a folder without what Python compiled."""
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target.parent.mkdir(exist_ok=True)
        shutil.copy(source, target)


def is_accepted(port: int) -> bool:
    """Post one record; return whether it was accepted, False while nothing listens."""
    record = {"timestamp": iso_z(SystemClock().now()), "server_name": "web-01", "cpu_pct": 12.5}
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=START_LIMIT_S)
    try:
        link.request(
            "POST", "/feed/data", json.dumps({"records": [record]}), {"Content-Type": "application/json"}
        )
        answer = link.getresponse()
        assert answer.status == 200, answer.read()
        return bool(json.loads(answer.read())["records_received"] == 1)
    except ConnectionError:
        return False
    finally:
        link.close()


def cpu_seconds(pid: int) -> float:
    """Return what a living process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def imports(place: Path) -> dict[str, Any]:
    """Return the milliseconds of imports by package, until the daemon listens or the program ends."""
    told = (place / "stderr").read_text(errors="replace").partition("listening url=")[0]
    by_package: Counter[str] = Counter()
    for spent_us, module in _IMPORT.findall(told):
        by_package[module.partition(".")[0]] += int(spent_us)
    shown = {name: round(spent_us / 1000) for name, spent_us in by_package.most_common(SHOWN)}
    return {"imports_ms": round(sum(by_package.values()) / 1000), "imports_by_package_ms": shown}


def make_fleet(folder: Path) -> None:
    """Write a small buffer whose newest bin is of now, and a version in service."""
    end_bin = to_ms(SystemClock().now()) // BIN_MS
    bins = range(end_bin - HISTORY_BINS, end_bin)
    buffer = DataBuffer(folder / "data_buffer")
    buffer.open()
    buffer.append(
        {
            "timestamp": iso_z(from_ms(number * BIN_MS)),
            "server_name": server,
            **{metric: steady(number, row) for row, metric in enumerate(METRICS)},
        }
        for number in bins
        for server in SERVERS
    )
    buffer.append_predictions(settle(bins[-SETTLED_BINS:]))
    buffer.close()
    put_into_service(folder, bins[:-SETTLED_BINS])


def steady(number: int, row: int) -> float:
    """Return a value around 40 that moves a little with time."""
    return float(40 + 5 * np.sin(number / 9 + row) + (number * 7919 % 13) / 13)


def settle(bins: Sequence[int]) -> SettledForecasts:
    """Return settled forecasts one bin ahead that were right."""
    keys = [(number, server, row) for number in bins for server in SERVERS for row in range(len(METRICS))]
    target = np.array([number * BIN_MS for number, *_ in keys], np.int64)
    actual = np.array([steady(number, row) for number, _, row in keys])
    return SettledForecasts(
        origin_ms=target - BIN_MS,
        target_ms=target,
        horizon=np.ones(len(keys), np.int32),
        server_name=np.array([server for _, server, _ in keys], object),
        metric=np.array([METRICS[row] for *_, row in keys], object),
        p10=actual - 1,
        p50=actual,
        p90=actual + 1,
        actual=actual,
        model_version=np.array([VERSION] * len(keys), object),
    )


def put_into_service(folder: Path, bins: Sequence[int]) -> None:
    """Promote a version with a baseline; its weights are none, so the daemon loads the base."""
    values = np.empty((len(SERVERS), len(METRICS), len(bins)), np.float32)  # (server, metric, time)
    for row in range(len(METRICS)):
        values[:, row] = [steady(number, row) for number in bins]
    made = Baseline.from_grid(values, bins[0] * BIN_MS, BIN_MS, SERVERS, METRICS, VERSION)
    known = dataclasses.replace(made, series_error_mae=np.full(values.shape[:2], 1.0, np.float32))
    registry, end = Registry(folder / "checkpoints"), from_ms((bins[-1] + 1) * BIN_MS)
    span = {"start": iso_z(end - timedelta(milliseconds=len(bins) * BIN_MS)), "end": iso_z(end)}
    manifest = {"created_at": iso_z(end), "promoted": True, "data_range": span}
    registry.add(VERSION, {"model.ckpt": b"no model", "baseline.npz": known.to_bytes()}, manifest)
    registry.promote(VERSION)
    registry.set_baseline(VERSION)


if __name__ == "__main__":
    raise SystemExit(main())
