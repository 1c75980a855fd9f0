"""Records as an Arrow IPC stream (`application/vnd.apache.arrow.stream`), read as columns.

Owns: which Arrow types mean what, and that no stream makes us build more than it is worth. The
rules for records are `records.accept_columns`' own: the same answers as for JSON.
Does not know: HTTP, storage. Nothing in a stream is trusted: sizes are bounded before they are
used, and every array is validated in full before it is looked at.
"""

import numpy as np
import pyarrow as pa
import pyarrow.types as kinds

from fleetcast.errors import BadData
from fleetcast.ingest.arrow_messages import check_messages
from fleetcast.ingest.arrow_text import coded_texts, is_text
from fleetcast.ingest.columns import joined_column
from fleetcast.ingest.record_columns import NO_NAME, NO_TIME, CodedNames, Column, Flags, NotNumbers
from fleetcast.ingest.recordrules import REQUIRED, is_metric_name
from fleetcast.schema import Longs

ROWS_MAX = 2**18
COLUMNS_MAX = 1024
CELLS_MAX = 2**23  # 64 MB of doubles
_ALWAYS_THERE = "each record needs timestamp and server_name"


def read_columns(body: bytes) -> dict[str, Column]:
    """Return the records of a stream as columns for `records.accept_columns`.

    Raises:
        BadData: the stream is damaged, too large, compressed, or lacks a required column.
    """
    check_messages(body)
    try:
        batches = _batches(body)
        columns = [_columns(batch) for batch in batches]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadData(f"the body is not an Arrow IPC stream: {str(error)[:200]}") from error
    names = columns[0].keys() if columns else REQUIRED
    return {name: joined_column([one[name] for one in columns]) for name in names}


def _batches(body: bytes) -> list[pa.RecordBatch]:
    reader = pa.ipc.open_stream(pa.py_buffer(body))
    _check_schema(reader.schema)
    n_rows = 0
    batches = []
    for batch in reader:
        n_rows += batch.num_rows
        if n_rows > ROWS_MAX or n_rows * batch.num_columns > CELLS_MAX:
            limit = min(ROWS_MAX, CELLS_MAX // max(batch.num_columns, 1))
            raise BadData(f"too many records in one stream, at most {limit} of {batch.num_columns} columns")
        batch.validate(full=True)
        batches.append(batch)
    return batches


def _check_schema(schema: pa.Schema) -> None:
    names = schema.names
    if len(names) > COLUMNS_MAX:
        raise BadData(f"the Arrow stream has {len(names)} columns, at most {COLUMNS_MAX} are taken")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadData(f"the Arrow stream has the column {twice[0][:60]!r} twice")
    for name in REQUIRED:
        if name not in names:
            raise BadData(f"the Arrow stream has no column {name!r}; {_ALWAYS_THERE}")
    time_type = schema.field("timestamp").type
    if not kinds.is_timestamp(time_type) and not is_text(time_type):
        raise BadData(f"timestamp must be an Arrow timestamp or ISO 8601 text, got {time_type}")
    if not is_text(schema.field("server_name").type):
        raise BadData(f"server_name must be text, got {schema.field('server_name').type}")


def _columns(batch: pa.RecordBatch) -> dict[str, Column]:
    columns: dict[str, Column] = {}
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        if name == "timestamp" and kinds.is_timestamp(array.type):
            columns[name] = _times_ms(array)
        elif name in REQUIRED:
            columns[name] = coded_texts(array)
        elif not is_metric_name(name) or is_text(array.type):
            columns[name] = CodedNames(("text",), np.where(_is_there(array), 0, NO_NAME).astype(np.int32))
        else:
            columns[name] = _metric(array)
    return columns


def _times_ms(array: pa.Array) -> Longs:
    """Return ms since 1970, NO_TIME where absent or beyond what 64 bits hold."""
    times = np.asarray(array.view(pa.int64()).fill_null(NO_TIME), dtype=np.int64)
    is_time = times != NO_TIME
    match array.type.unit:
        case "s":
            is_time &= np.abs(times) <= np.iinfo(np.int64).max // 1000
            times = np.where(is_time, times, 0) * 1000
        case "us":
            times = times // 1_000
        case "ns":
            times = times // 1_000_000
    return np.where(is_time, times, NO_TIME)


def _metric(array: pa.Array) -> Column:
    """Return a column of numbers, absent = NaN; one that holds a NaN of its own cell by cell."""
    kind = array.type
    if kinds.is_null(kind):
        return np.full(len(array), np.nan)
    if not (kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_decimal(kind)):
        return NotNumbers(str(kind)[:60], _is_there(array))
    doubles = array.cast(pa.float64(), safe=False)
    values = doubles.to_numpy(zero_copy_only=False)
    if np.count_nonzero(np.isnan(values)) == array.null_count:
        return np.asarray(values, dtype=np.float64)
    own: list[object] = doubles.to_pylist()
    return own


def _is_there(array: pa.Array) -> Flags:
    return np.asarray(array.is_valid().to_numpy(zero_copy_only=False), dtype=np.bool_)
