"""Rounding of metric values, done once, at acceptance.

Owns: how many digits of a value are kept. Memory, disk, training and serving then agree, and
rounded values compress several times better than raw ones.
"""

import numpy as np

from fleetcast.schema import Floats

PERCENT_SUFFIX = "_pct"
_EXACT_POWER = 22  # 10.0**22 is the largest power of ten a double holds exactly
_POWERS = 10.0 ** np.arange(_EXACT_POWER + 1)
_ALL_DIGITS = 17  # a double has no more


def rounded(name: str, values: Floats, percent_decimals: int, significant_digits: int) -> Floats:
    """Return the values of one metric rounded; NaN stays NaN and -0.0 becomes 0.0.

    >>> rounded("cpu_pct", np.array([12.3456]), 2, 4).tolist()
    [12.35]
    >>> rounded("latency_ms", np.array([12.3456, 123456.0, 0.00123456]), 2, 4).tolist()
    [12.35, 123500.0, 0.001235]
    """
    if name.endswith(PERCENT_SUFFIX):
        return np.round(values, percent_decimals) + 0.0
    if significant_digits >= _ALL_DIGITS:
        return values + 0.0
    return to_significant(values, significant_digits) + 0.0


def to_significant(values: Floats, digits: int) -> Floats:
    """Return `values` with `digits` significant digits, each the double nearest to the decimal."""
    result = values.copy()
    usable = np.isfinite(values) & (values != 0.0)
    some = values[usable]
    decimals = digits - 1 - np.floor(np.log10(np.abs(some))).astype(np.int64)
    is_exact = np.abs(decimals) <= _EXACT_POWER
    power = _POWERS[np.where(is_exact, np.abs(decimals), 0)]
    # dividing by an exact power of ten keeps the result the nearest double; multiplying by 0.001 would not
    is_small = decimals >= 0
    scaled = np.rint(np.where(is_small, some * power, some / power))
    out = np.where(is_small, scaled / power, scaled * power)
    for place in np.flatnonzero(~is_exact):
        printed = float(f"{some[place]:.{digits - 1}e}")
        out[place] = printed if np.isfinite(printed) else some[place]  # the largest doubles stay as they are
    result[usable] = out
    return result
