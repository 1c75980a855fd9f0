"""The append-only log under a day store: bytes are durable before `append` returns.

Owns: segments, frames, payloads, group commit, what happens when a write fails, torn tails and
damage. Does not know: what becomes of a closed segment, or of damaged bytes.

A segment `NNNNNNNNNNNN.wal` is a row of frames: magic (4 bytes, its last one is the format version),
payload length and crc32c of magic + length + payload (little-endian unsigned 32-bit each), payload.
The magic holds a byte that UTF-8 never has, so no name in a payload can imitate it.

A payload of records, little-endian: tag (4 bytes), number of rows, of metrics, of servers and bytes
of the names (unsigned 32-bit each); the names (UTF-8, metrics then servers, separated by newlines);
timestamps (int64, ms); values (float64, metric by metric, NaN = absent); the server of each row
(int32). Records are plain columns because one tick of a small fleet is 20 rows, and an Arrow stream
of them is mostly headers. Settled forecasts, and all logs of format version 1, are Arrow IPC
streams, which begin with other bytes than the tag.
"""

import errno
import logging
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import crc32c
import numpy as np
import pyarrow as pa

from fleetcast.errors import FleetcastError, StorageBroken
from fleetcast.files import fsync_dir, read_regular, storage_error
from fleetcast.schema import Codes, Floats, Longs, RecordBatch
from fleetcast.storage.parts import READ_ERRORS
from fleetcast.storage.tables import METRICS, TableKind, canonical, concatenate, table_of_batch

TAG = b"FCR\x01"
_HEAD = struct.Struct("<4s4I")
_SEPARATOR = "\n"
_SMALL_BYTES = 65_536  # of a payload that is read together with those like it; copying larger ones costs more


def encode_table(table: pa.Table) -> bytes:
    """Return a table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def encode_nothing(schema: pa.Schema) -> bytes:
    """Return a stream without rows; `Schema.empty_table` would load pandas."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema):
        pass
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
    for columns in _read(payloads, kind, on_bad):
        if alike and (isinstance(columns, pa.Table) or columns.names != alike[0].names):
            tables.append(_table(alike))
            alike = []
        if isinstance(columns, pa.Table):
            tables.append(columns)
        else:
            alike.append(columns)
    if alike:
        tables.append(_table(alike))
    return concatenate(tables, kind)


def _read(
    payloads: Sequence[bytes], kind: TableKind, on_bad: Callable[[bytes, Exception], None]
) -> Iterator["_Columns | pa.Table"]:
    """Yield what payloads hold; those that are wrong in a run of them are found one by one."""
    for run in _runs(payloads):
        try:
            yield _columns(run, kind) if run[0].startswith(TAG) else _stream(run[0], kind)
        except READ_ERRORS as error:
            if len(run) == 1:
                on_bad(run[0], error)
                continue
            for payload in run:
                yield from _read([payload], kind, on_bad)


def _runs(payloads: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Yield payloads of records that differ in numbers only together, any other alone."""
    run: list[bytes] = []
    head = b""
    for payload in payloads:
        if head and len(payload) == len(run[0]) and payload.startswith(head):
            run.append(payload)
            continue
        if run:
            yield run
        run, head = [payload], b""
        if payload.startswith(TAG) and _HEAD.size <= len(payload) <= _SMALL_BYTES:
            head = payload[: _HEAD.size + _HEAD.unpack_from(payload)[4]]
    if run:
        yield run


@dataclass(frozen=True, slots=True)
class _Columns:
    """The rows of payloads with the same names."""

    n_metrics: int
    names: tuple[str, ...]  # metrics, then servers
    times_ms: Longs
    values: Floats  # (metric, row)
    codes: Codes


def _columns(run: Sequence[bytes], kind: TableKind) -> _Columns:
    """Return the plain columns of a run of payloads; ValueError where they do not fit."""
    payload = run[0]
    if kind is not METRICS or len(payload) < _HEAD.size:
        raise ValueError("a payload of records has no place here")
    _, n_rows, n_metrics, n_servers, n_bytes = _HEAD.unpack_from(payload)
    times_at = _HEAD.size + n_bytes
    values_at = times_at + 8 * n_rows
    codes_at = values_at + 8 * n_rows * n_metrics
    names = _names(payload[_HEAD.size : times_at])
    if codes_at + 4 * n_rows != len(payload) or len(names) != n_metrics + n_servers:
        raise ValueError("a payload of records does not have the size it says")
    cells = np.frombuffer(b"".join(run), np.uint8).reshape(len(run), -1)  # (payload, byte)
    codes = np.ascontiguousarray(cells[:, codes_at:]).reshape(-1).view("<i4")
    if len(codes) and not 0 <= codes.min() <= codes.max() < n_servers:
        raise ValueError("a payload of records names a server it does not have")
    flat = np.ascontiguousarray(cells[:, values_at:codes_at]).reshape(-1).view("<f8")
    values = flat.reshape(len(run), n_metrics, n_rows).transpose(1, 0, 2).reshape(n_metrics, len(codes))
    times = np.ascontiguousarray(cells[:, times_at:values_at]).reshape(-1).view("<i8")
    return _Columns(n_metrics, names, times, values, codes)


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
        CorruptFile: it is no file that can be read.
    """
    return parse_frames(read_regular(path))


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


logger = logging.getLogger(__name__)

SEGMENT_MAX_BYTES = 64 * 2**20  # a full segment is closed: it is read back as a whole
_WRITEV_MAX = 512  # buffers of one writev; the kernel's limit is 1024


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

    def __init__(self, folder: Path, next_number: int, guard: Callable[[], None] = lambda: None) -> None:
        """Write to segments from `next_number` on; `guard` raises where the folder is not ours any more."""
        self._folder = folder
        self._next_number = next_number
        self._guard = guard
        self._turn = threading.Condition()
        self._waiting: list[_Waiter] = []
        self._is_writing = False
        self._descriptor: int | None = None
        self._size_bytes = 0
        self._open_number = -1
        self._open_path = folder  # of the open segment, looked at before each write

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

    def rotate(self) -> int:
        """Close the open segment; every number below the one returned is closed for good."""
        with self._turn:
            while self._is_writing:
                self._turn.wait()
            if self._descriptor is not None and not self._is_in_place(self._descriptor):
                self._save_deleted_segment()
            self._close_segment()
            return self._next_number

    def close(self) -> None:
        """Close the open segment and write nothing more."""
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
        self._guard()
        if self._descriptor is not None and not self._is_in_place(self._descriptor):
            self._save_deleted_segment()
        self._append([buffer for waiter in group for buffer in waiter.buffers])

    def _is_in_place(self, descriptor: int) -> bool:
        """Whether the open segment still has its name: what is written to one without goes at its close."""
        try:
            found = self._open_path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(descriptor))

    def _save_deleted_segment(self) -> None:
        """Write a segment that another program deleted again, under the next number."""
        assert self._descriptor is not None
        self._guard()
        logger.error(
            "the open log segment was deleted by another program; it is written again number=%d bytes=%d",
            *(self._open_number, self._size_bytes),
        )
        whole = os.pread(self._descriptor, self._size_bytes, 0)
        self._close_segment()
        self._append([whole])

    def _append(self, buffers: list[bytes]) -> None:
        descriptor = self._open_segment()
        number = self._open_number
        try:
            written = _write_all(descriptor, buffers)
        except OSError as error:
            self._take_back(descriptor)
            raise storage_error(self._path(number), error) from error
        try:
            os.fdatasync(descriptor)
        except OSError as error:
            # after a failed fsync the kernel may have dropped the pages: this descriptor lies from now on
            self._take_back(descriptor)
            self._close_segment()
            raise storage_error(self._path(number), error) from error
        self._size_bytes += written
        if self._size_bytes >= SEGMENT_MAX_BYTES:
            self._close_segment()

    def _take_back(self, descriptor: int) -> None:
        """Cut off what a failed write left; where even that fails, leave the segment behind."""
        try:
            os.ftruncate(descriptor, self._size_bytes)
        except OSError as error:
            logger.error("cannot cut a refused write off number=%d error=%s", self._open_number, error)
            self._close_segment()

    def _open_segment(self) -> int:
        if self._descriptor is not None:
            return self._descriptor
        path = self._path(self._next_number)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._descriptor = os.open(path, flags, 0o644)
            fsync_dir(self._folder)
        except OSError as error:
            self._close_segment()
            raise storage_error(path, error) from error
        finally:
            self._next_number += 1  # a number is never used twice, not even after a failure
        self._open_number = self._next_number - 1
        self._open_path = path
        self._size_bytes = 0
        return self._descriptor

    def _close_segment(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._open_number = -1

    def _path(self, number: int) -> Path:
        return segment_path(self._folder, number)


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
