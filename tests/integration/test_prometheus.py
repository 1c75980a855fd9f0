"""The real thing: Debian's Prometheus scrapes Debian's node_exporter and remote-writes into our daemon.

Nothing is configured on our side. Prometheus's own database is the reference: every sample it
took of a gauge must be in our buffer, also over a kill -9 of the daemon.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import psutil
import pytest

from benchmarks.programs import InferenceDaemon, free_port, wait_for
from data_buffer import DataBuffer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
NEEDED = ("prometheus", "prometheus-node-exporter")


@pytest.fixture(autouse=True)
def real_programs() -> None:
    missing = [program for program in NEEDED if not shutil.which(program)]
    if missing and os.environ.get("CI"):
        pytest.fail(f"{missing} not installed; .ci/run does it")
    if missing:
        pytest.skip(f"{missing} not installed")


def configuration(exporter_port: int, daemon_url: str) -> str:
    """Return the documented configuration, with the addresses of this test and faster clocks."""
    page = (ROOT / "docs" / "ingest.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in page.split("```yaml\n")[1:]]
    (documented,) = [block for block in blocks if block.startswith("# prometheus.yml")]
    changes = {
        "scrape_interval: 15s": "scrape_interval: 1s\n  scrape_timeout: 1s",
        "http://localhost:8000": daemon_url,
        'targets: ["web-01:9100", "web-02:9100"]': f'targets: ["127.0.0.1:{exporter_port}"]\n'
        "        labels: {instance: web-01}",
    }
    for old, new in changes.items():
        assert old in documented
        documented = documented.replace(old, new)
    return documented


@contextmanager
def running(*command: str, log: Path) -> Iterator[None]:
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def serving(folder: Path, configuration: str, *flags: str, port: int | None = None) -> Iterator[str]:
    """Run Prometheus with that configuration; give its address."""
    config, address = folder / "prometheus.yml", f"127.0.0.1:{port or free_port()}"
    config.write_text(configuration)
    own = (f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}")
    with running(NEEDED[0], *own, f"--web.listen-address={address}", *flags, log=folder / "prometheus.log"):
        yield f"http://{address}"


@contextmanager
def prometheus(folder: Path, daemon_url: str) -> Iterator[str]:
    """Run both programs; give Prometheus's address."""
    exporter_port = free_port()
    exporter = [NEEDED[1], f"--web.listen-address=127.0.0.1:{exporter_port}"]
    scraped = configuration(exporter_port, daemon_url)
    with running(*exporter, log=folder / "exporter.log"), serving(folder, scraped) as url:
        yield url


def samples(url: str, query: str) -> dict[int, float]:
    """Return every raw sample of one series that Prometheus holds: ms since 1970 → value."""
    answer = httpx.get(f"{url}/api/v1/query", params={"query": f"{query}[1h]"}, trust_env=False).json()
    (result,) = answer["data"]["result"]
    return {round(at_s * 1000): float(text) for at_s, text in result["values"]}


def current(daemon: InferenceDaemon) -> dict[str, Any]:
    document = daemon.client.get("/predictions/current?fields=current")
    values: dict[str, Any] = document["predictions"].get("web-01", {}).get("current", {})
    return values


def stored(folder: Path) -> pd.DataFrame:
    frame = DataBuffer(folder / "data_buffer").get_training_window(days=1, include_today=True)
    return frame[frame.server_name == "web-01"].set_index("timestamp")


def test_a_fleet_feeds_the_daemon_by_configuration_alone(tmp_path: Path) -> None:
    with InferenceDaemon(tmp_path) as daemon, prometheus(tmp_path, daemon.url):
        wait_for("rates of two scrapes", lambda: {"cpu_pct", "net_in_mb_s"} <= current(daemon).keys(), 40)
        values = current(daemon)
        assert values["mem_pct"] == pytest.approx(psutil.virtual_memory().percent, abs=10)
        assert 0 <= values["cpu_pct"] <= 100
        assert {"load_average", "net_out_mb_s"} <= values.keys()
        metrics = httpx.get(f"{daemon.url}/metrics", trust_env=False).text
        assert 'fleetcast_write_samples_total{outcome="taken"}' in metrics
        assert 'fleetcast_write_seconds_count{code="400"} 0.0' in metrics


def test_every_sample_prometheus_took_is_in_the_buffer_over_a_kill_of_the_daemon(tmp_path: Path) -> None:
    with InferenceDaemon(tmp_path) as daemon, prometheus(tmp_path, daemon.url) as url:
        wait_for("some records", lambda: "load_average" in current(daemon), 40)
        taken_before = set(samples(url, "node_load1"))
        daemon.kill()
        wait_for("scrapes in between", lambda: len(samples(url, "node_load1").keys() - taken_before) >= 5, 40)
        daemon.start()
        taken = samples(url, "node_load1")
        total = next(iter(samples(url, "node_memory_MemTotal_bytes").values()))
        available = samples(url, "node_memory_MemAvailable_bytes")

        def kept() -> pd.DataFrame:
            return stored(tmp_path)

        wait_for("what was taken meanwhile", lambda: len(kept()) >= len(taken), 60)
        frame = kept()
    found = {int(at.value // 1_000_000): row for at, row in frame.iterrows()}
    assert taken.keys() - found.keys() == set()
    for at_ms, value in taken.items():
        assert found[at_ms].load_average == pytest.approx(value, rel=1e-3)
        assert found[at_ms].mem_pct == pytest.approx(100 * (1 - available[at_ms] / total), abs=0.0051)
    # rates begin again at the second scrape after the restart; at most that one is missing
    assert frame.cpu_pct.isna().sum() <= 2
    assert frame.cpu_pct.dropna().between(0, 100).all()
