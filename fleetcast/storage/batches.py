"""Between the value types of `schema.py` and Arrow tables, both ways, and from DataFrames.

Owns: how a RecordBatch and SettledForecasts look in columns. Does not know: files.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fleetcast.errors import BadData
from fleetcast.ingest.recordrules import REQUIRED
from fleetcast.schema import Longs, RecordBatch, SettledForecasts
from fleetcast.storage.arrays import (
    NUMBER,
    TIME,
    cells,
    coded_texts,
    codes_of,
    column_of,
    floats,
    nulls_for_nan,
    texts,
    times_ms,
)
from fleetcast.storage.tables import METRICS, PREDICTIONS

Cells = Sequence[Any] | NDArray[Any]
_NO_TIME = np.iinfo(np.int64).min


def table_of_batch(batch: RecordBatch) -> pa.Table:
    """Return records as a canonical table, in the order they came."""
    metrics = sorted(batch.metrics)
    servers = coded_texts(batch.server_names, batch.server_codes)
    columns = [
        column_of(batch.timestamps_ms, TIME),
        servers,
        *(nulls_for_nan(batch.metrics[name]) for name in metrics),
    ]
    return pa.Table.from_arrays(columns, schema=_schema(tuple(metrics)))


def batch_of_table(table: pa.Table) -> RecordBatch:
    """Return the rows of a canonical metrics table."""
    every_name, codes = codes_of(table.column("server_name"))
    used, codes_of_used = np.unique(codes, return_inverse=True)
    names = [name for name in table.column_names if name not in REQUIRED]
    return RecordBatch(
        server_names=tuple(str(every_name[code]) for code in used.tolist()),
        server_codes=codes_of_used.astype(np.int32),
        timestamps_ms=times_ms(table, "timestamp"),
        metrics={name: floats(table.column(name)) for name in names},
    )


def table_of_settled(rows: SettledForecasts) -> pa.Table:
    """Return settled forecasts as a table."""
    columns = {
        "origin": column_of(rows.origin_ms, TIME),
        "target": column_of(rows.target_ms, TIME),
        "horizon": column_of(rows.horizon, pa.int32()),
        "server_name": texts(rows.server_name),
        "metric": texts(rows.metric),
        "p10": column_of(rows.p10, NUMBER),
        "p50": column_of(rows.p50, NUMBER),
        "p90": column_of(rows.p90, NUMBER),
        "actual": column_of(rows.actual, NUMBER),
        "model_version": texts(rows.model_version),
        "model_p50": column_of(rows.model_p50, NUMBER),
    }
    return pa.table(columns)


def settled_of_table(table: pa.Table) -> SettledForecasts:
    """Return the rows of a canonical predictions table."""
    objects = {name: _objects(table.column(name)) for name in PREDICTIONS.text_columns}
    p50, own = floats(table.column("p50")), floats(table.column("model_p50"))
    return SettledForecasts(
        origin_ms=times_ms(table, "origin"),
        target_ms=times_ms(table, "target"),
        horizon=cells(table.column("horizon"), np.int32),
        server_name=objects["server_name"],
        metric=objects["metric"],
        p10=floats(table.column("p10")),
        p50=p50,
        p90=floats(table.column("p90")),
        actual=floats(table.column("actual")),
        model_version=objects["model_version"],
        model_p50=np.where(np.isnan(own), p50, own),  # stored before there was feedback
    )


def columns_of_frame(frame: Any) -> dict[str, Cells]:
    """Return the columns of a DataFrame as `records.accept_columns` takes them.

    Raises:
        BadData: it has no `timestamp` or no `server_name`, or two columns of one name.
    """
    names = [str(name) for name in frame.columns]
    missing = [name for name in REQUIRED if name not in names]
    if missing or len(set(names)) < len(names):
        problem = f"lacks {' and '.join(missing)}" if missing else "has two columns of one name"
        raise BadData(f"a DataFrame of records {problem}; its columns are {', '.join(names)}")
    return {name: _cells(frame.iloc[:, place]) for place, name in enumerate(names)}


@lru_cache(maxsize=256)
def _schema(metrics: tuple[str, ...]) -> pa.Schema:
    """Return the schema of a table of these metrics; a fleet sends few different ones."""
    return pa.schema([*METRICS.schema, *((name, NUMBER) for name in metrics)])


def _cells(series: Any) -> Cells:
    """Return one DataFrame column; pandas' missing values are None, NaN or the missing time."""
    if series.dtype.kind == "M":
        times = series.dt.tz_localize("UTC") if series.dt.tz is None else series.dt.tz_convert("UTC")
        numbers: Longs = times.astype("datetime64[ms, UTC]").astype("int64").to_numpy()
        return np.where(series.isna().to_numpy(), _NO_TIME, numbers)
    if series.dtype.kind in "fiu":
        return np.asarray(series.to_numpy(dtype=np.float64, na_value=np.nan))
    missing = series.isna().to_numpy()
    return [None if gone else cell for cell, gone in zip(series.tolist(), missing, strict=True)]


def _objects(column: pa.ChunkedArray) -> Any:
    """Return text cells as objects (None for null), each distinct text made once."""
    names, codes = codes_of(column)
    return np.array(names, dtype=np.object_)[codes]
