"""The HTTP server's thread: bound before anything else, stopped in good order.

Owns: uvicorn, the listening socket. Does not know: which routes there are.
"""

import asyncio
import logging
import socket
import threading
from typing import Any

import uvicorn

from fleetcast.api.connections import BoundedConnection
from fleetcast.clock import monotonic, sleep
from fleetcast.errors import CannotStart

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_S = 75  # agents send every 5 s and shall not connect anew each time
_MAX_CONNECTIONS = 2048
_START_TIMEOUT_S = 30.0


class HttpListener:
    """One uvicorn server in a thread of its own; the main thread keeps the signals."""

    def __init__(self, host: str, port: int) -> None:
        """Bind the address, so that a taken port is known at once.

        Raises:
            CannotStart: the address cannot be bound.
        """
        self._socket = _bound(host, port)
        bound_host, bound_port = self._socket.getsockname()[:2]
        shown = f"[{bound_host}]" if ":" in bound_host else bound_host
        self.url = f"http://{shown}:{bound_port}"
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_alive(self) -> bool:
        """Whether requests are being served."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, app: Any, drain_s: float) -> None:
        """Serve `app`; returns once it does.

        Args:
            drain_s: how long requests at work may take once the stop was asked for.
        """
        config = uvicorn.Config(
            app,
            http=BoundedConnection,  # on httptools: its parser is C, a third of what a post costs the loop
            log_config=None,  # logging is configured once, in main
            log_level=logging.ERROR,  # a warning per bad request would let a sender flush the log
            access_log=False,
            lifespan="on",
            server_header=False,
            proxy_headers=False,
            ws="none",
            timeout_keep_alive=_KEEP_ALIVE_S,
            limit_concurrency=_MAX_CONNECTIONS,
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


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise CannotStart(f"cannot listen on {host}: {error}", hint="server.host") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise CannotStart(
            f"cannot listen on {host} port {port}: {error.strerror}",
            hint="another program has the port? choose one with --port",
        ) from error
    return bound
