"""By when a disk is full: days and weeks ahead, from the highest value of each day.

Owns: the trend of a series since its last clean-up, the range of dates that the fleet's own record
gives it, and when there is no date to tell. Does not know: where daily maxima come from.

The range is no standard error of a regression. Every day of the record is taken as if it were today: the
trend of then is drawn on to each day after, and the day on which the series first came so high is held
against it, as days it took / days it was to take. A disk that was cleaned up before, or climbed no
further, took for ever. The tenth and ninetieth percentile of these ratios, at leads like the one asked
for and of trends as clear, make the early and the late date. A disk that is freed every night has no trend
in its daily maxima, and so no date.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from fleetcast.schema import Floats, Longs

FEWEST_DAYS = 7
FEWEST_RATIOS = 30
CLEAN_UP = 10.0  # points that a daily maximum falls by where someone made room
WITHIN_DAYS = 30
OVER = "it was over the limit"  # on the newest whole day
_YEAR = 365.0
_LOW, _HIGH = 0.1, 0.9
_ALIKE = 3.0
_NOISE_FLOOR = 0.05
_MOST_SERIES = 300  # that ratios are taken from
_SIGNIFICANT = 1.645  # a slope whose 90 % interval holds zero is none
_MOST_LATE = 2.0  # a range that ends beyond so many records says nothing

Judged = tuple[float, float, float]  # lead, clarity, ratio


@dataclass(frozen=True, slots=True)
class Trend:
    """How a series climbed since its last clean-up."""

    level: float  # of the line, on the last day
    slope: float  # points a day (Theil and Sen: the median of all pairs)
    days: int  # that the line rests on
    is_climb: bool  # whether the 90 % interval of the slope lies above zero
    noise: float  # points, standard deviation about the line

    def clarity(self, days: float) -> float:
        """Return how many times the noise the line climbs in so many days."""
        return self.slope * days / max(self.noise, _NOISE_FLOOR)


@dataclass(frozen=True, slots=True)
class Ratios:
    """Days that the fleet's past climbs took over the days they were to take; infinite = never."""

    leads: Floats  # (comparison,) days it was to take, ascending
    clarities: Floats
    values: Floats

    def near(self, days: float, clarity: float) -> Floats:
        """Return those at leads from half to twice as long, of trends as clear where there are enough."""
        first = int(np.searchsorted(self.leads, days / 2, "left"))
        end = int(np.searchsorted(self.leads, days * 2, "right"))
        clarities, values = self.clarities[first:end], self.values[first:end]
        both = values[(clarities >= clarity / _ALIKE) & (clarities <= clarity * _ALIKE)]
        return both if len(both) >= FEWEST_RATIOS else values


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is known of one series; `why_not` says why there is no date."""

    now: float
    slope: float | None = None  # points a day
    days: int = 0
    early_days: float | None = None
    late_days: float | None = None
    p_within: float | None = None
    within_days: int = 0
    why_not: str = ""

    @property
    def has_date(self) -> bool:
        """Whether it says between which days."""
        return self.early_days is not None


def find_trend(maxima: Floats) -> Trend | None:
    """Return the trend up to the last day of (day,) maxima, None where fewer than two days are known."""
    days = np.flatnonzero(np.isfinite(maxima))
    values = maxima[days]
    falls = np.flatnonzero(np.diff(values) < -CLEAN_UP)
    if len(falls):
        days, values = days[falls[-1] + 1 :], values[falls[-1] + 1 :]
    n_days = len(days)
    if n_days < 2:
        return None
    first, second = _pairs(n_days)
    slopes = np.sort((values[second] - values[first]) / (days[second] - days[first]))
    n_slopes = len(slopes)
    slope = float(slopes[(n_slopes - 1) // 2] + slopes[n_slopes // 2]) / 2.0
    start = float(np.median(values - slope * days))
    level = start + slope * (len(maxima) - 1)
    # Sen's interval: as many slopes from the middle as Kendall's S varies by chance
    width = _SIGNIFICANT * np.sqrt(n_days * (n_days - 1) * (2 * n_days + 5) / 18.0)
    lowest = int((len(slopes) - width) / 2)
    is_climb = lowest >= 0 and slopes[lowest] > 0
    residuals = values - start - slope * days
    return Trend(level, slope, n_days, bool(is_climb), float(residuals.std()))


@lru_cache(maxsize=64)  # as many as there are numbers of days
def _pairs(n_days: int) -> tuple[Longs, Longs]:
    return np.triu_indices(n_days, 1)


def compare(maxima: Sequence[Floats]) -> Ratios:
    """Return how growth went on after each day of the record that looked like a climb.

    Args:
        maxima: (day,) of each series; of a large fleet, evenly chosen ones are enough.
    """
    return gather([judged for series in choose(maxima) for judged in judge(series)])


def choose(maxima: Sequence[Floats]) -> Sequence[Floats]:
    """Return evenly chosen series, which are enough to compare."""
    return list(maxima)[:: max(1, len(maxima) // _MOST_SERIES)]


def judge(series: Floats) -> list[Judged]:
    """Return how one (day,) series went on after each day that looked like a climb."""
    found: list[Judged] = []
    for today in range(FEWEST_DAYS - 1, len(series) - 1):
        trend = find_trend(series[: today + 1])
        if trend is not None and trend.is_climb and trend.days >= FEWEST_DAYS:
            found += _judge_line(trend, series[today], series[today + 1 :])
    return found


def gather(found: Sequence[Judged]) -> Ratios:
    """Return the comparisons of several series as one."""
    columns = np.array(found, np.float64).reshape(-1, 3)
    return Ratios(*np.ascontiguousarray(columns[np.argsort(columns[:, 0], kind="stable")].T))


def _judge_line(trend: Trend, now: float, ahead: Floats) -> Iterator[Judged]:
    """Yield (lead, clarity, ratio) of each day that the line leads to and the record can judge."""
    tops = np.maximum.accumulate(np.where(np.isfinite(ahead), ahead, -np.inf))
    for lead in range(1, trend.days + 1):
        level = trend.level + trend.slope * lead
        if level <= now:
            continue
        took = int(np.searchsorted(tops, level)) + 1
        if took <= len(tops):
            yield lead, trend.clarity(lead), took / lead
        elif len(tops) >= _MOST_LATE * lead:
            yield lead, trend.clarity(lead), np.inf


def look_ahead(maxima: Floats, limit: float, ratios: Ratios) -> Outlook:
    """Return by when a series reaches the limit, and how sure that is within a month."""
    known = maxima[np.isfinite(maxima)]
    if not len(known):
        return Outlook(np.nan, why_not="nothing was sent")
    now = float(known[-1])
    if now >= limit:
        return Outlook(now, why_not=OVER)
    falls = np.flatnonzero(np.diff(known) < -CLEAN_UP)
    if len(falls) and known[: falls[-1] + 1].max() < limit:
        return Outlook(now, why_not=f"it was freed at {known[falls[-1]]:.0f} % before")
    trend = find_trend(maxima)
    if trend is None or trend.days < FEWEST_DAYS:
        n_days = 0 if trend is None else trend.days
        return Outlook(now, days=n_days, why_not=f"{n_days} of {FEWEST_DAYS} days since the last clean-up")
    if not trend.is_climb:
        return Outlook(now, trend.slope, trend.days, why_not="it does not climb")
    days_to = (limit - trend.level) / trend.slope
    within = min(WITHIN_DAYS, trend.days)
    told = Outlook(now, trend.slope, trend.days, within_days=within)
    if days_to > _YEAR:
        return replace(told, why_not="more than a year ahead")
    if days_to > trend.days:
        return replace(told, why_not=f"about {days_to:.0f} days ahead, beyond the {trend.days} days known")
    days_to = max(days_to, 1.0)
    settled = ratios.near(days_to, trend.clarity(days_to))
    if len(settled) < FEWEST_RATIOS:
        return replace(told, why_not=f"{len(settled)} of {FEWEST_RATIOS} comparisons with what came")
    told = replace(told, p_within=float(np.mean(settled * days_to <= within)))
    early, late = np.quantile(settled, (_LOW, _HIGH), method="inverted_cdf") * days_to
    if not late <= _MOST_LATE * trend.days:
        return replace(told, why_not="growth like this often did not go on")
    return replace(told, early_days=float(early), late_days=float(late))
