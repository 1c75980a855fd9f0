"""Whether a fleet has data enough for its first training, told from the buffer without much reading.

Owns: how the span and the trainable windows are found in the buffer. The rule itself is
`windows.enough_to_train`, which the trainer asks, too. Does not know: whether a training is due.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Protocol

import numpy as np

from fleetcast.bins import bin_means, count_trainable, enough_to_train
from fleetcast.clock import DAY_MS, to_ms
from fleetcast.schema import RecordBatch
from fleetcast.settings import BinSettings, DecisionSettings


class RecordStore(Protocol):
    """What is asked of the DataBuffer."""

    def newest_record_time(self) -> datetime | None: ...

    def oldest_record_time(self) -> datetime | None: ...

    def iter_batches(
        self, start_ms: int, end_ms: int, metrics: Sequence[str] | None = None
    ) -> Iterator[RecordBatch]: ...


class Readiness:
    """Answers again and again; once there was enough it reads no more. Not thread safe."""

    def __init__(
        self,
        store: RecordStore,
        bins: BinSettings,
        horizon_bins: int,
        training_days: int,
        settings: DecisionSettings,
    ) -> None:
        self._store = store
        self._bins = bins
        self._horizon_bins = horizon_bins
        self._training_days = training_days
        self._settings = settings
        self._was_enough = False

    def why_not(self) -> str:
        """Return what is missing for a first training, or ""."""
        newest, oldest = self._store.newest_record_time(), self._store.oldest_record_time()
        if newest is None or oldest is None:
            return "no data"
        if self._was_enough:
            return ""
        oldest = max(oldest, newest - timedelta(days=self._training_days))
        span_s = (newest - oldest).total_seconds()
        enough = self._settings.initial_min_windows
        missing = enough_to_train(span_s, enough, self._settings)  # the span alone, before any reading
        if not missing:
            n_windows = self._count(to_ms(oldest), to_ms(newest), enough)
            missing = enough_to_train(span_s, n_windows, self._settings)
        self._was_enough = not missing
        return missing

    def _count(self, oldest_ms: int, newest_ms: int, enough: int) -> int:
        """Count windows day by day, newest first, until there are `enough`.

        A window that spans midnight is not counted: a lower bound is all that is asked for.
        """
        found = 0
        for day in range(newest_ms // DAY_MS, oldest_ms // DAY_MS - 1, -1):
            start_ms, end_ms = day * DAY_MS, (day + 1) * DAY_MS
            for batch in self._store.iter_batches(start_ms, end_ms, self._bins.forecast_metrics):
                found += self._windows_of(batch, start_ms)
                if found >= enough:
                    return found
        return found

    def _windows_of(self, batch: RecordBatch, day_ms: int) -> int:
        if not len(batch) or not batch.metrics:
            return 0
        bin_ms = self._bins.bin_s * 1000
        values = np.stack(list(batch.metrics.values()), axis=1)
        codes, starts, means = bin_means(batch.server_codes, batch.timestamps_ms, values, bin_ms)
        shape = (len(batch.server_names), values.shape[1], DAY_MS // bin_ms)
        grid = np.full(shape, np.nan, np.float32)
        grid[codes, :, (starts - day_ms) // bin_ms] = means
        return count_trainable(grid, self._horizon_bins)
