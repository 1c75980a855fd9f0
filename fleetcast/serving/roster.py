"""The fleet as the daemon knows it: newest values (`Roster`), recent bins, and by which clock (`Fleet`).

Owns: last-seen times and current values, when a server is stale or gone, and what "now" is for the
parts that judge the fleet. Does not know: how bins close (`history`), forecasts, HTTP.
"""

import re
import threading
import zlib
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from fleetcast.clock import Clock, from_ms, iso_z, to_ms
from fleetcast.errors import FleetcastError, quote
from fleetcast.ingest.rules import RecordRules
from fleetcast.schema import Codes, Floats, Longs, NameRows, RecordBatch
from fleetcast.serving.history import BinHistory
from fleetcast.settings import ForecastSettings

_NEVER = int(np.iinfo(np.int64).min)
_NAMES = RecordRules(None)
_FORGET_AT = 64  # gone servers kept before the arrays are made smaller


class BadShare(FleetcastError):
    """Raised when a request names no share of the fleet."""


@dataclass(frozen=True, slots=True, eq=False)
class PresentServers:
    """The servers that are not gone, at one moment."""

    server_names: tuple[str, ...]
    metrics: tuple[str, ...]
    values: Floats  # (server, metric) newest known value, NaN = never sent
    last_seen_ms: Longs  # (server,)
    is_stale: NDArray[np.bool_]  # (server,)

    def silent_since(self) -> dict[str, str]:
        """Return the silent servers with the times of their newest records."""
        rows = np.flatnonzero(self.is_stale).tolist()
        return {self.server_names[row]: iso_z(from_ms(int(self.last_seen_ms[row]))) for row in rows}


class Roster:
    """Newest values by server; every method is safe from any thread."""

    def __init__(self, settings: ForecastSettings) -> None:
        self._stale_ms = int(settings.stale_after_s * 1000)
        self._gone_ms = int(settings.gone_after_s * 1000)
        self._lock = threading.Lock()
        self._changes = 0
        self._begin()

    def _begin(self) -> None:
        self._rows = NameRows()
        self._columns = NameRows()
        self._values: Floats = np.full((16, 8), np.nan)
        self._last_seen_ms: Longs = np.full(16, _NEVER, dtype=np.int64)

    @property
    def changes(self) -> int:
        """Return a number that grows with every change."""
        return self._changes

    def unknown_metrics(self, names: tuple[str, ...]) -> list[str]:
        """Return those metrics that no server sent yet."""
        return self._columns.unknown(names)

    @property
    def n_metrics(self) -> int:
        """Return how many different metrics were sent."""
        return len(self._columns)

    def metric_names(self) -> tuple[str, ...]:
        """Return the metrics that count against the limit."""
        return tuple(self._columns)

    def note_metrics(self, names: Iterable[str]) -> None:
        """Count metrics that are stored and were not sent since the start."""
        with self._lock:
            self._columns.of(tuple(names))
            self._grow(len(self._values), max(self._values.shape[1], len(self._columns)))
            self._changes += 1

    def forget_metrics(self, names: Collection[str]) -> None:
        """Free the places of metrics of which nothing is stored any more."""
        with self._lock:
            kept = [name for name in self._columns if name not in names]
            values = self._values[:, [self._columns[name] for name in kept]]
            self._columns = NameRows(kept)
            self._values = np.full((len(values), max(8, len(kept))), np.nan)
            self._values[:, : len(kept)] = values
            self._changes += 1

    def clear(self) -> None:
        """Forget every server."""
        with self._lock:
            self._begin()
            self._changes += 1

    def add(self, batch: RecordBatch) -> None:
        """Take durable records in; a record older than its server's newest changes nothing."""
        if not len(batch):
            return
        times = batch.timestamps_ms
        cells = np.array(list(batch.metrics.values())).reshape(-1, len(batch)).T  # (record, metric)
        order = None
        if (times[1:] < times[:-1]).any():
            order = np.argsort(times, kind="stable")
            times, cells = times[order], cells[order]
        with self._lock:
            rows = self._rows_of(batch) if order is None else self._rows_of(batch)[order]
            columns = self._columns.of(tuple(batch.metrics))
            is_sent = ~np.isnan(cells)
            is_sent &= (times >= self._last_seen_ms[rows])[:, None]
            if is_sent.all():  # numpy assigns in order: of repeated rows the newest stays
                if _are_first(columns):  # a fifth of the time where rows are many
                    self._values[rows, : len(columns)] = cells
                else:
                    self._values[rows[:, None], columns] = cells
            else:
                record, metric = np.nonzero(is_sent)
                self._values[rows[record], columns[metric]] = cells[record, metric]
            np.maximum.at(self._last_seen_ms, rows, times)
            self._changes += 1

    def servers(self, now: datetime) -> PresentServers:
        """Return the servers that are not gone, in the order of first appearance."""
        now_ms = to_ms(now)
        with self._lock:
            names = list(self._rows)
            seen = self._last_seen_ms[: len(names)]
            here = np.flatnonzero(seen > now_ms - self._gone_ms).astype(np.int32)
            metrics = tuple(self._columns)
            values = self._values[here, : len(metrics)]
            last_seen_ms = seen[here]
            if len(names) - len(here) > max(_FORGET_AT, len(here)):
                self._keep([names[row] for row in here], here)
        return PresentServers(
            tuple(names[row] for row in here),
            metrics,
            values,
            last_seen_ms,
            last_seen_ms <= now_ms - self._stale_ms,
        )

    def _rows_of(self, batch: RecordBatch) -> Codes:
        """Return the row of each record, making room; caller holds the lock."""
        row_of_code = self._rows.of(batch.server_names)
        self._columns.of(tuple(batch.metrics))
        n_rows, n_columns = self._values.shape
        if len(self._rows) > n_rows or len(self._columns) > n_columns:
            self._grow(max(n_rows, len(self._rows) * 3 // 2), max(n_columns, len(self._columns) + 8))
        return row_of_code[batch.server_codes]

    def _grow(self, n_rows: int, n_columns: int) -> None:
        have = self._values
        self._values = np.full((n_rows, n_columns), np.nan)
        self._values[: have.shape[0], : have.shape[1]] = have
        seen = self._last_seen_ms
        self._last_seen_ms = np.full(n_rows, _NEVER, dtype=np.int64)
        self._last_seen_ms[: len(seen)] = seen

    def _keep(self, names: list[str], rows: Codes) -> None:
        """Forget all other servers; caller holds the lock."""
        values, seen = self._values[rows], self._last_seen_ms[rows]
        self._rows = NameRows(names)
        self._values = np.full((max(16, len(rows)), self._values.shape[1]), np.nan)
        self._values[: len(rows)] = values
        self._last_seen_ms = np.full(len(self._values), _NEVER, dtype=np.int64)
        self._last_seen_ms[: len(rows)] = seen


def _are_first(columns: Codes) -> bool:
    """Whether these are the columns from 0 on, in order."""
    is_last = len(columns) > 0 and columns[-1] == len(columns) - 1
    return bool(is_last and (columns[1:] > columns[:-1]).all())


@dataclass(frozen=True, slots=True)
class Fleet:
    """What the daemon knows of its servers, and the clock by which it judges them.

    With the data clock, now is the time of the newest record: `clock` then reads the history.
    """

    history: BinHistory
    roster: Roster
    clock: Clock
    settings: ForecastSettings
    is_data_clock: bool = False
    left_out: Callable[[], Collection[str]] = frozenset  # servers of which nothing is made

    def add(self, batch: RecordBatch) -> None:
        """Take durable records in; safe from any thread."""
        now = self.clock.now()  # before the history knows them: they move a data clock
        out = self.left_out()
        if out:
            is_out = np.array([name in out for name in batch.server_names], dtype=np.bool_)
            batch = batch.where(~is_out[batch.server_codes]) if is_out.any() else batch
        self.roster.add(batch)
        self.history.add(batch, now)

    def clear(self) -> None:
        """Forget every record, for `restore` to follow."""
        self.history.clear()
        self.roster.clear()

    def servers(self) -> PresentServers:
        """Return the servers that are not gone now."""
        return self.roster.servers(self.clock.now())

    def due_bins(self) -> list[int]:
        """Return the starts of the bins that wait for their sweep, oldest first."""
        return self.history.due(self.clock.now())

    def is_present(self, bin_ms: int) -> bool:
        """Return whether a due bin is the newest that can be due: an older one holds history that comes in.

        Recorded time is lived through bin by bin: there each one is.
        """
        oldest_ms = self.history.newest_due_ms(self.clock.now()) - self.history.bin_ms
        return self.is_data_clock or bin_ms > oldest_ms

    def is_of_use(self, bin_ms: int) -> bool:
        """Return whether a forecast from this bin speaks of a time that is yet to come.

        Recorded time is lived through bin by bin: there each one does.
        """
        end_ms = bin_ms + (1 + self.settings.horizon_bins) * self.history.bin_ms
        return self.is_data_clock or end_ms > to_ms(self.clock.now())


def meant(server_name: str, known: Container[str] = ()) -> str:
    """Return the name of the server that a question means: as a sender's, without blanks, composed (NFC).

    >>> meant("  lead"), meant("  lead", {"  lead"})
    ('lead', '  lead')
    """
    return server_name if server_name in known else _NAMES.server_name(server_name) or server_name


def share_of(text: str | None, servers: Sequence[str] = ()) -> tuple[int, int] | None:
    """Return which share of how many `K/N` asks for.

    >>> share_of("3/16")
    (3, 16)

    Raises:
        BadShare: it names none, or servers are named beside it.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise BadShare(f"no share of the fleet: {quote(text)}", hint="?shard=K/N, K from 0 to N - 1")
    if servers:
        raise BadShare("?shard= and ?server= exclude each other")
    return int(found[1]), int(found[2])


def is_of(server_name: str, which: int, of: int) -> bool:
    """Return whether a server belongs to one of so many equal shares of the fleet."""
    return zlib.crc32(server_name.encode("utf-8", "surrogatepass")) % of == which
