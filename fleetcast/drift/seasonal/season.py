"""What is usual for a series at a time of day, and what is left of a value when that is taken away.

Owns: the local day (`DayClock`), the rhythm and spread of every series (`Shape`), the residuals a
value leaves (`Traits`), and the code books that turn a residual into its place in the reference.
A code says how many edges lie below a value and how many are equal to it, so that a value that is
exactly the usual one (a disk that stands still) has a code of its own. Everything here keeps its
value when a metric changes its unit. numpy only. Does not know: windows, limits, alarms, files.

Does the newest day fit the usual day better when that is moved by some hours? Each bin says for
and against each lag as much as the two templates differ there, at most, whatever its value: a
spike, an outage or a new level says nothing about the time of day. These are integers, so that
sums over a window are exact.
"""

import zoneinfo
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fleetcast.clock import DAY_MS
from fleetcast.errors import BadData
from fleetcast.schema import Floats, Floats32, Longs

MAX_SLOTS = 96  # a quarter of an hour: sharp enough for cron jobs, enough values for a median
NEIGHBOUR_BINS = 2  # bins taken in from each side of a slot
SPREAD_SLOTS = 4  # spreads need more values than medians: an hour to each side
SPREAD_FLOOR = 0.3  # of the mean spread: a quiet hour is not infinitely quiet
SPREAD_CAP = 0.99  # quantile of the residuals above which a spike stops counting
WEEKDAYS = 7
PLACE_STEPS = 1024  # integers per range
PLACE_CAP = 14.0  # ranges from the centre: evidence stays within 16 bits
ABSENT_PLACE = np.iinfo(np.int16).min
LAGS_H = tuple(range(1, 24))
N_EDGES = 24
N_CODES = 2 * N_EDGES + 1
ABSENT = 255  # the code of a value that is not there
SCORE_CAP = 6.0  # spreads; beyond it a value is "far off", whatever it is
LEVEL_CAP = 0.5  # of the range: the most one value moves a mean
LEVEL_STEPS = 1024  # integers per range: sums of a window are exact, in whatever order
SPREAD_STEPS = 1000
OUTSIDE_MARGIN = 0.05  # of the range, beyond the reference's extremes

Bools = NDArray[np.bool_]
Bytes = NDArray[np.uint8]
Shorts = NDArray[np.int16]


@dataclass(frozen=True)
class DayClock:
    """How bins fall on the local day."""

    bin_ms: int
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        if self.bin_ms <= 0 or DAY_MS % self.bin_ms or DAY_MS // self.bin_ms < 24:
            raise BadData(f"bin_ms must divide a day into at least 24 bins, got {self.bin_ms}")
        try:
            zoneinfo.ZoneInfo(self.timezone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise BadData(f"unknown time zone {self.timezone!r}", hint="for example Europe/Berlin") from error

    @property
    def bins_per_day(self) -> int:
        """Return how many bins a day has."""
        return DAY_MS // self.bin_ms

    @property
    def n_slots(self) -> int:
        """Return how many slots the day's profile has."""
        return min(MAX_SLOTS, self.bins_per_day)

    def local_bins(self, start_ms: int, n_bins: int) -> Longs:
        """Return the number of each bin since 1970-01-01 00:00 local time.

        >>> DayClock(300_000).local_bins(600_000, 2).tolist()
        [2, 3]
        """
        starts = start_ms + np.arange(n_bins, dtype=np.int64) * self.bin_ms
        if self.timezone == "UTC" or not n_bins:
            return starts // self.bin_ms
        zone = zoneinfo.ZoneInfo(self.timezone)
        quarters, which = np.unique(starts // 900_000, return_inverse=True)  # offsets change on these
        moments = [datetime.fromtimestamp(int(quarter) * 900, UTC).astimezone(zone) for quarter in quarters]
        offsets = [moment.utcoffset() for moment in moments]
        shift = np.array([0 if off is None else int(off.total_seconds()) * 1000 for off in offsets], np.int64)
        return (starts + shift[which]) // self.bin_ms

    def slots(self, local_bins: Longs) -> Longs:
        """Return the slot of the day of each bin."""
        return (local_bins % self.bins_per_day) * self.n_slots // self.bins_per_day

    def midnight(self, moment_ms: int) -> int:
        """Return the start of the local day that a time belongs to."""
        return moment_ms - int(self.local_bins(moment_ms, 1)[0]) % self.bins_per_day * self.bin_ms

    def first_days(self, changed_ms: Floats, start_ms: int) -> Longs:
        """Return the first whole day after each change, counted from that of `start_ms`; NaN = 0.

        >>> DayClock(300_000).first_days(np.array([np.nan, -5.0, 1.0, DAY_MS * 2.0]), 0).tolist()
        [0, 0, 1, 2]
        """
        since = (changed_ms - start_ms + (start_ms - self.midnight(start_ms))) / DAY_MS
        days = np.where(np.nan_to_num(changed_ms, nan=-np.inf) <= start_ms, 0.0, np.ceil(since))
        return np.asarray(np.nan_to_num(days, nan=0.0), np.int64)

    def starts_ms(self, days: Longs, start_ms: int) -> Floats:
        """Return the midnight at which each of these days begins; day 0 = NaN."""
        return np.asarray(np.where(days > 0, self.midnight(start_ms) + days * float(DAY_MS), np.nan))

    def weekdays(self, local_bins: Longs) -> Longs:
        """Return the day of the week of each bin, 0-6, from a Thursday."""
        return (local_bins // self.bins_per_day) % WEEKDAYS


def medians(values: Floats32) -> Floats32:
    """Return the median over the last axis, NaN left out; all NaN gives NaN. Sorts a copy.

    numpy's nanmedian goes through masked arrays on short axes and takes ten times as long.
    """
    ordered = np.sort(values, axis=-1)  # NaN last
    n = np.isfinite(ordered).sum(axis=-1)
    low = np.take_along_axis(ordered, np.maximum((n - 1) // 2, 0)[..., None], -1)[..., 0]
    high = np.take_along_axis(ordered, np.minimum(n // 2, ordered.shape[-1] - 1)[..., None], -1)[..., 0]
    return np.asarray(np.where(n > 0, (low + high) / 2, np.nan), np.float32)


def day_grid(values: Floats32, local_bins: Longs, bins_per_day: int) -> Floats32:
    """Lay bins on whole local days: (series, bin) -> (series, day, bin of day), NaN where none.

    A bin that a clock change repeats takes the later value, one that it skips stays NaN.
    """
    first = int(local_bins[0]) // bins_per_day
    n_days = int(local_bins.max()) // bins_per_day - first + 1
    grid = np.full((len(values), n_days * bins_per_day), np.nan, np.float32)
    grid[:, local_bins - first * bins_per_day] = values
    return grid.reshape(len(values), n_days, bins_per_day)


def slot_windows(clock: DayClock, reach: int) -> NDArray[np.int64]:
    """Return (slot, bin of day): the bins of each slot and `reach` more to each side."""
    per_slot = clock.bins_per_day // clock.n_slots
    offsets = np.arange(-reach, per_slot + reach)
    return np.asarray(
        (np.arange(clock.n_slots)[:, None] * per_slot + offsets[None]) % clock.bins_per_day, np.int64
    )


def slot_medians(days: Floats32, clock: DayClock) -> Floats32:
    """Return (series, slot): the usual value at each time of day."""
    gathered = days[:, :, slot_windows(clock, NEIGHBOUR_BINS)]  # (series, day, slot, bin)
    n_series, n_days, n_slots, n_bins = gathered.shape
    return medians(np.moveaxis(gathered, 1, 2).reshape(n_series, n_slots, n_days * n_bins))


def bin_medians(days: Floats32) -> Floats32:
    """Return (series, bin of day): the usual value of each bin alone; a job of five minutes shows."""
    return medians(np.moveaxis(days, 1, 2))


def weekday_medians(days: Floats32, weekdays: Longs, clock: DayClock) -> Floats32:
    """Return (series, weekday, slot); a weekday without values takes the profile of all days."""
    everyday = slot_medians(days, clock)
    out = np.repeat(everyday[:, None], WEEKDAYS, axis=1)
    for weekday in np.unique(weekdays):
        own = slot_medians(days[:, weekdays == weekday], clock)
        out[:, weekday] = np.where(np.isfinite(own), own, everyday)
    return out


def slot_spreads(residuals: Floats32, clock: DayClock) -> Floats32:
    """Return (series, slot): mean absolute residual around each time of day, floored.

    Args:
        residuals: (series, day, bin of day), NaN = absent.
    """
    size = np.abs(residuals)
    n_series = len(size)
    flat = size.reshape(n_series, -1)
    cap = upper_quantile(flat, SPREAD_CAP)
    size = np.minimum(size, cap[:, None, None])
    per_slot = clock.bins_per_day // clock.n_slots
    by_slot = size.reshape(n_series, -1, clock.n_slots, per_slot)
    present = np.isfinite(by_slot)
    sums = np.where(present, by_slot, 0).sum(axis=(1, 3), dtype=np.float64)
    counts = present.sum(axis=(1, 3)).astype(np.float64)
    sums, counts = _around(sums), _around(counts)
    overall = sums.sum(axis=1) / np.maximum(counts.sum(axis=1), 1)
    spread = np.where(counts > 0, sums / np.maximum(counts, 1), overall[:, None])
    return np.asarray(np.hypot(spread, SPREAD_FLOOR * overall[:, None]), np.float32)


def _around(slots: Floats) -> Floats:
    """Sum each slot with its neighbours around the clock."""
    reach = min(SPREAD_SLOTS, slots.shape[1] // 2)
    return np.asarray(sum(np.roll(slots, step, axis=1) for step in range(-reach, reach + 1)))


def upper_quantile(values: Floats32, share: float) -> Floats32:
    """Return a high quantile over the last axis, NaN left out; all NaN gives NaN."""
    ordered = np.sort(values, axis=-1)
    n = np.isfinite(ordered).sum(axis=-1)
    index = np.clip(np.ceil(share * n).astype(np.int64) - 1, 0, ordered.shape[-1] - 1)
    return np.asarray(np.take_along_axis(ordered, index[..., None], -1)[..., 0], np.float32)


def places(values: Floats32, centres: Floats32, ranges: Floats32) -> Shorts:
    """Return values (series, bin) about their centre in 1 / PLACE_STEPS of the range."""
    with np.errstate(over="ignore"):
        about = (values - centres[:, None]) / ranges[:, None]
    about = np.clip(about, -PLACE_CAP, PLACE_CAP) * PLACE_STEPS
    return np.asarray(np.where(np.isfinite(about), np.rint(about), ABSENT_PLACE), np.int16)


def lag_bins(bins_per_day: int) -> Longs:
    """Return (lag,): the bins of the day that each lag is long."""
    return np.asarray(np.rint(np.array(LAGS_H) * bins_per_day / 24), np.int64)


def evidence(template: Shorts, values: Shorts, day_bins: Longs) -> Shorts:
    """Return (lag, series, bin): how much nearer a value is to the moved template than to its own.

    Args:
        template: (series, bin of day), as `places`.
        values: (series, bin), as `places`.
        day_bins: (bin,) bin of the day of each.
    """
    bins_per_day = template.shape[1]
    wide, present = values.astype(np.int32), values != ABSENT_PLACE
    own = np.abs(wide - template[:, day_bins])
    out = np.empty((len(LAGS_H), *values.shape), np.int16)
    for row, lag in enumerate(lag_bins(bins_per_day)):
        out[row] = np.where(present, own - np.abs(wide - template[:, (day_bins - lag) % bins_per_day]), 0)
    return out


def distances(template: Shorts) -> Floats32:
    """Return (series, lag): mean distance of a bin from the template moved by each lag."""
    wide = template.astype(np.int32)
    moved = [np.abs(wide - np.roll(wide, lag, axis=1)).mean(axis=1) for lag in lag_bins(wide.shape[1])]
    return np.asarray(np.stack(moved, axis=1), np.float32)


@dataclass(frozen=True, eq=False)
class PerSeries:
    """What is known of some series: every array has a row per series."""

    def rows(self, chosen: Longs) -> Self:
        """Return it for some of the series, in that order."""
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(
            self,
            **{
                name: part.rows(chosen) if isinstance(part, PerSeries) else part[chosen]
                for name, part in own.items()
            },
        )

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        """Put the series of several parts under each other."""
        columns = {item.name: [getattr(part, item.name) for part in parts] for item in fields(cls)}
        return cls(
            **{
                name: type(own[0]).stack(own) if isinstance(own[0], PerSeries) else np.concatenate(own)
                for name, own in columns.items()
            }
        )


@dataclass(frozen=True, eq=False)
class Shape(PerSeries):
    """The rhythm, spread and range of each series."""

    profiles: Floats32  # (series, slot)
    weekly_rows: Longs  # (series,) row in weekday_profiles, -1 = every day alike
    weekday_profiles: Floats32  # (weekly series, weekday, slot)
    spreads: Floats32  # (series, slot) > 0
    centres: Floats32  # (series,) mean of the profile
    ranges: Floats32  # (series,) > 0: between the reference's .5 % and 99.5 %, floored
    lows: Floats32  # (series,) smallest and largest value of the reference
    highs: Floats32
    template: Shorts  # (series, bin of day) the usual value of each bin alone, as `places`

    def usual_values(self, clock: DayClock, local_bins: Longs) -> Floats32:
        """Return (series, bin): the usual value of each series at each bin."""
        slots = clock.slots(local_bins)
        usual = self.profiles[:, slots]
        if len(self.weekday_profiles):
            is_weekly = self.weekly_rows >= 0
            rows = self.weekly_rows[is_weekly]
            usual[is_weekly] = self.weekday_profiles[rows][:, clock.weekdays(local_bins), slots]
        return usual

    def rows(self, chosen: Longs) -> Self:
        """Return the shape of some of the series, in that order."""
        weekly = self.weekly_rows[chosen]
        kept = weekly[weekly >= 0]
        renumbered = np.full(len(chosen), -1, np.int64)
        renumbered[weekly >= 0] = np.arange(len(kept))
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        out = {name: array[chosen] for name, array in own.items() if name != "weekday_profiles"}
        by_weekday = self.weekday_profiles[kept]
        return replace(self, **{**out, "weekly_rows": renumbered, "weekday_profiles": by_weekday})

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        """Put the series of several shapes under each other."""
        offset, moved = 0, []
        for part in parts:
            rows = np.where(part.weekly_rows >= 0, part.weekly_rows + offset, -1)
            moved.append(replace(part, weekly_rows=rows.astype(np.int64)))
            offset += len(part.weekday_profiles)
        return super().stack(moved)


@dataclass(frozen=True, eq=False)
class Traits:
    """Values as their series sees them, each (series, bin); NaN and 0 where absent."""

    scores: Floats32  # residual in spreads
    level: Shorts  # residual in 1 / LEVEL_STEPS of the range, capped
    size: Shorts  # |score| in 1 / SPREAD_STEPS, capped
    rhythm: Shorts  # the usual value about its centre, in the unit of level
    is_outside: NDArray[np.bool_]  # beyond everything the reference holds
    place: Shorts  # the value itself, as `places`
    evidence: Shorts  # (lag, series, bin), as `evidence`


def traits(shape: Shape, clock: DayClock, local_bins: Longs, values: Floats32) -> Traits:
    """Measure values (series, bin) against their shape."""
    usual = shape.usual_values(clock, local_bins)
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
class CodeBook(PerSeries):
    """Where in the reference a value lies, as one of N_CODES codes per series."""

    edges: Floats32  # (series, N_EDGES) non-decreasing; NaN row = nothing known
    shares: Floats32  # (series, N_CODES) share of the reference at or below each code

    def codes(self, values: Floats32) -> Bytes:
        """Return (series, bin) codes; ABSENT where a value or the book is NaN."""
        edges, own = self.edges[:, None, :], values[:, :, None]
        out = np.count_nonzero(own > edges, axis=2) + np.count_nonzero(own >= edges, axis=2)
        out[~np.isfinite(values) | ~np.isfinite(self.edges[:, :1])] = ABSENT
        return np.asarray(out, np.uint8)


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
