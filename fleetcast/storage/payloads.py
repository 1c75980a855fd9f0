"""Rows as the payload of a log frame, and back.

Owns: the two payload formats. Records are written as plain columns, because one tick of a small
fleet is 20 rows and an Arrow stream of them is mostly headers; settled forecasts, and all logs of
format version 1, are Arrow IPC streams. Does not know: frames, files.

A payload of records, little-endian: tag (4 bytes), number of rows, of metrics, of servers and
bytes of the names (unsigned 32-bit each); the names (UTF-8, metrics then servers, separated by
newlines); timestamps (int64, ms); values (float64, metric by metric, NaN = absent); the server
of each row (int32). An Arrow stream begins with other bytes than the tag.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from fleetcast.schema import Codes, Floats, Longs, RecordBatch
from fleetcast.storage.batches import table_of_batch
from fleetcast.storage.days import READ_ERRORS
from fleetcast.storage.tables import METRICS, TableKind, canonical, concatenated

TAG = b"FCR\x01"
_HEAD = struct.Struct("<4s4I")
_SEPARATOR = "\n"


def encode_table(table: pa.Table) -> bytes:
    """Return a table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def encode_batch(batch: RecordBatch) -> bytes:
    """Return records as plain columns."""
    every_name = [*batch.metrics, *batch.server_names]
    text = _SEPARATOR.join(every_name)
    if text.count(_SEPARATOR) != len(every_name) - 1:  # no accepted record has such a name
        return encode_table(table_of_batch(batch))
    names = text.encode()
    head = _HEAD.pack(TAG, len(batch), len(batch.metrics), len(batch.server_names), len(names))
    values = np.array(list(batch.metrics.values()), dtype="<f8").data
    times = np.ascontiguousarray(batch.timestamps_ms, "<i8").data
    return b"".join([head, names, times, values, np.ascontiguousarray(batch.server_codes, "<i4").data])


def decode_payloads(
    payloads: Sequence[bytes], kind: TableKind, on_bad: Callable[[bytes, Exception], None]
) -> pa.Table:
    """Return the rows of payloads in their order; an undecodable one costs only itself."""
    tables: list[pa.Table] = []
    alike: list[_Columns] = []  # one after the other, with the same names
    for payload in payloads:
        try:
            columns = _columns(payload, kind)
            if alike and (columns is None or columns.names != alike[0].names):
                tables.append(_table(alike))
                alike = []
            if columns is None:
                tables.append(_stream(payload, kind))
            else:
                alike.append(columns)
        except READ_ERRORS as error:
            on_bad(payload, error)
    if alike:
        tables.append(_table(alike))
    return concatenated(tables, kind)


@dataclass(frozen=True, slots=True)
class _Columns:
    """The rows of one payload; the arrays lie in its bytes."""

    n_metrics: int
    names: tuple[str, ...]  # metrics, then servers
    times_ms: Longs
    values: Floats  # (metric, row)
    codes: Codes


def _columns(payload: bytes, kind: TableKind) -> _Columns | None:
    """Return the plain columns of a payload, None for an Arrow stream; ValueError where they do not fit."""
    if payload[: len(TAG)] != TAG:
        return None
    if kind is not METRICS or len(payload) < _HEAD.size:
        raise ValueError("a payload of records has no place here")
    _, n_rows, n_metrics, n_servers, n_bytes = _HEAD.unpack_from(payload)
    times_at = _HEAD.size + n_bytes
    values_at = times_at + 8 * n_rows
    codes_at = values_at + 8 * n_rows * n_metrics
    names = _names(payload[_HEAD.size : times_at])
    if codes_at + 4 * n_rows != len(payload) or len(names) != n_metrics + n_servers:
        raise ValueError("a payload of records does not have the size it says")
    codes = np.frombuffer(payload, "<i4", n_rows, codes_at)
    if n_rows and not 0 <= codes.min() <= codes.max() < n_servers:
        raise ValueError("a payload of records names a server it does not have")
    values = np.frombuffer(payload, "<f8", n_rows * n_metrics, values_at).reshape(n_metrics, n_rows)
    return _Columns(n_metrics, names, np.frombuffer(payload, "<i8", n_rows, times_at), values, codes)


def _table(alike: Sequence[_Columns]) -> pa.Table:
    """Return payloads of the same names as one table."""
    names = alike[0].names
    n_metrics = alike[0].n_metrics
    values = np.concatenate([columns.values for columns in alike], axis=1)
    batch = RecordBatch(
        server_names=names[n_metrics:],
        server_codes=np.concatenate([columns.codes for columns in alike]),
        timestamps_ms=np.concatenate([columns.times_ms for columns in alike]),
        metrics=dict(zip(names[:n_metrics], values, strict=True)),
    )
    return table_of_batch(batch)


@lru_cache(maxsize=64)
def _names(text: bytes) -> tuple[str, ...]:
    """Return the names of a payload; a fleet sends few different rows of them."""
    return tuple(text.decode().split(_SEPARATOR))


def _stream(payload: bytes, kind: TableKind) -> pa.Table:
    with pa.ipc.open_stream(payload) as reader:
        return canonical(reader.read_all(), kind)
