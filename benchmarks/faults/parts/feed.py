"""A fleet whose every record is known in advance, fed to a daemon that may die at any moment.

Owns: the records, who acknowledged them, and the count of what is lost or doubled afterwards,
read with pandas and not with our own code wherever a reader of ours could hide a fault.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fleetcast.clock import iso_z, monotonic, sleep, to_ms
from fleetcast.errors import DaemonAway
from fleetcast.sources.client import DaemonClient

START = datetime(2026, 1, 5, tzinfo=UTC)
STEP = timedelta(minutes=1)
BIN = timedelta(minutes=5)
SETTLED = (1, 12, 96)
METRICS = ("cpu_pct", "mem_pct")
GIVE_UP_S = 120.0


@dataclass(frozen=True)
class Fleet:
    """Servers that send a record per minute; values are exact at two decimals."""

    n_servers: int = 5
    start: datetime = START

    @property
    def names(self) -> tuple[str, ...]:
        """The servers."""
        return tuple(f"web-{number:02d}" for number in range(self.n_servers))

    def records(self, step: int) -> list[dict[str, Any]]:
        """Return the records of one minute."""
        moment = iso_z(self.start + step * STEP)
        return [
            {"timestamp": moment, "server_name": name, **self.values(step, place)}
            for place, name in enumerate(self.names)
        ]

    def values(self, step: int, place: int) -> dict[str, float]:
        """Return what a server measured: a daily rhythm, its own level, a bit that tells the step."""
        wave = 20 * np.sin(2 * np.pi * step / 1440 + place)
        return {
            "cpu_pct": round(float(40 + wave) + step % 7 + place, 2),
            "mem_pct": round(30 + 2.5 * place + step % 11, 2),
        }


@dataclass
class Tally:
    """What was sent, acknowledged, and found in the end."""

    acknowledged: int = 0  # records
    retries: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    recovered_s: list[float] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing was lost, doubled or changed."""
        return self.lost == self.doubled == self.wrong == 0


class Feeder(threading.Thread):
    """Sends steps in order, each again and again until it is acknowledged."""

    def __init__(self, fleet: Fleet, url: str, first: int, last: int, *, pause_s: float = 0.0) -> None:
        super().__init__(daemon=True)
        self._fleet = fleet
        self._client = DaemonClient(url, api_key="", timeout_s=10.0)
        self._steps = range(first, last)
        self._pause_s = pause_s
        self.tally = Tally()
        self.acknowledged_steps = first
        self.failure = ""

    def run(self) -> None:
        """Send everything, or say why not."""
        for step in self._steps:
            if not self._send(step):
                return
            self.acknowledged_steps = step + 1
            sleep(self._pause_s)

    def _send(self, step: int) -> bool:
        records = self._fleet.records(step)
        deadline_s = monotonic() + GIVE_UP_S
        while monotonic() < deadline_s:
            try:
                answer = self._client.post_records(records)
            except DaemonAway as error:
                self.tally.retries += 1
                self.failure = str(error)
                sleep(0.02)
                continue
            if answer.rejected:
                self.failure = f"rejected: {answer.errors}"
                return False
            self.tally.acknowledged += answer.received
            self.failure = ""
            return True
        return False


def stored(folder: Path, kind: str = "metrics") -> pd.DataFrame:
    """Return every row of the public day files."""
    paths = sorted((folder / "data_buffer").glob(f"{kind}_????-??-??.parquet"))
    return pd.concat([pd.read_parquet(path) for path in paths], ignore_index=True)


def count_records(folder: Path, fleet: Fleet, n_steps: int, tally: Tally) -> None:
    """Add to `tally` what of the acknowledged steps is missing, twice there, or different."""
    frame = stored(folder)
    keys = pd.MultiIndex.from_frame(frame[["server_name", "timestamp"]])
    tally.doubled += int(keys.duplicated().sum())
    times = pd.DatetimeIndex(frame["timestamp"]).asi8 // _per_ms(frame["timestamp"])
    found = dict(
        zip(
            zip(frame["server_name"], times.tolist(), strict=True),
            zip(frame["cpu_pct"], frame["mem_pct"], strict=True),
            strict=True,
        )
    )
    for step in range(n_steps):
        for place, name in enumerate(fleet.names):
            row = found.get((name, to_ms(fleet.start + step * STEP)))
            if row is None:
                tally.lost += 1
            elif row != tuple(fleet.values(step, place).values()):
                tally.wrong += 1


def _per_ms(times: "pd.Series[Any]") -> int:
    unit = pd.DatetimeIndex(times).unit
    return {"ms": 1, "us": 1_000, "ns": 1_000_000}[unit]


def count_forecasts(folder: Path, fleet: Fleet, n_steps: int, tally: Tally) -> None:
    """Add settled forecasts that are missing, doubled, or settled with another value than was sent."""
    frame = stored(folder, "predictions")
    key = ["origin", "horizon", "server_name", "metric"]
    tally.doubled += int(frame.duplicated([name for name in key if name in frame.columns]).sum())
    n_closed = (n_steps - 2) // 5  # a bin closes after its grace: a record on its end is too early
    expected = sum(max(0, n_closed - horizon) for horizon in SETTLED) * fleet.n_servers * len(METRICS)
    tally.lost += max(0, expected - len(frame))
    tally.doubled += max(0, len(frame) - expected)
    means = _bin_means(fleet, n_closed)
    target = pd.DatetimeIndex(frame["target"]).asi8 // _per_ms(frame["target"])
    bins = (target - to_ms(fleet.start)) // 300_000
    for number, server, metric, actual in zip(
        bins.tolist(), frame["server_name"], frame["metric"], frame["actual"], strict=True
    ):
        if abs(means[server, metric][number] - actual) > 1e-3:
            tally.wrong += 1


def _bin_means(fleet: Fleet, n_bins: int) -> dict[tuple[str, str], list[float]]:
    return {
        (name, metric): [
            float(np.mean([fleet.values(5 * number + k, place)[metric] for k in range(5)]))
            for number in range(n_bins)
        ]
        for place, name in enumerate(fleet.names)
        for metric in METRICS
    }


def timed_recovery(tally: Tally, recover: Callable[[], Any]) -> None:
    """Run `recover` and note how long it took."""
    began_s = monotonic()
    recover()
    tally.recovered_s.append(monotonic() - began_s)
