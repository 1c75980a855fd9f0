"""The page for operators (`/ui/`), what it asks for, `/docs`, `/history`, `/capacity`, forecasts as series.

Owns: these routes, the files of the page as they were when the daemon started, and the headers that
keep a browser to them: nothing is loaded from elsewhere, no script stands in the page itself, and no
other site may frame it. One thread answers, so that operators who look cost ingest and sweeps little;
those that would wait too long are told to come again.
Does not know: what is shown (`serving/overview.py`), how the page draws it (`fleetcast/ui/`).

The files need no key and hold no data; every answer with data needs it, where one is set. The page
sends it as a header, never in a URL, and there is no cookie that another site could use.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from fleetcast.api.bodies import encode
from fleetcast.api.connection import Pieces
from fleetcast.api.feed import JSON, WRONG_KEY, Door
from fleetcast.api.server import PROMETHEUS, Schema, answers, only, preference, require_key
from fleetcast.errors import FleetcastError
from fleetcast.serving.board import UnknownServer
from fleetcast.serving.capacity import MOST_ROWS as MOST_CAPACITY_ROWS
from fleetcast.serving.capacity import Capacity, CapacityQuestion
from fleetcast.serving.export import Export
from fleetcast.serving.fullness import DEFAULT_LIMIT, FIRST_METRIC, DatesQuestion, Fullness
from fleetcast.serving.overview import MOST_ROWS, PAGE_ROWS, STATES, FleetQuery, Overview
from fleetcast.serving.past import MOST_HOURS, AccuracyQuestion, Past
from fleetcast.serving.roster import meant

UI_FOLDER = Path(__file__).parents[1] / "ui"
MAX_WAITING = 32
MOST_WORST = 1000  # series named in one answer
_RETRY_AFTER = "1"
_INDEX = "index.html"
_DOCS = "docs.html"  # Swagger UI, served at /docs alone: its links are relative to that
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": JSON,
    ".txt": "text/plain; charset=utf-8",
    "": "text/plain; charset=utf-8",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
FILE_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
_DATA_HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}

_VALUES: Schema = {"type": "array", "items": {"type": ["number", "null"]}}
_SAID: Schema = {
    "type": "object",
    "required": ["p10", "p50", "p90"],
    "properties": {"p10": _VALUES, "p50": _VALUES, "p90": _VALUES},
}
_NUMBER: Schema = {"type": ["number", "null"]}
_ACCURACY: Schema = {
    "type": "object",
    "required": ["bins", "error", "last_value_error", "ratio", "inside"],
    "properties": {
        "bins": {"type": "integer", "description": "settled forecasts whose last value is known, too"},
        "error": {**_NUMBER, "description": "mean |p50 - actual|, in the metric's unit"},
        "last_value_error": {**_NUMBER, "description": "the same for repeating the last value"},
        "ratio": {**_NUMBER, "description": "error / last_value_error; below 1 is better"},
        "inside": {**_NUMBER, "description": "share of actuals from p10 to p90; 0.8 is meant"},
    },
}
HISTORY: Schema = {
    "type": "object",
    "required": ["server", "bin_s", "start", "end", "source", "metrics"],
    "properties": {
        "server": {"type": "string"},
        "bin_s": {"type": "integer"},
        "start": {"type": "string", "format": "date-time", "description": "start of the first bin"},
        "end": {"type": "string", "format": "date-time", "description": "end of the last bin"},
        "source": {"type": "string", "enum": ["memory", "buffer"]},
        "metrics": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["actual", "said", "accuracy"],
                "properties": {
                    "actual": {**_VALUES, "description": "mean of each bin; null = no record"},
                    "said": {
                        "type": "object",
                        "additionalProperties": _SAID,
                        "description": "by bins ahead: what was forecast for each bin that long before",
                    },
                    "accuracy": {"type": "object", "additionalProperties": _ACCURACY},
                },
            },
        },
    },
}
HISTORY_ANSWERS = answers(
    HISTORY,
    e401=WRONG_KEY,
    e404="unknown server",
    e422="no time, too much at once, or an unknown metric",
    e503="too many questions wait; Retry-After says when to try again",
)
_BY_HORIZON: Schema = {"type": "object", "additionalProperties": _ACCURACY}
ACCURACY: Schema = {
    "type": "object",
    "required": ["server", "servers", "bin_s", "start", "end", "metrics", "worst"],
    "properties": {
        "server": {"type": ["string", "null"]},
        "servers": {"type": "integer"},
        "bin_s": {"type": "integer"},
        "start": {"type": "string", "format": "date-time", "description": "later for a large fleet"},
        "end": {"type": "string", "format": "date-time"},
        "metrics": {"type": "object", "additionalProperties": _BY_HORIZON},
        "worst": {"type": "array", "items": {"type": "object"}, "description": "the highest ratios first"},
    },
}
_ROWS: Schema = {"type": "array", "items": {"type": "object"}}
CAPACITY: Schema = {
    "type": "object",
    "required": ["origin", "horizon_s", "limit", "servers", "metrics", "matching", "rows"],
    "properties": {
        "origin": {"type": ["string", "null"], "description": "the bin that it starts from"},
        "horizon_s": {"type": "integer"},
        "limit": {"type": "number"},
        "servers": {"type": "integer"},
        "metrics": {
            "type": "object",
            "description": "by metric: which source answers, why it, and all scores",
        },
        "not_sent": {
            "type": "array",
            "items": {"type": "string"},
            "description": "those of the metrics that no server sends",
        },
        "matching": {"type": "integer", "description": "series"},
        "silent": {"type": "integer", "description": "those of them whose server sends nothing any more"},
        "bins_waiting": {"type": "integer", "description": "closed bins that are not forecast from yet"},
        "rows": _ROWS,
    },
}
DATES: Schema = {
    "type": "object",
    "required": ["metric", "limit", "days", "newest_day", "comparisons", "matching", "with_date", "rows"],
    "properties": {
        "metric": {"type": "string"},
        "limit": {"type": "number"},
        "days": {"type": "integer", "description": "days of this metric that are known"},
        "newest_day": {"type": "string"},
        "comparisons": {"type": "integer", "description": "of the record's climbs with what came"},
        "matching": {"type": "integer"},
        "with_date": {"type": "integer"},
        "rows": _ROWS,
    },
}
Answer = TypeVar("Answer")
Ask = Callable[[Callable[[], Any]], Awaitable[Response]]


class Desk:
    """Answers questions one after another, in a thread of its own; used on the event loop only."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "page")
        self._n_waiting = 0

    async def ask(self, question: Callable[[], Any]) -> Response:
        """Answer a question as JSON; raises as `run` does."""
        body = await self.run(lambda: encode(question()))
        return Response(body, media_type=JSON, headers=_DATA_HEADERS)

    async def run(self, question: Callable[[], Answer]) -> Answer:
        """Return what a question returns.

        Raises:
            HTTPException: 503 too many wait; 404 an unknown server; 422 a question that cannot be answered.
        """
        if self._n_waiting >= MAX_WAITING:
            raise HTTPException(503, "too many questions wait", headers={"retry-after": _RETRY_AFTER})
        self._n_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, question)
        except UnknownServer as error:
            raise HTTPException(404, str(error)) from error
        except FleetcastError as error:
            raise HTTPException(422, str(error)) from error
        finally:
            self._n_waiting -= 1

    def close(self) -> None:
        """Let the question at work finish; those that wait are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class PageFile:
    """One file of the page."""

    body: bytes
    media_type: str
    tag: str  # of its bytes

    @classmethod
    def read(cls, path: Path) -> "PageFile":
        """Return the file at `path`."""
        body = path.read_bytes()
        return cls(body, _TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:16]}"')


def read_files(folder: Path = UI_FOLDER) -> dict[str, PageFile]:
    """Return the page's files by their paths below /ui/."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in _TYPES)
    return {path.relative_to(folder).as_posix(): PageFile.read(path) for path in paths}


def add_page(
    app: FastAPI,
    overview: Overview,
    past: Past,
    capacity: Capacity,
    fullness: Fullness,
    door: Door,
    export: Export | None = None,
) -> Desk:
    """Add the page's routes, and that of the forecasts as series where they are exported.

    Returns:
        what answers; the caller closes it.
    """
    desk = Desk()
    guard = [Depends(require_key(door))]
    app.include_router(_history_route(past, desk.ask, guard))
    for prefix, is_shown in (("", True), ("/ui/api", False)):  # the page asks below its own path
        dates = fullness.answer if is_shown else fullness.tell
        router = _capacity_routes(past, capacity.answer, dates, desk.ask, guard)
        app.include_router(router, prefix=prefix, include_in_schema=is_shown)
    if export is not None:
        app.include_router(_export_route(export, desk, door))
    app.include_router(_data_routes(overview, desk.ask, guard))
    app.include_router(_file_routes(read_files()))
    return desk


def _history_route(past: Past, ask: Ask, guard: list[Any]) -> APIRouter:
    router = APIRouter(dependencies=guard)
    fields = [Depends(only("server", "metric", "start", "end"))]

    @router.get("/history", responses=HISTORY_ANSWERS, dependencies=fields)
    async def history(
        server: Annotated[str, Query(description="one server's name")],
        metric: Annotated[list[str], Query(description="narrow to these metrics")] = [],  # noqa: B006
        start: Annotated[str | None, Query(description="ISO 8601; 48 h before the end")] = None,
        end: Annotated[str | None, Query(description="ISO 8601; the newest closed bin")] = None,
    ) -> Response:
        """Return one server's past in bins, what was forecast for them, and how good that was."""
        return await ask(lambda: past.answer(server, metric, start, end))

    @router.get(
        "/accuracy",
        responses={**HISTORY_ANSWERS, **answers(ACCURACY)},
        dependencies=[Depends(only("server", "metric", "hours", "worst"))],
    )
    async def accuracy(
        server: Annotated[str, Query(description="one server; without it: the fleet")] = "",
        metric: Annotated[list[str], Query(description="narrow to these metrics")] = [],  # noqa: B006
        hours: Annotated[int, Query(ge=1, le=MOST_HOURS)] = 24,
        worst: Annotated[int, Query(ge=0, le=MOST_WORST, description="how many series to name")] = 0,
    ) -> Response:
        """Return how good settled forecasts were beside repeating the last value."""
        return await ask(lambda: past.accuracy(AccuracyQuestion(server, tuple(metric), hours, worst)))

    return router


def _capacity_routes(
    past: Past,
    near: Callable[[CapacityQuestion], dict[str, Any]],
    dates: Callable[[DatesQuestion], dict[str, Any]],
    ask: Ask,
    guard: list[Any],
) -> APIRouter:
    router = APIRouter(dependencies=guard)
    rows_limit = Annotated[int, Query(ge=1, le=MOST_CAPACITY_ROWS)]

    @router.get(
        "/capacity",
        responses={**HISTORY_ANSWERS, **answers(CAPACITY)},
        dependencies=[Depends(only("server", "metric", "limit", "min_p", "rows"))],
    )
    async def crossings(
        server: Annotated[str, Query(description="one server; without it: the fleet")] = "",
        metric: Annotated[list[str], Query(description="narrow to these metrics")] = [],  # noqa: B006
        limit: Annotated[float, Query(description="70, 80, 90 or 95 percent")] = 90.0,
        min_p: Annotated[float, Query(ge=0, le=1, description="from which probability on")] = 0.1,
        rows: rows_limit = 100,
    ) -> Response:
        """Return which servers pass a limit within the horizon, how sure that is, and since when or when."""
        asked = CapacityQuestion(tuple(metric), limit, min_p, server, rows)
        return await ask(lambda: near(_of_one(past, asked) if server else asked))

    @router.get(
        "/capacity/dates",
        responses={**HISTORY_ANSWERS, **answers(DATES)},
        dependencies=[Depends(only("server", "metric", "limit", "rows"))],
    )
    async def by_when(
        server: Annotated[str, Query(description="one server; without it: the fleet")] = "",
        metric: Annotated[str, Query(description="a metric in percent")] = FIRST_METRIC,
        limit: Annotated[float, Query(description="percent")] = DEFAULT_LIMIT,
        rows: rows_limit = 100,
    ) -> Response:
        """Return by when servers reach a limit, days and weeks ahead, or why there is no date."""
        return await ask(lambda: dates(DatesQuestion(metric, limit, meant(server), rows)))

    return router


def _of_one(past: Past, asked: CapacityQuestion) -> CapacityQuestion:
    return replace(asked, server=past.require(asked.server), min_p=0.0)


def _export_route(export: Export, desk: Desk, door: Door) -> APIRouter:
    """Return the route that Prometheus scrapes; it can send a key as `Authorization: Bearer` alone."""
    header, bearer = APIKeyHeader(name="X-API-Key", auto_error=False), HTTPBearer(auto_error=False)
    Token = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]

    async def check(request: Request, key: Annotated[str | None, Depends(header)], token: Token) -> None:
        if not door.is_welcome(key or (token.credentials if token else None)):
            door.note(request.scope)
            raise HTTPException(401, WRONG_KEY)

    router = APIRouter(dependencies=[Depends(check)])
    described = answers({}, e401=WRONG_KEY, e503=HISTORY_ANSWERS[503]["description"])
    described[200]["content"] = {PROMETHEUS.partition(";")[0]: {"schema": {"type": "string"}}}

    @router.get(
        "/metrics/forecasts", response_class=Response, responses=described, dependencies=[Depends(only())]
    )
    async def forecasts() -> Response:
        """Return the newest forecasts in Prometheus's text format, how far they look ahead as a label."""
        return Pieces(await desk.run(export.pieces), PROMETHEUS)

    return router


def _data_routes(overview: Overview, ask: Ask, guard: list[Any]) -> APIRouter:
    """Return what the page asks for; it may change with the page, so it is not in the description."""
    router = APIRouter(prefix="/ui/api", dependencies=guard, include_in_schema=False)

    @router.get("/pulse", dependencies=[Depends(only())])
    async def pulse(request: Request) -> Response:
        answer = await ask(overview.pulse)
        tag = f'"{hashlib.sha256(answer.body).hexdigest()[:16]}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"etag": tag, **_DATA_HEADERS})
        answer.headers["etag"] = tag
        return answer

    @router.get("/strip", dependencies=[Depends(only())])
    async def strip() -> Response:
        return await ask(overview.strip)

    @router.get("/fleet", dependencies=[Depends(only("sort", "order", "filter", "state", "offset", "limit"))])
    async def fleet(
        sort: str = "name",
        order: Literal["asc", "desc"] = "asc",
        text: Annotated[str, Query(alias="filter", max_length=128)] = "",
        state: Literal["", *STATES] = "",  # type: ignore[valid-type]
        offset: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
        limit: Annotated[int, Query(ge=1, le=MOST_ROWS)] = PAGE_ROWS,
    ) -> Response:
        query = FleetQuery(sort, order == "desc", text, state, offset, limit)
        return await ask(lambda: overview.table(query))

    @router.get("/server", dependencies=[Depends(only("name", "hours"))])
    async def server(name: str, hours: Annotated[int, Query(ge=1, le=168)] = 48) -> Response:
        return await ask(lambda: overview.server(name, hours))

    _add_watch_routes(router, overview, ask)
    return router


def _add_watch_routes(router: APIRouter, overview: Overview, ask: Ask) -> None:
    """Add the routes about the loop as a whole."""

    @router.get("/drift", dependencies=[Depends(only("days"))])
    async def drift(days: Annotated[float, Query(gt=0, le=60)] = 7.0) -> Response:
        return await ask(lambda: overview.drift(days))

    @router.get("/trainings", dependencies=[Depends(only())])
    async def trainings() -> Response:
        return await ask(overview.trainings)

    @router.get("/health", dependencies=[Depends(only())])
    async def health() -> Response:
        return await ask(overview.health)


def _file_routes(files: Mapping[str, PageFile]) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def root(request: Request) -> Response:
        """Lead to the page, unless a client asks for something else than HTML."""
        accept = ",".join(request.headers.getlist("accept")) or "*/*"
        if preference(accept, "text/html")[0] == 0.0:
            raise HTTPException(404)
        return Response(status_code=307, headers={"location": "ui/", "vary": "accept"})

    @router.get("/ui")
    async def without_slash() -> Response:
        return Response(status_code=307, headers={"location": "ui/"})

    @router.get("/redoc")
    async def other_docs() -> Response:
        return Response(status_code=307, headers={"location": "docs"})

    @router.get("/docs")
    async def docs(request: Request) -> Response:
        return _file_answer(files[_DOCS], request)

    @router.get("/ui/{name:path}")
    async def page_file(name: str, request: Request) -> Response:
        found = files.get(name or _INDEX)
        if found is None or name == _DOCS:
            raise HTTPException(404)
        return _file_answer(found, request)

    return router


def _file_answer(found: PageFile, request: Request) -> Response:
    headers = {**FILE_HEADERS, "etag": found.tag}
    if request.headers.get("if-none-match") == found.tag:
        return Response(status_code=304, headers=headers)
    return Response(found.body, media_type=found.media_type, headers=headers)
