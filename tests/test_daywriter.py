"""Changes to a day: additions, merges, compaction, sealed files; each repeatable, none visible by half."""

from datetime import date
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from buffer_rows import NOON_MS, Key, Values, day_folder, rows_of, rows_of_frame, table

from fleetcast import files
from fleetcast.errors import StorageFull
from fleetcast.storage import writer as writer_module
from fleetcast.storage.days import COLUMNS_FILE, Quarantine, open_day, part_names
from fleetcast.storage.parts import PartName, write_part
from fleetcast.storage.reader import merge_sources
from fleetcast.storage.tables import METRICS, batch_of_table
from fleetcast.storage.writer import DayWriter

DAY = date(2026, 1, 15)


@pytest.fixture
def writer(tmp_path: Path) -> DayWriter:
    return DayWriter(tmp_path, METRICS, Quarantine(tmp_path / "quarantine"))


def content(folder: Path) -> dict[Key, Values]:
    parts = open_day(folder, METRICS, DAY).parts
    return rows_of(batch_of_table(some) for some in merge_sources(parts, [], METRICS))


def by_pandas(folder: Path) -> dict[Key, Values]:
    return rows_of_frame(pd.read_parquet(day_folder(folder)))


def numbers(folder: Path) -> list[int]:
    return [name.number for name in part_names(day_folder(folder))]


def seal(folder: Path, writer: DayWriter) -> None:
    parts = open_day(folder, METRICS, DAY).parts
    (whole,) = merge_sources(parts, [], METRICS)
    path = writer_module.hidden_name(day_folder(folder))
    write_part(path, iter([whole]), METRICS, whole.schema, parts[-1].number, is_sealed=True)
    writer.put_sealed(DAY, path)


def test_new_rows_become_a_part_of_their_own(tmp_path: Path, writer: DayWriter) -> None:
    writer.add(DAY, table(("a", NOON_MS, {"x": 1.0})), 1)
    writer.add(DAY, table(("a", NOON_MS + 1, {"x": 2.0}), ("b", NOON_MS, {"x": 3.0})), 2)
    assert numbers(tmp_path) == [1, 2]
    expected = {("a", NOON_MS): {"x": 1.0}, ("a", NOON_MS + 1): {"x": 2.0}, ("b", NOON_MS): {"x": 3.0}}
    assert content(tmp_path) == by_pandas(tmp_path) == expected


def test_a_segment_that_is_added_again_changes_nothing(tmp_path: Path, writer: DayWriter) -> None:
    rows = table(("a", NOON_MS, {"x": 1.0}))
    writer.add(DAY, rows, 1)
    writer.add(DAY, table(("a", NOON_MS, {"x": 9.0})), 1)
    fresh = DayWriter(tmp_path, METRICS, Quarantine(tmp_path / "quarantine"))
    fresh.add(DAY, rows, 1)
    assert (content(tmp_path), numbers(tmp_path)) == ({("a", NOON_MS): {"x": 1.0}}, [1])


def test_a_known_key_is_merged_where_its_row_is(tmp_path: Path, writer: DayWriter) -> None:
    writer.add(DAY, table(("a", NOON_MS, {"x": 1.0, "y": 1.0}), ("b", NOON_MS, {"x": 1.0})), 1)
    writer.add(DAY, table(("a", NOON_MS, {"x": 5.0, "z": 7.0}), ("c", NOON_MS, {"x": 2.0})), 2)
    expected = {
        ("a", NOON_MS): {"x": 5.0, "y": 1.0, "z": 7.0},
        ("b", NOON_MS): {"x": 1.0},
        ("c", NOON_MS): {"x": 2.0},
    }
    assert content(tmp_path) == by_pandas(tmp_path) == expected
    assert part_names(day_folder(tmp_path)) == [PartName(1, 2), PartName(2, 1)]


def test_a_repetition_of_the_same_values_rewrites_nothing(tmp_path: Path, writer: DayWriter) -> None:
    rows = table(("a", NOON_MS, {"x": 1.0}), ("b", NOON_MS, {}))
    writer.add(DAY, rows, 1)
    before = day_folder(tmp_path).stat().st_ino
    writer.add(DAY, rows, 2)
    writer.add(DAY, table(("a", NOON_MS, {})), 3)
    assert day_folder(tmp_path).stat().st_ino == before
    assert numbers(tmp_path) == [1]


def test_a_new_metric_is_seen_by_pandas_on_the_folder(tmp_path: Path, writer: DayWriter) -> None:
    writer.add(DAY, table(("a", NOON_MS, {"x": 1.0})), 1)
    writer.add(DAY, table(("a", NOON_MS + 1, {"b": 2.0})), 2)
    assert by_pandas(tmp_path) == {("a", NOON_MS): {"x": 1.0}, ("a", NOON_MS + 1): {"b": 2.0}}
    assert list(pd.read_parquet(day_folder(tmp_path)).columns) == ["timestamp", "server_name", "b", "x"]


def test_compaction_makes_one_part_and_keeps_every_row(tmp_path: Path, writer: DayWriter) -> None:
    for number in range(1, 8):
        writer.add(
            DAY, table(("a", NOON_MS + number, {"x": float(number)}), (f"s{number}", NOON_MS, {})), number
        )
    before = content(tmp_path)
    assert writer.compact(DAY)
    assert (numbers(tmp_path), content(tmp_path)) == ([7], before)
    assert by_pandas(tmp_path) == before
    assert writer.compact(DAY) is False


def test_compaction_leaves_a_big_old_part_alone(tmp_path: Path, writer: DayWriter) -> None:
    writer.add(DAY, table(*(("big", NOON_MS + tick, {"x": 1.0}) for tick in range(100))), 1)
    for number in (2, 3, 4):
        writer.add(DAY, table(("a", NOON_MS + number, {"x": 1.0})), number)
    assert writer.compact(DAY)
    assert part_names(day_folder(tmp_path)) == [PartName(1, 100), PartName(4, 3)]


def test_rows_after_the_sealing_stand_beside_the_sealed_rows(tmp_path: Path, writer: DayWriter) -> None:
    writer.add(DAY, table(("a", NOON_MS, {"x": 1.0}), ("b", NOON_MS, {"x": 1.0})), 4)
    seal(tmp_path, writer)
    assert day_folder(tmp_path).is_file()
    assert writer.newest_number() == 4
    writer.add(DAY, table(("a", NOON_MS, {"x": 1.0})), 5)
    assert day_folder(tmp_path).is_file(), "nothing new in it"
    writer.add(DAY, table(("a", NOON_MS, {"x": 2.0}), ("c", NOON_MS, {"y": 3.0})), 6)
    expected = {("a", NOON_MS): {"x": 2.0}, ("b", NOON_MS): {"x": 1.0}, ("c", NOON_MS): {"y": 3.0}}
    assert content(tmp_path) == by_pandas(tmp_path) == expected
    seal(tmp_path, writer)
    assert by_pandas(tmp_path) == expected


def test_a_foreign_day_file_with_our_columns_is_taken_over(tmp_path: Path, writer: DayWriter) -> None:
    times = pd.to_datetime([NOON_MS + 1, NOON_MS], unit="ms", utc=True)
    foreign = pd.DataFrame({"timestamp": times, "server_name": ["b", "a"], "x": pd.array([1, 2], "float32")})
    foreign.to_parquet(day_folder(tmp_path))
    writer.add(DAY, table(("a", NOON_MS, {"x": 9.0}), ("c", NOON_MS, {"x": 3.0})), 1)
    expected = {("a", NOON_MS): {"x": 9.0}, ("b", NOON_MS + 1): {"x": 1.0}, ("c", NOON_MS): {"x": 3.0}}
    assert content(tmp_path) == by_pandas(tmp_path) == expected


def test_a_foreign_file_whose_names_are_numbers_stops_no_write(tmp_path: Path, writer: DayWriter) -> None:
    writer.add(DAY, table(("a", NOON_MS, {"x": 1.0})), 1)
    times = pd.to_datetime([NOON_MS, NOON_MS + 1], unit="ms", utc=True)
    foreign = pd.DataFrame({"timestamp": times, "server_name": [7, 8], "x": [1.0, 2.0]})
    foreign.to_parquet(day_folder(tmp_path) / PartName(2, 2).text)
    writer.add(DAY, table(("a", NOON_MS, {"x": 9.0}), ("c", NOON_MS, {"x": 3.0})), 3)
    seal(tmp_path, writer)
    assert {("a", NOON_MS), ("c", NOON_MS)} <= content(tmp_path).keys()


@pytest.mark.parametrize("junk", [b"", b"not parquet"])
def test_a_junk_day_file_makes_way_and_is_kept_aside(tmp_path: Path, writer: DayWriter, junk: bytes) -> None:
    day_folder(tmp_path).write_bytes(junk)
    writer.add(DAY, table(("a", NOON_MS, {"x": 1.0})), 1)
    assert by_pandas(tmp_path) == {("a", NOON_MS): {"x": 1.0}}
    (kept,) = (tmp_path / "quarantine").iterdir()
    assert kept.read_bytes() == junk


def test_junk_in_a_day_is_moved_aside_at_the_next_change_of_the_whole(
    tmp_path: Path, writer: DayWriter
) -> None:
    for number in (1, 2, 3):
        writer.add(DAY, table(("a", NOON_MS + number, {"x": 1.0})), number)
    damaged = day_folder(tmp_path) / PartName(2, 1).text
    damaged.write_bytes(b"no parquet any more")
    (day_folder(tmp_path) / "notes.txt").write_text("foreign")
    assert writer.compact(DAY)
    assert content(tmp_path) == {("a", NOON_MS + 1): {"x": 1.0}, ("a", NOON_MS + 3): {"x": 1.0}}
    kept = sorted(path.read_bytes() for path in (tmp_path / "quarantine").iterdir())
    assert kept == [b"foreign", b"no parquet any more"]


def test_a_removed_day_is_gone(tmp_path: Path, writer: DayWriter) -> None:
    writer.add(DAY, table(("a", NOON_MS, {"x": 1.0})), 1)
    writer.remove(DAY)
    assert list(tmp_path.glob("*metrics*")) == []


def test_recovery_removes_what_was_half_built(tmp_path: Path, writer: DayWriter) -> None:
    writer.add(DAY, table(("a", NOON_MS, {"x": 1.0})), 1)
    built = writer_module.hidden_name(day_folder(tmp_path))
    built.mkdir()
    (built / "part-000000000009-1.parquet").write_bytes(b"half")
    (day_folder(tmp_path) / f".part{files.TEMP_MARK}1234").write_bytes(b"half")
    writer.recover()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics_2026-01-15.parquet"]
    assert sorted(path.name for path in day_folder(tmp_path).iterdir()) == [COLUMNS_FILE, PartName(1, 1).text]


def test_recovery_puts_back_a_day_that_a_swap_without_exchange_left_aside(
    tmp_path: Path, writer: DayWriter
) -> None:
    writer.add(DAY, table(("a", NOON_MS, {"x": 1.0})), 1)
    before = content(tmp_path)
    day_folder(tmp_path).rename(files.temp_beside(day_folder(tmp_path)))
    writer.recover()
    assert content(tmp_path) == before


def test_where_links_are_not_possible_parts_are_copied(
    tmp_path: Path, writer: DayWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_paths: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(writer_module.os, "link", no_links)
    writer.add(DAY, table(("a", NOON_MS, {"x": 1.0})), 1)
    writer.add(DAY, table(("b", NOON_MS, {"x": 1.0})), 2)
    writer.add(DAY, table(("a", NOON_MS, {"x": 2.0})), 3)
    assert content(tmp_path) == {("a", NOON_MS): {"x": 2.0}, ("b", NOON_MS): {"x": 1.0}}


def test_a_full_disk_while_building_leaves_the_day_as_it_was(
    tmp_path: Path, writer: DayWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.add(DAY, table(("a", NOON_MS, {"x": 1.0})), 1)

    def no_space(*_args: object, **_kwargs: object) -> int:
        raise StorageFull("no space")

    with monkeypatch.context() as full:
        full.setattr(writer_module, "write_part", no_space)
        with pytest.raises(StorageFull):
            writer.add(DAY, table(("a", NOON_MS, {"x": 2.0})), 2)
    assert content(tmp_path) == {("a", NOON_MS): {"x": 1.0}}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics_2026-01-15.parquet"]
    writer.add(DAY, table(("a", NOON_MS, {"x": 2.0})), 2)
    assert content(tmp_path) == {("a", NOON_MS): {"x": 2.0}}


def test_parts_of_other_hours_and_servers_are_not_even_opened(
    tmp_path: Path, writer: DayWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.add(DAY, table(("a", NOON_MS, {"x": 1.0})), 1)
    writer.add(DAY, table(("a", NOON_MS + 10, {"x": 1.0}), ("b", NOON_MS + 10, {"x": 1.0})), 2)
    opened: list[pa.Table] = []
    real = DayWriter._known_rows
    monkeypatch.setattr(DayWriter, "_known_rows", lambda *args: (opened.append(args), real(*args))[1])
    writer.add(DAY, table(("c", NOON_MS, {"x": 1.0})), 3)
    writer.add(DAY, table(("a", NOON_MS + 20, {"x": 1.0})), 4)
    assert opened == []
