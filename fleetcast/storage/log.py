"""The append-only log under a DayStore: bytes are durable before `append` returns.

Owns: writing segments of frames (`frames.py`), group commit, what happens when a write fails.
Does not know: what the payloads mean, or what becomes of a closed segment.
"""

import errno
import logging
import os
import threading
from pathlib import Path

from fleetcast.errors import FleetcastError, StorageBroken
from fleetcast.files import fsync_dir, storage_error
from fleetcast.storage.frames import PAYLOAD_MAX_BYTES, frame, segment_path

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

    def __init__(self, folder: Path, next_number: int) -> None:
        self._folder = folder
        self._next_number = next_number
        self._turn = threading.Condition()
        self._waiting: list[_Waiter] = []
        self._is_writing = False
        self._descriptor: int | None = None
        self._size_bytes = 0
        self._open_number = -1

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
            self._close_segment()
            return self._next_number

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
        number = self._open_number
        buffers = [buffer for waiter in group for buffer in waiter.buffers]
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
