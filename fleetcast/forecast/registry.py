"""Model versions on disk: the champion, what else may serve, the baseline in force, verdicts.

    <checkpoints>/last.ckpt     -> versions/<id>/model.ckpt     replaced by rename, never written through
    <checkpoints>/baseline.npz  -> versions/<id>/baseline.npz   moves with a rejected challenger, too
    <checkpoints>/versions/<id>/model.ckpt, baseline.npz, reference.npz, manifest.json   immutable once named
    <checkpoints>/rollbacks.jsonl                               versions taken out of service by hand
    <checkpoints>/attempts/<id>.json                            how each trainer process ended

manifest.json (format 1): id, created_at, parent, promoted, files {name: sha256}, and what the
trainer adds: data_range, metrics, verdict, settings, schema.

Owns: this layout and its order of writing: nothing half-written ever has a public name.
Reading takes no lock. Only the trainer writes, under `trainer.lock`; the shipped base
(`models/`, the same layout) is only read. Does not know: what a model is (no torch here), how the
trainer's process ended (`retraining/attempts`).
"""

import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fleetcast import files
from fleetcast.clock import from_ms, iso_z, parse_plain_utc, to_ms
from fleetcast.errors import BadCheckpoint, CorruptFile, FleetcastError

logger = logging.getLogger(__name__)

FORMAT = 1
VERSIONS_FOLDER = "versions"
MODEL_FILE = "model.ckpt"
BASELINE_FILE = "baseline.npz"
REFERENCE_FILE = "reference.npz"
MANIFEST_FILE = "manifest.json"
LAST_LINK = "last.ckpt"
BASELINE_LINK = "baseline.npz"
TRAINER_LOCK = "trainer.lock"
ATTEMPT_LOCK = "attempt.lock"
_ROLLBACKS = "rollbacks.jsonl"
_ROLLBACKS_MAX_BYTES = 1_000_000
ATTEMPTS_FOLDER = "attempts"
_ID_TIME = "%Y%m%dT%H%M%SZ"

OnProblem = Callable[[BadCheckpoint], None]


def new_version_id(now: datetime) -> str:
    """Return a fresh id that sorts by time, as `20260115T100005Z-3f2a`."""
    return f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"


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
    def n_specialist_series(self) -> int:
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


class Registry:
    """The versions of one checkpoint folder, and the base shipped with the program."""

    def __init__(self, checkpoint_dir: Path, models_dir: Path | None = None) -> None:
        self.folder = checkpoint_dir
        self._models_dir = models_dir

    def current_id(self) -> str | None:
        """Return the version `last.ckpt` points to, cheaply and without checking it."""
        return _linked_id(self.folder / LAST_LINK, MODEL_FILE)

    def version(self, version_id: str) -> Version:
        """Return one version of the checkpoint folder.

        Raises:
            BadCheckpoint: there is no such version, or its manifest cannot be read.
        """
        return _read_version(self.folder, version_id, is_base=False)

    def current(self) -> Version | None:
        """Return the version in service, or None when nothing was promoted yet.

        Raises:
            BadCheckpoint: `last.ckpt` leads nowhere.
        """
        version_id = self.current_id()
        return None if version_id is None else self.version(version_id)

    def usable_versions(self, on_problem: OnProblem | None = None) -> Iterator[Version]:
        """Yield the intact versions that may serve: current, then the newest, then the base.

        Versions that the gate rejected or an operator rolled back are left out. Damaged ones are
        skipped and go to `on_problem` (default: a warning in the log).
        """
        report = on_problem or _log_problem
        current = self.current_id()
        if current is None and _exists(self.folder / LAST_LINK):
            report(BadCheckpoint(self.folder / LAST_LINK, "not a link to versions/<id>/model.ckpt"))
        others = [
            item for item in reversed(self.version_ids()) if item not in {current, *self._rolled_back_ids()}
        ]
        for version_id in [current, *others] if current else others:
            version = _read_intact(self.folder, version_id, report, is_base=False)
            if version and (version.is_promoted or version_id == current):
                yield version
        base = self.base(report)
        if base:
            yield base

    def base(self, on_problem: OnProblem | None = None) -> Version | None:
        """Return the shipped base model, if there is an intact one."""
        if self._models_dir is None:
            return None
        linked = _linked_id(self._models_dir / LAST_LINK, MODEL_FILE)
        newest = _version_ids(self._models_dir)[-1:]
        for version_id in [linked] if linked else newest:
            return _read_intact(self._models_dir, version_id, on_problem or _log_problem, is_base=True)
        return None

    def version_ids(self) -> list[str]:
        """Return the ids of all versions, oldest first."""
        return _version_ids(self.folder)

    def baseline_in_force(self) -> Version | None:
        """Return the version whose baseline drift is measured against, or None.

        Raises:
            BadCheckpoint: `baseline.npz` leads nowhere, or its bytes are not what was written.
        """
        version_id = _linked_id(self.folder / BASELINE_LINK, BASELINE_FILE)
        if version_id is None:
            return None
        version = self.version(version_id)
        version.verify(BASELINE_FILE)
        return version

    # The rest writes: the caller holds trainer.lock.

    def add(self, version_id: str, contents: Mapping[str, bytes], manifest: Mapping[str, Any]) -> Version:
        """Write one version: all of it beside, then one rename.

        Args:
            contents: bytes by file name, `model.ckpt` and `baseline.npz` among them.
            manifest: `created_at`, `parent`, `promoted` and whatever else describes it.
        """
        versions = self.folder / VERSIONS_FOLDER
        versions.mkdir(parents=True, exist_ok=True)
        self._sweep_leftovers(versions)
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
        folder, final = files.temp_beside(versions / version_id), versions / version_id
        folder.mkdir()
        for name, data in contents.items():
            files.write_atomic(folder / name, data)
        files.write_json(
            folder / MANIFEST_FILE, {"format": FORMAT, "id": version_id, **manifest, "files": digests}
        )
        files.publish(folder, final)
        return self.version(version_id)

    def promote(self, version_id: str) -> None:
        """Put a version into service, as one rename of `last.ckpt`."""
        files.link_atomic(f"{VERSIONS_FOLDER}/{version_id}/{MODEL_FILE}", self.folder / LAST_LINK)

    def set_baseline(self, version_id: str) -> None:
        """Put a version's baseline in force, as one rename of `baseline.npz`."""
        files.link_atomic(f"{VERSIONS_FOLDER}/{version_id}/{BASELINE_FILE}", self.folder / BASELINE_LINK)

    def rollback(self, now: datetime) -> tuple[str, str]:
        """Put the version before the current one back into service.

        The baseline in force stays: it describes the newest data, and moving it back would only
        report the same drift again.

        Returns:
            the version taken out of service and the one put back.
        Raises:
            FleetcastError: there is no intact earlier version.
        """
        current = self.current_id()
        if current is None:
            raise FleetcastError(f"nothing to roll back: {self.folder / LAST_LINK} points to no version")
        for version in self._earlier(current):
            line = json.dumps({"from": current, "to": version.id, "at": iso_z(now)})
            files.append_line(self.folder / _ROLLBACKS, line, max_bytes=_ROLLBACKS_MAX_BYTES)
            self.promote(version.id)
            return current, version.id
        raise FleetcastError(f"nothing to roll back to: no intact promoted version before {current}")

    def prune(self, keep: int) -> list[str]:
        """Delete old versions; return their ids.

        Kept are the newest `keep`, the champion, the version a rollback would put back, and the
        baseline in force. A version loses its name in one rename before its files go, so a kill leaves it
        whole or as a leftover that the next `add` sweeps.
        """
        current = self.current_id()
        previous = next(self._earlier(current), None) if current else None
        baseline = _linked_id(self.folder / BASELINE_LINK, BASELINE_FILE)
        kept = {*self.version_ids()[-keep:], current, baseline, previous.id if previous else None}
        versions = self.folder / VERSIONS_FOLDER
        pruned = [version_id for version_id in self.version_ids() if version_id not in kept]
        for version_id in pruned:
            files.publish(versions / version_id, files.temp_beside(versions / version_id))
        if pruned:
            self._sweep_leftovers(versions)
        return pruned

    def _earlier(self, current: str) -> Iterator[Version]:
        """Yield the parent of `current`, then every older promoted version, newest first."""
        older = [item for item in reversed(self.version_ids()) if item < current]
        with_parent = [_parent_id(self.folder, current), *older]
        skipped = {current, *self._rolled_back_ids()}
        for version_id in dict.fromkeys(item for item in with_parent if item in older):
            if version_id in skipped:
                continue
            version = _read_intact(self.folder, version_id, _log_problem, is_base=False)
            if version and version.is_promoted:
                yield version

    def _rolled_back_ids(self) -> set[str]:
        lines = files.read_json_lines(self.folder / _ROLLBACKS)
        return {line["from"] for line in lines if isinstance(line.get("from"), str)}

    def _sweep_leftovers(self, versions: Path) -> None:
        """Delete half-written and half-deleted folders; their names are no versions."""
        for folder in versions.glob(f".*{files.TEMP_MARK}*"):
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()


def _exists(path: Path) -> bool:
    """Return whether there is anything of that name, a dangling link included."""
    return path.is_symlink() or path.exists()


def _linked_id(link: Path, file_name: str) -> str | None:
    """Return the version a link of our form points to, or None."""
    try:
        target = link.readlink()
    except OSError:  # no link there, or a plain file in its place
        return None
    parts = target.parts
    is_ours = len(parts) == 3 and parts[0] == VERSIONS_FOLDER and parts[1] != ".." and parts[2] == file_name
    return parts[1] if is_ours else None


def _version_ids(folder: Path) -> list[str]:
    """Return the ids of all versions in a folder, oldest first."""
    versions = folder / VERSIONS_FOLDER
    if not versions.is_dir():
        return []
    return sorted(item.name for item in versions.iterdir() if not item.name.startswith("."))


def _read_version(folder: Path, version_id: str, *, is_base: bool) -> Version:
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


def _read_intact(folder: Path, version_id: str, report: OnProblem, *, is_base: bool) -> Version | None:
    """Return a version whose weights are what was written, or None after reporting why not."""
    try:
        version = _read_version(folder, version_id, is_base=is_base)
        version.verify()
    except BadCheckpoint as error:
        report(error)
        return None
    return version


def _parent_id(folder: Path, version_id: str) -> str | None:
    """Return the version that a training started from, None where the manifest is unreadable."""
    try:
        return _read_version(folder, version_id, is_base=False).parent
    except BadCheckpoint:
        return None


def _log_problem(error: BadCheckpoint) -> None:
    """Log why a version was skipped."""
    logger.warning("version skipped reason=%s", error)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a training ended: an attempt that got as far as a challenger."""

    attempt_id: str
    promoted: bool
    version: str
    why: str
    at: datetime
    changed_loss: float | None = None  # on the series that changed, as a share of the champion's


def read_verdict(checkpoint_dir: Path, attempt_id: str) -> Verdict | None:
    """Return the verdict on one attempt; None where there is none, or no challenger was made."""
    path = checkpoint_dir / ATTEMPTS_FOLDER / f"{attempt_id}.json"
    try:
        raw = files.read_json(path)
        promoted, version, why = raw.get("promoted"), raw.get("version"), raw.get("why")
        if not isinstance(promoted, bool) or not isinstance(version, str):
            return None
        changed_loss = _changed_loss(raw.get("figures"))
        return Verdict(attempt_id, promoted, version, str(why or ""), _made_at(path), changed_loss)
    except FileNotFoundError:
        return None
    except (CorruptFile, OSError) as error:
        logger.warning("verdict unreadable error=%s", error)
        return None


def new_verdicts(checkpoint_dir: Path, known: Container[str]) -> Iterator[Verdict]:
    """Yield the verdicts on attempts that are not known, oldest first."""
    for path in sorted((checkpoint_dir / ATTEMPTS_FOLDER).glob("*.json")):
        if path.stem not in known and not path.name.startswith("."):
            verdict = read_verdict(checkpoint_dir, path.stem)
            if verdict is not None:
                yield verdict


def _changed_loss(figures: object) -> float | None:
    changed = figures.get("changed") if isinstance(figures, dict) else None
    ratio = changed.get("ratio") if isinstance(changed, dict) else None
    return float(ratio) if isinstance(ratio, int | float) else None


def _made_at(path: Path) -> datetime:
    """Return when an attempt was made: by its id, which is in the Clock's time, else by its file."""
    try:
        return datetime.strptime(path.stem.split("-")[0], _ID_TIME).replace(tzinfo=UTC)
    except ValueError:
        return from_ms(path.stat().st_mtime_ns // 1_000_000)
