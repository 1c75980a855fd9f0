"""An Arrow IPC stream looked at before it is read: what it would unpack to must be bounded.

Owns: the few offsets of the flatbuffers that frame a stream (format/Message.fbs of Apache Arrow).
A compressed buffer states its own unpacked size, so that a small body could ask for any amount of
memory; compressed streams are refused. pyarrow verifies each flatbuffer before we look into it.
"""

import struct

import pyarrow as pa

from fleetcast.errors import BadData

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
