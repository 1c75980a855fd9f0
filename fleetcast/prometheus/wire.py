"""Prometheus remote-write 1.0: the bytes of a request, as samples by series number.

Owns: snappy, the protobuf descriptors (as prometheus/prompb numbers their fields), and which bytes
need no parsing. Does not know: what series mean.

A request is mostly series seen before. Each series of a request is one protobuf message: its labels,
then its samples. The bytes of its labels are kept with the series' number: labels are parsed once, a
known series costs one look into a dict, and its samples, which have one of two fixed layouts, are
read as arrays. A request that repeats an earlier one but for times and values does not even cost that:
`tape` says how far it does. Concatenated protobuf messages mean their merger, so this reads what parsing
would; everything else is parsed. A request keeps its series as bytes (on the wire an embedded message and a
byte string are the same), and labels are bytes until they are looked at, so that one that is not
UTF-8 costs its own series only. Metadata, exemplars and native histograms are fields without a name
here, which protobuf skips.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from fleetcast.errors import BadData
from fleetcast.prometheus.labels import LABELS_MAX, UNKNOWN, KnownSeries
from fleetcast.prometheus.protobuf import (
    NO_REQUEST,
    BodyTooLarge,
    check_fields,
    check_series,
    message_classes,
    too_many,
    unpack,
)
from fleetcast.prometheus.series import IGNORED, INVALID, REFUSED, Samples
from fleetcast.prometheus.tape import FULL_BYTES, ZERO_BYTES, Bytes, Series, Tape
from fleetcast.schema import Codes, Flags, Longs
from fleetcast.settings import RemoteWriteSettings

WriteRequestMessage, TimeSeriesMessage = message_classes(
    "wire",
    {"Label": [("name", 1, "bytes", ""), ("value", 2, "bytes", "")],
     "Sample": [("value", 1, "double", ""), ("timestamp", 2, "int64", "")],
     "TimeSeries": [("labels", 1, "message[]", "Label"), ("samples", 2, "message[]", "Sample")],
     "WriteRequest": [("timeseries", 1, "bytes[]", "")]},
)  # fmt: skip

_TIMESERIES = 1  # number of the field
_TIME_BYTES = 6  # ms since 1970 from 1971 to 2109
_FULL_MARK = np.frombuffer(b"\x12\x10\x09", dtype=np.uint8)
_ZERO_MARK = np.frombuffer(b"\x12\x07\x10", dtype=np.uint8)
_TIME_TAG_PLACE = 11
_CUTS: Any = (slice(-ZERO_BYTES), slice(-FULL_BYTES))  # by whether the value is written out
_LABEL_TAG, _SAMPLE_TAG, _SERIES_TAG = 0x0A, 0x12, 0x0A
# where a request repeats the tape less than that, it is looked up instead
_LOOKS_FREE, _SERIES_PER_LOOK = 5, 64
_FOLLOWED_SHARE = 8  # a request that repeats less than one in so many makes the next one be looked at once
_FAULTS_NAMED = 3


@dataclass(frozen=True, slots=True, eq=False)
class WriteRequest:
    """One decoded request."""

    samples: Samples  # of the series that are wanted
    n_ignored: int  # samples of series that no rule wants
    n_refused: int  # samples of series there is no room for
    n_refused_series: int
    n_invalid: int  # samples of series whose labels are not usable
    faults: Sequence[str]  # which series those are and why, the first few
    n_faults: int


class WriteDecoder:
    """Decodes requests; not thread safe."""

    def __init__(self, number: Callable[[Mapping[str, str]], int], settings: RemoteWriteSettings) -> None:
        """Take the function that numbers a series by its labels; a negative number is not wanted."""
        self._settings = settings
        self._tape = Tape()
        self._looks_free = _LOOKS_FREE
        self._known = KnownSeries(number, on_move=lambda: self._tape.clear())

    @property
    def known(self) -> KnownSeries:
        """Return the series that requests made known."""
        return self._known

    def decode(self, body: bytes) -> WriteRequest:
        """Return the samples of a request; `read` of its unpacked bytes."""
        return self.read(unpack(body, self._settings.max_unpacked_bytes))

    def read(self, content: bytes) -> WriteRequest:
        """Return the samples of a request's bytes.

        A series whose labels are not usable is left out and named; it costs no other series.

        Raises:
            BodyTooLarge: it holds more than the limits.
            BadData: it is no WriteRequest; nothing of it is taken.
        """
        found = Found(self._settings.max_request_samples)
        place, odd = self._follow(content, found)
        rest = content[place:] if place else content
        check_fields(rest, _TIMESERIES, self._settings.max_request_samples, "series", found.n_samples)
        try:
            chunks = list(WriteRequestMessage.FromString(rest).timeseries)
        except DecodeError as error:
            raise BadData(NO_REQUEST) from error
        n_followed = found.n_samples
        self._looks_free = _LOOKS_FREE if n_followed * _FOLLOWED_SHARE >= len(chunks) else 1
        odd += self._take_known(chunks, rest, n_followed, found)
        for chunk in odd:
            self._take_one(chunk, found)
        self._known.bound_memory()
        return found.request()

    def renumber(self, new_numbers: NDArray[np.int64]) -> None:
        """Follow a renumbering; labels of series that were forgotten or refused are forgotten."""
        self._known.renumber(new_numbers)

    def _follow(self, content: bytes, found: "Found") -> tuple[int, list[bytes]]:
        """Take the series that repeat what is on the tape; return where they end, and those among them
        that do not.
        """
        cells = np.frombuffer(content, dtype=np.uint8)
        odd: list[bytes] = []
        missed: list[bytes] = []  # since the last series that did
        place = n_looks = reached = 0
        while place < len(content) and n_looks < self._looks_free + found.n_samples // _SERIES_PER_LOOK:
            n_looks += 1
            chunk, end = _chunk_at(content, place)
            if not end:
                break
            entry = self._entry_of(chunk)
            if entry >= 0:
                series, place = self._tape.follow(cells, place, entry)
                if len(series.ends):
                    found.add_followed(cells, series, self._known.numbers[series.slots])
                    odd, missed, reached = odd + missed, [], place
                    continue
            missed.append(chunk)
            place = end
        return reached, odd

    def _entry_of(self, chunk: bytes) -> int:
        """Return where a series stands on the tape, -1 where it does not."""
        for size in (FULL_BYTES, ZERO_BYTES):
            slot = self._known.slot(chunk[:-size])
            if slot != UNKNOWN:
                return self._tape.entry_of(slot)
        return -1

    def _take_known(
        self, chunks: list[bytes], content: bytes, n_followed: int, found: "Found"
    ) -> list[bytes]:
        """Take series of known labels that end with one sample of a fixed layout; return the others.

        They go on the tape, where that promises to be of use.

        Args:
            content: the bytes that the chunks are of.
        """
        sizes = np.fromiter(map(len, chunks), dtype=np.int64, count=len(chunks))
        ends = np.cumsum(sizes + 2 + (sizes >= 2**7) + (sizes >= 2**14) + (sizes >= 2**21))
        is_bare = bool(len(ends)) and ends[-1] == len(content)
        if not is_bare:  # a longer tag or length, or another field, took more
            content, ends = b"".join(chunks), np.cumsum(sizes)
        cells = np.frombuffer(content, dtype=np.uint8)
        are_full = ~_end_with(_ZERO_MARK, cells, ends - ZERO_BYTES)
        heads: Any = map(getitem, chunks, map(_CUTS.__getitem__, are_full.tolist()))
        slots = self._known.slots(heads, len(chunks))
        for size, is_it in ((FULL_BYTES, are_full), (ZERO_BYTES, ~are_full)):
            some = np.flatnonzero(is_it & (slots != UNKNOWN))
            if len(some):
                tails = cells[ends[some][:, None] + np.arange(-size, 0)]
                are_plain = found.add_tails(tails.tobytes(), size, self._known.numbers[slots[some]])
                slots[some[~are_plain]] = UNKNOWN
        if self._tape.may_record(n_followed, len(chunks)) and is_bare:
            self._tape.record(cells, ends, slots, are_full, slots != UNKNOWN)
        return [chunks[place] for place in np.flatnonzero(slots == UNKNOWN).tolist()]

    def _take_one(self, chunk: bytes, found: "Found") -> None:
        """Take a series of unknown labels, of several samples, or of an odd layout."""
        check_series(chunk, self._settings.max_series_bytes)
        end = _end_of_labels(chunk)
        slot = self._known.slot(chunk[:end])
        number = UNKNOWN if slot == UNKNOWN else int(self._known.numbers[slot])
        if number != UNKNOWN and _take_tails(chunk[end:], number, found):
            return
        message = _parse(chunk)
        is_whole = bool(end) and len(message.labels) == len(_parse(chunk[:end]).labels)
        if number == UNKNOWN or not is_whole:
            pairs = [(label.name, label.value) for label in message.labels[: LABELS_MAX + 1]]
            number = found.learn(self._known, pairs, chunk[:end] if is_whole else b"")
        found.count(len(message.samples))
        for sample in message.samples:
            found.add(number, sample.timestamp, sample.value)


class Found:
    """The samples of one request as they are found."""

    def __init__(self, n_most: int) -> None:
        self._n_most = n_most
        self.n_samples = 0
        self.n_refused_series = 0
        self._faults: list[str] = []
        self._n_faults = 0
        self._numbers: list[NDArray[np.int32]] = []
        self._times: list[NDArray[np.int64]] = []
        self._values: list[NDArray[np.float64]] = []
        self._parsed: list[tuple[int, int, float]] = []
        self._tails: list[bytes] = []  # single ones of the fixed layout, and their series
        self._tail_numbers: list[int] = []

    def note_fault(self, text: str) -> None:
        """Note a series that is left out, and why."""
        self._n_faults += 1
        if len(self._faults) < _FAULTS_NAMED and text not in self._faults:
            self._faults.append(text)

    def learn(self, known: KnownSeries, pairs: Sequence[tuple[bytes, bytes]], head: bytes) -> int:
        """Return the number of a series not seen before; one that is not usable is noted."""
        try:
            number = known.learn(pairs, head)
        except BadData as fault:
            self.note_fault(str(fault))
            return INVALID
        self.n_refused_series += number == REFUSED
        return number

    def count(self, n_more: int) -> None:
        """Raise BodyTooLarge where there are more samples than a request may have."""
        self.n_samples += n_more
        if self.n_samples > self._n_most:
            raise BodyTooLarge(too_many("samples", self._n_most))

    def add(self, number: int, time_ms: int, value: float) -> None:
        """Add one parsed sample."""
        self._parsed.append((number, time_ms, value))

    def add_tail(self, tail: bytes, number: int) -> None:
        """Add one sample, which `is_plain`."""
        self.count(1)
        self._tails.append(tail)
        self._tail_numbers.append(number)

    def add_followed(self, content: Bytes, series: Series, numbers: Codes) -> None:
        """Add series of a request that repeats an earlier one: their layout is known to be fixed."""
        self.count(len(numbers))
        # eight bytes that may begin anywhere; those before a time's six are shifted out
        words = np.ndarray((max(len(content) - 7, 0),), dtype="<u8", buffer=content, strides=(1,))
        given = words[series.ends - 8]
        times = given >> 16 & 0x7F
        for place in range(1, _TIME_BYTES):
            times |= (given >> (16 + place)) & (0x7F << (7 * place))
        values = np.zeros(len(numbers))
        values[series.are_full] = words[series.ends[series.are_full] - (FULL_BYTES - 3)].view("<f8")
        self._numbers.append(numbers)
        self._times.append(times.astype(np.int64))
        self._values.append(values)

    def add_tails(
        self, tails: bytes, size: int, numbers: NDArray[np.int32], *, is_whole: bool = False
    ) -> NDArray[np.bool_]:
        """Add samples of `size` bytes each; return which of them have the fixed layout.

        Args:
            is_whole: add none of them unless all have it.
        """
        cells = np.frombuffer(tails, dtype=np.uint8).reshape(len(numbers), size)
        is_full = size == FULL_BYTES
        is_plain: NDArray[np.bool_] = (cells[:, :3] == (_FULL_MARK if is_full else _ZERO_MARK)).all(axis=1)
        if is_full:
            is_plain &= cells[:, _TIME_TAG_PLACE] == 0x10
        times, is_time = _varint_times(cells[:, -_TIME_BYTES:])
        is_plain &= is_time
        if is_whole and not is_plain.all():
            return is_plain
        values = np.zeros(len(numbers))
        if is_full:
            values = np.ascontiguousarray(cells[:, 3:_TIME_TAG_PLACE]).view("<f8")[:, 0]
        self.count(int(np.count_nonzero(is_plain)))
        self._numbers.append(numbers[is_plain])
        self._times.append(times[is_plain])
        self._values.append(values[is_plain])
        return is_plain

    def request(self) -> WriteRequest:
        """Return everything in columns."""
        if self._tails:
            self.n_samples -= len(self._tails)  # they are counted again
            self.add_tails(b"".join(self._tails), FULL_BYTES, np.array(self._tail_numbers, dtype=np.int32))
        own, times, values = zip(*self._parsed, strict=True) if self._parsed else ((), (), ())
        numbers = np.concatenate([*self._numbers, np.array(own, dtype=np.int32)])
        samples = Samples(
            numbers,
            np.concatenate([*self._times, np.array(times, dtype=np.int64)]),
            np.concatenate([*self._values, np.array(values, dtype=np.float64)]),
        )
        return WriteRequest(
            samples.where(numbers >= 0),
            n_ignored=int(np.count_nonzero(numbers == IGNORED)),
            n_refused=int(np.count_nonzero(numbers == REFUSED)),
            n_refused_series=self.n_refused_series,
            n_invalid=int(np.count_nonzero(numbers == INVALID)),
            faults=tuple(self._faults),
            n_faults=self._n_faults,
        )


def is_plain(tail: bytes) -> bool:
    """Return whether bytes are one sample of the fixed layout with a value."""
    is_framed = len(tail) == FULL_BYTES and tail[:3] == b"\x12\x10\x09" and tail[_TIME_TAG_PLACE] == 0x10
    return is_framed and tail[-1] < 0x80 and min(tail[-_TIME_BYTES:-1]) >= 0x80


def _end_of_labels(chunk: bytes) -> int:
    """Return where the labels end and samples begin, 0 where a message is not laid out like that."""
    place = 0
    size = len(chunk)
    while place < size and chunk[place] == _LABEL_TAG:
        if place + 1 == size:
            return 0
        length = chunk[place + 1]
        place += 2
        if length >= 0x80:  # a label of 128 bytes or more has a longer length
            if place == size or chunk[place] >= 0x80:
                return 0
            length = length & 0x7F | chunk[place] << 7
            place += 1
        place += length
    if place > size or (place < size and chunk[place] != _SAMPLE_TAG):
        return 0
    return place


def _take_tails(tails: bytes, number: int, found: Found) -> bool:
    """Add the samples of one series and return whether all of them have the fixed layout."""
    n_samples, rest = divmod(len(tails), FULL_BYTES)
    numbers = np.full(n_samples, number, dtype=np.int32)
    return not rest and bool(found.add_tails(tails, FULL_BYTES, numbers, is_whole=True).all())


def _parse(chunk: bytes) -> Any:
    try:
        return TimeSeriesMessage.FromString(chunk)
    except DecodeError as error:
        raise BadData("a time series of the body is not protobuf") from error


def _chunk_at(content: bytes, place: int) -> tuple[bytes, int]:
    """Return the series that begins there and where it ends; 0 where none is laid out as senders do."""
    if content[place] != _SERIES_TAG:
        return b"", 0
    length = shift = 0
    for byte in content[place + 1 : place + 4]:
        place += 1
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            end = place + 1 + length
            return (content[place + 1 : end], end) if end <= len(content) else (b"", 0)
    return b"", 0


def _end_with(mark: Bytes, cells: Bytes, places: Longs) -> Flags:
    """Return where the bytes of a mark stand; what lies before the first byte is no mark."""
    found = places >= 0
    for place, byte in enumerate(mark.tolist() if found.any() else ()):
        found &= cells[np.maximum(places, 0) + place] == byte
    return found


def _varint_times(cells: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return varints of exactly six bytes, and which rows are such."""
    is_time = (cells[:, :-1] >= 0x80).all(axis=1) & (cells[:, -1] < 0x80)
    times = np.zeros(len(cells), dtype=np.int64)
    for place in range(_TIME_BYTES):
        times |= (cells[:, place] & 0x7F).astype(np.int64) << (7 * place)
    return times, is_time
