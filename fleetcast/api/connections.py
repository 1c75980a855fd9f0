"""What one connection may cost before and after its request: time for the head, its size, unread answers.

Owns: the limits that uvicorn does not have. A sender that never finishes its head, or never reads
its answer, would otherwise keep a connection (there are 2,048) and what waits in it for ever.
Bodies have their own limits in `ingest.bodies`. Does not know: routes, keys.
"""

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 65_536  # request line and headers; the longest useful ones are a few hundred bytes
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-type: text/plain; charset=utf-8\r\ncontent-length: 40\r\nconnection: close\r\n\r\n"
    b"the headers must be at most 65536 bytes\n"
)


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
        self._head_arrived()
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
        self._answer_read()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget both limits."""
        self._head_arrived()
        self._answer_read()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self.transport.abort)

    def _head_arrived(self) -> None:
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

    def _answer_read(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None
