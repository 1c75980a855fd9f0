"""Owner locks: one writer a resource, whatever becomes of the names of its files."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fleetcast import locks
from fleetcast.errors import AlreadyRunning, CannotStart, ExitCode, OwnershipLost
from fleetcast.locks import OwnerLock, is_locked, lock_holders, read_pid


def test_a_second_owner_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    with OwnerLock(tmp_path / "x.lock", "the buffer"), pytest.raises(AlreadyRunning) as caught:
        OwnerLock(tmp_path / "x.lock", "the buffer").acquire()
    assert caught.value.pid == os.getpid()
    assert str(caught.value) == f"the buffer is already held by pid {os.getpid()}"


def test_a_released_lock_can_be_taken_again(tmp_path: Path) -> None:
    lock = OwnerLock(tmp_path / "sub" / "x.lock", "the buffer")
    assert lock.acquire() is lock.acquire()  # taking it twice is harmless
    assert lock.is_held
    assert is_locked(lock.path)
    lock.release()
    lock.release()
    assert not lock.is_held
    assert not is_locked(lock.path)
    with OwnerLock(lock.path, "the buffer"):
        pass


def test_a_child_that_inherits_the_lock_keeps_it_until_it_ends(tmp_path: Path) -> None:
    lock = OwnerLock(tmp_path / "attempt.lock", "the training").acquire()
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        pass_fds=lock.filenos(),
    )
    lock.release()
    assert is_locked(lock.path)
    child.communicate()
    assert not is_locked(lock.path)


def test_asking_for_a_lock_that_never_was_creates_nothing(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "x.lock")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_cannot_be_opened_is_a_failed_start(tmp_path: Path) -> None:
    (tmp_path / "x.lock").mkdir()
    with pytest.raises(CannotStart, match=r"x\.lock"):
        OwnerLock(tmp_path / "x.lock", "the buffer").acquire()


@pytest.mark.parametrize("content", [None, "", "0\n", "junk", "-"])
def test_a_pid_that_cannot_be_read_is_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "x.lock").write_text(content)
    assert read_pid(tmp_path / "x.lock") is None


def test_somebody_asking_about_a_lock_does_not_keep_another_from_taking_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trainer.lock"
    path.touch()
    asking = path.open("rb")
    fcntl.flock(asking, fcntl.LOCK_SH)  # the middle of somebody's `is_locked`
    monkeypatch.setattr(locks, "sleep", lambda _seconds: asking.close())
    with OwnerLock(path, "the training") as lock:
        assert lock.is_held


def test_a_lock_on_a_folder_outlives_the_name_of_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    first = OwnerLock(folder / "x.lock", "the buffer", folder).acquire()
    first.path.unlink()
    with pytest.raises(AlreadyRunning) as caught:
        OwnerLock(folder / "x.lock", "the buffer", folder).acquire()
    assert caught.value.exit_code == ExitCode.ALREADY_RUNNING
    assert is_locked(first.path, folder)
    first.check()
    assert read_pid(folder / "x.lock") == os.getpid(), "the file is made anew, for earlier releases"
    with pytest.raises(AlreadyRunning):
        OwnerLock(folder / "x.lock", "the buffer").acquire()
    first.release()
    assert not is_locked(first.path, folder)


def test_an_earlier_release_and_this_one_exclude_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with OwnerLock(folder / "x.lock", "the buffer"), pytest.raises(AlreadyRunning):  # the file alone
        OwnerLock(folder / "x.lock", "the buffer", folder).acquire()
    with OwnerLock(folder / "x.lock", "the buffer", folder), pytest.raises(AlreadyRunning):
        OwnerLock(folder / "x.lock", "the buffer").acquire()


@pytest.mark.parametrize("replace", [True, False])
def test_an_owner_notices_that_its_folder_is_another(tmp_path: Path, replace: bool) -> None:
    folder = tmp_path / "data"
    with OwnerLock(folder / "x.lock", "the buffer", folder) as lock:
        lock.check()
        folder.rename(tmp_path / "moved")
        if replace:
            folder.mkdir()
        assert not lock.is_in_place
        with pytest.raises(OwnershipLost, match="no longer"):
            lock.check()
        assert not list(folder.glob("*"))


def test_an_owner_notices_that_another_has_its_replaced_lock_file(tmp_path: Path) -> None:
    with OwnerLock(tmp_path / "x.lock", "the state") as lock:
        lock.path.unlink()
        with OwnerLock(tmp_path / "x.lock", "the state"), pytest.raises(OwnershipLost, match="replaced"):
            lock.check()


def test_a_file_system_that_locks_no_folder_is_named_and_the_file_protects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")  # as NFS does
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with OwnerLock(tmp_path / "x.lock", "the buffer", tmp_path) as lock:
        assert "refuses a lock on a folder" in caplog.text
        assert f"folder={tmp_path} file_system=" in caplog.text
        assert "file_system=unknown" not in caplog.text
        with pytest.raises(AlreadyRunning):
            OwnerLock(tmp_path / "x.lock", "the buffer", tmp_path).acquire()
        lock.check()


def test_the_holders_of_a_lock_are_found_with_their_age(tmp_path: Path) -> None:
    lock = OwnerLock(tmp_path / "x.lock", "a test", tmp_path).acquire()
    child = subprocess.Popen(["sleep", "60"], pass_fds=lock.filenos())
    lock.release()
    try:
        (holder,) = lock_holders(tmp_path / "x.lock", tmp_path)
        assert (holder.pid, holder.command) == (child.pid, "sleep 60")
        assert 0 <= holder.age_s < 60
    finally:
        child.kill()
        child.wait()
    assert lock_holders(tmp_path / "x.lock", tmp_path) == []
