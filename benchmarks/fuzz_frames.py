"""The fuzzing's target for the buffer's log: segments of frames with faults in them.

What the reader gives back must be payloads that were written, each at most as often as the bytes
hold it: a checksum that lets one changed bit pass would show here as a payload nobody wrote.
"""

import numpy as np

from fleetcast.schema import RecordBatch
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
            assert payload in self._payloads, "a payload that nobody wrote"
        for damage in content.damages:
            assert body[damage.offset : damage.offset + len(damage.data)] == damage.data
        n_frames = sum(len(frame(payload)) + len(payload) for payload in content.payloads)
        n_damaged = sum(len(damage.data) for damage in content.damages)
        if not content.is_newer_format:
            assert n_frames + n_damaged + content.torn_bytes == len(body), "bytes that nobody accounts for"
        return bool(content.payloads)


def _batch(n_rows: int) -> RecordBatch:
    return RecordBatch(
        ("web-01", "web-02"),
        (np.arange(n_rows) % 2).astype(np.int32),
        NOW + np.arange(n_rows),
        {"cpu_pct": np.linspace(0.0, 99.5, n_rows), "mem_pct": np.full(n_rows, np.nan)},
    )
