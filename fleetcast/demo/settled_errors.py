"""Forecast errors out of the settled forecasts a run left behind.

Owns: the mean absolute error per group of servers, phase and horizon: of what clients got, of the
network alone, and of repeating the last value, on the same forecasts. Does not know: how the run was made.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from fleetcast.clock import to_ms
from fleetcast.schema import Floats, SettledForecasts

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Phase:
    """Settled forecasts whose target lies in [start, end)."""

    name: str
    start: datetime
    end: datetime


@dataclass(frozen=True)
class ErrorCell:
    """The errors of one group in one phase at one horizon."""

    n: int
    ours: float  # what clients got
    model: float
    last_value: float


def keys_of(rows: SettledForecasts) -> set[tuple[int, int, str, str]]:
    """Return what identifies each forecast."""
    return set(
        zip(
            rows.origin_ms.tolist(),
            rows.horizon.tolist(),
            rows.server_name.tolist(),
            rows.metric.tolist(),
            strict=True,
        )
    )


def last_values(rows: SettledForecasts) -> Floats:
    """Return what each series was when its forecast was made; NaN where that is not settled."""
    known = {
        (target, server, metric): actual
        for target, server, metric, actual in zip(
            rows.target_ms.tolist(),
            rows.server_name.tolist(),
            rows.metric.tolist(),
            rows.actual.tolist(),
            strict=True,
        )
    }
    asked = zip(rows.origin_ms.tolist(), rows.server_name.tolist(), rows.metric.tolist(), strict=True)
    return np.array([known.get(key, np.nan) for key in asked], dtype=np.float64)


def error_table(
    rows: SettledForecasts,
    phases: Iterable[Phase],
    groups: Mapping[str, frozenset[str]],
    horizons: Iterable[int],
) -> dict[tuple[str, int, str], ErrorCell]:
    """Return the errors by (group, horizon, phase)."""
    last = last_values(rows)
    sides = [np.abs(said - rows.actual) for said in (rows.p50, rows.model_p50, last)]
    is_comparable = np.isfinite(np.stack(sides)).all(axis=0)
    table = {}
    for group, servers in groups.items():
        in_group = is_comparable & np.isin(rows.server_name.astype(str), sorted(servers))
        for horizon in horizons:
            for phase in phases:
                chosen = in_group & (rows.horizon == horizon) & in_phase(rows, phase)
                n = int(chosen.sum())
                means = [float(errors[chosen].mean()) if n else float("nan") for errors in sides]
                table[group, horizon, phase.name] = ErrorCell(n, *means)
    return table


def in_phase(rows: SettledForecasts, phase: Phase) -> Mask:
    """Return which rows belong to a phase."""
    inside: Mask = (rows.target_ms >= to_ms(phase.start)) & (rows.target_ms < to_ms(phase.end))
    return inside
