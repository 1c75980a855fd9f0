"""Which posted records are refused and in which words, and how values are rounded.

Owns: names, types, ranges and times of docs/ingest.md, the words of a rejection, and how many
digits of a value are kept. Values are rounded once, at acceptance: memory, disk, training and
serving agree, and rounded values compress several times better. Does not know: columns or speed
(`records` applies the same rules to many at once).
"""

import math
import numbers
import re
import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from ipaddress import ip_address
from typing import Self

import numpy as np

from fleetcast.clock import from_ms, iso_z, to_ms
from fleetcast.errors import is_visible
from fleetcast.schema import Flags, Floats
from fleetcast.settings import BufferSettings

PERCENT_SUFFIX = "_pct"
RATE_SUFFIX = "_mb_s"
_EXACT_POWER = 22  # 10.0**22 is the largest power of ten a double holds exactly
_POWERS = 10.0 ** np.arange(_EXACT_POWER + 1)
_ALL_DIGITS = 17  # a double has no more
_EXPONENTS = 2048  # of a double, as its bits say them: 0 is for zeros, the last one for infinity and NaN
_EXPONENT_SHIFT = 52
_EXPONENT_BIAS = 1023
_LARGEST_TURN = 308  # 1e309 is infinite


def round_rows(
    names: Sequence[str], values: Floats, percent_decimals: int, significant_digits: int
) -> Floats:
    """Return the values (metric, row) rounded; NaN stays NaN and -0.0 becomes 0.0.

    >>> names, values = ["cpu_pct", "latency_ms"], np.array([[12.3456, 0.0], [123456.0, 0.00123456]])
    >>> round_rows(names, values, 2, 4).tolist()
    [[12.35, 0.0], [123500.0, 0.001235]]
    """
    are_percents = np.array([name.endswith(PERCENT_SUFFIX) for name in names], dtype=np.bool_)
    result = np.empty_like(values)
    result[are_percents] = np.round(values[are_percents], percent_decimals)
    others = values[~are_percents]
    is_whole = significant_digits >= _ALL_DIGITS
    result[~are_percents] = others if is_whole else to_significant(others, significant_digits)
    result += 0.0
    return result


def to_significant(values: Floats, digits: int) -> Floats:
    """Return `values` with `digits` significant digits, each the double nearest to the decimal."""
    powers, turns = _scales(digits)
    sizes = np.abs(values, order="C")
    exponents = sizes.view(np.int64) >> _EXPONENT_SHIFT
    power = powers[2 * exponents + (sizes >= turns[exponents])]
    # dividing by an exact power of ten gives the nearest double; multiplying by 0.001 would not
    result = np.asarray(np.rint(values * power) / power)
    is_other = np.isnan(result) != np.isnan(values)
    if np.count_nonzero(result) != np.count_nonzero(values):
        is_other |= (result == 0.0) & (values != 0.0)  # a subnormal
    if is_other.any():
        result[is_other] = _far_from_one(values[is_other], digits)
    return result


@lru_cache(maxsize=32)
def _scales(digits: int) -> tuple[Floats, Floats]:
    """Return how to scale a double by its binary exponent.

    Returns:
        powers: (2 * exponent + is_turned) the power of ten that makes `digits` digits of it whole;
            NaN where that is none, or none a double holds exactly.
        turns: (exponent) the power of ten among the doubles of this exponent, from which on they have
            one digit more; infinity where there is none.
    """
    powers = np.full(2 * _EXPONENTS, np.nan)
    powers[:2] = 1.0  # zeros
    turns = np.full(_EXPONENTS, np.inf)
    for exponent in range(1, _EXPONENTS - 1):
        lowest = 2.0 ** (exponent - _EXPONENT_BIAS)
        turn = math.floor(math.log10(lowest)) + 1
        turns[exponent] = float(f"1e{turn}") if turn <= _LARGEST_TURN else np.inf
        for is_turned in (0, 1):
            decimals = digits - turn - is_turned
            if 0 <= decimals <= _EXACT_POWER:
                powers[2 * exponent + is_turned] = _POWERS[decimals]
    return powers, turns


def _far_from_one(values: Floats, digits: int) -> Floats:
    """Round what is infinite, subnormal, or has no digit to round after the point."""
    result = values.copy()
    usable = np.isfinite(values) & (values != 0.0)
    some = values[usable]
    decimals = digits - 1 - np.floor(np.log10(np.abs(some))).astype(np.int64)
    is_exact = (decimals < 0) & (decimals >= -_EXACT_POWER)
    power = _POWERS[np.where(is_exact, -decimals, 0)]
    out = np.rint(some / power) * power
    for place in np.flatnonzero(~is_exact):
        printed = float(f"{some[place]:.{digits - 1}e}")
        out[place] = printed if np.isfinite(printed) else some[place]  # the largest doubles stay as they are
    result[usable] = out
    return result


REQUIRED = ("timestamp", "server_name")
ALIASES = {"mem_used_pct": "mem_pct"}
PERCENT_LOW, PERCENT_HIGH = -1.0, 1000.0  # multi-core tools report over 100
FUTURE_LIMIT = timedelta(minutes=5)
_FUTURE_LIMIT_MS = FUTURE_LIMIT // timedelta(milliseconds=1)
_EXAMPLE_MS = 1_768_471_505_000  # 2026-01-15T10:05:05Z: where no moment is known
FIELDS_MAX = 4096  # of a record: each costs a look, also those that are no metric
NAME_MAX_CHARS = 128
_SENT_NAME_MAX_CHARS = 4 * NAME_MAX_CHARS  # as sent: with blanks, with its domain, in parts to be composed
METRIC_NAME_MAX_CHARS = 64

_METRIC_NAME = re.compile(rf"[a-z][a-z0-9_]{{0,{METRIC_NAME_MAX_CHARS - 1}}}", re.ASCII)
_RFC_3339 = re.compile(r"(\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d):(\d\d)((?:\.\d+)?(?:[zZ]|[+-]\d\d:\d\d))", re.ASCII)
_TIME_MAX_CHARS = 64


class _Shown(reprlib.Repr):
    """What was sent, as a message repeats it: short, and in the sender's words rather than in Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 60
        self.maxlevel = 2

    def repr1(self, x: object, level: int) -> str:
        """Return one value; texts that show nothing with their characters written out."""
        if isinstance(x, datetime):
            return _moment(x)
        if isinstance(x, bytes):
            return f"<{len(x)} bytes>"
        if isinstance(x, (Decimal, date, timedelta, np.generic)) and not isinstance(x, str):
            return str(x)[: self.maxother]
        text = super().repr1(x, level)
        is_plain = not isinstance(x, str) or is_visible(x)
        return text if is_plain else text.encode("ascii", "backslashreplace").decode()


_SHOWN = _Shown()


def quote_value(value: object) -> str:
    """Return a value that was sent as a message repeats it.

    >>> quote_value(datetime(2026, 1, 15, 10, tzinfo=UTC)), quote_value(np.float64(1.5)), quote_value(b"web")
    ('2026-01-15T10:00:00Z', '1.5', '<3 bytes>')
    """
    return _SHOWN.repr(value)


def _moment(value: datetime) -> str:
    try:
        return iso_z(value.replace(tzinfo=UTC) if value.tzinfo is None else value)
    except (OverflowError, ValueError, TypeError):  # year 1 or 9999 with an offset; pandas' NaT
        return str(value)


# A reason quotes what the sender sent; its first words say which rule it was (and `intake`).
TOO_MANY_SERVERS = "too_many_servers"
RULES = {
    "a record must be an object": "not_an_object",
    "must have at most": "too_many_fields",
    "must be ISO 8601": "time_format",
    "lies more than": "time_in_future",
    "is older than": "time_too_old",
    "must be 1-": "server_name",
    "must be a number": "not_a_number",
    "must be a finite number": "not_finite",
    "must lie in": "out_of_range",
    "is one of over": "too_many_metrics",
    "is a new metric": "too_many_metrics",
    "is a new name": TOO_MANY_SERVERS,
}
OTHER_RULE = "other"


def rule_of(reason: str) -> str:
    """Return the short name of the rule a rejection's reason comes from.

    >>> rule_of("must lie in -1..1000, got 1e+06")
    'out_of_range'
    """
    return next((rule for start, rule in RULES.items() if reason.startswith(start)), OTHER_RULE)


@dataclass(frozen=True, slots=True)
class RecordRules:
    """What depends on the moment and on settings; bounds are inclusive, None = no bound."""

    newest_ms: int | None
    oldest_ms: int | None = None
    oldest_is: str = "the retention"  # what `oldest_ms` is, as messages name it
    percent_decimals: int = BufferSettings.percent_decimals
    significant_digits: int = BufferSettings.significant_digits
    rate_max: float = BufferSettings.rate_max
    value_max: float = BufferSettings.value_max
    is_lower_case: bool = False
    is_domain_cut: bool = False

    @classmethod
    def at(cls, now: datetime, settings: BufferSettings, *, expires: bool = True) -> Self:
        """Return the rules at `now`; where nothing expires, no record is too old."""
        retention = timedelta(days=settings.retention_days)
        return cls(
            newest_ms=to_ms(now + FUTURE_LIMIT),
            oldest_ms=to_ms(now - retention) if expires else None,
            oldest_is=f"the retention of {settings.retention_days} days (buffer.retention_days)",
            percent_decimals=settings.percent_decimals,
            significant_digits=settings.significant_digits,
            rate_max=settings.rate_max,
            value_max=settings.value_max,
            is_lower_case=settings.name_case == "lower",
            is_domain_cut=settings.name_domain == "cut",
        )

    def bounds(self, name: str) -> tuple[float, float]:
        """Return the least and the largest value of a metric.

        >>> RecordRules(None).bounds("cpu_pct"), RecordRules(None).bounds("net_in_mb_s")
        ((-1.0, 1000.0), (-10000000.0, 10000000.0))
        """
        if name.endswith(PERCENT_SUFFIX):
            return PERCENT_LOW, PERCENT_HIGH
        most = self.rate_max if name.endswith(RATE_SUFFIX) else self.value_max
        return -most, most

    def in_range(self, name: str, values: Floats) -> Flags:
        """Return which values a metric of this name may have; absent ones do."""
        low, high = self.bounds(name)
        return np.isnan(values) | ((values >= low) & (values <= high))

    def server_name(self, text: object) -> str | None:
        """Return the name of the server that a sender means, None where it is no usable name.

        Blanks around it and Unicode's forms of one text make no other server.

        >>> RecordRules(None).server_name(" web-01 "), RecordRules(None).server_name("\\t ")
        ('web-01', None)
        """
        if not isinstance(text, str) or len(text) > _SENT_NAME_MAX_CHARS:
            return None
        return _server_name(text, self.is_domain_cut, self.is_lower_case)


@dataclass(frozen=True, slots=True)
class CheckedRecord:
    """One acceptable record, not yet rounded."""

    timestamp_ms: int
    server_name: str
    values: Mapping[str, float]
    ignored_fields: Sequence[str]


class RecordFault(Exception):
    """Raised when one record is not acceptable; carries the field and the reason."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason


def check_record(record: object, rules: RecordRules) -> CheckedRecord:
    """Return one record checked.

    Raises:
        RecordFault: names the first field that is wrong: time, server, then the others in order.
    """
    if not isinstance(record, Mapping):
        raise RecordFault("", f"a record must be an object, got {quote_value(record)}")
    if len(record) > FIELDS_MAX:
        raise RecordFault("", f"must have at most {FIELDS_MAX} fields, got {len(record)}")
    timestamp_ms = _check_time(record.get("timestamp"), rules)
    server_name = rules.server_name(record.get("server_name"))
    if server_name is None:
        limits = f"must be 1-{NAME_MAX_CHARS} printable characters, at least one of them visible"
        raise RecordFault("server_name", f"{limits}, got {quote_value(record.get('server_name'))}")
    values: dict[str, float] = {}
    ignored: list[str] = []
    for name, value in record.items():
        if name in REQUIRED:
            continue
        if not is_metric_name(name) or isinstance(value, str):
            ignored.append(str(name))
        elif value is not None:
            values[name] = _check_number(name, value, rules)
    for alias, name in ALIASES.items():
        if alias in values:
            values.setdefault(name, values[alias])
            del values[alias]
    return CheckedRecord(timestamp_ms, server_name, values, ignored)


@lru_cache(maxsize=2**14)  # a fleet sends the same names for ever
def _server_name(text: str, is_domain_cut: bool, is_lower_case: bool) -> str | None:
    name = text.strip()
    if not name.isascii():
        name = unicodedata.normalize("NFC", name)
    if is_domain_cut:
        name = _without_domain(name)
    if is_lower_case:
        name = name.lower()
    return name if is_server_name(name) else None


def is_metric_name(name: object) -> bool:
    """Whether a field of this name is a metric if it holds a number."""
    return isinstance(name, str) and len(name) <= METRIC_NAME_MAX_CHARS and _is_metric_text(name)


@lru_cache(maxsize=4096)
def _is_metric_text(name: str) -> bool:
    return _METRIC_NAME.fullmatch(name) is not None


def is_server_name(name: object) -> bool:
    """Whether this is a usable server name."""
    if not isinstance(name, str) or not 1 <= len(name) <= NAME_MAX_CHARS:
        return False
    return name.isprintable() and (name.isascii() or is_visible(name))


def _without_domain(name: str) -> str:
    """Return the part before the first dot; an address has no domain.

    >>> _without_domain("web-01.example.org"), _without_domain("10.0.0.5")
    ('web-01', '10.0.0.5')
    """
    try:
        ip_address(name)
    except ValueError:
        return name.partition(".")[0] or name
    return name


def parse_timestamp_ms(value: object) -> int:
    """Return milliseconds since 1970 of ISO 8601 text or of a datetime; naive means UTC.

    >>> parse_timestamp_ms("1970-01-01T01:00:01.5+01:00"), parse_timestamp_ms("1970-01-01T00:00:60z")
    (1500, 60000)

    Raises:
        ValueError: it is neither.
    """
    moment = _read_time(value) if isinstance(value, str) else value
    is_forged = isinstance(value, str) and "\0" in value  # CPython lets a trailing NUL pass
    if is_forged or not isinstance(moment, datetime):
        raise ValueError(f"not a time: {quote_value(value)}")
    try:
        return to_ms(moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment)
    except (OverflowError, TypeError) as error:  # year 1 or 9999 with an offset; pandas' NaT
        raise ValueError(str(error)) from error


def _read_time(text: str) -> datetime:
    """Read ISO 8601, and what RFC 3339 has beyond Python's: a small `z`, and the leap second `:60`."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        found = _RFC_3339.fullmatch(text) if len(text) <= _TIME_MAX_CHARS else None
        if found is None:
            raise
    start, seconds, rest = found.groups()
    is_leap = seconds == "60"
    zone = "Z" if rest[-1] in "zZ" else ""
    moment = datetime.fromisoformat(f"{start}:{'59' if is_leap else seconds}{rest.rstrip('zZ')}{zone}")
    try:  # as POSIX clocks count it: the second after :59
        return moment + timedelta(seconds=1) if is_leap else moment
    except OverflowError as error:
        raise ValueError(str(error)) from error


def _check_time(value: object, rules: RecordRules) -> int:
    try:
        moment_ms = parse_timestamp_ms(value)
    except ValueError:
        reason = f"must be ISO 8601 text such as {_example(rules)}, got {quote_value(value)}"
        raise RecordFault("timestamp", reason) from None
    if rules.newest_ms is not None and moment_ms > rules.newest_ms:
        limit = f"; by this host's clock the newest accepted is {_z(rules.newest_ms)}"
        raise RecordFault("timestamp", f"lies more than 5 min in the future: {quote_value(value)}{limit}")
    if rules.oldest_ms is not None and moment_ms < rules.oldest_ms:
        limit = f"; the oldest accepted is {_z(rules.oldest_ms)}"
        raise RecordFault("timestamp", f"is older than {rules.oldest_is}: {quote_value(value)}{limit}")
    return moment_ms


def _example(rules: RecordRules) -> str:
    """Return the present moment, which nothing refuses as too old."""
    newest_ms = rules.newest_ms or _EXAMPLE_MS
    return _z((newest_ms - _FUTURE_LIMIT_MS) // 1000 * 1000)


def _z(milliseconds: int) -> str:
    return iso_z(from_ms(milliseconds))


def _check_number(name: str, value: object, rules: RecordRules) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RecordFault(name, f"must be a number, got {quote_value(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RecordFault(name, f"must be a finite number, got {quote_value(value)}")
    low, high = rules.bounds(name)
    if not low <= number <= high:
        setting = "" if name.endswith(PERCENT_SUFFIX) else f" ({_bound_setting(name)})"
        raise RecordFault(name, f"must lie in {low:g}..{high:g}{setting}, got {number:g}")
    return number


def _bound_setting(name: str) -> str:
    return "buffer.rate_max" if name.endswith(RATE_SUFFIX) else "buffer.value_max"
