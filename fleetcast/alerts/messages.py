"""What a channel is sent: which alerts it has not heard of, and in which words.

Owns: one message for a rule and check, what is left out of it, repeats, silences, the limit of an hour,
the texts, templates of them, and the fields of each kind of message. Does not know: how a message travels
(`channels`). Texts hold names that strangers chose: each format escapes them where it is built. A template
takes whole fields, once: nothing in a name or in a template is looked up or run.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from string import Formatter
from typing import Any

from fleetcast.alerts.rules import FIRING, SEVERITIES, Alert
from fleetcast.alerts.state import RESEND, ChannelState, Silence
from fleetcast.clock import iso_z
from fleetcast.setting import nearest

MOST_NAMED = 10  # alerts of a message
MOST_IN_JSON = 1000  # of the message of a webhook
SEVERAL = "several rules"
TEMPLATE_FIELDS = ("fleet", "rule", "severity", "state", "firing", "title", "lines", "page")
_SUMMARY_CHARACTERS = 1024  # PagerDuty takes no more
_CONTROL = dict.fromkeys([*range(32), 127], " ")


@dataclass(frozen=True, slots=True)
class Notice:
    """What one channel should hear of one rule now."""

    rule: str
    severity: str
    fired: tuple[Alert, ...]  # to be named: new ones, or all again
    ended: tuple[Alert, ...]
    firing: tuple[Alert, ...]  # all that fire
    is_repeat: bool = False

    @property
    def is_over(self) -> bool:
        """Whether nothing of the rule fires any more."""
        return not self.firing


@dataclass(frozen=True, slots=True)
class Sender:
    """Who sends: the name of this installation and where its page is, "" where that is not known."""

    fleet: str
    page_url: str = ""
    title_template: str = ""  # "" = the standard words
    text_template: str = ""

    def key(self, rule: str) -> str:
        """Return what stays the same for a rule of this fleet, over restarts."""
        return f"fleetcast:{hashlib.sha256(json.dumps([self.fleet, rule]).encode()).hexdigest()[:32]}"


def trial_notice(now: datetime) -> Notice:
    """Return what `fleetcast alerts test` sends."""
    alert = Alert("Test", SEVERITIES[0], (), FIRING, now, now, "this is a test, nothing is wrong", now)
    return Notice(alert.rule, alert.severity, (alert,), (), (alert,))


def end(notice: Notice) -> Notice:
    """Return the notice that says that all of another one is over."""
    return replace(notice, fired=(), ended=notice.fired, firing=())


def plan(
    alerts: Sequence[Alert],
    channel: ChannelState,
    silences: Sequence[Silence],
    now: datetime,
    repeat: timedelta,
) -> list[Notice]:
    """Return what a channel should hear now; a silence holds back what fires, never the end of it."""
    by_rule: dict[str, list[Alert]] = {}
    for alert in alerts:
        by_rule.setdefault(alert.rule, []).append(alert)
    notices = (_plan_rule(group, channel, silences, now, repeat) for group in by_rule.values())
    return [notice for notice in notices if notice.fired or notice.ended]


def _plan_rule(
    group: Sequence[Alert],
    channel: ChannelState,
    silences: Sequence[Silence],
    now: datetime,
    repeat: timedelta,
) -> Notice:
    firing = tuple(
        alert for alert in group if alert.is_firing and not any(item.covers(alert, now) for item in silences)
    )
    ended = tuple(alert for alert in group if not alert.is_firing and alert.fingerprint in channel.told)
    fresh = tuple(alert for alert in firing if alert.fingerprint not in channel.told)
    told = (channel.told[mark] for alert in firing if (mark := alert.fingerprint) in channel.told)
    is_due = any(now - at >= repeat for at in told)
    fired = fresh or (firing if is_due else ())
    return Notice(group[0].rule, group[0].severity, fired, ended, firing, is_repeat=bool(fired) and not fresh)


def note_told(channel: ChannelState, notice: Notice, now: datetime) -> ChannelState:
    """Return the channel's state after it took a notice."""
    over = {alert.fingerprint for alert in notice.ended}
    told = {mark: at for mark, at in channel.told.items() if mark not in over}
    told |= {alert.fingerprint: now for alert in notice.fired}
    return replace(channel, told=told)


def within_limit(
    notices: Sequence[Notice], n_sent: int, most: int, *, can_sum_up: bool = True
) -> list[Notice]:
    """Return what may be sent now: up to `most` an hour, then one that sums up, then nothing.

    What is left out waits, as nothing was told of it.

    Args:
        can_sum_up: False for a channel that keeps an incident for each rule: all ends go there.
    """
    left = most - n_sent
    if not can_sum_up:
        over = [notice for notice in notices if notice.is_over]
        return over + [notice for notice in notices if not notice.is_over][: max(0, left)]
    if left < 0:
        return []
    if len(notices) <= left:
        return list(notices)
    return [*notices[:left], _sum_up(notices[left:])]


def _sum_up(notices: Sequence[Notice]) -> Notice:
    return Notice(
        SEVERAL,
        max((notice.severity for notice in notices), key=SEVERITIES.index),
        tuple(alert for notice in notices for alert in notice.fired),
        tuple(alert for notice in notices for alert in notice.ended),
        tuple(alert for notice in notices for alert in notice.firing),
        is_repeat=all(notice.is_repeat for notice in notices),
    )


def title(notice: Notice, sender: Sender) -> str:
    """Return a message's first line."""
    return _plain(_fill(sender.title_template, notice, sender)).strip() or _standard_title(notice, sender)


def _standard_title(notice: Notice, sender: Sender) -> str:
    if notice.is_over:
        return _plain(f"{sender.fleet}: {notice.rule} is over")
    count = f", {len(notice.firing)} fire" if len(notice.firing) > 1 else ""
    still = "still " if notice.is_repeat else ""
    return _plain(f"{sender.fleet}: {still}{notice.rule} ({notice.severity}{count})")


def lines(notice: Notice) -> Iterator[str]:
    """Yield the other lines: what fires, what is over; ten are named, the others are counted."""
    yield from _name(notice.fired, "", notice.rule == SEVERAL)
    yield from _name(notice.ended, "over: ", notice.rule == SEVERAL)


def text(notice: Notice, sender: Sender) -> str:
    """Return a message as plain text, with the address of the page where one is set."""
    page = [sender.page_url] if sender.page_url else []
    filled = _fill(sender.text_template, notice, sender).strip()
    others = [_plain(line) for line in filled.split("\n")] if filled else [*lines(notice), *page]
    return "\n".join([title(notice, sender), *others])


def find_template_problems(template: str) -> list[str]:
    """Return what is wrong with a template, each with what would be right."""
    known = ", ".join(f"{{{name}}}" for name in TEMPLATE_FIELDS)
    try:
        fields = [tuple(found[1:]) for found in Formatter().parse(template) if found[1] is not None]
    except ValueError as error:
        return [f"cannot be read: {error} (a brace that is meant as one is written {{{{ or }}}})"]
    return [
        f"must have {{{name}}} alone in its braces, without ! or :"
        if name in TEMPLATE_FIELDS
        else f"has an unknown field {{{name}}}{nearest(str(name), list(TEMPLATE_FIELDS))} (known: {known})"
        for name, form, conversion in fields
        if name not in TEMPLATE_FIELDS or form or conversion
    ]


def _fill(template: str, notice: Notice, sender: Sender) -> str:
    """Return a template with its fields put in; it has no problems, or `make_sender` kept it back."""
    if not template:
        return ""
    values = {
        "fleet": sender.fleet,
        "rule": notice.rule,
        "severity": notice.severity,
        "state": "over" if notice.is_over else "still firing" if notice.is_repeat else "firing",
        "firing": str(len(notice.firing)),
        "title": _standard_title(notice, sender),
        "lines": "\n".join(lines(notice)),
        "page": sender.page_url,
    }
    parts = Formatter().parse(template)
    return "".join(literal + (values[name] if name else "") for literal, name, _form, _conversion in parts)


def _name(alerts: Sequence[Alert], before: str, with_rule: bool) -> Iterator[str]:
    for alert in alerts[:MOST_NAMED]:
        names = [alert.rule if with_rule else "", alert.subject, alert.sentence]
        yield _plain(before + ": ".join(filter(None, names)))
    if len(alerts) > MOST_NAMED:
        yield f"{before}+{len(alerts) - MOST_NAMED} more"


def _plain(line: str) -> str:
    """Return a line that can be written, without control characters: names that senders chose forge none."""
    return line.translate(_CONTROL).encode("utf-8", "replace").decode()


def slack_body(notice: Notice, sender: Sender) -> dict[str, Any]:
    """Return the message of an incoming webhook; no name in it mentions people or hides a link."""
    escaped = text(notice, sender).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return {"text": escaped.replace("@", "@\N{ZERO WIDTH SPACE}")}


def webhook_body(notice: Notice, sender: Sender, now: datetime) -> dict[str, Any]:
    """Return the message of the generic webhook; docs/alerts.md lists the fields."""
    shown = (*notice.fired, *notice.ended)
    return {
        "fleet": sender.fleet,
        "key": sender.key(notice.rule),
        "status": "resolved" if notice.is_over else "firing",
        "rule": notice.rule,
        "severity": notice.severity,
        "repeat": notice.is_repeat,
        "firing": len(notice.firing),
        "title": title(notice, sender),
        "text": text(notice, sender),
        "page": sender.page_url,
        "sent_at": iso_z(now),
        "alerts": [_alert_json(alert) for alert in shown[:MOST_IN_JSON]],
        "alerts_left_out": max(0, len(shown) - MOST_IN_JSON),
    }


def pagerduty_body(notice: Notice, sender: Sender, key: str) -> dict[str, Any] | None:
    """Return an event of PagerDuty's Events API v2; None where an open incident needs none.

    Args:
        key: the integration key.
    """
    event = {"routing_key": key, "dedup_key": sender.key(notice.rule)}
    if notice.is_over:
        return {**event, "event_action": "resolve"}
    if not notice.fired:
        return None
    told = list(lines(notice))
    return {
        **event,
        "event_action": "trigger",
        "client": "fleetcast",
        **({"client_url": sender.page_url} if sender.page_url else {}),
        "payload": {
            "summary": f"{title(notice, sender)}: {told[0]}"[:_SUMMARY_CHARACTERS],
            "source": sender.fleet,
            "severity": notice.severity,
            "component": notice.rule,
            "custom_details": {"alerts": told, "firing": len(notice.firing)},
        },
    }


def _alert_json(alert: Alert) -> dict[str, Any]:
    times = {"since": alert.since, "fired_at": alert.fired_at, "ended_at": alert.ended_at}
    return {
        "rule": alert.rule,
        "fingerprint": alert.fingerprint,
        "state": "firing" if alert.is_firing else "resolved",
        "labels": dict(alert.labels),
        "sentence": alert.sentence,
        **{name: iso_z(at) if at else None for name, at in times.items()},
    }


def alertmanager_body(
    alerts: Iterable[Alert], silences: Sequence[Silence], sender: Sender, now: datetime, lasts: timedelta
) -> list[dict[str, Any]]:
    """Return all that fire, until `lasts` from now, and all that ended in the last quarter of an hour.

    Alertmanager keeps alerts in memory, so it hears of each at every check. One that it does not hear of
    ends by itself, so `lasts` has to be longer than a few checks.
    """
    return [
        _alertmanager_alert(alert, sender, ends_at)
        for alert in alerts
        if (ends_at := _ends_at(alert, now, lasts)) is not None
        and not (alert.is_firing and any(item.covers(alert, now) for item in silences))
    ]


def _ends_at(alert: Alert, now: datetime, lasts: timedelta) -> datetime | None:
    if alert.is_firing:
        return now + lasts
    return alert.ended_at if alert.ended_at and now - alert.ended_at <= RESEND else None


def _alertmanager_alert(alert: Alert, sender: Sender, ends_at: datetime) -> dict[str, Any]:
    subject = f"{alert.subject}: " if alert.subject else ""
    labels = {"alertname": f"Fleetcast{alert.rule}", "severity": alert.severity, "fleet": sender.fleet}
    return {
        "labels": {**dict(alert.labels), **labels},
        "annotations": {"summary": _plain(f"{subject}{alert.sentence}")},
        "startsAt": iso_z(alert.fired_at or alert.since),
        "endsAt": iso_z(ends_at),
        **({"generatorURL": sender.page_url} if sender.page_url else {}),
    }
