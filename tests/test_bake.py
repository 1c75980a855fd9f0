"""What follows from the evidence of a bake: who serves, what stands, what the audit says; kills."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest
from desk_folder import NOW, SPARE, WAITS, A, B, C, add, alone, give, order

from fleetcast import files
from fleetcast.clock import FakeClock
from fleetcast.errors import StorageFull
from fleetcast.forecast.registry import Registry
from fleetcast.promotion.audit import CONFIRM, DONE, INTENT, ROLLBACK, Standing, sentence
from fleetcast.promotion.bake import RACES_FOLDER, read_evidence, report, settle_bake, write_evidence
from fleetcast.promotion.bake import sentence as tell
from fleetcast.promotion.desk import STATE, Desk
from fleetcast.promotion.evidence import BETTER, PASSED, WORSE, Block
from fleetcast.settings import PromotionSettings

SETTINGS = PromotionSettings()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A served, then B came: B is baked beside A."""
    alone(tmp_path)
    found = Desk(Registry(tmp_path), FakeClock(NOW))
    switch(found, B)
    return found


def switch(desk: Desk, version_id: str) -> None:
    add(desk.registry, version_id, promoted=True)
    with desk.lock():
        desk.promote(version_id, "the trainer", "better")


def measure(desk: Desk, *ratios: float) -> None:
    """Write evidence of hours in which the new model's loss was so many times the old one's."""
    bake = desk.standing().bake
    assert bake is not None
    blocks = tuple(Block("2026-01-15T10:00:00Z", 500, (ratio, 1.0), (ratio, 1.0)) for ratio in ratios)
    write_evidence(desk.folder, replace(read_evidence(desk.folder, bake), blocks=blocks))


def test_a_switch_begins_a_bake_against_the_version_before(desk: Desk) -> None:
    bake = desk.standing().bake
    assert bake is not None
    assert (bake.version, bake.against) == (B, A)
    assert desk.report()["state"] == "baking"
    assert settle_bake(desk, SETTINGS) is not None
    assert desk.registry.current_id() == B


def test_the_first_version_of_a_fleet_is_not_baked(tmp_path: Path) -> None:
    alone(tmp_path)
    assert Desk(Registry(tmp_path)).standing().bake is None


def test_with_the_setting_off_nothing_is_baked(tmp_path: Path) -> None:
    alone(tmp_path)
    desk = Desk(Registry(tmp_path), FakeClock(NOW), bakes=False)
    switch(desk, B)
    assert desk.standing().bake is None


def test_a_worse_model_is_taken_back_by_itself_and_the_audit_says_why(desk: Desk) -> None:
    measure(desk, 1.6, 1.6, 1.6)
    verdict = settle_bake(desk, SETTINGS)
    assert verdict is not None
    assert verdict.kind == WORSE
    assert desk.registry.current_id() == A
    assert B in desk.registry.rolled_back_ids()
    standing = desk.standing()
    assert (standing.bake, standing.held) == (None, None)
    assert standing.cooldown is not None
    assert standing.cooldown.until == "2026-01-16T10:00:05Z"
    last = list(desk.audit.entries())[-2:]
    assert [(entry.event, entry.phase) for entry in last] == [(ROLLBACK, INTENT), (ROLLBACK, DONE)]
    told = f"the bake rolled back from {B} to {A}: 3 hours in a row its loss was over 1.5 times that of {A}"
    assert sentence(last[1]).startswith(f"2026-01-15 10:00:05  {told}")
    assert last[1].figures["hours"] == 3
    assert settle_bake(desk, SETTINGS) is None, "what is restored is not baked"


def test_a_model_that_is_as_good_for_a_day_stays(desk: Desk) -> None:
    measure(desk, *[0.99] * 24)
    verdict = settle_bake(desk, SETTINGS)
    assert verdict is not None
    assert verdict.kind == PASSED
    assert desk.registry.current_id() == B
    assert desk.standing().bake is None
    ended = list(desk.audit.entries())[-1]
    assert (ended.event, ended.phase) == (CONFIRM, DONE)
    assert sentence(ended).endswith(
        f"{B} stays in service, the bake ended: clients got forecasts 1.0 % closer over 24 hours beside {A}"
    )
    assert settle_bake(desk, SETTINGS) is None


def take_back_twice(desk: Desk, days_between: int) -> None:
    measure(desk, 1.6, 1.6, 1.6)
    settle_bake(desk, SETTINGS)
    desk.clock.time += timedelta(days=days_between)  # type: ignore[attr-defined]
    switch(desk, C)
    measure(desk, 1.6, 1.6, 1.6)
    settle_bake(desk, SETTINGS)
    assert len(desk.standing().taken_back) == 2


def test_two_rollbacks_within_a_week_hold_models_back_until_a_person_resumes(desk: Desk) -> None:
    take_back_twice(desk, days_between=2)
    held = desk.standing().held
    assert held is not None
    assert held.why == "models taken back within 7 days: 2; look at the newest data, then resume"
    assert desk.registry.current_id() == A
    desk.give(order("resume"))
    assert (desk.standing().held, desk.standing().cooldown) == (None, None)


def test_rollbacks_more_than_a_week_apart_hold_nothing(desk: Desk) -> None:
    take_back_twice(desk, days_between=8)
    assert desk.standing().held is None


def test_in_recorded_time_the_hosts_clock_neither_cools_down_nor_holds(desk: Desk) -> None:
    for version_id in (B, C):
        if desk.registry.current_id() != version_id and version_id == C:
            switch(desk, C)
        measure(desk, 1.6, 1.6, 1.6)
        settle_bake(desk, SETTINGS, is_recorded=True)
    standing = desk.standing()
    assert (standing.cooldown_at(desk.clock), standing.held) == (None, None)


def test_a_version_that_waited_for_the_cooldown_goes_into_service_after_it(desk: Desk) -> None:
    measure(desk, 1.6, 1.6, 1.6)
    settle_bake(desk, SETTINGS)
    add(desk.registry, WAITS, passed_gate=True)
    with desk.lock():
        desk.keep_waiting(WAITS, "the trainer", "a model was taken back")
    settle_bake(desk, SETTINGS)
    assert desk.registry.current_id() == A
    desk.clock.time += timedelta(hours=24)  # type: ignore[attr-defined]
    settle_bake(desk, SETTINGS)
    assert desk.registry.current_id() == WAITS
    bake = desk.standing().bake
    assert bake is not None
    assert bake.against == A


def test_a_version_that_comes_during_a_bake_is_compared_with_the_proven_one(desk: Desk) -> None:
    switch(desk, C)
    bake = desk.standing().bake
    assert bake is not None
    assert (bake.version, bake.against) == (C, A)
    measure(desk, 1.6, 1.6, 1.6)
    settle_bake(desk, SETTINGS)
    assert desk.registry.current_id() == A


@pytest.mark.parametrize("kind", ["rollback", "promote"])
def test_a_persons_order_ends_a_bake_and_wins_over_its_verdict(desk: Desk, kind: str) -> None:
    add(desk.registry, SPARE, passed_gate=True)
    measure(desk, 1.6, 1.6, 1.6)
    more = {"version": SPARE} if kind == "promote" else {}
    give(desk.folder, kind, **more)
    settle_bake(desk, SETTINGS)
    assert desk.registry.current_id() == (SPARE if kind == "promote" else A)
    assert [e.by for e in desk.audit.entries() if e.event == ROLLBACK and e.phase == DONE] == (
        ["ann"] if kind == "rollback" else []
    )


def test_what_a_person_puts_back_by_force_is_not_taken_back_again(desk: Desk) -> None:
    measure(desk, 1.6, 1.6, 1.6)
    settle_bake(desk, SETTINGS)
    give(desk.folder, "promote", version=B, force=True)
    assert desk.registry.current_id() == B
    assert desk.standing().bake is None


def test_hold_keeps_a_bake_armed(desk: Desk) -> None:
    give(desk.folder, "hold")
    measure(desk, 1.6, 1.6, 1.6)
    settle_bake(desk, SETTINGS)
    assert desk.registry.current_id() == A


def test_both_models_of_a_bake_are_never_pruned(desk: Desk) -> None:
    assert desk.standing().protects == {A, B}


def test_evidence_of_another_bake_or_a_damaged_one_counts_as_none(desk: Desk) -> None:
    measure(desk, 1.6, 1.6, 1.6)
    bake = desk.standing().bake
    assert bake is not None
    path = desk.folder / RACES_FOLDER / f"{bake.id}.json"
    text = path.read_text()
    endless = text.replace('"void": 0', '"void": 1e999')
    assert endless != text
    for damaged in (text.replace(A, C), text[:40], "[]", text.replace('"format": 1', '"format": 9'), endless):
        path.write_text(damaged)
        settle_bake(desk, SETTINGS)
        assert desk.registry.current_id() == B


def test_a_state_that_names_no_file_of_ours_is_damaged(desk: Desk) -> None:
    path = desk.folder / STATE
    bake = desk.standing().bake
    assert bake is not None
    path.write_text(path.read_text().replace(bake.id, "../../etc"))
    assert desk.standing().bake == bake, "taken from the audit"


def test_a_version_that_waits_since_no_time_is_damaged_too(racing: Desk) -> None:
    path, waiting = racing.folder / STATE, racing.standing().waiting
    assert waiting is not None
    path.write_text(path.read_text().replace(waiting.since, "yesterday", 1))
    assert racing.standing().waiting == waiting, "taken from the audit"
    settle_bake(racing, PromotionSettings(mode="advise"))


def test_a_damaged_older_model_is_not_gone_back_to(desk: Desk) -> None:
    (desk.registry.version(A).folder / "model.ckpt").write_bytes(b"damaged")
    measure(desk, 1.6, 1.6, 1.6)
    settle_bake(desk, SETTINGS)
    assert desk.registry.current_id() == B


def test_a_worse_model_with_nothing_to_go_back_to_is_told_once_and_ends_the_bake(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(desk.registry.version(A).folder)
    measure(desk, 1.6, 1.6, 1.6)
    for _ in range(3):
        settle_bake(desk, SETTINGS)
    assert (desk.registry.current_id(), desk.standing().bake) == (B, None)
    ended = [
        sentence(entry) for entry in desk.audit.entries() if entry.event == CONFIRM and entry.phase == DONE
    ]
    assert len(ended) == 1
    assert "it is worse, and cannot be taken back: nothing to roll back to" in ended[0]
    assert [record.levelname for record in caplog.records].count("ERROR") == 1


def test_a_full_disk_stops_the_rollback_and_the_next_look_does_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(desk, 1.6, 1.6, 1.6)

    def full(*_args: object, **_more: object) -> None:
        raise StorageFull("no space")

    with monkeypatch.context() as patch:
        patch.setattr(files, "append_line", full)
        with pytest.raises(StorageFull):
            settle_bake(desk, SETTINGS)
        assert desk.registry.current_id() == B
    settle_bake(desk, SETTINGS)
    assert desk.registry.current_id() == A


class Killed(BaseException):
    pass


def _writes(folder: Path, patch: pytest.MonkeyPatch, kill_at: int) -> Callable[[], int]:
    """Count every write; the one of this number is the last thing that happens."""
    n_writes = 0

    def counted(name: str) -> None:
        real = getattr(files, name)

        def write(*args: object, **more: object) -> object:
            nonlocal n_writes
            n_writes += 1
            if n_writes == kill_at:
                raise Killed
            return real(*args, **more)

        patch.setattr(files, name, write)

    for name in ("append_line", "link_atomic", "write_json"):
        counted(name)
    return lambda: n_writes


@pytest.mark.parametrize("ratios", [(1.6, 1.6, 1.6), (1.0,) * 24], ids=["rollback", "confirm"])
def test_a_kill_at_any_write_leaves_one_champion_and_one_pair_of_lines(
    tmp_path: Path, ratios: tuple[float, ...]
) -> None:
    kill_at, n_writes = 0, 1
    while kill_at < n_writes:
        kill_at += 1
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        alone(folder)
        desk = Desk(Registry(folder), FakeClock(NOW))
        switch(desk, B)
        measure(desk, *ratios)
        with pytest.MonkeyPatch.context() as patch:
            count = _writes(folder, patch, kill_at)
            try:
                settle_bake(desk, SETTINGS)
            except Killed:
                n_writes = max(n_writes, kill_at + 1)
            else:
                n_writes = count()
        again = Desk(Registry(folder), FakeClock(NOW))
        again.settle()
        settle_bake(again, SETTINGS)
        settle_bake(again, SETTINGS)
        event, serves = (ROLLBACK, A) if len(ratios) == 3 else (CONFIRM, B)
        assert again.registry.current_id() == serves
        lines = [entry.phase for entry in again.audit.entries() if entry.event == event]
        assert lines == [INTENT, DONE], f"killed at write {kill_at}: {lines}"
        assert again.standing() != Standing()
        assert again.standing().bake is None
    assert kill_at > 2


def test_only_the_newest_files_of_evidence_stay(desk: Desk) -> None:
    folder = desk.folder / RACES_FOLDER
    folder.mkdir(exist_ok=True)
    for number in range(40):
        (folder / f"20250101T0000{number:02}Z-00000000.json").write_text("{}")
    measure(desk, 1.0)
    assert len(list(folder.glob("*.json"))) <= 21


# a version that waits, compared before it serves


@pytest.fixture
def racing(tmp_path: Path) -> Desk:
    """A serves; B passed the gate and waits, as `promotion.mode` asks."""
    alone(tmp_path)
    desk = Desk(Registry(tmp_path), FakeClock(NOW))
    add(desk.registry, B, passed_gate=True)
    with desk.lock():
        desk.keep_waiting(B, "the trainer", f"it is compared with {A} first")
    return desk


def measure_race(desk: Desk, *ratios: float, **more: object) -> None:
    race = desk.standing().race
    assert race is not None
    blocks = tuple(Block("2026-01-15T10:00:00Z", 500, (ratio, 1.0), (ratio, 1.0)) for ratio in ratios)
    known = read_evidence(desk.folder, race)
    write_evidence(desk.folder, replace(known, blocks=blocks, **more))  # type: ignore[arg-type]


def mode(name: str, **more: object) -> PromotionSettings:
    return replace(PromotionSettings(), mode=name, **more)  # type: ignore[arg-type]


def last(desk: Desk) -> tuple[str, str, str]:
    entry = list(desk.audit.entries())[-1]
    return entry.event, entry.phase, entry.by


def test_a_race_is_won_by_the_proof_alone_and_the_winner_is_baked(racing: Desk) -> None:
    measure_race(racing, *[0.95] * 23)
    settle_bake(racing, mode("auto"))
    assert racing.registry.current_id() == A, "a day at least"
    measure_race(racing, *[0.95] * 40)
    verdict = settle_bake(racing, mode("auto"))
    assert verdict is not None
    assert verdict.kind == BETTER
    assert racing.registry.current_id() == B
    assert last(racing) == ("promote", DONE, "the race")
    assert verdict.why == (
        f"clients would have got forecasts 5.0 % closer over 40 hours beside {A}, which chance does for a "
        "model that is no better in at most 1% of races"
    )
    bake = racing.standing().bake
    assert bake is not None
    assert (bake.version, bake.against) == (B, A)


def test_advise_shows_the_proof_and_leaves_the_answer_to_a_person(racing: Desk) -> None:
    measure_race(racing, *[0.95] * 40)
    settle_bake(racing, mode("advise"))
    assert racing.registry.current_id() == A
    told = report(racing, mode("advise"))
    assert told["race"]["verdict"] == BETTER
    assert told["race"]["version"] == B
    give(racing.folder, "approve", version=B)
    assert racing.registry.current_id() == B


@pytest.mark.parametrize("name", ["advise", "auto"])
def test_a_loser_waits_no_longer_and_may_still_be_promoted(racing: Desk, name: str) -> None:
    measure_race(racing, *[1.2] * 20)
    settle_bake(racing, mode(name))
    assert racing.registry.current_id() == A
    assert racing.standing().waiting is None
    assert last(racing) == ("lose", DONE, "the race")
    give(racing.folder, "promote", version=B)
    assert racing.registry.current_id() == B


@pytest.mark.parametrize(("choice", "serves"), [("keep", A), ("gate", B)])
def test_a_week_without_a_proof_ends_as_the_setting_says(racing: Desk, choice: str, serves: str) -> None:
    rng = np.random.default_rng(1)
    measure_race(racing, *(1 + 0.02 * rng.normal(size=168)))
    settle_bake(racing, mode("auto", on_inconclusive=choice))
    assert racing.registry.current_id() == serves
    assert racing.standing().waiting is None


def test_a_person_who_does_not_answer_is_not_waited_for_for_ever(racing: Desk) -> None:
    measure_race(racing, *[0.95] * 40)
    racing.clock.time += timedelta(days=8)  # type: ignore[attr-defined]
    settle_bake(racing, mode("advise"))
    assert racing.standing().waiting is None
    assert [entry.why for entry in racing.audit.entries()][-1] == "no person answered for 7 days"


def test_a_race_with_hours_can_be_shown_over_http_and_says_what_clients_would_have_got(racing: Desk) -> None:
    measure_race(racing, *[0.95] * 5)
    told = report(racing, SETTINGS)
    msgspec.json.encode(told)
    assert "clients would have got forecasts 5.0 % closer (proof that it is better: " in tell(told["race"])
    measure_race(racing, *[1.6] * 3)
    told = report(racing, SETTINGS)["race"]
    assert told["why"].endswith("what clients would have got)")
    assert tell(told).count("clients") == 1, "a verdict says itself by how much"


def test_a_person_may_end_a_cooldown_that_history_tells_of(desk: Desk) -> None:
    measure(desk, 1.6, 1.6, 1.6)
    settle_bake(desk, SETTINGS)
    told = [sentence(entry) for entry in desk.audit.entries()][-1]
    assert told.endswith("; no training puts a model into service until 2026-01-16T10:00:05Z")
    assert give(desk.folder, "resume").phase == DONE
    assert desk.standing().cooldown is None
    assert give(desk.folder, "resume").phase == "refused"


def test_a_version_proven_worse_while_a_cooldown_lasts_waits_no_longer(desk: Desk) -> None:
    measure(desk, 1.6, 1.6, 1.6)
    settle_bake(desk, SETTINGS)
    add(desk.registry, C, passed_gate=True)
    with desk.lock():
        desk.keep_waiting(C, "the trainer", "it waits for the end of the cooldown")
    measure_race(desk, *[1.6] * 3)
    settle_bake(desk, SETTINGS)
    assert desk.standing().waiting is None
    assert last(desk) == ("lose", DONE, "the race")
    settle_bake(Desk(desk.registry, FakeClock(NOW + timedelta(hours=25))), SETTINGS)
    assert desk.registry.current_id() == A


def test_a_hold_keeps_the_winner_of_a_race_out_until_resume(racing: Desk) -> None:
    give(racing.folder, "hold")
    measure_race(racing, *[0.95] * 40)
    settle_bake(racing, mode("auto"))
    assert racing.registry.current_id() == A
    give(racing.folder, "resume")
    assert racing.registry.current_id() == B


def test_a_race_against_a_model_that_no_longer_serves_decides_nothing(racing: Desk) -> None:
    measure_race(racing, *[0.95] * 40)
    add(racing.registry, C, promoted=True)
    with racing.lock():
        racing.promote(C, "ann", "another")
    settle_bake(racing, mode("auto"))
    assert racing.registry.current_id() == C


def test_a_challenger_that_cannot_be_loaded_loses(racing: Desk) -> None:
    measure_race(racing, unable="it is no model")
    settle_bake(racing, mode("auto"))
    assert racing.standing().waiting is None


def test_a_waiting_version_of_an_older_program_is_compared_with_nothing(racing: Desk) -> None:
    path = racing.folder / STATE
    raw = json.loads(path.read_text())
    del raw["waiting"]["id"]
    path.write_text(json.dumps(raw))
    assert racing.standing().race is None
    assert settle_bake(racing, mode("auto")) is None
    assert racing.registry.current_id() == A
