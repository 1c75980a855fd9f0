"""What an append costs, durable tick by tick; beside the naive buffer, SQLite, DuckDB and the bare disk.

    python -m benchmarks.buffer.buffer [--servers 20 2000] [--rows 24000] [--repeats 3] [--day]

Reading, sealing and sizes are in `buffer_reads.py`. DuckDB is measured where it is installed.

`fleetcast_60_s` is ours with `buffer.publish_s` of 60: a part each 45 s. `--day` runs ours through one
day of 17,280 ticks, joins and sealing included. Of several repeats each figure is the median.

A generated fleet (14 metrics, percents of 2 decimals, seed 7) of 5-second ticks. CPU seconds hold on a
busy host, wall times are upper bounds.
"""

import argparse
import importlib
import importlib.util
import os
import resource
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.results_file import write_results
from data_buffer import DataBuffer
from fleetcast.clock import DAY_MS, from_ms, monotonic, sleep
from fleetcast.ingest.rules import round_rows
from fleetcast.schema import RecordBatch
from fleetcast.settings import BufferSettings
from fleetcast.storage.days import day_of_ms, day_path
from fleetcast.storage.daystore import publish_after_s
from fleetcast.storage.tables import METRICS
from fleetcast.storage.upkeep import UpkeepPace

START_MS = 1_767_225_600_000  # 2026-01-01
TICK_MS = 5000
TICKS_PER_DAY = 86_400_000 // TICK_MS
N_METRICS = 14
Figures = dict[str, Any]


def cpu_s() -> float:
    """Return CPU seconds of this process and its ended children, kernel time included."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


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
        rows = round_rows(["x_pct"] * len(values), values, 2, 4)
        metrics = {f"m{place:02d}_pct": row for place, row in enumerate(rows)}
        yield RecordBatch(names, codes, np.full(servers, start_ms + tick * TICK_MS), metrics)


def ticks_of_part(settings: BufferSettings, servers: int) -> int:
    """Return how many ticks the daemon lets become one part."""
    ticks = 1
    while ticks * TICK_MS / 1000 < publish_after_s(settings, ticks * servers):
        ticks += 1
    return ticks


def ours(place: Path, batches: list[RecordBatch], publish_s: float = BufferSettings.publish_s) -> Figures:
    """Append tick by tick, durable each; publish and join as the daemon does, by record time.

    A whole day is sealed at the end, by the daemon's child, whose CPU seconds count.
    """
    settings = BufferSettings(publish_s=publish_s)
    ticks = ticks_of_part(settings, len(batches[0]))
    usual = UpkeepPace()
    parts = min(usual.compact_parts, round(usual.compact_interval_s * 1000 / TICK_MS) // ticks)
    buffer = DataBuffer(
        place, settings=settings, expire=False, pace=UpkeepPace(compact_parts=parts, seal_quiet_s=0.0)
    )
    buffer.open()
    waits, cpu = [], cpu_s()
    for tick, batch in enumerate(batches, 1):
        began = monotonic()
        buffer.append_batch(batch)
        waits.append(monotonic() - began)
        if tick % ticks == 0:
            buffer.flush()
            buffer.maintain(from_ms(START_MS))
    buffer.flush()
    if len(batches) == TICKS_PER_DAY:
        seal(buffer)
    buffer.close()
    return timed(batches, cpu_s() - cpu, waits, place)


def seal(buffer: DataBuffer) -> None:
    """Let the first day be sealed, as the daemon does ten minutes after its end."""
    path = day_path(buffer.folder, METRICS, day_of_ms(START_MS))
    for _ in range(600):
        buffer.maintain(from_ms(START_MS + 2 * DAY_MS))
        if path.is_file():
            return
        sleep(0.1)
    raise RuntimeError(f"{path} was not sealed within a minute")


def naive(place: Path, batches: list[RecordBatch]) -> Figures:
    """Read, concatenate and rewrite the day at each flush; what is not flushed is not durable."""
    waits, cpu, waiting = [], cpu_s(), []
    path = place / "day.parquet"
    place.mkdir()
    for tick, batch in enumerate(batches):
        began = monotonic()
        columns: dict[str, Any] = {"timestamp": batch.timestamps_ms, "server": batch.server_codes} | dict(
            batch.metrics
        )
        waiting.append(pd.DataFrame(columns))
        if tick % 9 == 8:
            old = [pd.read_parquet(path)] if path.exists() else []
            pd.concat([*old, *waiting]).to_parquet(path)
            waiting = []
        waits.append(monotonic() - began)
    return timed(batches, cpu_s() - cpu, waits, place)


def sqlite(place: Path, batches: list[RecordBatch]) -> Figures:
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
        columns_of: list[Any] = [batch.timestamps_ms, batch.server_codes, *batch.metrics.values()]
        base.executemany(insert, zip(*(column.tolist() for column in columns_of), strict=True))
        base.commit()
        waits.append(monotonic() - began)
    base.close()
    return timed(batches, cpu_s() - cpu, waits, place)


def duckdb(place: Path, batches: list[RecordBatch]) -> Figures | None:
    """Insert tick by tick into DuckDB, one transaction each; None where it is not installed."""
    if importlib.util.find_spec("duckdb") is None:
        return None
    base = importlib.import_module("duckdb").connect(str(place))
    columns = ", ".join(f"m{number} double" for number in range(N_METRICS))
    base.execute(f"create table metrics (time bigint, server int, {columns}, primary key (server, time))")
    names = ["time", "server", *(f"m{number}" for number in range(N_METRICS))]
    waits, cpu = [], cpu_s()
    for batch in batches:
        began = monotonic()
        cells = [batch.timestamps_ms, batch.server_codes, *batch.metrics.values()]
        tick = pd.DataFrame(dict(zip(names, cells, strict=True)))
        base.register("tick", tick)
        base.execute("insert or replace into metrics select * from tick")
        waits.append(monotonic() - began)
    base.close()
    return timed(batches, cpu_s() - cpu, waits, place)


def bare(place: Path, batches: list[RecordBatch]) -> Figures:
    """Write the same values with nothing around them and sync: what the disk alone costs."""
    waits, cpu = [], cpu_s()
    with place.open("wb", buffering=0) as stream:
        for batch in batches:
            began = monotonic()
            stream.write(np.array(list(batch.metrics.values())).data)
            os.fdatasync(stream.fileno())
            waits.append(monotonic() - began)
    return timed(batches, cpu_s() - cpu, waits, place)


WAYS: dict[str, Callable[[Path, list[RecordBatch]], Figures | None]] = {
    "bare": bare,
    "fleetcast": ours,
    "fleetcast_60_s": partial(ours, publish_s=60.0),
    "sqlite": sqlite,
    "duckdb": duckdb,
    "naive": naive,
}


def joined(batches: list[RecordBatch]) -> RecordBatch:
    """Return batches of one fleet as one."""
    return RecordBatch(
        batches[0].server_names,
        np.concatenate([batch.server_codes for batch in batches]),
        np.concatenate([batch.timestamps_ms for batch in batches]),
        {name: np.concatenate([batch.metrics[name] for batch in batches]) for name in batches[0].metrics},
    )


def timed(batches: list[RecordBatch], cpu: float, waits: list[float], place: Path) -> Figures:
    """Return the figures of one way to append, which left its files at `place`."""
    n_rows = sum(map(len, batches))
    p50, p99 = (np.percentile(waits, [50, 99]) * 1000).tolist()
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    figures = {"rows": n_rows, "cpu_s_per_1m_rows": cpu / n_rows * 1e6, "bytes_per_row": size / n_rows}
    return figures | {"ack_p50_ms": p50, "ack_p99_ms": p99}


def median_of_ways(names: list[str], batches: list[RecordBatch], repeats: int) -> dict[str, Figures]:
    """Run the ways in turn, again and again; return the median of each figure of each that can be run."""
    runs: dict[str, list[Figures]] = {}
    for _ in range(repeats):
        for name in names:
            with tempfile.TemporaryDirectory() as place:
                found = WAYS[name](Path(place) / name, batches)
            if found is not None:
                runs.setdefault(name, []).append(found)
    return {
        name: {key: float(np.median([run[key] for run in some])) for key in some[0]}
        for name, some in runs.items()
    }


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, nargs="+", default=[20, 2000])
    parser.add_argument("--rows", type=int, default=24_000, help="rows appended in each way")
    parser.add_argument(
        "--repeats", type=int, default=1, help="runs of each way, one after the other in turn"
    )
    parser.add_argument("--day", action="store_true", help="run ours through a whole day instead")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    options = parser.parse_args()
    if options.day:
        options.ways = [name for name in options.ways if name.startswith("fleetcast")]
    figures: dict[str, Any] = {"options": vars(options)}
    for servers in options.servers:
        ticks = TICKS_PER_DAY if options.day else max(options.rows // servers, 36)
        found = median_of_ways(options.ways, list(fleet(servers, ticks)), options.repeats)
        figures |= {f"{name}_{servers}_servers": values for name, values in found.items()}
        for name, values in found.items():
            print(servers, name, {key: round(value, 2) for key, value in values.items()}, flush=True)
    print(write_results("buffer_day" if options.day else "buffer", figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
