"""Synthetic fleets: what a server's metric may do that no recording at hand shows.

Owns: seeded processes (trends with ends, leaks that are freed, saw-teeth, jobs, regimes, walks, daily
curves, Gaussian processes of random kernels), their sums and products, and how they become percents and
rates. numpy only, all series at once; one seed gives one fleet. Does not know: models, trainings.

Every process is (series, bin) float64 with a range of about 1, on bins of 5 minutes.
Source of the kernels: KernelSynth (Ansari et al., Chronos, arXiv:2403.07815): kernels drawn from a bank,
joined by + or *. Here one is sampled by its circulant embedding, and noise and trends are added apart.
"""

from collections.abc import Callable

import numpy as np

from fleetcast.forecast.encoding import is_percent
from fleetcast.schema import Floats, Longs
from fleetcast.training.grid import TrainingGrid

BIN_MS, HOUR, DAY = 300_000, 12, 288
START_MS = 946_857_600_000  # 2000-01-03, a Monday, as the Server Machine Dataset is dated
MAX_SEGMENTS = 48
_AT_ONCE = 256  # series whose kernels are sampled together
_JOB_BINS = (HOUR, 2 * HOUR, 4 * HOUR, 6 * HOUR, 12 * HOUR, DAY)

Random = np.random.Generator
Process = Callable[[int, int, Random], Floats]  # (series, bins, random) -> (series, bin)


def synthetic_fleet(metrics: tuple[str, ...], n_server: int, n_bins: int, seed: int) -> TrainingGrid:
    """Return a fleet whose series are independent draws; the same arguments return the same values.

    Args:
        metrics: percents end in `_pct` and stay within 0..100; others are rates, not negative. A name
            that stands there twice has two series a server.
    """
    random = np.random.default_rng(seed)
    n_series = n_server * len(metrics)
    shape = _mix(n_series, n_bins, random)
    flags = np.tile([is_percent(metric) for metric in metrics], n_server)
    values = np.where(flags[:, None], _as_percent(shape, random), _as_rate(shape, random))
    names = tuple(f"synthetic-{number:05d}" for number in range(n_server))
    cube = values.astype(np.float32).reshape(n_server, len(metrics), n_bins)
    return TrainingGrid(names, metrics, cube, START_MS, BIN_MS)


def trends(n_series: int, n_bins: int, random: Random) -> Floats:
    """Return climbs and falls that end, rest, are freed, or go on.

    A segment of 2 hours to 6 days moves at a pace of its own or rests. The next begins where it ended,
    or, in series that are freed, where the first began.
    """
    starts, number = _segments(n_series, n_bins, 2 * HOUR, 6 * DAY, random)
    shape = starts.shape
    pace = np.exp(random.uniform(np.log(0.05), np.log(2.0), shape)) / DAY
    sign = np.where(random.random((n_series, 1)) < 0.7, 1.0, -1.0)
    sign = np.where(random.random(shape) < 0.2, -sign, sign)
    slope = pace * sign * (random.random(shape) < random.uniform(0.3, 1.0, (n_series, 1)))
    is_freed = random.random(shape) < random.choice([0.0, 0.5, 1.0], (n_series, 1))
    length = np.diff(starts, axis=1, append=starts[:, -1:] + DAY)
    level = np.zeros(shape)
    for place in range(1, shape[1]):
        end = level[:, place - 1] + slope[:, place - 1] * length[:, place - 1]
        level[:, place] = np.where(is_freed[:, place], 0.0, end)
    since = np.arange(n_bins) - _at(starts, number)
    return _at(level, number) + _at(slope, number) * since


def leaks(n_series: int, n_bins: int, random: Random) -> Floats:
    """Return levels that rest for half a day to 5 days, then climb for 8 hours to 8 days, again and again.

    A climb ends in a plateau or is freed; most windows that see one see no end of it.
    """
    shape = (n_series, MAX_SEGMENTS)
    rest = np.exp(random.uniform(np.log(0.5 * DAY), np.log(5 * DAY), shape))
    climb = np.exp(random.uniform(np.log(8 * HOUR), np.log(8 * DAY), shape))
    is_climb = (np.arange(MAX_SEGMENTS) + random.integers(0, 2, (n_series, 1))) % 2 == 1
    starts, number = _lay(np.where(is_climb, climb, rest).astype(int), n_bins, random)
    pace = np.exp(random.uniform(np.log(0.1), np.log(1.0), shape)) / DAY
    stays = is_climb[:, :-1] & (random.random((n_series, MAX_SEGMENTS - 1)) < 0.3)
    plateau = np.pad(stays * pace[:, :-1] * np.diff(starts, axis=1), ((0, 0), (1, 0)))
    since = np.arange(n_bins) - _at(starts, number)
    return _at(np.where(is_climb, 0.0, plateau), number) + _at(is_climb * pace, number) * since


def levels(n_series: int, n_bins: int, random: Random) -> Floats:
    """Return levels that hold for 1 hour to 5 days; some series know two of them."""
    starts, number = _segments(n_series, n_bins, HOUR, 5 * DAY, random)
    free = random.uniform(0, 1, starts.shape)
    has_two = random.random((n_series, 1)) < 0.4
    return _at(np.where(has_two, np.round(free), free), number)


def variances(n_series: int, n_bins: int, random: Random) -> Floats:
    """Return white noise whose size changes after 2 hours to 5 days."""
    starts, number = _segments(n_series, n_bins, 2 * HOUR, 5 * DAY, random)
    size = np.exp(random.uniform(np.log(0.02), np.log(0.5), starts.shape))
    return _at(size, number) * random.standard_normal((n_series, n_bins))


def saw_teeth(n_series: int, n_bins: int, random: Random) -> Floats:
    """Return climbs of 20 minutes to 17 hours, or of a day, that drop back, or fall and jump back.

    Some rest at the top or the bottom, some climb as fast as they fall, some vary their pace.
    """
    period = _log_uniform(4, 17 * HOUR, n_series, random)
    period = np.where(random.random((n_series, 1)) < 0.25, float(DAY), period)
    within = _phase(period, n_bins, random) % 1
    kind = random.integers(0, 4, (n_series, 1))
    duty = random.uniform(0.2, 1.0, (n_series, 1))
    rested = np.minimum(within / duty, 1.0)
    tooth = np.select(
        [kind == 0, kind == 1, kind == 2], [within, rested, rested * (rested < 1)], 1 - abs(2 * within - 1)
    )
    return np.where(random.random((n_series, 1)) < 0.2, 1 - tooth, tooth)


def jobs(n_series: int, n_bins: int, random: Random) -> Floats:
    """Return bursts by a timetable: hourly, daily or at any pace, at times left out, of varying height."""
    period = random.choice(_JOB_BINS, (n_series, 1)).astype(np.float64)
    period = np.where(random.random((n_series, 1)) < 0.3, _log_uniform(6, DAY, n_series, random), period)
    phase = np.arange(n_bins) / period + random.random((n_series, 1))
    number = phase.astype(np.int64)
    width = np.maximum(random.uniform(0.02, 0.5, (n_series, 1)), 1.2 / period)
    shape = (n_series, int(number.max()) + 1)
    height = np.maximum(0.0, 1 + random.uniform(0, 0.4, (n_series, 1)) * random.standard_normal(shape))
    height = height * (random.random(shape) >= random.choice([0.0, 0.0, 0.2], (n_series, 1)))
    return _at(height, number) * (phase % 1 < width)


def bursts(n_series: int, n_bins: int, random: Random) -> Floats:
    """Return bursts that come without warning and die away within minutes to hours."""
    begins = random.random((n_series, n_bins)) < _log_uniform(0.5, 12, n_series, random) / DAY
    kicks = begins * random.exponential(1.0, (n_series, n_bins))
    return np.asarray(_decay(kicks, np.exp(-1 / _log_uniform(1, 4 * HOUR, n_series, random))))


def walks(n_series: int, n_bins: int, random: Random) -> Floats:
    """Return random walks, some drawn back to where they began."""
    steps = random.standard_normal((n_series, n_bins)) * _log_uniform(0.003, 0.03, n_series, random)
    return _decay(
        steps,
        np.where(
            random.random((n_series, 1)) < 0.4, 1.0, 1 - 1 / _log_uniform(HOUR, 2 * DAY, n_series, random)
        ),
    )


def days(n_series: int, n_bins: int, random: Random) -> Floats:
    """Return a daily curve of one to four harmonics, some of them lower at the weekend or only by day."""
    angle = 2 * np.pi * np.arange(n_bins) / DAY
    curve = np.zeros((n_series, n_bins))
    n_harmonic = random.integers(1, 5, (n_series, 1))
    for harmonic in range(1, 5):
        size = random.uniform(0, 1, (n_series, 1)) / harmonic * (harmonic <= n_harmonic)
        curve += size * np.sin(harmonic * angle + 2 * np.pi * random.random((n_series, 1)))
    curve = _unit(curve)
    steep = random.random((n_series, 1)) < 0.3
    curve = np.where(steep, 1 / (1 + np.exp(-12 * (curve - random.uniform(0.3, 0.7, (n_series, 1))))), curve)
    is_weekend = (np.arange(n_bins) // DAY) % 7 >= 5
    quiet = np.where(random.random((n_series, 1)) < 0.4, random.uniform(0.1, 1.0, (n_series, 1)), 1.0)
    return curve * np.where(is_weekend, quiet, 1.0)


def kernels(n_series: int, n_bins: int, random: Random) -> Floats:
    """Return Gaussian processes of one to three stationary kernels, joined by + or *."""
    parts = [
        _sample(min(_AT_ONCE, n_series - first), n_bins, random) for first in range(0, n_series, _AT_ONCE)
    ]
    return _unit(np.concatenate(parts))


def _sample(n_series: int, n_bins: int, random: Random) -> Floats:
    """Sample by circulant embedding; eigenvalues below zero (a lag that wraps is no kernel) are left out."""
    size = 2 * n_bins
    lag = np.minimum(np.arange(size), size - np.arange(size)).astype(np.float64)
    kernel = _kernel(lag, n_series, random)
    for _ in range(2):
        other, draw = _kernel(lag, n_series, random), random.random((n_series, 1))
        kernel = np.select([draw < 0.35, draw < 0.7], [kernel + other, kernel * other], kernel)
    power = np.maximum(np.fft.rfft(kernel, axis=1).real, 0.0)
    noise = random.standard_normal((n_series, size))
    return np.asarray(np.fft.irfft(np.sqrt(power) * np.fft.rfft(noise, axis=1), size, axis=1)[:, :n_bins])


def _kernel(lag: Floats, n_series: int, random: Random) -> Floats:
    """Return one of: squared exponential, exponential, rational quadratic, periodic, (series, lag)."""
    length = _log_uniform(0.5 * HOUR, 2 * DAY, n_series, random)
    period = _log_uniform(HOUR, 2 * DAY, n_series, random)
    period = np.where(random.random((n_series, 1)) < 0.5, float(DAY), period)
    wave = np.sin(np.pi * lag / period) / random.uniform(0.3, 1.5, (n_series, 1))
    kind = random.integers(0, 5, (n_series, 1))
    choices = [np.exp(-0.5 * (lag / length) ** 2), np.exp(-lag / length), 1 / (1 + (lag / length) ** 2 / 2)]
    return np.select([kind == 0, kind == 1, kind == 2], choices, np.exp(-2 * wave**2))


PROCESSES: tuple[Process, ...] = (
    *(leaks, trends, levels, variances, saw_teeth, jobs, bursts, walks, days, kernels),
)
# how often each is drawn
_SHARES = np.array([5, 4, 2, 1, 3, 2, 1, 2, 3, 4]) / 27


def _mix(n_series: int, n_bins: int, random: Random) -> Floats:
    """Return sums and products of one to three processes with noise, each series with a range of 1."""
    n_part = random.choice([1, 2, 3], (n_series,), p=[0.45, 0.4, 0.15])
    total = np.zeros((n_series, n_bins))
    for part in range(3):
        rows = np.flatnonzero(n_part > part)
        drawn = _draw(len(rows), n_bins, random)
        size = _log_uniform(0.15, 1.0, len(rows), random) if part else 1.0
        is_product = (random.random((len(rows), 1)) < 0.3) & (part > 0)
        before = total[rows]
        total[rows] = np.where(is_product, before * (0.2 + drawn), before + size * drawn)
    spread = np.ptp(total, axis=1, keepdims=True)
    is_flat = spread < 1e-9
    noise = _log_uniform(0.001, 0.2, n_series, random) * (random.random((n_series, 1)) > 0.1)
    own = _decay(random.standard_normal((n_series, n_bins)), random.choice([0, 0, 0, 0.5], (n_series, 1)))
    return (total - total.min(axis=1, keepdims=True)) / np.where(is_flat, 1.0, spread) + noise * own


def _draw(n_series: int, n_bins: int, random: Random) -> Floats:
    """Return a process for each series."""
    kind = random.choice(len(PROCESSES), n_series, p=_SHARES)
    found = np.empty((n_series, n_bins))
    for number, process in enumerate(PROCESSES):
        rows = np.flatnonzero(kind == number)
        if len(rows):
            found[rows] = process(len(rows), n_bins, random)
    return found


def _as_percent(shape: Floats, random: Random) -> Floats:
    """Return points of a hundred; what goes beyond 0 or 100 stays there."""
    n_series = len(shape)
    size = _log_uniform(2, 95, n_series, random)
    low = random.uniform(0, 1, (n_series, 1)) * np.maximum(105 - size, 5) - 3
    return np.round(np.clip(low + size * shape, 0, 100), 2)


def _as_rate(shape: Floats, random: Random) -> Floats:
    """Return rates of any size: a shape above a floor, or one that multiplies."""
    n_series = len(shape)
    size = _log_uniform(0.1, 300, n_series, random)
    floor = random.choice([0.0, 0.05, 0.3, 1.0, 3.0], (n_series, 1))
    power = random.uniform(0.3, 4.0, (n_series, 1))
    is_power = random.random((n_series, 1)) < 0.4
    return size * np.where(is_power, np.exp(power * (np.minimum(shape, 2) - 1)), np.maximum(floor + shape, 0))


def _segments(n_series: int, n_bins: int, low: float, high: float, random: Random) -> tuple[Longs, Longs]:
    """Return the first bin of each segment (series, segment) and the segment of each bin (series, bin).

    Lengths lie around one that is typical of the series. The last of `MAX_SEGMENTS` goes on to the end.
    """
    typical = _log_uniform(low, high, n_series, random)
    lengths = np.clip(typical * random.uniform(0.3, 1.7, (n_series, MAX_SEGMENTS)), low, high)
    return _lay(lengths.astype(int), n_bins, random)


def _lay(lengths: Longs, n_bins: int, random: Random) -> tuple[Longs, Longs]:
    """Lay segments (series, segment) one after another; see `_segments`."""
    n_series = len(lengths)
    begun = (lengths[:, :1] * random.random((n_series, 1))).astype(int)  # bins before the first
    starts = np.cumsum(lengths, axis=1) - lengths - begun
    marks = np.zeros((n_series, n_bins), np.int64)
    rows, places = np.nonzero((starts > 0) & (starts < n_bins))
    np.add.at(marks, (rows, starts[rows, places]), 1)
    return starts, np.cumsum(marks, axis=1)


def _phase(period: Floats, n_bins: int, random: Random) -> Floats:
    """Return how many periods have passed, (series, bin); half of the series vary their pace by a few %."""
    jitter = np.where(random.random(period.shape) < 0.5, 0.0, random.uniform(0.02, 0.1, period.shape))
    steps = (1 + jitter * random.standard_normal((len(period), n_bins))) / period
    return np.cumsum(steps, axis=1) + random.random(period.shape)


def _decay(kicks: Floats, keep: Floats) -> Floats:
    """Return a sum of kicks of which each bin keeps a share (series, 1) of what was before."""
    found = kicks.copy()
    for place in range(1, kicks.shape[1]):
        found[:, place] += keep[:, 0] * found[:, place - 1]
    return found


def _at(table: Floats | Longs, number: Longs) -> Floats:
    return np.take_along_axis(table, np.minimum(number, table.shape[1] - 1), axis=1)


def _log_uniform(low: float, high: float, n_series: int, random: Random) -> Floats:
    return np.exp(random.uniform(np.log(low), np.log(high), (n_series, 1)))


def _unit(values: Floats) -> Floats:
    """Return each series from 0 to 1."""
    low, spread = values.min(axis=1, keepdims=True), np.ptp(values, axis=1, keepdims=True)
    return (values - low) / np.maximum(spread, 1e-9)
