"""Rounding of metric values, done once, at acceptance.

Owns: how many digits of a value are kept. Memory, disk, training and serving then agree, and
rounded values compress several times better than raw ones.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from fleetcast.schema import Floats

PERCENT_SUFFIX = "_pct"
_EXACT_POWER = 22  # 10.0**22 is the largest power of ten a double holds exactly
_POWERS = 10.0 ** np.arange(_EXACT_POWER + 1)
_ALL_DIGITS = 17  # a double has no more
_EXPONENTS = 2048  # of a double, as its bits say them: 0 is for zeros, the last one for infinity and NaN
_EXPONENT_SHIFT = 52
_EXPONENT_BIAS = 1023
_LARGEST_TURN = 308  # 1e309 is infinite


def rounded(name: str, values: Floats, percent_decimals: int, significant_digits: int) -> Floats:
    """Return the values of one metric rounded; NaN stays NaN and -0.0 becomes 0.0.

    >>> rounded("cpu_pct", np.array([12.3456]), 2, 4).tolist()
    [12.35]
    >>> rounded("latency_ms", np.array([12.3456, 123456.0, 0.00123456]), 2, 4).tolist()
    [12.35, 123500.0, 0.001235]
    """
    row: Floats = rounded_rows([name], values[None], percent_decimals, significant_digits)[0]
    return row


def rounded_rows(
    names: Sequence[str], values: Floats, percent_decimals: int, significant_digits: int
) -> Floats:
    """Do the same for many metrics at once; `values` is (metric, row)."""
    are_percents = np.array([name.endswith(PERCENT_SUFFIX) for name in names], dtype=np.bool_)
    result = np.empty_like(values)
    result[are_percents] = np.round(values[are_percents], percent_decimals)
    others = values[~are_percents]
    is_whole = significant_digits >= _ALL_DIGITS
    result[~are_percents] = others if is_whole else to_significant(others, significant_digits)
    result += 0.0
    return result


def to_significant(values: Floats, digits: int) -> Floats:
    """Return `values` with `digits` significant digits, each the double nearest to the decimal."""
    powers, turns = _scales(digits)
    sizes = np.abs(values, order="C")
    exponents = sizes.view(np.int64) >> _EXPONENT_SHIFT
    power = powers[2 * exponents + (sizes >= turns[exponents])]
    # dividing by an exact power of ten gives the nearest double; multiplying by 0.001 would not
    result = np.asarray(np.rint(values * power) / power)
    is_other = np.isnan(result) != np.isnan(values)
    if np.count_nonzero(result) != np.count_nonzero(values):
        is_other |= (result == 0.0) & (values != 0.0)  # a subnormal
    if is_other.any():
        result[is_other] = _far_from_one(values[is_other], digits)
    return result


@lru_cache(maxsize=32)
def _scales(digits: int) -> tuple[Floats, Floats]:
    """Return how to scale a double by its binary exponent.

    Returns:
        powers: (2 * exponent + is_turned) the power of ten that makes `digits` digits of it whole;
            NaN where that is none, or none a double holds exactly.
        turns: (exponent) the power of ten among the doubles of this exponent, from which on they have
            one digit more; infinity where there is none.
    """
    powers = np.full(2 * _EXPONENTS, np.nan)
    powers[:2] = 1.0  # zeros
    turns = np.full(_EXPONENTS, np.inf)
    for exponent in range(1, _EXPONENTS - 1):
        lowest = 2.0 ** (exponent - _EXPONENT_BIAS)
        turn = math.floor(math.log10(lowest)) + 1
        turns[exponent] = float(f"1e{turn}") if turn <= _LARGEST_TURN else np.inf
        for is_turned in (0, 1):
            decimals = digits - turn - is_turned
            if 0 <= decimals <= _EXACT_POWER:
                powers[2 * exponent + is_turned] = _POWERS[decimals]
    return powers, turns


def _far_from_one(values: Floats, digits: int) -> Floats:
    """Round what is infinite, subnormal, or has no digit to round after the point."""
    result = values.copy()
    usable = np.isfinite(values) & (values != 0.0)
    some = values[usable]
    decimals = digits - 1 - np.floor(np.log10(np.abs(some))).astype(np.int64)
    is_exact = (decimals < 0) & (decimals >= -_EXACT_POWER)
    power = _POWERS[np.where(is_exact, -decimals, 0)]
    out = np.rint(some / power) * power
    for place in np.flatnonzero(~is_exact):
        printed = float(f"{some[place]:.{digits - 1}e}")
        out[place] = printed if np.isfinite(printed) else some[place]  # the largest doubles stay as they are
    result[usable] = out
    return result
