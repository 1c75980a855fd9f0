"""The way of remote-write requests into the daemon: decode, map, then take as records.

Owns: the order of requests that touch the same counters, and records that could not be stored.
Does not know: HTTP, files. Safe from any thread.

A request that fails at the disk has moved the counters on; the records it led to are kept here
and go with the next request, which is the sender's repetition.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fleetcast.errors import SettingsError, StorageBroken, StorageFull
from fleetcast.ingest.columns import RowsOf
from fleetcast.ingest.records import RecordRules
from fleetcast.prometheus.scrapes import Derived, ExporterMapping
from fleetcast.prometheus.wire import WriteDecoder, WriteRequest
from fleetcast.serving.intake import Receipt
from fleetcast.settings import RemoteWriteSettings

_UNSTORED_MAX_ROWS = 100_000


@dataclass(frozen=True, slots=True)
class WriteReceipt:
    """What became of one request."""

    n_records: int  # durable now
    samples: Mapping[str, int]  # by outcome
    reasons: Sequence[str]  # why records were refused
    problems: Sequence[str]  # what the sender should know; the intake took the rest


class WriteIntake:
    """Takes remote-write requests."""

    def __init__(
        self,
        settings: RemoteWriteSettings,
        take: Callable[[Sequence[object]], Receipt],
        rules: Callable[[], RecordRules],
    ) -> None:
        """Raises SettingsError where the path, a rule or a pattern is not usable."""
        if not settings.path.startswith("/") or "{" in settings.path:
            raise SettingsError(
                [f"remote_write.path must be a path such as /api/v1/write, got {settings.path!r}"]
            )
        self.path = settings.path
        self._settings = settings
        self._take = take
        self._rules = rules
        self._lock = threading.Lock()
        self._mapping = ExporterMapping(settings)
        self._decoder = WriteDecoder(self._mapping.number, settings.max_unpacked_bytes)
        self._unstored: list[RowsOf] = []

    @property
    def n_series(self) -> int:
        """Return how many series the mapping remembers."""
        return self._mapping.n_series

    def take(self, body: bytes) -> WriteReceipt:
        """Make durable the records that a request completes.

        Raises:
            BadData: it is no remote-write request; nothing of it was taken.
            StorageFull, StorageBroken: the records wait for the next request.
        """
        with self._lock:
            request = self._decoder.decode(body)
            derived = self._mapping.derive(request.samples, self._rules())
            self._forget_silent()
            rows = [*self._unstored, RowsOf(derived.columns)]
            self._unstored = []
        receipts: list[Receipt] = []
        try:
            for some in rows:
                if len(some):
                    receipts.append(self._take(some))
        except (StorageFull, StorageBroken):
            self._keep_unstored(rows[len(receipts) :])
            raise
        reasons = [r.reason for receipt in receipts for r in receipt.rejections]
        return WriteReceipt(
            sum(receipt.n_received for receipt in receipts),
            _outcomes(request, derived),
            reasons,
            self._problems(request, derived, reasons),
        )

    def _forget_silent(self) -> None:
        new_numbers = self._mapping.forget_silent()
        if new_numbers is not None:
            self._decoder.renumber(new_numbers)

    def _keep_unstored(self, rows: list[RowsOf]) -> None:
        with self._lock:
            self._unstored = [some for some in (*rows, *self._unstored) if len(some)]
            while sum(map(len, self._unstored)) > _UNSTORED_MAX_ROWS:
                del self._unstored[0]

    def _problems(self, request: WriteRequest, derived: Derived, reasons: Sequence[str]) -> list[str]:
        problems = []
        if derived.n_out_of_bounds:
            bounds = "older than the retention or over 5 min in the future"
            problems.append(f"{derived.n_out_of_bounds} samples are {bounds}")
        if request.n_refused:
            limit = self._settings.max_series
            problems.append(f"{request.n_refused} series are beyond remote_write.max_series = {limit}")
        if reasons:
            problems.append(f"{len(reasons)} records refused: {reasons[0]}")
        return problems


def _outcomes(request: WriteRequest, derived: Derived) -> dict[str, int]:
    return {
        "taken": len(request.samples) - derived.n_out_of_bounds,
        "out_of_bounds": derived.n_out_of_bounds,
        "ignored": request.n_ignored,
        "refused": request.n_refused,
    }
