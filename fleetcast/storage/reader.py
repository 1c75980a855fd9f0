"""Everything that is read from a buffer's folder, by any process, without locks.

Owns: windows, batches, settled forecasts, edges in time, export and statistics of one folder.
Does not know: writing, or which process owns the folder.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fleetcast.schema import RecordBatch, SettledForecasts
from fleetcast.storage.arrays import cells, chosen, in_order, times_ms
from fleetcast.storage.batches import batch_of_table, settled_of_table
from fleetcast.storage.bufferstats import buffer_stats
from fleetcast.storage.dayreader import DayReader
from fleetcast.storage.export import export_records
from fleetcast.storage.tables import METRICS, PREDICTIONS, merged, stored_schema

if TYPE_CHECKING:
    import pandas as pd


class BufferReader:
    """Reads one folder; holds no state, so it may be shared by threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metrics = DayReader(folder, METRICS)
        self._predictions = DayReader(folder, PREDICTIONS)

    def frame(self, start_ms: int, end_ms: int) -> "pd.DataFrame":
        """Return records with start <= time < end, ordered by day, server and time."""
        tables = [table for _, table in self._metrics.read(start_ms, end_ms)]
        whole = pa.concat_tables(tables or [METRICS.schema.empty_table()], promote_options="default")
        frame: pd.DataFrame = whole.cast(stored_schema(whole.schema)).to_pandas(split_blocks=True)
        return frame

    def batches(
        self, start_ms: int, end_ms: int, metrics: Sequence[str] | None = None
    ) -> Iterator[RecordBatch]:
        """Yield the same records in columns, each batch with all its rows of the servers in it."""
        for _, table in self._metrics.read(start_ms, end_ms, metrics):
            yield batch_of_table(table)

    def predictions(self, start_ms: int, end_ms: int, horizon: int | None = None) -> SettledForecasts:
        """Return settled forecasts with start <= target < end, sorted by target."""
        tables = []
        for _, table in self._predictions.read(start_ms, end_ms):
            if horizon is not None:
                table = chosen(table, cells(table.column("horizon"), np.int32) == horizon)
            tables.append(table)
        whole = merged(tables, PREDICTIONS)
        order = np.argsort(times_ms(whole, "target"), kind="stable")
        return settled_of_table(in_order(whole, order))

    def newest_ms(self) -> int | None:
        """Return the newest time of all records."""
        return self._metrics.newest_ms()

    def oldest_ms(self) -> int | None:
        """Return the oldest time of all records."""
        return self._metrics.oldest_ms()

    def export(self, path: Path, start_ms: int, end_ms: int, resolution_s: float | None) -> int:
        """Write records with start <= time < end to one Parquet file and return their number."""
        return export_records(self._metrics, path, start_ms, end_ms, resolution_s)

    def stats(self) -> dict[str, Any]:
        """Return the counts of records, and those of settled forecasts under `predictions`."""
        return {
            **buffer_stats(self._folder, METRICS),
            "predictions": buffer_stats(self._folder, PREDICTIONS),
        }
