"""Servers left out: kept, but not forecast, not judged for drift, not trained on; back with their past."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from buffer_rows import NOON_MS, batch, rows_of
from settled_rows import BIN_MS, START_MS, settled
from small_fleet import HISTORY_BINS, SERVERS, SmallFleet, quiet_answers, settings
from test_console import Terminal
from test_inference import World
from told_daemon import Told

from adaptive_retraining_daemon import AdaptiveRetrainingDaemon
from data_buffer import DataBuffer
from fleetcast.clock import SystemClock, from_ms, iso_z
from fleetcast.drift.literal.window import PairWindow
from fleetcast.errors import AlreadyRunning, BadOrder, CorruptFile, ExitCode
from fleetcast.exclusions import FILE_NAME, LOCK_NAME, Exclusions, exclude, include, read
from fleetcast.files import write_json
from fleetcast.locks import OwnerLock
from fleetcast.retraining.order import export_for_training

WHY = {"by": "me", "reason": "load tests"}


def leave_out(folder: Path, *names: str) -> None:
    exclude(folder, names, WHY, SystemClock().now())


# the file


def test_the_file_says_who_was_left_out_when_by_whom_and_why(tmp_path: Path) -> None:
    known = Exclusions(tmp_path / "checkpoints")
    assert known() == frozenset()
    leave_out(tmp_path / "checkpoints", "a", "b", "a")
    assert known() == frozenset(), "names hold from one look to the next"
    assert known.look()
    assert not known.look()
    assert known() == {"a", "b"}
    entry = json.loads((tmp_path / "checkpoints" / FILE_NAME).read_text())["servers"]["a"]
    assert (entry["by"], entry["reason"], entry["at"][-1]) == ("me", "load tests", "Z")
    assert include(tmp_path / "checkpoints", ["a", "x"]) == ["a"]
    assert known.look()
    assert known() == {"b"}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 2, "servers": {}}', '{"format": 1, "servers": ["a"]}']
)
def test_a_damaged_file_leaves_the_names_before_in_force_and_is_not_written_over(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    leave_out(tmp_path, "a")
    known = Exclusions(tmp_path)
    (tmp_path / FILE_NAME).write_text(text)
    assert not known.look()
    assert known() == {"a"}
    assert "the last one holds" in caplog.text
    with pytest.raises(CorruptFile):
        leave_out(tmp_path, "b")
    assert (tmp_path / FILE_NAME).read_text() == text


def test_one_command_writes_at_a_time_and_the_list_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OwnerLock(tmp_path / LOCK_NAME, "the list"), pytest.raises(AlreadyRunning):
        leave_out(tmp_path, "a")
    monkeypatch.setattr("fleetcast.exclusions.MOST", 2)
    leave_out(tmp_path, "a", "b")
    with pytest.raises(BadOrder, match="at most 2 servers can be excluded, 2 are"):
        leave_out(tmp_path, "c")
    assert set(read(tmp_path)) == {"a", "b"}


# readers of the buffer


def test_a_buffer_passes_over_them_wherever_all_servers_are_read(tmp_path: Path) -> None:
    buffer = DataBuffer(tmp_path, expire=False)
    buffer.append_batch(
        batch((name, NOON_MS + tick, {"cpu_pct": 1.0}) for name in "abc" for tick in range(3))
    )
    buffer.append_predictions(settled(["a", "b"], range(3), lambda *_: 1.0))
    out: set[str] = set()
    buffer.leave_out(lambda: out)

    def servers() -> tuple[set[str], ...]:
        export = tmp_path.parent / "export.parquet"
        buffer.export_training_data(export, days=36_500)
        records = {server for server, _ in rows_of(buffer.iter_batches(0, 2**45))}
        return (
            records,
            set(buffer.read_predictions(0, 2**45).server_name),
            set(pd.read_parquet(export).server_name),
        )

    assert servers() == ({"a", "b", "c"}, {"a", "b"}, {"a", "b", "c"})
    out |= {"b", "nobody here"}
    assert servers() == ({"a", "c"}, {"a"}, {"a", "c"})
    buffer.flush()
    assert servers() == ({"a", "c"}, {"a"}, {"a", "c"})
    assert len(buffer.read_server("b", 0, 2**45, ["cpu_pct"])) == 3, "asked for by name, it is there"
    assert buffer.get_stats()["total_records"] == 9
    buffer.close()


# the inference daemon


@pytest.fixture(autouse=True)
def folder_of_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETCAST_PATHS_DATA_BUFFER_DIR", "data")  # where the world has it


def n_settled(world: World, server: str) -> int:
    """Return of how many bins a forecast one bin ahead is settled."""
    past = world.get(f"/history?server={server}&metric=cpu_pct")
    number: int = past["metrics"]["cpu_pct"]["accuracy"]["1"]["bins"]
    return number


def grow(world: World, first: int, last: int, *names: str) -> None:
    for number in range(first, last):
        answer = world.post(*((name, number, 10.0 + number) for name in names))
        assert answer.json()["records_received"] == len(names)
        world.service.cycle()


def test_an_excluded_server_is_kept_but_not_forecast_and_comes_back_with_its_past(
    world: World, terminal: Terminal
) -> None:
    grow(world, 0, 4, "a", "b")
    said = terminal.run("servers", "exclude", "b", "--reason", "load tests")
    assert "b: excluded; records are kept, but nothing is forecast" in said
    world.service.cycle()
    shown = world.get("/predictions/current")["predictions"]
    assert set(shown) == {"a"}
    assert shown["a"]["forecast"] is not None
    settled_before = n_settled(world, "b")
    grow(world, 4, 8, "a", "b")
    assert set(world.get("/predictions/current")["predictions"]) == {"a"}
    assert world.get("/status")["excluded_servers"] == ["b"]
    left_out = world.get("/ui/api/strip")["left_out"]
    assert left_out["excluded"] == {"servers": 1, "names": ["b"]}
    assert left_out["being_forgotten"]["servers"] == 0
    rows = {row["server"]: row["state"] for row in terminal.json("servers", "list")}
    assert rows == {"a": "calm", "b": "excluded"}
    assert [row["server"] for row in terminal.json("servers", "list", "--state", "excluded")] == ["b"]
    terminal.run("servers", "include", "b")
    world.service.cycle()
    past = world.get("/history?server=b&metric=cpu_pct&start=2020-01-01T00:00:00Z")
    assert past["source"] == "memory"
    assert past["metrics"]["cpu_pct"]["actual"] == [10.0 + number for number in range(7)]
    assert n_settled(world, "b") == settled_before, "nothing settled meanwhile"
    assert world.get("/predictions/current")["predictions"]["b"]["forecast"] is not None
    grow(world, 8, 10, "a", "b")
    assert n_settled(world, "b") > settled_before


def test_a_restart_leaves_it_out_from_the_start(world: World, terminal: Terminal) -> None:
    grow(world, 0, 4, "a", "b")
    terminal.run("servers", "exclude", "b", "--reason", "gone")
    world.end()
    world.start()
    assert set(world.get("/predictions/current")["predictions"]) == {"a"}
    grow(world, 4, 6, "a", "b")
    assert world.get("/status")["servers"] == 1


def test_an_excluded_server_takes_no_place_and_is_refused_none(
    world: World, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow(world, 0, 2, "a", "b")
    terminal.run("servers", "exclude", "b", "--reason", "x")
    world.service.cycle()
    limits = world.service._intake._limits
    monkeypatch.setattr(world.service._intake, "_limits", type(limits)(max_server_names=2))
    grow(world, 2, 3, "a", "b", "c")
    refused = world.post(("d", 3, 1.0), ("b", 3, 1.0)).json()
    assert (refused["records_received"], refused["errors"][0]["index"]) == (1, 0)


# the retraining daemon


def names_of(window: PairWindow) -> set[str]:
    return {window.server_names[code] for code in window.servers}


def test_drift_and_training_leave_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = SmallFleet(tmp_path)
    own.grow(700)
    own.serve()
    own.grow(48)
    with Told() as told:
        told.answers = quiet_answers(own.version)
        daemon = AdaptiveRetrainingDaemon(daemon_url=told.url, settings=settings())

        def judged() -> set[str]:
            daemon.run_check_cycle()
            return names_of(daemon._source.evidence(own.version).window)

        assert judged() == set(SERVERS)
        leave_out(tmp_path / "checkpoints", "web-02")
        assert judged() == {"web-01", "web-03"}
        export_for_training(settings(), tmp_path / "export.parquet")
        assert set(pd.read_parquet("export.parquet").server_name) == {"web-01", "web-03"}
        include(tmp_path / "checkpoints", ["web-02"])
        assert judged() == set(SERVERS)
    own.buffer.close()


def test_of_a_fleet_too_large_to_train_on_whole_a_sample_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = SmallFleet(tmp_path)
    own.grow(700)
    two_fit = settings(trainer={"max_cells": 4 * 701 * 2})
    write_json(Path("training_context.json"), {"drifting": [{"server": "web-03", "metric": "cpu_pct"}]})
    for left_out in ("", "web-01"):
        if left_out:
            leave_out(tmp_path / "checkpoints", left_out)
        said = export_for_training(two_fit, tmp_path / "export.parquet")
        names = set(pd.read_parquet("export.parquet").server_name)
        assert "web-03" in names
        assert left_out not in names
        assert len(names) == 2
        assert ("of a sample of 2 of 3 servers" in said) == (not left_out)
    own.buffer.close()


def test_a_sample_is_drawn_from_the_servers_that_still_send(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = SmallFleet(tmp_path)
    own.grow(300)
    dead = [
        {
            "timestamp": iso_z(from_ms(START_MS - HISTORY_BINS * BIN_MS)),
            "server_name": f"gone-{n:02}",
            "cpu_pct": 1.0,
        }
        for n in range(40)
    ]
    own.buffer.append(dead)
    own.grow(600)
    three_fit = settings(trainer={"max_cells": 4 * 902 * 3})
    said = export_for_training(three_fit, tmp_path / "export.parquet")
    assert set(pd.read_parquet("export.parquet").server_name) == set(SERVERS)
    assert "of a sample of 3 of 43 servers" in said
    own.buffer.close()


# the terminal


def test_what_cannot_be_excluded_or_included_says_what_would_be_right(
    world: World, terminal: Terminal
) -> None:
    grow(world, 0, 2, "web-01")
    bad = ExitCode.BAD_SETTINGS

    def said(*words: str) -> str:
        return terminal.run("servers", *words, code=bad)

    assert "the daemon knows no server 'web-0' (did you mean web-01?)" in said(
        "exclude", "web-0", "--reason", "x"
    )
    assert "--reason is needed" in said("exclude", "web-01")
    assert "needs a NAME" in said("exclude", "--reason", "x")
    assert "'web-01' is not excluded (excluded: none is)" in said("include", "web-01")
    assert "are for servers list" in said("include", "web-01", "--limit", "3")
    assert "takes no NAME" in said("list", "web-01")
    terminal.run("servers", "exclude", "web-01", "--reason", "x")
    world.service.cycle()
    assert "web-01: excluded before" in terminal.run("servers", "exclude", "web-01", "--reason", "x")


def test_another_folders_daemon_is_named_and_without_one_the_file_is_written(
    world: World, terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow(world, 0, 2, "a")
    monkeypatch.delenv("FLEETCAST_PATHS_DATA_BUFFER_DIR")
    said = terminal.run("servers", "exclude", "a", "--reason", "x", code=ExitCode.BAD_SETTINGS)
    assert f"works in {tmp_path / 'data'}, not in {tmp_path / 'data_buffer'}" in said
    terminal.url = "http://127.0.0.1:9"
    told: Any = terminal.json("servers", "exclude", "a", "--reason", "x")
    assert told == {"excluded": ["a"], "before": []}
    assert read(tmp_path / "checkpoints")["a"]["reason"] == "x"
