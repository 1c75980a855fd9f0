"""Model versions on disk: what serves, what else could, which baseline is in force.

    <checkpoints>/last.ckpt     -> versions/<id>/model.ckpt     replaced by rename, never written through
    <checkpoints>/baseline.npz  -> versions/<id>/baseline.npz   moves with a rejected candidate, too
    <checkpoints>/versions/<id>/model.ckpt, baseline.npz, reference.npz, manifest.json   immutable once named
    <checkpoints>/rollbacks.jsonl                               versions taken out of service by hand

Owns: this layout and its order of writing: nothing half-written ever has a public name.
Reading takes no lock. Writing is the trainer's, under `trainer.lock`; the shipped base
(`models/`, the same layout) is only read. Does not know: what a model is (no torch here).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fleetcast import files
from fleetcast.clock import iso_z
from fleetcast.errors import BadCheckpoint, FleetcastError
from fleetcast.forecast.versions import (
    BASELINE_FILE,
    FORMAT,
    MANIFEST_FILE,
    MODEL_FILE,
    VERSIONS_FOLDER,
    OnProblem,
    Version,
    exists,
    intact_version,
    linked_id,
    log_problem,
    parent_id,
    read_version,
    version_ids,
)

LAST_LINK = "last.ckpt"
BASELINE_LINK = "baseline.npz"
TRAINER_LOCK = "trainer.lock"
ATTEMPT_LOCK = "attempt.lock"
_ROLLBACKS = "rollbacks.jsonl"
_ROLLBACKS_MAX_BYTES = 1_000_000


class Registry:
    """The versions of one checkpoint folder, and the base shipped with the program."""

    def __init__(self, checkpoint_dir: Path, models_dir: Path | None = None) -> None:
        self.folder = checkpoint_dir
        self._models_dir = models_dir

    def current_id(self) -> str | None:
        """Return the version `last.ckpt` points to, cheaply and without checking it."""
        return linked_id(self.folder / LAST_LINK, MODEL_FILE)

    def version(self, version_id: str) -> Version:
        """Return one version of the checkpoint folder.

        Raises:
            BadCheckpoint: there is no such version, or its manifest cannot be read.
        """
        return read_version(self.folder, version_id, is_base=False)

    def current(self) -> Version | None:
        """Return the version in service, or None when nothing was promoted yet.

        Raises:
            BadCheckpoint: `last.ckpt` leads nowhere.
        """
        version_id = self.current_id()
        return None if version_id is None else self.version(version_id)

    def candidates(self, on_problem: OnProblem | None = None) -> Iterator[Version]:
        """Yield the intact versions that may serve: current, then the newest, then the base.

        Versions the gate rejected and versions rolled back are left out. What had to be passed
        over goes to `on_problem` (default: a warning in the log).
        """
        report = on_problem or log_problem
        current = self.current_id()
        if current is None and exists(self.folder / LAST_LINK):
            report(BadCheckpoint(self.folder / LAST_LINK, "not a link to versions/<id>/model.ckpt"))
        others = [
            item for item in reversed(self.version_ids()) if item not in {current, *self._rolled_back()}
        ]
        for version_id in [current, *others] if current else others:
            version = intact_version(self.folder, version_id, report, is_base=False)
            if version and (version.is_promoted or version_id == current):
                yield version
        base = self.base(report)
        if base:
            yield base

    def base(self, on_problem: OnProblem | None = None) -> Version | None:
        """Return the shipped base model, if there is an intact one."""
        if self._models_dir is None:
            return None
        linked = linked_id(self._models_dir / LAST_LINK, MODEL_FILE)
        newest = version_ids(self._models_dir)[-1:]
        for version_id in [linked] if linked else newest:
            return intact_version(self._models_dir, version_id, on_problem or log_problem, is_base=True)
        return None

    def version_ids(self) -> list[str]:
        """Return the ids of all versions, oldest first."""
        return version_ids(self.folder)

    def baseline_in_force(self) -> Version | None:
        """Return the version whose baseline drift is measured against, or None.

        Raises:
            BadCheckpoint: `baseline.npz` leads nowhere, or its bytes are not what was written.
        """
        version_id = linked_id(self.folder / BASELINE_LINK, BASELINE_FILE)
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
        """Put the version that served before the current one back into service.

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

        Kept are the newest `keep`, what serves, what a rollback would put back, and the baseline in
        force. A version loses its name in one rename before its files go, so a kill leaves it
        whole or as a leftover that the next `add` sweeps.
        """
        current = self.current_id()
        previous = next(self._earlier(current), None) if current else None
        baseline = linked_id(self.folder / BASELINE_LINK, BASELINE_FILE)
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
        with_parent = [parent_id(self.folder, current), *older]
        skipped = {current, *self._rolled_back()}
        for version_id in dict.fromkeys(item for item in with_parent if item in older):
            if version_id in skipped:
                continue
            version = intact_version(self.folder, version_id, log_problem, is_base=False)
            if version and version.is_promoted:
                yield version

    def _rolled_back(self) -> set[str]:
        lines = files.read_json_lines(self.folder / _ROLLBACKS)
        return {line["from"] for line in lines if isinstance(line.get("from"), str)}

    def _sweep_leftovers(self, versions: Path) -> None:
        """Delete what was left half written or half deleted; those names are no versions."""
        for folder in versions.glob(f".*{files.TEMP_MARK}*"):
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
