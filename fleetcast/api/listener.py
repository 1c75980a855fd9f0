"""The HTTP server's thread, and what one connection may cost before and after its request.

Owns: uvicorn, the listening socket, and the limits that uvicorn does not have: time and size of a
head, and unread answers. A sender that never finishes its head, or never reads its answer, would
otherwise keep a connection (there are 2,048) and what waits in it for ever. Bodies have their own
limits in `bodies`. Does not know: routes, keys.
"""

import asyncio
import logging
import socket
import threading
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fleetcast.clock import monotonic, sleep
from fleetcast.errors import CannotStart

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 65_536  # request line and headers; the longest useful ones are a few hundred bytes
_BACKLOG = 2048
_KEEP_ALIVE_S = 75  # agents send every 5 s: they should not connect anew each time
_MAX_CONNECTIONS = 2048
_START_TIMEOUT_S = 30.0
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-type: text/plain; charset=utf-8\r\ncontent-length: 40\r\nconnection: close\r\n\r\n"
    b"the headers must be at most 65536 bytes\n"
)


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
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise CannotStart(
            f"cannot listen on {host} port {port}: {error.strerror}",
            hint="another program has the port? choose one with --port",
        ) from error
    return bound


class BoundedConnection(HttpToolsProtocol):
    """A connection that is closed when its sender takes too long; on the event loop only.

    Between two requests uvicorn's keep-alive limit holds, from the first byte of the next one on
    ours: the keep-alive timer is stopped by any byte, a lone line feed included.
    """

    head_timeout_s: ClassVar[float] = 15.0
    stalled_answer_s: ClassVar[float] = 30.0  # in this time at least something of the answer must be read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the first head its time."""
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = None
        self._answer_timer: asyncio.TimerHandle | None = None
        self._is_in_head = self._is_in_body = False
        self._n_head_bytes = 0
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes; those that come while no request is at work have to become one in time."""
        began_in_body = self._is_in_body
        if self.cycle is None or self.cycle.response_complete:
            self._await_head()
        super().data_received(data)
        if self._is_in_head and not began_in_body:  # else most of these bytes were a body's
            self._n_head_bytes += len(data)
            if self._n_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.transport.write(_TOO_LARGE)
                self.transport.close()

    def on_message_begin(self) -> None:
        """Begin to count a head."""
        self._is_in_head = True
        self._n_head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """End the head's time: from here on the body's limits hold."""
        self._is_in_head, self._is_in_body = False, True
        self._end_head()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Note that what follows is no body."""
        self._is_in_body = False
        super().on_message_complete()

    def pause_writing(self) -> None:
        """Watch an answer that is not being read."""
        super().pause_writing()
        self._watch_answer(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Stop watching: it was read."""
        super().resume_writing()
        self._end_answer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget both limits."""
        self._end_head()
        self._end_answer()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self.transport.abort)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _watch_answer(self, n_waiting: int) -> None:
        self._answer_timer = self.loop.call_later(self.stalled_answer_s, self._check_answer, n_waiting)

    def _check_answer(self, n_before: int) -> None:
        """Go on as long as bytes leave; keep-alive's `close` would wait for them for ever."""
        n_waiting = self.transport.get_write_buffer_size()
        if n_waiting >= n_before:
            self.transport.abort()
        else:
            self._watch_answer(n_waiting)

    def _end_answer(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None
