"""From the log into days: durable at once, seen once, whatever breaks in between."""

import errno
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from buffer_rows import DAY_MS, NOON_MS, Key, Values, batch, day_folder, one_segment, rows_of, rows_of_frame

from fleetcast import files
from fleetcast.clock import monotonic
from fleetcast.errors import StorageBroken, StorageFull, UnknownFormat
from fleetcast.settings import BufferSettings
from fleetcast.storage import daystore, log, upkeep
from fleetcast.storage import writer as writer_module
from fleetcast.storage.bin_days import lacks_bins, make_bins
from fleetcast.storage.days import day_path, list_days, part_names
from fleetcast.storage.daystore import PART_ROWS, DayStore, publish_after_s
from fleetcast.storage.log import encode_table
from fleetcast.storage.reader import DayReader, log_folder
from fleetcast.storage.tables import BINS, METRICS, batch_of_table, table_of_batch
from fleetcast.storage.upkeep import UpkeepPace

ALWAYS_MS = 2**45
LATER = datetime(2027, 1, 1, tzinfo=UTC)
Rows = dict[Key, Values]


class Crash(BaseException):
    """The process dies here: nothing that cleans up after an `Exception` may run."""


def store(folder: Path, on_step: Callable[[str], None] = writer_module.no_step, **pace: float) -> DayStore:
    opened = DayStore(folder, METRICS, BufferSettings(), UpkeepPace(**pace), on_step)  # type: ignore[arg-type]
    opened.open()
    return opened


def append(to: DayStore, *rows: tuple[str, int, Values]) -> None:
    to.append(table_of_batch(batch(rows)))


def content(folder: Path) -> Rows:
    return rows_of(
        batch_of_table(table) for _, table in DayReader(folder, METRICS).read(-ALWAYS_MS, ALWAYS_MS)
    )


def in_days(folder: Path) -> Rows:
    """Return what pandas finds in the day files, without the log."""
    found: Rows = {}
    for path in sorted(folder.glob("metrics_*.parquet")):
        rows = rows_of_frame(pd.read_parquet(path))
        assert not rows.keys() & found.keys()
        found |= rows
    return found


def test_an_appended_row_is_seen_before_and_after_the_flush(tmp_path: Path) -> None:
    owner = store(tmp_path)
    append(owner, ("a", NOON_MS, {"x": 1.0}), ("b", NOON_MS - DAY_MS, {"x": 2.0}))
    expected = {("a", NOON_MS): {"x": 1.0}, ("b", NOON_MS - DAY_MS): {"x": 2.0}}
    assert (content(tmp_path), in_days(tmp_path), owner.pending_s > 0) == (expected, {}, True)
    assert owner.flush() == 2
    assert content(tmp_path) == in_days(tmp_path) == expected
    assert (owner.pending_s, list(log_folder(tmp_path, METRICS).iterdir())) == (0, [])
    assert list_days(tmp_path, METRICS) == [date(2026, 1, 14), date(2026, 1, 15)]
    assert owner.flush() == 0


def test_the_last_value_of_a_key_wins_wherever_its_row_is(tmp_path: Path) -> None:
    owner = store(tmp_path)
    append(owner, ("a", NOON_MS, {"x": 1.0, "y": 1.0}))
    append(owner, ("a", NOON_MS, {"x": 2.0}))
    assert content(tmp_path) == {("a", NOON_MS): {"x": 2.0, "y": 1.0}}
    owner.flush()
    append(owner, ("a", NOON_MS, {"y": 3.0, "z": 4.0}))
    expected = {("a", NOON_MS): {"x": 2.0, "y": 3.0, "z": 4.0}}
    assert content(tmp_path) == expected
    owner.flush()
    assert content(tmp_path) == in_days(tmp_path) == expected


def test_a_restart_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    append(store(tmp_path), ("a", NOON_MS, {"x": 1.0}))
    second = store(tmp_path)
    assert content(tmp_path) == in_days(tmp_path) == {("a", NOON_MS): {"x": 1.0}}
    append(second, ("b", NOON_MS, {"x": 2.0}))
    second.close()
    assert len(in_days(tmp_path)) == 2


def test_segment_numbers_are_never_used_twice(tmp_path: Path) -> None:
    first = store(tmp_path)
    append(first, ("a", NOON_MS, {"x": 1.0}))
    first.close()
    second = store(tmp_path)
    append(second, ("a", NOON_MS + 1, {"x": 2.0}))
    second.close()
    assert [name.number for name in part_names(day_folder(tmp_path))] == [1, 2]


def test_a_flush_is_due_by_rows_or_by_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(daystore, "monotonic", lambda: now[0])
    owner = DayStore(tmp_path, METRICS, BufferSettings(publish_records=3, publish_s=60.0))
    owner.open()
    assert owner.is_flush_due is False
    append(owner, ("a", NOON_MS, {"x": 1.0}))
    assert owner.is_flush_due is False
    now[0] += 45.0
    assert owner.is_flush_due is True
    owner.maintain(LATER, expires=False)
    assert (owner.pending_s, len(in_days(tmp_path))) == (0, 1)
    append(owner, *(("a", NOON_MS + tick, {"x": 1.0}) for tick in range(3)))
    assert owner.is_flush_due is True


def test_few_rows_wait_longer_for_their_part_than_many() -> None:
    default = BufferSettings()
    waits_s = [publish_after_s(default, n_rows) for n_rows in (1, PART_ROWS - 1, PART_ROWS, 9_999, 10_000)]
    assert waits_s == [285.0, 285.0, 45.0, 45.0, 0.0]  # 300 s and 60 s, less what a join may take
    soon = BufferSettings(publish_s=2.0)
    assert [publish_after_s(soon, n_rows) for n_rows in (1, PART_ROWS)] == [1.5, 1.5]


def test_five_minutes_of_a_small_fleet_outlive_a_crash(tmp_path: Path) -> None:
    """The process dies with every row in the log; the next owner makes parts of them at once."""
    owner = store(tmp_path)
    rows: Rows = {}
    for tick in range(60):
        ticked = [(f"s{number:02d}", NOON_MS + 5_000 * tick, {"x": float(tick)}) for number in range(20)]
        append(owner, *ticked)
        rows |= {(server, time): values for server, time, values in ticked}
    assert (in_days(tmp_path), content(tmp_path) == rows) == ({}, True)  # our readers see the log
    store(tmp_path).close()
    assert content(tmp_path) == in_days(tmp_path) == rows


def test_a_row_of_many_metrics_does_not_make_many_rows_wide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daystore, "SEGMENT_CELLS_MAX", 5_000)
    own = store(tmp_path)
    append(own, ("wide", NOON_MS, {f"m{number}": 1.0 for number in range(100)}))
    append(own, *[("long", NOON_MS + number, {"load": 2.0}) for number in range(500)])
    append(own, ("long", NOON_MS + 500, {"load": 2.0}))

    written = [part.path for part in log.segments(log_folder(tmp_path, METRICS))]

    assert len(written) == 2, "the third came into the second's"
    assert own.flush() == 502
    assert len(in_days(tmp_path)) == 502
    own.close()


def test_a_torn_tail_is_dropped_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    owner = store(tmp_path)
    append(owner, ("a", NOON_MS, {"x": 1.0}))
    append(owner, ("b", NOON_MS, {"x": 2.0}))
    segment = one_segment(tmp_path)
    segment.write_bytes(segment.read_bytes()[:-7])
    assert content(tmp_path) == {("a", NOON_MS): {"x": 1.0}}
    with caplog.at_level(logging.WARNING):
        store(tmp_path)
    assert "unfinished frame" in caplog.text
    assert in_days(tmp_path) == {("a", NOON_MS): {"x": 1.0}}
    assert not (tmp_path / "quarantine").exists()


def test_damage_in_the_middle_costs_one_frame_and_is_kept(tmp_path: Path) -> None:
    owner = store(tmp_path)
    for place, server in enumerate("abc"):
        append(owner, (server, NOON_MS + place, {"x": 1.0}))
    segment = one_segment(tmp_path)
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(bytes(data))
    newer = log.segment_path(segment.parent, 2)
    payload = encode_table(table_of_batch(batch([("d", NOON_MS, {"x": 1.0})])))
    newer.write_bytes(log.frame(payload) + payload)
    expected = {("a", NOON_MS), ("c", NOON_MS + 2), ("d", NOON_MS)}
    assert content(tmp_path).keys() == expected
    store(tmp_path)
    assert in_days(tmp_path).keys() == expected
    (kept,) = (tmp_path / "quarantine").iterdir()
    assert kept.stat().st_size == len(data) // 3


def test_a_frame_that_is_no_table_costs_only_itself(tmp_path: Path) -> None:
    owner = store(tmp_path)
    append(owner, ("a", NOON_MS, {"x": 1.0}))
    owner._log.append(b"checksummed, but no Arrow stream")  # type: ignore[union-attr]
    owner._log.append(encode_table(pa.table({"other": [1]})))  # type: ignore[union-attr]
    append(owner, ("b", NOON_MS, {"x": 2.0}))
    assert len(content(tmp_path)) == 2
    owner.flush()
    assert len(in_days(tmp_path)) == 2
    assert len(list((tmp_path / "quarantine").iterdir())) == 2


def test_removed_segments_are_durable_before_their_numbers_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut that brings a segment back must find its part, or newer values would be undone."""
    order: list[str] = []
    monkeypatch.setattr(daystore, "fsync_dir", lambda folder: order.append(folder.parent.name))
    owner = store(tmp_path, order.append, compact_parts=2)
    for place in range(2):
        append(owner, ("a", NOON_MS + place, {"x": 1.0}))
        owner.flush()
    assert "log" not in order
    owner.maintain(datetime(2026, 1, 15, 12, tzinfo=UTC), expires=False)
    assert order.index("log") < order.index("day built", order.index("segment removed"))
    order.clear()
    append(owner, ("a", NOON_MS, {"x": 2.0}))  # changes an old part: nothing bears the segment's number
    owner.flush()
    assert order[-2:] == ["log", "segment removed"]


def test_foreign_and_empty_files_in_the_log_are_left_alone(tmp_path: Path) -> None:
    append(store(tmp_path), ("a", NOON_MS, {"x": 1.0}))
    folder = log_folder(tmp_path, METRICS)
    (folder / "000000000009.wal").touch()
    (folder / "notes.txt").write_text("foreign")
    (folder / "000000000010.wal").mkdir()
    owner = store(tmp_path)
    assert in_days(tmp_path) == {("a", NOON_MS): {"x": 1.0}}
    append(owner, ("b", NOON_MS, {"x": 1.0}))
    assert (folder / "000000000011.wal").exists()
    owner.flush()
    assert len(in_days(tmp_path)) == 2


def test_a_log_of_a_newer_version_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(log, "MAGIC", log.MAGIC[:3] + b"\x03")
        append(store(tmp_path), ("a", NOON_MS, {"x": 1.0}))
    with pytest.raises(UnknownFormat, match="newer version"):
        store(tmp_path)
    assert one_segment(tmp_path).stat().st_size > 0


def test_a_full_disk_refuses_the_append_and_later_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = store(tmp_path)
    append(owner, ("a", NOON_MS, {"x": 1.0}))

    def full(*_args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(log.os, "writev", full)
        with pytest.raises(StorageFull):
            append(owner, ("b", NOON_MS, {"x": 2.0}))
    assert content(tmp_path) == {("a", NOON_MS): {"x": 1.0}}
    append(owner, ("b", NOON_MS, {"x": 2.0}))
    assert len(content(tmp_path)) == 2


def test_a_full_disk_at_the_flush_keeps_the_log_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = store(tmp_path)
    append(owner, ("a", NOON_MS, {"x": 1.0}), ("b", NOON_MS - DAY_MS, {"x": 2.0}))
    calls = [0]
    real = files.fsync_file

    def full_at_the_second_day(path: Path) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path)

    with monkeypatch.context() as patched:
        patched.setattr("fleetcast.storage.parts.fsync_file", full_at_the_second_day)
        with pytest.raises(StorageFull):
            owner.flush()
    assert len(content(tmp_path)) == 2
    owner.flush()
    assert len(in_days(tmp_path)) == 2


def test_a_failing_maintenance_waits_before_it_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = DayStore(tmp_path, METRICS, BufferSettings(publish_records=1))
    owner.open()
    append(owner, ("a", NOON_MS, {"x": 1.0}))

    def broken(_path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr("fleetcast.storage.parts.fsync_file", broken)
        with pytest.raises(StorageBroken):
            owner.maintain(LATER, expires=False)
        owner.maintain(LATER, expires=False)
    assert content(tmp_path) == {("a", NOON_MS): {"x": 1.0}}


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file where the folder should be")
    with pytest.raises(StorageBroken):
        store(tmp_path)


def life(folder: Path, on_step: Callable[[str], None]) -> Iterator[Rows]:
    """Run a store through every kind of change; yield all rows acknowledged so far after each append."""
    rows: Rows = {}

    def put(owner: DayStore, *some: tuple[str, int, Values]) -> Rows:
        append(owner, *some)
        for server, time, values in some:
            rows.setdefault((server, time), {}).update(values)
        return {key: dict(values) for key, values in rows.items()}

    owner = store(folder, on_step, compact_parts=3, seal_quiet_s=0.0, bin_ms=2)
    yield put(owner, ("a", NOON_MS, {"x": 1.0}), ("b", NOON_MS, {"x": 1.0}))
    owner.flush()
    yield put(owner, ("a", NOON_MS + 1, {"x": 2.0, "y": 2.0}), ("b", NOON_MS - DAY_MS, {"x": 3.0}))
    owner.flush()
    yield put(owner, ("a", NOON_MS, {"x": 4.0}), ("a", NOON_MS + 2, {"z": 4.0}))
    owner.flush()
    owner.maintain(datetime(2026, 1, 15, 12, tzinfo=UTC), expires=False)  # compacts, seals the 14th
    wait_for_seal(owner, datetime(2026, 1, 15, 12, tzinfo=UTC))  # and takes its means
    yield put(owner, ("b", NOON_MS - DAY_MS, {"x": 5.0}), ("c", NOON_MS - DAY_MS, {"x": 5.0}))
    owner.flush()
    yield put(owner, ("c", NOON_MS, {"x": 6.0}))
    wait_for_seal(owner, LATER)  # all days, and the means of the 14th anew
    owner.close()


def wait_for_seal(owner: DayStore, now: datetime) -> None:
    for _ in range(12):  # each round starts or ends one, or takes means
        owner.maintain(now, expires=False)


def means(rows: Rows) -> Rows:
    """Return the means of bins of 2 ms."""
    by_bin: dict[Key, list[Values]] = {}
    for (server, time), values in rows.items():
        by_bin.setdefault((server, time // 2 * 2), []).append(values)
    return {
        key: {
            name: float(np.mean([values[name] for values in some if name in values]))
            for name in {name for values in some for name in values}
        }
        for key, some in by_bin.items()
    }


def means_content(folder: Path) -> Rows:
    return rows_of(
        batch_of_table(table) for _, table in DayReader(folder, METRICS).read_bins(-ALWAYS_MS, ALWAYS_MS, 2)
    )


class MeansHere:
    """Takes means in this process, at once."""

    is_running = False

    def __init__(self, folder: Path, task: str, day: date, target: Path) -> None:
        self.day = day
        self._target = target
        make_bins(folder, day, int(task.removeprefix("bins-")), target)

    def publish(self, path: Path) -> str:
        self._target.replace(path)
        return ""

    def stop(self) -> None:
        self._target.unlink(missing_ok=True)


class SealHere:
    """Seals in this process, at once: forty children would make the test slow (see test_sealing.py)."""

    is_running = False

    def __init__(self, folder: Path, kind_name: str, day: date, target: Path, drops: upkeep.Drops) -> None:
        self.day = day
        self.started_at = monotonic()
        self._sealed = upkeep.seal(folder, kind_name, day, target, drops)

    def result(self) -> upkeep.Sealed:
        return self._sealed

    def stop(self) -> None:
        self._sealed.path.unlink(missing_ok=True)


@pytest.fixture
def seals_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "SealProcess", SealHere)
    monkeypatch.setattr(upkeep, "BinsProcess", MeansHere)


@pytest.mark.usefixtures("seals_here")
def test_what_waits_in_the_log_is_published_before_its_day_is_sealed(tmp_path: Path) -> None:
    owner = store(tmp_path, seal_quiet_s=0.0)
    append(owner, ("a", NOON_MS, {"x": 1.0}))
    owner.flush()
    append(owner, ("a", NOON_MS + 1, {"x": 2.0}))
    wait_for_seal(owner, LATER)
    assert day_folder(tmp_path).is_file()
    assert in_days(tmp_path) == {("a", NOON_MS): {"x": 1.0}, ("a", NOON_MS + 1): {"x": 2.0}}
    owner.close()


@pytest.mark.usefixtures("seals_here")
def test_a_life_without_faults_ends_with_every_row_in_its_day(tmp_path: Path) -> None:
    steps: list[str] = []
    *_, rows = life(tmp_path, steps.append)
    assert content(tmp_path) == in_days(tmp_path) == rows
    assert set(steps) == {
        "segment read",
        "columns written",
        "part written",
        "part published",
        "day built",
        "day published",
        "day swapped",
        "old day removed",
        "segment removed",
        "seal started",
        "means started",
        "means published",
    }


def steps_of_a_life(folder: Path) -> int:
    steps: list[str] = []
    for _ in life(folder, steps.append):
        pass
    return len(steps)


@pytest.mark.usefixtures("seals_here")
def test_a_crash_at_any_step_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Given a process that dies at its n-th step, for every n, then readers see exactly what was
    acknowledged before the restart, after it, and after everything was flushed."""
    for fatal in range(steps_of_a_life(tmp_path / "whole")):
        folder = tmp_path / str(fatal)
        left = [fatal]

        def die(step: str, left: list[int] = left) -> None:
            if left[0] == 0:
                raise Crash(step)
            left[0] -= 1

        acknowledged: Rows = {}
        try:
            for rows in life(folder, die):
                acknowledged = rows
        except Crash as crash:
            step = str(crash)
        else:
            pytest.fail(f"step {fatal} was not reached")
        assert content(folder) == acknowledged, f"after the crash at {fatal}: {step}"
        assert means_content(folder) == means(acknowledged), f"after the crash at {fatal}: {step}"
        owner = store(folder, seal_quiet_s=0.0, bin_ms=2)
        assert content(folder) == in_days(folder) == acknowledged, f"after the restart, {fatal}: {step}"
        wait_for_seal(owner, LATER)
        owner.close()
        assert in_days(folder) == acknowledged
        assert means_content(folder) == means(acknowledged)
        sealed = [day for day in list_days(folder, METRICS) if not part_names(day_path(folder, METRICS, day))]
        assert list_days(folder, BINS) == sealed, f"{fatal}: {step}"
        assert not any(lacks_bins(folder, day, 2) for day in sealed)
        left_over = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        assert left_over == [], f"{fatal}: {step}"
