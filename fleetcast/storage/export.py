"""The export for training: a stretch of records as one Parquet file, written day by day.

Owns: raw and binned export in bounded memory. Does not know: what a trainer does with it.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fleetcast.bins import bin_means
from fleetcast.errors import BadData
from fleetcast.files import fsync_file, publish, storage_error, temp_beside
from fleetcast.schema import RecordBatch
from fleetcast.storage.arrays import NUMBER
from fleetcast.storage.batches import batch_of_table, table_of_batch
from fleetcast.storage.dayfiles import DAY_MS
from fleetcast.storage.dayreader import DayReader
from fleetcast.storage.tables import METRICS, canonical, filled, stored_schema


def export_records(
    reader: DayReader, path: Path, start_ms: int, end_ms: int, resolution_s: float | None
) -> int:
    """Write the records with start <= time < end to `path` and return the number of rows.

    Args:
        resolution_s: length of the bins whose means are written, at their starts; None = raw.
    Raises:
        BadData: the bins do not divide a day.
        StorageFull, StorageBroken: a file that was at `path` before is untouched.
    """
    bin_ms = _bin_ms(resolution_s)
    names = reader.metric_names(start_ms, end_ms)
    schema = pa.schema([*METRICS.schema, *((name, NUMBER) for name in names)])
    tables = (table for _, table in reader.read(start_ms, end_ms, names))
    if bin_ms is not None:
        tables = (binned(table, bin_ms) for table in tables)
    return _write(path, tables, schema)


def binned(table: pa.Table, bin_ms: int) -> pa.Table:
    """Return the bin means of whole servers; the time of a row is its bin's start."""
    batch = batch_of_table(table)
    metrics = list(batch.metrics)
    # each column in one piece: means are taken column by column
    values = np.array([batch.metrics[name] for name in metrics]).reshape(len(metrics), len(batch)).T
    codes, starts_ms, means = bin_means(batch.server_codes, batch.timestamps_ms, values, bin_ms)
    columns = {name: means[:, place] for place, name in enumerate(metrics)}
    return canonical(table_of_batch(RecordBatch(batch.server_names, codes, starts_ms, columns)), METRICS)


def _bin_ms(resolution_s: float | None) -> int | None:
    if resolution_s is None:
        return None
    bin_ms = round(resolution_s * 1000) if math.isfinite(resolution_s) else 0
    if bin_ms <= 0 or DAY_MS % bin_ms:
        raise BadData(f"resolution_s must divide a day (86400 s), got {resolution_s}")
    return bin_ms


def _write(path: Path, tables: Iterator[pa.Table], schema: pa.Schema) -> int:
    temp = temp_beside(path)
    written = stored_schema(schema)
    dictionary: Sequence[str] = [name for name in schema.names if name != "timestamp"]
    n_rows = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(temp, written, compression="zstd", use_dictionary=dictionary) as writer:
            for table in tables:
                writer.write_table(filled(table, schema).cast(written))
                n_rows += len(table)
        fsync_file(temp)
        publish(temp, path)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # usually it became `path`
            temp.unlink()
    return n_rows
