"""Segments of the log as bytes: framed, checksummed payloads, and reading them back.

Owns: the frame format, the segment's file name, what a torn tail and damage are.
Does not know: writing, or what the payloads mean.

A segment `NNNNNNNNNNNN.wal` is a row of frames: magic (4 bytes, its last one is the format
version), payload length and crc32c of magic + length + payload (little-endian unsigned 32-bit
each), payload. The magic holds a byte that UTF-8 never has, so no name in a payload can imitate it.
"""

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import crc32c

MAGIC = b"\xf5FW\x02"
_READABLE = (b"\xf5FW\x01", MAGIC)  # version 1 had Arrow streams as payloads only
PAYLOAD_MAX_BYTES = 256 * 2**20
_HEADER = struct.Struct("<4sII")
_LENGTH = struct.Struct("<I")
_SEGMENT_NAME = re.compile(r"(\d{12})\.wal")


@dataclass(frozen=True, slots=True)
class Segment:
    """One file of the log; a higher number is newer."""

    number: int
    path: Path


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes of a segment that no frame owns, with valid frames or the file's end after them."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class SegmentContent:
    """What could be read from a segment."""

    payloads: tuple[bytes, ...]
    damages: tuple[Damage, ...]
    torn_bytes: int  # an unfinished last frame: never acknowledged, or still being written
    is_newer_format: bool = False


def frame(payload: bytes) -> bytes:
    """Return the header that goes before `payload`."""
    start = MAGIC + _LENGTH.pack(len(payload))
    return start + _LENGTH.pack(crc32c.crc32c(payload, crc32c.crc32c(start)))


def segment_path(folder: Path, number: int) -> Path:
    """Return the file of a segment."""
    return folder / f"{number:012d}.wal"


def segments(folder: Path) -> list[Segment]:
    """Return the segments of a log folder, oldest first; foreign files are not looked at."""
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [(match, name) for name in names if (match := _SEGMENT_NAME.fullmatch(name))]
    listed = [Segment(int(match[1]), folder / name) for match, name in found]
    return sorted(listed, key=lambda segment: segment.number)


def read_segment(path: Path) -> SegmentContent:
    """Return every valid frame's payload; damage in the middle costs only itself.

    Raises:
        FileNotFoundError: the segment became parts meanwhile.
    """
    return parse_frames(path.read_bytes())


def parse_frames(data: bytes) -> SegmentContent:
    """Read frames from the bytes of a segment, resynchronising at the next valid one."""
    if _is_newer(data):
        return SegmentContent((), (), 0, is_newer_format=True)
    payloads: list[bytes] = []
    damages: list[Damage] = []
    offset = 0
    while offset < len(data):
        payload = _payload_at(data, offset)
        if payload is not None:
            payloads.append(payload)
            offset += _HEADER.size + len(payload)
            continue
        found = _next_valid(data, offset + 1)
        if found is None:
            if _is_torn(data, offset):
                return SegmentContent(tuple(payloads), tuple(damages), len(data) - offset)
            found = len(data)
        damages.append(Damage(offset, data[offset:found]))
        offset = found
    return SegmentContent(tuple(payloads), tuple(damages), 0)


def _is_newer(data: bytes) -> bool:
    """Whether the first frame is whole and of a later format version (a flipped bit is no version)."""
    is_other = data[:3] == MAGIC[:3] and data[3:4] > MAGIC[3:]
    return is_other and _payload_at(data, 0, (data[:4],)) is not None


def _payload_at(data: bytes, offset: int, wanted: tuple[bytes, ...] = _READABLE) -> bytes | None:
    if offset + _HEADER.size > len(data):
        return None
    magic, length, checksum = _HEADER.unpack_from(data, offset)
    start = offset + _HEADER.size
    if magic not in wanted or length > PAYLOAD_MAX_BYTES or start + length > len(data):
        return None
    payload = data[start : start + length]
    if crc32c.crc32c(payload, crc32c.crc32c(data[offset : offset + 8])) != checksum:
        return None
    return payload


def _next_valid(data: bytes, start: int) -> int | None:
    offset = data.find(MAGIC[:3], start)
    while offset >= 0:
        if _payload_at(data, offset) is not None:
            return offset
        offset = data.find(MAGIC[:3], offset + 1)
    return None


def _is_torn(data: bytes, offset: int) -> bool:
    """Whether the rest looks like a frame whose end was never written (zeros after a power cut)."""
    rest = data[offset:]
    if len(rest) < _HEADER.size:
        return any(magic.startswith(rest[: len(magic)]) for magic in _READABLE) or not any(rest)
    magic, length, _ = _HEADER.unpack_from(rest)
    is_unfinished = magic in _READABLE and _HEADER.size + length > len(rest)
    return is_unfinished or not any(rest)
