"""When many series differ at once: from scores per series to one verdict for the fleet.

Owns: how short and long windows support each other, the share of a fleet that must agree, and
the scale of the specification (its threshold is where unchanged data would be once a month).
Pure maths on arrays. Does not know: where scores come from, what is done about a verdict.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetcast.drift.seasonal.statistics import (
    ANOMALY,
    DSS,
    FAMILIES,
    FAMILY_OF,
    FDS,
    IS_SHORT,
    NEEDS_SUPPORT,
    PER,
    SUPPORTS,
)
from fleetcast.errors import BadData
from fleetcast.schema import Floats32, Longs

MIN_SERVERS = 3  # fleets this large never move for one server
MATURE_DAYS = 21  # fewer days behind a series make false alarms likelier; see drift-quality.md
SURE_TIMES = 2.0  # a fleet this many times over its limit drifts at once
MIN_COMMON = 3  # servers that one and the same statistic must carry over its limit

# The scale of the scores, as the specification prints it. It stays when thresholds or weights are
# edited in drift_monitor.py or in the settings: a threshold twice as high asks for twice the limit.
THRESHOLDS: Mapping[str, float] = {PER: 0.10, DSS: 0.20, FDS: 0.15, ANOMALY: 0.05}
WEIGHTS: Mapping[str, float] = {PER: 0.40, DSS: 0.30, FDS: 0.20, ANOMALY: 0.10}
COMBINED_THRESHOLD = 0.12


@dataclass(frozen=True)
class QuorumRule:
    """How many series, for how long, make a fleet's drift."""

    quorum: float = 0.25  # share of the compared series in alarm at once
    sustained_quorum: float = 0.10  # the same, of series in alarm most of the last hours
    common_quorum: float = (
        0.08  # share of the compared servers that one statistic carries over its limit at once
    )
    sustained_h: float = 24.0
    sustained_share: float = 0.75  # "most"
    hold_h: float = 0.75  # a series is in alarm after this long over a limit
    fleet_hold_h: float = 2.0  # a fleet drifts after this long over a limit, or when it is twice as far

    def __post_init__(self) -> None:
        for name in ("quorum", "sustained_quorum", "common_quorum", "sustained_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadData(f"{name} must be within 0..1, got {getattr(self, name)}")
        if self.sustained_h <= 0 or min(self.hold_h, self.fleet_hold_h) < 0:
            raise BadData("sustained_h must be > 0, hold_h and fleet_hold_h >= 0")

    def hold_bins(self, bins_per_day: int) -> int:
        """Return the bins of `hold_h`, at least one."""
        return max(1, round(self.hold_h * bins_per_day / 24))

    def fleet_hold_bins(self, bins_per_day: int) -> int:
        """Return the bins of `fleet_hold_h`, at least one."""
        return max(1, round(self.fleet_hold_h * bins_per_day / 24))

    def sustained_bins(self, bins_per_day: int) -> int:
        """Return the bins of `sustained_h`, at least one."""
        return max(1, round(self.sustained_h * bins_per_day / 24))


def limit_ratios(statistics: Floats32, limits: Floats32) -> Floats32:
    """Return (statistic, series, ...): each over its limit, those of a day as far as they are supported.

    Args:
        statistics: (statistic, series, ...), NaN = not judged.
        limits: (series, statistic).
    """
    bounds = limits.T.reshape(limits.T.shape + (1,) * (statistics.ndim - 2))
    with np.errstate(invalid="ignore"):
        ratios = np.maximum(np.nan_to_num(statistics / bounds, nan=0.0, posinf=0.0, neginf=0.0), 0)
    needed = SUPPORTS[NEEDS_SUPPORT].reshape(-1, *(1,) * (ratios.ndim - 1))
    ratios[NEEDS_SUPPORT] = np.minimum(ratios[NEEDS_SUPPORT], ratios[IS_SHORT].max(axis=0) / needed)
    return np.asarray(ratios, np.float32)


def by_family(ratios: Floats32) -> Floats32:
    """Return (family, ...): the largest ratio of each family, of (statistic, ...)."""
    return np.stack([ratios[family == FAMILY_OF].max(axis=0) for family in range(len(FAMILIES))])


def youth(n_days: Longs) -> Floats32:
    """Return (series,) >= 1: by how much wider limits have to be where few days are known.

    >>> youth(np.array([5, 21, 30])).round(2).tolist()
    [2.049999952316284, 1.0, 1.0]
    """
    return np.sqrt(np.maximum(MATURE_DAYS / np.maximum(n_days, 1), 1)).astype(np.float32)


def common_ratios(
    ratios: Floats32, n_days: Longs, is_compared: NDArray[np.bool_], n_metrics: int, rule: QuorumRule
) -> Floats32:
    """Return (statistic, ...): 1 where it carries just enough servers to their limits at once.

    Several servers that change in the same way are evidence that one server is not: fewer of them are
    enough. A series of which few days are known has to be further off to be one of them.

    Args:
        ratios: (statistic, series, ...) as `limit_ratios`, 0 for series not compared; server by server.
        n_days: (series,) days behind each.
        is_compared: (series,)
    """
    n_servers = ratios.shape[1] // n_metrics
    n_compared = int(is_compared.reshape(n_servers, n_metrics).any(axis=1).sum())
    k = max(MIN_COMMON, math.floor(rule.common_quorum * n_compared) + 1)
    if k > n_compared:
        return np.zeros((ratios.shape[0], *ratios.shape[2:]), np.float32)
    sure = ratios / youth(n_days).reshape(-1, *(1,) * (ratios.ndim - 2))
    by_server = sure.reshape(ratios.shape[0], n_servers, n_metrics, *ratios.shape[2:]).max(axis=2)
    return _kth_largest(by_server, k, n_servers)


def fleet_ratios(
    held: Floats32, common: Floats32, sustained: Floats32, n_compared: int, n_metrics: int, rule: QuorumRule
) -> Floats32:
    """Return (family, ...): 1 where just enough of the fleet is at its limit.

    Args:
        held: (family, series, ...) ratios, 0 for series not compared; series are server by server.
        common: (family, ...) of `common_ratios`, held as long as `held`.
        sustained: (series, ...) share of the last hours each series was in alarm.
    """
    if not n_compared:
        return np.zeros((held.shape[0], *held.shape[2:]), np.float32)
    steady = held * np.minimum(sustained / max(rule.sustained_share, 1e-6), 1)
    fast = _kth_largest(held, math.floor(rule.quorum * n_compared) + 1, n_compared)
    slow = _kth_largest(steady, math.floor(rule.sustained_quorum * n_compared) + 1, n_compared)
    ratios = np.maximum(np.maximum(fast, slow), common)
    n_servers = held.shape[1] // n_metrics
    if n_servers < MIN_SERVERS:
        return np.asarray(ratios, np.float32)
    by_server = held.reshape(held.shape[0], n_servers, n_metrics, *held.shape[2:]).max(axis=2)
    others = _kth_largest(by_server, 2, n_servers)
    # a single server, however far off, moves the fleet no further than the next one does: were it
    # held just below the limit, four such scores would still pass the combined one
    return np.asarray(np.minimum(ratios, np.where(others > 1, np.inf, others)), np.float32)


def _kth_largest(values: Floats32, k: int, n: int) -> Floats32:
    place = values.shape[1] - min(k, n)
    return np.asarray(np.partition(values, place, axis=1)[:, place], np.float32)


def scale_scores(ratios: Floats32, thresholds: Mapping[str, float]) -> dict[str, float]:
    """Return the four metrics on the specification's scale: threshold x ratio."""
    return {name: float(thresholds[name] * ratios[index]) for index, name in enumerate(FAMILIES)}


def combined_ratio(
    ratios: Floats32, thresholds: Mapping[str, float], weights: Mapping[str, float], limit: float
) -> Floats32:
    """Return the combined score over its limit, of ratios (family, ...)."""
    weighted = sum(weights[name] * thresholds[name] * ratios[index] for index, name in enumerate(FAMILIES))
    return np.asarray(weighted / limit, np.float32)


def worst_ratio(ratios: Floats32) -> Floats32:
    """Return how near to a verdict the default rule is: any metric, or the combined score."""
    combined = combined_ratio(ratios, THRESHOLDS, WEIGHTS, COMBINED_THRESHOLD)
    return np.asarray(np.maximum(ratios.max(axis=0), combined), np.float32)


def held_fleet(ratios: Floats32, steps: int) -> Floats32:
    """Return fleet ratios (..., time) that lasted for `steps`; what is far over its limit need not last.

    Incidents of an hour or two make most false alarms of a fleet, and a training can wait as long.
    """
    return np.asarray(np.maximum(running_minimum(ratios, steps), ratios / SURE_TIMES), np.float32)


def running_minimum(ratios: Floats32, steps: int) -> Floats32:
    """Return the smallest of the last `steps` ratios along the last axis; 0 before there are so many."""
    if steps <= 1:
        return ratios
    padded = np.concatenate([np.zeros((*ratios.shape[:-1], steps - 1), np.float32), ratios], axis=-1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, steps, axis=-1)
    return np.asarray(windows.min(axis=-1), np.float32)


def running_share(alarms: NDArray[np.bool_], steps: int) -> Floats32:
    """Return the share of the last `steps` that were in alarm, along the last axis."""
    total = np.cumsum(alarms, axis=-1, dtype=np.int32)
    before = np.zeros_like(total)
    before[..., steps:] = total[..., :-steps] if steps < total.shape[-1] else 0
    return np.asarray((total - before) / steps, np.float32)
