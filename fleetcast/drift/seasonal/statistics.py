"""Statistics of the newest 3 and 24 hours of a series against its reference.

Owns: which statistics there are, to which of the four metrics each belongs, their formulas over
window sums, and the sums: of a whole stretch at once (`sums_over`), or of a fleet kept up to date
bin by bin (`RunningSums`), where adding a bin costs the same however long the history is. Sums are
of integers and so exact: a window reached bin by bin equals one summed at once. Does not know:
limits, alarms.

Measured on recorded fleets (docs/decisions/drift-quality.md): short windows find sudden changes
within hours and let go of short disturbances; long windows find the slow ones.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast.drift.seasonal.season import (
    ABSENT,
    ABSENT_PLACE,
    LAGS_H,
    LEVEL_STEPS,
    N_CODES,
    SPREAD_STEPS,
    Bytes,
    CodeBook,
    PerSeries,
    Shorts,
    Traits,
    code_counts,
    evidence,
)
from fleetcast.schema import Floats32, Longs

SHORT_H = 3
LONG_H = 24
MIN_COVERAGE = 0.6  # of a window's bins, else its statistics are NaN
MOVE_NOISE = 0.2  # spreads; moves smaller than this say nothing about smoothness
PAIR_LAGS = (1, 2)  # bins between the two values of a pair
# A long window remembers a disturbance for a day after it ended; it counts as long as the newest
# hours still look at least this unusual. Those of the dynamics need less: they are rarer by themselves.
SUPPORT, DYNAMICS_SUPPORT = 0.6, 0.25
SHARE_CAP = 0.97  # a share of 1 would be endlessly surprising

PER, DSS, FDS, ANOMALY = "per", "dss", "fds", "anomaly_rate"
FAMILIES = (PER, DSS, FDS, ANOMALY)


@dataclass(frozen=True)
class Statistic:
    """One way to be different."""

    name: str
    family: str
    is_short: bool
    is_share: bool  # bounded by 1, measured as -log(1 - share)
    floor: float  # the smallest difference that matters, in the statistic's own unit
    says: str
    support: float = SUPPORT  # of a limit the newest hours have to reach for a long window; 0 = none

    @property
    def stands_alone(self) -> bool:
        """Whether a long window counts although the newest hours by themselves look usual."""
        return not self.is_short and not self.support


STATISTICS = (
    Statistic("innovation_3h", PER, True, True, 0.5, "is more or less predictable from bin to bin"),
    Statistic("error_3h", PER, True, True, 0.5, "is forecast worse than usual"),
    Statistic("error_24h", PER, False, True, 0.3, "is forecast worse than usual for a day", 0),
    Statistic("restless_24h", PER, False, False, 0.3, "moves more from bin to bin", DYNAMICS_SUPPORT),
    Statistic("rougher_24h", PER, False, False, 0.1, "is less smooth from bin to bin", DYNAMICS_SUPPORT),
    Statistic("smoother_24h", PER, False, False, 0.15, "is smoother from bin to bin", 0),
    Statistic("shape_3h", DSS, True, True, 0.9, "has left its usual values"),
    Statistic("shape_24h", DSS, False, True, 0.4, "is distributed differently over a day"),
    Statistic("below_24h", DSS, False, True, 0.3, "is too often at the low end"),
    Statistic("above_24h", DSS, False, True, 0.3, "is too often at the high end"),
    Statistic("higher_24h", FDS, False, False, 0.1, "has risen"),
    Statistic("lower_24h", FDS, False, False, 0.1, "has fallen"),
    Statistic("rhythm_down_24h", FDS, False, False, 0.25, "has lost its daily rhythm"),
    Statistic("shifted_24h", FDS, False, True, 0.25, "has its daily rhythm at another time", 0),
    Statistic("outside_3h", ANOMALY, True, True, 0.4, "is where it never was"),
    Statistic("wider_24h", ANOMALY, False, False, 0.5, "scatters more"),
    Statistic("calmer_24h", ANOMALY, False, False, 0.5, "scatters less"),
)
N_STATISTICS = len(STATISTICS)
INDEX = {statistic.name: index for index, statistic in enumerate(STATISTICS)}
IS_SHORT = np.array([statistic.is_short for statistic in STATISTICS])
NEEDS_SUPPORT = np.array([not (item.is_short or item.stands_alone) for item in STATISTICS])
SUPPORTS = np.array([item.support for item in STATISTICS], np.float32)
IS_SHARE = np.array([statistic.is_share for statistic in STATISTICS])
FAMILY_OF = np.array([FAMILIES.index(statistic.family) for statistic in STATISTICS])


def surprise(share: Floats32 | np.float32) -> Floats32:
    """Return -log(1 - share): a share's distance from 0 on a scale without an upper end.

    >>> round(float(surprise(np.float32(0.5))), 4)
    0.6931
    """
    return np.asarray(-np.log1p(-np.minimum(share, SHARE_CAP)), np.float32)


_OWN_FLOORS = np.array([statistic.floor for statistic in STATISTICS], np.float32)
FLOORS = np.where(IS_SHARE, surprise(_OWN_FLOORS), _OWN_FLOORS)
CAPS = np.where(IS_SHARE, 0.98 * float(surprise(np.float32(SHARE_CAP))), np.inf).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Books(PerSeries):
    """The constants the statistics compare with."""

    values: CodeBook  # of scores
    innovations: CodeBook
    errors: CodeBook  # NaN edges where no model errors are known
    tails: NDArray[np.int64]  # (series, 2) code whose share is just over 10 % and 90 %
    log_size: Floats32  # (series,) log of the mean capped |score|
    rhythm_power: Floats32  # (series,) variance of the profile, in ranges squared
    rhythm_noise: Floats32  # (series,) what keeps a flat profile from dividing by nothing
    log_moves: Floats32  # (series, 2) log of the mean move over one and two bins
    order: Floats32  # (series,) usual `order` of its codes; NaN in files of format 2
    distances: Floats32  # (series, lag) of the template from itself moved, and what keeps it from 0


@dataclass(eq=False)
class WindowSums:
    """Integer sums over the windows that end at each time: (series, time) or (.., N_CODES)."""

    short_values: NDArray[np.int32]  # counts of codes
    long_values: NDArray[np.int32]
    short_innovations: NDArray[np.int32]
    short_errors: NDArray[np.int32]
    long_errors: NDArray[np.int32]
    outside: NDArray[np.int32]  # short window
    level: NDArray[np.int64]  # long window, as all that follow
    size: NDArray[np.int64]
    rhythm: NDArray[np.int64]
    rhythm_square: NDArray[np.int64]
    rhythm_level: NDArray[np.int64]
    moved: NDArray[np.int64]  # (distance, series, time)
    n_moved: NDArray[np.int64]
    evidence: NDArray[np.int64]  # (lag, series, time)
    short_pairs: NDArray[np.int64]  # as `pair_sums`
    long_pairs: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class BinCodes:
    """What a window keeps of each bin, (series, bin)."""

    values: Bytes
    innovations: Bytes
    errors: Bytes
    traits: Traits
    moved: Shorts  # (distance, series, bin), as `moves`
    day_bins: Longs  # (bin,) bin of the day


def sums_over(codes: BinCodes, step: int, short: int, long: int) -> WindowSums:
    """Sum the windows that end after each `step` bins of a stretch that starts with a whole window.

    `short` and `long` are in bins, multiples of `step`; the first window ends at bin `long`.
    """
    n_series, n_bins = codes.values.shape
    n_blocks = n_bins // step

    def blocks(array: NDArray[Any]) -> NDArray[Any]:
        return array[:, : n_blocks * step].reshape(n_series, n_blocks, step)

    def windows(per_block: NDArray[np.integer[Any]], length: int) -> NDArray[np.int64]:
        total = np.cumsum(per_block, axis=1)
        total = np.concatenate([np.zeros_like(total[:, :1]), total], axis=1)
        ends = np.arange(long // step, n_blocks + 1)
        return np.asarray(total[:, ends] - total[:, ends - length // step])

    def counts(array: Bytes, length: int) -> NDArray[np.int32]:
        return np.asarray(windows(code_counts(np.asarray(blocks(array), np.uint8)), length), np.int32)

    def sums(array: NDArray[Any], length: int) -> NDArray[np.int64]:
        return windows(blocks(array).sum(axis=2, dtype=np.int64), length)

    traits = codes.traits
    rhythm, level = traits.rhythm.astype(np.int64), traits.level.astype(np.int64)
    return WindowSums(
        short_values=counts(codes.values, short),
        long_values=counts(codes.values, long),
        short_innovations=counts(codes.innovations, short),
        short_errors=counts(codes.errors, short),
        long_errors=counts(codes.errors, long),
        outside=sums(traits.is_outside, short).astype(np.int32),
        level=sums(traits.level, long),
        size=sums(traits.size, long),
        rhythm=sums(traits.rhythm, long),
        rhythm_square=sums(rhythm * rhythm, long),
        rhythm_level=sums(rhythm * level, long),
        moved=np.stack([sums(np.maximum(part, 0), long) for part in codes.moved]),
        n_moved=np.stack([sums(part >= 0, long) for part in codes.moved]),
        evidence=np.stack([sums(part, long) for part in traits.evidence]),
        short_pairs=pair_sums(codes.values, np.arange(long // step, n_blocks + 1) * step, short),
        long_pairs=pair_sums(codes.values, np.arange(long // step, n_blocks + 1) * step, long),
    )


def pair_sums(codes: Bytes, ends: Longs, length: int) -> NDArray[np.int64]:
    """Return (lag, 2, series, time): how far the codes of pairs lie apart in all, and how many pairs.

    A pair has both ends in its window, which ends before the bin `ends` and is `length` bins long.
    """
    n_series, n_bins = codes.shape
    out = np.empty((len(PAIR_LAGS), 2, n_series, len(ends)), np.int64)
    for row, lag in enumerate(PAIR_LAGS):
        for column, part in enumerate(_pairs(codes[:, lag:], codes[:, :-lag])):
            total = np.zeros((n_series, n_bins + 1), np.int64)
            np.cumsum(part, axis=1, out=total[:, lag + 1 :])
            out[row, column] = total[:, ends] - total[:, ends - length + lag]
    return out


def _pairs(later: Bytes, earlier: Bytes) -> tuple[Shorts, NDArray[np.bool_]]:
    """Return how far apart the codes of pairs are, 0 where one is absent, and where both are present."""
    known = (later != ABSENT) & (earlier != ABSENT)
    apart = np.abs(later.astype(np.int16) - earlier)
    return np.asarray(np.where(known, apart, 0), np.int16), np.asarray(known)


def order(pairs: NDArray[np.int64], least: float = 1) -> Floats32:
    """Return log of how far one bin moves a series' code, over how far two do; NaN below `least` pairs.

    0 = values in random order, -log 2 = a straight line. Codes are ranks in the reference: a spike is
    one move among many.

    Args:
        pairs: (lag, 2, series, ...), as `pair_sums`.
    """
    known = np.where(pairs[:, 1] >= least, pairs[:, 1], np.nan)
    one, two = pairs[:, 0] / known + 1  # a code more: a series that stands still is in no order
    return np.asarray(np.log(one / two), np.float32)


def statistics(sums: WindowSums, books: Books, short: int, long: int) -> Floats32:
    """Return (N_STATISTICS, series, time); NaN where a window is too thin to judge.

    Args:
        short, long: lengths of the windows in bins.
    """
    n_short = _enough(sums.short_values.sum(axis=-1), short)
    n_long = _enough(sums.long_values.sum(axis=-1), long)
    out = np.full((N_STATISTICS, *n_short.shape), np.nan, np.float32)
    gap = _gaps(sums.short_values, n_short, books.values)
    out[INDEX["shape_3h"]] = np.abs(gap).max(axis=-1)
    gap = _gaps(sums.long_values, n_long, books.values)
    out[INDEX["shape_24h"]] = np.abs(gap).max(axis=-1)
    tails = np.take_along_axis(gap, books.tails[:, None, :], axis=2)
    out[INDEX["below_24h"]], out[INDEX["above_24h"]] = tails[..., 0], -tails[..., 1]
    n_moves = _enough(sums.short_innovations.sum(axis=-1), short)
    gap = _gaps(sums.short_innovations, n_moves, books.innovations)
    out[INDEX["innovation_3h"]] = np.abs(gap).max(axis=-1)
    for name, errors, length in (
        ("error_3h", sums.short_errors, short),
        ("error_24h", sums.long_errors, long),
    ):
        n_errors = _enough(errors.sum(axis=-1), length)
        out[INDEX[name]] = (-_gaps(errors, n_errors, books.errors)).max(axis=-1)
    out[INDEX["outside_3h"]] = sums.outside / n_short
    found = sums.evidence / (n_long * books.distances.T[..., None])
    out[INDEX["shifted_24h"]] = found.max(axis=0)
    out[IS_SHARE] = surprise(out[IS_SHARE])
    # a day is smoother only while its newest hours are, too
    newest, day = (
        order(sums.short_pairs, MIN_COVERAGE**2 * short),
        order(sums.long_pairs, MIN_COVERAGE**2 * long),
    )
    out[INDEX["smoother_24h"]] = books.order[:, None] - np.maximum(newest, day)
    _moments(out, sums, books, n_long)
    return out


def _moments(out: Floats32, sums: WindowSums, books: Books, n: Floats32) -> None:
    level = sums.level / (n * LEVEL_STEPS)
    out[INDEX["higher_24h"]], out[INDEX["lower_24h"]] = level, -level
    size = np.maximum(sums.size / (n * SPREAD_STEPS), 1e-3)
    wider = np.log(size) - books.log_size[:, None]
    out[INDEX["wider_24h"]], out[INDEX["calmer_24h"]] = wider, -wider
    n_moved = np.where(sums.n_moved >= MIN_COVERAGE**2 * n, sums.n_moved, np.nan)
    one, two = log_moves(sums.moved / n_moved)
    usual_one, usual_two = books.log_moves.T[..., None]
    out[INDEX["restless_24h"]] = one - usual_one
    # without memory one bin moves a value as far as two do; rougher than that is not counted
    out[INDEX["rougher_24h"]] = np.minimum(one - two, 0) - np.minimum(usual_one - usual_two, 0)
    rhythm = sums.rhythm / (n * LEVEL_STEPS)
    power = sums.rhythm_square / (n * LEVEL_STEPS**2) - rhythm**2
    together = sums.rhythm_level / (n * LEVEL_STEPS**2) - rhythm * level
    swing = together / (np.maximum(power, books.rhythm_power[:, None]) + books.rhythm_noise[:, None])
    out[INDEX["rhythm_down_24h"]] = -swing


def log_moves(mean: NDArray[Any]) -> Floats32:
    """Return the log of mean moves, in 1 / SPREAD_STEPS, with a floor that fades in."""
    return np.asarray(np.log(mean / SPREAD_STEPS + MOVE_NOISE), np.float32)


def _enough(counts: NDArray[np.int64], length: int) -> Floats32:
    return np.asarray(np.where(counts >= MIN_COVERAGE * length, counts, np.nan), np.float32)


def _gaps(counts: NDArray[np.int32], n: Floats32, book: CodeBook) -> Floats32:
    """Return the window's distribution minus the reference's, at each code."""
    shares = np.cumsum(counts, axis=-1, dtype=np.int32) / n[..., None]
    return np.asarray(shares - book.shares[:, None, :], np.float32)


def tail_codes(book: CodeBook) -> NDArray[np.int64]:
    """Return (series, 2): the codes at which a reference has passed 10 % and 90 %.

    The last code always has a share of 1 and can show no difference: it is never a tail.
    """
    places = [(book.shares < level - 1e-6).sum(axis=1) for level in (0.1, 0.9)]
    return np.asarray(np.minimum(np.stack(places, axis=1), book.shares.shape[1] - 2), np.int64)


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
        self._pairs = np.zeros((2, len(PAIR_LAGS), 2, n_series), np.int64)  # short and long window

    def add(self, codes: BinCodes) -> None:
        """Take in one bin, (series, 1), and let the oldest go."""
        place = self.n_bins % self.long
        if self.n_bins >= self.long:
            self._count(place, place_short=None, sign=-1)
            old = evidence(self._template, self.place[place][:, None], self.day_bins[[place]])
            self._evidence -= old[:, :, 0]
            self._pair(self._pairs[1:], place, 1, sign=-1)
        if self.n_bins >= self.short:
            oldest = (self.n_bins - self.short) % self.long
            self._count(None, place_short=oldest, sign=-1)
            self._pair(self._pairs[:1], oldest, 1, sign=-1)
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
        self._pair(self._pairs, place, -1, sign=1)
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

    def _pair(self, sums: NDArray[np.int64], place: int, direction: int, *, sign: int) -> None:
        """Add the pairs of one bin with those after it (1) or before it (-1); rings start as absent."""
        for row, lag in enumerate(PAIR_LAGS):
            apart, known = _pairs(self.values[place], self.values[(place + direction * lag) % self.long])
            sums[:, row, 0] += sign * apart
            sums[:, row, 1] += sign * known

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
            *self._pairs[..., None],
        )

    def newest(self, ring: NDArray[np.generic], bins: int) -> NDArray[np.generic]:
        """Return (bin, series): the newest `bins` of a ring, oldest first."""
        bins = min(bins, self.n_bins, self.long)
        return ring[np.arange(self.n_bins - bins, self.n_bins) % self.long]
