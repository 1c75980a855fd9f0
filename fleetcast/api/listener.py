"""The HTTP server's thread; a server that ends unasked begins again on the same address.

Owns: uvicorn, the listening socket, and how many connections there may be: with a reserve of file
descriptors, or a flood of connections would take the log and the buffer their files. What one
connection may cost is in `connection`. Does not know: routes, keys.
"""

import asyncio
import logging
import resource
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn

from fleetcast.api.connection import BoundedConnection, Crowd
from fleetcast.clock import monotonic, sleep
from fleetcast.errors import CannotStart
from fleetcast.settings import ServerSettings
from fleetcast.workers import Workers, WorkerThread

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_ACCEPTS_AT_ONCE = 64  # connections taken before any of them is counted
_KEEP_ALIVE_S = 75  # agents send every 5 s: they should not connect anew each time
_MAX_CONNECTIONS = 2048
_WANTED_DESCRIPTORS = 8192
_RESERVED_DESCRIPTORS = 256  # for the log, the buffer's files, and connections taken before they are counted
_START_TIMEOUT_S = 30.0
WORKER = "http"
_SEND_BUFFER_BYTES = 262_144  # of each connection: the kernel's memory counts against the unit's limit


class HttpListener:
    """One uvicorn server in a thread of its own; the main thread keeps the signals."""

    def __init__(self, host: str, port: int) -> None:
        """Bind the address, so that a taken port is known at once.

        Raises:
            CannotStart: the address cannot be bound.
        """
        self._socket = _bind(host, port)
        self._host, self._port = host, int(self._socket.getsockname()[1])
        bound_host = self._socket.getsockname()[0]
        shown = f"[{bound_host}]" if ":" in bound_host else bound_host
        self.url = f"http://{shown}:{self._port}"
        self._config: Callable[[], uvicorn.Config] | None = None
        self._server: _Server | None = None
        self._thread: WorkerThread | None = None
        self._is_ending = False

    @property
    def is_alive(self) -> bool:
        """Whether requests are being served, or will be after a pause."""
        return self._thread is not None and self._thread.is_alive

    def start(
        self,
        app: Any,
        drain_s: float,
        *,
        max_answer_bytes: int = ServerSettings.max_answer_bytes,
        on_end: Callable[[str], None] = lambda _why: None,
        workers: Workers | None = None,
    ) -> None:
        """Serve `app`; returns once it does.

        Args:
            drain_s: how long requests at work may take once the stop was asked for.
            max_answer_bytes: what answers that are being read may hold together.
            on_end: told why a connection was ended by us, on the server's thread.
            workers: told when the server ends unasked.
        """
        n_connections = _connections_allowed()

        def make_config() -> uvicorn.Config:  # of its own: a server that died left its crowd uncounted
            return _config(app, Crowd(n_connections, max_answer_bytes, on_end), drain_s)

        self._config = make_config
        self._thread = (workers or Workers()).thread(WORKER, self._serve)
        self._thread.start()
        deadline = monotonic() + _START_TIMEOUT_S
        while self._server is None or not self._server.started:
            if not self.is_alive or self._thread.worker.n_failures or monotonic() > deadline:
                raise CannotStart("the HTTP server did not start; see the log")
            sleep(0.005)

    def stop(self, timeout_s: float) -> bool:
        """Close the port, let requests at work finish, and return whether all did in time."""
        self._is_ending = True
        if self._thread is None:
            self._socket.close()
            return True
        self._thread.stop()
        if self._server is not None:
            self._server.should_exit = True
        return self._thread.join(timeout_s)

    def _serve(self) -> None:
        """Serve until the stop; on the address again after a server that ended unasked."""
        if self._is_ending or self._config is None:
            return
        if self._server is not None:
            self._socket.close()
            self._socket = _bind(self._host, self._port)
        self._server = server = _Server(self._config())
        asyncio.run(server.serve(sockets=[self._socket]))
        if not self._is_ending:
            raise CannotStart("the HTTP server ended by itself")


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Let the kernel queue more than asyncio takes at once."""
        await super().startup(sockets)
        for one in sockets or ():
            one.listen(_BACKLOG)


def _config(app: Any, crowd: Crowd, drain_s: float) -> uvicorn.Config:
    return uvicorn.Config(
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
