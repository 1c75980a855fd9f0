"""Records as an Arrow IPC stream (`application/vnd.apache.arrow.stream`), read as columns.

Owns: which Arrow types mean what, text columns as codes into distinct texts, and the bounds of what
a stream may unpack to. The rules for records are those of `records.accept_columns`: the same
answers as for JSON. Does not know: HTTP, storage.

Nothing in a stream is trusted. Sizes are read from the few offsets of the flatbuffers that frame it
(format/Message.fbs of Apache Arrow) before anything is unpacked; compressed streams are refused,
since a buffer states its own unpacked size. Every array is validated in full before it is read. In a
view column many rows can point at one text, so texts beyond any use are left out. Of a dictionary, which each
batch of a stream comes with anew, no more texts are read than the batch has rows.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as kinds
from numpy.typing import NDArray

from fleetcast.errors import BadData, quote
from fleetcast.ingest.columns import NO_NAME, NO_TIME, CodedNames, Column, Flags, NotNumbers, join_column
from fleetcast.ingest.rules import REQUIRED, is_metric_name
from fleetcast.schema import Longs

TEXT_MAX_BYTES = 512  # a name of 128 characters
_VIEW_BYTES = 16  # size, then 12 bytes of text, or 4 of it, the number of a buffer and an offset
_INLINE_MAX = 12


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text."""
    if kinds.is_dictionary(kind):
        kind = kind.value_type
    return bool(kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind))


def coded_texts(array: pa.Array) -> CodedNames:
    """Return a validated text column as codes; what is absent or far too long is absent."""
    if kinds.is_string_view(array.type):
        return _coded_views(array, _is_there(array))
    if not kinds.is_dictionary(array.type):
        array = array.dictionary_encode()
    indices, values = array.indices.cast(pa.int32()), array.dictionary
    is_there = _is_there(indices)
    codes = np.where(is_there, _numbers(indices, np.int32), np.int32(NO_NAME))
    if kinds.is_string_view(values.type):
        is_used = np.zeros(len(values), np.bool_)
        is_used[codes[is_there]] = True
        inner = _coded_views(values, is_used & _is_there(values))
        codes[is_there] = inner.codes[codes[is_there]]
        return CodedNames(inner.names, codes)
    if len(values) > len(indices):
        used, codes[is_there] = np.unique(codes[is_there], return_inverse=True)
        values = values.take(pa.Array.from_buffers(pa.int32(), len(used), [None, pa.py_buffer(used)]))
    lengths = pc.binary_length(values).cast(pa.int64())
    is_long = _is_there(lengths) & (_numbers(lengths, np.int64) > TEXT_MAX_BYTES)
    if is_long.any():
        kept = pa.py_buffer(np.packbits(~is_long, bitorder="little"))
        is_kept = pa.Array.from_buffers(pa.bool_(), len(values), [None, kept])
        values = pc.if_else(is_kept, values, pa.nulls(len(values), values.type))
    return CodedNames(values.to_pylist(), codes)


def _coded_views(array: pa.Array, is_there: Flags) -> CodedNames:
    """Read each distinct view of these places once."""
    codes = np.full(len(array), NO_NAME, dtype=np.int32)
    if not is_there.any():
        return CodedNames((), codes)
    _validity, views, *data = array.buffers()
    place = array.offset * _VIEW_BYTES
    entries = np.frombuffer(views, dtype=f"V{_VIEW_BYTES}", count=len(array), offset=place)
    distinct, codes[is_there] = np.unique(entries[is_there], return_inverse=True)
    return CodedNames([_view(entry.tobytes(), data) for entry in distinct], codes)


def _view(entry: bytes, data: Sequence[pa.Buffer]) -> str | None:
    size, _prefix, buffer, offset = struct.unpack("<i4sii", entry)
    if size <= _INLINE_MAX:
        return entry[4 : 4 + size].decode()
    if size > TEXT_MAX_BYTES:
        return None
    return str(data[buffer].slice(offset, size).to_pybytes(), "utf-8")


MESSAGES_MAX = 10_000
_MESSAGE_HEADER = 2  # numbers of fields in their tables
_BATCH_COMPRESSION = 3
_DICTIONARY_BATCH = 1


def check_messages(body: bytes) -> None:
    """Refuse a stream that is compressed or of too many messages.

    Raises:
        BadData: so it is, or it is no Arrow IPC stream.
    """
    n_messages = 0
    try:
        for message in pa.ipc.MessageReader.open_stream(pa.py_buffer(body)):
            n_messages += 1
            if n_messages > MESSAGES_MAX:
                raise BadData(f"over {MESSAGES_MAX} messages in one stream", hint="send larger batches")
            if message.type in ("record batch", "dictionary") and _is_compressed(
                message.metadata.to_pybytes(), is_dictionary=message.type == "dictionary"
            ):
                raise BadData("the Arrow stream is compressed", hint="write it with compression=None")
    except (pa.ArrowException, OSError, struct.error) as error:
        raise BadData(f"the body is not an Arrow IPC stream: {error}") from error
    if n_messages == 0:
        raise BadData("the body is not an Arrow IPC stream: it is empty")


def _is_compressed(metadata: bytes, *, is_dictionary: bool) -> bool:
    (root,) = struct.unpack_from("<I", metadata, 0)
    batch = _inner_table(metadata, root, _MESSAGE_HEADER)
    if is_dictionary:
        batch = _inner_table(metadata, batch, _DICTIONARY_BATCH)
    return _field(metadata, batch, _BATCH_COMPRESSION) != 0


def _inner_table(metadata: bytes, table: int, number: int) -> int:
    place = _field(metadata, table, number)
    if not place:
        raise BadData("the body is not an Arrow IPC stream: a batch without a header")
    return int(place + struct.unpack_from("<I", metadata, place)[0])


def _field(metadata: bytes, table: int, number: int) -> int:
    """Return where a field of a flatbuffers table lies, 0 where it is absent."""
    vtable = table - struct.unpack_from("<i", metadata, table)[0]
    (vtable_bytes,) = struct.unpack_from("<H", metadata, vtable)
    slot = 4 + 2 * number
    if slot + 2 > vtable_bytes:
        return 0
    (offset,) = struct.unpack_from("<H", metadata, vtable + slot)
    return table + offset if offset else 0


ROWS_MAX = 2**18
COLUMNS_MAX = 1024
CHECKED_MAX_BYTES = 2**28  # of all batches, each with its dictionaries: they count again with each batch
CELLS_MAX = 2**21  # as many values as a request of JSON may hold
_ALWAYS_THERE = "each record needs timestamp and server_name"


def read_columns(body: bytes) -> dict[str, Column]:
    """Return the records of a stream as columns for `records.accept_columns`.

    Raises:
        BadData: the stream is damaged, too large, compressed, or lacks a required column.
    """
    check_messages(body)
    try:
        columns = [_columns(batch) for batch in _batches(body)]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadData(f"the body is not an Arrow IPC stream: {str(error)[:200]}") from error
    names = columns[0].keys() if columns else REQUIRED
    return {name: join_column([one[name] for one in columns]) for name in names}


def _batches(body: bytes) -> Iterator[pa.RecordBatch]:
    reader = pa.ipc.open_stream(pa.py_buffer(body))
    _check_schema(reader.schema)
    n_rows = n_bytes = 0
    for batch in reader:
        n_bytes += batch.get_total_buffer_size()
        if n_bytes > CHECKED_MAX_BYTES:
            limit = f"over {CHECKED_MAX_BYTES >> 20} MiB to check in one stream"
            raise BadData(limit, hint="each batch counts its dictionaries anew: send larger batches")
        n_rows += batch.num_rows
        if n_rows > ROWS_MAX or n_rows * batch.num_columns > CELLS_MAX:
            limit = min(ROWS_MAX, CELLS_MAX // max(batch.num_columns, 1))
            raise BadData(f"too many records in one stream, at most {limit} of {batch.num_columns} columns")
        batch.validate(full=True)
        yield batch


def _check_schema(schema: pa.Schema) -> None:
    names = schema.names
    if len(names) > COLUMNS_MAX:
        raise BadData(f"the Arrow stream has {len(names)} columns, at most {COLUMNS_MAX} are taken")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadData(f"the Arrow stream has the column {quote(twice[0])} twice")
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
    times = np.where(_is_there(array), _numbers(array.view(pa.int64()), np.int64), NO_TIME)
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
    values = _numbers(doubles, np.float64)
    if array.null_count:
        values = np.where(_is_there(array), values, np.nan)
    if np.count_nonzero(np.isnan(values)) == array.null_count:
        return values
    own: list[object] = doubles.to_pylist()
    return own


def _is_there(array: pa.Array) -> Flags:
    if not array.null_count:
        return np.ones(len(array), np.bool_)
    bitmap, start = array.buffers()[0], array.offset
    if bitmap is None:  # of nulls alone, or of a kind that has none
        found = array.is_valid()
        bitmap, start = found.buffers()[1], found.offset
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), count=start + len(array), bitorder="little")
    return bits[start:].view(np.bool_)


def _numbers(array: pa.Array, kind: type[np.generic]) -> NDArray[Any]:
    """Return values of fixed width; what a null holds is undefined.

    `to_numpy`, `fill_null` and `pa.scalar` would import pandas first: half a second of the first request.
    """
    if not len(array):
        return np.zeros(0, kind)
    return np.frombuffer(array.buffers()[1], kind, array.offset + len(array))[array.offset :]
