"""Whether it is a quiet period: the fleet's means and the host's load, with every number named.

Owns: reading the fleet's load out of `/predictions/current?fields=current`, and the verdict.
Does not know: the fleet's limits (they stand in `check_quiet_period()`, to be edited there), HTTP.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fleetcast.errors import DaemonAway
from fleetcast.retraining.hostload import HostLoad
from fleetcast.schema import QuietVerdict
from fleetcast.settings import DecisionSettings

CPU, MEM = "cpu_pct", "mem_pct"


class FleetMean(float):
    """A mean over the fleet that notes the limit it is compared with.

    So the literal in `check_quiet_period()` is what decides and what is reported, also after
    somebody edited it. A limit from the settings goes before the literal. A metric that was
    not measured (NaN) is below every limit: it does not block.

    >>> mean = FleetMean(75.0)
    >>> mean < 60.0, mean.limit
    (False, 60.0)
    >>> FleetMean(math.nan) < 60.0
    True
    """

    limit: float | None = None
    limit_by_setting: float | None = None

    @classmethod
    def of(cls, value: float | None, limit_by_setting: float | None) -> "FleetMean":
        """Return the mean, or one that was not measured."""
        mean = cls(math.nan if value is None else value)
        mean.limit_by_setting = limit_by_setting
        return mean

    def __lt__(self, limit: float) -> bool:
        self.limit = limit if self.limit_by_setting is None else self.limit_by_setting
        return not self.is_measured or float(self) < self.limit

    @property
    def is_measured(self) -> bool:
        """Whether the fleet sends the metric."""
        return not math.isnan(self)


@dataclass(frozen=True, slots=True)
class FleetLoad:
    """Means over the live servers; None = no live server sends it."""

    live_servers: int | None = None
    cpu_percent: float | None = None
    mem_percent: float | None = None
    away: str = ""  # why the inference daemon could not be asked


def fleet_load(document: Mapping[str, Any]) -> FleetLoad:
    """Return the load out of the answer of `/predictions/current`.

    Raises:
        DaemonAway: the answer has another shape.
    """
    predictions = document.get("predictions")
    if not isinstance(predictions, Mapping):
        raise DaemonAway("the inference daemon's predictions have another shape: no `predictions`")
    current: list[Mapping[str, Any]] = [
        server["current"]
        for server in predictions.values()
        if isinstance(server, Mapping)
        and isinstance(server.get("current"), Mapping)
        and server.get("stale") is not True
    ]
    return FleetLoad(len(current), _mean(current, CPU), _mean(current, MEM))


def _mean(current: list[Mapping[str, Any]], metric: str) -> float | None:
    values = [
        float(value)
        for server in current
        if isinstance(value := server.get(metric), int | float) and math.isfinite(value)
    ]
    return sum(values) / len(values) if values else None


def quiet_verdict(
    fleet: FleetLoad,
    means: Mapping[str, FleetMean],
    host: HostLoad,
    *,
    is_fleet_quiet: bool,
    settings: DecisionSettings,
) -> QuietVerdict:
    """Join the fleet's answer and the host's into one verdict.

    Args:
        means: "cpu" and "mem", after the comparison that made `is_fleet_quiet`.
    """
    load_limit, memory_limit = settings.host_load_per_core * host.cores, settings.host_min_available_gb
    is_idle, has_memory = host.load_of_others < load_limit, host.available_gb >= memory_limit
    steps = (
        (not fleet.away, f"the inference daemon cannot be asked: {fleet.away}"),
        (fleet.live_servers != 0, "no live server to measure"),
        (is_fleet_quiet, f"the fleet is busy: {_shown(means)}"),
        (is_idle, f"the host is busy: load of others {host.load_of_others:.2f}, limit {load_limit:.2f}"),
        (has_memory, f"the host has {host.available_gb:.1f} GB available, {memory_limit:g} needed"),
    )
    failed = next((why for passed, why in steps if not passed), "")
    return QuietVerdict(
        is_quiet=not failed,
        reason=failed or "quiet",
        measured={
            "live_servers": fleet.live_servers,
            "fleet_cpu_percent": fleet.cpu_percent,
            "fleet_mem_percent": fleet.mem_percent,
            "host_load_1m": host.load_1m,
            "host_own_cores": host.own_cores,
            "host_load_of_others": host.load_of_others,
            "host_available_gb": host.available_gb,
        },
        limits={
            **{f"fleet_{name}_percent": mean.limit for name, mean in means.items() if mean.limit is not None},
            "host_load_of_others": load_limit,
            "host_available_gb": memory_limit,
        },
        is_host_quiet=is_idle and has_memory,
    )


def _shown(means: Mapping[str, FleetMean]) -> str:
    return ", ".join(
        f"mean {name} {mean:.1f} %" + ("" if mean.limit is None else f" (limit {mean.limit:g})")
        for name, mean in means.items()
        if mean.is_measured
    )
