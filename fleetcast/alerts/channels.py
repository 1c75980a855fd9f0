"""How messages leave: one class for each kind of channel.

Owns: addresses and keys (they come from the settings alone and are in no message, log line or error), the
signature of a webhook, what an answer means. Does not know: what is worth sending (`messages`), when a
channel is tried again (`engine`).
"""

import hashlib
import hmac
import json
import logging
import re
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from fleetcast.alerts.messages import (
    Notice,
    Sender,
    alertmanager_body,
    find_template_problems,
    pagerduty_body,
    slack_body,
    text,
    title,
    webhook_body,
)
from fleetcast.alerts.rules import Alert, parse_rules
from fleetcast.alerts.state import Silence
from fleetcast.clock import Clock
from fleetcast.errors import NotDelivered, SettingsError, quote
from fleetcast.outbound import TimeLimit, cause, request
from fleetcast.settings import AlertSettings

if TYPE_CHECKING:
    import smtplib

logger = logging.getLogger(__name__)

ALERTMANAGER, SLACK, WEBHOOK, PAGERDUTY = "alertmanager", "slack", "webhook", "pagerduty"
EMAIL, APPRISE, HEARTBEAT = "email", "apprise", "heartbeat"
SIGNATURE = "X-Fleetcast-Signature"
_EMAIL = re.compile(r"[^\s@<>,;]+@[^\s@<>,;]+")
_APPRISE_KINDS = {"info": "info", "warning": "warning", "critical": "failure"}
_SHORTEST_INTERVAL_S = 60.0
_LASTS_INTERVALS = 4.0  # an alert outlives three checks that fail (Grafana flapped with 1 and with 3)

Body = Callable[[Notice], Any]


class MessageChannel(Protocol):
    """Takes one notice at a time."""

    @property
    def name(self) -> str: ...

    @property
    def can_sum_up(self) -> bool:
        """Whether one message may be about several rules."""

    def send(self, notice: Notice) -> str:
        """Deliver; return what the other side said, "" where there was nothing to say."""


@dataclass(frozen=True, repr=False)
class HttpChannel:
    """Posts each notice as JSON to one address."""

    name: str
    url: str
    timeout_s: float
    body: Body
    secret: str = ""  # signs the body
    key: str = ""  # is in the body
    can_sum_up: bool = True

    def send(self, notice: Notice) -> str:
        """Deliver one notice; return the answer's status.

        Raises:
            NotDelivered: it was refused, or there was no answer in time.
        """
        body = self.body(notice)
        if body is None:
            return ""
        data = json.dumps(body, allow_nan=False).encode()
        headers = {"Content-Type": "application/json"}
        if self.secret:
            headers[SIGNATURE] = sign(self.secret, data)
        hidden = (self.secret, self.key)
        return request("POST", self.url, self.timeout_s, data=data, headers=headers, hidden=hidden)


@dataclass(frozen=True)
class EmailChannel:
    """Sends each notice as plain text by SMTP; the messages of a rule make one thread."""

    settings: AlertSettings
    sender: Sender
    clock: Clock
    name: str = EMAIL
    can_sum_up: bool = True

    def send(self, notice: Notice) -> str:
        """Deliver one notice; raises as `HttpChannel.send` does."""
        own = self.settings
        message = EmailMessage()
        message["Subject"], message["To"] = title(notice, self.sender), ", ".join(own.email_to)
        message["From"] = own.email_from or own.email_to[0]
        message["Date"] = format_datetime(self.clock.now())
        message["Message-ID"] = make_msgid(domain="fleetcast")
        message["References"] = f"<{self.sender.key(notice.rule).replace(':', '.')}@fleetcast>"
        message["Auto-Submitted"] = "auto-generated"  # an answering machine does not answer
        message.set_content(text(notice, self.sender))
        limit = TimeLimit(own.timeout_s)
        try:
            with limit, self._connect(limit) as server:
                if own.smtp_user:
                    server.login(own.smtp_user, own.smtp_password)
                server.send_message(message)
        except OSError as error:  # smtplib's are such, too
            why = f"no answer within {own.timeout_s:g} s" if limit.is_over else cause(error)
            raise NotDelivered(f"{own.smtp_host}: {why}") from None
        finally:
            limit.forget()
        return f"taken by {own.smtp_host}"

    def _connect(self, limit: TimeLimit) -> "smtplib.SMTP":
        import smtplib  # 10 ms of a check that sends nothing

        own, context = self.settings, ssl.create_default_context()

        class Watched(smtplib.SMTP):
            def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
                made = limit.connect(host, port)
                return context.wrap_socket(made, server_hostname=host) if own.smtp_security == "tls" else made

        server = Watched(own.smtp_host, own.smtp_port, timeout=own.timeout_s)
        if own.smtp_security == "starttls":
            try:
                server.starttls(context=context)
            except OSError:
                server.close()
                raise
        return server


@dataclass(frozen=True, repr=False)
class AppriseChannel:
    """Hands each notice to apprise, where that is installed, for all its addresses."""

    urls: tuple[str, ...]
    sender: Sender
    name: str = APPRISE
    can_sum_up: bool = True

    def send(self, notice: Notice) -> str:
        """Deliver one notice; raises as `HttpChannel.send` does."""
        import apprise

        services = apprise.Apprise()
        if not all([services.add(url) for url in self.urls]):
            raise NotDelivered("apprise does not know one of the addresses")
        kind = "success" if notice.is_over else _APPRISE_KINDS[notice.severity]
        first, *others = text(notice, self.sender).splitlines()
        if not services.notify(title=first, body="\n".join(others) or first, notify_type=kind):
            raise NotDelivered("apprise could not deliver to every address")
        return "taken by apprise"


@dataclass(frozen=True, repr=False)
class HeartbeatChannel:
    """Fetches an address: a service that expects it tells people when it does not come."""

    url: str
    timeout_s: float
    name: str = HEARTBEAT

    def beat(self) -> str:
        """Fetch it; raises as `HttpChannel.send` does."""
        return request("GET", self.url, self.timeout_s)


@dataclass(frozen=True, repr=False)
class AlertmanagerChannel:
    """Posts all alerts to one Alertmanager (API v2); grouping, repeats and routes are its work."""

    name: str
    url: str
    timeout_s: float
    sender: Sender
    interval_s: float  # between checks

    def send_all(self, alerts: Sequence[Alert], silences: Sequence[Silence], now: datetime) -> str:
        """Deliver everything that fires or ended a short time ago; raises as `HttpChannel.send` does."""
        lasts = timedelta(seconds=_LASTS_INTERVALS * max(self.interval_s, _SHORTEST_INTERVAL_S))
        body = alertmanager_body(alerts, silences, self.sender, now, lasts)
        headers = {"Content-Type": "application/json"}
        url = f"{self.url.rstrip('/')}/api/v2/alerts"
        return request("POST", url, self.timeout_s, data=json.dumps(body).encode(), headers=headers)


Channel = AlertmanagerChannel | HeartbeatChannel | MessageChannel


def sign(secret: str, data: bytes) -> str:
    """Return what proves to a receiver with the same secret that the bytes are ours.

    >>> sign("key", b"{}")[:20]
    'sha256=a777724d943eb'
    """
    return f"sha256={hmac.new(secret.encode(), data, hashlib.sha256).hexdigest()}"


def make_channels(settings: AlertSettings, interval_s: float, clock: Clock) -> tuple[Channel, ...]:
    """Return the channels that are set; with an Alertmanager set, those for people are none.

    Raises:
        SettingsError: names everything that is wrong, without the value of what is secret.
    """
    if problems := list(_problems(settings)):
        raise SettingsError(problems)
    sender = make_sender(settings)
    beats: list[Channel] = []
    if settings.heartbeat_url:
        beats.append(HeartbeatChannel(settings.heartbeat_url, settings.timeout_s))
    if settings.alertmanager_urls:
        managers = (
            AlertmanagerChannel(_number(place), url, settings.timeout_s, sender, interval_s)
            for place, url in enumerate(settings.alertmanager_urls, 1)
        )
        return (*managers, *beats)
    return (*message_channels(settings, sender, clock), *beats)


def make_sender(settings: AlertSettings) -> Sender:
    """Return who sends; for a template that cannot be used, which is logged, the standard words are sent."""
    problems = _template_problems(settings)
    for problem in chain(*problems.values()):
        logger.error("the standard words are sent: %s", problem)
    templates = {name: "" if texts else getattr(settings, name) for name, texts in problems.items()}
    return Sender(settings.fleet, settings.page_url, **templates)


def find_problems(settings: AlertSettings) -> list[str]:
    """Return all that is wrong with the settings of alerts, each with what would be right."""
    problems = [*_problems(settings)]
    try:
        parse_rules(settings.rules)
    except SettingsError as error:
        problems += error.problems
    return [*problems, *chain(*_template_problems(settings).values())]


def _template_problems(settings: AlertSettings) -> dict[str, list[str]]:
    """Return by the name of each template what is wrong with it."""
    return {
        name: [f"alerts.{name} {problem}" for problem in find_template_problems(getattr(settings, name))]
        for name in ("title_template", "text_template")
    }


def message_channels(settings: AlertSettings, sender: Sender, clock: Clock) -> Iterator[MessageChannel]:
    """Yield the channels for people that are set."""
    limit_s, key = settings.timeout_s, settings.pagerduty_key
    if settings.slack_url:
        yield HttpChannel(SLACK, settings.slack_url, limit_s, lambda notice: slack_body(notice, sender))
    if settings.webhook_url:
        signed, url = settings.webhook_secret, settings.webhook_url
        yield HttpChannel(
            WEBHOOK, url, limit_s, lambda notice: webhook_body(notice, sender, clock.now()), signed
        )
    if key:
        yield HttpChannel(
            PAGERDUTY,
            settings.pagerduty_url,
            limit_s,
            lambda notice: pagerduty_body(notice, sender, key),
            key=key,
            can_sum_up=False,
        )
    if settings.email_to:
        yield EmailChannel(settings, sender, clock)
    if settings.apprise_urls:
        yield AppriseChannel(settings.apprise_urls, sender)


def _number(place: int) -> str:
    return ALERTMANAGER if place == 1 else f"{ALERTMANAGER}-{place}"


def _problems(settings: AlertSettings) -> Iterator[str]:
    """Yield what is wrong; no address is shown, since most hold a key."""
    urls = ("slack_url", "webhook_url", "page_url", "pagerduty_url", "heartbeat_url")
    given = {
        **{f"alertmanager_urls (number {n})": url for n, url in enumerate(settings.alertmanager_urls, 1)},
        **{name: getattr(settings, name) for name in urls},
    }
    for name, url in given.items():
        if url and not _is_address(url):
            yield f"alerts.{name} must look like https://host/path"
    for address in (*settings.email_to, *filter(None, (settings.email_from,))):
        if not _EMAIL.fullmatch(address):
            right = "must look like ops@example.com"
            yield f"alerts.email_to and alerts.email_from {right}, got {quote(address)}"
    if settings.apprise_urls and find_spec("apprise") is None:
        yield "alerts.apprise_urls needs the package apprise: pip install apprise"


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False
