"""A settled actual is the mean of what is stored, whatever order several senders' records arrive in."""

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks.programs import InferenceDaemon, wait_for
from fleetcast.clock import iso_z
from fleetcast.errors import ExitCode
from fleetcast.loop import Stop
from fleetcast.sources.client import RecordSender

pytestmark = pytest.mark.slow
START = datetime(2024, 1, 1, tzinfo=UTC)
BINS = 30


def record(seconds: float, cpu: float) -> dict[str, Any]:
    return {
        "timestamp": iso_z(START + timedelta(seconds=seconds)), "server_name": "web-01", "cpu_pct": cpu,
    }  # fmt: skip


def read(folder: Path, kind: str) -> pd.DataFrame:
    paths = sorted((folder / "data_buffer").glob(f"{kind}_*.parquet"))
    return pd.concat([pd.read_parquet(path) for path in paths], ignore_index=True)


@pytest.mark.parametrize("kill", [False, True])
def test_two_agents_of_one_server_settle_with_the_mean_of_both(tmp_path: Path, kill: bool) -> None:
    """Given an agent that is a bin ahead of another, whose records come up to 10 minutes late."""
    daemon = InferenceDaemon(tmp_path, "--clock", "data").start()
    try:
        sender = RecordSender(daemon.client, Stop(), give_up_s=60.0)
        for number in range(BINS):
            at = 300 * number
            sender.send([record(at, 10.0), record(at + 100, 10.0)])
            late = at + 20 if number % 3 == 0 else at - 280  # in time, or when the bin has been settled
            sender.send([record(late, 106.0)] if late > 0 else [])
            if kill and number == BINS // 2:
                daemon.kill()
                daemon.start()
        sender.send([record(300 * BINS + 40, 10.0)])
        wait_for("the last sweep", lambda: daemon.status()["backlog"] == 0)
        status = daemon.status()
        assert daemon.stop() == ExitCode.OK
    finally:
        if daemon.process.poll() is None:
            daemon.kill()
    rows, settled = read(tmp_path, "metrics"), read(tmp_path, "predictions")
    means = rows.groupby(rows["timestamp"].dt.floor("5min"))["cpu_pct"].mean()
    assert not settled.duplicated(["origin", "horizon", "server_name", "metric"]).any()
    assert len(settled) > BINS
    wrong = [
        (target, actual, means[target])
        for target, actual in zip(settled["target"], settled["actual"], strict=True)
        if not math.isclose(actual, means[target], rel_tol=1e-6)
    ]
    assert wrong == []
    ledger = status["ledger"]
    assert ledger["opened"] == ledger["settled"] + ledger["expired"] + ledger["open"]
    assert ledger["settled"] == len(settled)
