"""Recorded fleets as bin grids, with what is known about them: stable series and real changes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fleetcast.clock import DAY_MS
from fleetcast.errors import BadData
from fleetcast.schema import Floats32

BIN_MS = 300_000
DAY = DAY_MS // BIN_MS
SPLIT_SEED = 20261123
NO_METRICS = ("timestamp", "server_name", "anomaly_label", "cpu_cores_count", "mem_capacity_mb")


@dataclass(frozen=True, eq=False)
class Change:
    """One real change of one series, with the bin it was labelled at."""

    server: int
    metric: int
    bin: int


@dataclass(frozen=True, eq=False)
class RecordedFleet:
    """One data set in 5-minute bins; bin 0 of the grid starts a UTC day."""

    name: str
    server_names: tuple[str, ...]
    metrics: tuple[str, ...]
    grid: Floats32  # (server, metric, bin)
    start_ms: int
    stable: tuple[tuple[int, int], ...]  # (server, metric) rows
    changes: tuple[Change, ...]

    @property
    def n_bins(self) -> int:
        """Return the length of the record."""
        return int(self.grid.shape[2])


def halves(names: list[str]) -> tuple[list[str], list[str]]:
    """Split servers into the development half and the reported one, as the protocol fixed it."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(names))
    cut = len(names) // 2
    return sorted(names[i] for i in order[:cut]), sorted(names[i] for i in order[cut:])


def bin_grid(frame: pd.DataFrame, metrics: list[str], names: list[str]) -> tuple[Floats32, int]:
    """Return (server, metric, bin) means from the first UTC midnight on, and its time in ms."""
    moments = pd.to_datetime(frame["timestamp"], utc=True)  # without a zone it is UTC
    times = moments.astype("datetime64[ms, UTC]").astype("int64").to_numpy()
    start_ms = int(-(-times.min() // DAY_MS) * DAY_MS)
    frame, times = frame[times >= start_ms], times[times >= start_ms]
    bins = (times - start_ms) // BIN_MS
    n_bins = int(bins.max()) + 1
    rows = pd.Index(names).get_indexer(pd.Index(frame["server_name"]))
    cells = rows * n_bins + bins
    grid = np.full((len(names), len(metrics), n_bins), np.nan, np.float32)
    for column, metric in enumerate(metrics):
        values = frame[metric].to_numpy(float)
        seen = np.isfinite(values)
        sums = np.bincount(cells[seen], values[seen], len(names) * n_bins)
        counts = np.bincount(cells[seen], minlength=len(names) * n_bins)
        means = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
        grid[:, column] = means.reshape(len(names), n_bins)
    return grid, start_ms


def load_fleet(data: Path, stable: Path | None, regimes: Path | None, half: str) -> RecordedFleet:
    """Read one data set; `half` is develop, report or all.

    Raises:
        BadData: no series of the stable list is in the data, or a column is missing.
    """
    frame = pd.read_parquet(data)
    _need(data, frame, ("timestamp", "server_name"))
    names = sorted(frame["server_name"].unique())
    if half != "all":
        names = halves(names)[0 if half == "develop" else 1]
        frame = frame[frame["server_name"].isin(names)]
    numbers = frame.select_dtypes("number").columns
    metrics = [name for name in numbers if name not in NO_METRICS and frame[name].notna().any()]
    grid, start_ms = bin_grid(frame, metrics, names)
    pairs = _rows(_listed(stable, ()), names, metrics) if stable else []
    if stable and not pairs:
        hint = f"servers are {', '.join(names[:5])}, ...; metrics are {', '.join(metrics[:5])}, ..."
        raise BadData(f"{stable}: none of its series is in {data} ({half} servers)", hint=hint)
    changes = _changes(_listed(regimes, ("change_time_utc",)), names, metrics, start_ms) if regimes else ()
    return RecordedFleet(
        data.stem, tuple(names), tuple(metrics), grid, start_ms, tuple(sorted(pairs)), tuple(changes)
    )


def sub_fleet(fleet: RecordedFleet, rows: list[int]) -> RecordedFleet:
    """Return some servers of a fleet, with what is known about them."""
    place = {row: index for index, row in enumerate(rows)}
    return RecordedFleet(
        fleet.name,
        tuple(fleet.server_names[row] for row in rows),
        fleet.metrics,
        fleet.grid[rows],
        fleet.start_ms,
        tuple((place[server], metric) for server, metric in fleet.stable if server in place),
        tuple(Change(place[c.server], c.metric, c.bin) for c in fleet.changes if c.server in place),
    )


def _listed(path: Path, others: tuple[str, ...]) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
    except pd.errors.EmptyDataError as error:
        raise BadData(f"{path}: an empty file, not even a header") from error
    _need(path, table, ("server_name", "metric", *others))
    return table


def _need(path: Path, table: pd.DataFrame, columns: tuple[str, ...]) -> None:
    missing = [name for name in columns if name not in table]
    if missing:
        raise BadData(f"{path}: no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")


def _rows(table: pd.DataFrame, names: list[str], metrics: list[str]) -> list[tuple[int, int]]:
    known = table[table["server_name"].isin(names) & table["metric"].isin(metrics)]
    return [
        (names.index(server), metrics.index(metric))
        for server, metric in zip(known["server_name"], known["metric"], strict=True)
    ]


def _changes(table: pd.DataFrame, names: list[str], metrics: list[str], start_ms: int) -> list[Change]:
    found = []
    for row in table.to_dict("records"):
        if row["server_name"] not in names or row["metric"] not in metrics:
            continue
        when = row.get("change_time_refined_utc")
        when = when if isinstance(when, str) else row["change_time_utc"]
        at = int(pd.Timestamp(when).timestamp() * 1000)
        where = (names.index(row["server_name"]), metrics.index(row["metric"]))
        found.append(Change(*where, (at - start_ms) // BIN_MS))
    return found


def interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    """Return the middle 95 % of draws."""
    if not len(draws):
        return float("nan"), float("nan")
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
