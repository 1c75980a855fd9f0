"""Owner locks: one process is the writer of a resource, and people are told which.

Owns: `flock`, the pid in a lock file, and who holds a lock as /proc shows it.
Does not know: what the owner writes.
"""

import fcntl
import logging
import os
import threading
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from fleetcast.clock import sleep
from fleetcast.errors import AlreadyRunning, CannotStart, CorruptFile, OwnershipLost
from fleetcast.files import MOVE_IT, find_misplaced, read_regular

logger = logging.getLogger(__name__)

_LOCK_ATTEMPTS, _LOCK_PAUSE_S = 5, 0.01
_PID_MAX_BYTES = 100


class OwnerLock:
    """Makes one process the writer of a resource, by advisory locks (`flock`) on a folder and on a file.

    The folder's lock is on its inode, so it holds whatever becomes of a name in it. The file's lock keeps
    earlier releases out, and the file holds the owner's pid for people and for error messages. Where a
    file system refuses the lock on a folder, a warning says so and the file's has to do.
    The kernel frees both when their last holder dies, so a crash never leaves one stuck.
    """

    def __init__(self, path: Path, what: str, folder: Path | None = None) -> None:
        """Remember what to lock.

        Args:
            path: the file; `what` it stands for is named in messages.
            folder: what the owner writes; None locks the file alone.
        """
        self.path = path
        self.folder = folder
        self._what = what
        self._descriptor: int | None = None
        self._folder_descriptor: int | None = None
        self._is_folder_locked = False
        self._changing = threading.Lock()

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> Self:
        """Take the lock.

        Raises:
            AlreadyRunning: another process has it.
            CannotStart: the lock file, or the folder, cannot be opened.
        """
        if self.is_held:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock_folder(self.folder)  # first: a second owner must not touch the first one's file
            self._descriptor = self._lock_file()
            self.check()
        except BaseException as error:
            self.release()
            if isinstance(error, OSError):
                raise self._refusal(error) from error
            raise
        return self

    def _refusal(self, error: OSError) -> CannotStart:
        """Return what people are told of a lock that cannot be taken."""
        for path, is_folder in ((self.folder, True), (self.path, False)):
            if path is not None and (in_the_way := find_misplaced(path, wants_folder=is_folder)):
                return CannotStart(f"cannot open {self.path}: {in_the_way}", hint=MOVE_IT)
        return CannotStart(f"cannot open {error.filename or self.path}: {error.strerror}")

    def _lock_folder(self, folder: Path) -> None:
        self._folder_descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._is_folder_locked = _try_lock(self._folder_descriptor)
        except OSError as error:
            logger.warning(
                "the file system refuses a lock on a folder, so only the lock file protects it; never delete "
                "that file: folder=%s file_system=%s lock_file=%s error=%s",
                *(folder, file_system_of(folder), self.path, error.strerror),
            )
            return
        if not self._is_folder_locked:
            raise AlreadyRunning(self._what, self._holder_pid())

    def _lock_file(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(self.path, flags, 0o644)
        try:
            if not _try_lock(descriptor):
                raise AlreadyRunning(self._what, self._holder_pid())
            os.ftruncate(descriptor, 0)  # it refuses a pipe
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _holder_pid(self) -> int | None:
        """Return the pid of the owner: as the kernel knows it, else as the file says."""
        holders = lock_holders(*(path for path in (self.folder, self.path) if path is not None))
        return holders[0].pid if holders else read_pid(self.path)

    @property
    def is_in_place(self) -> bool:
        """Whether the folder that was locked still is the one of its path; cheap, from any thread."""
        descriptor = self._folder_descriptor
        return self.folder is None or descriptor is None or _is_at(descriptor, self.folder)

    def check(self) -> None:
        """Make sure that this process still owns what the paths name; a deleted lock file is made anew.

        Raises:
            OwnershipLost: the folder was moved or deleted, or another process has the lock file.
        """
        if not self.is_in_place:
            raise OwnershipLost(self._what, f"{self.folder} is no longer the folder that this process locked")
        with self._changing:
            if self._descriptor is None or _is_at(self._descriptor, self.path):
                return
            try:
                fresh = self._lock_file()
            except AlreadyRunning as error:
                raise OwnershipLost(self._what, f"{self.path} was replaced, and {error}") from error
            except OSError as error:
                logger.error("cannot make the deleted lock file anew path=%s error=%s", self.path, error)
                return
            os.close(self._descriptor)
            self._descriptor = fresh
        logger.warning("the lock file was deleted by another program, and made anew path=%s", self.path)

    def filenos(self) -> tuple[int, ...]:
        """Return the descriptors, for a child that must keep the lock alive."""
        assert self._descriptor is not None, "the lock is not held"
        both = (self._descriptor, self._folder_descriptor)
        return tuple(descriptor for descriptor in both if descriptor is not None)

    def release(self) -> None:
        """Give the lock up; a child that inherited it keeps it held."""
        for descriptor in (self._descriptor, self._folder_descriptor):
            if descriptor is not None:
                os.close(descriptor)
        self._descriptor = self._folder_descriptor = None
        self._is_folder_locked = False

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


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` names the open file or folder."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def read_pid(path: Path) -> int | None:
    """Return the pid written in a lock file, None if there is none to read."""
    try:
        return int(read_regular(path, _PID_MAX_BYTES).strip() or 0) or None
    except (OSError, ValueError, CorruptFile):
        return None


def is_locked(*paths: Path) -> bool:
    """Return whether some process holds a lock at one of the paths, without taking or creating it."""
    return any(_is_locked(path) for path in paths)


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # this file system knows no such lock
        return False
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class LockHolder:
    """A process that keeps a lock: by itself, or because it inherited it."""

    pid: int
    age_s: float
    command: str

    def __str__(self) -> str:
        return f"pid {self.pid}, for {self.age_s / 3600:.1f} h, {self.command!r}"


def lock_holders(*paths: Path) -> list[LockHolder]:
    """Return the other processes that hold a lock at one of the paths, oldest first.

    The pid that a lock file or /proc/locks shows is that of the process that took the lock; those that
    inherited it keep it, too. Processes of other users are not seen.
    """
    wanted = {(found.st_dev, found.st_ino) for path in paths if (found := _stat(path)) is not None}
    holders = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int(process.name) != os.getpid() and _holds_lock(process, wanted):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                holders.append(LockHolder(int(process.name), _age_s(process), command.strip()[:200]))
        except (OSError, ValueError, IndexError):  # it ended meanwhile, or is another user's
            continue
    return sorted(holders, key=lambda holder: -holder.age_s)


def _holds_lock(process: Path, wanted: Container[tuple[int, int]]) -> bool:
    for link in (process / "fd").iterdir():
        found = _stat(link)
        is_wanted = found is not None and (found.st_dev, found.st_ino) in wanted
        if is_wanted and "FLOCK" in (process / "fdinfo" / link.name).read_text():
            return True
    return False


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _age_s(process: Path) -> float:
    """Return how long a process has lived: proc(5), field 22 of `stat`, in clock ticks since boot."""
    started = int((process / "stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, float(Path("/proc/uptime").read_text().split()[0]) - started)


def file_system_of(path: Path) -> str:
    """Return the type of the file system that holds `path`, "unknown" where /proc does not say."""
    found = "/", "unknown"
    try:
        for line in Path("/proc/mounts").read_text().splitlines():
            _, point, kind, *_ = line.split()
            if path.resolve().is_relative_to(point) and len(point) >= len(found[0]):
                found = point, kind
    except (OSError, ValueError):
        return "unknown"
    return found[1]
