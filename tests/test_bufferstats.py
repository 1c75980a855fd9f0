"""Statistics count rows that readers would see, without reading the days."""

from pathlib import Path

from buffer_rows import DAY_MS, NOON_MS, Values, batch, day_folder

from fleetcast.settings import BufferSettings
from fleetcast.storage import reader
from fleetcast.storage.daystore import DayStore
from fleetcast.storage.parts import OpenPart
from fleetcast.storage.reader import buffer_stats
from fleetcast.storage.tables import METRICS, table_of_batch


def store(folder: Path) -> DayStore:
    opened = DayStore(folder, METRICS, BufferSettings())
    opened.open()
    return opened


def append(to: DayStore, *rows: tuple[str, int, Values]) -> None:
    to.append(table_of_batch(batch(rows)))


def test_a_missing_folder_counts_as_nothing(tmp_path: Path) -> None:
    assert buffer_stats(tmp_path / "missing", METRICS) == {
        "file_count": 0,
        "total_records": 0,
        "date_range": {"start": None, "end": None},
        "disk_usage_mb": 0.0,
    }
    assert list(tmp_path.iterdir()) == []


def test_rows_of_the_log_count_unless_a_part_has_their_key(tmp_path: Path) -> None:
    owner = store(tmp_path)
    append(owner, ("a", NOON_MS, {"x": 1.0}), ("b", NOON_MS, {"x": 1.0}))
    owner.flush()
    append(owner, ("a", NOON_MS, {"x": 2.0}), ("c", NOON_MS, {"x": 1.0}))
    append(owner, ("c", NOON_MS, {"x": 3.0}), ("a", NOON_MS + DAY_MS, {"x": 1.0}))
    before = buffer_stats(tmp_path, METRICS)
    assert (before["file_count"], before["total_records"]) == (1, 4)
    assert before["date_range"] == {"start": "2026-01-15", "end": "2026-01-16"}
    owner.flush()
    after = buffer_stats(tmp_path, METRICS)
    assert (after["file_count"], after["total_records"]) == (2, 4)


def test_days_are_counted_by_names_and_footers(tmp_path: Path, monkeypatch: object) -> None:
    owner = store(tmp_path)
    for day in range(5):
        append(owner, *((f"s{n}", NOON_MS + day * DAY_MS, {"x": 1.0}) for n in range(10)))
        owner.flush()

    def never(*_args: object) -> object:
        raise AssertionError("a day was read")

    monkeypatch.setattr(OpenPart, "tables", never)  # type: ignore[attr-defined]
    assert buffer_stats(tmp_path, METRICS)["total_records"] == 50


def test_bytes_are_those_of_day_files_and_log(tmp_path: Path) -> None:
    owner = store(tmp_path)
    append(owner, *((f"s{n}", NOON_MS, {"x": n / 7}) for n in range(3000)))
    owner.flush()
    append(owner, ("a", NOON_MS + 1, {"x": 1.0}))
    (tmp_path / "someone_elses.bin").write_bytes(bytes(10_000_000))
    files = [*day_folder(tmp_path).iterdir(), *reader.log_folder(tmp_path, METRICS).iterdir()]
    size = sum(path.stat().st_size for path in files)
    assert buffer_stats(tmp_path, METRICS)["disk_usage_mb"] == round(size / 1e6, 2)


def test_an_unreadable_day_counts_no_rows_but_is_there(tmp_path: Path) -> None:
    day_folder(tmp_path).write_bytes(b"junk")
    stats = buffer_stats(tmp_path, METRICS)
    assert (stats["file_count"], stats["total_records"]) == (1, 0)
