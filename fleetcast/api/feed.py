"""The front of the HTTP interface: it takes records in from the first moment, and guards every path.

Owns: content types, the form of an error for each kind of sender, how much work may wait, and the
guards. Reads raw bodies itself (`bodies`) and hands them to threads (`lanes`; remote-write to a pool of
its own), so that the event loop only ever waits. Does not know: what records are; what a full or broken
disk answers (`lanes.storage_refusal`); the other routes (`server`).

`FeedDoor` answers these POSTs before any routing: a web framework's routing, dependencies and exit
stacks cost a post of 20 records as much as all the rest of the event loop's work. The routes are
still declared to the framework, for the interface description. To import the framework takes longer
than all else that a post needs: `Front` answers posts meanwhile, and lets other requests wait for it.

Without a key the daemon listens on loopback, but a browser on the same host is on loopback, too.
A page may point a name of its own at 127.0.0.1 (DNS rebinding) and read the answers, or post
across origins without reading. The first shows in `Host`, the second in `Origin`: `BrowserGuard`
refuses both. With a key it is not needed, since a page does not know the key.
"""

import asyncio
import hmac
import ipaddress
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fleetcast.api.bodies import LIGHT_BYTES, BodyReader, Refusal, check_unpacked, encode
from fleetcast.api.lanes import Lanes, PostGroups, storage_refusal
from fleetcast.clock import monotonic
from fleetcast.errors import BadData, StorageBroken, StorageFull, quote
from fleetcast.prometheus.protobuf import BodyTooLarge
from fleetcast.serving.intake import Intake, Receipt
from fleetcast.serving.telemetry import Telemetry
from fleetcast.serving.writes import WriteIntake, WriteReceipt
from fleetcast.settings import ServerSettings

FEED_PATH = "/feed/data"
JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"
PROTOBUF = "application/x-protobuf"
KEY_HEADER = "x-api-key"
WRONG_KEY = "X-API-Key is missing or wrong"
_WORKERS = 32  # threads that wait for the disk together: one fdatasync then serves all of them
_HEAVY_PENDING = 16  # large bodies at work: they must not use up the places of the small ones
_HOLD_STEP_S = 0.002
_ROUTES_STEP_S = 0.01  # between looks whether the other routes are there
_FOREIGN_HOST = 421
_HAS_SYMBOLS = {"": False, "prometheus.WriteRequest": False, "io.prometheus.write.v2.Request": True}
_WRITTEN = "X-Prometheus-Remote-Write-{}-Written"


class Feed:
    """Answers POSTs of records; everything but the work itself runs on one event loop."""

    def __init__(
        self,
        intake: Intake,
        writes: WriteIntake | None,
        is_held: Callable[[], bool],
        telemetry: Telemetry,
        settings: ServerSettings,
    ) -> None:
        self._writes = writes
        self._is_held = is_held
        self._telemetry = telemetry
        self._settings = settings
        self._work = PostGroups(intake, self._count).work
        self._bodies = BodyReader(settings.max_body_bytes)
        self._n_pending = self._n_heavy = 0  # touched by the event loop only
        self._is_open = False
        self.open()

    def open(self) -> None:
        """Begin to work, also again after a server that ended unasked has closed it."""
        if self._is_open:
            return
        self._is_open = True
        self._lanes = Lanes(self._work, self._telemetry.workers)
        n_workers = min(_WORKERS, self._settings.max_pending_posts)
        self._workers = ThreadPoolExecutor(n_workers, thread_name_prefix="ingest")

    def close(self) -> None:
        """Wait for the requests at work; called once no new one can arrive."""
        self._is_open = False
        self._lanes.close()
        self._workers.shutdown(wait=True)

    async def answer(self, request: Request) -> Response:
        """Answer one POST of records and count it."""
        started = monotonic()
        is_arrow = _content_type(request) == ARROW
        try:
            async with self._bodies.read(request) as body, self._turn(len(body)):
                answer = await self._lanes.take(body, is_arrow=is_arrow)
            response = Response(answer, media_type=JSON)
        except Refusal as refusal:
            detail = encode({"detail": str(refusal)})
            response = Response(detail, refusal.code, _retry_after(refusal), media_type=JSON)
        self._telemetry.count_feed(response.status_code, monotonic() - started)
        return response

    async def answer_write(self, request: Request) -> Response:
        """Answer one remote-write request and count it.

        Senders drop what is answered with a 4xx, 429 included, and repeat what is answered with
        a 5xx: whatever can pass is a 503 here.
        """
        started = monotonic()
        try:
            has_symbols = _has_symbols(request)
            async with self._bodies.read(request, encoding="snappy") as body, self._turn(len(body)):
                if self._writes is not None:
                    check_unpacked(body, self._writes.max_unpacked_bytes)
                loop = asyncio.get_running_loop()
                receipt = await loop.run_in_executor(self._workers, self._take_write, body, has_symbols)
            written = _written(receipt) if has_symbols else None
            problems = "; ".join(receipt.problems)
            response = (
                PlainTextResponse(problems + "\n", 400, written) if problems else Response(None, 204, written)
            )
        except Refusal as refusal:
            code = 503 if refusal.code in (408, 429) else refusal.code
            response = PlainTextResponse(f"{refusal}\n", code, _retry_after(refusal))
        self._telemetry.count_write(response.status_code, monotonic() - started)
        return response

    @asynccontextmanager
    async def _turn(self, n_bytes: int) -> AsyncIterator[None]:
        """Let the block run once it may; it is counted as work until it ends."""
        is_heavy = n_bytes > LIGHT_BYTES
        if self._n_pending >= self._settings.max_pending_posts:
            limit = f"{self._settings.max_pending_posts} (server.max_pending_posts)"
            raise Refusal(503, f"too many requests at work, at most {limit}", retry_after_s=1)
        if is_heavy and self._n_heavy >= _HEAVY_PENDING:
            raise Refusal(503, f"too many large requests at work, at most {_HEAVY_PENDING}", retry_after_s=1)
        self._n_pending += 1
        self._n_heavy += is_heavy
        try:
            await self._wait_for_the_sweep()
            yield
        finally:
            self._n_pending -= 1
            self._n_heavy -= is_heavy

    async def _wait_for_the_sweep(self) -> None:
        deadline = monotonic() + self._settings.hold_s
        while self._is_held():
            if monotonic() >= deadline:
                raise Refusal(429, "a sweep or a training goes first (data clock)", retry_after_s=1)
            await asyncio.sleep(_HOLD_STEP_S)

    def _count(self, receipt: Receipt) -> None:
        n_refused = sum(one.n_records for one in receipt.refused_fields)
        self._telemetry.count_records(
            receipt.n_received, receipt.by_rule, receipt.n_ignored_fields, n_refused
        )

    def _take_write(self, body: bytes, has_symbols: bool) -> WriteReceipt:
        """Decode, derive records and store them."""
        if self._writes is None:
            raise Refusal(404, "remote-write is not taken here")
        try:
            receipt = self._writes.take(body, has_symbols=has_symbols)
        except (StorageFull, StorageBroken) as error:
            raise storage_refusal(error) from error
        except BodyTooLarge as error:
            raise Refusal(413, str(error)) from error
        except BadData as error:
            raise Refusal(400, str(error)) from error
        self._telemetry.count_samples(receipt.samples)
        self._telemetry.count_records(receipt.n_records, receipt.faults, 0, receipt.n_fields_refused)
        return receipt


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _has_symbols(request: Request) -> bool:
    """Return whether a remote-write request is of version 2.0; raises Refusal for what is of neither."""
    parameters = request.headers.get("content-type", "").partition(";")[2]
    fields = (part.strip().partition("=") for part in parameters.split(";"))
    proto = next((value.strip('"') for name, _, value in fields if name.lower() == "proto"), "")
    if _content_type(request) != PROTOBUF or proto not in _HAS_SYMBOLS:
        protos = " or ".join(name for name in _HAS_SYMBOLS if name)
        raise Refusal(415, f"remote-write 1.0 and 2.0 are taken: Content-Type {PROTOBUF}; proto={protos}")
    return _HAS_SYMBOLS[proto]


def _written(receipt: WriteReceipt) -> dict[str, str]:
    """Return the headers by which a sender of version 2.0 knows what was taken."""
    counts = {"Samples": receipt.n_accepted, "Histograms": 0, "Exemplars": 0}
    return {_WRITTEN.format(kind): str(n) for kind, n in counts.items()}


def _retry_after(refusal: Refusal) -> dict[str, str] | None:
    return {"Retry-After": str(refusal.retry_after_s)} if refusal.retry_after_s else None


class Front:
    """The ASGI application: it answers posts of records, and hands other requests to what `open` gives it.

    A request for another route that comes before `open` waits for it. `open` may be called from any thread.
    """

    def __init__(
        self,
        feed: Feed,
        door: "Door",
        telemetry: Telemetry,
        settings: ServerSettings,
        *,
        write_path: str | None = None,
        is_guarded: bool,
    ) -> None:
        """Put the parts together.

        Args:
            write_path: where Prometheus remote-write is taken; None leaves that route out.
            is_guarded: whether browsers of foreign pages are refused; a key does so otherwise.
        """
        self._feed = feed
        self._routes: ASGIApp | None = None
        answers = {FEED_PATH: feed.answer} | ({write_path: feed.answer_write} if write_path else {})
        app: ASGIApp = FeedDoor(self._ask_routes, answers, door.is_welcome, door.note)
        if is_guarded:  # a request passes it before the door
            app = BrowserGuard(app, settings.allowed_hosts, telemetry.count_refusal)
        self._app = HeadDoor(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event of ASGI."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await self._app(scope, receive, send)

    def open(self, routes: ASGIApp) -> None:
        """Hand requests that are no posts of records to `routes`."""
        self._routes = routes

    async def _ask_routes(self, scope: Scope, receive: Receive, send: Send) -> None:
        while self._routes is None:
            await asyncio.sleep(_ROUTES_STEP_S)
        await self._routes(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        """Open the feed when the server begins, and let it finish when the server ends."""
        await receive()
        self._feed.open()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._feed.close()
        await send({"type": "lifespan.shutdown.complete"})


def create_front(
    intake: Intake,
    is_held: Callable[[], bool],
    telemetry: Telemetry,
    settings: ServerSettings,
    api_key: str = "",
    writes: WriteIntake | None = None,
) -> Front:
    """Build what answers posts of records.

    Args:
        is_held: whether a sweep or a training goes first.
        api_key: empty means that no key is asked for.
        writes: takes Prometheus remote-write; None leaves that route out.
    """
    feed, door = Feed(intake, writes, is_held, telemetry, settings), Door(api_key, telemetry)
    path = writes.path if writes is not None else None
    return Front(feed, door, telemetry, settings, write_path=path, is_guarded=not api_key)


class FeedDoor:
    """ASGI middleware: answers POSTs to its own paths, hands every other request on."""

    def __init__(
        self,
        app: ASGIApp,
        answers: Mapping[str, Callable[[Request], Awaitable[Response]]],
        is_welcome: Callable[[str | None], bool],
        on_refusal: Callable[[Scope], None],
    ) -> None:
        """Take the answering function of each path, and the test of a request's key (None = it has none).

        Args:
            on_refusal: told of each request with a wrong key.
        """
        self._app = app
        self._answers = answers
        self._is_welcome = is_welcome
        self._on_refusal = on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event of ASGI."""
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        answer = self._answers.get(scope["path"]) if is_post else None
        if answer is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        if self._is_welcome(request.headers.get(KEY_HEADER)):
            response = await answer(request)
        else:
            self._on_refusal(scope)
            response = Response(encode({"detail": WRONG_KEY}), 401, media_type="application/json")
        await response(scope, receive, send)


class Door:
    """Lets requests with the right key in, and counts the others."""

    def __init__(self, api_key: str, telemetry: Telemetry) -> None:
        self._wanted = api_key.encode()
        self._telemetry = telemetry

    def is_welcome(self, given: str | None) -> bool:
        """Return whether a key opens the guarded routes, compared in constant time."""
        found = (given or "").encode("latin-1", "replace")
        return not self._wanted or hmac.compare_digest(found, self._wanted)

    def note(self, scope: Scope) -> None:
        """Count a request that has no right key."""
        self._telemetry.count_refusal("key", _peer(scope))


class HeadDoor:
    """Middleware that answers HEAD as GET without the body, on every path: `wget --spider` asks so."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, send_head)


class BrowserGuard:
    """Middleware that answers 421 for a foreign `Host` and 403 for a foreign `Origin`."""

    def __init__(
        self,
        app: ASGIApp,
        allowed_hosts: Iterable[str],
        on_refusal: Callable[[str, str], None] = lambda _reason, _peer: None,
    ) -> None:
        self._app = app
        self._on_refusal = on_refusal
        self._allowed = {name.lower() for name in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            status, why = self.refusal(dict(scope["headers"]))
            if status:
                self._on_refusal("host" if status == _FOREIGN_HOST else "origin", _peer(scope))
                refusal = Response(json.dumps({"detail": why}), status, media_type=JSON)
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def refusal(self, headers: dict[bytes, bytes]) -> tuple[int, str]:
        """Return the status and the reason, (0, "") for a request that may pass.

        >>> guard = BrowserGuard(lambda *_: None, ["forecasts.example"])
        >>> guard.refusal({b"host": b"127.0.0.1:8000"})
        (0, '')
        >>> guard.refusal({b"host": b"evil.example"})[0]
        421
        """
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._is_ours(host):
            return (
                _FOREIGN_HOST,
                f"this daemon is not known as {quote(host)}: set server.allowed_hosts or a TFT_API_KEY",
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.partition("://")[2].lower() != host.lower():
            return 403, f"a page of {quote(origin)} may not ask without a TFT_API_KEY"
        return 0, ""

    def _is_ours(self, host: str) -> bool:
        name = _without_port(host).lower()
        if name in self._allowed or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)  # no other can point an address here, as they can a name
        except ValueError:
            return False
        return True


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "unknown"
