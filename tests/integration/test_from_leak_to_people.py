"""All of it at once: a made host's leak is a series in Prometheus, an answer, and one alert for people.

Debian's Prometheus, node_exporter and Alertmanager run beside both daemons. Recorded time carries 33 hours
of a made fleet past them in a minute; the records end now, so that node_exporter's go on from there.
"""

import re
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alert_sink import Sink
from test_alertmanager import active, alertmanager
from test_alertmanager import real_program as real_alertmanager
from test_grafana_queries import ask, ask_when_up
from test_prometheus import NEEDED, ROOT, real_programs, running, serving

from benchmarks.programs import InferenceDaemon, Program, free_port, wait_for
from fleetcast.clock import iso_z
from fleetcast.sources.client import RequestRefused

pytestmark = pytest.mark.slow
__all__ = ["real_alertmanager", "real_programs"]  # skip, or fail in CI, where a program is absent
BIN = timedelta(minutes=5)
BINS, LEAK_BEGINS, LEAK_A_BIN = 400, 200, 0.3  # until now; windows of 8 h have settled by then; percent
LEVEL, LIMIT = 30.0, 90.0
FULL = LEAK_BEGINS + int((LIMIT - LEVEL) / LEAK_A_BIN)
INTERVAL_S = 0.5
LIKELY = 'fleetcast_capacity_probability{server="leak",metric="mem_pct"} > 0.5'
RULE = 'ALERTS{alertname="FleetcastLimitLikely",metric="mem_pct"}'
RETRAINING = "adaptive_retraining_daemon.py"


class MadeFleet:
    """Five hosts, one of which leaks memory, a record of each for every bin."""

    def __init__(self, daemon: InferenceDaemon) -> None:
        self._daemon = daemon
        now = datetime.now(UTC)
        self.start = now - (now - datetime(1970, 1, 1, tzinfo=UTC)) % BIN - BINS * BIN
        self.next_bin = 0

    def send(self, n_bins: int, *, leaks: bool = False) -> None:
        for number in range(self.next_bin, self.next_bin + n_bins):
            level = LEVEL + LEAK_A_BIN * (number - LEAK_BEGINS) if leaks else LEVEL
            calm = {f"calm-{n}": 40.0 + (number * 7 + n * 13) % 9 for n in range(4)}
            at = iso_z(self.start + number * BIN)
            fleet = {"leak": level, **calm}
            records = [
                {"timestamp": at, "server_name": name, "mem_pct": value} for name, value in fleet.items()
            ]
            wait_for("the daemon to take records", lambda records=records: self._is_taken(records))
        self.next_bin += n_bins

    def _is_taken(self, records: list[dict[str, Any]]) -> bool:
        """Send records; while a sweep is due the daemon asks for patience."""
        try:
            return self._daemon.client.post_records(records).received == len(records)
        except RequestRefused as error:
            if error.status == 429:
                return False
            raise

    def bin_of(self, moment: datetime) -> float:
        return (moment - self.start) / BIN


def configuration(daemon: InferenceDaemon, exporter_port: int) -> str:
    """Return what docs/dashboards.md and docs/ingest.md say, with faster clocks."""
    return f"""
global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}
rule_files: ["{ROOT}/deploy/prometheus/fleetcast.rules.yml"]
remote_write: [{{url: "{daemon.url}/api/v1/write", write_relabel_configs: [
  {{source_labels: [job], regex: node, action: keep}}]}}]
scrape_configs:
  - {{job_name: fleetcast, static_configs: [{{targets: ["127.0.0.1:{daemon.port}"]}}]}}
  - {{job_name: fleetcast_forecasts, metrics_path: /metrics/forecasts,
     static_configs: [{{targets: ["127.0.0.1:{daemon.port}"]}}]}}
  - {{job_name: node,
     static_configs: [{{targets: ["127.0.0.1:{exporter_port}"], labels: {{instance: real-host}}}}]}}
"""


def environ(alerts: dict[str, str]) -> dict[str, str]:
    shorter = ("LimitLikely: capacity_p > 0.5 warning", "Down: daemon_away > 0 critical")
    rules = ",".join((*shorter, "DiskLow: off", "NoData: off", "ServersSilent: off"))
    return {
        "FLEETCAST_CLOCK_MODE": "data",
        "FLEETCAST_PATHS_MODELS_DIR": "no-model",
        "FLEETCAST_EXPORT_ENABLED": "on",
        "FLEETCAST_ALERTS_RULES": rules,
        **{f"FLEETCAST_ALERTS_{name.upper()}": value for name, value in alerts.items()},
    }


def retraining(folder: Path, url: str, settings: dict[str, str]) -> Program:
    flags = ("--daemon-url", url, "--interval", str(INTERVAL_S), "--mode", "advise")
    return Program(RETRAINING, folder, *flags, environ=settings)


def told(people: Sink, status: str) -> list[Any]:
    """Return the alerts about the leak that people got in messages of this status."""
    alerts = [(one.json["status"], alert) for one in people.requests for alert in one.json["alerts"]]
    return [alert for said, alert in alerts if said == status and alert["labels"].get("server") == "leak"]


def forecast_8h(url: str) -> float:
    which = 'server="leak",metric="mem_pct",lead="8h",quantile="0.5"'
    found = ask_when_up(url, f"fleetcast_forecast{{{which}}}")
    return float(found[0]["value"][1]) if found else float("nan")


def test_a_leak_becomes_a_series_an_answer_and_one_alert_that_ends(tmp_path: Path) -> None:
    am_port, exporter_port = free_port(), free_port()
    settings = environ({"alertmanager_urls": f"http://127.0.0.1:{am_port}"})
    with (
        Sink() as people,
        InferenceDaemon(tmp_path, environ=settings) as daemon,
        serving(tmp_path, configuration(daemon, exporter_port)) as url,
        retraining(tmp_path, daemon.url, settings) as checks,
    ):
        fleet = MadeFleet(daemon)
        with alertmanager(tmp_path, am_port, people) as am:
            fleet.send(LEAK_BEGINS)
            wait_for("a flat forecast", lambda: abs(forecast_8h(url) - LEVEL) < 3.0, 40)
            assert [alert for alert in active(am) if alert["labels"].get("server")] == []

            def likely() -> list[Any]:
                answer = daemon.client.get("/capacity?limit=90&metric=mem_pct&min_p=0.5")
                rows: list[Any] = answer["rows"]
                return rows

            while not likely() and fleet.next_bin < FULL:
                fleet.send(4, leaks=True)  # the answer must hold once all of them are forecast
                wait_for("the sweeps", lambda: daemon.status()["backlog"] == 0, 30)
            (row,) = likely()
            assert row["server"] == "leak"
            wait_for("the alert", lambda: any(a["labels"].get("server") == "leak" for a in active(am)), 30)
            (alert,) = [a for a in active(am) if a["labels"].get("server") == "leak"]
            assert alert["labels"]["alertname"] == "FleetcastLimitLikely"
            possible = re.search(r"possible from (\S+)", alert["annotations"]["summary"])
            assert possible, alert
            hour = fleet.bin_of(datetime.fromisoformat(possible[1]))
            assert fleet.next_bin < hour <= FULL + 1, "it may come early, not late"
            assert FULL - hour < 36, "by three hours at most"
            wait_for("the forecast rises", lambda: forecast_8h(url) > LIMIT - 10.0, 30)
            wait_for("people hear of it", lambda: bool(told(people, "firing")), 30)
            for query in (LIKELY, RULE):
                wait_for(query, lambda query=query: bool(ask(url, query)), 30)
            daemon.kill()
            checks.kill()
        with alertmanager(tmp_path, am_port, people) as am:
            daemon.start()
            checks.start()
            fleet.send(2, leaks=True)

            def again() -> list[Any]:
                return [a for a in active(am) if a["labels"].get("server") == "leak"]

            wait_for("the alert after kill and restart", lambda: bool(again()), 30)
            assert again()[0]["fingerprint"] == alert["fingerprint"]
            assert len({one["fingerprint"] for one in told(people, "firing")}) == 1
            fleet.send(16)
            wait_for("the end of the alert", lambda: not again(), 30)
            wait_for("people hear of the end", lambda: bool(told(people, "resolved")), 30)
            fleet.send(BINS - fleet.next_bin)
            exporter = [NEEDED[1], f"--web.listen-address=127.0.0.1:{exporter_port}"]
            with running(*exporter, log=tmp_path / "exporter.log"):

                def real_host() -> dict[str, Any]:
                    current = daemon.client.get("/predictions/current?fields=current")["predictions"]
                    values: dict[str, Any] = current.get("real-host", {}).get("current", {})
                    return values

                wait_for("this host by remote-write", lambda: "mem_pct" in real_host(), 40)
            assert ask(url, LIKELY) == []
            assert ask(url, RULE) == [], "the shipped rule agrees"
    assert len(told(people, "firing")) == 1, (
        "one alert for people, over a kill of ours and a restart of theirs"
    )


def test_pagerduty_sees_one_incident_over_a_kill_between_sending_and_saving(tmp_path: Path) -> None:
    """Given no Alertmanager, an inference daemon that is away, and a retraining daemon that is killed while
    PagerDuty takes its first message, then there is one key, one trigger more for that kill, and one end."""
    with Sink() as pagerduty:
        settings = environ({"pagerduty_key": "0" * 32, "pagerduty_url": pagerduty.url})
        daemon = InferenceDaemon(tmp_path, environ=settings)
        pagerduty.go_on.clear()  # the answer waits, so that nothing is saved yet
        with retraining(tmp_path, daemon.url, settings) as checks:
            wait_for("the first message", lambda: len(pagerduty.requests) == 1, 60)
            checks.kill()
        pagerduty.go_on.set()
        for _ in range(2):
            with retraining(tmp_path, daemon.url, settings) as checks:
                wait_for("it is told again", lambda: len(pagerduty.requests) >= 2, 60)
                wait_for("some checks", more_checks(tmp_path, 3), 60)
                assert checks.stop(signal.SIGTERM) == 0
        assert [one.json["event_action"] for one in pagerduty.requests] == ["trigger", "trigger"]
        with retraining(tmp_path, daemon.url, settings), daemon:
            wait_for("its end", lambda: len(pagerduty.requests) >= 3, 60)
            wait_for("some checks", more_checks(tmp_path, 3), 60)
        actions = [one.json["event_action"] for one in pagerduty.requests]
        assert actions == ["trigger", "trigger", "resolve"]
        assert len({one.json["dedup_key"] for one in pagerduty.requests}) == 1


def more_checks(folder: Path, n: int) -> Any:
    """Return a question: whether so many more checks were written down."""
    path = folder / "decisions.jsonl"

    def count() -> int:
        return len(path.read_text().splitlines()) if path.exists() else 0

    before = count()
    return lambda: count() >= before + n
