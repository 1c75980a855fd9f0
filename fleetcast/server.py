"""The HTTP interface of the inference daemon (owner of FastAPI).

Owns: routes, status codes, authentication, and how much work may wait. It is given what it
serves as narrow protocols. Does not know: models, buffers, bins.

The hot route reads the raw body itself (`bodies`) and hands it to worker threads, so that the
event loop only ever waits.
"""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.security import APIKeyHeader

from fleetcast import __version__, apidocs
from fleetcast.apidocs import answers
from fleetcast.board import UnknownServer
from fleetcast.bodies import BodyReader, Refusal, encoded, records_in
from fleetcast.clock import monotonic
from fleetcast.errors import StorageBroken, StorageFull
from fleetcast.intake import Receipt
from fleetcast.settings import ServerSettings
from fleetcast.telemetry import Telemetry

logger = logging.getLogger(__name__)

MAX_ERRORS_SHOWN = 20
_WORKERS = 32  # threads that wait for the disk together: one fdatasync then serves all of them
_HOLD_STEP_S = 0.002
_JSON = "application/json"


class Intake(Protocol):
    """Takes records; raises StorageFull or StorageBroken when none was kept."""

    def take(self, raw: Sequence[object]) -> Receipt: ...


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
) -> FastAPI:
    """Build the application; an empty `api_key` means that no key is asked for."""
    feed = _Feed(intake, daemon, telemetry, settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        feed.close()

    app = FastAPI(title="fleetcast inference daemon", version=__version__, lifespan=lifespan)
    app.include_router(_guarded_routes(feed, board, daemon, api_key))
    app.include_router(_open_routes(daemon, telemetry))
    return app


def _guarded_routes(feed: "_Feed", board: Board, daemon: Daemon, api_key: str) -> APIRouter:
    router = APIRouter(dependencies=[Depends(_key_check(api_key))])

    @router.post(
        "/feed/data",
        responses=apidocs.FEED_ANSWERS,
        openapi_extra={"requestBody": {"required": True, "content": {_JSON: {"schema": apidocs.FEED_BODY}}}},
    )
    async def feed_data(request: Request) -> Response:
        """Take records in; received means accepted and durable."""
        return await feed.answer(request)

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
        return Response(document, media_type=_JSON)

    @router.get("/status", responses=apidocs.STATUS_ANSWERS)
    def status() -> Response:
        """Summarise buffer, model, ledger, backlog and the last errors."""
        return Response(encoded(daemon.status()), media_type=_JSON)

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

    async def check(given: Annotated[str | None, Depends(header)]) -> None:
        if api_key and not hmac.compare_digest((given or "").encode("latin-1", "replace"), api_key.encode()):
            raise HTTPException(401, "X-API-Key is missing or wrong")

    return check


class _Feed:
    """The hot route: bounded waiting, worker threads, one answer per request."""

    def __init__(
        self, intake: Intake, daemon: Daemon, telemetry: Telemetry, settings: ServerSettings
    ) -> None:
        self._intake = intake
        self._daemon = daemon
        self._telemetry = telemetry
        self._settings = settings
        self._bodies = BodyReader(settings.max_body_bytes)
        self._n_pending = 0  # touched by the event loop only
        n_workers = min(_WORKERS, settings.max_pending_posts)
        self._workers = ThreadPoolExecutor(n_workers, thread_name_prefix="ingest")

    def close(self) -> None:
        """Wait for the requests at work; called once no new one can arrive."""
        self._workers.shutdown(wait=True)

    async def answer(self, request: Request) -> Response:
        """Answer one POST and count it."""
        started = monotonic()
        try:
            async with self._bodies.read(request) as body:
                response = await self._answer_body(body)
        except Refusal as refusal:
            headers = {"Retry-After": str(refusal.retry_after_s)} if refusal.retry_after_s else None
            detail = encoded({"detail": str(refusal)})
            response = Response(detail, refusal.code, headers, media_type=_JSON)
        self._telemetry.feed_answered(response.status_code, monotonic() - started)
        return response

    async def _answer_body(self, body: bytes) -> Response:
        if self._n_pending >= self._settings.max_pending_posts:
            raise Refusal(503, "too many requests at work", retry_after_s=1)
        self._n_pending += 1
        try:
            await self._wait_for_the_sweep()
            answer = await asyncio.get_running_loop().run_in_executor(self._workers, self._take, body)
        finally:
            self._n_pending -= 1
        return Response(answer, media_type=_JSON)

    async def _wait_for_the_sweep(self) -> None:
        deadline = monotonic() + self._settings.hold_s
        while self._daemon.is_held():
            if monotonic() >= deadline:
                raise Refusal(429, "a sweep or a training goes first (data clock)", retry_after_s=1)
            await asyncio.sleep(_HOLD_STEP_S)

    def _take(self, body: bytes) -> bytes:
        """Decode, check and store; runs in a worker thread."""
        try:
            receipt = self._intake.take(records_in(body))
        except StorageFull as error:
            raise Refusal(507, str(error)) from error
        except StorageBroken as error:
            raise Refusal(503, str(error), retry_after_s=5) from error
        self._telemetry.records_taken(
            receipt.n_received, (r.reason for r in receipt.rejections), receipt.n_ignored_fields
        )
        return encoded(
            {
                "status": "ok",
                "records_received": receipt.n_received,
                "records_rejected": len(receipt.rejections),
                "errors": [r.as_dict() for r in receipt.rejections[:MAX_ERRORS_SHOWN]],
            }
        )
