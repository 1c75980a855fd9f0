"""One request to an address of the settings: it ends in time, and what it says steers no terminal."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from alert_sink import Sink

from fleetcast.errors import NotDelivered
from fleetcast.outbound import TimeLimit, request


@contextmanager
def dripping(
    start: bytes, more: bytes, *, wait_s: float = 0.1, waits: bool = True
) -> Iterator[tuple[str, threading.Event]]:
    """Answer with `start`, then `more` again and again; the event tells that the sender hung up.

    Args:
        waits: for a request; a server of mail speaks first.
    """
    ended = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        peer, _ = listener.accept()
        with peer:
            if waits:
                peer.recv(65_536)
            try:
                peer.sendall(start)
                for _ in range(600):
                    peer.sendall(more)
                    time.sleep(wait_s)
            except OSError:
                ended.set()

    threading.Thread(target=answer, daemon=True).start()
    with listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", ended


@pytest.mark.parametrize(
    ("start", "more"),
    [(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"), (b"HTTP/1.1 200 OK\r\nX: ", b"b"), (b"", b"H")],
)
def test_an_answer_that_drips_ends_at_the_limit(start: bytes, more: bytes) -> None:
    with dripping(start, more) as (url, ended):
        with pytest.raises(NotDelivered) as caught:
            request("POST", url, 0.5, data=b"{}")
        assert str(caught.value) == "no answer within 0.5 s"
        assert ended.wait(20)  # the connection is not left open


def test_the_words_of_a_refusal_that_drips_end_at_the_limit() -> None:
    head = b"HTTP/1.1 500 No\r\nContent-Length: 100000\r\n\r\n"
    with dripping(head, b"x") as (url, ended):
        with pytest.raises(NotDelivered) as caught:
            request("POST", url, 0.5, data=b"{}")
        assert str(caught.value).startswith("HTTP 500: x")
        assert len(str(caught.value)) < 100  # of 200 that would be shown
        assert ended.wait(20)


def test_a_refusal_cannot_steer_the_terminal_that_shows_it() -> None:
    with Sink() as sink:
        sink.status, sink.answer = 500, b"\x1b[31mboom\x07"
        with pytest.raises(NotDelivered) as caught:
            request("POST", sink.url, 5.0)
    assert str(caught.value) == r"HTTP 500: \x1b[31mboom\x07"


def test_a_redirect_is_told_as_such() -> None:
    with Sink() as sink:
        sink.status, sink.answer, sink.headers = 302, b"", {"Location": f"{sink.url}/secret"}
        with pytest.raises(NotDelivered) as caught:
            request("POST", sink.url, 5.0)
    assert str(caught.value) == "HTTP 302: a redirect, which is not followed"
    assert len(sink.requests) == 1


def test_a_look_up_of_a_name_that_hangs_ends_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr("fleetcast.outbound.socket.getaddrinfo", lambda *_, **__: go_on.wait(60) and [])
    try:
        with pytest.raises(NotDelivered) as caught:
            request("POST", "http://hooks.example.com/secret", 0.3)
        assert str(caught.value) == "no answer within 0.3 s"
    finally:
        go_on.set()


@pytest.mark.parametrize("host", ["no-such-name.invalid", f"{'a' * 80}.invalid"])
def test_a_name_that_is_not_known_is_told_as_such(host: str) -> None:
    with pytest.raises(NotDelivered) as caught:
        request("POST", f"http://{host}/secret", 20.0)
    assert str(caught.value).startswith(("no answer: gaierror: ", "no answer: OSError: "))
    assert "secret" not in str(caught.value)


def test_the_addresses_of_a_name_are_tried_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ["127.0.0.2", "127.0.0.1"]  # the sink listens at the second one alone
    monkeypatch.setattr("fleetcast.outbound._addresses", lambda _host: known)
    with Sink() as sink:
        place = f"hooks.example.com:{sink.url.rsplit(':', 1)[1]}"
        assert request("POST", f"http://{place}/", 5.0) == "HTTP 200"
        assert sink.requests[0].headers["Host"] == place


def test_no_address_is_tried_once_the_limit_is_over() -> None:
    with TimeLimit(0.0) as limit:
        with pytest.raises(TimeoutError):
            limit.left_s()
        assert limit.is_over
    with TimeLimit(60.0) as limit:
        assert 0.0 < limit.left_s() <= 60.0
        assert limit.look_up("::1") == ["::1"]
        assert not limit.is_over
