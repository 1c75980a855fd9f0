"""The short way through JSON must give the long way's answer, or none."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetcast.api.bodies import Refusal, read_records
from fleetcast.ingest.columns import RowsOf
from fleetcast.ingest.json_records import SHAPES_MAX, JsonRecords
from fleetcast.ingest.records import Accepted, RecordRules, accept

RULES = RecordRules(newest_ms=1_800_000_000_000, oldest_ms=0)
GOOD = {"timestamp": "2026-01-15T10:00:05Z", "server_name": "web-01", "cpu_pct": 12.5, "mem_pct": 40}


def body_of(*records: Any) -> bytes:
    return json.dumps({"records": records}).encode()


def taught(*records: Any) -> JsonRecords:
    reader = JsonRecords()
    for _ in range(2):
        body = body_of(*records)
        reader.learn(body, read_records(body))
    return reader


def plain(accepted: Accepted) -> Any:
    batch = accepted.batch
    return (
        [(r.index, r.field) for r in accepted.rejections],
        accepted.ignored_text_fields,
        batch.timestamps_ms.tolist(),
        [batch.server_names[code] for code in batch.server_codes],
        {
            name: [None if np.isnan(value) else value for value in values.tolist()]
            for name, values in batch.metrics.items()
            if not np.isnan(values).all()
        },
    )


def test_a_shape_is_known_from_its_third_body_on() -> None:
    reader, body = JsonRecords(), body_of(GOOD, GOOD)
    for _ in range(2):
        assert reader.read(body) is None
        reader.learn(body, read_records(body))
    rows = reader.read(body)
    assert rows is not None
    assert rows[:] == [{**GOOD, "mem_pct": 40.0}] * 2


@pytest.mark.parametrize(
    "record",
    [
        {**GOOD, "cpu_pct": True},
        {**GOOD, "cpu_pct": "12"},
        {**GOOD, "cpu_pct": [1]},
        {**GOOD, "server_name": 7},
        {**GOOD, "timestamp": 7},
        {**GOOD, "latency_ms": 1.0},
        {"timestamp": GOOD["timestamp"], "server_name": "web-01", "cpu_pct": 1.0},
        {},
        None,
        "text",
    ],
)
def test_one_record_of_another_shape_sends_the_body_the_long_way(record: Any) -> None:
    assert taught(GOOD).read(body_of(GOOD, record)) is None


@pytest.mark.parametrize(
    "record",
    [
        {**GOOD, "cpu_pct": None},
        {**GOOD, "cpu_pct": 5000},
        {**GOOD, "server_name": None},
        {**GOOD, "timestamp": "soon"},
        {**GOOD, "timestamp": None},
        {**GOOD, "cpu_pct": 10**30},
        {**GOOD, "mem_pct": -0.0},
        {name: GOOD[name] for name in reversed(GOOD)},
    ],
)
def test_odd_values_of_the_right_types_get_the_same_answer(record: Any) -> None:
    reader, body = taught(GOOD), body_of(GOOD, record, GOOD)
    rows = reader.read(body)
    assert rows is not None
    assert plain(accept(rows, RULES)) == plain(accept(read_records(body), RULES))


@pytest.mark.parametrize(
    "fields",
    [
        {"class": 1.0, "from": 2.0, "f0": 3.0},
        {"state": "up", "cpu_pct": 1.0},
        {"note": 'colons: and "quotes"', "cpu_pct": 1.0},
        {"note": "braces {}", "cpu_pct": 1.0},
        {"Odd": 1.0},
        {"odd name": 1.0},
        {"nested": {"a": 1}},
        {"flag": True},
    ],
)
def test_any_field_name_and_text_is_read_the_same_way_or_not_at_all(fields: dict[str, Any]) -> None:
    record = {**GOOD, **fields}
    body = body_of(record, record)
    rows = taught(record).read(body)
    if rows is not None:
        assert plain(accept(rows, RULES)) == plain(accept(read_records(body), RULES))


CELLS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**25), 10**25),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["up", "2026-01-15T10:00:05Z", "web-01", ""]),
)
RECORDS = st.dictionaries(
    st.sampled_from(["timestamp", "server_name", "cpu_pct", "mem_used_pct", "class", "Odd", "lag_ms"]), CELLS
).map(lambda odd: {**GOOD, **odd})


@given(RECORDS, st.lists(RECORDS, max_size=4))
def test_whatever_was_learnt_the_answer_is_the_long_ways(first: Any, more: list[Any]) -> None:
    reader, body = taught(first), body_of(first, *more)
    rows = reader.read(body)
    if rows is not None:
        assert plain(accept(rows, RULES)) == plain(accept(read_records(body), RULES))


@given(st.binary(max_size=60))
def test_bytes_that_only_begin_like_a_known_body_are_left_to_the_long_way(tail: bytes) -> None:
    body = body_of(GOOD)
    reader = taught(GOOD)
    for place in (len(body) - 2, len(body) // 2, 15):
        broken = body[:place] + tail
        rows = reader.read(broken)
        try:
            raw = read_records(broken)
        except Refusal:
            assert rows is None
        else:
            assert rows is None or plain(accept(rows, RULES)) == plain(accept(raw, RULES))


def test_a_repeated_field_keeps_its_last_value() -> None:
    body = body_of(GOOD).replace(b'"mem_pct": 40', b'"cpu_pct": 99.5')
    reader = JsonRecords()
    for _ in range(2):
        reader.learn(body, read_records(body))
    rows = reader.read(body)
    assert rows is None or rows[0]["cpu_pct"] == 99.5
    assert read_records(body)[0]["cpu_pct"] == 99.5


def test_a_sender_of_ever_new_shapes_does_not_make_it_grow() -> None:
    reader = JsonRecords()
    for number in range(3 * SHAPES_MAX):
        body = body_of({**GOOD, f"m{number}": 1.0})
        for _ in range(2):
            reader.learn(body, read_records(body))
    assert len(reader._decoders) <= SHAPES_MAX
    assert len(reader._seen_once) <= SHAPES_MAX


def test_columns_are_what_the_intake_takes() -> None:
    rows = taught(GOOD).read(body_of(GOOD))
    assert isinstance(rows, RowsOf)
    assert accept(rows, RULES).batch.metrics["cpu_pct"].tolist() == [12.5]
