"""What the fuzzing hits: each decoder with its seeds, and what may come out of it.

A target takes bytes. It may refuse them with the error of its interface; whatever it takes must
be what an independent reading of the same bytes gives. Any other exception is a finding.

The fuzzing's target for the buffer's log: segments of frames with faults in them.

What the reader gives back must be payloads that were written, each at most as often as the bytes
hold it: a checksum that lets one changed bit pass would show here as a payload that was never written.
"""

import json
import random
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from google.protobuf.message import DecodeError

from fleetcast.api.bodies import Refusal, read_records
from fleetcast.errors import BadData
from fleetcast.ingest.arrow import read_columns
from fleetcast.ingest.columns import RowsOf
from fleetcast.ingest.json_records import JsonRecords
from fleetcast.ingest.records import Accepted, RecordRules, accept
from fleetcast.prometheus.protobuf import message_classes
from fleetcast.prometheus.symbols import SymbolDecoder
from fleetcast.prometheus.wire import WriteDecoder
from fleetcast.schema import RecordBatch
from fleetcast.serving.intake import Receipt
from fleetcast.serving.writes import WriteIntake
from fleetcast.settings import RemoteWriteSettings
from fleetcast.storage.log import encode_batch, frame, parse_frames

NOW = 1_768_471_200_000


class FrameTarget:
    """Segments of one to three frames; taken means that a frame was left to read."""

    def __init__(self) -> None:
        payloads = [b"", b"\xf5FW", *(encode_batch(_batch(n_rows)) for n_rows in (1, 3))]
        framed = [frame(payload) + payload for payload in payloads]
        self._payloads = set(payloads)
        self.seeds = [*framed, b"".join(framed), framed[2] + framed[3], framed[3] + bytes(40)]

    def hit(self, body: bytes) -> bool:
        """Read a segment; its parts must be all of it."""
        content = parse_frames(body)
        for payload in content.payloads:
            assert payload in self._payloads, "a payload that was never written"
        for damage in content.damages:
            assert body[damage.offset : damage.offset + len(damage.data)] == damage.data
        n_frames = sum(len(frame(payload)) + len(payload) for payload in content.payloads)
        n_damaged = sum(len(damage.data) for damage in content.damages)
        if not content.is_newer_format:
            assert n_frames + n_damaged + content.torn_bytes == len(body), "bytes that are in no count"
        return bool(content.payloads)


def _batch(n_rows: int) -> RecordBatch:
    return RecordBatch(
        ("web-01", "web-02"),
        (np.arange(n_rows) % 2).astype(np.int32),
        NOW + np.arange(n_rows),
        {"cpu_pct": np.linspace(0.0, 99.5, n_rows), "mem_pct": np.full(n_rows, np.nan)},
    )


RULES = RecordRules(newest_ms=NOW + 300_000, oldest_ms=0)
SERIES_KEPT = 20_000
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x12, ord('"'), ord("{"), ord("]"), ord("e"), ord("-"))


class Target(Protocol):
    """One decoder under fire."""

    seeds: list[bytes]

    def hit(self, body: bytes) -> bool:
        """Return whether the body was taken; raise AssertionError where it was misread."""


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    """Return a seed with one to eight faults: bits, bytes, lengths, slices moved, cut or repeated."""
    body = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not body:
            break
        place = rng.randrange(len(body))
        match rng.randrange(8):
            case 0:
                body[place] ^= 1 << rng.randrange(8)
            case 1:
                body[place] = rng.choice(INTERESTING)
            case 2:
                body[place:place] = rng.randbytes(rng.randrange(1, 9))
            case 3:
                del body[place : place + rng.randrange(1, 17)]
            case 4:
                body[place:place] = body[place : place + rng.randrange(1, 65)]
            case 5:
                del body[place:]
            case 6:
                other = rng.choice(seeds)
                start = rng.randrange(len(other))
                body[place : place + rng.randrange(33)] = other[start : start + rng.randrange(1, 65)]
            case 7:
                width = rng.choice((2, 4, 8))
                number = rng.choice((0, 1, -1, 2**31 - 1, -(2**31), 2**40, 255)) & (2 ** (8 * width) - 1)
                body[place : place + width] = number.to_bytes(width, "little")
    return bytes(body)


class JsonTarget:
    """The short way through JSON against the long one, and columns against records one by one."""

    def __init__(self) -> None:
        record = {
            "timestamp": "2026-01-15T10:00:00Z",
            "server_name": "web-01",
            "cpu_pct": 12.5,
            "mem_pct": 40,
        }
        more = {**record, "state": "up", "mem_used_pct": None, "latency_ms": 1e-3}
        self.seeds = [
            json.dumps({"records": [{**one, "server_name": f"web-{n}"} for n in range(5)]}).encode()
            for one in (record, more, {**more, "cpu_pct": -0.5, "cpu_idle_pct": 3})
        ]
        self._json = JsonRecords()
        for body in self.seeds * 2:
            self._json.learn(body, read_records(body))

    def hit(self, body: bytes) -> bool:
        """Read both ways and compare."""
        short = self._json.read(body)
        try:
            raw = read_records(body)
        except Refusal:
            assert short is None, "the short way took what is no JSON"
            return False
        together = _plain(accept(raw, RULES))
        if short is not None:
            assert _plain(accept(short, RULES)) == together, "the short way read something else"
        alone = [accept([record], RULES) for record in raw]
        kept = [_plain(one)[2] for one in alone if not one.rejections]
        assert together[2] == [row for rows in kept for row in rows], (
            "columns say something else than records"
        )
        assert together[0] == [index for index, one in enumerate(alone) if one.rejections]
        return True


class ArrowTarget:
    """Arrow IPC streams: nothing but refusals, and nothing taken that no record may hold."""

    def __init__(self) -> None:
        times = pa.array([NOW + n for n in range(6)]).cast(pa.timestamp("ms", "UTC"))
        names = pa.array(["web-01", "web-02", "a name longer than twelve bytes", None, "web-01", "x"])
        numbers = pa.array([1.0, 2.5, None, -0.0, 99.0, 7.0])
        self.seeds = [
            _stream({"timestamp": times, "server_name": names.dictionary_encode(), "cpu_pct": numbers}),
            _stream(
                {"timestamp": times, "server_name": names, "a": numbers.cast(pa.float32()), "note": names}
            ),
            _stream({"timestamp": times, "server_name": names.cast(pa.string_view()), "b": pa.nulls(6)}),
            _stream(
                {
                    "timestamp": pa.array(["2026-01-15T10:00:00Z"] * 6),
                    "server_name": names.cast(pa.large_string()),
                    "flag": pa.array([True, None] * 3),
                    "lists": pa.array([[1.0], None, [], [2.0, 3.0], None, []]),
                    "count": pa.array([1, 2, 3, None, 5, 6], pa.uint16()),
                }
            ),
        ]

    def hit(self, body: bytes) -> bool:
        """Read, and look at what came out."""
        try:
            rows = RowsOf(read_columns(body))
        except BadData:
            return False
        accepted = accept(rows, RULES)
        batch = accepted.batch
        assert len(batch) + len(accepted.rejections) == len(rows)
        assert all(0 <= code < len(batch.server_names) for code in batch.server_codes.tolist())
        assert all(not np.isinf(values).any() for values in batch.metrics.values())
        assert ((batch.timestamps_ms >= 0) & (batch.timestamps_ms <= NOW + 300_000)).all()
        for rejection in accepted.rejections:
            repr(rows[rejection.index])
        return True


class WriteTarget:
    """Remote-write: the decoder that skips parsing against the library that parses everything."""

    def __init__(self) -> None:
        self._parse = _full_request_class()
        long = tuple(range(-3, 17))  # so many series are compared with earlier requests, not looked up
        self._seed_contents = [
            self._request(values)
            for values in ((1.0, 2.0), (0.0, 3.5), (float("nan"), 0.0), long, long[::-1])
        ]
        self.seeds = self._seed_contents + [_packed(content) for content in self._seed_contents]
        self._begin()

    def _begin(self) -> None:
        self._numbers: dict[tuple[tuple[str, str], ...], int] = {}
        self._decoder = WriteDecoder(self._number, RemoteWriteSettings(max_unpacked_bytes=2**20))
        self._intake = WriteIntake(RemoteWriteSettings(max_series=500), self._take, lambda: RULES)

    def hit(self, body: bytes) -> bool:
        """Decode the bytes as a content to be packed and as they are; map what is taken."""
        if len(self._numbers) > SERIES_KEPT:
            self._begin()
        packed = _packed(body)
        is_taken = self._hit_packed(packed, body)
        if is_taken:
            self._intake.take(packed)
        self._hit_packed(body, None)
        return is_taken

    def _take(self, raw: Sequence[object]) -> Receipt:
        accepted = accept(raw, RULES)
        assert accepted.rejections == (), "the mapping made records that are none"
        assert len(accepted.batch) == len(raw)
        return Receipt(len(raw), (), 0)

    def _hit_packed(self, body: bytes, content: bytes | None) -> bool:
        try:
            samples = self._decoder.decode(body).samples
        except BadData:
            samples = None
        if content is not None:
            want = self._reference(content)
            assert (samples is None) == (want is None), "one reading took it, the other did not"
        if samples is None:
            return False
        if content is not None and want is not None:
            bits = samples.values.view(np.int64).tolist()
            got = sorted(zip(samples.series.tolist(), samples.timestamps_ms.tolist(), bits, strict=True))
            assert got == want, "read something else than the library does"
        return True

    def _number(self, labels: Mapping[str, str]) -> int:
        return self._numbers.setdefault(tuple(sorted(labels.items())), len(self._numbers))

    def _reference(self, content: bytes) -> list[tuple[int, int, int]] | None:
        """Return what the library reads, None where it refuses."""
        try:
            request = self._parse.FromString(content)
        except DecodeError:
            return None
        found = []
        for series in request.timeseries:
            labels = _labels_of(series)
            if labels is None:  # left out, at no other series' cost
                continue
            number = self._number(labels)
            for sample in series.samples:
                (bits,) = struct.unpack("<q", struct.pack("<d", sample.value))
                found.append((number, sample.timestamp, bits))
        return sorted(found)

    def _request(self, values: Sequence[float]) -> bytes:
        request = self._parse()
        for number, value in enumerate(values):
            series = request.timeseries.add()
            for name, text in (("__name__", f"node_load{number}"), ("instance", "web-01:9100")):
                series.labels.add(name=name.encode(), value=text.encode())
            series.samples.add(value=value, timestamp=NOW)
        return bytes(request.SerializeToString())


class SymbolTarget:
    """Remote-write 2.0: the decoder that keeps tables of symbols against the library, which keeps nothing."""

    def __init__(self) -> None:
        self._parse = _full_request_class(has_symbols=True)
        self.seeds = [
            self._request(values, order)
            for values in ((1.0, 2.0), (0.0, 3.5), tuple(range(-3, 9)))
            for order in (1, -1)
        ]
        self._begin()

    def _begin(self) -> None:
        self._numbers: dict[tuple[tuple[str, str], ...], int] = {}
        settings = RemoteWriteSettings(max_unpacked_bytes=2**20)
        self._decoder = SymbolDecoder(WriteDecoder(self._number, settings).known, settings)

    def hit(self, body: bytes) -> bool:
        """Read the bytes of a request, and compare."""
        if len(self._numbers) > SERIES_KEPT:
            self._begin()
        try:
            samples = self._decoder.read(body).samples
        except BadData:
            samples = None
        want = self._reference(body)
        assert (samples is None) == (want is None), "one reading took it, the other did not"
        if samples is None:
            return False
        bits = samples.values.view(np.int64).tolist()
        got = sorted(zip(samples.series.tolist(), samples.timestamps_ms.tolist(), bits, strict=True))
        assert got == want, "read something else than the library does"
        return True

    def _number(self, labels: Mapping[str, str]) -> int:
        return self._numbers.setdefault(tuple(sorted(labels.items())), len(self._numbers))

    def _reference(self, content: bytes) -> list[tuple[int, int, int]] | None:
        try:
            request = self._parse.FromString(content)
        except DecodeError:
            return None
        if content and not request.symbols:
            return None
        found = []
        for series in request.timeseries:
            labels = _labels_by(series.labels_refs, request.symbols)
            if labels is not None:
                number = self._number(labels)
                for sample in series.samples:
                    (bits,) = struct.unpack("<q", struct.pack("<d", sample.value))
                    found.append((number, sample.timestamp, bits))
        return sorted(found)

    def _request(self, values: Sequence[float], order: int) -> bytes:
        request = self._parse()
        texts = [b"__name__", b"instance", b"web-01:9100", *(b"node_load%d" % n for n in range(len(values)))]
        request.symbols.extend([b"", *texts[::order]])
        places = {text: place for place, text in enumerate(request.symbols)}
        for number, value in enumerate(values):
            own = (b"__name__", b"node_load%d" % number, b"instance", b"web-01:9100")
            series = request.timeseries.add(labels_refs=[places[text] for text in own])
            series.samples.add(value=value, timestamp=NOW)
        return bytes(request.SerializeToString())


def _labels_by(refs: Sequence[int], symbols: Sequence[bytes]) -> dict[str, str] | None:
    """Return the labels of a series; None where they are not usable."""
    if len(refs) % 2 or any(ref >= len(symbols) for ref in refs):
        return None
    texts = [symbols[ref] for ref in refs]
    try:
        labels = {name.decode(): value.decode() for name, value in zip(texts[::2], texts[1::2], strict=True)}
    except UnicodeDecodeError:
        return None
    return labels if 2 * len(labels) == len(refs) and "" not in labels else None


def _plain(accepted: Accepted) -> tuple[list[int], int, list[Any]]:
    batch = accepted.batch
    rows = [
        (
            batch.server_names[code],
            at_ms,
            {n: v[row].item() for n, v in sorted(batch.metrics.items()) if not np.isnan(v[row])},
        )
        for row, (code, at_ms) in enumerate(
            zip(batch.server_codes, batch.timestamps_ms.tolist(), strict=True)
        )
    ]
    return [rejection.index for rejection in accepted.rejections], accepted.ignored_text_fields, rows


def _stream(columns: Mapping[str, pa.Array]) -> bytes:
    batch = pa.record_batch(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch.slice(0, 4))
        writer.write_batch(batch.slice(4))
    return bytes(sink.getvalue())


def _packed(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="snappy", asbytes=True))


def _labels_of(series: Any) -> dict[str, str] | None:
    """Return the labels of a series; None where one is not UTF-8, has no name or comes twice."""
    try:
        labels = {label.name.decode(): label.value.decode() for label in series.labels}
    except UnicodeDecodeError:
        return None
    return labels if len(labels) == len(series.labels) and "" not in labels else None


def _full_request_class(*, has_symbols: bool = False) -> Any:
    """Return the request message with every series parsed, unlike the ones the daemon uses."""
    sample = [("value", 1, "double", ""), ("timestamp", 2, "int64", "")]
    if has_symbols:
        series = [("labels_refs", 1, "uint32[]", ""), ("samples", 2, "message[]", "Sample")]
        request = [("symbols", 4, "bytes[]", ""), ("timeseries", 5, "message[]", "TimeSeries")]
        return message_classes("fuzz.two", {"Sample": sample, "TimeSeries": series, "Request": request})[0]
    label = [("name", 1, "bytes", ""), ("value", 2, "bytes", "")]
    series = [("labels", 1, "message[]", "Label"), ("samples", 2, "message[]", "Sample")]
    request = [("timeseries", 1, "message[]", "TimeSeries")]
    layout = {"Label": label, "Sample": sample, "TimeSeries": series, "WriteRequest": request}
    return message_classes("fuzz.one", layout)[0]


TARGETS: dict[str, type[Target]] = {
    "json": JsonTarget,
    "arrow": ArrowTarget,
    "remote_write": WriteTarget,
    "remote_write_2": SymbolTarget,
    "frames": FrameTarget,
}
