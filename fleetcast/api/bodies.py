"""Request bodies: read within bounds of size, time and memory, and decoded.

Owns: what a body may cost, in bytes and in values, and its shape (owner of the JSON decoder of the hot
route). Does not know: what a record must look like inside.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request

from fleetcast.errors import quote
from fleetcast.ingest.arrow import ROWS_MAX

BODY_TIMEOUT_S = 30.0  # for the whole body, so that slow senders cannot pile up
_BODIES_IN_MEMORY = 8  # times the largest body: what all requests together may hold
_DISCARDED_BODIES = 4  # so much of a refused body is read and dropped, for the sender to get its answer
_DOUBLE_DIGITS = 310
LIGHT_BYTES = (
    2**18
)  # bodies up to here have memory and lanes of their own: large ones cannot take their place
_LIGHT_SHARE = 8  # one body in so many of what all hold
RECORDS_MAX = ROWS_MAX  # of one request, in JSON as in Arrow
ITEMS_MAX = 2**21  # values of one request: what it costs, in time and memory, goes by them and not by bytes
_UNPACKED_PER_BYTE_MAX = 24  # snappy's densest copy makes 64 bytes out of 3
_SHAPE = 'the body must be {"records": [...]}'


class Refusal(Exception):
    """Raised when a request is refused as a whole; carries the status code."""

    def __init__(self, code: int, detail: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.retry_after_s = retry_after_s


class BodyReader:
    """Reads bodies on one event loop, counting the bytes that all of them hold."""

    def __init__(self, max_body_bytes: int) -> None:
        self._max_bytes = max_body_bytes
        self._held_bytes = 0

    @asynccontextmanager
    async def read(self, request: Request, encoding: str = "identity") -> AsyncIterator[bytes]:
        """Give the body of a request; its bytes are accounted for until the block ends.

        Args:
            encoding: the Content-Encoding it must have; it is not undone here.
        Raises:
            Refusal: 408, 413, 415, 503, or 400 for a sender that went away.
        """
        found = request.headers.get("content-encoding", "identity").lower()
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                refusal = await self._collect(request, body)
            if refusal:
                raise refusal
            if found != encoding:
                wanted = "uncompressed" if encoding == "identity" else f"with Content-Encoding {encoding}"
                raise Refusal(415, f"send the body {wanted}, not with Content-Encoding {quote(found)}")
            whole = bytes(body)
            n_held = len(body)
            body.clear()  # only the copy is needed from here on
            try:
                yield whole
            finally:
                self._held_bytes -= n_held
        except TimeoutError as error:
            raise Refusal(408, f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from error
        except ClientDisconnect as error:
            raise Refusal(400, "the sender went away") from error
        finally:
            self._held_bytes -= len(body)

    async def _collect(self, request: Request, body: bytearray) -> Refusal | None:
        """Fill `body`; a body refused is read on for a while, or the sender never sees the answer."""
        refusal = None
        n_seen = 0
        if _declared_length(request) > self._max_bytes * _DISCARDED_BODIES:
            return self._too_large()
        async for chunk in request.stream():
            n_seen += len(chunk)
            if n_seen > self._max_bytes * _DISCARDED_BODIES:
                return refusal
            if refusal is None and n_seen > self._max_bytes:
                refusal = self._too_large()
            elif refusal is None and self._held_bytes + len(chunk) > self._room(len(body) + len(chunk)):
                refusal = Refusal(503, "too many large requests at once", retry_after_s=1)
            if refusal is None:
                body += chunk
                self._held_bytes += len(chunk)
            else:
                self._held_bytes -= len(body)
                body.clear()
        return refusal

    def _room(self, body_bytes: int) -> int:
        """Return what all bodies may hold for one of this size; the last part is for small ones."""
        all_bytes = self._max_bytes * _BODIES_IN_MEMORY
        return all_bytes if body_bytes <= LIGHT_BYTES else all_bytes - all_bytes // _LIGHT_SHARE

    def _too_large(self) -> Refusal:
        limit = f"{self._max_bytes} bytes (server.max_body_bytes)"
        return Refusal(413, f"the body must be at most {limit}; send fewer records at once")


def read_records(body: bytes) -> list[Any]:
    """Return the list of raw records in a body.

    Raises:
        Refusal: 422, the body is not of the documented shape.

    >>> read_records(b'{"records": [{"cpu_pct": NaN}]}')
    [{'cpu_pct': nan}]
    """
    check_items(body)
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        value = _decode_leniently(body, error)
    records = value.get("records") if isinstance(value, dict) else None
    if not isinstance(records, list):
        found = f'"records" is {_kind(records)}' if isinstance(value, dict) else f"it is {_kind(value)}"
        raise Refusal(422, f"{_SHAPE}; {found}")
    if len(records) > RECORDS_MAX:
        raise _too_many(f"{len(records)} records", RECORDS_MAX)
    return records


def check_items(body: bytes) -> None:
    """Refuse JSON of too many values or lists and objects, before any of them is made.

    Counts what begins or parts them, those in texts too: a text of many commas is no record of ours.

    Raises:
        Refusal: 413.
    """
    n_containers = body.count(b"{") + body.count(b"[")
    if n_containers > RECORDS_MAX + 2:
        raise _too_many(f"about {n_containers} objects and lists", RECORDS_MAX)
    n_items = n_containers + body.count(b",")
    if n_items > ITEMS_MAX:
        raise _too_many(f"about {n_items} values", ITEMS_MAX)


def check_unpacked(body: bytes, max_bytes: int) -> None:
    """Refuse a snappy block by what it says to unpack to, before any lock is taken.

    Raises:
        Refusal: 413 where that is too much, 400 where so much cannot be in it.
    """
    size = 0
    for place, byte in enumerate(body[:5]):
        size |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            break
    if size > max_bytes:
        raise Refusal(413, f"the body unpacks to {size} bytes, at most {max_bytes} are taken")
    if size > len(body) * _UNPACKED_PER_BYTE_MAX:
        raise Refusal(400, "the body is not a snappy block: it states an impossible size")


def _too_many(what: str, limit: int) -> Refusal:
    return Refusal(413, f"the body holds {what}, at most {limit} are taken; send fewer records at once")


def encode(answer: Mapping[str, Any]) -> bytes:
    """Return the JSON of an answer; what is no number in JSON (NaN) becomes null."""
    return msgspec.json.encode(answer)


def _decode_leniently(body: bytes, error: Exception) -> Any:
    """Decode what senders write beyond JSON (NaN, 1e999, half a surrogate), to lose only their records."""
    try:
        return json.loads(body.decode(), parse_int=_integer)
    except (ValueError, RecursionError):
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refusal(422, f"{_SHAPE}; it is not JSON: {reason}") from error


def _integer(digits: str) -> float:
    """Return an integer, infinity in place of one that no double holds (and `int` may refuse)."""
    return int(digits) if len(digits) <= _DOUBLE_DIGITS else float("inf")


def _kind(value: object) -> str:
    names = {type(None): "absent", dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "a number")


def _declared_length(request: Request) -> int:
    text = request.headers.get("content-length", "0")
    return int(text) if text.isdigit() else 0
