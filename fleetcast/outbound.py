"""One request to an address of the settings: bounded in time, and telling no one the address or its keys.

Owns: how such a request is made (requests), what may be said of one that failed, and the limit in
time. Does not know: what is sent, and when it is tried again.
"""

import contextlib
import ipaddress
import queue
import socket
import threading
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, Self
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import BaseHTTPError  # type: ignore[attr-defined]  # urllib3's, as it is named there

from fleetcast.clock import monotonic
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
        with TimeLimit(timeout_s) as limit, requests.Session() as session:
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


class TimeLimit:
    """Ends the connection of its adapter when the time of a `with` block is over, block after block.

    The limits of sockets are for each read, so an answer that drips would never end; the system's look-up of
    a name has none, and each of its addresses would have the limit for itself. One thread at a time may use
    it. What comes from a connection that was ended may look whole: ask `is_over` before it is used.
    Closing the adapter, or the session that it is mounted on, closes its connections.
    """

    def __init__(self, limit_s: float) -> None:
        self.is_over = False  # in the newest block
        self.adapter = _TwinAdapter(self)
        self._lock = threading.Lock()
        self._twins: list[socket.socket] = []  # under the lock
        self._limit_s, self._is_left = limit_s, threading.Event()
        self._ends_at = float("-inf")
        weakref.finalize(self, _close_all, self._twins)

    def __enter__(self) -> Self:
        with self._lock:
            self.is_over, self._is_left = False, threading.Event()
            self._ends_at = monotonic() + self._limit_s
        wait = partial(self._wait, self._is_left)
        Workers().thread("limit of a request", wait, once=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._is_left.set()

    def left_s(self) -> float:
        """Return what is left of the block's time.

        Raises:
            TimeoutError: nothing is.
        """
        left_s = self._ends_at - monotonic()
        if left_s > 0:
            return left_s
        self.is_over = True
        raise TimeoutError

    def look_up(self, host: str) -> list[str]:
        """Return the addresses of a host; a system that goes on to look for them is left to itself.

        Raises:
            TimeoutError: they did not come in time.
            OSError: there are none.
        """
        if _is_address(host):
            return [host]
        found: queue.SimpleQueue[list[str] | OSError] = queue.SimpleQueue()
        Workers().thread("look-up of a name", lambda: found.put(_addresses(host)), once=True).start()
        try:
            answer = found.get(timeout=self.left_s())
        except queue.Empty:
            self.is_over = True
            raise TimeoutError from None
        if isinstance(answer, OSError):
            raise answer
        return answer

    def connect(self, host: str, port: int) -> socket.socket:
        """Return a watched connection to the first address of a host that takes one.

        Raises:
            OSError: none does, or there was no time left.
        """
        *others, last = self.look_up(host)
        for address in others:
            with contextlib.suppress(OSError):
                return self._open(address, port)
        return self._open(last, port)

    def _open(self, address: str, port: int) -> socket.socket:
        made = socket.create_connection((address, port), self.left_s())
        self.watch(made)
        return made

    def watch(self, connection: socket.socket) -> None:
        """Keep a second handle: encryption takes the first one over. The connection before has ended."""
        with self._lock:
            _close_all(self._twins)
            self._twins.append(connection.dup())
            if self.is_over:
                self._end()

    def forget(self) -> None:
        """Close the second handle."""
        with self._lock:
            _close_all(self._twins)

    def _wait(self, is_left: threading.Event) -> None:
        if is_left.wait(self._limit_s):
            return
        with self._lock:
            if not is_left.is_set():  # it was left while this thread woke up
                self.is_over = True
                self._end()

    def _end(self) -> None:
        """End the connection; the caller holds the lock."""
        for twin in self._twins:
            with contextlib.suppress(OSError):  # it ended by itself
                twin.shutdown(socket.SHUT_RDWR)


def _close_all(twins: list[socket.socket]) -> None:
    while twins:
        twins.pop().close()


class _TwinAdapter(HTTPAdapter):
    """Shows each new connection to a limit."""

    def __init__(self, limit: TimeLimit) -> None:
        self._limit = limit
        super().__init__()

    def close(self) -> None:
        """Close the connections, and their second handles."""
        super().close()
        self._limit.forget()

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        """Return the pool of an address; it belongs to this adapter alone."""
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        if getattr(pool.ConnectionCls, "is_watched", False):
            return pool
        limit = self._limit

        class Watched(pool.ConnectionCls):  # type: ignore[misc]
            is_watched = True
            _dns_host: str
            timeout: float | None

            def _new_conn(self) -> socket.socket:
                name, longest_s = self._dns_host, self.timeout
                *others, last = limit.look_up(name)
                try:
                    for address in others:
                        with contextlib.suppress(BaseHTTPError):
                            return self._connect_to(address, longest_s)
                    return self._connect_to(last, longest_s)
                finally:
                    self._dns_host = name  # that certificates and the head of the request are about

            def _connect_to(self, address: str, longest_s: float | None) -> socket.socket:
                left_s = limit.left_s()
                self._dns_host, self.timeout = address, min(left_s, longest_s or left_s)
                made: socket.socket = super()._new_conn()
                limit.watch(made)
                return made

        pool.ConnectionCls = Watched
        return pool


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def _addresses(host: str) -> list[str] | OSError:
    """Return what the system knows of a name, each address once, the one to try first at the front."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: a label of more than 63 characters
        return error if isinstance(error, OSError) else OSError(0, "no name of a host")
    return list(dict.fromkeys(str(place[0]) for *_, place in found))


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
