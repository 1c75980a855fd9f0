"""Declared changes put into recorded series: seeded, and fixed before the first run."""

import zlib

import numpy as np
from numpy.typing import NDArray

from benchmarks.drift.parts.data import BIN_MS, DAY

Values = NDArray[np.float64]

KINDS = ("level", "level_mid", "std2", "var2", "phase", "rhythm", "ramp", "shuffle", "sawtooth")
PER_BLOCK = 2
LOOK_BINS = DAY  # a hit is an alarm within a day ...
RAMP_LOOK_BINS = 4 * DAY  # ... of a ramp within four
RAMP_BINS = 3 * DAY
PHASE_BINS = DAY // 4
SHUFFLE_BINS = 36
SAW_BLOCK, SAW_PERIOD = 144, 24
RHYTHM_SHARE = 0.25
AUTOCORRELATION = 0.5


def look_bins(kind: str) -> int:
    """Return how long after its start an injection may be found."""
    return RAMP_LOOK_BINS if kind == "ramp" else LOOK_BINS


def room_bins(kind: str) -> int:
    """Return the bins of test data an injection needs behind its start."""
    return 1200 if kind == "ramp" else 360


def rhythm_share(reference: Values) -> float:
    """Return the share of one half's variance that the other half's time-of-day medians explain."""
    days = reference[: len(reference) // DAY * DAY].reshape(-1, DAY)
    half = len(days) // 2
    if not half:
        return 0.0
    seen = np.isfinite(days[:half]).any(axis=0)
    profile = np.full(DAY, np.nan)
    profile[seen] = np.nanmedian(days[:half][:, seen], axis=0)
    later = days[half:]
    both = np.isfinite(later) & np.isfinite(profile)
    if both.sum() < 100:
        return 0.0
    actual, usual = later[both], np.broadcast_to(profile, later.shape)[both]
    rest = actual - usual
    variance = actual.var()
    return float(1 - rest.var() / variance) if variance > 0 else 0.0


def ranks(reference: Values) -> Values:
    """Return each value's place among the values, 0 to 1, equal values at their mean place.

    A job that runs once a day is most of a quiet disk's variance and one bin of its ranks.
    """
    out = np.full(len(reference), np.nan)
    seen = np.isfinite(reference)
    known, place, count = np.unique(reference[seen], return_inverse=True, return_counts=True)
    if len(known):
        ends = np.cumsum(count)
        out[seen] = ((ends - (count - 1) / 2) / ends[-1])[place]
    return out


def autocorrelation(values: Values) -> float:
    """Return the correlation of neighbouring bins."""
    both = np.isfinite(values[:-1]) & np.isfinite(values[1:])
    first, second = values[:-1][both], values[1:][both]
    if len(first) < 10 or first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def is_eligible(kind: str, reference: Values) -> bool:
    """Return whether a change of this kind is one at all for a series."""
    spread = np.nanmax(reference) - np.nanmin(reference)
    if kind == "level_mid":
        low, high = np.nanpercentile(reference, [1, 99])
        return bool(high > low)
    if kind == "phase":
        return rhythm_share(reference) >= RHYTHM_SHARE
    if kind == "rhythm":
        both = (rhythm_share(reference), rhythm_share(ranks(reference)))
        return min(both) >= RHYTHM_SHARE
    if kind in ("shuffle", "sawtooth"):
        return bool(spread > 0) and autocorrelation(reference) >= AUTOCORRELATION
    return bool(spread > 0)


def seeded(server: str, metric: str, block_ms: int, kind: str) -> np.random.Generator:
    """Return the generator that the protocol names for one series, block and kind."""
    return np.random.default_rng(zlib.crc32(f"{server}|{metric}|{block_ms}|{kind}".encode()))


def block_ms(start_ms: int, first: int) -> int:
    """Return the start of a reference block."""
    return start_ms + first * BIN_MS


def injected(
    kind: str, values: Values, start: int, reference: Values, generator: np.random.Generator
) -> Values:
    """Return the series with a change from bin `start` on."""
    changed = values.copy()
    part = slice(start, start + room_bins(kind))
    own = values[part]
    spread = np.nanmax(reference) - np.nanmin(reference)
    mean = np.nanmean(reference)
    if kind == "level":
        changed[part] = own + 0.2 * spread
    elif kind == "level_mid":
        low, high = np.nanpercentile(reference, [1, 99])
        changed[part] = own + 0.2 * (high - low)
    elif kind in ("std2", "var2"):
        changed[part] = mean + (2 if kind == "std2" else 2**0.5) * (own - mean)
    elif kind in ("phase", "rhythm"):
        changed[part] = values[start - PHASE_BINS : start - PHASE_BINS + len(own)]
    elif kind == "ramp":
        changed[part] = own + 0.2 * spread * np.minimum(np.arange(len(own)) / RAMP_BINS, 1)
    else:
        _reorder(kind, changed[part], generator)
    return changed


def _reorder(kind: str, part: Values, generator: np.random.Generator) -> None:
    """Give the values another order in place: the distribution stays, the dynamics change."""
    length = SHUFFLE_BINS if kind == "shuffle" else SAW_BLOCK
    for first in range(0, len(part), length):
        block = part[first : first + length]
        if kind == "shuffle":
            block[:] = generator.permutation(block)
            continue
        seen = np.isfinite(block)
        place = np.arange(int(seen.sum()))
        height = (place % SAW_PERIOD) / SAW_PERIOD + 1e-6 * place / SAW_BLOCK
        block[seen] = np.sort(block[seen])[np.argsort(np.argsort(height))]
