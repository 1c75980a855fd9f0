"""Rules to compare with, each for one series: literal, Kolmogorov-Smirnov, peers' defaults.

Every rule looks at a stretch of bins whose first day is history and answers at each quarter of an
hour after it. Evidently's and NannyML's defaults are written out in numpy from their documents;
two streaming detectors are small versions of their published algorithms.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.drift.parts.data import DAY
from fleetcast.drift.seasonal.quorum import COMBINED_THRESHOLD, THRESHOLDS, WEIGHTS

Values = NDArray[np.float64]
Bools = NDArray[np.bool_]

STEP = 3  # bins between checks
POINTS = 128  # sketch of a reference: distribution gaps are exact to 1 / POINTS
LITERAL_DAYS = 7
LITERAL_BINS = 12
COVERAGE = 0.6
SLOW = 4  # the two window rules that sort are asked hourly and keep their answer in between
RULES = (
    "literal 1,000",
    "literal 24 h",
    "ours",
    "KS p < .05",
    "Evidently",
    "NannyML",
    "ADWIN",
    "Page-Hinkley",
)


@dataclass(frozen=True, eq=False)
class Stretch:
    """What a rule is given: a reference, and a day of history before the bins it judges."""

    metric: str
    reference: Values
    values: Values  # the first DAY bins are history
    errors: Values  # of the one-step proxy, for the same bins

    @property
    def ends(self) -> NDArray[np.int64]:
        """Return the end (exclusive) of the window of each check."""
        return np.arange(DAY, len(self.values) + 1, STEP)


@dataclass(frozen=True, eq=False)
class Sketch:
    """A reference as evenly spaced quantiles, and how much of it is at or below each."""

    edges: Values
    below: Values  # share < edge, share <= edge, alternating

    @staticmethod
    def of(values: Values) -> "Sketch":
        """Sketch the finite values."""
        known = np.sort(values[np.isfinite(values)])
        edges = np.unique(known[((np.arange(POINTS) + 0.5) / POINTS * len(known)).astype(int)])
        sides = np.stack([np.searchsorted(known, edges, "left"), np.searchsorted(known, edges, "right")], 1)
        return Sketch(edges, sides.ravel() / len(known))

    def running(self, values: Values) -> NDArray[np.int32]:
        """Return (bin + 1, 2 x edge): running counts of values below and at or below each edge."""
        seen = np.isfinite(values)[:, None]
        hits = (
            np.stack([values[:, None] < self.edges, values[:, None] <= self.edges], axis=2) & seen[:, :, None]
        )
        flat = hits.reshape(len(values), -1).cumsum(axis=0, dtype=np.int32)
        return np.concatenate([np.zeros_like(flat[:1]), flat])


def window_gaps(sketch: Sketch, values: Values, ends: NDArray[np.int64], length: int) -> Values:
    """Return the Kolmogorov-Smirnov distance of each window; 0 where it is too thin."""
    running = sketch.running(values)
    n = window_sums(np.isfinite(values), ends, length)
    counts = running[ends] - running[ends - length]
    gaps = np.abs(counts / np.maximum(n, 1)[:, None] - sketch.below).max(axis=1)
    return np.where(n >= COVERAGE * length, gaps, 0.0)


def window_gaps_of(sketch: Sketch, series: list[Values], ends: NDArray[np.int64], length: int) -> Values:
    """Return the distance of the pooled windows of several series."""
    counts = np.zeros((len(ends), len(sketch.below)))
    n = np.zeros(len(ends))
    for values in series:
        running = sketch.running(values)
        counts += running[ends] - running[ends - length]
        n += window_sums(np.isfinite(values), ends, length)
    return np.asarray(np.abs(counts / np.maximum(n, 1)[:, None] - sketch.below).max(axis=1) * (n > 0))


def window_sums(values: NDArray[np.generic], ends: NDArray[np.int64], length: int) -> Values:
    """Return the sum over each window that ends there."""
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return np.asarray(total[ends] - total[ends - length])


def literal(stretch: Stretch, length: int) -> Bools:
    """Apply the specification's four metrics and its thresholds to one series."""
    base = stretch.reference[-LITERAL_DAYS * DAY :]
    base = base[np.isfinite(base)]
    if len(base) < 50:
        return np.zeros(len(stretch.ends), np.bool_)
    ends, seen = stretch.ends, np.isfinite(stretch.values)
    values = np.where(seen, stretch.values, 0.0)
    p95 = abs(float(np.quantile(base, 0.95)))
    percent = stretch.metric.endswith("_pct")
    std = max(float(base.std()), 0.5 if percent else max(0.01 * p95, 1e-9))
    floor = 20.0 if percent else max(0.2 * p95, 1e-9)
    n = np.maximum(window_sums(seen, ends, length), 1)
    relative = np.nan_to_num(stretch.errors / np.maximum(np.abs(stretch.values), floor))
    mean = window_sums(values, ends, length) / n
    scores = {
        "per": window_sums(relative, ends, length) / n,
        "dss": window_gaps(Sketch.of(base), stretch.values, ends, length),
        "fds": np.minimum(np.abs(mean - base.mean()) / std / 3, 1),
        "anomaly_rate": window_sums(seen & (np.abs(values - base.mean()) > 3 * std), ends, length) / n,
    }
    combined = sum(WEIGHTS[name] * score for name, score in scores.items())
    over = combined > COMBINED_THRESHOLD
    for name, score in scores.items():
        over |= score > THRESHOLDS[name]
    return np.asarray(over & (window_sums(seen, ends, length) >= COVERAGE * length))


def ks_test(stretch: Stretch) -> Bools:
    """Two-sample Kolmogorov-Smirnov of the newest day, asymptotic p < .05."""
    known = int(np.isfinite(stretch.reference).sum())
    n = np.maximum(window_sums(np.isfinite(stretch.values), stretch.ends, DAY), 1)
    limit = 1.358 * np.sqrt((n + known) / (n * max(known, 1)))
    gaps = window_gaps(Sketch.of(stretch.reference), stretch.values, stretch.ends, DAY)
    return np.asarray(gaps > limit)


def evidently(stretch: Stretch) -> Bools:
    """Evidently's default for a numeric column over 1,000 rows: normed Wasserstein >= 0.1."""
    known = np.sort(stretch.reference[np.isfinite(stretch.reference)])
    if len(known) <= 1000:
        return ks_test(stretch)
    norm = max(float(known.std()), 0.001)
    ends = stretch.ends[::SLOW]
    out = np.zeros(len(ends), np.bool_)
    usual = np.quantile(known, (np.arange(DAY) + 0.5) / DAY)
    for place, end in enumerate(ends):
        window = stretch.values[end - DAY : end]
        own = np.sort(window[np.isfinite(window)])
        if len(own) < COVERAGE * DAY:
            continue
        expected = usual if len(own) == DAY else np.quantile(known, (np.arange(len(own)) + 0.5) / len(own))
        out[place] = np.abs(own - expected).mean() / norm >= 0.1
    return np.repeat(out, SLOW)[: len(stretch.ends)]


def nannyml(stretch: Stretch) -> Bools:
    """NannyML's default, Jensen-Shannon over mean + 3 std of day chunks; the chunk is the newest day."""
    known = stretch.reference[np.isfinite(stretch.reference)]
    edges = np.unique(np.histogram_bin_edges(known, bins="doane"))
    inner = edges[1:-1]
    base = np.bincount(np.searchsorted(inner, known, "right"), minlength=len(inner) + 1) / len(known)
    days = stretch.reference[: len(stretch.reference) // DAY * DAY].reshape(-1, DAY)
    own = np.array([_distance(base, inner, day) for day in days if np.isfinite(day).mean() >= COVERAGE])
    limit = own.mean() + 3 * own.std() if len(own) else np.inf
    windows = (stretch.values[end - DAY : end] for end in stretch.ends[::SLOW])
    over = [np.isfinite(w).mean() >= COVERAGE and _distance(base, inner, w) > limit for w in windows]
    return np.repeat(np.array(over, np.bool_), SLOW)[: len(stretch.ends)]


def _distance(base: Values, inner: Values, values: Values) -> float:
    """Return the Jensen-Shannon distance of a window from the reference's histogram."""
    known = values[np.isfinite(values)]
    own = np.bincount(np.searchsorted(inner, known, "right"), minlength=len(base)) / len(known)
    middle = (base + own) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(p > 0, p * np.log2(p / middle), 0).sum() for p in (base, own)]
    return float(np.sqrt(max(sum(parts) / 2, 0)))
