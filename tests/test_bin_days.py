"""The kept means of sealed days: the same as those of the records, or not used."""

import errno
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from buffer_rows import DAY_MS, NOON_MS, Key, Values, batch, day_folder, rows_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleetcast.bins import bin_means
from fleetcast.clock import FakeClock, from_ms, to_ms
from fleetcast.inference import restore
from fleetcast.schema import RecordBatch
from fleetcast.serving.history import BinHistory
from fleetcast.serving.roster import Fleet, Roster
from fleetcast.settings import BinSettings, BufferSettings, ForecastSettings
from fleetcast.storage import bin_days, reader, upkeep
from fleetcast.storage.bin_days import lacks_bins, make_bins
from fleetcast.storage.days import day_path, list_days
from fleetcast.storage.store import DataBuffer
from fleetcast.storage.tables import BINS, METRICS
from fleetcast.storage.upkeep import MeansUpkeep, UpkeepPace, seal
from fleetcast.storage.writer import no_step

BIN = 300_000
START_MS = NOON_MS - DAY_MS // 2
DAY = date(2026, 1, 15)
NAMES = ("a", "B", "ä", "../x", "a b", "'; --", "名" * 100, "zz" * 60, "10", "9", "nul-ish\u2400")
Cells = dict[Key, Values]


def random_batches(seed: int, n_days: int) -> Iterator[RecordBatch]:
    """Yield records of several days as they might come: late, twice, with gaps, and new metrics at noon."""
    rng = np.random.default_rng(seed)
    names = rng.permutation(NAMES)[: rng.integers(1, len(NAMES) + 1)].tolist()
    for _ in range(int(rng.integers(1, 6))):
        n_rows = int(rng.integers(1, 400))
        times = (
            START_MS + rng.integers(0, n_days * 48, n_rows) * 1_800_000 + rng.integers(0, 30, n_rows) * 10_000
        )
        metrics = {
            name: np.where(rng.random(n_rows) < rng.random(), np.nan, np.round(rng.normal(50, 20, n_rows), 2))
            for name in ("cpu_pct", "mem_pct", "fans")
        }
        metrics["at_noon_pct"] = np.where(times % DAY_MS < DAY_MS // 2, np.nan, rng.random(n_rows))
        codes = rng.integers(0, len(names), n_rows).astype(np.int32)
        used, places = np.unique(codes, return_inverse=True)
        yield RecordBatch(tuple(names[code] for code in used), places.astype(np.int32), times, metrics)


def seal_days(buffer: DataBuffer, days: int | None = None) -> list[date]:
    """Seal the oldest open days of a buffer as its upkeep does; return them."""
    buffer.flush()
    writer = buffer._own().metrics._writer
    done = [day for day in list_days(buffer.folder, METRICS)[:days] if writer.path(day).is_dir()]
    for day in done:
        sealed = seal(buffer.folder, "metrics", day, buffer.folder / ".sealed")
        writer.put_sealed(day, sealed.path, sealed.rejects)
    return done


def keep_means(folder: Path, days: list[date], bin_ms: int = BIN) -> None:
    for day in days:
        make_bins(folder, day, bin_ms, folder / ".means")
        (folder / ".means").replace(day_path(folder, BINS, day))


def means_of_records(
    buffer: DataBuffer, start_ms: int, end_ms: int, metrics: list[str] | None = None
) -> Cells:
    """Return what was computed before there were kept means."""
    found: Cells = {}
    for one in buffer.iter_batches(start_ms, end_ms, metrics):
        names = list(one.metrics)
        values = np.array([one.metrics[name] for name in names]).reshape(len(names), len(one)).T
        codes, starts, means = bin_means(one.server_codes, one.timestamps_ms, values, BIN)
        columns = {name: means[:, place] for place, name in enumerate(names)}
        found |= rows_of([RecordBatch(one.server_names, codes, starts, columns)])
    return found


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note whenever means are taken of records, instead of those that are kept."""
    noted: list[str] = []
    for module in (bin_days, reader):
        real = module.bin_table
        monkeypatch.setattr(
            module,
            "bin_table",
            lambda table, bin_ms, real=real: noted.append("records") or real(table, bin_ms),
        )
    return noted


@given(st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_kept_means_are_exactly_those_of_the_records(seed: int, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place, closing(DataBuffer(place, expire=False).open()) as buffer:
        batches = list(random_batches(seed, 3))
        for one in batches[:-1]:
            buffer.append_batch(one)
        days = seal_days(buffer)
        keep_means(buffer.folder, days)
        if data.draw(st.booleans(), label="late rows"):
            buffer.append_batch(batches[-1])  # in the log: some days are not only what was sealed
        for _ in range(3):
            start = START_MS + data.draw(st.integers(0, 3 * 288)) * BIN
            end = start + data.draw(
                st.one_of(st.integers(1, 3 * 288).map(lambda n: n * BIN), st.integers(1, DAY_MS))
            )
            metrics = data.draw(st.sampled_from([None, ["cpu_pct"], ["at_noon_pct", "never"]]))
            assert rows_of(buffer.iter_bins(start, end, BIN, metrics)) == means_of_records(
                buffer, start, end, metrics
            )


class World:
    """What a restart fills, over one folder."""

    def __init__(
        self, folder: Path, now_ms: int, resume_ms: int | None, out: frozenset[str] = frozenset()
    ) -> None:
        self.buffer = DataBuffer(folder, expire=False).leave_out(lambda: out)
        forecast = ForecastSettings()
        self.history = BinHistory(
            BinSettings(forecast_metrics=("cpu_pct", "mem_pct", "at_noon_pct")), forecast
        )
        self.roster = Roster(forecast)
        fleet = Fleet(self.history, self.roster, FakeClock(from_ms(now_ms)), forecast, left_out=lambda: out)
        self.taken = restore(self.buffer, fleet, SimpleNamespace(resume_bin_ms=resume_ms))  # type: ignore[arg-type]

    def state(self) -> tuple[object, ...]:
        """Return everything that a restart brought back."""
        names = self.history.server_names()
        assert self.taken is not None
        pasts = {name: self.history.past(name, self.taken, 3 * 288) for name in names}
        present = self.roster.servers(
            from_ms(START_MS)
        )  # nobody is gone: nothing is left out of the comparison
        values = {
            (name, metric): present.values[row, column]
            for row, name in enumerate(present.server_names)
            for column, metric in enumerate(present.metrics)
        }
        known = {key: value for key, value in values.items() if value == value}
        seen = dict(zip(present.server_names, present.last_seen_ms.tolist(), strict=True))
        open_rows = {
            start: sorted(
                (names[row], time) for rows, times, _ in parts for row, time in zip(rows, times, strict=True)
            )
            for start, parts in self.history._open.items()
        }
        return (
            {
                name: np.nan_to_num(past, nan=-1.0).tobytes()
                for name, past in pasts.items()
                if past is not None
            },
            known,
            seen,
            open_rows,
        )


@given(st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_restart_brings_back_the_same_from_kept_means(seed: int, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place, closing(DataBuffer(place, expire=False).open()) as buffer:
        for one in random_batches(seed, 3):
            buffer.append_batch(one)
        newest = buffer.newest_record_time()
        assert newest is not None
        days = seal_days(buffer, data.draw(st.integers(1, 3), label="sealed"))
        now_ms = to_ms(newest) - data.draw(
            st.sampled_from([0, 0, 3_600_000, DAY_MS]), label="the clock is behind"
        )
        behind = data.draw(st.sampled_from([None, 0, 1, 100, 500]), label="bins not worked off")
        resume = None if behind is None else to_ms(newest) // BIN * BIN - behind * BIN
        out = frozenset(data.draw(st.sampled_from([(), NAMES[:3]]), label="left out"))
        without = World(buffer.folder, now_ms, resume, out)
        keep_means(buffer.folder, days)
        with_means = World(buffer.folder, now_ms, resume, out)
        assert with_means.state() == without.state()
        if now_ms == to_ms(newest):
            assert with_means.history.newest_ms == without.history.newest_ms
        assert with_means.history._late_bins == without.history._late_bins


@pytest.fixture
def buffer(tmp_path: Path) -> Iterator[DataBuffer]:
    """A sealed day of three servers, with its means, and a day that is open."""
    with closing(DataBuffer(tmp_path, expire=False).open()) as owner:
        owner.append_batch(fleet())
        owner.append_batch(fleet(DAY_MS))
        keep_means(tmp_path, seal_days(owner, 1))
        yield owner


def fleet(later_ms: int = 0, n_rows: int = 8640) -> RecordBatch:
    rng = np.random.default_rng(later_ms)
    codes = np.repeat(np.arange(3, dtype=np.int32), n_rows)
    times = START_MS + later_ms + np.tile(np.arange(n_rows, dtype=np.int64) * (DAY_MS // n_rows), 3)
    return RecordBatch(("a", "b", "c"), codes, times, {"cpu_pct": np.round(rng.normal(50, 9, len(codes)), 2)})


def day_means(buffer: DataBuffer) -> Cells:
    return rows_of(buffer.iter_bins(START_MS, START_MS + DAY_MS, BIN))


def test_a_day_with_means_is_not_read_again(buffer: DataBuffer, reads: list[str]) -> None:
    assert day_means(buffer) == means_of_records(buffer, START_MS, START_MS + DAY_MS)
    assert reads == []
    assert len(rows_of(buffer.iter_bins(START_MS + DAY_MS, START_MS + 2 * DAY_MS, BIN))) == 3 * 288
    assert reads != [], "the day that is open"


def test_means_need_the_bins_they_were_taken_of(buffer: DataBuffer, reads: list[str]) -> None:
    assert len(rows_of(buffer.iter_bins(START_MS, START_MS + DAY_MS, 2 * BIN))) == 3 * 144
    assert len(reads) == 1
    half = list(buffer.iter_bins(START_MS + 1000, START_MS + BIN + 1000, BIN))
    assert len(reads) == 2, "parts of bins"
    assert rows_of(half) == means_of_records(buffer, START_MS + 1000, START_MS + BIN + 1000)


def test_rows_in_the_log_and_a_day_sealed_again_leave_old_means_unread(
    buffer: DataBuffer, reads: list[str]
) -> None:
    old = day_path(buffer.folder, BINS, DAY).read_bytes()
    for step in (lambda: None, buffer.flush, lambda: seal_days(buffer, 1)):
        buffer.append_batch(batch([("a", START_MS + 1, {"cpu_pct": 7.0})]))
        step()
        reads.clear()
        assert day_means(buffer) == means_of_records(buffer, START_MS, START_MS + DAY_MS)
        assert reads != []
        assert day_path(buffer.folder, BINS, DAY).read_bytes() == old
    keep_means(buffer.folder, [DAY])
    reads.clear()
    assert day_means(buffer) == means_of_records(buffer, START_MS, START_MS + DAY_MS)
    assert reads == []


def test_the_same_rows_sealed_twice_are_two_files(buffer: DataBuffer) -> None:
    """Given a day whose footer would be the same, then the seal still tells one content from another."""
    path, means = day_folder(buffer.folder), day_path(buffer.folder, BINS, DAY)
    first = bin_days.sealed_file(buffer.folder, DAY)
    assert first is not None
    seal(buffer.folder, "metrics", DAY, buffer.folder / ".again")
    (buffer.folder / ".again").replace(path)
    second = bin_days.sealed_file(buffer.folder, DAY)
    assert second is not None
    assert (second.seal == first.seal, lacks_bins(buffer.folder, DAY, BIN), means.exists()) == (
        False,
        True,
        True,
    )


def test_a_day_sealed_before_there_were_seals_keeps_means_until_it_is_written_again(
    buffer: DataBuffer, reads: list[str]
) -> None:
    path = day_folder(buffer.folder)

    def write_as_before(value: float) -> None:
        table = pq.read_table(path)
        rest = [name for name in table.column_names if name != "cpu_pct"]
        table = table.select(rest).append_column("cpu_pct", [np.full(len(table), value)])
        pq.write_table(
            table.replace_schema_metadata({"fleetcast.format": "1", "fleetcast.segment": "1"}), path
        )

    write_as_before(5.0)
    assert lacks_bins(buffer.folder, DAY, BIN)
    keep_means(buffer.folder, [DAY])
    assert {value for values in day_means(buffer).values() for value in values.values()} == {5.0}
    reads.clear()
    day_means(buffer)
    assert reads == []
    write_as_before(6.0)  # as many bytes
    assert {value for values in day_means(buffer).values() for value in values.values()} == {6.0}
    assert reads != []


def break_page(path: Path, group: int, column: int) -> None:
    data = bytearray(path.read_bytes())
    place = pq.ParquetFile(path).metadata.row_group(group).column(column)
    start = place.dictionary_page_offset if place.has_dictionary_page else place.data_page_offset
    data[start + place.total_compressed_size // 2] ^= 1
    path.write_bytes(bytes(data))


def as_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_no_json(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"fleetcast.format": "1", "fleetcast.bins": "[1"}), path)


@pytest.mark.parametrize(
    ("damage", "is_said"),
    [
        (lambda path: path.write_bytes(b""), True),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), True),
        (lambda path: path.write_bytes(b"no parquet at all"), True),
        (as_a_folder, True),
        (as_no_json, True),
        (
            lambda path: pq.write_table(pq.read_table(path), path),
            True,
        ),  # row groups joined by another program
        (lambda path: break_page(path, 0, 2), True),
        (lambda path: path.unlink(), False),
    ],
)
def test_what_is_wrong_with_a_file_of_means_costs_time_alone(
    buffer: DataBuffer, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], *, is_said: bool
) -> None:
    expected = day_means(buffer)
    damage(day_path(buffer.folder, BINS, DAY))
    with caplog.at_level(logging.WARNING):
        assert day_means(buffer) == expected
    assert len(caplog.messages) == is_said, caplog.messages


def test_damaged_newest_values_are_read_from_the_records(buffer: DataBuffer) -> None:
    whole = buffer.read_newest(START_MS + BIN, START_MS + DAY_MS, BIN)
    path = day_path(buffer.folder, BINS, DAY)
    break_page(path, pq.ParquetFile(path).num_row_groups - 1, 2)
    again = buffer.read_newest(START_MS + BIN, START_MS + DAY_MS, BIN)
    assert whole is not None
    assert again is not None
    assert rows_of([again]) == rows_of([whole])
    assert {time for _, time in rows_of([whole])} == {START_MS + DAY_MS - 10_000}


def test_of_a_damaged_day_no_means_are_kept(buffer: DataBuffer) -> None:
    break_page(day_folder(buffer.folder), 0, 2)
    with pytest.raises(Exception, match="damaged, no means are kept of it"):
        make_bins(buffer.folder, DAY, BIN, buffer.folder / ".means")
    assert not (buffer.folder / ".means").exists()


def test_large_fleets_come_in_row_groups_of_whole_servers(
    buffer: DataBuffer, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    monkeypatch.setattr(bin_days, "_GROUP_ROWS", 500)
    monkeypatch.setattr(bin_days, "whole_servers", lambda tables, kind: servers_apart(tables))
    keep_means(buffer.folder, [DAY])
    metadata = pq.ParquetFile(day_path(buffer.folder, BINS, DAY)).metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [576, 288, 3]
    expected = means_of_records(buffer, START_MS, START_MS + DAY_MS)
    reads.clear()
    assert day_means(buffer) == expected
    assert reads == []
    break_page(day_path(buffer.folder, BINS, DAY), 0, 2)
    assert day_means(buffer) == expected
    assert reads != [], "of the two servers in the damaged row group"


def servers_apart(tables: Iterator[object]) -> Iterator[object]:
    for table in tables:
        names = table.column("server_name").to_pylist()  # type: ignore[attr-defined]
        for name in sorted(set(names)):
            yield table.slice(names.index(name), names.count(name))  # type: ignore[attr-defined]


def test_an_export_in_bins_is_the_same_with_and_without_means_and_its_first_bin_is_whole(
    buffer: DataBuffer, tmp_path: Path, reads: list[str]
) -> None:
    until = from_ms(START_MS + 2 * DAY_MS)
    frames = []
    for name in ("with.parquet", "without.parquet"):
        reads.clear()
        buffer.export_training_data(tmp_path / name, 1.7, 300, until=until)
        frames.append(pd.read_parquet(tmp_path / name))
        frames.append(len(reads))
        day_path(buffer.folder, BINS, DAY).unlink(missing_ok=True)
    assert frames[0].equals(frames[2])
    assert frames[1] < frames[3]
    buffer.export_training_data(tmp_path / "cut.parquet", 1.7 - 0.001, 300, until=until)
    assert pd.read_parquet(tmp_path / "cut.parquet").equals(frames[0])


def test_left_out_servers_have_no_means(buffer: DataBuffer, reads: list[str]) -> None:
    buffer.leave_out(lambda: {"b"})
    assert {server for server, _ in day_means(buffer)} == {"a", "c"}
    newest = buffer.read_newest(START_MS, START_MS + DAY_MS, BIN)
    assert newest is not None
    assert newest.server_names == ("a", "c")
    assert reads == []


def test_the_files_of_means_count_as_bytes_of_the_buffer(buffer: DataBuffer) -> None:
    stats = buffer.get_stats()
    size = day_path(buffer.folder, BINS, DAY).stat().st_size
    day_path(buffer.folder, BINS, DAY).write_bytes(bytes(size + 5_000_000))
    again = buffer.get_stats()
    assert again["disk_usage_mb"] - stats["disk_usage_mb"] == pytest.approx(5.0)
    assert again["total_records"] == stats["total_records"]
    assert again["file_count"] == stats["file_count"] == 2


class MeansHere:
    """Takes means in this process, at once."""

    failure = ""
    started: list[date] = []  # noqa: RUF012 (tests look at it)
    is_running = False

    def __init__(self, folder: Path, task: str, day: date, target: Path) -> None:
        self.day, self._target = day, target
        MeansHere.started.append(day)
        if not MeansHere.failure:
            make_bins(folder, day, int(task.removeprefix("bins-")), target)

    def publish(self, path: Path) -> str:
        if not MeansHere.failure:
            self._target.replace(path)
        return MeansHere.failure

    def stop(self) -> None:
        self._target.unlink(missing_ok=True)


@pytest.fixture
def upkeep_of(buffer: DataBuffer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MeansUpkeep]:
    monkeypatch.setattr(upkeep, "BinsProcess", MeansHere)
    monkeypatch.setattr(MeansHere, "started", [])
    monkeypatch.setattr(MeansHere, "failure", "")

    def build(bin_ms: int = BIN) -> MeansUpkeep:
        means = MeansUpkeep(buffer.folder, UpkeepPace(bin_ms=bin_ms), no_step)
        means.load()
        return means

    return build


def test_sealed_days_get_means_the_newest_first_and_once(
    buffer: DataBuffer, upkeep_of: Callable[..., MeansUpkeep]
) -> None:
    day_path(buffer.folder, BINS, DAY).unlink()
    buffer.append_batch(fleet(2 * DAY_MS))
    seal_days(buffer, 2)
    for means in (upkeep_of(), upkeep_of()):
        for _ in range(12):
            means.run()
        assert MeansHere.started == [DAY + timedelta(days=1), DAY]
    assert list_days(buffer.folder, BINS) == [DAY, DAY + timedelta(days=1)]


def test_bins_of_another_length_are_taken_anew(
    buffer: DataBuffer, upkeep_of: Callable[..., MeansUpkeep], reads: list[str]
) -> None:
    means = upkeep_of(60_000)
    for _ in range(4):
        means.run()
    assert MeansHere.started == [DAY]
    reads.clear()
    assert len(rows_of(buffer.iter_bins(START_MS, START_MS + DAY_MS, 60_000))) == 3 * 1440
    assert reads == []


def test_a_failure_is_said_once_and_tried_again_later(
    buffer: DataBuffer,
    upkeep_of: Callable[..., MeansUpkeep],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    day_path(buffer.folder, BINS, DAY).unlink()
    now = [1000.0]
    monkeypatch.setattr(upkeep, "monotonic", lambda: now[0])
    MeansHere.failure = "no space to write it"
    means = upkeep_of()
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            means.run()
            now[0] += 60.0
    assert 3 < len(MeansHere.started) <= 6
    assert len(caplog.messages) == 1
    assert "no space to write it" in caplog.messages[0]
    MeansHere.failure = ""
    now[0] += 600.0
    for _ in range(3):
        means.run()
    assert not lacks_bins(buffer.folder, DAY, BIN)


def test_means_go_with_their_day_and_without_it(
    buffer: DataBuffer, upkeep_of: Callable[..., MeansUpkeep]
) -> None:
    orphan, left = (
        day_path(buffer.folder, BINS, date(2025, 1, 1)),
        buffer.folder / ".bins_2026-01-15.parquet.new-1",
    )
    orphan.write_bytes(b"of a day that was deleted")
    left.write_bytes(b"half")
    means = upkeep_of()
    assert (orphan.exists(), left.exists()) == (False, False)
    means.remove(DAY)
    assert list_days(buffer.folder, BINS) == []


def test_the_retention_prunes_both(tmp_path: Path) -> None:
    clock = FakeClock(datetime(2026, 1, 16, 1, tzinfo=UTC))
    pace = UpkeepPace(bin_ms=BIN, seal_quiet_s=0.0, expire_interval_s=0.0)
    with closing(
        DataBuffer(tmp_path, settings=BufferSettings(retention_days=60), clock=clock, pace=pace).open()
    ) as own:
        own.append_batch(fleet())
        own.flush()
        wait_for_means(own, clock)
        assert (list_days(tmp_path, METRICS), list_days(tmp_path, BINS)) == ([DAY], [DAY])
        own.maintain(clock.now() + timedelta(days=70))
        assert (list_days(tmp_path, METRICS), list_days(tmp_path, BINS)) == ([], [])


def wait_for_means(own: DataBuffer, clock: FakeClock) -> None:
    """Run the upkeep with its real children until the sealed day has its means."""
    deadline = datetime.now(UTC) + timedelta(seconds=60)
    while lacks_bins(own.folder, DAY, BIN) or not day_folder(own.folder).is_file():
        assert datetime.now(UTC) < deadline
        own.maintain(clock.now())


def child(folder: Path, target: Path, task: str = f"bins-{BIN}") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "fleetcast.storage.upkeep",
        str(folder),
        task,
        DAY.isoformat(),
        str(target),
    ]
    return subprocess.run(
        [*command, str(os.getpid()), "{}"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_child_that_finds_no_sealed_day_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    done = child(tmp_path, tmp_path / "target")
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (1, "", [])
    assert "there is nothing to take means of" in done.stdout


def test_a_full_disk_costs_the_means_and_no_day(
    buffer: DataBuffer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = day_folder(buffer.folder).read_bytes()

    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fleetcast.storage.parts.fsync_file", full)
    monkeypatch.setattr("os.nice", lambda _by: 0)
    target = buffer.folder / ".target"
    assert upkeep.main([str(buffer.folder), f"bins-{BIN}", DAY.isoformat(), str(target), "1", "{}"]) == 1
    assert "no space to write" in capsys.readouterr().out
    assert (target.exists(), day_folder(buffer.folder).read_bytes() == before) == (False, True)


def named_in_means(folder: Path) -> set[str]:
    return {
        name
        for path in folder.glob("*bins_*")
        for name in pq.read_table(path).column("server_name").to_pylist()
    }


@pytest.mark.parametrize("late_rows", [False, True])
def test_a_forgotten_server_has_no_means_either(buffer: DataBuffer, *, late_rows: bool) -> None:
    """Given a sealed day, or one that late rows opened again, its old means go with the server's rows."""
    if late_rows:
        buffer.append_batch(batch([("a", START_MS + 1, {"cpu_pct": 7.0})]))
        buffer.flush()
    assert named_in_means(buffer.folder) == {"a", "b", "c"}
    now = from_ms(START_MS + (1 if late_rows else 2) * DAY_MS)  # an open day is written in this process
    while not buffer.forget({"b": START_MS + 2 * DAY_MS}, now):
        pass
    assert named_in_means(buffer.folder) == set()
    assert {server for server, _ in day_means(buffer)} == {"a", "c"}


def test_forgetting_leaves_the_means_of_days_without_the_server(buffer: DataBuffer) -> None:
    owner = buffer._own().metrics._upkeep._means
    assert owner is not None
    owner._bin_ms = BIN
    while not buffer.forget({"never seen": START_MS + 2 * DAY_MS}, from_ms(START_MS + 2 * DAY_MS)):
        pass
    assert named_in_means(buffer.folder) == {"a", "b", "c"}
    owner.remove_stale(DAY)
    assert not lacks_bins(buffer.folder, DAY, BIN)
