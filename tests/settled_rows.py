"""Settled forecasts made by hand, and a store that hands them out as the DataBuffer does."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import numpy as np

from fleetcast.clock import from_ms
from fleetcast.schema import SettledForecasts

BIN_MS = 300_000
START_MS = 1_768_464_000_000  # 2026-01-15 08:00 UTC, the start of a bin

Value = Callable[[str, str, int], float]  # server, metric, bin number -> value


def settled(
    servers: Sequence[str],
    bins: Sequence[int],
    actual: Value,
    p50: Value | None = None,
    *,
    metrics: Sequence[str] = ("cpu_pct",),
    horizons: Sequence[int] = (1,),
    version: str | None = "v1",
) -> SettledForecasts:
    """Return one row per bin, server, metric and horizon; bin 0 starts at START_MS."""
    p50 = p50 or actual
    keys = [(b, s, m, h) for b in bins for s in servers for m in metrics for h in horizons]
    target = np.array([START_MS + b * BIN_MS for b, *_ in keys], np.int64)
    horizon = np.array([h for *_, h in keys], np.int32)
    forecast = np.array([p50(s, m, b) for b, s, m, _ in keys], float)
    return SettledForecasts(
        origin_ms=target - horizon.astype(np.int64) * BIN_MS,
        target_ms=target,
        horizon=horizon,
        server_name=np.array([s for _, s, *_ in keys], object),
        metric=np.array([m for _, _, m, _ in keys], object),
        p10=forecast - 1,
        p50=forecast,
        p90=forecast + 1,
        actual=np.array([actual(s, m, b) for b, s, m, _ in keys], float),
        model_version=np.array([version] * len(keys), object),
    )


def joined(*tables: SettledForecasts) -> SettledForecasts:
    """Return the rows of all tables."""
    return SettledForecasts(
        *(np.concatenate([getattr(t, name) for t in tables]) for name in SettledForecasts.__slots__)
    )


class RowStore:
    """Settled forecasts in memory; counts what is read."""

    def __init__(self, rows: SettledForecasts) -> None:
        self.rows = rows
        self.reads: list[tuple[int, int]] = []

    def add(self, rows: SettledForecasts) -> None:
        self.rows = joined(self.rows, rows)

    def read_predictions(self, start_ms: int, end_ms: int, horizon: int | None = None) -> SettledForecasts:
        self.reads.append((start_ms, end_ms))
        chosen = (self.rows.target_ms >= start_ms) & (self.rows.target_ms < end_ms)
        if horizon is not None:
            chosen &= self.rows.horizon == horizon
        found = self.rows.where(chosen)
        return found.where(np.argsort(found.target_ms, kind="stable"))

    def newest_record_time(self) -> datetime | None:
        if not len(self.rows):
            return None
        return from_ms(int(self.rows.target_ms.max()) + BIN_MS - 1)


def columns_equal(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> bool:
    """Return whether two tables hold the same, NaN included."""
    return first.keys() == second.keys() and all(
        np.array_equal(first[name], second[name], equal_nan=True) for name in first
    )
