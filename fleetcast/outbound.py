"""One request to an address of the settings: bounded in time, and telling no one the address or its keys.

Owns: how such a request is made (requests), and what may be said of one that failed. Does not know: what
is sent, and when it is tried again.
"""

import contextlib
import socket
import threading
from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

from fleetcast.errors import NotDelivered, printable
from fleetcast.workers import Workers

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_DETAIL_BYTES = 200
_REDIRECT = "a redirect, which is not followed"


def request(
    method: str,
    url: str,
    timeout_s: float,
    *,
    data: bytes | None = None,
    headers: dict[str, str] | None = None,
    hidden: Sequence[str] = (),
) -> str:
    """Make one request; return the status. It follows no redirect: those would take the key elsewhere.

    Args:
        timeout_s: for all of it, also where the other side goes on to say a little.
        hidden: what a message must not repeat, besides the parts of the address.
    Raises:
        NotDelivered: with the status or the cause, never with the address.
    """
    try:
        with _Limit(timeout_s) as limit, requests.Session() as session:
            session.mount("http://", limit.adapter)
            session.mount("https://", limit.adapter)
            session.trust_env = urlsplit(url).hostname not in LOOPBACK
            answer = session.request(
                method,
                url,
                data=data,
                headers=headers,
                timeout=timeout_s,
                allow_redirects=False,
                stream=True,  # what it says at length is not read
            )
            with answer:
                if limit.is_over:  # the head was cut off, and what there is of it may look whole
                    raise requests.Timeout
                if 200 <= answer.status_code < 300:
                    return f"HTTP {answer.status_code}"
                detail = _read_some(answer)
    except requests.Timeout:
        raise NotDelivered(_late(timeout_s)) from None
    except (requests.RequestException, ValueError) as error:  # its text holds the address
        raise NotDelivered(_late(timeout_s) if limit.is_over else f"no answer: {cause(error)}") from None
    says = _REDIRECT if 300 <= answer.status_code < 400 else _without(url, hidden, detail)
    raise NotDelivered(f"HTTP {answer.status_code}: {says}", retry_after_s=_seconds(answer.headers))


class _Limit:
    """Ends the connections of its adapter when the time is over.

    The limits of sockets are for each read, so an answer that drips would never end.
    """

    def __init__(self, limit_s: float) -> None:
        self.is_over = False
        self.adapter = _TwinAdapter(self)
        self._lock = threading.Lock()
        self._twins: list[socket.socket] = []  # under the lock
        self._limit_s, self._is_left = limit_s, threading.Event()
        self._thread = Workers().thread("limit of a request", self._wait, once=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_left.set()
        with self._lock:
            for twin in self._twins:
                twin.close()
            self._twins.clear()

    def watch(self, connection: socket.socket) -> None:
        """Keep a second handle: encryption takes the first one over."""
        with self._lock:
            self._twins.append(connection.dup())
        if self.is_over:
            self._end()

    def _wait(self) -> None:
        if not self._is_left.wait(self._limit_s):
            self._end()

    def _end(self) -> None:
        with self._lock:
            self.is_over = True
            for twin in self._twins:
                with contextlib.suppress(OSError):  # it ended by itself
                    twin.shutdown(socket.SHUT_RDWR)


class _TwinAdapter(HTTPAdapter):
    """Shows each new connection to a limit."""

    def __init__(self, limit: _Limit) -> None:
        self._limit = limit
        super().__init__()

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        """Return the pool of an address; it belongs to this adapter alone."""
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        watch = self._limit.watch

        class Watched(pool.ConnectionCls):  # type: ignore[misc]
            def _new_conn(self) -> socket.socket:
                made: socket.socket = super()._new_conn()
                watch(made)
                return made

        pool.ConnectionCls = Watched
        return pool


def _late(limit_s: float) -> str:
    return f"no answer within {limit_s:g} s"


def _read_some(answer: requests.Response) -> str:
    """Return how a refusal begins, as far as it came."""
    said = b""
    with contextlib.suppress(requests.RequestException):
        for piece in answer.iter_content(1):
            said += piece
            if len(said) >= _DETAIL_BYTES:
                break
    return said.decode("utf-8", "replace")


def cause(error: BaseException) -> str:
    """Return the innermost cause by its name and the system's words, without any address."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    words = error.strerror if isinstance(error, OSError) else None
    words = words.decode("utf-8", "replace") if isinstance(words, bytes) else words  # smtplib's
    return f"{type(error).__name__}{f': {words}' if words else ''}"


def _without(url: str, hidden: Sequence[str], detail: str) -> str:
    """Return what a refusal says, unless it repeats a key, or a part of the address that may be one."""
    parts = urlsplit(url)
    long = [part for part in (*parts.path.split("/"), parts.query, parts.password or "") if len(part) > 6]
    is_told = any(secret in detail for secret in (*long, *filter(None, hidden)))
    return "(not shown)" if is_told else printable(" ".join(detail.split()))


def _seconds(headers: Any) -> float:
    try:
        return max(0.0, float(headers.get("Retry-After", 0)))
    except ValueError:
        return 0.0
