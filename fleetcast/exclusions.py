"""Servers that people left out, or want forgotten: two files in the checkpoints' folder.

Owns: the files, who may be in them, and noticing that they changed. An excluded server's records are kept,
and nothing is made of them: no forecast, no drift, no training, no mean of the fleet. When it is included
again, its past is all there. A server that is to be forgotten is left out in the same way until everything
known of it is gone; then its name is free. Does not know: who leaves it out of what (`storage/store.py`,
`serving/roster.py`), who removes what (`serving/forgetting.py`, the retraining daemon).

`excluded_servers.json` (format 1): `servers` by name, each with `at`, `by` and `reason`.
`forgotten_servers.json` (format 1): the same, and how far it is: `before` (records from before this time go;
the inference daemon sets it when it begins), `records_gone` and `drift_gone` (when each daemon had done its
part).
Entries stay as a record of who had what removed, the newest 10,000. A program that changes a file holds
`excluded_servers.lock`, so orders work with both daemons down; the daemons look at each cycle.
A file that cannot be read changes nothing: what was known before holds, and the log says so.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fleetcast.clock import iso_z, parse_plain_utc, to_ms
from fleetcast.errors import BadOrder, CorruptFile, UnknownFormat
from fleetcast.files import read_json, write_json
from fleetcast.locks import OwnerLock

logger = logging.getLogger(__name__)

FILE_NAME, LOCK_NAME = "excluded_servers.json", "excluded_servers.lock"
FORGOTTEN_NAME = "forgotten_servers.json"
FORMAT = 1
MOST = 10_000
MAX_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Forgotten:
    """One server that a person wants forgotten, and how far that is; times are ISO 8601, UTC."""

    at: str
    by: str
    reason: str
    before: str | None = None  # records from before this time go
    records_gone: str | None = None
    drift_gone: str | None = None

    @property
    def before_ms(self) -> int:
        """Return the time from which on its records count again."""
        return to_ms(parse_plain_utc(self.before or self.at))


class AllBut:
    """The names of all servers but these, where only these are read."""

    def __init__(self, names: Collection[str]) -> None:
        """Take the names."""
        self._names = frozenset(names)

    def __contains__(self, name: object) -> bool:
        """Whether a server is none of them."""
        return name not in self._names


class Exclusions:
    """The names in force for one process; `look` and `names` are safe from any thread."""

    def __init__(self, checkpoint_dir: str | Path) -> None:
        """Read the files, where there are any."""
        self.folder = Path(checkpoint_dir)
        self._seen: tuple[tuple[int, ...] | None, ...] = ()
        self._names: frozenset[str] = frozenset()
        self._forgotten: dict[str, Forgotten] = {}
        self.look()

    def __call__(self) -> frozenset[str]:
        """Return the names as of the last look: excluded servers, and those that are being forgotten."""
        return self._names

    def forgotten(self) -> Mapping[str, Forgotten]:
        """Return every server that people wanted forgotten, as of the last look."""
        return self._forgotten

    def being_forgotten(self) -> dict[str, Forgotten]:
        """Return those of them whose records are not gone yet, in the order of the orders."""
        waiting = [(entry.at, name) for name, entry in self._forgotten.items() if not entry.records_gone]
        return {name: self._forgotten[name] for _, name in sorted(waiting)}

    def look(self) -> bool:
        """Read the files again if they changed; return whether other names are in force, or more is gone."""
        seen = tuple(_signature(self.folder / name) for name in (FILE_NAME, FORGOTTEN_NAME))
        if seen == self._seen:
            return False
        self._seen = seen
        before, gone = self._names, self._gone()
        try:
            excluded, self._forgotten = read(self.folder), read_forgotten(self.folder)
        except (CorruptFile, OSError) as error:
            logger.warning("the list of excluded servers cannot be read, the last one holds error=%s", error)
            return False
        self._names = frozenset(excluded).union(self.being_forgotten())
        if self._names != before:
            logger.info("excluded servers n=%d n_before=%d", len(self._names), len(before))
        return self._names != before or self._gone() != gone

    def _gone(self) -> set[tuple[str, str | None]]:
        return {(name, one.records_gone) for name, one in self._forgotten.items() if one.records_gone}


def _signature(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def read(checkpoint_dir: Path) -> dict[str, dict[str, Any]]:
    """Return the excluded servers, each with `at`, `by` and `reason`; none where there is no file.

    Raises:
        CorruptFile, UnknownFormat: the file is not one of ours.
    """
    return _read(checkpoint_dir / FILE_NAME, "move it away to exclude none")


def read_forgotten(checkpoint_dir: Path) -> dict[str, Forgotten]:
    """Return the servers that people wanted forgotten; none where there is no file. Raises as `read` does."""
    path = checkpoint_dir / FORGOTTEN_NAME
    raw = _read(path, "move it away: what is not forgotten yet stays")
    try:
        found = {name: Forgotten(**entry) for name, entry in raw.items()}
        for one in found.values():  # what is no time raises
            parse_plain_utc(one.at)
            parse_plain_utc(one.before or one.at)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CorruptFile(path, f"an entry of another form: {error}") from error
    return found


def _read(path: Path, hint: str) -> dict[str, dict[str, Any]]:
    try:
        found = read_json(path, MAX_BYTES)
    except FileNotFoundError:
        return {}
    servers = found.get("servers")
    if found.get("format") != FORMAT:
        raise UnknownFormat(path, f"format {found.get('format')!r}", hint=f"this program reads {FORMAT}")
    if not isinstance(servers, dict) or not all(isinstance(entry, dict) for entry in servers.values()):
        raise CorruptFile(path, "servers is no object of objects", hint=hint)
    return servers


def exclude(checkpoint_dir: Path, names: Sequence[str], entry: Mapping[str, str], now: datetime) -> list[str]:
    """Write servers down as excluded; return those that were not before.

    Args:
        entry: `by` and `reason`.
    Raises:
        BadOrder: there would be too many.
        AlreadyRunning: another command writes the file at this moment.
        CorruptFile, StorageFull, StorageBroken: nothing was changed.
    """
    checkpoint_dir.mkdir(parents=True, exist_ok=True)
    with OwnerLock(checkpoint_dir / LOCK_NAME, "the list of excluded servers"):
        servers = read(checkpoint_dir)
        fresh = [name for name in dict.fromkeys(names) if name not in servers]
        if len(servers) + len(fresh) > MOST:
            raise BadOrder(f"at most {MOST} servers can be excluded, {len(servers)} are")
        servers |= {name: {"at": iso_z(now), **entry} for name in fresh}
        write_json(checkpoint_dir / FILE_NAME, {"format": FORMAT, "servers": servers})
    return fresh


def include(checkpoint_dir: Path, names: Sequence[str]) -> list[str]:
    """Take servers off the list; return those that were on it. Raises as `exclude` does."""
    if not (checkpoint_dir / FILE_NAME).exists():
        return []
    with OwnerLock(checkpoint_dir / LOCK_NAME, "the list of excluded servers"):
        servers = read(checkpoint_dir)
        back = [name for name in dict.fromkeys(names) if servers.pop(name, None) is not None]
        write_json(checkpoint_dir / FILE_NAME, {"format": FORMAT, "servers": servers})
    return back


def forget(
    checkpoint_dir: Path, names: Sequence[str], entry: Mapping[str, str], now: datetime
) -> dict[str, Forgotten]:
    """Write down that servers are to be forgotten; return each with its entry, one that waits as it is.

    Args:
        entry: `by` and `reason`.
    Raises:
        BadOrder: there would be too many that wait. The others as `exclude` does.
    """
    checkpoint_dir.mkdir(parents=True, exist_ok=True)
    with OwnerLock(checkpoint_dir / LOCK_NAME, "the list of excluded servers"):
        known = read_forgotten(checkpoint_dir)
        waiting = {name for name, one in known.items() if not one.records_gone}
        fresh = {name: Forgotten(iso_z(now), **entry) for name in names if name not in waiting}
        if len(waiting) + len(fresh) > MOST:
            raise BadOrder(f"at most {MOST} servers can wait to be forgotten, {len(waiting)} do")
        known = {name: one for name, one in known.items() if name not in fresh} | fresh  # newest last
        _write_forgotten(checkpoint_dir, known)
    return {name: known[name] for name in names}


def note_forgotten(checkpoint_dir: Path, done: Mapping[str, Forgotten], **stamps: str) -> None:
    """Note how far the forgetting of some servers is; one ordered anew meanwhile is left alone.

    With `records_gone` their exclusion ends, too: the name is free. Raises as `exclude` does.
    """
    with OwnerLock(checkpoint_dir / LOCK_NAME, "the list of excluded servers"):
        known = read_forgotten(checkpoint_dir)
        same = {name: known[name] for name, one in done.items() if name in known and known[name].at == one.at}
        if "records_gone" in stamps:
            _end_exclusions(checkpoint_dir, same)
        _write_forgotten(checkpoint_dir, known | {name: replace(one, **stamps) for name, one in same.items()})


def _end_exclusions(checkpoint_dir: Path, forgotten: Mapping[str, Forgotten]) -> None:
    excluded = read(checkpoint_dir)
    left = {
        name: one
        for name, one in excluded.items()
        if name not in forgotten or str(one.get("at", "")) > forgotten[name].at
    }
    if left != excluded:
        write_json(checkpoint_dir / FILE_NAME, {"format": FORMAT, "servers": left})


def _write_forgotten(checkpoint_dir: Path, servers: Mapping[str, Forgotten]) -> None:
    """Write the list without the oldest entries that are done and too many."""
    excess = len(servers) - MOST
    done: Collection[str] = [name for name, one in servers.items() if one.records_gone][: max(0, excess)]
    kept = {name: asdict(one) for name, one in servers.items() if name not in set(done)}
    write_json(checkpoint_dir / FORGOTTEN_NAME, {"format": FORMAT, "servers": kept})
