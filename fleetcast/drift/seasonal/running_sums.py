"""Window sums of a whole fleet, kept up to date bin by bin.

Owns: rings of the last day and the integer sums over them. Adding a bin costs the same however
long the reference or the history is; integers make the sums exact, so that a window reached
bin by bin equals one summed at once. Does not know: what the sums say.
"""

import numpy as np
from numpy.typing import NDArray

from fleetcast.drift.seasonal.residuals import ABSENT, N_CODES, Shorts
from fleetcast.drift.seasonal.shifted_day import ABSENT_PLACE, LAGS_H, evidence
from fleetcast.drift.seasonal.statistics import BinCodes, WindowSums


class RunningSums:
    """Sums over the newest `short` and `long` bins of every series."""

    def __init__(self, template: Shorts, short: int, long: int) -> None:
        self._template = template  # (series, bin of day)
        n_series = len(template)
        self.short, self.long, self.n_bins = short, long, 0
        self._rows = np.arange(n_series)
        self.values = np.full((long, n_series), ABSENT, np.uint8)  # rings: newest at (n_bins - 1) % long
        self.innovations = np.full((long, n_series), ABSENT, np.uint8)
        self.errors = np.full((long, n_series), ABSENT, np.uint8)
        self.level = np.zeros((long, n_series), np.int16)
        self.size = np.zeros((long, n_series), np.int16)
        self.rhythm = np.zeros((long, n_series), np.int16)
        self.outside = np.zeros((long, n_series), np.bool_)
        self.place = np.full((long, n_series), ABSENT_PLACE, np.int16)
        self.moved = np.full((long, 2, n_series), -1, np.int16)
        self.day_bins = np.zeros(long, np.int64)
        # one column more than codes: absent values are counted there and never read
        self._counts = np.zeros((5, n_series, N_CODES + 1), np.int16)
        self._sums = np.zeros((6, n_series), np.int64)
        self._moved = np.zeros((2, 2, n_series), np.int64)  # sums and counts of each distance
        self._evidence = np.zeros((len(LAGS_H), n_series), np.int64)

    def add(self, codes: BinCodes) -> None:
        """Take in one bin, (series, 1), and let the oldest go."""
        place = self.n_bins % self.long
        if self.n_bins >= self.long:
            self._count(place, place_short=None, sign=-1)
            old = evidence(self._template, self.place[place][:, None], self.day_bins[[place]])
            self._evidence -= old[:, :, 0]
        if self.n_bins >= self.short:
            self._count(None, place_short=(self.n_bins - self.short) % self.long, sign=-1)
        self.values[place] = codes.values[:, 0]
        self.innovations[place] = codes.innovations[:, 0]
        self.errors[place] = codes.errors[:, 0]
        traits = codes.traits
        self.level[place], self.size[place] = traits.level[:, 0], traits.size[:, 0]
        self.rhythm[place], self.outside[place] = traits.rhythm[:, 0], traits.is_outside[:, 0]
        self.place[place], self.moved[place] = traits.place[:, 0], codes.moved[:, :, 0]
        self.day_bins[place] = codes.day_bins[0]
        self._count(place, place_short=place, sign=1)
        self._evidence += traits.evidence[:, :, 0]
        self.n_bins += 1

    def _count(self, place: int | None, *, place_short: int | None, sign: int) -> None:
        if place_short is not None:
            for table, ring in enumerate((self.values, self.innovations, self.errors)):
                self._tally(table, ring[place_short], sign)
            self._sums[0] += sign * self.outside[place_short]
        if place is not None:
            self._tally(3, self.values[place], sign)
            self._tally(4, self.errors[place], sign)
            level, rhythm = self.level[place].astype(np.int64), self.rhythm[place].astype(np.int64)
            parts = (level, self.size[place], rhythm, rhythm * rhythm, rhythm * level)
            for row, part in enumerate(parts, 1):
                self._sums[row] += sign * part
            moved = self.moved[place]
            self._moved[0] += sign * np.maximum(moved, 0)
            self._moved[1] += sign * (moved >= 0)

    def _tally(self, table: int, codes: NDArray[np.uint8], sign: int) -> None:
        self._counts[table, self._rows, np.minimum(codes, N_CODES)] += np.int16(sign)

    def window_sums(self) -> WindowSums:
        """Return the sums of the windows that end now, (series, 1)."""
        counts = self._counts[:, :, None, :N_CODES].astype(np.int32)
        outside, *others = (row[:, None] for row in self._sums)
        others += [self._moved[0][..., None], self._moved[1][..., None], self._evidence[..., None]]
        short_values, short_innovations, short_errors, long_values, long_errors = counts
        return WindowSums(
            short_values,
            long_values,
            short_innovations,
            short_errors,
            long_errors,
            outside.astype(np.int32),
            *others,
        )

    def newest(self, ring: NDArray[np.generic], bins: int) -> NDArray[np.generic]:
        """Return (bin, series): the newest `bins` of a ring, oldest first."""
        bins = min(bins, self.n_bins, self.long)
        return ring[np.arange(self.n_bins - bins, self.n_bins) % self.long]
