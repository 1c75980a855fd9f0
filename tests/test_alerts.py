"""What channels are sent: rounds of the engine against real receivers, over restarts, faults and hangs."""

import dataclasses
import hashlib
import hmac
import logging
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alert_sink import Sink
from test_inference import World
from test_outbound import dripping
from told_daemon import Told

from fleetcast.alerts import engine as module
from fleetcast.alerts.engine import AlertEngine, CheckFigures, facts_of_check, facts_of_daemon
from fleetcast.alerts.rules import FACTS, Sample
from fleetcast.alerts.state import SILENCES_FILE, Silence, add_silence, load_state
from fleetcast.capacity.dates import OVER
from fleetcast.clock import FakeClock
from fleetcast.errors import OwnershipLost, SettingsError, StorageFull, UnknownFormat
from fleetcast.files import read_json
from fleetcast.schema import ALERT_RULES
from fleetcast.settings import AlertSettings, PathSettings, RetrainingSettings, Settings
from fleetcast.sources.client import DaemonClient

OFF = tuple(f"{line.split(':')[0]}: off" for line in ALERT_RULES)  # of the shipped ones
RULES = ("DriftHigh: drift_score > 0.15 warning",)
CALM: dict[str, Any] = {
    "status": "ready",
    "detail": "",
    "backlog": 0,
    "newest_record_time": None,
    "clock": {"now": "2026-01-15T10:00:00Z"},
    "model": {"problems": []},
}


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as receiver:
        yield receiver


@pytest.fixture
def told() -> Iterator[Told]:
    with Told() as daemon:
        daemon.answers["/status"] = CALM
        yield daemon


class Installation:
    """A folder with an engine in it, which can be restarted; time moves by hand."""

    def __init__(self, folder: Path, daemon_url: str, **alerts: Any) -> None:
        own = AlertSettings(**{"timeout_s": 5.0, **alerts, "rules": (*OFF, *alerts.get("rules", RULES))})
        retraining = RetrainingSettings(daemon_url=daemon_url, request_timeout_s=5.0)
        paths = PathSettings(str(folder), str(folder / "absent"))
        self.settings = dataclasses.replace(Settings(), alerts=own, retraining=retraining, paths=paths)
        self.folder, self.clock = folder, FakeClock()
        self.restart()

    def restart(self) -> None:
        self.engine = AlertEngine(self.settings, self.folder, self.clock)

    def check(self, score: float | None = 0.1, minutes: float = 5, **figures: Any) -> None:
        """Let time pass, and one check with its messages."""
        self.clock.advance(minutes=minutes)
        self.engine.note(given(score, **figures))
        assert self.engine.finish(20.0)

    def state(self) -> dict[str, Any]:
        return read_json(self.folder / "alerts.json")


def given(score: float | None = 0.1, **figures: Any) -> CheckFigures:
    return CheckFigures(drift_score=score, **{"training_failures": 0, "trainings_7d": 0, **figures})


def test_slack_hears_once_of_what_fires_again_after_four_hours_and_once_of_its_end(
    tmp_path: Path, sink: Sink, told: Told
) -> None:
    own = Installation(tmp_path, told.url, slack_url=f"{sink.url}/services/T0/B0/secret")
    own.check(0.1)
    assert sink.bodies() == []
    own.check(0.2)
    assert sink.bodies() == [
        {"text": "fleetcast: DriftHigh (warning)\nthe combined drift score is 0.2 (&gt; 0.15)"}
    ]
    for _ in range(47):
        own.check(0.2)
    assert sink.bodies() == []
    own.check(0.3)
    (again,) = sink.bodies()
    assert again["text"].startswith("fleetcast: still DriftHigh (warning)\nthe combined drift score is 0.3")
    own.check(0.1)
    assert sink.bodies() == [
        {"text": "fleetcast: DriftHigh is over\nover: the combined drift score is 0.3 (&gt; 0.15)"}
    ]
    own.check(0.1)
    assert sink.bodies() == []


def test_a_restart_between_any_two_checks_sends_nothing_twice(tmp_path: Path, sink: Sink, told: Told) -> None:
    own = Installation(tmp_path, told.url, slack_url=sink.url)
    for score in (0.2, 0.2, 0.2, 0.1, 0.1, 0.1):
        own.check(score)
        own.restart()
    texts = [body["text"].splitlines()[0] for body in sink.bodies()]
    assert texts == ["fleetcast: DriftHigh (warning)", "fleetcast: DriftHigh is over"]
    own.check(0.1, minutes=16)
    assert own.state()["alerts"] == []


def test_pending_alerts_outlive_a_restart(tmp_path: Path, sink: Sink, told: Told) -> None:
    rules = ("DriftHigh: drift_score > 0.15 for 15m warning",)
    own = Installation(tmp_path, told.url, slack_url=sink.url, rules=rules)
    for _ in range(3):
        own.check(0.2)
        own.restart()
    assert sink.bodies() == []
    own.check(0.2)
    assert len(sink.bodies()) == 1


def test_a_kill_between_sending_and_saving_sends_again_and_one_after_it_does_not(
    tmp_path: Path, sink: Sink, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Installation(tmp_path, told.url, slack_url=sink.url)
    real = module.note_told

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "note_told", killed)
    own.check(0.2)
    assert len(sink.bodies()) == 1, "it was sent, and nothing says so"
    monkeypatch.setattr(module, "note_told", real)
    own.restart()
    own.check(0.2)
    assert len(sink.bodies()) == 1
    own.restart()
    own.check(0.2)
    assert sink.bodies() == []


def test_a_channel_that_hangs_delays_no_check_and_no_other_channel(
    tmp_path: Path, sink: Sink, told: Told
) -> None:
    with Sink() as hanging:
        hanging.go_on.clear()
        own = Installation(tmp_path, told.url, slack_url=hanging.url, webhook_url=sink.url, timeout_s=0.5)
        began = time.monotonic()
        own.engine.note(given(0.2))
        assert time.monotonic() - began < 0.4, "a check does not wait"
        assert own.engine.finish(20.0)
        assert len(sink.bodies()) == 1
        assert own.state()["channels"]["slack"]["failures"] >= 1
        assert own.state()["channels"]["slack"]["told"] == {}
        hanging.go_on.set()
        hanging.requests.clear()
        own.check(0.2)
        assert len(hanging.bodies()) == 1, "it is told later"


@pytest.mark.parametrize("kind", ["slack", "webhook", "pagerduty", "email", "alertmanager", "heartbeat"])
def test_a_channel_that_drips_is_given_up_with_its_connection_and_delays_no_other(
    tmp_path: Path, sink: Sink, told: Told, kind: str
) -> None:
    start = b"220-\r\n" if kind == "email" else b"HTTP/1.1 200 OK\r\n"
    more = b"220-still\r\n" if kind == "email" else b"X-A: b\r\n"
    with dripping(start, more, waits=kind != "email") as (url, ended):
        port = int(url.rsplit(":", 1)[1])
        mail = {"email_to": ("a@example.com",), "smtp_host": "127.0.0.1", "smtp_port": port}
        drips = {
            "slack": {"slack_url": url},
            "webhook": {"webhook_url": url},
            "pagerduty": {"pagerduty_url": url, "pagerduty_key": "k" * 32},
            "email": {**mail, "smtp_security": "none"},
            "alertmanager": {"alertmanager_urls": (url, sink.url)},
            "heartbeat": {"heartbeat_url": url},
        }[kind]
        healthy = {"webhook": {"slack_url": sink.url}, "alertmanager": {}}.get(
            kind, {"webhook_url": sink.url}
        )
        own = Installation(tmp_path, told.url, timeout_s=0.5, **drips, **healthy)
        own.check(0.2)
        assert len(sink.requests) == 1
        assert "no answer within 0.5 s" in own.state()["channels"][kind]["last_error"]
        assert ended.wait(20), "the connection is not left open"
        thread = own.engine._at_work[kind][0]
        assert thread.join(20), "the thread is not kept"


def test_a_look_up_that_hangs_costs_its_channel_and_no_other(
    tmp_path: Path, sink: Sink, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr("fleetcast.outbound._addresses", lambda _host: go_on.wait(60) and [])
    own = Installation(
        tmp_path,
        told.url,
        slack_url="http://hooks.example.com/x",
        webhook_url=sink.url,
        email_to=("a@example.com",),
        smtp_host="mail.example.com",
        timeout_s=0.5,
    )
    own.check(0.2)
    channels = own.state()["channels"]
    assert len(sink.requests) == len(channels["webhook"]["told"]) == 1
    for name in ("slack", "email"):
        assert "no answer within 0.5 s" in channels[name]["last_error"]
        assert own.engine._at_work[name][0].join(20), "the thread is not kept"
    go_on.set()


def test_a_slow_channel_has_the_limit_for_each_message(
    tmp_path: Path, sink: Sink, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SLACK_S", 0.0)
    rules = tuple(f"{name}: drift_score > 0.15 warning" for name in ("A", "B", "C", "D"))
    own = Installation(tmp_path, told.url, slack_url=sink.url, rules=rules, timeout_s=1.0)
    sink.delay_s = 0.4
    own.check(0.2)
    assert len(sink.requests) == len(own.state()["channels"]["slack"]["told"]) == 4
    assert own.state()["channels"]["slack"]["failures"] == 0


def test_an_alertmanager_that_was_down_is_told_at_the_next_check(
    tmp_path: Path, sink: Sink, told: Told
) -> None:
    own = Installation(tmp_path, told.url, alertmanager_urls=(sink.url,))
    sink.status = 503
    for _ in range(8):
        own.check(0.2, minutes=1)
    assert len(sink.requests) == 8, "no pause: what fires would end by itself meanwhile"
    assert own.state()["channels"]["alertmanager"]["failures"] == 8


def test_an_answer_that_comes_too_late_still_counts(
    tmp_path: Path, sink: Sink, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SLACK_S", -4.8)  # the engine waits 0.2 s, the request 5 s
    own = Installation(tmp_path, told.url, slack_url=sink.url)
    sink.go_on.clear()
    own.check(0.2)
    assert own.state()["channels"]["slack"]["last_error"] == "no answer within 5 s"
    sink.go_on.set()
    thread = own.engine._at_work["slack"][0]
    assert thread.join(5.0)
    own.check(0.2)
    assert len(sink.bodies()) == 1
    assert own.state()["channels"]["slack"]["failures"] == 0


def test_a_refusal_is_tried_again_after_a_pause_that_grows(
    tmp_path: Path, sink: Sink, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    own = Installation(tmp_path, told.url, slack_url=f"{sink.url}/services/T0/B0/topsecret")
    sink.status, sink.answer = 404, b"no_team for topsecret"
    with caplog.at_level(logging.DEBUG):
        for _ in range(6):
            own.check(0.2, minutes=1)
    assert len(sink.requests) == 3, "after 1 and 2 minutes"
    assert own.state()["channels"]["slack"]["last_error"] == "HTTP 404: (not shown)"
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("fleetcast")]
    assert any("alert not sent channel=slack error=HTTP 404" in line for line in ours)
    assert not any("topsecret" in line for line in ours)
    sink.requests.clear()
    sink.status, sink.answer = 200, b"ok"
    own.check(0.2)
    assert len(sink.bodies()) == 1
    own.check(0.2)
    assert sink.bodies() == []


def test_retry_after_is_honoured(tmp_path: Path, sink: Sink, told: Told) -> None:
    own = Installation(tmp_path, told.url, slack_url=sink.url)
    sink.status, sink.headers = 429, {"Retry-After": "600"}
    own.check(0.2)
    sink.status = 200
    own.check(0.2)
    assert len(sink.requests) == 1
    own.check(0.2)
    assert len(sink.requests) == 2


def test_a_redirect_is_not_followed(tmp_path: Path, sink: Sink, told: Told) -> None:
    with Sink() as other:
        sink.status, sink.headers = 307, {"Location": other.url}
        own = Installation(tmp_path, told.url, webhook_url=sink.url, webhook_secret="key")
        own.check(0.2)
        assert other.requests == []
        assert own.state()["channels"]["webhook"]["failures"] == 1


def test_an_address_without_a_listener_is_named_by_its_cause_alone(tmp_path: Path, told: Told) -> None:
    own = Installation(tmp_path, told.url, slack_url="http://127.0.0.1:9/services/T0/B0/topsecret")
    own.check(0.2)
    error = own.state()["channels"]["slack"]["last_error"]
    assert error == "no answer: ConnectionRefusedError: Connection refused"


def test_a_silence_holds_back_what_fires_and_never_its_end(tmp_path: Path, sink: Sink, told: Told) -> None:
    own = Installation(tmp_path, told.url, slack_url=sink.url)
    until = own.clock.now() + timedelta(hours=2)
    silence = Silence("DriftHigh", until, "release week", "anna", own.clock.now())
    add_silence(tmp_path / SILENCES_FILE, silence)
    for _ in range(23):
        own.check(0.2)
    assert sink.bodies() == []
    own.check(0.2)
    assert len(sink.bodies()) == 1, "the silence is over"
    later = dataclasses.replace(silence, until=own.clock.now() + timedelta(hours=9))
    add_silence(tmp_path / SILENCES_FILE, later)
    own.check(0.1)
    assert [body["text"].splitlines()[0] for body in sink.bodies()] == ["fleetcast: DriftHigh is over"]


def test_a_silence_can_be_of_one_server_and_be_taken_back(tmp_path: Path, sink: Sink, told: Told) -> None:
    own = Installation(
        tmp_path, told.url, slack_url=sink.url, rules=("LimitLikely: capacity_p > 0.5 warning",)
    )
    told.answers["/capacity"] = {"rows": [row("web-1", 0.9), row("web-2", 0.8)]}
    until, now = own.clock.now() + timedelta(days=1), own.clock.now()
    silence = Silence("LimitLikely", until, "known", "anna", now, server="web-1")
    add_silence(tmp_path / SILENCES_FILE, silence)
    own.check()
    (body,) = sink.bodies()
    assert "web-2 mem_pct" in body["text"]
    assert "web-1" not in body["text"]
    add_silence(tmp_path / SILENCES_FILE, dataclasses.replace(silence, until=now))
    own.check()
    (body,) = sink.bodies()
    assert "web-1 mem_pct" in body["text"]


def row(server: str, p: float | None, state: str = "may pass") -> dict[str, Any]:
    first = "2026-01-15T14:00:00Z" if p else None
    times = {"first_possible": first, "likely": None, "since": None if p else "2026-01-15T09:00:00Z"}
    times["silent_since"] = None
    found = {"server": server, "metric": "mem_pct", "state": state, "now": 80.0, "p": p, **times}
    return {**found, "since_or_before": False}


def test_one_message_for_a_rule_and_check_names_ten_servers_and_counts_the_others(
    tmp_path: Path, sink: Sink, told: Told
) -> None:
    own = Installation(
        tmp_path, told.url, slack_url=sink.url, rules=("LimitLikely: capacity_p > 0.5 warning",)
    )
    told.answers["/capacity"] = {"rows": [row(f"web-{n:02}", 0.9) for n in range(25)]}
    own.check()
    (body,) = sink.bodies()
    lines = body["text"].splitlines()
    assert lines[0] == "fleetcast: LimitLikely (warning, 25 fire)"
    assert lines[1].startswith(
        "web-00 mem_pct: it passes 90 % within the horizon with a probability of 0.9 (&gt; 0.5);"
    )
    assert lines[1].endswith("possible from 2026-01-15T14:00:00Z")
    assert len(lines) == 12
    assert lines[-1] == "+15 more"
    told.answers["/capacity"] = {"rows": [row(f"web-{n:02}", 0.9) for n in range(1, 26)]}
    own.check()
    (body,) = sink.bodies()
    assert [line.split(":")[0] for line in body["text"].splitlines()[1:]] == ["web-25 mem_pct", "over"]


def test_a_server_that_passed_the_limit_keeps_its_alert(tmp_path: Path, sink: Sink, told: Told) -> None:
    own = Installation(
        tmp_path, told.url, webhook_url=sink.url, rules=("LimitLikely: capacity_p > 0.5 warning",)
    )
    told.answers["/capacity"] = {"rows": [row("always-full", None, "over"), row("web-1", 0.9)]}
    own.check()
    told.answers["/capacity"] = {"rows": [row("always-full", None, "over"), row("web-1", None, "over")]}
    own.check()
    told.answers["/capacity"] = {"rows": [row("always-full", None, "over")]}
    own.check()
    first, last = sink.bodies()
    assert [alert["labels"]["server"] for alert in first["alerts"]] == ["web-1"]
    assert last["status"] == "resolved"
    assert last["alerts"][0]["sentence"] == "it is over the limit since 2026-01-15T09:00:00Z"


def test_a_silent_server_keeps_an_alert_about_its_limit_and_begins_none(
    tmp_path: Path, sink: Sink, told: Told
) -> None:
    rules = ("LimitLikely: capacity_p > 0.5 warning",)
    own = Installation(tmp_path, told.url, webhook_url=sink.url, rules=rules)
    silent = {"silent_since": "2026-01-15T09:30:00Z"}
    told.answers["/capacity"] = {"rows": [row("web-1", 0.9), {**row("web-2", 0.9), **silent}]}
    own.check()
    told.answers["/capacity"] = {"rows": [{**row("web-1", 0.9), **silent}, {**row("web-2", 0.9), **silent}]}
    own.check()
    (body,) = sink.bodies()
    assert [alert["labels"]["server"] for alert in body["alerts"]] == ["web-1"]


def test_dates_of_full_disks_become_days(tmp_path: Path, sink: Sink, told: Told) -> None:
    rules = ("DiskFullSoon: disk_full_days < 7 warning",)
    own = Installation(tmp_path, told.url, webhook_url=sink.url, rules=rules)
    told.answers["/capacity/dates"] = {
        "rows": [
            {"server": "a", "full_between": ["2026-01-20", "2026-01-25"], "why_no_date": None},
            {"server": "b", "full_between": ["2026-01-30", "2026-02-25"], "why_no_date": None},
            {"server": "c", "full_between": None, "why_no_date": OVER},
        ]
    }
    own.check()
    (body,) = sink.bodies()
    (alert,) = body["alerts"]
    assert alert["labels"] == {"server": "a"}
    (full,) = module._dates(told.answers["/capacity/dates"]["rows"][2:], own.clock.now())
    assert (full.value, full.text) == (None, "it was full on the newest whole day")
    assert (
        "it is full in 4.6 days, at the earliest (< 7 days); full between 2026-01-20 and 2026-01-25"
        in alert["sentence"]
    )


def test_a_daemon_that_is_away_fires_an_alert_and_ends_none(tmp_path: Path, sink: Sink, told: Told) -> None:
    rules = ("ForecastsLate: backlog > 2 warning", "DaemonAway: daemon_away > 0 critical")
    own = Installation(tmp_path, told.url, webhook_url=sink.url, rules=rules)
    told.answers["/status"] = {**CALM, "backlog": 7}
    own.check()
    told.close()
    own.check()
    assert [(body["rule"], body["status"]) for body in sink.bodies()] == [
        ("ForecastsLate", "firing"),
        ("DaemonAway", "firing"),
    ]


def test_old_data_and_little_disk_fire(tmp_path: Path, sink: Sink, told: Told) -> None:
    rules = ("NoData: data_age_s > 300 critical", "DiskLow: free_disk_gb < 1000000 critical")
    own = Installation(tmp_path, told.url, webhook_url=sink.url, rules=rules)
    told.answers["/status"] = {**CALM, "newest_record_time": "2026-01-15T09:50:00Z"}
    own.check()
    data, disk = sorted(sink.bodies(), key=lambda body: str(body["rule"]), reverse=True)
    assert "the newest record is 10 min old (> 5 min)" in data["text"]
    assert disk["alerts"][0]["labels"] == {"folder": str(tmp_path)}


def test_a_daemon_that_does_not_work_says_why(tmp_path: Path, sink: Sink, told: Told) -> None:
    rules = ("NotReady: not_ready > 0 critical", "ModelRefused: model_problems > 0 warning")
    own = Installation(tmp_path, told.url, webhook_url=sink.url, rules=rules)
    broken = {"status": "not ready", "detail": "no space to write", "model": {"problems": ["it is damaged"]}}
    told.answers["/status"] = {**CALM, **broken}
    own.check()
    ready, model = sink.bodies()
    assert ready["text"].endswith("\nthe inference daemon cannot do its work; no space to write")
    assert model["text"].endswith("\na model version does not serve; it is damaged")
    told.answers["/status"] = CALM
    own.check()
    assert {body["status"] for body in sink.bodies()} == {"resolved"}


def test_silent_servers_are_named(tmp_path: Path, sink: Sink, told: Told) -> None:
    own = Installation(
        tmp_path, told.url, webhook_url=sink.url, rules=("ServersSilent: silent_h > 0 warning",)
    )
    told.answers["/ui/api/fleet"] = {"rows": [{"server": "web-1", "seen": "2026-01-15T09:15:00Z"}]}
    own.check()
    (body,) = sink.bodies()
    assert body["alerts"][0]["labels"] == {"server": "web-1"}
    assert "web-1: it sent nothing for 45 min (> 0 s)" in body["text"]


def test_forecasts_worse_than_the_last_value_and_a_long_hold_fire(
    tmp_path: Path, sink: Sink, told: Told
) -> None:
    rules = ("ForecastsPoor: error_ratio > 1 warning", "HeldLong: held_h > 168 warning")
    own = Installation(tmp_path, told.url, webhook_url=sink.url, rules=rules)
    own.check(error_ratio=1.2, held_since=own.clock.now() - timedelta(days=8))
    assert sorted(body["rule"] for body in sink.bodies()) == ["ForecastsPoor", "HeldLong"]


def test_a_model_that_was_taken_back_fires_for_a_day(tmp_path: Path, sink: Sink, told: Told) -> None:
    own = Installation(
        tmp_path, told.url, webhook_url=sink.url, rules=("ModelTakenBack: taken_back_h < 24 warning",)
    )
    own.check(taken_back=None)
    assert sink.requests == []
    at = own.clock.now()
    own.check(taken_back=(at, "v2 costs clients 9 % more"))
    own.check(taken_back=(at, "v2 costs clients 9 % more"), minutes=24 * 60)
    first, last = sink.bodies()
    assert first["text"].endswith("has served again for 5 min (< 24 h); v2 costs clients 9 % more")
    assert last["status"] == "resolved"


def test_a_check_that_fails_fires_and_ends_nothing_else(tmp_path: Path, sink: Sink, told: Told) -> None:
    rules = (*RULES, "ChecksFail: check_failed > 0 critical")
    with Sink() as heart:
        own = Installation(tmp_path, told.url, webhook_url=sink.url, rules=rules, heartbeat_url=heart.url)
        own.check(0.2)
        with pytest.raises(StorageFull), own.engine.watch():
            raise StorageFull("no space to write drift_metrics.json")
        assert own.engine.finish(20.0)
        own.check(0.2)
        drift, fails, ends = sink.bodies()
        assert (drift["rule"], drift["status"]) == ("DriftHigh", "firing")
        assert (fails["rule"], fails["status"]) == ("ChecksFail", "firing")
        assert fails["text"].endswith("no space to write drift_metrics.json")
        assert (ends["rule"], ends["status"]) == ("ChecksFail", "resolved")
        assert len(heart.requests) == 2, "a failed check is no heartbeat"


def test_a_lost_folder_is_not_written_to(tmp_path: Path, sink: Sink, told: Told) -> None:
    own = Installation(tmp_path, told.url, webhook_url=sink.url)
    with pytest.raises(OwnershipLost), own.engine.watch():
        raise OwnershipLost("the folder", "it was moved")
    assert list(tmp_path.iterdir()) == []


def test_the_webhooks_signature_is_of_the_bytes_that_are_sent(tmp_path: Path, sink: Sink, told: Told) -> None:
    own = Installation(tmp_path, told.url, webhook_url=sink.url, webhook_secret="a key of ours")
    own.check(0.2)
    (request,) = sink.requests
    signed = hmac.new(b"a key of ours", request.body, hashlib.sha256).hexdigest()
    assert request.headers["X-Fleetcast-Signature"] == f"sha256={signed}"
    assert request.json["alerts"][0]["fired_at"] == "2026-01-15T10:05:00Z"


def test_names_in_a_slack_message_mention_no_one_and_forge_no_line(
    tmp_path: Path, sink: Sink, told: Told
) -> None:
    own = Installation(
        tmp_path, told.url, slack_url=sink.url, rules=("LimitLikely: capacity_p > 0.5 warning",)
    )
    told.answers["/capacity"] = {"rows": [row("<!channel> @all\nfleetcast: over", 0.9)]}
    own.check()
    (body,) = sink.bodies()
    assert "<!channel>" not in body["text"]
    assert "@all" not in body["text"]
    assert len(body["text"].splitlines()) == 2


def test_more_than_the_hours_messages_become_one_and_then_wait(
    tmp_path: Path, sink: Sink, told: Told
) -> None:
    own = Installation(tmp_path, told.url, webhook_url=sink.url, messages_per_hour=3)
    for score in (0.2, 0.1, 0.2, 0.1, 0.2, 0.1):
        own.check(score)
    bodies = sink.bodies()
    assert [body["rule"] for body in bodies] == ["DriftHigh"] * 3 + ["several rules"]
    assert bodies[-1]["status"] == "resolved"
    own.check(0.1, minutes=60)
    assert sink.bodies() == [], "what began and ended meanwhile is no news"
    own.check(0.2)
    assert len(sink.bodies()) == 1


def test_alertmanager_is_sent_what_fires_at_each_check_and_its_end_for_a_quarter_of_an_hour(
    tmp_path: Path, sink: Sink, told: Told
) -> None:
    with Sink() as slack:
        own = Installation(tmp_path, told.url, alertmanager_urls=(f"{sink.url}/",), slack_url=slack.url)
        own.check(0.1)
        assert sink.requests == []
        own.check(0.2)
        own.restart()
        own.check(0.2)
        assert {request.path for request in sink.requests} == {"/api/v2/alerts"}
        ((first,), (second,)) = sink.bodies()
        assert first["labels"] == {
            "alertname": "FleetcastDriftHigh",
            "severity": "warning",
            "fleet": "fleetcast",
        }
        assert (first["startsAt"], first["endsAt"]) == ("2026-01-15T10:10:00Z", "2026-01-15T10:30:00Z")
        assert (second["startsAt"], second["endsAt"]) == ("2026-01-15T10:10:00Z", "2026-01-15T10:35:00Z")
        for _ in range(4):
            own.check(0.1)
        ends = [alert["endsAt"] for (alert,) in sink.bodies()]
        assert ends == ["2026-01-15T10:20:00Z"] * 4, "at 20, 25, 30 and 35"
        own.check(0.1)
        assert sink.requests == []
        assert slack.requests == []


def test_each_of_several_alertmanagers_hears_of_everything(tmp_path: Path, sink: Sink, told: Told) -> None:
    with Sink() as other:
        own = Installation(tmp_path, told.url, alertmanager_urls=(sink.url, other.url))
        own.check(0.2)
        assert len(sink.bodies()) == len(other.bodies()) == 1
        assert own.state()["channels"].keys() == {"alertmanager", "alertmanager-2"}


def test_without_a_channel_nothing_is_asked_or_written(tmp_path: Path, told: Told) -> None:
    own = Installation(tmp_path, told.url)
    own.check(0.2)
    assert told.paths == []
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_state_is_set_aside_and_what_fires_is_sent(tmp_path: Path, sink: Sink, told: Told) -> None:
    (tmp_path / "alerts.json").write_text('{"format": 1, "alerts": 7}')
    own = Installation(tmp_path, told.url, slack_url=sink.url)
    own.check(0.2)
    assert len(sink.bodies()) == 1
    assert (tmp_path / "alerts.json.corrupt").exists()
    assert load_state(tmp_path / "alerts.json").alerts[0].rule == "DriftHigh"


def test_a_state_of_a_newer_program_is_refused_and_left_alone(tmp_path: Path, sink: Sink, told: Told) -> None:
    newer = '{"format": 2, "alerts": []}'
    (tmp_path / "alerts.json").write_text(newer)
    with pytest.raises(UnknownFormat, match="format 2"):
        AlertEngine(Settings(alerts=AlertSettings(slack_url=sink.url)), tmp_path).load()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("alerts.json", newer)]
    AlertEngine(Settings(), tmp_path).load()  # without a channel nothing is read


def test_a_full_disk_keeps_no_alert_from_being_sent(
    tmp_path: Path, sink: Sink, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise StorageFull("no space")

    monkeypatch.setattr(module, "save_state", full)
    own = Installation(tmp_path, told.url, slack_url=sink.url)
    own.check(0.2)
    own.check(0.2)
    assert len(sink.bodies()) == 1


def test_a_clock_that_steps_back_silences_nothing(tmp_path: Path, sink: Sink, told: Told) -> None:
    own = Installation(tmp_path, told.url, slack_url=sink.url)
    own.check(0.2)
    own.clock.time = datetime(2026, 1, 1, tzinfo=UTC)
    own.check(0.2)
    own.check(0.2, minutes=241)
    assert len(sink.bodies()) == 2


def test_a_wrong_address_is_refused_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        Installation(tmp_path, "http://127.0.0.1:9", slack_url="hooks/topsecret", webhook_url="ftp://x")
    assert caught.value.problems == (
        "alerts.slack_url must look like https://host/path",
        "alerts.webhook_url must look like https://host/path",
    )


def test_keys_are_in_no_text_of_the_settings(tmp_path: Path) -> None:
    own = Installation(tmp_path, "http://127.0.0.1:9", slack_url="http://127.0.0.1:9/topsecret")
    assert "topsecret" not in repr(own.settings)


def test_a_real_daemons_answers_become_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path).start()
    try:
        for number in range(60):
            rows = [("full", number, 93.0), ("leak", number, 30.0 + number)]
            rows += [("gone", number, 10.0)] if number < 50 else []
            assert world.post(*rows).status_code == 200
            world.service.cycle()
        with DaemonClient(str(world.client.base_url)) as client:
            facts = facts_of_daemon(client, set(FACTS), datetime(2020, 1, 1, 5, tzinfo=UTC))
            row_keys = client.get("/capacity?rows=1")["rows"][0].keys()
    finally:
        world.end()
    of_check = set(facts_of_check(given(), datetime(2020, 1, 1, 5, tzinfo=UTC)))
    assert facts.keys() == FACTS.keys() - of_check - {"free_disk_gb", "disk_full_days"}, "no day is over"
    assert {fact: facts[fact][0].value for fact in ("daemon_away", "not_ready", "backlog", "data_age_s")} == {
        "daemon_away": 0.0,
        "not_ready": 0.0,
        "backlog": 0.0,
        "data_age_s": 0.0,
    }
    (silent,) = facts["silent_h"]
    assert silent == Sample.of(silent.value, server="gone")
    assert silent.value == pytest.approx(10 / 12, abs=0.02)
    near = {dict(sample.labels)["server"]: sample for sample in facts["capacity_p"]}
    assert near["full"].value is None
    assert "over the limit since 2020-01-01T00:00:00Z or before" in near["full"].text
    assert near["leak"].text == "it is not known at the moment", "no window has settled yet"
    assert row_keys == row("x", 0.5).keys()
