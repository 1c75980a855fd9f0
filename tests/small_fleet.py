"""A small fleet on disk: records and settled forecasts in a real buffer, a version in service."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from settled_rows import BIN_MS, START_MS, Value, settled

from data_buffer import DataBuffer
from fleetcast.clock import FakeClock, from_ms, iso_z
from fleetcast.drift.literal.baseline import Baseline
from fleetcast.forecast.registry import Registry
from fleetcast.settings import Settings

SERVERS = ("web-01", "web-02", "web-03")
METRICS = ("cpu_pct", "mem_pct")
HISTORY_BINS = 700  # before START_MS: what the first model was trained on
PAIRS = 120  # a full window of these tests


def steady(server: str, metric: str, number: int) -> float:
    """A value around 40 that moves a little with time."""
    return float(40 + 5 * np.sin(number / 9 + ord(server[-1])) + (number * 7919 % 13) / 13)


def shifted_from(start: int, by: float = 25.0) -> Value:
    """Return the steady values, higher on web-02 from bin `start` on."""

    def value(server: str, metric: str, number: int) -> float:
        return steady(server, metric, number) + (by if server == "web-02" and number >= start else 0.0)

    return value


def settings(**parts: dict[str, Any]) -> Settings:
    """Return settings of a small, undemanding installation; each part may be changed further."""
    small: dict[str, dict[str, Any]] = {
        "clock": {"mode": "data"},  # the fleet's days are long past, and an export ends now
        # two days and a half: too few for a calibrated reference
        "drift": {"basis": "literal", "window_size": PAIRS, "min_pairs": 60, "min_span_s": 3600.0},
        "decision": {"host_load_per_core": 1000.0, "host_min_available_gb": 0.0},
        "retraining": {"request_timeout_s": 5.0, "training_nice": 0, "training_timeout_s": 60.0},
    }
    for part, values in parts.items():
        small[part] = {**small.get(part, {}), **values}
    base = Settings()
    return dataclasses.replace(
        base, **{part: dataclasses.replace(getattr(base, part), **values) for part, values in small.items()}
    )


class SmallFleet:
    """Grows bin by bin; owns the buffer as the inference daemon would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = FakeClock(from_ms(START_MS))
        self.buffer = DataBuffer(folder / "data_buffer", clock=self.clock, expire=False)
        self.registry = Registry(folder / "checkpoints")
        self.next_bin = -HISTORY_BINS
        self.version: str | None = None

    def grow(self, n_bins: int, value: Value = steady, p50: Value = steady) -> None:
        """Add bins of records, with the forecasts that were made for them (p50)."""
        bins = range(self.next_bin, self.next_bin + n_bins)
        self.clock.time = from_ms(START_MS + bins.stop * BIN_MS)
        self.buffer.append(
            {
                "timestamp": iso_z(from_ms(START_MS + number * BIN_MS)),
                "server_name": server,
                **{metric: value(server, metric, number) for metric in METRICS},
            }
            for number in bins
            for server in SERVERS
        )
        if self.version:
            forecasts = settled(
                SERVERS, bins, value, p50, metrics=METRICS, horizons=(1, 12), version=self.version
            )
            self.buffer.append_predictions(forecasts)
        self.next_bin = bins.stop

    def serve(self, version: str = "20260115T080000Z-aaaa") -> None:
        """Put a version into service that was trained on everything so far."""
        self.version = version
        shape = (len(SERVERS), len(METRICS), HISTORY_BINS)
        values = np.empty(shape, np.float32)
        for row, server in enumerate(SERVERS):
            for column, metric in enumerate(METRICS):
                values[row, column] = [steady(server, metric, n) for n in range(-HISTORY_BINS, 0)]
        made = Baseline.from_grid(values, START_MS - HISTORY_BINS * BIN_MS, BIN_MS, SERVERS, METRICS, version)
        known = dataclasses.replace(made, series_error_mae=np.full(shape[:2], 1.0, np.float32))
        self.registry.add(
            version,
            {"model.ckpt": b"no model", "baseline.npz": known.to_bytes()},
            {
                "created_at": iso_z(self.clock.now()),
                "promoted": True,
                "data_range": {"start": iso_z(self.clock.now()), "end": iso_z(self.clock.now())},
            },
        )
        self.registry.promote(version)
        self.registry.set_baseline(version)


def quiet_answers(version: str | None, cpu: float = 20.0, mem: float = 30.0) -> dict[str, Any]:
    """Return what a quiet inference daemon says, by path."""
    current = {"cpu_pct": cpu, "mem_pct": mem}
    return {
        "/status": {"pid": None, "model": {"version": version} if version else None},
        "/predictions/current": {"predictions": {s: {"current": current, "stale": False} for s in SERVERS}},
    }
