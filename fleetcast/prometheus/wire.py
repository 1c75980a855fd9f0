"""Prometheus remote-write 1.0: the bytes of a request, as samples by series number.

Owns: snappy, the protobuf descriptors (as prometheus/prompb numbers their fields), and which bytes
need no parsing. Does not know: what series mean.

A request is mostly series seen before. Each series of a request is one protobuf message: its labels,
then its samples. The bytes before the last sample ("head") of a message that was parsed are kept
with the series' number; the next message with an equal head needs no parsing except for its sample,
which has one of two fixed layouts. Concatenated protobuf messages mean their merger, so this reads
what parsing would; everything else is parsed. A request keeps its series as bytes (on the wire an
embedded message and a byte string are the same). Metadata, exemplars and native histograms are
fields without a name here, which protobuf skips.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from fleetcast.errors import BadData
from fleetcast.prometheus.series import IGNORED, REFUSED, Samples


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

    message("Label", ("name", kinds.TYPE_STRING, False, ""), ("value", kinds.TYPE_STRING, False, ""))
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


SERIES_PER_REQUEST_MAX = 100_000  # senders put 500 to 10,000 samples into a request
SAMPLES_PER_SERIES_MAX = 10_000
_FULL_BYTES = 18  # tag, length, tag, 8 bytes of value, tag, 6 bytes of time
_ZERO_BYTES = 9  # proto3 leaves a value of 0 out
_TIME_BYTES = 6  # ms since 1970 from 1971 to 2109
_FULL_MARK = b"\x12\x10\x09"
_ZERO_MARK = b"\x12\x07\x10"
_HEADS_BYTES_MAX = 128 * 2**20  # what remembered heads may take
_HEAD_EXTRA_BYTES = 120  # of a bytes object and its place in a dict
_EXPANSION_MAX = 32  # snappy's densest copy makes 64 bytes out of 3


class BodyTooLarge(BadData):
    """Raised when a body would unpack to more than is allowed."""


@dataclass(frozen=True, slots=True, eq=False)
class WriteRequest:
    """One decoded request."""

    samples: Samples  # of the series that are wanted
    n_ignored: int  # series nobody wants
    n_refused: int  # series there is no room for


class WriteDecoder:
    """Decodes requests; not thread safe.

    Memory is bounded: remembered heads are dropped when they take too much.
    """

    def __init__(self, number: Callable[[Mapping[str, str]], int], max_bytes: int) -> None:
        """Take the function that numbers a series by its labels; a negative number is not wanted."""
        self._number = number
        self._max_bytes = max_bytes
        self._heads: dict[bytes, int] = {}
        self._heads_bytes = 0

    def decode(self, body: bytes) -> WriteRequest:
        """Return the samples of a request.

        Raises:
            BodyTooLarge: it would unpack to more than the limit.
            BadData: it is no snappy block, or no WriteRequest; nothing of it is taken.
        """
        try:
            series = WriteRequestMessage.FromString(unpack(body, self._max_bytes)).timeseries
        except DecodeError as error:
            raise BadData("the body is not a protobuf WriteRequest") from error
        if len(series) > SERIES_PER_REQUEST_MAX:
            raise BodyTooLarge(
                f"{len(series)} series in one request, at most {SERIES_PER_REQUEST_MAX} are taken"
            )
        chunks = list(series)
        found = _Found()
        plain = self._plain(chunks, found)
        for chunk in plain:
            self._parse(chunk, found)
        return found.request()

    def renumber(self, new_numbers: NDArray[np.int64]) -> None:
        """Follow a renumbering; heads of series that were forgotten or refused are forgotten."""
        renumbered = {}
        for head, number in self._heads.items():
            new = int(new_numbers[number]) if number >= 0 else number
            if new != REFUSED:
                renumbered[head] = new
        self._heads = renumbered
        self._heads_bytes = sum(map(_cost, renumbered))

    def _plain(self, chunks: list[bytes], found: "_Found") -> list[bytes]:
        """Take the series whose heads are known; return the others."""
        known = self._heads.get
        others: list[bytes] = []
        full: list[bytes] = []
        full_numbers: list[int] = []
        zero: list[bytes] = []
        zero_numbers: list[int] = []
        n_ignored = 0
        for chunk in chunks:
            if (number := known(chunk[:-_FULL_BYTES])) is not None:
                if number >= 0:
                    full.append(chunk)
                    full_numbers.append(number)
                else:
                    n_ignored += 1
            elif (number := known(chunk[:-_ZERO_BYTES])) is not None:
                if number >= 0:
                    zero.append(chunk)
                    zero_numbers.append(number)
                else:
                    n_ignored += 1
            else:
                others.append(chunk)
        found.n_ignored += n_ignored
        others += found.add_tails(full, full_numbers, _FULL_BYTES, _FULL_MARK)
        others += found.add_tails(zero, zero_numbers, _ZERO_BYTES, _ZERO_MARK)
        return others

    def _parse(self, chunk: bytes, found: "_Found") -> None:
        try:
            series = TimeSeriesMessage.FromString(chunk)
        except DecodeError as error:
            raise BadData("a time series of the body is not protobuf") from error
        labels = {label.name: label.value for label in series.labels}
        if len(labels) != len(series.labels):
            raise BadData("a time series of the body has a label twice")
        number = self._number(labels)
        if number == REFUSED:
            found.n_refused += 1
            return
        self._remember(chunk, labels, number)
        if number == IGNORED:
            found.n_ignored += 1
            return
        if len(series.samples) > SAMPLES_PER_SERIES_MAX:
            raise BodyTooLarge(f"over {SAMPLES_PER_SERIES_MAX} samples of one series in a request")
        for sample in series.samples:
            found.add(number, sample.timestamp, sample.value)

    def _remember(self, chunk: bytes, labels: Mapping[str, str], number: int) -> None:
        """Remember the head of a message, if it is all labels and a sample of known layout follows."""
        for size, mark in ((_FULL_BYTES, _FULL_MARK), (_ZERO_BYTES, _ZERO_MARK)):
            head = chunk[:-size]
            if not head or not chunk[-size:].startswith(mark):
                continue
            try:
                alone = TimeSeriesMessage.FromString(head)
            except DecodeError:
                continue
            if not alone.samples and {label.name: label.value for label in alone.labels} == labels:
                self._heads_bytes += _cost(head) if head not in self._heads else 0
                self._heads[head] = number
                break
        if self._heads_bytes > _HEADS_BYTES_MAX:
            self._heads = {head: number for head, number in self._heads.items() if number >= 0}
            self._heads_bytes = sum(map(_cost, self._heads))
            if self._heads_bytes > _HEADS_BYTES_MAX // 2:
                self._heads, self._heads_bytes = {}, 0


class _Found:
    """The samples of one request as they are found."""

    def __init__(self) -> None:
        self.n_ignored = 0
        self.n_refused = 0
        self._numbers: list[NDArray[np.int32]] = []
        self._times: list[NDArray[np.int64]] = []
        self._values: list[NDArray[np.float64]] = []
        self._parsed: list[tuple[int, int, float]] = []

    def add(self, number: int, time_ms: int, value: float) -> None:
        """Add one parsed sample."""
        self._parsed.append((number, time_ms, value))

    def add_tails(self, chunks: list[bytes], numbers: list[int], size: int, mark: bytes) -> list[bytes]:
        """Add the last sample of each chunk; return the chunks that do not end with the fixed layout."""
        if not chunks:
            return []
        tails = b"".join([chunk[-size:] for chunk in chunks])
        cells = np.frombuffer(tails, dtype=np.uint8).reshape(len(chunks), size)
        is_plain = (cells[:, :3] == np.frombuffer(mark, dtype=np.uint8)).all(axis=1)
        if size == _FULL_BYTES:
            is_plain &= cells[:, 11] == 0x10
        times, is_time = _varint_times(cells[:, -_TIME_BYTES:])
        is_plain &= is_time
        values = np.zeros(len(chunks))
        if size == _FULL_BYTES:
            values = np.ascontiguousarray(cells[:, 3:11]).view("<f8")[:, 0]
        self._numbers.append(np.array(numbers, dtype=np.int32)[is_plain])
        self._times.append(times[is_plain])
        self._values.append(values[is_plain])
        return [chunks[place] for place in np.flatnonzero(~is_plain).tolist()]

    def request(self) -> WriteRequest:
        """Return everything in columns."""
        numbers, times, values = zip(*self._parsed, strict=True) if self._parsed else ((), (), ())
        samples = Samples(
            np.concatenate([*self._numbers, np.array(numbers, dtype=np.int32)]),
            np.concatenate([*self._times, np.array(times, dtype=np.int64)]),
            np.concatenate([*self._values, np.array(values, dtype=np.float64)]),
        )
        return WriteRequest(samples, self.n_ignored, self.n_refused)


def _varint_times(cells: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return varints of exactly six bytes, and which rows are such."""
    is_time = (cells[:, :-1] >= 0x80).all(axis=1) & (cells[:, -1] < 0x80)
    shifts = np.arange(_TIME_BYTES) * 7
    times = ((cells & 0x7F).astype(np.int64) << shifts).sum(axis=1)
    return times, is_time


def unpack(body: bytes, max_bytes: int) -> bytes:
    """Return the content of a snappy block.

    Raises:
        BodyTooLarge: the block says that its content is larger than `max_bytes`.
        BadData: it is no snappy block.
    """
    size = _stated_size(body)
    if size > max_bytes:
        raise BodyTooLarge(f"the body unpacks to {size} bytes, at most {max_bytes} are taken")
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


def _cost(head: bytes) -> int:
    return len(head) + _HEAD_EXTRA_BYTES
