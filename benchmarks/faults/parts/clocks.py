"""Clocks that jump, processes that stand still, a daemon that is away."""

import signal
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.parts.feed import (
    Feeder,
    Fleet,
    Tally,
    count_forecasts,
    count_records,
    stored,
    timed_recovery,
)
from benchmarks.faults.parts.trainings import RetrainingDaemon
from benchmarks.programs import ROOT, InferenceDaemon, Program, wait_for
from fleetcast.clock import iso_z, monotonic, plain_utc, sleep
from fleetcast.files import read_json, read_json_lines, write_json
from fleetcast.storage.store import DataBuffer

JUMPS_S = (3600, 0, -3600, 0, 86_400, 0, -86_400, 0)
QUICK_BINS = "[bins]\nbin_s = 1\nclose_grace_s = 0.2\n"
PHASE_S = 3.0
RESUME_LIMIT_S = 20.0


class ShiftedInferenceDaemon(InferenceDaemon):
    """The inference daemon on a clock that can be set."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._offset = folder / "clock_offset"
        self.set_clock(0)
        python, script, *flags = self._command
        shifted = "benchmarks.faults.parts.shifted_clock"
        self._command = [python, "-m", shifted, str(self._offset), script, *flags]
        self._environ["PYTHONPATH"] = str(ROOT)

    def set_clock(self, offset_s: float) -> None:
        """Step the clock; readers never see half a number."""
        fresh = self._offset.with_suffix(".new")
        fresh.write_text(str(offset_s))
        fresh.replace(self._offset)


def clock_jumps(folder: Path, jumps_s: Sequence[float] = JUMPS_S) -> Tally:
    """Set the host's clock (sender and daemon alike) and back; forecasts must come again soon."""
    tally = Tally()
    (folder / "fleetcast.toml").write_text(QUICK_BINS)
    sent: set[str] = set()
    with ShiftedInferenceDaemon(folder) as daemon:
        _feed_for(daemon, 0, PHASE_S, sent, tally)
        for offset_s in jumps_s:
            daemon.set_clock(offset_s)
            timed_recovery(tally, lambda o=offset_s: _until_forecast(daemon, o, sent, tally))  # type: ignore[misc]
            _feed_for(daemon, offset_s, PHASE_S, sent, tally)
        ledger = daemon.status()["ledger"]
        tally.wrong += ledger["opened"] != ledger["settled"] + ledger["expired"] + ledger["open"]
        assert daemon.stop() == 0, daemon.output
    frame = stored(folder)
    tally.lost += len(sent) - len(frame)
    tally.doubled += int(frame.duplicated(["server_name", "timestamp"]).sum())
    return tally


def _send(daemon: InferenceDaemon, offset_s: float, sent: set[str], tally: Tally) -> None:
    moment = iso_z(datetime.now(UTC) + timedelta(seconds=offset_s))
    value = round(50 + 10 * float(np.sin(len(sent))), 2)
    answer = daemon.client.post_records([{"timestamp": moment, "server_name": "web", "cpu_pct": value}])
    tally.acknowledged += answer.received
    tally.wrong += answer.rejected
    sent.add(moment)


def _feed_for(daemon: InferenceDaemon, offset_s: float, seconds: float, sent: set[str], tally: Tally) -> None:
    until = monotonic() + seconds
    while monotonic() < until:
        _send(daemon, offset_s, sent, tally)
        sleep(0.1)


def _until_forecast(daemon: InferenceDaemon, offset_s: float, sent: set[str], tally: Tally) -> None:
    """Feed until the newest forecast begins at the present of the clock as it is now set."""
    deadline = monotonic() + RESUME_LIMIT_S
    while monotonic() < deadline:
        _send(daemon, offset_s, sent, tally)
        web: dict[str, Any] = daemon.client.get("/predictions/current")["predictions"].get("web", {})
        if web.get("timestamps"):
            now = datetime.now(UTC) + timedelta(seconds=offset_s)
            if abs((datetime.fromisoformat(web["timestamps"][0]) - now).total_seconds()) < 5:
                return
        sleep(0.1)
    raise AssertionError(
        f"no forecast for the present {RESUME_LIMIT_S:.0f} s after the clock was set by {offset_s} s"
    )


def stopped_process(folder: Path, seconds: float) -> Tally:
    """SIGSTOP the inference daemon in the middle of a replay; senders wait, nothing is lost."""
    fleet = Fleet()
    n_steps = 5 * 110 + 1
    daemon = InferenceDaemon(folder, "--clock", "data")
    with daemon:
        feeder = Feeder(fleet, daemon.url, 0, n_steps)
        feeder.start()
        sleep(1.0)
        daemon.process.send_signal(signal.SIGSTOP)
        sleep(seconds)
        before = feeder.acknowledged_steps
        daemon.process.send_signal(signal.SIGCONT)
        timed_recovery(
            feeder.tally, lambda: wait_for("progress", lambda: feeder.acknowledged_steps > before + 1)
        )
        wait_for("the rest of the replay", lambda: not feeder.is_alive(), 200)
        assert not feeder.failure, feeder.failure
        wait_for("the last sweep", lambda: daemon.status()["backlog"] == 0)
        assert daemon.stop() == 0, daemon.output
    count_records(folder, fleet, n_steps, feeder.tally)
    count_forecasts(folder, fleet, n_steps, feeder.tally)
    return feeder.tally


def stopped_retraining(folder: Path, seconds: float) -> Tally:
    """SIGSTOP the retraining daemon; it checks on, and makes up for no missed check."""
    tally = Tally()
    with RetrainingDaemon(folder) as daemon:
        wait_for("the first check", lambda: (folder / "drift_metrics.json").exists())
        daemon.process.send_signal(signal.SIGSTOP)
        sleep(seconds)
        before = len(list(read_json_lines(folder / "decisions.jsonl")))
        daemon.process.send_signal(signal.SIGCONT)
        timed_recovery(tally, lambda: wait_for("a check", lambda: _n_checks(folder) > before))
        sleep(1.0)
        tally.doubled += max(0, _n_checks(folder) - before - 5)  # at 2 per second, with room
        assert daemon.stop() == 0, daemon.output
    return tally


def _n_checks(folder: Path) -> int:
    return len(list(read_json_lines(folder / "decisions.jsonl")))


def inference_daemon_away(folder: Path, n_checks: int) -> Tally:
    """Check `n_checks` times without an inference daemon (12 are an hour): none trains, none fails."""
    tally = Tally()
    inference = InferenceDaemon(folder, "--clock", "data")
    with RetrainingDaemon(folder, inference.url) as daemon:
        wait_for("the checks", lambda: _n_checks(folder) >= n_checks, 30 + 2.0 * n_checks)
        decisions = list(read_json_lines(folder / "decisions.jsonl"))
        tally.wrong += any(line["should_retrain"] or line["quiet"]["is_quiet"] for line in decisions)
        tally.acknowledged += len(decisions)
        with inference:
            before = _n_checks(folder)
            inference.client.post_records(Fleet().records(0))
            timed_recovery(tally, lambda: wait_for("a fleet", lambda: _sees_fleet(folder, before)))
        assert daemon.process.poll() is None
        assert daemon.stop() == 0, daemon.output
    return tally


def _sees_fleet(folder: Path, before: int) -> bool:
    fresh = list(read_json_lines(folder / "decisions.jsonl"))[before:]
    return any("cpu" in name and value for line in fresh for name, value in line["quiet"]["measured"].items())


def history_in_the_future(folder: Path) -> Tally:
    """A state whose trainings lie ahead (the clock was set back): read, warned of, not believed."""
    tally = Tally()
    with closing(DataBuffer(folder / "data_buffer")) as buffer:  # with neither it could not look
        buffer.append([{"timestamp": datetime.now(UTC), "server_name": "a", "cpu_pct": 1.0}])
    ahead = plain_utc(datetime.now(UTC) + timedelta(days=1))
    state = {"last_training_time": ahead, "training_history": [ahead], "total_trainings": 1}
    write_json(folder / "retraining_state.json", state)
    program = Program("adaptive_retraining_daemon.py", folder, "--once", "--daemon-url", "http://127.0.0.1:9")
    tally.wrong += program.run() != 0
    stored_last = read_json(folder / "retraining_state.json")["last_training_time"]
    tally.wrong += stored_last >= ahead
    tally.wrong += "WARNING" not in program.output
    return tally
