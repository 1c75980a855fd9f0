"""Durable small files, files of other processes, atomic swaps and careful removal.

Owns: `fsync`, `os.replace`, `renameat2`, and the one way to open a file of another process.
After `write_atomic` returns, a power cut leaves either the old file or the new one, never a
mixture and never nothing.
Does not know: what the files mean.
Learned from: litestream `file/replica_client.go`, prometheus/client_python.
"""

import contextlib
import ctypes
import errno
import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from fleetcast.errors import CorruptFile, StorageBroken, StorageFull

logger = logging.getLogger(__name__)

AT_FDCWD = -100
RENAME_EXCHANGE = 2  # linux/fs.h: swap two paths in one step
TEMP_MARK = ".tmp-"
MOVE_IT = "move it away, or correct what it leads to, and start again"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of ours: they say nothing about the file
READ_MAX_BYTES = 2**30  # what is read in one piece; each kind of file has a closer bound of its own
JSON_MAX_BYTES = 64 * 2**20
_LINE_MAX_BYTES = 2**24
_LINES_MAX_BYTES = 2**24  # of the end of a file of lines


def free_bytes(folder: Path) -> int | None:
    """Return the bytes a user may still write where a folder is, or will be; None where it cannot be told."""
    for place in (folder.absolute(), *folder.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def storage_error(path: Path, error: OSError) -> StorageFull | StorageBroken:
    """Return the error of our tree for an `OSError` of a write."""
    if error.errno in _FULL:
        return StorageFull(f"no space to write {path}: {error.strerror}", hint="free disk space")
    wants_folder = error.errno in (errno.EEXIST, errno.ENOTDIR)
    if in_the_way := find_misplaced(path, wants_folder=wants_folder):
        return StorageBroken(f"cannot write {path}: {in_the_way}", hint=MOVE_IT)
    return StorageBroken(f"cannot write {path}: {error}")


def find_misplaced(path: Path, *, wants_folder: bool) -> str:
    """Return in words what stands where a folder, or a plain file, belongs: at a path or above it; or ""."""
    for place in (*reversed(path.parents), path):
        belongs = "a folder" if wants_folder or place != path else "a plain file"
        found = _kind(place)
        if found not in ("", belongs):
            return f"{place} is {found}, and {belongs} belongs there"
    return ""


def _kind(place: Path) -> str:
    try:
        mode = place.stat().st_mode
    except OSError:
        return "a link that leads nowhere" if place.is_symlink() else ""
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a plain file" if stat.S_ISREG(mode) else "a pipe, a socket or a device"


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


def remove_leftover(path: Path) -> bool:
    """Delete what nothing refers to any more, file, link or folder; return whether it is gone.

    A link goes and what it points to stays, at any depth. What will not go is logged and stays: a leftover
    must stop no work.
    """
    refused: list[BaseException] = []
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, onerror=lambda _act, _path, failure: refused.append(failure[1]))
    except OSError as error:
        refused.append(error)
    if refused:
        logger.warning("cannot delete a leftover path=%s error=%s", path, refused[0])
    return not refused


def remove_stale_temps(folder: Path) -> int:
    """Delete what a crash left half written in `folder`; only its single writer may call this."""
    return sum(remove_leftover(path) for path in folder.glob(f".*{TEMP_MARK}*"))


def write_atomic(path: Path, data: bytes | Callable[[BinaryIO], object]) -> None:
    """Replace `path` by `data` in one durable step: temp, fsync, rename, fsync folder.

    Args:
        data: or what writes it, where it is too large to be held as a whole.
    Raises:
        StorageFull, StorageBroken: the old content of `path` still stands.
    """
    temp = temp_beside(path)
    try:
        with temp.open("xb") as stream:
            if isinstance(data, bytes):
                stream.write(data)
            else:
                data(stream)
            stream.flush()
            os.fsync(stream.fileno())
        if path.is_dir() and not path.is_symlink():  # no rename replaces a folder by a file
            set_aside(path, "a folder where a file belongs")
        publish(temp, path)
    except OSError as error:
        remove_leftover(temp)
        raise storage_error(path, error) from error
    except BaseException:  # of what writes it
        remove_leftover(temp)
        raise


def publish(temp: Path, path: Path) -> None:
    """Rename a finished, fsynced file (or folder) to its public name and make that durable."""
    os.replace(temp, path)
    fsync_dir(path.parent)


def set_aside(path: Path, why: object) -> Path:
    """Rename what cannot be read: its place is free, and people can look at it; return its new name."""
    aside = path.with_name(f"{path.name}.corrupt")
    if aside.is_dir():
        aside = path.with_name(f"{path.name}.corrupt-{secrets.token_hex(4)}")
    publish(path, aside)
    logger.error("damaged file set aside path=%s reason=%s", aside, why)
    return aside


def open_regular(path: Path, *, max_bytes: int | None = None) -> BinaryIO:
    """Open a file that another process may have written, to be read: the only way this project does it.

    A pipe, a socket, a device or a folder in its place never blocks the reader and is no surprise:
    it is a damaged file, as one without permission to read is.

    Args:
        max_bytes: a longer file is refused; None leaves the bound to a caller that reads in pieces.
    Raises:
        FileNotFoundError: there is none.
        CorruptFile: it is not a regular file, too long, or cannot be opened.
        OSError: this process is short of handles or memory.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in _SHORTAGES:
            raise
        raise CorruptFile(path, f"cannot be opened: {error.strerror}") from error
    found = os.fstat(descriptor)
    is_regular = stat.S_ISREG(found.st_mode)
    if not is_regular or (max_bytes is not None and found.st_size > max_bytes):
        os.close(descriptor)
        size = f"{found.st_size} bytes, at most {max_bytes} are read"
        raise CorruptFile(path, size if is_regular else "not a regular file")
    return os.fdopen(descriptor, "rb")


@contextlib.contextmanager
def name_regular(path: Path) -> Iterator[str]:
    """Give a name under which a library may open the file itself; raises what `open_regular` raises.

    The name is that of the open file, so a pipe that takes the path meanwhile holds no one up.
    """
    with open_regular(path) as stream:
        yield f"/proc/self/fd/{stream.fileno()}"


def open_append(path: Path, mode: int = 0o666) -> BinaryIO:
    """Open a file to write at its end, made where there is none; a terminal or /dev/null will do, too.

    Raises:
        OSError: it cannot be opened, or is a pipe, a socket or a folder: those would hold the writer.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, mode)
    kind = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISCHR(kind)):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "ab+" if stat.S_ISREG(kind) else "ab")


def read_regular(path: Path, max_bytes: int = READ_MAX_BYTES) -> bytes:
    """Return the bytes of a regular file; raises what `open_regular` raises."""
    with open_regular(path, max_bytes=max_bytes) as stream:
        try:
            size = os.fstat(stream.fileno()).st_size
            data = stream.read(size + 1)  # memory for the limit would be asked for, half a GB
            if len(data) > size:  # it grew meanwhile
                data += stream.read(max_bytes + 1 - len(data))
        except OSError as error:  # a disk that cannot read its own bytes
            raise CorruptFile(path, f"cannot be read: {error.strerror}") from error
    if len(data) > max_bytes:
        raise CorruptFile(path, f"grew past {max_bytes} bytes while it was read")
    return data


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` atomically as readable JSON; NaN and infinity are refused."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path, max_bytes: int = JSON_MAX_BYTES) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises:
        FileNotFoundError: there is none.
        CorruptFile: it is not a JSON object.
    """
    try:
        value = json.loads(read_regular(path, max_bytes))
    except (ValueError, RecursionError) as error:
        raise CorruptFile(path, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptFile(path, f"expected a JSON object, got {type(value).__name__}")
    return value


def append_line(path: Path, line: str, *, max_bytes: int) -> None:
    """Append one line, fsynced; past `max_bytes` the file first moves to `path.1`, over the last one.

    A crash can leave a torn last line, which readers drop (`read_json_lines`).

    Raises:
        StorageFull, StorageBroken: the line is not in the file.
    """
    size = None
    try:
        size = path.stat().st_size if path.exists() else 0
        if size + len(line) + 1 > max_bytes and size > 0:
            os.replace(path, path.with_name(f"{path.name}.1"))
            size = 0
        with open_append(path, 0o644) as stream:
            if size > 0:
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":  # a torn line must not swallow the next one
                    stream.write(b"\n")
            stream.write(line.encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        if size is not None:
            _cut_back(path, size)
        raise storage_error(path, error) from error


def _cut_back(path: Path, size: int) -> None:
    """Take back what a refused write left of a line: it was reported as not written."""
    with contextlib.suppress(OSError):
        if path.stat().st_size > size:
            os.truncate(path, size)


def read_json_lines(path: Path) -> Iterable[dict[str, Any]]:
    """Yield the JSON objects of a file of lines; torn or damaged lines are skipped.

    Of a file that grew out of bounds (ours end at 5 MB) only the end is read.

    Raises:
        CorruptFile: it is no file that can be read.
    """
    try:
        stream = open_regular(path)
    except FileNotFoundError:
        return
    with stream:
        _skip_to_newest_lines(stream)
        while line := stream.readline(_LINE_MAX_BYTES):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                yield value


def _skip_to_newest_lines(stream: BinaryIO) -> None:
    size = os.fstat(stream.fileno()).st_size
    if size > _LINES_MAX_BYTES:
        stream.seek(size - _LINES_MAX_BYTES - 1)
        stream.readline(_LINES_MAX_BYTES + 1)  # the rest of a line that began before


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
