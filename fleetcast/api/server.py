"""The HTTP interface of the inference daemon (owner of FastAPI).

Owns: routes, status codes, authentication, and how much work may wait. It is given what it
serves as narrow protocols. Does not know: models, buffers, bins.

The routes that take records in are in `feed`.
"""

import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Response
from fastapi.security import APIKeyHeader

from fleetcast import __version__
from fleetcast.api import apidocs
from fleetcast.api.apidocs import answers
from fleetcast.api.bodies import encoded
from fleetcast.api.browserguard import BrowserGuard
from fleetcast.api.door import WRONG_KEY, FeedDoor
from fleetcast.api.feed import ARROW, JSON, PROTOBUF, Feed, Writes
from fleetcast.api.post_group import Intake
from fleetcast.serving.board import UnknownServer
from fleetcast.serving.telemetry import Telemetry
from fleetcast.settings import ServerSettings

FEED_PATH = "/feed/data"


class Board(Protocol):
    """Answers with predictions; raises UnknownServer."""

    def document(self, servers: Sequence[str] = (), *, only_current: bool = False) -> bytes: ...


class Daemon(Protocol):
    """What the rest of the daemon tells about itself."""

    def is_held(self) -> bool:
        """Return whether records have to wait (data clock: a sweep or a training goes first)."""

    def why_not_ready(self) -> str:
        """Return what keeps the daemon from serving, "" when nothing does."""

    def status(self) -> dict[str, Any]:
        """Return the summary for `/status`."""


def create_app(
    intake: Intake,
    board: Board,
    daemon: Daemon,
    telemetry: Telemetry,
    settings: ServerSettings,
    api_key: str = "",
    writes: Writes | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        api_key: empty means that no key is asked for.
        writes: takes Prometheus remote-write; None leaves that route out.
    """
    feed = Feed(intake, writes, daemon.is_held, telemetry, settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        feed.close()

    app = FastAPI(title="fleetcast inference daemon", version=__version__, lifespan=lifespan)
    answers_by_path = {FEED_PATH: feed.answer}
    app.include_router(_guarded_routes(board, daemon, api_key))
    if writes is not None:
        answers_by_path[writes.path] = feed.answer_write
        app.include_router(_write_route(writes.path, api_key))
    app.add_middleware(FeedDoor, answers=answers_by_path, is_welcome=_key_test(api_key))
    if not api_key:  # added after the door, so that requests pass it before the door
        app.add_middleware(BrowserGuard, allowed_hosts=settings.allowed_hosts)
    app.include_router(_open_routes(daemon, telemetry))
    return app


def _guarded_routes(board: Board, daemon: Daemon, api_key: str) -> APIRouter:
    router = APIRouter(dependencies=[Depends(_key_check(api_key))])

    @router.post(
        FEED_PATH,
        responses=apidocs.FEED_ANSWERS,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {JSON: {"schema": apidocs.FEED_BODY}, ARROW: {"schema": apidocs.BINARY}},
            }
        },
    )
    async def feed_data() -> None:  # declared for the interface description: the door answers
        """Take records in; received means accepted and durable."""

    @router.get(
        "/predictions/current",
        responses=apidocs.PREDICTION_ANSWERS,
    )
    def predictions_current(
        server: Annotated[list[str], Query(description="narrow to these servers")] = [],  # noqa: B006
        fields: Annotated[Literal["current"] | None, Query(description="leave the forecasts out")] = None,
    ) -> Response:
        """Return the newest values and forecasts of the fleet."""
        try:
            document = board.document(server, only_current=fields == "current")
        except UnknownServer as error:
            raise HTTPException(404, str(error)) from error
        return Response(document, media_type=JSON)

    @router.get("/status", responses=apidocs.STATUS_ANSWERS)
    def status() -> Response:
        """Summarise buffer, model, ledger, backlog and the last errors."""
        return Response(encoded(daemon.status()), media_type=JSON)

    return router


def _write_route(path: str, api_key: str) -> APIRouter:
    router = APIRouter(dependencies=[Depends(_key_check(api_key))])

    @router.post(
        path,
        status_code=204,
        response_class=Response,
        responses=apidocs.WRITE_ANSWERS,
        openapi_extra={
            "requestBody": {"required": True, "content": {PROTOBUF: {"schema": apidocs.BINARY}}},
        },
    )
    async def remote_write() -> None:  # declared for the interface description: the door answers
        """Take Prometheus remote-write 1.0 in: snappy block, protobuf WriteRequest."""

    return router


def _open_routes(daemon: Daemon, telemetry: Telemetry) -> APIRouter:
    router = APIRouter()

    @router.get("/health", responses=answers(apidocs.OBJECT))
    async def health() -> dict[str, str]:
        """Answer as long as the process does."""
        return {"status": "alive"}

    @router.get("/ready", responses=answers(apidocs.OBJECT, e503="not yet, or not any more"))
    def ready(response: Response) -> dict[str, str]:
        """Say whether the daemon has recovered and can write."""
        reason = daemon.why_not_ready()
        if reason:
            response.status_code = 503
            return {"status": "not ready", "detail": reason}
        return {"status": "ready"}

    @router.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """Return the daemon's numbers in Prometheus's text format."""
        return Response(telemetry.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _key_check(api_key: str) -> Callable[..., Awaitable[None]]:
    header = APIKeyHeader(name="X-API-Key", auto_error=False)
    is_welcome = _key_test(api_key)

    async def check(given: Annotated[str | None, Depends(header)]) -> None:
        if not is_welcome(given):
            raise HTTPException(401, WRONG_KEY)

    return check


def _key_test(api_key: str) -> Callable[[str | None], bool]:
    """Return whether a given key opens the guarded routes, compared in constant time."""
    wanted = api_key.encode()
    return lambda given: not wanted or hmac.compare_digest((given or "").encode("latin-1", "replace"), wanted)
