"""Servers forgotten: every stored row goes, whatever dies in between, and the name is a new server's."""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from buffer_rows import DAY_MS, NOON_MS, batch, rows_of
from settled_rows import settled
from small_fleet import SmallFleet, quiet_answers, settings
from test_console import Terminal
from test_daystore import Crash, SealHere
from test_exclusions import n_settled
from test_inference import START, World
from told_daemon import Told

from adaptive_retraining_daemon import AdaptiveRetrainingDaemon
from data_buffer import DataBuffer
from fleetcast.cli import main
from fleetcast.clock import SystemClock
from fleetcast.errors import CorruptFile, ExitCode, StorageFull
from fleetcast.exclusions import (
    FORGOTTEN_NAME,
    Exclusions,
    exclude,
    forget,
    note_forgotten,
    read,
    read_forgotten,
)
from fleetcast.serving import corrector, ledger
from fleetcast.serving.corrector import Corrector
from fleetcast.serving.history import BinHistory
from fleetcast.settings import BinSettings, ForecastSettings
from fleetcast.storage import upkeep
from fleetcast.storage.upkeep import UpkeepPace

WHY = {"by": "me", "reason": "taken down"}
TODAY = datetime(2026, 1, 15, 18, tzinfo=UTC)
ODD = (
    "*",
    "web[0-9]?",
    "a/../../b",
    "..",
    "wéb-ü\u4e2d",
    "<img src=x onerror=1>",
    "n" * 128,
    "-x",
    "'; rm -rf /",
)


# days


def fill(buffer: DataBuffer, *names: str) -> None:
    """Store two days that are over, one of them sealed, and today: a row of each server an hour."""
    for day in range(-2, 1):
        rows = [
            (name, NOON_MS + day * DAY_MS + hour * 3_600_000, {"cpu_pct": float(hour)})
            for name in names
            for hour in range(-12, 5)
        ]
        buffer.append_batch(batch(rows))
        buffer.flush()
    buffer.append_predictions(settled(list(names), range(3), lambda *_: 1.0))
    buffer.append_batch(batch((name, NOON_MS + 5 * 3_600_000, {"cpu_pct": 9.0}) for name in names))


def open_buffer(folder: Path, on_step: Callable[[str], None] = lambda _step: None) -> DataBuffer:
    return DataBuffer(folder, expire=False, pace=UpkeepPace(seal_quiet_s=0.0), on_step=on_step).open()


def seal_all(buffer: DataBuffer) -> None:
    for _ in range(8):
        buffer.maintain(TODAY)


def until_gone(buffer: DataBuffer, drops: dict[str, int]) -> None:
    for _ in range(40):
        if buffer.forget(drops, TODAY):
            return
    pytest.fail("some rows are left")


def servers_in(folder: Path) -> tuple[set[str], set[str]]:
    """Return the servers with records, and with settled forecasts, as any reader finds them."""
    reader = DataBuffer(folder)
    records = {server for server, _ in rows_of(reader.iter_batches(0, 2**45))}
    return records, set(reader.read_predictions(0, 2**45).server_name)


@pytest.fixture
def seals_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "SealProcess", SealHere)


@pytest.mark.usefixtures("seals_here")
def test_rows_from_before_go_from_every_day_and_all_others_stay(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    fill(buffer, "a", "b", "c")
    seal_all(buffer)
    everything = rows_of(DataBuffer(tmp_path).iter_batches(0, 2**45))
    late = NOON_MS + 5 * 3_600_000
    until_gone(buffer, {"a": late, "b": late + 1})
    left = rows_of(DataBuffer(tmp_path).iter_batches(0, 2**45))
    assert left == {key: values for key, values in everything.items() if key[0] == "c" or key == ("a", late)}
    assert set(buffer.read_predictions(0, 2**45).server_name) == {"c"}
    assert buffer.get_stats()["total_records"] == len(left)
    assert not buffer.has_server("b")
    buffer.close()


@pytest.mark.usefixtures("seals_here")
def test_a_day_that_only_held_them_goes(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    fill(buffer, "a")
    seal_all(buffer)
    until_gone(buffer, {"a": 2**45})
    assert list(tmp_path.glob("*.parquet")) == []
    assert buffer.newest_record_time() is None
    fill(buffer, "a")
    assert servers_in(tmp_path) == ({"a"}, {"a"})
    buffer.close()
    assert servers_in(tmp_path) == ({"a"}, {"a"})


def test_a_sealed_day_is_written_again_by_a_child_while_rows_go_on_to_come(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    fill(buffer, *ODD, "kept")
    drops = dict.fromkeys(ODD, NOON_MS + DAY_MS)
    for number in range(2000):
        if buffer.forget(drops, TODAY):
            break
        buffer.append_batch(batch([("new", NOON_MS + DAY_MS // 4 + number, {"cpu_pct": 1.0})]))
        buffer.maintain(TODAY)
        time.sleep(0.02)
    assert servers_in(tmp_path) == ({"kept", "new"}, {"kept"})
    buffer.close()


@pytest.mark.usefixtures("seals_here")
def test_a_crash_at_any_step_is_gone_on_from(tmp_path: Path) -> None:
    """Given a process that dies at its n-th step, for every n, then the next one ends the work, and no
    row of another server was ever missing."""

    def life(folder: Path, on_step: Callable[[str], None]) -> None:
        buffer = open_buffer(folder)
        fill(buffer, "a", "b")
        for _ in range(3):  # the first day is sealed
            buffer.maintain(datetime(2026, 1, 14, 1, tzinfo=UTC))
        buffer.close()
        buffer = DataBuffer(folder, expire=False, pace=UpkeepPace(seal_quiet_s=0.0), on_step=on_step)
        try:
            until_gone(buffer, {"a": 2**45})
        finally:
            buffer._own().lock.release()  # as the kernel does for a killed process

    steps: list[str] = []
    life(tmp_path / "whole", steps.append)
    assert {"seal started", "day swapped", "day built"} <= set(steps)
    expected = set(rows_of(DataBuffer(tmp_path / "whole").iter_batches(0, 2**45)))
    assert len(expected) == 3 * 17 + 1
    for fatal in range(len(steps)):
        folder = tmp_path / str(fatal)
        left = [fatal]

        def die(step: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Crash(step)

        with pytest.raises(Crash) as crash:
            life(folder, die)
        where = f"{fatal}: {crash.value}"
        found = set(rows_of(DataBuffer(folder).iter_batches(0, 2**45)))
        assert {key for key in found if key[0] == "b"} == expected, where
        again = open_buffer(folder)
        until_gone(again, {"a": 2**45})
        again.close()
        assert set(rows_of(DataBuffer(folder).iter_batches(0, 2**45))) == expected, where
        assert [path.name for path in folder.iterdir() if path.name.startswith(".metrics")] == [], where


# the lists


def test_an_order_stays_on_the_list_with_how_far_it_is(tmp_path: Path) -> None:
    exclude(tmp_path, ["a", "b"], WHY, SystemClock().now())
    known = Exclusions(tmp_path)
    orders = forget(tmp_path, ["a"], WHY, SystemClock().now())
    assert not known.look(), "it was left out before"
    assert (known(), list(known.being_forgotten())) == ({"a", "b"}, ["a"])
    note_forgotten(tmp_path, orders, records_gone="2026-01-15T10:00:00Z")
    assert known.look()
    assert (known(), known.being_forgotten()) == ({"b"}, {})
    assert set(read(tmp_path)) == {"b"}, "the exclusion ended with the server"
    assert known.forgotten()["a"].records_gone == "2026-01-15T10:00:00Z"


def test_an_order_given_again_is_another_one_and_one_that_waits_stands(tmp_path: Path) -> None:
    first = forget(tmp_path, ["a"], WHY, START.to_pydatetime())
    assert forget(tmp_path, ["a"], {"by": "you", "reason": "?"}, SystemClock().now()) == first
    note_forgotten(tmp_path, first, records_gone="2026-01-15T10:00:00Z")
    again = forget(tmp_path, ["a"], WHY, SystemClock().now())
    note_forgotten(tmp_path, first, records_gone="2026-01-16T10:00:00Z")
    assert read_forgotten(tmp_path) == again, "what was done for the first order says nothing of the second"


@pytest.mark.parametrize(
    "text",
    ["{", '{"format": 1, "servers": {"a": {"at": "never", "by": "", "reason": ""}}}',
     '{"format": 1, "servers": {"a": {"at": 3}}}', '{"format": 2, "servers": {}}'],
)  # fmt: skip
def test_a_damaged_list_changes_nothing_and_is_not_written_over(tmp_path: Path, text: str) -> None:
    forget(tmp_path, ["a"], WHY, SystemClock().now())
    known = Exclusions(tmp_path)
    (tmp_path / FORGOTTEN_NAME).write_text(text)
    assert not known.look()
    assert known() == {"a"}
    with pytest.raises(CorruptFile):
        forget(tmp_path, ["b"], WHY, SystemClock().now())
    assert (tmp_path / FORGOTTEN_NAME).read_text() == text


# the inference daemon


@pytest.fixture(autouse=True)
def folder_of_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETCAST_PATHS_DATA_BUFFER_DIR", "data")  # where the world has it
    monkeypatch.setattr(corrector, "SAVE_S", 0.0)


def grow(world: World, first: int, last: int, *names: str) -> None:
    for number in range(first, last):
        assert world.post(*((name, number, 10.0 + number) for name in names)).status_code == 200
        world.service.cycle()


def wait_until_gone(world: World) -> None:
    for _ in range(400):
        world.service.cycle()
        if not world.service._excluded.being_forgotten():
            world.service.cycle()
            return
        time.sleep(0.02)
    pytest.fail("the order still waits")


def traces(folder: Path, name: str) -> dict[str, bool]:
    """Return by file whether anything of a server is left in it."""
    history = BinHistory(BinSettings(), ForecastSettings())
    taught = Corrector(folder / "data", history, ForecastSettings().settle_horizons)
    opened = [ledger.read_origin(path) for path in (folder / "data/open_forecasts").glob("*.npz")]
    records, forecasts = servers_in(folder / "data")
    rejected = folder / "data/quarantine.jsonl"
    return {
        "records": name in records,
        "settled": name in forecasts,
        "open": any(name in one.server_names for one in opened),
        "feedback": name in taught._rows,
        "rejected": rejected.exists() and json.dumps(name)[1:-1] in rejected.read_text(),
    }


def test_everything_of_a_forgotten_server_goes_and_it_begins_anew(world: World, terminal: Terminal) -> None:
    grow(world, 0, 6, "a", "b")
    world.client.post("/feed/data", json={"records": [{"server_name": "b", "timestamp": "when?", "x": 1}]})
    assert set(traces(world.folder, "b").values()) == {True}
    said = terminal.run("servers", "forget", "b", "--reason", "taken down")
    assert "b: to be forgotten; all records and forecasts of it are removed" in said
    world.service.cycle()
    assert world.get("/status")["servers_being_forgotten"] == ["b"]
    assert set(world.get("/predictions/current")["predictions"]) == {"a"}
    assert "b: records are being removed, ordered" in terminal.run(
        "servers", "forget", "b", "--reason", "again"
    )
    wait_until_gone(world)
    assert traces(world.folder, "b") == dict.fromkeys(traces(world.folder, "b"), False)
    assert [*traces(world.folder, "a").values()][:4] == [True] * 4
    counts = world.get("/status")["ledger"]
    assert counts["opened"] == counts["settled"] + counts["expired"] + counts["open"]
    (row,) = terminal.json("servers", "list", "--state", "forgotten")
    assert (row["server"], row["reason"], row["drift_gone"]) == ("b", "taken down", None)
    assert "of drift at the retraining daemon's next check" in terminal.run(
        "servers", "list", "--state", "forgotten"
    )
    grow(world, 6, 9, "a", "b")
    past = world.get("/history?server=b&metric=cpu_pct&start=2020-01-01T00:00:00Z")
    actual = past["metrics"]["cpu_pct"]["actual"]
    assert [value for value in actual if value is not None] == [16.0, 17.0]
    assert n_settled(world, "b") <= 1
    assert world.get("/predictions/current")["predictions"]["b"]["source"] == "fallback"
    assert world.get("/status")["servers"] == 2


def test_an_order_given_while_no_daemon_runs_is_carried_out_by_the_next(
    world: World, terminal: Terminal
) -> None:
    grow(world, 0, 4, *ODD, "kept")
    world.end()
    terminal.url = "http://127.0.0.1:9"
    assert main(["servers", "forget", "--reason", "x", "--url", terminal.url, "--", *ODD]) == 0
    assert "waits for the inference daemon" in terminal.run("servers", "list", "--state", "forgotten")
    world.start()
    assert set(world.get("/predictions/current")["predictions"]) == {"kept"}
    wait_until_gone(world)
    assert servers_in(world.folder / "data") == ({"kept"}, {"kept"})


def test_a_place_is_free_again_and_a_full_disk_only_delays(
    world: World, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow(world, 0, 4, "a", "b")
    terminal.run("servers", "forget", "b", "--reason", "x")

    def full(path: Path, *_: object) -> None:
        raise StorageFull(path)

    with monkeypatch.context() as patched:
        patched.setattr(ledger, "write_origin", full)
        for _ in range(10):
            world.service.cycle()
        assert world.service._excluded.being_forgotten()
    world.end()
    world.start()
    wait_until_gone(world)
    assert not any(traces(world.folder, "b").values())
    limits = world.service._intake._limits
    monkeypatch.setattr(world.service._intake, "_limits", type(limits)(max_server_names=2))
    assert world.post(("c", 5, 1.0)).json()["records_received"] == 1


def test_what_cannot_be_forgotten_says_what_would_be_right(
    world: World, terminal: Terminal, tmp_path: Path
) -> None:
    grow(world, 0, 2, "web-01", "db-7")
    bad = ExitCode.BAD_SETTINGS

    def said(*words: str) -> str:
        return terminal.run("servers", "forget", *words, code=bad)

    assert "the daemon knows no server 'web-0' (did you mean web-01?)" in said("web-0", "--reason", "x")
    assert "the daemon knows no server 'bd-7' (did you mean db-7?)" in said("bd-7", "--reason", "x")
    assert "--reason is needed" in said("web-01")
    assert "needs a NAME" in said("--reason", "x")
    terminal.url = "http://127.0.0.1:9"
    assert "no record of a server 'wbe-01' is stored in data (did you mean web-01?)" in said(
        "wbe-01", "--reason", "x"
    )
    assert not (tmp_path / "checkpoints" / FORGOTTEN_NAME).exists()
    assert "no server was forgotten" in terminal.run("servers", "list", "--state", "forgotten")


# the retraining daemon


def test_the_drift_reference_and_the_training_data_go_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = SmallFleet(tmp_path)
    own.grow(700)
    own.serve()
    own.grow(48)
    with Told() as told:
        told.answers = quiet_answers(own.version)
        daemon = AdaptiveRetrainingDaemon(daemon_url=told.url, settings=settings())
        daemon.run_check_cycle()
        Path("training_data_incremental.parquet").write_bytes(b"of all servers")
        orders = forget(tmp_path / "checkpoints", ["web-02"], WHY, SystemClock().now())
        daemon.run_check_cycle()
        assert Path("training_data_incremental.parquet").exists(), "its records are not gone yet"
        note_forgotten(tmp_path / "checkpoints", orders, records_gone="2026-01-15T10:00:00Z")
        daemon.run_check_cycle()
        daemon.run_check_cycle()
    assert not Path("training_data_incremental.parquet").exists()
    assert read_forgotten(tmp_path / "checkpoints")["web-02"].drift_gone
    own.buffer.close()
