"""Everything that is read from a buffer's folder, by any process, without locks and without repairing.

Owns: the merge of a kind's parts and log rows, in order, in bounded memory; `get_stats()` from names,
footers and the log; the export of a stretch as one Parquet file. Sees every acknowledged row once:
the log is read before the days, and a row that moved meanwhile is in both and merged.
Does not know: writing, which process owns the folder.
"""

import logging
import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fleetcast.clock import DAY_MS
from fleetcast.errors import BadData, CorruptFile
from fleetcast.storage.bin_days import BinDay, bin_table, open_bins, sealed_file
from fleetcast.storage.days import (
    Days,
    day_of_ms,
    day_path,
    day_start_ms,
    folder_bytes,
    list_days,
    list_months,
    month_path,
    open_day,
    part_names,
    servers_between,
    split_by_day,
    whole_servers,
)
from fleetcast.storage.log import decode_payloads, read_segment, segments
from fleetcast.storage.parts import OpenPart, write_export
from fleetcast.storage.tables import (
    BINS,
    METRICS,
    NUMBER,
    TableKind,
    choose,
    codes_of,
    concatenate,
    has_key,
    merge,
    times_ms,
)

logger = logging.getLogger(__name__)

CHUNK_ROWS = 262_144
_STRETCH_ROWS = 8 * CHUNK_ROWS  # of a day that is read by time
_READS_MOST = 2  # times that a row may be read so: large parts of the whole day are not read by time


@dataclass(frozen=True, slots=True)
class LogRows:
    """Rows of one log segment, in the order they were appended."""

    number: int
    table: pa.Table


def log_folder(folder: Path, kind: TableKind) -> Path:
    """Return the folder of a kind's log."""
    return folder / "log" / kind.name


def read_log(folder: Path, kind: TableKind) -> list[LogRows]:
    """Return what the log holds that may not be in parts yet."""
    found = []
    for segment in segments(log_folder(folder, kind)):
        try:
            content = read_segment(segment.path)
        except FileNotFoundError:  # became parts since it was listed; the days are opened later
            continue
        except (OSError, CorruptFile) as error:
            logger.warning("skipped a log segment path=%s error=%s", segment.path, error)
            continue
        table = decode_payloads(content.payloads, kind, _note_bad_frame)
        if len(table):
            found.append(LogRows(segment.number, table))
    return found


def _note_bad_frame(payload: bytes, error: Exception) -> None:
    logger.warning("skipped a log frame size_bytes=%d error=%s", len(payload), error)


class DayReader:
    """Reads one kind in one folder; holds no state."""

    def __init__(self, folder: Path, kind: TableKind) -> None:
        self.folder = folder
        self.kind = kind
        self.left_out: Callable[[], Container[str]] = frozenset  # servers that `read` passes over

    def read(
        self,
        start_ms: int,
        end_ms: int,
        columns: Sequence[str] | None = None,
        chunk_rows: int = CHUNK_ROWS,
    ) -> Iterator[tuple[date, pa.Table]]:
        """Yield the rows with start <= time < end, day by day.

        A day comes in one or more tables that hold whole servers, sorted by key, one row per key.
        """
        log, opened = read_log(self.folder, self.kind), Days(self.folder, self.kind)
        for day in self._days(log, start_ms, end_ms):
            first_ms = max(start_ms, day_start_ms(day))
            last_ms = min(end_ms, day_start_ms(day) + DAY_MS)
            parts = opened.open(day).parts
            for table in self._rows_between(parts, log, (first_ms, last_ms), columns, chunk_rows):
                kept = _without(table, self.left_out())
                if len(kept):
                    yield day, kept

    def read_by_bins(
        self, start_ms: int, end_ms: int, bin_ms: int, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[date, pa.Table]]:
        """Yield the same rows, all that a server has of a bin in one table, in what order is fastest."""
        log, opened = read_log(self.folder, self.kind), Days(self.folder, self.kind)
        for day in self._days(log, start_ms, end_ms):
            span_ms = max(start_ms, day_start_ms(day)), min(end_ms, day_start_ms(day) + DAY_MS)
            for table in self._rows_by_bins(opened.open(day).parts, log, span_ms, bin_ms, columns):
                kept = _without(table, self.left_out())
                if len(kept):
                    yield day, kept

    def _rows_by_bins(
        self,
        parts: Sequence[OpenPart],
        log: Sequence[LogRows],
        span_ms: tuple[int, int],
        bin_ms: int,
        columns: Sequence[str] | None,
    ) -> Iterator[pa.Table]:
        """Yield the rows of a span inside one day, stretch after stretch of time where its parts allow it."""
        for stretch in _stretches(parts, span_ms, bin_ms):
            yield from self._rows_between(parts, log, stretch, columns, CHUNK_ROWS)

    def _rows_between(
        self,
        parts: Sequence[OpenPart],
        log: Sequence[LogRows],
        span_ms: tuple[int, int],
        columns: Sequence[str] | None,
        chunk_rows: int,
    ) -> Iterator[pa.Table]:
        """Yield the rows of a span inside one day."""
        start_ms, end_ms = span_ms
        fresh = []
        for rows in log:
            table = _between(_narrow(rows.table, self.kind, columns), self.kind, start_ms, end_ms)
            if len(table):
                fresh.append(LogRows(rows.number, table))
        parts = [part for part in parts if part.may_hold(start_ms, end_ms)]
        is_inside = all(part.lies_in(start_ms, end_ms) for part in parts)
        for table in merge_sources(parts, fresh, self.kind, columns, chunk_rows):
            inside = table if is_inside else _between(table, self.kind, start_ms, end_ms)
            if len(inside):
                yield inside

    def read_bins(
        self, start_ms: int, end_ms: int, bin_ms: int, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[date, pa.Table]]:
        """Yield the means of the bins of the rows with start <= time < end, day by day.

        A row stands at the start of its bin. The means that were kept of a sealed day are the same as those
        of its rows, which are read where none were kept, or part of a bin is asked for.
        """
        log, opened = read_log(self.folder, self.kind), Days(self.folder, self.kind)
        for day in self._days(log, start_ms, end_ms):
            first_ms, last_ms = max(start_ms, day_start_ms(day)), min(end_ms, day_start_ms(day) + DAY_MS)
            kept = self._bin_day(day, log, (first_ms, last_ms), bin_ms)
            if kept is not None:
                tables = kept.means(columns)
            else:
                rows = self._rows_by_bins(opened.open(day).parts, log, (first_ms, last_ms), bin_ms, columns)
                tables = (bin_table(table, bin_ms) for table in rows)
            for table in tables:
                inside = _between(table, self.kind, first_ms // bin_ms * bin_ms, last_ms)
                wanted = _without(inside, self.left_out())
                if len(wanted):
                    yield day, wanted

    def read_newest(self, start_ms: int, end_ms: int, bin_ms: int) -> pa.Table | None:
        """Return each server's newest values of the rest of a sealed day, None where it has not kept them."""
        day = day_of_ms(start_ms)
        kept = self._bin_day(day, read_log(self.folder, self.kind), (start_ms, end_ms), bin_ms)
        if kept is None or kept.newest_ms >= end_ms:
            return None
        tables = [_between(table, self.kind, start_ms, end_ms) for table in kept.newest()]
        return _without(concatenate(tables, self.kind), self.left_out())

    def _bin_day(
        self, day: date, log: Sequence[LogRows], span_ms: tuple[int, int], bin_ms: int
    ) -> BinDay | None:
        """Return the kept means of a day, None unless they are those of the rows of this span of it.

        Args:
            log: what the log held before; a row of the day in it is in no means.
        """
        start_ms = day_start_ms(day)
        in_log = (times_ms(rows.table, self.kind.time_column) // DAY_MS for rows in log)
        is_touched = any((days == start_ms // DAY_MS).any() for days in in_log)
        if is_touched or DAY_MS % bin_ms or span_ms[0] % bin_ms:
            return None
        sealed = sealed_file(self.folder, day)
        if sealed is None:
            return None
        kept = open_bins(self.folder, day, sealed, bin_ms)
        if kept is None or (span_ms[1] % bin_ms and kept.newest_ms >= span_ms[1]):
            return None  # it has rows of the last bin that are not asked for
        return kept

    def read_server(
        self, server_name: str, start_ms: int, end_ms: int, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Return one server's rows with start <= time < end, sorted by key, one row per key.

        Only the row groups that can hold the server are read.
        """
        names = (server_name, server_name)
        log = read_log(self.folder, self.kind)
        sources = [(rows.number, 1, iter([_narrow(rows.table, self.kind, columns)])) for rows in log]
        opened = Days(self.folder, self.kind)
        for day in self._days(log, start_ms, end_ms):
            for part in opened.open(day).parts:
                if part.may_hold(start_ms, end_ms):
                    sources.append((part.number, 0, part.tables(columns, part.groups(names))))
        found = []
        for _, _, tables in sorted(sources, key=lambda source: source[:2]):
            for table in tables:
                own = servers_between(table, self.kind, *names)
                found.append(_between(own, self.kind, start_ms, end_ms))
        return merge(found, self.kind)

    def metric_names(self, start_ms: int, end_ms: int) -> list[str]:
        """Return the metrics that occur in days of this range, sorted, from footers and the log."""
        log = read_log(self.folder, self.kind)
        names: set[str] = set()
        for rows in log:
            if len(_between(rows.table, self.kind, start_ms, end_ms)):
                names.update(rows.table.column_names)
        opened = Days(self.folder, self.kind)
        for day in self._days([], start_ms, end_ms):
            for part in opened.open(day).parts:
                names.update(part.schema.names)
        return sorted(names - set(self.kind.schema.names))

    def newest_ms(self) -> int | None:
        """Return the newest time of all rows."""
        return self._edge_ms(newest=True)

    def oldest_ms(self) -> int | None:
        """Return the oldest time of all rows."""
        return self._edge_ms(newest=False)

    def _edge_ms(self, *, newest: bool) -> int | None:
        edge = max if newest else min
        log = read_log(self.folder, self.kind)
        times = [times_ms(rows.table, self.kind.time_column) for rows in log if len(rows.table)]
        found = [int(edge(some)) for some in times]
        days, opened = list_days(self.folder, self.kind), Days(self.folder, self.kind)
        for day in reversed(days) if newest else days:
            in_day = [edge_of for part in opened.open(day).parts for edge_of in _edges(part, self.kind)]
            if in_day:
                found.append(edge(in_day))
                break
        return edge(found) if found else None

    def _days(self, log: Sequence[LogRows], start_ms: int, end_ms: int) -> list[date]:
        if start_ms >= end_ms:
            return []
        days = set(list_days(self.folder, self.kind))
        for rows in log:
            numbers = np.unique(times_ms(rows.table, self.kind.time_column) // DAY_MS)
            days.update(day_of_ms(int(number) * DAY_MS) for number in numbers)
        return sorted(
            day for day in days if day_start_ms(day) < end_ms and day_start_ms(day) + DAY_MS > start_ms
        )


def merge_sources(
    parts: Sequence[OpenPart],
    log: Sequence[LogRows],
    kind: TableKind,
    columns: Sequence[str] | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Iterator[pa.Table]:
    """Yield the rows of parts and log merged: sorted by key, one row per key, newer ones win.

    Never more than about `chunk_rows` rows are held, unless one server alone has more.
    """
    if len(parts) == 1 and not log and parts[0].is_ours:
        yield from whole_servers(parts[0].tables(columns), kind)  # sorted and unique as it is
        return
    ranges = _server_ranges(parts, log, kind, chunk_rows)
    for first, last in ranges:
        sources = [(part.number, 0, _part_rows(part, kind, columns, first, last)) for part in parts]
        sources += [(rows.number, 1, [servers_between(rows.table, kind, first, last)]) for rows in log]
        sources.sort(key=lambda source: source[:2])
        tables = [table for _, _, some in sources for table in some]
        table = merge(tables, kind)
        if len(table):
            yield table


def _stretches(parts: Sequence[OpenPart], span_ms: tuple[int, int], bin_ms: int) -> Iterator[tuple[int, int]]:
    """Yield a span cut between bins, so that a stretch has few rows and few parts lie in two.

    Each range of servers (see `_server_ranges`) reads row groups of every part of a stretch: of 10,000
    servers' open day, with some hundred parts, each row was read twenty times.
    """
    start_ms, end_ms = span_ms
    first_ms = start_ms - start_ms % bin_ms
    n_rows, n_bins = sum(part.n_rows for part in parts), -(-(end_ms - first_ms) // bin_ms)
    step_ms = max(1, n_bins * _STRETCH_ROWS // max(n_rows, 1)) * bin_ms
    ranges = [(part.n_rows, part.time_range_ms() or span_ms) for part in parts]
    n_read = sum(rows * (newest // step_ms - oldest // step_ms + 1) for rows, (oldest, newest) in ranges)
    if n_read > _READS_MOST * n_rows:
        step_ms = n_bins * bin_ms
    for start in range(first_ms, end_ms, step_ms):
        yield max(start, start_ms), min(start + step_ms, end_ms)


def _server_ranges(
    parts: Sequence[OpenPart], log: Sequence[LogRows], kind: TableKind, chunk_rows: int
) -> list[tuple[str | None, str | None]]:
    """Return inclusive ranges of server names of about `chunk_rows` rows; (None, None) is all."""
    if sum(part.n_rows for part in parts) + sum(len(rows.table) for rows in log) <= chunk_rows:
        return [(None, None)]
    counts: dict[str, int] = {}
    tables = [table for part in parts for table in part.tables([])] + [rows.table for rows in log]
    for table in tables:
        for entry in pc.value_counts(table.column(kind.key[0])).to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
    ranges: list[tuple[str | None, str | None]] = []
    first, last, n_rows = "", "", 0
    for name in sorted(counts):
        if n_rows and n_rows + counts[name] > chunk_rows:
            ranges.append((first, last))
            n_rows = 0
        first = name if n_rows == 0 else first
        last = name
        n_rows += counts[name]
    return [*ranges, (first, last)] if n_rows else ranges


def _part_rows(
    part: OpenPart, kind: TableKind, columns: Sequence[str] | None, first: str | None, last: str | None
) -> list[pa.Table]:
    if first is None or last is None:
        return list(part.tables(columns))
    groups = part.groups((first, last))
    return [servers_between(table, kind, first, last) for table in part.tables(columns, groups)]


def _without(table: pa.Table, servers: Container[str]) -> pa.Table:
    """Return the rows of all other servers."""
    if not servers:  # an empty set
        return table
    names, codes = codes_of(table.column("server_name"))
    is_out = np.array([name in servers for name in names], dtype=np.bool_)
    return choose(table, ~is_out[codes]) if is_out.any() else table


def _narrow(table: pa.Table, kind: TableKind, columns: Sequence[str] | None) -> pa.Table:
    if columns is None or not kind.has_metrics:
        return table
    fixed = kind.schema.names
    return table.select([name for name in table.column_names if name in fixed or name in columns])


def _between(table: pa.Table, kind: TableKind, start_ms: int, end_ms: int) -> pa.Table:
    times = times_ms(table, kind.time_column)
    inside = (times >= start_ms) & (times < end_ms)
    return table if inside.all() else choose(table, inside)


def _edges(part: OpenPart, kind: TableKind) -> list[int]:
    span = part.time_range_ms()
    if span is not None:
        return list(span)
    tables = [times_ms(table, kind.time_column) for table in part.tables([]) if len(table)]
    return [int(edge) for times in tables for edge in (times.min(), times.max())]


MEGABYTE = 1_000_000


def buffer_stats(folder: Path, kind: TableKind) -> dict[str, Any]:
    """Return the counts of one kind, as `spec.md` prints them."""
    log = read_log(folder, kind)  # before the days: a row that moves meanwhile is not missed
    days = list_days(folder, kind)
    by_day = _log_by_day(log, kind)
    opened, months = Days(folder, kind), list_months(folder, kind)
    total = sum(_rows_of_day(folder, kind, day, opened) for day in days)
    total += sum(_new_rows(folder, kind, day, rows) for day, rows in by_day.items())
    every_day = sorted({*days, *by_day})
    size = sum(folder_bytes(day_path(folder, kind, day)) for day in days)
    size += sum(folder_bytes(month_path(folder, kind, month)) for month in months)
    size += folder_bytes(log_folder(folder, kind))
    if kind is METRICS:
        size += sum(folder_bytes(day_path(folder, BINS, day)) for day in list_days(folder, BINS))
    return {
        "file_count": len(months) + sum(day_path(folder, kind, day).exists() for day in days),
        "total_records": total,
        "date_range": {
            "start": every_day[0].isoformat() if every_day else None,
            "end": every_day[-1].isoformat() if every_day else None,
        },
        "disk_usage_mb": round(size / MEGABYTE, 2),
    }


def _rows_of_day(folder: Path, kind: TableKind, day: date, opened: Days) -> int:
    path = day_path(folder, kind, day)
    if path.is_dir():
        return sum(name.n_rows for name in part_names(path))
    return opened.open(day).n_rows


def _log_by_day(log: Sequence[LogRows], kind: TableKind) -> dict[date, pa.Table]:
    """Return the log's rows, merged, by day."""
    by_day: dict[date, pa.Table] = split_by_day(merge([rows.table for rows in log], kind), kind)
    return by_day


def _new_rows(folder: Path, kind: TableKind, day: date, rows: pa.Table) -> int:
    """Return how many rows have a key that the day's parts do not have yet."""
    is_known = np.zeros(len(rows), dtype=np.bool_)
    times = times_ms(rows, kind.time_column)
    for part in open_day(folder, kind, day).parts:
        if part.may_hold(int(times.min()), int(times.max()) + 1):
            for keys in part.tables([]):
                is_known |= has_key(rows, keys, kind)
    return int((~is_known).sum())


def export_records(
    reader: DayReader, path: Path, start_ms: int, end_ms: int, resolution_s: float | None
) -> int:
    """Write the records with start <= time < end to `path` and return the number of rows.

    Args:
        resolution_s: length of the bins whose means are written, at their starts; None = raw.
    Raises:
        BadData: the bins do not divide a day.
        StorageFull, StorageBroken: a file that was at `path` before is untouched.
    """
    bin_ms = _bin_ms(resolution_s)
    if bin_ms is not None:
        start_ms -= start_ms % bin_ms  # the first bin is whole, too
    names = reader.metric_names(start_ms, end_ms)
    schema = pa.schema([*METRICS.schema, *((name, NUMBER) for name in names)])
    if bin_ms is None:
        found = reader.read(start_ms, end_ms, names)
    else:
        found = reader.read_bins(start_ms, end_ms, bin_ms, names)
    return write_export(path, (table for _, table in found), schema)


def _bin_ms(resolution_s: float | None) -> int | None:
    if resolution_s is None:
        return None
    bin_ms = round(resolution_s * 1000) if math.isfinite(resolution_s) else 0
    if bin_ms <= 0 or DAY_MS % bin_ms:
        raise BadData(f"resolution_s must divide a day (86400 s), got {resolution_s}")
    return bin_ms
