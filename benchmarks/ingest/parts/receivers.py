"""The receivers that a user would pick instead, as Debian packages them, and ours, as processes.

Owns: command lines, paths that take remote-write and rows, and CPU, memory and bytes of a process and its
folder. A receiver whose program is not installed is not there.
"""

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from benchmarks.programs import InferenceDaemon, free_port

WRITE_HEADERS = "Content-Type: application/x-protobuf\r\nContent-Encoding: snappy"
JSON, LINES = "json", "lines"
SETTLE_LIMIT_S, AT_REST_CPU_S = 60.0, 0.05  # a second of less is rest
_READY_LIMIT_S = 60.0
_STOP_LIMIT_S = 60.0


@dataclass(frozen=True)
class Receiver:
    """How one of them is run and written to."""

    name: str
    program: str  # "" is ours
    write_path: str
    rows_path: str = ""  # where it takes rows; "" has none
    rows_form: str = LINES
    create_database: bool = False

    @property
    def is_installed(self) -> bool:
        """Whether its program is there."""
        return not self.program or shutil.which(self.program) is not None

    def command(self, folder: Path, port: int) -> list[str]:
        """Return how it is started."""
        address = f"127.0.0.1:{port}"
        if self.program == "prometheus":
            config = folder / "prometheus.yml"
            config.write_text("scrape_configs: []\n")
            flags = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
            flags += ["--storage.tsdb.retention.time=10y", f"--web.listen-address={address}"]
            return [self.program, *flags, "--web.enable-remote-write-receiver"]
        if self.program == "victoria-metrics":
            flags = [f"-storageDataPath={folder / 'data'}", f"-httpListenAddr={address}"]
            return [self.program, *flags, "-retentionPeriod=100y", "-loggerLevel=ERROR"]
        config = folder / "influxdb.conf"
        config.write_text(
            f'reporting-disabled = true\nbind-address = "127.0.0.1:{free_port()}"\n'
            f'[meta]\ndir = "{folder}/meta"\n[data]\ndir = "{folder}/data"\nwal-dir = "{folder}/wal"\n'
            f'index-version = "tsi1"\nquery-log-enabled = false\n'
            f'[http]\nbind-address = "{address}"\nlog-enabled = false\nmax-body-size = 0\n[monitor]\n'
            f"store-enabled = false\n"
        )
        return [self.program, "-config", str(config)]


OURS = Receiver("fleetcast", "", "/api/v1/write", "/feed/data", JSON)
RECEIVERS = (
    OURS,
    Receiver("victoria-metrics", "victoria-metrics", "/api/v1/write", "/write"),
    Receiver("prometheus", "prometheus", "/api/v1/write"),
    Receiver("influxdb", "influxd", "/api/v1/prom/write?db=fleet", "/write?db=fleet", create_database=True),
)


@dataclass
class Running:
    """A receiver at work."""

    port: int
    process: psutil.Process

    @property
    def cpu_s(self) -> float:
        """CPU seconds since its start."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    @property
    def memory_mb(self) -> float:
        """Resident memory."""
        return float(self.process.memory_info().rss / 1e6)

    def settle(self) -> None:
        """Return when it is at rest, or after a minute."""
        deadline = time.monotonic() + SETTLE_LIMIT_S
        while time.monotonic() < deadline:
            before = self.cpu_s
            time.sleep(1.0)
            if self.cpu_s - before < AT_REST_CPU_S:
                return


@contextmanager
def run(receiver: Receiver, folder: Path, rules: Sequence[str] = ()) -> Iterator[Running]:
    """Run a receiver in a folder until the block ends, then stop it in good order."""
    if not receiver.program:
        if rules:
            text = ",\n".join(repr(rule) for rule in rules)
            (folder / "fleetcast.toml").write_text(f"[remote_write]\nrules = [\n{text}\n]\n")
        with InferenceDaemon(folder) as daemon:
            ours = Running(daemon.port, psutil.Process(daemon.process.pid))
            ours.settle()  # it loads a model, which no sample costs
            yield ours
            daemon.stop(limit_s=_STOP_LIMIT_S)
        return
    port = free_port()
    with (folder / "console").open("ab") as console:
        process = subprocess.Popen(
            receiver.command(folder, port), stdout=console, stderr=console, stdin=subprocess.DEVNULL
        )
    try:
        _wait_ready(f"http://127.0.0.1:{port}", process, folder)
        if receiver.create_database:
            _session().post(
                f"http://127.0.0.1:{port}/query", data={"q": "CREATE DATABASE fleet"}, timeout=10
            ).raise_for_status()
        yield Running(port, psutil.Process(process.pid))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(_STOP_LIMIT_S)


def folder_bytes(folder: Path) -> int:
    """Return what files take: blocks, not lengths, so that what is only reserved does not count."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _session() -> requests.Session:
    session = requests.Session()
    session.trust_env = False
    return session


def _wait_ready(url: str, process: "subprocess.Popen[bytes]", folder: Path) -> None:
    session = _session()
    deadline = time.monotonic() + _READY_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        for path in ("/-/ready", "/ping", "/health"):
            try:
                if session.get(url + path, timeout=2).status_code in (200, 204):
                    return
            except requests.RequestException:
                break
        time.sleep(0.1)
    raise AssertionError((folder / "console").read_text(errors="replace")[-2000:])
