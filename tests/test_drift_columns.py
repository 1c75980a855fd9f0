"""Numbers by metric out of what callers have at hand, and clear words where there are none."""

import numpy as np
import pandas as pd
import pytest

from fleetcast.drift.literal.scores import extend, float_columns, n_rows
from fleetcast.errors import BadData


def test_a_number_an_array_a_list_and_a_series_are_columns() -> None:
    for values in ([1.0, 2.0], np.array([1, 2]), pd.Series([1, 2], dtype="Int64")):
        assert float_columns({"cpu_pct": values}, "actuals")["cpu_pct"].tolist() == [1.0, 2.0]
    assert float_columns({"cpu_pct": 3}, "actuals")["cpu_pct"].tolist() == [3.0]


def test_the_number_columns_of_a_frame_count_and_the_others_do_not() -> None:
    frame = pd.DataFrame(
        {"timestamp": pd.to_datetime(["2026-01-01"]), "server_name": ["a"], "cpu_pct": [1.5], "mem_pct": [2]}
    )
    assert {name: column.tolist() for name, column in float_columns(frame, "features").items()} == {
        "cpu_pct": [1.5],
        "mem_pct": [2.0],
    }


def test_what_is_not_finite_is_absent_and_the_callers_array_is_left_alone() -> None:
    given = np.array([1.0, np.inf, -np.inf, np.nan])
    column = float_columns({"cpu_pct": given}, "actuals")["cpu_pct"]
    assert column[0] == 1.0
    assert np.isnan(column[1:]).all()
    assert np.isinf(given[1])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([1, 2], "actuals must be a mapping of metric to number or array, or a DataFrame, got list"),
        ("text", "got str"),
        (None, "got NoneType"),
        ({"cpu_pct": "high"}, r"actuals\['cpu_pct'\] must be numbers"),
        ({"cpu_pct": {"a": 1}}, r"actuals\['cpu_pct'\] must be numbers"),
        ({"cpu_pct": [[1, 2], [3, 4]]}, r"must be one number or a flat array, got shape \(2, 2\)"),
        ({"a": [1, 2], "b": [1]}, "columns of equal length, got a: 2, b: 1"),
    ],
)
def test_other_shapes_are_refused_with_what_would_be_right(source: object, message: str) -> None:
    with pytest.raises(BadData, match=message):
        float_columns(source, "actuals")


def test_tables_of_different_length_do_not_belong_together() -> None:
    with pytest.raises(BadData, match=r"must have one length, got \[1, 2\] rows"):
        n_rows({"a": np.ones(1)}, {"a": np.ones(2)})
    assert n_rows({}, {}) == 0


def test_a_metric_that_one_side_lacks_is_absent_there() -> None:
    joined = extend({"a": np.array([1.0, 2.0])}, 2, {"b": np.array([3.0])}, 1, keep=2)
    assert joined["a"][0] == 2.0
    assert np.isnan(joined["a"][1])
    assert np.isnan(joined["b"][0])
    assert joined["b"][1] == 3.0
