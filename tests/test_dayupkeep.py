"""When days are compacted, sealed and deleted."""

import dataclasses
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from buffer_rows import DAY_MS, NOON_MS, day_folder, table

from fleetcast.settings import BufferSettings
from fleetcast.storage import retention, upkeep
from fleetcast.storage.days import Quarantine, day_path, folder_bytes, list_days, part_names
from fleetcast.storage.retention import Retention
from fleetcast.storage.tables import BINS, METRICS
from fleetcast.storage.upkeep import DayUpkeep, UpkeepPace
from fleetcast.storage.writer import DayWriter, no_step

DAY = date(2026, 1, 15)
DAY_END = datetime(2026, 1, 16, tzinfo=UTC)


class Wall:
    """Wall time that tests move by hand."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@dataclasses.dataclass
class Place:
    """One folder with its writer and upkeep."""

    folder: Path
    writer: DayWriter
    upkeep: DayUpkeep
    wall: Wall
    n_added: int = 0

    def add(self, server: str = "a", day: int = 0) -> None:
        self.n_added += 1
        row = (server, NOON_MS + day * DAY_MS + self.n_added, {"x": 1.0})
        self.writer.add(DAY + timedelta(days=day), table(row), self.n_added)
        self.upkeep.note_change(DAY + timedelta(days=day))

    def run(self, now: datetime, *, expires: bool = False) -> None:
        self.upkeep.run(now, expires=expires)


class InstantSeal:
    """Seals when its result is taken, in this process."""

    started: list["InstantSeal"] = []  # noqa: RUF012 (tests look at it)
    fails = False
    is_running = False

    def __init__(self, folder: Path, kind_name: str, day: date, target: Path, drops: upkeep.Drops) -> None:
        self.day = day
        self.started_at = upkeep.monotonic()
        self._call: Callable[[], upkeep.Sealed] = lambda: upkeep.seal(folder, kind_name, day, target, drops)
        InstantSeal.started.append(self)

    def result(self) -> upkeep.Sealed | None:
        return None if InstantSeal.fails else self._call()

    def stop(self) -> None:
        """Nothing runs."""


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Wall:
    clock = Wall()
    monkeypatch.setattr(upkeep, "monotonic", clock)
    monkeypatch.setattr(upkeep, "SealProcess", InstantSeal)
    monkeypatch.setattr(InstantSeal, "started", [])
    monkeypatch.setattr(InstantSeal, "fails", False)
    return clock


@pytest.fixture
def make(tmp_path: Path, wall: Wall, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Place]:
    def build(**settings: int) -> Place:
        limits = Retention(tmp_path_factory.mktemp("state"), BufferSettings(**settings))
        limits._put_in_force()  # as if it had been so for long
        writer = DayWriter(tmp_path, METRICS, Quarantine(tmp_path / "quarantine"))
        expiry = partial(limits.expiry, tmp_path, METRICS)
        upkeep = DayUpkeep(tmp_path, writer, METRICS, expiry, UpkeepPace(), lambda: None, no_step)
        upkeep.load()
        return Place(tmp_path, writer, upkeep, wall)

    return build


def test_sixty_parts_are_compacted_at_once_fewer_after_an_hour(make: Callable[..., Place]) -> None:
    place = make()
    for _ in range(59):
        place.add()
    place.run(DAY_END)
    assert len(part_names(day_folder(place.folder))) == 59
    place.add()
    place.run(DAY_END)
    assert len(part_names(day_folder(place.folder))) == 1
    place.add()
    place.add()
    place.wall.seconds += 3599
    place.run(DAY_END)
    assert len(part_names(day_folder(place.folder))) == 3
    place.wall.seconds += 1
    place.run(DAY_END)
    assert [name.n_rows for name in part_names(day_folder(place.folder))] == [60, 2]


def test_a_day_is_sealed_when_it_is_over_for_ten_minutes_and_quiet_for_one(
    make: Callable[..., Place],
) -> None:
    place = make()
    place.add()
    place.wall.seconds += 59
    place.run(DAY_END + timedelta(minutes=11))
    assert InstantSeal.started == [], "rows came just now"
    place.wall.seconds += 1
    place.run(DAY_END + timedelta(minutes=9, seconds=59))
    assert InstantSeal.started == [], "late rows may come"
    place.run(DAY_END + timedelta(minutes=10))
    assert [process.day for process in InstantSeal.started] == [DAY]
    assert day_folder(place.folder).is_dir()
    place.run(DAY_END + timedelta(minutes=10))
    assert day_folder(place.folder).is_file()
    place.run(DAY_END + timedelta(minutes=10))
    assert len(InstantSeal.started) == 1


def test_days_are_sealed_one_at_a_time_the_oldest_first(make: Callable[..., Place]) -> None:
    place = make()
    for day in (1, 0, 2):
        place.add(day=day)
    place.wall.seconds += 60
    for _ in range(8):
        place.run(DAY_END + timedelta(days=1, hours=1))
    assert [process.day for process in InstantSeal.started] == [DAY, DAY + timedelta(days=1)]


def test_rows_that_come_during_the_sealing_are_not_lost(make: Callable[..., Place]) -> None:
    place = make()
    place.add()
    place.wall.seconds += 60
    place.run(DAY_END + timedelta(hours=1))
    place.writer.add(DAY, table(("a", NOON_MS + 1, {"x": 9.0})), 50)  # a known key: no new part
    place.upkeep.note_change(DAY)
    place.run(DAY_END + timedelta(hours=1))
    assert day_folder(place.folder).is_dir(), "the finished file lacks them"
    place.wall.seconds += 600
    for _ in range(2):
        place.run(DAY_END + timedelta(hours=1))
    assert day_folder(place.folder).is_file()
    assert [path.name for path in place.folder.iterdir()] == ["metrics_2026-01-15.parquet"]


def test_late_rows_open_a_sealed_day_again_and_it_is_sealed_again(make: Callable[..., Place]) -> None:
    place = make()
    place.add()
    place.wall.seconds += 60
    for _ in range(2):
        place.run(DAY_END + timedelta(hours=1))
    place.add("late")
    assert day_folder(place.folder).is_dir()
    place.wall.seconds += 60
    for _ in range(2):
        place.run(DAY_END + timedelta(hours=2))
    assert day_folder(place.folder).is_file()


def test_a_sealing_that_fails_is_tried_again_after_ten_minutes(make: Callable[..., Place]) -> None:
    place = make()
    place.add()
    place.wall.seconds += 60
    InstantSeal.fails = True
    for _ in range(5):
        place.run(DAY_END + timedelta(hours=1))
    assert len(InstantSeal.started) == 1
    InstantSeal.fails = False
    place.wall.seconds += 600
    for _ in range(2):
        place.run(DAY_END + timedelta(hours=1))
    assert day_folder(place.folder).is_file()


def test_a_restart_takes_open_days_up_again(make: Callable[..., Place]) -> None:
    make().add()
    place = make()
    place.wall.seconds += 60
    for _ in range(2):
        place.run(DAY_END + timedelta(hours=1))
    assert day_folder(place.folder).is_file()


def test_days_older_than_the_retention_go(make: Callable[..., Place]) -> None:
    place = make(retention_days=2)
    for day in range(5):
        place.add(day=day)
    place.run(DAY_END + timedelta(days=4))
    assert len(list_days(place.folder, METRICS)) == 5, "nothing expires under the data clock"
    place.run(DAY_END + timedelta(days=4), expires=True)
    assert list_days(place.folder, METRICS) == [DAY + timedelta(days=day) for day in (3, 4)]


def test_expiry_is_looked_at_once_a_minute(make: Callable[..., Place]) -> None:
    place = make(retention_days=1)
    place.run(DAY_END, expires=True)
    place.add()
    place.wall.seconds += 59
    place.run(DAY_END + timedelta(days=5), expires=True)
    assert len(list_days(place.folder, METRICS)) == 1
    place.wall.seconds += 1
    place.run(DAY_END + timedelta(days=5), expires=True)
    assert list_days(place.folder, METRICS) == []


def test_a_limit_on_bytes_deletes_the_oldest_days_but_never_the_newest(
    make: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make(retention_max_mb=2)
    for day in range(3):
        place.add(day=day)
    sizes = {DAY: 900_000, DAY + timedelta(days=1): 800_000, DAY + timedelta(days=2): 1_000_000}
    by_path = {place.writer.path(day): size for day, size in sizes.items()}
    by_path[day_path(place.folder, BINS, DAY + timedelta(days=1))] = 100_000
    monkeypatch.setattr(retention, "folder_bytes", lambda path: by_path.get(path, 0))
    place.run(DAY_END + timedelta(days=2), expires=True)
    assert list_days(place.folder, METRICS) == [DAY + timedelta(days=1), DAY + timedelta(days=2)]
    by_path[place.writer.path(DAY + timedelta(days=2))] = 9_000_000
    place.wall.seconds += 60
    place.run(DAY_END + timedelta(days=2), expires=True)
    assert list_days(place.folder, METRICS) == [DAY + timedelta(days=2)]
    assert folder_bytes(place.folder / "missing") == 0


def test_a_day_that_expires_while_it_is_sealed_stays_gone(make: Callable[..., Place]) -> None:
    place = make(retention_days=1)
    place.add()
    place.wall.seconds += 60
    place.run(DAY_END + timedelta(hours=1))
    assert len(InstantSeal.started) == 1
    place.upkeep._expire(DAY_END + timedelta(days=9))
    place.run(DAY_END + timedelta(days=9))
    assert list(place.folder.iterdir()) == []
    place.upkeep.stop()
