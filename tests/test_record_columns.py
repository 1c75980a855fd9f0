"""Reading columns must agree with reading records one by one, whatever the cells are."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetcast.ingest.columns import (
    NO_NAME,
    CodedNames,
    cell,
    numbers,
    server_codes,
    text_cells,
    times_ms,
)
from fleetcast.ingest.columns import cell_kinds as kinds_of
from fleetcast.ingest.records import RecordRules, accept, accept_columns

RULES = RecordRules(newest_ms=1_800_000_000_000, oldest_ms=0)
TIMES = ["2026-01-15T10:00:05Z", "2026-01-15T10:00:10", "yesterday", None, 5, "2999-01-01T00:00:00Z"]
NAMES = ["web-01", "web-02", "", "x" * 129, "tab\there", None, 7]
CELLS = [1, 2.5, -0.0, True, None, "on", float("nan"), float("inf"), 10**400, 2**70, [], 999.0, 1001.0]


def records() -> st.SearchStrategy[list[dict[str, Any]]]:
    one = st.fixed_dictionaries(
        {
            "timestamp": st.sampled_from(TIMES[:2] * 4 + TIMES),
            "server_name": st.sampled_from(NAMES[:2] * 4 + NAMES),
            "cpu_pct": st.sampled_from(CELLS),
            "latency_ms": st.sampled_from(CELLS),
        }
    )
    return st.lists(one, min_size=4, max_size=12)


@given(records())
def test_many_records_of_one_shape_get_the_same_answer_as_each_alone(raw: list[dict[str, Any]]) -> None:
    together = accept(raw, RULES)
    alone = [accept([record], RULES) for record in raw]
    reasons = [(i, r.field, r.reason) for i, one in enumerate(alone) for r in one.rejections]
    assert [(r.index, r.field, r.reason) for r in together.rejections] == reasons
    assert together.ignored_text_fields == sum(one.ignored_text_fields for one in alone)
    batch = together.batch
    kept = [one.batch for one in alone if len(one.batch)]
    assert batch.timestamps_ms.tolist() == [one.timestamps_ms[0] for one in kept]
    assert [batch.server_names[code] for code in batch.server_codes] == [one.server_names[0] for one in kept]
    for metric in ("cpu_pct", "latency_ms"):
        want = [one.metrics[metric][0] if metric in one.metrics else np.nan for one in kept]
        got = batch.metrics.get(metric, np.full(len(kept), np.nan))
        np.testing.assert_array_equal(got, want)


def test_coded_names_are_read_like_the_names_they_stand_for() -> None:
    names = ["web-01", "", "web-02", "web-01"]
    column = CodedNames(names, np.array([0, 2, 1, NO_NAME, 3], dtype=np.int32))
    known: dict[str, int] = {}
    codes = server_codes(column, known, RULES)
    assert (codes.tolist(), known) == ([0, 1, NO_NAME, NO_NAME, 0], {"web-01": 0, "web-02": 1})
    assert list(column) == ["web-01", "web-02", "", None, "web-01"]
    assert (cell("server_name", column, 1), cell("server_name", column, 3)) == ("web-02", None)
    assert text_cells(column).tolist() == [True, True, True, False, True]


def test_names_no_row_uses_do_not_enter_the_batch() -> None:
    columns = {
        "timestamp": np.array([5, 6]),
        "server_name": CodedNames(["a", "b", "c"], np.array([2, 2], dtype=np.int32)),
        "cpu_pct": np.array([1.0, 2.0]),
    }
    assert accept_columns(columns, RULES).batch.server_names == ("c",)


def test_a_time_beyond_the_calendar_is_rejected_not_a_crash() -> None:
    times = np.array([2**62, -(2**62), 5])
    columns = {"timestamp": times, "server_name": ["a", "b", "c"], "cpu_pct": np.array([1.0, 2.0, 3.0])}
    accepted = accept_columns(columns, RULES)
    assert [rejection.index for rejection in accepted.rejections] == [0, 1]
    assert accepted.batch.timestamps_ms.tolist() == [5]


@pytest.mark.parametrize(
    ("cells", "values", "is_number"),
    [
        ([1.0, None, 3], [1.0, np.nan, 3.0], [True, True, True]),
        ([1.0, None, float("nan")], [1.0, np.nan, np.nan], [True, True, False]),
        ([1.0, True, 3], [1.0, np.nan, 3.0], [True, False, True]),
        ([1.0, 10**400], [1.0, np.nan], [True, False]),
        (["1", 2.0], [np.nan, 2.0], [False, True]),
    ],
)
def test_only_plain_numbers_and_absent_cells_count_as_numbers(
    cells: list[Any], values: list[float], is_number: list[bool]
) -> None:
    got, good = numbers(cells, kinds_of(cells))
    np.testing.assert_array_equal(got, values)
    assert good.tolist() == is_number


def test_equal_texts_are_one_time_and_other_cells_are_none() -> None:
    column = ["1970-01-01T00:00:01Z", 1.0, "1970-01-01T00:00:01Z", [], "soon"]
    none = np.iinfo(np.int64).min
    assert times_ms(column).tolist() == [1000, none, 1000, none, none]
