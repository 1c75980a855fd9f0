"""A new model in service is watched: it stays, or the one before it takes over again, without a person.

Owns: where the evidence of a bake lies and when it goes, and what follows from a verdict: a rollback with
its cooldown, a hold after too many of them, or the end of the bake. Does not know: how a verdict comes
about (`evidence`), how a version is moved (`desk`), who measures (`serving/shadow`: the inference daemon
is the only writer of evidence, the retraining daemon the only one that acts on it).

    <checkpoints>/races/<id of the switch>.json     what was measured, written once an hour of data
"""

import logging
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from fleetcast import files
from fleetcast.clock import parse_plain_utc
from fleetcast.errors import CorruptFile, OrderRefused
from fleetcast.promotion.audit import Bake, Standing
from fleetcast.promotion.desk import Desk
from fleetcast.promotion.evidence import (
    BETTER,
    GOES_ON,
    INCONCLUSIVE,
    PASSED,
    WORSE,
    Evidence,
    Limits,
    Verdict,
    in_words,
    judge,
    judge_race,
    parse_evidence,
)
from fleetcast.settings import PromotionSettings

logger = logging.getLogger(__name__)

RACES_FOLDER = "races"
OFF, ADVISE, AUTO = "off", "advise", "auto"  # of promotion.mode
_KEPT = 20  # files of evidence
_WEEK = timedelta(days=7)


def limits_of(settings: PromotionSettings) -> Limits:
    """Return the settings as what a verdict needs."""
    race = (settings.min_hours, settings.max_hours, settings.alpha)
    return Limits(settings.bake_hours, *race, settings.rollback_alpha, settings.max_harm)


def read_evidence(checkpoint_dir: Path, bake: Bake) -> Evidence:
    """Return what was measured of a bake so far; nothing, where its file is missing or damaged."""
    empty = Evidence(bake.id, bake.version, bake.against)
    try:
        found = parse_evidence(files.read_json(_path(checkpoint_dir, bake.id)))
    except FileNotFoundError:
        return empty
    except (CorruptFile, OSError, KeyError, TypeError, ValueError, OverflowError) as error:
        logger.error("evidence of the bake %s unreadable, it begins anew: %s", bake.id, error)
        return empty
    is_of_it = (found.id, found.version, found.against) == (bake.id, bake.version, bake.against)
    return found if is_of_it else empty


def write_evidence(checkpoint_dir: Path, evidence: Evidence) -> None:
    """Keep what was measured; only the newest bakes' files stay.

    Raises:
        StorageFull, StorageBroken: the older file stands.
    """
    folder = checkpoint_dir / RACES_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = sorted(folder.glob("*.json"))
    except OSError as error:
        raise files.storage_error(folder, error) from error
    files.write_json(_path(checkpoint_dir, evidence.id), evidence.as_json())
    for path in known[:-_KEPT]:
        files.remove_leftover(path)


def judge_bake(desk: Desk, settings: PromotionSettings) -> Verdict | None:
    """Return how the bake stands that goes on, or the race, None where neither does."""
    standing = desk.standing()
    if standing.bake:
        return judge(read_evidence(desk.folder, standing.bake), limits_of(settings))
    if standing.race:
        return judge_race(read_evidence(desk.folder, standing.race), limits_of(settings))
    return None


def report(desk: Desk, settings: PromotionSettings, limit: int = 50) -> dict[str, Any]:
    """Return what stands and what happened, with the bake that goes on, as `GET /promotion` shows it."""
    standing, verdict = desk.standing(), judge_bake(desk, settings)
    told = {**desk.report(limit), "mode": settings.mode, "bake": None, "race": None}
    compared = standing.bake or standing.race
    if compared is None or verdict is None:
        return told
    own: dict[str, Any] = {"version": compared.version, "against": compared.against, "since": compared.since}
    own |= {"verdict": verdict.kind, "why": verdict.why, "figures": verdict.figures}
    return {**told, "bake" if standing.bake else "race": own}


def sentence(told: Mapping[str, Any]) -> str:
    """Return one line of a bake or a race as `report` tells it.

    >>> figures = {"loss_ratio_served": 0.98, "log10_e_worse": 0.12, "log10_e_needed": 1.6}
    >>> own = {"version": "B", "against": "A", "why": "7 of 24 hours compared", "figures": figures}
    >>> sentence(own).partition("compared, ")[2]
    'clients got forecasts 2.0 % closer (proof that it is worse: 8 %)'
    >>> race = {**figures, "log10_e_better": 1.0, "log10_e_better_needed": 2.0}
    >>> sentence({**own, "figures": race}).partition("compared, ")[2]
    'clients would have got forecasts 2.0 % closer (proof that it is better: 50 %)'
    """
    figures = told["figures"]
    is_race, ratio = "log10_e_better" in figures, figures["loss_ratio_served"]
    got, what = ("would have got", "better") if is_race else ("got", "worse")
    needed = figures["log10_e_better_needed" if is_race else "log10_e_needed"]
    share = min(1.0, max(0.0, figures[f"log10_e_{what}"]) / needed)
    is_told = ratio is None or told.get("verdict", GOES_ON) != GOES_ON  # then the reason says it
    gain = "" if is_told else f", clients {got} forecasts {in_words(ratio)}"
    proof = f"(proof that it is {what}: {share:.0%})".replace("%", " %")
    return f"{told['version']} is compared with {told['against']}: {told['why']}{gain} {proof}"


def settle_bake(desk: Desk, settings: PromotionSettings, *, is_recorded: bool = False) -> Verdict | None:
    """Do what follows from the evidence, and from the end of a cooldown.

    Args:
        is_recorded: the time of the data is past, so that the host's clock says nothing about a cooldown.
    Returns:
        the verdict, None where no bake goes on.
    Raises:
        AlreadyRunning: another process moves things just now; the next look does it.
        StorageFull, StorageBroken: an act cannot be written down, so it did not happen.
    """
    standing = desk.standing()
    bake = standing.bake
    if bake is None:
        return _settle_race(desk, standing, settings) if standing.waiting else None
    verdict = judge(read_evidence(desk.folder, bake), limits_of(settings))
    if verdict.kind == PASSED:
        desk.confirm(bake, verdict.why, verdict.figures)
    elif verdict.kind == WORSE:
        _take_back(desk, bake, verdict, settings, is_recorded=is_recorded)
    return verdict


def _settle_race(desk: Desk, standing: Standing, settings: PromotionSettings) -> Verdict | None:
    """Decide about the version that waits, as far as no person does."""
    race, waiting = standing.race, standing.waiting
    if waiting is None or race is None or race.against != desk.registry.current_id():
        if settings.mode == OFF:
            desk.release_waiting()
        return None
    verdict = judge_race(read_evidence(desk.folder, race), limits_of(settings))
    is_free = not standing.held and not standing.cooldown_at(desk.clock) and settings.mode == AUTO
    goes_by_gate = verdict.kind == INCONCLUSIVE and settings.on_inconclusive == "gate" and is_free
    if settings.mode == OFF and verdict.kind != WORSE:
        desk.release_waiting()
    elif is_free and (verdict.kind == BETTER or goes_by_gate):
        desk.end_race(race, verdict.why, verdict.figures, wins=True)
    elif verdict.kind == WORSE or (verdict.kind == INCONCLUSIVE and settings.mode == AUTO):
        desk.end_race(race, verdict.why, verdict.figures, wins=False)
    elif settings.mode == ADVISE and not standing.held:
        age = desk.clock.now() - parse_plain_utc(waiting.since)
        if age > timedelta(days=settings.approval_days):
            why = f"no person answered for {settings.approval_days:g} days"
            desk.end_race(race, why, verdict.figures, wins=False)
    return verdict


def _take_back(
    desk: Desk, bake: Bake, verdict: Verdict, settings: PromotionSettings, *, is_recorded: bool
) -> None:
    now = desk.clock.now()
    until = now if is_recorded else now + timedelta(hours=settings.cooldown_hours)
    before = [at for at in desk.standing().taken_back if parse_plain_utc(at) > now - _WEEK]
    is_too_often = len(before) + 1 >= settings.max_rollbacks_per_week and not is_recorded
    holds = (
        f"models taken back within 7 days: {len(before) + 1}; look at the newest data, then resume"
        if is_too_often
        else ""
    )
    try:
        is_done = desk.take_back(bake, verdict.why, until=until, holds=holds, figures=verdict.figures)
    except OrderRefused as error:
        why = f"it is worse, and cannot be taken back: {error}; {verdict.why}"
        logger.error("%s stays in service: %s", bake.version, why)
        desk.confirm(bake, why, verdict.figures)
        return
    if is_done:
        logger.warning("taken back version=%s for=%s why=%s", bake.version, bake.against, verdict.why)


def _path(checkpoint_dir: Path, bake_id: str) -> Path:
    return checkpoint_dir / RACES_FOLDER / f"{bake_id}.json"
