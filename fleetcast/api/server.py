"""The HTTP interface of the inference daemon (owner of FastAPI): routes, keys, and its description.

Owns: routes, status codes, authentication, and what `/openapi.json` says (plain OpenAPI;
changes are additive only, and `tests/test_server.py` compares it with the answers). `feed` answers
the routes that take records in, and guards these. Does not know: models, bins, how answers are made.
"""

import copy
import re
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.security import APIKeyHeader

from fleetcast import __version__
from fleetcast.api.bodies import encode
from fleetcast.api.connection import Pieces
from fleetcast.api.feed import ARROW, FEED_PATH, JSON, PROTOBUF, WRONG_KEY, Door
from fleetcast.clock import SystemClock, iso_z
from fleetcast.serving.board import PredictionBoard, TooManyServers, UnknownServer
from fleetcast.serving.roster import BadShare, share_of
from fleetcast.serving.status import StatusReport
from fleetcast.serving.telemetry import Telemetry
from fleetcast.settings import ServerSettings

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
Schema = dict[str, Any]

_NUMBERS: Schema = {"type": "array", "items": {"type": "number"}}
_QUANTILES: Schema = {
    "type": "object",
    "required": ["p10", "p50", "p90"],
    "properties": {"p10": _NUMBERS, "p50": _NUMBERS, "p90": _NUMBERS},
}
_SOURCE: Schema = {"type": "string", "enum": ["model", "fallback"]}
_PREDICTION: Schema = {
    "type": "object",
    "required": ["current", "source", "stale"],
    "properties": {
        "current": {"type": "object", "additionalProperties": {"type": "number"}},
        "forecast": {"type": ["object", "null"], "additionalProperties": _QUANTILES},
        "timestamps": {"type": "array", "items": {"type": "string", "format": "date-time"}},
        "source": {"type": "string", "enum": ["model", "fallback", "warming_up", "not_forecast"]},
        "sources": {"type": "object", "additionalProperties": _SOURCE},
        "stale": {"type": "boolean"},
    },
}


def _fields(description: str) -> Schema:
    properties = {"field": {"type": "string"}, "records": {"type": "integer"}, "reason": {"type": "string"}}
    item = {"type": "object", "required": ["field", "reason"], "properties": properties}
    return {"type": "array", "maxItems": 20, "description": description, "items": item}


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
        "fields_refused": _fields("metrics too many, left out of records that were received without them"),
        "fields_ignored": _fields("the fields that are no metric, where a record has no other ones"),
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
}
ERROR: Schema = {
    "type": "object",
    "required": ["detail"],
    "properties": {
        "detail": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "object", "required": ["loc", "msg"]}},
            ],
            "description": "why; of fields of the query: a list, each with its place and its message",
        }
    },
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
    415: {"description": "not remote-write 1.0 or 2.0 in a snappy block"},
    503: {"description": "busy, or a sweep goes first (data clock); repeat it"},
    507: {"description": "the disk is full; repeat it"},
}
_CODES = {UnknownServer: 404, TooManyServers: 413, BadShare: 422}
PREDICTION_ANSWERS = answers(
    PREDICTIONS,
    e401=WRONG_KEY,
    e404="unknown server",
    e413="too many servers for one document; ?shard=K/N asks for a share of them",
    e422="too many servers named",
    e503="too many answers unread",
)
PREDICTION_ANSWERS[200]["content"][ARROW] = {"schema": BINARY}
STATUS_ANSWERS = answers(OBJECT, e401=WRONG_KEY)
_QUERY_FAULTS_MAX = 20
_QUERY_SHOWN_CHARS = 80
_BY_NAME = 2  # a media range that is no wildcard
_QUALITY = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?", re.ASCII)


def create_app(
    board: PredictionBoard,
    report: StatusReport,
    telemetry: Telemetry,
    settings: ServerSettings,
    api_key: str = "",
    write_path: str | None = None,
) -> FastAPI:
    """Build the routes behind the front; those that take records in are only declared.

    Args:
        api_key: empty means that no key is asked for.
        write_path: where the front takes Prometheus remote-write.
    """
    title, no_docs = "fleetcast inference daemon", None  # `page` serves /docs
    app = FastAPI(title=title, version=__version__, docs_url=no_docs, redoc_url=no_docs)
    app.add_exception_handler(RequestValidationError, _refuse_query)
    door = Door(api_key, telemetry)
    app.include_router(_guarded_routes(board, report, door, settings.max_query_servers))
    if write_path is not None:
        app.include_router(_write_route(write_path, door))
    app.include_router(_open_routes(report, telemetry))
    app.openapi = _with_present_example(app.openapi)  # type: ignore[method-assign]
    return app


async def _refuse_query(_request: Request, error: Exception) -> Response:
    """Answer 422 as the framework does, with no more than the start of what was sent."""
    assert isinstance(error, RequestValidationError)
    detail = [
        {
            **one,
            "loc": list(map(_cut, one["loc"])),
            **({"input": _cut(one["input"])} if "input" in one else {}),
        }
        for one in islice(error.errors(), _QUERY_FAULTS_MAX)
    ]
    return Response(encode({"detail": jsonable_encoder(detail)}), 422, media_type=JSON)


def _cut(sent: Any) -> Any:
    if isinstance(sent, list):
        return list(map(_cut, sent[:_QUERY_FAULTS_MAX]))
    if not isinstance(sent, str) or len(sent) <= _QUERY_SHOWN_CHARS:
        return sent
    return f"{sent[:_QUERY_SHOWN_CHARS]}..."


def _with_present_example(describe: Callable[[], Schema]) -> Callable[[], Schema]:
    """Let the description's example record be of this moment: an old one would be refused."""

    def describe_now() -> Schema:
        description = copy.deepcopy(describe())
        content = description["paths"][FEED_PATH]["post"]["requestBody"]["content"]
        now = iso_z(SystemClock().now().replace(microsecond=0))
        record = {"timestamp": now, "server_name": "web-01", "cpu_pct": 12.5, "mem_pct": 40.1}
        content[JSON]["example"] = {"records": [record]}
        return description

    return describe_now


def _guarded_routes(
    board: PredictionBoard, report: StatusReport, door: "Door", max_query_servers: int
) -> APIRouter:
    router = APIRouter(dependencies=[Depends(require_key(door))])

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
        dependencies=[Depends(only("server", "fields", "shard"))],
    )
    def predictions_current(
        server: Annotated[list[str], Query(description="narrow to these servers")] = [],  # noqa: B006
        fields: Annotated[Literal["current"] | None, Query(description="leave the forecasts out")] = None,
        shard: Annotated[str | None, Query(description="K/N: share K of N of the fleet, K from 0")] = None,
        accept: Annotated[list[str], Header(description=f"{ARROW}: as an Arrow table")] = [],  # noqa: B006
    ) -> Response:
        """Return the newest values and forecasts of the fleet."""
        if len(server) > max_query_servers:
            raise HTTPException(422, f"a query names at most {max_query_servers} servers; ask for all")
        try:
            return _predictions(board, server, share_of(shard, server), fields, ",".join(accept))
        except (UnknownServer, TooManyServers, BadShare) as error:
            raise HTTPException(_CODES[type(error)], str(error)) from error

    @router.get("/status", responses=STATUS_ANSWERS, dependencies=[Depends(only())])
    def status() -> Response:
        """Summarise buffer, model, ledger, backlog and the last errors."""
        return Response(encode(report.status()), media_type=JSON)

    return router


def _predictions(
    board: PredictionBoard, servers: list[str], share: tuple[int, int] | None, fields: str | None, accept: str
) -> Pieces:
    """Return the fleet's forecasts as JSON, or as Arrow where a client asks for that by its name."""
    table, document = preference(accept, ARROW), preference(accept, JSON)
    is_equal = table == document and table[1] == _BY_NAME  # it reads both: a table costs less
    is_table = table[0] > 0.0 and (table > document or is_equal)
    told = (board.table if is_table else board.document)(servers, share, only_current=fields == "current")
    answer = Pieces(told, ARROW if is_table else JSON)
    answer.headers["vary"] = "Accept"
    return answer


def _write_route(path: str, door: "Door") -> APIRouter:
    router = APIRouter(dependencies=[Depends(require_key(door))])

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
        """Take Prometheus remote-write 1.0 or 2.0 in: snappy block, protobuf WriteRequest or v2.Request."""

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
        return Response(telemetry.render(report.snapshot()), media_type=PROMETHEUS)

    return router


def preference(accept: str, media_type: str) -> tuple[float, int]:
    """Return how much an Accept header wants a media type: its quality, and how exactly it is named.

    The range that names it most exactly counts, in whatever case. One whose quality is no number from 0 to 1
    is passed over. Source: RFC 9110, 12.5.1.

    >>> accept = "text/*;q=0.5, TEXT/HTML ; Q=0.8, */*;q=0"
    >>> [preference(accept, media_type) for media_type in ("text/html", "text/css", "a/b")]
    [(0.8, 2), (0.5, 1), (0.0, 0)]
    """
    wanted = {"*/*": 0, f"{media_type.partition('/')[0]}/*": 1, media_type: _BY_NAME}
    found = (-1, 0.0)
    for part in accept.lower().split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        written = next((one[2:] for one in parameters if one.startswith("q=")), "1")
        if name in wanted and _QUALITY.fullmatch(written):
            found = max(found, (wanted[name], float(written)))
    return found[1], max(found[0], 0)


def require_key(door: Door) -> Callable[..., Awaitable[None]]:
    """Return the dependency that the framework's routes check the key by."""
    header = APIKeyHeader(name="X-API-Key", auto_error=False)

    async def check(request: Request, given: Annotated[str | None, Depends(header)]) -> None:
        if not door.is_welcome(given):
            door.note(request.scope)
            raise HTTPException(401, WRONG_KEY)

    return check


def only(*names: str) -> Callable[[Request], Awaitable[None]]:
    """Return a dependency that refuses query fields of other names: a mistyped one would widen the answer."""

    async def check(request: Request) -> None:
        takes = f"this path takes {', '.join(names)}" if names else "this path takes none"
        unknown = [name for name in request.query_params if name not in names]
        if unknown:
            raise RequestValidationError(
                [
                    {"type": "extra_forbidden", "loc": ("query", name), "msg": f"unknown field: {takes}"}
                    for name in unknown
                ]
            )

    return check
