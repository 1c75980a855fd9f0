"""Tables of a kind: canonical form, one row per key, the last value wins."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from buffer_rows import NOON_MS, Key, Values, batch, rows_of, table
from hypothesis import given
from hypothesis import strategies as st

from fleetcast.schema import SettledForecasts
from fleetcast.storage.tables import (
    METRICS,
    NUMBER,
    PREDICTIONS,
    TEXT,
    TIME,
    NotThisKind,
    batch_of_table,
    canonical,
    fill,
    has_key,
    key_ranks,
    merge,
    settled_of_table,
    stored_schema,
    table_of_batch,
    table_of_settled,
    times_ms,
    union_schema,
)

rows = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "ä", "a b", "Z"]),
        st.integers(NOON_MS, NOON_MS + 3),
        st.dictionaries(st.sampled_from(["x", "y", "z"]), st.integers(0, 9).map(float), max_size=3),
    ),
    max_size=25,
)


def expected(*batches: list[tuple[str, int, Values]]) -> dict[Key, Values]:
    found: dict[Key, Values] = {}
    for server, time, values in (row for one in batches for row in one):
        found.setdefault((server, time), {}).update(values)
    return found


@given(rows, rows)
def test_merging_leaves_one_row_per_key_and_the_last_value_of_each_metric(
    first: list[tuple[str, int, Values]], second: list[tuple[str, int, Values]]
) -> None:
    whole = merge([table_of_batch(batch(first)), table_of_batch(batch(second))], METRICS)
    assert rows_of([batch_of_table(whole)]) == expected(first, second)
    ranks = key_ranks(whole, METRICS)
    assert bool((ranks[1:] > ranks[:-1]).all()), "sorted by server, then time"
    names = whole.column("server_name").cast(pa.string()).to_pylist()
    keys = list(zip(names, times_ms(whole, "timestamp").tolist(), strict=True))
    assert keys == sorted(keys)


def test_merging_nothing_gives_an_empty_table_of_the_kind() -> None:
    assert merge([], METRICS).schema.equals(METRICS.schema)
    assert len(merge([], PREDICTIONS)) == 0


def settled(p50: float, version: str | None) -> SettledForecasts:
    text = np.array(["a"], dtype=object)
    one = np.array([p50])
    return SettledForecasts(
        origin_ms=np.array([NOON_MS]),
        target_ms=np.array([NOON_MS + 300_000]),
        horizon=np.array([1], dtype=np.int32),
        server_name=text,
        metric=np.array(["cpu_pct"], dtype=object),
        p10=one,
        p50=one,
        p90=one,
        actual=one,
        model_version=np.array([version], dtype=object),
    )


def test_of_two_predictions_of_one_key_the_whole_last_row_wins() -> None:
    tables = [table_of_settled(settled(1.0, "v1")), table_of_settled(settled(2.0, None))]
    whole = merge(tables, PREDICTIONS)
    assert (whole.column("p50").to_pylist(), whole.column("model_version").to_pylist()) == ([2.0], [None])


def test_a_foreign_table_is_brought_into_our_form() -> None:
    foreign = pa.table(
        {
            "server_name": ["a", "b"],
            "load": pa.array([1, None], pa.int32()),
            "cpu_pct": pa.array([1.5, float("nan")], pa.float32()),
            "site": ["x", "y"],
            "timestamp": pa.array([NOON_MS * 1000, NOON_MS * 1000 + 999], pa.timestamp("us")),
        }
    )
    ours = canonical(foreign, METRICS)
    assert dict(zip(ours.schema.names, ours.schema.types, strict=True)) == {
        "timestamp": TIME,
        "server_name": TEXT,
        "cpu_pct": NUMBER,
        "load": NUMBER,
    }
    assert times_ms(ours, "timestamp").tolist() == [NOON_MS, NOON_MS]
    assert ours.column("cpu_pct").to_pylist() == [1.5, None]
    assert ours.column("load").to_pylist() == [1.0, None]


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"server_name": ["a"]}, "timestamp is missing"),
        ({"timestamp": ["yesterday"], "server_name": ["a"]}, "timestamp is string"),
        ({"timestamp": pa.array([None], TIME), "server_name": ["a"]}, "timestamp has empty cells"),
        ({"timestamp": pa.array([0], TIME), "server_name": pa.array([None], pa.string())}, "server_name has"),
    ],
)
def test_a_table_of_another_kind_is_refused(columns: dict[str, object], why: str) -> None:
    with pytest.raises(NotThisKind, match=why):
        canonical(pa.table(columns), METRICS)


def test_only_the_metrics_asked_for_are_kept() -> None:
    whole = table(("a", NOON_MS, {"x": 1.0, "y": 2.0}))
    assert canonical(whole, METRICS, ["y", "missing"]).column_names == ["timestamp", "server_name", "y"]
    assert canonical(whole, METRICS, []).column_names == ["timestamp", "server_name"]


def test_known_keys_are_found_whatever_the_codes() -> None:
    ours = table(("a", NOON_MS, {}), ("b", NOON_MS, {}), ("c", NOON_MS, {}))
    others = table(("c", NOON_MS, {"x": 1.0}), ("a", NOON_MS + 1, {}), ("b", NOON_MS, {}))
    assert has_key(ours, others, METRICS).tolist() == [False, True, True]


def test_metrics_that_come_and_go_widen_the_schema() -> None:
    first, second = table(("a", NOON_MS, {"x": 1.0})), table(("a", NOON_MS + 1, {"b": 2.0}))
    schema = union_schema(METRICS, [first.schema, second.schema])
    assert schema.names == ["timestamp", "server_name", "b", "x"]
    assert fill(first, schema).column("b").to_pylist() == [None]
    assert stored_schema(schema).field("server_name").type == pa.string()


def test_keys_of_any_width_are_ranked() -> None:
    """Given times 290 million years apart, then the ranks still fit and order the rows."""
    far = 2**62
    wide = table(("b", far, {}), ("a", far, {}), ("a", -far, {}))
    assert times_ms(wide, "timestamp").tolist() == [-far, far, far]


def test_predictions_stored_before_there_was_feedback_are_still_read() -> None:
    older = table_of_settled(settled(1.5, "v1")).drop_columns(["model_p50"])
    newer = table_of_settled(replace(settled(2.5, "v1"), origin_ms=np.array([0]), model_p50=np.array([9.0])))
    rows = settled_of_table(merge([canonical(older, PREDICTIONS), newer], PREDICTIONS))
    assert sorted(zip(rows.p50.tolist(), rows.model_p50.tolist(), strict=True)) == [(1.5, 1.5), (2.5, 9.0)]
