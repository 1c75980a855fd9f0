"""The append-only log under a DayStore: bytes are durable before `append` returns.

Owns: segments of framed, checksummed payloads; group commit; reading them back after a crash,
a torn tail or damage. Does not know: what the payloads mean.

A segment `NNNNNNNNNNNN.wal` is a row of frames: magic (4 bytes, its last one is the format
version), payload length and crc32c of length + payload (little-endian unsigned 32-bit each),
payload. The magic holds a byte that UTF-8 never has, so no name in a payload can imitate it.
"""

import errno
import logging
import os
import re
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

import crc32c

from fleetcast.errors import FleetcastError, StorageBroken
from fleetcast.files import fsync_dir, storage_error

logger = logging.getLogger(__name__)

MAGIC = b"\xf5FW\x01"
PAYLOAD_MAX_BYTES = 256 * 2**20
_HEADER = struct.Struct("<4sII")
_LENGTH = struct.Struct("<I")
_SEGMENT_NAME = re.compile(r"(\d{12})\.wal")
_WRITEV_MAX = 512  # buffers of one writev; the kernel's limit is 1024


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
    length = _LENGTH.pack(len(payload))
    checksum = crc32c.crc32c(payload, crc32c.crc32c(length))
    return MAGIC + length + _LENGTH.pack(checksum)


def segments(folder: Path) -> list[Segment]:
    """Return the segments of a log folder, oldest first; foreign files are not looked at."""
    try:
        names = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [(match, name) for name in names if (match := _SEGMENT_NAME.fullmatch(name))]
    return sorted(
        (Segment(int(match[1]), folder / name) for match, name in found), key=lambda segment: segment.number
    )


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
    return is_other and _payload_at(MAGIC + data[4:], 0) is not None


def _payload_at(data: bytes, offset: int) -> bytes | None:
    if offset + _HEADER.size > len(data):
        return None
    magic, length, checksum = _HEADER.unpack_from(data, offset)
    start = offset + _HEADER.size
    if magic != MAGIC or length > PAYLOAD_MAX_BYTES or start + length > len(data):
        return None
    payload = data[start : start + length]
    if crc32c.crc32c(payload, crc32c.crc32c(_LENGTH.pack(length))) != checksum:
        return None
    return payload


def _next_valid(data: bytes, start: int) -> int | None:
    offset = data.find(MAGIC, start)
    while offset >= 0:
        if _payload_at(data, offset) is not None:
            return offset
        offset = data.find(MAGIC, offset + 1)
    return None


def _is_torn(data: bytes, offset: int) -> bool:
    """Whether the rest looks like a frame whose end was never written (zeros after a power cut)."""
    rest = data[offset:]
    if len(rest) < _HEADER.size:
        return MAGIC.startswith(rest[: len(MAGIC)]) or not any(rest)
    magic, length, _ = _HEADER.unpack_from(rest)
    is_unfinished = magic == MAGIC and _HEADER.size + length > len(rest)
    return is_unfinished or not any(rest)


class _Waiter:
    """One append waiting for its group's fdatasync."""

    __slots__ = ("buffers", "error", "is_done")

    def __init__(self, payload: bytes) -> None:
        self.buffers = (frame(payload), payload)
        self.is_done = False
        self.error: FleetcastError | None = None


class WriteAheadLog:
    """The writing side; thread safe. Appends that arrive during a write share the next fdatasync.

    Guarantees: a frame is on disk when `append` returns; of a refused append nothing is kept,
    unless the disk refuses even that; a descriptor whose fsync failed is never written again.
    """

    def __init__(self, folder: Path, next_number: int) -> None:
        self._folder = folder
        self._next_number = next_number
        self._turn = threading.Condition()
        self._waiting: list[_Waiter] = []
        self._is_writing = False
        self._descriptor: int | None = None
        self._size_bytes = 0
        self._open_number = -1

    @property
    def open_number(self) -> int:
        """Number of the segment that appends go to now; -1 while none is open."""
        return self._open_number

    def append(self, payload: bytes) -> None:
        """Write one frame and return when it is durable.

        Raises:
            StorageFull, StorageBroken: it is not kept; the caller may try again later.
        """
        if len(payload) > PAYLOAD_MAX_BYTES:
            raise ValueError(f"a payload must have <= {PAYLOAD_MAX_BYTES} bytes, got {len(payload)}")
        waiter = _Waiter(payload)
        with self._turn:
            self._waiting.append(waiter)
            while self._is_writing and not waiter.is_done:
                self._turn.wait()
            if not waiter.is_done:
                self._is_writing = True
                group, self._waiting = self._waiting, []
        if not waiter.is_done:
            self._lead(group)
        if waiter.error is not None:
            raise waiter.error

    def rotate(self) -> None:
        """Close the open segment, so that it can become parts; the next append opens a new one."""
        with self._turn:
            while self._is_writing:
                self._turn.wait()
            self._close_segment()

    def _lead(self, group: list[_Waiter]) -> None:
        """Write the frames of all that wait; the caller has set `_is_writing`."""
        error: FleetcastError | None = StorageBroken("the write was interrupted")
        try:
            self._write(group)
            error = None
        except FleetcastError as refused:
            error = refused
        finally:
            with self._turn:
                for waiter in group:
                    waiter.error = error
                    waiter.is_done = True
                self._is_writing = False
                self._turn.notify_all()

    def _write(self, group: list[_Waiter]) -> None:
        descriptor = self._open_segment()
        path = self._path()
        buffers = [buffer for waiter in group for buffer in waiter.buffers]
        try:
            written = _write_all(descriptor, buffers)
        except OSError as error:
            self._take_back(descriptor)
            raise storage_error(path, error) from error
        try:
            os.fdatasync(descriptor)
        except OSError as error:
            # after a failed fsync the kernel may have dropped the pages: this descriptor lies from now on
            self._take_back(descriptor)
            self._close_segment()
            raise storage_error(path, error) from error
        self._size_bytes += written

    def _take_back(self, descriptor: int) -> None:
        """Cut off what a failed write left; where even that fails, leave the segment behind."""
        try:
            os.ftruncate(descriptor, self._size_bytes)
        except OSError as error:
            logger.error("cannot cut a refused write off segment=%s error=%s", self._path(), error)
            self._close_segment()

    def _open_segment(self) -> int:
        if self._descriptor is not None:
            return self._descriptor
        path = self._folder / f"{self._next_number:012d}.wal"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._descriptor = os.open(path, flags, 0o644)
            fsync_dir(self._folder)
        except OSError as error:
            self._close_segment()
            raise storage_error(path, error) from error
        finally:
            self._next_number += 1  # a number is never used twice, not even after a failure
        self._open_number = self._next_number - 1
        self._size_bytes = 0
        return self._descriptor

    def _close_segment(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._open_number = -1

    def _path(self) -> Path:
        return self._folder / f"{self._open_number:012d}.wal"


def _write_all(descriptor: int, buffers: list[bytes]) -> int:
    """Write all buffers and return the number of bytes; a short count is no success."""
    written = 0
    for start in range(0, len(buffers), _WRITEV_MAX):
        chunk = buffers[start : start + _WRITEV_MAX]
        size = sum(map(len, chunk))
        count = os.writev(descriptor, chunk)
        if count < size:  # a full disk shows itself as a short count first, then as an error
            _write_rest(descriptor, memoryview(b"".join(chunk))[count:])
        written += size
    return written


def _write_rest(descriptor: int, rest: memoryview) -> None:
    while rest:
        count = os.write(descriptor, rest)
        if count == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rest = rest[count:]
