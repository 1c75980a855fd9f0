"""How messages leave: one class for each kind of channel, and one request within a bounded time.

Owns: addresses and keys (they come from the settings alone and are in no message, log line or error), the
signature of a webhook, what an answer means. Does not know: what is worth sending (`messages`), when a
channel is tried again (`engine`).
"""

import hashlib
import hmac
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol
from urllib.parse import urlsplit

import requests

from fleetcast.alerts.messages import Notice, Sender, alertmanager_body, slack_body, webhook_body
from fleetcast.alerts.rules import Alert
from fleetcast.alerts.state import Silence
from fleetcast.clock import Clock
from fleetcast.errors import NotDelivered, SettingsError
from fleetcast.settings import AlertSettings
from fleetcast.sources.client import LOOPBACK

ALERTMANAGER, SLACK, WEBHOOK = "alertmanager", "slack", "webhook"
SIGNATURE = "X-Fleetcast-Signature"
_DETAIL_BYTES = 200
_SHORTEST_INTERVAL_S = 60.0
_LASTS_INTERVALS = 4.0  # an alert outlives three checks that fail (Grafana flapped with 1 and with 3)

Body = Callable[[Notice], Any]


class MessageChannel(Protocol):
    """Takes one notice at a time."""

    @property
    def name(self) -> str: ...

    def send(self, notice: Notice) -> str:
        """Deliver; return what the other side said. Raises NotDelivered."""


@dataclass(frozen=True)
class HttpChannel:
    """Posts each notice as JSON to one address."""

    name: str
    url: str
    timeout_s: float
    body: Body
    secret: str = ""  # signs the body

    def send(self, notice: Notice) -> str:
        """Deliver one notice; return the answer's status.

        Raises:
            NotDelivered: it was refused, or there was no answer in time.
        """
        data = json.dumps(self.body(notice), allow_nan=False).encode()
        headers = {"Content-Type": "application/json"}
        if self.secret:
            headers[SIGNATURE] = sign(self.secret, data)
        return request("POST", self.url, self.timeout_s, data=data, headers=headers)


@dataclass(frozen=True)
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


Channel = AlertmanagerChannel | MessageChannel


def sign(secret: str, data: bytes) -> str:
    """Return what proves to a receiver with the same secret that the bytes are ours.

    >>> sign("key", b"{}")[:20]
    'sha256=d7db7c38ab8c5'
    """
    return f"sha256={hmac.new(secret.encode(), data, hashlib.sha256).hexdigest()}"


def request(
    method: str,
    url: str,
    timeout_s: float,
    *,
    data: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> str:
    """Make one request; return the status. It follows no redirect: those would take the key elsewhere.

    Raises:
        NotDelivered: with the status or the cause, never with the address.
    """
    try:
        with requests.Session() as session:
            session.trust_env = urlsplit(url).hostname not in LOOPBACK
            answer = session.request(
                method,
                url,
                data=data,
                headers=headers,
                timeout=timeout_s,
                allow_redirects=False,
                stream=True,  # what it says at length is not read
            )
            with answer:
                if 200 <= answer.status_code < 300:
                    return f"HTTP {answer.status_code}"
                detail = next(answer.iter_content(_DETAIL_BYTES), b"").decode("utf-8", "replace")
    except (requests.RequestException, ValueError) as error:
        raise NotDelivered(f"no answer: {cause(error)}") from None  # the error's text holds the address
    raise NotDelivered(
        f"HTTP {answer.status_code}: {_without(url, detail)}", retry_after_s=_seconds(answer.headers)
    )


def cause(error: BaseException) -> str:
    """Return the innermost cause by its name and the system's words, without any address."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    words = error.strerror if isinstance(error, OSError) else None
    return f"{type(error).__name__}{f': {words}' if words else ''}"


def _without(url: str, detail: str) -> str:
    """Return what a refusal says, unless it repeats a part of the address that may be a key."""
    parts = urlsplit(url)
    secrets = [part for part in (*parts.path.split("/"), parts.query, parts.password or "") if len(part) > 6]
    return "(not shown)" if any(secret in detail for secret in secrets) else " ".join(detail.split())


def _seconds(headers: Any) -> float:
    try:
        return max(0.0, float(headers.get("Retry-After", 0)))
    except ValueError:
        return 0.0


def make_channels(settings: AlertSettings, interval_s: float, clock: Clock) -> tuple[Channel, ...]:
    """Return the channels that are set; with an Alertmanager set, those alone.

    Raises:
        SettingsError: names every address that is none, without its value.
    """
    check_addresses(settings)
    sender = Sender(settings.fleet, settings.page_url)
    if settings.alertmanager_urls:
        return tuple(
            AlertmanagerChannel(_number(place), url, settings.timeout_s, sender, interval_s)
            for place, url in enumerate(settings.alertmanager_urls, 1)
        )
    return tuple(message_channels(settings, sender, clock))


def message_channels(settings: AlertSettings, sender: Sender, clock: Clock) -> Iterator[MessageChannel]:
    """Yield the channels for people that are set."""
    limit_s = settings.timeout_s
    if settings.slack_url:
        yield HttpChannel(SLACK, settings.slack_url, limit_s, lambda notice: slack_body(notice, sender))
    if settings.webhook_url:
        yield HttpChannel(
            WEBHOOK,
            settings.webhook_url,
            limit_s,
            lambda notice: webhook_body(notice, sender, clock.now()),
            settings.webhook_secret,
        )


def _number(place: int) -> str:
    return ALERTMANAGER if place == 1 else f"{ALERTMANAGER}-{place}"


def check_addresses(settings: AlertSettings) -> None:
    """Refuse addresses that cannot be one, all at once.

    Raises:
        SettingsError: it shows no address, since most hold a key.
    """
    given = {
        **{f"alertmanager_urls (number {n})": url for n, url in enumerate(settings.alertmanager_urls, 1)},
        **{name: getattr(settings, name) for name in ("slack_url", "webhook_url", "page_url")},
    }
    wrong = [name for name, url in given.items() if url and not _is_address(url)]
    if wrong:
        raise SettingsError([f"alerts.{name} must look like https://host/path" for name in wrong])


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False
