"""Samples of many series in columns, and the rates of those that are counters.

Owns: the order of samples, what a counter's fall means, staleness marks.
Does not know: names or labels; a series is a number.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetcast.schema import Codes, Floats, Longs

NEVER = int(np.iinfo(np.int64).min)
STALE_BITS = 0x7FF0000000000002  # the NaN by which Prometheus says that a series has ended


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Samples in columns."""

    series: Codes  # (sample,)
    timestamps_ms: Longs  # (sample,)
    values: Floats  # (sample,) any double, staleness marks too

    def __len__(self) -> int:
        return len(self.series)

    def where(self, chosen: NDArray[np.bool_] | Longs | slice) -> "Samples":
        """Return some of the samples."""
        return Samples(self.series[chosen], self.timestamps_ms[chosen], self.values[chosen])

    @property
    def are_stale_marks(self) -> NDArray[np.bool_]:
        """Return which samples say that their series has ended."""
        return np.equal(self.values.view(np.int64), STALE_BITS)


class CounterMemory:
    """The newest sample of every series, by which the next one's rate is known."""

    def __init__(self, max_gap_s: float) -> None:
        self._max_gap_ms = max_gap_s * 1000.0
        self.last_ms: Longs = np.full(64, NEVER, dtype=np.int64)
        self._last_value: Floats = np.full(64, np.nan)

    def ensure(self, n_series: int) -> None:
        """Make room for series 0 to n_series - 1."""
        have = len(self.last_ms)
        if n_series > have:
            n_more = max(n_series - have, have // 2)
            self.last_ms = np.concatenate((self.last_ms, np.full(n_more, NEVER, dtype=np.int64)))
            self._last_value = np.concatenate((self._last_value, np.full(n_more, np.nan)))

    def keep(self, old_numbers: Longs) -> None:
        """Forget all series but these, which are numbered anew in this order."""
        self.last_ms = self.last_ms[old_numbers]
        self._last_value = self._last_value[old_numbers]
        self.ensure(64)

    def take(self, samples: Samples) -> tuple[Samples, Floats]:
        """Return the samples that are news, by series and time, and each one's rate per second.

        A sample no newer than its series' newest is a repetition or too late, and left out.
        Where a counter fell it began again at 0 in between, as Prometheus reads it. There is no
        rate (NaN) without a sample before, over more than the longest gap, or from a value that
        is no number.
        """
        news = self._news(samples)
        series, times = news.series, news.timestamps_ms
        is_first = np.ones(len(news), dtype=np.bool_)
        is_first[1:] = series[1:] != series[:-1]
        before_ms = np.where(is_first, self.last_ms[series], np.roll(times, 1))
        before = np.where(is_first, self._last_value[series], np.roll(news.values, 1))
        with np.errstate(invalid="ignore", over="ignore"):
            increase = news.values - before
            increase = np.where(increase < 0, news.values, increase)
            elapsed_ms = times.astype(np.float64) - before_ms
            rates = increase / (elapsed_ms / 1000.0)
        usable = (before_ms != NEVER) & (elapsed_ms <= self._max_gap_ms) & (increase >= 0)
        is_last = np.roll(is_first, -1)
        self.last_ms[series[is_last]] = times[is_last]
        self._last_value[series[is_last]] = news.values[is_last]
        return news, np.where(usable, rates, np.nan)

    def _news(self, samples: Samples) -> Samples:
        """Return the samples newer than what is known, sorted, one per series and time."""
        samples = samples.where(samples.timestamps_ms > self.last_ms[samples.series])
        series, times = samples.series, samples.timestamps_ms
        samples = samples.where(np.lexsort((times, series)))
        series, times = samples.series, samples.timestamps_ms
        is_other = np.ones(len(samples), dtype=np.bool_)
        is_other[1:] = (series[1:] != series[:-1]) | (times[1:] != times[:-1])
        return samples.where(is_other)
