"""The baseline a model was trained on: what its data looked like, per metric and per series.

Owns: sketches (sorted quantiles, mean, spread, time of day) of the newest days of a training
grid, and their file. Does not know: how drift is scored, or which version is in force.

File: `baseline.npz`, format 1, one array per field of `Baseline` (`fleetcast/archive.py`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fleetcast.archive import check_shapes, pack, unpack
from fleetcast.clock import HOUR_MS
from fleetcast.schema import Floats, Floats32, Longs

FORMAT = 1
POOLED_POINTS = 1001
SERIES_POINTS = 65
HOURS = 24
_CHUNK_SERVERS = 256
_MIN_WEIGHT_VALUES = 12  # a series with fewer values than this weighs less in the pooled sketch


@dataclass(frozen=True, eq=False)
class Baseline:
    """Sketches of one training's reference data; every array is finite where its count is > 0.

    The pooled sketch weighs each series alike: a series that is only known since its change
    counts as much as one known for the whole range, as it does in a drift window.
    """

    version: str
    metrics: tuple[str, ...]
    server_names: tuple[str, ...]  # empty: pooled only
    start_ms: int
    end_ms: int  # end of the newest bin
    bin_ms: int
    counts: Longs  # (metric,) values pooled
    means: Floats  # (metric,)
    stds: Floats  # (metric,)
    p95: Floats  # (metric,)
    quantiles: Floats  # (metric, POOLED_POINTS) non-decreasing, levels evenly from 0 to 1
    series_counts: Longs  # (server, metric)
    series_means: Floats32
    series_stds: Floats32
    series_quantiles: Floats32  # (server, metric, SERIES_POINTS) levels evenly from 0 to 1
    hour_counts: Longs  # (server, metric, HOURS) by UTC hour of the bin
    hour_means: Floats32
    hour_stds: Floats32
    error_horizons: Longs  # (horizon,) bins ahead; empty: no model error is known
    error_mae: Floats  # (metric, horizon) of the model in service, on data it was not trained on
    series_error_mae: Floats32  # (server, metric) one bin ahead, NaN = unknown

    @classmethod
    def from_grid(
        cls,
        values: Floats32,
        start_ms: int,
        bin_ms: int,
        server_names: tuple[str, ...],
        metrics: tuple[str, ...],
        version: str,
    ) -> Self:
        """Sketch a grid of bin means.

        Args:
            values: (server, metric, bin) NaN = not part of the reference.
            start_ms: start of the first bin.
        """
        n_server, n_metric, n_bin = values.shape
        pooled = [_pool(values[:, index]) for index in range(n_metric)]
        counts, means, stds, quantiles = _sketch(values, SERIES_POINTS)
        hours = ((start_ms + np.arange(n_bin) * bin_ms) // HOUR_MS) % HOURS
        by_hour = [_sketch(values[..., hours == hour], 0)[:3] for hour in range(HOURS)]
        return cls(
            version=version,
            metrics=metrics,
            server_names=server_names,
            start_ms=start_ms,
            end_ms=start_ms + n_bin * bin_ms,
            bin_ms=bin_ms,
            counts=np.array([item[0] for item in pooled], np.int64),
            means=np.array([item[1] for item in pooled]),
            stds=np.array([item[2] for item in pooled]),
            p95=np.array([_level(item[3], 0.95) for item in pooled]),
            quantiles=np.array([item[3] for item in pooled]).reshape(n_metric, POOLED_POINTS),
            series_counts=counts,
            series_means=means.astype(np.float32),
            series_stds=stds.astype(np.float32),
            series_quantiles=quantiles.astype(np.float32),
            hour_counts=np.stack([item[0] for item in by_hour], axis=-1),
            hour_means=np.stack([item[1] for item in by_hour], axis=-1).astype(np.float32),
            hour_stds=np.stack([item[2] for item in by_hour], axis=-1).astype(np.float32),
            error_horizons=np.empty(0, np.int64),
            error_mae=np.empty((n_metric, 0)),
            series_error_mae=np.full((n_server, n_metric), np.nan, np.float32),
        )

    def to_bytes(self) -> bytes:
        """Return the content of a baseline file."""
        return pack(self, FORMAT)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a baseline file.

        Raises:
            FileNotFoundError: there is none.
            UnknownFormat: another format version wrote it.
            CorruptFile: it is not a baseline.
        """
        loaded = unpack(path, cls, "baseline", FORMAT)
        _check(path, loaded)
        return loaded


def _check(path: Path, loaded: Baseline) -> None:
    n_server, n_metric = len(loaded.server_names), len(loaded.metrics)
    n_error = len(loaded.error_horizons)
    expected: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("counts", "means", "stds", "p95"), (n_metric,)),
        **dict.fromkeys(
            ("series_counts", "series_means", "series_stds", "series_error_mae"), (n_server, n_metric)
        ),
        **dict.fromkeys(("hour_counts", "hour_means", "hour_stds"), (n_server, n_metric, HOURS)),
        "quantiles": (n_metric, POOLED_POINTS),
        "series_quantiles": (n_server, n_metric, SERIES_POINTS),
        "error_mae": (n_metric, n_error),
    }
    check_shapes(path, ((name, getattr(loaded, name), shape) for name, shape in expected.items()))


def _pool(values: Floats32 | Floats) -> tuple[int, float, float, Floats]:
    """Return count, mean, std and quantiles of (series, value), each series weighing alike."""
    present = np.isfinite(values)
    counts = present.sum(axis=-1)
    if not counts.sum():
        return 0, 0.0, 0.0, np.zeros(POOLED_POINTS)
    weights = np.repeat(1.0 / np.maximum(counts, _MIN_WEIGHT_VALUES), counts)
    flat = values[present].astype(np.float64)  # series by series, as the weights
    mean = float(np.average(flat, weights=weights))
    std = float(np.sqrt(np.average((flat - mean) ** 2, weights=weights)))
    order = np.argsort(flat)
    below = np.cumsum(weights[order])
    # levels of the sorted values from 0 (smallest) to 1 (largest), as numpy's linear quantile
    span = below[-1] - weights[order[0]]
    levels = (below - weights[order[0]]) / span if span > 0 else np.zeros(len(flat))
    return len(flat), mean, std, np.interp(np.linspace(0, 1, POOLED_POINTS), levels, flat[order])


def _level(quantiles: Floats, level: float) -> float:
    return float(quantiles[round(level * (len(quantiles) - 1))])


def _sketch(values: Floats32, points: int) -> tuple[Longs, Floats, Floats, Floats]:
    """Return count, mean, std and `points` quantiles along the last axis; 0 where there is no value."""
    if len(values) <= _CHUNK_SERVERS:
        return _sketch_chunk(values, points)
    starts = range(0, len(values), _CHUNK_SERVERS)  # a week of 10,000 servers is 3 GB at once
    chunks = [_sketch_chunk(values[start : start + _CHUNK_SERVERS], points) for start in starts]
    counts, means, stds, quantiles = zip(*chunks, strict=True)
    return np.concatenate(counts), np.concatenate(means), np.concatenate(stds), np.concatenate(quantiles)


def _sketch_chunk(values: Floats32, points: int) -> tuple[Longs, Floats, Floats, Floats]:
    present = np.isfinite(values)
    counts: NDArray[np.int64] = present.sum(axis=-1)
    divisor = np.maximum(counts, 1)
    clean = np.where(present, values, 0.0).astype(np.float64)
    means = clean.sum(axis=-1) / divisor
    stds = np.sqrt((np.where(present, clean - means[..., None], 0.0) ** 2).sum(axis=-1) / divisor)
    if not points:
        return counts, means, stds, np.empty((*counts.shape, 0))
    if not values.shape[-1]:
        return counts, means, stds, np.zeros((*counts.shape, points))
    ordered = np.sort(np.where(present, clean, np.inf), axis=-1)
    position = np.linspace(0, 1, points) * np.maximum(counts - 1, 0)[..., None]
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, np.maximum(counts - 1, 0)[..., None])
    left, right = np.take_along_axis(ordered, low, -1), np.take_along_axis(ordered, high, -1)
    empty = (counts == 0)[..., None]
    left, right = np.where(empty, 0.0, left), np.where(empty, 0.0, right)
    return counts, means, stds, left + (right - left) * (position - low)
