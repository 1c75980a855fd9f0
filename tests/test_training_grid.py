"""Claims about reading a training export."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from odd_files import KINDS, put

from fleetcast.bins import bin_means
from fleetcast.errors import BadData
from fleetcast.training.grid import TrainingGrid

BIN_MS = 300_000
START = pd.Timestamp("2026-01-15T00:00:00Z")


def frame(n_row: int, step_s: int, servers: tuple[str, ...] = ("web-01", "web-02")) -> pd.DataFrame:
    random = np.random.default_rng(0)
    times = START + pd.to_timedelta(np.arange(n_row) * step_s, unit="s")
    parts = [
        pd.DataFrame({"timestamp": times, "server_name": name, "cpu_pct": random.uniform(0, 100, n_row)})
        for name in servers
    ]
    return pd.concat(parts, ignore_index=True)


def written(path: Path, table: pd.DataFrame, row_group: int | None = None) -> Path:
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), path, row_group_size=row_group)
    return path


def test_raw_rows_become_the_means_that_the_server_computes(tmp_path: Path) -> None:
    rows = frame(500, 5)
    grid = TrainingGrid.read(written(tmp_path / "raw.parquet", rows), ("cpu_pct",), BIN_MS)
    codes = rows.server_name.map({"web-01": 0, "web-02": 1}).to_numpy(np.int32)
    times = rows.timestamp.astype("datetime64[ms, UTC]").astype("int64").to_numpy()
    code, start, mean = bin_means(codes, times, rows.cpu_pct.to_numpy(), BIN_MS)
    np.testing.assert_array_equal(
        grid.values[code, 0, (start - grid.start_ms) // BIN_MS], mean.astype(np.float32)
    )
    assert grid.values.shape == (2, 1, 9)
    assert grid.start_ms == START.value // 1_000_000


@pytest.mark.parametrize("order", ["by time", "by server", "backwards", "shuffled"])
@pytest.mark.parametrize("row_group", [7, 100, 10_000])
def test_neither_the_order_nor_the_row_groups_change_the_grid(
    tmp_path: Path, order: str, row_group: int
) -> None:
    rows = frame(300, 20)
    expected = TrainingGrid.read(written(tmp_path / "a.parquet", rows), ("cpu_pct",), BIN_MS)
    if order == "by time":
        rows = rows.sort_values("timestamp")
    elif order == "backwards":
        rows = rows[::-1]
    elif order == "shuffled":
        rows = rows.sample(frac=1, random_state=1)
    found = TrainingGrid.read(written(tmp_path / "b.parquet", rows, row_group), ("cpu_pct",), BIN_MS)
    np.testing.assert_array_equal(found.values, expected.values)
    assert found.start_ms == expected.start_ms


def test_bins_exported_as_rows_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = frame(20, 300, ("web-01",))
    grid = TrainingGrid.read(written(tmp_path / "bins.parquet", rows), ("cpu_pct",), BIN_MS)
    np.testing.assert_array_equal(grid.values[0, 0], rows.cpu_pct.to_numpy(np.float32))


def test_gaps_and_absent_values_are_nan(tmp_path: Path) -> None:
    rows = frame(10, 300, ("web-01",)).drop(index=[3, 4])
    rows.loc[6, "cpu_pct"] = np.nan
    rows.loc[7, "cpu_pct"] = np.inf
    grid = TrainingGrid.read(written(tmp_path / "gaps.parquet", rows), ("cpu_pct",), BIN_MS)
    assert np.flatnonzero(np.isnan(grid.values[0, 0])).tolist() == [3, 4, 6, 7]


def test_integers_nulls_and_other_columns_are_no_obstacle(tmp_path: Path) -> None:
    table = pa.table(
        {
            "timestamp": pa.array([0, 300_000_000, None], pa.timestamp("us")),  # no zone: UTC
            "server_name": pa.array(["a", None, "a"]).dictionary_encode(),
            "cpu_pct": pa.array([5, 6, 7], pa.int32()),
            "note": ["x", "y", "z"],
        }
    )
    pq.write_table(table, tmp_path / "odd.parquet")
    grid = TrainingGrid.read(tmp_path / "odd.parquet", ("cpu_pct", "note", "mem_pct"), BIN_MS)
    assert grid.metrics == ("cpu_pct",)
    assert grid.values[0, 0, 0] == 5.0
    assert np.isnan(grid.values[0, 0, 1])


def test_rows_long_before_the_others_are_left_out(tmp_path: Path) -> None:
    rows = frame(10, 300, ("web-01",))
    rows.loc[0, "timestamp"] = pd.Timestamp("1970-01-01T00:00:00Z")
    grid = TrainingGrid.read(written(tmp_path / "old.parquet", rows), ("cpu_pct",), BIN_MS)
    assert grid.n_bins == 100 * 288 + 1
    assert np.isfinite(grid.values).sum() == 9


def test_one_row_of_the_year_2262_costs_itself_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = frame(500, 60)
    rows.loc[3, "timestamp"] = pd.Timestamp("2262-01-01T00:00:00Z")

    grid = TrainingGrid.read(written(tmp_path / "raw.parquet", rows, 100), ("cpu_pct",), BIN_MS)

    assert (grid.start_ms, grid.values.shape) == (START.value // 1_000_000, (2, 1, 100))
    assert "rows of the future left out" in caplog.text


def test_a_column_that_holds_no_numbers_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = frame(10, 60).assign(mem_pct="12.5")

    grid = TrainingGrid.read(written(tmp_path / "raw.parquet", rows), ("cpu_pct", "mem_pct"), BIN_MS)

    assert grid.metrics == ("cpu_pct",)
    assert "column=mem_pct" in caplog.text


def test_the_span_and_the_bin_of_a_time_are_known(tmp_path: Path) -> None:
    grid = TrainingGrid.read(written(tmp_path / "a.parquet", frame(24, 300)), ("cpu_pct",), BIN_MS)
    assert grid.span_s == 7200
    moment = datetime(2026, 1, 15, 1, 2, tzinfo=UTC)
    assert grid.bin_of(int(moment.timestamp() * 1000)) == 12


def test_what_is_no_export_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    with pytest.raises(BadData, match="parquet"):
        TrainingGrid.read(tmp_path / "junk.parquet", ("cpu_pct",), BIN_MS)
    rows = frame(3, 300)
    with pytest.raises(BadData, match="no column server_name"):
        TrainingGrid.read(
            written(tmp_path / "s.parquet", rows.drop(columns="server_name")), ("cpu_pct",), BIN_MS
        )
    with pytest.raises(BadData, match="forecast_metrics"):
        TrainingGrid.read(written(tmp_path / "m.parquet", rows), ("latency_ms",), BIN_MS)
    with pytest.raises(BadData, match="must hold times"):
        TrainingGrid.read(written(tmp_path / "t.parquet", rows.assign(timestamp=1.5)), ("cpu_pct",), BIN_MS)


def test_an_empty_export_is_an_empty_grid(tmp_path: Path) -> None:
    grid = TrainingGrid.read(written(tmp_path / "e.parquet", frame(3, 300).iloc[:0]), ("cpu_pct",), BIN_MS)
    assert grid.values.shape == (0, 1, 0)
    assert grid.span_s == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_that_is_no_file_is_bad_data_at_once(tmp_path: Path, kind: str) -> None:
    put(kind, tmp_path / "export.parquet")
    with pytest.raises(BadData, match="cannot be read as parquet"):
        TrainingGrid.read(tmp_path / "export.parquet", ("cpu_pct",), 300_000)


def test_of_too_many_servers_a_sample_is_read_with_the_wanted_in_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = frame(12, 300, tuple(f"web-{number:02}" for number in range(40)))
    path = written(tmp_path / "large.parquet", rows, 30)
    whole = TrainingGrid.read(path, ("cpu_pct",), BIN_MS)
    assert len(whole.server_names) == 40
    with caplog.at_level("INFO"):
        sample = TrainingGrid.read(path, ("cpu_pct",), BIN_MS, max_cells=10 * 12, wanted=["web-33"])
    assert "servers=10 of=40" in caplog.text
    assert "web-33" in sample.server_names
    places = [whole.server_names.index(name) for name in sample.server_names]
    np.testing.assert_array_equal(sample.values, whole.values[places])
