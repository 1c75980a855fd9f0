"""A daemon without a key answers its own host's programs, and no page of somebody else."""

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from fleetcast.api.listener import HttpListener
from fleetcast.api.server import BrowserGuard


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
