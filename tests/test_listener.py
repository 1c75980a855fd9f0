"""The HTTP server's thread, and what a connection may cost before and after its request."""

import asyncio
import contextlib
import resource
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from fleetcast.api import listener as listener_module
from fleetcast.api.connection import MAX_FIELDS, MAX_HEAD_BYTES, MAX_PIPELINED, BoundedConnection
from fleetcast.api.listener import HttpListener
from fleetcast.clock import monotonic
from fleetcast.errors import CannotStart


def test_a_taken_port_is_named_with_what_to_do() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(CannotStart, match=rf"port {port}: Address already in use.*--port"):
            HttpListener("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "256.1.1.1", "a" * 300, "x\udc80"])
def test_an_impossible_host_is_a_failed_start(host: str) -> None:
    with pytest.raises(CannotStart, match="cannot listen on"):
        HttpListener(host, 0)


def test_an_ipv6_address_has_a_url() -> None:
    try:
        listener = HttpListener("::1", 0)
    except CannotStart:
        pytest.skip("this host has no IPv6")
    assert listener.url.startswith("http://[::1]:")
    assert listener.stop(1.0)


def test_a_stop_lets_the_request_at_work_finish_and_refuses_new_ones() -> None:
    at_work, release = threading.Event(), threading.Event()
    app = FastAPI()

    @app.get("/slow")
    def slow() -> str:
        at_work.set()
        release.wait(30)
        return "done"

    listener = HttpListener("127.0.0.1", 0)
    listener.start(app, 10.0)
    with httpx.Client(base_url=listener.url, trust_env=False) as client, ThreadPoolExecutor(2) as pool:
        answer = pool.submit(client.get, "/slow")
        at_work.wait(30)
        stopped = pool.submit(listener.stop, 10.0)
        with pytest.raises(httpx.ConnectError):
            while True:  # until the port is closed, within a tick of the server
                httpx.get(f"{listener.url}/none", trust_env=False)
        release.set()
        assert answer.result().json() == "done"
        assert stopped.result()
    assert not listener.is_alive


def test_a_request_that_never_ends_does_not_hold_the_stop_up() -> None:
    at_work, release = threading.Event(), threading.Event()
    app = FastAPI()

    @app.get("/hang")
    def hang() -> None:
        at_work.set()
        release.wait(30)

    listener = HttpListener("127.0.0.1", 0)
    listener.start(app, 0.0)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.get, f"{listener.url}/hang", trust_env=False)
        at_work.wait(30)
        listener.stop(0.5)
        release.set()
        with pytest.raises(httpx.HTTPError):
            answer.result().raise_for_status()


LARGE = b"x" * 30_000_000  # more than the buffers of both sockets take
GET = b"GET /small HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(BoundedConnection, "head_timeout_s", 0.3)
    monkeypatch.setattr(BoundedConnection, "stalled_answer_s", 0.3)
    app = FastAPI()

    @app.get("/small")
    async def small() -> str:
        return "small"

    @app.post("/refused", status_code=401)
    async def refused() -> str:
        return "refused"

    @app.get("/large")
    async def large() -> Response:
        return Response(LARGE)

    @app.post("/echo")
    async def echo(request: Request) -> tuple[int, bool]:
        return len(await request.body()), "x-late" in request.headers

    @app.get("/slow")
    async def slow() -> None:
        await asyncio.sleep(5)

    listener = HttpListener("127.0.0.1", 0)
    listener.start(app, 1.0)
    yield int(listener.url.rsplit(":", 1)[1])
    listener.stop(5.0)


def wire(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def rest(connection: socket.socket) -> bytes:
    """Return what still comes until the daemon closes; a hang is a TimeoutError."""
    found = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(1_000_000):
            found += data
    return bytes(found)


def still_open(connection: socket.socket) -> bool:
    """Send one more byte of a head; False once the daemon has closed."""
    try:
        connection.sendall(b"a")
        return connection.recv(1) != b""
    except TimeoutError:
        return True
    except (BrokenPipeError, ConnectionResetError):
        return False


@pytest.mark.parametrize(
    "begun", [b"", b"GET /small HT", GET, GET + b"X-Slow: ", b"\r\n"], ids=lambda begun: repr(begun[-9:])
)
def test_a_head_that_does_not_come_ends_the_connection(port: int, begun: bytes) -> None:
    with wire(port) as connection:
        connection.sendall(begun)
        assert rest(connection) == b""


def test_a_head_that_trickles_gains_no_time_by_it(port: int) -> None:
    with wire(port) as connection:
        connection.settimeout(0.02)
        connection.sendall(GET + b"X-Slow: ")
        began_s = monotonic()
        while still_open(connection):
            assert monotonic() - began_s < 10


def test_after_an_answer_a_lone_line_feed_does_not_keep_the_connection_for_ever(port: int) -> None:
    with wire(port) as connection:
        connection.sendall(GET + b"\r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"\r\n")
        rest(connection)


def test_a_flood_of_headers_is_refused_before_it_costs_memory(port: int) -> None:
    with wire(port) as connection:
        connection.sendall(GET + b"X-A: b\r\n" * (MAX_HEAD_BYTES // 8))
        assert rest(connection).startswith(b"HTTP/1.1 431 ")


CHUNKED = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("begun", "endless"),
    [
        (CHUNKED + b"2\r\nhi\r\n0\r\n", b"x-trailer: 1\r\n" * 100),
        (CHUNKED + b"2\r\nhi\r\n0\r\nx-trailer: ", b"t" * 1000),
        (CHUNKED + b"5;name=", b"e" * 1000),
        (CHUNKED, b"1;" + b"e" * 1000 + b"\r\nx\r\n"),
        (b"GET /", b"u" * 1000),
        (GET + b"Connection: keep-alive\r\n\r\n", b"\r\n" * 500),
        (b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n", GET + b"\r\n"),
    ],
    ids=["trailers", "one trailer", "one extension", "extensions", "a line", "line feeds", "a pipeline"],
)
def test_no_state_of_the_parser_takes_bytes_without_end(
    port: int, begun: bytes, endless: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BoundedConnection, "head_timeout_s", 60.0)  # bytes alone end it
    n_sent = 0
    with wire(port) as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(begun)
        while n_sent < 30_000_000:
            connection.sendall(endless)
            n_sent += len(endless)
    assert n_sent < 10_000_000  # the sockets' buffers among them


def test_a_head_of_many_tiny_fields_is_refused_by_their_number(port: int) -> None:
    with wire(port) as connection:
        connection.sendall(GET + b"a:b\r\n" * (MAX_FIELDS + 1) + b"\r\n")
        assert rest(connection).startswith(b"HTTP/1.1 431 ")


def test_a_trailer_does_not_become_a_header_and_small_chunks_are_fine(port: int) -> None:
    with wire(port) as connection:
        chunks = b"1\r\nx\r\n" * 100_000
        connection.sendall(CHUNKED + chunks + b"0\r\nx-late: 1\r\n\r\n" + GET + b"Connection: close\r\n\r\n")
        answers = rest(connection)
    assert b"[100000,false]" in answers
    assert answers.endswith(b'"small"')


def test_answers_that_nobody_reads_are_bounded_together_and_refused_with_when_to_come_back() -> None:
    app = FastAPI()

    @app.get("/large")
    async def large() -> Response:
        return Response(LARGE)

    @app.get("/small")
    async def small() -> str:
        return "small"

    listener = HttpListener("127.0.0.1", 0)
    listener.start(app, 1.0, max_answer_bytes=2 * len(LARGE))
    port = int(listener.url.rsplit(":", 1)[1])
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(wire(port)) for _ in range(3)]
        for reader in readers:
            reader.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            head = reader.recv(100)
            assert head.startswith(b"HTTP/1.1 503" if reader is readers[2] else b"HTTP/1.1 200")
        assert b"retry-after: 5" in head + rest(readers[2])
        assert httpx.get(f"{listener.url}/small", trust_env=False).json() == "small"
        for reader in readers[:2]:
            assert rest(reader).endswith(LARGE[-1000:])
        assert httpx.get(f"{listener.url}/large", trust_env=False, timeout=30).content == LARGE
    assert listener.stop(5.0)


def test_a_connection_that_is_ended_with_requests_at_work_is_no_error_of_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app, n_at_work, n_done = FastAPI(), threading.Semaphore(0), threading.Semaphore(0)

    @app.get("/slow")
    async def slow() -> str:
        n_at_work.release()
        await asyncio.sleep(0.2)
        n_done.release()
        return "nobody reads this"

    listener = HttpListener("127.0.0.1", 0)
    listener.start(app, 1.0)
    with wire(int(listener.url.rsplit(":", 1)[1])) as client:
        client.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        assert n_at_work.acquire(timeout=30)
        client.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n" * MAX_PIPELINED)  # more than may wait
    assert n_done.acquire(timeout=30)
    assert httpx.get(f"{listener.url}/slow", trust_env=False).text == '"nobody reads this"'
    assert listener.stop(5.0)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_where_connections_are_used_up_the_longest_idle_one_makes_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listener_module, "_MAX_CONNECTIONS", 10)
    ends: list[str] = []
    listener = HttpListener("127.0.0.1", 0)
    app = FastAPI()

    @app.get("/small")
    async def small() -> str:
        return "small"

    listener.start(app, 1.0, on_end=ends.append)
    port = int(listener.url.rsplit(":", 1)[1])
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(wire(port)) for _ in range(30)]
        for _ in range(5):
            assert httpx.get(f"{listener.url}/small", trust_env=False).json() == "small"
        assert rest(idle[0]) == b""
        idle[29].sendall(GET + b"\r\n")
        assert idle[29].recv(100).startswith(b"HTTP/1.1 200")
    assert set(ends) == {"crowded"}
    assert listener.stop(5.0)


def test_the_soft_limit_of_descriptors_is_raised_and_a_low_hard_one_leaves_a_reserve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _what: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _what, new: limits.append(new))
    assert listener_module._connections_allowed() == 2048
    assert limits[-1] == (4096, 4096)
    limits.append((1024, 1024))
    assert listener_module._connections_allowed() == 1024 - 256


def test_a_small_request_after_a_long_body_is_not_taken_for_a_flood(port: int) -> None:
    with wire(port) as connection:
        length = 3 * MAX_HEAD_BYTES
        head = b"POST /refused HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length
        connection.sendall(head + b"b" * length + GET + b"Connection: close\r\n\r\n")
        answers = rest(connection)
    assert answers.count(b"HTTP/1.1 ") == 2
    assert b"HTTP/1.1 401 " in answers
    assert answers.endswith(b'"small"')


def test_an_answer_that_nobody_reads_is_given_up(port: int) -> None:
    with wire(port) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        for _ in range(3):  # each of these ends after the head's time: together longer than the answer's
            with wire(port) as other:
                rest(other)
        assert len(rest(connection)) < len(LARGE)


def test_a_large_answer_that_is_read_arrives_whole(port: int) -> None:
    with wire(port) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert rest(connection).endswith(b"\r\n\r\n" + LARGE)
