"""Changes to the days of one kind: adding rows, compacting, putting sealed files in place, deleting.

Owns: what is written below a day's public path, in an order that a crash cannot hurt. A part is
added by renaming it into the day's folder; every other change is a `DayBuild`.
Does not know: when (DayStore decides), the log, or other processes: one writer, one thread.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from fleetcast.files import TEMP_MARK, fsync_dir, publish, remove_stale_temps, storage_error, temp_beside
from fleetcast.storage.arrays import Flags, chosen, times_ms
from fleetcast.storage.daybuild import (
    NEW_MARK,
    DayBuild,
    Step,
    hidden_name,
    keep_rejects,
    no_step,
    remove_path,
    swap,
    write_columns,
)
from fleetcast.storage.dayfiles import day_path, list_days, open_day, part_names
from fleetcast.storage.days import COLUMNS_FILE, READ_ERRORS, OpenPart, PartName, write_part
from fleetcast.storage.quarantine import Quarantine
from fleetcast.storage.tables import TableKind, has_key, merged

logger = logging.getLogger(__name__)

COMPACTED_ROWS_MAX = 1_048_576  # bigger parts stay as they are until the day is sealed
JOIN_RATIO = 2  # a part is rewritten only with at least 1/2 of its rows in newer, smaller ones


@dataclass(frozen=True, slots=True)
class PartFacts:
    """What adding rows needs to know of a part; remembered, so that it is opened once."""

    columns: frozenset[str]
    span_ms: tuple[int, int] | None  # oldest and newest time; None = unknown
    names: tuple[str, str] | None  # first and last server

    def may_share(self, other: Self) -> bool:
        """Whether a row of `other` can have the key of a row of this part."""
        is_apart = False
        for own, others in ((self.span_ms, other.span_ms), (self.names, other.names)):
            is_apart = is_apart or (own is not None and others is not None and _are_apart(own, others))
        return not is_apart


def facts_of_table(table: pa.Table, kind: TableKind) -> PartFacts:
    """Return the facts of a part that holds this table (not empty)."""
    times = times_ms(table, kind.time_column)
    names: list[str] = table.column(kind.key[0]).unique().to_pylist()
    span = int(times.min()), int(times.max())
    return PartFacts(frozenset(table.column_names), span, (min(names), max(names)))


def facts_of_part(part: OpenPart) -> PartFacts:
    """Return the facts of an open part, from its footer."""
    return PartFacts(frozenset(part.schema.names), part.time_range_ms(), part.name_range())


class DayWriter:
    """Writes the days of one kind in one folder; not thread safe."""

    def __init__(
        self, folder: Path, kind: TableKind, quarantine: Quarantine, on_step: Step = no_step
    ) -> None:
        self._folder = folder
        self._kind = kind
        self._quarantine = quarantine
        self._step = on_step
        self._facts: dict[date, dict[PartName, PartFacts]] = {}

    def newest_number(self) -> int:
        """Return the highest segment number in any part or sealed file, 0 if there is none."""
        days = list_days(self._folder, self._kind)
        numbers = [name.number for day in days for name in part_names(self.path(day))]
        for day in days:
            if self.path(day).is_file():
                numbers += [part.number for part in open_day(self._folder, self._kind, day).parts]
        return max(numbers, default=0)

    def recover(self) -> None:
        """Remove what a crash left half built; put back a day that a crash left aside."""
        days = f".{self._kind.name}_*.parquet"
        for aside in self._folder.glob(f"{days}{TEMP_MARK}*"):
            live = aside.with_name(aside.name[1:].split(TEMP_MARK)[0])
            if not live.exists():  # a swap without RENAME_EXCHANGE was cut short
                publish(aside, live)
            else:
                remove_path(aside)
        for built in self._folder.glob(f"{days}{NEW_MARK}*"):
            remove_path(built)
        for day in list_days(self._folder, self._kind):
            path = self.path(day)
            if path.is_dir():
                remove_stale_temps(path)

    def path(self, day: date) -> Path:
        """Return the public path of a day."""
        return day_path(self._folder, self._kind, day)

    def add(self, day: date, table: pa.Table, number: int) -> bool:
        """Add merged rows of log segment `number`; adding the same segment again changes nothing.

        Rows whose key the day already has are merged where that row is.

        Returns:
            whether the day now has a part of that number, by which a repetition is recognised.
        """
        path = self.path(day)
        names = part_names(path)
        if any(name.number == number for name in names):
            return True
        facts = facts_of_table(table, self._kind)
        if path.is_dir() and not self._shares_keys(day, names, table, facts):
            self._add_part(day, names, table, number, facts)
            return True
        snapshot = open_day(self._folder, self._kind, day)
        if any(part.number == number for part in snapshot.parts):
            return True
        is_fresh, touched = self._sorted_out(snapshot.parts, table, facts)
        if not touched and not is_fresh.any():
            return False  # a pure repetition
        with DayBuild(path, self._kind, snapshot, self._quarantine, self._step) as build:
            for part in snapshot.parts:
                if part in touched:
                    build.rewrite(part, chosen(table, touched[part]))
                else:
                    build.keep(part)
            if is_fresh.any():
                build.add(chosen(table, is_fresh), number)
        self._facts.pop(day, None)
        return bool(is_fresh.any())

    def compact(self, day: date) -> bool:
        """Make one part of the day's small ones; return whether there was something to do."""
        snapshot = open_day(self._folder, self._kind, day)
        small = _worth_joining(snapshot.parts)
        if len(small) < 2:
            return False
        with DayBuild(self.path(day), self._kind, snapshot, self._quarantine, self._step) as build:
            for part in snapshot.parts:
                if part not in small:
                    build.keep(part)
            build.join(small)
        self._facts.pop(day, None)
        return True

    def put_sealed(self, day: date, sealed: Path, rejects: Iterable[str] = ()) -> None:
        """Put a finished sealed file in the place of the day's parts.

        Args:
            rejects: names of parts that could not be read completely.
        """
        keep_rejects(self.path(day), rejects, self._quarantine)
        swap(sealed, self.path(day), self._step)
        self._facts.pop(day, None)

    def remove(self, day: date) -> None:
        """Delete a day."""
        path = doomed = self.path(day)
        if path.is_dir():  # vanishes at once for readers, however many files it has
            doomed = hidden_name(path)
            publish(path, doomed)
        remove_path(doomed)
        fsync_dir(self._folder)
        self._facts.pop(day, None)

    def _shares_keys(self, day: date, names: list[PartName], table: pa.Table, facts: PartFacts) -> bool:
        """Whether the open day has a key of `table`; opens only parts of the same hours and servers."""
        for name in names:
            if self._facts_of(day, name).may_share(facts):
                part = self._open(day, name)
                if part is not None and self._known_rows(part, table, facts).any():
                    return True
        return False

    def _facts_of(self, day: date, name: PartName) -> PartFacts:
        facts = self._facts.setdefault(day, {})
        if name not in facts:
            part = self._open(day, name)
            facts[name] = facts_of_part(part) if part else PartFacts(frozenset(), None, None)
        return facts[name]

    def _open(self, day: date, name: PartName) -> OpenPart | None:
        try:
            return OpenPart(self.path(day) / name.text, name, self._kind)
        except READ_ERRORS as error:
            logger.warning("skipped an unreadable part day=%s name=%s error=%s", day, name.text, error)
            return None

    def _sorted_out(
        self, parts: list[OpenPart], table: pa.Table, facts: PartFacts
    ) -> tuple[Flags, dict[OpenPart, Flags]]:
        """Return which rows have new keys, and which change a value of which part."""
        is_fresh = np.ones(len(table), dtype=np.bool_)
        touched: dict[OpenPart, Flags] = {}
        for part in parts:
            if not facts_of_part(part).may_share(facts):
                continue
            is_known = self._known_rows(part, table, facts)
            is_fresh &= ~is_known
            if is_known.any() and self._changes(part, chosen(table, is_known), facts):
                touched[part] = is_known
        return is_fresh, touched

    def _known_rows(self, part: OpenPart, table: pa.Table, facts: PartFacts) -> Flags:
        """Return which rows have a key that `part` has."""
        is_known = np.zeros(len(table), dtype=np.bool_)
        for keys in part.tables([], part.groups(facts.names)):
            is_known |= has_key(table, keys, self._kind)
        return is_known

    def _changes(self, part: OpenPart, rows: pa.Table, facts: PartFacts) -> bool:
        """Whether merging `rows` changes a value in `part`."""
        for old in part.tables(None, part.groups(facts.names)):
            hit = has_key(rows, old, self._kind)
            if hit.any() and not _holds_all(old, merged([old, chosen(rows, hit)], self._kind)):
                return True
        return False

    def _add_part(
        self, day: date, names: list[PartName], table: pa.Table, number: int, facts: PartFacts
    ) -> None:
        path = self.path(day)
        known = [self._facts_of(day, name).columns for name in names]
        try:
            if not known or not facts.columns <= frozenset().union(*known):
                self._widen_columns(day, table.schema)
            final = path / PartName(number, len(table)).text
            temp = temp_beside(final)
            write_part(temp, iter([table]), self._kind, table.schema, number)
            self._step("part written")
            publish(temp, final)
        except OSError as error:
            raise storage_error(path, error) from error
        self._facts[day][PartName(number, len(table))] = facts
        self._step("part published")

    def _widen_columns(self, day: date, schema: pa.Schema) -> None:
        parts = open_day(self._folder, self._kind, day).parts
        path = self.path(day) / COLUMNS_FILE
        temp = temp_beside(path)
        write_columns(temp, self._kind, [*(part.schema for part in parts), schema])
        publish(temp, path)
        self._step("columns written")


def _worth_joining(parts: list[OpenPart]) -> list[OpenPart]:
    """Return the newest parts up to the first that is big beside them: rows are rewritten few times."""
    joined: list[OpenPart] = []
    n_rows = 0
    for part in sorted(parts, key=lambda part: part.number, reverse=True):
        is_big = len(joined) > 1 and part.n_rows > JOIN_RATIO * n_rows
        if is_big or n_rows + part.n_rows > COMPACTED_ROWS_MAX:
            break
        joined.append(part)
        n_rows += part.n_rows
    return joined


def _are_apart(first: tuple[Any, Any], second: tuple[Any, Any]) -> bool:
    return bool(first[1] < second[0] or first[0] > second[1])


def _holds_all(old: pa.Table, new: pa.Table) -> bool:
    """Whether `new` (the same rows) has no value that `old` has not; dictionaries may differ."""
    for name in new.column_names:
        column = new.column(name)
        if name not in old.column_names:
            if column.null_count < len(column):
                return False
        elif pa.types.is_dictionary(column.type):
            if not column.cast(pa.string()).equals(old.column(name).cast(pa.string())):
                return False
        elif not column.equals(old.column(name)):
            return False
    return True
