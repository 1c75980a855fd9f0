"""Rows of several bodies are the same rows put one after another."""

import numpy as np

from fleetcast.ingest.columns import NO_NAME, CodedNames, NotNumbers, RowsOf, join_rows, layout_of


def rows(names: list[str], values: list[float], **more: object) -> RowsOf:
    return RowsOf({"timestamp": ["t"] * len(names), "server_name": names, "cpu": np.array(values), **more})  # type: ignore[dict-item]


def test_rows_of_one_layout_are_put_one_after_another() -> None:
    parts = [rows(["a", "b"], [1.0, np.nan]), rows(["c"], [3.0])]
    assert layout_of(parts[0]) == layout_of(parts[1])
    assert list(join_rows(parts)) == [
        {"timestamp": "t", "server_name": "a", "cpu": 1.0},
        {"timestamp": "t", "server_name": "b", "cpu": None},
        {"timestamp": "t", "server_name": "c", "cpu": 3.0},
    ]


def test_coded_names_keep_their_names_and_their_gaps() -> None:
    first = CodedNames(("x", "y"), np.array([1, NO_NAME], dtype=np.int32))
    second = CodedNames(("z",), np.array([0, NO_NAME], dtype=np.int32))
    joined = join_rows([rows(["a", "b"], [1, 2], note=first), rows(["c", "d"], [3, 4], note=second)])
    assert [row["note"] for row in joined] == ["y", None, "z", None]  # type: ignore[index]


def test_other_columns_other_types_or_other_order_stay_apart() -> None:
    plain = rows(["a"], [1.0])
    others = [
        rows(["a"], [1.0], mem=np.array([1.0])),
        RowsOf({**plain.columns, "cpu": np.array([1])}),
        RowsOf({name: plain.columns[name] for name in reversed(list(plain.columns))}),
        RowsOf({**plain.columns, "cpu": NotNumbers("bool", np.array([True]))}),
        [{"timestamp": "t", "server_name": "a", "cpu": 1.0}],
    ]
    layouts = [layout_of(plain), *map(layout_of, others)]
    assert len(set(layouts)) == len(layouts)


def test_plain_records_are_joined_whatever_they_hold() -> None:
    parts: list[list[object]] = [[{"a": 1}, 7], [{}]]
    assert layout_of(parts[0]) == layout_of(parts[1])
    assert join_rows(parts) == [{"a": 1}, 7, {}]
