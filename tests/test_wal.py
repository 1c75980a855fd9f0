"""Appends are durable, grouped, refused as a whole, and never written to a descriptor that lied."""

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fleetcast.errors import StorageBroken, StorageFull
from fleetcast.storage import log as log_module
from fleetcast.storage.log import WriteAheadLog, read_segment, segments


def payloads(folder: Path) -> list[bytes]:
    return [payload for segment in segments(folder) for payload in read_segment(segment.path).payloads]


def torn(folder: Path) -> int:
    return sum(read_segment(segment.path).torn_bytes for segment in segments(folder))


def failing(code: int, times: int = 1) -> Callable[..., int]:
    left = [times]

    def call(*_args: object) -> int:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return 0

    return call


def test_an_append_is_in_the_file_when_it_returns(tmp_path: Path) -> None:
    log = WriteAheadLog(tmp_path, 5)
    log.append(b"one")
    log.append(b"two")
    assert payloads(tmp_path) == [b"one", b"two"]
    assert [segment.number for segment in segments(tmp_path)] == [5]


def test_every_append_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(log_module.os, "fdatasync", lambda fd: (real(fd), synced.append(fd)))
    log = WriteAheadLog(tmp_path, 1)
    for _ in range(3):
        log.append(b"x")
    assert len(synced) == 3


def test_appends_that_wait_share_one_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a sync that takes long, when ten appends come meanwhile, then one more sync serves all."""
    release, first_is_in = threading.Event(), threading.Event()
    syncs: list[int] = []

    def slow(descriptor: int) -> None:
        syncs.append(descriptor)
        first_is_in.set()
        release.wait(10)

    monkeypatch.setattr(log_module.os, "fdatasync", slow)
    log = WriteAheadLog(tmp_path, 1)
    threads = [threading.Thread(target=log.append, args=(b"%d" % number,)) for number in range(11)]
    threads[0].start()
    assert first_is_in.wait(10)
    for thread in threads[1:]:
        thread.start()
    while len(log._waiting) < 10:
        threading.Event().wait(0.001)
    release.set()
    for thread in threads:
        thread.join(10)
    assert len(syncs) == 2
    assert sorted(payloads(tmp_path)) == sorted(b"%d" % number for number in range(11))


def test_rotation_closes_all_numbers_below_the_one_it_returns(tmp_path: Path) -> None:
    log = WriteAheadLog(tmp_path, 1)
    assert log.rotate() == 1, "nothing was open"
    log.append(b"one")
    assert log.rotate() == 2
    log.append(b"two")
    assert [segment.number for segment in segments(tmp_path)] == [1, 2]


def test_a_full_segment_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "SEGMENT_MAX_BYTES", 100)
    log = WriteAheadLog(tmp_path, 1)
    for _ in range(4):
        log.append(bytes(60))
    assert len(segments(tmp_path)) == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_refuses_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    log = WriteAheadLog(tmp_path, 1)
    log.append(b"before")
    with monkeypatch.context() as patched:
        patched.setattr(log_module.os, "writev", failing(code))
        with pytest.raises(StorageFull):
            log.append(b"refused")
    log.append(b"after")
    assert payloads(tmp_path) == [b"before", b"after"]
    assert len(segments(tmp_path)) == 1


def test_a_short_write_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a disk that takes 5 bytes and then is full, then the refused frame leaves no trace."""
    real = os.write
    log = WriteAheadLog(tmp_path, 1)
    log.append(b"before")
    with monkeypatch.context() as patched:
        patched.setattr(log_module.os, "writev", lambda fd, buffers: real(fd, b"".join(buffers)[:5]))
        patched.setattr(log_module.os, "write", failing(errno.ENOSPC))
        with pytest.raises(StorageFull):
            log.append(b"refused")
    assert (payloads(tmp_path), torn(tmp_path)) == ([b"before"], 0)
    log.append(b"after")
    assert payloads(tmp_path) == [b"before", b"after"]


def test_a_short_write_that_goes_on_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(log_module.os, "writev", lambda fd, buffers: real(fd, b"".join(buffers)[:5]))
    monkeypatch.setattr(log_module.os, "write", lambda fd, rest: real(fd, bytes(rest[:7])))
    WriteAheadLog(tmp_path, 1).append(b"a payload of some length")
    assert payloads(tmp_path) == [b"a payload of some length"]


def test_a_disk_that_takes_no_byte_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module.os, "writev", lambda fd, buffers: 0)
    monkeypatch.setattr(log_module.os, "write", lambda fd, rest: 0)
    with pytest.raises(StorageFull):
        WriteAheadLog(tmp_path, 1).append(b"refused")


def test_after_a_failed_sync_the_descriptor_is_never_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = WriteAheadLog(tmp_path, 1)
    log.append(b"before")
    with monkeypatch.context() as patched:
        patched.setattr(log_module.os, "fdatasync", failing(errno.EIO))
        with pytest.raises(StorageBroken):
            log.append(b"refused")
    log.append(b"after")
    found = {segment.number: read_segment(segment.path).payloads for segment in segments(tmp_path)}
    assert found == {1: (b"before",), 2: (b"after",)}


def test_where_even_the_cut_fails_the_segment_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    log = WriteAheadLog(tmp_path, 1)
    log.append(b"before")
    with monkeypatch.context() as patched:
        patched.setattr(log_module.os, "writev", lambda fd, buffers: real(fd, b"".join(buffers)[:9]))
        patched.setattr(log_module.os, "write", failing(errno.EIO))
        patched.setattr(log_module.os, "ftruncate", failing(errno.EIO))
        with pytest.raises(StorageBroken):
            log.append(b"refused")
    log.append(b"after")
    assert payloads(tmp_path) == [b"before", b"after"]
    assert len(segments(tmp_path)) == 2


def test_a_segment_that_cannot_be_opened_refuses_the_append_only(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    log = WriteAheadLog(folder, 1)
    with pytest.raises(StorageBroken):
        log.append(b"refused")
    folder.mkdir()
    log.append(b"after")
    assert payloads(folder) == [b"after"]


def test_a_refusal_reaches_every_append_of_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module.os, "fdatasync", failing(errno.EIO, times=100))
    log = WriteAheadLog(tmp_path, 1)
    refused: list[bytes] = []

    def append(payload: bytes) -> None:
        try:
            log.append(payload)
        except StorageBroken:
            refused.append(payload)

    threads = [threading.Thread(target=append, args=(b"%d" % number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(refused) == 8
    assert payloads(tmp_path) == []


def test_an_impossible_payload_is_our_own_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "PAYLOAD_MAX_BYTES", 10)
    with pytest.raises(ValueError, match="<= 10 bytes, got 11"):
        WriteAheadLog(tmp_path, 1).append(bytes(11))


_FILL = """
import resource, sys
from pathlib import Path
from fleetcast.errors import StorageFull
from fleetcast.storage.log import WriteAheadLog
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
log = WriteAheadLog(Path(sys.argv[1]), 1)
for number in range(100):
    try:
        log.append(b"%04d" % number * 100)
    except StorageFull:
        print(number)
        break
"""


def test_a_real_limit_of_the_system_is_a_full_disk(tmp_path: Path) -> None:
    """Given files of 5,000 bytes at most, then 12 frames of 412 fit and the 13th leaves nothing."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", _FILL, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout == "12\n"
    assert payloads(tmp_path) == [b"%04d" % number * 100 for number in range(12)]
    assert torn(tmp_path) == 0
