"""Archived months: one file in the place of its days, the same for every reader, whatever crashes."""

import shutil
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from buffer_rows import DAY_MS, batch, rows_of

from data_buffer import DataBuffer
from fleetcast.clock import monotonic
from fleetcast.errors import CorruptFile
from fleetcast.settings import BufferSettings
from fleetcast.storage import retention, upkeep
from fleetcast.storage.bin_days import make_bins
from fleetcast.storage.days import Days, day_path, day_start_ms, list_days, list_months, month_path
from fleetcast.storage.parts import write_month
from fleetcast.storage.tables import BINS, METRICS
from fleetcast.storage.upkeep import UpkeepPace

JANUARY = date(2026, 1, 1)
DAYS = [date(2026, 1, 29) + timedelta(days=number) for number in range(4)]  # two of each month
OLD_ENOUGH = datetime(2026, 2, 9, 1, tzinfo=UTC)  # for January, a week after its end
BIN_MS = 3_600_000
END_MS = 2**45


class Crash(BaseException):
    """The process ends here."""


class Here:
    """What a child does, in this process."""

    is_running = False

    def __init__(self, folder: Path, task: str, day: date, target: Path, drops: Any = None) -> None:
        self.day, self.target, self.drops = day, target, drops or {}
        self.started_at = monotonic()
        self.answer: Any = self.work(folder, task)

    def work(self, folder: Path, task: str) -> Any:
        """Do it."""

    def result(self) -> Any:
        return self.answer

    def stop(self) -> None:
        self.target.unlink(missing_ok=True)


class SealHere(Here):
    def work(self, folder: Path, task: str) -> Any:
        return upkeep.seal(folder, task, self.day, self.target, self.drops)


class MeansHere(Here):
    def work(self, folder: Path, task: str) -> Any:
        make_bins(folder, self.day, int(task.removeprefix("bins-")), self.target)

    def publish(self, path: Path) -> str:
        self.target.replace(path)
        return ""


class ArchiveHere(Here):
    def work(self, folder: Path, task: str) -> Any:
        try:
            return retention.archive(folder, self.day, self.target, self.drops)
        except CorruptFile:
            self.target.unlink(missing_ok=True)
            return None


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "SealProcess", SealHere)
    monkeypatch.setattr(upkeep, "BinsProcess", MeansHere)
    monkeypatch.setattr(retention, "ArchiveProcess", ArchiveHere)


def open_buffer(
    folder: Path,
    on_step: Callable[[str], None] = lambda _step: None,
    *,
    expire: bool = False,
    **settings: int,
) -> DataBuffer:
    pace = UpkeepPace(seal_quiet_s=0.0, archive_interval_s=0.0, expire_interval_s=0.0, bin_ms=BIN_MS)
    wanted = BufferSettings(**{"archive_after_days": 7, **settings})
    return DataBuffer(folder, settings=wanted, expire=expire, pace=pace, on_step=on_step).open()


def rows_of_day(day: date, *servers: str) -> list[tuple[str, int, dict[str, float]]]:
    start = day_start_ms(day)
    return [
        (server, start + hour * BIN_MS // 2, {"cpu_pct": place + hour / 4, f"only_{day.day}": -0.0})
        for place, server in enumerate(servers)
        for hour in range(40)
    ]


def fill(buffer: DataBuffer, *servers: str) -> None:
    for day in DAYS:
        buffer.append_batch(batch(rows_of_day(day, *servers)))
        buffer.flush()


def rounds(buffer: DataBuffer, now: datetime = OLD_ENOUGH, number: int = 16) -> None:
    for _ in range(number):
        buffer.maintain(now)


def seen(folder: Path) -> dict[str, Any]:
    """Return what every reader shows of the folder."""
    reader = DataBuffer(folder)
    export = folder.parent / "export.parquet"
    reader.export_training_data(export, 60, until=OLD_ENOUGH)
    raw = rows_of(reader.iter_batches(0, END_MS))
    frame = pd.read_parquet(export)
    means = rows_of(reader.iter_bins(0, END_MS, BIN_MS))
    reader.export_training_data(export, 60, BIN_MS / 1000, until=OLD_ENOUGH)
    newest = [reader.read_newest(day_start_ms(day), day_start_ms(day) + DAY_MS, BIN_MS) for day in DAYS]
    return {
        "rows": raw,
        "by_bins": rows_of(reader.iter_by_bins(0, END_MS, BIN_MS)) == raw,
        "means": means,
        "newest": [None if some is None else rows_of([some]) for some in newest],
        "server": rows_of([reader.read_server("b", 0, END_MS, ["cpu_pct"])]),
        "part": rows_of(reader.iter_batches(day_start_ms(DAYS[0]) + 7 * BIN_MS, day_start_ms(DAYS[3]))),
        "export": frame.to_csv(),
        "export_means": pd.read_parquet(export).to_csv(),
        "metrics": reader.metric_names(),
        "edges": (reader.oldest_record_time(), reader.newest_record_time(), reader.first_day()),
        "names": reader.newest_names(30),
        "records": reader.get_stats()["total_records"],
        "dates": reader.get_stats()["date_range"],
    }


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A buffer of four sealed days with their means, of which no month is archived."""
    folder = tmp_path / "buffer"
    buffer = open_buffer(folder, archive_after_days=0)
    fill(buffer, "a", "b", "c")
    rounds(buffer)
    buffer.close()
    assert list_months(folder, METRICS) == []
    assert all(day_path(folder, METRICS, day).is_file() for day in DAYS)
    return folder


@pytest.fixture
def archived(sealed: Path) -> Path:
    """The same, January archived."""
    buffer = open_buffer(sealed)
    rounds(buffer)
    buffer.close()
    assert own_days(sealed) == DAYS[3:]
    return sealed


def own_days(folder: Path) -> list[date]:
    return [day for day in list_days(folder, METRICS) if day_path(folder, METRICS, day).exists()]


def test_a_month_takes_the_place_of_its_days_and_every_reader_shows_the_same(sealed: Path) -> None:
    before, size = seen(sealed), DataBuffer(sealed).get_stats()["disk_usage_mb"]
    frames = [pd.read_parquet(day_path(sealed, METRICS, day)) for day in DAYS[:3]]
    buffer = open_buffer(sealed)
    rounds(buffer)
    assert seen(sealed) == before
    assert seen(sealed)["by_bins"] and all(before["newest"]), "kept means serve as before"
    assert own_days(sealed) == DAYS[3:]
    assert list_months(sealed, METRICS) == [JANUARY]
    stats = buffer.get_stats()
    assert (stats["file_count"], stats["disk_usage_mb"] <= size) == (2, True)
    month = pd.read_parquet(month_path(sealed, METRICS, JANUARY))
    days = pd.concat(frames).sort_values(["server_name", "timestamp"], ignore_index=True)
    pd.testing.assert_frame_equal(month, days[list(month.columns)], check_exact=True)
    assert np.signbit(month["only_30"].dropna()).all(), "-0.0 stays"
    buffer.close()


def test_none_is_archived_by_default_nor_too_early_nor_with_an_open_day(sealed: Path) -> None:
    buffer = open_buffer(sealed, archive_after_days=BufferSettings.archive_after_days)
    rounds(buffer)
    buffer.close()
    buffer = open_buffer(sealed)
    rounds(buffer, OLD_ENOUGH - timedelta(days=1, hours=2))
    assert list_months(sealed, METRICS) == [], "too early"
    buffer.append_batch(batch([("a", day_start_ms(DAYS[0]) + 1, {"cpu_pct": 1.0})]))
    buffer.flush()
    buffer._stores[0]._months.run(OLD_ENOUGH)  # type: ignore[union-attr]
    assert buffer._stores[0]._months._process is None, "a day is open"  # type: ignore[union-attr]
    rounds(buffer)
    assert list_months(sealed, METRICS) == [JANUARY]
    buffer.close()


def test_a_late_row_opens_its_day_again_which_wins_and_is_archived_again(archived: Path) -> None:
    before = seen(archived)["rows"]
    first = day_start_ms(DAYS[1])
    buffer = open_buffer(archived)
    late = [("a", first, {"cpu_pct": 99.0}), ("late", first + 5, {"cpu_pct": 1.0})]
    buffer.append_batch(batch(late))
    expected = {key: dict(values) for key, values in before.items()}
    for server, at, values in late:
        expected.setdefault((server, at), {}).update(values)
    for step in (lambda: None, buffer.flush, lambda: rounds(buffer, number=4), lambda: rounds(buffer)):
        step()
        assert rows_of(DataBuffer(archived).iter_batches(0, END_MS)) == expected
        assert buffer.get_stats()["total_records"] == len(expected)
    assert own_days(archived) == DAYS[3:]
    assert list_days(archived, BINS) == DAYS
    assert len(pd.read_parquet(month_path(archived, METRICS, JANUARY))) == 3 * 3 * 40 + 1
    buffer.close()


def test_a_row_sent_again_opens_no_day(archived: Path) -> None:
    buffer = open_buffer(archived)
    buffer.append_batch(batch(rows_of_day(DAYS[0], "a", "b", "c")))
    buffer.flush()
    assert own_days(archived) == DAYS[3:]
    buffer.close()


def test_a_reader_in_the_middle_of_a_month_sees_its_next_version(archived: Path) -> None:
    opened = Days(archived, METRICS)
    assert opened.open(DAYS[0]).n_rows == 120
    buffer = open_buffer(archived)
    buffer.append_batch(batch([("late", day_start_ms(DAYS[1]), {"cpu_pct": 1.0})]))
    buffer.flush()
    rounds(buffer)
    assert own_days(archived) == DAYS[3:]
    assert opened.open(DAYS[1]).n_rows == 121
    assert sum(map(len, opened.open(DAYS[1]).parts[0].tables())) == 121
    buffer.close()


def test_large_months_are_read_some_days_at_a_time(archived: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = seen(archived)
    monkeypatch.setattr("fleetcast.storage.days._HELD_ROWS", 250)
    assert seen(archived) == before


def lives(tmp_path: Path, start: Path, life: Callable[[DataBuffer], None]) -> "list[tuple[str, Path]]":
    """Return the folder that each crash of a life leaves, with the step that it died at."""

    def run(folder: Path, on_step: Callable[[str], None]) -> None:
        shutil.copytree(start, folder)
        buffer = open_buffer(folder)
        buffer.close()
        buffer = open_buffer(folder, on_step)
        try:
            life(buffer)
        finally:
            buffer._own().lock.release()  # as the kernel does for a killed process

    steps: list[str] = []
    run(tmp_path / "whole", steps.append)
    found = []
    for fatal in range(len(steps)):
        left = [fatal]

        def die(step: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Crash(step)

        folder = tmp_path / str(fatal)
        with pytest.raises(Crash) as crash:
            run(folder, die)
        found.append((str(crash.value), folder))
    return found


def test_a_crash_at_any_step_loses_and_doubles_nothing(tmp_path: Path, sealed: Path) -> None:
    """Given a process that dies at its n-th step while a month is archived, a late row comes and the month is
    archived again, then readers see each acknowledged row once, before and after the restart."""
    before = seen(sealed)["rows"]
    late = {("late", day_start_ms(DAYS[2])): {"cpu_pct": 1.0}}

    def life(buffer: DataBuffer) -> None:
        rounds(buffer)
        buffer.append_batch(batch([(*key, values) for key, values in late.items()]))
        buffer.flush()
        rounds(buffer)

    crashed = lives(tmp_path, sealed, life)
    steps = [step for step, _ in crashed]
    assert steps.count("archive started") == 2
    assert steps.count("archived day removed") == 4
    for number, (step, folder) in enumerate(crashed):
        where = f"{number}: {step}"
        found = rows_of(DataBuffer(folder).iter_batches(0, END_MS))
        has_late = number > steps.index("archived day removed") + 2
        assert found in ([before | late] if has_late else [before, before | late]), where
        buffer = open_buffer(folder)
        rounds(buffer)
        buffer.close()
        assert rows_of(DataBuffer(folder).iter_batches(0, END_MS)) == found, where
        assert own_days(folder) == DAYS[3:], where
        assert [path.name for path in folder.iterdir() if path.name.startswith(".metrics")] == [], where


def test_a_server_is_forgotten_in_months_too_whatever_crashes(tmp_path: Path, archived: Path) -> None:
    """Given a month and a day of it that is open again, then no file has a row of the server, at last."""
    before = rows_of(DataBuffer(archived).iter_batches(0, END_MS))
    buffer = open_buffer(archived, archive_after_days=0)
    buffer.append_batch(batch([("a", day_start_ms(DAYS[1]) + 5, {"cpu_pct": 7.0})]))
    buffer.close()
    kept = {key: values for key, values in before.items() if key[0] != "a"}

    def life(buffer: DataBuffer) -> None:
        until_gone(buffer)

    crashed = lives(tmp_path, archived, life)
    assert "month published" in [step for step, _ in crashed]
    for number, (step, folder) in enumerate([*crashed, ("none", tmp_path / "whole")]):
        where = f"{number}: {step}"
        found = rows_of(DataBuffer(folder).iter_batches(0, END_MS))
        assert {key: values for key, values in found.items() if key[0] != "a"} == kept, where
        buffer = open_buffer(folder)
        until_gone(buffer)
        buffer.close()
        for path in [*folder.glob("metrics_*"), *folder.glob("bins_*")]:
            assert "a" not in set(pd.read_parquet(path).server_name), f"{where}: {path.name}"
        assert rows_of(DataBuffer(folder).iter_batches(0, END_MS)) == kept, where
        assert not DataBuffer(folder).has_server("a")


def until_gone(buffer: DataBuffer) -> None:
    for _ in range(60):
        if buffer.forget({"a": END_MS}, OLD_ENOUGH):
            return
    pytest.fail("some rows are left")


def test_a_month_that_only_held_forgotten_servers_goes(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    fill(buffer, "a")
    rounds(buffer)
    assert list_months(tmp_path, METRICS) == [JANUARY]
    until_gone(buffer)
    assert list(tmp_path.glob("*.parquet")) == []
    buffer.close()


def test_the_means_of_a_month_without_some_servers_are_taken_anew(archived: Path) -> None:
    buffer = open_buffer(archived)
    until_gone(buffer)
    assert list_days(archived, BINS) == DAYS[3:] or list_days(archived, BINS) == []
    rounds(buffer)
    assert list_days(archived, BINS) == DAYS
    reader = DataBuffer(archived)
    kept = [reader.read_newest(day_start_ms(day), day_start_ms(day) + DAY_MS, BIN_MS) for day in DAYS]
    assert all(some is not None and set(some.server_names) == {"b", "c"} for some in kept)
    buffer.close()


def test_a_month_expires_as_a_whole_when_its_newest_day_does(archived: Path) -> None:
    buffer = open_buffer(archived, expire=True, retention_days=60, archive_after_days=0)
    newest = datetime(2026, 1, 31, tzinfo=UTC)
    buffer.maintain(newest + timedelta(days=60, hours=23))
    assert list_days(archived, METRICS) == DAYS
    buffer.maintain(newest + timedelta(days=61))
    assert list_days(archived, METRICS) == DAYS[3:]
    assert list_days(archived, BINS) == DAYS[3:]
    assert list_months(archived, METRICS) == []
    buffer.close()


def test_a_limit_on_bytes_counts_months(archived: Path) -> None:
    found = retention.Retention(archived, BufferSettings(retention_days=3650, retention_max_mb=1))
    found._put_in_force()
    assert found.expiry(archived, METRICS, OLD_ENOUGH) == []
    with month_path(archived, METRICS, JANUARY).open("ab") as stream:
        stream.truncate(2_000_000)
    # a month that cannot be read has no days any more, and stays for a person to look at
    assert found.expiry(archived, METRICS, OLD_ENOUGH) == []


def test_the_oldest_month_goes_when_there_are_too_many_bytes(
    archived: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = retention.Retention(archived, BufferSettings(retention_days=3650, retention_max_mb=1))
    found._put_in_force()
    month = month_path(archived, METRICS, JANUARY)
    monkeypatch.setattr(retention, "folder_bytes", lambda path: 1_500_000 if path == month else 10)
    ((unit, why),) = found.expiry(archived, METRICS, OLD_ENOUGH)
    assert (unit, why) == ((JANUARY, DAYS[:3]), "more bytes than retention_max_mb")


def test_what_does_not_read_back_takes_no_days_place(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(path: Path, tables: Any, *rest: Any) -> int:
        def other() -> Any:
            for table in tables:
                place = table.column_names.index("cpu_pct")
                values = table.column(place).to_numpy().copy()
                values[-1] = np.nextafter(values[-1], 100)
                yield table.set_column(place, "cpu_pct", [values])

        return write_month(path, other(), *rest)

    before = seen(sealed)
    monkeypatch.setattr(retention, "write_month", changed)
    with pytest.raises(CorruptFile, match="does not read back: 0 of 360 rows"):
        retention.archive(sealed, JANUARY, sealed.parent / "target", {})
    buffer = open_buffer(sealed)
    rounds(buffer)
    buffer.close()
    assert (list_months(sealed, METRICS), own_days(sealed), seen(sealed)) == ([], DAYS, before)


def test_a_day_that_changes_while_its_month_is_written_is_not_lost(sealed: Path) -> None:
    buffer = open_buffer(sealed)
    months = buffer._stores[0]._months
    assert months is not None
    months.run(OLD_ENOUGH)
    assert months._process is not None
    buffer.append_batch(batch([("late", day_start_ms(DAYS[0]), {"cpu_pct": 1.0})]))
    buffer.flush()
    months.run(OLD_ENOUGH)
    assert (list_months(sealed, METRICS), len(own_days(sealed))) == ([], 4)
    rounds(buffer)
    assert list_months(sealed, METRICS) == [JANUARY]
    assert ("late", day_start_ms(DAYS[0])) in rows_of(buffer.iter_batches(0, END_MS))
    buffer.close()


def test_a_damaged_day_is_not_archived_and_a_damaged_month_not_replaced(sealed: Path) -> None:
    path = day_path(sealed, METRICS, DAYS[0])
    data = bytearray(path.read_bytes())
    data[200] ^= 255
    path.write_bytes(bytes(data))
    buffer = open_buffer(sealed)
    rounds(buffer)
    assert (list_months(sealed, METRICS), own_days(sealed)) == ([], DAYS)
    buffer.close()
    month_path(sealed, METRICS, JANUARY).write_bytes(b"no parquet")
    with pytest.raises(CorruptFile, match="not a month of ours"):
        retention.archive(sealed, JANUARY, sealed.parent / "target", {})


def test_the_child_archives_and_says_what_it_took_in(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    before = seen(sealed)
    pace = UpkeepPace(seal_quiet_s=0.0, archive_interval_s=0.0)
    buffer = DataBuffer(sealed, settings=BufferSettings(archive_after_days=7), expire=False, pace=pace).open()
    until = time.monotonic() + 60
    while not list_months(sealed, METRICS) and time.monotonic() < until:
        buffer.maintain(OLD_ENOUGH)
        time.sleep(0.05)
    buffer.close()
    assert own_days(sealed) == DAYS[3:]
    assert seen(sealed) == before
