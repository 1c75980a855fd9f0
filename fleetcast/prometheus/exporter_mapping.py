"""Samples of an exporter's series in, records of our metrics out.

Owns: the order of the steps: bounds, rates, what completes a scrape, forgetting.
Does not know: protobuf, HTTP, storage. Bounded memory: at most `max_series` series, and a few
scrapes per server. Not thread safe.

What is kept here is lost with the process: after a restart each server's rates begin again at
its second scrape.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fleetcast.ingest.record_columns import CodedNames, Column, in_range
from fleetcast.ingest.recordrules import RecordRules
from fleetcast.prometheus.counters import CounterMemory, Samples
from fleetcast.prometheus.exporter_grammar import parse_rules
from fleetcast.prometheus.scrapes import ONLY_LOOK, CompleteRows, Contributions, PendingScrapes
from fleetcast.prometheus.series import REFUSED, ExporterSeries, roomy
from fleetcast.remote_write_settings import NODE_EXPORTER_RULES, RemoteWriteSettings
from fleetcast.schema import Longs

logger = logging.getLogger(__name__)

_PIECE_SAMPLES = 2**16  # bounds the arrays that one request makes us build
_LOOKS_PER_GAP = 4  # how often silent series are looked for within the longest gap
_FORGET_AFTER_SWEEPS = 12  # a series from which nothing came for so many of them is forgotten


@dataclass(frozen=True, slots=True, eq=False)
class Derived:
    """What samples led to."""

    columns: Mapping[str, Column]  # of records that are complete now, not rounded yet
    n_out_of_bounds: int  # samples in the future or older than the retention
    n_out_of_range: int  # values that a metric of this name cannot have; they are absent


class ExporterMapping:
    """Derives records; remembers counters and incomplete scrapes between calls."""

    def __init__(self, settings: RemoteWriteSettings) -> None:
        """Raises SettingsError where a rule or pattern cannot be read."""
        self._settings = settings
        self._rules = parse_rules((*NODE_EXPORTER_RULES, *settings.rules))
        self._terms = tuple(dict.fromkeys(term for rule in self._rules for term in rule.terms))
        self._is_rate = np.array([term.is_rate for term in self._terms])
        self._series = ExporterSeries(self._terms, settings)
        self._counters = CounterMemory(settings.max_gap_s)
        self._scrapes = PendingScrapes(self._rules, self._terms)
        self._gap_ms = settings.max_gap_s * 1000
        self._newest_ms = self._looked_ms = self._swept_ms = 0
        self._n_sweeps = 0
        self._sweep_of: Longs = np.zeros(64, dtype=np.int64)  # (series,) when something last came
        self._newest_of_server: Longs = np.zeros(16, dtype=np.int64)  # (server,)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the metrics there is a rule for."""
        return tuple(rule.metric for rule in self._rules)

    @property
    def n_series(self) -> int:
        """Return how many series are kept in mind."""
        return len(self._series)

    def number(self, labels: Mapping[str, str]) -> int:
        """Return the number of a series for `Samples`, IGNORED or REFUSED."""
        return self._series.number(labels)

    def derive(self, samples: Samples, rules: RecordRules) -> Derived:
        """Return the records that these samples complete."""
        times = samples.timestamps_ms
        within = times >= max(rules.oldest_ms or 0, 0)
        if rules.newest_ms is not None:
            within &= times <= rules.newest_ms
        n_out_of_bounds = len(samples) - int(within.sum())
        usable = samples.where(np.flatnonzero(within))
        rows = []
        for start in range(0, len(usable), _PIECE_SAMPLES):
            rows += self._complete(usable.where(slice(start, start + _PIECE_SAMPLES)))
        return self._derived(rows, n_out_of_bounds)

    def forget_silent(self) -> Longs | None:
        """Drop series from which nothing came for long, when that is worth it.

        Returns:
            the new number of every old one (REFUSED = forgotten), or None if none was dropped.
        """
        if self._newest_ms - self._swept_ms < self._gap_ms:
            return None
        self._swept_ms = self._newest_ms
        n_old = len(self._series)
        kept = np.flatnonzero(self._sweep_of[:n_old] >= self._n_sweeps - _FORGET_AFTER_SWEEPS)
        self._n_sweeps += 1
        if n_old - len(kept) <= n_old // 4 and n_old < self._settings.max_series:
            return None
        self._counters.keep(kept)
        self._sweep_of = self._sweep_of[kept]
        servers = self._series.keep(kept)
        self._scrapes.keep(servers)
        self._newest_of_server = self._newest_of_server[servers]
        new_numbers = np.full(n_old, REFUSED)
        new_numbers[kept] = np.arange(len(kept))
        logger.info("silent series forgotten n_forgotten=%d n_kept=%d", n_old - len(kept), len(kept))
        return new_numbers

    def _complete(self, samples: Samples) -> list[CompleteRows]:
        self._make_room()
        news, rates = self._counters.take(samples)
        if not len(news):
            return []
        self._note_living(news)
        rows, terms = self._series.members(news.series)
        is_mark = news.are_stale_marks[rows]
        given = Contributions(
            self._series.server_of[news.series[rows]],
            news.timestamps_ms[rows],
            np.where(is_mark, ONLY_LOOK, terms),
            np.where(self._is_rate[terms], rates[rows], news.values[rows]),
        )
        return [self._scrapes.add(given, self._series.n_alive)] if len(rows) else []

    def _make_room(self) -> None:
        n_servers = self._series.n_servers
        self._counters.ensure(len(self._series))
        self._scrapes.ensure(n_servers)
        self._sweep_of = roomy(self._sweep_of, len(self._series))
        self._newest_of_server = roomy(self._newest_of_server, n_servers)

    def _note_living(self, news: Samples) -> None:
        """Count a series from its first sample until its end: marked, or silent beside its server."""
        is_last = np.ones(len(news), dtype=np.bool_)
        is_last[:-1] = news.series[1:] != news.series[:-1]
        newest = news.where(is_last)
        self._series.set_alive(newest.series, ~newest.are_stale_marks)
        self._sweep_of[newest.series] = self._n_sweeps
        servers = self._series.server_of[newest.series]
        np.maximum.at(self._newest_of_server, servers, newest.timestamps_ms)
        self._newest_ms = max(self._newest_ms, int(newest.timestamps_ms.max()))
        if self._newest_ms - self._looked_ms >= self._gap_ms / _LOOKS_PER_GAP:
            self._looked_ms = self._newest_ms
            self._end_the_silent()

    def _end_the_silent(self) -> None:
        """Let series end that lack in their server's newest scrapes, though nobody marked them."""
        alive = self._series.alive()
        newest_ms = self._newest_of_server[self._series.server_of[alive]]
        silent = alive[self._counters.last_ms[alive] < newest_ms - self._gap_ms]
        self._series.set_alive(silent, np.zeros(len(silent), dtype=np.bool_))

    def _derived(self, rows: list[CompleteRows], n_out_of_bounds: int) -> Derived:
        """Return complete rows as columns of records.

        A value out of range costs its metric only, not the record: the others are measured apart.
        """
        servers = np.concatenate([np.empty(0, np.int64), *(part.servers for part in rows)])
        times = np.concatenate([np.empty(0, np.int64), *(part.timestamps_ms for part in rows)])
        values = np.concatenate([np.empty((0, len(self._rules))), *(part.values for part in rows)])
        n_out_of_range = 0
        for number, rule in enumerate(self._rules):
            is_out = np.logical_not(in_range(rule.metric, values[:, number]))
            values[is_out, number] = np.nan
            n_out_of_range += int(np.count_nonzero(is_out))
        is_told = ~np.isnan(values)
        some = is_told.any(axis=1)
        used, codes = np.unique(servers[some], return_inverse=True)
        columns: dict[str, Column] = {
            "timestamp": times[some],
            "server_name": CodedNames(self._series.names_of(used), codes.astype(np.int32)),
        }
        for number, rule in enumerate(self._rules):
            if is_told[:, number].any():
                columns[rule.metric] = values[some, number]
        return Derived(columns, n_out_of_bounds, n_out_of_range)
