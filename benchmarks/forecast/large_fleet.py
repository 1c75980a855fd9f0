"""The real daemon with 10,000 servers: sweeps, memory, the feed beside them, hot reloads.

    .venv/bin/python -m benchmarks.forecast.large_fleet [--servers 10000] [--bins 3] [--shadow] [--shards 2]

One daemon, the real network (random weights, hidden 32), fed over loopback: `--history` bins of
one record per server fast (their sweeps overtake each other, as after an outage), then bins one by
one, each forecast before the next one closes. A second connection sends 20 records every 50 ms all
the while and notes how long each answer takes. At the end `/predictions/current` is read whole,
twice, and models are replaced while sweeps go on. With `--shadow` the model was switched before the
measured sweeps, so that the one before is compared with it (the bake), on as many servers as by default.
With `--shards` the daemon has that many processes that forecast; their CPU seconds and memory are told, too.

    .venv/bin/python -m benchmarks.forecast.large_fleet --restart [--servers 10000] [--days 8] [--interval 60]

measures a restart instead: sealed days of one record per server and `--interval` seconds, then ten minutes
of an open day, are read as a new daemon does, with the kept means and without; and a daemon is started.

    .venv/bin/python -m benchmarks.forecast.large_fleet --forget [--servers 10000] [--days 8] [--interval 300]

measures `fleetcast servers forget` of one server and of 100 on such days: until all rows are gone, what the
daemon and its children spend, and how long posts of 20 records take meanwhile.
"""

import argparse
import http.client
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from benchmarks.ingest.feed_latency import Fleet, Repeating, probe, promote, store
from benchmarks.programs import ROOT, InferenceDaemon, wait_for
from benchmarks.results_file import write_results
from fleetcast.clock import DAY_MS, FakeClock
from fleetcast.exclusions import read_forgotten
from fleetcast.forecast.registry import Registry
from fleetcast.inference import restore
from fleetcast.promotion.desk import Desk
from fleetcast.schema import RecordBatch
from fleetcast.serving import roster
from fleetcast.serving.history import BinHistory
from fleetcast.serving.ledger import Ledger
from fleetcast.serving.shards import MODULE as SHARD
from fleetcast.settings import BinSettings, ForecastSettings
from fleetcast.sources.client import ARROW, DaemonClient
from fleetcast.storage.bin_days import make_bins
from fleetcast.storage.days import day_of_ms, day_path
from fleetcast.storage.parts import write_part
from fleetcast.storage.store import DataBuffer
from fleetcast.storage.tables import BINS, METRICS, batch_of_table, canonical, table_of_batch

RELOADS = 3
_FIRST_MS, _BIN_MS = 1_768_435_200_000, 300_000  # 2026-01-15
_METRICS = ("cpu_pct", "mem_pct", "disk_io_mb_s", "latency_ms")
_POST_SERVERS = 2000


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--servers", type=int, default=10_000)
    parser.add_argument("--history", type=int, default=14, help="bins sent before (a model needs 12)")
    parser.add_argument("--bins", type=int, default=3, help="bins swept one by one")
    parser.add_argument("--shadow", action="store_true", help="with the model before beside the new one")
    parser.add_argument("--shards", type=int, default=1, help="processes that forecast")
    parser.add_argument("--restart", action="store_true", help="measure a restart instead")
    parser.add_argument("--forget", action="store_true", help="measure `fleetcast servers forget` instead")
    parser.add_argument("--days", type=int, default=8, help="sealed days of a restart, or to forget in")
    parser.add_argument("--interval", type=int, default=60, help="seconds between a server's stored records")
    parser.add_argument("--restore", type=Path, help=argparse.SUPPRESS)  # the child: the folder
    options = parser.parse_args(argv)
    if options.restore:
        print(json.dumps(restore_once(options.restore)))
        return 0
    if options.restart:
        with tempfile.TemporaryDirectory() as folder:
            figures = restart(Path(folder), options.servers, options.days, options.interval)
        print(write_results(f"large_fleet_restart_{options.interval}s", figures))
        return 0
    if options.forget:
        with tempfile.TemporaryDirectory() as folder:
            figures = forget(Path(folder), options.servers, options.days, options.interval)
        print(write_results(f"large_fleet_forget_{options.interval}s", figures))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        figures = run(Path(folder), options)
    for name, value in figures.items():
        print(f"{name:32s} {value}")
    name = f"large_fleet_{options.shards}_shards" if options.shards > 1 else "large_fleet"
    print(write_results(f"{name}_shadow" if options.shadow else name, figures))
    return 0


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one daemon."""
    promote(folder, 0)
    n_servers, n_bins = options.servers, options.bins
    environ = {"FLEETCAST_SERVER_MAX_SERVER_NAMES": str(2 * n_servers)}
    with InferenceDaemon(folder, "--shards", str(options.shards), environ=environ) as daemon:
        wait_for("the model", lambda: daemon.status()["model"]["version"] is not None)
        idle_mb = daemon.memory_bytes / 1e6
        fleet = LargeFleet(daemon, n_servers)
        for _ in range(options.history):
            fleet.send_a_bin()
        wait_for("the backlog", lambda: daemon.status()["backlog"] == 0, 300)
        if options.shadow:
            _begin_bake(daemon, folder)
        sweeps: list[dict[str, Any]] = []
        latencies_ms: list[float] = []
        prober = threading.Thread(target=_probe_until, args=(daemon, fleet, latencies_ms, sweeps, n_bins))
        prober.start()
        for _ in range(n_bins):
            sweeps.append(fleet.sweep_once())
            print(sweeps[-1], flush=True)
        prober.join()
        share = f"?shard=0/{2 * -(-n_servers // 20_000)}" if n_servers > 20_000 else ""
        documents = [_timed_read(daemon, share) for _ in range(2)]
        tables = [_timed_read(daemon, "", ARROW) for _ in range(2)]
        peak_mb = _peak_mb(daemon.process.pid)
        shards_mb = [round(_peak_mb(pid)) for pid in _shards_of(daemon)]
        print(f"peak {peak_mb:.0f} MB, idle {idle_mb:.0f} MB, documents {documents}", flush=True)
        reloads = _reload_beside_sweeps(daemon, fleet, folder)
    return {
        "servers": n_servers,
        "sweeps": sweeps,
        "feed_p50_ms": round(float(np.quantile(latencies_ms, 0.5)), 1),
        "feed_p99_ms": round(float(np.quantile(latencies_ms, 0.99)), 1),
        "feed_max_ms": round(max(latencies_ms), 1),
        "feed_requests": len(latencies_ms),
        "idle_mb": round(idle_mb),
        "peak_above_idle_mb": round(peak_mb - idle_mb),
        "shards_peak_mb": shards_mb,
        "load_1_min": round(os.getloadavg()[0], 1),
        "document_mb": round(documents[0][1] / 1e6, 1),
        "document_s_first_and_second": [round(seconds, 2) for seconds, _, _ in documents],
        "document_cpu_s": [round(cpu_s, 2) for _, _, cpu_s in documents],
        "table_mb": round(tables[0][1] / 1e6, 1),
        "table_s": [round(seconds, 2) for seconds, _, _ in tables],
        "table_cpu_s": [round(cpu_s, 2) for _, _, cpu_s in tables],
        "reloads_s_beside_sweeps": reloads,
    }


def restart(folder: Path, n_servers: int, n_days: int, interval_s: int) -> dict[str, Any]:
    """Return what sealed days cost with and without means, and what a daemon's start takes."""
    place = folder / "data_buffer"
    figures: dict[str, Any] = {"servers": n_servers, "days": n_days, "interval_s": interval_s}
    figures |= store_days(place, n_servers, n_days, interval_s)
    print(figures, flush=True)
    figures["daemon"] = _start(folder)
    for name in ("with means", "without means"):
        if name == "without means":
            for path in place.glob("bins_*.parquet"):
                path.unlink()
        command = [sys.executable, "-m", "benchmarks.forecast.large_fleet", "--restore", str(place)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        figures[name] = json.loads(done.stdout)
        print(name, figures[name], flush=True)
    return figures


def forget(folder: Path, n_servers: int, n_days: int, interval_s: int) -> dict[str, Any]:
    """Return what forgetting one server, then 100 at once, takes in a buffer of sealed days."""
    figures: dict[str, Any] = {"servers": n_servers, "days": n_days, "interval_s": interval_s}
    figures |= store_days(folder / "data_buffer", n_servers, n_days, interval_s)
    newest = datetime.fromtimestamp(_FIRST_MS / 1000, UTC) + timedelta(days=n_days, seconds=600 - interval_s)
    daemon = InferenceDaemon(folder, "--clock", "data")
    daemon.launch()
    try:
        wait_for("the start", partial(_answers, daemon, "/ready"), 1800)
        figures["nothing to do"] = _beside_posts(daemon, newest, lambda: time.sleep(20))
        for first, n_names in ((1, 1), (100, 100)):
            names = [f"server-{number:05d}" for number in range(first, first + n_names)]
            figures[f"forget {n_names}"] = _beside_posts(daemon, newest, partial(_forget, daemon, names))
            print(figures, flush=True)
    finally:
        daemon.kill()
    return figures


def _forget(daemon: InferenceDaemon, names: Sequence[str]) -> None:
    """Order it as a person does; return when all rows are gone."""
    order = [sys.executable, "-m", "fleetcast.console.servers", "forget", *names, "--reason", "a benchmark"]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "FLEETCAST_RETRAINING_DAEMON_URL": daemon.url}
    subprocess.run(order, cwd=daemon.folder, env=environ, check=True, stdout=subprocess.DEVNULL)
    wait_for("the rows", partial(_are_gone, daemon.folder / "checkpoints", names), 1800)


def _are_gone(folder: Path, names: Sequence[str]) -> bool:
    known = read_forgotten(folder)
    return all(known[name].records_gone for name in names)


def _beside_posts(daemon: InferenceDaemon, at: datetime, act: Callable[[], None]) -> dict[str, Any]:
    """Return what something costs the daemon and its children, and posts while it goes on."""
    latencies_ms: list[float] = []
    cpu_before, began = _all_cpu_s(daemon), time.monotonic()
    with Repeating(lambda: latencies_ms.extend(probe(daemon, lambda: at, 0.5)), pause_s=0.0):
        act()
        took_s = time.monotonic() - began
        cpu_s = _all_cpu_s(daemon) - cpu_before
    p50, p99 = np.quantile(latencies_ms, (0.5, 0.99))
    return {
        "took_s": round(took_s, 1),
        "cpu_s": round(cpu_s, 1),
        "posts": len(latencies_ms),
        "post_p50_ms": round(float(p50), 1),
        "post_p99_ms": round(float(p99), 1),
        "post_max_ms": round(max(latencies_ms), 1),
        "load_1_min": round(os.getloadavg()[0], 1),
    }


def _all_cpu_s(daemon: InferenceDaemon) -> float:
    used = psutil.Process(daemon.process.pid).cpu_times()
    return float(used.user + used.system + used.children_user + used.children_system)


def restore_once(place: Path) -> dict[str, float]:
    """Read a buffer as a restart does, in this process; return what that took."""
    buffer, forecast = DataBuffer(place, expire=False), ForecastSettings()
    newest = buffer.newest_record_time()
    assert newest is not None
    history = BinHistory(BinSettings(), forecast)
    fleet = roster.Fleet(history, roster.Roster(forecast), FakeClock(newest), forecast, is_data_clock=True)
    ledger = Ledger(place, forecast.settle_horizons, history.bin_ms, "data")
    cpu, began = time.process_time(), time.monotonic()
    restore(buffer, fleet, ledger)
    return {
        "servers": history.n_servers,
        "cpu_s": round(time.process_time() - cpu, 1),
        "wall_s": round(time.monotonic() - began, 1),
        "peak_mb": round(_peak_mb()),
        "load_1_min": round(os.getloadavg()[0], 1),
    }


def store_days(place: Path, n_servers: int, n_days: int, interval_s: int) -> dict[str, float]:
    """Write sealed days and their means; return what the last day took."""
    place.mkdir()
    found: dict[str, float] = {}
    for number in range(n_days):
        start_ms = _FIRST_MS + number * DAY_MS
        day, n_ticks = day_of_ms(start_ms), DAY_MS // 1000 // interval_s
        parts = [range(n_servers)[at : at + 100] for at in range(0, n_servers, 100)]
        tables = (_rows(part, start_ms, n_ticks, interval_s) for part in parts)
        schema = _rows(range(1), start_ms, 1, 1).schema
        path, began = day_path(place, METRICS, day), time.process_time()
        n_rows = write_part(path, tables, METRICS, schema, number + 1, is_sealed=True)
        stored = time.process_time()
        n_bins = make_bins(place, day, _BIN_MS, day_path(place, BINS, day))
        found = {
            "rows_a_day": n_rows,
            "bins_a_day": n_bins,
            "write_cpu_s_a_day": round(stored - began, 1),
            "means_cpu_s_a_day": round(time.process_time() - stored, 2),
            "sealed_mb_a_day": round(path.stat().st_size / 1e6, 1),
            "means_mb_a_day": round(day_path(place, BINS, day).stat().st_size / 1e6, 1),
        }
    owner = DataBuffer(place, expire=False)
    for at in range(0, n_servers, 1000):
        servers = range(n_servers)[at : at + 1000]
        rows = _rows(servers, _FIRST_MS + n_days * DAY_MS, 600 // interval_s, interval_s)
        owner.append_batch(batch_of_table(rows))
    owner.close()
    return found


def _rows(servers: range, start_ms: int, n_ticks: int, interval_s: int) -> pa.Table:
    """Return rows of some servers, sorted by key: a level, a day's rhythm and noise, at two decimals."""
    noise = np.random.default_rng([servers.start, start_ms % 2**31])
    times = start_ms + np.arange(n_ticks, dtype=np.int64) * interval_s * 1000
    rhythm = 10 * np.sin(times * (2 * np.pi / DAY_MS))
    codes = np.repeat(np.arange(len(servers), dtype=np.int32), n_ticks)
    metrics = {
        metric: np.round(50 + np.tile(rhythm, len(servers)) + noise.normal(0, 3, len(codes)), 2)
        for metric in _METRICS
    }
    names = tuple(f"server-{number:05d}" for number in servers)
    batch = RecordBatch(names, codes, np.tile(times, len(servers)), metrics)
    return canonical(table_of_batch(batch), METRICS)


def _start(folder: Path) -> dict[str, float]:
    """Start a daemon, kill it when it is ready; return when it answered, and what that took."""
    daemon = InferenceDaemon(folder, "--clock", "data")
    daemon.console.unlink(missing_ok=True)
    started = time.monotonic()
    daemon.launch()
    try:
        answered: dict[str, float] = {}
        for path in ("/health", "/ready"):
            wait_for(path, partial(_answers, daemon, path), 1800)
            answered[path] = round(time.monotonic() - started, 1)
        took = re.search(r"history restored .*servers=(\d+) .*took_s=([0-9.]+)", daemon.output)
        assert took is not None
        return {
            "health_s": answered["/health"],
            "restored_servers": int(took[1]),
            "restore_s": float(took[2]),
            "ready_s": answered["/ready"],
            "cpu_s": round(_cpu_s(daemon.process.pid), 1),
            "peak_mb": round(_peak_mb(daemon.process.pid)),
            "load_1_min": round(os.getloadavg()[0], 1),
        }
    finally:
        daemon.kill()


def _answers(daemon: InferenceDaemon, path: str) -> bool:
    assert daemon.process.poll() is None, daemon.output
    link = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=5)
    try:
        link.request("GET", path)
        return link.getresponse().status == 200
    except OSError:
        return False
    finally:
        link.close()


def _begin_bake(daemon: InferenceDaemon, folder: Path) -> None:
    """Switch the model as a training does, so that the one before is compared with the new one."""
    desk, version = Desk(Registry(folder / "checkpoints")), store(folder, 1000)
    with desk.lock():
        desk.promote(version, "the benchmark", "to compare")
    wait_for("the switch", lambda: daemon.status()["model"]["version"] == version, 120)


class LargeFleet(Fleet):
    """A fleet that is sent in several posts per bin; its first bin was 7 hours ago: forecasts are of use."""

    def __init__(self, daemon: InferenceDaemon, n_servers: int) -> None:
        super().__init__(daemon, n_servers, n_history=0)

    def send_a_bin(self) -> None:
        """Send one record per server of the next bin."""
        names = self._names
        start = self._bin_start
        for first in range(0, len(names), _POST_SERVERS):
            self._names, self._bin_start = names[first : first + _POST_SERVERS], start
            self._send()
        self._names = names

    def sweep_once(self) -> dict[str, Any]:
        """Close a bin and wait for its sweep; return what both took."""
        before = self._daemon.status()["sweep"]["count"]
        shards = _shards_of(self._daemon)
        cpu_before, started = [_cpu_s(pid) for pid in (self._daemon.process.pid, *shards)], time.monotonic()
        self.send_a_bin()
        sent = time.monotonic()
        wait_for("the sweep", lambda: self._daemon.status()["sweep"]["count"] > before, 300)
        sweep = self._daemon.status()["sweep"]
        published = time.monotonic()
        shadow_s = self._shadow_s()
        return {
            "sweep_s": round(float(sweep["seconds"]), 2),
            "send_s": round(sent - started, 2),
            "bin_closed_to_published_s": round(published - sent, 2),
            **({"shadow_s": round(shadow_s, 2)} if shadow_s is not None else {}),
            **_cpu_used(self._daemon, shards, cpu_before),
        }

    def _shadow_s(self) -> float | None:
        """Return how long the comparison after the sweep took, None without one."""
        if _shadow_seconds(self._daemon) is None:
            return None
        pid = self._daemon.process.pid
        used = _cpu_s(pid)
        while True:  # it goes on after the forecasts are published
            time.sleep(0.5)
            now = _cpu_s(pid)
            if now - used < 0.2:
                return _shadow_seconds(self._daemon)
            used = now


def _shadow_seconds(daemon: InferenceDaemon) -> float | None:
    link = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=60)
    link.request("GET", "/metrics")
    text = link.getresponse().read().decode()
    link.close()
    found = re.search(r"^fleetcast_shadow_seconds (\S+)$", text, re.M)
    return float(found[1]) if found else None


def _probe_until(
    daemon: InferenceDaemon,
    fleet: LargeFleet,
    latencies_ms: list[float],
    sweeps: list[dict[str, Any]],
    n_bins: int,
) -> None:
    while len(sweeps) < n_bins:
        latencies_ms += probe(daemon, fleet.moment, 0.5)


def _timed_read(daemon: InferenceDaemon, share: str, kind: str = "*/*") -> tuple[float, int, float]:
    """Return the seconds a whole document took, its bytes, and the daemon's CPU seconds."""
    process = psutil.Process(daemon.process.pid)
    cpu_s, started = sum(process.cpu_times()[:2]), time.monotonic()
    link = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=60)
    link.request("GET", f"/predictions/current{share}", headers={"Accept": kind})
    n_bytes = len(link.getresponse().read())
    link.close()
    return time.monotonic() - started, n_bytes, sum(process.cpu_times()[:2]) - cpu_s


def _reload_beside_sweeps(daemon: InferenceDaemon, fleet: LargeFleet, folder: Path) -> list[float]:
    """Replace the model a few times while sweeps go on; return what the daemon's log says each took."""
    numbers = itertools.count(1)
    # a client is for one thread, and the sweeps' thread uses the daemon's own
    with Repeating(fleet.sweep_once, pause_s=0.0), DaemonClient(daemon.url, timeout_s=20) as client:
        for _ in range(RELOADS):
            replaced = client.status()["model"]["version"]
            promote(folder, next(numbers))
            wait_for("the reload", partial(_serves_another, client, replaced), 900)
    return [float(took) for took in re.findall(r"model in service .*took_s=([0-9.]+)", daemon.output)][1:]


def _serves_another(client: DaemonClient, version: str) -> bool:
    return bool(client.status()["model"]["version"] != version)


def _shards_of(daemon: InferenceDaemon) -> list[int]:
    children = psutil.Process(daemon.process.pid).children()
    return [child.pid for child in children if SHARD in _command_of(child)]


def _command_of(process: psutil.Process) -> list[str]:
    """Return its command line, empty for one that has just ended (a seal of a day, a count of ratios)."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _cpu_used(daemon: InferenceDaemon, shards: Sequence[int], before: Sequence[float]) -> dict[str, Any]:
    """Return the CPU seconds since then, of the daemon and of each shard."""
    own, *others = [
        round(_cpu_s(pid) - was, 2) for pid, was in zip((daemon.process.pid, *shards), before, strict=True)
    ]
    return {"daemon_cpu_s": own, **({"shards_cpu_s": others} if others else {})}


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def _peak_mb(pid: int | str = "self") -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    raise SystemExit(main())
