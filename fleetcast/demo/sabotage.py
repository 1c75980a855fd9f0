"""The last scene of the demo: a bad model is put into service by hand, and the bake takes it out.

Owns: how the bad model is made (declared: the network of the model in service with all its weights
doubled, which no gate would pass), the order that puts it in, and what became of it. Nothing
here takes it out again: the two daemons do, as in any other installation.
"""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from fleetcast.clock import SystemClock, iso_z, monotonic, sleep
from fleetcast.demo.harness import LoopFailed
from fleetcast.forecast.registry import (
    BASELINE_FILE,
    MODEL_FILE,
    TRAINER_LOCK,
    Registry,
    lock_of,
    new_version_id,
)
from fleetcast.promotion.audit import DONE, ROLLBACK
from fleetcast.promotion.desk import Desk

REASON = "the demo puts a bad model in by hand"
_WAIT_S, _POLL_S = 60.0, 0.2


@dataclass(frozen=True)
class Sabotage:
    """A bad model in service, and the one that is compared with it."""

    bad: str
    elder: str

    def outcome(self, folder: Path) -> "TakenBack | None":
        """Return how the bad model was taken out, None if it was not."""
        desk = Desk(Registry(folder / "checkpoints"))
        for entry in desk.audit.entries():
            if entry.event == ROLLBACK and entry.phase == DONE and entry.source == self.bad:
                serves = desk.registry.current_id()
                return TakenBack(entry.by, entry.why, int(entry.figures.get("hours", 0)), serves)
        return None

    def wait(self, folder: Path) -> None:
        """Wait until the bad model is out of service, or for as long as that may take."""
        end_s = monotonic() + _WAIT_S
        while self.outcome(folder) is None and monotonic() < end_s:
            sleep(_POLL_S)


@dataclass(frozen=True)
class TakenBack:
    """How the bad model ended."""

    by: str
    why: str
    hours: int
    serves: str | None


def put_in_bad_model(folder: Path) -> Sabotage:
    """Make the bad model and order it into service, as a person with a shell could.

    Raises:
        LoopFailed: nothing is in service, or the order was refused.
    """
    registry = Registry(folder / "checkpoints")
    bad = _make(registry)
    order = [sys.executable, "-m", "fleetcast", "promote", bad, "--force", "--reason", REASON]
    done = subprocess.run(order, cwd=folder, capture_output=True, text=True, check=False)
    bake = Desk(registry).standing().bake
    if done.returncode or bake is None:
        raise LoopFailed(f"the bad model cannot be put in: {done.stdout}{done.stderr}")
    return Sabotage(bad, bake.against)


def _make(registry: Registry) -> str:
    """Store the bad model as a version that did not pass the gate; return its id."""
    from fleetcast.forecast.predictor import Forecaster  # with torch, to write

    champion = registry.current()
    if champion is None:
        raise LoopFailed("no trained model is in service")
    model, now = Forecaster.load(champion.model_path), SystemClock().now()
    version = new_version_id(now)
    doubled = {name: 2.0 * tensor for name, tensor in model.weights.items()}
    bad = Forecaster(replace(model.description, version=version), doubled)
    contents = {MODEL_FILE: bad.to_bytes(), BASELINE_FILE: champion.baseline_path.read_bytes()}
    manifest = {**champion.manifest, "created_at": iso_z(now), "parent": champion.id, "kind": "made by hand"}
    manifest |= {"promoted": False, "passed_gate": False, "verdict": None, "specialists": []}
    with lock_of(registry.folder, TRAINER_LOCK, "the trainings of this folder"):
        registry.add(version, contents, manifest)
    return version
