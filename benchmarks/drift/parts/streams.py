"""Two streaming change detectors, small: ADWIN (Bifet and Gavalda 2007) and Page-Hinkley (1954)."""

import copy
import functools
import math

import numpy as np
from numpy.typing import NDArray

from benchmarks.drift.parts.data import DAY
from benchmarks.drift.parts.rules import STEP, Stretch

Bools = NDArray[np.bool_]
WARM_DAYS = 7  # of the reference that a detector sees first
HOLD_BINS = DAY  # a detection counts as an alarm for a day
ADWIN_DELTA = 0.002
ADWIN_CLOCK = 32
ADWIN_BUCKETS = 5
PH_DELTA, PH_LAMBDA, PH_ALPHA, PH_MIN = 0.005, 50.0, 0.9999, 30


class Adwin:
    """An adaptive window over numbers: cut where two parts have different means."""

    def __init__(self) -> None:
        self._rows: list[list[tuple[float, float]]] = [[]]  # per row: (total, variance sum) of 2**row values
        self._n, self._total, self._variance, self._clock = 0, 0.0, 0.0, 0

    def update(self, value: float) -> bool:
        """Take in one value; return whether the window was cut."""
        if self._n:
            self._variance += (value - self._total / self._n) ** 2 * self._n / (self._n + 1)
        self._n, self._total = self._n + 1, self._total + value
        self._rows[0].append((value, 0.0))
        self._compress()
        self._clock += 1
        return self._clock % ADWIN_CLOCK == 0 and self._n > 10 and self._shrink()

    def _compress(self) -> None:
        for row, buckets in enumerate(self._rows):
            if len(buckets) <= ADWIN_BUCKETS:
                return
            size = 2**row
            (first, own), (second, other) = buckets.pop(0), buckets.pop(0)
            joined = own + other + (first / size - second / size) ** 2 * size / 2
            if row + 1 == len(self._rows):
                self._rows.append([])
            self._rows[row + 1].append((first + second, joined))

    def _shrink(self) -> bool:
        was_cut = False
        while self._cuts():
            was_cut = True
            row = max(index for index, buckets in enumerate(self._rows) if buckets)
            total, variance = self._rows[row].pop(0)
            size = 2**row
            self._n, self._total = self._n - size, self._total - total
            apart = (total / size - self._total / self._n) ** 2 * size * self._n / (size + self._n)
            self._variance = max(self._variance - variance - apart, 0.0)
        return was_cut

    def _cuts(self) -> bool:
        n_old, total_old = 0, 0.0
        spread, log = self._variance / self._n, math.log(2 * math.log(self._n) / ADWIN_DELTA)
        for row in range(len(self._rows) - 1, -1, -1):
            for total, _ in self._rows[row]:
                n_old, total_old = n_old + 2**row, total_old + total
                n_new = self._n - n_old
                if n_old < 5 or n_new < 5:
                    continue
                parts = 1 / (n_old - 4) + 1 / (n_new - 4)
                bound = math.sqrt(2 * parts * spread * log) + 2 / 3 * log * parts
                if abs(total_old / n_old - (self._total - total_old) / n_new) > bound:
                    return True
        return False


class PageHinkley:
    """Cumulated deviations from the running mean, upwards and downwards."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._n, self._mean, self._up, self._down, self._low, self._high = 0, 0.0, 0.0, 0.0, 0.0, 0.0

    def update(self, value: float) -> bool:
        """Take in one value; return whether a change was found."""
        self._n += 1
        self._mean += (value - self._mean) / self._n
        self._up = PH_ALPHA * self._up + value - self._mean - PH_DELTA
        self._down = PH_ALPHA * self._down + value - self._mean + PH_DELTA
        self._low, self._high = min(self._low, self._up), max(self._high, self._down)
        found = max(self._up - self._low, self._high - self._down) > PH_LAMBDA
        if self._n < PH_MIN or not found:
            return False
        self._reset()
        return True


@functools.lru_cache(maxsize=4)  # the trials of one series follow each other
def _warmed(
    kind: type[Adwin] | type[PageHinkley], reference: bytes
) -> tuple[Adwin | PageHinkley, float, float]:
    """Return a detector that has seen the end of a reference, and the reference's mean and scale."""
    values = np.frombuffer(reference, np.float64)
    known = values[np.isfinite(values)]
    mean, scale = float(known.mean()), float(known.std()) or 1.0
    detector = kind()
    for value in ((values[-WARM_DAYS * DAY :] - mean) / scale).tolist():
        if value == value:
            detector.update(value)
    return detector, mean, scale


def streamed(kind: type[Adwin] | type[PageHinkley], stretch: Stretch) -> Bools:
    """Run a detector over the end of the reference and the stretch; values are standardised."""
    detector, mean, scale = copy.deepcopy(_warmed(kind, stretch.reference.tobytes()))
    last = -HOLD_BINS - 1
    alarms = np.zeros(len(stretch.values), np.bool_)
    for place, value in enumerate(((stretch.values - mean) / scale).tolist()):
        if value == value and detector.update(value):
            last = place
        alarms[place] = place - last < HOLD_BINS
    return np.asarray(alarms[DAY - 1 :: STEP])
