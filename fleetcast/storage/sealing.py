"""Sealing: all parts of a day that is over become one sorted, compressed Parquet file.

Owns: the child process that writes it (run as `python -m fleetcast.storage.sealing`, low priority, its
memory goes back to the system when it ends) and the parent's view of that child.
Does not know: when a day is over, or how the file takes the day's place.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from fleetcast.clock import monotonic
from fleetcast.errors import FleetcastError
from fleetcast.storage.dayfiles import open_day
from fleetcast.storage.dayreader import merge_sources
from fleetcast.storage.days import OpenPart, PartName, write_part
from fleetcast.storage.tables import METRICS, PREDICTIONS, union_schema

logger = logging.getLogger(__name__)

NICE = 10
TIMEOUT_S = 1800.0
_GROUP_ROWS = 131_072  # rows of a row group, cut between servers
_PACKAGE_FOLDER = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Sealed:
    """A finished file and the parts it was made of."""

    path: Path
    parts: tuple[PartName, ...]  # unreadable ones included
    rejects: tuple[str, ...]  # names of parts that could not be read completely
    n_rows: int


class SealProcess:
    """The child that seals one day; `poll` never waits."""

    def __init__(self, folder: Path, kind_name: str, day: date, target: Path) -> None:
        self.day = day
        self._target = target
        self.started_at = monotonic()
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(_PACKAGE_FOLDER), *filter(None, [environment.get("PYTHONPATH")])]
        )
        command = [sys.executable, "-m", __name__, str(folder), kind_name, day.isoformat(), str(target)]
        self._process = subprocess.Popen(
            [*command, str(os.getpid())], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment
        )

    @property
    def is_running(self) -> bool:
        """Whether it still works; one over its time is killed."""
        if self._process.poll() is None and monotonic() - self.started_at > TIMEOUT_S:
            logger.error("killed a sealing that took too long day=%s limit_s=%g", self.day, TIMEOUT_S)
            self._process.kill()
        return self._process.poll() is None

    def result(self) -> Sealed | None:
        """Return what it made, waiting for its end; None if it failed."""
        output, _ = self._process.communicate()
        if self._process.returncode != 0:
            logger.error("sealing failed day=%s exit=%d", self.day, self._process.returncode)
            self._target.unlink(missing_ok=True)
            return None
        answer = json.loads(output)
        parts = tuple(PartName(number, n_rows) for number, n_rows in answer["parts"])
        return Sealed(self._target, parts, tuple(answer["rejects"]), answer["n_rows"])

    def stop(self) -> None:
        """End it; the day stays as it is."""
        self._process.kill()
        self._process.communicate()
        self._target.unlink(missing_ok=True)


def seal(folder: Path, kind_name: str, day: date, target: Path) -> Sealed:
    """Write the day's parts, merged, as one file at `target` and read it back."""
    kind = {kind.name: kind for kind in (METRICS, PREDICTIONS)}[kind_name]
    snapshot = open_day(folder, kind, day)
    schema = union_schema(kind, [part.schema for part in snapshot.parts])
    tables = merge_sources(snapshot.parts, [], kind, None, _GROUP_ROWS)
    number = max((part.number for part in snapshot.parts), default=0)
    n_rows = write_part(target, tables, kind, schema, number, is_sealed=True)
    written = OpenPart(target, None, kind)
    n_read = sum(len(table) for table in written.tables())
    if n_read != n_rows or written.n_damaged_groups:
        raise OSError(f"{target} does not read back: wrote {n_rows} rows, read {n_read}")
    names = {part: PartName(part.number, part.n_rows) for part in snapshot.parts}
    hurt = [names[part].text for part in snapshot.parts if part.n_damaged_groups]
    damaged = [name for text in snapshot.damaged if (name := PartName.parse(text)) is not None]
    return Sealed(target, tuple(sorted([*names.values(), *damaged])), (*snapshot.damaged, *hurt), n_rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Seal one day: folder, kind, day, target, pid of the owner."""
    folder, kind_name, day, target, owner = sys.argv[1:] if argv is None else argv
    os.nice(NICE)
    try:
        sealed = seal(Path(folder), kind_name, date.fromisoformat(day), Path(target))
    except (FleetcastError, OSError) as error:
        print(f"sealing {kind_name} {day}: {error}", file=sys.stderr)
        Path(target).unlink(missing_ok=True)
        return 1
    if os.getppid() != int(owner):  # the owner died: nobody will take this file
        sealed.path.unlink(missing_ok=True)
        return 1
    names = [[name.number, name.n_rows] for name in sealed.parts]
    print(json.dumps({"parts": names, "rejects": sealed.rejects, "n_rows": sealed.n_rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
