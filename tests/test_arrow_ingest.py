import datetime
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetcast.errors import BadData
from fleetcast.ingest.arrow import COLUMNS_MAX, ROWS_MAX, read_columns
from fleetcast.ingest.columns import CodedNames, RowsOf
from fleetcast.ingest.records import Accepted, RecordRules, accept, accept_columns

NOW = 1_768_471_200_000  # 2026-01-15T10:00:00Z
RULES = RecordRules(newest_ms=NOW + 300_000, oldest_ms=0)
TIMES = [NOW, NOW + 5_000, NOW + 900_000, -5_000, None]
NAMES = ["web-01", "web-02", "", "x" * 600, "tab\there", None, "naïve-01"]
NUMBERS = [1.0, 2.5, -0.0, None, 999.0, 1001.0, float("nan"), float("inf")]


def stream(
    columns: Mapping[str, pa.Array], n_batches: int = 1, schema: pa.Schema | None = None, **options: Any
) -> bytes:
    batch = pa.record_batch(columns, schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for part in range(n_batches):
            start = batch.num_rows * part // n_batches
            writer.write_batch(batch.slice(start, batch.num_rows * (part + 1) // n_batches - start))
    return bytes(sink.getvalue())


def times(values: Sequence[int | None], unit: str = "ms") -> pa.Array:
    factor = {"s": 0.001, "ms": 1, "us": 1_000, "ns": 1_000_000}[unit]
    scaled = [None if value is None else int(value * factor) for value in values]
    return pa.array(scaled, pa.int64()).cast(pa.timestamp(unit, "UTC"))


def two(**metrics: pa.Array) -> dict[str, pa.Array]:
    return {"timestamp": times([NOW, NOW + 5_000]), "server_name": pa.array(["web-01", "web-02"]), **metrics}


def taken(body: bytes) -> Accepted:
    return accept_columns(read_columns(body), RULES)


def same(got: Accepted, want: Accepted) -> None:
    assert [(r.index, r.field) for r in got.rejections] == [(r.index, r.field) for r in want.rejections]
    assert got.ignored_text_fields == want.ignored_text_fields
    assert got.batch.timestamps_ms.tolist() == want.batch.timestamps_ms.tolist()
    name = [[b.server_names[code] for code in b.server_codes] for b in (got.batch, want.batch)]
    assert name[0] == name[1]
    for metric in got.batch.metrics.keys() | want.batch.metrics.keys():
        absent = np.full(len(want.batch), np.nan)
        np.testing.assert_array_equal(
            got.batch.metrics.get(metric, absent), want.batch.metrics.get(metric, absent)
        )


rows = st.lists(
    st.tuples(
        st.sampled_from(TIMES[:2] * 3 + TIMES),
        st.sampled_from(NAMES[:2] * 3 + NAMES),
        st.sampled_from(NUMBERS[:3] * 2 + NUMBERS),
        st.sampled_from(["up", None]),
        st.sampled_from([True, False, None, None, None, None]),
    ),
    max_size=12,
)


@given(
    rows,
    st.sampled_from(["s", "ms", "us", "ns", "text"]),
    st.sampled_from(["plain", "large", "view", "dict"]),
    st.integers(1, 3),
)
def test_a_stream_gets_the_same_answer_as_its_records_as_json(
    rows: list[tuple[Any, ...]], unit: str, text: str, n_batches: int
) -> None:
    raw = []
    for time, name, number, state, flag in rows:
        stamp = (
            None if time is None else datetime.datetime.fromtimestamp(time / 1000, datetime.UTC).isoformat()
        )
        record = {"timestamp": stamp, "server_name": name, "cpu_pct": number, "latency_ms": number}
        raw.append({**record, "state": state, "Odd": 1, "flag": flag})
    kinds = {"plain": pa.string(), "large": pa.large_string(), "view": pa.string_view(), "dict": pa.string()}
    stamps = pa.array([r["timestamp"] for r in raw], kinds[text])
    names = pa.array([r["server_name"] for r in raw], kinds[text])
    numbers = pa.array([row[2] for row in rows], pa.float64(), from_pandas=False)
    columns = {
        "timestamp": stamps if unit == "text" else times([row[0] for row in rows], unit),
        "server_name": names.dictionary_encode() if text == "dict" else names,
        "cpu_pct": numbers,
        "latency_ms": numbers,
        "state": pa.array([row[3] for row in rows], kinds[text]),
        "Odd": pa.array([1] * len(rows), pa.int8()),
        "flag": pa.array([row[4] for row in rows], pa.bool_()),
    }
    same(taken(stream(columns, n_batches)), accept(raw, RULES))


@pytest.mark.parametrize(
    "array",
    [
        pa.array([12, None], pa.int8()),
        pa.array([12, None], pa.uint64()),
        pa.array([12.0, None], pa.float32()),
        pa.array([np.float16(12), None], pa.float16()),
        pa.array([Decimal("12.00"), None], pa.decimal128(10, 2)),
    ],
    ids=lambda array: str(array.type),
)
def test_every_kind_of_number_is_a_metric(array: pa.Array) -> None:
    metrics = taken(stream(two(cpu_pct=array))).batch.metrics
    np.testing.assert_array_equal(metrics["cpu_pct"], [12.0, np.nan])


def test_float32_values_are_stored_as_the_decimals_they_stand_for() -> None:
    metrics = taken(stream(two(cpu_pct=pa.array([12.1, 0.07], pa.float32())))).batch.metrics
    assert metrics["cpu_pct"].tolist() == [12.1, 0.07]


@pytest.mark.parametrize(
    "array",
    [
        pa.array([True, None]),
        pa.array([[1.0], None]),
        pa.array([{"a": 1}, None]),
        pa.array([b"1", None]),
        pa.array([datetime.date(2026, 1, 15), None]),
        pa.array([datetime.timedelta(1), None]),
        pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"x" * 16, None], pa.binary(16))),
        pa.array([[1.0], None], pa.list_view(pa.float64())),
    ],
    ids=lambda array: str(array.type),
)
def test_a_value_that_is_no_number_costs_its_record_and_an_absent_one_does_not(array: pa.Array) -> None:
    accepted = taken(stream(two(cpu_pct=array)))
    (rejection,) = accepted.rejections
    assert (rejection.index, rejection.field) == (0, "cpu_pct")
    assert rejection.reason == f"must be a number, got <{array.type}>"
    assert accepted.batch.server_names == ("web-02",)


def test_columns_without_any_value_are_absent_metrics() -> None:
    accepted = taken(stream(two(cpu_pct=pa.nulls(2), mem_pct=pa.array([1.0, 2.0]))))
    assert list(accepted.batch.metrics) == ["mem_pct"]


def test_a_stream_without_records_is_accepted_and_empty() -> None:
    for n_batches in (0, 1):
        empty = {name: array.slice(0, 0) for name, array in two(cpu_pct=pa.array([1.0, 2.0])).items()}
        accepted = taken(stream(empty, n_batches))
        assert (len(accepted.batch), accepted.rejections) == (0, ())


def test_times_that_do_not_fit_are_rejected_one_by_one() -> None:
    for unit in ("s", "ms", "us", "ns"):
        extreme = pa.array([2**62, -(2**62), NOW if unit == "ms" else None], pa.int64()).cast(
            pa.timestamp(unit)
        )
        columns = {"timestamp": extreme, "server_name": pa.array(["a", "b", "c"])}
        accepted = taken(stream(columns))
        assert [r.field for r in accepted.rejections] == ["timestamp"] * (2 if unit == "ms" else 3)


def test_names_of_several_batches_are_counted_once() -> None:
    names = pa.array(["a", "b", "a", "c", "b", "a"]).dictionary_encode()
    columns = {"timestamp": times([NOW + n for n in range(6)]), "server_name": names}
    batch = taken(stream(columns, 3)).batch
    assert batch.server_names == ("a", "b", "c")
    assert batch.server_codes.tolist() == [0, 1, 0, 2, 1, 0]


def test_many_rows_that_point_at_one_long_text_cost_nothing() -> None:
    # Given views: 1,000 rows of 16 bytes that each stand for the same 10 MB
    one = pa.array(["x" * 10_000_000], pa.string_view())
    views = pa.py_buffer(one.buffers()[1].to_pybytes()[:16] * 1000)
    names = pa.Array.from_buffers(pa.string_view(), 1000, [None, views, *one.buffers()[2:]])
    accepted = taken(stream({"timestamp": times([NOW] * 1000), "server_name": names}))
    assert len(accepted.rejections) == 1000
    assert (
        accepted.rejections[0].reason
        == "must be 1-128 printable characters, at least one of them visible, got None"
    )


def test_rejected_rows_can_be_shown_as_records() -> None:
    columns = read_columns(stream(two(cpu_pct=pa.array([1.5, None]), flag=pa.array([True, None]))))
    shown = RowsOf(columns)
    assert len(shown) == 2
    assert repr(shown[0]["flag"]) == "<bool>"
    assert shown[1]["cpu_pct"] is None
    assert [row["server_name"] for row in shown[:]] == ["web-01", "web-02"]


def large(n_rows: int, n_columns: int) -> bytes:
    columns = {f"m{n}": pa.nulls(n_rows) for n in range(n_columns - 2)}
    names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n_rows, np.int8)), pa.array(["a"]))
    stamps = pa.array(np.zeros(n_rows, np.int64)).cast(pa.timestamp("ms"))
    return stream({"timestamp": stamps, "server_name": names, **columns})


HOSTILE: list[tuple[bytes, str]] = [
    (b"", "it is empty"),
    (b"\0" * 64, "it is empty"),
    (b'{"records": []}', "not an Arrow IPC stream"),
    (stream(two())[:-60], "not an Arrow IPC stream"),
    (stream(two(cpu_pct=pa.array([1.0, 2.0])), compression="zstd"), "compressed .*compression=None"),
    (stream(two(cpu_pct=pa.array([1.0, 2.0])), compression="lz4"), "compressed"),
    (stream({"server_name": pa.array(["a"])}), "no column 'timestamp'"),
    (stream({"timestamp": times([NOW])}), "no column 'server_name'"),
    (
        stream({"timestamp": pa.array([NOW]), "server_name": pa.array(["a"])}),
        "must be an Arrow timestamp .* int64",
    ),
    (
        stream({"timestamp": times([NOW]), "server_name": pa.array([1])}),
        "server_name must be text, got int64",
    ),
    (large(1, COLUMNS_MAX + 1), "1025 columns, at most 1024"),
    (large(ROWS_MAX + 1, 3), "at most 262144 of 3 columns"),
    (large(10_000, 1000), "at most 2097 of 1000 columns"),
]


@pytest.mark.parametrize(("body", "message"), HOSTILE, ids=[message for _, message in HOSTILE])
def test_a_stream_that_cannot_be_taken_says_why(body: bytes, message: str) -> None:
    with pytest.raises(BadData, match=message):
        read_columns(body)


def test_a_column_that_comes_twice_is_refused() -> None:
    batch = pa.RecordBatch.from_arrays(
        [times([NOW]), pa.array(["a"]), pa.array(["b"])], ["timestamp", "server_name", "server_name"]
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(BadData, match="'server_name' twice"):
        read_columns(bytes(sink.getvalue()))


def test_a_compressed_dictionary_is_refused_too() -> None:
    names = pa.array(["a" * 100, "b" * 100]).dictionary_encode()
    with pytest.raises(BadData, match="compressed"):
        read_columns(stream({"timestamp": times([NOW, NOW]), "server_name": names}, compression="zstd"))


def test_names_that_are_no_utf8_do_not_pass_validation() -> None:
    body = stream(two())
    with pytest.raises(BadData, match=r"UTF8|UTF-8|utf-8"):
        read_columns(body.replace(b"web-01", b"web-\xff\xfe"))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_of_a_dictionary_only_the_texts_that_a_row_has_are_read(kind: pa.DataType) -> None:
    names = pa.array([f"web-{number:02}" for number in range(50)]).cast(kind)
    codes = pa.array([7, None, 3, 7], pa.int16())
    columns = {
        "timestamp": times([NOW, NOW, NOW, NOW + 5_000]),
        "server_name": pa.DictionaryArray.from_arrays(codes, names),
        "cpu_pct": pa.array([1.0, 2.0, 3.0, 4.0]),
    }
    read = read_columns(stream(columns, n_batches=2))["server_name"]
    assert isinstance(read, CodedNames)
    assert set(read.names) <= {"web-07", "web-03", None}
    found = taken(stream(columns))
    assert [found.batch.server_names[code] for code in found.batch.server_codes] == [
        "web-07",
        "web-03",
        "web-07",
    ]


@pytest.mark.parametrize("kind", [pa.string(), pa.string_view()])
def test_rows_without_a_name_need_no_dictionary(kind: pa.DataType) -> None:
    names = pa.DictionaryArray.from_arrays(pa.array([None, None], pa.int32()), pa.array([], kind))
    found = taken(stream(two(cpu_pct=pa.array([1.0, 2.0])) | {"server_name": names}))
    assert [(one.index, one.field) for one in found.rejections] == [(0, "server_name"), (1, "server_name")]


def test_a_dictionary_that_comes_again_with_thousands_of_batches_is_refused() -> None:
    """A small body would take gigabytes and minutes: each batch is checked with the whole dictionary."""
    names = pa.DictionaryArray.from_arrays(
        pa.array([1] * 2000, pa.int32()), pa.array(["x" * 200_000, "web-01"])
    )
    columns = {"timestamp": times([NOW] * 2000), "server_name": names}
    with pytest.raises(BadData, match="over 256 MiB to check"):
        read_columns(stream(columns, n_batches=2000))


def test_codes_beyond_their_dictionary_do_not_pass_validation() -> None:
    names = pa.DictionaryArray.from_arrays(pa.array([77, 0], pa.int8()), pa.array(["a", "b"]), safe=False)
    with pytest.raises(BadData, match=r"out of bounds|77"):
        read_columns(stream({"timestamp": times([NOW, NOW]), "server_name": names}))
