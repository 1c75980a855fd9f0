"""What a buffer's folder holds, from names, footers and the log: no day is read to be counted.

Owns: `get_stats()`. Does not know: the rows of closed days.
"""

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fleetcast.storage.arrays import times_ms
from fleetcast.storage.dayfiles import day_path, folder_bytes, list_days, open_day, part_names, split_by_day
from fleetcast.storage.dayreader import LogRows, log_folder, read_log
from fleetcast.storage.tables import TableKind, has_key, merged

MEGABYTE = 1_000_000


def buffer_stats(folder: Path, kind: TableKind) -> dict[str, Any]:
    """Return the counts of one kind, as `spec.md` prints them."""
    log = read_log(folder, kind)  # before the days: a row that moves meanwhile is not missed
    days = list_days(folder, kind)
    by_day = _log_by_day(log, kind)
    total = sum(_rows_of_day(folder, kind, day) for day in days)
    total += sum(_new_rows(folder, kind, day, rows) for day, rows in by_day.items())
    every_day = sorted({*days, *by_day})
    size = sum(folder_bytes(day_path(folder, kind, day)) for day in days)
    size += folder_bytes(log_folder(folder, kind))
    return {
        "file_count": len(days),
        "total_records": total,
        "date_range": {
            "start": every_day[0].isoformat() if every_day else None,
            "end": every_day[-1].isoformat() if every_day else None,
        },
        "disk_usage_mb": round(size / MEGABYTE, 2),
    }


def _rows_of_day(folder: Path, kind: TableKind, day: date) -> int:
    path = day_path(folder, kind, day)
    if path.is_dir():
        return sum(name.n_rows for name in part_names(path))
    return open_day(folder, kind, day).n_rows


def _log_by_day(log: Sequence[LogRows], kind: TableKind) -> dict[date, pa.Table]:
    """Return the log's rows, merged, by day."""
    by_day: dict[date, pa.Table] = split_by_day(merged([rows.table for rows in log], kind), kind)
    return by_day


def _new_rows(folder: Path, kind: TableKind, day: date, rows: pa.Table) -> int:
    """Return how many rows have a key that the day's parts do not have yet."""
    is_known = np.zeros(len(rows), dtype=np.bool_)
    times = times_ms(rows, kind.time_column)
    for part in open_day(folder, kind, day).parts:
        if part.may_hold(int(times.min()), int(times.max()) + 1):
            for keys in part.tables([]):
                is_known |= has_key(rows, keys, kind)
    return int((~is_known).sum())
