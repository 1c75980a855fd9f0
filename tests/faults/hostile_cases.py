"""What a misbehaving client may send, each with the documented answer.

`BODIES` are refused as a whole; in `RECORDS` one bad record stands between two good ones, which
must be kept; `ODD_BUT_FINE` look wrong and are not. Text is spelled in bytes, so that nothing
here is repaired by a JSON library on its way out.
"""

import gzip
import json
import zlib
from dataclasses import dataclass, field

from fleetcast.ingest.records import METRICS_MAX

DEEP = 100_000
GOOD = b'{"timestamp": "%(now)s", "server_name": "good", "cpu_pct": 12.5}'
VALID = b'{"records": [' + GOOD + b"]}"


@dataclass(frozen=True)
class Body:
    """A request that is refused as a whole: `says` is part of the answer."""

    name: str
    data: bytes
    status: int = 422
    says: str = "the body must be"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """A record that is rejected alone: `%(now)s` in it is the time of sending."""

    name: str
    json: bytes
    field: str
    says: str


def _encoded(name: str, data: bytes, encoding: str) -> Body:
    return Body(name, data, 415, "send the body uncompressed", {"Content-Encoding": encoding})


BODIES = (
    Body("nothing", b""),
    Body("blank", b" \r\n\t "),
    Body("null", b"null", says="it is absent"),
    Body("a list", b"[" + GOOD + b"]", says="it is a list"),
    Body("text", b'"records"', says="it is text"),
    Body("a number", b"17", says="it is a number"),
    Body("true", b"true", says="it is true or false"),
    Body("an object without records", b"{}", says='"records" is absent'),
    Body("another case", b'{"Records": []}', says='"records" is absent'),
    Body("records null", b'{"records": null}', says='"records" is absent'),
    Body("records an object", b'{"records": {"0": {}}}', says='"records" is an object'),
    Body("records text", b'{"records": "[]"}', says='"records" is text'),
    Body("records a number", b'{"records": 1}', says='"records" is a number'),
    Body("records false", b'{"records": false}', says='"records" is true or false'),
    Body("cut off", VALID[:-10], says="not JSON"),
    Body("cut off in a string", b'{"records": [{"server_name": "a', says="not JSON"),
    Body("something after it", VALID + b" x", says="not JSON"),
    Body("two documents", VALID + VALID, says="not JSON"),
    Body("lines of JSON", GOOD + b"\n" + GOOD, says="not JSON"),
    Body("a comma too many", b'{"records": [],}', says="not JSON"),
    Body("single quotes", b"{'records': []}", says="not JSON"),
    Body("comments", b'{"records": [] /* none */}', says="not JSON"),
    Body("names without quotes", b"{records: []}", says="not JSON"),
    Body("hexadecimal", b'{"records": [{"cpu_pct": 0x10}]}', says="not JSON"),
    Body("plus sign", b'{"records": [{"cpu_pct": +1}]}', says="not JSON"),
    Body("leading zero", b'{"records": [{"cpu_pct": 01}]}', says="not JSON"),
    Body("nan in lower case", b'{"records": [{"cpu_pct": nan}]}', says="not JSON"),
    Body("half an escape", b'{"records": ["\\u12"]}', says="not JSON"),
    Body("a raw newline in a string", b'{"records": ["a\nb"]}', says="not JSON"),
    Body("NUL bytes", b"\0" * 1000, says="not JSON"),
    Body("random bytes", bytes(range(256)) * 20, says="not JSON"),
    Body("not UTF-8", b'{"records": [{"server_name": "caf\xe9"}]}', says="not JSON"),
    Body("overlong UTF-8", b'{"records": [{"server_name": "\xc0\xaf"}]}', says="not JSON"),
    Body("a surrogate in UTF-8", b'{"records": [{"server_name": "\xed\xa0\x80"}]}', says="not JSON"),
    Body("UTF-16", VALID.decode().encode("utf-16"), says="not JSON"),
    Body("UTF-32", VALID.decode().encode("utf-32"), says="not JSON"),
    Body("two byte order marks", b"\xef\xbb\xbf" * 2 + VALID, says="not JSON"),
    Body("deep lists", b'{"records": ' + b"[" * DEEP + b"]" * DEEP + b"}", says="nested too deeply"),
    Body("deep objects", b'{"a": ' * DEEP + b"1" + b"}" * DEEP, says="nested too deeply"),
    Body("deep and never closed", b"[" * DEEP, says="nested too deeply"),
    Body("a form", b"records=%5B%5D", headers={"Content-Type": "application/x-www-form-urlencoded"}),
    Body("XML", b'<?xml version="1.0"?><records/>', headers={"Content-Type": "text/xml"}),
    Body("gzip without saying so", gzip.compress(VALID), says="not JSON"),
    _encoded("gzip", gzip.compress(VALID), "gzip"),
    _encoded("a gzip bomb", gzip.compress(b" " * 50_000_000), "gzip"),
    _encoded("deflate", zlib.compress(VALID), "deflate"),
    _encoded("brotli", VALID, "br"),
    _encoded("two encodings", gzip.compress(gzip.compress(VALID)), "gzip, gzip"),
    _encoded("an unknown encoding", VALID, "\\x0d<script>"),
    Body("too large", b'{"records": [' + b" " * (33 * 2**20) + b"]}", 413, "send fewer records at once"),
)

_SOME = b'"timestamp": "%(now)s", "server_name": "bad", '
_LONG = b"x" * 129


def _time(name: str, value: bytes, says: str = "must be ISO 8601 text") -> Record:
    record = b'{"timestamp": ' + value + b', "server_name": "bad", "cpu_pct": 1}'
    return Record(f"time {name}", record, "timestamp", says)


def _server(name: str, value: bytes) -> Record:
    record = b'{"timestamp": "%(now)s", "server_name": ' + value + b', "cpu_pct": 1}'
    return Record(f"server {name}", record, "server_name", "must be 1-128 printable characters")


def _value(name: str, metric: str, value: bytes, says: str) -> Record:
    return Record(f"value {name}", b"{" + _SOME + f'"{metric}": '.encode() + value + b"}", metric, says)


RECORDS = (
    *(
        Record(f"a record that is {name}", value, "", "a record must be an object")
        for name, value in (
            ("null", b"null"),
            ("a number", b"3"),
            ("text", b'"cpu_pct"'),
            ("a list", b'["web", 1]'),
            ("true", b"true"),
        )
    ),
    Record(
        "a record of 5,000 fields",
        b'{"timestamp": "%(now)s", "server_name": "bad", '
        + b", ".join(b'"w%d": 1' % n for n in range(5_000))
        + b"}",
        "",
        "must have at most 4096 fields, got 5002",
    ),
    Record("an empty record", b"{}", "timestamp", "must be ISO 8601 text"),
    _time("absent", b"null"),
    _time("empty", b'""'),
    _time("in seconds", b"1768471205"),
    _time("infinite", b"Infinity"),
    _time("a list", b"[2026, 1, 15]"),
    _time("a word", b'"yesterday"'),
    _time("a day that is none", b'"2026-02-30T00:00:00Z"'),
    _time("an hour that is none", b'"2026-01-15T25:00:00Z"'),
    _time("an offset that is none", b'"2026-01-15T10:00:00+99:99"'),
    _time("with a trailing NUL", b'"%(now)s\\u0000"'),
    _time("very long", b'"' + b"2" * 100_000 + b'"'),
    _time("the year 0", b'"0000-01-01T00:00:00Z"'),
    _time("the year 1, east of Greenwich", b'"0001-01-01T00:00:00+14:00"', "older than the retention"),
    _time("the year 9999", b'"9999-12-31T23:59:59Z"', "more than 5 min in the future"),
    _time("tomorrow", b'"%(tomorrow)s"', "more than 5 min in the future"),
    _time("1970", b'"1970-01-01T00:00:00Z"', "older than the retention"),
    _time("61 days ago", b'"%(too_old)s"', "older than the retention"),
    _server("absent", b"null"),
    _server("empty", b'""'),
    _server("a number", b"7"),
    _server("a list", b'["a"]'),
    _server("too long", b'"' + _LONG + b'"'),
    _server("a megabyte", b'"' + b"y" * 1_000_000 + b'"'),
    _server("that forges a log line", b'"a\\n2026-01-15T10:00:00.000Z ERROR forged: line"'),
    _server("with a carriage return", b'"a\\rb"'),
    _server("of blanks", b'" \\t\\u3000 "'),
    _server("with a NUL", b'"a\\u0000b"'),
    _server("with an escape sequence", b'"a\\u001b[31mred"'),
    _server("with a line separator", b'"a\\u2028b"'),
    _server("written from right to left", b'"a\\u202egnp.exe"'),
    _server("with half a surrogate pair", b'"a\\ud800b"'),
    _server("with a zero width space", b'"a\\u200bb"'),
    _value("NaN", "cpu_pct", b"NaN", "must be a finite number"),
    _value("infinity", "cpu_pct", b"Infinity", "must be a finite number"),
    _value("minus infinity", "load", b"-Infinity", "must be a finite number"),
    _value("an integer beyond any double", "load", b"1" + b"0" * 400, "must be a finite number"),
    _value("an integer of 10,000 digits", "load", b"7" * 10_000, "must be a finite number"),
    _value("a float beyond any double", "load", b"-1e999", "must be a finite number"),
    _value("true", "cpu_pct", b"true", "must be a number"),
    _value("a list", "cpu_pct", b"[1]", "must be a number"),
    _value("an object", "cpu_pct", b'{"value": 1}', "must be a number"),
    _value("a percent below -1", "cpu_pct", b"-1.01", "must lie in -1..1000"),
    _value("a percent above 1000", "mem_pct", b"1000.5", "must lie in -1..1000"),
    _value(
        "a counter that wrapped",
        "load",
        b"18446744073709551615",
        "must lie in -1e+18..1e+18 (buffer.value_max)",
    ),
    _value(
        "a rate of a counter that wrapped",
        "net_in_mb_s",
        b"1.8e13",
        "must lie in -1e+07..1e+07 (buffer.rate_max)",
    ),
    _value("the largest double", "load", b"1.7976931348623157e308", "must lie in -1e+18..1e+18"),
    _value("an alias out of range", "mem_used_pct", b"-50", "must lie in -1..1000"),
)


def _odd(rest: bytes = b"", name: bytes = b"odd", time: bytes = b"now") -> bytes:
    return b'{"timestamp": "%%(%s)s", "server_name": "%s"%s}' % (time, name, rest)


ODD_BUT_FINE = {
    "no metric at all": _odd(),
    "a number as text": _odd(b', "cpu_pct": "12"'),
    "too many metrics": _odd(b", " + b", ".join(b'"m%d": 1' % n for n in range(METRICS_MAX + 1))),
    "an absent value": _odd(b', "cpu_pct": null'),
    "minus zero": _odd(b', "cpu_pct": -0.0'),
    "the largest value": _odd(b', "load": 1e18'),
    "the smallest double": _odd(b', "load": 5e-324'),
    "a field twice": _odd(b', "load": 1, "load": 2'),
    "names that are no metrics": _odd(b', "__proto__": 1, "A b": 2, "": 3, "1st": 4'),
    "a very long field name": _odd(b', "' + b"z" * 10_000 + b'": 1'),
    "a name in another script": _odd(b', "load": 1', "сервер-1".encode()),
    "a name that quotes a label": _odd(b', "load": 1', b'a\\"} 1 #{b=\\"\\\\'),
    "a name that climbs folders": _odd(b', "load": 1', b"../../etc/passwd"),
    "a name that is markup": _odd(b', "load": 1', b"<script>alert(1)</script>"),
    "an offset far from Greenwich": _odd(b', "load": 1', time=b"now_east"),
}


def spelled(text: bytes, times: dict[str, str]) -> bytes:
    """Put the times of sending into a case."""
    for key, value in times.items():
        text = text.replace(b"%(" + key.encode() + b")s", value.encode())
    return text


def body_of(records: list[bytes]) -> bytes:
    """Return a request's body of records spelled in JSON."""
    return b'{"records": [' + b", ".join(records) + b"]}"


def as_json(value: object) -> bytes:
    """Return ordinary JSON."""
    return json.dumps(value).encode()
