"""Prometheus remote-write 2.0: a request names its labels by their places in a table of symbols.

Owns: the descriptors (as prometheus/prompb/io/prometheus/write/v2 numbers their fields), the table of a
request, and the way from a series' places to the bytes of its labels as `wire` knows them, so that a sender
that changes the version keeps its series. Does not know: what series mean.

A sender makes the table anew for each request, yet requests of the same series have the same one. Under one
table, the bytes of a series without its one sample are enough to know it again. Histograms, exemplars,
metadata and times of creation are fields without a name here, which protobuf skips.
"""

from collections.abc import Sequence
from typing import Any

from google.protobuf.message import DecodeError

from fleetcast.errors import BadData
from fleetcast.prometheus.labels import LABELS_BYTES_MAX, LABELS_MAX, UNKNOWN, KnownSeries
from fleetcast.prometheus.protobuf import NO_REQUEST, check_fields, check_series, message_classes
from fleetcast.prometheus.series import INVALID, REFUSED
from fleetcast.prometheus.tape import FULL_BYTES
from fleetcast.prometheus.wire import Found, WriteRequest, is_plain
from fleetcast.settings import RemoteWriteSettings

_SYMBOL, _TIMESERIES = 4, 5  # numbers of a request's fields
_SYMBOLS_PER_SERIES = 4  # so many texts a request may have for each series that it may have
_TABLES_MAX, _TABLE_BYTES_MAX = 64, 2**19  # remembered; a sender has one for each shard and place in a scrape
_SYMBOL_EXTRA_BYTES = 60  # of a bytes object and its place in a table
_KNOWN_MAX, _KNOWN_BYTES_MAX = 2**17, 256  # series of all remembered tables; bytes of one, but for its sample
_REFS_TAG = 0x0A
_ONE_BYTE = 0x80

RequestMessage, SeriesMessage = message_classes(
    "symbols",
    {"Sample": [("value", 1, "double", ""), ("timestamp", 2, "int64", "")],
     "TimeSeries": [("labels_refs", 1, "uint32[]", ""), ("samples", 2, "message[]", "Sample")],
     "Request": [("symbols", _SYMBOL, "bytes[]", ""), ("timeseries", _TIMESERIES, "bytes[]", "")]},
)  # fmt: skip


class SymbolDecoder:
    """Decodes requests of version 2.0; not thread safe."""

    def __init__(self, known: KnownSeries, settings: RemoteWriteSettings) -> None:
        """Take the series that requests of either version made known."""
        self._known = known
        self._settings = settings
        self._tables: dict[tuple[bytes, ...], dict[bytes, int]] = {}

    def clear(self) -> None:
        """Forget the tables: series were numbered anew."""
        self._tables = {}

    def read(self, content: bytes) -> WriteRequest:
        """Return the samples of a request's bytes; see `WriteDecoder.read`.

        Raises:
            BodyTooLarge: it holds more than the limits.
            BadData: it is no Request; nothing of it is taken.
        """
        n_most = self._settings.max_request_samples
        check_fields(content, _TIMESERIES, n_most, "series")
        check_fields(content, _SYMBOL, n_most * _SYMBOLS_PER_SERIES, "symbols")
        try:
            request = RequestMessage.FromString(content)
        except DecodeError as error:
            raise BadData(NO_REQUEST) from error
        if content and not request.symbols:  # not even the empty one: it is of version 1.0, or something else
            raise BadData("the body is no remote-write 2.0 Request: it has no symbols")
        found = Found(n_most)
        symbols = tuple(request.symbols)
        numbers = self._table(symbols)
        for chunk in request.timeseries:
            self._take(chunk, symbols, numbers, found)
        self._known.bound_memory()
        return found.request()

    def _table(self, symbols: tuple[bytes, ...]) -> dict[bytes, int]:
        """Return the series known under a table; the one that was used longest ago makes room."""
        if sum(map(len, symbols)) + _SYMBOL_EXTRA_BYTES * len(symbols) > _TABLE_BYTES_MAX:
            return {}
        if sum(map(len, self._tables.values())) > _KNOWN_MAX:
            self.clear()
        numbers = self._tables.pop(symbols, None)
        if numbers is None:
            numbers = {}
            while len(self._tables) >= _TABLES_MAX:
                self._tables.pop(next(iter(self._tables)))
        self._tables[symbols] = numbers
        return numbers

    def _take(self, chunk: bytes, symbols: Sequence[bytes], numbers: dict[bytes, int], found: Found) -> None:
        """Take one series: of a known table as an array, otherwise parsed."""
        check_series(chunk, self._settings.max_series_bytes)
        end = _end_of_refs(chunk)
        rest = chunk[:end] + chunk[end + FULL_BYTES :] if end else b""
        number = numbers.get(rest, UNKNOWN)
        if number != UNKNOWN:
            found.add_tail(chunk[end : end + FULL_BYTES], number)
            return
        try:
            message = SeriesMessage.FromString(chunk)
        except DecodeError as error:
            raise BadData("a time series of the body is not protobuf") from error
        number = self._number(message.labels_refs, symbols, found)
        found.count(len(message.samples))
        for sample in message.samples:
            found.add(number, sample.timestamp, sample.value)
        is_small = 0 < len(rest) <= _KNOWN_BYTES_MAX
        if is_small and number not in (INVALID, REFUSED) and len(message.samples) == 1:
            self._remember(rest, message, number, numbers)

    def _remember(self, rest: bytes, message: Any, number: int, numbers: dict[bytes, int]) -> None:
        """Keep a series, where the rest of its bytes is all of it but the sample."""
        other = SeriesMessage.FromString(rest)
        if not other.samples and other.labels_refs == message.labels_refs:
            numbers[rest] = number

    def _number(self, refs: Sequence[int], symbols: Sequence[bytes], found: Found) -> int:
        """Return the number of a series by its places in the table."""
        fault = _fault_of(refs, symbols)
        if fault:
            found.note_fault(fault)
            return INVALID
        texts = [symbols[ref] for ref in refs]
        pairs = list(zip(texts[::2], texts[1::2], strict=True))
        head = b"".join([_label(name, value) for name, value in pairs])
        slot = self._known.slot(head)
        if slot != UNKNOWN:
            return int(self._known.numbers[slot])
        return found.learn(self._known, pairs, head)


def _fault_of(refs: Sequence[int], symbols: Sequence[bytes]) -> str:
    """Return what is wrong with a series' places, before any text of theirs is copied."""
    if len(refs) > 2 * LABELS_MAX:
        return f"a series has over {LABELS_MAX} labels"
    if len(refs) % 2 or any(ref >= len(symbols) for ref in refs):
        return "a series has a label that is not in the table of symbols"
    if sum(len(symbols[ref]) for ref in refs) > LABELS_BYTES_MAX:
        return f"a series has over {LABELS_BYTES_MAX} bytes of labels"
    return ""


def _end_of_refs(chunk: bytes) -> int:
    """Return where the one short list of places ends with which senders begin a series, 0 where no plain
    sample follows.
    """
    if len(chunk) < 2 + FULL_BYTES or chunk[0] != _REFS_TAG or chunk[1] >= _ONE_BYTE:
        return 0
    end = 2 + chunk[1]
    return end if is_plain(chunk[end : end + FULL_BYTES]) else 0


def _label(name: bytes, value: bytes) -> bytes:
    """Return a label as version 1.0 has it.

    >>> _label(b"a", b"")
    b'\\n\\x03\\n\\x01a'
    """
    content = b"".join(
        bytes([tag]) + _varint(len(text)) + text for tag, text in ((0x0A, name), (0x12, value)) if text
    )
    return b"\x0a" + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    low = bytes([number & 0x7F | (_ONE_BYTE if number >= _ONE_BYTE else 0)])
    return low + _varint(number >> 7) if number >= _ONE_BYTE else low
