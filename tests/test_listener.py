"""The HTTP thread: a taken port is known at once, a stop answers what is at work."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi import FastAPI

from fleetcast.api.listener import HttpListener
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
