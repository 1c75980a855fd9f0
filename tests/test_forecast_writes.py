"""Forecasts that are sent by remote-write: the bytes, who gets them, and what a receiver that fails costs."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from remote_write_bodies import request_bytes
from test_forecast_series import HOSTILE, export_of, forecast, settled
from test_inference import World

from benchmarks.programs import wait_for
from fleetcast.errors import NotDelivered, SettingsError
from fleetcast.prometheus import outgoing
from fleetcast.prometheus.outgoing import Family, Receiver, Sender, write_requests
from fleetcast.prometheus.wire import TimeSeriesMessage, WriteRequestMessage, unpack
from fleetcast.settings import ExportSettings, Settings, load_settings
from fleetcast.workers import Workers

TOKEN = "a-token-that-no-log-may-hold"


class Stub(ThreadingHTTPServer):
    """A receiver that answers with the statuses it is given, then with 204."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Taker)
        self.url = f"http://127.0.0.1:{self.server_port}/api/v1/write"
        self.statuses: list[int] = []
        self.taken: list[tuple[dict[str, str], bytes]] = []
        self.may_answer = threading.Event()
        self.may_answer.set()


class Taker(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.taken.append(({k.lower(): v for k, v in self.headers.items()}, body))
        self.server.may_answer.wait(30)
        status = self.server.statuses.pop(0) if self.server.statuses else 204
        self.send_response(status)
        text = b"" if status == 204 else f"bad token {TOKEN}".encode()
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.may_answer.set()
    server.shutdown()
    thread.join()
    server.server_close()


def series_of(body: bytes) -> list[tuple[dict[str, str], float, int]]:
    found = []
    for raw in WriteRequestMessage.FromString(unpack(body, 2**24)).timeseries:
        series = TimeSeriesMessage.FromString(raw)
        (sample,) = series.samples
        labels = [(label.name.decode(), label.value.decode()) for label in series.labels]
        assert labels == sorted(labels), "receivers refuse others"
        found.append((dict(labels), sample.value, sample.timestamp))
    return found


def test_the_bytes_are_those_of_the_format() -> None:
    rows = [(("server", name),) for name in HOSTILE]
    cells = [(("lead", "5m"),), (("lead", "1h"),)]
    values = np.arange(2 * len(HOSTILE), dtype=np.float64).reshape(-1, 2)
    values[1, 0] = np.nan
    (body,) = write_requests([Family("f", "", rows, cells, values)], 1_768_471_200_000, (("job", "j"),))
    wanted = [
        ({"__name__": "f", "job": "j", "lead": lead, "server": name}, [(1_768_471_200_000, float(value))])
        for name, row in zip(HOSTILE, values, strict=True)
        for lead, value in zip(("5m", "1h"), row, strict=True)
        if value == value
    ]
    assert unpack(body, 2**20) == request_bytes(wanted)


def test_a_request_holds_so_many_series_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "SERIES_A_REQUEST", 3)
    rows = [(("server", str(number)),) for number in range(7)]
    bodies = list(write_requests([Family("f", "", rows, [()], np.ones((7, 1)))], 1))
    assert [len(series_of(body)) for body in bodies] == [3, 3, 1]
    assert list(write_requests([Family("f", "", [], [()], np.ones((0, 1)))], 1)) == []


def test_what_is_sent_is_what_is_scraped() -> None:
    export = export_of()
    export.note_settled(settled("a", 1, 41.0, 44.0))
    export.note(forecast("a", "b"))
    (body,) = export.requests()
    sent = series_of(body)
    lines = [line for line in b"".join(export.pieces()).decode().splitlines() if line[0] != "#"]
    assert len(sent) == len(lines)
    labels, value, time_ms = next(item for item in sent if item[0]["__name__"] == "fleetcast_forecast_due")
    assert labels == {
        "__name__": "fleetcast_forecast_due", "job": "fleetcast_forecasts", "server": "a",
        "metric": "cpu_pct", "lead": "5m", "quantile": "0.1",
    }  # fmt: skip
    assert (value, time_ms) == (40.0, 1_768_471_200_000), "one of now, never of the future"


def test_a_request_says_what_it_is_and_carries_the_token(stub: Stub) -> None:
    Receiver(stub.url, TOKEN).take(b"body")
    ((headers, body),) = stub.taken
    assert body == b"body"
    assert headers["authorization"] == f"Bearer {TOKEN}"
    assert headers["content-encoding"] == "snappy"
    assert headers["content-type"] == "application/x-protobuf"
    assert headers["x-prometheus-remote-write-version"] == "0.1.0"


def test_a_refusal_ends_the_round_and_tells_neither_address_nor_token(stub: Stub) -> None:
    ends: list[NotDelivered | None] = []
    receiver = Receiver(stub.url.replace("write", "write-secret-path"), TOKEN)
    sender = Sender(receiver, lambda: iter([b"1", b"2"]), ends.append, Workers())
    stub.statuses = [500]
    sender.send()
    sender.send()
    assert [body for _, body in stub.taken] == [b"1", b"1", b"2"], "nothing waits: the next round is whole"
    assert ends[1] is None
    assert "HTTP 500" in str(ends[0])
    for secret in (TOKEN, "write-secret-path"):
        assert secret not in f"{ends[0]} {receiver!r}"


def test_a_receiver_that_hangs_delays_no_forecast_and_gets_the_newest_afterwards(
    stub: Stub, tmp_path: Path
) -> None:
    stub.may_answer.clear()
    world = World(tmp_path)
    world.export = ExportSettings(remote_write_url=stub.url)
    world.start()
    try:
        for number in range(5):
            world.post(("a", number, 20.0 + number))
            world.service.cycle()
            if number == 1:
                wait_for("the first request", lambda: bool(stub.taken))
        assert world.get("/status")["sweep"]["count"] == 4
        assert len(stub.taken) == 1, "the thread waits, the sweeps did not"
        assert world.client.get("/metrics/forecasts").status_code == 404, "sending is not serving"
        stub.may_answer.set()
        wait_for("the newest", lambda: len(stub.taken) >= 2)
        origin = [
            s for s in series_of(stub.taken[1][1]) if s[0]["__name__"].endswith("origin_timestamp_seconds")
        ]
        assert origin[0][1] % 86_400 == 4 * 300, "the bins in between were dropped"
        done = 'fleetcast_forecast_writes_total{outcome="ok"} '
        wait_for("the count", lambda: f"{done}2.0" in world.client.get("/metrics").text)
    finally:
        world.end()


def test_a_receiver_that_is_away_is_a_counted_error(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.export = ExportSettings(remote_write_url="http://127.0.0.1:9/api/v1/write")
    world.start()
    try:
        for number in range(2):
            world.post(("a", number, 20.0))
            world.service.cycle()
        failed = 'fleetcast_forecast_writes_total{outcome="failed"} 1.0'
        wait_for("the failure", lambda: failed in world.client.get("/metrics").text)
        assert world.get("/status")["last_errors"][0]["part"] == "export"
    finally:
        world.end()


def test_the_address_must_be_one_and_is_not_shown() -> None:
    with pytest.raises(SettingsError) as raised:
        load_settings(flags={"export.remote_write_url": f"ftp://{TOKEN}@host"}, environ={})
    assert "export.remote_write_url must begin with http:// or https://" in str(raised.value)
    assert TOKEN not in str(raised.value)
    assert TOKEN not in repr(Settings(export=ExportSettings(remote_write_token=TOKEN)))
