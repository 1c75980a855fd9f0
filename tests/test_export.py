"""The export: one file, day by day, raw or in bins, never half written."""

import errno
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from buffer_rows import DAY_MS, NOON_MS, Values, batch, rows_of_frame

from fleetcast.errors import BadData, StorageBroken, StorageFull
from fleetcast.settings import BufferSettings
from fleetcast.storage.daystore import DayStore
from fleetcast.storage.reader import DayReader, export_records
from fleetcast.storage.tables import METRICS, table_of_batch

BIN_MS = 300_000


@pytest.fixture
def reader(tmp_path: Path) -> DayReader:
    owner = DayStore(tmp_path / "buffer", METRICS, BufferSettings())
    owner.open()
    rows: list[tuple[str, int, Values]] = []
    for day in range(3):
        for server in ("b", "a"):
            for tick in range(120):  # ten minutes of 5 s
                values = {"cpu_pct": float(tick % 60)} | ({"late_ms": 1.0} if day == 2 else {})
                rows.append((server, NOON_MS + day * DAY_MS + tick * 5000, values))
    for start in range(0, len(rows), 200):
        owner.append(table_of_batch(batch(rows[start : start + 200])))
        if start < 400:
            owner.flush()
    return DayReader(tmp_path / "buffer", METRICS)


def test_the_raw_export_is_every_record_once(reader: DayReader, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "export.parquet"
    assert export_records(reader, path, 0, 2**45, None) == 720
    frame = pd.read_parquet(path)
    rows = rows_of_frame(frame)
    assert len(rows) == 720
    assert rows[("a", NOON_MS + 5000)] == {"cpu_pct": 1.0}
    assert rows[("a", NOON_MS + 2 * DAY_MS)] == {"cpu_pct": 0.0, "late_ms": 1.0}
    assert list(frame.columns) == ["timestamp", "server_name", "cpu_pct", "late_ms"]
    assert [entry.name for entry in path.parent.iterdir()] == ["export.parquet"]


def test_bins_are_means_at_their_starts(reader: DayReader, tmp_path: Path) -> None:
    path = tmp_path / "bins.parquet"
    assert export_records(reader, path, 0, 2**45, 300) == 12
    rows = rows_of_frame(pd.read_parquet(path))
    assert rows[("a", NOON_MS)] == {"cpu_pct": 29.5}
    assert rows[("b", NOON_MS + 2 * DAY_MS + BIN_MS)] == {"cpu_pct": 29.5, "late_ms": 1.0}


def test_bins_do_not_depend_on_how_a_day_is_cut(
    reader: DayReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_records(reader, tmp_path / "whole", 0, 2**45, 300)
    monkeypatch.setattr("fleetcast.storage.reader.CHUNK_ROWS", 1)
    monkeypatch.setattr("fleetcast.storage.parts._EXPORT_ROWS", 1)
    export_records(reader, tmp_path / "cut", 0, 2**45, 300)
    assert pq.ParquetFile(tmp_path / "cut").metadata.num_row_groups == 6
    first, second = pd.read_parquet(tmp_path / "whole"), pd.read_parquet(tmp_path / "cut")
    pd.testing.assert_frame_equal(first, second)


@pytest.mark.parametrize("resolution_s", [0, -5, 7, 86_401, 0.0001, float("nan"), float("inf")])
def test_bins_that_do_not_divide_a_day_are_refused(
    reader: DayReader, tmp_path: Path, resolution_s: float
) -> None:
    with pytest.raises(BadData, match="resolution_s must divide a day"):
        export_records(reader, tmp_path / "bins", 0, 2**45, resolution_s)


def test_an_export_of_nothing_is_a_file_without_rows(reader: DayReader, tmp_path: Path) -> None:
    assert export_records(reader, tmp_path / "none.parquet", 0, 1, 300) == 0
    frame = pd.read_parquet(tmp_path / "none.parquet")
    assert (len(frame), list(frame.columns)) == (0, ["timestamp", "server_name"])


def test_a_failed_export_leaves_the_one_before(
    reader: DayReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "export.parquet"
    export_records(reader, path, 0, 2**45, 300)
    before = path.read_bytes()

    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fleetcast.storage.parts.fsync_file", full)
    with pytest.raises(StorageFull):
        export_records(reader, path, 0, 2**45, None)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["buffer", "export.parquet"]
    with pytest.raises(StorageBroken):
        export_records(reader, path / "below a file" / "export.parquet", 0, 2**45, None)


def test_the_sum_of_bins_is_the_sum_of_records(reader: DayReader, tmp_path: Path) -> None:
    export_records(reader, tmp_path / "hour.parquet", 0, 2**45, 3600)
    frame = pd.read_parquet(tmp_path / "hour.parquet")
    np.testing.assert_allclose(frame.cpu_pct, 29.5)
