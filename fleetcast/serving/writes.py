"""The way of remote-write requests into the daemon: decode, derive records, then take those.

Owns: the order of requests that touch the same counters, the order of the steps from samples to
records (bounds, repetitions, rates, sums, forgetting), the count of what became of each sample, and
records that could not be stored. One scrape of a target is many samples of one time, which a sender
spreads over requests in any order; a record is made when all series of a metric have spoken. Memory
is bounded: at most `max_series` series, and the scrapes of `reorder_window_s`. Does not know: HTTP,
protobuf, files. `WriteIntake` is safe from any thread, `ExporterMapping` is not.

No counter is saved: after a restart each server's rates begin again at its second scrape.

A request that fails at the disk has moved the counters on; the records it led to are kept here
and go with the next request, which is the sender's repetition.
"""

import logging
import threading
from collections import Counter as Tally
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fleetcast.clock import monotonic
from fleetcast.errors import StorageBroken, StorageFull
from fleetcast.ingest.columns import CodedNames, Column, RowsOf
from fleetcast.ingest.rules import RecordRules
from fleetcast.prometheus.protobuf import unpack
from fleetcast.prometheus.rules import parse_rules
from fleetcast.prometheus.series import REFUSED, ExporterSeries, LivingSeries, Samples
from fleetcast.prometheus.symbols import SymbolDecoder
from fleetcast.prometheus.window import Batch, Fates, ScrapeWindow, WholeScrapes
from fleetcast.prometheus.wire import WriteDecoder, WriteRequest
from fleetcast.schema import NODE_EXPORTER_RULES, Longs
from fleetcast.serving.intake import Receipt
from fleetcast.settings import RemoteWriteSettings

logger = logging.getLogger(__name__)

_UNSTORED_MAX_ROWS = 100_000
_PIECE_SAMPLES = 2**16  # bounds the arrays that one request makes us build


@dataclass(frozen=True, slots=True, eq=False)
class Derived:
    """What samples led to."""

    columns: Mapping[str, Column]  # of records that are complete now, not rounded yet
    n_out_of_bounds: int  # samples in the future or older than the retention
    n_out_of_order: int  # samples that came after the window of their scrape target had passed them
    n_repeated: int  # samples that were there before
    n_taken: int  # samples, also of earlier calls, whose scrape is whole now
    n_incomplete: int  # samples, also of earlier calls, whose scrape left the window unfinished


@dataclass(frozen=True, slots=True)
class WriteReceipt:
    """What became of one request."""

    n_records: int  # durable now
    samples: Mapping[str, int]  # by outcome
    faults: Mapping[str, int]  # refused records, by rule
    n_fields_refused: int
    problems: Sequence[str]  # what the sender should know; the intake took the rest
    n_accepted: int  # samples of this request that were not refused; those that no rule wants are not


class WriteIntake:
    """Takes remote-write requests."""

    def __init__(
        self,
        settings: RemoteWriteSettings,
        take: Callable[[Sequence[object]], Receipt],
        rules: Callable[[], RecordRules],
        wall_s: Callable[[], float] = monotonic,
    ) -> None:
        """Raises SettingsError where a rule or a pattern is not usable."""
        self.path = settings.path
        self.max_unpacked_bytes = settings.max_unpacked_bytes
        self._settings = settings
        self._take = take
        self._rules = rules
        self._wall_s = wall_s
        self._lock = threading.Lock()
        self._mapping = ExporterMapping(settings)
        self._decoder = WriteDecoder(self._mapping.number, settings)
        self._symbols = SymbolDecoder(self._decoder.known, settings)
        self._unstored: list[RowsOf] = []

    @property
    def n_series(self) -> int:
        """Return how many series the mapping remembers."""
        return self._mapping.n_series

    def take(self, body: bytes, *, has_symbols: bool = False) -> WriteReceipt:
        """Make durable the records that a request completes.

        Args:
            has_symbols: it is of remote-write 2.0.
        Raises:
            BadData: it is no remote-write request; nothing of it was taken.
            StorageFull, StorageBroken: the records wait for the next request.
        """
        content = unpack(body, self.max_unpacked_bytes)
        with self._lock:
            arrival_s = self._wall_s()
            request = (self._symbols if has_symbols else self._decoder).read(content)
            rules = self._rules()
            derived = self._mapping.derive(request.samples, rules, arrival_s)
            self._forget_silent(arrival_s)
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
        faults: Tally[str] = Tally()
        for receipt in receipts:
            faults.update(receipt.by_rule)
        return WriteReceipt(
            sum(receipt.n_received for receipt in receipts),
            _outcomes(request, derived),
            faults,
            sum(one.n_records for receipt in receipts for one in receipt.refused_fields),
            [*self._problems(request, derived, rules), *_refusals(receipts, faults.total())],
            len(request.samples) + request.n_ignored - derived.n_out_of_bounds - derived.n_out_of_order,
        )

    def _forget_silent(self, arrival_s: float) -> None:
        new_numbers = self._mapping.forget_silent(arrival_s)
        if new_numbers is not None:
            self._decoder.renumber(new_numbers)
            self._symbols.clear()

    def _keep_unstored(self, rows: list[RowsOf]) -> None:
        with self._lock:
            self._unstored = [some for some in (*rows, *self._unstored) if len(some)]
            while sum(map(len, self._unstored)) > _UNSTORED_MAX_ROWS:
                del self._unstored[0]

    def _problems(self, request: WriteRequest, derived: Derived, rules: RecordRules) -> list[str]:
        problems = []
        if derived.n_out_of_bounds:
            bounds = f"older than {rules.oldest_is} or over 5 min in the future"
            problems.append(f"{derived.n_out_of_bounds} samples are {bounds}")
        if request.n_refused_series:
            limit = self._settings.max_series
            problems.append(f"{request.n_refused_series} series are beyond remote_write.max_series = {limit}")
        if request.n_faults:
            problems.append(f"{request.n_faults} series left out: {', '.join(request.faults)}")
        return problems


def _refusals(receipts: Sequence[Receipt], n_refused: int) -> list[str]:
    """Return what to say of records and fields that were refused, each with its first reason."""
    reasons = [one.reason for receipt in receipts for one in receipt.rejections]
    fields = [one for receipt in receipts for one in receipt.refused_fields]
    said = [f"{n_refused} records refused: {reasons[0]}"] if reasons else []
    return said + [f"{one.n_records} values of {one.field} refused: it {one.reason}" for one in fields[:1]]


def _outcomes(request: WriteRequest, derived: Derived) -> dict[str, int]:
    """Return samples by what became of them; those of a scrape that is not whole yet are in none."""
    return {
        "taken": derived.n_taken,
        "repeated": derived.n_repeated,
        "incomplete": derived.n_incomplete,
        "out_of_order": derived.n_out_of_order,
        "out_of_bounds": derived.n_out_of_bounds,
        "ignored": request.n_ignored,
        "refused": request.n_refused,
        "invalid": request.n_invalid,
    }


@dataclass(slots=True)
class _Counts:
    out_of_order: int = 0
    repeated: int = 0


class ExporterMapping:
    """Derives records; remembers counters and incomplete scrapes between calls."""

    def __init__(self, settings: RemoteWriteSettings) -> None:
        """Raises SettingsError where a rule or pattern cannot be read."""
        self._settings = settings
        self._rules = parse_rules((*NODE_EXPORTER_RULES, *settings.rules))
        terms = tuple(dict.fromkeys(term for rule in self._rules for term in rule.terms))
        self._series = ExporterSeries(terms, settings)
        self._living = LivingSeries(self._series, len(terms), settings.max_gap_s)
        self._window = ScrapeWindow(self._rules, terms, self._series, self._living, settings)
        self._window_ms = int(settings.reorder_window_s * 1000)
        self._fates = Fates()  # since the last answer

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the metrics there is a rule for."""
        return tuple(rule.metric for rule in self._rules)

    @property
    def n_series(self) -> int:
        """Return how many series are kept in mind."""
        return len(self._series)

    @property
    def n_waiting(self) -> int:
        """Return how many samples wait for the rest of their scrape."""
        return self._window.n_waiting

    def number(self, labels: Mapping[str, str]) -> int:
        """Return the number of a series for `Samples`, IGNORED or REFUSED."""
        return self._series.number(labels)

    def derive(self, samples: Samples, rules: RecordRules, arrival_s: float) -> Derived:
        """Return the records that these samples complete.

        Args:
            arrival_s: when they came, by a clock that never steps back.
        """
        times = samples.timestamps_ms
        within = times >= max(rules.oldest_ms or 0, 0)
        if rules.newest_ms is not None:
            within &= times <= rules.newest_ms
        usable = samples if within.all() else samples.where(np.flatnonzero(within))
        if len(usable) > _PIECE_SAMPLES:  # the oldest scrapes first, each of them as whole as it came
            usable = usable.where(np.argsort(usable.timestamps_ms, kind="stable"))
        whole: list[WholeScrapes] = []
        counts = _Counts()
        for start in range(0, len(usable), _PIECE_SAMPLES):
            piece = usable.where(slice(start, start + _PIECE_SAMPLES))
            whole += self._take(piece, arrival_s, counts)
        columns = self._columns(whole, rules)
        fates, self._fates = self._fates, Fates()
        for server, label in fates.unfinished.items():
            text = _APART if server in fates.apart else _UNFINISHED
            logger.warning(text, server, label[:_LABEL_SHOWN_CHARS] or "none")
        return Derived(
            columns,
            n_out_of_bounds=len(samples) - len(usable),
            n_out_of_order=counts.out_of_order,
            n_repeated=counts.repeated,
            n_taken=fates.n_taken,
            n_incomplete=fates.n_incomplete,
        )

    def forget_silent(self, arrival_s: float) -> Longs | None:
        """Drop series from which nothing came for long, when that is worth it.

        Returns:
            the new number of every old one (REFUSED = forgotten), or None if none was dropped.
        """
        kept = self._living.forgettable(arrival_s)
        n_old = len(self._series)
        if kept is None or (n_old - len(kept) <= n_old // 4 and n_old < self._settings.max_series):
            return None
        if len(kept) == n_old:
            return None
        self._make_room()
        targets = np.unique(self._series.target_of[kept]).astype(np.int64)
        self._fates.n_incomplete += self._window.keep(kept, targets)
        self._living.keep(kept, targets)
        self._series.keep(kept)
        new_numbers = np.full(n_old, REFUSED)
        new_numbers[kept] = np.arange(len(kept))
        logger.info("silent series forgotten n_forgotten=%d n_kept=%d", n_old - len(kept), len(kept))
        return new_numbers

    def _make_room(self) -> None:
        self._living.ensure()
        self._window.ensure()

    def _take(self, samples: Samples, arrival_s: float, counts: _Counts) -> list[WholeScrapes]:
        self._make_room()
        oldest_ms = self._living.newest_ms[self._series.target_of[samples.series]] - self._window_ms
        is_late = samples.timestamps_ms < oldest_ms
        counts.out_of_order += int(np.count_nonzero(is_late))
        samples, n_twice = _each_once(samples.where(~is_late) if is_late.any() else samples)
        is_fresh = samples.timestamps_ms > self._living.last_ms[samples.series]
        if not is_fresh.all():
            is_known = np.zeros(len(samples), dtype=np.bool_)
            is_known[~is_fresh] = self._window.has(samples.where(~is_fresh))
            n_twice += int(np.count_nonzero(is_known))
            samples, is_fresh = samples.where(~is_known), is_fresh[~is_known]
        counts.repeated += n_twice
        if not len(samples):
            return []
        if is_fresh.all():
            rates = self._living.rates(samples)
        else:
            rates = np.full(len(samples), np.nan)
            rates[is_fresh] = self._living.rates(samples.where(is_fresh))
        self._living.note(samples, is_fresh, arrival_s)
        self._living.end_silent(arrival_s)
        self._fates.n_taken += int(np.count_nonzero(samples.are_stale_marks))
        return list(self._window.add(Batch(samples, is_fresh, rates), self._fates))

    def _columns(self, whole: list[WholeScrapes], rules: RecordRules) -> dict[str, Column]:
        """Return whole scrapes as columns of records.

        A value that a metric of this name cannot have costs its metric only, not the record: the others
        are measured apart.
        """
        targets = np.concatenate([np.empty(0, np.int64), *(part.targets for part in whole)])
        times = np.concatenate([np.empty(0, np.int64), *(part.timestamps_ms for part in whole)])
        values = np.concatenate([np.empty((0, len(self._rules))), *(part.values for part in whole)])
        low, high = np.array([rules.bounds(rule.metric) for rule in self._rules]).T
        values[(values < low) | (values > high)] = np.nan
        is_told = ~np.isnan(values)
        some = is_told.any(axis=1)
        used, codes = np.unique(self._series.servers_of(targets[some]), return_inverse=True)
        columns: dict[str, Column] = {
            "timestamp": times[some],
            "server_name": CodedNames(self._series.server_names(used), codes.astype(np.int32)),
        }
        for number, rule in enumerate(self._rules):
            if is_told[:, number].any():
                columns[rule.metric] = values[some, number]
        return columns


_APART = (
    "scrapes of a server were left unfinished: its series have times of their own, less than a second apart "
    "server=%s label=%s (let the scraper stamp all series of a scrape alike: honor_timestamps: false; "
    "two scrapers of one host: name the label that tells them apart in remote_write.ignored_labels)"
)
_LABEL_SHOWN_CHARS = 80  # a sender chose it
_UNFINISHED = (
    "scrapes of a server were left unfinished: its series never came together server=%s label=%s "
    "(two scrapers of one host: name the label that tells them apart in remote_write.ignored_labels)"
)


def _each_once(samples: Samples) -> tuple[Samples, int]:
    """Return the samples sorted by series and time, the first of each, and how many were repetitions."""
    if (samples.series[1:] > samples.series[:-1]).all():
        return samples, 0
    samples = samples.where(np.lexsort((samples.timestamps_ms, samples.series)))
    series, times = samples.series, samples.timestamps_ms
    is_other = np.ones(len(samples), dtype=np.bool_)
    is_other[1:] = (series[1:] != series[:-1]) | (times[1:] != times[:-1])
    n_twice = len(samples) - int(np.count_nonzero(is_other))
    return (samples.where(is_other) if n_twice else samples), n_twice
