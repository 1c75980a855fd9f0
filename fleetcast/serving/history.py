"""The fleet's recent past in bins: which bins are closed, what they hold, what a model sees.

Owns: the rule by which a bin closes, the rows of bins still open, and the last 8 days of means in
one rolling array of 16-bit codes, the newest hour of them also as they are. Does not know: the buffer's
files (it is handed batches), forecasts, HTTP.

A bin closes `close_grace_s` after its end by the caller's clock, also when a record of a later bin
came sooner: several senders of one server need not be in step. Rows that come later are counted
and reopen nothing; their bins are read again from the buffer (`refresh`), so that the window is
always what a restart, or the trainer, would make of the same records. Those that come within
`correct_within_s` of their bin's end are handed to the caller again, as corrections.
"""

import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from datetime import datetime

import numpy as np

from fleetcast.bins import HISTORY_BINS, NO_MEAN, RECENT_BINS, BinCodes, MeanCodes, bin_means
from fleetcast.clock import from_ms, to_ms
from fleetcast.forecast.encoding import is_percent
from fleetcast.schema import ClosedBin, Codes, Floats, Floats32, HistoryWindow, Longs, NameRows, RecordBatch
from fleetcast.settings import BinSettings, ForecastSettings

_REFRESH_BINS = 288  # bins read again per call: a bound on how long one call takes
_CLOSE_ROWS = 2**18  # of bins that close together: bounds their arrays
_UNSEEN = int(np.iinfo(np.int64).min)
_SPARE_BINS = 96  # three moves a day at 5 minutes; more would cost more memory than time
_FIRST_ROWS, _FEW_ROWS = 32, 256
_BLOCK_ROWS = 256  # moved at once: a copy of everything would double the memory

ReadRecords = Callable[[int, int], Iterable[RecordBatch]]  # (start_ms, end_ms), half open
_Rows = tuple[Codes, Longs, Floats]  # server rows, times, values (row, metric)


class BinHistory:
    """Rows in, closed bins and windows out.

    `add` and the questions (`due`, `past`, counts) are safe from any thread; `close`,
    `window`, `restore` and `refresh` belong to the one thread that sweeps.
    """

    def __init__(
        self, bins: BinSettings, forecast: ForecastSettings, *, keep_bins: int = HISTORY_BINS
    ) -> None:
        self.metrics = bins.forecast_metrics
        self.bin_ms = bins.bin_s * 1000
        self._grace_ms = int(bins.close_grace_s * 1000)
        self.correct_ms = int(bins.correct_within_s * 1000)
        self._gone_ms = int(forecast.gone_after_s * 1000)
        self._keep_bins = keep_bins
        self.late_rows = 0
        # Guards the cells for readers of other threads. Always taken before `_lock`, never after it: a
        # large grid moves for a tenth of a second, and `add` must not wait for that.
        self._grid_lock = threading.Lock()
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        # the lock guards what `add` touches, down to _late_bins; the rest is the sweeping thread's
        self._rows = NameRows()
        self._newest_ms: Longs = np.full(64, _UNSEEN, dtype=np.int64)  # (server row,)
        self._open: dict[int, list[_Rows]] = {}
        self._taken_ms: int | None = None  # the newest closed bin
        self._late_bins: set[int] = set()
        self._correctable: set[int] = set()  # of these, closed bins whose actuals are to be corrected
        self._grid = BinGrid(self.metrics, self.bin_ms, self._keep_bins)
        self._seen_bin_ms: Longs = np.full(64, _UNSEEN, dtype=np.int64)  # newest closed bin with a record

    @property
    def newest_ms(self) -> int | None:
        """Return the time of the newest record, or None."""
        with self._lock:
            newest = int(self._newest_ms.max())
        return None if newest == _UNSEEN else newest

    def newest_record_time(self) -> datetime | None:
        """Return the same as a `datetime`, as a data clock asks for it."""
        newest_ms = self.newest_ms
        return None if newest_ms is None else from_ms(newest_ms)

    @property
    def n_servers(self) -> int:
        """Return how many servers are remembered."""
        return len(self._rows)

    def server_names(self) -> tuple[str, ...]:
        """Return every server that is remembered."""
        with self._lock:
            return tuple(self._rows)

    def unknown(self, server_names: Iterable[str]) -> list[str]:
        """Return those names of which nothing is remembered."""
        return self._rows.unknown(server_names)

    @property
    def taken_bin_ms(self) -> int | None:
        """Return the newest closed bin, or None before the first."""
        return self._taken_ms

    @property
    def awaits_refresh(self) -> bool:
        """Whether late rows changed bins that are already closed."""
        return bool(self._late_bins)

    @property
    def awaits_correction(self) -> bool:
        """Whether late rows came soon enough to correct what closed bins said."""
        return bool(self._correctable)

    def add(self, batch: RecordBatch, now: datetime | None = None) -> None:
        """Take durable records in; visible to the next question about due bins.

        Args:
            now: when they arrived; without it, late rows correct nothing.
        """
        if not len(batch):
            return
        values = self._columns(batch)
        starts = batch.timestamps_ms // self.bin_ms * self.bin_ms
        with self._lock:
            rows = self._rows_of(batch)
            np.maximum.at(self._newest_ms, rows, batch.timestamps_ms)
            for start in (
                sorted(set(starts.tolist())) if len(starts) < _FEW_ROWS else np.unique(starts).tolist()
            ):
                of_bin = starts == start
                if self._taken_ms is not None and start <= self._taken_ms:
                    self.late_rows += int(np.count_nonzero(of_bin))
                    self._note_late(start, now)
                else:
                    part = (rows[of_bin], batch.timestamps_ms[of_bin], values[of_bin])
                    self._open.setdefault(start, []).append(part)

    def _note_late(self, start: int, now: datetime | None) -> None:
        """Note a closed bin that has to be read again; caller holds the lock."""
        assert self._taken_ms is not None
        if start > self._taken_ms - self._keep_bins * self.bin_ms:
            self._late_bins.add(start)
            if now is not None and to_ms(now) <= start + self.bin_ms + self.correct_ms:
                self._correctable.add(start)

    def due(self, now: datetime) -> list[int]:
        """Return the starts of the bins that hold rows and are closed by `now`, oldest first."""
        with self._lock:
            return sorted(start for start in self._open if start <= self.newest_due_ms(now))

    def newest_due_ms(self, now: datetime) -> int:
        """Return the latest time at which a bin may start that is closed by `now`."""
        return to_ms(now) - self._grace_ms - self.bin_ms

    def n_open_rows(self, bin_ms: int) -> int:
        """Return how many rows a bin that is not closed yet holds."""
        with self._lock:
            return sum(len(part[0]) for part in self._open.get(bin_ms, ()))

    def close(self, bin_ms: int) -> ClosedBin:
        """Take one due bin; due bins are taken oldest first, and only once."""
        return self.close_first([bin_ms])[0]

    def close_first(self, due: Sequence[int]) -> list[ClosedBin]:
        """Take the first of the due bins together, as many as do not hold too many rows; at least one."""
        with self._lock:
            taken, parts, names = self._take_first(due)
        rows, times, values = (np.concatenate(column) for column in zip(*parts, strict=True))
        codes, starts, means = bin_means(rows, times, values, self.bin_ms)
        with self._grid_lock:
            self._grid.advance(taken[-1])
            self._grid.put(codes, starts, means)
        self._note_seen(codes, starts)
        self._forget_the_long_gone()
        by_bin = np.argsort(starts, kind="stable")
        ends = np.searchsorted(starts[by_bin], taken, side="right").tolist()
        closed = []
        for bin_ms, first, end in zip(taken, [0, *ends], ends, strict=False):
            cells = by_bin[first:end]
            servers = tuple([names[code] for code in codes[cells].tolist()])
            closed.append(ClosedBin(bin_ms, servers, self.metrics, means[cells].astype(np.float32)))
        return closed

    def _take_first(self, due: Sequence[int]) -> tuple[list[int], list[_Rows], list[str]]:
        """Return bins that are open no more, their rows, and all names; caller holds the lock."""
        parts: list[_Rows] = []
        taken: list[int] = []
        for bin_ms in due:
            if taken and sum(len(part[0]) for part in (*parts, *self._open[bin_ms])) > _CLOSE_ROWS:
                break
            assert bin_ms == min(self._open), "bins are taken oldest first"
            parts += self._open.pop(bin_ms)
            taken.append(bin_ms)
        self._taken_ms = taken[-1]
        return taken, parts, list(self._rows)

    def parts(self, end_bin_ms: int, n_servers: int) -> Iterator[HistoryWindow]:
        """Yield the fleet's means up to the newest closed bin, at most `n_servers` at a time.

        A whole fleet's would take twice the memory of its codes. Servers unseen for `gone_after_s` are left
        out.
        """
        names, rows = self._here(end_bin_ms)
        for start in range(0, len(rows), n_servers):
            yield self._part(names, rows[start : start + n_servers], end_bin_ms)

    def _here(self, end_bin_ms: int) -> tuple[list[str], Longs]:
        """Return all names and the rows of servers that are not gone."""
        assert end_bin_ms == self._taken_ms, "a window ends at the newest closed bin"
        with self._lock:
            names = list(self._rows)
        seen = self._seen_bin_ms[: len(names)]
        return names, np.flatnonzero(seen > end_bin_ms - self._gone_ms).astype(np.int64)

    def _part(self, names: list[str], rows: Longs, end_bin_ms: int) -> HistoryWindow:
        with self._grid_lock:  # a longer array may move
            values = self._grid.values(rows)
        return HistoryWindow(tuple(names[row] for row in rows), self.metrics, values, end_bin_ms, self.bin_ms)

    def past(self, server_name: str, last_bin_ms: int, n_bins: int) -> Floats32 | None:
        """Return closed bins of one server, (metric, bin), NaN = no record; None: nothing is remembered.

        Safe from any thread.
        """
        with self._grid_lock, self._lock:
            row = self._rows.get(server_name)
            if row is None:
                return None
            return self._grid.span(row, last_bin_ms, n_bins)

    @property
    def oldest_kept_ms(self) -> int | None:
        """Return the oldest bin within the memory's reach, or None before the first closed bin."""
        taken_ms = self._taken_ms
        return None if taken_ms is None else taken_ms - (self._keep_bins - 1) * self.bin_ms

    def clear(self) -> None:
        """Forget everything, for a `restore` to follow."""
        with self._lock:
            self._begin()

    def restore(self, batches: Iterable[RecordBatch], taken_bin_ms: int) -> None:
        """Fill a history from stored records, before its first `close`.

        Those after `taken_bin_ms` are open again; new records may come in meanwhile. The newest closed
        bins are to be corrected: a kill may have come between a late row and its correction.
        """
        with self._lock:
            self._taken_ms = taken_bin_ms
            for start in [start for start in self._open if start <= taken_bin_ms]:
                del self._open[start]  # records that came before this call: read again by `refresh`
                self._late_bins.add(start)
        with self._grid_lock:
            self._grid.advance(taken_bin_ms)
        for batch in batches:
            self._put_closed(batch)
            self.add(batch.where(batch.timestamps_ms >= taken_bin_ms + self.bin_ms))
        newest_ms = self.newest_ms
        if newest_ms is not None:
            newest_bin = newest_ms // self.bin_ms * self.bin_ms
            first = (newest_ms - self.correct_ms) // self.bin_ms * self.bin_ms
            recent = range(first, min(taken_bin_ms, newest_bin) + 1, self.bin_ms)
            with self._lock:
                self._late_bins.update(recent)
                self._correctable.update(recent)

    def note_newest(self, batch: RecordBatch) -> None:
        """Take the times of records in, of which `restore` gets the means."""
        with self._lock:
            rows = self._rows_of(batch)
            np.maximum.at(self._newest_ms, rows, batch.timestamps_ms)

    def refresh(self, read: ReadRecords, *, corrections_only: bool = False) -> list[ClosedBin]:
        """Read bins again that late rows belong to, newest first; return the corrected ones, oldest first."""
        with self._lock:
            wanted = self._correctable if corrections_only else self._late_bins
            late = sorted(wanted, reverse=True)[:_REFRESH_BINS]
            corrected = self._correctable.intersection(late)
            self._late_bins.difference_update(late)
            self._correctable.difference_update(late)
        found: dict[int, list[ClosedBin]] = {start: [] for start in sorted(corrected)}
        try:
            for start, end in _runs(late, self.bin_ms):
                for batch in read(start, end):
                    for part in self._put_closed(batch, corrected):
                        found[part.bin_ms].append(part)
        except BaseException:
            with self._lock:
                self._late_bins.update(late)
                self._correctable.update(corrected)
            raise
        return [_join(parts) for parts in found.values() if parts]

    def _put_closed(self, batch: RecordBatch, wanted: Container[int] = ()) -> list[ClosedBin]:
        """Write the cells of a batch that holds whole bins; return its part of the bins asked for."""
        with self._lock:
            taken = self._taken_ms
            rows = self._rows_of(batch)
            names = list(self._rows) if wanted else []
            if len(batch):
                np.maximum.at(self._newest_ms, rows, batch.timestamps_ms)
        codes, starts, means = bin_means(rows, batch.timestamps_ms, self._columns(batch), self.bin_ms)
        is_closed = starts <= (_UNSEEN if taken is None else taken)
        with self._grid_lock:
            self._grid.put(codes[is_closed], starts[is_closed], means[is_closed])
        self._note_seen(codes[is_closed], starts[is_closed])
        parts: list[ClosedBin] = []
        if not wanted:
            return parts
        for start in np.unique(starts[is_closed]).tolist():
            if start in wanted:
                of_bin = starts == start
                servers = tuple(names[code] for code in codes[of_bin])
                parts.append(ClosedBin(start, servers, self.metrics, means[of_bin].astype(np.float32)))
        return parts

    def _columns(self, batch: RecordBatch) -> Floats:
        """Return (row, metric) of the metrics that are forecast; NaN where the batch has none."""
        values = np.full((len(batch), len(self.metrics)), np.nan)
        for index, metric in enumerate(self.metrics):
            if metric in batch.metrics:
                values[:, index] = batch.metrics[metric]
        return values

    def _rows_of(self, batch: RecordBatch) -> Codes:
        """Return the history's row of each record; caller holds the lock."""
        rows: Codes = self._rows.of(batch.server_names)[batch.server_codes]
        self._newest_ms = _grow(self._newest_ms, len(self._rows))
        return rows

    def _note_seen(self, codes: Codes, starts: Longs) -> None:
        self._seen_bin_ms = _grow(self._seen_bin_ms, len(self._rows))
        np.maximum.at(self._seen_bin_ms, codes, starts)

    def _forget_the_long_gone(self) -> None:
        """Drop servers without a value in the whole window, once they are a sixteenth of the rows."""
        with self._grid_lock, self._lock:
            assert self._taken_ms is not None
            oldest_kept = self._taken_ms - self._grid.keep_bins * self.bin_ms
            names = list(self._rows)
            kept = np.flatnonzero(self._newest_ms[: len(names)] >= oldest_kept).astype(np.int32)
            if len(names) - len(kept) < max(16, len(names) // 16):
                return
            new_row = np.full(len(names), -1, dtype=np.int32)
            new_row[kept] = np.arange(len(kept), dtype=np.int32)
            self._rows = NameRows(names[row] for row in kept)
            self._newest_ms = _grow(self._newest_ms[kept], 64)
            self._seen_bin_ms = _grow(_grow(self._seen_bin_ms, len(names))[kept], 64)
            self._open = {
                start: [(new_row[rows], times, values) for rows, times, values in parts]
                for start, parts in self._open.items()
            }
            self._grid.keep_rows(kept)


class BinGrid:
    """Means (server, metric, bin) of the `keep_bins` newest bins; NaN = no record. Not thread safe.

    A window is decoded when it is asked for. The newest hour is also kept as it came: what a series is now
    goes into its forecast undamped. The array has spare columns on its right and is moved to the left once
    these are used up, a few times a day.
    """

    def __init__(self, metrics: Sequence[str], bin_ms: int, keep_bins: int) -> None:
        self.bin_ms = bin_ms
        self.keep_bins = keep_bins
        self._coders = [BinCodes(is_percent=is_percent(metric)) for metric in metrics]
        shape = (_FIRST_ROWS, len(metrics), keep_bins + _SPARE_BINS)
        self._codes: MeanCodes = np.full(shape, NO_MEAN, np.uint16)
        self._newest: Floats32 = np.full((*shape[:2], min(RECENT_BINS, keep_bins)), np.nan, np.float32)
        self._end = keep_bins  # one past the newest column
        self.newest_bin_ms: int | None = None
        self.oldest_used_ms: int | None = None  # oldest bin that was ever given a value

    def advance(self, bin_ms: int) -> None:
        """Make `bin_ms` the newest column; bins jumped over stay empty."""
        if self.newest_bin_ms is None:
            self.newest_bin_ms = bin_ms
            return
        steps = (bin_ms - self.newest_bin_ms) // self.bin_ms
        assert steps >= 0, f"bins close in order: {bin_ms} after {self.newest_bin_ms}"
        self.newest_bin_ms = bin_ms
        kept = max(0, self._newest.shape[2] - steps)
        self._newest[:, :, :kept] = self._newest[:, :, steps : steps + kept].copy()
        self._newest[:, :, kept:] = np.nan
        if steps >= self.keep_bins:  # a gap longer than the memory
            self._codes[:] = NO_MEAN
            self._end = self.keep_bins
            self.oldest_used_ms = None
            return
        if self._end + steps > self._codes.shape[2]:
            self._move_left(self.keep_bins - steps)
            self._end = self.keep_bins
        else:
            self._end += steps

    def put(self, rows: Codes, bin_starts_ms: Longs, means: Floats) -> None:
        """Set the cells of `rows` at `bin_starts_ms` (cell, metric); those out of reach are dropped."""
        assert self.newest_bin_ms is not None, "advance first"
        ages = (self.newest_bin_ms - bin_starts_ms) // self.bin_ms
        is_kept = (ages >= 0) & (ages < self.keep_bins)
        if not is_kept.any():
            return
        self._reserve(int(rows.max()) + 1)
        for place, coder in enumerate(self._coders):
            self._codes[rows[is_kept], place, self._end - 1 - ages[is_kept]] = coder.encode(
                means[is_kept, place]
            )
        n_newest = self._newest.shape[2]
        is_new = is_kept & (ages < n_newest)
        self._newest[rows[is_new], :, n_newest - 1 - ages[is_new]] = means[is_new]
        oldest = int(bin_starts_ms[is_kept].min())
        self.oldest_used_ms = oldest if self.oldest_used_ms is None else min(self.oldest_used_ms, oldest)

    def values(self, rows: Longs) -> Floats32:
        """Return (row, metric, bin) from the oldest bin used to the newest."""
        self._reserve(int(rows.max(initial=-1)) + 1)
        return self._decode(rows, self._end - self._n_used(), self._end)

    def span(self, row: int, last_bin_ms: int, n_bins: int) -> Floats32:
        """Return (metric, bin) of a row's `n_bins` bins up to `last_bin_ms`; NaN out of reach."""
        values = np.full((len(self._coders), n_bins), np.nan, dtype=np.float32)
        if self.newest_bin_ms is None or row >= len(self._codes):
            return values
        stop = self._end - (self.newest_bin_ms - last_bin_ms) // self.bin_ms
        first, last = max(stop - n_bins, self._end - self.keep_bins), min(stop, self._end)
        if first < last:
            found = self._decode(np.array([row]), first, last)[0]
            values[:, first - stop + n_bins : last - stop + n_bins] = found
        return values

    def keep_rows(self, rows: Codes) -> None:
        """Forget every row but `rows`, rising, which move up in this order."""
        for array, empty in ((self._codes, NO_MEAN), (self._newest, np.nan)):
            for first in range(0, len(rows), _BLOCK_ROWS):
                block = rows[first : first + _BLOCK_ROWS]
                array[first : first + len(block)] = array[block]
            array[len(rows) :] = empty

    def _decode(self, rows: Longs, first: int, last: int) -> Floats32:
        """Return (row, metric, bin) of the columns from `first` to before `last`."""
        values = np.empty((len(rows), len(self._coders), last - first), np.float32)
        for row, into in zip(rows.tolist(), values, strict=True):
            for place, coder in enumerate(self._coders):
                coder.decode(self._codes[row, place, first:last], into[place])
        begin = self._end - self._newest.shape[2]  # column of the oldest that is kept as it came
        if last > (start := max(first, begin)):
            values[:, :, start - first :] = self._newest[rows, :, start - begin : last - begin]
        return values

    def _n_used(self) -> int:
        if self.newest_bin_ms is None or self.oldest_used_ms is None:
            return 0
        return min(self.keep_bins, (self.newest_bin_ms - self.oldest_used_ms) // self.bin_ms + 1)

    def _move_left(self, keep: int) -> None:
        """Bring the newest `keep` columns to the left edge; all others become empty."""
        for first in range(0, len(self._codes), _BLOCK_ROWS):
            block = self._codes[first : first + _BLOCK_ROWS]
            block[:, :, :keep] = block[:, :, self._end - keep : self._end].copy()
            block[:, :, keep:] = NO_MEAN

    def _reserve(self, n_rows: int) -> None:
        have = len(self._codes)
        if n_rows <= have:
            return
        n_rows = max(n_rows, have + _BLOCK_ROWS)
        # in place: the system moves pages, and a copy of everything would double the memory
        self._codes.resize((n_rows, *self._codes.shape[1:]), refcheck=False)
        self._codes[have:] = NO_MEAN
        self._newest.resize((n_rows, *self._newest.shape[1:]), refcheck=False)
        self._newest[have:] = np.nan


def _grow(array: Longs, size: int) -> Longs:
    """Return `array` with room for `size` items, the new ones unseen."""
    if size <= len(array):
        return array
    longer = np.full(max(size, 2 * len(array)), _UNSEEN, dtype=np.int64)
    longer[: len(array)] = array
    return longer


def _join(parts: Sequence[ClosedBin]) -> ClosedBin:
    """Return one bin of several that hold different servers."""
    names = tuple(name for part in parts for name in part.server_names)
    first = parts[0]
    return ClosedBin(first.bin_ms, names, first.metrics, np.concatenate([part.values for part in parts]))


def _runs(starts: list[int], bin_ms: int) -> Iterator[tuple[int, int]]:
    """Yield half-open ranges that cover adjoining bins.

    >>> list(_runs([900, 600, 0], 300))
    [(0, 300), (600, 1200)]
    """
    ordered = sorted(starts)
    for index, start in enumerate(ordered):
        if index == 0 or start != ordered[index - 1] + bin_ms:
            first = start
        if index + 1 == len(ordered) or ordered[index + 1] != start + bin_ms:
            yield first, start + bin_ms
