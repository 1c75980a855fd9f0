"""The value types that travel between parts, and what a host's counters and devices mean to all of them.

Owns: shapes and units (arrays are columns, times are ms since 1970 UTC); which devices count, the
default rules for node_exporter and for alerts, and the share below which a fall of a counter is a
reset. A counter that began again (a reboot, a reloaded driver) starts near zero. A small fall is a
reading that went back a little (a clock was set, a second scraper was read out of turn), and a fall to
somewhere in between is another device under the same name: then nothing is known of that time. Does
not know: where values come from or go to.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0.1, 0.5, 0.9)
SOURCE_WARMING_UP = "warming_up"
SOURCE_NOT_FORECAST = "not_forecast"  # a server sends none of the metrics that are forecast
SOURCE_FALLBACK = "fallback"
SOURCE_MODEL = "model"

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
Longs = NDArray[np.int64]
Series = tuple[str, str]  # (server, metric)
Codes = NDArray[np.int32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why one record of a request was not accepted."""

    index: int
    field: str
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Return the plain form the HTTP interface answers with."""
        return {"index": self.index, "field": self.field, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class RefusedField:
    """A field that was left out of some records of a request; their other fields were taken."""

    field: str
    n_records: int
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Return the plain form the HTTP interface answers with."""
        return {"field": self.field, "records": self.n_records, "reason": self.reason}


class NameRows(dict[str, int]):
    """Rows by name, in the order of appearance; a tuple of names that comes again is looked up once.

    A sender's posts name the same servers each time. Names are only added: to move rows, make another.

    >>> names = NameRows()
    >>> names.of(("web-1", "web-2")).tolist(), names.of(("web-2", "web-3")).tolist()
    ([0, 1], [1, 2])
    """

    _TUPLES_MAX, _LENGTH_MAX = 64, 2048  # that are remembered: 2 MB of places at most

    def __init__(self, names: Iterable[str] = ()) -> None:
        super().__init__({name: row for row, name in enumerate(names)})
        self._known: dict[tuple[str, ...], Codes] = {}

    def of(self, names: tuple[str, ...]) -> Codes:
        """Return the row of each name, new ones for those not seen before; the array is shared."""
        found = self._known.get(names)
        if found is None:
            found = np.array([self.setdefault(name, len(self)) for name in names], dtype=np.int32)
            if len(names) <= self._LENGTH_MAX:
                if len(self._known) >= self._TUPLES_MAX:
                    self._known.clear()
                self._known[names] = found
        return found

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Return the names without a row."""
        if isinstance(names, tuple) and names in self._known:
            return []
        return [name for name in names if name not in self]


@dataclass(frozen=True, slots=True, eq=False)
class RecordBatch:
    """Accepted records in columns, in the order they came; every metric is finite or NaN = absent."""

    server_names: tuple[str, ...]  # distinct
    server_codes: Codes  # (row,) index into server_names
    timestamps_ms: Longs  # (row,)
    metrics: Mapping[str, Floats]  # each (row,)

    def __len__(self) -> int:
        return len(self.timestamps_ms)

    def where(self, is_chosen: NDArray[np.bool_]) -> "RecordBatch":
        """Return the chosen rows, without the names and metrics that none of them has."""
        codes, places = np.unique(self.server_codes[is_chosen], return_inverse=True)
        chosen = {name: values[is_chosen] for name, values in self.metrics.items()}
        return RecordBatch(
            tuple(self.server_names[code] for code in codes),
            places.astype(np.int32),
            self.timestamps_ms[is_chosen],
            {name: values for name, values in chosen.items() if not np.isnan(values).all()},
        )


@dataclass(frozen=True, slots=True, eq=False)
class HistoryWindow:
    """Bin means of a fleet up to and including one closed bin."""

    server_names: tuple[str, ...]
    metrics: tuple[str, ...]
    values: Floats32  # (server, metric, bin) native units, NaN = no record; last column = end bin
    end_bin_ms: int  # start of the last (newest closed) bin
    bin_ms: int

    def of(self, rows: "Longs") -> "HistoryWindow":
        """Return the window of some of its servers."""
        names = tuple(self.server_names[row] for row in rows.tolist())
        return HistoryWindow(names, self.metrics, self.values[rows], self.end_bin_ms, self.bin_ms)


@dataclass(frozen=True, slots=True, eq=False)
class ClosedBin:
    """One closed bin, with the servers that sent something in it."""

    bin_ms: int  # start of the bin
    server_names: tuple[str, ...]
    metrics: tuple[str, ...]
    values: Floats32  # (server, metric) means, NaN = absent


@dataclass(frozen=True)
class ChangedSeries:
    """One series of a grid that drifted, and the bin since which it did."""

    server: int  # row of the grid
    metric: int  # column
    since_bin: int


@dataclass(frozen=True, slots=True, eq=False)
class FleetForecast:
    """Forecasts of one sweep, made when the bin `origin_ms` closed.

    Step h (from 1) is the mean of the bin that starts at origin_ms + h * bin_ms.
    """

    origin_ms: int
    bin_ms: int
    server_names: tuple[str, ...]
    metrics: tuple[str, ...]
    quantiles: Floats32  # (server, metric, horizon, quantile), non-decreasing on the last axis; NaN = none
    sources: NDArray[np.bool_]  # (server, metric) True = model, False = fallback
    model_version: str | None
    # (server, metric, horizon) the model's own median where feedback changed it; None = nowhere
    model_median: Floats32 | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SettledForecasts:
    """Settled forecasts in columns, one row per (origin, horizon, server, metric).

    p10, p50 and p90 are what clients got; `model_p50` is the version's own median, before feedback
    from settled forecasts, and the measure of that version. Where it is not given, it is p50.
    """

    origin_ms: Longs
    target_ms: Longs  # start of the forecast bin
    horizon: Codes  # bins
    server_name: NDArray[np.object_]
    metric: NDArray[np.object_]
    p10: Floats
    p50: Floats
    p90: Floats
    actual: Floats
    model_version: NDArray[np.object_]  # None = fallback
    model_p50: Floats = None  # type: ignore[assignment]  # never None once made

    def __post_init__(self) -> None:
        if self.model_p50 is None:
            object.__setattr__(self, "model_p50", self.p50)

    def __len__(self) -> int:
        return len(self.origin_ms)

    def where(self, mask: NDArray[np.bool_]) -> "SettledForecasts":
        """Return the rows for which `mask` holds."""
        return SettledForecasts(*(getattr(self, name)[mask] for name in self.__slots__))


ReadForecasts = Callable[[int, int], SettledForecasts]  # start_ms, end_ms of the target, half open


@dataclass(frozen=True)
class SafeguardCheck:
    """One safeguard as it is reported: always all of them, passed or not."""

    name: str
    value: float | int | None
    limit: float | int
    passed: bool
    unit: str = ""


@dataclass(frozen=True)
class QuietVerdict:
    """Whether it is a quiet period, with every measurement it rests on (None = not measured)."""

    is_quiet: bool
    reason: str
    measured: Mapping[str, float | None] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    is_host_quiet: bool = True


# Devices whose bytes pass through another device too (or are memory) would be counted twice.
VIRTUAL_DISKS = ("loop", "ram", "zram", "dm-", "md", "sr", "fd", "nbd")
VIRTUAL_NICS = ("lo", "docker", "br-", "veth", "virbr", "ifb", "cni", "flannel", "cali", "tun", "tap")
_DISKS = f"({'|'.join(VIRTUAL_DISKS)}).*"
_NICS = f"lo|({'|'.join(VIRTUAL_NICS[1:])}).*"

NODE_EXPORTER_RULES = (
    'cpu_pct = clamp(100 * (1 - avg(rate(node_cpu_seconds_total{mode="idle"}))), 0, 100)',
    "mem_pct = 100 * (1 - sum(node_memory_MemAvailable_bytes) / sum(node_memory_MemTotal_bytes))",
    f'disk_io_mb_s = (sum(rate(node_disk_read_bytes_total{{device!~"{_DISKS}"}}))'
    f' + sum(rate(node_disk_written_bytes_total{{device!~"{_DISKS}"}}))) / 1e6',
    f'net_in_mb_s = sum(rate(node_network_receive_bytes_total{{device!~"{_NICS}"}})) / 1e6',
    f'net_out_mb_s = sum(rate(node_network_transmit_bytes_total{{device!~"{_NICS}"}})) / 1e6',
    "load_average = max(node_load1)",
    'disk_usage_pct = 100 * (max(node_filesystem_size_bytes{mountpoint="/"})'
    ' - max(node_filesystem_free_bytes{mountpoint="/"}))'
    ' / (max(node_filesystem_size_bytes{mountpoint="/"}) - max(node_filesystem_free_bytes{mountpoint="/"})'
    ' + max(node_filesystem_avail_bytes{mountpoint="/"}))',
)

RESET_SHARE = 0.01  # of the value before: at or below it the counter began again at zero


def increase(before: float, after: float) -> float:
    """Return by how much a counter grew, NaN where that is unknown.

    >>> increase(1e9, 1.5e9), increase(1e9, 40.0), increase(1e9, 1e9 - 512), increase(1e9, 2e8)
    (500000000.0, 40.0, nan, nan)
    """
    grown = after - before
    if not grown >= 0:
        grown = after if 0 <= after <= before * RESET_SHARE < math.inf else math.nan
    return grown if math.isfinite(grown) else math.nan


def increases(before: Floats, after: Floats) -> Floats:
    """Return the same for many pairs; what is not finite has no increase."""
    with np.errstate(invalid="ignore", over="ignore"):
        grown = after - before
        is_reset = (after >= 0) & (after <= before * RESET_SHARE) & (before < np.inf)
        found = np.where(grown >= 0, grown, np.where(is_reset, after, np.nan))
    return np.where(np.isfinite(found), found, np.nan)


ALERT_RULES = (  # NAME: FACT OP NUMBER [for TIME] [keep TIME] SEVERITY, as alerts/rules.py reads them
    "DriftHigh: drift_score > 0.15 for 15m keep 15m warning",
    "TrainingFailed: training_failures > 0 warning",
    "TrainingsFail: training_failures > 2 critical",
    "TrainsTooOften: trainings_7d >= 3 warning",
    "DiskLow: free_disk_gb < 5 keep 15m critical",
    "ChecksFail: check_failed > 0 for 10m critical",
    "Down: daemon_away > 0 for 5m critical",
    "NotReady: not_ready > 0 for 5m critical",
    "NoData: data_age_s > 300 for 5m critical",
    "ServersSilent: silent_h > 0 for 15m warning",
    "ForecastsLate: backlog > 2 for 10m warning",
    "ForecastsPoor: error_ratio > 1 for 6h keep 1h warning",
    "ModelRefused: model_problems > 0 for 10m warning",
    "ModelTakenBack: taken_back_h < 24 warning",
    "HeldLong: held_h > 168 warning",
    "LimitLikely: capacity_p > 0.5 keep 1h warning",
    "DiskFullSoon: disk_full_days < 7 keep 12h warning",
)
