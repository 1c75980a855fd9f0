"""Records → bins: the means a model sees, whether there are enough to train, and of which servers.

Owns: `bin_means`, the one way rows become bins (the server and the trainer both call it), the 16 bits in
which a daemon remembers a mean (`BinCodes`), the count of trainable windows, and the sample of a fleet too
large to train on whole. numpy only. Does not know: what a model makes of the bins (`encoding`), files,
clocks.
"""

from collections.abc import Collection, Iterable
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from fleetcast.schema import Codes, Floats, Floats32, Longs
from fleetcast.settings import DecisionSettings

LIVE_DAYS = 2  # of a fleet too large to train on whole, a server that was silent for longer is passed over
HISTORY_BINS = 2304  # bins of history a forecast may look at: 8 days of 5 minutes
DAY_BINS = 288  # bins in which a series shows its present level and spread: 1 day of 5 minutes
RECENT_BINS = 12  # a series silent for longer has no origin to forecast from: 1 hour of 5 minutes
NO_MEAN = 65_535  # the code of a bin without a record
_LAST_CODE = NO_MEAN - 1
_LOW_PERCENT, _FINE_PERCENTS = -1.0, 101.0  # the lowest that is accepted; points above it up to 100
_PERCENT_STEP, _HIGH_PERCENT_STEP = 0.005, 0.02  # points
_SMALL_RATE, _RATE_STEP, _FAR_RATE_STEP = 1e-6, 0.0016, 0.01971  # of log(1 + rate / smallest), to 3.4e38
_MIDDLE_CODE, _RATE_CODES = 32_767, 30_000  # of a rate of 0; fine steps on either side of it

MeanCodes = NDArray[np.uint16]


def bin_means(codes: Codes, timestamps_ms: Longs, values: Floats, bin_ms: int) -> tuple[Codes, Longs, Floats]:
    """Return the mean of every (server, bin) that holds a row.

    Rows of one (server, timestamp) are merged first: the last value that is not NaN wins. The
    answer does not depend on the order of rows of different times, nor on the other columns.

    Args:
        codes: (row,) server of each row.
        timestamps_ms: (row,)
        values: (row,) or (row, metric); NaN = absent.
    Returns:
        server codes, bin starts and means, sorted by server then bin; NaN = no value.

    >>> code, start, mean = bin_means(
    ...     np.zeros(3, np.int32), np.array([0, 5_000, 300_000]), np.array([1.0, 2.0, 7.0]), 300_000
    ... )
    >>> start.tolist(), mean.tolist()
    ([0, 300000], [1.5, 7.0])
    """
    columns = values if values.ndim == 2 else values[:, None]
    # rows of the buffer are ordered: a sort would cost as much as the rest
    if not _is_ordered(codes, timestamps_ms):
        order = np.lexsort((timestamps_ms, codes))  # stable: rows of one key keep their order
        codes, timestamps_ms, columns = codes[order], timestamps_ms[order], columns[order]
    codes, timestamps_ms, columns = _merge_repeated(codes, timestamps_ms, columns)
    bins = timestamps_ms // bin_ms
    starts = _group_starts(codes, bins)
    if len(starts) == len(codes):  # means already, or as few records: each is its own mean
        return codes, bins * bin_ms, (columns if values.ndim == 2 else columns[:, 0])
    means = np.full((len(starts), columns.shape[1]), np.nan)
    for index in range(columns.shape[1]):
        means[:, index] = _group_means(columns[:, index], starts)
    return (
        codes[starts],
        bins[starts] * bin_ms,
        means if values.ndim == 2 else means[:, 0],
    )


def _is_ordered(codes: Codes, times: Longs) -> bool:
    """Whether rows are sorted by server then time already."""
    is_later = (codes[1:] == codes[:-1]) & (times[1:] >= times[:-1])
    return bool((is_later | (codes[1:] > codes[:-1])).all())


def _merge_repeated(codes: Codes, times: Longs, columns: Floats) -> tuple[Codes, Longs, Floats]:
    """Return one row per (server, time), each metric the last that was sent."""
    starts = _group_starts(codes, times)
    if len(starts) == len(codes):
        return codes, times, columns
    ends = np.append(starts[1:], len(codes)) - 1
    rows = np.arange(len(codes))
    merged = np.empty((len(starts), columns.shape[1]))
    for index in range(columns.shape[1]):
        column = columns[:, index]
        newest = np.maximum.reduceat(np.where(np.isnan(column), -1, rows), starts)
        merged[:, index] = column[np.where(newest < 0, ends, newest)]
    return codes[starts], times[starts], merged


def _group_starts(first: Codes | Longs, second: Longs) -> Longs:
    """Return the first row of each run of equal pairs."""
    if not len(first):
        return np.empty(0, np.int64)
    changed = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    return np.flatnonzero(np.concatenate(([True], changed))).astype(np.int64)


def _group_means(column: Floats, starts: Longs) -> Floats:
    if not len(starts):
        return np.empty(0)
    # one contiguous column at a time: a sum must not depend on which other metrics came along
    column = np.ascontiguousarray(column)
    present = ~np.isnan(column)
    sums = np.add.reduceat(np.where(present, column, 0.0), starts)
    counts = np.add.reduceat(present.astype(np.int64), starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums / counts)


class BinCodes:
    """Means of one metric as 16 bits.

    Percents are kept to 0.0025 points up to 100 and to 0.01 up to 1000; other metrics to 0.1 % from 1e-5
    to 7e14 on either side of 0, to 1 % beyond; 0 is exact. A code depends on its mean alone, so a restart,
    which reads the means again, brings back the same values.

    >>> percents, rates = BinCodes(is_percent=True), BinCodes(is_percent=False)
    >>> percents.decode(percents.encode(np.array([-1.0, 12.34, 100.0, 1000.0, np.nan]))).tolist()
    [-1.0, 12.34000015258789, 100.0, 1000.0, nan]
    >>> np.round(rates.decode(rates.encode(np.array([-3.0, 0.0, 52.3]))), 2).tolist()
    [-3.0, 0.0, 52.31999969482422]
    """

    def __init__(self, *, is_percent: bool) -> None:
        self._is_percent = is_percent
        codes = np.arange(NO_MEAN, dtype=np.float64)
        if is_percent:
            values = _bend_up(codes, _FINE_PERCENTS, _PERCENT_STEP, _HIGH_PERCENT_STEP) + _LOW_PERCENT
        else:
            steps = codes - _MIDDLE_CODE
            logs = _bend_up(np.abs(steps), _RATE_CODES * _RATE_STEP, _RATE_STEP, _FAR_RATE_STEP)
            values = np.copysign(_SMALL_RATE * np.expm1(logs), steps)
        self._values = np.append(values + 0.0, np.nan).astype(np.float32)  # (code,)

    def encode(self, means: Floats) -> MeanCodes:
        """Return the codes of means; those out of reach get the nearest that is in it."""
        if self._is_percent:
            apart = np.maximum(means - _LOW_PERCENT, 0.0)
            codes = _bend_down(apart, _FINE_PERCENTS, _PERCENT_STEP, _HIGH_PERCENT_STEP)
        else:
            logs = np.log1p(np.abs(means) / _SMALL_RATE)
            steps = _bend_down(logs, _RATE_CODES * _RATE_STEP, _RATE_STEP, _FAR_RATE_STEP)
            codes = np.copysign(steps, means) + _MIDDLE_CODE
        kept = np.clip(np.rint(codes), 0, _LAST_CODE)
        return np.where(np.isnan(kept), NO_MEAN, kept).astype(np.uint16)

    def decode(self, codes: MeanCodes, values: Floats32 | None = None) -> Floats32:
        """Return the means of codes, in `values` where that is given."""
        return self._values.take(codes, out=values, mode="clip")  # a checked index costs twice the time


def _bend_up(codes: Floats, knee: float, step: float, far_step: float) -> Floats:
    """Return what lies so many steps from 0: they are longer beyond the knee."""
    return np.where(codes * step <= knee, codes * step, knee + (codes - knee / step) * far_step)


def _bend_down(values: Floats, knee: float, step: float, far_step: float) -> Floats:
    """Return how many steps values lie from 0, not rounded."""
    return np.where(values <= knee, values / step, knee / step + (values - knee) / far_step)


def count_trainable(values: Floats32, horizon_bins: int) -> int:
    """Count the windows of a grid that can teach something.

    A window is one origin bin of one series: a value within the last hour, an hour of values
    within the last day, and at least half of the horizon known.

    Args:
        values: (..., bin) NaN = no record.
    """
    return sum(_count_origins(row, horizon_bins) for row in values.reshape(-1, values.shape[-1]))


def _count_origins(row: Floats32, horizon_bins: int) -> int:
    seen = np.concatenate(([0], np.cumsum(np.isfinite(row))))  # seen[i] = values before bin i
    end = np.arange(1, len(row) + 1)
    recent = seen[end] - seen[np.maximum(end - RECENT_BINS, 0)]
    day = seen[end] - seen[np.maximum(end - DAY_BINS, 0)]
    ahead = seen[np.minimum(end + horizon_bins, len(row))] - seen[end]
    return int(((recent > 0) & (day >= RECENT_BINS) & (2 * ahead >= horizon_bins)).sum())


def enough_to_train(span_s: float, n_windows: int, settings: DecisionSettings) -> str:
    """Return why there is not enough data for a training, or "" if there is.

    >>> enough_to_train(3600.0, 500, DecisionSettings())
    'data span 1.0 h of 48 h'
    >>> enough_to_train(200_000.0, 500, DecisionSettings())
    ''
    """
    if span_s < settings.initial_min_span_s:
        return f"data span {span_s / 3600:.1f} h of {settings.initial_min_span_s / 3600:g} h"
    if n_windows < settings.initial_min_windows:
        return f"{n_windows} of {settings.initial_min_windows} trainable windows"
    return ""


def sample_servers(names: Collection[str], wanted: Iterable[str], most: int, day: int) -> frozenset[str]:
    """Return the servers to train on: all of a small fleet, of a larger one a sample by hash.

    The wanted servers are in it first, up to half of it. The others are the same for all programs on the same
    day, and others on another: over some trainings a model sees more of the fleet than one could hold.

    Args:
        wanted: those that drift, the worst first.
        most: how many servers a training can hold, 2 at least.
        day: the day of the newest data, since 1970.

    >>> sorted(sample_servers(["a", "b", "c"], ["c"], 3, 20_000))
    ['a', 'b', 'c']
    >>> len(sample_servers([f"web-{n}" for n in range(100)], ["web-7"], 10, 20_000))
    10
    """
    if len(names) <= most:
        return frozenset(names)
    known = set(names)
    chosen = dict.fromkeys(name for name in wanted if name in known)
    first = list(chosen)[: most // 2]
    rest = sorted(known.difference(first), key=lambda name: _lot(name, day))
    return frozenset(first + rest[: most - len(first)])


def _lot(name: str, day: int) -> bytes:
    """Return what a server draws on a day: the smallest are trained on."""
    return blake2b(f"{day}:{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def most_servers(max_cells: int, n_metrics: int, n_bins: int) -> int:
    """Return how many servers have at most so many (server, metric, bin) cells; 2 at least."""
    return max(2, max_cells // max(1, n_metrics * n_bins))
