"""Prometheus remote-write 1.0: the bytes of a request, as samples by series number.

Owns: snappy, the protobuf descriptors (as prometheus/prompb numbers their fields), and which bytes
need no parsing. Does not know: what series mean.

A request is mostly series seen before. Each series of a request is one protobuf message: its labels,
then its samples. The bytes of its labels are kept with the series' number: labels are parsed once, a
known series costs one look into a dict, and its samples, which have one of two fixed layouts, are
read as arrays. Concatenated protobuf messages mean their merger, so this reads what parsing would;
everything else is parsed. A request keeps its series as bytes (on the wire an embedded message and a
byte string are the same), and labels are bytes until they are looked at, so that one that is not
UTF-8 costs its own series only. Metadata, exemplars and native histograms are fields without a name
here, which protobuf skips.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from fleetcast.errors import BadData
from fleetcast.prometheus.series import IGNORED, INVALID, REFUSED, Samples
from fleetcast.settings import RemoteWriteSettings


def _message_classes() -> tuple[Any, Any]:
    """Return (request with its series as bytes, series), as prometheus/prompb defines them."""
    kinds = descriptor_pb2.FieldDescriptorProto
    package = "fleetcast.prometheus.wire"
    file = descriptor_pb2.FileDescriptorProto(name="remote_write.proto", package=package, syntax="proto3")

    def message(name: str, *fields: tuple[str, int, bool, str]) -> None:
        made = file.message_type.add(name=name)
        for number, (field, kind, is_repeated, type_name) in enumerate(fields, start=1):
            made.field.add(
                name=field,
                number=number,
                type=kind,
                label=kinds.LABEL_REPEATED if is_repeated else kinds.LABEL_OPTIONAL,
                type_name=type_name or None,
            )

    message("Label", ("name", kinds.TYPE_BYTES, False, ""), ("value", kinds.TYPE_BYTES, False, ""))
    message("Sample", ("value", kinds.TYPE_DOUBLE, False, ""), ("timestamp", kinds.TYPE_INT64, False, ""))
    message(
        "TimeSeries",
        ("labels", kinds.TYPE_MESSAGE, True, f".{package}.Label"),
        ("samples", kinds.TYPE_MESSAGE, True, f".{package}.Sample"),
    )
    message("WriteRequest", ("timeseries", kinds.TYPE_BYTES, True, ""))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    request = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.WriteRequest"))
    series = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.TimeSeries"))
    return request, series


WriteRequestMessage, TimeSeriesMessage = _message_classes()


LABELS_MAX = 256  # of one series; senders' own limits are about 30
LABELS_BYTES_MAX = 4096  # of one series
_TIMESERIES, _LENGTH = 1, 2  # number of the field, and its wire type
_FIXED_BYTES = {1: 8, 5: 4}  # by wire type
_FULL_BYTES = 18  # tag, length, tag, 8 bytes of value, tag, 6 bytes of time
_ZERO_BYTES = 9  # proto3 leaves a value of 0 out
_TIME_BYTES = 6  # ms since 1970 from 1971 to 2109
_FULL_MARK = np.frombuffer(b"\x12\x10\x09", dtype=np.uint8)
_ZERO_MARK = np.frombuffer(b"\x12\x07\x10", dtype=np.uint8)
_TIME_TAG_PLACE = 11
_LABEL_TAG, _SAMPLE_TAG = 0x0A, 0x12
_UNKNOWN = -100  # instead of a number: these label bytes were not seen before
_KNOWN_BYTES_MAX = 128 * 2**20  # what remembered label bytes may take
_LABELS_EXTRA_BYTES = 120  # of a bytes object and its place in a dict
_EXPANSION_MAX = 32  # snappy's densest copy makes 64 bytes out of 3
_FAULTS_NAMED = 3
_NO_REQUEST = "the body is not a protobuf WriteRequest"
_NAME_MAX_CHARS = 100


class BodyTooLarge(BadData):
    """Raised when a body would unpack to more than is allowed."""


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
    """Decodes requests; not thread safe.

    Memory is bounded: remembered label bytes are dropped when they take too much.
    """

    def __init__(self, number: Callable[[Mapping[str, str]], int], settings: RemoteWriteSettings) -> None:
        """Take the function that numbers a series by its labels; a negative number is not wanted."""
        self._number = number
        self._settings = settings
        self._known: dict[bytes, int] = {}
        self._known_bytes = 0

    def decode(self, body: bytes) -> WriteRequest:
        """Return the samples of a request.

        A series whose labels are not usable is left out and named; it costs no other series.

        Raises:
            BodyTooLarge: it would unpack to more than the limit.
            BadData: it is no snappy block, or no WriteRequest; nothing of it is taken.
        """
        content = unpack(body, self._settings.max_unpacked_bytes)
        _check_series(content, self._settings.max_request_samples)
        try:
            chunks = list(WriteRequestMessage.FromString(content).timeseries)
        except DecodeError as error:
            raise BadData(_NO_REQUEST) from error
        found = _Found(self._settings.max_request_samples)
        for size in (_FULL_BYTES, _ZERO_BYTES):
            chunks = self._take_known(chunks, size, found)
        for chunk in chunks:
            self._take_one(chunk, found)
        self._bound_memory()
        return found.request()

    def renumber(self, new_numbers: NDArray[np.int64]) -> None:
        """Follow a renumbering; labels of series that were forgotten or refused are forgotten."""
        renumbered = {}
        for labels, number in self._known.items():
            new = int(new_numbers[number]) if number >= 0 else number
            if new != REFUSED:
                renumbered[labels] = new
        self._known = renumbered
        self._known_bytes = sum(map(_cost, renumbered))

    def _take_known(self, chunks: list[bytes], size: int, found: "_Found") -> list[bytes]:
        """Take series of known labels that end with one sample of `size` bytes; return the others."""
        if not chunks:
            return []
        known = self._known.get
        numbers = np.array([known(chunk[:-size], _UNKNOWN) for chunk in chunks], dtype=np.int32)
        is_known = numbers != _UNKNOWN
        some = chunks if is_known.all() else [chunks[place] for place in np.flatnonzero(is_known).tolist()]
        is_plain = found.add_tails(b"".join([chunk[-size:] for chunk in some]), size, numbers[is_known])
        is_known[is_known] = is_plain
        return [] if is_known.all() else [chunks[place] for place in np.flatnonzero(~is_known).tolist()]

    def _take_one(self, chunk: bytes, found: "_Found") -> None:
        """Take a series of unknown labels, of several samples, or of an odd layout."""
        if len(chunk) > self._settings.max_series_bytes:
            limit = f"{self._settings.max_series_bytes} bytes (remote_write.max_series_bytes)"
            raise BodyTooLarge(f"a series of the request has {len(chunk)} bytes, at most {limit} are taken")
        end = _end_of_labels(chunk)
        number = self._known.get(chunk[:end], _UNKNOWN)
        if number != _UNKNOWN and _take_tails(chunk[end:], number, found):
            return
        message = _parse(chunk)
        if number == _UNKNOWN or len(message.labels) != len(_parse(chunk[:end]).labels):
            number = self._learn(message, chunk[:end], found)
        found.count(len(message.samples))
        for sample in message.samples:
            found.add(number, sample.timestamp, sample.value)

    def _learn(self, message: Any, head: bytes, found: "_Found") -> int:
        """Return the number of a series by its labels; remember it by their bytes if those are the head."""
        try:
            labels = _labels_of(message.labels)
        except BadData as fault:
            found.note_fault(str(fault))
            return INVALID
        number = self._number(labels)
        if number == REFUSED:
            found.n_refused_series += 1
        elif head and len(_parse(head).labels) == len(message.labels):
            self._known_bytes += _cost(head) if head not in self._known else 0
            self._known[head] = number
        return number

    def _bound_memory(self) -> None:
        if self._known_bytes <= _KNOWN_BYTES_MAX:
            return
        self._known = {labels: number for labels, number in self._known.items() if number >= 0}
        self._known_bytes = sum(map(_cost, self._known))
        if self._known_bytes > _KNOWN_BYTES_MAX // 2:
            self._known, self._known_bytes = {}, 0


class _Found:
    """The samples of one request as they are found."""

    def __init__(self, n_most: int) -> None:
        self._n_most = n_most
        self._n_samples = 0
        self.n_refused_series = 0
        self._faults: list[str] = []
        self._n_faults = 0
        self._numbers: list[NDArray[np.int32]] = []
        self._times: list[NDArray[np.int64]] = []
        self._values: list[NDArray[np.float64]] = []
        self._parsed: list[tuple[int, int, float]] = []

    def note_fault(self, text: str) -> None:
        """Note a series that is left out, and why."""
        self._n_faults += 1
        if len(self._faults) < _FAULTS_NAMED and text not in self._faults:
            self._faults.append(text)

    def count(self, n_more: int) -> None:
        """Raise BodyTooLarge where there are more samples than a request may have."""
        self._n_samples += n_more
        if self._n_samples > self._n_most:
            raise BodyTooLarge(_too_many("samples", self._n_most))

    def add(self, number: int, time_ms: int, value: float) -> None:
        """Add one parsed sample."""
        self._parsed.append((number, time_ms, value))

    def add_tails(
        self, tails: bytes, size: int, numbers: NDArray[np.int32], *, is_whole: bool = False
    ) -> NDArray[np.bool_]:
        """Add samples of `size` bytes each; return which of them have the fixed layout.

        Args:
            is_whole: add none of them unless all have it.
        """
        cells = np.frombuffer(tails, dtype=np.uint8).reshape(len(numbers), size)
        is_full = size == _FULL_BYTES
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


def _take_tails(tails: bytes, number: int, found: _Found) -> bool:
    """Add the samples of one series and return whether all of them have the fixed layout."""
    n_samples, rest = divmod(len(tails), _FULL_BYTES)
    numbers = np.full(n_samples, number, dtype=np.int32)
    return not rest and bool(found.add_tails(tails, _FULL_BYTES, numbers, is_whole=True).all())


def _parse(chunk: bytes) -> Any:
    try:
        return TimeSeriesMessage.FromString(chunk)
    except DecodeError as error:
        raise BadData("a time series of the body is not protobuf") from error


def _check_series(content: bytes, n_most: int) -> None:
    """Count the series of a request without building any, up to the limit.

    A field's first byte is one of two, however long its tag is written: where those are few, there is
    nothing to count.

    Raises:
        BodyTooLarge: there are more.
        BadData: the bytes are no message, or hold a group, which no sender makes.
    """
    if content.count(b"\x0a") + content.count(b"\x8a") <= n_most:
        return
    place = n_series = 0
    while place < len(content):
        tag, place = _varint(content, place)
        kind = tag & 7
        n_series += tag >> 3 == _TIMESERIES
        if n_series > n_most:
            raise BodyTooLarge(_too_many("series", n_most))
        if kind == 0:
            _, place = _varint(content, place)
        elif kind == _LENGTH:
            length, place = _varint(content, place)
            place += length
        elif kind in _FIXED_BYTES:
            place += _FIXED_BYTES[kind]
        else:
            raise BadData(_NO_REQUEST)


def _varint(content: bytes, place: int) -> tuple[int, int]:
    """Return the number that begins there, and where it ends."""
    number = 0
    for n_before, byte in enumerate(content[place : place + 10]):
        number |= (byte & 0x7F) << (7 * n_before)
        if byte < 0x80:
            return number, place + n_before + 1
    raise BadData(_NO_REQUEST)


def _too_many(what: str, n_most: int) -> str:
    return f"over {n_most} {what} in one request (remote_write.max_request_samples)"


def _labels_of(found: Sequence[Any]) -> dict[str, str]:
    """Return the labels of a series.

    Raises:
        BadData: a label is there twice, has no name, or is not UTF-8, or they are too many; says which one.
    """
    pairs = [(label.name, label.value) for label in found[:LABELS_MAX]]
    labels = {_shown(name): _shown(value) for name, value in pairs}
    own = ", ".join(f"{name}={labels[name]!r}" for name in ("instance", "job") if name in labels)
    series = f"{labels.get('__name__', '')}{{{own}}}"
    if len(found) > LABELS_MAX:
        raise BadData(f"{series} has over {LABELS_MAX} labels")
    if sum(len(name) + len(value) for name, value in pairs) > LABELS_BYTES_MAX:
        raise BadData(f"{series} has over {LABELS_BYTES_MAX} bytes of labels")
    seen = set()
    for name, value in pairs:
        if not name:
            raise BadData(f"{series} has a label without a name")
        if name in seen:
            raise BadData(f"{series} has the label {_shown(name)!r} twice")
        seen.add(name)
        try:
            name.decode(), value.decode()
        except UnicodeDecodeError:
            raise BadData(f"{series} has the label {_shown(name)!r}, which is not UTF-8") from None
    return {name.decode(): value.decode() for name, value in pairs}


def _shown(text: bytes) -> str:
    return text[:_NAME_MAX_CHARS].decode("utf-8", "replace")


def _varint_times(cells: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return varints of exactly six bytes, and which rows are such."""
    is_time = (cells[:, :-1] >= 0x80).all(axis=1) & (cells[:, -1] < 0x80)
    times = np.zeros(len(cells), dtype=np.int64)
    for place in range(_TIME_BYTES):
        times |= (cells[:, place] & 0x7F).astype(np.int64) << (7 * place)
    return times, is_time


def unpack(body: bytes, max_bytes: int) -> bytes:
    """Return the content of a snappy block.

    Raises:
        BodyTooLarge: the block says that its content is larger than `max_bytes`.
        BadData: it is no snappy block.
    """
    size = _stated_size(body)
    if size > max_bytes:
        limit = f"{max_bytes} (remote_write.max_unpacked_bytes)"
        raise BodyTooLarge(f"the body unpacks to {size} bytes, at most {limit} are taken")
    if size > len(body) * _EXPANSION_MAX:
        raise BadData("the body is not a snappy block: it states an impossible size")
    try:
        return bytes(pa.decompress(body, decompressed_size=size, codec="snappy", asbytes=True))
    except (pa.ArrowException, OSError) as error:
        raise BadData("the body is not a snappy block") from error


def _stated_size(body: bytes) -> int:
    size = 0
    for place, byte in enumerate(body[:5]):
        size |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return size
    raise BadData("the body is not a snappy block: its size is missing")


def _cost(labels: bytes) -> int:
    return len(labels) + _LABELS_EXTRA_BYTES
