"""Telling a broken sensor from drift: outages, restarts and values that stopped moving.

Owns: which values are fit to be compared, bin by bin and causally, so that a live window and a
reference are cleaned alike; the events it saw. numpy only. Does not know: statistics, alarms.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast.schema import Floats32, Longs

OUTAGE_H = 0.5  # silence of a whole server
RESTART_AFTER_H = 1.0  # an outage this long is followed by a warm-up ...
RESTART_H = 0.5  # ... whose values are not compared
FROZEN_H = 1.0  # the shortest standstill that is worth a word
FROZEN_TIMES = 1.5  # of the longest standstill in the reference
FROZEN_IN_REFERENCE_H = 6.0
FROZEN_IN_REFERENCE_TIMES = 3.0  # of a usual day's longest standstill

LARGEST = 1e30  # larger values are no measurements, and their squares overflow
NEVER_STILL = np.iinfo(np.int64).max  # limit of series that may stand still for days
STILL_CAP_H = 48.0

OUTAGE, RESTART, FROZEN = "outage", "restart", "frozen"


@dataclass(frozen=True, slots=True)
class DataQualityEvent:
    """Something wrong with the data themselves; metric None = all of the server's."""

    kind: str
    server_name: str
    metric: str | None
    since_ms: int


def measurements(values: NDArray[Any]) -> Floats32:
    """Return values as float32 with NaN for what cannot be a measurement."""
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(values) < LARGEST, values, np.nan).astype(np.float32)


def still_limits(longest: Longs, bins_per_day: int) -> Longs:
    """Return how many equal bins in a row mean frozen, from the longest run of each series."""
    least = int(FROZEN_H * bins_per_day / 24)
    limits = np.maximum(np.ceil(longest * FROZEN_TIMES), max(2, least)).astype(np.int64)
    return np.asarray(np.where(limits > STILL_CAP_H * bins_per_day / 24, NEVER_STILL, limits), np.int64)


class SensorWatch:
    """Follows a fleet bin by bin and takes out what is not fit to be compared.

    The same bins give the same answers wherever it starts, once every standstill and outage
    that reaches into them has been seen from its beginning.
    """

    def __init__(self, n_servers: int, n_metrics: int, limits: Longs, bins_per_day: int) -> None:
        """Begin with nothing seen.

        Args:
            limits: (series,) bins of standstill that mean frozen.
        """
        self._shape = (n_servers, n_metrics)
        self._limits = limits
        self._per_h = bins_per_day / 24
        self.last = np.full(n_servers * n_metrics, np.nan, np.float32)
        self.still = np.zeros(n_servers * n_metrics, np.int64)  # equal bins in a row, this one included
        self.silent = np.zeros(n_servers, np.int64)  # bins without any value
        self.warming = np.zeros(n_servers, np.int64)  # bins left to wait after a restart
        self._was_seen = np.zeros(n_servers, np.bool_)

    def admit(self, values: Floats32) -> Floats32:
        """Return one bin's values, (series,), with NaN for those not fit to be compared."""
        servers = values.reshape(self._shape)
        present = np.isfinite(servers).any(axis=1)
        back = present & self._was_seen & (self.silent >= RESTART_AFTER_H * self._per_h)
        self.silent = np.where(present, 0, self.silent + 1)
        self._was_seen |= present
        self.warming = np.where(back, round(RESTART_H * self._per_h), np.maximum(self.warming - present, 0))
        same = values == self.last
        seen = np.isfinite(values)
        self.still = np.where(seen, np.where(same, self.still + 1, 1), self.still)
        self.last = np.where(seen, values, self.last)
        unfit = np.repeat(self.warming > 0, self._shape[1]) | (self.still >= self._limits)
        return np.asarray(np.where(unfit, np.nan, values), np.float32)

    @property
    def is_frozen(self) -> NDArray[np.bool_]:
        """Return which series (series,) stand still and are still being reported."""
        heard = np.repeat(self.silent == 0, self._shape[1])
        return np.asarray((self.still >= self._limits) & heard)

    @property
    def is_out(self) -> NDArray[np.bool_]:
        """Return which servers have been silent for long, having been heard before."""
        return np.asarray(self._was_seen & (self.silent >= OUTAGE_H * self._per_h))

    def events(
        self, server_names: tuple[str, ...], metrics: tuple[str, ...], end_ms: int, bin_ms: int
    ) -> tuple[DataQualityEvent, ...]:
        """Return what is wrong now; `end_ms` is the end of the newest bin."""
        found = [
            DataQualityEvent(OUTAGE, server_names[row], None, int(end_ms - self.silent[row] * bin_ms))
            for row in np.flatnonzero(self.is_out)
        ]
        waited = round(RESTART_H * self._per_h) - self.warming
        found += [
            DataQualityEvent(RESTART, server_names[row], None, int(end_ms - (waited[row] + 1) * bin_ms))
            for row in np.flatnonzero((self.warming > 0) & (self.silent == 0))
        ]
        for series in np.flatnonzero(self.is_frozen):
            row, column = divmod(int(series), len(metrics))
            since = int(end_ms - self.still[series] * bin_ms)
            found.append(DataQualityEvent(FROZEN, server_names[row], metrics[column], since))
        return tuple(found)


def run_lengths(values: Floats32) -> NDArray[np.int32]:
    """Return, for each bin of (series, bin), how many equal values in a row end there; 0 = absent."""
    out = np.zeros(values.shape, np.int32)
    last = np.full(len(values), np.nan, np.float32)
    run = np.zeros(len(values), np.int32)
    for index in range(values.shape[1]):
        column = values[:, index]
        seen = np.isfinite(column)
        run = np.where(seen, np.where(column == last, run + 1, 1), run)
        last = np.where(seen, column, last)
        out[:, index] = np.where(seen, run, 0)
    return out


def clean_reference(grid: Floats32, bins_per_day: int) -> tuple[Floats32, Longs]:
    """Take standstills and restarts out of a reference, (server, metric, bin).

    Returns:
        The grid with NaN in their place, and (series,) the runs that mean frozen from then on.
    """
    n_servers, n_metrics, n_bins = grid.shape
    flat = grid.reshape(-1, n_bins)
    runs = run_lengths(flat)
    n_days = n_bins // bins_per_day
    if n_days:
        by_day = runs[:, : n_days * bins_per_day].reshape(-1, n_days, bins_per_day).max(axis=2)
        usual = np.median(by_day, axis=1)
    else:
        usual = np.zeros(len(runs))
    longest = np.maximum(FROZEN_IN_REFERENCE_TIMES * usual, FROZEN_IN_REFERENCE_H * bins_per_day / 24)
    cleaned = np.where(runs > longest[:, None], np.nan, flat).astype(np.float32)
    limits = still_limits(np.minimum(runs.max(axis=1, initial=0), longest).astype(np.int64), bins_per_day)
    watch = SensorWatch(n_servers, n_metrics, np.full(len(flat), NEVER_STILL), bins_per_day)
    for index in range(n_bins):
        cleaned[np.isnan(watch.admit(flat[:, index])), index] = np.nan
    return cleaned.reshape(grid.shape), limits
