"""What happens to days after rows arrived: compaction, sealing, means of bins, expiry, forgotten servers.

Owns: when each is due, and the child process (`python -m fleetcast.storage.upkeep`, low priority; its
memory goes back to the system when it ends) that seals, or takes means: all parts of a day that is over
become one sorted, compressed Parquet file, and a sealed day without means of its bins gets them.
Does not know: the log, how a sealed file takes the day's place, what is in a file of means (`bin_days`).
Not thread safe: the caller holds the store's structure lock.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

from fleetcast.clock import DAY_MS, monotonic, to_ms
from fleetcast.errors import FleetcastError
from fleetcast.files import publish, remove_leftover, set_aside
from fleetcast.program import child_environment
from fleetcast.storage.bin_days import lacks_bins, make_bins, open_bins, sealed_file
from fleetcast.storage.days import (
    Drops,
    day_path,
    day_start_ms,
    folder_bytes,
    holds_forgotten,
    list_days,
    month_path,
    open_day,
    part_names,
    without_forgotten,
)
from fleetcast.storage.parts import OpenPart, PartName, write_part
from fleetcast.storage.reader import merge_sources
from fleetcast.storage.tables import BINS, METRICS, PREDICTIONS, TableKind, fill, in_pieces, union_schema
from fleetcast.storage.writer import NEW_MARK, DayWriter, Step, hidden_name

logger = logging.getLogger(__name__)

NICE = 10
TIMEOUT_S = 1800.0
_LOOK_S = 0.2  # of one look for days that hold forgotten servers
_GROUP_ROWS = 131_072  # rows of a row group, cut between servers
_BINS_TASK = "bins-"


@dataclass(frozen=True, slots=True)
class Sealed:
    """A finished file and the parts it was made of."""

    path: Path
    parts: tuple[PartName, ...]  # unreadable ones included
    rejects: tuple[str, ...]  # names of parts that could not be read completely
    n_rows: int


class DayProcess:
    """The child that makes one file of one day; `is_running` never waits."""

    PROGRAM = "fleetcast.storage.upkeep"

    def __init__(self, folder: Path, task: str, day: date, target: Path, drops: Drops | None = None) -> None:
        """Start it.

        Args:
            task: the name of the kind to seal, or `bins-` and the length of the bins in ms.
            drops: servers whose rows are left out of a sealed file.
        """
        self.day = day
        self.target = target
        self.drops = drops or {}
        self.started_at = monotonic()
        command = [sys.executable, "-m", self.PROGRAM, str(folder), task, day.isoformat(), str(target)]
        self._process = subprocess.Popen(
            [*command, str(os.getpid()), json.dumps(self.drops)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=child_environment(),
        )

    @property
    def is_running(self) -> bool:
        """Whether it still works; one over its time is killed."""
        if self._process.poll() is None and monotonic() - self.started_at > TIMEOUT_S:
            logger.error("killed what took too long for a day day=%s limit_s=%g", self.day, TIMEOUT_S)
            self._process.kill()
        return self._process.poll() is None

    def stop(self) -> None:
        """End it; the day stays as it is."""
        self._process.kill()
        self._process.communicate()
        remove_leftover(self.target)


class SealProcess(DayProcess):
    """The child that seals one day."""

    def result(self) -> Sealed | None:
        """Return what it made, waiting for its end; None if it failed."""
        output, _ = self._process.communicate()
        if self._process.returncode != 0:
            logger.error("sealing failed day=%s exit=%d", self.day, self._process.returncode)
            remove_leftover(self.target)
            return None
        answer = json.loads(output)
        parts = tuple(PartName(number, n_rows) for number, n_rows in answer["parts"])
        return Sealed(self.target, parts, tuple(answer["rejects"]), answer["n_rows"])


class BinsProcess(DayProcess):
    """The child that takes the means of one sealed day."""

    def publish(self, path: Path) -> str:
        """Put what it made at `path`, waiting for its end; return why there is nothing, or ""."""
        output, _ = self._process.communicate()
        if self._process.returncode == 0:
            try:
                if path.is_dir() and not path.is_symlink():
                    set_aside(path, "a folder where a file of means belongs")
                publish(self.target, path)
                return ""
            except OSError as error:
                output = str(error).encode()
        remove_leftover(self.target)
        return output.decode(errors="replace").strip() or f"exit {self._process.returncode}"


def seal(folder: Path, kind_name: str, day: date, target: Path, drops: Drops | None = None) -> Sealed:
    """Write the day's parts, merged and without what is in `drops`, as one file and read it back."""
    kind = {kind.name: kind for kind in (METRICS, PREDICTIONS)}[kind_name]
    snapshot = open_day(folder, kind, day)
    schema = union_schema(kind, [part.schema for part in snapshot.parts])
    tables = without_forgotten(merge_sources(snapshot.parts, [], kind, None, _GROUP_ROWS), kind, drops or {})
    number = max((part.number for part in snapshot.parts), default=0)
    pieces = in_pieces((fill(table, schema) for table in tables), _GROUP_ROWS // 2)
    n_rows = write_part(target, pieces, kind, schema, number, is_sealed=True)
    written = OpenPart(target, None, kind)
    n_read = sum(len(table) for table in written.tables())
    if n_read != n_rows or written.n_damaged_groups:
        raise OSError(f"{target} does not read back: wrote {n_rows} rows, read {n_read}")
    names = {part: PartName(part.number, part.n_rows) for part in snapshot.parts}
    hurt = [names[part].text for part in snapshot.parts if part.n_damaged_groups]
    damaged = [name for text in snapshot.damaged if (name := PartName.parse(text)) is not None]
    return Sealed(target, tuple(sorted([*names.values(), *damaged])), (*snapshot.damaged, *hurt), n_rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Seal one day, or take its means: folder, task, day, target, owner's pid, forgotten servers as JSON."""
    folder, task, day, target, owner, drops = sys.argv[1:] if argv is None else argv
    os.nice(NICE)
    answer: dict[str, Any] = {}
    is_seal = not task.startswith(_BINS_TASK)  # the owner says what hinders the others, once
    try:
        if not is_seal:
            bin_ms = int(task.removeprefix(_BINS_TASK))
            answer["n_rows"] = make_bins(Path(folder), date.fromisoformat(day), bin_ms, Path(target))
        else:
            sealed = seal(Path(folder), task, date.fromisoformat(day), Path(target), json.loads(drops))
            names = [[name.number, name.n_rows] for name in sealed.parts]
            answer = {"parts": names, "rejects": sealed.rejects, "n_rows": sealed.n_rows}
    except (FleetcastError, OSError) as error:
        print(f"sealing {task} {day}: {error}" if is_seal else error, file=sys.stderr if is_seal else None)
        remove_leftover(Path(target))
        return 1
    return hand_over(Path(target), answer, int(owner))


def hand_over(target: Path, answer: object, owner: int) -> int:
    """Tell the owner what its child made, where it still lives; return the child's exit code."""
    if os.getppid() != owner:  # it died and cannot take this file
        remove_leftover(target)
        return 1
    print(json.dumps(answer))
    return 0


SEAL_GRACE = timedelta(minutes=10)  # by the owner's clock: time for late rows


Unit = tuple[date | None, list[date]]  # what goes together: a day, or an archived month with its days


@dataclass(frozen=True, slots=True)
class UpkeepPace:
    """Wall times between the steps, how many parts a day may have, and whether it keeps means."""

    compact_parts: int = 60
    compact_interval_s: float = 3600.0
    seal_quiet_s: float = 60.0  # without a new part, before a day is sealed
    reseal_quiet_s: float = 600.0  # before another try after a failure
    expire_interval_s: float = 60.0
    archive_interval_s: float = 3600.0  # between two looks for a month to archive
    bin_ms: int = 0  # length of the bins of which sealed days of records keep the means; 0: none


@dataclass(slots=True)
class OpenDay:
    """What is remembered of a day that is a folder of parts; times are wall seconds."""

    changed_at: float
    compacted_at: float
    n_new_parts: int = 0
    seal_after: float = 0.0


class DayUpkeep:
    """Keeps the days of one kind few in files and within the retention."""

    def __init__(
        self,
        folder: Path,
        writer: DayWriter,
        kind: TableKind,
        expiry: Callable[[datetime], list[tuple[Unit, str]]],
        pace: UpkeepPace,
        settle: Callable[[], None],
        on_step: Step,
    ) -> None:
        """Remember what to keep; `expiry` says what is to be deleted, the oldest first, and why.

        `settle` is called before parts lose the numbers of their segments.
        """
        self._folder = folder
        self._writer = writer
        self._kind = kind
        self._expiry = expiry
        self._pace = pace
        self._settle = settle
        self._step = on_step
        self._means = MeansUpkeep(folder, pace, on_step) if kind is METRICS else None
        self._open_days: dict[date, OpenDay] = {}
        self._sealer: SealProcess | None = None
        self._expire_at = 0.0
        self._drops: Drops = {}
        self._free: set[date] = set()  # days known to have no row of `_drops`
        self._forget_at = 0.0

    def load(self) -> None:
        """Note the days that are folders of parts."""
        now = monotonic()
        for day in list_days(self._folder, self._kind):
            path = self._writer.path(day)
            if path.is_dir():
                self._open_days[day] = OpenDay(now, now, len(part_names(path)))
        if self._means:
            self._means.load()

    def note_change(self, day: date) -> None:
        """Note that rows were added to a day."""
        now = monotonic()
        state = self._open_days.setdefault(day, OpenDay(now, now))
        state.changed_at = now
        state.n_new_parts += 1

    def run(self, now: datetime, *, expires: bool) -> None:
        """Do what is due; `now` is the owner's clock."""
        self._compact_due()
        self._seal_due(now)
        if self._means and self._sealer is None:
            self._means.run()
        if expires and monotonic() >= self._expire_at:
            self._expire_at = monotonic() + self._pace.expire_interval_s
            self._expire(now)

    def stop(self) -> None:
        """End a running sealing; its day stays as it is."""
        if self._sealer is not None:
            self._sealer.stop()
            self._sealer = None
        if self._means:
            self._means.stop()

    def look_at_means(self, day: date) -> None:
        """Take the means of a day of a month anew where the month was written without some of its rows."""
        if self._means:
            self._means.remove_stale(day)
            self._means.want(day)

    def _compact_due(self) -> None:
        now = monotonic()
        for day, state in self._open_days.items():
            if self._sealer is not None and self._sealer.day == day:
                continue
            is_old = state.n_new_parts > 1 and now - state.compacted_at >= self._pace.compact_interval_s
            if is_old or state.n_new_parts >= self._pace.compact_parts:
                self._settle()
                if self._writer.compact(day):
                    logger.info("buffer compacted kind=%s day=%s", self._kind.name, day)
                state.n_new_parts = 0
                state.compacted_at = now

    def _seal_due(self, now: datetime) -> None:
        """Start sealing a day, or take over the finished one."""
        if self._sealer is not None:
            if not self._sealer.is_running:
                process, self._sealer = self._sealer, None
                self._finish_seal(process)
        elif (day := self.day_to_seal(now)) is not None:
            self._start_seal(day, {})

    def day_to_seal(self, now: datetime) -> date | None:
        """Return the oldest day that is over and quiet, None while one is being sealed."""
        if self._sealer is not None:
            return None
        wall, over_ms = monotonic(), to_ms(now - SEAL_GRACE)
        for day, state in sorted(self._open_days.items()):
            is_over = day_start_ms(day) + DAY_MS <= over_ms
            if is_over and wall >= max(state.changed_at + self._pace.seal_quiet_s, state.seal_after):
                return day
        return None

    def _start_seal(self, day: date, drops: Drops) -> None:
        self._settle()
        target = hidden_name(self._writer.path(day))
        self._sealer = SealProcess(self._folder, self._kind.name, day, target, drops)
        self._step("seal started")

    def _finish_seal(self, process: SealProcess) -> None:
        state = self._open_days.get(process.day)  # None: a sealed day, written again
        path = self._writer.path(process.day)
        if state:
            state.seal_after = monotonic() + self._pace.reseal_quiet_s
        sealed = process.result()
        if sealed is None:
            self._forget_at = monotonic() + self._pace.seal_quiet_s
            return
        has_changed = state is not None and state.changed_at >= process.started_at
        if has_changed or (path.is_dir() and list(sealed.parts) != part_names(path)):
            remove_leftover(sealed.path)  # late rows came meanwhile: it lacks them
            return
        if not sealed.n_rows:
            remove_leftover(sealed.path)
            self._remove(process.day, "only forgotten servers were in it")
            return
        self._writer.put_sealed(process.day, sealed.path, sealed.rejects)
        self._open_days.pop(process.day, None)
        if self._means:
            self._means.want(process.day)
        size = folder_bytes(path)
        name = self._kind.name
        logger.info(
            "buffer sealed kind=%s day=%s rows=%d size_bytes=%d", name, process.day, sealed.n_rows, size
        )

    def forget(self, drops: Drops, now: datetime) -> bool:
        """Write one more day without the rows of some servers; return whether no day has any.

        Args:
            drops: their names, each with the time before which rows go; the same until True is returned.
            now: the owner's clock; a day that is over is written by a child, which also seals it.
        """
        if drops != self._drops:
            self._drops, self._free = dict(drops), set()
        if self._sealer is not None:
            self._seal_due(now)
            return False
        if monotonic() < self._forget_at:
            return False
        until = monotonic() + _LOOK_S
        for day in list_days(self._folder, self._kind):
            if day in self._free or day_start_ms(day) >= max(drops.values(), default=0):
                continue
            if not self._writer.path(day).exists():  # in a month, which is written again as a whole
                continue
            if monotonic() > until:
                return False
            parts = open_day(self._folder, self._kind, day).parts
            if any(holds_forgotten(part, self._kind, drops) for part in parts):
                self._write_without(day, now)
                return False
            if self._means:
                self._means.remove_stale(day)
            self._free.add(day)
        return True

    def _write_without(self, day: date, now: datetime) -> None:
        is_over = day_start_ms(day) + DAY_MS <= to_ms(now - SEAL_GRACE)
        if is_over or day not in self._open_days:
            self._start_seal(day, self._drops)
            return
        self._settle()
        self._writer.forget(day, self._drops)
        if not self._writer.path(day).exists():
            del self._open_days[day]
            if self._means:
                self._means.remove(day)
        logger.info("buffer rewritten without forgotten servers kind=%s day=%s", self._kind.name, day)

    def _expire(self, now: datetime) -> None:
        for (month, days), why in self._expiry(now):
            if month:  # first: without a day's own file its older version in the month would be seen
                remove_leftover(month_path(self._folder, self._kind, month))
                self._step("month removed")
            for day in days:
                self._remove(day, why)

    def _remove(self, day: date, why: str) -> None:
        if self._sealer is not None and self._sealer.day == day:
            self.stop()
        self._writer.remove(day)
        self._step("day removed")
        if self._means:
            self._means.remove(day)
        self._open_days.pop(day, None)
        logger.info("buffer expired kind=%s day=%s why=%s", self._kind.name, day, why)


class MeansUpkeep:
    """Sees to it that every sealed day of records has the means of its bins, the newest days first.

    One child at a time, begun where nothing is being sealed; no sealing waits for it. What fails is said
    once, and tried again later; readers take the records meanwhile.
    """

    def __init__(self, folder: Path, pace: UpkeepPace, on_step: Step) -> None:
        self._folder = folder
        self._bin_ms = pace.bin_ms
        self._pace = pace
        self._step = on_step
        self._wanted: list[date] = []  # sealed days to look at, the next one last
        self._process: BinsProcess | None = None
        self._wait_until = 0.0
        self._said = ""  # why the last one failed

    def load(self) -> None:
        """Remove what a crash left, and want the means of every sealed day."""
        for built in self._folder.glob(f".{BINS.name}_*.parquet{NEW_MARK}*"):
            remove_leftover(built)
        days = list_days(self._folder, METRICS)
        for day in set(list_days(self._folder, BINS)).difference(days):
            self.remove(day)
        self._wanted = [day for day in days if not day_path(self._folder, METRICS, day).is_dir()]

    def want(self, day: date) -> None:
        """Look at a day next, because it was sealed."""
        self._wanted = [*(other for other in self._wanted if other != day), day]

    def run(self) -> None:
        """Start on one day, or take over what was made of it."""
        if self._process is not None:
            if not self._process.is_running:
                process, self._process = self._process, None
                self._finish(process)
            return
        if self._bin_ms and self._wanted and monotonic() >= self._wait_until:
            day = self._wanted.pop()
            if lacks_bins(self._folder, day, self._bin_ms):
                target = hidden_name(day_path(self._folder, BINS, day))
                self._process = BinsProcess(self._folder, f"{_BINS_TASK}{self._bin_ms}", day, target)
                self._step("means started")

    def stop(self) -> None:
        """End a running child."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def remove(self, day: date) -> None:
        """Delete the means of a day that is no more."""
        if self._process is not None and self._process.day == day:
            self.stop()
        self._wanted = [other for other in self._wanted if other != day]
        remove_leftover(day_path(self._folder, BINS, day))
        self._step("means removed")

    def remove_stale(self, day: date) -> None:
        """Delete means that are not those of the day as it is: they may hold servers that were forgotten."""
        if self._process is not None and self._process.day == day:
            self.stop()  # it may have begun before the day was written again
            self.want(day)
        sealed = sealed_file(self._folder, day)
        if sealed is None or open_bins(self._folder, day, sealed, self._bin_ms) is None:
            remove_leftover(day_path(self._folder, BINS, day))

    def _finish(self, process: BinsProcess) -> None:
        path = day_path(self._folder, BINS, process.day)
        failure = process.publish(path)
        self._step("means published")
        if not failure:
            self._said = ""
            logger.info("buffer took means day=%s size_bytes=%d", process.day, folder_bytes(path))
            return
        if not self._said:
            logger.warning(
                "no means of bins are kept for now, the records are read instead day=%s why=%s",
                *(process.day, failure),
            )
        self._said = failure
        self._wait_until = monotonic() + self._pace.reseal_quiet_s
        self._wanted.insert(0, process.day)


if __name__ == "__main__":
    raise SystemExit(main())
