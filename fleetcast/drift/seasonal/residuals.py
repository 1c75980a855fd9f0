"""What is left of a value when its usual value at that time of day is taken away.

Owns: the profile of every series (`Shape`), the residuals it leaves (`Traits`), and the code
books that turn a residual into its place in the reference. A code says how many edges lie below
a value and how many are equal to it, so that a value that is exactly the usual one (a disk that
stands still) has a code of its own. Everything here keeps its value when a metric changes its
unit. numpy only. Does not know: windows, limits, alarms.
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from fleetcast.drift.seasonal.season import DayClock
from fleetcast.drift.seasonal.shifted_day import evidence, places
from fleetcast.schema import Floats32, Longs

N_EDGES = 24
N_CODES = 2 * N_EDGES + 1
ABSENT = 255  # the code of a value that is not there
SCORE_CAP = 6.0  # spreads; beyond it a value is "far off", whatever it is
LEVEL_CAP = 0.5  # of the range: the most one value moves a mean
LEVEL_STEPS = 1024  # integers per range: sums of a window are exact, in whatever order
SPREAD_STEPS = 1000
OUTSIDE_MARGIN = 0.05  # of the range, beyond the reference's extremes

Bytes = NDArray[np.uint8]
Shorts = NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class Shape:
    """The rhythm, spread and range of each series; every array has a row per series."""

    profiles: Floats32  # (series, slot)
    weekly_rows: Longs  # (series,) row in weekday_profiles, -1 = every day alike
    weekday_profiles: Floats32  # (weekly series, weekday, slot)
    spreads: Floats32  # (series, slot) > 0
    centres: Floats32  # (series,) mean of the profile
    ranges: Floats32  # (series,) > 0: between the reference's .5 % and 99.5 %, floored
    lows: Floats32  # (series,) smallest and largest value of the reference
    highs: Floats32
    template: Shorts  # (series, bin of day) the usual value of each bin alone, as `places`

    def expected(self, clock: DayClock, local_bins: Longs) -> Floats32:
        """Return (series, bin): the usual value of each series at each bin."""
        slots = clock.slots(local_bins)
        usual = self.profiles[:, slots]
        if len(self.weekday_profiles):
            is_weekly = self.weekly_rows >= 0
            rows = self.weekly_rows[is_weekly]
            usual[is_weekly] = self.weekday_profiles[rows][:, clock.weekdays(local_bins), slots]
        return usual

    def rows(self, chosen: NDArray[np.int64]) -> "Shape":
        """Return the shape of some of the series, in that order."""
        weekly = self.weekly_rows[chosen]
        kept = weekly[weekly >= 0]
        renumbered = np.full(len(chosen), -1, np.int64)
        renumbered[weekly >= 0] = np.arange(len(kept))
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        out = {name: array[chosen] for name, array in own.items() if name != "weekday_profiles"}
        return Shape(**{**out, "weekly_rows": renumbered, "weekday_profiles": self.weekday_profiles[kept]})


@dataclass(frozen=True, eq=False)
class Traits:
    """Values as their series sees them, each (series, bin); NaN and 0 where absent."""

    scores: Floats32  # residual in spreads
    level: Shorts  # residual in 1 / LEVEL_STEPS of the range, capped
    size: Shorts  # |score| in 1 / SPREAD_STEPS, capped
    rhythm: Shorts  # the usual value about its centre, in the unit of level
    is_outside: NDArray[np.bool_]  # beyond everything the reference holds
    place: Shorts  # the value itself, as `shifted_day.places`
    evidence: Shorts  # (lag, series, bin), as `shifted_day.evidence`


def traits(shape: Shape, clock: DayClock, local_bins: Longs, values: Floats32) -> Traits:
    """Measure values (series, bin) against their shape."""
    usual = shape.expected(clock, local_bins)
    residual = values - usual
    present = np.isfinite(residual)
    ranges = shape.ranges[:, None]
    with np.errstate(invalid="ignore", over="ignore"):
        scores = np.where(present, residual / shape.spreads[:, clock.slots(local_bins)], np.nan)
        level = np.clip(residual / ranges, -LEVEL_CAP, LEVEL_CAP)
        rhythm = np.clip((usual - shape.centres[:, None]) / ranges, -1.0, 1.0)
        margin = OUTSIDE_MARGIN * shape.ranges
        outside = (values > (shape.highs + margin)[:, None]) | (values < (shape.lows - margin)[:, None])
    size = np.minimum(np.abs(scores), SCORE_CAP)
    place = places(values, shape.centres, shape.ranges)
    return Traits(
        scores=scores.astype(np.float32),
        level=_steps(level, LEVEL_STEPS, present),
        size=_steps(size, SPREAD_STEPS, present),
        rhythm=_steps(rhythm, LEVEL_STEPS, present),
        is_outside=outside & present,
        place=place,
        evidence=evidence(shape.template, place, local_bins % clock.bins_per_day),
    )


def _steps(values: Floats32, steps: int, present: NDArray[np.bool_]) -> Shorts:
    return np.asarray(np.rint(np.where(present, values, 0) * steps), np.int16)


def innovations(scores: Floats32, before: Floats32, pull: Floats32) -> Floats32:
    """Return |score - pull x the score one bin earlier|: what a plain forecast would have missed.

    Args:
        scores: (series, bin).
        before: (series,) scores of the bin ahead of the first.
        pull: (series,) autoregression of each series' scores, 0..1.
    """
    earlier = np.concatenate([before[:, None], scores[:, :-1]], axis=1)
    return np.asarray(np.abs(scores - pull[:, None] * earlier), np.float32)


def moves(scores: Floats32, before: Floats32) -> Shorts:
    """Return (distance, series, bin): |score - the score one, then two bins earlier|; -1 = unknown.

    In 1 / SPREAD_STEPS, capped.

    Args:
        scores: (series, bin).
        before: (series, 2) scores of the two bins ahead of the first.
    """
    earlier = np.concatenate([before, scores], axis=1)
    n_bins = scores.shape[1]
    out = np.empty((2, *scores.shape), np.int16)
    for distance in (1, 2):
        size = np.abs(scores - earlier[:, 2 - distance : 2 - distance + n_bins])
        steps = np.rint(np.minimum(size, SCORE_CAP) * SPREAD_STEPS)
        out[distance - 1] = np.where(np.isfinite(size), steps, -1)
    return out


def autoregression(scores: Floats32) -> Floats32:
    """Return each series' pull of one bin on the next, within 0..1."""
    capped = np.clip(scores, -SCORE_CAP, SCORE_CAP)
    earlier, later = capped[:, :-1], capped[:, 1:]
    both = np.isfinite(earlier) & np.isfinite(later)
    product = np.where(both, earlier * later, 0).sum(axis=1, dtype=np.float64)
    square = np.where(both, earlier * earlier, 0).sum(axis=1, dtype=np.float64)
    return np.asarray(np.clip(product / np.maximum(square, 1e-9), 0, 1), np.float32)


@dataclass(frozen=True, eq=False)
class CodeBook:
    """Where in the reference a value lies, as one of N_CODES codes per series."""

    edges: Floats32  # (series, N_EDGES) non-decreasing; NaN row = nothing known
    shares: Floats32  # (series, N_CODES) share of the reference at or below each code

    def codes(self, values: Floats32) -> Bytes:
        """Return (series, bin) codes; ABSENT where a value or the book is NaN."""
        edges, own = self.edges[:, None, :], values[:, :, None]
        out = np.count_nonzero(own > edges, axis=2) + np.count_nonzero(own >= edges, axis=2)
        out[~np.isfinite(values) | ~np.isfinite(self.edges[:, :1])] = ABSENT
        return np.asarray(out, np.uint8)

    def rows(self, chosen: NDArray[np.int64]) -> "CodeBook":
        """Return the book of some of the series, in that order."""
        return CodeBook(self.edges[chosen], self.shares[chosen])


def code_book(values: Floats32) -> CodeBook:
    """Make the book of a reference (series, bin), NaN = absent.

    Edges are values that occur, evenly spaced by rank: atoms stay atoms.
    """
    ordered = np.sort(values, axis=1)
    n = np.isfinite(ordered).sum(axis=1)
    levels = (np.arange(N_EDGES) + 0.5) / N_EDGES
    ranks = np.floor(levels[None] * n[:, None]).astype(np.int64)
    edges = np.take_along_axis(ordered, np.minimum(ranks, ordered.shape[1] - 1), axis=1)
    edges[n == 0] = np.nan
    blank = CodeBook(np.asarray(edges, np.float32), np.zeros((len(values), N_CODES), np.float32))
    counts = code_counts(blank.codes(values)[:, None])[:, 0]
    shares = np.cumsum(counts, axis=1) / np.maximum(n, 1)[:, None]
    return CodeBook(blank.edges, np.asarray(shares, np.float32))


def code_counts(codes: Bytes) -> NDArray[np.int32]:
    """Count the codes of each block: (series, block, bin of block) -> (series, block, N_CODES)."""
    n_series, n_blocks, _ = codes.shape
    cells = np.arange(n_series * n_blocks, dtype=np.int64).reshape(n_series, n_blocks, 1) * (ABSENT + 1)
    counts = np.bincount((cells + codes).ravel(), minlength=n_series * n_blocks * (ABSENT + 1))
    return np.asarray(counts.reshape(n_series, n_blocks, ABSENT + 1)[..., :N_CODES], np.int32)
