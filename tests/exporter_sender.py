"""A sender of exporters' series, and what became of them."""

import dataclasses
import struct
from collections import Counter
from collections.abc import Mapping

import numpy as np

from fleetcast.ingest.records import RecordRules, accept_columns
from fleetcast.prometheus.series import Samples
from fleetcast.serving.writes import Derived, ExporterMapping
from fleetcast.settings import RemoteWriteSettings

NOW = 1_768_471_200_000
RULES = RecordRules(newest_ms=NOW + 86_400_000, oldest_ms=NOW - 86_400_000, significant_digits=17)
STALE = struct.unpack("<d", struct.pack("<Q", 0x7FF0000000000002))[0]
Sample = tuple[Mapping[str, str], int, float]  # labels, seconds after NOW, value
OUTCOMES = ("taken", "repeated", "incomplete", "out_of_order", "out_of_bounds")
Found = dict[tuple[str, int], dict[str, float]]


class Sender:
    """Sends samples to a mapping and merges what comes out, as every reader of the buffer does."""

    def __init__(self, **changes: object) -> None:
        self.mapping = ExporterMapping(dataclasses.replace(RemoteWriteSettings(), **changes))  # type: ignore[arg-type]
        self.found: Found = {}
        self.arrival_s = 0.0
        self.counted: Counter[str] = Counter()

    def send(self, *samples: Sample, rules: RecordRules = RULES, arrival_s: float | None = None) -> Found:
        """Return the rows that this request alone led to; it arrives when its newest sample was taken."""
        self.arrival_s = max([self.arrival_s, *(at_s for _, at_s, _ in samples)])
        self.arrival_s = self.arrival_s if arrival_s is None else arrival_s
        numbered = [
            (self.mapping.number(labels), NOW + int(at_s * 1000), value) for labels, at_s, value in samples
        ]
        columns = list(zip(*(row for row in numbered if row[0] >= 0), strict=True)) or [(), (), ()]
        derived = self.mapping.derive(
            Samples(
                np.array(columns[0], np.int32), np.array(columns[1], np.int64), np.array(columns[2], float)
            ),
            rules,
            self.arrival_s,
        )
        self.counted.update({name: getattr(derived, f"n_{name}") for name in OUTCOMES})
        self.derived: Derived = derived
        batch = accept_columns(derived.columns, rules).batch
        rows: Found = {}
        for row in range(len(batch)):
            key = (batch.server_names[batch.server_codes[row]], (int(batch.timestamps_ms[row]) - NOW) // 1000)
            values = {name: float(column[row]) for name, column in batch.metrics.items()}
            rows[key] = {name: value for name, value in values.items() if not np.isnan(value)}
            self.found.setdefault(key, {}).update(rows[key])
        return rows


def series(name: str, instance: str = "web-01:9100", **more: str) -> dict[str, str]:
    return {"__name__": name, "instance": instance, "job": "node", **more}


def idle(cpu: int, instance: str = "web-01:9100") -> dict[str, str]:
    return series("node_cpu_seconds_total", instance, cpu=str(cpu), mode="idle")


def disk(device: str, what: str = "read") -> dict[str, str]:
    return series(f"node_disk_{what}_bytes_total", device=device)
