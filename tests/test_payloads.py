"""Rows come back from a payload of either format; a payload that does not fit costs only itself."""

import random
from collections.abc import Sequence
from itertools import pairwise

import pyarrow as pa
import pytest
from buffer_rows import NOON_MS, Key, Values, batch, rows_of

from fleetcast.schema import RecordBatch
from fleetcast.storage.log import TAG, decode_payloads, encode_batch, encode_table
from fleetcast.storage.tables import (
    METRICS,
    PREDICTIONS,
    TableKind,
    batch_of_table,
    is_canonical,
    table_of_batch,
)

ONE = batch([("web-01", NOON_MS, {"cpu_pct": 1.25, "mem_pct": 2.5}), ("db-é", NOON_MS, {"cpu_pct": 3.0})])
TWO = batch([("db-é", NOON_MS + 1, {"load": 4.0})])


def decoded(payloads: Sequence[bytes], kind: TableKind = METRICS) -> tuple[pa.Table, list[bytes]]:
    bad: list[bytes] = []
    return decode_payloads(payloads, kind, lambda payload, _: bad.append(payload)), bad


def rows_in(table: pa.Table) -> dict[Key, Values]:
    return rows_of([batch_of_table(table)])


def test_both_formats_say_the_same() -> None:
    columns, bad = decoded([encode_batch(ONE), encode_batch(TWO)])
    streams, worse = decoded([encode_table(table_of_batch(ONE)), encode_table(table_of_batch(TWO))])
    assert rows_in(columns) == rows_in(streams)
    assert (bad, worse) == ([], [])
    assert is_canonical(columns.schema, METRICS)
    assert rows_in(columns)["web-01", NOON_MS] == {"cpu_pct": 1.25, "mem_pct": 2.5}


def test_rows_keep_their_order_whatever_formats_and_names_alternate() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    sent = [batch([("a", NOON_MS, {"x": value})]) for value in values]
    encoded = [
        encode_batch(one) if place % 2 else encode_table(table_of_batch(one))
        for place, one in enumerate(sent)
    ]
    table, _ = decoded([*encoded, encode_batch(sent[0]), encode_batch(sent[1])])
    assert table.column("x").to_pylist() == [*values, 1.0, 2.0]


def test_a_tick_of_a_small_fleet_is_little_more_than_its_values() -> None:
    values: Values = {f"m{place:02d}_pct": float(place) for place in range(14)}
    tick = batch([(f"server-{place:04d}", NOON_MS, values) for place in range(20)])
    assert len(encode_batch(tick)) == 20 * (8 + 4 + 14 * 8) + 20 + 20 * 12 + 14 * 8 - 1
    assert len(encode_table(table_of_batch(tick))) > 1.5 * len(encode_batch(tick))


def test_a_name_that_would_look_like_two_is_kept_as_it_is() -> None:
    odd = RecordBatch(
        ("a\nb",), ONE.server_codes[:1], ONE.timestamps_ms[:1], {"x": ONE.metrics["cpu_pct"][:1]}
    )
    assert not encode_batch(odd).startswith(TAG)
    assert rows_in(decoded([encode_batch(odd)])[0]) == {("a\nb", NOON_MS): {"x": 1.25}}


@pytest.mark.parametrize("place", [4, 8, 12, 16])
def test_a_count_that_does_not_fit_costs_only_its_payload(place: int) -> None:
    payload = encode_batch(ONE)
    wrong = bytearray(payload)
    wrong[place] += 1
    table, bad = decoded([payload, bytes(wrong), encode_batch(TWO)])
    assert bad == [bytes(wrong)]
    assert len(table) == 3


def test_no_row_is_given_to_a_server_that_is_not_named() -> None:
    for code in (2, -1):
        wrong = encode_batch(ONE)[:-4] + code.to_bytes(4, "little", signed=True)
        assert decoded([wrong])[1] == [wrong]


def test_records_in_the_log_of_forecasts_are_refused() -> None:
    assert decoded([encode_batch(ONE)], PREDICTIONS)[1] == [encode_batch(ONE)]


def test_cut_or_changed_payloads_never_end_the_reader() -> None:
    rng = random.Random(7)
    payload = encode_batch(ONE)
    for _ in range(500):
        mutated = bytearray(payload)
        mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        first, last = sorted((rng.randrange(len(mutated) + 1), len(mutated)))
        for some in (bytes(mutated), bytes(mutated[:first]), bytes(mutated[first:last])):
            table, bad = decoded([some, encode_batch(TWO)])
            assert len(table) >= 1
            assert len(bad) <= 1


def test_every_mix_of_names_makes_one_table() -> None:
    sent = [batch([(server, NOON_MS + place, {"x": 1.0})]) for place, server in enumerate("aabbab")]
    table, _ = decoded([encode_batch(one) for one in sent])
    assert [row["server_name"] for row in table.to_pylist()] == list("aabbab")
    assert all(first < last for first, last in pairwise(row["timestamp"] for row in table.to_pylist()))


def test_of_ticks_that_are_read_together_a_wrong_one_costs_only_itself() -> None:
    ticks = [
        batch([("a", NOON_MS + tick, {"x": float(tick), "y": -1.0}), ("b", NOON_MS + tick, {"x": 9.0})])
        for tick in range(5)
    ]
    payloads = [encode_batch(tick) for tick in ticks]
    wrong = payloads[2][:-4] + b"\xff\xff\xff\xff"  # the last row's server
    table, bad = decoded([*payloads[:2], wrong, *payloads[3:]])
    assert bad == [wrong]
    expected = {place: value for kept in (0, 1, 3, 4) for place, value in rows_of([ticks[kept]]).items()}
    assert rows_in(table) == expected
    assert table.column("timestamp").cast(pa.int64()).to_pylist() == [
        NOON_MS + tick for tick in (0, 0, 1, 1, 3, 3, 4, 4)
    ]


def test_rows_without_metrics_are_read_too() -> None:
    bare = RecordBatch(ONE.server_names, ONE.server_codes, ONE.timestamps_ms, {})
    assert len(decoded([encode_batch(bare)] * 2)[0]) == 4
