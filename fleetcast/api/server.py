"""The HTTP interface of the inference daemon (owner of FastAPI): routes, keys, and its description.

Owns: routes, status codes, authentication, and what `/openapi.json` and `/docs` say (plain OpenAPI;
changes are additive only, and `tests/test_server.py` compares it with the answers). `feed` answers
the routes that take records in. Does not know: models, bins, how answers are made.

Without a key the daemon listens on loopback, but a browser on the same host is on loopback, too.
A page may point a name of its own at 127.0.0.1 (DNS rebinding) and read the answers, or post
across origins without reading. The first shows in `Host`, the second in `Origin`: `BrowserGuard`
refuses both. With a key it is not needed, since a page does not know the key.
"""

import hmac
import ipaddress
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Response
from fastapi.security import APIKeyHeader
from starlette.types import ASGIApp, Receive, Scope, Send

from fleetcast import __version__
from fleetcast.api.bodies import encode
from fleetcast.api.feed import ARROW, JSON, PROTOBUF, WRONG_KEY, Feed, FeedDoor
from fleetcast.serving.board import PredictionBoard, UnknownServer
from fleetcast.serving.intake import Intake
from fleetcast.serving.status import StatusReport
from fleetcast.serving.telemetry import Telemetry
from fleetcast.serving.writes import WriteIntake
from fleetcast.settings import ServerSettings

FEED_PATH = "/feed/data"
Schema = dict[str, Any]

_NUMBERS: Schema = {"type": "array", "items": {"type": "number"}}
_QUANTILES: Schema = {
    "type": "object",
    "required": ["p10", "p50", "p90"],
    "properties": {"p10": _NUMBERS, "p50": _NUMBERS, "p90": _NUMBERS},
}
_PREDICTION: Schema = {
    "type": "object",
    "required": ["current", "source", "stale"],
    "properties": {
        "current": {"type": "object", "additionalProperties": {"type": "number"}},
        "forecast": {"type": ["object", "null"], "additionalProperties": _QUANTILES},
        "timestamps": {"type": "array", "items": {"type": "string", "format": "date-time"}},
        "source": {"type": "string", "enum": ["model", "fallback", "warming_up"]},
        "stale": {"type": "boolean"},
    },
}
_MODEL: Schema = {
    "type": ["object", "null"],
    "required": ["version", "trained_at", "base"],
    "properties": {
        "version": {"type": "string"},
        "trained_at": {"type": "string", "format": "date-time"},
        "base": {"type": "boolean"},
    },
}
PREDICTIONS: Schema = {
    "type": "object",
    "required": ["timestamp", "model", "predictions"],
    "properties": {
        "timestamp": {"type": "string", "format": "date-time"},
        "model": _MODEL,
        "predictions": {"type": "object", "additionalProperties": _PREDICTION},
    },
}
FEED_ANSWER: Schema = {
    "type": "object",
    "required": ["status", "records_received", "records_rejected", "errors"],
    "properties": {
        "status": {"type": "string", "enum": ["ok"]},
        "records_received": {"type": "integer", "description": "accepted and durable"},
        "records_rejected": {"type": "integer"},
        "errors": {
            "type": "array",
            "maxItems": 20,
            "items": {
                "type": "object",
                "required": ["index", "field", "reason"],
                "properties": {
                    "index": {"type": "integer"},
                    "field": {"type": "string"},
                    "reason": {"type": "string"},
                },
            },
        },
    },
}
FEED_BODY: Schema = {
    "type": "object",
    "required": ["records"],
    "properties": {
        "records": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["timestamp", "server_name"],
                "properties": {
                    "timestamp": {"type": "string", "description": "ISO 8601; without an offset it is UTC"},
                    "server_name": {"type": "string", "minLength": 1, "maxLength": 128},
                },
                "additionalProperties": True,
                "description": "every other field [a-z][a-z0-9_]* with a finite number is a metric",
            },
        }
    },
    "example": {
        "records": [
            {"timestamp": "2026-01-15T10:00:05Z", "server_name": "web-01", "cpu_pct": 12.5, "mem_pct": 40.1}
        ]
    },
}
ERROR: Schema = {
    "type": "object",
    "required": ["detail"],
    "properties": {"detail": {"type": "string"}},
}
OBJECT: Schema = {"type": "object"}
BINARY: Schema = {"type": "string", "format": "binary"}


def answers(ok: Schema, **errors: str) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route: 200 with its schema, errors as `e404="why"`."""
    described: dict[int | str, dict[str, Any]] = {
        200: {"description": "OK", "content": {"application/json": {"schema": ok}}}
    }
    for code, text in errors.items():
        described[int(code.removeprefix("e"))] = {
            "description": text,
            "content": {"application/json": {"schema": ERROR}},
        }
    return described


FEED_ANSWERS = answers(
    FEED_ANSWER,
    e401=WRONG_KEY,
    e408="the body did not arrive in time",
    e413="the body is too large",
    e415="the body is compressed",
    e422='the body is not {"records": [...]}',
    e429="a sweep or a training goes first (data clock); Retry-After says when to try again",
    e503="overloaded, or the disk does not take the records; Retry-After says when to try again",
    e507="the disk is full; nothing of the request was kept",
)
WRITE_ANSWERS: dict[int | str, dict[str, Any]] = {
    204: {"description": "taken"},
    400: {"description": "not a WriteRequest, or some samples were refused: the text says which"},
    401: {"description": WRONG_KEY},
    413: {"description": "too large, packed or unpacked"},
    415: {"description": "not remote-write 1.0 in a snappy block"},
    503: {"description": "busy, or a sweep goes first (data clock); repeat it"},
    507: {"description": "the disk is full; repeat it"},
}
PREDICTION_ANSWERS = answers(PREDICTIONS, e401=WRONG_KEY, e404="unknown server")
STATUS_ANSWERS = answers(OBJECT, e401=WRONG_KEY)


def create_app(
    intake: Intake,
    board: PredictionBoard,
    report: StatusReport,
    telemetry: Telemetry,
    settings: ServerSettings,
    api_key: str = "",
    writes: WriteIntake | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        api_key: empty means that no key is asked for.
        writes: takes Prometheus remote-write; None leaves that route out.
    """
    feed = Feed(intake, writes, report.is_held, telemetry, settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        feed.close()

    app = FastAPI(title="fleetcast inference daemon", version=__version__, lifespan=lifespan)
    answers_by_path = {FEED_PATH: feed.answer}
    app.include_router(_guarded_routes(board, report, api_key))
    if writes is not None:
        answers_by_path[writes.path] = feed.answer_write
        app.include_router(_write_route(writes.path, api_key))
    app.add_middleware(FeedDoor, answers=answers_by_path, is_welcome=_key_test(api_key))
    if not api_key:  # added after the door, so that requests pass it before the door
        app.add_middleware(BrowserGuard, allowed_hosts=settings.allowed_hosts)
    app.include_router(_open_routes(report, telemetry))
    return app


def _guarded_routes(board: PredictionBoard, report: StatusReport, api_key: str) -> APIRouter:
    router = APIRouter(dependencies=[Depends(_key_check(api_key))])

    @router.post(
        FEED_PATH,
        responses=FEED_ANSWERS,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {JSON: {"schema": FEED_BODY}, ARROW: {"schema": BINARY}},
            }
        },
    )
    async def feed_data() -> None:  # declared for the interface description: the door answers
        """Take records in; received means accepted and durable."""

    @router.get(
        "/predictions/current",
        responses=PREDICTION_ANSWERS,
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

    @router.get("/status", responses=STATUS_ANSWERS)
    def status() -> Response:
        """Summarise buffer, model, ledger, backlog and the last errors."""
        return Response(encode(report.status()), media_type=JSON)

    return router


def _write_route(path: str, api_key: str) -> APIRouter:
    router = APIRouter(dependencies=[Depends(_key_check(api_key))])

    @router.post(
        path,
        status_code=204,
        response_class=Response,
        responses=WRITE_ANSWERS,
        openapi_extra={
            "requestBody": {"required": True, "content": {PROTOBUF: {"schema": BINARY}}},
        },
    )
    async def remote_write() -> None:  # declared for the interface description: the door answers
        """Take Prometheus remote-write 1.0 in: snappy block, protobuf WriteRequest."""

    return router


def _open_routes(report: StatusReport, telemetry: Telemetry) -> APIRouter:
    router = APIRouter()

    @router.get("/health", responses=answers(OBJECT))
    async def health() -> dict[str, str]:
        """Answer as long as the process does."""
        return {"status": "alive"}

    @router.get("/ready", responses=answers(OBJECT, e503="not yet, or not any more"))
    def ready(response: Response) -> dict[str, str]:
        """Say whether the daemon has recovered and can write."""
        if reason := report.not_ready:
            response.status_code = 503
            return {"status": "not ready", "detail": reason}
        return {"status": "ready"}

    @router.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """Return the daemon's numbers in Prometheus's text format."""
        return Response(
            telemetry.render(report.snapshot()), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

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


class BrowserGuard:
    """Middleware that answers 421 for a foreign `Host` and 403 for a foreign `Origin`."""

    def __init__(self, app: ASGIApp, allowed_hosts: Iterable[str]) -> None:
        self._app = app
        self._allowed = {name.lower() for name in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            status, why = self.refusal(dict(scope["headers"]))
            if status:
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
                421,
                f"this daemon is not known as {host[:80]!r}: set server.allowed_hosts or a TFT_API_KEY",
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.partition("://")[2].lower() != host.lower():
            return 403, f"a page of {origin[:80]!r} may not ask without a TFT_API_KEY"
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
