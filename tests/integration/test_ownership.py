"""Who may write a folder, with real processes: names are deleted, folders replaced, and no record goes."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks.programs import InferenceDaemon, wait_for
from fleetcast.clock import iso_z
from fleetcast.errors import DaemonAway, ExitCode

pytestmark = pytest.mark.slow
START = datetime.now(UTC) - timedelta(hours=1)


def records(first: int, n: int) -> list[dict[str, Any]]:
    return [
        {"timestamp": iso_z(START + timedelta(seconds=i)), "server_name": "web-01", "cpu_pct": float(i % 90)}
        for i in range(first, first + n)
    ]


def n_stored(folder: Path) -> int:
    return sum(len(pd.read_parquet(path)) for path in folder.glob("metrics_*.parquet"))


def test_a_deleted_lock_file_lets_no_second_daemon_in(tmp_path: Path) -> None:
    buffer = tmp_path / "data_buffer"
    with InferenceDaemon(tmp_path) as first:
        assert first.client.post_records(records(0, 100)).received == 100
        (buffer / ".owner.lock").unlink()
        (tmp_path / "other").mkdir()
        second = InferenceDaemon(tmp_path / "other", "--data-buffer-dir", str(buffer))
        try:
            assert second.launch().process.wait(30) == ExitCode.ALREADY_RUNNING
        finally:
            second.kill()
        assert f"pid {first.process.pid}" in second.output
        assert first.client.post_records(records(100, 100)).received == 100
        wait_for("a new lock file, for earlier releases", (buffer / ".owner.lock").exists, 10.0)
        assert first.stop() == ExitCode.OK
    assert n_stored(buffer) == 200


def test_a_replaced_folder_stops_the_daemon_with_a_line_and_nothing_is_written_there(tmp_path: Path) -> None:
    buffer, moved = tmp_path / "data_buffer", tmp_path / "moved"
    with InferenceDaemon(tmp_path) as daemon:
        assert daemon.client.post_records(records(0, 100)).received == 100
        buffer.rename(moved)
        buffer.mkdir()
        with pytest.raises(DaemonAway):
            daemon.client.post_records(records(100, 100))
        assert daemon.process.wait(30) == ExitCode.FAILED
        assert "data_buffer" in daemon.output.splitlines()[-1]
        assert "no longer" in daemon.output.splitlines()[-1]
    assert list(buffer.iterdir()) == []
    with InferenceDaemon(tmp_path, "--data-buffer-dir", str(moved)) as daemon:
        assert daemon.stop() == ExitCode.OK
    assert n_stored(moved) == 100


def test_records_in_a_deleted_log_segment_are_written_again(tmp_path: Path) -> None:
    with InferenceDaemon(tmp_path) as daemon:
        assert daemon.client.post_records(records(0, 50)).received == 50
        for segment in (tmp_path / "data_buffer" / "log" / "metrics").iterdir():
            segment.unlink()
        assert daemon.client.post_records(records(50, 50)).received == 50
        assert daemon.stop() == ExitCode.OK
        assert "deleted" in (tmp_path / "inference_daemon.log").read_text()
    assert n_stored(tmp_path / "data_buffer") == 100
