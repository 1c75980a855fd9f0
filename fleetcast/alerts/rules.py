"""What fires: the rules, and the alerts that facts make of them; pure functions of values.

Owns: how a rule is written, which facts there are, and when an alert begins, fires and ends. Does not
know: where facts come from (`engine`), who hears of an alert (`messages`).

A rule is one line, `NAME: FACT OP NUMBER [for TIME] [keep TIME] SEVERITY`:

    DriftHigh: drift_score > 0.15 for 15m keep 15m warning

It fires once it has held for the first time, and ends once it has not held for the second: what goes to
and fro across a limit makes one alert. A fact that is not known changes nothing, so a daemon that is
away ends no alert.
"""

import hashlib
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from fleetcast.errors import SettingsError, quote
from fleetcast.schema import ALERT_RULES
from fleetcast.setting import nearest

PENDING, FIRING, ENDED = "pending", "firing", "ended"
SEVERITIES = ("info", "warning", "critical")
FACTS = {  # by name: what the value says, without its subject; those that are 0 or 1 have no {}
    "drift_score": "the combined drift score is {}",
    "error_ratio": "forecasts have {} times the error of repeating the last value",
    "training_failures": "{} trainings in a row failed",
    "trainings_7d": "{} trainings ran within 7 days",
    "held_h": "a person has held new models back, or paused trainings, for {}",
    "taken_back_h": "a new model was proven worse, and the one before has served again for {}",
    "check_failed": "drift cannot be checked",
    "free_disk_gb": "{} GB are free",
    "daemon_away": "the inference daemon cannot be asked",
    "not_ready": "the inference daemon cannot do its work",
    "data_age_s": "the newest record is {} old",
    "silent_h": "it sent nothing for {}",
    "backlog": "{} closed bins wait for their forecast",
    "model_problems": "a model version does not serve",
    "capacity_p": "it passes 90 % within the horizon with a probability of {}",
    "disk_full_days": "it is full in {}, at the earliest",
}
_LENGTHS_S = {  # facts that are lengths of time: the seconds of their unit
    "held_h": 3600.0,
    "taken_back_h": 3600.0,
    "data_age_s": 1.0,
    "silent_h": 3600.0,
    "disk_full_days": 86_400.0,
}
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_TIME = r"(\d+(?:\.\d+)?)([smhd])"
_RULE = re.compile(
    rf"(\w+): *(\w+) *([<>]=?) *(-?\d+(?:\.\d+)?)(?: +for +{_TIME})?(?: +keep +{_TIME})? +(\w+)"
)
_OFF = re.compile(r"(\w+): *off")
_FORM = "NAME: FACT OP NUMBER [for TIME] [keep TIME] SEVERITY, or NAME: off"

Labels = tuple[tuple[str, str], ...]  # sorted by name


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule as it was written."""

    name: str
    fact: str
    op: str
    limit: float
    for_s: float
    keep_s: float
    severity: str

    def holds(self, value: float) -> bool:
        """Return whether the value is beyond the limit."""
        return _OPERATORS[self.op](value, self.limit)

    @property
    def condition(self) -> str:
        """Return the limit in words."""
        return f"{self.op} {_amount(self.fact, self.limit)}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of a fact."""

    value: float | None  # None: it neither begins an alert nor ends one that fires
    labels: Labels = ()
    text: str = ""  # what else is known of it

    @classmethod
    def of(cls, value: float | None, text: str = "", **labels: str) -> "Sample":
        """Return a sample with its labels in order."""
        return cls(value, tuple(sorted(labels.items())), text)


Facts = Mapping[str, Sequence[Sample]]  # a fact that is not in it is not known


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule that holds, held until a moment ago, or may soon fire, for one set of labels."""

    rule: str
    severity: str
    labels: Labels
    state: str
    since: datetime  # when it began to hold
    seen_at: datetime  # when it held last
    sentence: str
    fired_at: datetime | None = None
    ended_at: datetime | None = None

    @property
    def fingerprint(self) -> str:
        """Return what makes it the same alert after a restart.

        >>> at = datetime(2026, 1, 15)
        >>> Alert("DriftHigh", "warning", (), FIRING, at, at, "").fingerprint
        '525d290a6e0578380534100e356431fe'
        """
        return fingerprint(self.rule, self.labels)

    @property
    def subject(self) -> str:
        """Return whom it is about, "" where it is about the fleet."""
        return " ".join(value for _, value in self.labels[::-1])

    @property
    def is_firing(self) -> bool:
        """Whether people are to know of it now."""
        return self.state == FIRING


def fingerprint(rule: str, labels: Labels) -> str:
    """Return 32 hexadecimal digits for a rule and labels."""
    return hashlib.sha256(json.dumps([rule, *labels]).encode()).hexdigest()[:32]


def parse_rules(lines: Sequence[str]) -> tuple[Rule, ...]:
    """Return the rules in force: the shipped ones, each replaced or ended by a line of its name.

    Raises:
        SettingsError: names every line that is no rule, with what would be right.
    """
    found: dict[str, Rule] = {}
    problems: list[str] = []
    for line in (*ALERT_RULES, *lines):
        try:
            name, rule = _parse(line.strip())
        except ValueError as error:
            problems.append(f"alerts.rules: {quote(line)} {error}")
            continue
        found.pop(name, None)
        if rule is not None:
            found[name] = rule
    if problems:
        raise SettingsError(problems)
    return tuple(found.values())


def _parse(line: str) -> tuple[str, Rule | None]:
    if off := _OFF.fullmatch(line):
        return off[1], None
    parts = _RULE.fullmatch(line)
    if parts is None:
        raise ValueError(f"must look like {_FORM}")
    name, fact, op, limit, for_n, for_unit, keep_n, keep_unit, severity = parts.groups()
    if fact not in FACTS:
        raise ValueError(
            f"has an unknown fact {fact}{nearest(fact, list(FACTS))} (known: {', '.join(FACTS)})"
        )
    if severity not in SEVERITIES:
        raise ValueError(f"must end with one of {', '.join(SEVERITIES)}, got {severity}")
    return name, Rule(
        name, fact, op, float(limit), _seconds(for_n, for_unit), _seconds(keep_n, keep_unit), severity
    )


def _seconds(number: str | None, unit: str | None) -> float:
    return float(number) * _UNITS_S[unit] if number and unit else 0.0


def judge(rules: Iterable[Rule], facts: Facts, standing: Iterable[Alert], now: datetime) -> tuple[Alert, ...]:
    """Return the alerts after one look at the facts.

    Args:
        standing: the alerts of the look before.
        now: later than any time in `standing`.
    Returns:
        those that are pending, fire, or have ended and were not forgotten yet (`state` does that).
    """
    before = {(alert.rule, alert.labels): alert for alert in standing}
    after: list[Alert] = []
    for rule in rules:
        own = {labels: alert for (name, labels), alert in before.items() if name == rule.name}
        after += _judge_rule(rule, facts.get(rule.fact), own, now)
    known = {rule.name for rule in rules}
    gone = [alert for alert in before.values() if alert.rule not in known]
    return (*after, *filter(None, (_end(alert, now) for alert in gone)))


def _judge_rule(
    rule: Rule, samples: Sequence[Sample] | None, own: Mapping[Labels, Alert], now: datetime
) -> Iterator[Alert]:
    if samples is None:
        yield from own.values()
        return
    by_labels = {sample.labels: sample for sample in samples}
    for labels in dict.fromkeys((*own, *by_labels)):
        alert = _step(rule, by_labels.get(labels, Sample(math.nan, labels)), own.get(labels), now)
        if alert is not None:
            yield alert


def _step(rule: Rule, sample: Sample, alert: Alert | None, now: datetime) -> Alert | None:
    """Return one alert after one sample, None where there is none any more."""
    if sample.value is None:
        is_firing = alert is not None and alert.is_firing
        return replace(alert, seen_at=now, sentence=_say(rule, sample)) if alert and is_firing else alert
    if rule.holds(sample.value):
        if alert is None or alert.state == ENDED:
            alert = Alert(rule.name, rule.severity, sample.labels, PENDING, now, now, "")
        alert = replace(alert, severity=rule.severity, seen_at=now, sentence=_say(rule, sample))
        is_due = alert.state == PENDING and (now - alert.since).total_seconds() >= rule.for_s
        return replace(alert, state=FIRING, fired_at=now) if is_due else alert
    if alert is None or alert.state == ENDED:
        return alert
    if alert.is_firing and (now - alert.seen_at).total_seconds() < rule.keep_s:
        return alert
    return _end(alert, now)


def _end(alert: Alert, now: datetime) -> Alert | None:
    """Return a firing alert as ended, an ended one as it is, and nothing for one that never fired."""
    if alert.state == PENDING:
        return None
    return alert if alert.state == ENDED else replace(alert, state=ENDED, ended_at=now)


def _say(rule: Rule, sample: Sample) -> str:
    """Return what is the case, as one sentence without its subject."""
    if sample.value is None:
        return sample.text
    words = FACTS[rule.fact]
    limit = f" ({rule.condition})" if "{}" in words else ""
    is_a_date = rule.fact == "disk_full_days" and sample.value < 1.0  # of whole days
    amount = "less than a day" if is_a_date else _amount(rule.fact, sample.value)
    said = f"{words.format(amount)}{limit}"
    return f"{said}; {sample.text}" if sample.text else said


def _amount(fact: str, value: float) -> str:
    """Return a value of a fact as people say it.

    >>> _amount("silent_h", 0.75), _amount("data_age_s", 90.0), _amount("disk_full_days", 6.52)
    ('45 min', '90 s', '6.5 days')
    >>> _amount("free_disk_gb", 4.98765)
    '4.988'
    """
    if fact not in _LENGTHS_S:
        return f"{value:.4g}"
    length_s = value * _LENGTHS_S[fact]
    for unit_s, name in ((86_400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if length_s >= 2 * unit_s:
            return (
                f"{length_s / unit_s:.2g} {name}"
                if length_s < 10 * unit_s
                else f"{length_s / unit_s:.0f} {name}"
            )
    return f"{length_s:.0f} s"
