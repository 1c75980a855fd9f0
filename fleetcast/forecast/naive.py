"""The naive forecast: it goes out before there is a model, and a model has to beat it.

Owns: last value, same time yesterday, the choice between the two and the spread around them.
Does not know: models, files or clocks; it sees one `HistoryWindow` and nothing after its end.

The choice and the spread are made per server, metric and horizon from the errors that both
rules made for targets of the last three days, all of them settled by now. Where fewer than
`MIN_ERRORS` are known, an interval of any source is at least as wide as `widen_young` says: from
the usual moves of servers, scaled by the fleet's, and with each bin more from the series' own, and
from how its own moves grow with time: noise does not wander, a walk does.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetcast.clock import DAY_MS
from fleetcast.forecast.encoding import is_percent
from fleetcast.schema import QUANTILES, Floats, Floats32, HistoryWindow, Longs

ERROR_DAYS = 3  # targets looked back at: long enough for a daily rhythm, short enough to follow a change
MAX_TARGETS = 144  # targets sampled from them; twice as many moved no quantile by more than 2 % of itself
MIN_ERRORS = 8  # errors needed for a 10 % quantile that is not an extreme
# The usual 80 % half-width of the last value so many seconds later, as factor and power of the time over
# 300 s: points of a percent, and logarithms of a rate. The median machine of samples/ (2026-11-27) has
# 1.1, 4.0 and 11.9 (cpu), 2.3, 6.3 and 17.6 (memory), 0.49, 0.31 and 0.92 (disk) after 5 min, 1 h and 8 h.
_USUAL_PERCENT, _USUAL_RATE = (1.8, 0.45), (0.4, 0.2)
_STEP_HALF = 1.6  # 80 % half-width over mean absolute step, of a normal distribution
_LEAST_HALF = (0.3, 0.05)  # of a percent, of a rate's logarithm: what a series that has not moved may do
_USUAL_GROWTH, _MOST_GROWTH = 0.25, 0.5  # power of moves over time: 0 is noise, .5 a random walk
_GROWTH_LAGS = (1, 2, 3, 6, 12, 24, 48)
_GROWTH_PAIRS = 4  # moves over a lag that tell how large they are
_GROWTH_DOUBT = 6.0  # bins: moves over so many say half of how a series' own moves grow
# chosen on some servers, measured on others: docs/decisions/first-intervals.md
_OWN_DOUBT = 12  # steps of a series after which they say half of how far it moves
_OF_USUAL = (0.25, 2.0)  # of the usual half-width: what a fleet's moves make of it
_FLEET_SHARE = 0.7  # of a fleet's series move less than what stands in for a series without its own moves
_KNOTS = (1, 2, 3, 6, 12, 24, 48, 72, 96)
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class _Errors:
    """Settled errors of one rule at the knots."""

    low: Floats32  # (series, knot) 10 % quantile, <= 0
    high: Floats32  # (series, knot) 90 % quantile, >= 0


class NaiveForecaster:
    """Forecasts by repetition; finite for every series that has at least one value.

    Example: a constant series stays what it is.

    >>> values = np.full((1, 1, 12), 40.0, dtype=np.float32)
    >>> window = HistoryWindow(("web-01",), ("cpu_pct",), values, 0, 300_000)
    >>> NaiveForecaster(horizon_bins=2).predict(window)[0, 0].tolist()
    [[40.0, 40.0, 40.0], [40.0, 40.0, 40.0]]
    """

    def __init__(self, horizon_bins: int = 96) -> None:
        self.horizon_bins = horizon_bins

    def predict(self, window: HistoryWindow) -> Floats32:
        """Forecast every series of one window.

        Args:
            window: bin means, NaN = no record; the last column is the newest closed bin.
        Returns:
            quantiles (server, metric, horizon, quantile) in native units, non-decreasing on the
            last axis; NaN for a series without any value.
        """
        n_servers, n_metrics, n_bins = window.values.shape
        shape = (n_servers, n_metrics, self.horizon_bins, len(QUANTILES))
        if 0 in (n_servers, n_metrics, n_bins):
            return np.full(shape, np.nan, dtype=np.float32)
        series = window.values.reshape(n_servers * n_metrics, n_bins)  # (series, bin)
        season = max(1, DAY_MS // window.bin_ms)
        knots = _knots(self.horizon_bins)
        percents = _percents(window.metrics, n_servers)
        last_errors, yesterday_errors, advantage = _settled_errors(series, percents, season, knots)

        weights = _interpolation(knots, self.horizon_bins)  # (knot, horizon)
        last = np.repeat(last_known(series)[:, None], self.horizon_bins, axis=1)
        yesterday = same_time_yesterday(series, season, self.horizon_bins)
        is_yesterday = (advantage @ weights > 0) & np.isfinite(yesterday)
        middle = np.where(is_yesterday, yesterday, last)
        low = middle + np.where(is_yesterday, yesterday_errors.low @ weights, last_errors.low @ weights)
        high = middle + np.where(is_yesterday, yesterday_errors.high @ weights, last_errors.high @ weights)
        quantiles = np.stack([low, middle, high], axis=-1).astype(np.float32)
        bounded = _bound(quantiles, series, percents).reshape(shape)
        widen_young(window, bounded)
        return bounded


def _knots(horizon_bins: int) -> Longs:
    """Return the horizons at which errors are measured; the ones between are interpolated."""
    inner = [knot for knot in _KNOTS if knot < horizon_bins]
    inner += range(_KNOTS[-1] * 2, horizon_bins, _KNOTS[-1])
    return np.array([*inner, horizon_bins], dtype=np.int64)


def _interpolation(knots: Longs, horizon_bins: int) -> Floats32:
    """Return weights (knot, horizon) of linear interpolation between the knots.

    >>> _interpolation(np.array([1, 3]), 3).tolist()
    [[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]]
    """
    horizons = np.arange(1, horizon_bins + 1)
    unit = np.eye(len(knots))
    return np.stack([np.interp(horizons, knots, row) for row in unit]).astype(np.float32)


def _sample_targets(n_bins: int, season: int) -> Longs:
    """Return the newest columns used as targets, thinned evenly."""
    span = min(n_bins, ERROR_DAYS * season)
    step = -(-span // MAX_TARGETS)
    return np.arange(n_bins - 1, n_bins - 1 - span, -step, dtype=np.int64)


def _percents(metrics: tuple[str, ...], n_servers: int) -> Flags:
    """Return (series,) which are percents, server by server."""
    return np.array([is_percent(metric) for metric in metrics] * n_servers, np.bool_)


def _settled_errors(
    series: Floats32, percents: Flags, season: int, knots: Longs
) -> tuple[_Errors, _Errors, Floats32]:
    """Return both rules' errors at the knots and the relative advantage of yesterday (series, knot)."""
    n_bins = series.shape[1]
    walk = np.full(len(series), _MOST_GROWTH, np.float32)
    last, yesterday, advantage = _errors_at(series, season, knots, _sample_targets(n_bins, season), walk)
    is_young = ~np.isfinite(series[:, : max(0, n_bins - MAX_TARGETS)]).any(axis=1)
    if is_young.any():  # thinned, their targets would be a handful
        newest = np.arange(n_bins - 1, max(-1, n_bins - 1 - MAX_TARGETS), -1, dtype=np.int64)
        young = series[is_young]
        growth = _growth(young[:, -MAX_TARGETS:], percents[is_young])
        own_last, own_yesterday, advantage[is_young] = _errors_at(young, season, knots, newest, growth)
        for errors, own in ((last, own_last), (yesterday, own_yesterday)):
            errors.low[is_young], errors.high[is_young] = own.low, own.high
    return last, yesterday, advantage


def _errors_at(
    series: Floats32, season: int, knots: Longs, targets: Longs, growth: Floats32
) -> tuple[_Errors, _Errors, Floats32]:
    """Return the same from some targets; beyond what they tell, the last value's errors grow by `growth`."""
    last = _Errors(*(np.zeros((len(series), len(knots)), dtype=np.float32) for _ in range(2)))
    yesterday = _Errors(*(np.zeros((len(series), len(knots)), dtype=np.float32) for _ in range(2)))
    advantage = np.full((len(series), len(knots)), -1.0, dtype=np.float32)
    actual = series[:, targets]
    for k, horizon in enumerate(knots.tolist()):
        by_last = actual - _lag(series, targets, horizon)
        by_yesterday = actual - _lag(series, targets, season * -(-horizon // season))
        longer = horizon / int(knots[k - 1]) if k else 1.0
        _measure(last, k, by_last, longer**growth)
        _measure(yesterday, k, by_yesterday, np.ones(len(series), np.float32))
        advantage[:, k] = _advantage(by_last, by_yesterday)
    return last, yesterday, advantage


def _lag(series: Floats32, targets: Longs, lag: int) -> Floats32:
    """Return the values `lag` bins before the targets, NaN before the window's start."""
    sources = targets - lag
    values = series[:, np.maximum(sources, 0)]
    values[:, sources < 0] = np.nan
    return values


def _measure(errors: _Errors, k: int, samples: Floats32, growth: Floats32) -> None:
    """Fill knot `k` with the samples' quantiles; too few samples extend the knot before."""
    ordered = np.sort(samples, axis=1)  # NaN last
    count = np.isfinite(ordered).sum(axis=1)
    is_measured = count >= MIN_ERRORS
    for quantile, side, limit in (
        (QUANTILES[0], errors.low, np.minimum),
        (QUANTILES[-1], errors.high, np.maximum),
    ):
        extended = side[:, k - 1] * growth if k else np.zeros(len(samples), dtype=np.float32)
        side[:, k] = np.where(is_measured, limit(_quantile(ordered, count, quantile), 0.0), extended)


def _quantile(ordered: Floats32, count: NDArray[np.intp], quantile: float) -> Floats32:
    """Return the interpolated quantile of the first `count` values of each sorted row."""
    position = np.maximum(count - 1, 0) * quantile
    below = np.floor(position).astype(np.intp)
    above = np.minimum(below + 1, np.maximum(count - 1, 0))
    rows = np.arange(len(ordered))
    share = (position - below).astype(np.float32)
    return ordered[rows, below] * (1 - share) + ordered[rows, above] * share


def _advantage(by_last: Floats32, by_yesterday: Floats32) -> Floats32:
    """Return (last - yesterday) / (last + yesterday) of the mean absolute errors on common targets."""
    is_common = np.isfinite(by_last) & np.isfinite(by_yesterday)
    error_last = np.where(is_common, np.abs(by_last), 0.0).sum(axis=1, dtype=np.float64)
    error_yesterday = np.where(is_common, np.abs(by_yesterday), 0.0).sum(axis=1, dtype=np.float64)
    total = error_last + error_yesterday
    relative = np.divide(error_last - error_yesterday, total, out=np.zeros(len(total)), where=total > 0)
    return np.where(is_common.sum(axis=1) >= MIN_ERRORS, relative, -1.0).astype(np.float32)


def last_known(series: Floats32) -> Floats32:
    """Return the newest value of each series, NaN where there is none."""
    is_known = np.isfinite(series)
    newest = series.shape[1] - 1 - np.argmax(is_known[:, ::-1], axis=1)
    return np.where(is_known.any(axis=1), series[np.arange(len(series)), newest], np.nan).astype(np.float32)


def same_time_yesterday(series: Floats32, season: int, horizon_bins: int) -> Floats32:
    """Return the value a whole number of days before each target, NaN where unknown."""
    horizons = np.arange(1, horizon_bins + 1)
    columns = series.shape[1] - 1 + horizons - season * -(-horizons // season)
    values = series[:, np.maximum(columns, 0)]
    values[:, columns < 0] = np.nan
    return values


def _bound(quantiles: Floats32, series: Floats32, percents: Flags) -> Floats32:
    """Keep a series that was never negative at >= 0, and a percent that never passed 100 at <= 100."""
    lowest = np.fmin.reduce(series, axis=1)
    highest = np.fmax.reduce(series, axis=1)
    floor = np.where(lowest >= 0, 0.0, -np.inf).astype(np.float32)
    ceiling = np.where(percents & (highest <= 100), 100.0, np.inf).astype(np.float32)
    return np.clip(quantiles, floor[:, None, None], ceiling[:, None, None])


def widen_young(window: HistoryWindow, quantiles: Floats32) -> None:
    """Let no interval of a series be narrower than honest while fewer than `MIN_ERRORS` errors are known.

    The half-width is that of the usual moves of servers, scaled by those of the fleet in `window` where it
    shows enough of them; with each bin more, the series' own moves say more. Beyond what the series has been
    so far it reaches as far as the series' own moves grow with time.

    Args:
        quantiles: (server, metric, horizon, quantile) native units, changed in place; NaN = no forecast.
    """
    n_horizon = quantiles.shape[2]
    n_known = np.isfinite(window.values).sum(axis=2)  # (server, metric)
    leads = np.arange(1, n_horizon + 1)
    for column in np.flatnonzero(((n_known > 0) & (n_known < n_horizon + MIN_ERRORS)).any(axis=0)):
        rows = np.flatnonzero(n_known[:, column] < n_horizon + MIN_ERRORS)
        scale = _Scale(is_percent(window.metrics[column]))
        newest = scale.take(window.values[:, column, -MAX_TARGETS:])
        growth = _growth(newest[rows], np.full(len(rows), scale.is_percent))
        usual = scale.usual(leads * window.bin_ms / 300_000)
        halves = _honest_halves(newest, rows, growth, usual, scale.least_half)
        halves[n_known[rows, column][:, None] - leads >= MIN_ERRORS] = 0.0
        past = scale.take(window.values[rows, column])
        quantiles[rows, column] = _widen(quantiles[rows, column], halves, growth, past, scale)


@dataclass(frozen=True, slots=True)
class _Scale:
    """On which moves of one metric are alike: percents as they are, rates by log(1 + 100 |x|)."""

    is_percent: bool

    @property
    def least_half(self) -> float:
        """Return the half-width of a series that has not moved."""
        return _LEAST_HALF[0 if self.is_percent else 1]

    def usual(self, steps: Floats) -> Floats:
        """Return the usual half-width so many times 300 s ahead."""
        factor, power = _USUAL_PERCENT if self.is_percent else _USUAL_RATE
        return np.asarray(factor * steps**power)

    def take(self, values: Floats32) -> Floats32:
        """Return native values on the scale."""
        if self.is_percent:
            return values
        return np.copysign(np.log1p(np.float32(100) * np.abs(values)), values)

    def give_back(self, scaled: Floats32) -> Floats32:
        """Return them in native units."""
        if self.is_percent:
            return scaled
        native = np.expm1(np.minimum(np.abs(scaled), 80)) / np.float32(100)
        return np.asarray(np.copysign(native, scaled), np.float32)


def _growth(scaled: Floats32, percents: Flags) -> Floats32:
    """Return (series,) the power by which moves grow with time: near 0 is noise, .5 a random walk.

    The slope of the logarithm of mean moves over that of time, through the moves over one bin. It has as
    much of a say as there are bins to move over, against the usual one.

    Args:
        scaled: (series, bin) the newest bins, NaN = no record.
        percents: (series,)
    """
    least = np.where(percents, *_LEAST_HALF)
    step = np.zeros(len(scaled))
    slope, weight, longest = (np.zeros(len(scaled)) for _ in range(3))
    for lag in _GROWTH_LAGS:
        mean, count = _moves(scaled, lag)
        size = np.log(_STEP_HALF * mean + least)
        step = size if lag == 1 else step
        share = np.where(count >= _GROWTH_PAIRS, count * np.log(lag), 0.0)
        slope, weight = slope + share * (size - step), weight + share * np.log(lag)
        longest = np.where(share > 0, np.log(lag), longest)
    own = np.clip(slope / np.maximum(weight, 1e-9), 0.0, _MOST_GROWTH)
    say = longest / (longest + np.log(_GROWTH_DOUBT))
    return np.asarray(say * own + (1 - say) * _USUAL_GROWTH, np.float32)


def _moves(scaled: Floats32, lag: int) -> tuple[Floats, NDArray[np.intp]]:
    """Return (series,) the mean absolute move over `lag` bins, 0 where there is none, and of how many."""
    moves = np.abs(scaled[:, lag:] - scaled[:, :-lag])
    is_known = np.isfinite(moves)
    count = is_known.sum(axis=1)
    return np.where(is_known, moves, 0.0).sum(axis=1, dtype=np.float64) / np.maximum(count, 1), count


def _honest_halves(
    scaled: Floats32, rows: NDArray[np.intp], growth: Floats32, usual: Floats, least: float
) -> Floats32:
    """Return (row, horizon) on the scale.

    Halves are mixed by their logarithms: of a mean, a hundredth of a noisy fleet's would be all of a quiet
    series'. Large moves are told sooner: that a series does not move is seen late, that it does at once.
    Each series of the fleet counts once, however much it moves and however long it is known.

    Args:
        scaled: (server, bin) of one metric, the whole part of the fleet.
        growth: (row,)
        usual: (horizon,) half-widths of usual servers.
        least: half-width of a series that has not moved.
    """
    leads = np.arange(1, len(usual) + 1)
    mean, count = _moves(scaled, 1)
    halves = _STEP_HALF * mean + least
    base = usual
    if count.sum() >= MIN_ERRORS:
        fleet = np.quantile(halves[count > 0], _FLEET_SHARE)
        smallest, largest = _OF_USUAL
        scaled_usual = usual * np.clip(fleet / usual[0], smallest, 1)
        base = np.maximum(scaled_usual, min(fleet, largest * usual[0]))
    own = halves[rows, None] * leads ** growth[:, None]
    say = (count[rows] / (count[rows] + _OWN_DOUBT))[:, None]
    return np.asarray(np.maximum(own**say * base ** (1 - say), np.sqrt(say) * halves[rows, None]), np.float32)


def _widen(
    quantiles: Floats32, halves: Floats32, growth: Floats32, past: Floats32, scale: _Scale
) -> Floats32:
    """Return (row, horizon, quantile) with sides at least `halves` from the median, as far as possible.

    Args:
        past: (row, bin) on the scale: beyond it, sides reach by as much of `halves` as the series wanders.
    """
    low, middle, high = np.moveaxis(quantiles, -1, 0)
    scaled, beyond = scale.take(middle), halves * np.minimum(growth / _USUAL_GROWTH, 1)[:, None]
    lowest, highest = np.fmin.reduce(past, axis=1)[:, None], np.fmax.reduce(past, axis=1)[:, None]
    down = scale.give_back(np.maximum(scaled - halves, lowest - beyond))
    up = scale.give_back(np.minimum(scaled + halves, highest + beyond))
    down = np.where(middle >= 0, np.maximum(down, 0), down)
    if scale.is_percent:
        up = np.where(middle <= 100, np.minimum(up, 100), up)
    is_told = halves > 0
    down, up = np.where(is_told, np.minimum(low, down), low), np.where(is_told, np.maximum(high, up), high)
    return np.stack([down, middle, up], axis=-1)
