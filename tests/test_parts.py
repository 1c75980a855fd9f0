"""Parts: what is written is read, pandas reads them too, and damage costs a row group at most."""

import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from buffer_rows import NOON_MS, rows_of, rows_of_frame, table

from fleetcast.errors import StorageBroken, StorageFull
from fleetcast.storage import parts
from fleetcast.storage.parts import READ_ERRORS, OpenPart, PartName, write_part
from fleetcast.storage.tables import METRICS, NotThisKind, batch_of_table

FLEET = table(
    *(
        (f"s{n:02d}", NOON_MS + tick * 5000, {"cpu_pct": n + tick / 4, "load": 2.0})
        for n in range(20)
        for tick in range(30)
    )
)


def written(tmp_path: Path, rows: pa.Table = FLEET, *, is_sealed: bool = False) -> Path:
    path = tmp_path / PartName(7, len(rows)).text
    assert write_part(path, iter([rows]), METRICS, rows.schema, 7, is_sealed=is_sealed) == len(rows)
    return path


def read(path: Path) -> dict[tuple[str, int], dict[str, float]]:
    return rows_of(batch_of_table(part) for part in OpenPart(path, None, METRICS).tables())


@pytest.mark.parametrize("is_sealed", [False, True])
def test_what_was_written_is_read_by_us_and_by_pandas(tmp_path: Path, is_sealed: bool) -> None:
    path = written(tmp_path, is_sealed=is_sealed)
    assert read(path) == rows_of([batch_of_table(FLEET)])
    frame = pd.read_parquet(path)
    assert rows_of_frame(frame) == read(path)
    assert str(frame.timestamp.dtype) == "datetime64[ms, UTC]"
    assert list(frame.columns) == ["timestamp", "server_name", "cpu_pct", "load"]
    assert frame.server_name.iloc[0] == "s00"


def test_a_part_says_what_it_holds_without_being_read(tmp_path: Path) -> None:
    part = OpenPart(written(tmp_path), None, METRICS)
    assert (part.number, part.n_rows, part.is_ours) == (7, 600, True)
    assert part.time_range_ms() == (NOON_MS, NOON_MS + 29 * 5000)
    assert part.name_range() == ("s00", "s19")
    assert part.schema.names == ["timestamp", "server_name", "cpu_pct", "load"]
    assert part.may_hold(NOON_MS + 29 * 5000, NOON_MS + 10**9)
    assert not part.may_hold(NOON_MS + 29 * 5000 + 1, NOON_MS + 10**9)
    assert not part.may_hold(0, NOON_MS)


def test_the_name_of_a_part_says_segment_and_rows() -> None:
    assert PartName.parse(PartName(12, 345).text) == PartName(12, 345)
    for foreign in ("part-1-2.parquet", "part-000000000001-x.parquet", "00-columns.parquet", "notes.txt"):
        assert PartName.parse(foreign) is None


def test_a_part_stays_readable_when_its_name_is_gone(tmp_path: Path) -> None:
    path = written(tmp_path)
    part = OpenPart(path, None, METRICS)
    path.unlink()
    assert sum(len(some) for some in part.tables()) == 600


def test_row_groups_are_found_by_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_PART_GROUP_ROWS", 100)
    part = OpenPart(written(tmp_path), None, METRICS)
    assert part.groups(None) == [0, 1, 2, 3, 4, 5]
    assert part.groups(("s00", "s00")) == [0]
    assert part.groups(("s05", "s07")) == [1, 2]
    assert part.groups(("t", "z")) == []


def test_absent_values_and_columns_of_others_are_null(tmp_path: Path) -> None:
    first, second = table(("a", NOON_MS, {"x": 1.0})), table(("b", NOON_MS, {"y": 2.0}))
    schema = table(("a", NOON_MS, {"x": 1.0, "y": 1.0})).schema
    path = tmp_path / "both.parquet"
    write_part(path, iter([first, second]), METRICS, schema, 1)
    assert read(path) == {("a", NOON_MS): {"x": 1.0}, ("b", NOON_MS): {"y": 2.0}}


def test_a_damaged_row_group_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_PART_GROUP_ROWS", 100)
    path = written(tmp_path)
    column = pq.ParquetFile(path).metadata.row_group(2).column(2)
    place = column.data_page_offset + column.total_compressed_size - 5
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(bytes(data))
    part = OpenPart(path, None, METRICS)
    assert sum(len(some) for some in part.tables()) == 500
    assert part.n_damaged_groups == 1


@pytest.mark.parametrize("is_sealed", [False, True])
def test_a_flipped_bit_in_the_data_is_never_silent(tmp_path: Path, is_sealed: bool) -> None:
    whole = written(tmp_path, is_sealed=is_sealed).read_bytes()
    (footer_bytes,) = struct.unpack("<I", whole[-8:-4])
    end_of_data = len(whole) - 8 - footer_bytes
    truth = rows_of([batch_of_table(FLEET)])
    rng = np.random.default_rng(3)
    for place in rng.integers(4, end_of_data, 150).tolist():
        data = bytearray(whole)
        data[place] ^= 1 << int(rng.integers(8))
        path = tmp_path / f"flipped-{place}.parquet"
        path.write_bytes(bytes(data))
        part = OpenPart(path, None, METRICS)
        found = rows_of(batch_of_table(some) for some in part.tables())
        assert found == truth or part.n_damaged_groups == 1, f"byte {place}"
        path.unlink()


def test_any_damage_is_an_error_we_know_or_no_change(tmp_path: Path) -> None:
    whole = written(tmp_path).read_bytes()
    rng = np.random.default_rng(4)
    path = tmp_path / "cut.parquet"
    for cut in [0, 1, 4, 8, *rng.integers(0, len(whole), 40).tolist()]:
        path.write_bytes(whole[:cut])
        with pytest.raises(READ_ERRORS):
            OpenPart(path, None, METRICS)
    for place in range(len(whole) - 400, len(whole)):  # the footer, which has no checksum
        data = bytearray(whole)
        data[place] ^= 0x55
        path.write_bytes(bytes(data))
        try:
            part = OpenPart(path, None, METRICS)
            part.time_range_ms()
            list(part.tables())
        except READ_ERRORS:
            continue


def test_a_foreign_file_with_our_columns_is_read_and_marked(tmp_path: Path) -> None:
    path = tmp_path / "foreign.parquet"
    times = pd.to_datetime([NOON_MS + 1, NOON_MS], unit="ms", utc=True)
    pd.DataFrame({"server_name": ["b", "a"], "timestamp": times, "load": [1, 2]}).to_parquet(path)
    part = OpenPart(path, None, METRICS)
    assert (part.is_ours, part.time_range_ms()) == (False, None)
    assert rows_of(batch_of_table(some) for some in part.tables()) == {
        ("a", NOON_MS): {"load": 2.0},
        ("b", NOON_MS + 1): {"load": 1.0},
    }


def test_a_newer_format_is_refused_with_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(parts, "FORMAT_VERSION", 2)
        path = written(tmp_path)
    with pytest.raises(NotThisKind, match="format 2 is newer than 1"):
        OpenPart(path, None, METRICS)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts, "fsync_file", no_space)
    with pytest.raises(StorageFull):
        write_part(tmp_path / "part", iter([FLEET]), METRICS, FLEET.schema, 1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageBroken):
        write_part(tmp_path / "missing" / "part", iter([FLEET]), METRICS, FLEET.schema, 1)
