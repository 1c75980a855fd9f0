"""Records that wait for a daemon that is away: bounded, oldest first, and sent again until taken.

Owns: the waiting records and the rhythm of tries: unlike `RecordSender`, which blocks its
caller until a batch is taken, it never keeps the next reading waiting and gives nothing up but
the oldest records. Does not know: where records come from (`post` is handed in).
A record leaves the backlog only after the daemon answered for it; sending one twice is
harmless, since the daemon keeps one row per (server, timestamp).
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fleetcast.clock import monotonic
from fleetcast.errors import DaemonAway
from fleetcast.sources.client import FeedAnswer, RequestRefused

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
BATCH_RECORDS = 500  # a day of one host at 5 s is delivered in 35 requests
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0
TOO_LARGE = 413


class Backlog:
    """At most `limit` records; a new one displaces the oldest. Safe between threads."""

    def __init__(self, limit: int) -> None:
        self._records: deque[tuple[int, Record]] = deque()
        self._limit = limit
        self._lock = threading.Lock()
        self._added = 0
        self.displaced = 0  # records given up because the daemon was away too long

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: Record) -> None:
        """Keep `record` until it is delivered or displaced."""
        with self._lock:
            self._added += 1
            self._records.append((self._added, record))
            if len(self._records) > self._limit:
                self._records.popleft()
                self.displaced += 1

    def oldest(self, count: int) -> tuple[list[Record], int]:
        """Return up to `count` records and the mark that tells `delivered` about them."""
        with self._lock:
            chosen = [self._records[i] for i in range(min(count, len(self._records)))]
        return [record for _, record in chosen], chosen[-1][0] if chosen else 0

    def delivered(self, mark: int) -> None:
        """Forget the records up to `mark`; ones displaced meanwhile are not counted again."""
        with self._lock:
            while self._records and self._records[0][0] <= mark:
                self._records.popleft()


class Delivery:
    """Empties a backlog into `post`, backing off while that fails. Not thread safe."""

    def __init__(
        self,
        backlog: Backlog,
        post: Callable[[Sequence[Record]], FeedAnswer],
        wall_s: Callable[[], float] = monotonic,
    ) -> None:
        self._backlog = backlog
        self._post = post
        self._wall_s = wall_s
        self._next_try_s = 0.0
        self._wait_s = FIRST_WAIT_S
        self._batch = BATCH_RECORDS
        self._away_since_s: float | None = None
        self.received = 0
        self.rejected = 0

    @property
    def is_away(self) -> bool:
        """Whether the last try failed."""
        return self._away_since_s is not None

    def run_due(self) -> None:
        """Deliver everything that waits, unless a failed try asked for patience."""
        while self._wall_s() >= self._next_try_s:
            records, mark = self._backlog.oldest(self._batch)
            if not records:
                return
            try:
                answer = self._post(records)
            except DaemonAway as error:
                self._note_failure(error, len(records))
                continue
            self._backlog.delivered(mark)
            self._note_success(answer)

    def _note_failure(self, error: DaemonAway, n_records: int) -> None:
        refusal = error if isinstance(error, RequestRefused) else None
        if refusal and refusal.status == TOO_LARGE and n_records > 1:
            self._batch = n_records // 2  # the daemon's limit is a setting: find one that fits
            return
        now_s = self._wall_s()
        if self._away_since_s is None:
            self._away_since_s = now_s
            logger.warning("delivery failed, records wait error=%s waiting=%d", error, len(self._backlog))
        asked_s = (refusal.retry_after_s if refusal else None) or 0.0
        self._next_try_s = now_s + min(max(asked_s, self._wait_s), LONGEST_WAIT_S)
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)

    def _note_success(self, answer: FeedAnswer) -> None:
        self.received += answer.received
        self.rejected += answer.rejected
        self._wait_s = FIRST_WAIT_S
        if answer.rejected:
            logger.warning("daemon rejected records=%d first=%s", answer.rejected, answer.errors[:1])
        if self._away_since_s is not None:
            away_s = self._wall_s() - self._away_since_s
            self._away_since_s = None
            logger.info("delivery works again after_s=%.0f waiting=%d", away_s, len(self._backlog))
