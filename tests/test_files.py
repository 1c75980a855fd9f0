import errno
import json
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import BinaryIO

import pytest
from odd_files import put

from fleetcast import files
from fleetcast.errors import CorruptFile, StorageBroken, StorageFull
from fleetcast.files import (
    append_line,
    exchange,
    link_atomic,
    name_regular,
    open_append,
    read_json,
    read_json_lines,
    read_regular,
    remove_leftover,
    remove_stale_temps,
    temp_beside,
    write_atomic,
    write_json,
)
from fleetcast.locks import read_pid


def failing(number: int, *_: object) -> None:
    raise OSError(number, os.strerror(number))


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_an_atomic_write_replaces_the_whole_content_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, b"a long old content")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StorageFull),
        (errno.EDQUOT, StorageFull),
        (errno.EFBIG, StorageFull),
        (errno.EIO, StorageBroken),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_atomic_write_keeps_the_old_content_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], call: str
) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, b"old")
    monkeypatch.setattr(files.os, call, lambda *args: failing(number))
    with pytest.raises(kind, match=r"state\.json"):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert hidden(tmp_path) == []


def test_a_content_that_is_written_in_pieces_replaces_the_old_one_only_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    write_atomic(path, b"old")

    def fail(stream: BinaryIO) -> None:
        stream.write(b"ne")
        raise ValueError("what writes it failed")

    def fill_the_disk(stream: BinaryIO) -> None:
        stream.write(b"ne")
        failing(errno.ENOSPC)

    with pytest.raises(ValueError, match="failed"):
        write_atomic(path, fail)
    with pytest.raises(StorageFull):
        write_atomic(path, fill_the_disk)
    assert (path.read_bytes(), hidden(tmp_path)) == (b"old", [])
    write_atomic(path, lambda stream: stream.write(b"new"))
    assert path.read_bytes() == b"new"


def test_a_folder_that_is_missing_is_a_broken_storage_not_a_crash(tmp_path: Path) -> None:
    with pytest.raises(StorageBroken):
        write_atomic(tmp_path / "no" / "state.json", b"x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_json_never_holds_nan(tmp_path: Path, value: object) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"per": value})
    assert not path.exists()


def test_json_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1, None, "ü"]})
    assert read_json(tmp_path / "x.json") == {"a": [1, None, "ü"]}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'"text"'])
def test_a_damaged_json_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match=r"x\.json"):
        read_json(path)


def test_a_pipe_that_nobody_writes_is_refused_at_once_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "state.json")

    with pytest.raises(CorruptFile, match="not a regular file"):
        read_json(tmp_path / "state.json")


def test_a_missing_json_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "x.json")


def test_appended_lines_are_read_back_and_rotate_at_the_bound(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    for number in range(10):
        append_line(path, json.dumps({"n": number}), max_bytes=30)
    assert [item["n"] for item in read_json_lines(path)] == [9]
    assert [item["n"] for item in read_json_lines(tmp_path / "decisions.jsonl.1")] == [6, 7, 8]
    assert not (tmp_path / "decisions.jsonl.2").exists()


def test_a_torn_last_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    append_line(path, '{"n": 1}', max_bytes=1000)
    with path.open("ab") as stream:
        stream.write(b'{"n": 2')
    append_line(path, '{"n": 3}', max_bytes=1000)
    assert [item["n"] for item in read_json_lines(path)] == [1, 3]


def test_a_line_nested_deeper_than_any_reader_goes_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    path.write_text('{"n": 1}\n' + "[" * 50_000 + '\n{"n": 3}\n')
    assert [item["n"] for item in read_json_lines(path)] == [1, 3]


def test_lines_of_a_missing_file_are_none(tmp_path: Path) -> None:
    assert list(read_json_lines(tmp_path / "no.jsonl")) == []


def test_a_line_that_does_not_fit_the_disk_is_storage_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.os, "fsync", lambda *args: failing(errno.ENOSPC))
    with pytest.raises(StorageFull):
        append_line(tmp_path / "x.jsonl", "{}", max_bytes=1000)


def test_a_link_moves_to_its_new_target_in_one_step(tmp_path: Path) -> None:
    link = tmp_path / "last.ckpt"
    link_atomic("versions/a/model.ckpt", link)
    link_atomic("versions/b/model.ckpt", link)
    assert str(link.readlink()) == "versions/b/model.ckpt"
    assert hidden(tmp_path) == []


def test_two_folders_change_places(tmp_path: Path) -> None:
    for name in ("new", "live"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    exchange(tmp_path / "new", tmp_path / "live")
    assert (tmp_path / "live" / "content").read_text() == "new"
    assert (tmp_path / "new" / "content").read_text() == "live"


def test_a_folder_and_a_file_change_places(tmp_path: Path) -> None:
    (tmp_path / "sealed").write_text("file")
    (tmp_path / "day").mkdir()
    exchange(tmp_path / "sealed", tmp_path / "day")
    assert (tmp_path / "day").read_text() == "file"
    assert (tmp_path / "sealed").is_dir()


def test_an_exchange_with_a_missing_path_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("new")
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "new", tmp_path / "missing")
    assert (tmp_path / "new").read_text() == "new"


def test_where_no_exchange_exists_three_renames_do_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoExchange:
        def renameat2(self, *args: object) -> int:
            return -1

    monkeypatch.setattr(files.ctypes, "CDLL", lambda *args, **kwargs: NoExchange())
    monkeypatch.setattr(files.ctypes, "get_errno", lambda: errno.EINVAL)
    (tmp_path / "new").write_text("new")
    (tmp_path / "live").write_text("live")
    assert exchange(tmp_path / "new", tmp_path / "live") is False
    assert (tmp_path / "live").read_text() == "new"
    assert (tmp_path / "new").read_text() == "live"
    assert hidden(tmp_path) == []


def test_what_a_crash_left_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    temp_beside(tmp_path / "state.json").write_bytes(b"half")
    (tmp_path / ".owner.lock").write_text("1\n")
    (tmp_path / "state.json").write_text("{}")
    assert remove_stale_temps(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".owner.lock", "state.json"]


def test_a_leftover_is_removed_whatever_it_is_and_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    (tmp_path / ".a.tmp-1").symlink_to(tmp_path / "kept")
    (tmp_path / ".b.tmp-1").mkdir()
    (tmp_path / ".b.tmp-1" / "link").symlink_to(tmp_path / "kept")
    (tmp_path / ".c.tmp-1").write_text("x")
    assert remove_stale_temps(tmp_path) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "file").read_text() == "kept"
    assert remove_leftover(tmp_path / "never there")


def test_what_is_no_plain_file_never_blocks_a_reader_and_is_a_damaged_file(tmp_path: Path) -> None:
    pipe, folder, loop = tmp_path / "pipe", tmp_path / "folder", tmp_path / "loop"
    os.mkfifo(pipe)
    folder.mkdir()
    loop.symlink_to(loop)
    for path in (pipe, folder, loop):
        with pytest.raises(CorruptFile):
            files.read_regular(path)
        with pytest.raises(CorruptFile):
            list(files.read_json_lines(path))
        assert read_pid(path) is None


def test_a_line_nested_too_deep_is_skipped_as_any_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("[" * 100_000 + '\n{"a": 1}\n')
    assert list(files.read_json_lines(path)) == [{"a": 1}]


def test_a_folder_in_the_place_of_a_file_is_set_aside_by_its_writer(tmp_path: Path) -> None:
    (tmp_path / "state.json").mkdir()
    files.write_json(tmp_path / "state.json", {"a": 1})
    assert files.read_json(tmp_path / "state.json") == {"a": 1}
    assert (tmp_path / "state.json.corrupt").is_dir()


@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "loop"])
def test_what_is_no_plain_file_is_neither_appended_to_nor_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    put(kind, path)
    with pytest.raises(OSError):
        open_append(path)
    with pytest.raises(CorruptFile), name_regular(path):
        pass


def test_a_named_file_is_that_which_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with name_regular(path) as name:
        path.unlink()
        os.mkfifo(path)
        assert Path(name).read_bytes() == b"old"


def test_free_bytes_are_those_of_the_disk_a_folder_will_be_on(tmp_path: Path) -> None:
    free = files.free_bytes(tmp_path / "not" / "yet")
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    (tmp_path / "file").touch()
    assert files.free_bytes(tmp_path / "file" / "below") is None, "it can never be a folder"


def test_of_a_file_of_lines_out_of_bounds_the_newest_are_read_at_once(tmp_path: Path) -> None:
    """Three sparse gigabytes with lines at both ends."""
    path = tmp_path / "promotions.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"n": 1}\n')
        stream.seek(3 * 10**9)
        stream.write(b'\n{"n": 2}\n' + b"x" * 2**23 + b'\n{"n": 3}\n{"torn')
    assert [item["n"] for item in read_json_lines(path)] == [2, 3]
    bound = files._LINES_MAX_BYTES
    for size in (bound, bound + 1, bound + 2):
        line = b'{"n": 4}\n'
        path.write_bytes(b"y" * (size - 2 * len(line) - 1) + b"\n" + 2 * line)
        assert len(list(read_json_lines(path))) == 2
    numbered = b"".join(b'{"n": %8d}\n' % number for number in range(1_300_000))
    path.write_bytes(numbered)
    kept = [item["n"] for item in read_json_lines(path)]
    assert kept == list(range(1_300_000 - bound // 16, 1_300_000)), "whole lines only, none lost"


def test_reading_a_small_file_asks_for_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(b"abc")
    tracemalloc.start()
    assert read_regular(path) == b"abc"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_what_a_file_gained_while_it_was_read_is_read_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a file whose size was asked for before it grew
    path = tmp_path / "growing"
    path.write_bytes(b"abcdef")
    of_file = os.fstat

    def smaller(descriptor: int) -> os.stat_result:
        found = list(of_file(descriptor))
        found[6] = 3
        return os.stat_result(found)

    monkeypatch.setattr("fleetcast.files.os.fstat", smaller)
    assert read_regular(path) == b"abcdef"
    with pytest.raises(CorruptFile, match="grew past 5 bytes"):
        read_regular(path, 5)
