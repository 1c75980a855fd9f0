"""Reading parts and log together: everything once, in order, in bounded pieces."""

from datetime import date
from pathlib import Path

import numpy as np
import pytest
from buffer_rows import DAY_MS, NOON_MS, Key, Values, batch, day_folder, one_segment, rows_of, table

from fleetcast.settings import BufferSettings
from fleetcast.storage import parts
from fleetcast.storage import reader as reader_module
from fleetcast.storage.daystore import DayStore
from fleetcast.storage.parts import OpenPart, PartName, write_part
from fleetcast.storage.reader import DayReader, LogRows, merge_sources
from fleetcast.storage.tables import METRICS, batch_of_table, codes_of, table_of_batch

DAY = date(2026, 1, 15)


@pytest.fixture
def store(tmp_path: Path) -> DayStore:
    opened = DayStore(tmp_path, METRICS, BufferSettings())
    opened.open()
    return opened


@pytest.fixture
def reader(tmp_path: Path) -> DayReader:
    return DayReader(tmp_path, METRICS)


def append(store: DayStore, *rows: tuple[str, int, Values]) -> None:
    store.append(table_of_batch(batch(rows)))


def read(reader: DayReader, start: int = 0, end: int = 2**45, **options: object) -> dict[Key, Values]:
    found = reader.read(start, end, **options)  # type: ignore[arg-type]
    return rows_of(batch_of_table(one) for _, one in found)


def test_an_empty_or_missing_folder_reads_as_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        reader = DayReader(folder, METRICS)
        assert (read(reader), reader.newest_ms(), reader.oldest_ms()) == ({}, None, None)
        assert reader.metric_names(0, 2**45) == []


def test_the_end_of_a_span_is_not_in_it(store: DayStore, reader: DayReader) -> None:
    append(store, *(("a", NOON_MS + tick, {"x": 1.0}) for tick in range(4)))
    for _ in range(2):
        assert read(reader, NOON_MS + 1, NOON_MS + 3).keys() == {("a", NOON_MS + 1), ("a", NOON_MS + 2)}
        assert read(reader, NOON_MS, NOON_MS) == {}
        store.flush()


def test_days_come_in_order_sorted_inside(store: DayStore, reader: DayReader) -> None:
    for day in (2, 0, 1):
        append(
            store, ("b", NOON_MS + day * DAY_MS, {"x": 1.0}), ("a", NOON_MS + day * DAY_MS + 1, {"x": 1.0})
        )
        if day:
            store.flush()
    found = [(day, batch_of_table(one)) for day, one in reader.read(0, 2**45)]
    assert [day.day for day, _ in found] == [15, 16, 17]
    for _, one in found:
        assert [one.server_names[code] for code in one.server_codes] == ["a", "b"]


def test_only_the_metrics_asked_for_are_read(store: DayStore, reader: DayReader) -> None:
    append(store, ("a", NOON_MS, {"x": 1.0, "y": 2.0}))
    for _ in range(2):
        assert read(reader, columns=["y"]) == {("a", NOON_MS): {"y": 2.0}}
        assert read(reader, columns=[]) == {("a", NOON_MS): {}}
        store.flush()
    assert reader.metric_names(0, 2**45) == ["x", "y"]
    assert reader.metric_names(0, NOON_MS - DAY_MS) == []


def test_edges_are_those_of_all_rows(store: DayStore, reader: DayReader) -> None:
    append(store, ("a", NOON_MS, {}), ("a", NOON_MS + DAY_MS, {}))
    store.flush()
    append(store, ("a", NOON_MS + 5, {}), ("a", NOON_MS - 5, {}))
    assert (reader.oldest_ms(), reader.newest_ms()) == (NOON_MS - 5, NOON_MS + DAY_MS)
    append(store, ("a", NOON_MS + 9 * DAY_MS, {}))
    assert reader.newest_ms() == NOON_MS + 9 * DAY_MS


def test_a_large_day_comes_in_pieces_of_whole_servers(
    store: DayStore, reader: DayReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_PART_GROUP_ROWS", 7)
    for tick in range(5):
        append(store, *((f"s{n:02d}", NOON_MS + tick, {"x": float(n)}) for n in range(12)))
        if tick < 4:
            store.flush()
    pieces = [batch_of_table(one) for _, one in reader.read(0, 2**45, chunk_rows=20)]
    assert [len(piece) for piece in pieces] == [20, 20, 20]
    servers = [set(piece.server_names) for piece in pieces]
    assert [len(some) for some in servers] == [4, 4, 4]
    assert len(rows_of(pieces)) == 60


def test_one_part_alone_is_cut_between_servers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_PART_GROUP_ROWS", 7)
    rows = table(*((f"s{n}", NOON_MS + tick, {"x": 1.0}) for n in range(3) for tick in range(10)))
    path = tmp_path / PartName(1, len(rows)).text
    write_part(path, iter([rows]), METRICS, rows.schema, 1)
    pieces = list(merge_sources([OpenPart(path, None, METRICS)], [], METRICS))
    assert sum(len(piece) for piece in pieces) == 30
    seen: list[str | None] = []
    for piece in pieces:
        names, codes = codes_of(piece.column("server_name"))
        here = [names[code] for code in np.unique(codes)]
        assert not set(here) & set(seen)
        seen += here


def test_newer_segments_win_over_older_parts_and_older_segments_over_none(tmp_path: Path) -> None:
    """Given a log read before a part of a later segment appeared, then the part's value is newer."""
    rows = table(("a", NOON_MS, {"x": 5.0}))
    path = tmp_path / PartName(5, 1).text
    write_part(path, iter([rows]), METRICS, rows.schema, 5)
    part = OpenPart(path, PartName(5, 1), METRICS)
    for number, winner in ((4, 5.0), (5, 9.0), (6, 9.0)):
        log = [LogRows(number, table(("a", NOON_MS, {"x": 9.0})))]
        assert rows_of(map(batch_of_table, merge_sources([part], log, METRICS))) == {
            ("a", NOON_MS): {"x": winner}
        }


def test_a_segment_that_becomes_parts_between_listing_and_reading_is_not_missed(
    store: DayStore, reader: DayReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(store, ("a", NOON_MS, {"x": 1.0}))
    real = reader_module.segments

    def flushed_meanwhile(folder: Path) -> object:
        listed = real(folder)
        monkeypatch.setattr(reader_module, "segments", real)
        store.flush()
        return listed

    monkeypatch.setattr(reader_module, "segments", flushed_meanwhile)
    assert read(reader) == {("a", NOON_MS): {"x": 1.0}}


def test_a_part_published_while_its_segment_still_stands_is_not_doubled(
    store: DayStore, reader: DayReader, tmp_path: Path
) -> None:
    append(store, ("a", NOON_MS, {"x": 1.0}))
    segment = one_segment(tmp_path)
    kept = segment.read_bytes()
    store.flush()
    segment.write_bytes(kept)
    assert read(reader) == {("a", NOON_MS): {"x": 1.0}}


def test_damage_costs_its_rows_only_and_no_error(store: DayStore, reader: DayReader, tmp_path: Path) -> None:
    for tick in range(3):
        append(store, ("a", NOON_MS + tick, {"x": 1.0}), ("a", NOON_MS + tick + DAY_MS, {"x": 1.0}))
        store.flush()
    (day_folder(tmp_path) / PartName(2, 1).text).write_bytes(b"")
    (tmp_path / "metrics_2026-01-17.parquet").write_bytes(b"foreign")
    (tmp_path / "metrics_2026-01-18.parquet").mkdir()
    assert len(read(reader)) == 5
    assert reader.newest_ms() == NOON_MS + 2 + DAY_MS


def test_one_server_is_read_from_parts_and_log_and_newer_rows_win(store: DayStore, reader: DayReader) -> None:
    append(store, ("a", NOON_MS, {"x": 1.0}), ("b", NOON_MS, {"x": 2.0}), ("b", NOON_MS + DAY_MS, {"x": 3.0}))
    store.flush()
    append(store, ("b", NOON_MS, {"y": 5.0}), ("b", NOON_MS + 1, {"x": 4.0}), ("c", NOON_MS, {"x": 9.0}))
    for _ in range(2):
        found = rows_of([batch_of_table(reader.read_server("b", NOON_MS, NOON_MS + DAY_MS))])
        assert found == {("b", NOON_MS): {"x": 2.0, "y": 5.0}, ("b", NOON_MS + 1): {"x": 4.0}}
        narrow = rows_of([batch_of_table(reader.read_server("b", NOON_MS, NOON_MS + 1, ["y"]))])
        assert narrow == {("b", NOON_MS): {"y": 5.0}}
        assert len(reader.read_server("nowhere", 0, 2**45)) == 0
        store.flush()


def test_only_the_row_groups_of_the_server_asked_for_are_read(
    tmp_path: Path, reader: DayReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_PART_GROUP_ROWS", 10)
    rows = [
        (f"s{number:02}", NOON_MS + tick, {"x": float(number)}) for number in range(20) for tick in range(10)
    ]
    folder = day_folder(tmp_path)
    folder.mkdir()
    write_part(folder / PartName(1, 200).text, iter([table(*rows)]), METRICS, table(*rows).schema, 1)
    read_groups: list[int] = []
    tables = OpenPart.tables

    def count(part: OpenPart, columns: object = None, groups: list[int] | None = None) -> object:
        read_groups.extend(groups or [])
        return tables(part, columns, groups)  # type: ignore[arg-type]

    monkeypatch.setattr(OpenPart, "tables", count)
    assert len(reader.read_server("s07", 0, 2**45)) == 10
    assert read_groups == [7]
