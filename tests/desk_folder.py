"""A checkpoint folder for tests of orders: versions in service before, one that waits, one that failed."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fleetcast.clock import FakeClock
from fleetcast.forecast.registry import Registry
from fleetcast.promotion.audit import Entry
from fleetcast.promotion.desk import Desk
from fleetcast.promotion.orders import Order, new_order

NOW = datetime(2026, 1, 15, 10, 0, 5, tzinfo=UTC)
A, B, C = (f"20260115T10000{number}Z-000{number}" for number in (1, 2, 3))  # in service, one after another
WAITS, FAILED, SPARE = "20260115T100004Z-0004", "20260115T100005Z-0005", "20260115T100006Z-0006"


def order(kind: str, **more: Any) -> Order:
    if kind == "pause":
        more.setdefault("until", "2026-01-16T00:00Z")
    return new_order(kind, more.pop("reason", "because"), more.pop("by", "ann"), NOW, **more)


def add(registry: Registry, version_id: str, **manifest: Any) -> None:
    registry.add(
        version_id,
        {"model.ckpt": version_id.encode(), "baseline.npz": b"sketch", "baseline_promoted.npz": b"better"},
        {"created_at": "2026-01-15T10:00:05Z", "parent": None, "promoted": False, **manifest},
    )


def desk_of(folder: Path) -> Desk:
    return Desk(Registry(folder), FakeClock(NOW))


def give(folder: Path, kind: str, **more: Any) -> Entry:
    ended = desk_of(folder).give(order(kind, **more))
    assert ended is not None
    return ended


def empty(folder: Path) -> None:
    Registry(folder)


def alone(folder: Path) -> None:
    desk = desk_of(folder)
    add(desk.registry, A, promoted=True)
    with desk.lock():
        desk.promote(A, "ann", "first")


def idle(folder: Path, *, bakes: bool = False) -> None:
    """C serves, B and A did before; three more versions are stored."""
    for version_id in (A, B, C):
        desk = Desk(Registry(folder), FakeClock(NOW), bakes=bakes and version_id == C)
        add(desk.registry, version_id, promoted=True)
        with desk.lock():
            desk.promote(version_id, "ann", "better")
    add(desk.registry, WAITS, passed_gate=True)
    add(desk.registry, SPARE, passed_gate=True)
    add(desk.registry, FAILED)
    desk.registry.set_baseline(C)


def baking(folder: Path) -> None:
    """As `idle`, but C is compared with B."""
    idle(folder, bakes=True)


def held(folder: Path) -> None:
    idle(folder)
    give(folder, "hold", reason="freeze")


def paused(folder: Path) -> None:
    idle(folder)
    give(folder, "pause")


def waiting(folder: Path) -> None:
    """A version passed the gate while models were held back."""
    held(folder)
    desk = desk_of(folder)
    with desk.lock():
        desk.keep_waiting(WAITS, "the trainer", "ann holds")
    desk.registry.set_baseline(WAITS)


def older(folder: Path) -> None:
    """A folder as an older release left it: links, but no record of what was in service."""
    registry = Registry(folder)
    for version_id, parent in ((A, None), (B, A), (C, B)):
        add(registry, version_id, promoted=True, parent=parent)
        registry.promote(version_id)


STATES: dict[str, Callable[[Path], None]] = {
    state.__name__: state for state in (empty, alone, idle, baking, held, paused, waiting, older)
}
