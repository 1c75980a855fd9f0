"""Analogues: what followed when a series last moved as it moves now.

Owns: the two ways of comparing movements, the search over a series' own last week, and what the
nearest moments say about the next bins. numpy only. Does not know: the network, other series, units
(it works on the scale of `scale.py`), who mixes its answers.

A moment is described by how the series came to its present value, so levels do not matter:

    near    z[t-l] - z[t] for l = 1..23 bins, the older the lighter (weights 1 falling to .3)
    far     z[t-l] - z[t] for l = 1..12, then 6 means of 3 bins and 6 means of 12 bins (8.5 hours)

The forecast at lead h is z[t] + median over the nearest moments c of (z[c+h] - z[c]). Moments whose
z[c+h] is not known yet cannot be asked about lead h; leads are asked in three groups.
Source: method of analogues (Lorenz 1969), k-nearest-neighbour forecasting on differenced windows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetcast.schema import Floats, Floats32, Longs

KINDS = ("near", "far")
LIBRARY_BINS = 2016  # a week of 5-minute bins: the longest that a restart brings back
NEIGHBOURS = 8
LOOK_BACK = 102  # bins before a moment that describe it
_NEAR_LAGS = 23
_FAR_LAGS = 12
_SHORT, _LONG = 3, 12  # bins in a mean of `far`
_MEANS = 6
_GROUPS = ((1, 1), (2, 12), (13, 96))  # leads asked of the same moments, for a horizon of 96
_BLOCK = 128  # series at a time: their arrays stay in the processor's cache

Complex = NDArray[np.complex64]


@dataclass(frozen=True, slots=True, eq=False)
class AnalogueForecast:
    """What the nearest moments say; NaN for a series with too short a history."""

    median: Floats32  # (kind, series, horizon)
    low: Floats32  # (kind, series, horizon) 2nd of 8
    high: Floats32  # (kind, series, horizon) 7th of 8


def analogue_forecast(history: Floats32, n_known: Longs, n_horizon: int) -> AnalogueForecast:
    """Forecast every series from the moments of its own past that resemble the present.

    Args:
        history: (series, bin) on the experts' scale, gaps carried forward; the last column is now.
        n_known: (series,) columns, counted from the right, since the first value.
        n_horizon: bins ahead.
    """
    n_series, n_bins = history.shape
    shape = (len(KINDS), n_series, n_horizon)
    answer = AnalogueForecast(*(np.full(shape, np.nan, np.float32) for _ in range(3)))
    first = max(0, n_bins - LIBRARY_BINS - LOOK_BACK)
    if n_bins - first <= LOOK_BACK + NEIGHBOURS:
        return answer
    for start in range(0, n_series, _BLOCK):
        rows = slice(start, start + _BLOCK)
        library = _Library(history[rows, first:], n_known[rows])
        for kind, distances in enumerate((library.near(), library.far())):
            for leads, moments, able in library.nearest(distances, n_horizon):
                moved = library.moves(moments, leads, able)  # (neighbour, series, lead), rising
                now = history[rows, -1][able, None]
                places = (kind, start + able[:, None], leads - 1)
                answer.median[places] = now + (moved[3] + moved[4]) / 2
                answer.low[places] = now + moved[1]
                answer.high[places] = now + moved[6]
    return answer


class _Library:
    """The past of some series, prepared to be compared with their present."""

    def __init__(self, history: Floats32, n_known: Longs) -> None:
        self._z = history - history[:, -1:]  # levels cancel; small numbers keep their digits
        self.n_bins = history.shape[1]
        self.n_known = n_known
        self._size = _fast_size(self.n_bins + LOOK_BACK + 1)
        self._spectrum = self._transform(self._z)

    def near(self) -> Floats32:
        """Return (series, bin) squared distances of `near`, up to a constant of each series."""
        weights = np.zeros(_NEAR_LAGS + 1, np.float32)
        weights[1:] = np.linspace(1.0, 0.3, _NEAR_LAGS)
        kernel = np.zeros((len(self._z), _NEAR_LAGS + 1), np.float32)
        kernel[:, 1:] = weights[1:] * self._z[:, -2 : -2 - _NEAR_LAGS : -1]
        weighed = self._transform(weights[None])
        lagged = self._inverse(self._spectrum * weighed)
        squares = self._transform(self._z**2) * weighed
        return self._distances(squares, kernel, lagged, weights.sum())

    def far(self) -> Floats32:
        """Return (series, bin) squared distances of `far`, up to a constant of each series."""
        begin = _FAR_LAGS + 1 + _SHORT * _MEANS
        ends = [(_FAR_LAGS + 1 + _SHORT * number, _SHORT) for number in range(_MEANS)]
        ends += [(begin + _LONG * number, _LONG) for number in range(_MEANS)]
        sums = _cumulate(self._z)
        boxes = {length: _past_sums(sums, 0, length) / np.float32(length) for length in (_SHORT, _LONG)}
        squared = {length: box**2 for length, box in boxes.items()}
        kernel = np.zeros((len(self._z), LOOK_BACK + 1), np.float32)
        kernel[:, 1 : _FAR_LAGS + 1] = self._z[:, -2 : -2 - _FAR_LAGS : -1]
        lagged = _past_sums(sums, 1, _FAR_LAGS)
        squares = _past_sums(_cumulate(self._z**2), 1, _FAR_LAGS)
        for lag, length in ends:
            kernel[:, lag : lag + length] = boxes[length][:, -1 - lag, None] / np.float32(length)
            squares[:, lag:] += squared[length][:, :-lag]
        lagged += _past_sums(sums, _FAR_LAGS + 1, _SHORT * _MEANS) / np.float32(_SHORT)
        lagged += _past_sums(sums, begin, _LONG * _MEANS) / np.float32(_LONG)
        found = self._distances(None, kernel, lagged, np.float32(_FAR_LAGS + 2 * _MEANS))
        found += squares
        return found

    def _distances(
        self, squares: Complex | None, kernel: Floats32, lagged: Floats32, n_feature: np.float32
    ) -> Floats32:
        """Return sum over features of (past - present)^2, up to a constant of each series.

        A feature is y - z with y a lagged value or mean, so with g the features of the present (its
        z is 0): sum (y - z - g)^2 = sum y^2 - 2 sum g y - 2 z sum y + 2 z sum g + n z^2 + const.
        """
        cross = -2 * self._spectrum * self._transform(kernel)
        found = self._inverse(cross if squares is None else squares + cross)
        found += self._z * (2 * kernel.sum(axis=1, keepdims=True) - 2 * lagged + n_feature * self._z)
        return found

    def nearest(self, distances: Floats32, n_horizon: int) -> Iterator[tuple[Longs, Longs, Longs]]:
        """Yield leads, the moments that know them (series, neighbour), and which series have enough.

        The nearest of the newest moments and of those already found are the nearest of all, so only
        the first group looks at the whole library.
        """
        oldest = self.n_bins - self.n_known + LOOK_BACK  # (series,)
        columns = np.arange(self.n_bins)
        distances[columns < np.maximum(oldest, LOOK_BACK)[:, None]] = np.inf
        found = np.empty((len(distances), 0), np.int64)
        begin = 0  # moments from here on were not looked at yet
        for first, last in reversed(_groups(n_horizon)):
            end = max(begin, self.n_bins - last)  # later moments do not know lead `last` yet
            fresh = np.broadcast_to(columns[begin:end], (len(distances), end - begin))
            moments = np.concatenate([found, fresh], axis=1)
            scores = np.take_along_axis(distances, moments, axis=1) if begin else distances[:, :end]
            if scores.shape[1] > NEIGHBOURS:
                chosen = np.argpartition(scores, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
                found = np.take_along_axis(moments, chosen, axis=1)
                begin = end
                able = np.isfinite(np.take_along_axis(scores, chosen, axis=1)).all(axis=1)
                yield np.arange(first, last + 1), found, np.flatnonzero(able)

    def moves(self, moments: Longs, leads: Longs, rows: Longs) -> Floats32:
        """Return (neighbour, row, lead): how far the series moved after those moments, rising."""
        moments = moments[rows].T  # (neighbour, row)
        flat = self._z.ravel()
        begin = rows * self.n_bins + moments
        moved = flat[begin[..., None] + leads] - flat[begin][..., None]
        moved.sort(axis=0)
        return np.asarray(moved, np.float32)

    def _transform(self, values: Floats32) -> Complex:
        padded = np.zeros((len(values), self._size), np.float32)
        padded[:, : values.shape[1]] = values
        return np.asarray(np.fft.rfft(padded, axis=1), np.complex64)

    def _inverse(self, spectrum: Complex) -> Floats32:
        return np.asarray(np.fft.irfft(spectrum, self._size, axis=1)[:, : self.n_bins], np.float32)


def _cumulate(values: Floats32) -> Floats:
    """Return (series, bin + 1) the sum of all bins before each one."""
    sums = np.zeros((len(values), values.shape[1] + 1))
    np.cumsum(values, axis=1, dtype=np.float64, out=sums[:, 1:])
    return sums


def _past_sums(sums: Floats, lag: int, length: int) -> Floats32:
    """Return (series, bin) the sum of the `length` bins that end `lag` before each bin, 0 where cut off."""
    last = sums.shape[1] - lag
    found = np.zeros((len(sums), sums.shape[1] - 1), np.float32)
    found[:, lag + length - 1 :] = sums[:, length:last] - sums[:, : last - length]
    return found


def _groups(n_horizon: int) -> list[tuple[int, int]]:
    """Return the groups of leads of a horizon.

    >>> _groups(96), _groups(8)
    ([(1, 1), (2, 12), (13, 96)], [(1, 1), (2, 8)])
    """
    return [(first, min(last, n_horizon)) for first, last in _GROUPS if first <= n_horizon]


def _fast_size(least: int) -> int:
    """Return a length of at least `least` that is 2^a * 3^b: fast to transform.

    >>> _fast_size(2117)
    2187
    """
    sizes = (2**a * 3**b for a in range(14) for b in range(9))
    return int(min(size for size in sizes if size >= least))
