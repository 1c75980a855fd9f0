"""Remote-write requests for tests, encoded by hand from the wire format, not by the library."""

import struct
from collections.abc import Iterable, Mapping

import pyarrow as pa

STALE = struct.unpack("<d", struct.pack("<Q", 0x7FF0000000000002))[0]
Series = tuple[Mapping[str, str], Iterable[tuple[int, float]]]


def varint(number: int) -> bytes:
    number &= 2**64 - 1  # negative numbers take ten bytes
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def label_bytes(labels: Mapping[str, str]) -> bytes:
    return b"".join(
        field(1, field(1, name.encode()) + field(2, value.encode())) for name, value in labels.items()
    )


def sample_bytes(time_ms: int, value: float) -> bytes:
    raw = struct.pack("<d", value)
    number = b"" if raw == b"\0" * 8 else b"\x09" + raw  # proto3 leaves a zero out
    return field(2, number + (b"\x10" + varint(time_ms) if time_ms else b""))


def series_bytes(labels: Mapping[str, str], samples: Iterable[tuple[int, float]]) -> bytes:
    return label_bytes(labels) + b"".join(sample_bytes(time_ms, value) for time_ms, value in samples)


def request_bytes(series: Iterable[Series]) -> bytes:
    return b"".join(field(1, series_bytes(labels, samples)) for labels, samples in series)


def symbols_bytes(series: Iterable[Series], symbols: list[str] | None = None, after: bytes = b"") -> bytes:
    """A request of remote-write 2.0; `after` stands behind each series' samples, as metadata does."""
    table = [""] if symbols is None else symbols
    chunks = []
    for own, samples in series:
        texts = [text for pair in own.items() for text in pair]
        table += [text for text in dict.fromkeys(texts) if text not in table]
        refs = b"".join(varint(table.index(text)) for text in texts)
        content = field(1, refs) + b"".join(sample_bytes(time_ms, value) for time_ms, value in samples)
        chunks.append(field(5, content + after))
    return b"".join(field(4, text.encode()) for text in table) + b"".join(chunks)


def packed(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="snappy", asbytes=True))


def body(series: Iterable[Series]) -> bytes:
    return packed(request_bytes(series))


def labels(name: str, server: str = "web-01:9100", **more: str) -> dict[str, str]:
    return dict(sorted({"__name__": name, "instance": server, "job": "node", **more}.items()))
