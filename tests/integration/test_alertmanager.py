"""The real thing: Debian's Alertmanager takes our alerts, and both sides restart in between."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from alert_sink import Sink
from test_inference import START, World

from benchmarks.programs import free_port, wait_for
from fleetcast.alerts.engine import AlertEngine, CheckFigures
from fleetcast.clock import SystemClock
from fleetcast.settings import AlertSettings, RetrainingSettings, Settings

pytestmark = pytest.mark.slow
LEAK_BEGINS, LEAK_A_BIN = 200, 0.3  # windows of 8 h have settled by then; percent
PROGRAM = "prometheus-alertmanager"
CONFIGURATION = """
route: {{receiver: people, group_wait: 0s, group_interval: 1s, repeat_interval: 4h}}
receivers:
  - name: people
    webhook_configs: [{{url: "{url}", send_resolved: true}}]
"""


@pytest.fixture(autouse=True)
def real_program() -> None:
    if not shutil.which(PROGRAM) and os.environ.get("CI"):
        pytest.fail(f"{PROGRAM} not installed; .ci/run does it")
    if not shutil.which(PROGRAM):
        pytest.skip(f"{PROGRAM} not installed")


@contextmanager
def alertmanager(folder: Path, port: int, people: Sink) -> Iterator[str]:
    """Run Alertmanager with its state in the folder; give its address."""
    config = folder / "alertmanager.yml"
    config.write_text(CONFIGURATION.format(url=people.url))
    command = (
        PROGRAM,
        f"--config.file={config}",
        f"--storage.path={folder / 'alertmanager'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    )
    url = f"http://127.0.0.1:{port}"
    with (folder / "alertmanager.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            wait_for("Alertmanager", lambda: is_ready(url), 30)
            yield url
        finally:
            process.terminate()  # killed, it forgets whom it told
            process.wait(20)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def active(url: str) -> list[dict[str, Any]]:
    found = httpx.get(f"{url}/api/v2/alerts", trust_env=False).json()
    assert isinstance(found, list)
    return found


def check(folder: Path, url: str, score: float, daemon_url: str = "http://127.0.0.1:9") -> None:
    """Let a daemon that has just started make one check."""
    rules = ("DriftHigh: drift_score > 0.15 warning", "LimitLikely: capacity_p > 0.5 warning", "DiskLow: off")
    settings = Settings(
        alerts=AlertSettings(rules=rules, alertmanager_urls=(url,)),
        retraining=RetrainingSettings(daemon_url=daemon_url, interval_s=300.0),
    )
    engine = AlertEngine(settings, folder, SystemClock())
    engine.note(CheckFigures(score, 0, 0))
    assert engine.finish(30)


def test_an_alert_outlives_restarts_of_both_sides_and_ends(tmp_path: Path) -> None:
    port = free_port()
    with Sink() as people:
        with alertmanager(tmp_path, port, people) as url:
            check(tmp_path, url, 0.2)
            (found,) = active(url)
            assert found["labels"]["alertname"] == "FleetcastDriftHigh"
            check(tmp_path, url, 0.3)
            (again,) = active(url)
            assert (again["fingerprint"], again["startsAt"]) == (found["fingerprint"], found["startsAt"])
            assert "is 0.3" in again["annotations"]["summary"]
            wait_for("people hear of it", lambda: bool(people.requests), 30)
        with alertmanager(tmp_path, port, people) as url:
            assert active(url) == [], "it keeps alerts in memory"
            check(tmp_path, url, 0.2)
            assert len(active(url)) == 1
            check(tmp_path, url, 0.1)
            wait_for("the end", lambda: active(url) == [], 30)
            wait_for(
                "people hear of the end",
                lambda: any(request.json["status"] == "resolved" for request in people.requests),
                30,
            )
        with alertmanager(tmp_path, port, people) as url:
            check(tmp_path, url, 0.1)
            assert active(url) == [], "the end is sent again, and stays one"
        firing = [request for request in people.requests if request.json["status"] == "firing"]
        assert len(firing) == 1, "the same alert after a restart is no second message"


def test_a_leak_is_told_with_its_hour_before_it_fills_the_server_and_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path)
    world.clock.advance(days=9)  # the host's: what is sent lies before it
    world.start()

    def send(number: int, leak: float) -> None:
        calm = ((f"calm-{n}", number, 40.0 + (number * 7 + n * 13) % 9) for n in range(4))
        assert world.post(("leak", number, leak), *calm).status_code == 200
        world.service.cycle()

    try:
        with Sink() as people, alertmanager(tmp_path, free_port(), people) as url:
            daemon_url = str(world.client.base_url)
            for number in range(LEAK_BEGINS):
                send(number, 30.0)
            check(tmp_path, url, 0.1, daemon_url)
            assert active(url) == []
            number, full = LEAK_BEGINS, LEAK_BEGINS + int((90.0 - 30.0) / LEAK_A_BIN)
            while not active(url) and number < full:
                send(number, 30.0 + LEAK_A_BIN * (number - LEAK_BEGINS))
                number += 1
                if number % 4 == 0:
                    check(tmp_path, url, 0.1, daemon_url)
            (alert,) = active(url)
            assert (alert["labels"]["server"], alert["labels"]["metric"]) == ("leak", "cpu_pct")
            said = re.search(r"possible from (\S+)", alert["annotations"]["summary"])
            assert said, alert
            possible = (datetime.fromisoformat(said[1]) - START.to_pydatetime()) / timedelta(minutes=5)
            assert number < possible <= full + 1, "it may come early, not late"
            assert full - possible < 36, "by three hours at most"
            for _ in range(12):
                send(number, 30.0)
                number += 1
            check(tmp_path, url, 0.1, daemon_url)
            wait_for("the end", lambda: active(url) == [], 30)
    finally:
        world.end()
