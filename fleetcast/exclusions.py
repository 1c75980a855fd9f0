"""Servers that people left out: `excluded_servers.json` in the checkpoints' folder.

Owns: the file, who may be in it, and noticing that it changed. An excluded server's records are kept, and
nothing is made of them: no forecast, no drift, no training, no mean of the fleet. When it is included again,
its past is all there. Does not know: who leaves it out of what (`storage/store.py`, `serving/roster.py`).

The file (format 1): `servers` by name, each with `at`, `by` and `reason`. Only `fleetcast servers` writes
it, under `excluded_servers.lock`, so it works with both daemons down; the daemons look at it at each cycle.
A file that cannot be read changes nothing: the names known before hold, and the log says so.
"""

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fleetcast.clock import iso_z
from fleetcast.errors import BadOrder, CorruptFile, UnknownFormat
from fleetcast.files import read_json, write_json
from fleetcast.locks import OwnerLock

logger = logging.getLogger(__name__)

FILE_NAME, LOCK_NAME = "excluded_servers.json", "excluded_servers.lock"
FORMAT = 1
MOST = 10_000
MAX_BYTES = 8 * 2**20


class Exclusions:
    """The names in force for one process; `look` and `names` are safe from any thread."""

    def __init__(self, checkpoint_dir: str | Path) -> None:
        """Read the file, where there is one."""
        self._path = Path(checkpoint_dir) / FILE_NAME
        self._seen: tuple[int, ...] | None = None
        self._names: frozenset[str] = frozenset()
        self.look()

    def __call__(self) -> frozenset[str]:
        """Return the names as of the last look."""
        return self._names

    def look(self) -> bool:
        """Read the file again if it changed; return whether other names are in force now."""
        seen = _signature(self._path)
        if seen == self._seen:
            return False
        self._seen = seen
        before = self._names
        try:
            self._names = frozenset(read(self._path.parent))
        except (CorruptFile, OSError) as error:
            logger.warning("the list of excluded servers cannot be read, the last one holds error=%s", error)
            return False
        if self._names != before:
            logger.info("excluded servers n=%d n_before=%d", len(self._names), len(before))
        return self._names != before


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
    path = checkpoint_dir / FILE_NAME
    try:
        found = read_json(path, MAX_BYTES)
    except FileNotFoundError:
        return {}
    servers = found.get("servers")
    if found.get("format") != FORMAT:
        raise UnknownFormat(path, f"format {found.get('format')!r}", hint=f"this program reads {FORMAT}")
    if not isinstance(servers, dict) or not all(isinstance(entry, dict) for entry in servers.values()):
        raise CorruptFile(path, "servers is no object of objects", hint="move it away to exclude none")
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
