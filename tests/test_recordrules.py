"""One record at a time: what contract §2 accepts, and what a rejection says."""

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fleetcast.ingest.rules import (
    RecordFault,
    RecordRules,
    check_record,
    is_server_name,
    parse_timestamp_ms,
    quote_value,
)
from fleetcast.settings import BufferSettings

NOW = datetime(2026, 1, 15, 10, 0, tzinfo=UTC)
RULES = RecordRules.at(NOW, BufferSettings())
AT = "2026-01-15T10:00:00Z"
AT_MS = 1_768_471_200_000
INVISIBLE = [
    "\u200b",
    "\u2060",
    "\ufeff",
    "\u00ad",
    "\u0301",
    "\u034f\ufe0f",
    "\u3164",
    "\u2800",
    "\u115f \uffa0",
]


def fault(record: object, rules: RecordRules = RULES) -> tuple[str, str]:
    with pytest.raises(RecordFault) as caught:
        check_record(record, rules)
    return caught.value.field, caught.value.reason


def values(**fields: Any) -> dict[str, float]:
    return dict(check_record({"timestamp": AT, "server_name": "a", **fields}, RULES).values)


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-15T10:00:00Z",
        "2026-01-15T10:00:00",
        "2026-01-15 10:00:00",
        "2026-01-15T10:00:00.000Z",
        "2026-01-15T12:00:00+02:00",
        "2026-01-15T04:30:00-05:30",
        "20260115T100000Z",
    ],
)
def test_iso_8601_is_read_and_naive_means_utc(text: str) -> None:
    assert parse_timestamp_ms(text) == AT_MS


def test_a_datetime_is_a_time_too() -> None:
    assert parse_timestamp_ms(NOW) == AT_MS
    assert parse_timestamp_ms(NOW.replace(tzinfo=None)) == AT_MS
    assert parse_timestamp_ms(NOW.astimezone(timezone(timedelta(hours=9)))) == AT_MS


def test_a_time_is_cut_to_milliseconds() -> None:
    assert parse_timestamp_ms("2026-01-15T10:00:00.123999Z") == AT_MS + 123


@pytest.mark.parametrize(
    "value",
    ["", "now", "15.01.2026", "2026-13-01T00:00:00Z", "2026-01-15T25:00:00", 1768471200, None, True, [1]],
)
def test_anything_else_is_no_time(value: Any) -> None:
    field, reason = fault({"timestamp": value, "server_name": "a"})
    assert field == "timestamp"
    assert "ISO 8601" in reason
    assert "such as 2026-01-15T10:00:00Z" in reason, "now, which is not too old"


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_the_edges_of_the_calendar_raise_nothing_unknown(text: str) -> None:
    field, _ = fault({"timestamp": text, "server_name": "a"})
    assert field == "timestamp"


def test_five_minutes_ahead_is_the_limit() -> None:
    at_limit = (NOW + timedelta(minutes=5)).isoformat()
    past_it = (NOW + timedelta(minutes=5, milliseconds=1)).isoformat()
    assert check_record({"timestamp": at_limit, "server_name": "a"}, RULES).server_name == "a"
    assert fault({"timestamp": past_it, "server_name": "a"})[1].startswith(
        "lies more than 5 min in the future"
    )


def test_the_retention_is_the_other_limit_where_records_expire() -> None:
    old = {"timestamp": (NOW - timedelta(days=60, milliseconds=1)).isoformat(), "server_name": "a"}
    assert fault(old) == (
        "timestamp",
        "is older than the retention of 60 days (buffer.retention_days): "
        "'2025-11-16T09:59:59.999000+00:00'; the oldest accepted is 2025-11-16T10:00:00Z",
    )
    kept_forever = RecordRules.at(NOW, BufferSettings(), expires=False)
    assert check_record(old, kept_forever).server_name == "a"


@pytest.mark.parametrize("name", ["a", "x" * 128, "web-01.example.com", "日本", "a b"])
def test_printable_names_up_to_128_characters_are_servers(name: str) -> None:
    assert is_server_name(name)


@pytest.mark.parametrize("name", INVISIBLE)
def test_a_name_that_shows_nothing_is_refused_with_its_characters_written_out(name: str) -> None:
    reason = fault({"timestamp": AT, "server_name": name})[1]
    assert reason == f"must be 1-128 printable characters, at least one of them visible, got {name!a}"
    assert RULES.server_name(f"web{name}") in (f"web{name}", None), "beside others, marks are part of a name"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (NOW, "2026-01-15T10:00:00Z"),
        (NOW.replace(tzinfo=None, microsecond=5000), "2026-01-15T10:00:00.005Z"),
        (pd.Timestamp(NOW), "2026-01-15T10:00:00Z"),
        (pd.NaT, "NaT"),
        (Decimal("12.50"), "12.50"),
        (np.float32(1.5), "1.5"),
        (np.bool_(True), "True"),
        (b"web-01", "<6 bytes>"),
        (NOW.date(), "2026-01-15"),
        ([Decimal(1), NOW], "[1, 2026-01-15T10:00:00Z]"),
    ],
)
def test_a_message_repeats_a_value_without_what_python_calls_it(value: object, text: str) -> None:
    assert quote_value(value) == text


def test_a_time_that_is_a_datetime_is_refused_in_iso_8601() -> None:
    late = fault({"timestamp": NOW + timedelta(hours=1), "server_name": "a"})[1]
    assert late.startswith("lies more than 5 min in the future: 2026-01-15T11:00:00Z; ")
    early = fault({"timestamp": NOW - timedelta(days=400), "server_name": "a"})[1]
    assert ": 2024-12-11T10:00:00Z; " in early


@pytest.mark.parametrize("sent", [" web-é", "web-é\u00a0", "\t\nweb-é ", "web-e\u0301"])
def test_blanks_around_a_name_and_forms_of_one_text_make_no_other_server(sent: str) -> None:
    assert RULES.server_name(sent) == "web-é"
    assert check_record({"timestamp": AT, "server_name": sent}, RULES).server_name == "web-é"


@pytest.mark.parametrize("sent", [" ", "\u3000", "a\u0301" * 200, "x" * 600, None])
def test_a_name_of_nothing_but_blanks_or_of_too_much_is_none(sent: object) -> None:
    assert RULES.server_name(sent) is None


def test_case_and_domain_of_names_are_the_operators_choice() -> None:
    rules = RecordRules.at(NOW, BufferSettings(name_case="lower", name_domain="cut"))
    names = ("Web-01.Example.org", "web-01", "10.0.0.5", "2001:DB8::1", ".hidden")
    assert [rules.server_name(name) for name in names] == [
        "web-01",
        "web-01",
        "10.0.0.5",
        "2001:db8::1",
        ".hidden",
    ]
    assert RULES.server_name("Web-01.Example.org") == "Web-01.Example.org"


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("2026-01-15T10:00:00z", "2026-01-15T10:00:00Z"),
        ("2026-01-15t10:00:00.25z", "2026-01-15T10:00:00.250Z"),
        ("2016-12-31T23:59:60Z", "2017-01-01T00:00:00Z"),
        ("2016-12-31T23:59:60.5+00:00", "2017-01-01T00:00:00.500Z"),
    ],
)
def test_what_rfc_3339_has_beyond_iso_8601_is_a_time(text: str, same: str) -> None:
    assert parse_timestamp_ms(text) == parse_timestamp_ms(same)


@pytest.mark.parametrize(
    "text", ["2026-01-15T10:00:61Z", "9999-12-31T23:59:60Z", "2026-13-15T10:00:00z", "2026-01-15T10:00:60Zz"]
)
def test_and_no_more_than_that(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_timestamp_ms(text)


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("net_in_mb_s", 1.8e13, r"-1e\+07..1e\+07 \(buffer.rate_max\)"),
        ("latency_ms", 2.0**64, r"-1e\+18..1e\+18 \(buffer.value_max\)"),
        ("latency_ms", -(2.0**64), r"-1e\+18..1e\+18 \(buffer.value_max\)"),
    ],
)
def test_what_a_wrapped_counter_makes_is_refused_with_the_limit_named(
    name: str, value: float, limit: str
) -> None:
    with pytest.raises(RecordFault, match=limit):
        check_record({"timestamp": AT, "server_name": "a", name: value}, RULES)
    wide = RecordRules.at(NOW, BufferSettings(rate_max=1e20, value_max=1e20))
    assert check_record({"timestamp": AT, "server_name": "a", name: value}, wide).values == {name: value}


@pytest.mark.parametrize(
    "name", ["", "x" * 129, "a\nb", "a\x00", "\ud800", "\u202e", None, 7, ["a"], {"a": 1}, *INVISIBLE]
)
def test_other_names_are_refused(name: Any) -> None:
    field, reason = fault({"timestamp": AT, "server_name": name})
    assert (field, reason[:30]) == ("server_name", "must be 1-128 printable charac")


@pytest.mark.parametrize("record", [None, 7, "text", [], [1, 2], True])
def test_a_record_is_an_object(record: object) -> None:
    assert fault(record) == ("", f"a record must be an object, got {record!r}")


def test_missing_fields_are_named() -> None:
    assert fault({})[0] == "timestamp"
    assert fault({"timestamp": AT})[0] == "server_name"


def test_numbers_are_metrics_null_is_absent_text_is_ignored() -> None:
    record = {
        "timestamp": AT,
        "server_name": "a",
        "load": 3,
        "x_ms": 1.5,
        "y": None,
        "state": "ok",
        "Zone": 1,
    }
    checked = check_record(record, RULES)
    assert checked.values == {"load": 3.0, "x_ms": 1.5}
    assert checked.ignored_fields == ["state", "Zone"], "`state` is text, `Zone` is no metric's name"


def test_numpy_numbers_are_numbers() -> None:
    assert values(a=np.float32(1.5), b=np.int64(7)) == {"a": 1.5, "b": 7.0}


@pytest.mark.parametrize("value", [True, False, [1], {"v": 1}, (1,), b"1", 1j, np.bool_(True)])
def test_other_types_are_rejected(value: Any) -> None:
    assert fault({"timestamp": AT, "server_name": "a", "load": value})[0] == "load"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 10**400])
def test_a_number_is_finite(value: Any) -> None:
    assert "finite" in fault({"timestamp": AT, "server_name": "a", "load": value})[1]


@pytest.mark.parametrize(("value", "is_good"), [(-1, True), (-1.01, False), (1000, True), (1000.1, False)])
def test_a_percent_lies_between_minus_one_and_a_thousand(value: float, is_good: bool) -> None:
    record = {"timestamp": AT, "server_name": "a", "cpu_pct": value, "latency_ms": -5e9}
    if is_good:
        assert check_record(record, RULES).values["cpu_pct"] == value
    else:
        assert fault(record) == ("cpu_pct", f"must lie in -1..1000, got {value:g}")


def test_mem_used_pct_is_mem_pct() -> None:
    assert values(mem_used_pct=40.0) == {"mem_pct": 40.0}
    assert values(mem_used_pct=40.0, mem_pct=41.0) == {"mem_pct": 41.0}
    assert values(mem_used_pct=40.0, mem_pct=None) == {"mem_pct": 40.0}


def test_a_reason_never_echoes_much_of_what_was_sent() -> None:
    deep: Any = "x" * 10_000
    for _ in range(500):
        deep = [deep] * 3
    _, reason = fault({"timestamp": AT, "server_name": "a", "load": deep})
    assert len(reason) < 300
