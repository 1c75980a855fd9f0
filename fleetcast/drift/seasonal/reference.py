"""The season-matched reference: what unchanged data of every server and metric look like.

Owns: learning it from some weeks of bins, the calibration of its limits, and its file. Lives
beside the baseline of a model version. Does not know: the newest values (`SeasonalDrift`).

Its file is specified in `reference_file.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fleetcast.drift.seasonal.fleet_calibration import FleetCalibration, calibrate
from fleetcast.drift.seasonal.learning import MIN_DAYS, value_ranges
from fleetcast.drift.seasonal.limits import growth, own_quantiles, series_limits, shared_growth
from fleetcast.drift.seasonal.quorum import QuorumRule
from fleetcast.drift.seasonal.reference_chunks import fit_all, joined_books, joined_shapes, sampled
from fleetcast.drift.seasonal.reference_file import read_reference, reference_bytes
from fleetcast.drift.seasonal.residuals import Shape
from fleetcast.drift.seasonal.season import DayClock
from fleetcast.drift.seasonal.sensors import clean_reference, measured
from fleetcast.drift.seasonal.statistics import Books
from fleetcast.errors import BadData
from fleetcast.files import write_atomic
from fleetcast.schema import Floats, Floats32, Longs

RANGE_FLOOR = 0.02  # of the metric's usual range in this fleet


@dataclass(frozen=True, eq=False)
class Reference:
    """Rhythm, spread and limits of every series; series run server by server.

    Guarantees: every limit of a compared series is finite and > 0, or NaN where that statistic
    cannot be judged (no forecast errors known).
    """

    server_names: tuple[str, ...]
    metrics: tuple[str, ...]
    bin_ms: int
    timezone: str
    start_ms: int
    end_ms: int  # end of the newest bin
    shape: Shape
    books: Books
    pull: Floats32  # (series,)
    n_days: Longs  # (series,) days behind it
    start_days: Longs  # (series,) first day used: later than 0 where an older regime was cut away
    still_limits: Longs  # (series,) equal bins in a row that mean a frozen sensor
    limits: Floats32  # (series, statistic)
    shared_growth: Floats32  # (statistic,)
    fleet: FleetCalibration

    @property
    def clock(self) -> DayClock:
        """Return how bins fall on the local day."""
        return DayClock(self.bin_ms, self.timezone)

    @property
    def n_series(self) -> int:
        """Return the number of (server, metric) pairs."""
        return len(self.server_names) * len(self.metrics)

    @property
    def is_compared(self) -> NDArray[np.bool_]:
        """Return which series (series,) have days enough to be judged."""
        return np.asarray(np.isfinite(self.limits).any(axis=1))

    @classmethod
    def fit(
        cls,
        grid: Floats32 | Floats,
        server_names: tuple[str, ...],
        metrics: tuple[str, ...],
        start_ms: int,
        bin_ms: int,
        *,
        errors: Floats32 | Floats | None = None,
        changed_ms: Floats | None = None,
        timezone: str = "UTC",
        rule: QuorumRule | None = None,
        false_alarms_per_month: float = 1.0,
        min_days: int = MIN_DAYS,
    ) -> Self:
        """Learn a reference; three weeks are good, five days the least advisable.

        Args:
            grid: (server, metric, bin) bin means in native units, NaN = absent.
            errors: the same shape, |forecast - actual| of the models that were in service.
            changed_ms: (server, metric) when a series is known to have changed, NaN = never;
                what came before does not count.
            false_alarms_per_month: how often an unchanged fleet may call for a training.
            min_days: days a series needs to be judged.
        Raises:
            BadData: shapes that do not fit each other.
        """
        values, missed = _checked(grid, errors, server_names, metrics)
        clock = DayClock(bin_ms, timezone)
        if changed_ms is not None:
            starts = start_ms + np.arange(values.shape[2], dtype=np.int64) * bin_ms
            values = np.where(starts < np.nan_to_num(changed_ms, nan=-np.inf)[..., None], np.nan, values)
        cleaned, still = clean_reference(values, clock.bins_per_day)
        flat = cleaned.reshape(-1, values.shape[2])
        flat_errors = None if missed is None else missed.reshape(flat.shape)
        local_bins = clock.local_bins(start_ms, values.shape[2])
        chunks = fit_all(flat, flat_errors, local_bins, _range_floors(flat, len(metrics)), clock)
        shared = shared_growth(np.concatenate([growth(part.left_out, part.folds) for part in chunks]))
        own = np.concatenate([own_quantiles(part.left_out) for part in chunks])
        n_days = np.concatenate([part.n_days for part in chunks])
        limits = series_limits(own, shared, n_days)
        limits[n_days < min_days] = np.nan
        fleet = calibrate(
            *sampled(chunks, len(metrics)), limits, len(metrics), rule or QuorumRule(), false_alarms_per_month
        )
        return cls(
            server_names,
            metrics,
            bin_ms,
            timezone,
            start_ms,
            start_ms + values.shape[2] * bin_ms,
            joined_shapes([part.shape for part in chunks]),
            joined_books([part.books for part in chunks]),
            np.concatenate([part.pull for part in chunks]),
            n_days,
            np.concatenate([part.start_days for part in chunks]),
            still,
            limits,
            shared,
            fleet,
        )

    def to_bytes(self) -> bytes:
        """Return the content of a reference file."""
        return reference_bytes(self)

    def save(self, path: Path) -> None:
        """Write the file in one durable step."""
        write_atomic(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a reference file.

        Raises:
            FileNotFoundError: there is none.
            UnknownFormat: another format version wrote it.
            CorruptFile: it is not a reference.
        """
        return read_reference(path, cls)


def _checked(
    grid: Floats32 | Floats,
    errors: Floats32 | Floats | None,
    servers: tuple[str, ...],
    metrics: tuple[str, ...],
) -> tuple[Floats32, Floats32 | None]:
    if grid.ndim != 3 or grid.shape[:2] != (len(servers), len(metrics)) or 0 in grid.shape:
        expected = f"({len(servers)}, {len(metrics)}, bins)"
        raise BadData(f"grid must be (server, metric, bin) {expected}, none of them 0, got {grid.shape}")
    if errors is not None and errors.shape != grid.shape:
        raise BadData(f"errors must have the grid's shape {grid.shape}, got {errors.shape}")
    return measured(grid), None if errors is None else measured(errors)


def _range_floors(flat: Floats32, n_metrics: int) -> Floats32:
    """Return (series,): the smallest range worth measuring by, from the same metric elsewhere."""
    ranges, lows, highs = value_ranges(flat)
    size = np.fmax(np.abs(lows), np.abs(highs))
    by_metric = ranges.reshape(-1, n_metrics)
    moving = np.where(by_metric > 0, by_metric, np.nan)
    usual = np.array([np.nanmedian(column) if np.isfinite(column).any() else 0.0 for column in moving.T])
    floors = np.fmax(RANGE_FLOOR * np.tile(usual, len(by_metric)), 1e-6 * np.nan_to_num(size))
    return np.asarray(np.maximum(floors, 1e-30), np.float32)
