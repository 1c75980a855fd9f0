"""The season-matched detector over whole stretches at once: the same formulas as bin by bin.

`tests/test_detector.py` proves that `SeasonalDetector` gives the same scores.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.drift.parts.data import BIN_MS, DAY, RecordedFleet
from benchmarks.drift.parts.rules import STEP
from fleetcast.drift.seasonal.quorum import (
    QuorumRule,
    by_family,
    common_ratios,
    fleet_ratios,
    held_fleet,
    limit_ratios,
    running_minimum,
    running_share,
    worst_ratio,
)
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.drift.seasonal.season import ABSENT, innovations, moves, traits
from fleetcast.drift.seasonal.sensors import SensorWatch
from fleetcast.drift.seasonal.settled import FleetGrid
from fleetcast.drift.seasonal.statistics import BinCodes, statistics, sums_over
from fleetcast.schema import Floats32

Bools = NDArray[np.bool_]
SHORT = DAY // 8
CHECKS_PER_DAY = DAY // STEP
# The check at which a change is put in must be judged as any other, so that a series that was in alarm
# before can be left out: a hold of several checks needs as many before it.
AT_START = max(1, QuorumRule().hold_bins(CHECKS_PER_DAY) - 1)
LEAD = DAY + AT_START * STEP  # history before the check at a start
WATCH_BINS = 2 * DAY  # standstills are followed from this far before a test


@dataclass(frozen=True, eq=False)
class Block:
    """One reference of a fleet and the test data after it, cleaned as the detector would."""

    reference: Reference
    first: int  # bin the reference starts at
    begin: int  # first test bin
    end: int
    admitted: Floats32  # (server, metric, bin) from `begin - LEAD` to `end`

    def row(self, server: int, metric: int) -> int:
        """Return the series' row."""
        return server * len(self.reference.metrics) + metric


def fitted_block(fleet: RecordedFleet, first: int, days: int, test_days: int) -> Block:
    """Learn a reference from `days` days and prepare what follows."""
    begin = first + days * DAY
    end = min(fleet.n_bins, begin + test_days * DAY)
    start_ms = fleet.start_ms + first * BIN_MS
    values = fleet.grid[:, :, first:begin]
    errors = np.full_like(values, np.nan)
    reference = Reference.fit(FleetGrid(fleet.server_names, fleet.metrics, start_ms, BIN_MS, values, errors))
    watch = SensorWatch(len(fleet.server_names), len(fleet.metrics), reference.still_limits, DAY)
    lead = begin - LEAD
    admitted = np.empty((*fleet.grid.shape[:2], end - lead), np.float32)
    for place in range(max(first, lead - WATCH_BINS), end):
        clean = watch.admit(fleet.grid[:, :, place].ravel())
        if place >= lead:
            admitted[:, :, place - lead] = clean.reshape(fleet.grid.shape[:2])
    return Block(reference, first, begin, end, admitted)


def series_ratios(reference: Reference, rows: NDArray[np.int64], values: Floats32, start_ms: int) -> Floats32:
    """Return (family, series, check) ratios before they are held; the first check ends at bin DAY."""
    return by_family(statistic_ratios(reference, rows, values, start_ms))


def statistic_ratios(
    reference: Reference, rows: NDArray[np.int64], values: Floats32, start_ms: int
) -> Floats32:
    """Return (statistic, series, check) ratios before they are held; the first check ends at bin DAY.

    Args:
        values: (series, bin) of those rows, from `start_ms`.
    """
    clock = reference.clock
    bins = clock.local_bins(start_ms, values.shape[1])
    books = reference.books.rows(rows)
    own = traits(reference.shape.rows(rows), clock, bins, np.asarray(values, np.float32))
    unknown = np.full((len(rows), 2), np.nan, np.float32)
    novel = innovations(own.scores, unknown[:, 0], reference.pull[rows])
    codes = books.values.codes(own.scores)
    coded = (codes, books.innovations.codes(novel), np.full_like(codes, ABSENT))
    kept = BinCodes(*coded, own, moves(own.scores, unknown), bins % clock.bins_per_day)
    found = statistics(sums_over(kept, STEP, SHORT, DAY), books, SHORT, DAY)
    return limit_ratios(found, reference.limits[rows])


def held(ratios: Floats32) -> Floats32:
    """Return ratios as they are after a series' hold."""
    return running_minimum(ratios, QuorumRule().hold_bins(CHECKS_PER_DAY))


def fleet_verdict(
    ratios: Floats32, n_days: NDArray[np.int64], is_compared: Bools, n_metrics: int, factor: float
) -> Bools:
    """Return (check,): whether a fleet drifts.

    Args:
        ratios: (statistic, series, check) before they are held, server by server.
        n_days: (series,) behind each reference.
        is_compared: (series,)
    """
    rule = QuorumRule()
    kept = held(by_family(ratios))
    common = by_family(held(common_ratios(ratios, n_days, is_compared, n_metrics, rule)))
    sustained = running_share(kept.max(axis=0) > 1, rule.sustained_bins(CHECKS_PER_DAY))
    fleet = fleet_ratios(kept, common, sustained, int(is_compared.sum()), n_metrics, rule)
    return np.asarray(worst_ratio(held_fleet(fleet / factor, rule.fleet_hold_bins(CHECKS_PER_DAY))) > 1)


def proxy_errors(reference: Reference, row: int, values: Floats32, start_ms: int) -> NDArray[np.float64]:
    """Return the one-step errors, native units, of the autoregression a reference holds."""
    clock = reference.clock
    rows = np.array([row])
    bins = clock.local_bins(start_ms, len(values))
    shape = reference.shape.rows(rows)
    own = traits(shape, clock, bins, np.asarray(values, np.float32)[None])
    novel = innovations(own.scores, np.full(1, np.nan, np.float32), reference.pull[rows])
    return np.asarray(novel[0] * shape.spreads[0][clock.slots(bins)], np.float64)
