"""The series of remote-write requests in the order in which they come, as one long piece of bytes.

Owns: finding how far a request repeats what came before. A sender's requests hold the same series in the
same order, scrape after scrape, and each is its labels' bytes and then a sample of a fixed layout. So a
request is compared with the tape in one go, byte by byte under a mask that leaves values and times out; what
is equal needs no parsing and no look-up a series. The mask keeps the first bit of each byte of a time: it
says whether another byte follows. Does not know: labels, numbers of series, what is done with a request
that is no repetition. Not thread safe.

Memory is bounded: a tape that is full begins anew. A sender without an order (its requests never repeat)
is not recorded for a while.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetcast.prometheus.series import roomy
from fleetcast.schema import Codes, Flags, Longs

Bytes = NDArray[np.uint8]
FULL_BYTES = 18  # of a sample at a series' end: tag, length, tag, 8 bytes of value, tag, 6 bytes of time
ZERO_BYTES = 9  # proto3 leaves a value of 0 out
BYTES_MAX = 2**25  # of the tape; the mask takes as much again
RUN_MIN = 8  # fewer series in a row are not worth their place
_STEP_FIRST, _STEP_MOST = 2**12, 2**17  # bytes compared at once: few where a difference is near
_PAUSE_FIRST, _PAUSE_MOST = 1, 256  # requests that are not recorded after one whose record was no use
_FULL_MASK = np.array([0xFF] * 3 + [0] * 8 + [0xFF] + [0x80] * 6, dtype=np.uint8)
_ZERO_MASK = np.array([0xFF] * 3 + [0x80] * 6, dtype=np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Series of one sample each, which a request repeats."""

    slots: Codes  # (series,) as they were recorded
    ends: Longs  # (series,) the place after its last byte in the request
    are_full: Flags  # (series,) whether the value is written out; it is 0 otherwise


class Tape:
    """What requests held, in their order."""

    def __init__(self, bytes_max: int = BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._pause = self._n_unrecorded = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._content: Bytes = np.empty(0, dtype=np.uint8)
        self._mask: Bytes = np.empty(0, dtype=np.uint8)
        self._ends: Longs = np.empty(0, dtype=np.int64)  # (entry,) of its bytes
        self._slots: Codes = np.empty(0, dtype=np.int32)  # (entry,)
        self._are_full: Flags = np.empty(0, dtype=np.bool_)  # (entry,)
        self._size = self._n_entries = 0
        self._entry_of: Codes = np.empty(0, dtype=np.int32)  # (slot,) where it is on the tape, -1: nowhere

    def entry_of(self, slot: int) -> int:
        """Return where a series is on the tape, -1 where it is not."""
        return int(self._entry_of[slot]) if slot < len(self._entry_of) else -1

    def follow(self, request: Bytes, place: int, entry: int) -> tuple[Series, int]:
        """Return the series from `place` on that the tape has from an entry on, and where they end."""
        begin = int(self._ends[entry - 1]) if entry else 0
        n_same = self._count_same(request[place:], begin)
        last = int(np.searchsorted(self._ends[: self._n_entries], begin + n_same, side="right"))
        some = slice(entry, last)
        ends = self._ends[some] + (place - begin)
        return Series(self._slots[some], ends, self._are_full[some]), int(ends[-1]) if len(ends) else place

    def _count_same(self, request: Bytes, begin: int) -> int:
        """Return how many bytes of a request the tape has from a place on."""
        n_most = min(len(request), self._size - begin)
        n_same, step = 0, _STEP_FIRST
        while n_same < n_most:
            end = min(n_same + step, n_most)
            there = slice(begin + n_same, begin + end)
            differs = request[n_same:end] ^ self._content[there]
            differs &= self._mask[there]
            if differs.any():
                return n_same + int(differs.argmax() if differs.max() == 1 else (differs != 0).argmax())
            n_same = end
            step = min(2 * step, _STEP_MOST)
        return n_most

    def may_record(self, n_followed: int, n_others: int) -> bool:
        """Return whether a request is worth recording, given how many of its series were repetitions."""
        if n_others < RUN_MIN:
            return False
        if n_followed > n_others:
            self._pause = 0
        if self._n_unrecorded < self._pause:
            self._n_unrecorded += 1
            return False
        self._n_unrecorded = 0
        self._pause = min(max(_PAUSE_FIRST, 2 * self._pause), _PAUSE_MOST) if self._n_entries else 0
        return True

    def record(self, request: Bytes, ends: Longs, slots: Codes, are_full: Flags, is_plain: Flags) -> None:
        """Take series down that lie one after the other in `request`.

        Args:
            ends: the place after each one's last byte; the first begins at 0.
            is_plain: which of them are of known labels and end with one sample of the fixed layout.
        """
        for first, last in _runs(is_plain):
            if last - first >= RUN_MIN:
                begin = int(ends[first - 1]) if first else 0
                some = slice(first, last)
                self._append(
                    request[begin : int(ends[last - 1])], ends[some] - begin, slots[some], are_full[some]
                )

    def _append(self, content: Bytes, ends: Longs, slots: Codes, are_full: Flags) -> None:
        if len(content) > self._bytes_max:
            return
        if self._size + len(content) > self._bytes_max:
            self.clear()
        mask = np.full(len(content), 0xFF, dtype=np.uint8)
        for size, pattern, of_size in (
            (FULL_BYTES, _FULL_MASK, are_full),
            (ZERO_BYTES, _ZERO_MASK, ~are_full),
        ):
            mask[ends[of_size][:, None] + np.arange(-size, 0)] = pattern
        size, n_entries = self._size + len(content), self._n_entries + len(ends)
        self._content = roomy(self._content, size - 1)
        self._mask = roomy(self._mask, size - 1)
        self._content[self._size : size], self._mask[self._size : size] = content, mask
        for name, values in (("_ends", ends + self._size), ("_slots", slots), ("_are_full", are_full)):
            column = roomy(getattr(self, name), n_entries - 1)
            column[self._n_entries : n_entries] = values
            setattr(self, name, column)
        self._entry_of = roomy(self._entry_of, int(slots.max()), -1)
        self._entry_of[slots] = np.arange(self._n_entries, n_entries, dtype=np.int32)
        self._size, self._n_entries = size, n_entries


def _runs(chosen: Flags) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of each run of chosen places.

    >>> list(_runs(np.array([True, True, False, True])))
    [(0, 2), (3, 4)]
    """
    edges = np.flatnonzero(np.diff(chosen.astype(np.int8), prepend=0, append=0))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
