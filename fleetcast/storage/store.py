"""The one process that writes a buffer's folder: its lock and its two stores.

Owns: `.owner.lock`, opening and closing the stores together, the newest time seen.
Does not know: what may be accepted, or reading.
"""

import contextlib
import logging
import threading
from datetime import datetime
from pathlib import Path

from fleetcast.files import OwnerLock
from fleetcast.schema import RecordBatch, SettledForecasts
from fleetcast.settings import BufferSettings
from fleetcast.storage.batches import table_of_settled
from fleetcast.storage.daybuild import Step, no_step
from fleetcast.storage.dayreader import DayReader
from fleetcast.storage.daystore import DayStore
from fleetcast.storage.payloads import encode_batch
from fleetcast.storage.tables import METRICS, PREDICTIONS
from fleetcast.storage.upkeep import UpkeepPace

logger = logging.getLogger(__name__)

LOCK_NAME = ".owner.lock"


class BufferOwner:
    """Holds the folder's lock from construction to `close`; thread safe."""

    def __init__(
        self,
        folder: Path,
        settings: BufferSettings,
        *,
        expires: bool,
        pace: UpkeepPace | None = None,
        on_step: Step = no_step,
    ) -> None:
        """Take the lock and recover what a crash left.

        Raises:
            AlreadyRunning: another process writes this buffer.
            CannotStart, StorageFull, StorageBroken: the folder cannot be written.
            UnknownFormat: the log was written by a newer version.
        """
        self._expires = expires
        self._lock = OwnerLock(folder / LOCK_NAME, f"the buffer {folder}").acquire()
        try:
            self._metrics = DayStore(folder, METRICS, settings, pace, on_step)
            self._predictions = DayStore(folder, PREDICTIONS, settings, pace, on_step)
            for store in self._stores:
                store.open()
            self._newest_ms = DayReader(folder, METRICS).newest_ms()
        except BaseException:
            self._lock.release()
            raise
        self._newest_lock = threading.Lock()
        logger.info("buffer opened folder=%s newest_ms=%s", folder, self._newest_ms)

    @property
    def _stores(self) -> tuple[DayStore, DayStore]:
        return self._metrics, self._predictions

    @property
    def newest_ms(self) -> int | None:
        """Newest time of all records."""
        return self._newest_ms

    @property
    def is_flush_due(self) -> bool:
        """Whether the records in the log should become parts now."""
        return self._metrics.is_flush_due

    @property
    def pending_s(self) -> float:
        """How long the oldest record outside its day file has waited."""
        return self._metrics.pending_s

    def append_batch(self, batch: RecordBatch) -> None:
        """Make records durable."""
        self._metrics.append_payload(encode_batch(batch), len(batch))
        newest_ms = int(batch.timestamps_ms.max())
        with self._newest_lock:
            self._newest_ms = newest_ms if self._newest_ms is None else max(self._newest_ms, newest_ms)

    def append_predictions(self, rows: SettledForecasts) -> None:
        """Make settled forecasts durable."""
        self._predictions.append(table_of_settled(rows))

    def flush(self) -> None:
        """Move every row of the logs into its day."""
        for store in self._stores:
            store.flush()

    def maintain(self, now: datetime) -> None:
        """Do what is due."""
        for store in self._stores:
            store.maintain(now, expires=self._expires)

    def close(self) -> None:
        """Flush and give the folder up."""
        with contextlib.ExitStack() as steps:  # each step is taken, whatever the others raise
            steps.callback(self._lock.release)
            for store in self._stores:
                steps.callback(store.close)
