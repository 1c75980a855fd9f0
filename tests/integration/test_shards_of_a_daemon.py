"""Shards of a real daemon: the same forecasts and accounts as without, whatever is killed between."""

import os
import signal
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import psutil
import pytest

from benchmarks.programs import InferenceDaemon, wait_for
from data_buffer import DataBuffer
from fleetcast.clock import iso_z, to_ms
from fleetcast.schema import SettledForecasts

pytestmark = pytest.mark.slow
START = datetime(2020, 1, 1, tzinfo=UTC)
N_SERVERS, N_BINS = 300, 15  # two parts of a sweep; the model takes over after an hour


def records(number: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(number)
    moment = iso_z(START + timedelta(minutes=5 * number))
    loads = 40 + 10 * np.sin(number / 5 + np.arange(N_SERVERS)) + random.normal(0, 2, N_SERVERS)
    return [
        {"timestamp": moment, "server_name": f"web-{k:03}", "cpu_pct": round(float(load), 2)}
        for k, load in enumerate(loads)
    ]


def feed(daemon: InferenceDaemon, first: int, last: int) -> None:
    """Send bins one by one, each as soon as it is taken, and wait for the sweeps."""
    for number in range(first, last):
        wait_for("the POST to be taken", partial(daemon.takes, records(number)))
    wait_for("the sweeps", lambda: daemon.status()["backlog"] == 0)


def start(folder: Path, n_shards: int) -> InferenceDaemon:
    return InferenceDaemon(folder, "--clock", "data", "--engine", "local", "--shards", str(n_shards))


def wait_for_shards(daemon: InferenceDaemon, n: int) -> None:
    wait_for(f"{n} shards", lambda: daemon.status()["sweep"]["shards"]["ready"] == n)


def shards_of(daemon: InferenceDaemon) -> list[psutil.Process]:
    children = psutil.Process(daemon.process.pid).children()
    alive = (child for child in children if child.status() != psutil.STATUS_ZOMBIE)
    return [child for child in alive if "fleetcast.serving.shard" in child.cmdline()]


def settled(folder: Path) -> dict[tuple[Any, ...], tuple[float, float]]:
    buffer = DataBuffer(folder / "data_buffer", expire=False)
    rows: SettledForecasts = buffer.read_predictions(0, 2 * to_ms(START))
    keys = zip(rows.origin_ms, rows.horizon, rows.server_name, rows.metric, strict=True)
    found = dict(zip(keys, zip(rows.p50, rows.actual, strict=True), strict=True))
    assert len(found) == len(rows), "no forecast is settled twice"
    return found


def test_the_forecasts_are_the_same_and_each_is_settled_once(tmp_path: Path) -> None:
    alone, divided, changed = (tmp_path / name for name in ("alone", "divided", "changed"))
    for folder in (alone, divided, changed):
        folder.mkdir()
    with start(alone, 1) as daemon:
        assert shards_of(daemon) == []
        wait_for("the model", lambda: daemon.status()["model"]["version"] is not None)
        feed(daemon, 0, N_BINS)
        expected = daemon.status()["ledger"]
        assert daemon.stop() == 0
    # a shard is killed in the middle of its life
    with start(divided, 2) as daemon:
        wait_for("the model", lambda: daemon.status()["model"]["version"] is not None)
        wait_for_shards(daemon, 2)
        feed(daemon, 0, N_BINS // 2)
        victim, other = shards_of(daemon)
        victim.send_signal(signal.SIGKILL)
        feed(daemon, N_BINS // 2, N_BINS)
        wait_for_shards(daemon, 2)
        status = daemon.status()
        assert status["sweep"]["shards"] == {"wanted": 2, "ready": 2, "restarts": 1}
        assert b"fleetcast_shard_restarts 1.0" in urlopen(f"{daemon.url}/metrics").read()
        assert status["ledger"] == expected
        assert other.pid in {shard.pid for shard in shards_of(daemon)}
        pids = [shard.pid for shard in shards_of(daemon)]
        assert daemon.stop() == 0
        assert not any(psutil.pid_exists(pid) for pid in pids)
    assert settled(divided) == settled(alone)
    # the daemon is killed, and started with another number of shards, and with none
    for n_shards, first, last in ((4, 0, 5), (2, 5, 10), (1, 10, N_BINS)):
        with start(changed, n_shards) as daemon:
            wait_for("the model", lambda daemon=daemon: daemon.status()["model"]["version"] is not None)
            feed(daemon, first, last)
            pids = [shard.pid for shard in shards_of(daemon)]
            counts = daemon.status()["ledger"]
            os.kill(daemon.process.pid, signal.SIGKILL)
            wait_for("its shards to end with it", lambda pids=pids: not any(map(psutil.pid_exists, pids)))
    assert (counts["settled"], counts["expired"]) == (expected["settled"], expected["expired"])
    assert settled(changed).keys() == settled(alone).keys()
