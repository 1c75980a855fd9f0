"""Claims about reading a model file without torch: it reads what torch reads, and no call is made."""

import io
import pickle
import random
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fleetcast.errors import BadCheckpoint
from fleetcast.forecast.checkpoint import read_content

DATA = Path(__file__).parent / "data"
SHIPPED = Path(__file__).parents[1] / "models" / "last.ckpt"
FILES = [SHIPPED, *sorted(DATA.glob("*.ckpt"))]


def content_of(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def archive(code: bytes, **members: bytes) -> bytes:
    """Return a file like torch's, of another pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        made.writestr("m/data.pkl", code)
        made.writestr("m/byteorder", b"little")
        for key, numbers in members.items():
            made.writestr(f"m/data/{key.removeprefix('k')}", numbers)
    return stream.getvalue()


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, torch.Tensor):
        return bool(np.array_equal(ours, theirs.numpy())) and ours.dtype == np.float32
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)):
        return type(ours) is type(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs and type(ours) is type(theirs))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_reads_what_torch_reads(path: Path) -> None:
    content = path.read_bytes()
    assert same(read_content(content, path), torch.load(io.BytesIO(content), weights_only=True))


def test_plain_values_of_every_kind_come_back() -> None:
    shared = [1, 2]
    value = {
        "numbers": [0, 255, 65_535, -7, 2**40, -(2**70), 1.5, float("inf")],
        "rest": [None, True, False, "", "Grüße"],
        "nested": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, [shared, shared]],
        "tensors": [torch.zeros(()), torch.arange(6.0).reshape(2, 3), torch.arange(9.0)[3:5]],
    }  # fmt: skip
    assert same(read_content(content_of(value), Path("x")), value)


class Nasty:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


GLOBAL_PRINT = b"\x80\x02cbuiltins\nprint\nX\x08\x00\x00\x00executed\x85R."
STORAGE = b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
HOSTILE = {
    "a call": content_of([Nasty()]),
    "a call in a tensor's place": content_of({"state_dict": {"a": Nasty()}}),
    "a name": archive(GLOBAL_PRINT),
    "a name from the stack": archive(b"\x80\x04\x8c\x08builtins\x8c\x05print\x93."),
    "an operation that sets attributes": archive(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b."),
    "an object of a class": archive(b"\x80\x02ctorch\nFloatStorage\n)\x81."),
    "a call of what is no function": archive(b"\x80\x02ctorch\nFloatStorage\n)R."),
    "a byte array of 8 EB": archive(b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"."),
    "an extension": archive(b"\x80\x02\x82\x01."),
    "nothing": archive(b"\x80\x02."),
    "two values": archive(b"\x80\x02K\x01K\x02."),
    "a mark that is not there": archive(b"\x80\x02t."),
    "more than there is": archive(b"\x80\x02K\x01\x86."),
    "a key without a value": archive(b"\x80\x02}(K\x01u."),
    "a list as a dict": archive(b"\x80\x02](K\x01K\x02u."),
    "what was never remembered": archive(b"\x80\x02h\x07."),
    "text in the place of numbers": content_of({"a": torch.zeros(3, dtype=torch.int64)}),
    "half of a number": archive(b"\x80\x02(" + STORAGE + b".", k0=b"abc"),
    "no such member": archive(b"\x80\x02(" + STORAGE + b"."),
    "no end": archive(b"\x80\x02]"),
    "big-endian": archive(b"\x80\x02].").replace(b"little", b"bigend"),
    "no pickle": archive(b""),
    "no zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_content_is_refused_and_executes_nothing(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadCheckpoint):
        read_content(HOSTILE[name], Path("x"))
    assert "executed" not in capsys.readouterr().out


def test_a_storage_that_is_asked_for_often_is_read_once() -> None:
    # Given a member of 4 MB, and a pickle that names it 2,000 times
    numbers = bytes(2**22)
    pid = STORAGE[:-1].replace(b"K\x01t", b"J" + struct.pack("<i", 2**20) + b"t")
    code = b"\x80\x02](" + b"".join([b"(" + pid + b"Q"] * 2000) + b"e."
    content = archive(code, k0=numbers)
    tracemalloc.start()
    found = read_content(content, Path("x"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 2000
    assert peak < 4 * len(content)


def test_a_damaged_pickle_is_a_bad_checkpoint_whatever_was_damaged() -> None:
    # Given the pickle of a real model
    with zipfile.ZipFile(FILES[-1]) as made:
        name = next(one for one in made.namelist() if one.endswith(".pkl"))
        members = {f"k{one.rpartition('/')[2]}": made.read(one) for one in made.namelist() if "/data/" in one}
        code = made.read(name)
    rng = random.Random(3)
    n_refused = 0
    for _ in range(300):
        damaged = bytearray(code)
        for _ in range(rng.choice((1, 1, 3, 20))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            read_content(archive(bytes(damaged), **members), Path("x"))
        except BadCheckpoint:
            n_refused += 1
    assert n_refused > 100


def test_a_memo_that_would_be_32_gb_as_a_table_costs_nothing() -> None:
    assert read_content(archive(b"\x80\x02]r\xff\xff\xff\xff."), Path("x")) == []


def test_no_pickle_of_python_itself_is_a_model() -> None:
    with pytest.raises(BadCheckpoint):
        read_content(pickle.dumps({"format": 1}), Path("x"))
