"""The HTTP server's thread.

Owns: uvicorn, the listening socket, and how many connections there may be: with a reserve of file
descriptors, or a flood of connections would take the log and the buffer their files. What one
connection may cost is in `connection`. Does not know: routes, keys.
"""

import asyncio
import logging
import resource
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn

from fleetcast.api.connection import BoundedConnection, Crowd
from fleetcast.clock import monotonic, sleep
from fleetcast.errors import CannotStart
from fleetcast.settings import ServerSettings

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_ACCEPTS_AT_ONCE = 64  # connections taken before any of them is counted
_KEEP_ALIVE_S = 75  # agents send every 5 s: they should not connect anew each time
_MAX_CONNECTIONS = 2048
_WANTED_DESCRIPTORS = 8192
_RESERVED_DESCRIPTORS = 256  # for the log, the buffer's files, and connections taken before they are counted
_START_TIMEOUT_S = 30.0
_SEND_BUFFER_BYTES = 262_144  # of each connection: the kernel's memory counts against the unit's limit


class HttpListener:
    """One uvicorn server in a thread of its own; the main thread keeps the signals."""

    def __init__(self, host: str, port: int) -> None:
        """Bind the address, so that a taken port is known at once.

        Raises:
            CannotStart: the address cannot be bound.
        """
        self._socket = _bind(host, port)
        bound_host, bound_port = self._socket.getsockname()[:2]
        shown = f"[{bound_host}]" if ":" in bound_host else bound_host
        self.url = f"http://{shown}:{bound_port}"
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_alive(self) -> bool:
        """Whether requests are being served."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self,
        app: Any,
        drain_s: float,
        *,
        max_answer_bytes: int = ServerSettings.max_answer_bytes,
        on_end: Callable[[str], None] = lambda _why: None,
    ) -> None:
        """Serve `app`; returns once it does.

        Args:
            drain_s: how long requests at work may take once the stop was asked for.
            max_answer_bytes: what answers that are being read may hold together.
            on_end: told why a connection was ended by us, on the server's thread.
        """
        crowd = Crowd(_connections_allowed(), max_answer_bytes, on_end)
        config = uvicorn.Config(
            app,
            http=partial(BoundedConnection, crowd=crowd),  # type: ignore[arg-type]  # on httptools: its parser is C, a third of what a post costs the loop
            log_config=None,  # logging is configured once, in main
            log_level=logging.ERROR,  # a warning per bad request would let a sender flush the log
            access_log=False,
            lifespan="on",
            server_header=False,
            proxy_headers=False,
            ws="none",
            timeout_keep_alive=_KEEP_ALIVE_S,
            limit_concurrency=crowd.max_connections + _ACCEPTS_AT_ONCE,
            backlog=_ACCEPTS_AT_ONCE,
            timeout_graceful_shutdown=int(drain_s),
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)
        self._thread.start()
        deadline = monotonic() + _START_TIMEOUT_S
        while not self._server.started:
            if not self.is_alive or monotonic() > deadline:
                raise CannotStart("the HTTP server did not start; see the log")
            sleep(0.005)
        self._socket.listen(_BACKLOG)  # asyncio lowered it to what it takes at once

    def stop(self, timeout_s: float) -> bool:
        """Close the port, let requests at work finish, and return whether all did in time."""
        if self._server is None or self._thread is None:
            self._socket.close()
            return True
        self._server.should_exit = True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        assert self._server is not None
        asyncio.run(self._server.serve(sockets=[self._socket]))


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise CannotStart(f"cannot listen on {host}: {error}", hint="server.host") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise CannotStart(
            f"cannot listen on {host} port {port}: {error.strerror}",
            hint="another program has the port? choose one with --port",
        ) from error
    return bound


def _connections_allowed() -> int:
    """Raise the soft limit of file descriptors; return how many connections leave the reserve free."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _WANTED_DESCRIPTORS:
        wanted = _WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_WANTED_DESCRIPTORS, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    allowed = min(_MAX_CONNECTIONS, max(soft - _RESERVED_DESCRIPTORS, soft // 4))
    if allowed < _MAX_CONNECTIONS:
        logger.warning("few file descriptors limit=%d connections=%d (LimitNOFILE=8192)", soft, allowed)
    return allowed
