"""One whole service in this process, over a real socket: start, cycles, status, stop, restart."""

import errno
import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
from programs import wait_for

from data_buffer import DataBuffer
from fleetcast.api.listener import HttpListener
from fleetcast.api.server import FEED_ANSWER, PREDICTIONS
from fleetcast.clock import FakeClock, SystemClock, iso_z, monotonic
from fleetcast.errors import CannotStart, SettingsError
from fleetcast.forecast.registry import Registry
from fleetcast.inference import InferenceService
from fleetcast.loop import Stop
from fleetcast.schema import Floats32, HistoryWindow
from fleetcast.settings import (
    BinSettings,
    ClockSettings,
    ExportSettings,
    PathSettings,
    ServerSettings,
    Settings,
)

START = pd.Timestamp("2020-01-01T00:00:00Z")


class Sevens:
    """A model that forecasts 7 for every server."""

    metrics = ("cpu_pct",)

    def predict(self, window: HistoryWindow) -> Floats32:
        made = np.full((*window.values.shape[:2], 96, 3), np.nan, dtype=np.float32)
        made[:, [name in self.metrics for name in window.metrics]] = 7.0
        return made


class World:
    """A service, its client, and the means to stop and start it again over the same folder."""

    def __init__(self, folder: Path, mode: str = "data", api_key: str = "") -> None:
        self.folder = folder
        self.api_key = api_key
        self.clock = FakeClock(START.to_pydatetime() + timedelta(hours=12))
        self.mode = mode
        self.export = ExportSettings()
        self.stop = Stop()

    def start(self) -> "World":
        paths = PathSettings(*(str(self.folder / name) for name in ("data", "checkpoints", "models")))
        settings = Settings(
            paths=paths,
            clock=ClockSettings(self.mode),
            server=ServerSettings(hold_s=0.0),
            export=self.export,
            bins=BinSettings(close_grace_s=0.0),  # a record of the next bin's start moves the clock so far
        )
        buffer = DataBuffer(paths.data_buffer_dir, expire=self.mode == "system")
        listener = HttpListener("127.0.0.1", 0)
        try:
            self.service = InferenceService(
                settings,
                buffer,
                listener,
                lambda path: Sevens(),
                self.api_key,
                self.stop,
                wall_clock=self.clock,
            )
        except SettingsError:
            listener.stop(1.0)
            raise
        self.service.start()
        self.service.wait_for_loader(30.0)
        self.client = httpx.Client(base_url=listener.url, trust_env=False)
        return self

    def end(self) -> None:
        self.client.close()
        self.service.close()

    def post(self, *rows: tuple[str, int, float], minutes: int = 5) -> httpx.Response:
        """Send (server, bin, cpu)."""
        records = [
            {
                "timestamp": (START + timedelta(minutes=minutes * number)).isoformat(),
                "server_name": name,
                "cpu_pct": value,
            }
            for name, number, value in rows
        ]
        return self.client.post("/feed/data", json={"records": records})

    def get(self, path: str) -> dict[str, Any]:
        answer = self.client.get(path)
        assert answer.status_code == 200, answer.text
        value = answer.json()
        assert isinstance(value, dict)
        return value

    def add_version(self, version_id: str) -> None:
        registry = Registry(self.folder / "checkpoints")
        manifest = {"created_at": iso_z(SystemClock().now()), "parent": None, "promoted": True}
        registry.add(version_id, {"model.ckpt": b"m", "baseline.npz": b""}, manifest)
        registry.promote(version_id)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path).start()
    yield world
    world.end()


def test_records_become_forecasts_and_settle(world: World) -> None:
    assert world.get("/predictions/current")["predictions"] == {}
    assert world.post(("a", 0, 1.0), ("b", 0, 2.0)).status_code == 200
    assert world.get("/predictions/current")["predictions"]["a"]["source"] == "warming_up"
    assert world.post(("a", 1, 3.0), ("b", 1, 2.0)).status_code == 200
    world.service.cycle()
    shown = world.get("/predictions/current")
    assert shown["model"] is None
    assert shown["predictions"]["a"]["source"] == "fallback"
    assert shown["predictions"]["a"]["forecast"]["cpu_pct"]["p50"] == [1.0] * 96
    assert shown["predictions"]["a"]["timestamps"][0] == "2020-01-01T00:05:00Z"
    assert shown["predictions"]["a"]["current"] == {"cpu_pct": 3.0}
    world.post(("a", 2, 3.0), ("b", 2, 2.0))
    world.service.cycle()
    assert world.get("/status")["ledger"] == {"opened": 12, "due": 2, "settled": 2, "expired": 0, "open": 10}


def test_records_are_held_until_the_sweep_is_done(world: World) -> None:
    world.post(("a", 0, 1.0), ("a", 1, 2.0))
    held = world.post(("a", 2, 3.0))
    assert (held.status_code, held.headers["retry-after"]) == (429, "1")
    world.service.cycle()
    assert world.post(("a", 2, 3.0)).status_code == 200


def test_a_due_bin_wakes_the_loop(world: World) -> None:
    world.post(("a", 0, 1.0))
    world.post(("a", 1, 2.0))
    assert world.stop.wait(30.0) is False  # came back at once, and not to stop


def test_a_model_that_comes_into_service_forecasts_at_once(world: World) -> None:
    world.post(("a", 0, 1.0), ("a", 1, 1.0))
    world.service.cycle()
    assert world.get("/predictions/current")["predictions"]["a"]["source"] == "fallback"
    world.add_version("20260115T100000Z-0001")
    world.service.cycle()
    assert world.service.wait_for_loader(30.0)
    world.service.cycle()  # no record came meanwhile
    answer = world.get("/predictions/current")
    assert answer["predictions"]["a"]["source"] == "model"
    assert answer["model"]["version"] == "20260115T100000Z-0001"


def test_a_new_version_is_in_service_from_the_next_sweep_on(world: World) -> None:
    world.post(("a", 0, 1.0), ("a", 1, 2.0))
    world.service.cycle()
    world.add_version("20260115T100000Z-0001")
    world.post(("a", 2, 3.0))
    world.service.cycle()
    shown = world.get("/predictions/current")
    assert shown["model"]["version"] == "20260115T100000Z-0001"
    assert shown["predictions"]["a"]["source"] == "model"
    assert shown["predictions"]["a"]["forecast"]["cpu_pct"]["p50"] == [7.0] * 96
    assert world.get("/status")["model"]["version"] == "20260115T100000Z-0001"


def test_the_status_says_how_things_stand(world: World) -> None:
    world.post(("a", 0, 1.0), ("a", 1, 2.0))
    before = world.get("/status")
    assert (before["backlog"], before["newest_record_time"]) == (1, "2020-01-01T00:05:00Z")
    assert before["clock"] == {"mode": "data", "now": "2020-01-01T00:05:00Z"}
    assert (before["status"], before["training"], before["servers"]) == ("ready", {"running": False}, 1)
    world.service.cycle()
    after = world.get("/status")
    assert (after["backlog"], after["sweep"]["count"], after["sweep"]["origin"]) == (
        0,
        1,
        "2020-01-01T00:00:00Z",
    )
    assert after["bins"] == {
        "bin_s": 300, "newest_closed": "2020-01-01T00:00:00Z", "skipped": 0, "late_records": 0,
        "corrected_forecasts": 0,
    }  # fmt: skip
    assert after["buffer"]["total_records"] == 2
    assert after["last_errors"] == []


def test_the_scrape_shows_the_states(world: World) -> None:
    world.post(("a", 0, 1.0), ("a", 1, 2.0))
    world.service.cycle()
    text = world.client.get("/metrics").text
    for line in (
        "fleetcast_ready 1.0",
        "fleetcast_servers 1.0",
        "fleetcast_backlog_bins 0.0",
        "fleetcast_open_forecasts 3.0",
        "fleetcast_training_running 0.0",
        'fleetcast_model_info{base="false",version=""} 1.0',
        'fleetcast_server_last_record_timestamp_seconds{server="a"} 1.5778371e+09',
        'fleetcast_series_forecast_total{source="fallback"} 1.0',
    ):
        assert line in text.splitlines()
    assert 'fleetcast_free_disk_bytes{folder="data_buffer"} ' in text
    assert world.post(("b", 8, 1.0)).status_code == 200  # 35 minutes later, and "a" sent nothing
    text = world.client.get("/metrics").text
    assert {"fleetcast_servers 2.0", "fleetcast_stale_servers 1.0"} <= set(text.splitlines())


def test_a_restart_goes_on_where_the_old_process_ended(tmp_path: Path) -> None:
    world = World(tmp_path).start()
    world.post(*(("a", number, float(number)) for number in range(4)))
    world.service.cycle()
    world.post(("a", 4, 4.0))
    before = world.get("/status")["ledger"]
    world.end()
    world = World(tmp_path).start()
    assert world.get("/status")["ledger"] == before
    assert world.get("/status")["backlog"] == 1
    shown = world.get("/predictions/current")["predictions"]["a"]
    assert (shown["source"], shown["forecast"]["cpu_pct"]["p50"][0]) == ("fallback", 2.0)
    world.service.cycle()
    assert world.get("/status")["ledger"]["opened"] == 12
    world.end()


def test_the_other_clock_is_refused_with_a_hint(tmp_path: Path) -> None:
    World(tmp_path).start().end()
    with pytest.raises(SettingsError, match="--clock data"):
        World(tmp_path, "system").start()


def test_after_the_system_clock_stepped_back_forecasts_go_on_at_once(tmp_path: Path) -> None:
    world = World(tmp_path, "system").start()
    right = world.clock.now()
    world.post(("a", 144, 1.0))
    world.service.cycle()
    world.clock.time = right + timedelta(days=1, minutes=5)  # wrong for a while, and agents with it
    world.post(("a", 144 + 288, 2.0), ("a", 145 + 288, 3.0))
    world.service.cycle()
    assert world.get("/status")["bins"]["newest_closed"] == "2020-01-02T12:00:00Z"
    world.clock.time = right + timedelta(minutes=10)
    world.post(("a", 145, 4.0))
    world.service.cycle()
    world.post(("a", 146, 5.0))
    world.service.cycle()
    assert world.get("/status")["bins"]["newest_closed"] == "2020-01-01T12:05:00Z"
    shown = world.get("/predictions/current")["predictions"]["a"]
    assert shown["current"] == {"cpu_pct": 5.0}
    assert shown["forecast"]["cpu_pct"]["p50"][0] == 4.0
    counts = world.get("/status")["ledger"]
    assert counts["opened"] == counts["settled"] + counts["expired"] + counts["open"]
    world.end()


def test_a_failing_disk_is_an_error_to_be_seen_not_the_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(now: object) -> None:
        raise CannotStart("the disk is on fire")

    monkeypatch.setattr(world.service._buffer, "maintain", fail)
    world.service.cycle()
    (error,) = world.get("/status")["last_errors"]
    assert (error["part"], error["error"]) == ("buffer", "the disk is on fire")


def test_an_http_server_that_ends_unasked_begins_again_on_its_address_and_takes_records(
    world: World,
) -> None:
    assert world.post(("a", 0, 1.0)).status_code == 200
    server = world.service._listener._server
    assert server is not None
    server.should_exit = True

    def answers() -> bool:
        with suppress(httpx.TransportError):
            return (
                world.client.get("/health").status_code == 200
                and server is not world.service._listener._server
            )
        return False

    wait_for("the server to be back", answers, 30)
    assert world.post(("a", 1, 1.0)).json()["records_received"] == 1
    status = world.get("/status")
    assert status["workers"]["http"] == 1
    assert any("http failed once" in text for text in status["problems"])
    assert 'fleetcast_errors_total{part="http"} 1.0' in world.client.get("/metrics").text


def test_ready_follows_the_last_write_and_heals_without_traffic(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert world.client.get("/ready").status_code == 200
    now_s, real = 1000.0, os.fdatasync

    def refuse(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fleetcast.serving.intake.monotonic", lambda: now_s)
    monkeypatch.setattr(os, "fdatasync", refuse)
    assert world.post(("a", 0, 1.0)).status_code == 507
    answer = world.client.get("/ready")
    assert answer.status_code == 503
    detail = answer.json()["detail"]
    assert "records cannot be stored" in detail and "No space left" in detail
    world.service.cycle()  # the disk still refuses
    assert world.client.get("/ready").status_code == 503
    assert "Not ready: records cannot be stored" in world.get("/status")["problems"][0]

    monkeypatch.setattr(os, "fdatasync", real)
    now_s += 4.0
    world.service.cycle()
    assert world.client.get("/ready").status_code == 503  # a probe every 5 s
    now_s += 2.0
    world.service.cycle()
    assert world.client.get("/ready").status_code == 200
    assert world.get("/status")["buffer"]["total_records"] == 0  # a probe is no record
    assert world.post(("a", 0, 1.0)).json()["records_received"] == 1


def test_ready_tells_of_a_write_that_waits_and_of_forecasts_that_cannot_be_stored(world: World) -> None:
    writes = world.service._intake.writes
    begun, release = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        release.wait(30)

    thread = threading.Thread(target=writes.write, args=(wait,))
    thread.start()
    assert begun.wait(30)
    assert writes.problem == ""
    writes._begun_at = dict.fromkeys(writes._begun_at, monotonic() - 20)
    assert "a write has been waiting for the disk for 20 s" in world.client.get("/ready").json()["detail"]
    release.set()
    thread.join(30)
    assert world.client.get("/ready").status_code == 200
    world.service._sweeper._waits_for_disk = "no space"
    assert world.client.get("/ready").json()["detail"] == "forecasts cannot be stored: no space"


def test_a_loader_that_cannot_work_at_all_is_not_ready(world: World) -> None:
    world.service._model._thread.worker.note_failure(RuntimeError("no threads left"))
    answer = world.client.get("/ready")
    assert (answer.status_code, "no threads left" in answer.json()["detail"]) == (503, True)
    assert "fleetcast_ready 0.0" in world.client.get("/metrics").text.splitlines()


def test_a_step_that_fails_costs_no_other_and_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_should_stop: object) -> None:
        raise KeyError("surprise")

    maintained: list[object] = []
    monkeypatch.setattr(world.service._sweeper, "cycle", fail)
    monkeypatch.setattr(world.service._buffer, "maintain", maintained.append)
    for _ in range(12):  # more than a loop survives where the error is its own
        world.service.cycle()
    assert maintained
    status = world.get("/status")
    assert status["workers"]["sweep"] == 1  # the others came within its pause
    assert any("sweep failed once" in text and "surprise" in text for text in status["problems"])
    assert 'fleetcast_errors_total{part="sweep"} 1.0' in world.client.get("/metrics").text


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    """Check the few schema words that the description uses."""
    kinds: dict[str, type] = {
        "object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None),
        "number": float,
    }  # fmt: skip
    wanted = schema.get("type", [])
    if not any(isinstance(value, kinds[kind]) for kind in ([wanted] if isinstance(wanted, str) else wanted)):
        return False
    if isinstance(value, list):
        return all(conforms(item, schema.get("items", {})) for item in value)
    if isinstance(value, dict):
        inner = schema.get("properties", {})
        rest = schema.get("additionalProperties", {"type": list(kinds)})
        return set(schema.get("required", [])) <= set(value) and all(
            conforms(item, inner.get(name, rest)) for name, item in value.items()
        )
    return value in schema.get("enum", [value])


def test_the_answers_are_what_the_interface_describes(world: World) -> None:
    world.add_version("20260115T100000Z-0001")
    answer = world.post(("a", 0, 1.0), ("a", 1, 2000.0), ("a", 1, 3.0)).json()
    assert answer["records_rejected"] == 1
    assert conforms(answer, FEED_ANSWER)
    assert conforms(world.get("/predictions/current"), PREDICTIONS)
    world.service.cycle()
    assert conforms(world.get("/predictions/current"), PREDICTIONS)
    assert conforms(world.get("/predictions/current?fields=current"), PREDICTIONS)
    assert not conforms(json.loads('{"timestamp": 7, "model": null, "predictions": {}}'), PREDICTIONS)


def test_a_record_of_unusable_fields_alone_is_told_which_they_were(tmp_path: Path) -> None:
    world = World(tmp_path, "system").start()
    at = {"timestamp": START.isoformat(), "server_name": "a"}
    useless = {**at, "CPU %": 12.5, "mem_pct": "12.5", "m" * 5000: 1.0}

    answer = world.client.post("/feed/data", json={"records": [{**at, "load": 1.0}, useless]}).json()
    usual = world.client.post("/feed/data", json={"records": [{**at, "load": 1.0, "state": "ok"}]}).json()

    assert (answer["records_received"], answer["records_rejected"]) == (2, 0)
    assert conforms(answer, FEED_ANSWER)
    assert answer["fields_ignored"] == [
        {"field": "CPU %", "reason": "a metric's name is [a-z][a-z0-9_]* of up to 64 characters"},
        {"field": "mem_pct", "reason": "is text, not a number"},
        {
            "field": "m" * 64 + "...",
            "reason": "a metric's name is [a-z][a-z0-9_]* of up to 64 characters",
        },
    ]
    assert "fields_ignored" not in usual
    world.end()


def test_a_byte_order_mark_and_another_form_of_a_name_are_taken(tmp_path: Path) -> None:
    world = World(tmp_path, "system").start()
    record = {"timestamp": START.isoformat(), "server_name": "café-1", "load": 1.0}
    body = json.dumps({"records": [record]}, ensure_ascii=False).encode("utf-8-sig")

    for _ in range(3):  # the short way through the decoder is learnt meanwhile
        assert world.client.post("/feed/data", content=body).json()["records_received"] == 1

    found = world.client.get("/predictions/current", params={"server": "cafe\u0301-1 "}).json()
    assert list(found["predictions"]) == ["café-1"]
    world.end()


def test_metric_names_survive_a_restart_and_go_with_their_last_row(tmp_path: Path) -> None:
    world = World(tmp_path, "system").start()
    junk = {"timestamp": START.isoformat(), "server_name": "bad"} | {f"junk_{n}": 1.0 for n in range(600)}
    answer = world.client.post("/feed/data", json={"records": [junk]}).json()
    assert (answer["records_received"], answer["records_rejected"]) == (1, 0)
    assert len(answer["fields_refused"]) == 20
    assert answer["fields_refused"][0]["reason"] == "is one of over 512 different metrics in a request"
    new = {"timestamp": START.isoformat(), "server_name": "good", "fans": 3.0, "junk_1": 2.0}
    for _ in range(2):
        answer = world.client.post("/feed/data", json={"records": [new]}).json()
        assert answer["records_received"] == 1
        assert answer["fields_refused"] == [
            {
                "field": "fans",
                "records": 1,
                "reason": "is a new metric beyond the limit of 512 metrics (server.max_metric_names)",
            }
        ]
        assert world.get("/status")["limits"]["metric_names"] == {"used": 512, "limit": 512}
        assert "fleetcast_metric_names_limit 512.0" in world.client.get("/metrics").text
        world.end()
        world.start()
    world.service._buffer.open()  # as the program does at its start
    world.clock.advance(days=61)
    world.service.cycle()
    moment = (START + timedelta(days=61)).isoformat()
    answer = world.client.post("/feed/data", json={"records": [{**new, "timestamp": moment}]}).json()
    assert "fields_refused" not in answer
    assert world.get("/status")["limits"]["metric_names"]["used"] == 2
    world.end()
