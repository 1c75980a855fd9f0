"""What is kept for how long: days when the setting shrinks, and months as one file each.

Owns: `retention.json` in the buffer's folder (format 1): the limits in force, and since when smaller ones
wait, as the old limit still holds for a day; which days and months are too old; when a month becomes one
file, the child (`python -m fleetcast.storage.retention`) that writes it and compares it with its days, and
the order in which it takes their place. Does not know: how a day is sealed or deleted (`upkeep`), how the
days of a month are read (`days`).
"""

import json
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fleetcast.clock import BIN_EPOCH, iso_z, monotonic, parse_plain_utc, to_ms
from fleetcast.errors import CorruptFile, FleetcastError
from fleetcast.files import publish, read_json, remove_leftover, write_json
from fleetcast.settings import BufferSettings
from fleetcast.storage.bin_days import sealed_file
from fleetcast.storage.days import (
    DAYS_NOTE,
    Drops,
    MonthFile,
    day_path,
    day_start_ms,
    folder_bytes,
    holds_forgotten,
    list_days,
    list_months,
    month_path,
    open_month,
    split_by_day,
    without_forgotten,
)
from fleetcast.storage.parts import READ_ERRORS, OpenPart, write_month
from fleetcast.storage.reader import merge_sources
from fleetcast.storage.tables import (
    BINS,
    METRICS,
    NUMBER,
    TableKind,
    fill,
    floats,
    in_pieces,
    times_ms,
    union_schema,
)
from fleetcast.storage.upkeep import NICE, DayProcess, Unit, hand_over
from fleetcast.storage.writer import DayWriter, Step, hidden_name

logger = logging.getLogger(__name__)

FILE = "retention.json"
GRACE = timedelta(days=1)
Limits = tuple[int, int]  # days, MB (0: no limit)


class Retention:
    """The limits in force: a mistyped setting deletes nothing before a day is over. Not thread safe."""

    def __init__(self, folder: Path, settings: BufferSettings) -> None:
        """Remember the limits that are wanted."""
        self._path = folder / FILE
        self._wanted: Limits = (settings.retention_days, settings.retention_max_mb)
        self._in_force: Limits | None = None
        self._since: datetime | None = None
        self.notice = ""  # what is going to be deleted, and when

    def limits(self, now: datetime) -> Limits:
        """Return the days and MB to keep at `now`; larger limits hold at once, smaller ones after a day."""
        if self._in_force is None:
            self._in_force = self._load()
        if not _shrinks(self._in_force, self._wanted):
            self._put_in_force()
        elif self._since is None:
            self._begin(now)
        elif not timedelta() <= now - self._since < GRACE:
            if now < self._since:  # the clock stepped back: the day counts anew
                self._begin(now)
            else:
                logger.warning("the smaller retention holds from now on: %s", self._words())
                self._put_in_force()
        return self._in_force

    def expiry(self, folder: Path, kind: TableKind, now: datetime) -> list[tuple[Unit, str]]:
        """Return what is to be deleted, the oldest first, and why; the newest day always stays."""
        keep_days, max_mb = self.limits(now)
        oldest = (now - timedelta(days=keep_days)).date()
        units = _units(folder, kind)
        found = [(unit, "older than the retention") for unit in units if unit[1][-1] < oldest]
        if not max_mb:
            return found
        rest = [unit for unit in units if unit[1][-1] >= oldest]
        sizes = [_bytes_of(folder, kind, unit) for unit in rest]
        excess = sum(sizes) - max_mb * 1_000_000
        for unit, size in list(zip(rest, sizes, strict=True))[:-1]:
            if excess <= 0:
                break
            found.append((unit, "more bytes than retention_max_mb"))
            excess -= size
        return found

    def _begin(self, now: datetime) -> None:
        self._since = now
        self._tell()
        logger.warning("%s", self.notice)
        self._save()

    def _put_in_force(self) -> None:
        is_new = self._in_force != self._wanted or self._since is not None or not self._path.exists()
        self._in_force, self._since, self.notice = self._wanted, None, ""
        if is_new:
            self._save()

    def _load(self) -> Limits:
        """Return what was in force; where that is unknown, the defaults may have been."""
        default = BufferSettings()
        unknown = max(default.retention_days, self._wanted[0]), default.retention_max_mb
        try:
            said = read_json(self._path)
            in_force, wanted = _limits(said["in_force"]), said["wanted"] and _limits(said["wanted"])
            if wanted == self._wanted and said["since"]:
                self._since = parse_plain_utc(said["since"])
                self._in_force = in_force
                self._tell()
            return in_force
        except FileNotFoundError:
            return unknown
        except (CorruptFile, OSError, KeyError, TypeError, ValueError, FleetcastError) as error:
            logger.warning("cannot read the retention in force, counting a day anew error=%s", error)
            self._since = None
            return unknown

    def _save(self) -> None:
        since = self._since
        said: dict[str, Any] = {
            "format": 1,
            "in_force": _as_table(self._in_force or self._wanted),
            "wanted": _as_table(self._wanted) if since else None,
            "since": iso_z(since) if since else None,
        }
        try:
            write_json(self._path, said)
        except FleetcastError as error:  # a restart then counts the day anew, and deletes later
            logger.error("cannot note the retention in force error=%s", error)

    def _tell(self) -> None:
        assert self._since is not None
        self.notice = (
            f"The retention shrinks: {self._words()}; what is older is deleted from "
            f"{iso_z(self._since + GRACE)} on, unless the setting goes back."
        )

    def _words(self) -> str:
        names = ("buffer.retention_days", "buffer.retention_max_mb")
        pairs = zip(names, self._in_force or self._wanted, self._wanted, strict=True)
        return ", ".join(f"{name} {old} to {new}" for name, old, new in pairs if old != new)


def _units(folder: Path, kind: TableKind) -> list[Unit]:
    """Return the days, those of an archived month together, the oldest first."""
    months = list_months(folder, kind)
    days_of: dict[tuple[date | None, date], list[date]] = {}
    for day in list_days(folder, kind):
        month = day.replace(day=1)
        days_of.setdefault((month, month) if month in months else (None, day), []).append(day)
    return [(month, days) for (month, _), days in days_of.items()]


def _bytes_of(folder: Path, kind: TableKind, unit: Unit) -> int:
    month, days = unit
    paths = [day_path(folder, kind, day) for day in days]
    paths += [day_path(folder, BINS, day) for day in days] if kind is METRICS else []
    return sum(map(folder_bytes, [*paths, *([month_path(folder, kind, month)] if month else [])]))


def _shrinks(old: Limits, new: Limits) -> bool:
    days, size = new[0] < old[0], bool(new[1]) and (old[1] == 0 or new[1] < old[1])
    return days or size


def _as_table(limits: Limits) -> dict[str, int]:
    return {"retention_days": limits[0], "retention_max_mb": limits[1]}


def _limits(said: dict[str, Any]) -> Limits:
    return int(said["retention_days"]), int(said["retention_max_mb"])


_ARCHIVE_GROUP_ROWS = 131_072  # rows of a row group of a month, cut between servers


def archive(folder: Path, month: date, target: Path, drops: Drops) -> dict[str, Any]:
    """Write the days of a month as one file, without what is in `drops`, and compare it with them.

    Sealed days of their own, and days of the month as it was that have no file of their own, are taken in.

    Returns:
        `of`: the seal of the month as it was; `absorbed`: the seals of the days' own files; `n_rows`.
    Raises:
        CorruptFile: something could not be read, or does not read back.
        StorageFull, StorageBroken: nothing is left at `target`.
    """
    path = month_path(folder, METRICS, month)
    old = open_month(path, METRICS)
    if old is None and path.exists():
        raise CorruptFile(path, "not a month of ours; move it away")
    days = [day for day in list_days(folder, METRICS) if day.replace(day=1) == month]
    own = {day: part for day in days if (part := _own_file(folder, day)) is not None}
    apart = {day for day in days if day_path(folder, METRICS, day).exists()}
    parts = [*own.values(), *([old.others(apart)] if old else [])]
    facts = {day: (part.number, part.n_rows, part.seal) for day, part in own.items()}
    for day, rows in (old.days if old else {}).items():
        if day not in apart:
            facts[day] = (rows.number, rows.n_rows, rows.seal)
    schema = union_schema(METRICS, [part.schema for part in parts])

    def pieces() -> Iterator[pa.Table]:
        merged = merge_sources(parts, [], METRICS, None, _ARCHIVE_GROUP_ROWS)
        kept = without_forgotten(merged, METRICS, drops)
        return in_pieces((fill(table, schema) for table in kept), _ARCHIVE_GROUP_ROWS // 2)

    content = _DaysOf(facts)
    number = max((part.number for part in parts), default=0)
    n_rows = write_month(target, content.note(pieces()), METRICS, schema, number, content.notes)
    _compare(target, pieces(), n_rows)
    if any(part.n_damaged_groups for part in parts):
        raise CorruptFile(path, "a day of it is damaged, its days stay as they are")
    absorbed = {day.isoformat(): part.seal for day, part in own.items()}
    return {"of": old.part.seal if old else "", "absorbed": absorbed, "n_rows": n_rows}


def _own_file(folder: Path, day: date) -> OpenPart | None:
    """Return the sealed file of a day that is not only in its month."""
    return sealed_file(folder, day) if day_path(folder, METRICS, day).is_file() else None


class _DaysOf:
    """What a month says of its days, counted while its rows are written."""

    def __init__(self, facts: Mapping[date, tuple[int, int, str]]) -> None:
        self._facts = facts  # of each day as it was: number, rows, seal
        self._rows: dict[date, list[int]] = {}  # rows, oldest and newest time

    def note(self, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """Yield the tables and count their rows."""
        for table in tables:
            for day, rows in split_by_day(table, METRICS).items():
                times = times_ms(rows, METRICS.time_column)
                n_rows, oldest, newest = self._rows.get(day, [0, int(times[0]), int(times[0])])
                edges = min(oldest, int(times.min())), max(newest, int(times.max()))
                self._rows[day] = [n_rows + len(rows), *edges]
            yield table

    def notes(self) -> dict[str, str]:
        """Return the note; a day with fewer rows than before has another seal."""
        said = {}
        for day, (n_rows, oldest, newest) in sorted(self._rows.items()):
            number, n_before, seal = self._facts[day]
            own = seal if n_rows == n_before else secrets.token_hex(16)
            said[day.isoformat()] = [number, n_rows, oldest, newest, own]
        return {DAYS_NOTE: json.dumps(said)}


def _compare(target: Path, expected: Iterator[pa.Table], n_rows: int) -> None:
    """Make sure that a file holds exactly these tables, bit for bit, one a row group."""
    written = MonthFile(target, METRICS)
    n_same = 0
    for found, table in zip(written.part.tables(), expected, strict=False):
        is_same = found.column_names == table.column_names and len(found) == len(table)
        n_same += len(table) if is_same and all(map(_is_same, found.columns, table.columns)) else 0
    if n_same != n_rows or sum(facts.n_rows for facts in written.days.values()) != n_rows:
        raise CorruptFile(target, f"does not read back: {n_same} of {n_rows} rows are those of the days")


def _is_same(found: pa.ChunkedArray, column: pa.ChunkedArray) -> bool:
    if found.type == NUMBER:
        is_alike: bool = (floats(found).view(np.int64) == floats(column).view(np.int64)).all()
        return is_alike and found.null_count == column.null_count
    plain = pa.string() if pa.types.is_dictionary(found.type) else found.type
    return bool(found.cast(plain).equals(column.cast(plain)))


class ArchiveProcess(DayProcess):
    """The child that writes one month."""

    PROGRAM = "fleetcast.storage.retention"

    def result(self) -> dict[str, Any] | None:
        """Return what it says of the finished file, waiting for its end; None if it failed."""
        output, _ = self._process.communicate()
        if self._process.returncode != 0:
            logger.error("archiving failed month=%s exit=%d", f"{self.day:%Y-%m}", self._process.returncode)
            remove_leftover(self.target)
            return None
        answer: dict[str, Any] = json.loads(output)
        return answer


class MonthsUpkeep:
    """Sees to it that months become one file each, and that none holds a forgotten server.

    A month is published before its days' own files go. Until then both are there, and the day's own file
    wins; after a crash between the two, `load` ends it.
    """

    def __init__(
        self,
        folder: Path,
        writer: DayWriter,
        after_days: int,
        interval_s: float,
        on_step: Step,
        on_change: Callable[[date], None],
    ) -> None:
        """Remember what to keep.

        Args:
            after_days: age of the newest day of a month that becomes one file; 0: none does.
            on_change: told of each day of a month that is without some servers now.
        """
        self._folder = folder
        self._writer = writer
        self._after = timedelta(days=after_days)
        self._interval_s = interval_s
        self._step = on_step
        self._on_change = on_change
        self._process: ArchiveProcess | None = None
        self._drops: Drops = {}
        self._wait_until = 0.0
        self._free: set[tuple[date, str]] = set()  # months, with seals, known to have no row of `_drops`

    def load(self) -> None:
        """Delete the days' own files that a crash left beside the same in their month."""
        for month in list_months(self._folder, METRICS):
            opened = open_month(month_path(self._folder, METRICS, month), METRICS)
            for day, facts in (opened.days if opened else {}).items():
                own = _own_file(self._folder, day)
                if own is not None and own.seal == facts.seal:
                    self._writer.remove(day)

    def run(self, now: datetime) -> None:
        """Start on a month that is due, or take over the finished one."""
        if self._process is not None:
            if not self._process.is_running:
                process, self._process = self._process, None
                self._finish(process)
        elif self._after and monotonic() >= self._wait_until:
            self._wait_until = monotonic() + self._interval_s
            if (month := self._due(now)) is not None:
                self._start(month, {})

    def _due(self, now: datetime) -> date | None:
        """Return the oldest month that is old enough and has days of their own, all sealed."""
        days_of: dict[date, list[date]] = {}
        for day in list_days(self._folder, METRICS):
            days_of.setdefault(day.replace(day=1), []).append(day)
        for month, days in days_of.items():
            end = (month + timedelta(days=31)).replace(day=1)
            is_old = day_start_ms(end) <= to_ms(now - self._after)
            is_open = any(day_path(self._folder, METRICS, day).is_dir() for day in days)
            if is_old and not is_open and any(_own_file(self._folder, day) for day in days):
                return month
        return None

    def forget(self, drops: Drops) -> bool:
        """Write one more month without the rows of some servers; return whether no month has any."""
        if self._process is not None:
            self.run(BIN_EPOCH)  # takes over what is finished
            return False
        if drops != self._drops:
            self._drops, self._free = dict(drops), set()
        for month in list_months(self._folder, METRICS):
            opened = open_month(month_path(self._folder, METRICS, month), METRICS)
            if opened is None or (month, opened.part.seal) in self._free:
                continue
            if holds_forgotten(opened.part, METRICS, drops):
                self._start(month, drops)
                return False
            for day in opened.days:  # a crash may have come between the month and its means
                self._on_change(day)
            self._free.add((month, opened.part.seal))
        return True

    def stop(self) -> None:
        """End a running child; its month stays as it is."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def _start(self, month: date, drops: Drops) -> None:
        target = hidden_name(month_path(self._folder, METRICS, month))
        self._process = ArchiveProcess(self._folder, METRICS.name, month, target, drops)
        self._step("archive started")

    def _finish(self, process: ArchiveProcess) -> None:
        answer = process.result()
        if answer is None:
            return
        month, path = process.day, month_path(self._folder, METRICS, process.day)
        old = open_month(path, METRICS)
        absorbed = {date.fromisoformat(day): seal for day, seal in answer["absorbed"].items()}
        own = {day: part.seal for day in absorbed if (part := _own_file(self._folder, day)) is not None}
        if (old.part.seal if old else "") != answer["of"] or own != absorbed:
            remove_leftover(process.target)  # something changed meanwhile: it lacks that
            return
        if answer["n_rows"]:
            publish(process.target, path)
        else:
            remove_leftover(process.target)
            remove_leftover(path)
        self._step("month published")
        for day in absorbed:
            self._writer.remove(day)
            self._step("archived day removed")
        if not answer["n_rows"]:
            for day in [*(old.days if old else ()), *absorbed]:
                self._on_change(day)
        logger.info(
            "buffer archived month=%s days=%d rows=%d size_bytes=%d",
            *(f"{month:%Y-%m}", len(absorbed), answer["n_rows"], folder_bytes(path)),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Archive one month: folder, kind, its first day, target, owner's pid, forgotten servers as JSON."""
    folder, _, month, target, owner, drops = sys.argv[1:] if argv is None else argv
    os.nice(NICE)
    try:
        answer = archive(Path(folder), date.fromisoformat(month), Path(target), json.loads(drops))
    except (FleetcastError, *READ_ERRORS) as error:
        print(f"archiving {month}: {error}", file=sys.stderr)
        remove_leftover(Path(target))
        return 1
    return hand_over(Path(target), answer, int(owner))


if __name__ == "__main__":
    raise SystemExit(main())
