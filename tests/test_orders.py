"""What an order may say, and its file; hostile input is refused before anything is written."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from desk_folder import NOW, SPARE, order

from fleetcast.clock import iso_z
from fleetcast.errors import BadOrder, ExitCode, StorageBroken
from fleetcast.promotion import orders


@pytest.mark.parametrize("kind", orders.KINDS)
def test_an_order_is_read_back_as_it_was_written(kind: str, tmp_path: Path) -> None:
    given = order(kind, **({"version": SPARE} if kind in orders.NEED_VERSION else {}))
    orders.submit(tmp_path, given)
    assert [found for _, found in orders.waiting(tmp_path)] == [given]
    assert [path.name for path in (tmp_path / "orders").iterdir()] == [f"{given.id}.json"]


@pytest.mark.parametrize(
    "version",
    [
        "",
        "..",
        "../../etc/passwd",
        "versions/x",
        "/etc/passwd",
        "a\x00b",
        "a\nb",
        ".hidden",
        "-rf",
        "x" * 101,
        "ü",
        "a b",
        "a.b",
        7,
        ["a"],
    ],
)
def test_a_version_that_is_no_id_is_refused(version: Any) -> None:
    with pytest.raises(BadOrder, match="must be an id like") as refusal:
        order("promote", version=version)
    assert refusal.value.exit_code == ExitCode.BAD_SETTINGS
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("", "is needed"),
        ("   ", "is needed"),
        (None, "is needed"),
        (7, "is needed"),
        ("x" * 501, "has 501 characters, at most 500"),
        ("x" * 1_000_000, "has 1000000 characters, at most 500"),
        ("one\ntwo", "one printable line"),
        ("\x1b[31mred", "one printable line"),
        ("a\x00b", "one printable line"),
        ("right\u202eleft", "one printable line"),
        ("two\u2028lines", "one printable line"),
        ("half \ud800", "one printable line"),
    ],
)
def test_a_reason_is_one_printable_line_for_people(reason: Any, said: str) -> None:
    with pytest.raises(BadOrder, match=said) as refusal:
        order("hold", reason=reason)
    assert len(str(refusal.value)) < 200
    with pytest.raises(BadOrder):
        order("hold", by=reason)


@pytest.mark.parametrize(
    "until",
    [
        "",
        "tomorrow",
        "2026-13-01T00:00Z",
        "2026-01-15T09:00Z",
        "2026-01-15T10:00:05Z",
        "2027-01-15T10:00Z",
        "9999-12-31T23:59:59-23:59",
        "0001-01-01T00:00:00+23:59",
        "x" * 1_000_000,
        7,
        [],
    ],
)
def test_a_pause_ends_at_a_time_that_is_ahead_and_not_too_far(until: Any) -> None:
    with pytest.raises(BadOrder, match=r"until must be in the future|a time looks like") as refusal:
        order("pause", until=until)
    assert len(str(refusal.value)) < 200


def test_times_without_an_offset_are_utc() -> None:
    assert order("pause", until="2026-01-15T18:00").until == "2026-01-15T18:00:00Z"
    assert order("pause", until="2026-01-15T18:00+02:00").until == "2026-01-15T16:00:00Z"
    last = iso_z(NOW + orders.LONGEST_PAUSE)
    assert order("pause", until=last).until == last


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("dance", {}, "an order is one of"),
        ("promote", {}, "needs a version"),
        ("hold", {"version": SPARE}, "takes no version"),
        ("hold", {"force": True}, "force is true or false"),
        ("promote", {"version": SPARE, "force": "yes"}, "force is true or false"),
        ("hold", {"until": "2026-01-16"}, "takes no until"),
        ("rollback", {"champion": "../x"}, "champion must be an id"),
    ],
)
def test_an_order_of_another_shape_says_what_would_be_right(
    kind: str, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadOrder, match=said):
        order(kind, **more)


def test_an_order_s_file_under_another_name_or_with_more_in_it_is_none(tmp_path: Path) -> None:
    given = order("hold")
    orders.submit(tmp_path, given)
    path = tmp_path / "orders" / f"{given.id}.json"
    content = json.loads(path.read_text())
    (tmp_path / "orders" / "other.json").write_text(json.dumps(content))
    path.write_text(json.dumps({**content, "shell": "rm"}))
    found = [item for _, item in orders.waiting(tmp_path)]
    assert [type(item) for item in found] == [BadOrder, BadOrder]


def test_an_order_knows_its_age() -> None:
    assert order("hold").age(NOW + timedelta(hours=2)) == timedelta(hours=2)


def test_the_user_of_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "tft")
    monkeypatch.setenv("SUDO_USER", "ann")
    assert orders.this_user() == "ann as tft"
    monkeypatch.setenv("SUDO_USER", "tft")
    assert orders.this_user() == "tft"
    monkeypatch.setenv("LOGNAME", "\x1b[31m" + "x" * 200)
    assert len(orders.this_user()) <= orders.MAX_NAME
    assert orders.this_user().isprintable()


def test_a_file_in_the_place_of_the_folder_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "orders").write_text("")
    assert list(orders.waiting(tmp_path)) == []
    assert not orders.any_waiting(tmp_path)
    with pytest.raises(StorageBroken, match="orders is no folder, so no order can be written down") as found:
        orders.submit(tmp_path, order("hold"))
    assert found.value.hint == "move it away, then give the order again"
