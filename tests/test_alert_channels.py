"""Channels that keep incidents, send mail or only beat, and what people type about alerts."""

import base64
import email
import json
import logging
import shutil
import socketserver
import ssl
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from email.message import Message
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Self

import pytest
from alert_sink import Sink
from test_alerts import CALM, Installation, row
from test_inference import World
from told_daemon import Told

from fleetcast.alerts.channels import AppriseChannel, EmailChannel
from fleetcast.alerts.messages import Notice, Sender, text, title, trial_notice
from fleetcast.alerts.rules import FIRING, Alert
from fleetcast.alerts.state import SILENCES_FILE, ChannelState, Silence, add_silence
from fleetcast.clock import FakeClock, SystemClock
from fleetcast.console.alerts import main
from fleetcast.console.command import main as check_settings
from fleetcast.console.doctor import main as doctor
from fleetcast.errors import ExitCode, NotDelivered, SettingsError
from fleetcast.settings import AlertSettings

LIMIT = ("LimitLikely: capacity_p > 0.5 warning",)


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as receiver:
        yield receiver


@pytest.fixture
def told() -> Iterator[Told]:
    with Told() as daemon:
        daemon.answers["/status"] = CALM
        yield daemon


class Mailbox:
    """A server of SMTP that takes every message; without a certificate it knows no encryption."""

    def __init__(self, refuse: bytes = b"", certificate: Path | None = None) -> None:
        self.messages: list[Message] = []
        self.to: list[str] = []
        self.logins: list[bytes] = []
        mailbox = self
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if certificate:
            context.load_cert_chain(certificate)

        class Handler(socketserver.StreamRequestHandler):
            def finish(self) -> None:
                super().finish()
                self.connection.close()

            def handle(self) -> None:
                self.wfile.write(b"220 ready\r\n")
                while line := self.rfile.readline():
                    verb = line.split()[0].upper()
                    if verb == b"EHLO" and certificate:
                        self.wfile.write(b"250-here\r\n250-STARTTLS\r\n250 AUTH PLAIN\r\n")
                        continue
                    if verb == b"STARTTLS":
                        self.wfile.write(b"220 go on\r\n")
                        try:
                            self.connection = context.wrap_socket(self.connection, server_side=True)
                        except OSError:  # the other side does not trust us
                            return
                        self.rfile = self.connection.makefile("rb")
                        self.wfile = self.connection.makefile("wb", buffering=0)
                        continue
                    if verb == b"AUTH":
                        mailbox.logins.append(base64.b64decode(line.split()[2]))
                        self.wfile.write(b"235 welcome\r\n")
                        continue
                    if verb == b"QUIT":
                        self.wfile.write(b"221 bye\r\n")
                        return
                    if verb == b"DATA":
                        self.wfile.write(b"354 go on\r\n")
                        lines = iter(self.rfile.readline, b".\r\n")
                        mailbox.messages.append(email.message_from_bytes(b"".join(lines)))
                    if verb == b"RCPT":
                        mailbox.to.append(line.decode().strip())
                    self.wfile.write(refuse if refuse and verb == b"RCPT" else b"250 ok\r\n")

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def incidents(sink: Sink) -> list[tuple[str, str]]:
    return [(body["event_action"], body["dedup_key"]) for body in sink.bodies()]


def test_pagerduty_sees_one_incident_over_restarts_and_one_end(
    tmp_path: Path, sink: Sink, told: Told
) -> None:
    own = Installation(tmp_path, told.url, pagerduty_key="k" * 32, pagerduty_url=sink.url)
    own.check(0.2)
    (trigger,) = [request.json for request in sink.requests]
    assert trigger["routing_key"] == "k" * 32
    assert trigger["payload"] == {
        "summary": "fleetcast: DriftHigh (warning): the combined drift score is 0.2 (> 0.15)",
        "source": "fleetcast",
        "severity": "warning",
        "component": "DriftHigh",
        "custom_details": {"alerts": ["the combined drift score is 0.2 (> 0.15)"], "firing": 1},
    }
    for score in (0.2, 0.3, 0.1, 0.1):
        own.restart()
        own.check(score)
    seen = incidents(sink)
    assert [action for action, _ in seen] == ["trigger", "resolve"]
    assert len({key for _, key in seen}) == 1
    assert "k" * 32 not in json.dumps(own.state())


def test_pagerduty_keeps_one_incident_for_a_rule_until_its_last_server_is_well(
    tmp_path: Path, sink: Sink, told: Told
) -> None:
    own = Installation(tmp_path, told.url, pagerduty_key="key", pagerduty_url=sink.url, rules=LIMIT)
    for rows in (["a", "b"], ["b"], ["b", "c"], ["c"], []):
        told.answers["/capacity"] = {"rows": [row(name, 0.9) for name in rows]}
        own.check()
    seen = incidents(sink)
    assert [action for action, _ in seen] == ["trigger", "trigger", "resolve"], "a, b; c; none"
    assert len({key for _, key in seen}) == 1
    assert own.state()["channels"]["pagerduty"]["told"] == {}


def test_the_hours_limit_holds_back_no_end_of_an_incident(tmp_path: Path, sink: Sink, told: Told) -> None:
    own = Installation(tmp_path, told.url, pagerduty_key="key", pagerduty_url=sink.url, messages_per_hour=1)
    for score in (0.2, 0.1, 0.2, 0.1):
        own.check(score)
    assert [action for action, _ in incidents(sink)] == ["trigger", "resolve"]


def test_two_fleets_have_keys_of_their_own() -> None:
    assert Sender("west").key("DriftHigh") != Sender("east").key("DriftHigh")
    assert Sender("west").key("DriftHigh") == Sender("west", "http://page").key("DriftHigh")


def test_mail_is_plain_text_in_one_thread(tmp_path: Path, told: Told) -> None:
    with Mailbox() as mailbox:
        own = Installation(
            tmp_path,
            told.url,
            email_to=("ops@example.com", "two@example.com"),
            email_from="fleetcast@example.com",
            smtp_host="127.0.0.1",
            smtp_port=mailbox.port,
            smtp_security="none",
            page_url="https://example.com/ui/",
        )
        own.check(0.2)
        own.check(0.1)
    first, last = mailbox.messages
    assert (first["Subject"], last["Subject"]) == (
        "fleetcast: DriftHigh (warning)",
        "fleetcast: DriftHigh is over",
    )
    assert (first["From"], first["To"]) == ("fleetcast@example.com", "ops@example.com, two@example.com")
    assert first["References"] == last["References"]
    assert first["Message-ID"] != last["Message-ID"]
    assert first["Date"] == "Thu, 15 Jan 2026 10:05:00 +0000"
    body = first.get_payload()
    assert isinstance(body, str)
    assert body.splitlines()[-1] == "https://example.com/ui/"
    assert len(mailbox.to) == 4


def mail(**settings: Any) -> EmailChannel:
    own = AlertSettings(
        **{"email_to": ("ops@example.com",), "smtp_host": "127.0.0.1", "timeout_s": 5.0, **settings}
    )
    return EmailChannel(own, Sender("fleetcast"), FakeClock())


def test_mail_does_not_go_out_in_the_clear_where_encryption_is_asked_for() -> None:
    with Mailbox() as mailbox:
        with pytest.raises(NotDelivered, match="SMTPNotSupportedError"):
            mail(smtp_port=mailbox.port).send(trial_notice(FakeClock().now()))
        assert mailbox.messages == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with a key and a certificate for 127.0.0.1 that no one else trusts."""
    if not shutil.which("openssl"):
        pytest.skip("openssl not installed")
    path = tmp_path_factory.mktemp("mail") / "mail.pem"
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=127.0.0.1"
    names = ("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", path, "-out", f"{path}.crt")
    subprocess.run(["openssl", *made.split(), *names], check=True, capture_output=True, timeout=60)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


def test_mail_is_encrypted_before_the_password_is_sent(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", f"{certificate}.crt")
    with Mailbox(certificate=certificate) as mailbox:
        channel = mail(smtp_port=mailbox.port, smtp_user="fleetcast", smtp_password="topsecret")
        assert channel.send(trial_notice(FakeClock().now())) == "taken by 127.0.0.1"
    assert mailbox.logins == [b"\0fleetcast\0topsecret"]
    assert len(mailbox.messages) == 1


def test_a_mail_server_that_is_not_trusted_gets_neither_password_nor_message(certificate: Path) -> None:
    with Mailbox(certificate=certificate) as mailbox:
        channel = mail(smtp_port=mailbox.port, smtp_user="fleetcast", smtp_password="topsecret")
        with pytest.raises(NotDelivered, match="SSLCertVerificationError") as caught:
            channel.send(trial_notice(FakeClock().now()))
    assert "topsecret" not in str(caught.value)
    assert (mailbox.logins, mailbox.messages) == ([], [])


def test_a_mail_server_that_refuses_is_named_by_its_cause() -> None:
    with Mailbox(refuse=b"550 no such user\r\n") as mailbox, pytest.raises(NotDelivered) as caught:
        mail(smtp_port=mailbox.port, smtp_security="none").send(trial_notice(FakeClock().now()))
    assert "SMTPRecipientsRefused" in str(caught.value)


def test_a_hostile_server_name_makes_no_header_and_blocks_no_mail(tmp_path: Path, told: Told) -> None:
    with Mailbox() as mailbox:
        own = Installation(
            tmp_path,
            told.url,
            email_to=("ops@example.com",),
            smtp_host="127.0.0.1",
            smtp_port=mailbox.port,
            smtp_security="none",
            rules=LIMIT,
            fleet="west\r\nBcc: all@example.com",
        )
        told.answers["/capacity"] = {"rows": [row("web\r\nBcc: all@example.com \ud800", 0.9)]}
        own.check()
    (message,) = mailbox.messages
    assert message["Bcc"] is None
    assert len(mailbox.to) == 1


class Apprise:
    """What apprise is to us."""

    sent: list[dict[str, str]] = []  # noqa: RUF012
    takes = True

    def add(self, url: str) -> bool:
        return url.startswith("json://")

    def notify(self, **message: str) -> bool:
        Apprise.sent.append(message)
        return Apprise.takes


def test_apprise_is_used_where_it_is_installed(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = types.ModuleType("apprise")
    stand_in.__spec__ = ModuleSpec("apprise", None)
    monkeypatch.setattr(stand_in, "Apprise", Apprise, raising=False)
    monkeypatch.setitem(sys.modules, "apprise", stand_in)
    monkeypatch.setattr(Apprise, "sent", [])
    own = Installation(tmp_path, told.url, apprise_urls=("json://127.0.0.1:9/topsecret",))
    own.check(0.2)
    own.check(0.1)
    assert [(message["title"], message["notify_type"]) for message in Apprise.sent] == [
        ("fleetcast: DriftHigh (warning)", "warning"),
        ("fleetcast: DriftHigh is over", "success"),
    ]
    monkeypatch.setattr(Apprise, "takes", False)
    own.check(0.2)
    assert "could not deliver" in own.state()["channels"]["apprise"]["last_error"]
    own = Installation(tmp_path, told.url, apprise_urls=("nonsense",))
    own.check(0.2, minutes=20)
    assert "does not know" in own.state()["channels"]["apprise"]["last_error"]


def test_settings_say_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apprise", None)
    with pytest.raises(SettingsError) as caught:
        Installation(tmp_path, "http://127.0.0.1:9", apprise_urls=("json://x",), email_to=("ops",))
    mail_problem, apprise_problem = caught.value.problems
    assert "must look like ops@example.com, got 'ops'" in mail_problem
    assert "pip install apprise" in apprise_problem


def test_each_good_check_is_a_heartbeat_beside_an_alertmanager_too(
    tmp_path: Path, sink: Sink, told: Told
) -> None:
    with Sink() as manager:
        own = Installation(
            tmp_path, told.url, heartbeat_url=f"{sink.url}/ping/1234", alertmanager_urls=(manager.url,)
        )
        own.check(0.1)
        own.check(0.2)
        assert [(beat.method, beat.path) for beat in sink.requests] == [("GET", "/ping/1234")] * 2
        assert len(manager.requests) == 1


class Terminal:
    """Types `fleetcast alerts`, in the working folder."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def run(self, *words: str, code: int = ExitCode.OK) -> str:
        """Return what it prints, stderr included."""
        self._capsys.readouterr()
        try:
            ended = main(words, prog="fleetcast alerts")
        except SystemExit as end:
            ended = int(end.code or 0)
        output = "".join(self._capsys.readouterr())
        assert ended == code, output
        return output

    def json(self, *words: str, code: int = ExitCode.OK) -> Any:
        return json.loads(self.run(*words, "--json", code=code))


@pytest.fixture
def terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.chdir(tmp_path)
    return Terminal(capsys)


def configure(**settings: object) -> None:
    lines = (f"{name} = {json.dumps(value)}" for name, value in settings.items())
    Path("fleetcast.toml").write_text("\n".join(["[alerts]", *lines]))


def test_the_list_names_what_fires_and_ends_with_one_while_something_does(
    tmp_path: Path, sink: Sink, told: Told, terminal: Terminal
) -> None:
    own = Installation(tmp_path, told.url, slack_url=f"{sink.url}/topsecret")
    configure(slack_url=f"{sink.url}/topsecret")
    own.check(0.1)
    assert "nothing fires; 17 rules" in terminal.run("list")
    own.check(0.2)
    says = terminal.run("list", code=ExitCode.FAILED)
    assert "DriftHigh  warning" in says
    assert "topsecret" not in says
    shown = terminal.json("list", code=ExitCode.FAILED)
    assert shown["firing"][0]["sentence"] == "the combined drift score is 0.2 (> 0.15)"
    assert shown["channels"]["slack"]["told"] == 1
    terminal.run("silence", "DriftHigh", "--hours", "2", "--reason", "release week")
    shown = terminal.json("list")
    assert shown["firing"][0]["silent"] is True
    assert shown["silences"][0]["why"] == "release week"
    terminal.run("silence", "DriftHigh", "--hours", "0", "--reason", "done")
    assert terminal.json("list", code=ExitCode.FAILED)["silences"] == []


def test_a_list_without_a_daemon_says_where_to_look(terminal: Terminal) -> None:
    assert "the retraining daemon's folder" in terminal.run("list", code=ExitCode.COULD_NOT_LOOK)


def test_a_test_prints_each_channels_answer(sink: Sink, terminal: Terminal) -> None:
    with Sink() as pagerduty:
        configure(
            slack_url=f"{sink.url}/services/topsecret",
            pagerduty_key="key-of-pagerduty",
            pagerduty_url=pagerduty.url,
            heartbeat_url=sink.url,
        )
        assert [line.split() for line in terminal.run("test").splitlines()[1:]] == [
            [name, "taken", "HTTP", "200"] for name in ("slack", "pagerduty", "heartbeat")
        ]
        assert [action for action, _ in incidents(pagerduty)] == ["trigger", "resolve"]
        sink.status, sink.answer = 403, b"invalid_token"
        says = terminal.run("test", "slack", code=ExitCode.FAILED)
        assert "HTTP 403: invalid_token" in says
        assert "topsecret" not in says
        assert terminal.json("test", "pagerduty") == {"pagerduty": {"taken": True, "answer": "HTTP 200"}}


def test_a_test_of_a_channel_that_hangs_in_a_library_ends(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    configure(apprise_urls=["json://127.0.0.1"], timeout_s=0.2)
    monkeypatch.setattr("fleetcast.alerts.channels.find_spec", lambda _name: ModuleSpec("apprise", None))
    monkeypatch.setattr(AppriseChannel, "send", lambda *_: str(go_on.wait(60)))
    assert "no answer within 0.2 s" in terminal.run("test", "apprise", code=ExitCode.FAILED)
    go_on.set()


TEMPLATES = {
    "title_template": "[{severity}] {rule} on {fleet}: {state} ({firing}) {{x}}",
    "text_template": "was: {title}\n{lines}\n\nsee {page}",
}


def test_messages_are_in_the_words_of_a_template(tmp_path: Path, sink: Sink, told: Told) -> None:
    page = "https://fleet.example.com/ui/"
    own = Installation(tmp_path, told.url, slack_url=sink.url, page_url=page, **TEMPLATES)
    for score in (0.2, 0.1):
        own.check(score)
    sentence = "the combined drift score is 0.2 (&gt; 0.15)"
    began, ended = (body["text"].splitlines() for body in sink.bodies())
    was = "was: fleetcast: DriftHigh"
    head = "[warning] DriftHigh on fleetcast"
    assert began[:3] == [f"{head}: firing (1) {{x}}", f"{was} (warning)", sentence]
    assert ended[:3] == [f"{head}: over (0) {{x}}", f"{was} is over", f"over: {sentence}"]
    assert began[3:] == ended[3:] == ["", f"see {page}"]


def test_names_that_look_like_templates_are_only_names() -> None:
    at = SystemClock().now()
    labels = (("server", "{rule.__class__} {page} {0}\nX-Header: 1"),)
    alert = Alert("ServersSilent", "warning", labels, FIRING, at, at, "it sent {lines}", at)
    notice = Notice("ServersSilent", "warning", (alert,), (), (alert,))
    sender = Sender("{page}", "https://x", "{fleet} {lines}", "{lines}|{fleet}")
    assert title(notice, sender) == "{page} {rule.__class__} {page} {0} X-Header: 1: it sent {lines}"
    assert text(notice, sender).splitlines()[1:] == [
        "{rule.__class__} {page} {0} X-Header: 1: it sent {lines}|{page}"
    ]
    assert title(notice, Sender("f", title_template="{page} ")) == "f: ServersSilent (warning)", (
        "nothing is left"
    )


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{rules}", "unknown field {rules}, nearest is rule (known: {fleet}"),
        ("{rule.__class__.__mro__}", "unknown field {rule.__class__.__mro__}"),
        ("{rule[0]}", "unknown field {rule[0]}"),
        ("{}", "unknown field {}"),
        ("{0}", "unknown field {0}"),
        ("{rule!r}", "must have {rule} alone in its braces"),
        ("{rule:>9999999999}", "must have {rule} alone in its braces"),
        ("{rule:{fleet}}", "must have {rule} alone in its braces"),
        ("a { b", "cannot be read"),
        ("a } b", "cannot be read"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_and_costs_no_alert(
    tmp_path: Path,
    sink: Sink,
    told: Told,
    terminal: Terminal,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    template: str,
    says: str,
) -> None:
    configure(slack_url=sink.url, text_template=template)
    said = terminal.run("test", code=ExitCode.BAD_SETTINGS)
    assert "alerts.text_template " in said
    assert says in said
    assert check_settings(["check"], prog="fleetcast settings") == ExitCode.BAD_SETTINGS
    assert says in capsys.readouterr().err
    assert sink.bodies() == []
    own = Installation(tmp_path, told.url, slack_url=sink.url, text_template=template)
    own.check(0.2)
    (sent,) = sink.bodies()
    assert sent["text"] == "fleetcast: DriftHigh (warning)\nthe combined drift score is 0.2 (&gt; 0.15)"
    assert "the standard words are sent: alerts.text_template" in caplog.text


def test_settings_with_which_no_daemon_starts_are_not_called_good(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(slack_url="nonsense", rules=["X: nope > 3 warning"])
    with Path("fleetcast.toml").open("a") as file:
        file.write('\n[remote_write]\nrules = ["cpu_pct: ("]\n')
    assert check_settings(["check"], prog="fleetcast settings") == ExitCode.BAD_SETTINGS
    said = capsys.readouterr().err
    assert doctor([]) == ExitCode.FAILED
    told = capsys.readouterr().out
    for name in ("alerts.slack_url", "alerts.rules", "remote_write.rules"):
        assert name in said
        assert name in told


def test_a_test_reaches_channels_that_an_alertmanager_keeps_quiet(sink: Sink, terminal: Terminal) -> None:
    configure(alertmanager_urls=[sink.url], slack_url=sink.url)
    terminal.run("test")
    assert [request.path for request in sink.requests] == ["/api/v2/alerts", "/"]


def test_the_page_shows_what_fires_who_takes_it_and_what_is_silent(
    tmp_path: Path, sink: Sink, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path).start()
    try:
        assert world.get("/ui/api/health")["alerts"] is None, "no channel is set"
        own = Installation(tmp_path, told.url, slack_url=f"{sink.url}/topsecret")
        own.check(0.2)
        now = SystemClock().now()
        silence = Silence("DriftHigh", now + timedelta(hours=1), "release", "anna", now)
        shown = world.get("/ui/api/health")["alerts"]
        add_silence(tmp_path / SILENCES_FILE, silence)
        silent = world.get("/ui/api/health")["alerts"]
        (tmp_path / "alerts.json").write_text("{")
        assert world.get("/ui/api/health")["alerts"] is None, "the page goes on"
    finally:
        world.end()
    (alert,) = shown["firing"]
    assert (alert["rule"], alert["since"], alert["silent"]) == ("DriftHigh", "2026-01-15T10:05:00Z", False)
    assert shown["channels"]["slack"]["told"] == 1
    assert "topsecret" not in json.dumps(shown)
    assert (silent["firing"][0]["silent"], silent["silences"][0]["why"]) == (True, "release")


def test_the_doctor_names_a_channel_that_nothing_reaches(
    tmp_path: Path,
    sink: Sink,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    own = Installation(tmp_path, told.url, slack_url=sink.url, webhook_url=sink.url)
    sink.status = 403
    own.check(0.2)
    sink.status = 200
    own.check(0.2)
    world = World(tmp_path).start()
    try:
        flags = ["--url", str(world.client.base_url), "--json"]
        own.engine._keep(
            own.engine._state.with_channel("slack", ChannelState(failures=3, last_error="HTTP 403: no_team"))
        )
        doctor(flags)
        found = json.loads(capsys.readouterr().out)["findings"]
        Path("alerts.json").write_text("{}")
        doctor(flags)
        damaged = json.loads(capsys.readouterr().out)["findings"]
    finally:
        world.end()
    slack, webhook = [item for item in found if item["check"] == "alerts"]
    assert (slack["state"], webhook["state"]) == ("bad", "ok")
    assert slack["says"] == "nothing reaches slack, 3 times in a row: HTTP 403: no_team"
    assert slack["right"].endswith("fleetcast alerts test slack")
    (finding,) = [item for item in damaged if item["check"] == "alerts"]
    assert (finding["state"], "cannot be read" in finding["says"]) == ("bad", True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("test",), "no channel is set"),
        (("silence", "DriftHgh", "--hours", "1", "--reason", "x"), "nearest is DriftHigh"),
        (("silence", "DriftHigh", "--hours", "1"), "needs a rule, --hours and --reason"),
        (("silence", "DriftHigh", "--hours", "x", "--reason", "x"), "must be hours, from 0 to 8760, got 'x'"),
        (("list", "--reason", "x"), "list takes no --hours, --reason or --server"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else "",
)
def test_wrong_words_end_with_two_and_say_what_would_be_right(
    words: tuple[str, ...], says: str, terminal: Terminal
) -> None:
    assert says in terminal.run(*words, code=ExitCode.BAD_SETTINGS)


def test_a_channel_that_is_not_set_is_named_with_those_that_are(sink: Sink, terminal: Terminal) -> None:
    configure(slack_url=sink.url)
    assert "set: slack" in terminal.run("test", "slak", code=ExitCode.BAD_SETTINGS)


def test_a_log_at_debug_level_holds_no_key(
    tmp_path: Path, sink: Sink, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), Sink() as pagerduty:
        pagerduty.status, pagerduty.answer = 400, b"bad routing_key key-of-pagerduty"
        own = Installation(tmp_path, told.url, pagerduty_key="key-of-pagerduty", pagerduty_url=pagerduty.url)
        own.check(0.2)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("fleetcast")]
    assert any("alert not sent channel=pagerduty" in line for line in ours)
    assert not any("key-of-pagerduty" in line for line in ours)
    assert replace(own.settings).alerts.pagerduty_key == "key-of-pagerduty"
