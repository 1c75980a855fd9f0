"""DataBuffer as `spec.md` and the contract describe it."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from buffer_rows import Key, Values, batch, rows_of, rows_of_frame
from odd_files import KINDS, put
from settled_rows import BIN_MS, START_MS, settled

from data_buffer import DataBuffer, main
from fleetcast.clock import FakeClock, from_ms, to_ms
from fleetcast.errors import AlreadyRunning, BadData, FleetcastError, StorageBroken, StorageFull
from fleetcast.settings import BufferSettings
from fleetcast.storage import store

ROOT = Path(__file__).parents[1]
NOW = datetime(2026, 1, 15, 10, 0, tzinfo=UTC)
NOW_MS = to_ms(NOW)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(NOW)


@pytest.fixture
def buffer(tmp_path: Path, clock: FakeClock) -> Iterator[DataBuffer]:
    made = DataBuffer(tmp_path / "buffer", clock=clock)
    yield made
    made.close()


def record(server: str = "a", age_s: float = 0.0, **values: Any) -> dict[str, Any]:
    return {"timestamp": (NOW - timedelta(seconds=age_s)).isoformat(), "server_name": server, **values}


def content(buffer: DataBuffer) -> dict[Key, Values]:
    return rows_of(buffer.iter_batches(0, 2**45))


def test_constructing_and_reading_create_nothing(tmp_path: Path) -> None:
    buffer = DataBuffer(tmp_path / "missing")
    assert buffer.get_stats()["total_records"] == 0
    assert len(buffer.get_training_window()) == 0
    assert (buffer.newest_record_time(), buffer.oldest_record_time()) == (None, None)
    assert len(buffer.read_predictions(0, 2**45)) == 0
    buffer.flush()
    buffer.maintain(NOW)
    buffer.close()
    assert list(tmp_path.iterdir()) == []


def test_the_statistics_snippet_of_the_spec_works_on_an_empty_buffer(tmp_path: Path) -> None:
    stats = DataBuffer(tmp_path).get_stats()
    shown = (
        f"{stats['file_count']} {stats['total_records']:,} {stats['disk_usage_mb']}"
        f" {stats['date_range']['start']} to {stats['date_range']['end']}"
    )
    assert shown == "0 0 0.0 None to None"
    assert stats["predictions"]["total_records"] == 0


def test_an_appended_record_is_seen_at_once_by_every_process(buffer: DataBuffer, tmp_path: Path) -> None:
    report = buffer.append([record("a", cpu_pct=12.346, state="ok"), record("b", load=1)])
    assert (report.accepted, report.rejections, report.ignored_text_fields) == (2, (), 1)
    assert content(DataBuffer(tmp_path / "buffer")) == {
        ("a", NOW_MS): {"cpu_pct": 12.35},
        ("b", NOW_MS): {"load": 1.0},
    }
    read_elsewhere = (
        "from data_buffer import DataBuffer; import sys;"
        "print(DataBuffer(sys.argv[1]).get_stats()['total_records'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", read_elsewhere, str(tmp_path / "buffer")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "2\n"


def test_rejected_records_are_reported_with_their_place(buffer: DataBuffer) -> None:
    report = buffer.append([record("a", cpu_pct=1.0), {"x": 1}, record("b", cpu_pct="high", load=[])])
    assert report.accepted == 1
    assert [(r.index, r.field) for r in report.rejections] == [(1, "timestamp"), (2, "load")]
    assert content(buffer).keys() == {("a", NOW_MS)}


def test_places_count_over_all_portions(buffer: DataBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_APPEND_ROWS", 3)
    raw = [record(f"s{n}", load=n) if n != 7 else {} for n in range(10)]
    report = buffer.append(iter(raw))
    assert (report.accepted, [r.index for r in report.rejections]) == (9, [7])


@pytest.mark.parametrize("shape", [{"records": []}, "text", b"bytes", 7, None])
def test_what_is_no_iterable_of_records_is_refused(buffer: DataBuffer, shape: Any) -> None:
    with pytest.raises(BadData, match="iterable of mappings or a DataFrame"):
        buffer.append(shape)


def test_a_frame_and_its_records_are_taken_alike(buffer: DataBuffer) -> None:
    times = pd.to_datetime([NOW_MS, NOW_MS], unit="ms", utc=True)
    frame = pd.DataFrame(
        {"timestamp": times, "server_name": ["a", "b"], "cpu_pct": [1.0, np.nan], "load": [2, 3]}
    )
    assert buffer.append(frame).accepted == 2
    by_frame = content(buffer)

    report = buffer.append(frame.to_dict("records"))

    assert (report.accepted, report.rejections) == (2, ())
    assert content(buffer) == by_frame


def test_a_frame_is_taken_with_nan_as_absent(buffer: DataBuffer) -> None:
    frame = pd.DataFrame(
        {
            "timestamp": pd.to_datetime([NOW, NOW, None, NOW - timedelta(days=90)], utc=True),
            "server_name": ["a", "b", "c", "d"],
            "cpu_pct": [1.0, np.nan, 3.0, 4.0],
            "load": pd.array([1, None, 3, 4], dtype="Int64"),
            "site": ["x", None, "y", "z"],
        }
    )
    report = buffer.append(frame)
    assert [(r.index, r.field) for r in report.rejections] == [(2, "timestamp"), (3, "timestamp")]
    assert content(buffer) == {("a", NOW_MS): {"cpu_pct": 1.0, "load": 1.0}, ("b", NOW_MS): {}}


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Berlin"])
def test_a_frame_s_times_may_have_any_unit_and_zone(buffer: DataBuffer, unit: str, zone: str | None) -> None:
    times = pd.Series(pd.to_datetime([NOW.replace(tzinfo=None)])).astype(f"datetime64[{unit}]")
    times = times if zone is None else times.dt.tz_localize("UTC").dt.tz_convert(zone)
    buffer.append(pd.DataFrame({"timestamp": times, "server_name": ["a"], "load": [1.0]}))
    assert content(buffer) == {("a", NOW_MS): {"load": 1.0}}


def test_a_frame_s_times_may_be_text(buffer: DataBuffer) -> None:
    frame = pd.DataFrame({"timestamp": [NOW.isoformat()], "server_name": ["a"], "load": [1.0]})
    assert buffer.append(frame).accepted == 1


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (pd.DataFrame({"server_name": ["a"]}), "lacks timestamp"),
        (pd.DataFrame({"x": [1]}), "lacks timestamp and server_name"),
        (pd.DataFrame([[1, 2, 3]], columns=["timestamp", "server_name", "timestamp"]), "two columns"),
    ],
)
def test_a_frame_without_the_columns_of_records_is_refused(
    buffer: DataBuffer, frame: pd.DataFrame, why: str
) -> None:
    with pytest.raises(BadData, match=why):
        buffer.append(frame)


def test_ten_thousand_records_are_flushed_by_themselves(buffer: DataBuffer, tmp_path: Path) -> None:
    buffer.append(record(f"s{n % 10}", age_s=n // 10, load=n) for n in range(9_999))
    assert not list((tmp_path / "buffer").glob("metrics_*"))
    buffer.append([record("last", load=1)])
    total = sum(len(pd.read_parquet(path)) for path in (tmp_path / "buffer").glob("metrics_*"))
    assert total == 10_000


def test_a_flush_that_fails_does_not_fail_the_append(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    buffer = DataBuffer(tmp_path, settings=BufferSettings(publish_records=1), clock=FakeClock(NOW))

    def full(_path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("fleetcast.storage.parts.fsync_file", full)
        assert buffer.append([record(load=1)]).accepted == 1
    assert "stay in the log" in caplog.text
    assert len(content(buffer)) == 1
    buffer.close()


def test_the_training_window_is_whole_days_and_today_if_asked(buffer: DataBuffer) -> None:
    day_s = 86_400
    buffer.append(
        [record("a", age_s=age, load=1.0) for age in (0, 9 * 3600, 11 * 3600, 3 * day_s, 4 * day_s)]
    )
    assert len(buffer.get_training_window(days=30)) == 3
    assert len(buffer.get_training_window(days=30, include_today=True)) == 5
    assert len(buffer.get_training_window(days=3, include_today=True)) == 4
    frame = buffer.get_training_window(days=3, include_today=True)
    assert list(frame.columns) == ["timestamp", "server_name", "load"]
    assert frame.timestamp.is_monotonic_increasing
    assert str(frame.timestamp.dtype) == "datetime64[ms, UTC]"


def test_the_export_ends_now_or_where_asked(buffer: DataBuffer, tmp_path: Path) -> None:
    buffer.append([record("a", age_s=age, load=1.0) for age in (-60, 0, 60, 86_400, 86_401, 10 * 86_400)])
    assert buffer.export_training_data(tmp_path / "one.parquet", days=1) == 2
    assert buffer.export_training_data(str(tmp_path / "all.parquet"), days=30) == 5
    until = NOW - timedelta(days=1)
    assert buffer.export_training_data(tmp_path / "old.parquet", days=30, until=until) == 2
    bins = buffer.export_training_data(tmp_path / "bins.parquet", days=30, resolution_s=300)
    assert bins == len(pd.read_parquet(tmp_path / "bins.parquet"))
    rows = rows_of_frame(pd.read_parquet(tmp_path / "bins.parquet"))
    assert {time % BIN_MS for _, time in rows} == {0}


def test_newest_and_oldest_are_known_with_and_without_ownership(buffer: DataBuffer, tmp_path: Path) -> None:
    buffer.append([record("a", age_s=100, load=1.0), record("a", age_s=86_400, load=1.0)])
    buffer.flush()
    buffer.append([record("a", age_s=50, load=1.0)])
    for one in (buffer, DataBuffer(tmp_path / "buffer")):
        assert one.newest_record_time() == NOW - timedelta(seconds=50)
        assert one.oldest_record_time() == NOW - timedelta(days=1)
    buffer.append([record("a", age_s=70, load=1.0)])
    assert buffer.newest_record_time() == NOW - timedelta(seconds=50)


def test_records_too_old_or_in_the_future_are_rejected_where_records_expire(buffer: DataBuffer) -> None:
    report = buffer.append([record("old", age_s=61 * 86_400), record("new", age_s=-301), record("good")])
    assert [(r.index, r.field) for r in report.rejections] == [(0, "timestamp"), (1, "timestamp")]


def test_recorded_data_of_any_age_are_taken_where_nothing_expires(tmp_path: Path) -> None:
    buffer = DataBuffer(tmp_path, clock=FakeClock(NOW), expire=False)
    assert buffer.append([{"timestamp": "2013-07-01T00:00:00Z", "server_name": "a", "load": 1}]).accepted == 1
    buffer.maintain(NOW)
    assert buffer.oldest_record_time() == datetime(2013, 7, 1, tzinfo=UTC)
    buffer.close()


def test_maintenance_deletes_days_older_than_the_retention(buffer: DataBuffer, clock: FakeClock) -> None:
    buffer.append([record("a", age_s=59 * 86_400, load=1.0), record("a", load=1.0)])
    buffer.flush()
    buffer.maintain(clock.now() + timedelta(days=3))
    assert content(buffer).keys() == {("a", NOW_MS)}


def test_predictions_are_kept_under_their_own_name_and_counted_apart(
    buffer: DataBuffer, tmp_path: Path
) -> None:
    rows = settled(["a", "b"], range(4), lambda s, m, b: b * 1.5, horizons=(1, 12), version=None)
    buffer.append_predictions(rows)
    buffer.append_predictions(settled(["a"], [0], lambda s, m, b: 9.0, version="v2"))
    for _ in range(2):
        found = buffer.read_predictions(START_MS, START_MS + 4 * BIN_MS)
        assert len(found) == 16
        assert found.target_ms.tolist() == sorted(found.target_ms.tolist())
        first = (found.server_name == "a") & (found.target_ms == START_MS) & (found.horizon == 1)
        assert found.p50[first].tolist() == [9.0]
        assert found.model_version[first].tolist() == ["v2"]
        assert set(found.model_version[~first]) == {None}
        assert len(buffer.read_predictions(START_MS, START_MS + BIN_MS)) == 4
        assert len(buffer.read_predictions(START_MS, START_MS + 4 * BIN_MS, horizon=12)) == 8
        buffer.flush()
    stats = buffer.get_stats()
    assert (stats["total_records"], stats["predictions"]["total_records"]) == (0, 16)
    path = tmp_path / "buffer" / f"predictions_{from_ms(START_MS).date()}.parquet"
    frame = pd.read_parquet(path)
    assert list(frame.columns) == [
        "origin",
        "target",
        "horizon",
        "server_name",
        "metric",
        "p10",
        "p50",
        "p90",
        "actual",
        "model_version",
        "model_p50",
    ]
    assert not frame.duplicated(["origin", "horizon", "server_name", "metric"]).any()


def test_empty_appends_take_no_ownership(tmp_path: Path) -> None:
    buffer = DataBuffer(tmp_path / "buffer")
    buffer.append([])
    buffer.append([{}])
    buffer.append_batch(batch([]))
    buffer.append_predictions(settled([], [], lambda s, m, b: 0.0))
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_is_told_the_pid_of_the_first(buffer: DataBuffer, tmp_path: Path) -> None:
    buffer.append([record(load=1)])
    second = DataBuffer(tmp_path / "buffer", clock=FakeClock(NOW))
    with pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}"):
        second.append([record(load=2)])
    assert len(content(second)) == 1, "reading needs no ownership"
    buffer.close()
    assert second.append([record("b", load=2)]).accepted == 1
    second.close()


def test_a_second_writing_process_ends_with_4(buffer: DataBuffer, tmp_path: Path) -> None:
    buffer.append([record(load=1)])
    code = (
        "import sys; from data_buffer import DataBuffer; from fleetcast.errors import FleetcastError\n"
        "try: DataBuffer(sys.argv[1]).open()\n"
        "except FleetcastError as error: print(error); sys.exit(error.exit_code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "buffer")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, str(os.getpid()) in done.stdout) == (4, True)


def test_a_closed_buffer_can_be_used_again(buffer: DataBuffer) -> None:
    buffer.append([record("a", load=1)])
    buffer.close()
    buffer.append([record("b", load=1)])
    assert len(content(buffer)) == 2


def test_threads_append_while_others_read_and_flush(buffer: DataBuffer) -> None:
    """Given four writers, a flusher and a reader at once, then no append is lost, none seen twice,
    and what a reader sees never becomes less."""
    buffer.append([record("first", load=0)])
    failures: list[BaseException] = []
    writing = threading.Event()

    def guarded(work: Any) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    def append(name: str) -> None:
        for tick in range(25):
            buffer.append_batch(batch([(name, NOW_MS - tick, {"load": float(tick)})]))

    def flush() -> None:
        while not writing.is_set():
            buffer.flush()

    def read() -> None:
        seen = 0
        while not writing.is_set():
            now_seen = len(content(buffer))
            assert now_seen >= seen
            seen = now_seen

    writers = [threading.Thread(target=guarded, args=(lambda n=n: append(f"w{n}"),)) for n in range(4)]
    others = [threading.Thread(target=guarded, args=(work,)) for work in (flush, read)]
    for thread in (*writers, *others):
        thread.start()
    for thread in writers:
        thread.join(60)
    writing.set()
    for thread in others:
        thread.join(60)
    assert failures == []
    assert len(content(buffer)) == 101
    assert buffer.get_stats()["total_records"] == 101


def test_the_log_says_buffer_at_the_start_and_at_each_flush(
    buffer: DataBuffer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        buffer.append([record(load=1)])
        buffer.flush()
    lines = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.INFO]
    assert [line.split()[:2] for line in lines] == [["buffer", "opened"], ["buffer", "flushed"]]


def test_a_read_only_folder_can_be_read_and_says_why_it_cannot_be_written(
    buffer: DataBuffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer.append([record(load=1)])
    buffer.close()
    real = os.open

    def read_only(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr("fleetcast.files.os.open", read_only)
    with pytest.raises(FleetcastError) as refused:
        buffer.append([record("b", load=1)])
    assert refused.value.exit_code == 3
    assert len(content(DataBuffer(tmp_path / "buffer"))) == 1


def test_a_refused_append_keeps_nothing_and_says_what_is_full(
    buffer: DataBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer.append([record("a", load=1)])

    def full(*_args: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("fleetcast.storage.log.os.writev", full)
        with pytest.raises(StorageFull, match=r"No space left on device \(free disk space\)"):
            buffer.append([record("b", load=1)])
    assert content(buffer).keys() == {("a", NOW_MS)}
    assert StorageBroken is not StorageFull


def test_the_program_prints_what_the_buffer_holds(
    buffer: DataBuffer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    buffer.append([record("a", load=1), record("b", load=1)])
    buffer.flush()
    assert main(["--data-buffer-dir", str(tmp_path / "buffer")]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "records      2 rows in 1 day files, 2026-01-15 to 2026-01-15, 0.0 MB",
        "predictions  0 rows in 0 day files, no day yet, 0.0 MB",
    ]


def test_the_program_refuses_a_folder_that_is_missing_and_takes_an_empty_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "buffer"
    assert main(["--data-buffer-dir", str(folder)]) == 6
    assert f"{folder} is no folder of a buffer (name the buffer's folder" in capsys.readouterr().err
    folder.mkdir()
    assert main(["--data-buffer-dir", str(folder)]) == 0
    assert "0 rows" in capsys.readouterr().out


def test_the_program_names_a_wrong_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "fleetcast.toml"
    config.write_text("[buffer]\nretention_dais = 3\n")
    assert main(["--config", str(config)]) == 2
    assert "retention_days" in capsys.readouterr().err
    assert date(2026, 1, 15) == NOW.date()


def test_a_probe_is_durable_and_seen_by_no_reader(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    with_rows = [{"timestamp": now.isoformat(), "server_name": "a", "cpu_pct": 1.0}]
    for n_records in (0, 1):
        buffer = DataBuffer(tmp_path)
        buffer.probe()
        if n_records:
            buffer.append(with_rows)
            buffer.probe()
        assert sum(len(batch) for batch in DataBuffer(tmp_path).iter_batches(0, 2**50)) == n_records
        buffer.close()
        assert sum(len(batch) for batch in DataBuffer(tmp_path).iter_batches(0, 2**50)) == n_records
    assert not list(tmp_path.glob("quarantine/*"))


@pytest.mark.parametrize("kind", [*KINDS, "dangling"])
@pytest.mark.parametrize("name", ["metrics_{:%Y-%m-%d}", "predictions_{:%Y-%m-%d}", "metrics_{:%Y-%m}"])
def test_what_stands_in_the_place_of_a_day_stops_no_write(
    tmp_path: Path, clock: FakeClock, kind: str, name: str
) -> None:
    place = tmp_path / f"{name.format(clock.now())}.parquet"
    place.symlink_to(tmp_path / "unmounted") if kind == "dangling" else put(kind, place)
    made = DataBuffer(tmp_path, clock=clock)
    made.append([record(cpu_pct=1.0)])
    made.flush()
    assert made.get_stats()["total_records"] == len(content(made)) == 1
    made.append([record(cpu_pct=2.0)])
    made.close()
    again = DataBuffer(tmp_path, clock=clock).open()
    assert len(content(again)) == 1
    again.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_odd_log_segment_costs_itself_only(
    tmp_path: Path, clock: FakeClock, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(kind, tmp_path / "buffer" / "log" / "metrics" / "000000000001.wal")
    made = DataBuffer(tmp_path / "buffer", clock=clock)
    made.append([record(cpu_pct=1.0)])
    assert len(content(made)) == 1
    made.flush()
    made.close()
    again = DataBuffer(tmp_path / "buffer", clock=clock).open()
    assert len(content(again)) == 1
    again.close()
    assert ("log segment path=" in caplog.text) == (kind != "unreadable" or os.geteuid() != 0)
