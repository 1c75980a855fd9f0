"""A Prometheus that holds a past: made series of node_exporter in blocks of promtool, served by the program.

Owns: what the series are (each server its own level, a daily rhythm, counters that began at their own
values), the OpenMetrics text, the blocks and the process.
"""

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requests

from fleetcast.demo.harness import free_port
from fleetcast.schema import Floats, Longs

NEEDED = ("prometheus", "promtool")
DAY_S = 86_400
N_CPUS = 2
_MEMORY = 16e9
_DISK = 100e9


def missing_programs() -> list[str]:
    """Return which of the programs are not installed."""
    return [program for program in NEEDED if not shutil.which(program)]


@dataclass(frozen=True)
class Scrapes:
    """A fleet's scrapes: `n_servers` from `start_s` up to `end_s`, every `interval_s`."""

    n_servers: int
    start_s: int
    end_s: int
    interval_s: int = 60

    def names(self) -> list[str]:
        """Return the servers as Prometheus's `instance` has them, without the port."""
        return [f"host-{number:03d}" for number in range(self.n_servers)]

    def times(self, start_s: int, end_s: int) -> Longs:
        """Return when the fleet was scraped from `start_s` on and before `end_s`."""
        return np.arange(max(start_s, self.start_s), min(end_s, self.end_s), self.interval_s)

    def families(self, number: int, times: Longs) -> Iterator[tuple[str, str, Mapping[str, str], Floats]]:
        """Yield (metric, type, own labels, values at the times) of one server."""
        busy = self.busy(number, times)
        elapsed = times - self.start_s
        angle = 2 * np.pi * times / DAY_S
        # the integral of busy, so that each rate is its mean since the scrape before
        idle = (1 - self.level(number)) * elapsed + 0.1 * DAY_S / (2 * np.pi) * (np.cos(angle) - 1)
        for cpu in range(N_CPUS):
            yield (
                "node_cpu_seconds_total",
                "counter",
                {"cpu": str(cpu), "mode": "idle"},
                1e5 * (number + 1) + idle,
            )
        yield "node_disk_read_bytes_total", "counter", {"device": "sda"}, 2e6 * elapsed
        yield "node_disk_written_bytes_total", "counter", {"device": "sda"}, (number + 1) * 1e5 * elapsed
        yield "node_network_receive_bytes_total", "counter", {"device": "eth0"}, 5e6 * elapsed
        yield "node_network_transmit_bytes_total", "counter", {"device": "eth0"}, 1e6 * elapsed
        yield "node_memory_MemTotal_bytes", "gauge", {}, np.full(len(times), _MEMORY)
        yield "node_memory_MemAvailable_bytes", "gauge", {}, _MEMORY * (1 - busy)
        yield "node_load1", "gauge", {}, N_CPUS * busy
        mounted = {"device": "/dev/sda1", "fstype": "ext4", "mountpoint": "/"}
        free = _DISK * (0.5 - 0.2 * elapsed / max(1, self.end_s - self.start_s))
        yield "node_filesystem_size_bytes", "gauge", mounted, np.full(len(times), _DISK)
        yield "node_filesystem_free_bytes", "gauge", mounted, free
        yield "node_filesystem_avail_bytes", "gauge", mounted, free

    def level(self, number: int) -> float:
        """Return a server's mean share of work."""
        return 0.2 + 0.5 * number / max(1, self.n_servers)

    def busy(self, number: int, times: Longs) -> Floats:
        """Return its share of work at each time."""
        return self.level(number) + 0.1 * np.sin(2 * np.pi * times / DAY_S)

    @property
    def n_samples(self) -> int:
        """Return how many samples the whole is."""
        some = self.times(self.start_s, self.start_s + self.interval_s)
        per_scrape = len(list(self.families(0, some)))
        return self.n_servers * per_scrape * len(self.times(self.start_s, self.end_s))


def write_openmetrics(path: Path, scrapes: Scrapes, start_s: int, end_s: int) -> None:
    """Write the scrapes of a stretch as OpenMetrics text; a family's series stand together."""
    times = scrapes.times(start_s, end_s)
    stamps = [f" {at_s}\n" for at_s in times.tolist()]
    by_family: dict[tuple[str, str], list[str]] = {}
    for number, name in enumerate(scrapes.names()):
        for metric, kind, labels, values in scrapes.families(number, times):
            given = {"instance": f"{name}:9100", "job": "node", **labels}
            head = metric + "{" + ",".join(f'{label}="{text}"' for label, text in given.items()) + "} "
            pairs = zip(values.tolist(), stamps, strict=True)
            by_family.setdefault((metric, kind), []).append(
                "".join(f"{head}{value!r}{at}" for value, at in pairs)
            )
    with path.open("w") as file:
        for (metric, kind), blocks in by_family.items():
            file.write(f"# TYPE {metric.removesuffix('_total')} {kind}\n")
            file.writelines(blocks)
        file.write("# EOF\n")


def backfill(folder: Path, scrapes: Scrapes, part_s: int = DAY_S) -> None:
    """Make blocks of the scrapes below `folder`, one part of the text at a time."""
    text = folder / "part.om"
    first_s = scrapes.start_s // part_s * part_s
    for start_s in range(first_s, scrapes.end_s, part_s):
        write_openmetrics(text, scrapes, start_s, start_s + part_s)
        make = ["promtool", "tsdb", "create-blocks-from", "openmetrics", "--quiet"]
        # its help hides this flag; without it, the text is read once for every two hours of it
        command = [*make, "--max-block-duration=24h", str(text), str(folder)]
        subprocess.run(command, check=True, capture_output=True)
    text.unlink()


@contextmanager
def serve(folder: Path) -> Iterator[tuple[str, int]]:
    """Run Prometheus over blocks, scraping nothing; give its address and pid."""
    port = free_port()
    config = folder / "prometheus.yml"
    config.write_text("scrape_configs: []\n")
    command = [
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={folder}",
        "--storage.tsdb.retention.time=10y",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "prometheus.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        _wait_ready(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(30)


def _wait_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    session = requests.Session()
    session.trust_env = False
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if session.get(f"{url}/-/ready", timeout=2).status_code == 200:
                return
        except requests.RequestException:
            pass
        time.sleep(0.1)
    raise AssertionError("prometheus is not ready")
