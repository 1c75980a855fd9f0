"""A trainer's last step: verdict, version, switch, and what a person's hold or a full disk makes of it."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from desk_folder import STATES, B, C, desk_of, give, order
from test_tft_trainer import SMALL, fleet, verdicts

import tft_trainer
from fleetcast.drift.literal.baseline import Baseline
from fleetcast.errors import StorageFull
from fleetcast.files import append_line
from fleetcast.forecast.registry import TRAINER_LOCK, Registry, lock_of
from fleetcast.promotion import audit, orders
from fleetcast.settings import Settings

NEW = "20260115T110000Z-abcd"
FOLDER = Path("checkpoints")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Bytes:
    def __init__(self, content: bytes) -> None:
        self.content = content
        self.version = NEW

    def to_bytes(self) -> bytes:
        return self.content


def challenger(*, passes: bool) -> Any:
    verdict = SimpleNamespace(
        promoted=passes, why="better: .8" if passes else "not better", figures={"r": 0.8}
    )
    return SimpleNamespace(
        model=Bytes(b"model"), verdict=verdict, baseline=Bytes(b"own"), baseline_if_held=Bytes(b"champion's")
    )


TRAINING: Any = SimpleNamespace(
    manifest=lambda made, attempt_id, _took: {
        "created_at": "2026-01-15T11:00:00Z",
        "attempt_id": attempt_id,
        "parent": C,
        "promoted": made.verdict.promoted,
        "passed_gate": made.verdict.promoted,
    }
)


def keep(*, passes: bool = True, champion_before: str | None = C) -> str:
    """Do the trainer's last step as for a challenger that was just judged."""
    registry = Registry(FOLDER)
    with lock_of(FOLDER, TRAINER_LOCK, "the lock") as lock:
        attempt = tft_trainer.Attempt(argparse.Namespace(), Settings(), registry, lock)
        attempt._champion_before = champion_before
        return attempt._keep(TRAINING, challenger(passes=passes), {})


def events(*phases: str) -> list[tuple[str, str | None]]:
    return [(e.event, e.target) for e in desk_of(FOLDER).audit.entries() if e.phase in phases]


def test_a_version_that_passes_goes_into_service_after_the_audit_says_so() -> None:
    STATES["idle"](FOLDER)
    assert keep() == ""
    assert Registry(FOLDER).current_id() == NEW
    assert Registry(FOLDER).previous_id() == C
    assert events("note", "intent", "done")[-3:] == [("verdict", NEW), ("promote", NEW), ("promote", NEW)]
    figures = [e.figures for e in desk_of(FOLDER).audit.entries() if e.event == "verdict"]
    assert figures == [{"r": 0.8}]
    version = Registry(FOLDER).version(NEW)
    assert version.is_promoted
    assert version.baseline_path.read_bytes() == b"own"


def test_a_version_that_does_not_pass_is_a_verdict_and_no_switch() -> None:
    STATES["idle"](FOLDER)
    assert keep(passes=False) == ""
    assert Registry(FOLDER).current_id() == C
    assert events("note") == [("verdict", NEW)]
    assert not Registry(FOLDER).version(NEW).has_passed_gate


def test_while_a_person_holds_it_waits_with_the_champion_s_errors_to_expect() -> None:
    STATES["held"](FOLDER)
    assert "ann holds new models back" in keep()
    registry = Registry(FOLDER)
    assert (registry.current_id(), registry.previous_id()) == (C, B)
    version = registry.version(NEW)
    assert (version.is_promoted, version.has_passed_gate) == (False, True)
    in_force = registry.baseline_in_force()
    assert in_force is not None
    assert in_force.baseline_path.read_bytes() == b"champion's"
    assert NEW not in [item.id for item in registry.usable_versions()]
    # When the person resumes, it goes in, with the errors to expect of it
    assert give(FOLDER, "resume").target == NEW
    assert registry.current_id() == NEW
    in_force = registry.baseline_in_force()
    assert in_force is not None
    assert in_force.baseline_path.read_bytes() == b"own"


def test_an_order_that_waits_goes_before_the_trainer_s_own_switch() -> None:
    STATES["idle"](FOLDER)
    orders.submit(FOLDER, order("hold"))
    assert "ann holds new models back" in keep()
    assert Registry(FOLDER).current_id() == C


def test_a_comparison_with_a_champion_that_was_changed_meanwhile_switches_nothing() -> None:
    STATES["idle"](FOLDER)
    give(FOLDER, "rollback")
    assert f"it was compared with {C}, now {B} serves" in keep()
    assert Registry(FOLDER).current_id() == B
    assert desk_of(FOLDER).standing().waiting is None
    assert give(FOLDER, "promote", version=NEW).phase == "done"


@pytest.mark.parametrize("event", ["verdict", "promote"])
def test_a_verdict_or_switch_that_cannot_be_written_down_puts_nothing_into_service(
    event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    STATES["idle"](FOLDER)

    def full(path: Path, line: str, **more: int) -> None:
        if path.name == audit.AUDIT and json.loads(line)["event"] == event:
            raise StorageFull("no space to write the audit")
        append_line(path, line, **more)

    with monkeypatch.context() as patched:
        patched.setattr("fleetcast.files.append_line", full)
        with pytest.raises(StorageFull):
            keep()
    assert Registry(FOLDER).current_id() == C
    assert (NEW in Registry(FOLDER).version_ids()) == (event == "promote")
    desk_of(FOLDER).settle()
    assert Registry(FOLDER).current_id() == C


def test_a_fleet_s_first_version_needs_no_champion() -> None:
    FOLDER.mkdir()
    assert keep(champion_before=None) == ""
    assert Registry(FOLDER).current_id() == NEW
    assert Registry(FOLDER).previous_id() is None


@pytest.mark.slow
def test_a_real_training_under_a_hold_waits_and_is_approved() -> None:
    fleet().to_parquet("data.parquet")
    Path("fleetcast.toml").write_text(SMALL)
    give(FOLDER, "hold")
    assert tft_trainer.main(["--data", "data.parquet", "--incremental", "--epochs", "1"]) == 0
    (verdict,) = verdicts(Path())
    assert (verdict["promoted"], verdict["passed_gate"]) == (False, True)
    assert "ann holds new models back" in verdict["why"]
    registry = Registry(FOLDER)
    assert registry.current_id() is None
    (version_id,) = registry.version_ids()
    version = registry.version(version_id)
    held = Baseline.load(version.folder / "baseline.npz")
    own = Baseline.load(version.folder / "baseline_promoted.npz")
    assert (own.error_mae < held.error_mae).any(), "the fallback errs more than what was trained"
    assert give(FOLDER, "approve", version=version_id).phase == "done"
    assert registry.current_id() == version_id
    assert [item.id for item in registry.usable_versions()] == [version_id]


@pytest.mark.slow
def test_a_training_that_fails_is_in_the_audit() -> None:
    fleet(40).to_parquet("data.parquet")
    Path("fleetcast.toml").write_text(SMALL)
    assert tft_trainer.main(["--data", "data.parquet"]) == 5
    (entry,) = desk_of(FOLDER).audit.entries()
    assert (entry.event, entry.phase) == ("training", "note")
    assert "of 48 h" in entry.why
