"""Attacks on the inference daemon, and what they cost it and its other clients: `make attacks`.

    .venv/bin/python -m benchmarks.faults.attacks [--only WORD] [--keep]

A real daemon serves a fleet of 1,000 servers; a second process attacks it; an honest client posts 20
records ten times a second meanwhile. Prints a table, writes `results/attacks_DATE.json` and the table
of docs/security.md.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psutil
import requests

from benchmarks.faults.parts.attacks import ATTACKS, N_SERVERS, SECONDS, server_name
from benchmarks.faults.reliability_tables import with_part
from benchmarks.programs import InferenceDaemon, wait_for
from benchmarks.results_file import ROOT, write_results
from fleetcast.clock import iso_z, monotonic, sleep

DOCUMENT = ROOT / "docs" / "security.md"
MB = 1e6
KEPT_MAX_MB = 300.0  # what a daemon may keep of an attack
N_BURSTS = 10  # of abandoned reads
SPREAD_MAX = 1.2  # memory after the last of them over memory after the first
SETTLE_S = 12.0
DESCRIPTORS = 1024  # the usual soft limit


@dataclass
class Honest:
    """A client that posts 20 records ten times a second, and what it was answered."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Honest":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        session = requests.Session()
        while not self._stop.is_set():
            began = monotonic()
            try:
                code = session.post(
                    f"{self.url}/feed/data", data=_records(20), headers=self.headers, timeout=60
                ).status_code
            except requests.RequestException:
                session, code = requests.Session(), 0
            self.seconds.append(monotonic() - began)
            if code != 200:
                self.refused.append(code)
            self._stop.wait(max(0.0, 0.1 - (monotonic() - began)))


def _records(n_servers: int, moment: datetime | None = None, first: int = 0) -> bytes:
    stamp = iso_z(moment or datetime.now(UTC))
    rows = [
        {"timestamp": stamp, "server_name": server_name(first + number), "cpu_pct": 12.5, "mem_pct": 40.0,
         "disk_io_mb_s": 3.0, "latency_ms": 2.0}
        for number in range(n_servers)
    ]  # fmt: skip
    return json.dumps({"records": rows}).encode()


@dataclass
class Outcome:
    """What one attack cost."""

    attack: str
    before_mb: float = 0.0
    peak_mb: float = 0.0
    after_mb: float = 0.0
    cpu_s: float = 0.0
    posts: int = 0
    refused: int = 0
    p99_s: float = 0.0
    worst_s: float = 0.0
    silent_s: float = 0.0  # longest wait for /health
    bursts_mb: list[float] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether memory came back and the honest client was served throughout."""
        spread = max(self.bursts_mb) / self.bursts_mb[0] if self.bursts_mb else 1.0
        return self.after_mb - self.before_mb < KEPT_MAX_MB and not self.refused and spread <= SPREAD_MAX

    def as_row(self) -> str:
        """Return its line of the table."""
        text = (ATTACKS[self.attack].__doc__ or "").strip().rstrip(".")
        kept = (
            f"{self.after_mb:.0f}"
            if self.after_mb - self.before_mb < KEPT_MAX_MB
            else f"**{self.after_mb:.0f}**"
        )
        refused = f"{self.refused}" if not self.refused else f"**{self.refused}**"
        return (
            f"| {text} | {self.before_mb:.0f} | {self.peak_mb:.0f} | {kept} | {self.cpu_s:.1f} "
            f"| {self.posts} ({refused}) | {1000 * self.p99_s:.0f} | {1000 * self.silent_s:.0f} |"
        )


class Watch:
    """Samples the daemon's memory, and its answer to /health, until the block ends."""

    def __init__(self, daemon: InferenceDaemon) -> None:
        self._daemon = daemon
        self.peak = self.silent_s = 0.0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._sample, self._ask)]

    def __enter__(self) -> "Watch":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, self._daemon.memory_bytes)

    def _ask(self) -> None:
        while not self._stop.wait(0.1):
            began = monotonic()
            try:
                requests.get(f"{self._daemon.url}/health", timeout=60)
            except requests.RequestException:
                continue
            finally:
                self.silent_s = max(self.silent_s, monotonic() - began)


def _cpu_s(daemon: InferenceDaemon) -> float:
    times = psutil.Process(daemon.process.pid).cpu_times()
    return float(times.user + times.system)


def attack(name: str, daemon: InferenceDaemon, headers: dict[str, str]) -> Outcome:
    """Carry out one attack on a running daemon."""
    outcome = Outcome(name, before_mb=daemon.memory_bytes / MB)
    began_cpu = _cpu_s(daemon)
    with Honest(daemon.url, headers) as honest, Watch(daemon) as watch:
        for _ in range(N_BURSTS if name == "abandoned_reads" else 1):
            subprocess.run(
                [sys.executable, "-m", "benchmarks.faults.parts.attacks", name, str(daemon.port)],
                cwd=ROOT, check=True, timeout=900,
            )  # fmt: skip
            if name == "abandoned_reads":
                sleep(SETTLE_S / 2)
                outcome.bursts_mb.append(daemon.memory_bytes / MB)
        sleep(1.0)
    outcome.cpu_s = _cpu_s(daemon) - began_cpu
    sleep(SETTLE_S)
    outcome.after_mb, outcome.peak_mb, outcome.silent_s = (
        daemon.memory_bytes / MB,
        watch.peak / MB,
        watch.silent_s,
    )
    outcome.posts, outcome.refused = len(honest.seconds), len(honest.refused)
    outcome.p99_s, outcome.worst_s = (float(np.quantile(honest.seconds, q)) for q in (0.99, 1.0))
    return outcome


def _few_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))


def try_out(name: str, folder: Path) -> Outcome:
    """Start a daemon with a fleet and attack it."""
    key = "right" if name == "wrong_keys" else ""
    environ = {"TFT_API_KEY": key} if key else {}
    headers = {"X-API-Key": key} if key else {}
    with InferenceDaemon(folder, environ=environ, preexec=_few_descriptors) as daemon:
        begin = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=25)
        for step in range(4):
            body = _records(N_SERVERS, begin + step * timedelta(minutes=5))
            requests.post(
                f"{daemon.url}/feed/data", data=body, headers=headers, timeout=60
            ).raise_for_status()
        wait_for("the fleet's forecasts", lambda: daemon.status()["sweep"]["count"] > 0)
        wait_for("the model", lambda: bool(daemon.status()["model"]["version"]))
        sleep(5.0)
        return attack(name, daemon, headers)


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the table of docs/security.md."""
    head = (
        "| attack | MB before | most | 12 s after | CPU s | honest posts (not 200) | their p99 in ms "
        "| longest wait for `/health` in ms |\n|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *(outcome.as_row() for outcome in outcomes)])


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out every attack; exit 1 if one of them left something behind or an honest post was refused."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.faults.attacks", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--only", default="", help="only attacks whose name holds this word")
    parser.add_argument("--keep", action="store_true", help="leave docs/security.md as it is")
    options = parser.parse_args(argv)
    outcomes = []
    for name in ATTACKS:
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory(prefix="fleetcast-attack-") as folder:
            outcomes.append(try_out(name, Path(folder)))
        print(outcomes[-1].as_row(), outcomes[-1].bursts_mb or "", flush=True)
    if not options.keep and not options.only:
        write_results("attacks", {"attack_s": SECONDS, "attacks": [asdict(outcome) for outcome in outcomes]})
        made = f"Made by `make attacks`, ended {iso_z(datetime.now(UTC))}."
        part = f"{made}\n\n{table(outcomes)}"
        DOCUMENT.write_text(with_part(DOCUMENT.read_text("utf-8"), "attacks", part), "utf-8")
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
