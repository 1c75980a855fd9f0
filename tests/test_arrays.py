"""Columns go to Arrow and back unchanged, without pandas."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from fleetcast.storage.tables import (
    NUMBER,
    TIME,
    cells,
    choose,
    codes_of,
    column_of,
    floats,
    in_order,
    nulls_for_nan,
    text_of_codes,
    texts,
    times_ms,
)

numbers = st.lists(st.one_of(st.floats(allow_nan=False), st.just(float("nan"))), max_size=20)


@given(numbers, st.integers(0, 5), st.integers(0, 5))
def test_absent_is_null_in_arrow_and_nan_in_numpy(values: list[float], head: int, tail: int) -> None:
    array = np.array(values, dtype=np.float64)
    column = pa.chunked_array([nulls_for_nan(array), nulls_for_nan(array[::-1])])
    assert column.null_count == 2 * int(np.isnan(array).sum())
    both = np.concatenate([array, array[::-1]])
    np.testing.assert_array_equal(floats(column), both)
    part = column.slice(head, max(0, len(both) - head - tail))
    np.testing.assert_array_equal(floats(part), both[head : head + len(part)])


@given(st.lists(st.one_of(st.none(), st.sampled_from(["", "a", "bü€", "日本", "a" * 128])), max_size=12))
def test_text_comes_back_with_its_nulls(values: list[str | None]) -> None:
    column = pa.chunked_array([texts(values), texts(values)])
    assert column.to_pylist() == values * 2
    names, codes = codes_of(column)
    assert [names[code] for code in codes] == values * 2


def test_codes_that_no_row_uses_do_no_harm() -> None:
    column = text_of_codes(("a", "b", "c"), np.array([2, 0], dtype=np.int32))
    assert column.to_pylist() == ["c", "a"]


def test_times_are_milliseconds() -> None:
    table = pa.table({"timestamp": column_of(np.array([0, 1500]), TIME)})
    assert [moment.isoformat() for moment in table.column(0).to_pylist()] == [
        "1970-01-01T00:00:00+00:00",
        "1970-01-01T00:00:01.500000+00:00",
    ]
    assert times_ms(table, "timestamp").tolist() == [0, 1500]


@given(st.lists(st.booleans(), max_size=40))
def test_chosen_rows_and_ordered_rows_are_those(flags: list[bool]) -> None:
    values = np.arange(len(flags), dtype=np.float64)
    table = pa.table({"x": column_of(values, NUMBER)})
    mask = np.array(flags, dtype=np.bool_)
    assert floats(choose(table, mask).column(0)).tolist() == values[mask].tolist()
    places = np.flatnonzero(mask)[::-1]
    assert floats(in_order(table, places).column(0)).tolist() == places.tolist()


def test_cells_of_nothing_are_nothing() -> None:
    assert cells(pa.chunked_array([], NUMBER), np.float64).tolist() == []


_WITHOUT_PANDAS = """
import sys, tempfile
from data_buffer import DataBuffer
buffer = DataBuffer(tempfile.mkdtemp())
raw = {"timestamp": "2026-01-15T10:00:00Z", "server_name": "a", "cpu_pct": 1.0}
buffer = DataBuffer(tempfile.mkdtemp(), expire=False)
buffer.append([raw, raw | {"server_name": "b", "cpu_pct": None}])
buffer.flush()
assert len(list(buffer.iter_batches(0, 2**45))) == 1
assert buffer.get_stats()["total_records"] == 2
buffer.close()
assert "pandas" not in sys.modules
"""


def test_a_buffer_that_makes_no_frame_does_without_pandas() -> None:
    subprocess.run([sys.executable, "-c", _WITHOUT_PANDAS], check=True, cwd=Path(__file__).parents[1])
