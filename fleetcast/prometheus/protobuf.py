"""The outside of a request: a snappy block of protobuf messages, bounded before anything of it is built.

Owns: snappy, descriptors made from a table (so no generated code and no protoc), counting a message's fields
without parsing it. Does not know: what the fields are.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from fleetcast.errors import BadData

NO_REQUEST = "the body is not a protobuf WriteRequest"
_LENGTH = 2  # wire type of what has a length before it
_FIXED_BYTES = {1: 8, 5: 4}  # by wire type
_EXPANSION_MAX = 32  # snappy's densest copy makes 64 bytes out of 3
Layout = Mapping[str, Sequence[tuple[str, int, str, str]]]  # message: (field, number, type, message of it)


def message_classes(package: str, layout: Layout) -> tuple[Any, Any]:
    """Return the last message described (a request) and the one before it (a series)."""
    kinds = descriptor_pb2.FieldDescriptorProto
    package = f"fleetcast.prometheus.{package}"
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    for message, described in layout.items():
        made = file.message_type.add(name=message)
        for field, number, kind, type_name in described:
            made.field.add(
                name=field,
                number=number,
                type=kinds.Type.Value(f"TYPE_{kind.removesuffix('[]').upper()}"),
                label=kinds.LABEL_REPEATED if kind.endswith("[]") else kinds.LABEL_OPTIONAL,
                type_name=f".{package}.{type_name}" if type_name else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    series, request = list(layout)[-2:]
    return tuple(
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
        for name in (request, series)
    )  # type: ignore[return-value]


class BodyTooLarge(BadData):
    """Raised when a body would unpack to more than is allowed."""


def unpack(body: bytes, max_bytes: int) -> bytes:
    """Return the content of a snappy block.

    Raises:
        BodyTooLarge: the block says that its content is larger than `max_bytes`.
        BadData: it is no snappy block.
    """
    size = _stated_size(body)
    if size > max_bytes:
        limit = f"{max_bytes} (remote_write.max_unpacked_bytes)"
        raise BodyTooLarge(f"the body unpacks to {size} bytes, at most {limit} are taken")
    if size > len(body) * _EXPANSION_MAX:
        raise BadData("the body is not a snappy block: it states an impossible size")
    try:
        return bytes(pa.decompress(body, decompressed_size=size, codec="snappy", asbytes=True))
    except (pa.ArrowException, OSError) as error:
        raise BadData("the body is not a snappy block") from error


def _stated_size(body: bytes) -> int:
    size = 0
    for place, byte in enumerate(body[:5]):
        size |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return size
    raise BadData("the body is not a snappy block: its size is missing")


def check_series(chunk: bytes, n_most: int) -> None:
    """Raise BodyTooLarge where one series has more bytes than that."""
    if len(chunk) > n_most:
        limit = f"{n_most} bytes (remote_write.max_series_bytes)"
        raise BodyTooLarge(f"a series of the request has {len(chunk)} bytes, at most {limit} are taken")


def check_fields(content: bytes, wanted: int, n_most: int, what: str, n_before: int = 0) -> None:
    """Count length-delimited fields of a request without building any, up to the limit.

    A field's first byte is one of two, however long its tag is written: where those are few, there is
    nothing to count.

    Args:
        wanted: their number, below 16.
        n_before: those that came before these bytes.
    Raises:
        BodyTooLarge: there are more.
        BadData: the bytes are no message, or hold a group, which no sender makes.
    """
    n_found = n_before
    if len(content) // 2 + n_found <= n_most:
        return
    tag = wanted << 3 | _LENGTH
    if n_found + _count_bytes(content, [tag, tag | 0x80]) <= n_most:
        return
    for number in _fields(content):
        n_found += number == wanted
        if n_found > n_most:
            raise BodyTooLarge(too_many(what, n_most))


def _count_bytes(content: bytes, wanted: Sequence[int]) -> int:
    cells = np.frombuffer(content, dtype=np.uint8)
    return sum(int(np.count_nonzero(cells == one)) for one in wanted)


def _fields(content: bytes) -> Iterator[int]:
    """Yield the number of each field of a message.

    Raises:
        BadData: the bytes are no message, or hold a group.
    """
    place = 0
    while place < len(content):
        tag, place = _varint(content, place)
        kind = tag & 7
        yield tag >> 3
        if kind == 0:
            _, place = _varint(content, place)
        elif kind == _LENGTH:
            length, place = _varint(content, place)
            place += length
        elif kind in _FIXED_BYTES:
            place += _FIXED_BYTES[kind]
        else:
            raise BadData(NO_REQUEST)


def _varint(content: bytes, place: int) -> tuple[int, int]:
    """Return the number that begins there, and where it ends."""
    number = 0
    for n_before, byte in enumerate(content[place : place + 10]):
        number |= (byte & 0x7F) << (7 * n_before)
        if byte < 0x80:
            return number, place + n_before + 1
    raise BadData(NO_REQUEST)


def too_many(what: str, n_most: int) -> str:
    """Return the words for a request of too many parts."""
    return f"over {n_most} {what} in one request (remote_write.max_request_samples)"
