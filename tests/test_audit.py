"""The audit: pairs of lines, torn and foreign lines, rotation, and the words people read."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from desk_folder import NOW, STATES, C, desk_of, order

from fleetcast import __version__
from fleetcast.errors import StorageBroken, StorageFull
from fleetcast.promotion import audit
from fleetcast.promotion.audit import Audit, Entry, new_entry, sentence


@pytest.fixture
def book(tmp_path: Path) -> Audit:
    return Audit(tmp_path)


def entry(event: str = audit.HOLD, **more: object) -> Entry:
    return new_entry(event, NOW, "ann", "because", **more)


def test_a_line_holds_who_what_why_when_and_by_which_release(book: Audit) -> None:
    book.append(entry(audit.ROLLBACK, source="b", target="a", order="o"))
    (line,) = book.path.read_text().splitlines()
    raw = json.loads(line)
    assert raw.pop("id").startswith("20260115T100005Z-")
    assert raw == {
        "event": "rollback",
        "phase": "intent",
        "at": "2026-01-15T10:00:05Z",
        "by": "ann",
        "why": "because",
        "from": "b",
        "to": "a",
        "order": "o",
        "revision": __version__,
    }


def test_an_act_is_open_until_its_second_line(book: Audit) -> None:
    first, second = entry(order="1"), entry(order="2")
    for item in (first, second):
        book.append(item)
    book.finish(first, NOW)
    assert book.open_intents() == [second]
    assert book.ended_orders() == {"1"}
    ended = book.outcome("1")
    assert ended is not None
    assert (ended.id, ended.phase) == (first.id, "done")
    assert book.outcome("2") is None


@pytest.mark.parametrize(
    "damage",
    [b'{"id": "x", "event"', b"\x00" * 50, b"[]\n", b"7\n", b'{"id": 7}\n', b"{}\n", b"\xff\xfe\n"],
)
def test_a_torn_or_foreign_line_costs_only_itself(damage: bytes, book: Audit) -> None:
    book.append(entry(order="1"))
    with book.path.open("ab") as stream:
        stream.write(damage)
    book.append(entry(order="2"))
    assert [item.order for item in book.entries()] == ["1", "2"]


def test_the_files_rotate_and_all_of_them_are_read(book: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MAX_BYTES", 2000)
    for number in range(100):
        book.append(entry(order=str(number)))
    names = sorted(path.name for path in book.path.parent.iterdir())
    assert names == ["promotions.jsonl", "promotions.jsonl.1"]
    assert all(path.stat().st_size <= 2000 for path in book.path.parent.iterdir())
    found = [int(item.order or "") for item in book.entries()]
    assert found == list(range(found[0], 100))
    assert len(found) > 7


@contextmanager
def small_files() -> Iterator[None]:
    """Limit every file to 700 bytes; not as a fixture, since pytest's own log is such a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_that_the_disk_refuses_leaves_nothing_of_it(book: Audit) -> None:
    # Given a disk that takes half of the fourth line
    with small_files(), pytest.raises(StorageFull):
        for _ in range(10):
            book.append(entry())
            seen = book.path.read_bytes()
    # Then the file is as it was: what was reported as not written is not found later
    assert book.path.read_bytes() == seen
    assert seen.endswith(b"\n")


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (entry(audit.PROMOTE, phase="done", target="v2"), "ann put v2 into service instead of no model: b"),
        (
            entry(audit.PROMOTE, phase="done", target="b", source="a", is_forced=True),
            "of a, by force: because",
        ),
        (entry(audit.ROLLBACK, source="b", target="a"), "(begun, not finished yet): because"),
        (entry(audit.PAUSE, phase="done", until="2026-01-16"), "paused trainings until 2026-01-16"),
        (entry(audit.RESUME, phase="done", target="w"), "resumed and put w, which waited, into service"),
        (entry(audit.RESUME, phase="done"), "ann resumed: because"),
        (entry(audit.VETO, phase="done", target="w"), "ann vetoed w"),
        (entry(audit.WAIT, phase="done", target="w"), "w passed the gate and waits"),
        (entry(audit.TRAIN_NOW, phase="done", attempt="t"), "ann ordered a training (attempt t)"),
        (entry(audit.VERDICT, phase="note", target="w"), "the gate judged w"),
        (entry(audit.TRAINING, phase="note", attempt="t"), "training t ended without a model"),
        (entry(audit.ADOPT, phase="done", target="w"), "ann found w in service"),
        (entry("order", phase="refused"), "refused to ann (order): because"),
        (entry("new", phase="done"), "ann: new"),
    ],
)
def test_a_line_in_words(item: Entry, words: str) -> None:
    assert words in sentence(item)
    assert sentence(item).startswith("2026-01-15 10:00:05  ")


def test_a_folder_in_the_place_of_the_audit_is_read_as_no_lines_and_stops_every_act(
    tmp_path: Path,
) -> None:
    STATES["idle"](tmp_path)
    (tmp_path / "promotions.jsonl").unlink()
    (tmp_path / "promotions.jsonl").mkdir()
    desk = desk_of(tmp_path)
    assert list(desk.audit.entries()) == []
    assert desk.models()["aliases"]["champion"] == C
    with pytest.raises((StorageBroken, StorageFull)):
        desk.give(order("rollback"))
    assert desk.registry.current_id() == C


def test_an_audit_that_grew_out_of_bounds_is_read_from_its_end_and_rotates(book: Audit) -> None:
    with book.path.open("wb") as stream:
        stream.seek(3 * 10**9)
        stream.write(b"\n")
    book.append(entry(order="o", phase=audit.DONE))
    book.append(entry(order="p", phase=audit.DONE))
    assert book.ended_orders() == {"o", "p"}
    assert book.path.stat().st_size < audit.MAX_BYTES
