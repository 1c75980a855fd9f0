"""The quarantine: damaged bytes and foreign files are kept, bounded, for people to look at.

Owns: `data_buffer/quarantine/`, how much it may hold and what goes first. Does not know: what is damaged,
or why. No program reads it back.
"""

import logging
import os
import secrets
import shutil
from pathlib import Path

from fleetcast.files import fsync_dir

logger = logging.getLogger(__name__)

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
