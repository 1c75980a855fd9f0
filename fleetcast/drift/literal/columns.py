"""Plain numbers by metric, out of whatever a caller of the Python interface has at hand.

Owns: mappings of metric to number or array, and DataFrames (recognised by shape, so that
pandas is not imported for it) → equal-length float columns; NaN = absent.
Does not know: what the numbers are compared with.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fleetcast.errors import BadData
from fleetcast.schema import Floats

_EXPECTED = "a mapping of metric to number or array, or a DataFrame"


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


def extended(
    old: Mapping[str, Floats], n_old: int, new: Mapping[str, Floats], n_new: int, keep: int
) -> dict[str, Floats]:
    """Return the newest `keep` rows of `old` followed by `new`; a metric one lacks is absent there."""
    return {
        name: np.concatenate((old.get(name, np.full(n_old, np.nan)), new.get(name, np.full(n_new, np.nan))))[
            -keep:
        ]
        for name in dict.fromkeys((*old, *new))
    }
