from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from odd_files import KINDS, put

from fleetcast.errors import BadData
from fleetcast.sources.recording import Cut, load_recording, parse_formula

NAN = float("nan")
START = datetime(2026, 1, 15, 10, 0, tzinfo=UTC)
SAMPLE = Path(__file__).parents[1] / "samples" / "smd_fleet.parquet"


def at(minute: int) -> datetime:
    return START + timedelta(minutes=minute)


def write(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two servers, three minutes, stored by server as recordings usually are."""
    return write(
        tmp_path / "fleet.parquet",
        timestamp=pa.array([at(0), at(1), at(2)] * 2, pa.timestamp("ms", "UTC")),
        server_name=["web"] * 3 + ["db"] * 3,
        read=pa.array([1.0, 2.0, 3.0, 10.0, None, 30.0]),
        write=pa.array([0.5, 0.5, NAN, 5.0, 5.0, 5.0]),
        label=["a"] * 6,
    )


def test_rows_come_in_the_order_of_time_then_server(file: Path) -> None:
    recording = load_recording(file)
    names = [recording.server_names[code] for code in recording.server_codes]
    assert names == ["db", "web"] * 3
    assert recording.first == at(0)
    assert recording.last == at(2)


def test_without_a_map_every_numeric_column_is_a_metric(file: Path) -> None:
    assert list(load_recording(file).metrics) == ["read", "write"]


def test_a_map_adds_and_scales_and_is_absent_where_a_term_is(file: Path) -> None:
    recording = load_recording(file, [parse_formula("io=read*2+write")])
    assert recording.records(slice(0, 9)) == [
        {"timestamp": "2026-01-15T10:00:00Z", "server_name": "db", "io": 25.0},
        {"timestamp": "2026-01-15T10:00:00Z", "server_name": "web", "io": 2.5},
        {"timestamp": "2026-01-15T10:01:00Z", "server_name": "web", "io": 4.5},
        {"timestamp": "2026-01-15T10:02:00Z", "server_name": "db", "io": 65.0},
    ]


def test_absent_values_are_left_out_of_the_record(file: Path) -> None:
    records = load_recording(file).records(slice(2, 3))
    assert records == [{"timestamp": "2026-01-15T10:01:00Z", "server_name": "db", "write": 5.0}]


def test_a_cut_keeps_only_the_wanted_servers_and_time(file: Path) -> None:
    cut = Cut(servers=frozenset({"web"}), start=at(1), days=1 / 1440)
    recording = load_recording(file, [], cut)
    assert [r["timestamp"] for r in recording.records(slice(0, 9))] == ["2026-01-15T10:01:00Z"]


def test_compacting_drops_the_names_no_row_uses_and_changes_no_row(file: Path) -> None:
    recording = load_recording(file, [], Cut(servers=frozenset({"web"})))
    assert recording.compact().server_names == ("web",)
    assert recording.compact().records(slice(0, 9)) == recording.records(slice(0, 9))


def test_a_shift_moves_every_time_by_the_same_step(file: Path) -> None:
    shifted = load_recording(file).shift(timedelta(days=100, seconds=1))
    assert shifted.first == at(0) + timedelta(days=100, seconds=1)
    assert shifted.last - shifted.first == timedelta(minutes=2)


def test_batches_cover_every_row_once_and_never_cross_a_step(file: Path) -> None:
    recording = load_recording(file)
    assert list(recording.batches(60, 100)) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert list(recording.batches(300, 4)) == [slice(0, 4), slice(4, 6)]


def test_text_times_and_dictionary_names_are_read_too(tmp_path: Path) -> None:
    path = write(
        tmp_path / "text.parquet",
        timestamp=["2026-01-15T10:00:00Z", "2026-01-15T10:01:00Z"],
        server_name=pa.array(["web", "db"]).dictionary_encode(),
        cpu_pct=pa.array([1, 2]),
    )
    assert load_recording(path).records(slice(0, 1)) == [
        {"timestamp": "2026-01-15T10:00:00Z", "server_name": "web", "cpu_pct": 1.0}
    ]


def test_times_without_a_zone_are_utc(tmp_path: Path) -> None:
    naive = pa.array([START.replace(tzinfo=None)], pa.timestamp("us"))
    path = write(tmp_path / "naive.parquet", timestamp=naive, server_name=["a"], cpu_pct=[1.0])
    assert load_recording(path).first == START


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"server_name": ["a"], "cpu_pct": [1.0]}, r"no column timestamp .it has server_name, cpu_pct"),
        ({"timestamp": [1], "server_name": ["a"], "cpu_pct": [1.0]}, "must be a timestamp"),
        ({"timestamp": ["soon"], "server_name": ["a"], "cpu_pct": [1.0]}, "cannot be read"),
        ({"timestamp": [START], "server_name": ["a"], "text": ["x"]}, "no numeric column"),
        ({"timestamp": [START], "server_name": [None], "cpu_pct": [1.0]}, "server_name is absent in 1"),
        ({"timestamp": [None, START], "server_name": ["a", "b"], "c": [1.0, 1.0]}, "absent in 1 rows"),
        ({"timestamp": [START], "server_name": ["a"], "cpu_pct": [NAN]}, "no such rows"),
    ],
)
def test_a_file_of_another_shape_is_refused_with_the_reason(
    tmp_path: Path, columns: dict[str, object], message: str
) -> None:
    with pytest.raises(BadData, match=message):
        load_recording(write(tmp_path / "bad.parquet", **columns))


def test_an_unknown_server_is_refused_with_the_known_ones(file: Path) -> None:
    with pytest.raises(BadData, match=r'no such server: mail .there are \["db", "web"\]'):
        load_recording(file, [], Cut(servers=frozenset({"mail"})))


def test_a_map_of_a_text_column_is_refused(file: Path) -> None:
    with pytest.raises(BadData, match="label is not numeric"):
        load_recording(file, [parse_formula("label")])


@pytest.mark.parametrize("content", [None, b"", b"PAR1 junk"])
def test_a_file_that_is_missing_or_no_parquet_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadData, match=r"does not exist|cannot be read"):
        load_recording(path)


def test_the_bundled_sample_is_complete() -> None:
    recording = load_recording(SAMPLE, [parse_formula("cpu_pct=cpu_r_norm01*100")])
    assert len(recording) == 8 * 7 * 1440 + 9 * 1440
    cpu = recording.metrics["cpu_pct"]
    assert not np.isnan(cpu).any()
    assert 0.0 <= cpu.min() <= cpu.max() <= 100.0001


@pytest.mark.parametrize("kind", KINDS)
def test_one_odd_file_in_a_folder_costs_itself_only(
    file: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(kind, file.parent / "a.parquet")
    assert len(load_recording(file.parent)) == len(load_recording(file))
    assert ("skipped an unreadable file" in caplog.text) == (kind != "folder")


@pytest.mark.parametrize("kind", KINDS)
def test_a_recording_that_is_no_file_is_said_at_once(tmp_path: Path, kind: str) -> None:
    put(kind, tmp_path / "a.parquet")
    with pytest.raises(BadData, match=r"a\.parquet"):
        load_recording(tmp_path / "a.parquet")
