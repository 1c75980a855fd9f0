"""The way of records into the daemon: checked, made durable, then known to every other part.

Owns: the order of these steps, the limits on how many servers and metrics there may be, and the
quarantine of rejected records. Does not know: HTTP, how the buffer stores, forecasts. A record is
reported as received only after the buffer has made it durable; the fleet's history and roster see
it after that, so that no forecast rests on a record that a crash could take back.

`data_buffer/quarantine.jsonl` is for people to look at, one JSON line per rejected record:
`received_at`, `index`, `field`, `reason`, `record` (cut to 2,000 characters). Bounded: past half of
`max_bytes` it moves to `quarantine.jsonl.1` and starts again. No program reads it back, so a line
that a full disk refused is only counted.
"""

import contextlib
import json
import logging
import threading
from collections import Counter as Tally
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fleetcast import files
from fleetcast.clock import Clock, iso_z, monotonic
from fleetcast.errors import StorageBroken, StorageFull
from fleetcast.ingest.columns import Flags, join_rows
from fleetcast.ingest.records import REJECTIONS_KEPT, RecordRules, accept
from fleetcast.ingest.rules import TOO_MANY_SERVERS, quote_value, rule_of
from fleetcast.schema import Longs, RecordBatch, RefusedField, Rejection
from fleetcast.serving.roster import Fleet
from fleetcast.settings import BufferSettings, ServerSettings
from fleetcast.storage.store import DataBuffer

logger = logging.getLogger(__name__)

FILE_NAME = "quarantine.jsonl"
RECORD_MAX_CHARS = 2000
PROBE_S = 5.0
_STUCK_S = 15.0  # one write takes milliseconds, on a busy disk a second or two


class RejectedRecords:
    """The bounded quarantine file; safe from any thread."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.path = folder / FILE_NAME
        self._half_bytes = max_bytes // 2
        self._lock = threading.Lock()
        self.lost = 0  # records the disk did not take

    def keep(self, raw: Sequence[object], rejections: Sequence[Rejection], received_at: datetime) -> None:
        """Append the rejected ones of `raw`."""
        stamp = iso_z(received_at)
        lines: list[str] = []
        n_bytes = 0
        for rejection in rejections:
            line = _line(stamp, rejection, raw[rejection.index])
            n_bytes += len(line.encode()) + 1
            if n_bytes > self._half_bytes:  # one request must not push out more than it can show
                break
            lines.append(line)
        with self._lock:
            try:
                files.append_line(self.path, "\n".join(lines), max_bytes=self._half_bytes)
            except (StorageFull, StorageBroken) as error:
                if not self.lost:
                    logger.warning("rejected records cannot be kept: %s", error)
                self.lost += len(rejections)

    def forget(self, servers: Collection[str]) -> bool:
        """Leave out what was rejected of some servers; return True.

        Raises:
            StorageFull, StorageBroken: the older file stands.
        """
        with self._lock:
            for path in (self.path, self.path.with_name(f"{self.path.name}.1")):
                try:
                    lines = path.read_text(errors="replace").splitlines()
                except OSError:
                    continue
                kept = [line for line in lines if not _is_of(line, servers)]
                if len(kept) < len(lines):
                    files.write_atomic(path, "".join(f"{line}\n" for line in kept).encode())
        return True


def _is_of(line: str, servers: Collection[str]) -> bool:
    """Whether a line is about one of the servers; of a record that was cut, its text tells."""
    try:
        record = json.loads(line)["record"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    if isinstance(record, dict):
        return record.get("server_name") in servers
    return isinstance(record, str) and any(ascii(name) in record for name in servers)


def _line(stamp: str, rejection: Rejection, record: object) -> str:
    kept: Any = record
    text = _text(record)
    if len(text) > RECORD_MAX_CHARS:
        kept = text[:RECORD_MAX_CHARS]
    entry = {"received_at": stamp, **rejection.as_dict(), "record": kept}
    try:
        return msgspec.json.encode(entry, enc_hook=quote_value).decode()
    except (UnicodeEncodeError, TypeError, ValueError, RecursionError):  # lone surrogates, odd keys
        return json.dumps({**entry, "record": text[:RECORD_MAX_CHARS]})


def _text(record: object) -> str:
    if isinstance(record, dict):  # of columns a time is no text
        record = {k: quote_value(v) if isinstance(v, datetime) else v for k, v in record.items()}
    try:
        return ascii(record)
    except RecursionError:
        return f"<{type(record).__name__} nested too deeply>"


class WriteHealth:
    """How the last writes of records went; safe from any thread.

    While they fail, a small durable write is tried now and then, so that the daemon is ready again
    without a client that sends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun_at: dict[int, float] = {}  # of the writes under way, by thread
        self._refusal = ""
        self._probed_at = float("-inf")

    @property
    def problem(self) -> str:
        """Return why records are not stored, "" where they are."""
        with self._lock:
            waits_s = monotonic() - min(self._begun_at.values(), default=float("inf"))
            if waits_s > _STUCK_S:
                return f"a write has been waiting for the disk for {waits_s:.0f} s"
            return self._refusal and f"records cannot be stored: {self._refusal}"

    def write(self, work: Callable[[], None]) -> None:
        """Do one write and keep how it went; raises what it raises."""
        thread = threading.get_ident()
        refusal = "the write was interrupted"
        with self._lock:
            self._begun_at[thread] = monotonic()
        try:
            work()
            refusal = ""
        except Exception as error:
            refusal = str(error) or type(error).__name__
            raise
        finally:
            with self._lock:
                del self._begun_at[thread]
                self._refusal = refusal

    def probe(self, work: Callable[[], None]) -> None:
        """Try a small write where the last one failed and it is time to; called about every second."""
        if self._refusal and monotonic() - self._probed_at >= PROBE_S:
            self._probed_at = monotonic()
            with contextlib.suppress(StorageFull, StorageBroken):
                self.write(work)
                logger.info("records can be stored again")


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of one request's records."""

    n_received: int
    rejections: tuple[Rejection, ...]  # the first of them
    n_ignored_fields: int
    faults: Mapping[str, int] = field(default_factory=dict)  # all of them, by rule, where not all are listed
    refused_fields: tuple[RefusedField, ...] = ()  # of records that were received without them
    useless_fields: tuple[str, ...] = ()  # ignored, where a record was received without any metric

    @property
    def by_rule(self) -> Mapping[str, int]:
        """Return how many records were refused, by rule."""
        return self.faults or Tally(rule_of(one.reason) for one in self.rejections)

    @property
    def n_rejected(self) -> int:
        """Return how many records were refused."""
        return sum(self.by_rule.values())


class Intake:
    """Takes requests' records; `take` is safe from any thread."""

    def __init__(
        self,
        buffer: DataBuffer,
        fleet: Fleet,
        rejected: RejectedRecords,
        wall_clock: Clock,
        limits: ServerSettings,
        buffer_settings: BufferSettings,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """Join the parts that a record passes.

        Args:
            wall_clock: bounds the times of records, also while the fleet's clock stands at the data.
            wake: called when records made a bin due that a forecast is made from.
        """
        self._buffer = buffer
        self._fleet = fleet
        self._rejected = rejected
        self._wall_clock = wall_clock
        self._limits = limits
        self._buffer_settings = buffer_settings
        self._wake = wake
        self.writes = WriteHealth()
        self.note_times: Callable[[Longs], None] = lambda times_ms: None  # told of what was made durable

    def forget(self, servers: Collection[str]) -> bool:
        """Forget what was rejected of some servers; see `RejectedRecords.forget`."""
        return self._rejected.forget(servers)

    def probe(self) -> None:
        """Find out whether records can be stored again, where the last ones could not."""
        self.writes.probe(self._buffer.probe)

    def take(self, raw: Sequence[object]) -> Receipt:
        """Check records and make the good ones durable.

        Raises:
            StorageFull, StorageBroken: none of them was kept.
        """
        return self.take_together([raw])[0]

    def take_together(self, parts: Sequence[Sequence[object]]) -> list[Receipt]:
        """Do the same for several requests of one layout (`columns.layout_of`) at once.

        Each record meets the fate it would meet alone. The first receipt counts the ignored fields
        of all.

        Raises:
            StorageFull, StorageBroken: nothing of any of them was kept.
        """
        raw = join_rows(parts)
        accepted = accept(raw, self.rules())
        is_whole = len(parts) == 1
        is_limited = accepted.is_curtailed or accepted.refused_fields or self._lacks_room(accepted.batch)
        if (
            not is_whole and is_limited
        ):  # what was listed, and which fields were left out, is for each request
            return [self.take(part) for part in parts]
        batch, fields = self._without_new_metrics(accepted.batch)
        batch, refused, n_refused = self._without_new_servers(batch, accepted.is_kept, is_whole)
        if len(batch):
            self.writes.write(lambda: self._buffer.append_batch(batch))
            self._fleet.add(batch)
            self.note_times(batch.timestamps_ms)
            due = self._fleet.due_bins()
            if due and self._fleet.is_present(due[-1]):  # history that comes in waits for the next tick
                self._wake()
        rejections = sorted((*accepted.rejections, *refused), key=lambda rejection: rejection.index)
        n_ignored = [accepted.ignored_text_fields] + [0] * (len(parts) - 1)
        if is_whole:
            faults = Tally(accepted.faults) + Tally({TOO_MANY_SERVERS: n_refused})
            receipt = Receipt(
                len(batch), tuple(rejections[:REJECTIONS_KEPT]), n_ignored[0], faults,
                (*accepted.refused_fields, *fields), accepted.useless_fields,
            )  # fmt: skip
            self._keep(raw, receipt)
            return [receipt]
        parted = _by_part(rejections, [len(part) for part in parts])
        has_useless = bool(accepted.useless_fields)  # the answers name each sender its own
        useless = [accept(part, self.rules()).useless_fields if has_useless else () for part in parts]
        return [self._receipt(*of_part) for of_part in zip(parts, parted, n_ignored, useless, strict=True)]

    def _receipt(
        self,
        raw: Sequence[object],
        rejections: tuple[Rejection, ...],
        n_ignored: int,
        useless_fields: tuple[str, ...],
    ) -> Receipt:
        n_received = len(raw) - len(rejections)
        receipt = Receipt(n_received, rejections, n_ignored, useless_fields=useless_fields)
        self._keep(raw, receipt)
        return receipt

    def _keep(self, raw: Sequence[object], receipt: Receipt) -> None:
        if receipt.rejections:
            self._rejected.keep(raw, receipt.rejections, self._wall_clock.now())

    def rules(self) -> RecordRules:
        """Return the rules at this moment; recorded data may be old, but not from before 1970."""
        expires = not self._fleet.is_data_clock
        rules = RecordRules.at(self._wall_clock.now(), self._buffer_settings, expires=expires)
        return rules if expires else replace(rules, oldest_ms=0, oldest_is="1970")

    def _without_new_servers(
        self, batch: RecordBatch, is_kept: Flags, is_whole: bool
    ) -> tuple[RecordBatch, list[Rejection], int]:
        """Leave out records of a server too many.

        Returns:
            the other records, the first refusals (all of them for requests taken together), their number.
        """
        out = self._fleet.left_out()  # stored, and no part of the fleet
        fresh = [name for name in self._fleet.history.unknown(batch.server_names) if name not in out]
        room = self._limits.max_server_names - self._fleet.history.n_servers
        if len(fresh) <= room:
            return batch, [], 0
        limit = f"{self._limits.max_server_names} servers (server.max_server_names)"
        reason = f"is a new name beyond the limit of {limit}"
        codes, first_rows = np.unique(batch.server_codes, return_index=True)
        row_of = {batch.server_names[code]: row for code, row in zip(codes, first_rows, strict=True)}
        in_turn = sorted(fresh, key=row_of.__getitem__)  # the first to come get the last places
        refused = set(in_turn[max(room, 0) :])
        beyond = [code for code, name in enumerate(batch.server_names) if name in refused]
        is_beyond = np.isin(batch.server_codes, beyond)
        indexes = np.flatnonzero(is_kept)[is_beyond]
        listed = indexes[:REJECTIONS_KEPT] if is_whole else indexes
        rejections = [Rejection(index, "server_name", reason) for index in listed.tolist()]
        return batch.where(~is_beyond), rejections, len(indexes)

    def _lacks_room(self, batch: RecordBatch) -> bool:
        fresh = self._fleet.roster.unknown_metrics(tuple(batch.metrics))
        return len(fresh) > max(0, self._limits.max_metric_names - self._fleet.roster.n_metrics)

    def _without_new_metrics(self, batch: RecordBatch) -> tuple[RecordBatch, list[RefusedField]]:
        """Leave out metrics one too many; their records keep their other fields."""
        if not self._lacks_room(batch):
            return batch, []
        fresh = self._fleet.roster.unknown_metrics(tuple(batch.metrics))
        room = max(0, self._limits.max_metric_names - self._fleet.roster.n_metrics)
        limit = f"{self._limits.max_metric_names} metrics (server.max_metric_names)"
        reason = f"is a new metric beyond the limit of {limit}"
        refused = fresh[room:]
        fields = [RefusedField(name, int((~np.isnan(batch.metrics[name])).sum()), reason) for name in refused]
        kept = {name: values for name, values in batch.metrics.items() if name not in set(refused)}
        return replace(batch, metrics=kept), fields


def _by_part(rejections: Sequence[Rejection], sizes: Sequence[int]) -> list[tuple[Rejection, ...]]:
    """Return the rejections of each part, numbered within it."""
    if not rejections:
        return [()] * len(sizes)
    ends = np.cumsum(sizes)
    found: list[list[Rejection]] = [[] for _ in sizes]
    for one in rejections:
        part = int(np.searchsorted(ends, one.index, side="right"))
        found[part].append(replace(one, index=one.index - int(ends[part]) + sizes[part]))
    return [tuple(some) for some in found]
