"""Samples of an exporter's series in, records of our metrics out.

Owns: the order of the steps (bounds, rates, sums, what completes a scrape, forgetting) and the newest
scrapes of each server. One scrape of a server is many samples of one time, which a sender spreads
over requests in any order. Bounded memory: at most `max_series` series and a few scrapes per
server. Does not know: protobuf, HTTP, storage. Not thread safe.

Nothing here is saved: after a restart each server's rates begin again at its second scrape.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast.ingest.columns import CodedNames, Column, in_range
from fleetcast.ingest.rules import RecordRules
from fleetcast.prometheus.rules import MetricRule, Term, parse_rules
from fleetcast.prometheus.series import NEVER, REFUSED, CounterMemory, ExporterSeries, Samples, roomy
from fleetcast.schema import Codes, Floats, Longs
from fleetcast.settings import NODE_EXPORTER_RULES, RemoteWriteSettings

Flags = NDArray[np.bool_]
SCRAPES_KEPT = 16  # per server: how far the pieces of one may run ahead of the others
ONLY_LOOK = -1  # instead of a term: nothing is added, the scrape may have become complete
_START = {"sum": 0.0, "avg": 0.0, "min": np.inf, "max": -np.inf}


@dataclass(frozen=True, slots=True, eq=False)
class Contributions:
    """What samples contribute to terms, in columns."""

    servers: Codes
    timestamps_ms: Longs
    terms: Codes  # or ONLY_LOOK
    values: Floats  # NaN = nothing known, which makes the term of that scrape unknown


@dataclass(frozen=True, slots=True, eq=False)
class CompleteRows:
    """Metrics whose last missing sample has arrived."""

    servers: Longs
    timestamps_ms: Longs
    values: Floats  # (row, rule) NaN = not complete or not defined


class PendingScrapes:
    """The newest scrapes of every server, term by term."""

    def __init__(self, rules: Sequence[MetricRule], terms: Sequence[Term]) -> None:
        self._rules = tuple(rules)
        self._terms = tuple(terms)
        self._places = [[self._terms.index(term) for term in rule.terms] for rule in self._rules]
        self._start = np.array([_START[term.aggregate] for term in self._terms])
        self._times: Longs = np.empty((0, SCRAPES_KEPT), dtype=np.int64)  # (server, scrape)
        self._counts: Codes = np.empty((0, SCRAPES_KEPT, len(self._terms)), dtype=np.int32)
        self._totals: Floats = np.empty((0, SCRAPES_KEPT, len(self._terms)))
        self._is_told: Flags = np.empty((0, SCRAPES_KEPT, len(self._rules)), dtype=np.bool_)

    def ensure(self, n_servers: int) -> None:
        """Make room for servers 0 to n_servers - 1."""
        n_more = n_servers - len(self._times)
        if n_more <= 0:
            return
        n_more = max(n_more, len(self._times) // 2, 16)
        n_terms, n_rules = len(self._terms), len(self._rules)
        self._times = _longer(self._times, np.full((n_more, SCRAPES_KEPT), NEVER, dtype=np.int64))
        self._counts = _longer(self._counts, np.zeros((n_more, SCRAPES_KEPT, n_terms), dtype=np.int32))
        self._totals = _longer(self._totals, np.tile(self._start, (n_more, SCRAPES_KEPT, 1)))
        self._is_told = _longer(self._is_told, np.zeros((n_more, SCRAPES_KEPT, n_rules), dtype=np.bool_))

    def keep(self, old_servers: Longs) -> None:
        """Forget all servers but these, which are numbered anew in this order."""
        self._times = self._times[old_servers]
        self._counts = self._counts[old_servers]
        self._totals = self._totals[old_servers]
        self._is_told = self._is_told[old_servers]

    def add(self, given: Contributions, n_alive: Codes) -> CompleteRows:
        """Add contributions, return what they complete.

        Args:
            n_alive: (server, term) living series; so many contributions make a term complete.
        """
        order = np.lexsort((given.timestamps_ms, given.servers))
        servers, times = given.servers[order].astype(np.int64), given.timestamps_ms[order]
        is_first = np.ones(len(order), dtype=np.bool_)
        is_first[1:] = (servers[1:] != servers[:-1]) | (times[1:] != times[:-1])
        counts, totals = self._sum(np.cumsum(is_first) - 1, given.terms[order], given.values[order])
        servers, times = servers[is_first], times[is_first]
        is_touched = counts > 0
        places, is_known, has_place = self._places_for(servers, times)
        at = (servers[is_known], places[is_known])
        counts[is_known] += self._counts[at]
        totals[is_known] = self._merge(self._totals[at], totals[is_known])
        is_told = np.zeros((len(servers), len(self._rules)), dtype=np.bool_)
        is_told[is_known] = self._is_told[at]
        values = self._complete(counts, totals, is_touched, is_told, n_alive[servers])
        is_told |= ~np.isnan(values)
        # Known ones first: a fresh scrape may take the place of a known one, never the other way round.
        for some in (np.flatnonzero(is_known), np.flatnonzero(has_place & ~is_known)):
            at = (servers[some], places[some])
            self._times[at] = times[some]
            self._counts[at] = counts[some]
            self._totals[at] = totals[some]
            self._is_told[at] = is_told[some]
        return CompleteRows(servers, times, values)

    def _sum(self, scrape_of: Longs, terms: Codes, values: Floats) -> tuple[Longs, Floats]:
        """Return (scrape, term) counts and totals of the contributions."""
        n_scrapes, n_terms = int(scrape_of[-1]) + 1, len(self._terms)
        is_value = terms != ONLY_LOOK
        scrape_of, terms, values = scrape_of[is_value], terms[is_value], values[is_value]
        cells = scrape_of * n_terms + terms
        shape = (n_scrapes, n_terms)
        counts: Longs = np.bincount(cells, minlength=n_scrapes * n_terms).astype(np.int64).reshape(shape)
        totals = np.bincount(cells, values, minlength=n_scrapes * n_terms).astype(np.float64).reshape(shape)
        for place, term in enumerate(self._terms):
            if term.aggregate in ("min", "max"):
                chosen = terms == place
                totals[:, place] = self._start[place]
                extreme = np.minimum if term.aggregate == "min" else np.maximum
                extreme.at(totals[:, place], scrape_of[chosen], values[chosen])
        return counts, totals

    def _merge(self, kept: Floats, more: Floats) -> Floats:
        """Return the totals (scrape, term) of both."""
        merged = kept + more
        for place, term in enumerate(self._terms):
            if term.aggregate == "min":
                merged[:, place] = np.minimum(kept[:, place], more[:, place])
            elif term.aggregate == "max":
                merged[:, place] = np.maximum(kept[:, place], more[:, place])
        return merged

    def _places_for(self, servers: Longs, times: Longs) -> tuple[Longs, Flags, Flags]:
        """Return where each scrape is kept: (place, is there already, has a place at all).

        The newest scrapes of a server are kept: of the new ones the newest replaces the oldest
        kept one, and so on, as long as it is newer.
        """
        kept = self._times[servers]
        is_it = kept == times[:, None]
        is_known = is_it.any(axis=1)
        rank = np.zeros(len(servers), dtype=np.int64)
        rank[~is_known] = _rank_from_end(servers[~is_known])
        by_age = kept.argsort(axis=1)
        rows = np.arange(len(servers))
        places = by_age[rows, np.minimum(rank, SCRAPES_KEPT - 1)]
        has_place = (rank < SCRAPES_KEPT) & (times > kept[rows, places])
        return np.where(is_known, is_it.argmax(axis=1), places), is_known, has_place

    def _complete(
        self, counts: Longs, totals: Floats, is_touched: Flags, is_told: Flags, n_alive: Codes
    ) -> Floats:
        """Return the values of the rules that are complete and not told yet, or told with fewer series."""
        is_complete = (n_alive > 0) & (counts >= n_alive)
        columns = {}
        for place, term in enumerate(self._terms):
            total = totals[:, place]
            columns[term] = total / np.maximum(counts[:, place], 1) if term.aggregate == "avg" else total
        values = np.full(is_told.shape, np.nan)
        for number, (rule, own) in enumerate(zip(self._rules, self._places, strict=True)):
            is_due = is_complete[:, own].all(axis=1)
            is_due &= is_touched[:, own].any(axis=1) | ~is_told[:, number]
            result = rule.evaluate(columns)
            is_due &= np.isfinite(result)
            values[is_due, number] = result[is_due]
        return values


def _longer(array: NDArray[Any], more: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate((array, more))


def _rank_from_end(groups: Longs) -> Longs:
    """Return the place of each row within its run of equal groups, counted from the run's end.

    >>> _rank_from_end(np.array([3, 3, 3, 5, 7, 7])).tolist()
    [2, 1, 0, 0, 1, 0]
    """
    is_last = np.ones(len(groups), dtype=np.bool_)
    is_last[:-1] = groups[1:] != groups[:-1]
    ends = np.flatnonzero(is_last)
    return np.subtract(ends[np.cumsum(is_last) - is_last], np.arange(len(groups)))


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
        return self._derive(rows, n_out_of_bounds)

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

    def _derive(self, rows: list[CompleteRows], n_out_of_bounds: int) -> Derived:
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
