"""A `last.ckpt` that is corrupt, truncated, foreign or malicious, under a running and a starting daemon.

In each case nothing in the file runs, no request fails, the old model or the fallback forecasts,
and the daemon takes up the next good version.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.parts.feed import Fleet, Tally, timed_recovery
from benchmarks.faults.parts.trainings import PREPARED_STEPS, SMALL, prepare
from benchmarks.programs import InferenceDaemon, Program, wait_for
from fleetcast.files import link_atomic, read_json
from fleetcast.forecast.registry import LAST_LINK, Registry
from fleetcast.loop import Stop
from fleetcast.sources.client import RecordSender

TRAINING_LIMIT_S = 180.0


class Malicious:
    """Unpickled by anything that executes code, it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._marker}",)


def _torch_bytes(value: Any) -> bytes:
    import torch

    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def bad_files(good: bytes, marker: Path) -> dict[str, bytes | None]:
    """Return what may lie in the place of a model, by kind; None stands for a pipe without a writer."""
    middle = len(good) // 2
    return {
        "a pipe": None,
        "one bit flipped": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        "truncated": good[:middle],
        "empty": b"",
        "random bytes": bytes(range(256)) * 64,
        "a web page": b"<html><body>404 Not Found</body></html>",
        "a checkpoint of something else": _torch_bytes({"state_dict": {}, "epoch": 3}),
        "a list in a checkpoint": _torch_bytes([1, 2, 3]),
        "a malicious pickle": pickle.dumps(Malicious(marker)),
        "a malicious checkpoint": _torch_bytes({"format": 1, "config": Malicious(marker)}),
    }


def train_once(folder: Path) -> str:
    """Let the retraining daemon train the prepared folder's first model; return its version."""
    program = Program("adaptive_retraining_daemon.py", folder, "--once", "--clock", "data")
    assert program.run(TRAINING_LIMIT_S) == 0, program.output
    version = Registry(folder / "checkpoints").current_id()
    if version is None:  # judged "not better": for this purpose any intact model is good enough
        version = Registry(folder / "checkpoints").version_ids()[-1]
        manifest = folder / "checkpoints" / "versions" / version / "manifest.json"
        manifest.write_text(json.dumps({**read_json(manifest), "promoted": True}))
        Registry(folder / "checkpoints").promote(version)
    return version


class _Stage:
    """A prepared folder with one good version, and a daemon fed bin by bin."""

    def __init__(self, folder: Path) -> None:
        self.fleet = Fleet(n_servers=3)
        self.folder = prepare(folder, self.fleet)
        (self.folder / "fleetcast.toml").write_text(SMALL.split("[retraining]")[0] + "[retraining]\n")
        self.good = train_once(self.folder)
        self.checkpoints = self.folder / "checkpoints"
        self.marker = self.folder / "executed"
        self._step = PREPARED_STEPS

    def feed_a_bin(self, daemon: InferenceDaemon) -> None:
        """Send six minutes: a bin closes, and a reload is noticed."""
        sender = RecordSender(daemon.client, Stop())
        for _ in range(6):
            sender.send(self.fleet.records(self._step))
            self._step += 1
        wait_for("the sweep", lambda: daemon.status()["backlog"] == 0)

    def plant(self, kind: str, data: bytes | None) -> None:
        """Put a version in place whose manifest vouches for the bad bytes, and point to it."""
        version = f"29990101T000000Z-{hashlib.sha256(kind.encode()).hexdigest()[:4]}"
        folder = self.checkpoints / "versions" / version
        shutil.copytree(self.checkpoints / "versions" / self.good, folder)
        manifest = read_json(folder / "manifest.json")
        if data is None:
            (folder / "model.ckpt").unlink()
            os.mkfifo(folder / "model.ckpt")
        else:
            (folder / "model.ckpt").write_bytes(data)
        if data is not None and kind != "one bit flipped":  # who can write files can write a manifest too
            manifest["files"]["model.ckpt"] = hashlib.sha256(data).hexdigest()
        (folder / "manifest.json").write_text(json.dumps({**manifest, "id": version}))
        link_atomic(f"versions/{version}/model.ckpt", self.checkpoints / LAST_LINK)

    def plant_odd(self, make: Callable[[Path], None]) -> None:
        """Put something that is no link of ours where `last.ckpt` should be."""
        link = self.checkpoints / LAST_LINK
        link.unlink(missing_ok=True)
        make(link)

    def mend(self) -> None:
        """Point to the good version again, as a rollback does."""
        link = self.checkpoints / LAST_LINK
        if link.is_dir() and not link.is_symlink():
            link.rmdir()
        else:
            link.unlink(missing_ok=True)
        link_atomic(f"versions/{self.good}/model.ckpt", link)

    def served(self, daemon: InferenceDaemon) -> str | None:
        """Return the version that `/predictions/current` names, after checking every server has one."""
        answer = daemon.client.get("/predictions/current")
        assert len(answer["predictions"]) == self.fleet.n_servers
        assert all(item["forecast"] for item in answer["predictions"].values())
        return answer["model"]["version"] if answer["model"] else None


def odd_links(marker: Path) -> dict[str, Callable[[Path], None]]:
    """Return ways to replace the link itself."""
    malicious = pickle.dumps(Malicious(marker))
    return {
        "a malicious file instead of the link": lambda link: _write(link, malicious),
        "a folder instead of the link": lambda link: link.mkdir(),
        "a link to nowhere": lambda link: link.symlink_to("versions/gone/model.ckpt"),
        "a link to itself": lambda link: link.symlink_to(LAST_LINK),
        "a link out of the folder": lambda link: link.symlink_to("../../../../etc/passwd"),
        "a pipe instead of the link": lambda link: os.mkfifo(link),
    }


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def bad_checkpoints(folder: Path, n_kinds: int | None = None) -> Tally:
    """Plant each kind under a running daemon, then under a starting one."""
    stage = _Stage(folder / "work")
    tally = Tally()
    good = (stage.checkpoints / "versions" / stage.good / "model.ckpt").read_bytes()
    files = list(bad_files(good, stage.marker).items())[-(n_kinds or 99) :]
    links = list(odd_links(stage.marker).items())[: n_kinds or 99]
    with InferenceDaemon(stage.folder, "--clock", "data") as daemon:
        wait_for("the model", lambda: _after_a_bin(stage, daemon) == stage.good)
        for plant in [*(lambda k=k, d=d: stage.plant(k, d) for k, d in files),
                      *(lambda m=m: stage.plant_odd(m) for _, m in links)]:  # fmt: skip
            plant()
            tally.acknowledged += 1
            tally.wrong += _after_a_bin(stage, daemon) != stage.good
            wait_for("the loader", lambda: not daemon.status()["model"]["loading"])
            assert daemon.stop() == 0, daemon.output
            timed_recovery(tally, daemon.start)
            wait_for("the loader", lambda: not daemon.status()["model"]["loading"])
            tally.wrong += _after_a_bin(stage, daemon) not in (stage.good, None)
            stage.mend()
            wait_for("the good model again", lambda: _after_a_bin(stage, daemon) == stage.good)
        tally.wrong += stage.marker.exists()
        assert daemon.stop() == 0, daemon.output
    return tally


def _after_a_bin(stage: _Stage, daemon: InferenceDaemon) -> str | None:
    stage.feed_a_bin(daemon)
    return stage.served(daemon)
