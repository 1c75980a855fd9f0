"""The literal four drift metrics: how far a window is from a baseline, as plain numbers.

Owns: the formulas of PER, DSS, FDS, anomaly rate and trend, and the columns they are taken over:
mappings of metric to number or array, and DataFrames (recognised by shape, so that pandas is not
imported for it), as float arrays of equal length, NaN = absent. numpy only, no state, no files.
Does not know: where a window comes from, which thresholds hold, what is done about drift.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from fleetcast.drift.literal.baseline import Baseline
from fleetcast.errors import BadData
from fleetcast.schema import Floats
from fleetcast.settings import DriftSettings

MOST_ERROR = 10.0  # of one forecast, relative: a stray value moves PER by no more than its share of the pairs
SIGMAS = 3.0  # FDS is full, and a value is an anomaly, at this many standard deviations
# A metric that stood still has no spread to measure by; its smallest step must not count as drift.
STD_FLOOR_POINTS = 0.5  # percents: what tools round to
STD_FLOOR_SHARE = 0.01  # others: share of the baseline's 95th percentile
TINY = 1e-9
_EXPECTED = "a mapping of metric to number or array, or a DataFrame"

Columns = Mapping[str, Floats]  # metric -> (row,), NaN = absent


def float_columns(source: Any, what: str) -> dict[str, Floats]:
    """Return the numbers of `source` by metric; values that are not finite are absent (NaN).

    Columns of a DataFrame that hold no numbers (timestamp, server_name) are left out.

    Raises:
        BadData: it is neither, or its columns are not numbers of equal length.

    >>> float_columns({"cpu_pct": 12, "mem_pct": None}, "features")
    {'cpu_pct': array([12.]), 'mem_pct': array([nan])}
    """
    if hasattr(source, "select_dtypes"):
        numbers = source.select_dtypes("number")
        columns = {str(name): _column(numbers[name], name, what) for name in numbers.columns}
    elif isinstance(source, Mapping):
        columns = {str(name): _column(values, name, what) for name, values in source.items()}
    else:
        raise BadData(f"{what} must be {_EXPECTED}, got {type(source).__name__}")
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        found = ", ".join(f"{name}: {len(column)}" for name, column in columns.items())
        raise BadData(f"{what} must be columns of equal length, got {found}")
    return columns


def _column(values: Any, name: object, what: str) -> Floats:
    try:
        if hasattr(values, "to_numpy"):
            column = np.array(values.to_numpy(dtype=float, na_value=np.nan))  # ours to change
        else:
            column = np.array(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise BadData(f"{what}[{name!r}] must be numbers: {error}") from error
    if column.ndim > 1:
        raise BadData(f"{what}[{name!r}] must be one number or a flat array, got shape {column.shape}")
    column = column.reshape(-1)
    column[~np.isfinite(column)] = np.nan
    return column


def n_rows(*tables: Mapping[str, Floats]) -> int:
    """Return the rows of tables that belong together.

    Raises:
        BadData: their lengths differ.
    """
    lengths = {len(column) for table in tables for column in table.values()}
    if len(lengths) > 1:
        raise BadData(f"predictions, actuals and features must have one length, got {sorted(lengths)} rows")
    return lengths.pop() if lengths else 0


def extend(
    old: Mapping[str, Floats], n_old: int, new: Mapping[str, Floats], n_new: int, keep: int
) -> dict[str, Floats]:
    """Return the newest `keep` rows of `old` followed by `new`; a metric one lacks is absent there."""
    return {
        name: np.concatenate((old.get(name, np.full(n_old, np.nan)), new.get(name, np.full(n_new, np.nan))))[
            -keep:
        ]
        for name in dict.fromkeys((*old, *new))
    }


@dataclass(frozen=True, slots=True, eq=False)
class MetricBaseline:
    """What the values of one metric looked like when the model was trained."""

    sorted_values: Floats  # a sample or evenly spaced quantiles, ascending; never empty where n > 0
    n: int
    mean: float
    std: float
    p95: float


@dataclass(frozen=True, slots=True)
class MetricScores:
    """The four metrics of one window (None: nothing to measure it by), and the columns they rest on."""

    per: float | None = None
    dss: float | None = None
    fds: float | None = None
    anomaly_rate: float | None = None
    compared: tuple[str, ...] = ()
    not_compared: Mapping[str, str] = field(default_factory=dict)  # metric -> why

    def by_name(self) -> dict[str, float | None]:
        """Return the four as the outer interfaces name them."""
        return {"per": self.per, "dss": self.dss, "fds": self.fds, "anomaly_rate": self.anomaly_rate}


def baseline_of(values: Floats) -> MetricBaseline:
    """Keep a sample of values exactly.

    >>> baseline_of(np.array([3.0, 1.0, np.nan, 2.0])).sorted_values.tolist()
    [1.0, 2.0, 3.0]
    """
    present = np.sort(values[np.isfinite(values)].astype(np.float64))
    if not len(present):
        return MetricBaseline(present, 0, 0.0, 0.0, 0.0)
    p95 = float(np.quantile(present, 0.95))
    return MetricBaseline(present, len(present), float(present.mean()), float(present.std()), p95)


def baselines_from(baseline: Baseline) -> dict[str, MetricBaseline]:
    """Return the pooled sketches of a saved baseline, by metric."""
    return {
        name: MetricBaseline(
            baseline.quantiles[index],
            int(baseline.counts[index]),
            float(baseline.means[index]),
            float(baseline.stds[index]),
            float(baseline.p95[index]),
        )
        for index, name in enumerate(baseline.metrics)
    }


def is_percent(metric: str) -> bool:
    """Whether a metric is in points of percent, by its name."""
    return metric.endswith("_pct")


def error_floor(metric: str, p95: float, settings: DriftSettings) -> float:
    """Return PER's smallest divisor: an error of 0.04 points on an idle CPU is no 40 % error."""
    if is_percent(metric):
        return settings.per_floor_points
    return max(settings.per_floor_share * abs(p95), TINY)


def std_floor(metric: str, p95: float) -> float:
    """Return the smallest standard deviation a metric is measured by."""
    return STD_FLOOR_POINTS if is_percent(metric) else max(STD_FLOOR_SHARE * abs(p95), TINY)


def relative_errors(p50: Floats, actual: Floats, floor: float) -> Floats:
    """Return |p50 - actual| / max(|actual|, floor), `MOST_ERROR` at most; NaN where either is absent.

    >>> relative_errors(np.array([55.0, 1.0]), np.array([50.0, 0.0]), 20.0).tolist()
    [0.1, 0.05]
    """
    return np.minimum(np.abs(p50 - actual) / np.maximum(np.abs(actual), floor), MOST_ERROR)


def ks_statistic(window: Floats, sorted_baseline: Floats) -> float:
    """Return the two-sample Kolmogorov-Smirnov statistic, as scipy's `ks_2samp(...).statistic`.

    Between two values of one sample its own distribution is flat and the other's rises, so the largest
    gap stands at a value of either sample, on it or just before it. The shorter sample is asked: a check
    against 1,001 quantiles costs one sort of the window, and little more however long the window is.

    >>> ks_statistic(np.array([3.0, 4.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    0.5
    """
    if not len(window) or not len(sorted_baseline):
        return 0.0
    shorter, longer = sorted((np.sort(window), sorted_baseline), key=len)
    on_it = _shares(shorter, shorter, "right") - _shares(longer, shorter, "right")
    before_it = _shares(shorter, shorter, "left") - _shares(longer, shorter, "left")
    return float(max(np.abs(on_it).max(), np.abs(before_it).max()))


def _shares(ordered: Floats, points: Floats, side: Literal["left", "right"]) -> Floats:
    """Return the share of values at or below each point ("right"), or below it ("left")."""
    return np.asarray(np.searchsorted(ordered, points, side=side) / len(ordered))


def mean_shift(values: Floats, baseline: MetricBaseline, floor: float) -> float:
    """Return the distance of the means in standard deviations of the baseline, 1.0 at three or more."""
    distance = abs(float(values.mean()) - baseline.mean) / max(baseline.std, floor)
    return min(distance / SIGMAS, 1.0)


def count_anomalies(values: Floats, baseline: MetricBaseline, floor: float) -> int:
    """Count the values more than three standard deviations from the baseline's mean."""
    return int((np.abs(values - baseline.mean) > SIGMAS * max(baseline.std, floor)).sum())


def score_window(
    predictions: Columns,
    actuals: Columns,
    features: Columns,
    baselines: Mapping[str, MetricBaseline],
    settings: DriftSettings,
) -> MetricScores:
    """Return the four metrics of a window.

    Without any baseline PER alone is measured, by whatever values there are. With one, only
    metrics with `min_values` values in both the window and the baseline count.
    """
    not_compared = {
        name: why for name in features if (why := _why_not(name, features[name], baselines, settings))
    }
    compared = tuple(name for name in features if name not in not_compared)
    shifts, drifts, anomalies, n_values = [], [], 0, 0
    for name in compared:
        present = features[name][np.isfinite(features[name])]
        baseline, floor = baselines[name], std_floor(name, baselines[name].p95)
        shifts.append(ks_statistic(present, baseline.sorted_values))
        drifts.append(mean_shift(present, baseline, floor))
        anomalies += count_anomalies(present, baseline, floor)
        n_values += len(present)
    return MetricScores(
        per=error_rate(predictions, actuals, baselines, settings),
        dss=float(np.mean(shifts)) if shifts else None,
        fds=float(np.mean(drifts)) if drifts else None,
        anomaly_rate=anomalies / n_values if n_values else None,
        compared=compared,
        not_compared=not_compared,
    )


def _why_not(
    name: str, values: Floats, baselines: Mapping[str, MetricBaseline], settings: DriftSettings
) -> str:
    n_window = int(np.isfinite(values).sum())
    if name not in baselines:
        return "not in the baseline" if baselines else "no baseline"
    if n_window < settings.min_values:
        return f"{n_window} values in the window, {settings.min_values} needed"
    if baselines[name].n < settings.min_values:
        return f"{baselines[name].n} values in the baseline, {settings.min_values} needed"
    return ""


def error_rate(
    predictions: Columns,
    actuals: Columns,
    baselines: Mapping[str, MetricBaseline],
    settings: DriftSettings,
) -> float | None:
    """Return PER: the mean relative error over every value of every metric that counts; None without any."""
    pooled = []
    for name in predictions:
        if name not in actuals or (baselines and name not in baselines):
            continue
        baseline = baselines.get(name) or baseline_of(np.abs(actuals[name]))
        errors = relative_errors(predictions[name], actuals[name], error_floor(name, baseline.p95, settings))
        errors = errors[np.isfinite(errors)]
        needed = settings.min_values if baselines else 1
        if len(errors) >= needed and (not baselines or baseline.n >= needed):
            pooled.append(errors)
    return float(np.concatenate(pooled).mean()) if pooled else None


def trend(older: float, newer: float, threshold: float) -> str:
    """Name the way a score goes: a tenth of its threshold is noise.

    >>> trend(0.08, 0.085, 0.10), trend(0.08, 0.12, 0.10), trend(0.2, 0.1, 0.15)
    ('stable', 'increasing', 'decreasing')
    """
    if abs(newer - older) <= 0.1 * threshold:
        return "stable"
    return "increasing" if newer > older else "decreasing"
