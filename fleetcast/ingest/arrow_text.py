"""Text columns of Arrow as codes into distinct texts.

Owns: the text types, plain, dictionary-encoded and by view. Texts beyond any use are left out
(absent): in a view column many rows can point at one text, so that what looks small could be
unpacked to any size.
"""

import struct
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as kinds

from fleetcast.ingest.record_columns import NO_NAME, CodedNames

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
        return _coded_views(array)
    if not kinds.is_dictionary(array.type):
        array = array.dictionary_encode()
    codes = np.asarray(array.indices.cast(pa.int32()).fill_null(NO_NAME), dtype=np.int32)
    values = array.dictionary
    if kinds.is_string_view(values.type):
        inner = _coded_views(values)
        return CodedNames(inner.names, np.where(codes == NO_NAME, NO_NAME, inner.codes[codes]))
    sizes = np.asarray(pc.binary_length(values).fill_null(0))
    if len(sizes) and sizes.max() > TEXT_MAX_BYTES:
        values = pc.if_else(pa.array(sizes <= TEXT_MAX_BYTES), values, pa.scalar(None, values.type))
    return CodedNames(values.to_pylist(), codes)


def _coded_views(array: pa.Array) -> CodedNames:
    """Read each distinct view once, and only those of rows that are there."""
    is_there = np.asarray(array.is_valid().to_numpy(zero_copy_only=False), dtype=np.bool_)
    codes = np.full(len(array), NO_NAME, dtype=np.int32)
    if not is_there.any():
        return CodedNames((), codes)
    _validity, views, *data = array.buffers()
    place = array.offset * _VIEW_BYTES
    entries = np.frombuffer(views, dtype=f"V{_VIEW_BYTES}", count=len(array), offset=place)
    distinct, codes[is_there] = np.unique(entries[is_there], return_inverse=True)
    return CodedNames([_viewed(entry.tobytes(), data) for entry in distinct], codes)


def _viewed(entry: bytes, data: Sequence[pa.Buffer]) -> str | None:
    size, _prefix, buffer, offset = struct.unpack("<i4sii", entry)
    if size <= _INLINE_MAX:
        return entry[4 : 4 + size].decode()
    if size > TEXT_MAX_BYTES:
        return None
    return str(data[buffer].slice(offset, size).to_pybytes(), "utf-8")
