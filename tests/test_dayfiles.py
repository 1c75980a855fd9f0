"""Names of day files, and snapshots of a day that its writer swaps all the time."""

import os
import threading
from datetime import date
from pathlib import Path

import pytest
from buffer_rows import DAY_MS, NOON_MS, day_folder, table

from fleetcast.files import exchange, remove_leftover
from fleetcast.storage.days import (
    day_of_ms,
    day_path,
    day_start_ms,
    folder_bytes,
    is_own_file,
    list_days,
    open_day,
    part_names,
    split_by_day,
)
from fleetcast.storage.parts import PartName, write_part
from fleetcast.storage.tables import METRICS, PREDICTIONS, batch_of_table, times_ms

DAY = date(2026, 1, 15)


def put_part(folder: Path, number: int, server: str, n_rows: int = 1) -> None:
    rows = table(*((server, NOON_MS + place, {"load": float(number)}) for place in range(n_rows)))
    write_part(folder / PartName(number, len(rows)).text, iter([rows]), METRICS, rows.schema, number)


def test_days_are_utc_days() -> None:
    assert day_of_ms(NOON_MS) == DAY
    assert day_of_ms(-1) == date(1969, 12, 31)
    assert day_start_ms(DAY) == NOON_MS - DAY_MS // 2
    assert day_path(Path("b"), METRICS, DAY) == Path("b/metrics_2026-01-15.parquet")


def test_only_real_days_of_the_kind_are_listed(tmp_path: Path) -> None:
    for name in (
        "metrics_2026-01-15.parquet",
        "metrics_2025-12-31.parquet",
        "metrics_2026-02-30.parquet",
        "metrics_2026-1-5.parquet",
        "predictions_2026-01-14.parquet",
        ".metrics_2026-01-13.parquet.new-1234",
        "metrics_2026-01-12.parquet.bak",
        "notes.txt",
    ):
        (tmp_path / name).touch()
    assert list_days(tmp_path, METRICS) == [date(2025, 12, 31), DAY]
    assert list_days(tmp_path, PREDICTIONS) == [date(2026, 1, 14)]
    assert list_days(tmp_path / "missing", METRICS) == []


def test_rows_are_split_by_their_own_day() -> None:
    rows = table(
        ("a", NOON_MS - DAY_MS, {}), ("a", NOON_MS, {}), ("b", NOON_MS, {}), ("b", NOON_MS + DAY_MS, {})
    )
    split = split_by_day(rows, METRICS)
    assert {day: len(some) for day, some in split.items()} == {
        date(2026, 1, 14): 1,
        DAY: 2,
        date(2026, 1, 16): 1,
    }
    assert split_by_day(rows.slice(0, 0), METRICS) == {}


def test_a_missing_day_has_no_parts(tmp_path: Path) -> None:
    snapshot = open_day(tmp_path, METRICS, DAY)
    assert (snapshot.parts, snapshot.n_rows, snapshot.damaged) == ([], 0, ())


def test_a_day_may_be_a_folder_or_a_file(tmp_path: Path) -> None:
    path = day_folder(tmp_path)
    path.mkdir()
    put_part(path, 1, "a")
    put_part(path, 2, "b", 2)
    folder = open_day(tmp_path, METRICS, DAY)
    assert ([part.number for part in folder.parts], folder.n_rows, folder.is_sealed) == ([1, 2], 3, False)
    remove_leftover(path)
    rows = table(("a", NOON_MS, {}))
    write_part(path, iter([rows]), METRICS, rows.schema, 2, is_sealed=True)
    sealed = open_day(tmp_path, METRICS, DAY)
    assert ([part.number for part in sealed.parts], sealed.n_rows, sealed.is_sealed) == ([2], 1, True)
    assert folder_bytes(path) == path.stat().st_size


def test_damaged_files_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    path = day_folder(tmp_path)
    path.mkdir()
    put_part(path, 1, "a")
    (path / "part-000000000002-5.parquet").write_bytes(b"")
    (path / "part-000000000003-5.parquet").write_bytes(b"PAR1 nothing of it PAR1")
    (path / "README").write_text("foreign")
    snapshot = open_day(tmp_path, METRICS, DAY)
    assert [part.number for part in snapshot.parts] == [1]
    assert snapshot.damaged == ("part-000000000002-5.parquet", "part-000000000003-5.parquet")
    assert [
        is_own_file(name) for name in ("README", "part-000000000001-1.parquet", "00-columns.parquet")
    ] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("content", [b"", b"text", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_foreign_day_file_is_damaged_not_fatal(tmp_path: Path, content: bytes) -> None:
    day_folder(tmp_path).write_bytes(content)
    snapshot = open_day(tmp_path, METRICS, DAY)
    assert (snapshot.parts, snapshot.damaged) == ([], ("metrics_2026-01-15.parquet",))


def test_a_snapshot_is_one_version_of_the_day_however_often_it_is_swapped(tmp_path: Path) -> None:
    """Given a writer that swaps two versions of a day (3 parts or 1) and deletes what it replaced,
    then each of many snapshots is exactly one version, read to the end."""
    path = day_folder(tmp_path)
    path.mkdir()
    put_part(path, 1, "a", 6)
    stop = threading.Event()
    swaps = [0]

    def swap() -> None:
        while not stop.is_set():
            built = tmp_path / f".metrics_2026-01-15.parquet.new-{swaps[0]}"
            built.mkdir()
            if swaps[0] % 2:
                put_part(built, 1, "a", 6)
            else:
                for number, n_rows in ((2, 1), (3, 2), (4, 3)):
                    put_part(built, number, f"s{number}", n_rows)
            exchange(built, path)
            remove_leftover(built)
            swaps[0] += 1

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        seen = set()
        reads = 0
        while reads < 150 or swaps[0] <= 10:
            reads += 1
            parts = open_day(tmp_path, METRICS, DAY).parts
            n_rows = sum(len(times_ms(some, "timestamp")) for part in parts for some in part.tables())
            seen.add((tuple(part.number for part in parts), n_rows))
    finally:
        stop.set()
        thread.join()
    assert seen <= {((1,), 6), ((2, 3, 4), 6)}


def test_part_names_of_a_file_or_nothing_are_none(tmp_path: Path) -> None:
    day_folder(tmp_path).write_bytes(b"")
    assert part_names(day_folder(tmp_path)) == []
    assert part_names(tmp_path / "missing") == []
    assert batch_of_table(table()).server_names == ()


def test_a_pipe_in_the_place_of_a_day_or_a_part_costs_itself_only(tmp_path: Path) -> None:
    folder = day_folder(tmp_path)
    folder.mkdir()
    put_part(folder, 1, "web-1")
    os.mkfifo(folder / "part-000000000009-1.parquet")
    snapshot = open_day(tmp_path, METRICS, DAY)
    assert (snapshot.n_rows, snapshot.damaged) == (1, ("part-000000000009-1.parquet",))
    os.mkfifo(tmp_path / "metrics_2001-01-01.parquet")
    assert open_day(tmp_path, METRICS, date(2001, 1, 1)).damaged == ("metrics_2001-01-01.parquet",)
