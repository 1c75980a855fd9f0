"""Settled one-bin-ahead forecasts as a grid: what every series was, and how far it was missed.

Owns: laying rows on (server, metric, bin), and reading long stretches a piece at a time. What is
settled never changes, so the same stretch gives the same grid whenever it is read; raw records
may still come late. Does not know: drift.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fleetcast.schema import Floats32, ReadForecasts, SettledForecasts

MOST_CELLS = 1_000_000  # (server, metric, bin) asked for at once
DAY_BINS_LEAST = 12  # read at once, however large the fleet


@dataclass(frozen=True, slots=True, eq=False)
class FleetGrid:
    """What every series of a fleet was on one time axis, and how far it was missed."""

    server_names: tuple[str, ...]
    metrics: tuple[str, ...]
    start_ms: int
    bin_ms: int
    values: Floats32  # (server, metric, bin) native units, NaN = not known
    errors: Floats32  # the same shape: |its own p50 - actual| of a model; NaN = none, or the fallback's

    @property
    def end_ms(self) -> int:
        """Return the end of the newest bin."""
        return self.start_ms + int(self.values.shape[2]) * self.bin_ms

    def since(self, first: int) -> "FleetGrid":
        """Return the bins from the `first`-th on."""
        start_ms, values, errors = self.start_ms + first * self.bin_ms, self.values, self.errors
        return replace(self, start_ms=start_ms, values=values[:, :, first:], errors=errors[:, :, first:])

    def servers(self, rows: NDArray[np.int64]) -> "FleetGrid":
        """Return some of the servers, in that order."""
        names = tuple(self.server_names[row] for row in rows)
        return replace(self, server_names=names, values=self.values[rows], errors=self.errors[rows])


def settled_grid(
    rows: SettledForecasts,
    server_names: tuple[str, ...],
    metrics: tuple[str, ...],
    span_ms: tuple[int, int],
    bin_ms: int,
    *,
    version: str | None = None,
) -> FleetGrid:
    """Lay rows on a grid; rows of other names or times are left out.

    Args:
        span_ms: start of the first bin and end of the last.
        version: errors of this model alone; None = of every model, never of the fallback.
    """
    start_ms, end_ms = span_ms
    shape = (len(server_names), len(metrics), (end_ms - start_ms) // bin_ms)
    values, errors = (np.full(shape, np.nan, np.float32) for _ in range(2))
    servers = _codes(rows.server_name, server_names)
    columns = _codes(rows.metric, metrics)
    bins = (rows.target_ms - start_ms) // bin_ms
    kept = (rows.horizon == 1) & (servers >= 0) & (columns >= 0) & (bins >= 0) & (bins < shape[2])
    place = (servers[kept], columns[kept], bins[kept])
    values[place] = rows.actual[kept]
    versions = rows.model_version[kept]
    is_model = np.fromiter(
        (name == version if version is not None else name is not None for name in versions),
        np.bool_,
        len(versions),
    )
    missed = np.abs(rows.model_p50[kept] - rows.actual[kept])
    errors[place] = np.where(is_model, missed, np.nan)
    return FleetGrid(server_names, metrics, start_ms, bin_ms, values, errors)


def _codes(names: np.ndarray, known: tuple[str, ...]) -> np.ndarray:
    code_of = {name: code for code, name in enumerate(known)}
    return np.fromiter((code_of.get(name, -1) for name in names), np.int64, len(names))


def bins_at_once(n_series: int) -> int:
    """Return how many bins of so many series are read at once."""
    return max(DAY_BINS_LEAST, MOST_CELLS // max(n_series, 1))


def read_grid(
    read: ReadForecasts,
    server_names: tuple[str, ...],
    metrics: tuple[str, ...],
    span_ms: tuple[int, int],
    bin_ms: int,
) -> FleetGrid:
    """Read a long stretch piece by piece into one grid, errors of every model."""
    pieces = [
        settled_grid(read(*piece), server_names, metrics, piece, bin_ms)
        for piece in _pieces(span_ms, bin_ms * bins_at_once(len(server_names) * len(metrics)))
    ]
    empty = np.empty((len(server_names), len(metrics), 0), np.float32)
    values = np.concatenate([empty, *(piece.values for piece in pieces)], axis=2)
    errors = np.concatenate([empty, *(piece.errors for piece in pieces)], axis=2)
    return FleetGrid(server_names, metrics, span_ms[0], bin_ms, values, errors)


def _pieces(span_ms: tuple[int, int], length_ms: int) -> Iterator[tuple[int, int]]:
    for start_ms in range(*span_ms, length_ms):
        yield start_ms, min(start_ms + length_ms, span_ms[1])
