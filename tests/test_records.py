"""Many records at once: order, shapes, derived metrics, rounding and the bound on metrics."""

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetcast.ingest.records import METRICS_MAX, REJECTIONS_KEPT, RecordRules, accept, accept_columns
from fleetcast.schema import RecordBatch

RULES = RecordRules(newest_ms=None)
AT = "2026-01-15T10:00:00Z"
AT_MS = 1_768_471_200_000


def record(server: str = "a", **fields: Any) -> dict[str, Any]:
    return {"timestamp": AT, "server_name": server, **fields}


def servers(batch: RecordBatch) -> list[str]:
    return [batch.server_names[code] for code in batch.server_codes]


def only_value(raw: dict[str, Any], metric: str) -> float:
    return float(accept([raw], RULES).batch.metrics[metric][0])


def test_nothing_in_nothing_out() -> None:
    accepted = accept([], RULES)
    assert (len(accepted.batch), accepted.rejections, accepted.ignored_text_fields) == (0, (), 0)


def test_one_bad_record_never_costs_the_others() -> None:
    raw = [record(f"s{i}", load=float(i)) for i in range(10)]
    raw[3] = record("s3", load="high", cpu_pct=float("nan"))
    raw[7] = {"timestamp": AT}
    accepted = accept(raw, RULES)
    assert [(r.index, r.field) for r in accepted.rejections] == [(3, "cpu_pct"), (7, "server_name")]
    assert servers(accepted.batch) == [f"s{i}" for i in range(10) if i not in (3, 7)]
    assert accepted.batch.metrics["load"].tolist() == [0, 1, 2, 4, 5, 6, 8, 9]


def test_records_of_different_shapes_keep_their_order() -> None:
    raw = [record("a", x=1.0), record("b", y=2.0)] * 6 + [record("c", x=3.0, y=4.0)]
    batch = accept(raw, RULES).batch
    assert servers(batch) == ["a", "b"] * 6 + ["c"]
    np.testing.assert_array_equal(batch.metrics["x"], [1, np.nan] * 6 + [3])
    np.testing.assert_array_equal(batch.metrics["y"], [np.nan, 2] * 6 + [4])


def test_a_server_of_rejected_records_only_is_not_in_the_batch() -> None:
    raw = [record("good", load=1.0)] * 5 + [record("bad", load=True)] * 5
    assert accept(raw, RULES).batch.server_names == ("good",)


@pytest.mark.parametrize(
    ("fields", "cpu"),
    [
        ({"cpu_idle_pct": 30.0}, 70.0),
        ({"cpu_user_pct": 10.0, "cpu_sys_pct": 5.0, "cpu_iowait_pct": 1.0}, 16.0),
        ({"cpu_idle_pct": 30.0, "cpu_user_pct": 1.0, "cpu_sys_pct": 1.0, "cpu_iowait_pct": 1.0}, 70.0),
        ({"cpu_idle_pct": 30.0, "cpu_pct": 12.0}, 12.0),
        ({"cpu_idle_pct": 30.0, "cpu_pct": None}, 70.0),
        ({"cpu_idle_pct": 100.4}, 0.0),
        ({"cpu_idle_pct": 780.0, "cpu_user_pct": 15.0, "cpu_sys_pct": 5.0, "cpu_iowait_pct": 0.0}, 20.0),
    ],
)
def test_absent_cpu_is_derived(fields: dict[str, Any], cpu: float) -> None:
    assert only_value(record(**fields), "cpu_pct") == cpu
    many = accept([record(**fields)] * 5, RULES).batch
    assert many.metrics["cpu_pct"].tolist() == [cpu] * 5


def test_an_idle_share_over_all_cpus_derives_nothing() -> None:
    # 8 CPUs of which one is busy would be 0 %
    for n_records in (1, 5):
        batch = accept([record(cpu_idle_pct=700.0)] * n_records, RULES).batch
        assert np.isnan(batch.metrics.get("cpu_pct", np.full(n_records, np.nan))).all()


def test_cpu_is_not_guessed_from_some_of_its_parts() -> None:
    assert "cpu_pct" not in accept([record(cpu_user_pct=10.0, cpu_sys_pct=5.0)], RULES).batch.metrics


def test_values_are_rounded_once() -> None:
    raw = record(cpu_pct=12.3456, latency_ms=123.456)
    assert (only_value(raw, "cpu_pct"), only_value(raw, "latency_ms")) == (12.35, 123.5)
    rules = RecordRules(newest_ms=None, percent_decimals=0, significant_digits=2)
    batch = accept([raw], rules).batch
    assert {name: column.tolist() for name, column in batch.metrics.items()} == {
        "cpu_pct": [12.0],
        "latency_ms": [120.0],
    }


def test_a_sender_cannot_make_columns_without_end() -> None:
    raw = [record(f"s{i}", **{f"m_{i}_{j}": 1.0 for j in range(100)}) for i in range(10)]
    accepted = accept(raw, RULES)
    assert len(accepted.batch.metrics) == METRICS_MAX
    assert (len(accepted.batch), accepted.rejections) == (10, ())
    assert sum(one.n_records for one in accepted.refused_fields) == 1000 - METRICS_MAX
    assert "512 different metrics" in accepted.refused_fields[0].reason


def test_many_rows_of_few_numbers_each_make_no_wide_table() -> None:
    raw = [record("a", **{f"m{number % 500}": 1.0}) for number in range(60_000)]
    accepted = accept(raw, RULES)
    assert len(accepted.batch) == 60_000
    assert len(accepted.batch.metrics) * 60_000 <= 2**23


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        (0, "not_an_object"),
        ({}, "time_format"),
        ({"server_name": "a", "cpu_pct": 1.0}, "time_format"),
        ({**record(), "timestamp": None}, "time_format"),
        ({**record(), "timestamp": "2999-01-01T00:00:00Z"}, "time_in_future"),
        ({**record(), "timestamp": "1960-01-01T00:00:00Z"}, "time_too_old"),
        ({**record(), "server_name": ""}, "server_name"),
        ({**record(), "cpu_pct": 5000.0}, "out_of_range"),
    ],
)
def test_of_many_refusals_a_few_are_listed_and_all_are_counted(bad: Any, rule: str) -> None:
    rules = RecordRules(newest_ms=4_000_000_000_000, oldest_ms=0)
    accepted = accept([record("good")] + [bad] * (REJECTIONS_KEPT + 500), rules)
    assert len(accepted.batch) == 1
    assert len(accepted.rejections) == REJECTIONS_KEPT
    assert [one.index for one in accepted.rejections[:2]] == [1, 2]
    assert accepted.faults == {rule: REJECTIONS_KEPT + 500}
    assert accepted.is_kept.tolist() == [True] + [False] * (REJECTIONS_KEPT + 500)


def test_columns_of_a_frame_mean_absent_by_nan_and_times_by_ms() -> None:
    columns = {
        "timestamp": np.array([AT_MS, AT_MS + 1, np.iinfo(np.int64).min]),
        "server_name": ["a", "b", "c"],
        "load": np.array([1.0, np.nan, 3.0]),
    }
    accepted = accept_columns(columns, RULES)
    assert accepted.batch.timestamps_ms.tolist() == [AT_MS, AT_MS + 1]
    np.testing.assert_array_equal(accepted.batch.metrics["load"], [1.0, np.nan])
    assert [(r.index, r.field) for r in accepted.rejections] == [(2, "timestamp")]


cells = st.sampled_from(
    [None, True, "x", 0, -5, 12.345, 999.5, 1000.5, float("nan"), float("inf"), [1], 10**400]
)
moments = st.sampled_from([AT, "2026-01-15", "x", None, 3, "2031-01-01T00:00:00Z", "2020-01-01T00:00:00Z"])
names = st.sampled_from(["a", "b", "", None, 5, "x" * 129, ["a"]])
raw_records = st.one_of(
    st.dictionaries(
        st.sampled_from(
            ["timestamp", "server_name", "cpu_pct", "load", "mem_used_pct", "cpu_idle_pct", "Bad"]
        ),
        st.one_of(cells, moments, names),
    ),
    st.fixed_dictionaries({"timestamp": moments, "server_name": names, "cpu_pct": cells, "load": cells}),
    st.just(7),
)


@given(st.lists(raw_records, max_size=30))
def test_any_mixture_gets_the_answers_of_each_record_alone(raw: list[Any]) -> None:
    now = datetime(2026, 1, 15, 12, tzinfo=UTC)
    rules = RecordRules(
        newest_ms=int(now.timestamp() * 1000), oldest_ms=int((now - timedelta(days=60)).timestamp() * 1000)
    )
    together = accept(raw, rules)
    alone = [accept([one], rules) for one in raw]
    faults = [(place, r.field, r.reason) for place, one in enumerate(alone) for r in one.rejections]
    assert [(r.index, r.field, r.reason) for r in together.rejections] == faults
    assert together.ignored_text_fields == sum(one.ignored_text_fields for one in alone)
    kept = [one.batch for one in alone if len(one.batch)]
    assert servers(together.batch) == [one.server_names[0] for one in kept]
    assert together.batch.timestamps_ms.tolist() == [int(one.timestamps_ms[0]) for one in kept]
    for metric in {name for one in kept for name in one.metrics}:
        expected = [float(one.metrics[metric][0]) if metric in one.metrics else np.nan for one in kept]
        np.testing.assert_array_equal(together.batch.metrics[metric], expected)
