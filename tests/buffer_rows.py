"""Records in columns made by hand, and what a folder of day files holds, read back plainly."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fleetcast.schema import RecordBatch
from fleetcast.storage.tables import METRICS, merge, table_of_batch

DAY_MS = 86_400_000
NOON_MS = 1_768_478_400_000  # 2026-01-15 12:00 UTC
Key = tuple[str, int]  # server, time in ms
Values = dict[str, float]


def batch(rows: Iterable[tuple[str, int, Mapping[str, float]]]) -> RecordBatch:
    """Return a batch of (server, time in ms, values); an absent metric is NaN."""
    listed = list(rows)
    names = list(dict.fromkeys(server for server, _, _ in listed))
    metrics = list(dict.fromkeys(name for _, _, values in listed for name in values))
    return RecordBatch(
        server_names=tuple(names),
        server_codes=np.array([names.index(server) for server, _, _ in listed], dtype=np.int32),
        timestamps_ms=np.array([time for _, time, _ in listed], dtype=np.int64),
        metrics={
            name: np.array([values.get(name, np.nan) for _, _, values in listed], dtype=np.float64)
            for name in metrics
        },
    )


def table(*rows: tuple[str, int, Mapping[str, float]]) -> pa.Table:
    """Return the same as a canonical table, sorted and unique."""
    return merge([table_of_batch(batch(rows))], METRICS)


def rows_of(batches: Iterable[RecordBatch]) -> dict[Key, Values]:
    """Return every row by key; a key that comes twice fails the test."""
    found: dict[Key, Values] = {}
    for one in batches:
        for place in range(len(one)):
            key = (one.server_names[one.server_codes[place]], int(one.timestamps_ms[place]))
            assert key not in found, f"{key} comes twice"
            values = {name: float(column[place]) for name, column in one.metrics.items()}
            found[key] = {name: value for name, value in values.items() if not np.isnan(value)}
    return found


def rows_of_frame(frame: Any) -> dict[Key, Values]:
    """Return every row of a DataFrame by key; a key that comes twice fails the test."""
    found: dict[Key, Values] = {}
    for record in frame.to_dict("records"):
        key = (record.pop("server_name"), int(record.pop("timestamp").timestamp() * 1000))
        assert key not in found, f"{key} comes twice"
        found[key] = {name: value for name, value in record.items() if not np.isnan(value)}
    return found


def day_folder(folder: Path, day: str = "2026-01-15") -> Path:
    """Return the public path of a day of records."""
    return folder / f"metrics_{day}.parquet"


def one_segment(folder: Path, kind: str = "metrics") -> Path:
    """Return the only segment of a log."""
    (path,) = (folder / "log" / kind).glob("*.wal")
    return path
