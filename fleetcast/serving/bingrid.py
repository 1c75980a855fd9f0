"""The rolling array of bin means behind the history: one row per server, one column per bin.

Owns: memory and column arithmetic. A window is a view, not a copy: the array has spare columns
on its right and is moved to the left once these are used up, a few times a day.
Does not know: records, clocks, or when a bin is closed. Not thread safe.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast.schema import Codes, Floats, Floats32, Longs

_SPARE_BINS = 96  # three moves a day at 5 minutes; more would cost more memory than time
_FIRST_ROWS = 32
_BLOCK_ROWS = 256  # moved at once: a copy of everything would double the memory


class BinGrid:
    """Means (server, metric, bin) of the `keep_bins` newest bins; NaN = no record."""

    def __init__(self, n_metrics: int, bin_ms: int, keep_bins: int) -> None:
        self.bin_ms = bin_ms
        self.keep_bins = keep_bins
        self._values: Floats32 = np.full(
            (_FIRST_ROWS, n_metrics, keep_bins + _SPARE_BINS), np.nan, dtype=np.float32
        )
        self._end = keep_bins  # one past the newest column
        self.newest_bin_ms: int | None = None
        self.oldest_used_ms: int | None = None  # oldest bin that was ever given a value

    def advance(self, bin_ms: int) -> None:
        """Make `bin_ms` the newest column; bins jumped over stay empty."""
        if self.newest_bin_ms is None:
            self.newest_bin_ms = bin_ms
            return
        steps = (bin_ms - self.newest_bin_ms) // self.bin_ms
        assert steps >= 0, f"bins close in order: {bin_ms} after {self.newest_bin_ms}"
        self.newest_bin_ms = bin_ms
        if steps >= self.keep_bins:  # a gap longer than the memory
            self._values[:] = np.nan
            self._end = self.keep_bins
            self.oldest_used_ms = None
            return
        if self._end + steps > self._values.shape[2]:
            self._move_left(self.keep_bins - steps)
            self._end = self.keep_bins
        else:
            self._end += steps

    def put(self, rows: Codes, bin_starts_ms: Longs, means: Floats) -> None:
        """Set the cells of `rows` at `bin_starts_ms` (cell, metric); those out of reach are dropped."""
        assert self.newest_bin_ms is not None, "advance first"
        columns = self._end - 1 - (self.newest_bin_ms - bin_starts_ms) // self.bin_ms
        is_kept = (columns < self._end) & (columns >= self._end - self.keep_bins)
        if not is_kept.any():
            return
        self._reserve(int(rows.max()) + 1)
        self._values[rows[is_kept], :, columns[is_kept]] = means[is_kept]
        oldest = int(bin_starts_ms[is_kept].min())
        self.oldest_used_ms = oldest if self.oldest_used_ms is None else min(self.oldest_used_ms, oldest)

    def view(self, n_rows: int) -> Floats32:
        """Return (row, metric, bin) from the oldest bin used to the newest; good until the next change."""
        self._reserve(n_rows)
        return self._values[:n_rows, :, self._end - self._n_used() : self._end]

    def span(self, rows: NDArray[np.integer[Any]], last_bin_ms: int, n_bins: int) -> Floats32:
        """Return a copy (row, metric, bin) of `n_bins` bins up to `last_bin_ms`; NaN out of reach."""
        values = np.full((len(rows), self._values.shape[1], n_bins), np.nan, dtype=np.float32)
        if self.newest_bin_ms is None or not len(rows):
            return values
        stop = self._end - (self.newest_bin_ms - last_bin_ms) // self.bin_ms
        first, last = max(stop - n_bins, self._end - self.keep_bins), min(stop, self._end)
        if first < last:
            values[:, :, first - stop + n_bins : last - stop + n_bins] = self._values[rows, :, first:last]
        return values

    def keep_rows(self, rows: Codes) -> None:
        """Forget every row but `rows`, which move up in this order."""
        kept = self._values[rows]
        self._values[: len(rows)] = kept
        self._values[len(rows) :] = np.nan

    def _n_used(self) -> int:
        if self.newest_bin_ms is None or self.oldest_used_ms is None:
            return 0
        return min(self.keep_bins, (self.newest_bin_ms - self.oldest_used_ms) // self.bin_ms + 1)

    def _move_left(self, keep: int) -> None:
        """Bring the newest `keep` columns to the left edge; all others become empty."""
        for first in range(0, len(self._values), _BLOCK_ROWS):
            block = self._values[first : first + _BLOCK_ROWS]
            block[:, :, :keep] = block[:, :, self._end - keep : self._end].copy()
            block[:, :, keep:] = np.nan

    def _reserve(self, n_rows: int) -> None:
        have, n_metrics, width = self._values.shape
        if n_rows <= have:
            return
        # in place: the system moves pages, and a copy of everything would double the memory; views
        # that are still referred to are not used any more (see `view`)
        self._values.resize((max(n_rows, have + _BLOCK_ROWS), n_metrics, width), refcheck=False)
        self._values[have:] = np.nan
