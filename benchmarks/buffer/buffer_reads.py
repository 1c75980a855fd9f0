"""What sealed days cost: bytes, sealing, windows, exports, statistics; memory above an idle process.

    python -m benchmarks.buffer.buffer_reads [--servers 20] [--days 30] [--real FILE ...]

Days of the fleet of `buffer.py` (the first one is generated, the others are the same values at later
times). Each way to read runs in a process of its own, whose memory before it counts as idle. `--real`
takes Parquet files of recorded metrics (timestamp, server_name, numbers), of which sizes (of days, and of the
fullest month in one file) and the CPU seconds of the child that seals are taken; `anomaly_label` is no
metric. `noise_bits` is the information in the generator's rounded noise: no codec without loss gets below.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.buffer.buffer import N_METRICS, START_MS, TICKS_PER_DAY, cpu_s, fleet, joined
from benchmarks.results_file import write_results
from data_buffer import DataBuffer
from fleetcast.clock import DAY_MS, FakeClock, from_ms, monotonic
from fleetcast.ingest.rules import round_rows
from fleetcast.schema import RecordBatch
from fleetcast.storage import parts
from fleetcast.storage.days import day_of_ms, day_path, day_start_ms, list_days, month_path, split_by_day
from fleetcast.storage.parts import write_part
from fleetcast.storage.reader import bin_table
from fleetcast.storage.retention import archive
from fleetcast.storage.tables import METRICS, batch_of_table, canonical, floats, merge, table_of_batch
from fleetcast.storage.upkeep import seal

BIN_MS = 300_000
FORECAST = ["m00_pct", "m01_pct", "m02_pct", "m03_pct"]


def resident_mb(field: str) -> float:
    """Return `VmRSS` (now) or `VmHWM` (the highest so far) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def read_once(way: str, place: Path, days: int) -> dict[str, float]:
    """Read in one way; wall and CPU seconds, rows per second, peak memory above idle."""
    buffer, end_ms = DataBuffer(place, expire=False), START_MS + days * DAY_MS
    idle, cpu, began = resident_mb("VmRSS"), cpu_s(), monotonic()
    if way == "stats":
        buffer.get_stats()
    elif way == "window_5min":
        for batch in buffer.iter_batches(START_MS, end_ms, FORECAST):
            means = batch_of_table(bin_table(table_of_batch(batch), BIN_MS)).metrics
            _ = [column.astype(np.float32) for column in means.values()]
    elif way == "frame_1_day":
        days = 1
        clock = FakeClock(from_ms(START_MS + DAY_MS))
        DataBuffer(place, expire=False, clock=clock).get_training_window(1)
    else:
        resolution_s = 300 if way == "export_5min" else None
        buffer.export_training_data(
            place.parent / f"{way}.parquet", days, resolution_s, until=from_ms(end_ms)
        )
    wall_s, used_s = monotonic() - began, cpu_s() - cpu
    n_rows = sum(pq.read_metadata(path).num_rows for path in sorted(place.glob("*.parquet"))[:days])
    rates = {"wall_s": wall_s, "cpu_s": used_s, "rows": n_rows, "rows_per_s": n_rows / wall_s}
    return rates | {"peak_above_idle_mb": resident_mb("VmHWM") - idle}


def sealed_days(place: Path, servers: int, days: int) -> dict[str, float]:
    """Seal a day as the daemon's child does, then write the same values as further sealed days."""
    first = merge([table_of_batch(joined(list(fleet(servers, TICKS_PER_DAY))))], METRICS)
    seal_s, size = sealed(place, first)
    for number in range(1, days):
        batch = batch_of_table(first)
        later = RecordBatch(
            batch.server_names, batch.server_codes, batch.timestamps_ms + number * DAY_MS, batch.metrics
        )
        path = day_path(place, METRICS, day_of_ms(START_MS + number * DAY_MS))
        table = canonical(table_of_batch(later), METRICS)
        write_part(path, iter([table]), METRICS, table.schema, number, is_sealed=True)
    n_rows = len(first)
    return {
        "rows_per_day": n_rows,
        "seal_cpu_s_per_1m_rows": seal_s / n_rows * 1e6,
        "bytes_per_row": size / n_rows,
        "bytes_per_sample": size / n_rows / N_METRICS,
        "noise_bits_per_sample": math.log2(0.5 * math.sqrt(2 * math.pi * math.e) / 0.01),
    }


def open_day_of(place: Path, table: pa.Table) -> Path:
    """Put one day's rows into `place` as a folder of one part; return the folder."""
    ((day, rows),) = split_by_day(table, METRICS).items()
    path = day_path(place, METRICS, day)
    path.mkdir(parents=True)
    write_part(path / f"part-000000000001-{len(rows)}.parquet", iter([rows]), METRICS, rows.schema, 1)
    return path


def sealed(place: Path, table: pa.Table) -> tuple[float, int]:
    """Put the first day's rows into `place` as a sealed file; return CPU seconds and bytes of sealing."""
    path = open_day_of(place, table)
    cpu = cpu_s()
    seal(place, "metrics", list_days(place, METRICS)[0], place / ".sealed")
    used_s = cpu_s() - cpu
    for part in path.iterdir():
        part.unlink()
    path.rmdir()
    (place / ".sealed").rename(path)
    return used_s, path.stat().st_size


def child_cpu_s(place: Path, table: pa.Table) -> float:
    """Return the CPU seconds of the child that seals a day, its start included."""
    folder = place / "child"
    day = open_day_of(folder, table).stem.removeprefix("metrics_")
    arguments = [str(folder), "metrics", day, str(folder / ".sealed"), str(os.getpid()), "{}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "fleetcast.storage.upkeep", *arguments]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def by_trial_or_not(table: pa.Table) -> dict[str, float]:
    """Return bytes and the best CPU seconds of nine readings by pandas, with and without a trial."""
    figures: dict[str, float] = {}
    for way, trial in (("trial", parts.encodings_by_trial), ("dictionary", lambda _table, _schema: {})):
        with tempfile.TemporaryDirectory() as place, patch.object(parts, "encodings_by_trial", trial):
            path = Path(place) / "day.parquet"
            write_part(path, iter([table]), METRICS, table.schema, 1, is_sealed=True)
            used_s = []
            for _ in range(9):
                before = cpu_s()
                pd.read_parquet(path)
                used_s.append(cpu_s() - before)
            figures |= {f"{way}_bytes": path.stat().st_size, f"{way}_pandas_cpu_s": min(used_s)}
    return figures


def real_sizes(file: Path) -> dict[str, float]:
    """Return the bytes of recorded metrics, rounded as ingest does, one sealed file a day."""
    recorded = pq.read_table(file)
    metrics = [name for name in recorded.column_names if name != "anomaly_label"]
    table = canonical(recorded.select(metrics), METRICS)
    for number, name in enumerate(table.column_names[2:], 2):
        table = table.set_column(
            number, name, pa.array(round_rows([name], floats(table.column(name))[None], 2, 4)[0])
        )
    size = n_rows = n_samples = n_days = 0
    used_s = 0.0
    pages: Counter[str] = Counter()
    days = split_by_day(merge([table], METRICS), METRICS)
    for day in list(days)[:: max(len(days) // 7, 1)]:
        with tempfile.TemporaryDirectory() as place:
            rows = canonical(days[day], METRICS)
            size += sealed(Path(place), rows)[1]
            used_s += child_cpu_s(Path(place), rows)
            pages += Counter(by_trial_or_not(rows))
            n_days += 1
        n_rows += len(rows)
        n_samples += sum(len(rows) - rows.column(name).null_count for name in rows.column_names[2:])
    return {
        "rows": n_rows,
        "bytes_per_row": size / n_rows,
        "bytes_per_sample": size / n_samples,
        "seal_child_cpu_s_per_day": used_s / n_days,
        **pages,
        **{f"archive_{name}": figure for name, figure in archive_figures(days).items()},
    }


def archive_figures(days: Mapping[date, pa.Table]) -> dict[str, float]:
    """Return bytes and CPU seconds of the fullest month in one file, and of reading it and its days."""
    fullest, _ = Counter(day.replace(day=1) for day in days).most_common(1)[0]
    own = {day: canonical(rows, METRICS) for day, rows in days.items() if day.replace(day=1) == fullest}
    n_samples = sum(
        len(rows) - rows.column(name).null_count for rows in own.values() for name in rows.column_names[2:]
    )
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for day, rows in own.items():
            write_part(day_path(place, METRICS, day), iter([rows]), METRICS, rows.schema, 1, is_sealed=True)
        read_days = read_cpu_s(place)
        before = cpu_s()
        archive(place, fullest, place / ".month", {})
        used_s = cpu_s() - before
        for day in own:
            day_path(place, METRICS, day).unlink()
        path = month_path(place, METRICS, fullest)
        (place / ".month").rename(path)
        figures = {"read_days_cpu_s": read_days, "read_month_cpu_s": read_cpu_s(place)}
        figures["read_a_day_of_it_cpu_s"] = read_cpu_s(place, max(own))
        return figures | {
            "days": len(own),
            "samples": n_samples,
            "bytes_per_sample": path.stat().st_size / n_samples,
            "archive_cpu_s": used_s,
        }


def read_cpu_s(place: Path, day: date | None = None) -> float:
    """Return the best CPU seconds of three readings of all records, or of a day of them."""
    start_ms = day_start_ms(day) if day else 0
    end_ms = start_ms + DAY_MS if day else 2**45
    used_s = []
    for _ in range(3):
        before = cpu_s()
        for _batch in DataBuffer(place, expire=False).iter_batches(start_ms, end_ms):
            pass
        used_s.append(cpu_s() - before)
    return min(used_s)


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, default=20)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--real", type=Path, nargs="*", default=[])
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)  # the child: way, folder
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read_once(options.read[0], Path(options.read[1]), options.days)))
        return 0
    figures: dict[str, Any] = {"options": {"servers": options.servers, "days": options.days}}
    for file in options.real:
        figures[f"sealed_{file.stem}"] = real_sizes(file)
        print(file.stem, figures[f"sealed_{file.stem}"], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "buffer"
        figures["sealed_generator"] = sealed_days(place, options.servers, options.days)
        print(figures["sealed_generator"], flush=True)
        for way in ("stats", "window_5min", "export_5min", "export_raw", "frame_1_day"):
            command = [sys.executable, "-m", "benchmarks.buffer.buffer_reads", "--days", str(options.days)]
            done = subprocess.run([*command, "--read", way, str(place)], capture_output=True, check=True)
            figures[way] = json.loads(done.stdout)
            print(way, figures[way], flush=True)
    print(write_results("buffer_reads", figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
