"""Sealing in its child: one sorted file that reads back, or the day stays as it was."""

import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from buffer_rows import NOON_MS, day_folder, rows_of_frame, table

from fleetcast.storage import upkeep
from fleetcast.storage.days import OpenPart, PartName, write_part
from fleetcast.storage.quarantine import Quarantine
from fleetcast.storage.tables import METRICS
from fleetcast.storage.upkeep import Sealed, SealProcess, seal
from fleetcast.storage.writer import DayWriter

DAY = date(2026, 1, 15)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def day(tmp_path: Path) -> Path:
    """A day of four parts, of different metrics, not in order of servers."""
    writer = DayWriter(tmp_path, METRICS, Quarantine(tmp_path / "quarantine"))
    for number, server in enumerate(("d", "a", "c", "b"), start=1):
        rows = [(server, NOON_MS + tick, {"load": float(tick), f"m{number}": 1.0}) for tick in range(50)]
        writer.add(DAY, table(*rows), number)
    return tmp_path


def test_a_sealed_day_holds_every_row_sorted_and_says_which_parts_it_is_made_of(day: Path) -> None:
    expected = rows_of_frame(pd.read_parquet(day_folder(day)))
    sealed = seal(day, "metrics", DAY, day / "sealed")
    assert (sealed.n_rows, sealed.rejects) == (200, ())
    assert sealed.parts == tuple(PartName(number, 50) for number in (1, 2, 3, 4))
    frame = pd.read_parquet(day / "sealed")
    assert rows_of_frame(frame) == expected
    assert frame.equals(frame.sort_values(["server_name", "timestamp"], ignore_index=True))
    assert OpenPart(day / "sealed", None, METRICS).number == 4


def test_a_sealed_day_is_compressed_and_checksummed(day: Path) -> None:
    seal(day, "metrics", DAY, day / "sealed")
    column = pq.ParquetFile(day / "sealed").metadata.row_group(0).column(2)
    assert column.compression == "ZSTD"
    assert "RLE_DICTIONARY" in column.encodings
    data = bytearray((day / "sealed").read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    (day / "sealed").write_bytes(bytes(data))
    part = OpenPart(day / "sealed", None, METRICS)
    list(part.tables())
    assert part.n_damaged_groups == 1


def test_large_days_are_sealed_in_row_groups_of_whole_servers(
    day: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "_GROUP_ROWS", 120)
    seal(day, "metrics", DAY, day / "sealed")
    metadata = pq.ParquetFile(day / "sealed").metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [100, 100]


def test_damaged_parts_are_named_and_cost_only_their_rows(day: Path) -> None:
    (day_folder(day) / PartName(2, 50).text).write_bytes(b"no parquet")
    sealed = seal(day, "metrics", DAY, day / "sealed")
    assert (sealed.n_rows, sealed.rejects) == (150, (PartName(2, 50).text,))
    assert len(sealed.parts) == 4, "the parent compares them with the folder"


def test_a_file_that_does_not_read_back_is_not_handed_over(
    day: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "write_part", lambda *args, **kwargs: 1 + write_part(*args, **kwargs))
    with pytest.raises(OSError, match="does not read back: wrote 201 rows, read 200"):
        seal(day, "metrics", DAY, day / "sealed")


def test_the_child_seals_and_answers(day: Path) -> None:
    process = SealProcess(day, "metrics", DAY, day / "sealed")
    deadline = time.monotonic() + 60
    while process.is_running and time.monotonic() < deadline:
        time.sleep(0.01)
    sealed = process.result()
    names = tuple(PartName(number, 50) for number in (1, 2, 3, 4))
    assert sealed == Sealed(day / "sealed", names, (), 200)
    assert len(pd.read_parquet(day / "sealed")) == 200


def test_a_child_that_fails_leaves_no_file(tmp_path: Path) -> None:
    process = SealProcess(tmp_path, "no such kind", DAY, tmp_path / "sealed")
    assert process.result() is None
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_is_stopped_leaves_no_file(day: Path) -> None:
    process = SealProcess(day, "metrics", DAY, day / "sealed")
    process.stop()
    assert process.is_running is False
    assert not (day / "sealed").exists()


def test_a_child_that_takes_too_long_is_killed(day: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = SealProcess(day, "metrics", DAY, day / "sealed")
    monkeypatch.setattr(upkeep, "TIMEOUT_S", -1.0)
    assert process.is_running in (True, False)
    assert process.result() is None
    assert not (day / "sealed").exists()


def test_a_child_without_its_owner_hands_nothing_over(day: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fleetcast.storage.upkeep",
        str(day),
        "metrics",
        "2026-01-15",
        str(day / "sealed"),
    ]
    done = subprocess.run([*command, "1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert not (day / "sealed").exists()
