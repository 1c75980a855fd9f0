"""Changes to the days of one kind: adding rows, compacting, putting sealed files in place, deleting.

Owns: what is written below a day's public path, in an order that a crash cannot hurt. A part is
added by renaming it into the day's folder. Every other change builds the next version of the day in
a hidden folder and swaps it in as a whole: until the swap readers see the old version, after it the
old version is deleted. Does not know: when (`DayStore` decides), the log, other processes.
"""

import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from fleetcast.files import (
    TEMP_MARK,
    exchange,
    fsync_dir,
    fsync_file,
    publish,
    remove_leftover,
    remove_stale_temps,
    set_aside,
    storage_error,
    temp_beside,
)
from fleetcast.storage.days import (
    COLUMNS_FILE,
    DaySnapshot,
    Drops,
    Quarantine,
    day_path,
    holds_forgotten,
    is_own_file,
    list_days,
    open_day,
    part_names,
    without_forgotten,
)
from fleetcast.storage.parts import READ_ERRORS, OpenPart, PartName, write_part
from fleetcast.storage.reader import LogRows, merge_sources
from fleetcast.storage.tables import Flags, TableKind, choose, has_key, merge, times_ms, union_schema

logger = logging.getLogger(__name__)

NEW_MARK = ".new-"  # a day being built, or the old one after the swap: never the only copy
Step = Callable[[str], None]


def no_step(_name: str) -> None:
    """Do nothing at a step; tests end the process there."""


class DayBuild:
    """Builds one day inside a `with` block and swaps it in at its end; an error leaves no trace."""

    def __init__(
        self, path: Path, kind: TableKind, snapshot: DaySnapshot, quarantine: Quarantine, on_step: Step
    ) -> None:
        self._path = path
        self._quarantine = quarantine
        self._kind = kind
        self._snapshot = snapshot
        self._step = on_step
        self._schemas = [part.schema for part in snapshot.parts]
        self._built = hidden_name(path)

    def __enter__(self) -> Self:
        try:
            self._built.mkdir()
        except OSError as error:
            raise storage_error(self._path, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        except OSError as late:
            remove_leftover(self._built)
            raise storage_error(self._path, late) from late
        if isinstance(error, Exception):
            remove_leftover(self._built)
            if isinstance(error, OSError):
                raise storage_error(self._path, error) from error

    def keep(self, part: OpenPart) -> None:
        """Take a part over as it is; a foreign file, or rows of a month, are written anew in our form."""
        if not part.is_ours or part.is_narrow:
            self.rewrite(part, None)
            return
        source = self._path
        if not self._snapshot.is_sealed:
            source = self._path / PartName(part.number, part.n_rows).text
        _link(source, self._built / PartName(part.number, part.n_rows).text)

    def rewrite(self, part: OpenPart, rows: pa.Table | None) -> None:
        """Take a part over with `rows` merged into it; in one of ours all their keys exist."""
        if rows is not None:
            self._schemas.append(rows.schema)
        schema = union_schema(self._kind, self._schemas if rows is None else [part.schema, rows.schema])
        if part.is_ours and rows is not None:
            tables = _update(part, rows, self._kind)
        else:
            log = [] if rows is None else [LogRows(part.number, rows)]
            tables = merge_sources([part], log, self._kind)
        self._write(tables, schema, part.number)

    def join(self, parts: Sequence[OpenPart]) -> None:
        """Make one part of several."""
        schema = union_schema(self._kind, [part.schema for part in parts])
        self._write(merge_sources(parts, [], self._kind), schema, max(part.number for part in parts))

    def add(self, rows: pa.Table, number: int) -> None:
        """Add a part of rows whose keys are new."""
        self._schemas.append(rows.schema)
        self._write(iter([rows]), rows.schema, number)

    def forget(self, part: OpenPart, drops: Drops) -> None:
        """Take a part over without the rows of some servers; one that has no other rows is left out."""
        rows = without_forgotten(merge_sources([part], [], self._kind), self._kind, drops)
        first = next(rows, None)
        if first is not None:
            schema = union_schema(self._kind, [part.schema])
            self._write(chain([first], rows), schema, part.number)

    def _finish(self) -> None:
        write_columns(self._built / COLUMNS_FILE, self._kind, self._schemas)
        fsync_dir(self._built)
        self._step("day built")
        hurt = [
            PartName(part.number, part.n_rows).text for part in self._snapshot.parts if part.n_damaged_groups
        ]
        keep_rejects(self._path, [*self._snapshot.damaged, *hurt], self._quarantine)
        if self._path.exists():
            swap(self._built, self._path, self._step)
        else:
            if self._path.is_symlink():
                set_aside(self._path, "a link that leads nowhere")
            publish(self._built, self._path)
            self._step("day published")

    def _write(self, tables: Iterator[pa.Table], schema: pa.Schema, number: int) -> None:
        temp = self._built / f".part-{number}"
        n_rows = write_part(temp, tables, self._kind, schema, number)
        publish(temp, self._built / PartName(number, n_rows).text)


def write_columns(path: Path, kind: TableKind, schemas: Sequence[pa.Schema]) -> None:
    """Write the file without rows that tells readers of a day's folder all its columns."""
    schema = union_schema(kind, schemas)
    write_part(path, iter(()), kind, schema, 0)


def swap(built: Path, path: Path, on_step: Step) -> None:
    """Exchange the live day for another version of it and delete the old one."""
    exchange(built, path)
    on_step("day swapped")
    remove_leftover(built)  # holds the old version now
    on_step("old day removed")


def keep_rejects(path: Path, rejects: Iterable[str], quarantine: Quarantine) -> None:
    """Keep under a second name what the next version of the day will not contain.

    Args:
        rejects: names of damaged files; a sealed day has one file, which any name stands for.
    """
    names = set(rejects)
    if path.is_file() and names:
        quarantine.keep_file(path)
    elif path.is_dir():
        names.update(entry.name for entry in path.iterdir() if not is_own_file(entry.name))
        for name in sorted(names):
            if (path / name).is_file():
                quarantine.keep_file(path / name)


def hidden_name(path: Path) -> Path:
    """Return a name for the next version of a day; what a crash leaves there is removed."""
    return path.with_name(f".{path.name}{NEW_MARK}{secrets.token_hex(4)}")


def _update(part: OpenPart, rows: pa.Table, kind: TableKind) -> Iterator[pa.Table]:
    for old in part.tables():
        hit = has_key(rows, old, kind)
        yield merge([old, choose(rows, hit)], kind) if hit.any() else old


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or a durable copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        fsync_file(target)


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
            if not self.path(day).is_dir():  # sealed, or in an archived month
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
                remove_leftover(aside)
        for built in self._folder.glob(f"{days}{NEW_MARK}*"):
            remove_leftover(built)
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
        is_fresh, touched = self._sort_out(snapshot.parts, table, facts)
        if not touched and not is_fresh.any():
            return False  # a pure repetition
        with DayBuild(path, self._kind, snapshot, self._quarantine, self._step) as build:
            for part in snapshot.parts:
                if part in touched:
                    build.rewrite(part, choose(table, touched[part]))
                else:
                    build.keep(part)
            if is_fresh.any():
                build.add(choose(table, is_fresh), number)
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

    def forget(self, day: date, drops: Drops) -> None:
        """Write the day's parts without the rows of some servers; a day that has no other rows goes."""
        snapshot = open_day(self._folder, self._kind, day)
        hit = [part for part in snapshot.parts if holds_forgotten(part, self._kind, drops)]
        with DayBuild(self.path(day), self._kind, snapshot, self._quarantine, self._step) as build:
            for part in snapshot.parts:
                if part in hit:
                    build.forget(part, drops)
                else:
                    build.keep(part)
        self._facts.pop(day, None)
        if not part_names(self.path(day)):
            self.remove(day)

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
        remove_leftover(doomed)
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

    def _sort_out(
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
            if is_known.any() and self._changes(part, choose(table, is_known), facts):
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
            if hit.any() and not _holds_all(old, merge([old, choose(rows, hit)], self._kind)):
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
        self._facts.setdefault(day, {})[PartName(number, len(table))] = facts
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
