"""What is kept for how long: days when the setting shrinks, and damaged bytes in the quarantine.

Owns: `retention.json` in the buffer's folder (format 1): the limits in force, and since when smaller ones
wait, as the old limit still holds for a day; `data_buffer/quarantine/`, how much it may hold and what goes
first. No program reads the quarantine back: it is for people to look at. Does not know: how a day is
deleted (`upkeep`), what is damaged, or why.
"""

import logging
import os
import secrets
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fleetcast.clock import iso_z, parse_plain_utc
from fleetcast.errors import CorruptFile, FleetcastError
from fleetcast.files import fsync_dir, read_json, write_json
from fleetcast.settings import BufferSettings

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


def _shrinks(old: Limits, new: Limits) -> bool:
    days, size = new[0] < old[0], bool(new[1]) and (old[1] == 0 or new[1] < old[1])
    return days or size


def _as_table(limits: Limits) -> dict[str, int]:
    return {"retention_days": limits[0], "retention_max_mb": limits[1]}


def _limits(said: dict[str, Any]) -> Limits:
    return int(said["retention_days"]), int(said["retention_max_mb"])


MAX_BYTES = 64 * 2**20


class Quarantine:
    """Keeps damaged bytes; beyond `max_bytes` the oldest are deleted.

    Keeping is best effort: a full disk must not stop the repair that it is part of.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self.n_kept = 0

    def keep_bytes(self, name: str, data: bytes) -> None:
        """Keep bytes cut out of a file."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._free_name(name).write_bytes(data[: self._max_bytes])
        except OSError as error:
            logger.error("cannot keep damaged bytes name=%s size_bytes=%d error=%s", name, len(data), error)
        self._note(name, len(data))

    def keep_file(self, path: Path) -> None:
        """Keep a damaged or foreign file under a second name; the caller removes the first."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            target = self._free_name(f"{path.parent.name}.{path.name}")
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)
            fsync_dir(self.folder)
            self._note(path.name, target.stat().st_size)
        except OSError as error:
            logger.error("cannot keep a damaged file path=%s error=%s", path, error)

    def _free_name(self, name: str) -> Path:
        return self.folder / f"{name.lstrip('.')}.{secrets.token_hex(4)}"

    def _note(self, name: str, size_bytes: int) -> None:
        self.n_kept += 1
        logger.warning("quarantined name=%s size_bytes=%d folder=%s", name, size_bytes, self.folder)
        self._stay_bounded()

    def _stay_bounded(self) -> None:
        """Delete the oldest until the rest fits; the newest stays in any case."""
        try:
            kept = sorted(
                (entry.stat().st_ctime_ns, entry) for entry in self.folder.iterdir() if entry.is_file()
            )
            excess = sum(path.stat().st_size for _, path in kept) - self._max_bytes
            for _, path in kept[:-1]:
                if excess <= 0:
                    break
                excess -= path.stat().st_size
                path.unlink()
        except OSError as error:  # a person tidies up meanwhile, or the disk is full
            logger.warning("cannot bound the quarantine folder=%s error=%s", self.folder, error)
