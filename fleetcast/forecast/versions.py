"""One model version on disk: its folder, its manifest, its bytes checked.

    versions/<id>/model.ckpt, baseline.npz, reference.npz, manifest.json   immutable once named

manifest.json (format 1): id, created_at, parent, promoted, files {name: sha256}, and what the
trainer adds: data_range, metrics, verdict, settings, schema.

Owns: reading and verifying a version. Does not know: which one serves (`registry`), what a
model is (no torch here).
"""

import hashlib
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fleetcast import files
from fleetcast.clock import parse_plain_utc, to_ms
from fleetcast.errors import BadCheckpoint, CorruptFile

logger = logging.getLogger(__name__)

FORMAT = 1
VERSIONS_FOLDER = "versions"
MODEL_FILE = "model.ckpt"
BASELINE_FILE = "baseline.npz"
REFERENCE_FILE = "reference.npz"
MANIFEST_FILE = "manifest.json"

OnProblem = Callable[[BadCheckpoint], None]


@dataclass(frozen=True)
class Version:
    """One immutable version: its manifest was read; `verify` checks the bytes."""

    id: str
    folder: Path
    manifest: Mapping[str, Any]
    is_base: bool = False

    @property
    def model_path(self) -> Path:
        """Return the path of the weights and their configuration."""
        return self.folder / MODEL_FILE

    @property
    def baseline_path(self) -> Path:
        """Return the path of the baseline saved with it."""
        return self.folder / BASELINE_FILE

    @property
    def reference_path(self) -> Path:
        """Return the path of the drift reference saved with it; older versions have none."""
        return self.folder / REFERENCE_FILE

    @property
    def is_promoted(self) -> bool:
        """Whether the gate let it into service."""
        return bool(self.manifest.get("promoted"))

    @property
    def parent(self) -> str | None:
        """Return the version its training started from, if any."""
        parent = self.manifest.get("parent")
        return parent if isinstance(parent, str) else None

    @property
    def created_at(self) -> datetime:
        """Return when it was made, by the system's clock."""
        return parse_plain_utc(self.manifest["created_at"])

    @property
    def data_end_ms(self) -> int | None:
        """Return the end of the newest bin it was trained on or judged by, in data time."""
        data_range = self.manifest.get("data_range")
        end = data_range.get("end") if isinstance(data_range, dict) else None
        return to_ms(parse_plain_utc(end)) if isinstance(end, str) else None

    @property
    def n_specialised(self) -> int:
        """Return how many series have weights of their own, by the manifest."""
        listed = self.manifest.get("specialists")
        return sum(len(series) for series in listed) if isinstance(listed, list) else 0

    def verify(self, name: str = MODEL_FILE) -> None:
        """Compare one file's bytes with the sha256 in the manifest.

        Raises:
            BadCheckpoint: the file is missing or its bytes are not what was written.
        """
        path, digest = self.folder / name, str(self.manifest["files"].get(name))
        try:
            found = hashlib.sha256(files.read_regular(path)).hexdigest()
        except OSError as error:
            raise BadCheckpoint(path, f"cannot be read: {error.strerror}") from error
        except CorruptFile as error:
            raise BadCheckpoint(path, "not a regular file") from error
        if found != digest:
            raise BadCheckpoint(path, f"sha256 is {found[:12]}.., the manifest says {digest[:12]}..")


def new_version_id(now: datetime) -> str:
    """Return a fresh id that sorts by time, as `20260115T100005Z-3f2a`."""
    return f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"


def exists(path: Path) -> bool:
    """Return whether there is anything of that name, a dangling link included."""
    return path.is_symlink() or path.exists()


def linked_id(link: Path, file_name: str) -> str | None:
    """Return the version a link of our form points to, or None."""
    try:
        target = link.readlink()
    except OSError:  # no link there, or a plain file somebody put in its place
        return None
    parts = target.parts
    is_ours = len(parts) == 3 and parts[0] == VERSIONS_FOLDER and parts[1] != ".." and parts[2] == file_name
    return parts[1] if is_ours else None


def version_ids(folder: Path) -> list[str]:
    """Return the ids of all versions in a folder, oldest first."""
    versions = folder / VERSIONS_FOLDER
    if not versions.is_dir():
        return []
    return sorted(item.name for item in versions.iterdir() if not item.name.startswith("."))


def read_version(folder: Path, version_id: str, *, is_base: bool) -> Version:
    """Return one version, its manifest read.

    Raises:
        BadCheckpoint: there is no such version, or its manifest cannot be read.
    """
    path = folder / VERSIONS_FOLDER / version_id / MANIFEST_FILE
    try:
        manifest = files.read_json(path)
    except (OSError, CorruptFile) as error:
        raise BadCheckpoint(path, f"no readable manifest: {error}") from error
    if manifest.get("format") != FORMAT:
        raise BadCheckpoint(path, f"manifest format {manifest.get('format')!r}", hint=f"expected {FORMAT}")
    digests, made = manifest.get("files"), manifest.get("created_at")
    if not isinstance(digests, dict) or MODEL_FILE not in digests or not _is_time(made):
        raise BadCheckpoint(path, "manifest lacks files or created_at")
    return Version(version_id, path.parent, manifest, is_base)


def _is_time(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(parse_plain_utc(value))
    except ValueError:
        return False


def intact_version(folder: Path, version_id: str, report: OnProblem, *, is_base: bool) -> Version | None:
    """Return a version whose weights are what was written, or None after reporting why not."""
    try:
        version = read_version(folder, version_id, is_base=is_base)
        version.verify()
    except BadCheckpoint as error:
        report(error)
        return None
    return version


def parent_id(folder: Path, version_id: str) -> str | None:
    """Return what a version was trained from, or None where that cannot be read."""
    try:
        return read_version(folder, version_id, is_base=False).parent
    except BadCheckpoint:
        return None


def log_problem(error: BadCheckpoint) -> None:
    """Log a version that had to be passed over."""
    logger.warning("version passed over reason=%s", error)
