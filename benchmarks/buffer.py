"""What the buffer costs: appends, sealed bytes, reading back; beside the naive buffer and SQLite.

    python -m benchmarks.buffer [--servers 20] [--ticks 1200] [--days 3]

A generated fleet (14 metrics, percents of 2 decimals, seed 7) of 5-second ticks. CPU seconds hold on a
busy host, wall times are upper bounds.
"""

import argparse
import resource
import sqlite3
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.results_file import write_results
from data_buffer import DataBuffer
from fleetcast.clock import from_ms, monotonic
from fleetcast.ingest.rounding import rounded
from fleetcast.schema import RecordBatch
from fleetcast.storage.dayfiles import day_of_ms, day_path
from fleetcast.storage.sealing import seal
from fleetcast.storage.tables import METRICS

START_MS = 1_767_225_600_000  # 2026-01-01
TICK_MS = 5000
TICKS_PER_DAY = 86_400_000 // TICK_MS
N_METRICS = 14


def cpu_s() -> float:
    """Return CPU seconds of this process, kernel time included."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_mb() -> float:
    """Return the highest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fleet(servers: int, ticks: int, start_ms: int = START_MS) -> Iterator[RecordBatch]:
    """Yield one batch per tick: a daily rhythm, a slow walk, and noise of half a point."""
    rng = np.random.default_rng(7)
    names = tuple(f"server-{number:04d}" for number in range(servers))
    codes = np.arange(servers, dtype=np.int32)
    level = rng.uniform(10, 60, (N_METRICS, servers))
    phase = rng.uniform(0, 2 * np.pi, servers)
    for tick in range(ticks):
        level = np.clip(level + rng.normal(0, 0.02, level.shape), 1, 90)
        rhythm = 5 * np.sin(2 * np.pi * tick / TICKS_PER_DAY + phase)
        values = np.clip(level + rhythm + rng.normal(0, 0.5, level.shape), 0, 100)
        metrics = {f"m{place:02d}_pct": rounded("x_pct", values[place], 2, 4) for place in range(N_METRICS)}
        yield RecordBatch(names, codes, np.full(servers, start_ms + tick * TICK_MS), metrics)


def ours(place: Path, batches: list[RecordBatch]) -> dict[str, Any]:
    """Append tick by tick, durable each, flushing as the daemon does (45 s of record time)."""
    buffer = DataBuffer(place, expire=False)
    buffer.open()
    waits, cpu = [], cpu_s()
    for tick, batch in enumerate(batches):
        began = monotonic()
        buffer.append_batch(batch)
        waits.append(monotonic() - began)
        if tick % 9 == 8:
            buffer.flush()
            buffer.maintain(from_ms(START_MS))
    buffer.close()
    return timed(batches, cpu_s() - cpu, waits)


def naive(place: Path, batches: list[RecordBatch]) -> dict[str, Any]:
    """Read, concatenate and rewrite the day at each flush; what is not flushed is not durable."""
    waits, cpu, waiting = [], cpu_s(), []
    path = place / "day.parquet"
    place.mkdir()
    for tick, batch in enumerate(batches):
        began = monotonic()
        columns = {"timestamp": batch.timestamps_ms, "server": batch.server_codes} | batch.metrics
        waiting.append(pd.DataFrame(columns))
        if tick % 9 == 8:
            old = [pd.read_parquet(path)] if path.exists() else []
            pd.concat([*old, *waiting]).to_parquet(path)
            waiting = []
        waits.append(monotonic() - began)
    return timed(batches, cpu_s() - cpu, waits)


def sqlite(place: Path, batches: list[RecordBatch]) -> dict[str, Any]:
    """Insert tick by tick into SQLite with a write-ahead log and full synchronisation."""
    base = sqlite3.connect(place)
    base.execute("pragma journal_mode=wal")
    base.execute("pragma synchronous=full")
    columns = ", ".join(f"m{number}" for number in range(N_METRICS))
    base.execute(f"create table metrics (time, server, {columns}, primary key (server, time)) without rowid")
    insert = f"insert or replace into metrics values ({', '.join('?' * (N_METRICS + 2))})"
    waits, cpu = [], cpu_s()
    for batch in batches:
        began = monotonic()
        columns_of = [batch.timestamps_ms, batch.server_codes, *batch.metrics.values()]
        base.executemany(insert, zip(*(column.tolist() for column in columns_of), strict=True))
        base.commit()
        waits.append(monotonic() - began)
    base.close()
    return timed(batches, cpu_s() - cpu, waits)


def joined(batches: list[RecordBatch]) -> RecordBatch:
    """Return batches of one fleet as one."""
    return RecordBatch(
        batches[0].server_names,
        np.concatenate([batch.server_codes for batch in batches]),
        np.concatenate([batch.timestamps_ms for batch in batches]),
        {name: np.concatenate([batch.metrics[name] for batch in batches]) for name in batches[0].metrics},
    )


def timed(batches: list[RecordBatch], cpu: float, waits: list[float]) -> dict[str, Any]:
    """Return the figures of one way to append."""
    n_rows = sum(map(len, batches))
    p50, p99 = (np.percentile(waits, [50, 99]) * 1000).tolist()
    return {"rows": n_rows, "cpu_s_per_1m_rows": cpu / n_rows * 1e6, "ack_p50_ms": p50, "ack_p99_ms": p99}


def sealed_days(place: Path, servers: int, days: int) -> dict[str, Any]:
    """Fill whole days, seal them here, and read them back in every way."""
    buffer = DataBuffer(place, expire=False)
    ticks = fleet(servers, TICKS_PER_DAY * days)
    while some := list(islice(ticks, 720)):  # an hour at once: appending is measured elsewhere
        buffer.append_batch(joined(some))
        buffer.flush()
    owner, n_rows = buffer.open(), servers * TICKS_PER_DAY * days
    cpu, size = cpu_s(), 0
    for number in range(days):
        day = day_of_ms(START_MS + number * 86_400_000)
        sealed = seal(place, "metrics", day, place / ".sealed")
        owner._metrics._writer.put_sealed(day, sealed.path)
        size += day_path(place, METRICS, day).stat().st_size
    figures: dict[str, Any] = {"rows": n_rows, "seal_cpu_s_per_1m_rows": (cpu_s() - cpu) / n_rows * 1e6}
    figures |= {"bytes_per_row": size / n_rows, "bytes_per_sample": size / n_rows / N_METRICS}
    buffer.close()
    began = monotonic()
    buffer.get_stats()
    figures["stats_ms"] = (monotonic() - began) * 1000
    before, cpu = peak_mb(), cpu_s()
    end = from_ms(START_MS + days * 86_400_000)
    buffer.export_training_data(place.parent / "bins.parquet", days, 300, until=end)
    figures["export_5min_rows_per_cpu_s"] = n_rows / (cpu_s() - cpu)
    cpu = cpu_s()
    buffer.export_training_data(place.parent / "raw.parquet", days, until=end)
    figures["export_raw_rows_per_cpu_s"] = n_rows / (cpu_s() - cpu)
    return figures | {"export_peak_above_before_mb": peak_mb() - before, "peak_mb": peak_mb()}


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, default=20)
    parser.add_argument("--ticks", type=int, default=1200, help="ticks appended in each way")
    parser.add_argument("--days", type=int, default=3, help="whole days sealed and read back")
    options = parser.parse_args()
    figures: dict[str, Any] = {"options": vars(options)}
    with tempfile.TemporaryDirectory() as place:
        batches = list(fleet(options.servers, options.ticks))
        for name, way in (("fleetcast", ours), ("sqlite", sqlite), ("naive", naive)):
            figures[name] = way(Path(place) / name, batches)
            print(name, {key: round(value, 2) for key, value in figures[name].items()})
        if options.days:
            figures["sealed"] = sealed_days(Path(place) / "sealed", options.servers, options.days)
            print("sealed", {key: round(value, 2) for key, value in figures["sealed"].items()})
    print(write_results("buffer", figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
