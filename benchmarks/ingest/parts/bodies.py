"""Request bodies for the ingest benchmark: one fleet, one minute, in every form a sender may use.

Every record has the 14 metrics of the spec's example fleet. Times are a millisecond apart so that
a bin of five minutes holds millions of different records: bodies are sent faster than life.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from fleetcast.clock import from_ms

METRICS = (
    "cpu_pct", "mem_pct", "disk_io_mb_s", "net_in_mb_s", "net_out_mb_s", "latency_ms", "load_average",
    "cpu_user_pct", "cpu_sys_pct", "cpu_iowait_pct", "cpu_idle_pct", "disk_usage_pct", "error_rate",
    "gc_pause_ms",
)  # fmt: skip
SERVERS = 200
CPUS, DISKS, NICS = 8, 2, 1
JSON, ARROW = "application/json", "application/vnd.apache.arrow.stream"


def json_bodies(first_ms: int, n_bodies: int, n_records: int) -> Iterator[bytes]:
    """Yield bodies for POST /feed/data."""
    rng = np.random.default_rng(1)
    for number in range(n_bodies):
        values = rng.uniform(0, 100, (n_records, len(METRICS))).round(2).tolist()
        records = []
        for row in range(n_records):
            at_ms = first_ms + (number * n_records + row) // SERVERS
            stamp = from_ms(at_ms).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            record = {"timestamp": stamp, "server_name": f"web-{row % SERVERS:03d}"}
            records.append(record | dict(zip(METRICS, values[row], strict=True)))
        yield json.dumps({"records": records}, separators=(",", ":")).encode()


def arrow_bodies(first_ms: int, n_bodies: int, n_records: int, n_servers: int = SERVERS) -> Iterator[bytes]:
    """Yield the same as Arrow streams."""
    rng = np.random.default_rng(1)
    names = pa.array([f"web-{number:03d}" for number in range(n_servers)])
    for number in range(n_bodies):
        rows = np.arange(n_records)
        times = first_ms + (number * n_records + rows) // n_servers
        columns = {
            "timestamp": pa.array(times).cast(pa.timestamp("ms", "UTC")),
            "server_name": pa.DictionaryArray.from_arrays(
                pa.array((rows % n_servers).astype(np.int32)), names
            ),
        }
        columns |= {metric: pa.array(rng.uniform(0, 100, n_records).round(2)) for metric in METRICS}
        batch = pa.record_batch(columns)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        yield bytes(sink.getvalue())


def write_bodies(first_ms: int, n_bodies: int, n_samples: int) -> Iterator[bytes]:
    """Yield remote-write requests: scrapes of node_exporter, filtered as the documents say."""
    heads = [head for server in range(SERVERS) for head in _heads(f"web-{server:03d}:9100")]
    place = 0
    for _ in range(n_bodies):
        content = b""
        for _ in range(n_samples):
            scrape, series = divmod(place, len(heads))
            content += _field(
                1, heads[series] + _sample(1000.0 + scrape * (series % 7), first_ms + scrape * 5)
            )
            place += 1
        yield bytes(pa.compress(content, codec="snappy", asbytes=True))


def small_bodies(form: str, first_ms: int, n_bodies: int, n_records: int, n_senders: int) -> Iterator[bytes]:
    """Yield the same rows, a millisecond apart, as `json`, `lines` (line protocol) or `write` requests.

    Each sender has servers of its own; the bodies of one are `n_senders` apart.
    """
    rng = np.random.default_rng(1)
    encode = {"json": _json_of, "lines": _lines_of, "write": _write_of}[form]
    for number in range(n_bodies):
        values = rng.uniform(0, 100, (n_records, len(METRICS))).round(2).tolist()
        yield encode(first_ms + number, number % n_senders * n_records, values)


def _json_of(at_ms: int, first: int, rows: list[list[float]]) -> bytes:
    stamp = from_ms(at_ms).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    records = [
        {"timestamp": stamp, "server_name": f"web-{place:03d}", **dict(zip(METRICS, row, strict=True))}
        for place, row in enumerate(rows, first)
    ]
    return json.dumps({"records": records}, separators=(",", ":")).encode()


def _lines_of(at_ms: int, first: int, rows: list[list[float]]) -> bytes:
    lines = []
    for place, row in enumerate(rows, first):
        fields = ",".join(f"{metric}={value}" for metric, value in zip(METRICS, row, strict=True))
        lines.append(f"fleet,server_name=web-{place:03d} {fields} {at_ms}000000")
    return "\n".join(lines).encode()


def _write_of(at_ms: int, first: int, rows: list[list[float]]) -> bytes:
    content = [
        _field(1, _head(f"fleet_{metric}", f"web-{place:03d}") + _sample(value, at_ms))
        for place, row in enumerate(rows, first)
        for metric, value in zip(METRICS, row, strict=True)
    ]
    return bytes(pa.compress(b"".join(content), codec="snappy", asbytes=True))


class Recorded:
    """A recorded fleet as an exporter's gauges, its last days moved to end at a given time."""

    def __init__(self, path: Path, days: float, end_ms: int) -> None:
        frame = pd.read_parquet(path).drop(columns="anomaly_label", errors="ignore")
        times = frame["timestamp"].dt.as_unit("ms").astype("int64")
        frame["at_ms"] = times + end_ms // 60_000 * 60_000 - times.max()
        recent = frame[frame["at_ms"] > end_ms - days * 86_400_000]
        self._frame = recent.sort_values(["at_ms", "server_name"])
        self._metrics = [name for name in frame.columns if name not in ("timestamp", "server_name", "at_ms")]

    def rules(self) -> list[str]:
        """Return the mapping rules that make each gauge a metric."""
        return [f"{name} = max(recorded_{name})" for name in self._metrics]

    def write_bodies(self, n_samples: int) -> Iterator[bytes]:
        """Yield remote-write requests of so many samples, oldest first; the last few are left out."""
        heads: dict[tuple[str, str], bytes] = {}
        content: list[bytes] = []
        columns = (self._frame[name].tolist() for name in ("at_ms", "server_name", *self._metrics))
        for at_ms, server, *values in zip(*columns, strict=True):
            for name, value in zip(self._metrics, values, strict=True):
                if value != value:  # absent
                    continue
                key = name, server
                head = heads.get(key) or heads.setdefault(key, _head(f"recorded_{name}", server))
                content.append(_field(1, head + _sample(value, at_ms)))
                if len(content) == n_samples:
                    yield bytes(pa.compress(b"".join(content), codec="snappy", asbytes=True))
                    content = []


def samples_per_record() -> int:
    """Return how many samples of a scrape make one record."""
    return len(list(_heads("web-000:9100")))


def _head(name: str, instance: str, **more: str) -> bytes:
    labels = {"__name__": name, "instance": instance, "job": "node", **more}
    pairs = (_field(1, key.encode()) + _field(2, labels[key].encode()) for key in sorted(labels))
    return b"".join(_field(1, pair) for pair in pairs)


def _heads(instance: str) -> Iterator[bytes]:
    def head(name: str, **more: str) -> bytes:
        return _head(name, instance, **more)

    for cpu in range(CPUS):
        yield head("node_cpu_seconds_total", cpu=str(cpu), mode="idle")
    for disk in range(DISKS):
        for way in ("read", "written"):
            yield head(f"node_disk_{way}_bytes_total", device=f"nvme{disk}n1")
    for nic in range(NICS):
        for way in ("receive", "transmit"):
            yield head(f"node_network_{way}_bytes_total", device=f"eth{nic}")
    for name in ("node_memory_MemTotal_bytes", "node_memory_MemAvailable_bytes", "node_load1"):
        yield head(name)
    for part in ("size", "free", "avail"):
        yield head(f"node_filesystem_{part}_bytes", device="/dev/sda1", fstype="ext4", mountpoint="/")


def _field(number: int, content: bytes) -> bytes:
    size = len(content)
    prefix = bytes([number << 3 | 2])
    return prefix + (bytes([size]) if size < 128 else bytes([size & 0x7F | 0x80, size >> 7])) + content


def _sample(value: float, time_ms: int) -> bytes:
    time = bytes([*(time_ms >> shift & 0x7F | 0x80 for shift in range(0, 35, 7)), time_ms >> 35])
    number = b"\x09" + struct.pack("<d", value) if value else b""  # proto3 leaves a zero out
    return _field(2, number + b"\x10" + time)
