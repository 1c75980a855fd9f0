"""Asking the inference daemon: what is learned, and that nothing hangs on it."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from told_daemon import Told

from fleetcast.errors import BadData, DaemonAway
from fleetcast.loop import Stop
from fleetcast.retraining.inquiry import FleetAhead, FleetLoad, Inquiry, fleet_ahead, fleet_load

FLEET = {"predictions": {"a": {"current": {"cpu_pct": 20.0, "mem_pct": 30.0}, "stale": False}}}


@pytest.fixture
def told() -> Iterator[Told]:
    with Told() as daemon:
        yield daemon


def test_the_version_in_service_and_the_process_are_learned(told: Told) -> None:
    told.answers["/status"] = {"pid": 77, "model": {"version": "v7"}}
    inquiry = Inquiry(told.url, 5.0)
    inquiry.look(Stop())
    assert (inquiry.served_version, inquiry.pids) == ("v7", (77,))


@pytest.mark.parametrize(
    "status",
    [{}, {"model": None, "pid": None}, {"model": "v1", "pid": "77"}, {"model": {"version": 3}, "pid": True}],
)
def test_what_the_status_does_not_say_stays_unknown(told: Told, status: dict[str, Any]) -> None:
    told.answers["/status"] = status
    inquiry = Inquiry(told.url, 5.0)
    inquiry.look(Stop())
    assert (inquiry.served_version, inquiry.pids) == (None, ())


def test_what_the_daemon_says_is_wrong_is_known_and_logged_once(
    told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    told.answers["/status"] = {"problems": ["No model serves: made for other bins", 7]}
    inquiry = Inquiry(told.url, 5.0)
    for _ in range(3):
        inquiry.look(Stop())
    assert inquiry.problems == ("No model serves: made for other bins", "7")
    assert sum("No model serves" in line.message for line in caplog.records) == 1
    told.answers["/status"] = {"problems": "none"}
    inquiry.look(Stop())
    assert inquiry.problems == ()
    told.close()
    inquiry.look(Stop())
    assert "it cannot be asked" in inquiry.problems[0]


def test_a_daemon_that_went_away_is_not_believed_any_longer(told: Told) -> None:
    told.answers["/status"] = {"pid": 77, "model": {"version": "v7"}}
    inquiry = Inquiry(told.url, 5.0)
    inquiry.look(Stop())
    told.close()
    inquiry.look(Stop())
    assert (inquiry.served_version, inquiry.pids) == (None, ())
    assert "does not answer" in inquiry.fleet(Stop()).away


def test_the_fleet_is_asked_for_its_current_values_only_and_with_the_key(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFT_API_KEY", "secret")
    told.answers["/predictions/current"] = FLEET
    assert Inquiry(told.url, 5.0).fleet(Stop()) == FleetLoad(1, 20.0, 30.0)
    assert (told.paths, told.keys) == (["/predictions/current?fields=current"], ["secret"])


def test_an_answer_of_another_shape_is_away(told: Told) -> None:
    told.answers["/predictions/current"] = {"predictions": 3}
    assert "another shape" in Inquiry(told.url, 5.0).fleet(Stop()).away


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", ""])
def test_an_address_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(BadData, match="must look like http://"):
        Inquiry(url, 5.0)


def test_a_daemon_that_hangs_does_not_hold_a_stop_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        inquiry, stop = Inquiry(f"http://127.0.0.1:{silent.getsockname()[1]}", 60.0), Stop()
        threading.Timer(0.2, stop.request, args=("a test",)).start()
        started = time.monotonic()
        assert inquiry.fleet(stop).away.endswith("was not waited for: a test")
        assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{"]
)
def test_an_answer_that_drips_for_ever_is_given_up(head: bytes) -> None:
    over = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection = listener.accept()[0]
        with connection:
            connection.sendall(head)
            while not over.wait(0.05):
                connection.sendall(b" ")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=drip, args=(listener,), daemon=True).start()
        inquiry, stop = Inquiry(f"http://127.0.0.1:{listener.getsockname()[1]}", 0.5), Stop()
        guard = threading.Timer(20, stop.request, args=("it hung",))
        guard.start()
        assert inquiry.fleet(stop).away.endswith("was not answered whole within 1 s")
        guard.cancel()
        over.set()


def server(stale: bool = False, **current: Any) -> dict[str, Any]:
    return {"current": current, "stale": stale}


def test_the_means_are_over_live_servers_that_send_the_metric() -> None:
    document = {
        "predictions": {
            "a": server(cpu_pct=10.0, mem_pct=40.0),
            "b": server(cpu_pct=30.0),
            "gone": server(stale=True, cpu_pct=99.0, mem_pct=99.0),
            "odd": server(cpu_pct=None, mem_pct="high"),
            "too long": server(cpu_pct=10**400, mem_pct=True),
        }
    }
    assert fleet_load(document) == FleetLoad(4, 20.0, 40.0)


def test_an_empty_fleet_has_no_means() -> None:
    assert fleet_load({"predictions": {}}) == FleetLoad(0, None, None)


@pytest.mark.parametrize("document", [{}, {"predictions": None}, {"predictions": [1]}])
def test_an_answer_of_another_shape_is_no_answer(document: dict[str, Any]) -> None:
    with pytest.raises(DaemonAway, match="another shape"):
        fleet_load(document)


AHEAD = {"start": "2026-03-02T10:05:00Z", "step_s": 3600.0, "cpu_pct": [20.0, 10.5], "mem_pct": [50, 51]}


def test_what_is_expected_of_the_fleet_is_learned_and_forgotten_with_the_daemon(told: Told) -> None:
    told.answers["/status"] = {"fleet_ahead": AHEAD}
    inquiry = Inquiry(told.url, 5.0)
    inquiry.look(Stop())
    ahead = inquiry.ahead
    assert (ahead.missing, ahead.n_steps, ahead.means["cpu_pct"]) == ("", 2, (20.0, 10.5))
    assert ahead.start_of(1) - ahead.start_of(0) == 3600.0
    assert fleet_ahead({"fleet_ahead": ahead.as_json()}) == ahead, "decisions.jsonl keeps it"
    told.close()
    inquiry.look(Stop())
    assert inquiry.ahead == FleetAhead()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (None, "says nothing"),
        ("soon", "says nothing"),
        ({"start": "soon"}, "something else than numbers"),
        ({"start": None}, "something else than numbers"),
        ({"start": "0001-01-01T00:00:00+14:00"}, "something else than numbers"),
        ({"step_s": 0}, "something else than numbers"),
        ({"step_s": "3600"}, "something else than numbers"),
        ({"step_s": 1e300}, "something else than numbers"),
        ({"cpu_pct": [20.0, float("nan")]}, "something else than numbers"),
        ({"cpu_pct": [20.0, float("-inf")]}, "something else than numbers"),
        ({"cpu_pct": [20.0, -1.0]}, "something else than numbers"),
        ({"cpu_pct": [20.0, True]}, "something else than numbers"),
        ({"cpu_pct": [20.0, [1]]}, "something else than numbers"),
        ({"cpu_pct": [20.0, 10**400]}, "something else than numbers"),
        ({"cpu_pct": 20.0}, "something else than numbers"),
        ({"cpu_pct": "20"}, "something else than numbers"),
        ({"cpu_pct": [20.0]}, "has 1, 2 hours"),
        ({"cpu_pct": [20.0] * 3}, "has 2, 3 hours"),
        ({"cpu_pct": [20.0], "mem_pct": [20.0]}, "has 1 hours"),
        ({"cpu_pct": [1.0] * 49, "mem_pct": None}, "has 49 hours"),
        ({"cpu_pct": None, "mem_pct": None}, "has no hours"),
    ],
)
def test_an_odd_forecast_of_the_fleet_is_none_and_said_in_words(change: Any, why: str) -> None:
    raw = {**AHEAD, **change} if isinstance(change, dict) else change
    found = fleet_ahead({"fleet_ahead": raw})
    assert why in found.missing
    assert (found.n_steps, found.as_json()) == (0, None)
