"""One HTTP connection: what it may cost before, between and after its requests.

Owns: the limits that uvicorn does not have, and documents that are sent in pieces. Every byte that is no body
is bounded in every state of the parser; answers leave in pieces, must be read at a minimum rate, and are
bounded together; where connections are used up, the one that has waited longest makes room. Does not know:
routes, keys; bodies have their own limits in `bodies`.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from starlette.concurrency import iterate_in_threadpool
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fleetcast.serving.telemetry import CROWDED, HEAD_TIMEOUT, TOO_LARGE, UNREAD_ANSWER

MAX_HEAD_BYTES = 65_536  # request line and headers, trailers, chunk extensions, what stands between requests
MAX_FIELDS = 128  # of one head: tiny ones cost many times their bytes
MAX_PIPELINED = 16  # requests of one connection that wait for the answer before theirs
PIECE_BYTES = 65_536  # bytes parsed at once, and sent at once
_FRAMING_PER_BYTE = 8  # chunks of one byte are allowed: six bytes frame it
_FREE_ANSWER_BYTES = 16_384  # answers to posts and refusals are never refused themselves
_STREAM_BYTES = 4 * PIECE_BYTES  # what an answer in pieces holds by itself, its transport included
_RETRY_AFTER = b"5"
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-type: text/plain; charset=utf-8\r\ncontent-length: 77\r\nconnection: close\r\n\r\n"
    b"what is not the body must be at most 65536 bytes and 128 fields of a request\n"
)
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\n"
    b"content-type: text/plain; charset=utf-8\r\ncontent-length: 21\r\nconnection: close\r\n\r\n"
    b"too many connections\n"
)
_UNREAD = b'{"detail":"too many answers are being read slowly"}'


class AnswerAbandoned(OSError):
    """Raised while an answer is sent to a client that went away."""


@dataclass(eq=False)
class Crowd:
    """What all connections of one server share; touched on its event loop only."""

    max_connections: int
    max_answer_bytes: int
    on_end: Callable[[str], None] = lambda _why: None
    answer_bytes: int = 0
    idle: "dict[BoundedConnection, None]" = field(default_factory=dict)  # longest idle first


class BoundedConnection(HttpToolsProtocol):
    """A connection that is ended when its client takes too much or too long; on the event loop only.

    Between two requests uvicorn's keep-alive limit holds, from the first byte of the next one on
    ours: the keep-alive timer is stopped by any byte, a lone line feed included.
    """

    head_timeout_s: ClassVar[float] = 15.0
    stalled_answer_s: ClassVar[float] = 15.0  # how often it is looked at how much of an answer was read
    min_read_bytes_per_s: ClassVar[float] = 10_000.0
    answer_timeout_s: ClassVar[float] = 300.0  # an answer that is read keeps its sweep in memory

    def __init__(self, *args: Any, crowd: Crowd, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._routes: ASGIApp = self.app
        self.app = self._serve
        self._crowd = crowd
        self._head_timer: asyncio.TimerHandle | None = None
        self._answer_timer: asyncio.TimerHandle | None = None
        self._is_in_head = self._is_refused = self._is_lost = False
        self._n_gap = 0  # bytes since the last one of a body or the end of a request
        self._n_framing = self._n_body = self._n_fields = self._fed_body = 0  # of the request that arrives
        self._has_ended = False
        self._n_sent = self._n_read = self._charge = 0
        self._answer_began = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the first head its time; make room where too many are connected."""
        super().connection_made(transport)
        self._crowd.idle[self] = None
        self._await_head()
        if len(self.connections) > self._crowd.max_connections:
            longest = next(iter(self._crowd.idle))
            longest._end(CROWDED, _FULL if longest is self else b"")

    def data_received(self, data: bytes) -> None:
        """Take bytes; those that come while no request is at work have to become one in time."""
        if self.cycle is None or self.cycle.response_complete:
            self._await_head()
        for start in range(0, len(data), PIECE_BYTES):
            if self.transport.is_closing():
                return
            self._feed(data[start : start + PIECE_BYTES] if len(data) > PIECE_BYTES else data)

    def _feed(self, data: bytes) -> None:
        self._fed_body, self._has_ended = 0, False
        super().data_received(data)
        n_other = len(data) - self._fed_body
        self._n_framing += n_other
        self._n_gap = 0 if self._fed_body or self._has_ended else self._n_gap + n_other
        allowed = MAX_HEAD_BYTES + _FRAMING_PER_BYTE * max(self._n_body, self._fed_body)
        if self._is_refused or self._n_gap > MAX_HEAD_BYTES or self._n_framing > allowed:
            self._end(TOO_LARGE, _TOO_LARGE)

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be parsed; `_feed` answers what is refused because of its size."""
        if not self._is_refused:
            super().send_400_response(msg)

    def on_message_begin(self) -> None:
        """Begin to count a request."""
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refuse("too many requests wait for the answer before theirs")
        self._is_in_head = True
        self._n_fields = self._n_framing = self._n_body = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; a trailer is no header."""
        self._n_fields += 1
        if self._n_fields > MAX_FIELDS:
            self._refuse("too many fields")
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """End the head's time: from here on the body's limits hold."""
        self._is_in_head = False
        self._end_head()
        self._crowd.idle.pop(self, None)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Count the bytes of the body."""
        self._fed_body += len(body)
        self._n_body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that what follows belongs to another request."""
        self._has_ended = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Read on only when every request that came is answered; watch what is still to be read."""
        super().on_response_complete()
        if self.cycle is None or not self.cycle.response_complete:
            self.flow.pause_reading()
        else:
            self._crowd.idle[self] = None
        if self.transport.get_write_buffer_size():
            self._watch_answer()

    def pause_writing(self) -> None:
        """Watch an answer that is not being read."""
        super().pause_writing()
        self._watch_answer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give back what the connection held."""
        self._is_lost = True
        self._crowd.idle.pop(self, None)
        self._charge_for(0)
        self._end_head()
        if self._answer_timer is not None:
            self._answer_timer.cancel()
        self.pipeline.clear()
        super().connection_lost(exc)

    def _refuse(self, why: str) -> None:
        """Stop the parser from inside one of its callbacks."""
        self._is_refused = True
        raise ValueError(why)

    def _end(self, why: str, answer: bytes = b"") -> None:
        if self.transport.is_closing():
            return
        self._crowd.on_end(why)
        self._crowd.idle.pop(self, None)
        if answer:
            self.transport.write(answer)
            self.transport.close()
            self._watch_answer()
        else:
            self.transport.abort()

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._end, HEAD_TIMEOUT)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _watch_answer(self) -> None:
        if self._answer_timer is None and not self._is_lost:
            self._answer_began = self.loop.time()
            self._n_read = self._n_sent - self.transport.get_write_buffer_size()
            self._answer_timer = self.loop.call_later(self.stalled_answer_s, self._check_answer)

    def _check_answer(self) -> None:
        """Go on as long as bytes leave fast enough; keep-alive's `close` would wait for them for ever."""
        self._answer_timer = None
        n_waiting = self.transport.get_write_buffer_size()
        if not n_waiting:
            if self.cycle is None or self.cycle.response_complete:
                self._charge_for(0)
            return
        n_read = self._n_sent - n_waiting
        is_slow = n_read - self._n_read < self.min_read_bytes_per_s * self.stalled_answer_s
        if is_slow or self.loop.time() - self._answer_began > self.answer_timeout_s:
            self._crowd.on_end(UNREAD_ANSWER)
            self.transport.abort()
            return
        self._n_read = n_read
        self._answer_timer = self.loop.call_later(self.stalled_answer_s, self._check_answer)

    def _charge_for(self, n_bytes: int) -> None:
        self._crowd.answer_bytes += n_bytes - self._charge
        self._charge = n_bytes

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer one request, its answer in pieces."""
        answer = _Answer(self, send)
        try:
            await self._routes(scope, receive, answer.send)
        except AnswerAbandoned:
            # uvicorn notes it of the newest request alone, and logs an ERROR for those before it
            getattr(send, "__self__", self.cycle).disconnected = True
            return
        if self._charge and not self._is_lost and not self.transport.get_write_buffer_size():
            self._charge_for(0)

    def admits(self, n_bytes: int) -> bool:
        """Take an answer's bytes into account; return whether there is room for them."""
        if n_bytes <= _FREE_ANSWER_BYTES:
            return True
        others = self._crowd.answer_bytes - self._charge
        if others + n_bytes > self._crowd.max_answer_bytes:
            return False
        if not self._is_lost:
            self._charge_for(n_bytes)
        return True

    async def pass_on(self, send: Send, message: Message, n_bytes: int) -> None:
        """Send one message, counting its bytes.

        Raises:
            AnswerAbandoned: the client went away.
        """
        if self._is_lost:
            raise AnswerAbandoned("the client went away")
        await send(message)
        self._n_sent += n_bytes


class _Answer:
    """One answer on its way: its start waits for its first bytes, so that it can still be refused."""

    def __init__(self, connection: BoundedConnection, send: Send) -> None:
        self._connection = connection
        self._send = send
        self._start: Message | None = None
        self._is_refused = False

    async def send(self, message: Message) -> None:
        """Pass one message of the application on; what follows a refusal is dropped."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        if self._is_refused:
            return
        body: bytes = message.get("body", b"")
        has_more: bool = message.get("more_body", False)
        if self._start is not None:
            if not self._connection.admits(_STREAM_BYTES if has_more else len(body)):
                self._is_refused = True
                await self._refuse()
                return
            n_head = sum(len(name) + len(value) + 4 for name, value in self._start.get("headers", ()))
            await self._connection.pass_on(self._send, self._start, n_head)
            self._start = None
        for start in range(0, len(body), PIECE_BYTES):
            piece = body[start : start + PIECE_BYTES] if len(body) > PIECE_BYTES else body
            is_last = start + PIECE_BYTES >= len(body)
            part = {"type": message["type"], "body": piece, "more_body": has_more or not is_last}
            await self._connection.pass_on(self._send, part, len(piece))
        if not body:
            await self._connection.pass_on(self._send, message, 0)

    async def _refuse(self) -> None:
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(_UNREAD)).encode()),
            (b"retry-after", _RETRY_AFTER),
        ]
        start = {"type": "http.response.start", "status": 503, "headers": headers}
        await self._connection.pass_on(self._send, start, 0)
        await self._connection.pass_on(self._send, {"type": "http.response.body", "body": _UNREAD}, 0)


class Pieces(Response):
    """A document that is joined piece by piece while it is sent, never as a whole.

    Pieces that are made while they are read are made in another thread, and their length is not told before.
    """

    def __init__(self, pieces: Iterable[bytes], media_type: str = "application/json") -> None:
        super().__init__(media_type=media_type)
        if isinstance(pieces, Sequence):
            self.headers["content-length"] = str(sum(map(len, pieces)))
        else:
            del self.headers["content-length"]
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; how fast is for the connection to say."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if isinstance(self._pieces, Sequence):
            for block in blocks(self._pieces, PIECE_BYTES):
                await send({"type": "http.response.body", "body": block, "more_body": True})
        else:
            async for block in iterate_in_threadpool(blocks(self._pieces, PIECE_BYTES)):
                await send({"type": "http.response.body", "body": block, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def blocks(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Yield pieces joined to blocks of about `size` bytes.

    >>> list(blocks([b"ab", b"c", b"defg"], 3))
    [b'abc', b'defg']
    """
    block: list[bytes] = []
    n_bytes = 0
    for piece in pieces:
        block.append(piece)
        n_bytes += len(piece)
        if n_bytes >= size:
            yield b"".join(block)
            block, n_bytes = [], 0
    if block:
        yield b"".join(block)
