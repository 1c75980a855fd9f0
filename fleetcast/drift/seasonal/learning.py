"""How a reference is learned from some weeks of bins: shapes, books, and what is needed for limits.

Owns: cutting away an older regime, days that count, leaving blocks of days out in turn, and the
statistics of the days left out: what unchanged data look like to a reference that has not seen
them. Works on chunks of series so that memory stays bounded, and picks the sample by which a
large fleet is calibrated. Does not know: limits, files, the fleet.
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from fleetcast.drift.seasonal.season import (
    PLACE_STEPS,
    DayClock,
    Shape,
    Traits,
    autoregression,
    bin_medians,
    code_book,
    code_counts,
    day_grid,
    distances,
    innovations,
    moves,
    places,
    slot_medians,
    slot_spreads,
    traits,
    upper_quantile,
    weekday_medians,
)
from fleetcast.drift.seasonal.statistics import (
    BinCodes,
    Books,
    log_moves,
    order,
    pair_sums,
    statistics,
    sums_over,
    tail_codes,
)
from fleetcast.schema import Floats32, Longs

FOLDS = 3  # blocks of days left out in turn
MIN_DAYS = 3  # as many as there are blocks to leave out
DAY_COVERAGE = 0.3  # of its bins a day needs to count
WEEKLY_DAYS = 19  # a weekly profile needs nearly three weeks
WEEKLY_GAIN = 0.9  # and must cut the error on days left out to this share
REGIME_DAYS = 7  # a newer regime must have lasted this long to be a reference of its own
REGIME_GAP = 0.85  # Kolmogorov-Smirnov distance between the days before and after
STEPS_PER_DAY = 48  # the days left out are judged every half hour
RANGE_TAIL = 0.995
RANGE_SHARE = 0.1  # of the full range: what spikes add to the range between the tails
SPREAD_OF_RANGE = 0.002  # smaller residuals than this are not worth a spread
NOISE_OF_SPREAD = 0.3
CHUNK = 64  # series fitted at once: some 100 MB of passing arrays at three weeks
CALIBRATION_SERIES = 2000  # the fleet's calibration looks at a sample of a larger fleet

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class FittedChunk:
    """What was learned about some series; arrays have a row per series."""

    shape: Shape
    books: Books
    pull: Floats32  # (series,)
    n_days: Longs  # (series,) days that count
    start_days: Longs  # (series,) first day used, counted from the grid's first
    left_out: Floats32  # (statistic, series, step) of days not in their reference
    folds: Longs  # (series, step) block each step belongs to, -1 = a day that does not count


def value_ranges(values: Floats32) -> tuple[Floats32, Floats32, Floats32]:
    """Return each series' range, smallest and largest value; NaN where it has none."""
    high = upper_quantile(values, 1.0)
    low = -upper_quantile(-values, 1.0)
    inner = upper_quantile(values, RANGE_TAIL) + upper_quantile(-values, RANGE_TAIL)
    return np.asarray(np.maximum(inner, RANGE_SHARE * (high - low)), np.float32), low, high


def newest_regime(days: Floats32) -> Longs:
    """Return the first day of the regime each series is in: 0 where it never changed for good.

    Args:
        days: (series, day, bin of day).
    """
    n_series, n_days, n_bins = days.shape
    first = np.zeros(n_series, np.int64)
    if n_days < REGIME_DAYS + 2:
        return first
    codes = code_book(days.reshape(n_series, -1)).codes(days.reshape(n_series, -1))
    counts = np.cumsum(
        np.cumsum(code_counts(codes.reshape(days.shape)), axis=2), axis=1
    )  # (series, day, code)
    total, widest = counts[:, -1], np.full(n_series, REGIME_GAP)
    for day in range(2, n_days - REGIME_DAYS + 1):
        before, after = counts[:, day - 1], total - counts[:, day - 1]
        n_before, n_after = before[:, -1:], after[:, -1:]
        gap = np.abs(before / np.maximum(n_before, 1) - after / np.maximum(n_after, 1)).max(axis=1)
        enough = (n_before[:, 0] >= DAY_COVERAGE * n_bins) & (n_after[:, 0] >= DAY_COVERAGE * n_bins)
        wider = enough & (gap > widest)
        widest[wider], first[wider] = gap[wider], day
    return first


def day_folds(days: Floats32) -> tuple[Longs, Longs]:
    """Return (series, day) the block each day is left out with, -1 = too thin; and days that count."""
    counts = np.isfinite(days).mean(axis=2) >= DAY_COVERAGE
    n_days = counts.sum(axis=1)
    rank = np.cumsum(counts, axis=1) - 1
    folds = rank * FOLDS // np.maximum(n_days, 1)[:, None]
    return np.where(counts, folds, -1).astype(np.int64), n_days.astype(np.int64)


def without(days: Floats32, dropped: Bools) -> Floats32:
    """Return the days with some of them, (series, day), taken out."""
    return np.asarray(np.where(dropped[:, :, None], np.nan, days), np.float32)


def is_weekly(days: Floats32, folds: Longs, weekdays: Longs, clock: DayClock) -> Bools:
    """Return which series are better described by a profile for each day of the week."""
    n_series, n_days, n_bins = days.shape
    if n_days < WEEKLY_DAYS:
        return np.zeros(n_series, np.bool_)
    slots = clock.slots(np.arange(n_bins))
    everyday_error, weekly_error = np.zeros(n_series), np.zeros(n_series)
    for fold in range(FOLDS):
        out = folds == fold
        kept = without(days, out)
        held = without(days, ~out)
        everyday = held - slot_medians(kept, clock)[:, None, slots]
        weekly = held - weekday_medians(kept, weekdays, clock)[:, weekdays][:, :, slots]
        everyday_error += np.nansum(np.abs(everyday), axis=(1, 2), dtype=np.float64)
        weekly_error += np.nansum(np.abs(weekly), axis=(1, 2), dtype=np.float64)
    enough = (folds >= 0).sum(axis=1) >= WEEKLY_DAYS
    return np.asarray(enough & (weekly_error < WEEKLY_GAIN * everyday_error))


def shape_of(
    days: Floats32, weekdays: Longs, weekly: Bools, range_floors: Floats32, clock: DayClock
) -> Shape:
    """Learn the rhythm, spread and range of some series from whole days."""
    n_series, _, n_bins = days.shape
    profiles = slot_medians(days, clock)
    known = np.isfinite(profiles)
    overall = np.where(known, profiles, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    profiles = np.asarray(np.where(known, profiles, overall[:, None]), np.float32)
    rows = np.asarray(np.where(weekly, np.cumsum(weekly) - 1, -1), np.int64)
    by_weekday = weekday_medians(days[weekly], weekdays, clock)
    by_weekday = np.where(np.isfinite(by_weekday), by_weekday, profiles[weekly][:, None]).astype(np.float32)
    slots = clock.slots(np.arange(n_bins))
    usual = np.repeat(profiles[:, None, slots], days.shape[1], axis=1)
    usual[weekly] = by_weekday[:, weekdays][:, :, slots]
    ranges, lows, highs = value_ranges(days.reshape(n_series, -1))
    ranges = np.fmax(ranges, range_floors).astype(np.float32)
    spreads = np.fmax(slot_spreads(days - usual, clock), SPREAD_OF_RANGE * ranges[:, None])
    centres = profiles.mean(axis=1)
    each = bin_medians(days)
    template = places(np.where(np.isfinite(each), each, profiles[:, slots]), centres, ranges)
    return Shape(
        profiles, rows, by_weekday, spreads.astype(np.float32), centres, ranges, lows, highs, template
    )


def fit_chunk(
    values: Floats32, errors: Floats32, local_bins: Longs, range_floors: Floats32, clock: DayClock
) -> FittedChunk:
    """Learn all about some series.

    Args:
        values, errors: (series, bin), NaN = absent; errors are those of the model in service.
        local_bins: (bin,) as `DayClock.local_bins`.
        range_floors: (series,) smallest range worth measuring by.
    """
    per_day = clock.bins_per_day
    days = day_grid(values, local_bins, per_day)
    start_days = newest_regime(days)
    days = without(days, np.arange(days.shape[1])[None] < start_days[:, None])
    folds, n_days = day_folds(days)
    days = without(days, folds < 0)
    bins = int(local_bins[0]) // per_day * per_day + np.arange(days.shape[1] * per_day, dtype=np.int64)
    weekdays = clock.weekdays(bins[::per_day])
    weekly = is_weekly(days, folds, weekdays, clock)
    shape = shape_of(days, weekdays, weekly, range_floors, clock)
    seen = _left_out_traits(days, folds, bins, weekdays, weekly, range_floors, clock)
    scaled = error_scores(without(day_grid(errors, local_bins, per_day), folds < 0), shape, clock)
    books, pull, codes = _books(shape, seen, scaled, clock, bins)
    step = max(1, per_day // STEPS_PER_DAY)
    short, long = per_day // 8 // step * step, per_day
    left_out = statistics(sums_over(codes, step, short, long), books, short, long)
    ends = np.arange(long // step, bins.size // step + 1) * step - 1
    return FittedChunk(shape, books, pull, n_days, start_days, left_out, folds[:, ends // per_day])


def error_scores(errors: Floats32, shape: Shape, clock: DayClock) -> Floats32:
    """Return errors (series, day, bin of day) in spreads of their time of day, flat in time."""
    slots = clock.slots(np.arange(clock.bins_per_day))
    scaled = np.abs(errors) / shape.spreads[:, None, slots]
    return np.asarray(scaled.reshape(len(errors), -1), np.float32)


def _left_out_traits(
    days: Floats32,
    folds: Longs,
    bins: Longs,
    weekdays: Longs,
    weekly: Bools,
    range_floors: Floats32,
    clock: DayClock,
) -> Traits:
    """Measure each day against the shape of the blocks it is not in."""
    n_series = len(days)
    flat = days.reshape(n_series, -1)
    parts: Traits | None = None
    for fold in range(FOLDS):
        out = folds == fold
        shape = shape_of(without(days, out), weekdays, weekly, range_floors, clock)
        own = traits(shape, clock, bins, flat)
        parts = own if parts is None else _choose(np.repeat(out, days.shape[2], axis=1), own, parts)
    assert parts is not None, "there is at least one fold"
    return parts


def _choose(where: Bools, one: Traits, other: Traits) -> Traits:
    names = [item.name for item in fields(Traits)]
    return Traits(**{name: np.where(where, getattr(one, name), getattr(other, name)) for name in names})


def _books(
    shape: Shape, seen: Traits, scaled_errors: Floats32, clock: DayClock, bins: Longs
) -> tuple[Books, Floats32, BinCodes]:
    """Make the books from days that were left out, and code those days."""
    pull = autoregression(seen.scores)
    unknown = np.full((len(pull), 2), np.nan, np.float32)
    novel = innovations(seen.scores, unknown[:, 0], pull)
    values, moved, missed = code_book(seen.scores), code_book(novel), code_book(scaled_errors)
    steps = moves(seen.scores, unknown)
    known = steps >= 0
    present = np.isfinite(seen.scores)
    size = np.where(present, seen.size, 0).sum(axis=1) / np.maximum(present.sum(axis=1), 1) / 1000
    about = (shape.profiles - shape.centres[:, None]) / shape.ranges[:, None]
    noise = NOISE_OF_SPREAD * np.median(shape.spreads, axis=1) / shape.ranges
    coded = values.codes(seen.scores)
    books = Books(
        values,
        moved,
        missed,
        tail_codes(values),
        np.log(np.maximum(size, 1e-3)).astype(np.float32),
        (about**2).mean(axis=1).astype(np.float32),
        (noise**2).astype(np.float32),
        log_moves(np.where(known, steps, 0).sum(axis=2).T / np.maximum(known.sum(axis=2), 1).T),
        order(pair_sums(coded, np.array([coded.shape[1]]), coded.shape[1]))[:, 0],
        distances(shape.template) + (noise * PLACE_STEPS + 1)[:, None].astype(np.float32),
    )
    own = (coded, moved.codes(novel), missed.codes(scaled_errors))
    codes = BinCodes(*own, seen, steps, bins % clock.bins_per_day)
    return books, pull, codes


def fit_all(
    flat: Floats32, errors: Floats32, local_bins: Longs, range_floors: Floats32, clock: DayClock
) -> list[FittedChunk]:
    """Learn all series, (series, bin), in chunks."""
    parts = []
    for first in range(0, len(flat), CHUNK):
        rows = slice(first, first + CHUNK)
        parts.append(fit_chunk(flat[rows], errors[rows], local_bins, range_floors[rows], clock))
    return parts


def sample(chunks: list[FittedChunk], n_metrics: int) -> tuple[NDArray[np.int64], Floats32]:
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
