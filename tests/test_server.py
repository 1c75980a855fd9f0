"""The HTTP interface: codes, headers and words, over the real application and a real socket."""

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from fleetcast.api import bodies
from fleetcast.api.feed import BrowserGuard, create_front
from fleetcast.api.listener import HttpListener
from fleetcast.api.server import create_app
from fleetcast.clock import FakeClock, SystemClock
from fleetcast.errors import StorageBroken, StorageFull
from fleetcast.schema import Rejection
from fleetcast.serving.board import TooManyServers, UnknownServer
from fleetcast.serving.intake import Receipt
from fleetcast.serving.telemetry import Snapshot, Telemetry
from fleetcast.settings import ServerSettings

GOOD = {"records": [{"timestamp": "2026-01-15T10:00:05Z", "server_name": "web-01", "cpu_pct": 12.5}]}


class Daemon:
    """What the application is given: intake, board and report in one, each as simple as can be."""

    def __init__(self) -> None:
        self.taken: list[Sequence[object]] = []
        self.error: Exception | None = None
        self.rejections: tuple[Rejection, ...] = ()
        self.held: Callable[[], bool] = lambda: False
        self.not_ready = ""
        self.before_taking: Callable[[int], object] = lambda _n_posts: None

    def take_together(self, parts: Sequence[Sequence[object]]) -> list[Receipt]:
        self.before_taking(len(parts))
        if self.error:
            raise self.error
        self.taken += parts
        return [Receipt(len(raw) - len(self.rejections), self.rejections, 0) for raw in parts]

    def document(
        self,
        servers: Sequence[str] = (),
        share: tuple[int, int] | None = None,
        *,
        only_current: bool = False,
    ) -> Sequence[bytes]:
        if "nobody" in servers:
            raise UnknownServer("unknown server 'nobody'")
        if share == (0, 1):
            raise TooManyServers("20001 servers are too many")
        told: dict[str, Any] = {"servers": list(servers), "only_current": only_current}
        return [json.dumps(told | ({"share": share} if share else {})).encode()]

    def table(
        self,
        servers: Sequence[str] = (),
        share: tuple[int, int] | None = None,
        *,
        only_current: bool = False,
    ) -> Iterator[bytes]:
        yield b"table of "
        yield from self.document(servers, share, only_current=only_current)

    def is_held(self) -> bool:
        return self.held()

    def status(self) -> dict[str, Any]:
        return {"pid": 7}

    def snapshot(self) -> Snapshot:
        return Snapshot({"servers": 3.0})


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


@contextmanager
def client_of(daemon: Daemon, api_key: str = "", **settings: Any) -> Iterator[httpx.Client]:
    telemetry = Telemetry(CollectorRegistry(), FakeClock())
    listener = HttpListener("127.0.0.1", 0)
    parts: Any = daemon  # stands in for intake, board and report
    own = ServerSettings(**settings)
    front = create_front(parts, parts.is_held, telemetry, own, api_key)
    front.open(create_app(parts, parts, telemetry, own, api_key))
    listener.start(front, 5.0)
    with httpx.Client(base_url=listener.url, trust_env=False) as client:
        yield client
    assert listener.stop(10.0)


@pytest.fixture
def client(daemon: Daemon) -> Iterator[httpx.Client]:
    with client_of(daemon) as client:
        yield client


def test_posts_are_taken_before_the_other_routes_are_there(daemon: Daemon) -> None:
    telemetry, own = Telemetry(CollectorRegistry(), FakeClock()), ServerSettings()
    listener = HttpListener("127.0.0.1", 0)
    parts: Any = daemon
    front = create_front(parts, parts.is_held, telemetry, own)
    listener.start(front, 5.0)
    with httpx.Client(base_url=listener.url, trust_env=False) as client, ThreadPoolExecutor(1) as pool:
        status = pool.submit(httpx.get, f"{listener.url}/status", trust_env=False)
        foreign = client.post("/feed/data", json=GOOD, headers={"host": "evil.example"})
        taken = client.post("/feed/data", json=GOOD)
        is_waiting = not status.done()
        front.open(create_app(parts, parts, telemetry, own))
        answered = status.result(10.0)
    assert listener.stop(10.0)
    assert (foreign.status_code, taken.status_code, daemon.taken) == (421, 200, [GOOD["records"]])
    assert is_waiting
    assert answered.json() == {"pid": 7}


def test_records_are_handed_on_and_the_answer_counts_them(client: httpx.Client, daemon: Daemon) -> None:
    answer = client.post("/feed/data", json=GOOD)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"status": "ok", "records_received": 1, "records_rejected": 0, "errors": []}
    assert daemon.taken == [GOOD["records"]]


def test_only_the_first_twenty_rejections_are_shown(client: httpx.Client, daemon: Daemon) -> None:
    daemon.rejections = tuple(Rejection(index, "cpu_pct", "bad") for index in range(30))
    answer = client.post("/feed/data", json={"records": [{}] * 30}).json()
    assert (answer["records_received"], answer["records_rejected"], len(answer["errors"])) == (0, 30, 20)
    assert answer["errors"][19] == {"index": 19, "field": "cpu_pct", "reason": "bad"}


def test_an_empty_list_is_fine(client: httpx.Client) -> None:
    assert client.post("/feed/data", json={"records": []}).status_code == 200


def test_the_body_is_read_whatever_its_declared_type(client: httpx.Client) -> None:
    content = json.dumps(GOOD)
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert client.post("/feed/data", content=content, headers={"content-type": kind}).status_code == 200


def test_another_shape_is_422_and_says_what_would_be_right(client: httpx.Client, daemon: Daemon) -> None:
    answer = client.post("/feed/data", content=b'{"rows": []}')
    assert answer.status_code == 422
    assert answer.json() == {"detail": 'the body must be {"records": [...]}; "records" is absent'}
    assert daemon.taken == []


def test_a_body_over_the_limit_is_413(daemon: Daemon) -> None:
    with client_of(daemon, max_body_bytes=2000) as client:
        assert client.post("/feed/data", content=b" " * 2001).status_code == 413
        assert client.post("/feed/data", content=b" " * 9000).status_code == 413
        chunks = (b" " * 500 for _ in range(10))
        assert client.post("/feed/data", content=chunks).status_code == 413
        assert client.post("/feed/data", content=json.dumps(GOOD)).status_code == 200


def test_a_compressed_body_is_415(client: httpx.Client) -> None:
    answer = client.post("/feed/data", content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
    assert answer.status_code == 415
    assert "uncompressed" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("error", "code", "retry_after"),
    [(StorageFull("no space left"), 507, None), (StorageBroken("input/output error"), 503, "5")],
)
def test_a_disk_that_refuses_is_told(
    client: httpx.Client, daemon: Daemon, error: Exception, code: int, retry_after: str | None
) -> None:
    daemon.error = error
    answer = client.post("/feed/data", json=GOOD)
    assert (answer.status_code, answer.headers.get("retry-after")) == (code, retry_after)
    assert str(error) in answer.json()["detail"]
    daemon.error = None
    assert client.post("/feed/data", json=GOOD).status_code == 200


def test_while_held_a_post_waits_and_then_goes_through(client: httpx.Client, daemon: Daemon) -> None:
    answers = iter([True, True, False])
    daemon.held = lambda: next(answers)
    assert client.post("/feed/data", json=GOOD).status_code == 200


def test_held_for_too_long_is_429_with_retry_after(daemon: Daemon) -> None:
    daemon.held = lambda: True
    with client_of(daemon, hold_s=0.0) as client:
        answer = client.post("/feed/data", json=GOOD)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert daemon.taken == []


def test_too_many_requests_at_work_are_503(daemon: Daemon) -> None:
    release, at_work = threading.Event(), threading.Semaphore(0)

    def wait(n_posts: int) -> None:
        at_work.release(n_posts)
        release.wait(30)

    daemon.before_taking = wait
    with client_of(daemon, max_pending_posts=2) as client, ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(client.post, "/feed/data", json=GOOD) for _ in range(2)]
        at_work.acquire()
        at_work.acquire()
        answer = client.post("/feed/data", json=GOOD)
        release.set()
        assert [item.result().status_code for item in slow] == [200, 200]
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_a_body_that_never_ends_is_408(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.05)
    answered = threading.Event()

    def chunks() -> Iterator[bytes]:
        yield b"{"
        answered.wait(0.5)
        yield b"}"

    with client_of(daemon) as client:
        assert client.post("/feed/data", content=chunks()).status_code == 408
        assert client.post("/feed/data", json=GOOD).status_code == 200


def test_a_sender_that_goes_away_disturbs_nobody(client: httpx.Client, daemon: Daemon) -> None:
    host, port = client.base_url.host, client.base_url.port
    with socket.create_connection((host, port or 0)) as link:
        link.sendall(b"POST /feed/data HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    assert client.post("/feed/data", json=GOOD).status_code == 200
    assert len(daemon.taken) == 1


def test_predictions_may_be_narrowed(client: httpx.Client) -> None:
    assert client.get("/predictions/current").json() == {"servers": [], "only_current": False}
    narrowed = client.get("/predictions/current?server=a&server=b&fields=current").json()
    assert narrowed == {"servers": ["a", "b"], "only_current": True}
    share = client.get("/predictions/current?shard=3/16").json()
    assert share == {"servers": [], "only_current": False, "share": [3, 16]}
    too_large = client.get("/predictions/current?shard=0/1")
    assert (too_large.status_code, too_large.json()) == (413, {"detail": "20001 servers are too many"})
    for wrong in ("shard=1/1", "shard=x", "shard=0/2&server=a"):
        assert client.get(f"/predictions/current?{wrong}").status_code == 422, wrong


def test_predictions_are_a_table_where_arrow_is_asked_for(client: httpx.Client) -> None:
    kind = "application/vnd.apache.arrow.stream"
    read_by_tables = (
        kind, f"{kind}, */*;q=0.1", kind.upper(), f"{kind} ; Q=0.5, application/json;q=0.2", f"*/*, {kind}",
        f"application/json, {kind}", "application/json;q=0, application/*",
    )  # fmt: skip
    for accept in read_by_tables:
        answer = client.get("/predictions/current?server=a&fields=current", headers={"Accept": accept})
        assert answer.headers["content-type"] == kind, accept
        assert answer.content == b'table of {"servers": ["a"], "only_current": true}'
    read_by_others = (
        "*/*", "application/*", "application/json", "text/html", "", f"{kind};q=0", f"{kind};q=0.000, */*",
        f"{kind};q=0.1, application/json", f"{kind};q=high", f"x{kind}", f"application/json;x={kind}",
    )  # fmt: skip
    for accept in read_by_others:
        answer = client.get("/predictions/current", headers={"Accept": accept})
        assert answer.headers["content-type"] == "application/json", accept
        assert answer.headers["vary"] == "Accept"
    twice = client.get(
        "/predictions/current", headers=[("Accept", "application/json;q=0.5"), ("Accept", kind)]
    )
    assert twice.headers["content-type"] == kind
    described = client.get("/openapi.json").json()["paths"]["/predictions/current"]["get"]["responses"]["200"]
    assert set(described["content"]) == {"application/json", kind}


def test_an_unknown_server_is_404_and_an_unknown_field_422(client: httpx.Client) -> None:
    answer = client.get("/predictions/current?server=nobody")
    assert (answer.status_code, answer.json()) == (404, {"detail": "unknown server 'nobody'"})
    assert client.get("/predictions/current?fields=everything").status_code == 422


def test_ready_says_what_is_missing(client: httpx.Client, daemon: Daemon) -> None:
    assert client.get("/ready").json() == {"status": "ready"}
    daemon.not_ready = "the history is being restored"
    answer = client.get("/ready")
    assert answer.status_code == 503
    assert answer.json() == {"status": "not ready", "detail": "the history is being restored"}
    assert client.get("/health").json() == {"status": "alive"}


def test_status_and_metrics_answer(client: httpx.Client) -> None:
    client.post("/feed/data", json=GOOD)
    assert client.get("/status").json() == {"pid": 7}
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "fleetcast_records_received_total 1.0" in answer.text
    assert "fleetcast_servers 3.0" in answer.text


@pytest.mark.parametrize("key", [None, "", "wrong", "secret2", "Secret", "sécret"])
@pytest.mark.parametrize("path", ["/feed/data", "/predictions/current", "/status"])
def test_without_the_key_nothing_is_told_or_taken(daemon: Daemon, path: str, key: str | None) -> None:
    headers = [] if key is None else [(b"X-API-Key", key.encode("latin-1"))]
    with client_of(daemon, api_key="secret") as client:
        method = "POST" if path == "/feed/data" else "GET"
        answer = client.request(method, path, content=json.dumps(GOOD), headers=headers)
        assert answer.status_code == 401
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 200
        assert client.get("/metrics").status_code == 200
    assert daemon.taken == []


@pytest.mark.parametrize("key", ["secret", "schlüssel-日"])
def test_with_the_key_everything_answers(daemon: Daemon, key: str) -> None:
    with client_of(daemon, api_key=key) as client:
        headers = {b"X-API-Key": key.encode()}
        assert client.post("/feed/data", json=GOOD, headers=headers).status_code == 200
        assert client.get("/status", headers=headers).status_code == 200


def test_the_described_example_is_of_this_moment_so_that_it_can_be_sent(client: httpx.Client) -> None:
    post = client.get("/openapi.json").json()["paths"]["/feed/data"]["post"]
    (record,) = post["requestBody"]["content"]["application/json"]["example"]["records"]
    age = SystemClock().now() - datetime.fromisoformat(record["timestamp"])
    assert abs(age.total_seconds()) < 60


def test_the_interface_describes_itself(client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()["paths"]
    assert set(described) == {
        "/feed/data", "/predictions/current", "/status", "/health", "/ready", "/metrics",
    }  # fmt: skip
    codes = set(described["/feed/data"]["post"]["responses"])
    assert codes == {"200", "401", "408", "413", "415", "422", "429", "503", "507"}


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/metrics", "/status", "/predictions/current", "/openapi.json"]
)
def test_head_is_answered_as_get_without_the_body(client: httpx.Client, path: str) -> None:
    told, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (told.status_code, b"")
    assert head.headers["content-type"] == told.headers["content-type"]
    assert int(head.headers["content-length"]) > 0


def test_head_passes_the_same_door_and_follows_readiness(daemon: Daemon) -> None:
    with client_of(daemon, "right") as client:
        assert client.head("/status").status_code == 401
        assert client.head("/status", headers={"x-api-key": "right"}).status_code == 200
        assert client.head("/feed/data").status_code == 405
        daemon.not_ready = "the disk is full"
        assert client.head("/ready").status_code == 503
    with client_of(daemon) as client:
        assert client.head("/status", headers={"host": "evil.example"}).status_code == 421


async def _says_hello(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    listener = HttpListener("127.0.0.1", 0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        await BrowserGuard(_says_hello, ["localhost", "forecasts.example"])(scope, receive, send)

    listener.start(app, 1.0)
    yield listener.url
    listener.stop(5.0)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:8000", "[::1]:8000", "localhost:80", "LOCALHOST", "a.localhost",
     "Forecasts.example:80"],
)  # fmt: skip
def test_programs_of_this_host_and_allowed_names_are_answered(url: str, host: str) -> None:
    assert httpx.get(url, headers={"Host": host}, trust_env=False).text == "hello"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "1.2.3"]
)
def test_a_name_that_somebody_pointed_here_is_refused_and_told_what_would_be_right(
    url: str, host: str
) -> None:
    answer = httpx.get(url, headers={"Host": host}, trust_env=False)

    assert answer.status_code == 421
    assert "server.allowed_hosts" in answer.json()["detail"]


def test_a_request_without_a_host_is_refused(url: str) -> None:
    address = url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), 10) as link:
        link.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b" 421 " in link.recv(1000)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://6.6.6.6", "https://127.0.0.1:1"])
def test_a_page_of_another_origin_may_not_post(url: str, origin: str) -> None:
    assert httpx.post(url, headers={"Origin": origin}, trust_env=False).status_code == 403


def test_the_daemons_own_page_may(url: str) -> None:
    assert httpx.post(url, headers={"Origin": url}, trust_env=False).status_code == 200


def test_a_query_names_a_bounded_number_of_servers(daemon: Daemon) -> None:
    with client_of(daemon, max_query_servers=2) as client:
        assert client.get("/predictions/current", params={"server": ["a", "b"]}).status_code == 200
        answer = client.get("/predictions/current", params={"server": ["a", "b", "c"]})
        assert (answer.status_code, answer.json()["detail"]) == (
            422, "a query names at most 2 servers; ask for all",
        )  # fmt: skip


def test_requests_refused_at_the_door_are_counted(daemon: Daemon) -> None:
    with client_of(daemon, api_key="secret") as client:
        client.post("/feed/data", json=GOOD)
        client.get("/status", headers={"X-API-Key": "wrong"})
        assert 'fleetcast_requests_refused_total{reason="key"} 2.0' in client.get("/metrics").text
    with client_of(daemon) as client:
        client.get("/status", headers={"Host": "evil.example"})
        client.get("/status", headers={"Origin": "http://evil.example"})
        text = client.get("/metrics").text
    assert 'fleetcast_requests_refused_total{reason="host"} 1.0' in text
    assert 'fleetcast_requests_refused_total{reason="origin"} 1.0' in text


@pytest.mark.parametrize(
    ("path", "takes"), [("/predictions/current?servers=x", "server, fields"), ("/status?x=1", "none")]
)
def test_an_unknown_query_field_is_422_and_names_the_right_ones(
    client: httpx.Client, path: str, takes: str
) -> None:
    answer = client.get(path)
    assert answer.status_code == 422
    assert f"this path takes {takes}" in answer.text
    assert client.get("/health?x=1").status_code == 200
    assert client.get("/metrics?x=1").status_code == 200
