"""Learning a large fleet a few series at a time, and putting the parts together again.

Owns: the size of a chunk and the sample a large fleet is calibrated on. Does not know: what is
learned (`reference_fit`), files.
"""

from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from fleetcast.drift.seasonal.learning import FittedChunk, fit_chunk
from fleetcast.drift.seasonal.residuals import CodeBook, Shape
from fleetcast.drift.seasonal.season import DayClock
from fleetcast.drift.seasonal.statistics import Books
from fleetcast.schema import Floats32, Longs

CHUNK = 64  # series fitted at once: some 100 MB of passing arrays at three weeks
CALIBRATION_SERIES = 2000  # the fleet's calibration looks at a sample of a larger fleet


def fit_all(
    flat: Floats32, errors: Floats32 | None, local_bins: Longs, range_floors: Floats32, clock: DayClock
) -> list[FittedChunk]:
    """Learn all series, (series, bin), in chunks."""
    parts = []
    for first in range(0, len(flat), CHUNK):
        rows = slice(first, first + CHUNK)
        missed = None if errors is None else errors[rows]
        parts.append(fit_chunk(flat[rows], missed, local_bins, range_floors[rows], clock))
    return parts


def sampled(chunks: list[FittedChunk], n_metrics: int) -> tuple[NDArray[np.int64], Floats32]:
    """Return series of whole servers, evenly spread, and (statistic, series, step) of days left out."""
    sizes = [part.left_out.shape[1] for part in chunks]
    n_servers = sum(sizes) // n_metrics
    stride = max(1, -(-n_servers * n_metrics // CALIBRATION_SERIES))
    servers = np.arange(0, n_servers, stride)
    series = (servers[:, None] * n_metrics + np.arange(n_metrics)).ravel()
    wanted = np.isin(np.arange(n_servers * n_metrics), series)
    ends = np.cumsum(sizes)
    spans = [(part.left_out, end - size, end) for part, size, end in zip(chunks, sizes, ends, strict=True)]
    picked = [left_out[:, wanted[first:end]] for left_out, first, end in spans]
    return series, np.concatenate(picked, axis=1)


def joined_shapes(parts: list[Shape]) -> Shape:
    """Put shapes of chunks under each other."""
    own = {item.name: np.concatenate([getattr(part, item.name) for part in parts]) for item in fields(Shape)}
    offset = 0
    rows = []
    for part in parts:
        rows.append(np.where(part.weekly_rows >= 0, part.weekly_rows + offset, -1))
        offset += len(part.weekday_profiles)
    return Shape(**{**own, "weekly_rows": np.concatenate(rows).astype(np.int64)})


def joined_books(parts: list[Books]) -> Books:
    """Put books of chunks under each other."""
    return Books(
        _joined_codes([part.values for part in parts]),
        _joined_codes([part.innovations for part in parts]),
        _joined_codes([part.errors for part in parts]),
        np.concatenate([part.tails for part in parts]),
        np.concatenate([part.log_size for part in parts]),
        np.concatenate([part.rhythm_power for part in parts]),
        np.concatenate([part.rhythm_noise for part in parts]),
        np.concatenate([part.log_moves for part in parts]),
        np.concatenate([part.distances for part in parts]),
    )


def _joined_codes(parts: list[CodeBook]) -> CodeBook:
    return CodeBook(
        np.concatenate([part.edges for part in parts]), np.concatenate([part.shares for part in parts])
    )
