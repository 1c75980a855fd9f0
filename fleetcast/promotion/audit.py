"""The audit: `promotions.jsonl`, one line for everything that decides which model is in service.

Owns: the form of a line, its writing (fsynced before the act it announces), what a line says in words,
and what stands after it until it is lifted (`Standing`, kept in `promotion.json`). Does not know: how an
act is done (`desk`), or what may be ordered (`orders`).

An act is a pair of lines with one id: `intent` before it, `done` after it. After a kill in between, the
intent says what to finish. A verdict or an ended training is one line, `note`; an order that cannot be
carried out is one line, `refused`. Only the holder of `promotion.lock` writes. A line that cannot be
written stops the act. 5 MB, then one older file; a torn last line is skipped.
"""

import json
import logging
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fleetcast import __version__, files
from fleetcast.clock import Clock, iso_z, parse_plain_utc
from fleetcast.errors import CorruptFile

logger = logging.getLogger(__name__)

AUDIT = "promotions.jsonl"
MAX_BYTES = 5_000_000
INTENT, DONE, REFUSED, NOTE = "intent", "done", "refused", "note"
PROMOTE, ROLLBACK, ADOPT = "promote", "rollback", "adopt"  # move what is in service, or find it moved
HOLD, RESUME, PAUSE, VETO, WAIT = "hold", "resume", "pause", "veto", "wait"  # stand until they are lifted
CONFIRM = "confirm"  # the end of a bake that found nothing
LOSE = "lose"  # the end of a version that waited
TRAIN_NOW, VERDICT, TRAINING = "train-now", "verdict", "training"
APPROVE = "approve"  # the order; the act is a promotion
MOVES = (PROMOTE, ROLLBACK, RESUME, ADOPT)
FORMAT = 1  # of promotion.json
_REMEMBERED = 50
_LONGEST = 1000  # characters of a reason
_TEXTS = ("id", "event", "phase", "at", "by", "why", "revision")
_NAMES = {"source": "from", "target": "to"}  # of our fields, in the file


@dataclass(frozen=True, slots=True)
class Entry:
    """One line."""

    id: str
    event: str
    phase: str
    at: str
    by: str
    why: str
    source: str | None = None  # the version in service before
    target: str | None = None  # the version that the event is about, or puts into service
    until: str | None = None  # of a pause; of the cooldown after a rollback that no person ordered
    order: str | None = None
    attempt: str | None = None
    is_forced: bool = False
    figures: Mapping[str, Any] = field(default_factory=dict)
    revision: str = __version__

    def as_json(self) -> dict[str, Any]:
        """Return the line as it is written and shown."""
        return {
            _NAMES.get(name, name): getattr(self, name)
            for name in self.__dataclass_fields__
            if name in (*_TEXTS, "source", "target") or getattr(self, name)
        }


def new_entry(event: str, now: datetime, by: str, why: str, **more: Any) -> Entry:
    """Return a line with an id of its own, by default the intent of an act."""
    entry_id = f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
    given = {"phase": INTENT, **more}
    return Entry(entry_id, event, at=iso_z(now), by=by, why=why[:_LONGEST], **given)


class Audit:
    """The lines of one checkpoint folder. Reading takes no lock and skips what is damaged."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / AUDIT

    def append(self, entry: Entry) -> None:
        """Write one line durably; the caller holds `promotion.lock`.

        Raises:
            StorageFull, StorageBroken: it is not written, so what it announces must not happen.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(entry.as_json(), allow_nan=False)
        files.append_line(self.path, line, max_bytes=MAX_BYTES)

    def finish(self, entry: Entry, now: datetime, phase: str = DONE, why: str = "") -> Entry:
        """Write the second line of a pair and return it."""
        ended = replace(entry, phase=phase, at=iso_z(now), why=why or entry.why)
        self.append(ended)
        return ended

    def entries(self) -> Iterator[Entry]:
        """Yield every line that is whole, oldest first.

        A folder or a pipe in its place holds none; nothing can be appended to it, so no act follows.
        """
        for path in (self.path.with_name(f"{AUDIT}.1"), self.path):
            try:
                yield from (entry for entry in map(_parse, files.read_json_lines(path)) if entry is not None)
            except (CorruptFile, OSError) as error:
                logger.warning("lines of the audit cannot be read: %s", error)

    def open_intents(self) -> list[Entry]:
        """Return the intents whose act has no second line, oldest first."""
        waiting: dict[str, Entry] = {}
        for entry in self.entries():
            if entry.phase == INTENT:
                waiting[entry.id] = entry
            else:
                waiting.pop(entry.id, None)
        return list(waiting.values())

    def outcome(self, order_id: str) -> Entry | None:
        """Return the line that ended an order, or None."""
        ended = (e for e in self.entries() if e.order == order_id and e.phase in (DONE, REFUSED))
        return next(ended, None)

    def knows_attempt(self, attempt_id: str) -> bool:
        """Return whether a line tells how this training ended."""
        return any(e.attempt == attempt_id and e.event in (VERDICT, TRAINING) for e in self.entries())

    def ended_orders(self) -> set[str]:
        """Return the orders that were carried out or refused."""
        return {e.order for e in self.entries() if e.order and e.phase in (DONE, REFUSED)}

    def signature(self) -> tuple[int, int]:
        """Return what changes with every line, cheaply."""
        try:
            found = self.path.stat()
        except OSError:
            return 0, 0
        return found.st_size, found.st_mtime_ns


def _parse(raw: Mapping[str, Any]) -> Entry | None:
    """Return a line of the file as an entry, None for one of another form."""
    figures = raw.get("figures") or {}
    texts = {name: raw.get(name) for name in _TEXTS}
    optional = {
        name: raw.get(_NAMES.get(name, name)) for name in ("source", "target", "until", "order", "attempt")
    }
    if not all(isinstance(text, str) for text in texts.values()) or not isinstance(figures, dict):
        return None
    if not all(text is None or isinstance(text, str) for text in optional.values()):
        return None
    return Entry(**texts, **optional, is_forced=raw.get("is_forced") is True, figures=figures)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Mark:
    """That something stands, since when, by whom, why."""

    since: str
    by: str
    why: str
    until: str | None = None  # of a pause


@dataclass(frozen=True, slots=True)
class Waiting:
    """A version that passed the gate while models were held back."""

    version: str
    champion: str | None  # that it was compared with
    since: str
    why: str
    id: str = ""  # of the line that says so; older programs wrote none


@dataclass(frozen=True, slots=True)
class Bake:
    """A new version in service, the older one beside it: `serving/shadow` compares them."""

    id: str  # of the switch
    version: str
    against: str  # the newest that was in service before and stood its own bake
    since: str


@dataclass(frozen=True, slots=True)
class Standing:
    """What stands until it is lifted."""

    held: Mark | None = None
    paused: Mark | None = None
    waiting: Waiting | None = None
    bake: Bake | None = None
    cooldown: Mark | None = None  # after a rollback that no person ordered
    taken_back: tuple[str, ...] = ()  # when such rollbacks were, newest first
    served: tuple[str, ...] = ()  # versions in service, newest first: the champion, the previous one, ...
    vetoed: tuple[str, ...] = ()

    @property
    def race(self) -> Bake | None:
        """Return the version that waits beside the one in service: they are compared, too."""
        waiting = self.waiting
        if waiting is None or waiting.champion is None or not waiting.id or self.bake:
            return None
        return Bake(waiting.id, waiting.version, waiting.champion, waiting.since)

    @property
    def protects(self) -> set[str]:
        """Return the versions that must not be pruned, besides those that links point to."""
        waiting = {self.waiting.version} if self.waiting else set()
        return waiting | ({self.bake.version, self.bake.against} if self.bake else set())

    def pause_at(self, clock: Clock) -> Mark | None:
        """Return the pause that is not over yet."""
        return _not_over(self.paused, clock)

    def cooldown_at(self, clock: Clock) -> Mark | None:
        """Return the cooldown that is not over yet."""
        return _not_over(self.cooldown, clock)


def _not_over(mark: Mark | None, clock: Clock) -> Mark | None:
    is_over = mark is None or parse_plain_utc(mark.until or "") <= clock.now()
    return None if is_over else mark


def apply(standing: Standing, entry: Entry) -> Standing:
    """Return what stands after an act; the same act twice changes nothing more."""
    mark, target = Mark(entry.at, entry.by, entry.why, entry.until), entry.target
    if entry.event == HOLD:
        return replace(standing, held=mark)
    if entry.event == PAUSE:
        return replace(standing, paused=mark)
    if entry.event == WAIT and target:
        return replace(standing, waiting=Waiting(target, entry.source, entry.at, entry.why, entry.id))
    if entry.event == VETO and target:
        is_waiting = standing.waiting is not None and standing.waiting.version == target
        vetoed = (target, *(item for item in standing.vetoed if item != target))[:_REMEMBERED]
        return replace(standing, vetoed=vetoed, waiting=None if is_waiting else standing.waiting)
    if entry.event == LOSE and standing.waiting and standing.waiting.version == target:
        return replace(standing, waiting=None)
    if entry.event == CONFIRM and standing.bake and standing.bake.version == target:
        return replace(standing, bake=None)
    if entry.event == RESUME:
        standing = replace(standing, held=None, paused=None, cooldown=None)
    if entry.event in MOVES and target:
        return _with_champion(_with_bake(standing, entry, target), entry, target)
    return standing


def _with_bake(standing: Standing, entry: Entry, target: str) -> Standing:
    """Return what is compared after a switch; one that comes during a bake meets the proven one, too."""
    bake, figures = standing.bake, entry.figures
    if entry.event != ADOPT and figures.get("bakes") is True and entry.source:
        against = bake.against if bake else entry.source
        return replace(
            standing, bake=Bake(entry.id, target, against, entry.at) if against != target else None
        )
    standing = replace(standing, bake=None)
    if not entry.until:
        return standing
    if entry.at not in standing.taken_back:
        standing = replace(standing, taken_back=(entry.at, *standing.taken_back)[:_REMEMBERED])
    held = Mark(entry.at, entry.by, str(figures["holds"])) if figures.get("holds") else standing.held
    return replace(standing, held=held, cooldown=Mark(entry.at, entry.by, entry.why, entry.until))


def _with_champion(standing: Standing, entry: Entry, target: str) -> Standing:
    served = standing.served
    if entry.event == ROLLBACK:  # what served after the target is never gone back to
        served = served[served.index(target) :] if target in served else served[1:]
    before = served or tuple(entry.figures.get("before", ()))
    served = (target, *(item for item in before if item != target))[:_REMEMBERED]
    vetoed = tuple(item for item in standing.vetoed if item != target)
    return replace(standing, served=served, waiting=None, vetoed=vetoed)


def parse_standing(raw: Mapping[str, Any]) -> Standing:
    """Return what `promotion.json` holds; KeyError, TypeError or ValueError where it is damaged."""
    if raw["format"] != FORMAT:
        raise ValueError(f"format {raw['format']!r}, this program reads {FORMAT}")
    marks = {name: Mark(**raw[name]) if raw.get(name) else None for name in ("held", "paused", "cooldown")}
    waiting, bake = raw["waiting"], raw.get("bake")  # older programs wrote no bake
    found = Standing(
        **marks,
        waiting=Waiting(**waiting) if waiting else None,
        bake=_parse_bake(bake) if bake else None,
        taken_back=tuple(map(str, raw.get("taken_back", ()))),
        served=tuple(map(str, raw["served"])),
        vetoed=tuple(map(str, raw["vetoed"])),
    )
    if found.race:
        _check_id(found.race.id)
    for mark in (found.paused, found.cooldown):
        if mark:
            parse_plain_utc(mark.until or "")
    for moment in (*found.taken_back, *([found.waiting.since] if found.waiting else [])):
        parse_plain_utc(moment)
    return found


def _parse_bake(raw: Mapping[str, Any]) -> Bake:
    bake = Bake(**raw)
    _check_id(bake.id)
    return bake


def _check_id(entry_id: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9-]{1,100}", entry_id):  # it names a file
        raise ValueError(f"not the id of a line: {entry_id!r}")


def sentence(entry: Entry) -> str:
    """Return one line of `fleetcast history`.

    >>> at = {"id": "1", "phase": DONE, "at": "2026-01-15T10:00:05Z", "by": "ann"}
    >>> sentence(Entry(event=ROLLBACK, why="bad nights", source="B", target="A", **at))
    '2026-01-15 10:00:05  ann rolled back from B to A: bad nights'
    >>> sentence(Entry(event=HOLD, why="freeze", **{**at, "phase": REFUSED}))
    '2026-01-15 10:00:05  refused to ann (hold): freeze'
    """
    when = entry.at[:19].replace("T", " ")
    why = f": {entry.why}" if entry.why else ""
    if entry.phase == REFUSED:
        return f"{when}  refused to {entry.by} ({entry.event}){why}"
    begun = " (begun, not finished yet)" if entry.phase == INTENT else ""
    forced = ", by force" if entry.is_forced else ""
    return f"{when}  {_in_words(entry)}{forced}{begun}{why}{_what_follows(entry)}"


def _what_follows(entry: Entry) -> str:
    """Return what a rollback that no person ordered keeps from happening, or ""."""
    if entry.event != ROLLBACK or not entry.until or entry.until <= entry.at:
        return ""
    end = "a person says resume" if entry.figures.get("holds") else entry.until
    return f"; no training puts a model into service until {end}"


def _in_words(entry: Entry) -> str:
    by, source, target = entry.by, entry.source or "no model", entry.target or "no model"
    deeds = {
        PROMOTE: f"{by} put {target} into service instead of {source}",
        ROLLBACK: f"{by} rolled back from {source} to {target}",
        ADOPT: f"{by} found {target} in service",
        HOLD: f"{by} holds: no training puts a model into service until resume",
        RESUME: f"{by} resumed" + (f" and put {target}, which waited, into service" if entry.target else ""),
        PAUSE: f"{by} paused trainings until {entry.until}",
        VETO: f"{by} vetoed {target}",
        WAIT: f"{target} passed the gate and waits",
        LOSE: f"{target} does not go into service, {by} ended",
        CONFIRM: f"{target} stays in service, {by} ended",
        TRAIN_NOW: f"{by} ordered a training" + (f" (attempt {entry.attempt})" if entry.attempt else ""),
        VERDICT: f"the gate judged {target}",
        TRAINING: f"training {entry.attempt} ended without a model",
    }
    return deeds.get(entry.event, f"{by}: {entry.event}")
