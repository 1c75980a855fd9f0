"""The retraining daemon as a process: its checks send alerts, with `--once` too, and hang on no channel."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alert_sink import Sink

from adaptive_retraining_daemon import AdaptiveRetrainingDaemon
from fleetcast.alerts.engine import CheckFigures
from fleetcast.promotion.audit import Mark, Standing
from fleetcast.retraining.report import alert_figures

ROOT = Path(__file__).parents[1]
RULE = "DiskLow: free_disk_gb < 1000000 critical"


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as receiver:
        yield receiver


def command(folder: Path, *flags: str, **settings: str) -> subprocess.Popen[str]:
    (folder / "data_buffer" / "log").mkdir(parents=True, exist_ok=True)
    given = {f"FLEETCAST_{name.upper()}": value for name, value in settings.items()}
    flags = ("--daemon-url", "http://127.0.0.1:9", *flags)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "adaptive_retraining_daemon.py"), *flags],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FLEETCAST_ALERTS_RULES": RULE, **given},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(n_requests: int, sink: Sink) -> None:
    until = time.monotonic() + 60
    while len(sink.requests) < n_requests and time.monotonic() < until:
        time.sleep(0.05)
    assert len(sink.requests) >= n_requests


def test_the_figures_of_a_check_are_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    daemon = AdaptiveRetrainingDaemon(daemon_url="http://127.0.0.1:9")
    check = daemon.run_check_cycle()
    assert alert_figures(check, daemon.engine) == CheckFigures(None, 0, 0)
    marks = [Mark(f"2026-01-0{day}T00:00:00Z", "anna", f"reason {day}") for day in (3, 2, 1)]
    standing = Standing(*marks[:2], cooldown=marks[2], taken_back=("2026-01-05T00:00:00Z", marks[0].since))
    report = replace(check.report, metrics={**check.report.metrics, "combined_score": 0.2})
    daemon.engine.record_training(True)
    daemon.engine.record_failure()
    figures = alert_figures(replace(check, standing=standing, report=report), daemon.engine)
    assert (figures.drift_score, figures.training_failures, figures.trainings_7d) == (0.2, 1, 1)
    assert figures.held_since == datetime(2026, 1, 2, tzinfo=UTC), "the older of a hold and a pause"
    assert figures.taken_back == (datetime(2026, 1, 5, tzinfo=UTC), "reason 1")


@pytest.mark.slow
def test_a_check_of_once_sends_what_fires_and_the_next_one_nothing(tmp_path: Path, sink: Sink) -> None:
    for n_sent in (1, 1):
        output, errors = command(tmp_path, "--once", alerts_slack_url=f"{sink.url}/topsecret").communicate()
        assert output.startswith("Looked at"), errors
        assert len(sink.requests) == n_sent, errors
        assert "topsecret" not in output + errors
    assert "topsecret" not in "".join(path.read_text() for path in tmp_path.glob("*.*") if path.is_file())
    assert "DiskLow (critical" in sink.requests[0].json["text"]


@pytest.mark.slow
def test_the_log_holds_no_address_at_debug_level(tmp_path: Path, sink: Sink) -> None:
    own = {"alerts_slack_url": f"{sink.url}/services/topsecret", "logging_level": "DEBUG"}
    output, errors = command(tmp_path, "--once", **own).communicate()
    assert len(sink.requests) == 1, errors
    assert "topsecret" not in output + errors + (tmp_path / "retraining_daemon.log").read_text()
    assert "alert sent channel=slack rule=DiskLow" in errors


@pytest.mark.slow
def test_a_daemon_killed_and_started_again_sends_nothing_twice(tmp_path: Path, sink: Sink) -> None:
    for _ in range(2):
        daemon = command(tmp_path, "--interval", "0.5", alerts_webhook_url=sink.url)
        try:
            wait_for(1, sink)
            decisions = tmp_path / "decisions.jsonl"
            until, before = time.monotonic() + 60, len(decisions.read_text().splitlines())
            while len(decisions.read_text().splitlines()) < before + 3 and time.monotonic() < until:
                time.sleep(0.05)
        finally:
            daemon.kill()
            daemon.communicate()
    assert [request.json["status"] for request in sink.requests] == ["firing"]


@pytest.mark.slow
def test_checks_go_on_while_a_channel_hangs(tmp_path: Path, sink: Sink) -> None:
    sink.go_on.clear()
    daemon = command(tmp_path, "--interval", "0.2", alerts_webhook_url=sink.url)
    try:
        wait_for(1, sink)
        decisions = tmp_path / "decisions.jsonl"
        before, began = len(decisions.read_text().splitlines()), time.monotonic()
        while len(decisions.read_text().splitlines()) < before + 3 and time.monotonic() - began < 8:
            time.sleep(0.05)
        assert len(decisions.read_text().splitlines()) >= before + 3, "within the 10 s that the channel has"
    finally:
        daemon.kill()
        daemon.communicate()


@pytest.mark.slow
def test_pagerduty_sees_one_incident_over_kills_at_any_time(tmp_path: Path, sink: Sink) -> None:
    own = {"alerts_pagerduty_key": "key", "alerts_pagerduty_url": sink.url}
    moments, n_kills = random.Random(7), 5
    for n_kill in range(n_kills):
        daemon = command(tmp_path, "--interval", "0.2", **own)
        try:
            wait_for(1, sink)
            if n_kill:
                wait_for_file(tmp_path / "alerts.json")
            time.sleep(moments.uniform(0.0, 1.5))
        finally:
            daemon.kill()
            daemon.communicate()
    n_triggers = len(sink.requests)
    assert 1 <= n_triggers <= 1 + n_kills, "a kill between sending and saving repeats one"
    daemon = command(tmp_path, "--interval", "0.2", **own, alerts_rules="DiskLow: free_disk_gb < 0 critical")
    try:
        wait_for(n_triggers + 1, sink)
        time.sleep(1.0)  # for one too many
    finally:
        daemon.kill()
        daemon.communicate()
    events = [request.json for request in sink.requests]
    assert [event["event_action"] for event in events] == ["trigger"] * n_triggers + ["resolve"]
    assert len({event["dedup_key"] for event in events}) == 1


def wait_for_file(path: Path) -> None:
    """Wait until a daemon has replaced the file once more."""
    before, until = path.stat().st_mtime_ns, time.monotonic() + 60
    while path.stat().st_mtime_ns == before and time.monotonic() < until:
        time.sleep(0.01)
    assert path.stat().st_mtime_ns != before
