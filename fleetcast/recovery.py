"""What a restart brings back: history, roster and the bins that were not worked off.

Owns: from where the buffer is read at start, and where sweeps go on.
Does not know: how the buffer recovers its own log (it has, before this is called).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from itertools import takewhile
from typing import Protocol

from fleetcast.bins import HISTORY_BINS
from fleetcast.clock import from_ms, iso_z, monotonic, to_ms
from fleetcast.ingest.recordrules import FUTURE_LIMIT
from fleetcast.schema import RecordBatch
from fleetcast.serving.history import BinHistory
from fleetcast.serving.ledger import Ledger
from fleetcast.serving.roster import Roster

logger = logging.getLogger(__name__)


class StoredRecords(Protocol):
    """The buffer, as far as a restart reads it."""

    def newest_record_time(self) -> datetime | None: ...

    def iter_batches(
        self, start_ms: int, end_ms: int, metrics: Sequence[str] | None = None
    ) -> Iterator[RecordBatch]: ...


def restore(
    stored: StoredRecords,
    history: BinHistory,
    roster: Roster,
    ledger: Ledger,
    gone_after_s: float,
    should_stop: Callable[[], bool] = lambda: False,
    now: datetime | None = None,
) -> int | None:
    """Fill history and roster from stored records.

    Bins after the last one the ledger worked off are open again: the next sweeps take them.

    Args:
        should_stop: asked between batches; what was read by then is all there is.
        now: the system's clock; what was stored by one that was ahead of it is left for its time.
    Returns:
        the newest bin worked off, to be forecast again for readers; None for an empty buffer.
    """
    newest = stored.newest_record_time()
    if newest is None:
        return None
    started = monotonic()
    newest = newest if now is None else min(newest, now + FUTURE_LIMIT)
    newest_bin = _bin(newest, history)
    resume = ledger.resume_bin_ms
    taken = newest_bin - history.bin_ms if resume is None else resume
    if now is not None and taken > newest_bin:
        taken = _bin(now, history) - history.bin_ms
    first = min(taken, newest_bin) - (HISTORY_BINS - 1) * history.bin_ms
    recent = max(first, newest_bin - int(gone_after_s * 1000) // history.bin_ms * history.bin_ms)
    batches = _batches(stored, history, roster, first, recent, newest_bin + history.bin_ms)
    history.restore(takewhile(lambda _: not should_stop(), batches), taken)
    logger.info(
        "history restored from the buffer servers=%d newest=%s resume=%s took_s=%.1f",
        history.n_servers, iso_z(newest), iso_z(from_ms(taken)), monotonic() - started,
    )  # fmt: skip
    return taken


def _bin(moment: datetime, history: BinHistory) -> int:
    return to_ms(moment) // history.bin_ms * history.bin_ms


def _batches(
    stored: StoredRecords, history: BinHistory, roster: Roster, first: int, recent: int, end: int
) -> Iterator[RecordBatch]:
    """Yield old records with the forecast metrics only, newer ones whole: the roster shows all metrics."""
    yield from stored.iter_batches(first, recent, history.metrics)
    for batch in stored.iter_batches(recent, end):
        roster.add(batch)
        yield batch
