"""The one mover of `last.ckpt`, `previous.ckpt` and the baseline; it also carries out people's orders.

Owns: `promotion.lock`, `promotion.json` (what stands until it is lifted: hold, pause, the version that
waits, what was in service before), the order of writing of an act, and how one that a kill broke off is
finished. Does not know: whether a version deserves it (`training/gate`), when to train (`retraining/`).

An act: the `intent` line, then the links and `promotion.json`, then the `done` line, then the order's file
goes. Every step is one rename or one line and may be done twice, and the intent says all that is needed,
so that the next holder of the lock finishes what a kill broke off: before anything else. The lock is held
for moments: a person's rollback never waits for a training, only for the trainer's last step.
docs/promotion.md is for people.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fleetcast import files
from fleetcast.clock import Clock, SystemClock, iso_z, monotonic, sleep
from fleetcast.errors import AlreadyRunning, BadCheckpoint, BadOrder, CorruptFile, OrderRefused
from fleetcast.forecast.registry import ORDERS_FOLDER, PROMOTION_LOCK, Registry, Version, lock_of
from fleetcast.promotion import audit, orders
from fleetcast.promotion.audit import FORMAT, Audit, Bake, Entry, Standing, apply, new_entry, parse_standing
from fleetcast.promotion.orders import Order

logger = logging.getLogger(__name__)

STATE = "promotion.json"
LOCK_WAIT_S = 30.0  # the trainer stores a version under the lock: seconds
STALE_ORDER = timedelta(hours=24)  # a training that was ordered longer ago is not what a person waits for
_LOCK_PAUSE_S = 0.05
_PROGRAM, THE_BAKE, THE_RACE = "the program", "the bake", "the race"


class Desk:
    """Moves what is in service, one mover at a time. Reading takes no lock. Not thread safe."""

    def __init__(self, registry: Registry, clock: Clock | None = None, *, bakes: bool = True) -> None:
        """Look at one checkpoint folder.

        Args:
            bakes: the version before goes on beside one that is put into service, and may take over again.
        """
        self.registry = registry
        self.folder = registry.folder
        self.audit = Audit(registry.folder)
        self.clock = clock or SystemClock()
        self._lock = lock_of(self.folder, PROMOTION_LOCK, f"the lock {self.folder / PROMOTION_LOCK}")
        self._bakes = bakes
        self._seen: tuple[int, int] | None = None

    def standing(self) -> Standing:
        """Return what stands; out of the audit where `promotion.json` is damaged or lost."""
        try:
            return parse_standing(files.read_json(self.folder / STATE))
        except FileNotFoundError:
            pass
        except (CorruptFile, OSError, KeyError, TypeError, ValueError) as error:
            logger.error("promotion state unreadable, taken from the audit error=%s", error)
        found = Standing()
        for entry in self.audit.entries():
            found = apply(found, entry) if entry.phase == audit.DONE else found
        return found

    @contextmanager
    def lock(self, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
        """Be the one that moves things; may be nested.

        Raises:
            AlreadyRunning: another process is, for longer than `wait_s`.
        """
        if self._lock.is_held:
            yield
            return
        until = monotonic() + wait_s
        while True:
            try:
                self._lock.acquire()
                break
            except AlreadyRunning:
                if monotonic() >= until:
                    raise
                sleep(_LOCK_PAUSE_S)
        try:
            yield
        finally:
            self._lock.release()

    def look_after(self) -> None:
        """Finish and carry out what there is, if anything changed; cheap, for a loop."""
        signature = self.audit.signature()
        if signature == self._seen and not orders.any_waiting(self.folder):
            return
        try:
            if signature != (0, 0) or orders.any_waiting(self.folder):
                self.settle(wait_s=0.0)
            self._seen = self.audit.signature()
        except AlreadyRunning:
            logger.debug("another process moves things just now")

    def settle(self, wait_s: float = LOCK_WAIT_S) -> None:
        """Finish acts that a kill broke off, then carry out every order but trainings.

        Raises:
            AlreadyRunning: another process holds the lock.
            StorageFull, StorageBroken: an act cannot be written down; it did not happen, its order waits.
        """
        with self.lock(wait_s):
            for entry in self.audit.open_intents():
                if entry.event != audit.TRAIN_NOW:
                    self._complete(entry)
            self._adopt()
            ended = self.audit.ended_orders()
            for path, order in orders.waiting(self.folder):
                self._take_up(path, order, ended)

    def give(self, order: Order) -> Entry | None:
        """Write an order down and carry it out at once; None: it waits for a holder of the lock.

        Raises:
            BadOrder: too many orders wait.
            StorageFull, StorageBroken: it cannot be written down, or its act cannot.
        """
        orders.submit(self.folder, order)
        if order.kind == audit.TRAIN_NOW:  # for the retraining daemon
            return None
        try:
            self.settle()
        except AlreadyRunning as error:
            logger.warning("the order waits: %s", error)
        return self.audit.outcome(order.id)

    def promote(self, version_id: str, by: str, why: str, **more: Any) -> None:
        """Put a version into service that its training let through; the caller holds the lock."""
        source = self.registry.current_id()
        given = {"figures": self._with_bake(source, version_id), **more}
        self._perform(self._entry(audit.PROMOTE, by, why, source=source, target=version_id, **given))

    def keep_waiting(self, version_id: str, by: str, why: str, **more: Any) -> None:
        """Let a version wait for a person; the caller holds the lock."""
        source = self.registry.current_id()
        self._perform(self._entry(audit.WAIT, by, why, source=source, target=version_id, **more))

    def take_back(self, bake: Bake, why: str, *, until: datetime, holds: str, figures: Any) -> bool:
        """Put the version before back into service, which no person ordered; return whether it was done.

        Args:
            until: end of the cooldown.
            holds: why models are held back from now on, "" = they are not.
        """
        with self.lock():
            self.settle()  # what a person ordered goes first
            standing, current = self.standing(), self.registry.current_id()
            if standing.bake != bake or current != bake.version:
                return False
            target = self._intact((bake.against, *standing.served[1:]), current)
            given = {"until": iso_z(until), "figures": {**figures, **({"holds": holds} if holds else {})}}
            self._perform(self._entry(audit.ROLLBACK, THE_BAKE, why, source=current, target=target, **given))
        return True

    def end_race(self, race: Bake, why: str, figures: Mapping[str, Any], *, wins: bool) -> None:
        """Put the version that waited into service, or let it wait no longer."""
        with self.lock():
            self.settle()
            if self.standing().race != race or self.registry.current_id() != race.against:
                return
            if wins:
                given = {**figures, **self._with_bake(race.against, race.version)}
                self.promote(race.version, THE_RACE, why, figures=given)
            else:
                about = {"source": race.against, "target": race.version, "figures": figures}
                self._perform(self._entry(audit.LOSE, THE_RACE, why, **about))

    def confirm(self, bake: Bake, why: str, figures: Mapping[str, Any]) -> None:
        """End a bake; the new version stays."""
        with self.lock():
            self.settle()
            if self.standing().bake == bake:
                about = {"source": bake.against, "target": bake.version, "figures": figures}
                self._perform(self._entry(audit.CONFIRM, THE_BAKE, why, **about))

    def release_waiting(self) -> None:
        """Put a version into service that nothing holds back any more."""
        standing = self.standing()
        waiting = standing.waiting
        if waiting is None or standing.held or standing.cooldown_at(self.clock):
            return
        with self.lock():
            self.settle()
            is_as_it_was = self.standing() == standing and waiting.champion == self.registry.current_id()
            if is_as_it_was and waiting.version in self.registry.version_ids():
                self.promote(waiting.version, _PROGRAM, f"nothing holds it back any more; {waiting.why}")

    def note(self, event: str, by: str, why: str, **more: Any) -> None:
        """Write down what moves nothing: a verdict, the end of a training."""
        with self.lock():
            self.audit.append(self._entry(event, by, why, phase=audit.NOTE, **more))

    # Trainings that people order: for the one owner of the retraining's state.

    def training_order(self) -> Order | None:
        """Return the oldest training that a person ordered and that was neither started nor refused."""
        for path, order in orders.waiting(self.folder):
            if isinstance(order, BadOrder) or order.kind != audit.TRAIN_NOW:
                continue
            if self.audit.outcome(order.id):
                files.remove_leftover(path)
            elif order.age(self.clock.now()) > STALE_ORDER:
                hours = STALE_ORDER.total_seconds() / 3600
                self.refuse_training(order, f"no retraining daemon took it up within {hours:.0f} h")
            else:
                return order
        return None

    def begin_training(self, order: Order) -> None:
        """Write down that an ordered training is about to start."""
        with self.lock():
            if not any(entry.order == order.id for entry in self.audit.open_intents()):
                self.audit.append(self._of(order))

    def end_training_order(self, order: Order, attempt_id: str) -> None:
        """Write down which training an order became; the order is done."""
        self._end_order(order, audit.DONE, order.reason, attempt_id)

    def refuse_training(self, order: Order, why: str) -> None:
        """Write down why an ordered training was not started; the order is done."""
        self._end_order(order, audit.REFUSED, why, None)

    def _end_order(self, order: Order, phase: str, why: str, attempt_id: str | None) -> None:
        with self.lock():
            begun = [entry for entry in self.audit.open_intents() if entry.order == order.id]
            entry = replace(begun[0] if begun else self._of(order), attempt=attempt_id)
            self.audit.finish(entry, self.clock.now(), phase, why)
            self._remove(order)

    def models(self) -> dict[str, Any]:
        """Return every version with its roles, as `GET /models` and `fleetcast models --json` show it."""
        standing, registry = self.standing(), self.registry
        waiting = standing.waiting.version if standing.waiting else None
        roles = {"champion": registry.current_id(), "previous": registry.previous_id(), "waiting": waiting}
        since = {
            entry.target: entry.at
            for entry in self.audit.entries()
            if entry.event in audit.MOVES and entry.phase == audit.DONE and entry.target
        }
        rolled_back = registry.rolled_back_ids()
        listed = []
        for version in self._versions():
            own = [role for role, version_id in roles.items() if version_id == version.id]
            if version.is_base:
                own = ["base"] if registry.current_id() else ["base", "champion"]
            marks = {"rolled_back": version.id in rolled_back, "vetoed": version.id in standing.vetoed}
            listed.append({**describe(version), "roles": own, **marks, "since": since.get(version.id)})
        return {"aliases": roles, "versions": listed}

    def report(self, limit: int = 50) -> dict[str, Any]:
        """Return what stands and what happened, as `GET /promotion` shows it."""
        standing = self.standing()
        pause, cooldown = standing.pause_at(self.clock), standing.cooldown_at(self.clock)
        pending = [item for _, item in orders.waiting(self.folder) if isinstance(item, Order)]
        return {
            "state": "held" if standing.held else "baking" if standing.bake else "idle",
            "held": asdict(standing.held) if standing.held else None,
            "paused": asdict(pause) if pause else None,
            "waiting": asdict(standing.waiting) if standing.waiting else None,
            "cooldown": asdict(cooldown) if cooldown else None,
            "orders": [asdict(order) for order in pending],
            "history": [
                {**entry.as_json(), "sentence": audit.sentence(entry)}
                for entry in deque(self.audit.entries(), limit)
            ],
        }

    def _versions(self) -> Iterator[Version]:
        for version_id in reversed(self.registry.version_ids()):
            try:
                yield self.registry.version(version_id)
            except BadCheckpoint as error:
                logger.debug("version not listed: %s", error)
        base = self.registry.base()
        if base:
            yield base

    # The rest is done under the lock.

    def _take_up(self, path: Path, order: Order | BadOrder, ended: set[str]) -> None:
        if isinstance(order, BadOrder):
            name = ascii(path.name)[1:-1][:80]
            refused = self._entry("order", _PROGRAM, f"{order} ({name})", phase=audit.REFUSED)
            self.audit.append(refused)
            files.remove_leftover(path)
        elif order.kind == audit.TRAIN_NOW:
            return
        elif order.id in ended:  # a kill came before its file went
            files.remove_leftover(path)
        else:
            self._carry_out(order)

    def _carry_out(self, order: Order) -> None:
        try:
            entry = _PLANS[order.kind](self, order)
        except OrderRefused as refusal:
            refused = replace(self._of(order), event=order.kind, phase=audit.REFUSED, why=str(refusal))
            self.audit.append(refused)
            logger.info("order refused kind=%s by=%s why=%s", order.kind, order.by, refusal)
        else:
            self._perform(entry)
        self._remove(order)

    def _remove(self, order: Order) -> None:
        files.remove_leftover(self.folder / ORDERS_FOLDER / f"{order.id}.json")

    def _perform(self, entry: Entry) -> None:
        self.audit.append(entry)
        self._complete(entry)

    def _complete(self, entry: Entry) -> None:
        """Do what an intent says, as far as it is not done yet, and write the second line."""
        try:
            self._act(entry)
        except BadCheckpoint as error:
            logger.error("cannot be finished event=%s why=%s", entry.event, error)
            self.audit.finish(entry, self.clock.now(), audit.REFUSED, f"cannot be done: {error}")
            return
        self.audit.finish(entry, self.clock.now())
        logger.info("done event=%s by=%s to=%s why=%s", entry.event, entry.by, entry.target, entry.why)

    def _act(self, entry: Entry) -> None:
        before = self.standing()
        standing = apply(before, entry)
        if entry.event in audit.MOVES and entry.target:
            self._move(entry, entry.target, standing)
        if standing != before:
            content = {"format": FORMAT, **asdict(standing)}
            files.write_json(self.folder / STATE, content)

    def _move(self, entry: Entry, target: str, standing: Standing) -> None:
        registry, now = self.registry, self.clock.now()
        if entry.event != audit.ADOPT:
            registry.version(target).verify()
        if entry.event == audit.ROLLBACK and entry.source:
            registry.note_rollback(entry.source, target, now)
        registry.note_return(target, now)
        known = registry.version_ids()
        registry.set_previous(next((item for item in standing.served[1:] if item in known), None))
        if registry.current_id() != target:
            registry.promote(target)
        registry.use_promoted_baseline(target)

    def _adopt(self) -> None:
        """Write down a champion that another program put into service."""
        current, served = self.registry.current_id(), self.standing().served
        if current is None or served[:1] == (current,):
            return
        before = [] if served else [*self.registry.earlier(current)]
        why = "last.ckpt was moved by another program" if served else "the record of promotions begins here"
        source = served[0] if served else None
        figures = {"before": before}
        self._perform(self._entry(audit.ADOPT, _PROGRAM, why, source=source, target=current, figures=figures))

    def _entry(self, event: str, by: str, why: str, **more: Any) -> Entry:
        return new_entry(event, self.clock.now(), by, why, **more)

    def _of(self, order: Order, **more: Any) -> Entry:
        """Return the intent of an order."""
        event = audit.PROMOTE if order.kind == audit.APPROVE else order.kind
        given: dict[str, Any] = {"target": order.version, "until": order.until, **more}
        if event in (audit.PROMOTE, audit.RESUME) and given["target"]:
            given["figures"] = self._with_bake(given.get("source"), given["target"])
        own = self._entry(event, order.by, order.reason, order=order.id, **given)
        return replace(own, is_forced=order.force)

    def _with_bake(self, source: str | None, target: str) -> dict[str, Any]:
        """Return the figures of a switch: whether the version before goes on beside the new one.

        What a person puts back although it was rolled back is the person's: nothing takes it back again.
        """
        is_returned = target in self.registry.rolled_back_ids()
        return {"bakes": True} if self._bakes and source and not is_returned else {}

    def _plan_mark(self, order: Order) -> Entry:
        if order.until is not None and orders.moment(order.until) <= self.clock.now():
            raise OrderRefused(f"{order.until} is over")
        return self._of(order)

    def _plan_resume(self, order: Order) -> Entry:
        standing, current = self.standing(), self.registry.current_id()
        stands = (standing.held, standing.pause_at(self.clock), standing.cooldown_at(self.clock))
        if not any(stands):
            raise OrderRefused("nothing is held or paused, and no cooldown goes on")
        waiting = standing.waiting
        target = waiting.version if waiting and waiting.champion == current else None
        return self._of(order, source=current if target else None, target=target)

    def _plan_veto(self, order: Order) -> Entry:
        version = self._version(order)
        if version.id == self.registry.current_id():
            raise OrderRefused(f"{version.id} is in service", hint="fleetcast rollback takes it out")
        return self._of(order)

    def _plan_promotion(self, order: Order) -> Entry:
        version, current, standing = self._version(order), self.registry.current_id(), self.standing()
        self._check_champion(order, current)
        waiting = standing.waiting.version if standing.waiting else None
        if version.id == current:
            raise OrderRefused(f"{version.id} is in service already")
        if order.kind == audit.APPROVE and version.id != waiting:
            raise OrderRefused(f"{version.id} does not wait for approval, {waiting or 'no version'} does")
        doubts = {
            "was rolled back": version.id in self.registry.rolled_back_ids(),
            "was vetoed": version.id in standing.vetoed,
            "did not pass the gate": not version.has_passed_gate,
        }
        against = [doubt for doubt, holds in doubts.items() if holds]
        if against and not order.force:
            raise OrderRefused(
                f"{version.id} {' and '.join(against)}", hint="--force promotes it all the same"
            )
        return self._of(order, source=current)

    def _plan_rollback(self, order: Order) -> Entry:
        current = self.registry.current_id()
        if current is None:
            raise OrderRefused(f"nothing to roll back: {self.folder / 'last.ckpt'} points to no version")
        self._check_champion(order, current)
        target = self._version(order).id if order.version else self._previous(current)
        if target == current:
            raise OrderRefused(f"{target} is in service already")
        if order.version and not self.registry.version(target).has_passed_gate:
            raise OrderRefused(f"{target} did not pass the gate", hint="see fleetcast promote --force")
        return self._of(order, source=current, target=target)

    def _previous(self, current: str) -> str:
        """Return the newest intact version that was in service before."""
        return self._intact(self.standing().served[1:], current)

    def _intact(self, version_ids: Sequence[str], current: str) -> str:
        for version_id in version_ids:
            try:
                self.registry.version(version_id).verify()
                return version_id
            except BadCheckpoint as error:
                logger.warning("version skipped reason=%s", error)
        raise OrderRefused(f"nothing to roll back to: no intact promoted version before {current}")

    def _version(self, order: Order) -> Version:
        if order.version not in self.registry.version_ids():
            raise OrderRefused(f"there is no version {order.version}", hint="fleetcast models lists them")
        try:
            version = self.registry.version(order.version)
            version.verify()
        except BadCheckpoint as error:
            raise OrderRefused(str(error)) from error
        return version

    def _check_champion(self, order: Order, current: str | None) -> None:
        if order.champion not in (None, current):
            raise OrderRefused(f"{current} is in service now, not {order.champion} as seen when ordered")


_PLANS: Mapping[str, Callable[[Desk, Order], Entry]] = {
    audit.HOLD: Desk._plan_mark,
    audit.PAUSE: Desk._plan_mark,
    audit.RESUME: Desk._plan_resume,
    audit.VETO: Desk._plan_veto,
    audit.PROMOTE: Desk._plan_promotion,
    audit.APPROVE: Desk._plan_promotion,
    audit.ROLLBACK: Desk._plan_rollback,
}


def describe(version: Version) -> dict[str, Any]:
    """Return what a manifest says about a version, its verdict with the figures."""
    manifest = version.manifest
    verdict = manifest.get("verdict")
    found = verdict if isinstance(verdict, dict) else {}
    gate = {name: found.get(name) for name in ("why", "compared_with", "figures")}
    return {
        "id": version.id,
        "created_at": iso_z(version.created_at),
        "parent": version.parent,
        "kind": manifest.get("kind"),
        "specialised_series": version.n_specialist_series,
        "gate": {"passed": version.has_passed_gate, **gate},
    }
