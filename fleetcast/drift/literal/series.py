"""Which servers and metrics drift, and since when: the names behind the fleet's four numbers.

Owns: the score of one series against its own baseline, and its time of change. numpy only.
Does not know: the fleet's verdict (a series never decides alone), files.

A series is compared with itself: its values with the same hours of its own baseline, in
standard deviations, and its one-bin-ahead error with the model's error on held-out data.
The score is the larger of the two over its limit; from 1.0 the series counts as drifting.

Beside that: what the model says of each series and what clients get, both as shares of the error of
repeating the last value. The first tells whether the model is stale, the second whether it matters.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fleetcast.clock import HOUR_MS
from fleetcast.drift.literal.baseline import Baseline
from fleetcast.drift.literal.scores import ks_statistic, std_floor
from fleetcast.drift.literal.window import PairWindow
from fleetcast.schema import Floats, Longs, ReadForecasts, SettledForecasts

SHIFT_LIMIT = 3.0  # standard deviations, mean over the window
ERROR_LIMIT = 3.0  # times the model's own held-out error
MIN_VALUES = 6  # half an hour of 5-minute bins
LOOK_BACK_DAYS = 7
_MIN_HOUR_VALUES = 12  # fewer say nothing about an hour; the whole series stands in
_SPREAD_SHARE = 0.25  # an hour is never taken for steadier than this share of the whole series
_MAD_TO_STD = 1.4826
_CLIP = 8.0
_FIRST_CHUNK_BINS = 24  # of a large fleet; small ones read more at a time
_MAX_ROWS_READ = 5_000_000  # of settled forecasts, for the times of change
_MOST_TIMES = 20.0  # the last value's error: a series that stood still must not outweigh the fleet


@dataclass(frozen=True, slots=True)
class SeriesDrift:
    """How far one series is from its own baseline."""

    server: str
    metric: str
    score: float
    shift: float  # standard deviations
    error_ratio: float | None  # None: the model's own error is not known
    ks: float
    n_values: int

    @property
    def is_drifting(self) -> bool:
        """Whether the series is past a limit."""
        return self.score >= 1.0


def series_drift(window: PairWindow, baseline: Baseline, top: int) -> list[SeriesDrift]:
    """Return the `top` series with the highest score, highest first."""
    row_of = {name: row for row, name in enumerate(baseline.server_names)}
    rows = np.array([row_of.get(name, -1) for name in window.server_names], np.int64)
    found: list[tuple[float, int, int, float, float, int]] = []
    for column, metric in enumerate(baseline.metrics):
        if metric in window.actuals and len(rows) and row_of:
            found += _metric_scores(window, baseline, column, rows)
    found.sort(key=lambda item: (-item[0], item[1], item[2]))
    return [_describe(window, baseline, rows, item) for item in found[:top]]


def _metric_scores(
    window: PairWindow, baseline: Baseline, column: int, rows: Longs
) -> list[tuple[float, int, int, float, float, int]]:
    """Return (score, metric, server code, shift, error ratio, n) of each series of one metric."""
    metric = baseline.metrics[column]
    values = window.actuals[metric]
    is_known = np.isfinite(values) & (rows[window.servers] >= 0)
    codes, values, n_server = window.servers[is_known], values[is_known], len(rows)
    counts = np.bincount(codes, minlength=n_server)
    z = hour_deviations(baseline, column, rows[codes], window.target_ms[is_known], values)
    divisor = np.maximum(counts, 1)
    shifts = np.abs(np.bincount(codes, weights=z, minlength=n_server)) / divisor
    ratios = _error_ratios(window, baseline, column, rows)
    scores = np.maximum(shifts / SHIFT_LIMIT, np.nan_to_num(ratios / ERROR_LIMIT))
    return [
        (float(scores[code]), column, code, float(shifts[code]), float(ratios[code]), int(counts[code]))
        for code in np.flatnonzero(counts >= MIN_VALUES).tolist()
    ]


def hour_deviations(baseline: Baseline, column: int, rows: Longs, times_ms: Longs, values: Floats) -> Floats:
    """Return values in standard deviations from the mean of the same hour of the same series."""
    hours = times_ms // HOUR_MS % baseline.hour_counts.shape[-1]
    has_hour = baseline.hour_counts[rows, column, hours] >= _MIN_HOUR_VALUES
    spread = baseline.series_stds[rows, column]
    mean = np.where(has_hour, baseline.hour_means[rows, column, hours], baseline.series_means[rows, column])
    std = np.where(has_hour, baseline.hour_stds[rows, column, hours], spread)
    floor = std_floor(baseline.metrics[column], float(baseline.p95[column]))
    return np.asarray((values - mean) / np.maximum(np.maximum(std, _SPREAD_SHARE * spread), floor), float)


def _error_ratios(window: PairWindow, baseline: Baseline, column: int, rows: Longs) -> Floats:
    """Return each server's mean error over the model's own; NaN where one of them is not known."""
    metric = baseline.metrics[column]
    forecast = window.one_ahead.get(metric)
    if forecast is None:
        return np.full(len(rows), np.nan)
    errors = np.abs(forecast - window.actuals[metric])
    present = np.isfinite(errors)
    codes = window.servers[present]
    counts = np.bincount(codes, minlength=len(rows))
    means = np.bincount(codes, weights=errors[present], minlength=len(rows)) / np.maximum(counts, 1)
    known = np.where(rows >= 0, baseline.series_error_mae[np.maximum(rows, 0), column], np.nan)
    own = np.maximum(known.astype(float), std_floor(metric, float(baseline.p95[column])))
    return np.asarray(np.where(counts >= MIN_VALUES, means / own, np.nan))


def _describe(
    window: PairWindow,
    baseline: Baseline,
    rows: Longs,
    item: tuple[float, int, int, float, float, int],
) -> SeriesDrift:
    score, column, code, shift, ratio, n_values = item
    metric = baseline.metrics[column]
    values = window.actuals[metric][window.servers == code]
    ks = ks_statistic(
        values[np.isfinite(values)], baseline.series_quantiles[rows[code], column].astype(float)
    )
    known_ratio = None if np.isnan(ratio) else ratio
    return SeriesDrift(window.server_names[code], metric, score, shift, known_ratio, ks, n_values)


@dataclass(frozen=True, slots=True, eq=False)
class RelativeErrors:
    """Mean errors of every series as shares of the last value's, on the same bins; NaN = not known."""

    server_names: tuple[str, ...]
    model: Mapping[str, Floats]  # metric -> (server,) of the version itself
    served: Mapping[str, Floats]  # of what clients got

    @property
    def n_series(self) -> int:
        """Return how many series are known."""
        return sum(int(np.isfinite(ratios).sum()) for ratios in self.served.values())

    def of(self, chosen: Container[tuple[str, str]]) -> "RelativeErrors":
        """Return the errors of some (server, metric) series alone."""

        def keep(side: Mapping[str, Floats]) -> dict[str, Floats]:
            return {
                metric: np.where([(name, metric) in chosen for name in self.server_names], ratios, np.nan)
                for metric, ratios in side.items()
            }

        return RelativeErrors(self.server_names, keep(self.model), keep(self.served))


def relative_to_last(window: PairWindow, horizon: int = 1) -> RelativeErrors:
    """Compare forecasts so many bins ahead with repeating the value of their origin.

    Counts the bins whose origin is in the window, too, and series with half an hour of them.
    """
    sides: list[dict[str, Floats]] = []
    keys = window.target_ms // window.bin_ms * max(1, len(window.server_names)) + window.servers
    origins = keys - horizon * max(1, len(window.server_names))
    place = np.minimum(np.searchsorted(keys, origins), max(0, len(keys) - 1))
    for columns in (window.forecasts.get(horizon, {}), window.served.get(horizon, {})):
        found = {}
        for metric in sorted(columns.keys() & window.actuals.keys()):
            actual = window.actuals[metric]
            last = np.where(keys[place] == origins, actual[place], np.nan)
            ours, naive = np.abs(columns[metric] - actual), np.abs(last - actual)
            found[metric] = _share(window, ours, naive)
        sides.append(found)
    return RelativeErrors(window.server_names, *sides)


def _share(window: PairWindow, ours: Floats, naive: Floats) -> Floats:
    """Return each server's summed error over the other's, NaN where there is too little of it."""
    n_server, is_known = len(window.server_names), np.isfinite(ours) & np.isfinite(naive)
    codes = window.servers[is_known]
    counts = np.bincount(codes, minlength=n_server)
    sums, others = (np.bincount(codes, weights=side[is_known], minlength=n_server) for side in (ours, naive))
    ratio = np.clip(sums / np.maximum(others, 1e-12), 1 / _MOST_TIMES, _MOST_TIMES)
    return np.asarray(np.where((counts >= MIN_VALUES) & (others > 0), ratio, np.nan))


def geometric_mean(ratios: Iterable[Floats]) -> float | None:
    """Return the geometric mean of all known ratios, None where there is none.

    >>> geometric_mean([np.array([0.5, np.nan]), np.array([2.0])])
    1.0
    """
    known = np.concatenate([np.empty(0), *ratios])
    known = known[np.isfinite(known)]
    return round(float(np.exp(np.log(known).mean())), 4) if len(known) else None


def split_point(values: Floats) -> tuple[int, float]:
    """Return where a sequence changes most, and how clearly (about 1.36 is 5 % by chance).

    The largest excursion of the cumulative sum of centred values, clipped at 8 robust standard
    deviations: one outage must not outweigh a day of new values. Returns the index of the first
    value after the change. Source: CUSUM; limit of the Brownian bridge's maximum.

    >>> split_point(np.array([1.0, 1.1, 0.9, 1.0, 9.0, 9.1, 8.9, 9.2]))[0]
    4
    """
    n = len(values)
    if n < 2:
        return 0, 0.0
    away = values - np.median(values)
    scale = float(np.median(np.abs(away))) * _MAD_TO_STD or float(away.std())
    if scale == 0.0:
        return 0, 0.0
    clipped = np.clip(away / scale, -_CLIP, _CLIP)
    centred = clipped - clipped.mean()
    spread = float(centred.std())
    walk = np.abs(np.cumsum(centred))[:-1]
    peak = int(walk.argmax())
    return peak + 1, float(walk[peak] / (spread * np.sqrt(n)))


def change_times(
    drifting: Sequence[SeriesDrift],
    baseline: Baseline,
    read: ReadForecasts,
    version: str | None,
    newest_ms: int,
    bin_ms: int,
) -> dict[tuple[str, str], int]:
    """Return the start of the bin in which each series changed, by (server, metric).

    Looks at the settled bins of the last week, back as far as reading stays bounded. Both the
    values, less what is usual at their hour, and the size of the model's error are split; the
    clearer split tells the time.
    """
    wanted = {(item.server, item.metric) for item in drifting}
    row_of = {name: row for row, name in enumerate(baseline.server_names)}
    if not wanted:
        return {}
    rows = _rows_of(wanted, read, newest_ms, bin_ms)
    changed = {}
    for (server, metric), (times_ms, values, errors) in _by_series(rows, version).items():
        server_rows = np.full(len(values), row_of[server], np.int64)
        unusual = hour_deviations(baseline, baseline.metrics.index(metric), server_rows, times_ms, values)
        value_split, value_strength = split_point(unusual)
        is_own = np.isfinite(errors)  # forecasts of the version in service only
        error_split, error_strength = split_point(errors[is_own])
        use_error = error_strength > value_strength
        times_ms, split = (times_ms[is_own], error_split) if use_error else (times_ms, value_split)
        if len(times_ms):
            changed[server, metric] = int(times_ms[split])
    return changed


def _rows_of(
    wanted: set[tuple[str, str]], read: ReadForecasts, newest_ms: int, bin_ms: int
) -> list[SettledForecasts]:
    """Return the one-bin-ahead rows of the wanted series, newest chunk first."""
    end_ms, n_read, chunks = newest_ms + bin_ms, 0, []
    oldest_ms = end_ms - LOOK_BACK_DAYS * 24 * HOUR_MS
    chunk_ms = _FIRST_CHUNK_BINS * bin_ms
    while end_ms > oldest_ms and n_read < _MAX_ROWS_READ:
        start_ms = max(oldest_ms, end_ms - chunk_ms)
        rows = read(start_ms, end_ms)
        n_read += len(rows)
        chunk_ms *= 2 if len(rows) < _MAX_ROWS_READ // 20 else 1
        rows = rows.where(rows.horizon == 1)
        series = zip(rows.server_name.tolist(), rows.metric.tolist(), strict=True)
        chunks.append(rows.where(np.fromiter((pair in wanted for pair in series), bool, len(rows))))
        end_ms = start_ms
    return chunks


def _by_series(
    chunks: Iterable[SettledForecasts], version: str | None
) -> dict[tuple[str, str], tuple[Longs, Floats, Floats]]:
    """Return times, values and errors (NaN: not the version's) of each series, by time."""
    gathered: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    for rows in chunks:
        for index in range(len(rows)):
            is_own = rows.model_version[index] == version
            error = abs(rows.model_p50[index] - rows.actual[index]) if is_own else np.nan
            point = (int(rows.target_ms[index]), float(rows.actual[index]), float(error))
            gathered.setdefault((rows.server_name[index], rows.metric[index]), []).append(point)
    series = {}
    for key, points in gathered.items():
        ordered = [point for point in sorted(points) if np.isfinite(point[1])]
        table = np.array(ordered, dtype=float).reshape(-1, 3)
        series[key] = (table[:, 0].astype(np.int64), table[:, 1], table[:, 2])
    return series
