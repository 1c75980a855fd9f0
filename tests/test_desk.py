"""The desk: what each order does in each state, and that a kill at any write loses and doubles nothing."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import desk_folder
import pytest
from desk_folder import FAILED, SPARE, STATES, WAITS, A, B, C, add, desk_of, give, order

from fleetcast import files
from fleetcast.errors import StorageFull
from fleetcast.forecast.registry import Registry
from fleetcast.promotion import orders
from fleetcast.promotion.audit import Entry, Standing
from fleetcast.promotion.desk import Desk

ROOT = Path(__file__).parents[1]
# an order: its kind and what it names
ORDERS: dict[str, dict[str, Any]] = {
    "hold": {},
    "resume": {},
    "pause": {},
    "rollback": {},
    "rollback to the first": {"version": A},
    "promote a spare": {"version": SPARE},
    "promote what failed": {"version": FAILED},
    "promote what failed, by force": {"version": FAILED, "force": True},
    "approve what waits": {"version": WAITS},
    "veto what waits": {"version": WAITS},
    "veto the champion": {"version": C},
}
# (order, state): the champion afterwards; absent = the order is refused
IN_SERVICE = {
    "empty": None,
    "alone": A,
    **dict.fromkeys(("idle", "baking", "held", "paused", "waiting", "older"), C),
}
FULL = ("idle", "baking", "held", "paused", "waiting")
DONE: dict[tuple[str, str], str | None] = {
    **{(name, state): found for state, found in IN_SERVICE.items() for name in ("hold", "pause")},
    ("resume", "held"): C,
    ("resume", "paused"): C,
    ("resume", "waiting"): WAITS,
    **{("rollback", state): B for state in (*FULL, "older")},
    **{("rollback to the first", state): A for state in (*FULL, "older")},
    **{("promote a spare", state): SPARE for state in FULL},
    **{("promote what failed, by force", state): FAILED for state in FULL},
    ("approve what waits", "waiting"): WAITS,
    **{("veto what waits", state): C for state in FULL},
}
every_case = pytest.mark.parametrize(
    ("name", "state"), [(name, state) for name in ORDERS for state in STATES]
)


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut would lose is not the question here, and thousands of fsyncs take minutes."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the program runs after it but what frees locks."""


class Guillotine:
    """Kills at the n-th durable step: before it, after it, or in the middle of a line."""

    STEPS = ("append_line", "write_atomic", "link_atomic", "remove_leftover")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at, self.how, self.count = 0, "before", 0
        for name in self.STEPS:
            monkeypatch.setattr(files, name, self._wrap(name, getattr(files, name)))

    def _wrap(self, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def do(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count != self.at:
                return step(*args, **kwargs)
            if self.how == "after":
                step(*args, **kwargs)
            if self.how == "torn" and name == "append_line":
                path, line = args
                with path.open("ab") as stream:
                    stream.write(line[: len(line) // 2].encode())
            raise Killed(name)

        return do


def kind_of(name: str) -> str:
    return name.split()[0]


def links(folder: Path) -> tuple[str | None, ...]:
    registry = Registry(folder)
    link = folder / "baseline.npz"
    baseline = str(link.readlink()) if link.is_symlink() else None
    return registry.current_id(), registry.previous_id(), baseline


def timeless(standing: Standing) -> Standing:
    """Return what stands without what differs between two runs."""
    return replace(
        standing,
        held=standing.held and replace(standing.held, since=""),
        paused=standing.paused and replace(standing.paused, since=""),
        waiting=standing.waiting and replace(standing.waiting, since=""),
        bake=standing.bake and replace(standing.bake, id="", since=""),
    )


def lines_of(folder: Path, order_id: str) -> list[Entry]:
    return [entry for entry in desk_of(folder).audit.entries() if entry.order == order_id]


@every_case
def test_an_order_does_in_every_state_what_the_table_says(name: str, state: str, tmp_path: Path) -> None:
    STATES[state](tmp_path)
    before = links(tmp_path)
    ended = give(tmp_path, kind_of(name), **ORDERS[name])
    assert (ended.phase == "done") == ((name, state) in DONE), ended.why
    champion = DONE.get((name, state), before[0])
    assert links(tmp_path)[0] == champion
    if ended.phase == "refused":
        assert links(tmp_path)[:2] in (before[:2], (C, B))  # of an older folder the record begins
    phases = [entry.phase for entry in lines_of(tmp_path, ended.order or "")]
    assert phases == (["intent", "done"] if ended.phase == "done" else ["refused"])
    assert not orders.any_waiting(tmp_path)
    # what stands can be found again from the audit alone
    known = desk_of(tmp_path).standing()
    (tmp_path / "promotion.json").unlink(missing_ok=True)
    assert timeless(desk_of(tmp_path).standing()) == timeless(known)


@pytest.mark.parametrize("how", ["before", "after", "torn"])
@every_case
def test_a_kill_at_any_write_of_an_order_loses_and_doubles_nothing(
    name: str, state: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given the order carried out without a kill, as the measure
    STATES[state](tmp_path / "start")
    (tmp_path / "start").mkdir(exist_ok=True)
    shutil.copytree(tmp_path / "start", tmp_path / "whole", symlinks=True)
    ended = give(tmp_path / "whole", kind_of(name), **ORDERS[name])
    expected, standing = links(tmp_path / "whole"), desk_of(tmp_path / "whole").standing()
    blade = Guillotine(monkeypatch)
    for step in range(1, 40):
        # When the same order is killed at one of its writes
        folder = tmp_path / f"killed-{step}"
        shutil.copytree(tmp_path / "start", folder, symlinks=True)
        own = order(kind_of(name), **ORDERS[name])
        blade.at, blade.how, blade.count = step, how, 0
        try:
            desk_of(folder).give(own)
            break  # it has fewer writes
        except Killed:
            blade.at = 0
        # Then there is one champion at every moment, and the next look finishes it
        if IN_SERVICE[state]:
            assert links(folder)[0] in (IN_SERVICE[state], expected[0])
        desk_of(folder).settle()
        lines = lines_of(folder, own.id)
        if step == 1 and how != "after":  # killed before the order was written down: it was never given
            assert lines == []
            assert [link for link in links(folder) if link] in (
                [link for link in links(tmp_path / "start") if link],
                [C, B],  # of an older folder the record begins
            )
        else:
            assert links(folder) == expected
            assert timeless(desk_of(folder).standing()) == timeless(standing)
            assert Counter(entry.phase for entry in lines)[ended.phase] == 1
            assert Counter(entry.phase for entry in lines)["intent"] == (ended.phase == "done")
            assert len({entry.id for entry in lines}) == 1
        assert not orders.any_waiting(folder)
        assert desk_of(folder).audit.open_intents() == []
        # and a further look changes nothing
        seen = (folder / "promotions.jsonl").read_bytes() if (folder / "promotions.jsonl").exists() else b""
        desk_of(folder).settle()
        after = (folder / "promotions.jsonl").read_bytes() if (folder / "promotions.jsonl").exists() else b""
        assert after == seen
    else:
        raise AssertionError("an order has fewer than 40 writes")
    assert step >= 3


KILLER = """
import os, signal, sys
from pathlib import Path
from fleetcast import files
from desk_folder import desk_of, order
at, count = int(sys.argv[2]), 0

def wrap(step):
    def do(*args, **kwargs):
        global count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args, **kwargs)
    return do

for name in ("append_line", "write_atomic", "link_atomic", "remove_leftover"):
    setattr(files, name, wrap(getattr(files, name)))
desk_of(Path(sys.argv[1])).give(order(sys.argv[3]))
"""


@pytest.mark.parametrize("kind", ["rollback", "resume"])
def test_a_killed_process_frees_the_lock_and_the_next_one_finishes(kind: str, tmp_path: Path) -> None:
    # Given a process that is killed at each write of a switch
    for step in range(2, 30):
        folder = tmp_path / str(step)
        STATES["waiting"](folder)
        killed = subprocess.run(
            [sys.executable, "-c", KILLER, str(folder), str(step), kind],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            check=False,
        )
        if killed.returncode == 0:
            break
        # When the next process looks
        assert killed.returncode == -9
        desk_of(folder).settle()
        # Then the order is done once
        assert links(folder)[0] == (B if kind == "rollback" else WAITS)
        done = [entry.event for entry in desk_of(folder).audit.entries() if entry.phase == "done"]
        assert done.count(kind) == 1
    assert 5 < step < 29


def test_two_programs_at_once_carry_each_order_out_once(tmp_path: Path) -> None:
    STATES["idle"](tmp_path)
    code = (
        "import sys\nfrom pathlib import Path\nfrom desk_folder import desk_of, order, SPARE, C\n"
        "for number in range(10):\n"
        "    for kind in ('hold', 'resume'):\n"
        "        desk_of(Path(sys.argv[1])).give(order(kind, by=sys.argv[2]))\n"
    )
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), by],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        )
        for by in ("ann", "bob")
    ]
    assert [program.wait(120) for program in programs] == [0, 0]
    ended = Counter(e.order for e in desk_of(tmp_path).audit.entries() if e.phase in ("done", "refused"))
    ended.pop(None)
    assert len(ended) == 40
    assert set(ended.values()) == {1}
    assert not orders.any_waiting(tmp_path)


def test_a_switch_that_cannot_be_written_down_does_not_happen(tmp_path: Path) -> None:
    # Given a disk that takes the order but not the audit's line
    STATES["idle"](tmp_path)
    audit = tmp_path / "promotions.jsonl"
    before, own = links(tmp_path), order("rollback")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (audit.stat().st_size + 100, hard))
    try:
        with pytest.raises(StorageFull, match="no space"):
            desk_of(tmp_path).give(own)
        # Then nothing moved, and the order waits
        assert links(tmp_path) == before
        with pytest.raises(StorageFull):
            desk_of(tmp_path).settle()
        assert links(tmp_path) == before
        assert orders.any_waiting(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # When there is space again it is carried out, once
    desk_of(tmp_path).settle()
    assert links(tmp_path)[:2] == (B, A)
    assert [entry.phase for entry in lines_of(tmp_path, own.id)] == ["intent", "done"]


def test_a_champion_that_another_program_put_in_is_written_down(tmp_path: Path) -> None:
    STATES["idle"](tmp_path)
    Registry(tmp_path).promote(SPARE)
    ended = give(tmp_path, "rollback")
    assert (ended.source, ended.target) == (SPARE, C)
    found = [entry for entry in desk_of(tmp_path).audit.entries() if entry.event == "adopt"]
    assert [entry.phase for entry in found] == ["intent", "done"]
    assert {(e.target, e.why) for e in found} == {(SPARE, "last.ckpt was moved by another program")}


def test_rollbacks_go_back_by_the_record_and_never_to_what_was_rolled_back(tmp_path: Path) -> None:
    STATES["idle"](tmp_path)
    assert give(tmp_path, "rollback").target == B
    assert give(tmp_path, "promote", version=SPARE).target == SPARE
    assert links(tmp_path)[:2] == (SPARE, B)
    assert give(tmp_path, "rollback").target == B
    assert give(tmp_path, "rollback").target == A
    assert links(tmp_path)[:2] == (A, None)
    assert not (tmp_path / "previous.ckpt").is_symlink()
    assert "nothing to roll back to" in give(tmp_path, "rollback").why
    # a person may bring one back, by force
    assert "was rolled back" in give(tmp_path, "promote", version=C).why
    assert give(tmp_path, "promote", version=C, force=True).phase == "done"
    assert C not in Registry(tmp_path).rolled_back_ids()


def test_a_damaged_previous_version_is_passed_over(tmp_path: Path) -> None:
    STATES["idle"](tmp_path)
    Registry(tmp_path).version(B).model_path.write_bytes(b"flipped")
    assert "sha256" in give(tmp_path, "rollback", version=B).why
    assert give(tmp_path, "rollback").target == A


def test_the_previous_version_and_the_one_that_waits_are_never_pruned(tmp_path: Path) -> None:
    STATES["waiting"](tmp_path)
    desk = desk_of(tmp_path)
    for number in range(10, 40):
        add(desk.registry, f"20260116T1000{number}Z-00{number}")
    with desk.lock():
        desk.registry.prune(1, desk.standing().protects)
    assert desk.registry.version_ids() == [B, C, WAITS, "20260116T100039Z-0039"]


def test_a_version_that_waited_brings_the_errors_to_expect_of_it_along(tmp_path: Path) -> None:
    STATES["waiting"](tmp_path)
    assert links(tmp_path)[2] == f"versions/{WAITS}/baseline.npz"
    give(tmp_path, "approve", version=WAITS)
    assert links(tmp_path)[2] == f"versions/{WAITS}/baseline_promoted.npz"
    in_force = Registry(tmp_path).baseline_in_force()
    assert in_force is not None
    assert in_force.baseline_path.read_bytes() == b"better"
    # a later baseline stays in force
    shutil.rmtree(tmp_path)
    STATES["waiting"](tmp_path)
    Registry(tmp_path).set_baseline(SPARE)
    give(tmp_path, "approve", version=WAITS)
    assert links(tmp_path)[2] == f"versions/{SPARE}/baseline.npz"


def test_a_version_waits_for_the_champion_it_was_compared_with_only(tmp_path: Path) -> None:
    STATES["waiting"](tmp_path)
    give(tmp_path, "rollback")
    ended = give(tmp_path, "resume")
    assert (ended.phase, ended.target) == ("done", None)
    assert links(tmp_path)[0] == B


def test_an_order_about_a_champion_that_is_not_there_any_more_is_refused(tmp_path: Path) -> None:
    STATES["idle"](tmp_path)
    assert "is in service now" in give(tmp_path, "rollback", champion=B).why
    assert give(tmp_path, "rollback", champion=C).target == B


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"format": 1}',
        b'{"format": 2, "id": "20260115T100005000000Z-00000000"}',
        json.dumps({"format": 1, "id": "../../x", "kind": "hold"}).encode(),
        b"\xff\xfe" * 100,
        b"[" * 100_000,
        b'"' + b"x" * 2_000_000 + b'"',
    ],
)
def test_a_file_that_is_no_order_is_refused_once_and_goes(content: bytes, tmp_path: Path) -> None:
    STATES["idle"](tmp_path)
    before = links(tmp_path)
    (tmp_path / "orders").mkdir(exist_ok=True)
    (tmp_path / "orders" / "20260115T100005000000Z-00000000.json").write_bytes(content)
    desk_of(tmp_path).settle()
    desk_of(tmp_path).settle()
    refused = [entry for entry in desk_of(tmp_path).audit.entries() if entry.phase == "refused"]
    assert len(refused) == 1
    assert "order" in refused[0].why
    assert not orders.any_waiting(tmp_path)
    assert links(tmp_path) == before


def test_links_pipes_and_folders_among_the_orders_hang_nothing_and_cost_nothing(tmp_path: Path) -> None:
    STATES["idle"](tmp_path)
    folder, precious = tmp_path / "orders", tmp_path / "precious.json"
    precious.write_text(json.dumps({"format": 1}))
    (folder / "a.json").symlink_to(precious)
    os.mkfifo(folder / "b.json")
    (folder / "c.json").mkdir()
    (folder / "d.txt").write_text("notes")
    assert give(tmp_path, "hold").phase == "done"
    assert precious.exists()
    assert sorted(path.name for path in folder.iterdir()) == ["c.json", "d.txt"]


def test_a_damaged_state_is_found_again_in_the_audit(tmp_path: Path) -> None:
    STATES["waiting"](tmp_path)
    known = desk_of(tmp_path).standing()
    for damage in (b"", b"{}", b"[]", b'{"format": 9}', b"\x00" * 200):
        (tmp_path / "promotion.json").write_bytes(damage)
        assert timeless(desk_of(tmp_path).standing()) == timeless(known)


def test_looking_after_a_folder_without_orders_creates_nothing(tmp_path: Path) -> None:
    desk_of(tmp_path / "checkpoints").look_after()
    desk_folder.older(tmp_path / "older")
    seen = sorted(path.name for path in (tmp_path / "older").iterdir())
    desk_of(tmp_path / "older").look_after()
    assert not (tmp_path / "checkpoints").exists()
    assert sorted(path.name for path in (tmp_path / "older").iterdir()) == seen


def test_an_ordered_training_that_no_daemon_took_up_for_a_day_is_refused(tmp_path: Path) -> None:
    STATES["idle"](tmp_path)
    desk = desk_of(tmp_path)
    assert desk.give(order("train-now")) is None
    found = desk.training_order()
    assert found is not None
    desk.clock.advance(hours=25)  # type: ignore[attr-defined]
    assert desk.training_order() is None
    ended = desk.audit.outcome(found.id)
    assert ended is not None
    assert (ended.phase, ended.why) == ("refused", "no retraining daemon took it up within 24 h")


def test_more_orders_than_people_give_are_refused(tmp_path: Path) -> None:
    desk = desk_of(tmp_path)
    for _ in range(orders.MAX_WAITING):
        desk.give(order("train-now"))
    with pytest.raises(Exception, match="wait already"):
        desk.give(order("train-now"))


def test_the_list_of_models_says_who_plays_which_role(tmp_path: Path) -> None:
    STATES["waiting"](tmp_path)
    give(tmp_path, "veto", version=SPARE)
    listed = desk_of(tmp_path).models()
    assert listed["aliases"] == {"champion": C, "previous": B, "waiting": WAITS}
    roles = {item["id"]: item["roles"] for item in listed["versions"]}
    assert roles == {C: ["champion"], B: ["previous"], WAITS: ["waiting"], A: [], SPARE: [], FAILED: []}
    assert [item["id"] for item in listed["versions"] if item["vetoed"]] == [SPARE]
    assert {item["id"]: item["since"] for item in listed["versions"]}[C] == "2026-01-15T10:00:05Z"
    assert Desk(Registry(tmp_path / "none")).models()["versions"] == []
