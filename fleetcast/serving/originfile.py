"""One sweep's open forecasts as a file: written once, read back at each settle horizon.

Owns: the format, `open_forecasts/<origin_ms>.npz`: `format`, `bin_ms`, `horizons` (horizon,),
`quantiles` (server, metric, horizon, quantile) float32, `is_model` (server, metric),
`model_median` (server, metric, horizon) float32 before feedback (absent in format 1), and the
names as UTF-8 lines in byte arrays (`servers`, `metrics`, `model_version`, empty = fallback).
The zip's own CRC-32 guards every array; nothing in it is pickled.
Does not know: when a forecast is due, or what became of it.
"""

import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fleetcast import files
from fleetcast.errors import CorruptFile, UnknownFormat
from fleetcast.schema import ClosedBin, Codes, FleetForecast, Floats32, SettledForecasts

ORIGIN_FORMAT = 2
_KNOWN_FORMATS = (1, 2)  # format 1: no feedback, the model's median is the one given


@dataclass(frozen=True, slots=True, eq=False)
class OpenForecasts:
    """The forecasts of one origin at the settle horizons."""

    origin_ms: int
    bin_ms: int
    horizons: Codes  # (horizon,)
    server_names: tuple[str, ...]
    metrics: tuple[str, ...]
    quantiles: Floats32  # (server, metric, horizon, quantile)
    is_model: NDArray[np.bool_]  # (server, metric)
    model_version: str | None
    model_median: Floats32  # (server, metric, horizon)

    def counts(self) -> dict[int, int]:
        """Return how many forecasts there are by target bin."""
        n_made = np.isfinite(self.quantiles[..., 1]).sum(axis=(0, 1))
        targets = self.origin_ms + self.horizons.astype(np.int64) * self.bin_ms
        return {int(target): int(n) for target, n in zip(targets, n_made, strict=True) if n}


def kept_of(forecast: FleetForecast, settle_horizons: tuple[int, ...]) -> OpenForecasts:
    """Return the part of a forecast that will be settled."""
    horizons = np.array(sorted(set(settle_horizons)), dtype=np.int32)
    horizons = horizons[horizons <= forecast.quantiles.shape[2]]
    median = forecast.quantiles[..., 1] if forecast.model_median is None else forecast.model_median
    return OpenForecasts(
        forecast.origin_ms,
        forecast.bin_ms,
        horizons,
        forecast.server_names,
        forecast.metrics,
        np.ascontiguousarray(forecast.quantiles[:, :, horizons - 1]),
        forecast.sources,
        forecast.model_version,
        np.ascontiguousarray(median[:, :, horizons - 1]),
    )


def write_origin(path: Path, kept: OpenForecasts) -> None:
    """Write one origin durably.

    Raises:
        StorageFull, StorageBroken: no file of that name was left.
    """
    stream = io.BytesIO()
    np.savez(
        stream,
        format=np.int64(ORIGIN_FORMAT),
        origin_ms=np.int64(kept.origin_ms),
        bin_ms=np.int64(kept.bin_ms),
        horizons=kept.horizons,
        quantiles=kept.quantiles,
        is_model=kept.is_model,
        model_median=kept.model_median,
        servers=bytes_of("\n".join(kept.server_names)),
        metrics=bytes_of("\n".join(kept.metrics)),
        model_version=bytes_of(kept.model_version or ""),
    )
    files.write_atomic(path, stream.getvalue())


def read_origin(path: Path) -> OpenForecasts:
    """Return what `write_origin` wrote.

    Raises:
        CorruptFile: it is missing, damaged or not ours.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            if int(arrays["format"]) not in _KNOWN_FORMATS:
                raise UnknownFormat(path, f"format {int(arrays['format'])}", hint=f"expected {ORIGIN_FORMAT}")
            quantiles = arrays["quantiles"]
            kept = OpenForecasts(
                int(arrays["origin_ms"]),
                int(arrays["bin_ms"]),
                arrays["horizons"],
                lines(arrays["servers"]),
                lines(arrays["metrics"]),
                quantiles,
                arrays["is_model"],
                arrays["model_version"].tobytes().decode() or None,
                arrays["model_median"] if "model_median" in arrays else quantiles[..., 1],
            )
    except (OSError, EOFError, ValueError, LookupError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise CorruptFile(path, f"not a file of open forecasts: {error}") from error
    shape = (len(kept.server_names), len(kept.metrics), len(kept.horizons), 3)
    if kept.quantiles.shape != shape or kept.is_model.shape != shape[:2]:
        raise CorruptFile(path, f"quantiles of shape {kept.quantiles.shape}, expected {shape}")
    if kept.model_median.shape != shape[:3]:
        raise CorruptFile(path, f"medians of shape {kept.model_median.shape}, expected {shape[:3]}")
    return kept


def settled_rows(kept: OpenForecasts, closed: ClosedBin) -> SettledForecasts:
    """Return the forecasts for `closed` that have an actual value, one row each."""
    row_of = {name: row for row, name in enumerate(closed.server_names)}
    column_of = {name: column for column, name in enumerate(closed.metrics)}
    rows = np.array([row_of.get(name, -1) for name in kept.server_names], dtype=np.int64)
    columns = np.array([column_of.get(name, -1) for name in kept.metrics], dtype=np.int64)
    targets = kept.origin_ms + kept.horizons.astype(np.int64) * kept.bin_ms
    step = int(np.flatnonzero(targets == closed.bin_ms)[0])
    actual = np.full(kept.is_model.shape, np.nan)
    known = np.ix_(rows >= 0, columns >= 0)
    actual[known] = closed.values[np.ix_(rows[rows >= 0], columns[columns >= 0])]
    quantiles = kept.quantiles[:, :, step].astype(np.float64)  # (server, metric, quantile)
    server, metric = np.nonzero(np.isfinite(actual) & np.isfinite(quantiles[..., 1]))
    versions = np.full(kept.is_model.shape, None, dtype=object)
    versions[kept.is_model] = kept.model_version
    return SettledForecasts(
        origin_ms=np.full(len(server), kept.origin_ms, dtype=np.int64),
        target_ms=np.full(len(server), closed.bin_ms, dtype=np.int64),
        horizon=np.full(len(server), kept.horizons[step], dtype=np.int32),
        server_name=np.array(kept.server_names, dtype=object)[server],
        metric=np.array(kept.metrics, dtype=object)[metric],
        p10=quantiles[server, metric, 0],
        p50=quantiles[server, metric, 1],
        p90=quantiles[server, metric, 2],
        actual=actual[server, metric],
        model_version=versions[server, metric],
        model_p50=kept.model_median[server, metric, step].astype(np.float64),
    )


def bytes_of(text: str) -> NDArray[np.uint8]:
    """Return text as an array that an npz file holds without pickling."""
    return np.frombuffer(text.encode(), dtype=np.uint8)


def lines(array: NDArray[np.uint8]) -> tuple[str, ...]:
    """Return the lines of such a text; none for an empty one."""
    text = array.tobytes().decode()
    return tuple(text.split("\n")) if text else ()
