"""The routes about which model is in service: what there is, what stands, and people's orders.

Owns: these paths, their status codes, and that an order needs a configured key: without one any program
on this host could give orders, so the answer is 403, on loopback too. Does not know: how an order is
carried out. This daemon only writes it down; the retraining daemon takes it up within seconds, and any
`fleetcast` command at once.
"""

import hashlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from starlette.concurrency import run_in_threadpool

from fleetcast.api.bodies import BodyReader, Refusal, encode
from fleetcast.api.feed import JSON, Door
from fleetcast.api.server import OBJECT, answers, only, require_key
from fleetcast.clock import SystemClock
from fleetcast.errors import BadOrder, StorageBroken, StorageFull
from fleetcast.promotion import orders
from fleetcast.promotion.audit import APPROVE, ROLLBACK
from fleetcast.promotion.bake import report
from fleetcast.promotion.desk import Desk
from fleetcast.promotion.orders import Order
from fleetcast.settings import PromotionSettings

NO_KEY = "orders need a configured key: set TFT_API_KEY, or use the fleetcast command on this host"
_FIELDS = ("reason", "by", "version", "to", "until", "force")
_WHO = 40  # characters of a name; the key's fingerprint stands beside it
_ORDER: dict[str, Any] = {
    "type": "object",
    "required": ["reason"],
    "properties": {
        "reason": {"type": "string", "maxLength": orders.MAX_REASON},
        "by": {"type": "string", "maxLength": _WHO, "description": "who asks, for the audit"},
        "version": {
            "type": "string",
            "description": "promote, approve, veto: which; rollback: which was seen in service (else 409)",
        },
        "to": {"type": "string", "description": "rollback: back to which; absent: the previous one"},
        "until": {"type": "string", "format": "date-time", "description": "pause: its end"},
        "force": {"type": "boolean", "description": "promote and train-now: all the same"},
    },
    "additionalProperties": False,
}
_GIVEN = {
    "type": "object",
    "required": ["order"],
    "properties": {"order": {"type": "string", "description": "its id, as the history shows it"}},
}


def add_promotion(app: FastAPI, desk: Desk, settings: PromotionSettings, door: Door, api_key: str) -> None:
    """Add the routes to an application of `create_app`."""
    app.include_router(_routes(_Orders(desk, api_key), settings, require_key(door)))


def _routes(
    given: "_Orders", settings: PromotionSettings, guard: Callable[..., Awaitable[None]]
) -> APIRouter:
    router = APIRouter(dependencies=[Depends(guard), Depends(only())])
    desk = given.desk

    @router.get("/models", responses=answers(OBJECT, e401="wrong or missing key"))
    def models() -> Response:
        """List the versions, their roles and verdicts."""
        return Response(encode(desk.models()), media_type=JSON)

    @router.get("/promotion", responses=answers(OBJECT, e401="wrong or missing key"))
    def promotion() -> Response:
        """Say what people hold or pause, which version waits or is baked, and what happened."""
        told = {**report(desk, settings), "no_orders": given.why_not}
        return Response(encode(told), media_type=JSON)

    described: dict[int | str, dict[str, Any]] = answers(
        OBJECT,
        e401="wrong or missing key",
        e403="no key is configured",
        e408="the body did not arrive in time",
        e409="another version is meant by now",
        e413="the body is too large",
        e422="not an order",
        e507="the disk is full: nothing was ordered",
    )
    del described[200]
    described[202] = {"description": "written down", "content": {JSON: {"schema": _GIVEN}}}
    for kind in orders.KINDS:
        router.add_api_route(
            f"/promotion/{kind}",
            given.door(kind),
            methods=["POST"],
            status_code=202,
            response_class=Response,
            responses=described,
            name=f"order_{kind}",
            openapi_extra={"requestBody": {"required": True, "content": {JSON: {"schema": _ORDER}}}},
        )
    return router


class _Orders:
    """Writes down what requests ask for."""

    def __init__(self, desk: Desk, api_key: str) -> None:
        self.desk = desk
        self._fingerprint = hashlib.sha256(api_key.encode()).hexdigest()[:8] if api_key else ""
        self._bodies = BodyReader(orders.MAX_BYTES)

    @property
    def why_not(self) -> str | None:
        """Return why no order is taken, None where they are."""
        return None if self._fingerprint else NO_KEY

    def door(self, kind: str) -> Callable[[Request], Awaitable[Response]]:
        """Return what answers one kind of order."""

        async def give(request: Request) -> Response:
            """Write an order down; the retraining daemon carries it out within seconds."""
            if self.why_not:
                raise HTTPException(403, self.why_not)
            try:
                async with self._bodies.read(request) as body:
                    order = self._order(kind, _fields(body))
            except Refusal as refusal:
                is_large = f"an order has at most {orders.MAX_BYTES} bytes" if refusal.code == 413 else ""
                raise HTTPException(refusal.code, is_large or str(refusal)) from refusal
            except BadOrder as error:
                raise HTTPException(422, str(error)) from error
            stale = await run_in_threadpool(self._submit, order)
            if stale:
                raise HTTPException(409, stale)
            return Response(encode({"order": order.id}), 202, media_type=JSON)

        return give

    def _order(self, kind: str, raw: dict[str, Any]) -> Order:
        by = raw.pop("by", None)
        if by is not None and not (isinstance(by, str) and len(by) <= _WHO):
            raise BadOrder(f"by must be a name of at most {_WHO} characters")
        who = f"{by}, key {self._fingerprint}" if by else f"key {self._fingerprint}"
        target = raw.pop("to", None)
        if kind == ROLLBACK:
            raw["champion"], raw["version"] = raw.pop("version", None), target
        elif target is not None:
            raise BadOrder("only rollback takes to")
        return orders.new_order(kind, raw.pop("reason", None), who, SystemClock().now(), **raw)

    def _submit(self, order: Order) -> str:
        """Write an order down; return why it is not what is meant now, or ""."""
        stale = self._why_stale(order)
        if stale:
            return stale
        try:
            orders.submit(self.desk.folder, order)
        except BadOrder as error:
            raise HTTPException(503, str(error)) from error
        except (StorageFull, StorageBroken) as error:
            raise HTTPException(507, str(error)) from error
        return ""

    def _why_stale(self, order: Order) -> str:
        current, waiting = self.desk.registry.current_id(), self.desk.standing().waiting
        if order.champion not in (None, current):
            return f"{current} is in service now, not {order.champion}"
        if order.version is not None and order.version not in self.desk.registry.version_ids():
            return f"there is no version {order.version}"
        if order.kind == APPROVE and (waiting is None or waiting.version != order.version):
            return f"{waiting.version if waiting else 'no version'} waits for approval, not {order.version}"
        return ""


def _fields(body: bytes) -> dict[str, Any]:
    """Return the fields of an order.

    Raises:
        BadOrder: the body is no object of these fields.
    """
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadOrder("the body must be a JSON object with a reason") from error
    if not isinstance(raw, dict):
        raise BadOrder("the body must be a JSON object with a reason")
    unknown = [name for name in raw if name not in _FIELDS]
    if unknown:
        raise BadOrder(f"unknown field {ascii(unknown[0])[:60]}: an order has {', '.join(_FIELDS)}")
    return {name: value for name, value in raw.items() if value is not None}
