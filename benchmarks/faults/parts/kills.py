"""kill -9 of the inference daemon at random points of a replay."""

import random
from pathlib import Path
from typing import Any

from benchmarks.faults.parts.feed import (
    Feeder,
    Fleet,
    Tally,
    count_forecasts,
    count_records,
    timed_recovery,
)
from benchmarks.programs import InferenceDaemon, wait_for
from fleetcast.clock import monotonic, sleep


def kill_inference_daemon(folder: Path, n_kills: int, *, seed: int = 1) -> Tally:
    """Replay while the daemon is killed `n_kills` times; account for every record and forecast."""
    chance = random.Random(seed)
    n_steps = 5 * (110 + 4 * n_kills) + 1
    fleet = Fleet()
    daemon = InferenceDaemon(folder, "--clock", "data")
    with daemon:
        feeder = Feeder(fleet, daemon.url, 0, n_steps)
        feeder.start()
        for _ in range(n_kills):
            sleep(chance.uniform(0.02, 1.5))
            if chance.random() < 0.25:  # also in the middle of a recovery
                daemon.kill()
                daemon.launch()
                sleep(chance.uniform(0.0, 2.0))
            daemon.kill()
            timed_recovery(feeder.tally, daemon.start)
        wait_for("the rest of the replay", lambda: not feeder.is_alive(), 300)
        assert not feeder.failure, feeder.failure
        wait_for("the last sweep", lambda: daemon.status()["backlog"] == 0)
        ledger: dict[str, Any] = daemon.status()["ledger"]
        assert daemon.stop() == 0, daemon.output
    count_records(folder, fleet, n_steps, feeder.tally)
    count_forecasts(folder, fleet, n_steps, feeder.tally)
    feeder.tally.wrong += ledger["opened"] != ledger["settled"] + ledger["expired"] + ledger["open"]
    return feeder.tally


def stop_inference_daemon(folder: Path, n_stops: int, *, seed: int = 2) -> Tally:
    """The same with SIGTERM: what was acknowledged is there, and the exit code is 0."""
    chance = random.Random(seed)
    n_steps = 5 * (20 + 4 * n_stops) + 1
    fleet = Fleet()
    daemon = InferenceDaemon(folder, "--clock", "data")
    with daemon:
        feeder = Feeder(fleet, daemon.url, 0, n_steps)
        feeder.start()
        for _ in range(n_stops):
            sleep(chance.uniform(0.1, 1.0))
            began_s = monotonic()
            assert daemon.stop() == 0, daemon.output
            assert monotonic() - began_s < 15
            timed_recovery(feeder.tally, daemon.start)
        wait_for("the rest of the replay", lambda: not feeder.is_alive(), 300)
        wait_for("the last sweep", lambda: daemon.status()["backlog"] == 0)
        assert daemon.stop() == 0, daemon.output
    count_records(folder, fleet, n_steps, feeder.tally)
    count_forecasts(folder, fleet, n_steps, feeder.tally)
    return feeder.tally
