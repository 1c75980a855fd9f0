"""How likely a series passes a limit within the horizon, and which of three sources to believe.

Owns: the sources, what each knows of the running maximum, how settled windows turn that into a share of
a hundred, and by which of them an answer is given. Does not know: where values and forecasts come from.

The quantiles of single bins do not answer the question: the maximum of 96 bins passes their p90 far more
often than once in ten. So a source only gives a centre and a scale of the maximum ahead, and what
settled says how far maxima lay from the centre, in scales: P is the share of settled scores that would
have reached the limit (split conformal prediction of the running maximum; Stankeviciute et al. 2021).
A flat series is surprised by many of its small scales, a noisy one by few of its large ones; so settled
scores have a say by the scale they had (Mondrian conformal prediction; Vovk et al. 2005, section 4.5), and
all of them together as much again: in small groups the largest scores, which decide, are few.

- forecast: centre max p50, scale max p90 - max p50;
- trend: the line through the last six hours, drawn to the horizon's end; scale its residuals;
- history: the share of the series' own last windows that passed the limit; it needs no scale.

What was said is then held against what came true, in ten bins of P, and moved there: a P of 0.7 that
came true in half of the windows is said as 0.5. The answer is the source whose settled Brier score was
the lowest over the last two weeks, on windows of which all three had said a P; all go on being kept.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fleetcast.schema import Flags, Floats, Floats32

LIMITS = (70.0, 80.0, 90.0, 95.0)  # percent; each has scores of its own
SOURCES = ("forecast", "trend", "history")
FORECAST, TREND, HISTORY = range(3)
ORIGINS_KEPT = 336  # settled origins that are remembered: two weeks, one an hour
P_BINS = 10
SCORES_KEPT = 200  # of each origin: a fleet's largest part says what all of it would
FEWEST = 50  # settled scores before a source says anything
_GROUPS = 4  # of settled scores by their scale, as many of them as hold enough scores
_FEWEST_IN_GROUP = 50
_SCALE_FLOOR = 0.5  # points of a percent: closer than any sensor matters
_TREND_BINS = 72
_TREND_FEWEST = 24
# Windows that a said P counts as, before what came true moves it. Windows of one hour and the next share
# seven hours, so these are about a dozen independent ones; with 400 rare crossings were told too often.
_PRIOR = 100.0
_LEAST_PASSED = 10  # windows over a limit before scores say which source knows
LOWEST = "its Brier score is the lowest"
NOTHING_SETTLED = "no window of which all sources had said a P has settled yet"
HARDLY_PASSED = (
    f"fewer than {_LEAST_PASSED} windows have passed the limit: until then the score is the lowest of the "
    "source that never warns"
)
_N_SUMS = 3  # windows, sum of P as said raw, windows that passed


@dataclass(frozen=True, slots=True, eq=False)
class Guess:
    """What the sources know of one metric's series at one origin."""

    centres: Floats32  # (2, series) of the maximum ahead: forecast, trend; NaN = nothing
    scales: Floats32  # (2, series)
    shares: Floats32  # (series, limit) of the series' own past windows that passed; NaN = too few
    now: Floats32  # (series,) the newest value


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """What was said of one metric at one origin, until it settles."""

    guess: Guess
    raw: Floats32  # (source, series, limit)
    told: Floats32  # (source, series, limit) after what came true before


def guess(quantiles: Floats32, history: Floats32, horizon_bins: int) -> Guess:
    """Return what the sources know.

    Args:
        quantiles: (series, horizon, 3) p10, p50, p90 as published; NaN = none.
        history: (series, bin) means up to the origin; NaN = no record.
    """
    with np.errstate(invalid="ignore"):
        median, high = quantiles[..., 1].max(axis=1), quantiles[..., 2].max(axis=1)
    centre, scale = _trend(history, horizon_bins)
    scales = np.maximum(np.stack([high - median, scale]), _SCALE_FLOOR)
    return Guess(
        np.stack([median, centre]).astype(np.float32),
        scales.astype(np.float32),
        _past_shares(history, horizon_bins),
        history[:, -1],
    )


def _trend(history: Floats32, horizon_bins: int) -> tuple[Floats, Floats]:
    """Return the highest point ahead of a least-squares line, and the standard deviation about it."""
    values = history[:, -_TREND_BINS:].astype(np.float64)
    times = np.arange(values.shape[1]) - values.shape[1] + 1.0
    is_known = np.isfinite(values)
    counts = is_known.sum(axis=1)
    weights = np.where(counts > 0, counts, 1)
    known = np.where(is_known, values, 0.0)
    mean_t, mean_v = (is_known * times).sum(axis=1) / weights, known.sum(axis=1) / weights
    dt = np.where(is_known, times - mean_t[:, None], 0.0)
    spread = (dt**2).sum(axis=1)
    slopes = (dt * (known - mean_v[:, None])).sum(axis=1) / np.where(spread > 0, spread, 1.0)
    level = mean_v - slopes * mean_t  # at the origin
    residuals = np.where(is_known, values - level[:, None] - slopes[:, None] * times, 0.0)
    scale = np.sqrt((residuals**2).sum(axis=1) / weights)
    centre = level + np.maximum(slopes * horizon_bins, 0.0)
    centre[counts < _TREND_FEWEST] = np.nan
    return centre, scale


def _past_shares(history: Floats32, horizon_bins: int) -> Floats32:
    """Return (series, limit): of the windows of this length in the past, one an hour, those that passed."""
    step = max(1, horizon_bins // 8)
    n_blocks = history.shape[1] // step
    blocks = history[:, history.shape[1] - n_blocks * step :].reshape(len(history), n_blocks, step)
    tops = np.where(np.isfinite(blocks), blocks, -np.inf).max(axis=2)
    span = -(-horizon_bins // step)
    shares = np.full((len(history), len(LIMITS)), np.nan, dtype=np.float32)
    if n_blocks < 2 * span:
        return shares
    windows = np.lib.stride_tricks.sliding_window_view(tops, span, axis=1).max(axis=2)
    is_known = np.isfinite(windows)
    n_known = is_known.sum(axis=1)
    for column, limit in enumerate(LIMITS):
        n_passed = (windows >= limit).sum(axis=1)
        shares[:, column] = np.where(n_known >= span, n_passed / np.maximum(n_known, 1), np.nan)
    return shares


@dataclass(slots=True, eq=False)
class Calibration:
    """What settled windows taught of one metric; plain arrays, so that a file can hold it."""

    scores: Floats32 = field(
        default_factory=lambda: np.full((2, ORIGINS_KEPT, SCORES_KEPT), np.nan, np.float32)
    )
    # the scale of each score; NaN = kept before scales were: it counts in each group
    scales: Floats32 = field(
        default_factory=lambda: np.full((2, ORIGINS_KEPT, SCORES_KEPT), np.nan, np.float32)
    )
    # (source, limit, origin, bin of P, [windows, sum of raw P, windows that passed])
    tallies: Floats32 = field(
        default_factory=lambda: np.zeros(
            (len(SOURCES), len(LIMITS), ORIGINS_KEPT, P_BINS, _N_SUMS), np.float32
        )
    )
    # (source, limit, origin, [windows, sum of squared errors of told P])
    brier: Floats32 = field(
        default_factory=lambda: np.zeros((len(SOURCES), len(LIMITS), ORIGINS_KEPT, 2), np.float32)
    )
    n_settled: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))

    def say(self, found: Guess) -> Said:
        """Return each source's P of passing each limit; NaN where it knows too little."""
        raw = np.full((len(SOURCES), len(found.now), len(LIMITS)), np.nan, dtype=np.float32)
        for source in (FORECAST, TREND):
            is_settled = np.isfinite(self.scores[source])
            if is_settled.sum() >= FEWEST:
                settled = self.scores[source][is_settled], self.scales[source][is_settled]
                raw[source] = _reach(found.centres[source], found.scales[source], *settled)
        raw[HISTORY] = found.shares
        return Said(found, raw, self._tell(raw))

    def settle(self, said: Said, peaks: Floats32) -> None:
        """Learn from what came true.

        Args:
            peaks: (series,) the highest bin of the horizon; NaN = no record.
        """
        place = int(self.n_settled[0]) % ORIGINS_KEPT
        self.scores[:, place] = self.scales[:, place] = np.nan
        self.tallies[:, :, place] = self.brier[:, :, place] = 0.0
        for source in (FORECAST, TREND):
            scores = (peaks - said.guess.centres[source]) / said.guess.scales[source]
            known = np.flatnonzero(np.isfinite(scores))
            kept = known[np.linspace(0, len(known) - 1, min(len(known), SCORES_KEPT)).astype(int)]
            self.scores[source, place, : len(kept)] = scores[kept]
            self.scales[source, place, : len(kept)] = said.guess.scales[source, kept]
        for column, limit in enumerate(LIMITS):
            was_below = np.isfinite(peaks) & (said.guess.now < limit)
            is_common = was_below & np.isfinite(said.told[:, :, column]).all(axis=0)
            passed = peaks >= limit
            for source in range(len(SOURCES)):
                raw, told = said.raw[source, :, column], said.told[source, :, column]
                is_said = was_below & np.isfinite(raw)
                self._tally(source, column, place, raw[is_said], passed[is_said])
                errors = told[is_common] - passed[is_common]  # all sources on the same windows
                self.brier[source, column, place] = len(errors), float((errors**2).sum())
        self.n_settled[0] += 1

    def choose(self, column: int) -> tuple[int, str]:
        """Return the source that answers for a limit, and why: the one with the lowest Brier score.

        Where hardly a window has passed the limit yet, the best score is that of the source that never says
        so: plain history. The forecast answers there.
        """
        sums = self.brier[:, column].sum(axis=1, dtype=np.float64)
        has_scores = bool(np.isfinite(self.scores).any())
        n_passed = self.tallies[HISTORY, column, :, :, 2].sum(dtype=np.float64)
        if not sums[0, 0]:
            return (FORECAST if has_scores else HISTORY), NOTHING_SETTLED
        if n_passed < _LEAST_PASSED and has_scores:
            return FORECAST, HARDLY_PASSED
        return int(np.argmin(sums[:, 1])), LOWEST  # of the same windows; the forecast where two are equal

    def brier_scores(self, column: int) -> tuple[int, Floats]:
        """Return of how many settled windows all sources had said a P, and their Brier scores on these."""
        sums = self.brier[:, column].sum(axis=1, dtype=np.float64)
        n_windows = int(sums[0, 0])
        return n_windows, np.asarray(sums[:, 1] / max(n_windows, 1), np.float64)

    def reliability(self, source: int, column: int) -> Floats:
        """Return (bin of P, [windows, mean raw P, share that passed]) of all that one source said."""
        sums = self.tallies[source, column].sum(axis=0, dtype=np.float64)
        counts = np.maximum(sums[:, :1], 1.0)
        return np.concatenate([sums[:, :1], sums[:, 1:] / counts], axis=1)

    def _tally(self, source: int, column: int, place: int, raw: Floats32, passed: Flags) -> None:
        bins = _p_bin(raw)
        for number, weights in enumerate((None, raw, passed)):
            self.tallies[source, column, place, :, number] = np.bincount(bins, weights, P_BINS)

    def _tell(self, raw: Floats32) -> Floats32:
        """Return each P moved to the share that came true where it was said."""
        told = raw.copy()
        for source in range(len(SOURCES)):
            for column in range(len(LIMITS)):
                sums = self.tallies[source, column].sum(axis=0, dtype=np.float64)
                middle = (np.arange(P_BINS) + 0.5) / P_BINS
                means = np.where(sums[:, 0] > 0, sums[:, 1] / np.maximum(sums[:, 0], 1.0), middle)
                shares = (sums[:, 2] + _PRIOR * means) / (sums[:, 0] + _PRIOR)
                shares = _in_order(shares, sums[:, 0] + 1.0)  # more said is never less told
                means, shares = (np.concatenate([[0.0], knots, [1.0]]) for knots in (means, shares))
                values = raw[source, :, column]
                is_said = np.isfinite(values)
                told[source, is_said, column] = np.interp(values[is_said], means, shares)
        return told


def _in_order(values: Floats, weights: Floats) -> Floats:
    """Return the nearest values that never fall: neighbours out of order share their mean.

    >>> _in_order(np.array([0.1, 0.5, 0.3]), np.array([1.0, 1.0, 3.0])).round(2).tolist()
    [0.1, 0.35, 0.35]
    """
    blocks: list[tuple[float, float, int]] = []  # mean, weight, how many values
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        mean, total, count = value, weight, 1
        while blocks and blocks[-1][0] > mean:
            before, its_weight, its_count = blocks.pop()
            mean = (before * its_weight + mean * total) / (its_weight + total)
            total, count = total + its_weight, count + its_count
        blocks.append((mean, total, count))
    return np.repeat([block[0] for block in blocks], [block[2] for block in blocks])


def _p_bin(values: Floats32) -> NDArray[np.intp]:
    return np.clip((values * P_BINS).astype(np.intp), 0, P_BINS - 1)


def _group(scores: Floats32, scales: Floats32) -> list[tuple[float, Floats32]]:
    """Return (logarithm of the middle scale, its sorted scores) of groups of about equal size."""
    is_known = np.isfinite(scales)
    if not is_known.any():
        return [(0.0, np.sort(scores))]
    order = np.argsort(scales[is_known], kind="stable")
    known, logs = scores[is_known][order], np.log(scales[is_known][order])
    n_groups = max(1, min(_GROUPS, len(known) // _FEWEST_IN_GROUP))
    # a group begins with the first of equal scales, so that each scale belongs to one group alone
    starts = np.unique(np.searchsorted(logs, logs[np.arange(n_groups) * len(logs) // n_groups]))[1:]
    of_any = scores[~is_known]
    return [
        (float(np.median(its_logs)), np.sort(np.concatenate([its_scores, of_any])))
        for its_scores, its_logs in zip(np.split(known, starts), np.split(logs, starts), strict=True)
    ]


def _reach(centre: Floats32, scale: Floats32, scores: Floats32, scales: Floats32) -> Floats32:
    """Return (series, limit): the share of settled scores that would have reached each limit.

    Half of it is of all scores, half of those with about this scale: a series between two groups gets of
    both, by how near it is to each.
    """
    needed = (np.array(LIMITS, np.float32) - centre[:, None]) / scale[:, None]
    groups = _group(scores, scales)
    places = np.interp(np.log(scale), [middle for middle, _ in groups], np.arange(len(groups)))
    own = np.zeros(needed.shape)
    for number, (_, settled) in enumerate(groups):
        nearness = np.maximum(0.0, 1.0 - np.abs(places - number))
        own += nearness[:, None] * _share_reached(settled, needed)
    reached = (own + _share_reached(np.sort(scores), needed)) / 2
    return np.where(np.isfinite(needed), reached, np.nan).astype(np.float32)


def _share_reached(settled: Floats32, needed: Floats32) -> Floats:
    """Return the share of sorted scores that are as high as needed, never quite none or all."""
    n_below = np.searchsorted(settled, needed, side="left")
    return np.asarray((len(settled) - n_below + 0.5) / (len(settled) + 1.0), np.float64)
