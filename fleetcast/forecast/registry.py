"""Model versions on disk: folders, checksums, which may serve, the baseline in force, pruning.

    <checkpoints>/last.ckpt     -> versions/<id>/model.ckpt     replaced by rename, never written through
    <checkpoints>/previous.ckpt -> versions/<id>/model.ckpt     what a rollback puts back
    <checkpoints>/baseline.npz  -> versions/<id>/baseline.npz   moves with a rejected challenger, too
    <checkpoints>/versions/<id>/model.ckpt, baseline.npz, reference.npz, manifest.json   immutable once named
    <checkpoints>/rollbacks.jsonl                               versions taken out of service by hand
    <checkpoints>/attempts/<id>.json                            how each trainer process ended

manifest.json (format 1): id, created_at, parent, promoted, files {name: sha256}, and what the
trainer adds: data_range, metrics, verdict, settings, schema.

Owns: this layout and its order of writing: nothing half-written ever has a public name.
Reading takes no lock. The trainer adds and prunes versions, under `trainer.lock`; `promotion/desk`
moves what is in service, under `promotion.lock`. The shipped base (`models/`, the same layout) is only
read. Does not know: what a model is (no torch here), how the trainer's process ended
(`retraining/attempts`), who may move what, and why (`promotion/`).
"""

import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fleetcast import files, locks
from fleetcast.clock import iso_z, parse_plain_utc, to_ms
from fleetcast.errors import BadCheckpoint, CorruptFile

logger = logging.getLogger(__name__)

FORMAT = 1
VERSIONS_FOLDER = "versions"
MODEL_FILE = "model.ckpt"
BASELINE_FILE = "baseline.npz"
REFERENCE_FILE = "reference.npz"
PROMOTED_BASELINE_FILE = "baseline_promoted.npz"  # of a version that waits: the errors to expect of it
MANIFEST_FILE = "manifest.json"
LAST_LINK = "last.ckpt"
PREVIOUS_LINK = "previous.ckpt"
BASELINE_LINK = "baseline.npz"
TRAINER_LOCK = "trainer.lock"
ATTEMPT_LOCK = "attempt.lock"
RUNS_FOLDER = "runs"  # output and end of each attempt's processes
ORDERS_FOLDER = "orders"  # what people ask for, one file each
PROMOTION_LOCK = "promotion.lock"
_LOCKED_FOLDERS = {  # what the holder of a lock writes
    TRAINER_LOCK: VERSIONS_FOLDER,
    ATTEMPT_LOCK: RUNS_FOLDER,
    PROMOTION_LOCK: ORDERS_FOLDER,
}
_ROLLBACKS = "rollbacks.jsonl"
_ROLLBACKS_MAX_BYTES = 1_000_000
ATTEMPTS_FOLDER = "attempts"
VERSION_FILE_MAX_BYTES = 2**29  # a model of the widest network with all its specialists has 150 MB
MANIFEST_MAX_BYTES = 2**24

OnProblem = Callable[[BadCheckpoint], None]


def lock_of(checkpoint_dir: Path, name: str, what: str) -> locks.OwnerLock:
    """Return the lock of this name: on its file and on the folder that only it writes."""
    return locks.OwnerLock(checkpoint_dir / name, what, checkpoint_dir / _LOCKED_FOLDERS[name])


def lock_paths(checkpoint_dir: Path, name: str) -> tuple[Path, Path]:
    """Return what the holder of a lock has locked, for `is_locked`."""
    return checkpoint_dir / name, checkpoint_dir / _LOCKED_FOLDERS[name]


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
    baseline_name: str = BASELINE_FILE

    @property
    def model_path(self) -> Path:
        """Return the path of the weights and their configuration."""
        return self.folder / MODEL_FILE

    @property
    def baseline_path(self) -> Path:
        """Return the path of the baseline saved with it."""
        return self.folder / self.baseline_name

    @property
    def reference_path(self) -> Path:
        """Return the path of the drift reference saved with it; older versions have none."""
        return self.folder / REFERENCE_FILE

    @property
    def is_promoted(self) -> bool:
        """Whether its training put it into service."""
        return bool(self.manifest.get("promoted"))

    @property
    def has_passed_gate(self) -> bool:
        """Whether the gate let it through; a hold may still have kept it out of service."""
        return self.is_promoted or bool(self.manifest.get("passed_gate"))

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
        return self._data_ms("end")

    def _data_ms(self, side: str) -> int | None:
        data_range = self.manifest.get("data_range")
        text = data_range.get(side) if isinstance(data_range, dict) else None
        return to_ms(parse_plain_utc(text)) if isinstance(text, str) else None

    @property
    def data_start_ms(self) -> int | None:
        """Return the start of the oldest bin it was trained on, in data time."""
        return self._data_ms("start")

    @property
    def n_specialist_series(self) -> int:
        """Return how many series have weights of their own, by the manifest."""
        return sum(len(series) for series in self.manifest.get("specialists") or ())

    def verify(self, name: str = MODEL_FILE) -> None:
        """Compare one file's bytes with the sha256 in the manifest.

        Raises:
            BadCheckpoint: the file is missing or its bytes are not what was written.
        """
        path, digest = self.folder / name, str(self.manifest["files"].get(name))
        try:
            found = hashlib.sha256(files.read_regular(path, VERSION_FILE_MAX_BYTES)).hexdigest()
        except OSError as error:
            raise BadCheckpoint(path, f"cannot be read: {error.strerror}") from error
        except CorruptFile as error:
            raise BadCheckpoint(path, error.why) from error
        if found != digest:
            raise BadCheckpoint(path, f"sha256 is {found[:12]}.., the manifest says {digest[:12]}..")


class Registry:
    """The versions of one checkpoint folder, and the base shipped with the program."""

    def __init__(self, checkpoint_dir: Path, models_dir: Path | None = None) -> None:
        self.folder = checkpoint_dir
        self._models_dir = models_dir

    def describe(self) -> str:
        """Name the folders for people."""
        return " or ".join(str(folder) for folder in (self.folder, self._models_dir) if folder)

    def current_id(self) -> str | None:
        """Return the version `last.ckpt` points to, cheaply and without checking it."""
        return _linked_id(self.folder / LAST_LINK, MODEL_FILE)

    def previous_id(self) -> str | None:
        """Return the version `previous.ckpt` points to: the one a rollback puts back."""
        return _linked_id(self.folder / PREVIOUS_LINK, MODEL_FILE)

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

        Versions that the gate rejected, that wait for a person, or that were rolled back are left out.
        Damaged ones are skipped and go to `on_problem` (default: a warning in the log).
        """
        report = on_problem or _log_problem
        current, others = self.current_id(), []
        in_service = {current, self.previous_id()}
        try:
            if current is None and _exists(self.folder / LAST_LINK):
                report(BadCheckpoint(self.folder / LAST_LINK, "not a link to versions/<id>/model.ckpt"))
            left_out = {current, *self.rolled_back_ids()}
            others = [item for item in reversed(self.version_ids()) if item not in left_out]
        except OSError as error:
            report(BadCheckpoint(self.folder, f"cannot be read: {error.strerror}"))
        for version_id in [current, *others] if current else others:
            version = _read_intact(self.folder, version_id, report, is_base=False)
            if version and (version.is_promoted or version_id in in_service):
                yield version
        base = self.base(report)
        if base:
            yield base

    def base(self, on_problem: OnProblem | None = None) -> Version | None:
        """Return the shipped base model, if there is an intact one."""
        if self._models_dir is None:
            return None
        report = on_problem or _log_problem
        try:
            linked = _linked_id(self._models_dir / LAST_LINK, MODEL_FILE)
            found = [linked] if linked else _version_ids(self._models_dir)[-1:]
        except OSError as error:
            report(BadCheckpoint(self._models_dir, f"cannot be read: {error.strerror}"))
            return None
        return _read_intact(self._models_dir, found[0], report, is_base=True) if found else None

    def version_ids(self) -> list[str]:
        """Return the ids of all versions, oldest first."""
        return _version_ids(self.folder)

    def baseline_in_force(self) -> Version | None:
        """Return the version whose baseline drift is measured against, or None.

        Raises:
            BadCheckpoint: `baseline.npz` leads nowhere, or its bytes are not what was written.
        """
        for name in (BASELINE_FILE, PROMOTED_BASELINE_FILE):
            version_id = _linked_id(self.folder / BASELINE_LINK, name)
            if version_id is not None:
                version = replace(self.version(version_id), baseline_name=name)
                version.verify(name)
                return version
        return None

    def rolled_back_ids(self) -> set[str]:
        """Return the versions that were taken out of service and not put back by a person."""
        try:
            lines = list(files.read_json_lines(self.folder / _ROLLBACKS))
        except (CorruptFile, OSError) as error:
            logger.warning("the list of rolled-back versions cannot be read: %s", error)
            return set()
        found: set[str] = set()
        for line in lines:
            if isinstance(line.get("from"), str):
                found.add(line["from"])
            found.discard(line.get("returned"))
        return found

    # The rest writes: the caller holds trainer.lock to add and prune, promotion.lock to move a link.

    def add(self, version_id: str, contents: Mapping[str, bytes], manifest: Mapping[str, Any]) -> Version:
        """Write one version: all of it beside, then one rename.

        Args:
            contents: bytes by file name, `model.ckpt` and `baseline.npz` among them.
            manifest: `created_at`, `parent`, `promoted` and whatever else describes it.
        """
        versions = self.folder / VERSIONS_FOLDER
        versions.mkdir(parents=True, exist_ok=True)
        files.remove_stale_temps(versions)
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

    def set_previous(self, version_id: str | None) -> None:
        """Name the version that a rollback puts back, as one rename of `previous.ckpt`; None: none."""
        link = self.folder / PREVIOUS_LINK
        if version_id is not None:
            files.link_atomic(f"{VERSIONS_FOLDER}/{version_id}/{MODEL_FILE}", link)
        elif _exists(link):
            files.remove_leftover(link)

    def set_baseline(self, version_id: str, name: str = BASELINE_FILE) -> None:
        """Put a version's baseline in force, as one rename of `baseline.npz`."""
        files.link_atomic(f"{VERSIONS_FOLDER}/{version_id}/{name}", self.folder / BASELINE_LINK)

    def use_promoted_baseline(self, version_id: str) -> None:
        """Let a version that waited bring the errors to expect of it along, if its baseline is in force."""
        is_in_force = _linked_id(self.folder / BASELINE_LINK, BASELINE_FILE) == version_id
        if is_in_force and (self.folder / VERSIONS_FOLDER / version_id / PROMOTED_BASELINE_FILE).exists():
            self.set_baseline(version_id, PROMOTED_BASELINE_FILE)

    def note_rollback(self, taken_out: str, put_back: str, at: datetime) -> None:
        """Write down that a version was taken out of service: it is no fall-back any more."""
        if taken_out not in self.rolled_back_ids():
            self._append({"from": taken_out, "to": put_back, "at": iso_z(at)})

    def note_return(self, version_id: str, at: datetime) -> None:
        """Write down that a person put a version back that was rolled back."""
        if version_id in self.rolled_back_ids():
            self._append({"returned": version_id, "at": iso_z(at)})

    def _append(self, content: Mapping[str, Any]) -> None:
        files.append_line(self.folder / _ROLLBACKS, json.dumps(content), max_bytes=_ROLLBACKS_MAX_BYTES)

    def prune(self, keep: int, besides: Container[str] = ()) -> list[str]:
        """Delete old versions; return their ids.

        Kept are the newest `keep`, the champion, the version a rollback would put back, the baseline in
        force, and those of `besides`. A version loses its name in one rename before its files go, so a
        kill leaves it whole or as a leftover that the next `add` sweeps.
        """
        current, link = self.current_id(), self.folder / BASELINE_LINK
        baselines = [_linked_id(link, name) for name in (BASELINE_FILE, PROMOTED_BASELINE_FILE)]
        previous = self.previous_id() or (next(self.earlier(current), None) if current else None)
        kept = {*self.version_ids()[-keep:], current, previous, *baselines}
        versions = self.folder / VERSIONS_FOLDER
        pruned = [item for item in self.version_ids() if item not in kept and item not in besides]
        for version_id in pruned:
            files.publish(versions / version_id, files.temp_beside(versions / version_id))
        if pruned:
            files.remove_stale_temps(versions)
        return pruned

    def earlier(self, current: str) -> Iterator[str]:
        """Yield what an older release would roll back to: the parent, then every older promoted version.

        Only for a folder without a record of what was in service before.
        """
        older = [item for item in reversed(self.version_ids()) if item < current]
        with_parent = [_parent_id(self.folder, current), *older]
        skipped = {current, *self.rolled_back_ids()}
        for version_id in dict.fromkeys(item for item in with_parent if item in older):
            if version_id in skipped:
                continue
            version = _read_intact(self.folder, version_id, _log_problem, is_base=False)
            if version and version.is_promoted:
                yield version_id


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
    try:
        names = [item.name for item in (folder / VERSIONS_FOLDER).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if not name.startswith("."))


def _read_version(folder: Path, version_id: str, *, is_base: bool) -> Version:
    """Return one version, its manifest read.

    Raises:
        BadCheckpoint: there is no such version, or its manifest cannot be read.
    """
    path = folder / VERSIONS_FOLDER / version_id / MANIFEST_FILE
    try:
        manifest = files.read_json(path, MANIFEST_MAX_BYTES)
    except CorruptFile as error:
        raise BadCheckpoint(path, f"no readable manifest: {error.why}") from error
    except OSError as error:
        raise BadCheckpoint(path, f"no readable manifest: {error.strerror}") from error
    if manifest.get("format") != FORMAT:
        raise BadCheckpoint(path, f"manifest format {manifest.get('format')!r}", hint=f"expected {FORMAT}")
    digests, made = manifest.get("files"), manifest.get("created_at")
    if not isinstance(digests, dict) or MODEL_FILE not in digests or not _is_time(made):
        raise BadCheckpoint(path, "manifest lacks files or created_at")
    if wrong := _find_wrong_field(manifest):
        raise BadCheckpoint(path, f"manifest field {wrong} is not of its kind")
    return Version(version_id, path.parent, manifest, is_base)


def _find_wrong_field(manifest: Mapping[str, Any]) -> str:
    """Return the first field of another kind than `tft_trainer.py` writes, "" where all are sound."""
    data_range = manifest.get("data_range")
    end = data_range.get("end") if isinstance(data_range, dict) else None
    kinds: dict[str, bool] = {
        "promoted": isinstance(manifest.get("promoted"), bool | None),
        "parent": isinstance(manifest.get("parent"), str | None),
        "data_range": data_range is None or isinstance(data_range, dict),
        "data_range.end": end is None or _is_time(end),
        "specialists": _are_specialists(manifest.get("specialists")),
        "files": all(isinstance(digest, str) for digest in manifest["files"].values()),
    }
    return next((name for name, is_sound in kinds.items() if not is_sound), "")


def _are_specialists(listed: object) -> bool:
    """Whether it lists, per specialist, its series as [server, metric] and whatever follows them."""
    return listed is None or (
        isinstance(listed, list)
        and all(
            isinstance(series, list) and all(isinstance(pair, list) and len(pair) >= 2 for pair in series)
            for series in listed
        )
    )


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
