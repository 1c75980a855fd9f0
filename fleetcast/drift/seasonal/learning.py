"""How a reference is learned from some weeks of a few series: shapes, books, limits to come.

Owns: cutting away an older regime, days that count, leaving blocks of days out in turn, and the
statistics of the days left out: what unchanged data look like to a reference that has not seen
them. Works on chunks of series so that memory stays bounded. Does not know: files, the fleet.

How large a statistic may get before unchanged data would not explain it.

Owns: limits per series from days left out of their reference, with strength shared between
series, and return levels of daily maxima. Pure maths. Does not know: what a statistic measures.

A series' own high quantile is multiplied by what the fleet's series showed a block of unseen
days to add to it: few or restless reference days give wide limits by themselves. A small fleet
leans on what recorded fleets showed.

Learning a large fleet a few series at a time, and putting the parts together again.

Owns: the size of a chunk and the sample a large fleet is calibrated on. Does not know: what is
learned (`reference_fit`), files.

What an unchanged fleet does as a whole, learned from the days left out of its reference.

Owns: the factor that makes the fleet's verdict as rare as asked, and the rate it showed. Pure
maths. Does not know: single series' limits (`limits`), the newest values.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from fleetcast.drift.seasonal.quorum import (
    QuorumRule,
    family_ratios,
    fleet_ratios,
    running_minimum,
    running_share,
    worst_ratio,
)
from fleetcast.drift.seasonal.season import (
    PLACE_STEPS,
    CodeBook,
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
    CAPS,
    FLOORS,
    STATISTICS,
    BinCodes,
    Books,
    log_moves,
    statistics,
    sums_over,
    tail_codes,
)
from fleetcast.schema import Floats32, Longs

FOLDS = 3  # blocks of days left out in turn
MIN_DAYS = 5
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
    values: Floats32, errors: Floats32 | None, local_bins: Longs, range_floors: Floats32, clock: DayClock
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
    error_days = None if errors is None else without(day_grid(errors, local_bins, per_day), folds < 0)
    scaled = error_scores(error_days, shape, clock, seen.scores.shape)
    books, pull, codes = _books(shape, seen, scaled, clock, bins)
    step = max(1, per_day // STEPS_PER_DAY)
    short, long = per_day // 8 // step * step, per_day
    left_out = statistics(sums_over(codes, step, short, long), books, short, long)
    ends = np.arange(long // step, bins.size // step + 1) * step - 1
    return FittedChunk(shape, books, pull, n_days, start_days, left_out, folds[:, ends // per_day])


def error_scores(errors: Floats32 | None, shape: Shape, clock: DayClock, size: tuple[int, ...]) -> Floats32:
    """Return errors (series, day, bin of day) in spreads of their time of day, flat in time."""
    if errors is None:
        return np.full(size, np.nan, np.float32)
    slots = clock.slots(np.arange(clock.bins_per_day))
    scaled = np.abs(errors) / shape.spreads[:, None, slots]
    return np.asarray(scaled.reshape(size), np.float32)


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
        parts = own if parts is None else _chosen(np.repeat(out, days.shape[2], axis=1), own, parts)
    assert parts is not None, "there is at least one fold"
    return parts


def _chosen(where: Bools, one: Traits, other: Traits) -> Traits:
    return Traits(
        np.where(where, one.scores, other.scores),
        np.where(where, one.level, other.level),
        np.where(where, one.size, other.size),
        np.where(where, one.rhythm, other.rhythm),
        np.where(where, one.is_outside, other.is_outside),
        np.where(where, one.place, other.place),
        np.where(where, one.evidence, other.evidence),
    )


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
    books = Books(
        values,
        moved,
        missed,
        tail_codes(values),
        np.log(np.maximum(size, 1e-3)).astype(np.float32),
        (about**2).mean(axis=1).astype(np.float32),
        (noise**2).astype(np.float32),
        log_moves(np.where(known, steps, 0).sum(axis=2).T / np.maximum(known.sum(axis=2), 1).T),
        distances(shape.template) + (noise * PLACE_STEPS + 1)[:, None].astype(np.float32),
    )
    own = (values.codes(seen.scores), moved.codes(novel), missed.codes(scaled_errors))
    codes = BinCodes(*own, seen, steps, bins % clock.bins_per_day)
    return books, pull, codes


OWN_QUANTILE = 0.995  # of the half hours of days left out
SHARED_QUANTILE = 0.95  # of the growth from known to unseen blocks
KNOWN_SHARE_OF_FLOOR = 0.7
PRIOR_WEIGHT = 30  # blocks; what a fleet of ten series has of its own
GROWTH_CAP = 9.0
EULER = 0.5772156649
# Measured on the development half of three recorded fleets (docs/decisions/drift-quality.md).
PRIOR_GROWTH = {
    "innovation_3h": 1.8,
    "error_3h": 1.8,
    "error_24h": 1.5,
    "restless_24h": 2.5,
    "rougher_24h": 1.1,
    "smoother_24h": 1.3,
    "shape_3h": 1.5,
    "shape_24h": 1.5,
    "below_24h": 1.6,
    "above_24h": 1.6,
    "higher_24h": 1.4,
    "lower_24h": 1.1,
    "rhythm_down_24h": 1.6,
    "shifted_24h": 1.4,
    "outside_3h": 1.0,
    "wider_24h": 2.2,
    "calmer_24h": 1.3,
}
# Wider than an unseen block asks for, where a statistic alone made most alarms on unchanged series: a
# third of them goes, detection hardly changes. Measured there, too.
MARGINS = {"error_24h": 1.2, "shape_3h": 1.2, "restless_24h": 1.2}
# Nothing but its limit holds back a statistic that stands alone, and one week says little of the next.
MATURE_DAYS = 21  # fewer days behind a series make false alarms likelier; see drift-quality.md
_STANDS_ALONE = np.array([item.stands_alone for item in STATISTICS])
_MARGINS = np.array([MARGINS.get(item.name, 1.0) for item in STATISTICS], np.float32)
_PRIOR = np.array([PRIOR_GROWTH[statistic.name] for statistic in STATISTICS], np.float32)


def own_quantiles(left_out: Floats32) -> Floats32:
    """Return (series, statistic): the high end of each statistic on days left out, NaN if unknown."""
    return np.asarray(upper_quantile(left_out, OWN_QUANTILE).T, np.float32)


def growth(left_out: Floats32, folds: Longs) -> Floats32:
    """Return (series x block, statistic): high end of an unseen block over that of the others.

    Args:
        left_out: (statistic, series, step).
        folds: (series, step) block of each step, -1 = none.
    """
    out = []
    for fold in range(FOLDS):
        in_fold = folds == fold
        unseen = upper_quantile(np.where(in_fold, left_out, np.nan), OWN_QUANTILE)
        known = upper_quantile(np.where(in_fold | (folds < 0), np.nan, left_out), OWN_QUANTILE)
        out.append(unseen / np.fmax(known, KNOWN_SHARE_OF_FLOOR * FLOORS[:, None]))
    return np.asarray(np.concatenate(out, axis=1).T, np.float32)


def shared_growth(ratios: Floats32, prior: Floats32 = _PRIOR) -> Floats32:
    """Return (statistic,): the growth that all but a few unseen blocks stay within.

    Args:
        ratios: (block, statistic) of this fleet, NaN = unknown.
        prior: (statistic,) what recorded fleets showed.
    """
    n = np.isfinite(ratios).sum(axis=0)
    own = np.where(n > 0, upper_quantile(ratios.T, SHARED_QUANTILE), prior)
    share = n / (n + PRIOR_WEIGHT)
    return np.asarray(np.clip(share * own + (1 - share) * prior, 1, GROWTH_CAP), np.float32)


def series_limits(own: Floats32, shared: Floats32, n_days: Longs) -> Floats32:
    """Return (series, statistic) limits; NaN where a statistic is unknown.

    Args:
        n_days: (series,) days behind each series.
    """
    young = np.sqrt(np.maximum(MATURE_DAYS / np.maximum(n_days, 1), 1)).astype(np.float32)
    widened = own * shared * _MARGINS * np.where(_STANDS_ALONE, young[:, None], 1)
    return np.asarray(np.minimum(np.maximum(widened, FLOORS), CAPS), np.float32)


def return_level(daily_maxima: Floats32, days: float) -> float:
    """Return the level that daily maxima pass once in `days`: Gumbel, by moments.

    >>> round(return_level(np.array([0.2, 0.3, 0.25, 0.2, 0.35], np.float32), 30.0), 3)
    0.403
    """
    known = daily_maxima[np.isfinite(daily_maxima)].astype(np.float64)
    if len(known) < 2:
        return float(known.max()) if len(known) else 0.0
    scale = float(known.std(ddof=1)) * math.sqrt(6) / math.pi
    place = float(known.mean()) - EULER * scale
    return place - scale * math.log(-math.log(1 - 1 / max(days, 1.0001)))


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


MONTH_DAYS = 30.0
EPISODE_DAYS = 1.0  # alarms closer than this are one


@dataclass(frozen=True)
class FleetCalibration:
    """How rare the fleet's verdict is on data that did not change."""

    false_alarms_per_month: float  # the target it was calibrated to
    factor: float  # >= 1: what fleet ratios are divided by
    days: float  # days left out that were judged
    alarms: int  # verdicts on them, with the factor
    series_alarm_share: float  # mean share of series in alarm on them

    @property
    def shown_per_month(self) -> float:
        """Return the rate of verdicts on days left out."""
        return self.alarms / self.days * MONTH_DAYS if self.days else 0.0


def calibrate(
    series: NDArray[np.int64],
    left_out: Floats32,
    limits: Floats32,
    n_metrics: int,
    rule: QuorumRule,
    false_alarms_per_month: float,
) -> FleetCalibration:
    """Judge the fleet on days left out and set the factor.

    Args:
        series: rows of `limits` that `left_out`, (statistic, series, step), is about: whole servers.
        false_alarms_per_month: how often an unchanged fleet may call for a training, > 0.
    """
    per_day = min(STEPS_PER_DAY, left_out.shape[2])
    ratios = family_ratios(left_out, limits[series])
    held = running_minimum(ratios, rule.hold_bins(per_day))
    alarms = held.max(axis=0) > 1
    is_compared = np.isfinite(limits[series]).any(axis=1)
    sustained = running_share(alarms, rule.sustained_bins(per_day))
    worst = worst_ratio(fleet_ratios(held, sustained, int(is_compared.sum()), n_metrics, rule))
    n_days = worst.size // per_day if per_day else 0
    if not n_days or not is_compared.any():
        return FleetCalibration(false_alarms_per_month, 1.0, 0.0, 0, 0.0)
    maxima = worst[: n_days * per_day].reshape(n_days, per_day).max(axis=1)
    factor = max(1.0, return_level(maxima, MONTH_DAYS / false_alarms_per_month))
    starts = np.flatnonzero(worst / factor > 1)
    n_alarms = int((np.diff(starts, prepend=-per_day * 10) > EPISODE_DAYS * per_day).sum())
    share = float(alarms[is_compared].mean())
    return FleetCalibration(false_alarms_per_month, factor, float(n_days), n_alarms, share)
