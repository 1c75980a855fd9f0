"""The routes that take records in: bounded waiting, worker threads, one answer per request.

Owns: content types, what a failure means to each kind of sender, how much work may wait. Reads
raw bodies itself (`bodies`) and hands them to worker threads, so that the event loop only ever
waits. Does not know: what records are.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from fleetcast.clock import monotonic
from fleetcast.errors import BadData, StorageBroken, StorageFull
from fleetcast.ingest.arrow_ingest import read_columns
from fleetcast.ingest.bodies import BodyReader, Refusal, encoded, records_in
from fleetcast.ingest.intake import Receipt
from fleetcast.ingest.json_records import JsonRecords
from fleetcast.ingest.record_columns import RowsOf
from fleetcast.ingest.remote_write import BodyTooLarge
from fleetcast.ingest.write_intake import WriteReceipt
from fleetcast.serving.telemetry import Telemetry
from fleetcast.settings import ServerSettings

MAX_ERRORS_SHOWN = 20
JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"
PROTOBUF = "application/x-protobuf"
_WORKERS = 32  # threads that wait for the disk together: one fdatasync then serves all of them
_HOLD_STEP_S = 0.002
_REMOTE_WRITE_2 = "io.prometheus.write.v2"

Answer = TypeVar("Answer")


class Intake(Protocol):
    """Takes records; raises StorageFull or StorageBroken when none was kept."""

    def take(self, raw: Sequence[object]) -> Receipt: ...


class Writes(Protocol):
    """Takes remote-write requests; raises as Intake does, and BadData for what is none."""

    path: str

    def take(self, body: bytes) -> WriteReceipt: ...


class Feed:
    """Answers POSTs; everything but the work itself runs on one event loop."""

    def __init__(
        self,
        intake: Intake,
        writes: Writes | None,
        is_held: Callable[[], bool],
        telemetry: Telemetry,
        settings: ServerSettings,
    ) -> None:
        self._intake = intake
        self._writes = writes
        self._is_held = is_held
        self._telemetry = telemetry
        self._settings = settings
        self._json = JsonRecords()
        self._bodies = BodyReader(settings.max_body_bytes)
        self._n_pending = 0  # touched by the event loop only
        n_workers = min(_WORKERS, settings.max_pending_posts)
        self._workers = ThreadPoolExecutor(n_workers, thread_name_prefix="ingest")

    def close(self) -> None:
        """Wait for the requests at work; called once no new one can arrive."""
        self._workers.shutdown(wait=True)

    async def answer(self, request: Request) -> Response:
        """Answer one POST of records and count it."""
        started = monotonic()
        is_arrow = _content_type(request) == ARROW
        try:
            async with self._bodies.read(request) as body:
                answer = await self._in_turn(self._take_arrow if is_arrow else self._take_json, body)
            response = Response(answer, media_type=JSON)
        except Refusal as refusal:
            detail = encoded({"detail": str(refusal)})
            response = Response(detail, refusal.code, _retry_after(refusal), media_type=JSON)
        self._telemetry.feed_answered(response.status_code, monotonic() - started)
        return response

    async def answer_write(self, request: Request) -> Response:
        """Answer one remote-write request and count it.

        Senders drop what is answered with a 4xx, 429 included, and repeat what is answered with
        a 5xx: whatever can pass is a 503 here.
        """
        started = monotonic()
        try:
            if _content_type(request) != PROTOBUF or _REMOTE_WRITE_2 in request.headers["content-type"]:
                raise Refusal(415, f"remote-write 1.0 is taken: Content-Type {PROTOBUF}, a WriteRequest")
            async with self._bodies.read(request, encoding="snappy") as body:
                problems = await self._in_turn(self._take_write, body)
            response = PlainTextResponse(problems + "\n", 400) if problems else Response(status_code=204)
        except Refusal as refusal:
            code = 503 if refusal.code in (408, 429) else refusal.code
            response = PlainTextResponse(f"{refusal}\n", code, _retry_after(refusal))
        self._telemetry.write_answered(response.status_code, monotonic() - started)
        return response

    async def _in_turn(self, work: Callable[[bytes], Answer], body: bytes) -> Answer:
        """Run the work in a worker thread, once it may."""
        if self._n_pending >= self._settings.max_pending_posts:
            raise Refusal(503, "too many requests at work", retry_after_s=1)
        self._n_pending += 1
        try:
            await self._wait_for_the_sweep()
            return await asyncio.get_running_loop().run_in_executor(self._workers, work, body)
        finally:
            self._n_pending -= 1

    async def _wait_for_the_sweep(self) -> None:
        deadline = monotonic() + self._settings.hold_s
        while self._is_held():
            if monotonic() >= deadline:
                raise Refusal(429, "a sweep or a training goes first (data clock)", retry_after_s=1)
            await asyncio.sleep(_HOLD_STEP_S)

    def _take_json(self, body: bytes) -> bytes:
        """Decode, check and store; runs in a worker thread."""
        columns = self._json.read(body)
        if columns is not None:
            return self._take(columns)
        records = records_in(body)
        self._json.learn(body, records)
        return self._take(records)

    def _take_arrow(self, body: bytes) -> bytes:
        """Do the same with an Arrow stream."""
        try:
            columns = read_columns(body)
        except BadData as error:
            raise Refusal(422, str(error)) from error
        return self._take(RowsOf(columns))

    def _take(self, raw: Sequence[object]) -> bytes:
        with _storage_refusals():
            receipt = self._intake.take(raw)
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

    def _take_write(self, body: bytes) -> str:
        """Decode, derive records and store them; return what was wrong with some of the samples."""
        if self._writes is None:
            raise Refusal(404, "remote-write is not taken here")
        try:
            with _storage_refusals():
                receipt = self._writes.take(body)
        except BodyTooLarge as error:
            raise Refusal(413, str(error)) from error
        except BadData as error:
            raise Refusal(400, str(error)) from error
        self._telemetry.samples_taken(receipt.samples)
        self._telemetry.records_taken(receipt.n_records, receipt.reasons, 0)
        return "; ".join(receipt.problems)


@contextmanager
def _storage_refusals() -> Iterator[None]:
    """Answer for a disk that does not take records; such a request can be repeated."""
    try:
        yield
    except StorageFull as error:
        raise Refusal(507, str(error)) from error
    except StorageBroken as error:
        raise Refusal(503, str(error), retry_after_s=5) from error


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _retry_after(refusal: Refusal) -> dict[str, str] | None:
    return {"Retry-After": str(refusal.retry_after_s)} if refusal.retry_after_s else None
