"""Frames read back exactly; damage costs only itself; a torn tail is no damage."""

import random
import struct
from pathlib import Path

import crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd_files import KINDS, put

from fleetcast.errors import CorruptFile
from fleetcast.storage.log import MAGIC, frame, parse_frames, read_segment, segment_path, segments

HEADER_BYTES = 12


def framed(payloads: list[bytes]) -> bytes:
    return b"".join(frame(payload) + payload for payload in payloads)


payload_lists = st.lists(
    st.one_of(st.binary(max_size=80), st.just(MAGIC * 3), st.just(bytes(40))), max_size=8
)


@given(payload_lists)
def test_what_was_framed_is_read(payloads: list[bytes]) -> None:
    content = parse_frames(framed(payloads))
    assert content.payloads == tuple(payloads)
    assert (content.damages, content.torn_bytes) == ((), 0)


def test_an_empty_segment_holds_nothing() -> None:
    assert parse_frames(b"").payloads == ()


@given(payload_lists.filter(bool), st.data())
def test_cut_anywhere_the_whole_frames_before_remain(payloads: list[bytes], data: st.DataObject) -> None:
    whole = framed(payloads)
    cut = data.draw(st.integers(0, len(whole)))
    content = parse_frames(whole[:cut])
    ends = [len(framed(payloads[: n + 1])) for n in range(len(payloads))]
    n_whole = sum(end <= cut for end in ends)
    assert content.payloads == tuple(payloads[:n_whole])
    assert content.damages == ()
    assert content.torn_bytes == cut - ([0, *ends])[n_whole]


@given(st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=6), st.data())
def test_a_flipped_bit_costs_one_frame_and_is_never_taken_for_data(
    payloads: list[bytes], data: st.DataObject
) -> None:
    whole = bytearray(framed(payloads))
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= 1 << data.draw(st.integers(0, 7))
    content = parse_frames(bytes(whole))
    ends = [len(framed(payloads[: n + 1])) for n in range(len(payloads))]
    hit = next(n for n, end in enumerate(ends) if place < end)
    assert content.payloads == tuple(payloads[:hit] + payloads[hit + 1 :])
    lost = sum(len(damage.data) for damage in content.damages) + content.torn_bytes
    assert lost == HEADER_BYTES + len(payloads[hit])


def test_damage_says_where_it_lay_and_keeps_its_bytes() -> None:
    first, second, third = framed([b"one"]), framed([b"two"]), framed([b"three"])
    junk = b"\x00junk" + second[:-1] + b"?"
    content = parse_frames(first + junk + third)
    assert content.payloads == (b"one", b"three")
    (damage,) = content.damages
    assert (damage.offset, damage.data) == (len(first), junk)


def test_zeros_at_the_end_are_a_torn_tail() -> None:
    content = parse_frames(framed([b"one"]) + bytes(4096))
    assert (content.payloads, content.damages, content.torn_bytes) == ((b"one",), (), 4096)


def test_junk_at_the_end_is_damage() -> None:
    content = parse_frames(framed([b"one"]) + b"not a frame, and nothing after it")
    assert (len(content.damages), content.torn_bytes) == (1, 0)


def test_thousands_of_mutations_neither_crash_nor_change_a_payload_silently() -> None:
    rng = random.Random(7)
    payloads = [rng.randbytes(rng.randrange(200)) for _ in range(12)]
    whole = framed(payloads)
    for _ in range(2_000):  # a million: benchmarks/buffer/buffer_crash.py
        mutated = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            action, place = rng.randrange(3), rng.randrange(len(mutated))
            if action == 0:
                mutated[place] = rng.randrange(256)
            elif action == 1:
                del mutated[place : place + rng.randrange(1, 30)]
            else:
                mutated[place:place] = rng.randbytes(rng.randrange(1, 30))
        assert set(parse_frames(bytes(mutated)).payloads) <= set(payloads)


def test_a_later_format_is_recognised_not_guessed_at() -> None:
    start = MAGIC[:3] + bytes([MAGIC[3] + 1]) + struct.pack("<I", 3)
    newer = start + struct.pack("<I", crc32c.crc32c(start + b"one")) + b"one"
    assert parse_frames(newer).is_newer_format
    assert parse_frames(newer[:-1]).is_newer_format is False
    flipped = start[:4] + framed([b"one"])[4:]
    assert parse_frames(flipped).is_newer_format is False, "a damaged byte is no version"


def test_frames_of_the_first_format_version_are_read_beside_new_ones() -> None:
    start = MAGIC[:3] + b"\x01" + struct.pack("<I", 3)
    old = start + struct.pack("<I", crc32c.crc32c(start + b"one")) + b"one"
    assert parse_frames(old + framed([b"two"]) + old).payloads == (b"one", b"two", b"one")
    assert parse_frames(old + old[:-1]).torn_bytes == len(old) - 1
    assert parse_frames(b"junk" + old).payloads == (b"one",)


def test_segments_are_listed_by_number_and_foreign_names_are_not(tmp_path: Path) -> None:
    for name in ("000000000010.wal", "000000000009.wal", "9.wal", "notes.txt", "000000000001.wal.bak"):
        (tmp_path / name).write_bytes(b"")
    assert [segment.number for segment in segments(tmp_path)] == [9, 10]
    assert segments(tmp_path / "missing") == []
    assert segments(tmp_path / "notes.txt") == []


def test_a_segment_that_became_parts_is_missing_not_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_segment(segment_path(tmp_path, 1))


@pytest.mark.parametrize("kind", KINDS[:4])
def test_a_segment_that_is_no_file_is_damaged_at_once(tmp_path: Path, kind: str) -> None:
    put(kind, tmp_path / "000000000001.wal")
    with pytest.raises(CorruptFile):
        read_segment(tmp_path / "000000000001.wal")
