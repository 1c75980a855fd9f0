"""The real thing: Debian's Prometheus scrapes a real daemon as documented; rules load, panels have data.

Bins last two seconds, so that forecasts are made, settled and due within a minute.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from real_scrape import write_retraining_numbers
from test_prometheus import ROOT, real_programs, serving

from benchmarks.programs import InferenceDaemon, free_port, wait_for
from fleetcast.clock import iso_z

pytestmark = pytest.mark.slow
__all__ = ["real_programs"]  # skips, or fails in CI, where there is no Prometheus
KEY = "0123456789abcdef"
RECEIVER = "--web.enable-remote-write-receiver"
SERVER = 'web "01" \\ {x}'
ENVIRON = {
    "TFT_API_KEY": KEY,
    "FLEETCAST_BINS_BIN_S": "2",
    "FLEETCAST_BINS_CLOSE_GRACE_S": "0",
    "FLEETCAST_EXPORT_ENABLED": "on",
}
NOT_WITHIN_A_MINUTE = {"Likeliest to pass 90 %"}  # that takes a horizon of history


def configuration(folder: Path, daemon: InferenceDaemon) -> str:
    """Return the documented configuration, with the addresses of this test and faster clocks."""
    page = (ROOT / "docs" / "dashboards.md").read_text(encoding="utf-8")
    (documented,) = [
        block.split("```")[0] for block in page.split("```yaml\n") if block.startswith("# prometheus.yml")
    ]
    changes = {
        "rule_files:": "global: {scrape_timeout: 1s, evaluation_interval: 1s}\nrule_files:",
        "/etc/prometheus/": f"{ROOT / 'deploy' / 'prometheus'}/",
        "scrape_interval: 30s": "scrape_interval: 1s",
        "scrape_interval: 60s": "scrape_interval: 1s",
        '# authorization: {credentials: "the TFT_API_KEY, where one is set"}': (
            f'authorization: {{credentials: "{KEY}"}}'
        ),
        "127.0.0.1:8000": f"127.0.0.1:{daemon.port}",
    }
    for old, new in changes.items():
        assert old in documented
        documented = documented.replace(old, new)
    return documented


@contextmanager
def sending(daemon: InferenceDaemon) -> Iterator[None]:
    """Send a good and a bad record twice a second."""
    has_ended = threading.Event()

    def send() -> None:
        with httpx.Client(headers={"X-API-Key": KEY}, trust_env=False) as client:
            while not has_ended.wait(0.5):
                now = iso_z(datetime.now(UTC))
                good = {"timestamp": now, "server_name": SERVER, "cpu_pct": 42.0, "mem_pct": 95.0}
                records = [good, {**good, "timestamp": "yesterday"}]
                client.post(f"{daemon.url}/feed/data", json={"records": records})

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()


def ask(url: str, expr: str) -> list[Any]:
    answer = httpx.get(f"{url}/api/v1/query", params={"query": expr}, trust_env=False).json()
    assert answer["status"] == "success", (expr, answer)
    found: list[Any] = answer["data"]["result"]
    return found


def promql(text: str) -> str:
    """Return a query as Grafana would send it: variables in their places, escaped."""
    name = SERVER.replace("\\", "\\\\").replace('"', '\\"')
    for variable, value in (("$__rate_interval", "10s"), ("$instance", ".*"), ("$server", name)):
        text = text.replace(variable, value)
    return text.replace("$metric", "cpu_pct").replace("$lead", "2s")


def test_every_panel_has_data_of_a_real_daemon_and_forecasts_arrive_by_remote_write(tmp_path: Path) -> None:
    write_retraining_numbers(tmp_path)
    board = json.loads((ROOT / "deploy" / "grafana" / "fleetcast.json").read_text())
    panels = {
        panel["title"]: [promql(target["expr"]) for target in panel["targets"]]
        for panel in board["panels"]
        if panel["title"] not in NOT_WITHIN_A_MINUTE
    }
    port = free_port()
    written = {"FLEETCAST_EXPORT_REMOTE_WRITE_URL": f"http://127.0.0.1:{port}/api/v1/write"}
    with (
        InferenceDaemon(tmp_path, environ={**ENVIRON, **written}) as daemon,
        serving(tmp_path, configuration(tmp_path, daemon), RECEIVER, port=port) as url,
    ):
        with sending(daemon):
            before = 'fleetcast_requests_refused_total{reason="key"} == 0'  # or no increase is seen
            wait_for("a scrape", lambda: bool(ask_when_up(url, before)), 40)
            httpx.get(f"{daemon.url}/status", trust_env=False)  # without the key
            lacking: dict[str, list[str]] = {}

            def all_have_data() -> bool:
                lacking.clear()
                lacking.update({t: q for t, q in panels.items() if not any(ask(url, expr) for expr in q)})
                return not lacking

            try:
                wait_for("data of every panel", all_have_data, 60)
            except AssertionError:
                pytest.fail(f"no data: {lacking}")
            ahead = ask(url, promql('fleetcast_forecast{server="$server",lead="192s",quantile="0.5"}'))
            sent = (
                'fleetcast_forecast{job="fleetcast_forecasts",instance=""}'  # a scraped one has an instance
            )
            wait_for("forecasts by remote-write", lambda: bool(ask(url, sent)), 40)
            due = 'fleetcast_forecast_due{instance="",quantile="0.9",lead="2s"}'
            wait_for("what is due by remote-write", lambda: bool(ask(url, due)), 40)
        loaded = httpx.get(f"{url}/api/v1/rules", trust_env=False).json()["data"]["groups"]
    assert {sample["metric"]["metric"] for sample in ahead} == {"cpu_pct", "mem_pct"}
    assert {sample["metric"]["server"] for sample in ahead} == {SERVER}, "the name came through whole"
    assert {rule["health"] for group in loaded for rule in group["rules"]} == {"ok"}


def ask_when_up(url: str, expr: str) -> list[Any]:
    try:
        return ask(url, expr)
    except (httpx.HTTPError, ValueError):  # not there yet, or not ready
        return []
