"""Arrow and remote-write over HTTP: what each kind of sender is told, with the real intake behind it."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pyarrow as pa
import pytest
from prometheus_client import CollectorRegistry
from remote_write_bodies import body, labels, packed, symbols_bytes

from fleetcast.api.feed import create_front
from fleetcast.api.listener import HttpListener
from fleetcast.api.server import create_app
from fleetcast.clock import FakeClock, to_ms
from fleetcast.errors import StorageBroken, StorageFull
from fleetcast.schema import RecordBatch
from fleetcast.serving.board import PredictionBoard
from fleetcast.serving.history import BinHistory
from fleetcast.serving.intake import Intake, RejectedRecords
from fleetcast.serving.roster import Fleet, Roster
from fleetcast.serving.telemetry import Snapshot, Telemetry
from fleetcast.serving.writes import WriteIntake
from fleetcast.settings import (
    BinSettings,
    BufferSettings,
    ForecastSettings,
    RemoteWriteSettings,
    ServerSettings,
)

CLOCK = FakeClock()
NOW = to_ms(CLOCK.now())
ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
WRITTEN = ("samples", "histograms", "exemplars")
WRITE = {"Content-Type": "application/x-protobuf", "Content-Encoding": "snappy"}
LOAD = body([(labels("node_load1"), [(NOW, 0.5)])])


class World:
    """The application on a real socket; the disk is a list."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.batches: list[RecordBatch] = []
        self.error: Exception | None = None
        self.is_held = lambda: False
        self.quarantine = folder / "quarantine.jsonl"
        self.telemetry = Telemetry(CollectorRegistry(), CLOCK)
        self.settings = ServerSettings(**limits)
        forecast = ForecastSettings()
        roster = Roster(forecast)
        buffer: Any = self  # stands in for the DataBuffer
        self.intake = Intake(
            buffer,
            Fleet(BinHistory(BinSettings(), forecast), roster, CLOCK, forecast),
            RejectedRecords(folder, 100_000),
            CLOCK,
            self.settings,
            BufferSettings(),
        )
        self.board = PredictionBoard(roster, CLOCK)
        self.writes = WriteIntake(RemoteWriteSettings(), self.intake.take, self.intake.rules)

    def append_batch(self, batch: RecordBatch) -> None:
        if self.error:
            raise self.error
        self.batches.append(batch)


@contextmanager
def client_of(world: World, api_key: str = "") -> Iterator[httpx.Client]:
    listener = HttpListener("127.0.0.1", 0)

    report: Any = SimpleNamespace(is_held=lambda: world.is_held(), not_ready="", snapshot=Snapshot)
    held, told, own, writes = report.is_held, world.telemetry, world.settings, world.writes
    front = create_front(world.intake, held, told, own, api_key, writes)
    front.open(create_app(world.board, report, told, own, api_key, writes.path))
    listener.start(front, 5.0)
    with httpx.Client(base_url=listener.url, trust_env=False) as client:
        yield client
    assert listener.stop(10.0)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def client(world: World) -> Iterator[httpx.Client]:
    with client_of(world) as client:
        yield client


def stream(**columns: Any) -> bytes:
    batch = pa.record_batch({"timestamp": pa.array([NOW, NOW]).cast(pa.timestamp("ms")), **columns})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def test_an_arrow_stream_is_answered_like_json(client: httpx.Client, world: World) -> None:
    content = stream(server_name=["web-01", "web-02"], cpu_pct=[12.345, 5000.0], up=[True, None])
    answer = client.post("/feed/data", content=content, headers=ARROW)
    assert answer.json() == {
        "status": "ok",
        "records_received": 0,
        "records_rejected": 2,
        "errors": [
            {"index": 0, "field": "up", "reason": "must be a number, got <bool>"},
            {"index": 1, "field": "cpu_pct", "reason": "must lie in -1..1000, got 5000"},
        ],
    }
    lines = [json.loads(line) for line in world.quarantine.read_text().splitlines()]
    assert [line["record"]["server_name"] for line in lines] == ["web-01", "web-02"]
    answer = client.post(
        "/feed/data", content=stream(server_name=["a", "b"], cpu_pct=[12.346, 1.0]), headers=ARROW
    )
    assert answer.json()["records_received"] == 2
    assert world.batches[0].metrics["cpu_pct"].tolist() == [12.35, 1.0]


def test_a_stream_that_is_none_is_a_422_that_says_why(client: httpx.Client) -> None:
    answer = client.post("/feed/data", content=b"no arrow", headers=ARROW)
    assert answer.status_code == 422
    assert "not an Arrow IPC stream" in answer.json()["detail"]


def test_json_stays_the_default_whatever_the_content_type_says(client: httpx.Client, world: World) -> None:
    record = {"timestamp": "2026-01-15T10:00:00Z", "server_name": "web-01", "cpu_pct": 1.0}
    content = json.dumps({"records": [record]}).encode()
    for kind in ("application/json", "application/x-www-form-urlencoded", "text/plain"):
        for _ in range(3):  # the short way opens at the third
            answer = client.post("/feed/data", content=content, headers={"Content-Type": kind})
            assert answer.json()["records_received"] == 1
    assert [batch.server_names for batch in world.batches] == [("web-01",)] * 9


def test_remote_write_is_answered_with_nothing_once_its_records_are_durable(
    client: httpx.Client, world: World
) -> None:
    answer = client.post("/api/v1/write", content=LOAD, headers=WRITE)
    assert (answer.status_code, answer.content) == (204, b"")
    assert world.batches[0].metrics["load_average"].tolist() == [0.5]
    metrics = client.get("/metrics").text
    assert 'fleetcast_write_samples_total{outcome="taken"} 1.0' in metrics
    assert 'fleetcast_write_seconds_count{code="204"} 1.0' in metrics
    assert "fleetcast_records_received_total 1.0" in metrics


def test_samples_that_can_never_be_taken_are_a_400_and_the_others_are_kept(
    client: httpx.Client, world: World
) -> None:
    content = body([(labels("node_load1"), [(NOW, 0.5), (NOW + 900_000, 1.0)])])
    answer = client.post("/api/v1/write", content=content, headers=WRITE)
    assert (answer.status_code, len(world.batches)) == (400, 1)
    assert "1 samples are older than the retention of 60 days (buffer.retention_days) or" in answer.text


@pytest.mark.parametrize(
    ("content", "headers", "code"),
    [
        (b"junk", {}, 400),
        (packed(b"junk"), {}, 400),
        (LOAD, {"Content-Type": "application/json"}, 415),
        (LOAD, {"Content-Type": "application/x-protobuf;proto=io.prometheus.write.v3.Request"}, 415),
        (LOAD, {"Content-Type": "application/x-protobuf;proto=io.prometheus.write.v2.Request"}, 400),
        (LOAD, {"Content-Type": "application/x-protobuf;proto=prometheus.WriteRequest"}, 204),
        (LOAD, {"Content-Encoding": "gzip"}, 415),
        (packed(b"\0" * (17 * 2**20)), {}, 413),
    ],
)
def test_a_request_that_can_never_be_taken_is_a_permanent_error(
    client: httpx.Client, content: bytes, headers: dict[str, str], code: int
) -> None:
    assert client.post("/api/v1/write", content=content, headers={**WRITE, **headers}).status_code == code


def test_remote_write_2_is_told_what_was_taken(client: httpx.Client, world: World) -> None:
    kind = {"Content-Type": 'application/x-protobuf; proto="io.prometheus.write.v2.Request"'}
    some = [(labels("node_load1"), [(NOW, 0.5)]), (labels("up"), [(NOW, 1.0)])]
    for series, code, n_samples in ((some, 204, "2"), ([(labels("node_load1"), [(0, 0.5)])], 400, "0")):
        answer = client.post(
            "/api/v1/write", content=packed(symbols_bytes(series)), headers={**WRITE, **kind}
        )
        assert answer.status_code == code
        told = [answer.headers[f"x-prometheus-remote-write-{what}-written"] for what in WRITTEN]
        assert told == [n_samples, "0", "0"]
    assert world.batches[0].metrics["load_average"].tolist() == [0.5]


@pytest.mark.parametrize(("error", "code"), [(StorageFull("full"), 507), (StorageBroken("broken"), 503)])
def test_a_disk_that_takes_nothing_is_an_error_senders_repeat(
    client: httpx.Client, world: World, error: Exception, code: int
) -> None:
    world.error = error
    assert client.post("/api/v1/write", content=LOAD, headers=WRITE).status_code == code
    world.error = None
    assert client.post("/api/v1/write", content=LOAD, headers=WRITE).status_code == 204
    assert len(world.batches) == 1


def test_a_sweep_that_goes_first_is_a_503_for_a_sender_that_would_drop_a_429(tmp_path: Path) -> None:
    world = World(tmp_path, hold_s=0.01)
    world.is_held = lambda: True
    with client_of(world) as client:
        answer = client.post("/api/v1/write", content=LOAD, headers=WRITE)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert client.post("/feed/data", content=b"", headers=ARROW).status_code == 429
        world.is_held = lambda: False
        assert client.post("/api/v1/write", content=LOAD, headers=WRITE).status_code == 204


def test_the_key_is_asked_for_here_too(world: World) -> None:
    with client_of(world, api_key="secret") as client:
        assert client.post("/api/v1/write", content=LOAD, headers=WRITE).status_code == 401
        assert (
            client.post("/api/v1/write", content=LOAD, headers={**WRITE, "X-API-Key": "secret"}).status_code
            == 204
        )


def test_a_server_beyond_the_limit_is_refused_by_name_and_limit(tmp_path: Path) -> None:
    world = World(tmp_path, max_server_names=1)
    with client_of(world) as client:
        assert client.post("/api/v1/write", content=LOAD, headers=WRITE).status_code == 204
        more = body([(labels("node_load1", "web-02:1"), [(NOW, 1.0)])])
        answer = client.post("/api/v1/write", content=more, headers=WRITE)
        assert (answer.status_code, answer.text) == (
            400,
            "1 records refused: is a new name beyond the limit of 1 servers (server.max_server_names)\n",
        )


def test_the_interface_description_names_the_route_and_both_bodies(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths["/feed/data"]["post"]["requestBody"]["content"]) == {
        "application/json",
        "application/vnd.apache.arrow.stream",
    }
    assert {"204", "400", "503", "507"} <= set(paths["/api/v1/write"]["post"]["responses"])


def test_posts_taken_together_are_answered_each_for_itself(world: World) -> None:
    """Shapes, an Arrow stream and one that cannot be read, all waiting while the disk is slow."""
    gate = threading.Event()
    append = world.append_batch

    def slow_append(batch: RecordBatch) -> None:
        assert gate.wait(30)
        append(batch)

    def post(client: httpx.Client, number: int) -> httpx.Response:
        record = {
            "timestamp": "2026-01-15T10:00:00Z",
            "server_name": f"web-{number}",
            "cpu_pct": number * 1.0,
        }
        if number == 3:
            return client.post("/feed/data", content=b"{")
        if number == 4:
            content = stream(server_name=["x", "y"], cpu_pct=[1.0, 5000.0])
            return client.post("/feed/data", content=content, headers=ARROW)
        return client.post("/feed/data", json={"records": [record, {"server_name": "x"}]})

    with client_of(world) as client:
        for _ in range(3):
            assert client.post("/feed/data", json={"records": []}).status_code == 200
        world.append_batch = slow_append  # type: ignore[method-assign]
        with ThreadPoolExecutor(12) as pool:
            answers = pool.map(partial(post, client), range(12))
            gate.set()
        got = list(answers)
    assert [answer.status_code for answer in got] == [200, 200, 200, 422] + [200] * 8
    for number, answer in enumerate(got):
        if number not in (3, 4):
            assert answer.json()["records_received"] == 1
            assert [error["index"] for error in answer.json()["errors"]] == [1]
    assert [error["index"] for error in got[4].json()["errors"]] == [1]
    stored = sorted(name for batch in world.batches for name in batch.server_names)
    assert stored == sorted(["x", *(f"web-{n}" for n in range(12) if n not in (3, 4))])


def test_a_page_of_somebody_else_is_refused_before_the_door(client: httpx.Client, world: World) -> None:
    record = {"timestamp": "2026-01-15T10:00:00Z", "server_name": "web-01", "cpu_pct": 1.0}
    for headers, code in (({"Host": "evil.example"}, 421), ({"Origin": "http://evil.example"}, 403)):
        answer = client.post("/feed/data", json={"records": [record]}, headers=headers)
        assert answer.status_code == code
    assert world.batches == []
