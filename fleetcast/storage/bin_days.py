"""The bins table: the means of a sealed day's bins, in a file beside the day (`bins_DAY.parquet`).

Owns: how the means are made of records, what the file says, and what proves that it belongs to exactly
this sealed file of this day. Nothing depends on it: without it, or where it does not fit, the records are
read, which gives the same and takes longer. Does not know: when it is made (`upkeep`), how other days are
read (`reader`).

First come row groups of means, cut between servers, sorted as a day of records is; a row stands at the start
of its bin. Then come row groups with each server's newest values: of the day's records only those cells that
no later record of that day replaces. The note `fleetcast.bins` is JSON: `of` (the seal of the day's file),
`bin_ms`, and `groups` (how many row groups are of the first kind, and of the second).
"""

import json
import logging
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa

from fleetcast.bins import bin_means
from fleetcast.clock import DAY_MS
from fleetcast.errors import CorruptFile
from fleetcast.schema import Floats, Longs, RecordBatch
from fleetcast.storage.days import day_path, day_start_ms, open_day, servers_between, whole_servers
from fleetcast.storage.parts import READ_ERRORS, OpenPart, write_part
from fleetcast.storage.tables import (
    BINS,
    METRICS,
    batch_of_table,
    canonical,
    merge,
    table_of_batch,
    union_schema,
)

logger = logging.getLogger(__name__)

_NOTE = "fleetcast.bins"
_GROUP_ROWS = 65_536  # rows of a row group of means, at least, but for the last


def bin_table(table: pa.Table, bin_ms: int) -> pa.Table:
    """Return the bin means of whole servers; the time of a row is its bin's start."""
    batch = batch_of_table(table)
    metrics = list(batch.metrics)
    # each column in one piece: means are taken column by column
    values = np.array([batch.metrics[name] for name in metrics]).reshape(len(metrics), len(batch)).T
    codes, starts_ms, means = bin_means(batch.server_codes, batch.timestamps_ms, values, bin_ms)
    columns = {name: means[:, place] for place, name in enumerate(metrics)}
    return canonical(table_of_batch(RecordBatch(batch.server_names, codes, starts_ms, columns)), METRICS)


def newest_table(table: pa.Table) -> pa.Table:
    """Return each server's newest value of each metric, at its time, of whole servers sorted by key.

    Each server's newest record is among the rows, with or without a value that stays.
    """
    batch = batch_of_table(table)
    codes, n_rows = batch.server_codes, len(batch)
    starts = np.flatnonzero(np.append(True, codes[1:] != codes[:-1]))
    places = np.arange(n_rows)
    kept: dict[str, Longs] = {}
    for name, column in batch.metrics.items():
        newest = np.maximum.reduceat(np.where(np.isnan(column), -1, places), starts)
        kept[name] = newest[newest >= 0]
    rows = np.unique(np.concatenate([np.append(starts[1:], n_rows) - 1, *kept.values()]))
    return table_of_batch(
        RecordBatch(
            batch.server_names,
            codes[rows],
            batch.timestamps_ms[rows],
            {name: _only(batch.metrics[name], kept[name], rows) for name in kept},
        )
    )


def _only(column: Floats, kept: Longs, rows: Longs) -> Floats:
    """Return a column's values at `rows`, NaN at those that are not kept."""
    return np.where(np.isin(rows, kept), column[rows], np.nan)


class BinDay:
    """The means of one sealed day, open beside the file that they were made of."""

    def __init__(self, day: date, part: OpenPart, sealed: OpenPart, bin_ms: int, n_means: int) -> None:
        self._day = day
        self._part = part
        self._sealed = sealed
        self._bin_ms = bin_ms
        self._n_means = n_means

    @property
    def newest_ms(self) -> int:
        """Return the time of the day's newest record."""
        span = self._sealed.time_range_ms()
        return day_start_ms(self._day) + DAY_MS - 1 if span is None else span[1]

    def means(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the means of whole servers, sorted by key; those of a damaged row group from the records.

        Args:
            columns: metrics to read; None reads all.
        """
        for group, names in zip(range(self._n_means), self._part.name_ranges(), strict=False):
            tables = list(self._part.tables(columns, [group]))
            if tables or names is None:
                yield from tables
                continue
            for table in whole_servers(self._sealed.tables(columns, self._sealed.groups(names)), METRICS):
                own = servers_between(table, METRICS, *names)
                if len(own):
                    yield bin_table(own, self._bin_ms)

    def newest(self) -> Iterator[pa.Table]:
        """Yield each server's newest values; from the records where what was kept is damaged."""
        kept = list(self._part.tables(None, range(self._n_means, self._part.n_groups)))
        if len(kept) == self._part.n_groups - self._n_means:
            yield from kept
            return
        for table in whole_servers(self._sealed.tables(), METRICS):
            yield newest_table(table)


def open_bins(folder: Path, day: date, sealed: OpenPart, bin_ms: int) -> BinDay | None:
    """Return the means of a sealed day, None where there are none of exactly this file and bin length."""
    path = day_path(folder, BINS, day)
    try:
        part = OpenPart(path, None, BINS)
        claim = json.loads(part.note(_NOTE))
        n_means, n_newest = map(int, claim["groups"])
        if min(n_means, n_newest) < 0 or n_means + n_newest != part.n_groups:
            raise CorruptFile(path, f"{part.n_groups} row groups, not {n_means} and {n_newest}")
        is_its_own = (claim["of"], claim["bin_ms"]) == (sealed.seal, bin_ms)
    except FileNotFoundError:
        return None
    except (*READ_ERRORS, TypeError) as error:
        logger.warning("a bins file is not used, the records are read path=%s error=%s", path, error)
        return None
    # otherwise of other records of this day, or of bins of another length: it is going to be made anew
    return BinDay(day, part, sealed, bin_ms, n_means) if is_its_own else None


def sealed_file(folder: Path, day: date) -> OpenPart | None:
    """Return the open file of a sealed day; None where it is open, foreign or unreadable."""
    snapshot = open_day(folder, METRICS, day)
    if not snapshot.is_sealed or not snapshot.parts or not snapshot.parts[0].is_ours:
        return None
    return snapshot.parts[0]


def lacks_bins(folder: Path, day: date, bin_ms: int) -> bool:
    """Whether a sealed day has no means of bins of this length."""
    sealed = sealed_file(folder, day)
    return sealed is not None and open_bins(folder, day, sealed, bin_ms) is None


def make_bins(folder: Path, day: date, bin_ms: int, target: Path) -> int:
    """Write the means of a sealed day's bins to `target`; return their number.

    Raises:
        CorruptFile: the day is not sealed, or some of it cannot be read.
        StorageFull, StorageBroken: nothing is left at `target`.
    """
    sealed = sealed_file(folder, day)
    if sealed is None or DAY_MS % bin_ms:
        raise CorruptFile(day_path(folder, METRICS, day), f"there is nothing to take means of {bin_ms} ms of")
    pieces = _Pieces(sealed, bin_ms)
    schema = union_schema(BINS, [sealed.schema])
    write_part(target, pieces.tables(), BINS, schema, sealed.number, is_sealed=True, notes=pieces.notes)
    if sealed.n_damaged_groups:
        target.unlink()
        raise CorruptFile(day_path(folder, METRICS, day), "damaged, no means are kept of it")
    return pieces.n_means


class _Pieces:
    """The row groups of a bins file, made of the records one after the other."""

    def __init__(self, sealed: OpenPart, bin_ms: int) -> None:
        self._sealed = sealed
        self._bin_ms = bin_ms
        self._groups = [0, 0]  # of means, of newest values
        self.n_means = 0

    def tables(self) -> Iterator[pa.Table]:
        """Yield the row groups."""
        newest: list[pa.Table] = []
        held: list[pa.Table] = []
        for table in whole_servers(self._sealed.tables(), METRICS):
            newest.append(newest_table(table))
            held.append(bin_table(table, self._bin_ms))
            if sum(map(len, held)) >= _GROUP_ROWS:
                yield self._join(held)
                held = []
        if held:
            yield self._join(held)
        if newest:
            self._groups[1] += 1
            yield merge(newest, BINS)

    def notes(self) -> dict[str, str]:
        """Return what the file says of itself."""
        claim = {"of": self._sealed.seal, "bin_ms": self._bin_ms, "groups": self._groups}
        return {_NOTE: json.dumps(claim)}

    def _join(self, held: list[pa.Table]) -> pa.Table:
        joined = merge(held, BINS)
        self._groups[0] += 1
        self.n_means += len(joined)
        return joined
