"""The errors of each model while it served: mean absolute error and the spec's PER, by horizon.

Owns: which settled forecasts belong to which model's time. PER here is the contract's formula with
one fixed floor per metric (20 points for percents, else 20 % of the run's 95th percentile), so
that phases can be compared with each other.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import numpy as np

from benchmarks.loop_harness import Reload
from benchmarks.settled_errors import Phase, in_phase, last_values
from fleetcast.clock import iso_z
from fleetcast.schema import Floats, SettledForecasts

PERCENT_FLOOR, OTHER_FLOOR_SHARE = 20.0, 0.2


@dataclass(frozen=True)
class HorizonError:
    """One model at one horizon; each figure ours and that of repeating the last value."""

    horizon: int
    n: int
    per: float
    per_last_value: float
    mae_by_metric: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class ModelPhase:
    """The time in which one model answered."""

    version: str
    start: datetime
    end: datetime
    horizons: tuple[HorizonError, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the phase as JSON holds it."""
        return asdict(self) | {"start": iso_z(self.start), "end": iso_z(self.end)}


def phases_of(
    rows: SettledForecasts, reloads: Sequence[Reload], first: datetime, end: datetime
) -> list[ModelPhase]:
    """Return a phase per model, and one for the fallback before the first."""
    starts = [(None, first), *((reload.version, reload.data_time) for reload in reloads)]
    ends = [start for _, start in starts[1:]] + [end]
    floors, last = _floors(rows), last_values(rows)
    return [
        ModelPhase(version or "fallback", start, until, _horizons(rows, last, floors, version, start, until))
        for (version, start), until in zip(starts, ends, strict=True)
    ]


def _floors(rows: SettledForecasts) -> Floats:
    floors = np.full(len(rows), PERCENT_FLOOR)
    for metric in sorted(set(rows.metric.tolist())):
        if not metric.endswith("_pct"):
            chosen = rows.metric == metric
            floors[chosen] = max(OTHER_FLOOR_SHARE * float(np.percentile(rows.actual[chosen], 95)), 1e-6)
    return floors


def _horizons(
    rows: SettledForecasts,
    last: Floats,
    floors: Floats,
    version: str | None,
    start: datetime,
    end: datetime,
) -> tuple[HorizonError, ...]:
    inside = in_phase(rows, Phase("", version, start, end))
    if version is None:
        inside &= np.array([item is None for item in rows.model_version], dtype=bool)
    inside &= np.isfinite(rows.p50) & np.isfinite(last)
    found = []
    for horizon in sorted(set(rows.horizon[inside].tolist())):
        chosen = inside & (rows.horizon == horizon)
        actual, ours = rows.actual[chosen], np.abs(rows.p50[chosen] - rows.actual[chosen])
        naive = np.abs(last[chosen] - actual)
        divisor = np.maximum(np.abs(actual), floors[chosen])
        metric = rows.metric[chosen]
        found.append(
            HorizonError(
                int(horizon),
                int(chosen.sum()),
                round(float((ours / divisor).mean()), 4),
                round(float((naive / divisor).mean()), 4),
                {
                    name: (
                        round(float(ours[metric == name].mean()), 4),
                        round(float(naive[metric == name].mean()), 4),
                    )
                    for name in sorted(set(metric.tolist()))
                },
            )
        )
    return tuple(found)


def phases_table(phases: Sequence[dict[str, Any]]) -> str:
    """Return the phases as lines: PER by horizon, in brackets that of repeating the last value."""
    lines = [f"{'model':<22} {'from':<21} PER (last value) by bins ahead"]
    for phase in phases:
        cells = [f"{h['horizon']}: {h['per']:.3f} ({h['per_last_value']:.3f})" for h in phase["horizons"]]
        lines.append(f"{phase['version']:<22} {phase['start']:<21} {'   '.join(cells)}")
    return "\n".join(lines)
