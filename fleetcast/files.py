"""Durable small files, atomic swaps and owner locks.

Owns: `fsync`, `os.replace`, `flock`, `renameat2`. After `write_atomic` returns, a power cut
leaves either the old file or the new one, never a mixture and never nothing.
Does not know: what the files mean.
Learned from: litestream `file/replica_client.go`, prometheus/client_python.
"""

import ctypes
import errno
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fleetcast.clock import sleep
from fleetcast.errors import AlreadyRunning, CannotStart, CorruptFile, StorageBroken, StorageFull

AT_FDCWD = -100
RENAME_EXCHANGE = 2  # linux/fs.h: swap two paths in one step
TEMP_MARK = ".tmp-"
_LOCK_ATTEMPTS, _LOCK_PAUSE_S = 5, 0.01
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def storage_error(path: Path, error: OSError) -> StorageFull | StorageBroken:
    """Return the error of our tree for an `OSError` of a write."""
    if error.errno in _FULL:
        return StorageFull(f"no space to write {path}: {error.strerror}", hint="free disk space")
    return StorageBroken(f"cannot write {path}: {error}")


def fsync_dir(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the bytes of a file durable that another library wrote."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temp_beside(path: Path) -> Path:
    """Return a hidden name in the same folder, to be renamed to `path` later."""
    return path.with_name(f".{path.name}{TEMP_MARK}{secrets.token_hex(4)}")


def remove_stale_temps(folder: Path) -> int:
    """Delete the half-written files that a crash left in `folder`; only its single writer may call this."""
    stale = [p for p in folder.glob(f".*{TEMP_MARK}*") if p.is_file() or p.is_symlink()]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one durable step: temp, fsync, rename, fsync folder.

    Raises:
        StorageFull, StorageBroken: the old content of `path` still stands.
    """
    temp = temp_beside(path)
    try:
        with temp.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        publish(temp, path)
    except OSError as error:
        temp.unlink(missing_ok=True)
        raise storage_error(path, error) from error


def publish(temp: Path, path: Path) -> None:
    """Rename a finished, fsynced file (or folder) to its public name and make that durable."""
    os.replace(temp, path)
    fsync_dir(path.parent)


def read_regular(path: Path) -> bytes:
    """Return the bytes of a regular file; a pipe or a device in its place never blocks the reader.

    Raises:
        OSError: it cannot be opened.
        CorruptFile: it is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CorruptFile(path, "not a regular file")
        return stream.read()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` atomically as readable JSON; NaN and infinity are refused."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises:
        FileNotFoundError: there is none.
        CorruptFile: it is not a JSON object.
    """
    try:
        value = json.loads(read_regular(path))
    except (ValueError, RecursionError) as error:
        raise CorruptFile(path, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptFile(path, f"expected a JSON object, got {type(value).__name__}")
    return value


def append_line(path: Path, line: str, *, max_bytes: int, keep: int = 1) -> None:
    """Append one line, fsynced; past `max_bytes` the file first moves to `path.1` .. `path.keep`.

    A crash can leave a torn last line, which readers drop (`read_lines`).
    """
    try:
        size = path.stat().st_size if path.exists() else 0
        if size + len(line) + 1 > max_bytes and size > 0:
            _rotate(path, keep)
            size = 0
        with path.open("ab+") as stream:
            if size > 0:
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":  # a torn line must not swallow the next one
                    stream.write(b"\n")
            stream.write(line.encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise storage_error(path, error) from error


def _rotate(path: Path, keep: int) -> None:
    for number in range(keep, 0, -1):
        older = path.with_name(f"{path.name}.{number}")
        newer = path.with_name(f"{path.name}.{number - 1}") if number > 1 else path
        if newer.exists():
            os.replace(newer, older)


def read_json_lines(path: Path) -> Iterable[dict[str, Any]]:
    """Yield the JSON objects of a file of lines; torn or damaged lines are skipped."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        for line in stream:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def link_atomic(target: str, link: Path) -> None:
    """Point the symlink `link` at `target` in one durable step."""
    temp = temp_beside(link)
    os.symlink(target, temp)
    publish(temp, link)


def exchange(first: Path, second: Path) -> bool:
    """Swap two paths (files or folders) in one step; return whether it was atomic.

    Where the file system knows no RENAME_EXCHANGE the swap takes three renames, and a reader
    can meet a missing path in between: ours retry.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        done = libc.renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE)
        if done == 0:
            fsync_dir(second.parent)
            return True
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))
    aside = temp_beside(second)
    os.rename(second, aside)
    os.rename(first, second)
    os.rename(aside, first)
    fsync_dir(second.parent)
    return False


class OwnerLock:
    """An advisory lock (`flock`) that makes one process the writer of a resource.

    The kernel frees it when its last holder dies, so a crash never leaves it stuck. The file
    holds the owner's pid for people and for error messages.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self._what = what
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> Self:
        """Take the lock.

        Raises:
            AlreadyRunning: another process has it.
            CannotStart: the lock file cannot be opened.
        """
        if self.is_held:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CannotStart(f"cannot open {self.path}: {error.strerror}") from error
        if not _try_lock(descriptor):
            os.close(descriptor)
            raise AlreadyRunning(self._what, read_pid(self.path))
        self._descriptor = descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return self

    def fileno(self) -> int:
        """Return the descriptor, for a child that must keep the lock alive."""
        assert self._descriptor is not None, "the lock is not held"
        return self._descriptor

    def release(self) -> None:
        """Give the lock up; a child that inherited it keeps it held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _try_lock(descriptor: int) -> bool:
    """Try to lock for a moment: `is_locked` in another process holds the lock for microseconds."""
    for attempt in range(_LOCK_ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if attempt < _LOCK_ATTEMPTS - 1:
                sleep(_LOCK_PAUSE_S)
    return False


def read_pid(path: Path) -> int | None:
    """Return the pid written in a lock file, None if there is none to read."""
    try:
        return int(path.read_text().strip() or 0) or None
    except (OSError, ValueError):
        return None


def is_locked(path: Path) -> bool:
    """Return whether some process holds the lock at `path`, without taking or creating it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
