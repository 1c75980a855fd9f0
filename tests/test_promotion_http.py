"""People's orders over HTTP: a configured key or 403, what a stale page gets, what is only written down."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from desk_folder import STATES, WAITS, A, B, C, desk_of
from prometheus_client import CollectorRegistry
from test_server import Daemon

from fleetcast.api.feed import Door, create_front
from fleetcast.api.listener import HttpListener
from fleetcast.api.promotion import add_promotion
from fleetcast.api.server import create_app
from fleetcast.clock import FakeClock
from fleetcast.forecast.registry import Registry
from fleetcast.promotion import orders
from fleetcast.promotion.bake import read_evidence, write_evidence
from fleetcast.promotion.desk import Desk
from fleetcast.promotion.evidence import Block
from fleetcast.promotion.orders import Order
from fleetcast.serving.telemetry import Telemetry
from fleetcast.settings import PromotionSettings, ServerSettings

KEY = "correct horse"
WITH_KEY = {"X-API-Key": KEY}


@contextmanager
def client_of(folder: Path, api_key: str) -> Iterator[httpx.Client]:
    parts: Any = Daemon()
    telemetry, listener = Telemetry(CollectorRegistry(), FakeClock()), HttpListener("127.0.0.1", 0)
    app = create_app(parts, parts, telemetry, ServerSettings(), api_key)
    door = Door(api_key, telemetry)
    add_promotion(app, Desk(Registry(folder)), PromotionSettings(), door, api_key)
    front = create_front(parts, parts.is_held, telemetry, ServerSettings(), api_key)
    front.open(app)
    listener.start(front, 5.0)
    with httpx.Client(base_url=listener.url, trust_env=False) as client:
        yield client
    assert listener.stop(10.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    STATES["waiting"](tmp_path)
    return tmp_path


@pytest.fixture
def client(folder: Path) -> Iterator[httpx.Client]:
    with client_of(folder, KEY) as client:
        client.headers.update(WITH_KEY)
        yield client


def waiting(folder: Path) -> list[Order]:
    return [item for _, item in orders.waiting(folder) if isinstance(item, Order)]


@pytest.mark.parametrize("kind", orders.KINDS)
def test_without_a_configured_key_no_order_is_taken(kind: str, folder: Path) -> None:
    with client_of(folder, "") as client:
        answer = client.post(f"/promotion/{kind}", json={"reason": "x", "version": WAITS})
        assert answer.status_code == 403
        assert "TFT_API_KEY" in answer.json()["detail"]
        assert client.get("/models").status_code == 200
    assert waiting(folder) == []


@pytest.mark.parametrize("path", ["/models", "/promotion"])
def test_a_wrong_key_sees_and_orders_nothing(path: str, client: httpx.Client, folder: Path) -> None:
    client.headers["X-API-Key"] = "wrong"
    assert client.get(path).status_code == 401
    assert client.post("/promotion/hold", json={"reason": "x"}).status_code == 401
    assert waiting(folder) == []


def test_an_order_is_written_down_with_who_gave_it(client: httpx.Client, folder: Path) -> None:
    answer = client.post("/promotion/rollback", json={"reason": "nights", "by": "ann", "version": C})
    assert answer.status_code == 202
    (found,) = waiting(folder)
    assert answer.json() == {"order": found.id}
    assert (found.kind, found.champion, found.version, found.reason) == ("rollback", C, None, "nights")
    assert found.by.startswith("ann, key ")
    assert KEY not in found.by
    # Then the next holder of the lock carries it out
    desk_of(folder).settle()
    assert Registry(folder).current_id() == B
    history = client.get("/promotion").json()["history"]
    assert (history[-1]["event"], history[-1]["phase"], history[-1]["order"]) == (
        "rollback",
        "done",
        found.id,
    )


def test_every_kind_of_order_can_be_given(client: httpx.Client, folder: Path) -> None:
    bodies: dict[str, dict[str, Any]] = {
        **{kind: {"version": WAITS} for kind in orders.NEED_VERSION},
        "pause": {"until": "2099-01-01T00:00Z"},
        "rollback": {"to": A},
        "train-now": {"force": True},
    }
    codes = {
        kind: client.post(f"/promotion/{kind}", json={"reason": "x", **bodies.get(kind, {})}).status_code
        for kind in orders.KINDS
    }
    assert codes == {**dict.fromkeys(orders.KINDS, 202), "pause": 422}  # 90 days at most
    assert {order.kind for order in waiting(folder)} == {*orders.KINDS} - {"pause"}


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        ("rollback", {"version": B}, "is in service now"),
        ("approve", {"version": A}, "waits for approval"),
        ("promote", {"version": "20260101T000000Z-0000"}, "there is no version"),
        ("veto", {"version": "20260101T000000Z-0000"}, "there is no version"),
        ("rollback", {"to": "20260101T000000Z-0000"}, "there is no version"),
    ],
)
def test_a_stale_page_gets_409(
    kind: str, body: dict[str, Any], said: str, client: httpx.Client, folder: Path
) -> None:
    answer = client.post(f"/promotion/{kind}", json={"reason": "x", **body})
    assert answer.status_code == 409
    assert said in answer.json()["detail"]
    assert waiting(folder) == []


@pytest.mark.parametrize(
    ("kind", "content", "code"),
    [
        ("hold", b"", 422),
        ("hold", b"{", 422),
        ("hold", b"[]", 422),
        ("hold", b"\xff", 422),
        ("hold", b"[" * 10_000, 422),
        ("hold", b'{"reason": 7}', 422),
        ("hold", b'{"reason": ""}', 422),
        ("hold", b'{"reason": "a\\u0000b"}', 422),
        ("hold", b'{"reason": "\\ud800"}', 422),
        ("hold", b'{"reason": "x", "shell": 1}', 422),
        ("hold", b'{"reason": "x", "by": "' + b"n" * 41 + b'"}', 422),
        ("hold", b'{"reason": "x", "to": "v"}', 422),
        ("pause", b'{"reason": "x", "until": "soon"}', 422),
        ("promote", b'{"reason": "x", "version": "../../x"}', 422),
        ("promote", b'{"reason": "x"}', 422),
        ("train-now", b'{"reason": "x", "force": "yes"}', 422),
        ("hold", json.dumps({"reason": "x" * 1_000_000}).encode(), 413),
    ],
)
def test_hostile_bodies_are_refused_and_leave_nothing(
    kind: str, content: bytes, code: int, client: httpx.Client, folder: Path
) -> None:
    answer = client.post(f"/promotion/{kind}", content=content)
    assert answer.status_code == code, answer.text
    assert len(answer.text) < 400
    assert waiting(folder) == []


def test_unknown_paths_and_query_fields_are_refused(client: httpx.Client) -> None:
    assert client.post("/promotion/dance", json={"reason": "x"}).status_code == 404
    assert client.get("/models?limit=3").status_code == 422
    assert client.get("/promotion/hold").status_code == 405


def test_too_many_orders_are_503(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "MAX_WAITING", 2)
    codes = [client.post("/promotion/hold", json={"reason": "x"}).status_code for _ in range(3)]
    assert codes == [202, 202, 503]


def test_models_and_promotion_say_what_stands(client: httpx.Client) -> None:
    models = client.get("/models").json()
    assert models["aliases"] == {"champion": C, "previous": B, "waiting": WAITS}
    promotion = client.get("/promotion").json()
    assert promotion["state"] == "held"
    assert promotion["held"]["why"] == "freeze"
    assert promotion["waiting"]["version"] == WAITS
    assert promotion["paused"] is None


def test_the_description_names_every_order(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {f"/promotion/{kind}" for kind in orders.KINDS} <= set(paths)
    assert set(paths["/promotion/hold"]["post"]["responses"]) >= {"202", "401", "403", "409", "413", "422"}
    assert "requestBody" in paths["/promotion/hold"]["post"]


def test_a_version_that_waits_is_told_with_its_race(folder: Path, client: httpx.Client) -> None:
    race = desk_of(folder).standing().race
    assert race is not None
    blocks = (Block("2026-01-15T10:00:00Z", 500, (0.97, 1.0), (0.97, 1.0)),) * 7
    write_evidence(folder, replace(read_evidence(folder, race), blocks=blocks))
    told = client.get("/promotion").json()
    assert told["race"]["version"] == WAITS
    assert told["race"]["figures"]["hours"] == 7
    assert told["race"]["figures"]["log10_e_better"] > 0
    last = told["history"][-1]["sentence"]
    assert last.endswith(f"{WAITS} passed the gate and waits: ann holds")
