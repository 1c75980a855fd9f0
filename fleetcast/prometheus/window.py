"""Remote-write samples held for a short time until all of a scrape has come; drift has another window.

Owns: where each sample of the window is kept, the terms' sums per scrape, which scrape is whole, what
a sample that comes late changes, and what is displaced. Samples of one target are kept as a grid of
series and scrapes, so that a scrape's sums can be made again from all of its samples; targets whose
window holds as many scrapes share arrays (a shelf). Samples in order are added up as they come; only
late ones, and scrapes around the birth or end of a series, are looked at one by one. Does not know:
requests, bounds, records. Not thread safe.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from fleetcast.prometheus.rules import MetricRule, Term, TermSums
from fleetcast.prometheus.series import (
    NEVER,
    STALE_BITS,
    ExporterSeries,
    LivingSeries,
    Samples,
    first_of_runs,
    longer,
    ranks_of,
    rates_between,
    roomy,
    scrapes_of,
)
from fleetcast.schema import Codes, Flags, Floats, Longs
from fleetcast.settings import RemoteWriteSettings

WIDTHS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # scrapes of a target that a shelf has room for
_BYTES_MAX = 768 * 2**20  # of all shelves: beyond it a target keeps as many scrapes as it has
_PIECE_CELLS = 2**20  # bounds the arrays for samples that are looked at one by one
_ABSENT_BITS = 0x7FF8000000000F0F  # a NaN that no sample is kept as
_ABSENT = np.array([_ABSENT_BITS], dtype=np.int64).view(np.float64)[0]
_APART_MS = 1000  # a series that lacks and has a sample so near was stamped apart from the others
_NAMES_MAX = 100_000  # servers remembered whose unfinished scrapes have been named


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Samples sorted by series and time, each (series, time) once and new to the window."""

    samples: Samples
    is_fresh: Flags  # False: a newer sample of its series came before it
    rates: Floats  # of the fresh ones

    def where(self, chosen: Flags) -> "Batch":
        """Return some of it."""
        return Batch(self.samples.where(chosen), self.is_fresh[chosen], self.rates[chosen])


@dataclass(frozen=True, slots=True, eq=False)
class WholeScrapes:
    """Metrics whose last missing sample has arrived."""

    targets: Longs
    timestamps_ms: Longs
    values: Floats  # (row, rule) NaN = not whole or not defined


@dataclass(slots=True)
class Fates:
    """What became of samples."""

    n_taken: int = 0
    n_incomplete: int = 0
    unfinished: dict[str, str] = field(default_factory=dict)  # by server: the label that splits its scrapes
    apart: set[str] = field(default_factory=set)  # those of them whose series have times of their own


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The scrapes of a batch, by target and time."""

    targets: Longs
    places: Longs  # of the targets in their shelf
    times: Longs
    of_sample: Longs  # (sample,) its row
    slots: Longs
    is_known: Flags
    ranks: Longs  # among the unknown ones of the target


class _Shelf:
    """Arrays for targets whose window has room for `width` scrapes."""

    def __init__(self, width: int, n_terms: int, n_rules: int) -> None:
        self.width = width
        shape = (0, width, n_terms)
        self.times: Longs = np.empty((0, width), dtype=np.int64)  # (target, slot) NEVER = free
        self.heads: Longs = np.empty(0, dtype=np.int64)  # (target,) the slot that is used next
        self.counts: Codes = np.empty(shape, dtype=np.int32)  # (target, slot, term)
        self.totals: Floats = np.empty(shape)  # of a free slot undefined, as its cells are
        self.waiting: Codes = np.empty(shape, dtype=np.int32)  # samples whose fate is open, by home term
        self.is_told: Flags = np.empty((0, width, n_rules), dtype=np.bool_)
        self.cells: Floats = np.empty((0, width))  # (series, slot)
        self._free_targets: list[int] = []
        self._free_series: list[int] = []

    @property
    def bytes_per_target(self) -> int:
        """Return what one target takes besides its series."""
        return self.width * (8 + 16 * int(self.counts.shape[2]) + int(self.is_told.shape[2]))

    @property
    def n_bytes(self) -> int:
        """Return what the shelf takes."""
        return len(self.times) * self.bytes_per_target + self.cells.nbytes

    def place_targets(self, n_more: int) -> Longs:
        """Return so many free places for targets, cleared."""
        n_old = len(self.times)
        if len(self._free_targets) < n_more:
            n_new = max(n_more, n_old // 2, 16)
            for name in ("times", "heads", "counts", "totals", "waiting", "is_told"):
                setattr(self, name, longer(getattr(self, name), n_new))
            self._free_targets += range(n_old + n_new - 1, n_old - 1, -1)
        places = np.array([self._free_targets.pop() for _ in range(n_more)], dtype=np.int64)
        self.heads[places] = 0
        self.times[places] = NEVER
        return places

    def place_series(self, n_more: int) -> Longs:
        """Return so many free places for series; what is in them is undefined."""
        n_old = len(self.cells)
        if len(self._free_series) < n_more:
            n_new = max(n_more, n_old // 2, 64)
            self.cells = longer(self.cells, n_new)
            self._free_series += range(n_old + n_new - 1, n_old - 1, -1)
        return np.array([self._free_series.pop() for _ in range(n_more)], dtype=np.int64)

    def free(self, targets: Longs, series: Longs) -> None:
        """Take places back."""
        self._free_targets += targets.tolist()
        self._free_series += series.tolist()

    def reset(self, places: Longs, slots: Longs) -> None:
        """Clear scrapes, but for their samples and totals, which are set where a scrape begins."""
        self.times[places, slots] = NEVER
        self.counts[places, slots] = 0
        self.waiting[places, slots] = 0
        self.is_told[places, slots] = False


class ScrapeWindow:
    """The scrapes of all targets."""

    def __init__(
        self,
        rules: Sequence[MetricRule],
        terms: Sequence[Term],
        series: ExporterSeries,
        living: LivingSeries,
        settings: RemoteWriteSettings,
    ) -> None:
        self._rules = tuple(rules)
        self._terms = tuple(terms)
        self._is_rate = np.array([term.is_rate for term in self._terms], dtype=np.bool_)
        self._sums = TermSums(rules, terms)
        self._series = series
        self._living = living
        self._window_ms = int(settings.reorder_window_s * 1000)
        self._gap_ms = settings.max_gap_s * 1000
        self._shelves = [_Shelf(width, len(self._terms), len(self._rules)) for width in WIDTHS]
        self._shelf_of: Longs = np.zeros(16, dtype=np.int64)  # (target,)
        self._place_of: Longs = np.full(16, -1, dtype=np.int64)  # (target,) in its shelf
        self._cells_of: Longs = np.full(64, -1, dtype=np.int64)  # (series,) in its target's shelf
        self._n_targets = self._n_series = 0
        self._named: set[str] = set()  # servers whose unfinished scrapes have been named

    def ensure(self) -> None:
        """Make room for all series and targets that have a number."""
        n_series, n_targets = len(self._series), self._series.n_targets
        if n_targets > self._n_targets:
            self._shelf_of = roomy(self._shelf_of, n_targets)
            self._place_of = roomy(self._place_of, n_targets, -1)
            self._shelf_of[self._n_targets : n_targets] = 0
            places = self._shelves[0].place_targets(n_targets - self._n_targets)
            self._place_of[self._n_targets : n_targets] = places
            self._n_targets = n_targets
        if n_series > self._n_series:
            self._cells_of = roomy(self._cells_of, n_series, -1)
            fresh = np.arange(self._n_series, n_series)
            shelves = self._shelf_of[self._series.target_of[fresh]]
            for number in np.unique(shelves).tolist():
                some = fresh[shelves == number]
                self._cells_of[some] = places = self._shelves[number].place_series(len(some))
                self._shelves[number].cells[places] = _ABSENT
            self._n_series = n_series

    def keep(self, old_series: Longs, old_targets: Longs) -> int:
        """Forget all but these, which are numbered anew in this order; call it before they are.

        Returns:
            how many samples waited for the rest of a scrape that is forgotten with them.
        """
        n_incomplete = 0
        is_lost = np.ones(self._n_targets, dtype=np.bool_)
        is_lost[old_targets] = False
        lost_series = np.setdiff1d(np.arange(self._n_series), old_series)
        shelf_of_series = self._shelf_of[self._series.target_of[lost_series]]
        for number, shelf in enumerate(self._shelves):
            lost = np.flatnonzero(is_lost & (self._shelf_of[: self._n_targets] == number))
            places = self._place_of[lost]
            n_incomplete += int(shelf.waiting[places].sum())
            shelf.reset(places[:, None], np.arange(shelf.width))
            shelf.free(places, self._cells_of[lost_series[shelf_of_series == number]])
        self._shelf_of = self._shelf_of[old_targets]
        self._place_of = self._place_of[old_targets]
        self._cells_of = self._cells_of[old_series]
        self._n_series, self._n_targets = len(old_series), len(old_targets)
        return n_incomplete

    @property
    def n_waiting(self) -> int:
        """Return how many samples wait for the rest of their scrape."""
        return sum(int(shelf.waiting.sum()) for shelf in self._shelves)

    def has(self, samples: Samples) -> Flags:
        """Return which samples are in the window already."""
        found = np.zeros(len(samples), dtype=np.bool_)
        targets = self._series.target_of[samples.series]
        shelves = self._shelf_of[targets]
        for number in np.unique(shelves).tolist():
            shelf, some = self._shelves[number], np.flatnonzero(shelves == number)
            for piece in _pieces(some, shelf.width):
                is_it = shelf.times[self._place_of[targets[piece]]] == samples.timestamps_ms[piece, None]
                cells = shelf.cells[self._cells_of[samples.series[piece]]]
                found[piece] = (is_it & _are_there(cells)).any(axis=1)
        return found

    def add(self, batch: Batch, fates: Fates) -> Iterator[WholeScrapes]:
        """Take samples in; yield what they make whole. The living series know of them already."""
        shelves = self._shelf_of[self._series.target_of[batch.samples.series]]
        number = int(shelves[0])
        if np.equal(shelves, number).all():  # targets that are scraped alike share one
            yield from self._add_to(number, batch, fates)
            return
        for number in np.unique(shelves).tolist():
            yield from self._add_to(number, batch.where(shelves == number), fates)

    def _add_to(self, number: int, batch: Batch, fates: Fates) -> Iterator[WholeScrapes]:
        shelf = self._shelves[number]
        rows = self._rows_of(shelf, batch.samples)
        is_crowded = self._find_crowded(number, rows)
        if is_crowded.any():
            self._widen(number, np.unique(rows.targets[is_crowded]))
            is_moved = is_crowded[rows.of_sample]
            yield from self._add_to(number + 1, batch.where(is_moved), fates)
            batch = batch.where(~is_moved)
            if not len(batch.samples):
                return
            rows = self._rows_of(shelf, batch.samples)
        self._settle_slots(shelf, rows, fates)
        has_slot = shelf.times[rows.places, rows.slots] == rows.times
        if not has_slot.all():  # more scrapes than there is room for, or ones that these displaced
            is_kept = has_slot[rows.of_sample]
            fates.n_incomplete += int(np.count_nonzero(~is_kept & ~batch.samples.are_stale_marks))
            batch = batch.where(is_kept)
            if not len(batch.samples):
                return
            rows = self._rows_of(shelf, batch.samples)
        looks = self._put(shelf, rows, batch)
        yield self._tell(shelf, looks, fates)
        self._expire(shelf, rows.targets[first_of_runs(rows.targets)], fates)

    def _rows_of(self, shelf: _Shelf, samples: Samples) -> _Rows:
        """Return the scrapes of samples: which are there, and which slots the others get."""
        targets, times, of_sample = scrapes_of(self._series.target_of[samples.series], samples.timestamps_ms)
        places = self._place_of[targets]
        is_it = shelf.times[places] == times[:, None]
        slots = is_it.argmax(axis=1)
        is_known = is_it[np.arange(len(slots)), slots]
        ranks = np.zeros(len(slots), dtype=np.int64)
        unknown = np.flatnonzero(~is_known)
        ranks[unknown] = ranks_of(targets[unknown])
        slots[unknown] = (shelf.heads[places[unknown]] + ranks[unknown]) % shelf.width
        return _Rows(targets, places, times, of_sample, slots, is_known, ranks)

    def _find_crowded(self, number: int, rows: _Rows) -> Flags:
        """Return which rows are of a target that needs, and may have, more room than this shelf's."""
        shelf = self._shelves[number]
        n_targets = self._n_targets
        needs = np.zeros(n_targets, dtype=np.bool_)
        fresh = np.flatnonzero(~rows.is_known)
        kept_ms = shelf.times[rows.places[fresh], rows.slots[fresh]]
        in_window = kept_ms >= self._living.newest_ms[rows.targets[fresh]] - self._window_ms
        needs[rows.targets[fresh[in_window | (rows.ranks[fresh] >= shelf.width)]]] = True
        if not needs.any() or number + 1 == len(self._shelves):
            return np.zeros(len(rows.targets), dtype=np.bool_)
        # a wider place takes at most as much again for each of the target's series, and the target itself
        n_more = int(needs.sum()) * shelf.bytes_per_target * 2 + int(needs.sum()) * shelf.width * 8 * 16
        if sum(one.n_bytes for one in self._shelves) + n_more > _BYTES_MAX:
            return np.zeros(len(rows.targets), dtype=np.bool_)
        return needs[rows.targets]

    def _widen(self, number: int, targets: Longs) -> None:
        """Move targets to the next wider shelf."""
        old, new = self._shelves[number], self._shelves[number + 1]
        rows, series = self._series.of_targets(targets)
        places, cells = self._place_of[targets], self._cells_of[series]
        in_turn = (old.heads[places][:, None] + np.arange(old.width)) % old.width  # oldest first
        at, at_cells = new.place_targets(len(targets)), new.place_series(len(series))
        for name in ("times", "counts", "totals", "waiting", "is_told"):
            getattr(new, name)[at, : old.width] = getattr(old, name)[places[:, None], in_turn]
        new.cells[at_cells, : old.width] = old.cells[cells[:, None], in_turn[rows]]
        new.heads[at] = old.width
        old.reset(places[:, None], np.arange(old.width))
        old.free(places, cells)
        self._shelf_of[targets] = number + 1
        self._place_of[targets] = at
        self._cells_of[series] = at_cells

    def _settle_slots(self, shelf: _Shelf, rows: _Rows, fates: Fates) -> None:
        """Clear slots for scrapes that begin, the newest ones if need be; what was there is displaced."""
        is_fresh = ~rows.is_known
        n_fresh = np.bincount(rows.places[is_fresh], minlength=len(shelf.times))
        fresh = np.flatnonzero(is_fresh & (rows.ranks >= n_fresh[rows.places] - shelf.width))
        targets, places, slots = rows.targets[fresh], rows.places[fresh], rows.slots[fresh]
        was_there = shelf.times[places, slots] != NEVER
        if was_there.any():  # a slot that is free has been cleared
            self._displace(shelf, targets[was_there], slots[was_there], fates)
            shelf.reset(places[was_there], slots[was_there])
        pairs, series = self._series.of_targets(targets)
        shelf.cells[self._cells_of[series], slots[pairs]] = _ABSENT
        shelf.totals[places, slots] = self._sums.starts
        shelf.times[places, slots] = rows.times[fresh]
        shelf.heads += n_fresh
        shelf.heads %= shelf.width

    def _displace(self, shelf: _Shelf, targets: Longs, slots: Longs, fates: Fates) -> None:
        """Count scrapes that leave the window unfinished, and find what splits them."""
        places = self._place_of[targets]
        n_waiting = shelf.waiting[places, slots].sum(axis=1)
        fates.n_incomplete += int(n_waiting.sum())
        for row in np.flatnonzero(n_waiting).tolist():
            target, slot = targets[row : row + 1], int(slots[row])
            (server,) = self._series.server_names(self._series.servers_of(target))
            if server not in self._named and len(self._named) < _NAMES_MAX:
                self._named.add(server)
                _, series = self._series.of_targets(target)
                is_there = _are_there(shelf.cells[self._cells_of[series], slot])
                label = self._series.label_between(series[is_there], series[~is_there])
                fates.unfinished[server] = label
                times = shelf.times[places[row]]
                near = np.flatnonzero((abs(times - times[slot]) <= _APART_MS) & (times != times[slot]))
                if _are_there(shelf.cells[self._cells_of[series[~is_there], None], near]).any():
                    fates.apart.add(server)

    def _put(self, shelf: _Shelf, rows: _Rows, batch: Batch) -> "_Looks":
        """Keep the samples and add the fresh ones up; return which scrapes are to be looked at."""
        series, values = batch.samples.series, batch.samples.values
        is_mark = batch.samples.are_stale_marks
        is_other = np.isnan(values) & ~is_mark
        shelf.cells[self._cells_of[series], rows.slots[rows.of_sample]] = (
            np.where(is_other, np.nan, values) if is_other.any() else values
        )
        added = np.flatnonzero(batch.is_fresh & ~is_mark)
        pairs, terms = self._series.members(series[added])
        given_by = added[pairs]
        given = np.where(self._is_rate[terms], batch.rates[given_by], values[given_by])
        counts, totals = self._sums.sum_up(rows.of_sample[given_by], terms, given, len(rows.times))
        at = (rows.places, rows.slots)
        shelf.counts[at] += counts
        shelf.totals[at] = self._sums.merge(shelf.totals[at], totals)
        n_terms = len(self._terms)
        homes = (rows.of_sample * n_terms + self._series.home_of[series])[~is_mark]
        shelf.waiting[at] += np.bincount(homes, minlength=len(rows.times) * n_terms).reshape(-1, n_terms)
        slow = np.zeros(len(rows.times), dtype=np.bool_)
        slow[rows.of_sample[~batch.is_fresh]] = True
        touched = (counts > 0) | slow[:, None]
        looks = _Looks(rows.targets, rows.slots, touched, slow)
        is_late = np.logical_not(batch.is_fresh)
        if is_late.any():
            looks = looks.join(*self._successors(shelf, batch.samples.where(is_late)), is_touched=True)
        if is_mark.any():
            looks = looks.join(*self._since(shelf, batch.samples.where(is_mark)), is_touched=False)
        return looks

    def _successors(self, shelf: _Shelf, late: Samples) -> tuple[Longs, Longs]:
        """Return (target, slot) of the samples that come next after late ones: their rates change."""
        targets = self._series.target_of[late.series].astype(np.int64)
        found: list[tuple[Longs, Longs]] = []
        for piece in _pieces(np.arange(len(late)), shelf.width):
            times = shelf.times[self._place_of[targets[piece]]]
            is_after = times > late.timestamps_ms[piece, None]
            is_after &= _are_there(shelf.cells[self._cells_of[late.series[piece]]])
            slots = np.where(is_after, times, np.iinfo(np.int64).max).argmin(axis=1)
            has_one = is_after.any(axis=1)
            found.append((targets[piece][has_one], slots[has_one]))
        return np.concatenate([one for one, _ in found]), np.concatenate([one for _, one in found])

    def _since(self, shelf: _Shelf, marks: Samples) -> tuple[Longs, Longs]:
        """Return (target, slot) of the scrapes from the end of a series on: it is not waited for."""
        targets, row_of = np.unique(self._series.target_of[marks.series], return_inverse=True)
        first_ms = np.full(len(targets), np.iinfo(np.int64).max)
        np.minimum.at(first_ms, row_of, marks.timestamps_ms)
        rows, slots = np.nonzero(shelf.times[self._place_of[targets]] >= first_ms[:, None])
        return targets[rows].astype(np.int64), slots

    def _tell(self, shelf: _Shelf, looks: "_Looks", fates: Fates) -> WholeScrapes:
        """Return the rules' values of scrapes that are whole and not told yet, or told otherwise."""
        targets, places, slots = looks.targets, self._place_of[looks.targets], looks.slots
        times = shelf.times[places, slots]
        needed = self._living.n_alive[targets].astype(np.int64)
        slow = np.flatnonzero(looks.is_slow | (times < self._living.changed_ms[targets]))
        for piece in _pieces(slow, shelf.width * 16):
            needed[piece] = self._add_up_again(shelf, targets[piece], slots[piece])
        counts, totals = shelf.counts[places, slots], shelf.totals[places, slots]
        is_whole = (needed > 0) & (counts >= needed)
        fates.n_taken += int(shelf.waiting[places, slots][is_whole].sum())
        shelf.waiting[places, slots] *= ~is_whole
        is_told = shelf.is_told[places, slots]
        values = self._sums.evaluate(counts, totals, is_whole, looks.touched, is_told)
        shelf.is_told[places, slots] = is_told | ~np.isnan(values)
        return WholeScrapes(targets, times, values)

    def _add_up_again(self, shelf: _Shelf, targets: Longs, slots: Longs) -> Longs:
        """Make the sums of scrapes anew from all their samples; return (scrape, term) how many are needed."""
        rows, series = self._series.of_targets(targets)
        places = self._place_of[targets]
        times = shelf.times[places, slots]
        n_terms = len(self._terms)
        pairs, terms = self._series.members(series)
        is_needed = self._living.are_needed(series, times[rows])[pairs]
        cells_of_need = rows[pairs][is_needed] * n_terms + terms[is_needed]
        values = shelf.cells[self._cells_of[series], slots[rows]]
        is_there = _are_there(values) & (values.view(np.int64) != STALE_BITS)
        rates = np.full(len(series), np.nan)
        for piece in _pieces(np.flatnonzero(is_there), shelf.width):
            at, own = places[rows[piece]], self._cells_of[series[piece]]
            before = np.where(_are_there(shelf.cells[own]), shelf.times[at], NEVER)
            before[before >= times[rows[piece], None]] = NEVER
            slot = before.argmax(axis=1)
            before_ms = before[np.arange(len(piece)), slot]
            rates[piece] = rates_between(
                before_ms, shelf.cells[own, slot], times[rows[piece]], values[piece], self._gap_ms
            )
        given = np.where(self._is_rate[terms], rates[pairs], values[pairs])
        some = is_there[pairs]
        counts, totals = self._sums.sum_up(rows[pairs][some], terms[some], given[some], len(slots))
        shelf.counts[places, slots] = counts
        shelf.totals[places, slots] = totals
        needed = np.bincount(cells_of_need, minlength=len(slots) * n_terms)
        return needed.astype(np.int64).reshape(-1, n_terms)

    def _expire(self, shelf: _Shelf, targets: Longs, fates: Fates) -> None:
        """Displace the scrapes that are older than the window."""
        times = shelf.times[self._place_of[targets]]
        oldest_ms = self._living.newest_ms[targets] - self._window_ms
        rows, slots = np.nonzero((times < oldest_ms[:, None]) & (times != NEVER))
        if len(rows):
            self._displace(shelf, targets[rows], slots, fates)
            shelf.reset(self._place_of[targets[rows]], slots)


@dataclass(frozen=True, slots=True, eq=False)
class _Looks:
    """Scrapes that may have become whole, each once."""

    targets: Longs
    slots: Longs
    touched: Flags  # (row, term) something was added, or changed
    is_slow: Flags  # to be added up again

    def join(self, targets: Longs, slots: Longs, *, is_touched: bool) -> "_Looks":
        """Return these and some more, which are to be added up again."""
        n_terms = self.touched.shape[1]
        every_target = np.concatenate((self.targets, targets))
        every_slot = np.concatenate((self.slots, slots))
        keys = every_target * WIDTHS[-1] + every_slot
        _, first, row_of = np.unique(keys, return_index=True, return_inverse=True)
        touched = np.zeros((len(first), n_terms), dtype=np.bool_)
        is_slow = np.zeros(len(first), dtype=np.bool_)
        more = np.full((len(targets), n_terms), is_touched)
        np.logical_or.at(touched, row_of, np.concatenate((self.touched, more)))
        np.logical_or.at(is_slow, row_of, np.concatenate((self.is_slow, np.ones(len(targets), np.bool_))))
        return _Looks(every_target[first], every_slot[first], touched, is_slow)


def _pieces(rows: Longs, width: int) -> Iterator[Longs]:
    """Yield rows in pieces for which an array of this width is not too large."""
    step = max(_PIECE_CELLS // width, 1)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _are_there(cells: Floats) -> Flags:
    return np.not_equal(cells.view(np.int64), _ABSENT_BITS)
