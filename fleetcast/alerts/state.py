"""`alerts.json` and `alert_silences.jsonl`: what alerting must not forget, and what people silenced.

Owns: both formats, what a damaged file costs, when an alert is forgotten. Does not know: when an alert
fires (`rules`), what is sent (`messages`). The retraining daemon alone writes `alerts.json`, each time in
one atomic step; `fleetcast alerts silence` adds lines to the other file, of which the newest for a rule
and server counts.

`alerts.json`: `format`; `fleet`; `alerts`, each with `rule`, `severity`, `labels`, `state`, `since`,
`seen_at`, `sentence`, `fired_at`, `ended_at`; `channels` by name, each with `told` (fingerprint: when it
was told last that this alert fires), `sent` (its messages of the last hour), `last_ok`, `failures` (in a
row), `next_try`, `last_error`. Times are UTC.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fleetcast import files
from fleetcast.alerts.rules import ENDED, FIRING, PENDING, Alert, Labels
from fleetcast.clock import iso_z, parse_plain_utc
from fleetcast.errors import CorruptFile, UnknownFormat

logger = logging.getLogger(__name__)

ALERTS_FILE = "alerts.json"
SILENCES_FILE = "alert_silences.jsonl"
FORMAT = 1
HOUR = timedelta(hours=1)
RESEND = timedelta(minutes=15)  # the end of an alert: Alertmanager forgets at a restart
_GIVE_UP = timedelta(days=1)  # telling a channel that an alert ended
_FIRST_PAUSE_S, _MOST_PAUSE_S = 60.0, 900.0
_SILENCES_MAX_BYTES = 1_000_000
_FUTURE = timedelta(minutes=2)


@dataclass(frozen=True, slots=True)
class ChannelState:
    """What one channel was told, and how that went."""

    told: Mapping[str, datetime] = field(default_factory=dict)  # by fingerprint; without what has ended
    sent: tuple[datetime, ...] = ()  # messages of the last hour
    last_ok: datetime | None = None
    failures: int = 0  # in a row
    next_try: datetime | None = None
    last_error: str = ""

    def n_sent(self, now: datetime) -> int:
        """Return how many messages it took in the last hour."""
        return sum(now - at < HOUR for at in self.sent)

    def may_try(self, now: datetime) -> bool:
        """Return whether its pause after a failure is over."""
        return self.next_try is None or now >= self.next_try

    def after_success(self, now: datetime, *, counts: bool) -> "ChannelState":
        """Return the state after a message was taken; only messages to people count for the limit."""
        sent = (*(at for at in self.sent if now - at < HOUR), *((now,) if counts else ()))
        return replace(self, sent=sent, last_ok=now, failures=0, next_try=None, last_error="")

    def after_failure(self, now: datetime, why: str, retry_after_s: float = 0.0) -> "ChannelState":
        """Return the state after a failure: the pause doubles from a minute to a quarter of an hour."""
        pause_s = min(_FIRST_PAUSE_S * 2.0 ** min(self.failures, 10), _MOST_PAUSE_S)
        next_try = now + timedelta(seconds=max(pause_s, min(retry_after_s, 3600.0)))
        return replace(self, failures=self.failures + 1, next_try=next_try, last_error=why)


@dataclass(frozen=True, slots=True)
class AlertState:
    """Everything that survives a restart."""

    alerts: tuple[Alert, ...] = ()
    channels: Mapping[str, ChannelState] = field(default_factory=dict)

    def of(self, channel: str) -> ChannelState:
        """Return what is known of a channel."""
        return self.channels.get(channel, ChannelState())

    def with_channel(self, name: str, channel: ChannelState) -> "AlertState":
        """Return the state with a channel replaced."""
        return replace(self, channels={**self.channels, name: channel})

    def settle(self, names: Iterable[str], now: datetime) -> "AlertState":
        """Return the state without channels that are no more, alerts that are over, and times to come."""
        channels = {name: _not_later(self.of(name), now) for name in names}
        told = {fingerprint for channel in channels.values() for fingerprint in channel.told}
        kept = tuple(
            alert
            for alert in (_alert_not_later(alert, now) for alert in self.alerts)
            if alert.ended_at is None
            or now - alert.ended_at <= (_GIVE_UP if alert.fingerprint in told else RESEND)
        )
        known = {alert.fingerprint for alert in kept}
        for name, channel in channels.items():
            still = {mark: at for mark, at in channel.told.items() if mark in known}
            channels[name] = replace(channel, told=still)
        return AlertState(kept, channels)


def _not_later(channel: ChannelState, now: datetime) -> ChannelState:
    """Return a channel's state without times to come: the clock stepped back."""
    told = {mark: min(at, now) for mark, at in channel.told.items()}
    is_far = channel.next_try is not None and channel.next_try > now + HOUR + _FUTURE
    next_try = None if is_far else channel.next_try
    sent = tuple(at for at in channel.sent if at <= now + _FUTURE)
    return replace(channel, told=told, sent=sent, next_try=next_try)


def _alert_not_later(alert: Alert, now: datetime) -> Alert:
    if max(alert.since, alert.seen_at, alert.fired_at or now, alert.ended_at or now) <= now:
        return alert
    return replace(
        alert,
        since=min(alert.since, now),
        seen_at=min(alert.seen_at, now),
        fired_at=alert.fired_at and min(alert.fired_at, now),
        ended_at=alert.ended_at and min(alert.ended_at, now),
    )


def load_state(path: Path) -> AlertState:
    """Return the state in `path`, a fresh one where there is none; raises what `read_json` raises."""
    try:
        raw = files.read_json(path)
    except FileNotFoundError:
        return AlertState()
    if raw.get("format") != FORMAT:
        raise UnknownFormat(path, f"format {raw.get('format')!r}", hint=f"this program reads {FORMAT}")
    try:
        channels = {name: _channel(item) for name, item in raw["channels"].items()}
        return AlertState(tuple(_alert(item) for item in raw["alerts"]), channels)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFile(path, f"no state of alerts: {error!r}") from error


def state_at_start(path: Path) -> AlertState:
    """Return the state for its owner; a damaged file is set aside, and what fires is sent once more.

    Raises:
        UnknownFormat: a newer program wrote it.
    """
    try:
        return load_state(path)
    except UnknownFormat:
        raise
    except CorruptFile as error:
        files.set_aside(path, error)
        return AlertState()


def save_state(path: Path, state: AlertState, fleet: str) -> None:
    """Replace the file in one durable step."""
    document = {
        "format": FORMAT,
        "fleet": fleet,
        "alerts": [{**asdict(alert), "labels": dict(alert.labels)} for alert in state.alerts],
        "channels": {name: asdict(channel) for name, channel in state.channels.items()},
    }
    files.write_json(path, _plain(document))


def _plain(value: Any) -> Any:
    """Return a value with its times as text."""
    if isinstance(value, datetime):
        return iso_z(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _alert(raw: Mapping[str, Any]) -> Alert:
    if raw["state"] not in (PENDING, FIRING, ENDED):
        raise ValueError(f"state {raw['state']!r}")
    labels: Labels = tuple(sorted((str(name), str(value)) for name, value in raw["labels"].items()))
    return Alert(
        rule=str(raw["rule"]),
        severity=str(raw["severity"]),
        labels=labels,
        state=raw["state"],
        since=parse_plain_utc(raw["since"]),
        seen_at=parse_plain_utc(raw["seen_at"]),
        sentence=str(raw["sentence"]),
        fired_at=_moment(raw["fired_at"]),
        ended_at=_moment(raw["ended_at"]),
    )


def _channel(raw: Mapping[str, Any]) -> ChannelState:
    return ChannelState(
        told={str(mark): parse_plain_utc(at) for mark, at in raw["told"].items()},
        sent=tuple(parse_plain_utc(at) for at in raw["sent"]),
        last_ok=_moment(raw["last_ok"]),
        failures=int(raw["failures"]),
        next_try=_moment(raw["next_try"]),
        last_error=str(raw["last_error"]),
    )


def _moment(text: str | None) -> datetime | None:
    return parse_plain_utc(text) if text else None


@dataclass(frozen=True, slots=True)
class Silence:
    """A rule that a person does not want to hear of until a time."""

    rule: str
    until: datetime
    reason: str
    by: str
    since: datetime
    server: str = ""  # "" = whatever the rule is about

    def covers(self, alert: Alert, now: datetime) -> bool:
        """Return whether it keeps an alert from being sent."""
        is_meant = self.rule == alert.rule and self.server in ("", dict(alert.labels).get("server"))
        return is_meant and now < self.until


def add_silence(path: Path, silence: Silence) -> None:
    """Write a silence down; one of the past ends what stands for the same rule and server."""
    line = json.dumps(_plain(asdict(silence)))
    files.append_line(path, line, max_bytes=_SILENCES_MAX_BYTES)


def read_silences(path: Path, now: datetime) -> list[Silence]:
    """Return the silences that stand; lines that cannot be read are none."""
    found: dict[tuple[str, str], Silence] = {}
    for place in (path.with_name(f"{path.name}.1"), path):
        try:
            for raw in files.read_json_lines(place):
                silence = _silence(raw)
                if silence is not None:
                    found[silence.rule, silence.server] = silence
        except (CorruptFile, OSError) as error:
            logger.warning("silences cannot be read path=%s error=%s", place, error)
    return [silence for silence in found.values() if now < silence.until]


def _silence(raw: Mapping[str, Any]) -> Silence | None:
    try:
        rule, reason, by, server = (str(raw[name]) for name in ("rule", "reason", "by", "server"))
        until, since = parse_plain_utc(raw["until"]), parse_plain_utc(raw["since"])
        return Silence(rule, until, reason, by, since, server)
    except (KeyError, TypeError, ValueError):
        return None


def report(state: AlertState, silences: Sequence[Silence], now: datetime) -> dict[str, Any]:
    """Return what people are shown: what fires, how the channels are, what is silent."""
    firing = [
        {
            "rule": alert.rule,
            "severity": alert.severity,
            "labels": dict(alert.labels),
            "about": alert.subject,
            "since": iso_z(alert.fired_at or alert.since),
            "sentence": alert.sentence,
            "silent": any(silence.covers(alert, now) for silence in silences),
        }
        for alert in state.alerts
        if alert.is_firing
    ]
    channels = {
        name: {
            "last_ok": iso_z(channel.last_ok) if channel.last_ok else None,
            "failures": channel.failures,
            "last_error": channel.last_error,
            "told": len(channel.told),
        }
        for name, channel in state.channels.items()
    }
    standing = [
        {
            "rule": item.rule,
            "server": item.server,
            "until": iso_z(item.until),
            "by": item.by,
            "why": item.reason,
        }
        for item in silences
    ]
    return {"firing": firing, "channels": channels, "silences": standing}
