"""The inference daemon as a process: real HTTP, real signals, kill -9 at any moment."""

import json
import random
import shutil
import signal
import socket
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks.programs import InferenceDaemon, Program, free_port, wait_for
from data_buffer import DataBuffer
from fleetcast.clock import iso_z
from fleetcast.errors import DaemonAway, ExitCode
from fleetcast.files import read_json
from fleetcast.sources.client import DaemonClient

pytestmark = pytest.mark.slow
START = datetime(2020, 1, 1, tzinfo=UTC)
SERVERS = ("a", "b", "c")
Record = dict[str, Any]


def minute(number: int) -> list[Record]:
    """One record of each server; values tell where they come from."""
    moment = iso_z(START + timedelta(minutes=number))
    return [
        {"timestamp": moment, "server_name": name, "cpu_pct": (number * 7 + index) % 100, "mem_pct": 50.0}
        for index, name in enumerate(SERVERS)
    ]


def live(**values: float) -> Record:
    return {"timestamp": iso_z(datetime.now(UTC)), "server_name": "web-01", **(values or {"cpu_pct": 12.5})}


def stored(folder: Path, kind: str = "metrics") -> pd.DataFrame:
    parts = [pd.read_parquet(path) for path in sorted((folder / "data_buffer").glob(f"{kind}_*"))]
    return pd.concat(parts, ignore_index=True)


def test_a_live_daemon_answers_the_printed_commands(tmp_path: Path) -> None:
    with InferenceDaemon(tmp_path) as daemon:
        assert daemon.client.get("/predictions/current")["predictions"] == {}
        assert daemon.client.post_records([live()]).received == 1
        shown = subprocess.run(
            ["curl", "-s", f"{daemon.url}/predictions/current"], capture_output=True, check=True
        ).stdout
        assert json.loads(shown)["predictions"]["web-01"]["source"] == "warming_up"
        if shutil.which("jq"):
            asked = ["jq", ".predictions | [.[] | .current | .cpu_pct] | add / length"]
            mean = subprocess.run(asked, input=shown, capture_output=True, check=True).stdout
            assert float(mean) == 12.5
        assert daemon.stop() == ExitCode.OK
    log = (tmp_path / "inference_daemon.log").read_text()
    assert "INFO" in log
    assert "buffer" in log


def test_a_stop_flushes_what_was_accepted(tmp_path: Path) -> None:
    with InferenceDaemon(tmp_path) as daemon:
        daemon.client.post_records([live()])
        assert daemon.stop() == ExitCode.OK
    assert len(stored(tmp_path)) == 1
    assert (
        not list((tmp_path / "data_buffer" / "log" / "metrics").glob("*"))
        or DataBuffer(tmp_path / "data_buffer").get_stats()["total_records"] == 1
    )


def test_requests_at_work_are_answered_during_a_stop(tmp_path: Path) -> None:
    with InferenceDaemon(tmp_path) as daemon:
        answers: list[int] = []
        refused = threading.Event()

        def send() -> None:
            client = DaemonClient(daemon.url)
            while not refused.is_set():
                try:
                    answers.append(client.post_records([live()]).received)
                except DaemonAway:
                    refused.set()

        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_for("some answers", lambda: len(answers) > 20)
        assert daemon.stop() == ExitCode.OK
        refused.set()
        for thread in threads:
            thread.join()
    assert set(answers) == {1}


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with InferenceDaemon(tmp_path) as daemon, _half_a_request(daemon):
        daemon.process.send_signal(signal.SIGTERM)
        wait_for("the stop to begin", lambda: "stopping" in daemon.output)
        assert daemon.stop(signal.SIGTERM, limit_s=5.0) == 128 + signal.SIGTERM


def test_a_request_that_hangs_holds_the_stop_up_for_a_bounded_time(tmp_path: Path) -> None:
    with InferenceDaemon(tmp_path) as daemon, _half_a_request(daemon):
        daemon.client.post_records([live()])
        assert daemon.stop(limit_s=20.0) == ExitCode.OK
    assert len(stored(tmp_path)) == 1


def _half_a_request(daemon: InferenceDaemon) -> socket.socket:
    wire = socket.create_connection(("127.0.0.1", daemon.port))
    wire.sendall(b"POST /feed/data HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    return wire


def test_a_second_daemon_names_the_first_and_exits_4(tmp_path: Path) -> None:
    with InferenceDaemon(tmp_path) as daemon:
        second = InferenceDaemon(tmp_path, port=daemon.port)
        assert second.run() == ExitCode.ALREADY_RUNNING
        assert f"pid {daemon.process.pid}" in second.output
        assert daemon.client.post_records([live()]).received == 1


def test_a_taken_port_exits_3(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with InferenceDaemon(tmp_path) as daemon:
        second = InferenceDaemon(tmp_path / "other", port=daemon.port)
        assert second.run() == ExitCode.CANNOT_START
        assert f"port {daemon.port}" in second.output


def test_wrong_settings_start_nothing_and_leave_nothing(tmp_path: Path) -> None:
    daemon = Program("tft_inference_daemon.py", tmp_path, "--host", "0.0.0.0", "--port", str(free_port()))
    assert daemon.run() == ExitCode.BAD_SETTINGS
    assert "TFT_API_KEY" in daemon.output
    assert [path.name for path in tmp_path.iterdir()] == [daemon.console.name]


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments_it_loses_no_record_and_counts_no_forecast_twice(
    tmp_path: Path, seed: int
) -> None:
    """Recorded hours are fed minute by minute through five lives of one daemon."""
    rng = random.Random(seed)
    n_minutes, n_lives, sent = 300, 5, 0
    for life in range(n_lives):
        with InferenceDaemon(tmp_path, "--clock", "data") as daemon:
            goal = n_minutes if life == n_lives - 1 else sent + rng.randint(20, 60)
            killer = threading.Timer(rng.uniform(0.2, 1.5), daemon.process.kill)
            if life < n_lives - 1:
                killer.start()
            while sent < goal:
                try:
                    daemon.client.post_records(minute(sent))
                except DaemonAway as error:
                    if daemon.process.poll() is not None:
                        break
                    assert getattr(error, "status", 0) in (0, 429), error
                    continue
                sent += 1  # acknowledged: from now on it must never be lost
            killer.cancel()
            if life == n_lives - 1:
                wait_for("the last sweep", lambda: daemon.status()["backlog"] == 0)
                status = daemon.status()
                assert daemon.stop() == ExitCode.OK
    records = stored(tmp_path)
    assert len(records) == n_minutes * len(SERVERS)
    assert not records.duplicated(["server_name", "timestamp"]).any()
    ledger = read_json(tmp_path / "data_buffer" / "ledger.json")
    waiting = sum(count for origin in ledger["waiting"].values() for count in origin.values())
    assert ledger["opened"] == ledger["settled"] + ledger["expired"] + waiting
    rows = stored(tmp_path, "predictions")
    assert not rows.duplicated(["origin", "horizon", "server_name", "metric"]).any()
    # every closed bin was an origin, and none was counted twice: one short of all bins stays open
    n_bins = n_minutes // 5 - 1
    per_sweep = len(SERVERS) * 2
    assert status["ledger"]["opened"] == n_bins * per_sweep * 3
    assert ledger["settled"] == len(rows) == sum(max(0, n_bins - h) for h in (1, 12, 96)) * per_sweep
    assert ledger["expired"] == 0


def test_what_a_daemon_writes_is_for_its_user_and_group_alone(tmp_path: Path) -> None:
    with InferenceDaemon(tmp_path) as daemon:
        daemon.client.post_records([live()])
    modes = {path: path.stat().st_mode for path in tmp_path.rglob("*") if path != daemon.console}
    assert len(modes) > 5
    assert {path.name: oct(mode) for path, mode in modes.items() if mode & 0o027} == {}
