"""The daily and weekly rhythm of many series at once: what is usual at a time of day.

Owns: local time of day, medians and spreads per slot of the day, and whether a series needs a
profile of its own for each day of the week. numpy only. Does not know: drift, files.
"""

import zoneinfo
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from fleetcast.errors import BadData
from fleetcast.schema import Floats, Floats32, Longs

DAY_MS = 86_400_000
MAX_SLOTS = 96  # a quarter of an hour: sharp enough for cron jobs, enough values for a median
NEIGHBOUR_BINS = 2  # bins taken in from each side of a slot
SPREAD_SLOTS = 4  # spreads need more values than medians: an hour to each side
SPREAD_FLOOR = 0.3  # of the mean spread: a quiet hour is not infinitely quiet
SPREAD_CAP = 0.99  # quantile of the residuals above which a spike stops counting
WEEKDAYS = 7

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class DayClock:
    """How bins fall on the local day."""

    bin_ms: int
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        if self.bin_ms <= 0 or DAY_MS % self.bin_ms or DAY_MS // self.bin_ms < 24:
            raise BadData(f"bin_ms must divide a day into at least 24 bins, got {self.bin_ms}")
        try:
            zoneinfo.ZoneInfo(self.timezone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise BadData(f"unknown time zone {self.timezone!r}", hint="for example Europe/Berlin") from error

    @property
    def bins_per_day(self) -> int:
        """Return how many bins a day has."""
        return DAY_MS // self.bin_ms

    @property
    def n_slots(self) -> int:
        """Return how many slots the day's profile has."""
        return min(MAX_SLOTS, self.bins_per_day)

    def local_bins(self, start_ms: int, n_bins: int) -> Longs:
        """Return the number of each bin since 1970-01-01 00:00 local time.

        >>> DayClock(300_000).local_bins(600_000, 2).tolist()
        [2, 3]
        """
        starts = start_ms + np.arange(n_bins, dtype=np.int64) * self.bin_ms
        if self.timezone == "UTC" or not n_bins:
            return starts // self.bin_ms
        zone = zoneinfo.ZoneInfo(self.timezone)
        quarters, which = np.unique(starts // 900_000, return_inverse=True)  # offsets change on these
        moments = [datetime.fromtimestamp(int(quarter) * 900, UTC).astimezone(zone) for quarter in quarters]
        offsets = [moment.utcoffset() for moment in moments]
        shift = np.array([0 if off is None else int(off.total_seconds()) * 1000 for off in offsets], np.int64)
        return (starts + shift[which]) // self.bin_ms

    def slots(self, local_bins: Longs) -> Longs:
        """Return the slot of the day of each bin."""
        return (local_bins % self.bins_per_day) * self.n_slots // self.bins_per_day

    def weekdays(self, local_bins: Longs) -> Longs:
        """Return the day of the week of each bin, 0-6, from a Thursday."""
        return (local_bins // self.bins_per_day) % WEEKDAYS


def sorted_medians(values: Floats32) -> Floats32:
    """Return the median over the last axis, NaN left out; all NaN gives NaN. Sorts a copy.

    numpy's nanmedian goes through masked arrays on short axes and takes ten times as long.
    """
    ordered = np.sort(values, axis=-1)  # NaN last
    n = np.isfinite(ordered).sum(axis=-1)
    low = np.take_along_axis(ordered, np.maximum((n - 1) // 2, 0)[..., None], -1)[..., 0]
    high = np.take_along_axis(ordered, np.minimum(n // 2, ordered.shape[-1] - 1)[..., None], -1)[..., 0]
    return np.asarray(np.where(n > 0, (low + high) / 2, np.nan), np.float32)


def day_grid(values: Floats32, local_bins: Longs, bins_per_day: int) -> Floats32:
    """Lay bins on whole local days: (series, bin) -> (series, day, bin of day), NaN where none.

    A bin that a clock change repeats takes the later value, one that it skips stays NaN.
    """
    first = int(local_bins[0]) // bins_per_day
    n_days = int(local_bins.max()) // bins_per_day - first + 1
    grid = np.full((len(values), n_days * bins_per_day), np.nan, np.float32)
    grid[:, local_bins - first * bins_per_day] = values
    return grid.reshape(len(values), n_days, bins_per_day)


def slot_windows(clock: DayClock, reach: int) -> NDArray[np.int64]:
    """Return (slot, bin of day): the bins of each slot and `reach` more to each side."""
    per_slot = clock.bins_per_day // clock.n_slots
    offsets = np.arange(-reach, per_slot + reach)
    return np.asarray(
        (np.arange(clock.n_slots)[:, None] * per_slot + offsets[None]) % clock.bins_per_day, np.int64
    )


def slot_medians(days: Floats32, clock: DayClock) -> Floats32:
    """Return (series, slot): the usual value at each time of day."""
    gathered = days[:, :, slot_windows(clock, NEIGHBOUR_BINS)]  # (series, day, slot, bin)
    n_series, n_days, n_slots, n_bins = gathered.shape
    return sorted_medians(np.moveaxis(gathered, 1, 2).reshape(n_series, n_slots, n_days * n_bins))


def bin_medians(days: Floats32) -> Floats32:
    """Return (series, bin of day): the usual value of each bin alone; a job of five minutes shows."""
    return sorted_medians(np.moveaxis(days, 1, 2))


def weekday_medians(days: Floats32, weekdays: Longs, clock: DayClock) -> Floats32:
    """Return (series, weekday, slot); a weekday without values takes the profile of all days."""
    everyday = slot_medians(days, clock)
    out = np.repeat(everyday[:, None], WEEKDAYS, axis=1)
    for weekday in np.unique(weekdays):
        own = slot_medians(days[:, weekdays == weekday], clock)
        out[:, weekday] = np.where(np.isfinite(own), own, everyday)
    return out


def slot_spreads(residuals: Floats32, clock: DayClock) -> Floats32:
    """Return (series, slot): mean absolute residual around each time of day, floored.

    Args:
        residuals: (series, day, bin of day), NaN = absent.
    """
    size = np.abs(residuals)
    n_series = len(size)
    flat = size.reshape(n_series, -1)
    cap = upper_quantile(flat, SPREAD_CAP)
    size = np.minimum(size, cap[:, None, None])
    per_slot = clock.bins_per_day // clock.n_slots
    by_slot = size.reshape(n_series, -1, clock.n_slots, per_slot)
    present = np.isfinite(by_slot)
    sums = np.where(present, by_slot, 0).sum(axis=(1, 3), dtype=np.float64)
    counts = present.sum(axis=(1, 3)).astype(np.float64)
    sums, counts = _around(sums), _around(counts)
    overall = sums.sum(axis=1) / np.maximum(counts.sum(axis=1), 1)
    spread = np.where(counts > 0, sums / np.maximum(counts, 1), overall[:, None])
    return np.asarray(np.hypot(spread, SPREAD_FLOOR * overall[:, None]), np.float32)


def _around(slots: Floats) -> Floats:
    """Sum each slot with its neighbours around the clock."""
    reach = min(SPREAD_SLOTS, slots.shape[1] // 2)
    return np.asarray(sum(np.roll(slots, step, axis=1) for step in range(-reach, reach + 1)))


def upper_quantile(values: Floats32, share: float) -> Floats32:
    """Return a high quantile over the last axis, NaN left out; all NaN gives NaN."""
    ordered = np.sort(values, axis=-1)
    n = np.isfinite(ordered).sum(axis=-1)
    index = np.clip(np.ceil(share * n).astype(np.int64) - 1, 0, ordered.shape[-1] - 1)
    return np.asarray(np.take_along_axis(ordered, index[..., None], -1)[..., 0], np.float32)
