"""Scrapes that arrive in pieces: the sums of each, until every series of a metric has spoken.

Owns: the newest scrapes of each server and which of their metrics are complete. One scrape of a
server is many samples of one time, which a sender spreads over requests in any order.
Does not know: labels or HTTP. Not thread safe.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast.prometheus.counters import NEVER
from fleetcast.prometheus.rules import MetricRule, Term
from fleetcast.schema import Codes, Floats, Longs

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
        counts, totals = self._summed(np.cumsum(is_first) - 1, given.terms[order], given.values[order])
        servers, times = servers[is_first], times[is_first]
        is_touched = counts > 0
        places, is_known, has_place = self._places_for(servers, times)
        at = (servers[is_known], places[is_known])
        counts[is_known] += self._counts[at]
        totals[is_known] = self._merged(self._totals[at], totals[is_known])
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

    def _summed(self, scrape_of: Longs, terms: Codes, values: Floats) -> tuple[Longs, Floats]:
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

    def _merged(self, kept: Floats, more: Floats) -> Floats:
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
