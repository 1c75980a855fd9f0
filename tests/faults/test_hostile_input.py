"""Sixty-odd kinds of bad bodies, seventy of bad records, and clients that misbehave on the wire,
against one real daemon that has to answer each as documented, stay alive and stay small."""

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import requests
from hostile_cases import BODIES, GOOD, ODD_BUT_FINE, RECORDS, VALID, Body, Record, body_of, spelled
from programs import InferenceDaemon, wait_for

from fleetcast.clock import iso_z

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceDaemon]:
    with InferenceDaemon(tmp_path_factory.mktemp("hostile")) as running:
        yield running
        assert running.process.poll() is None, running.output


def _times() -> dict[str, str]:
    now = datetime.now(UTC)
    return {
        "now": iso_z(now),
        "now_east": now.astimezone(timezone(timedelta(hours=14))).isoformat(),
        "tomorrow": iso_z(now + timedelta(days=1)),
        "too_old": iso_z(now - timedelta(days=61)),
    }


def _post(daemon: InferenceDaemon, data: bytes, **headers: str) -> requests.Response:
    return requests.post(
        f"{daemon.url}/feed/data",
        data=spelled(data, _times()),
        headers={"Content-Type": "application/json", **headers},
        timeout=60,
    )


def test_there_are_at_least_sixty_kinds_of_bad_bodies_and_records() -> None:
    assert len({case.name for case in BODIES}) == len(BODIES)
    assert len({case.name for case in RECORDS}) == len(RECORDS)
    assert len(BODIES) + len(RECORDS) >= 60


@pytest.mark.parametrize("case", BODIES, ids=lambda case: case.name)
def test_a_bad_body_gets_its_documented_answer(daemon: InferenceDaemon, case: Body) -> None:
    answer = _post(daemon, case.data, **case.headers)

    assert answer.status_code == case.status, answer.text[:300]
    assert case.says in answer.json()["detail"]
    assert len(answer.content) < 1_000


@pytest.mark.parametrize("case", RECORDS, ids=lambda case: case.name)
def test_a_bad_record_is_named_and_costs_no_other(daemon: InferenceDaemon, case: Record) -> None:
    answer = _post(daemon, body_of([GOOD, case.json, GOOD]))

    assert answer.status_code == 200, answer.text[:300]
    body = answer.json()
    assert (body["records_received"], body["records_rejected"]) == (2, 1)
    (error,) = body["errors"]
    assert error["index"] == 1
    assert error["field"].startswith(case.field)
    assert case.says in error["reason"]
    assert len(answer.content) < 1_000


@pytest.mark.parametrize("name", ODD_BUT_FINE)
def test_what_only_looks_wrong_is_taken(daemon: InferenceDaemon, name: str) -> None:
    answer = _post(daemon, body_of([ODD_BUT_FINE[name]]))

    assert answer.status_code == 200, answer.text[:300]
    assert answer.json()["records_received"] == 1


def test_another_content_type_is_no_reason_to_refuse_json(daemon: InferenceDaemon) -> None:
    assert _post(daemon, VALID, **{"Content-Type": "text/plain; charset=x"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/feed/data", 405),
        ("PUT", "/feed/data", 405),
        ("DELETE", "/predictions/current", 405),
        ("GET", "/predictions/../../../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/predictions/current?server=nobody", 404),
        ("GET", "/predictions/current?fields=everything", 422),
        ("GET", "/predictions/current?server=%00%0d%0aX-Forged:1", 404),
    ],
)
def test_a_wrong_route_is_refused(daemon: InferenceDaemon, method: str, path: str, status: int) -> None:
    answer = requests.request(method, daemon.url + path, timeout=20)

    assert answer.status_code == status
    assert "X-Forged" not in answer.headers


def _on_the_wire(daemon: InferenceDaemon, data: bytes, wait_s: float = 10.0) -> bytes:
    """Return what the daemon answers to raw bytes, b"" when it just closes."""
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=wait_s) as wire:
        wire.sendall(data)
        try:
            return wire.recv(65_536)
        except ConnectionResetError:
            return b""


_POST = b"POST /feed/data HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    ("name", "data", "status"),
    [
        ("no HTTP at all", b"\x00\x01\x02 hello \xff\r\n\r\n", b"400"),
        ("a TLS handshake", bytes.fromhex("16030100c8010000c40303") + b"\0" * 200, b"400"),
        ("a negative length", _POST + b"Content-Length: -5\r\n\r\n", b"400"),
        ("a length that is no number", _POST + b"Content-Length: ten\r\n\r\n", b"400"),
        ("two lengths", _POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", b"400"),
        ("a chunk of no size", _POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        ("a length beyond the limit", _POST + b"Content-Length: 10000000000000\r\n\r\n{", b"413"),
        ("a header that never ends", b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000, b"4"),
        ("a header with a NUL", b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n", b"400"),
    ],
)
def test_bytes_that_are_no_request_are_refused(
    daemon: InferenceDaemon, name: str, data: bytes, status: bytes
) -> None:
    answer = _on_the_wire(daemon, data)

    assert answer == b"" or answer.startswith(b"HTTP/1.1 " + status), (name, answer[:100])
    assert _post(daemon, VALID).status_code == 200


def test_a_sender_that_goes_away_mid_body_leaves_nothing_behind(daemon: InferenceDaemon) -> None:
    before = daemon.n_files
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", daemon.port)) as wire:
            wire.sendall(_POST + b'Content-Length: 1000\r\n\r\n{"records": [')

    wait_for("the connections to be closed", lambda: daemon.n_files <= before + 2, 10)
    assert _post(daemon, VALID).status_code == 200


def test_a_hundred_slow_senders_do_not_slow_the_others(daemon: InferenceDaemon) -> None:
    wires = [socket.create_connection(("127.0.0.1", daemon.port)) for _ in range(100)]
    try:
        for number, wire in enumerate(wires):
            wire.sendall(_POST + (b"Content-Length: 500\r\n\r\n" if number % 2 else b"X-Slow: "))
        for _ in range(20):
            for wire in wires:
                wire.sendall(b" ")
            assert _post(daemon, VALID).status_code == 200
    finally:
        for wire in wires:
            wire.close()


def test_a_burst_beyond_what_may_wait_is_told_to_come_back(daemon: InferenceDaemon) -> None:
    answers: list[requests.Response] = []

    def send() -> None:
        answers.append(_post(daemon, VALID))

    threads = [threading.Thread(target=send) for _ in range(150)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {answer.status_code for answer in answers} <= {200, 503}
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in answers if answer.status_code == 503)
    assert any(answer.status_code == 200 for answer in answers)


def _fleet(first: int, count: int) -> bytes:
    now = iso_z(datetime.now(UTC))
    rows = [
        {"timestamp": now, "server_name": f"new-{n}", "cpu_pct": 1.0} for n in range(first, first + count)
    ]
    return json.dumps({"records": rows}).encode()


def _typical_growth(daemon: InferenceDaemon, act: Callable[[], None], times: int) -> float:
    """The median growth in bytes, each between two moments without a sweep: one of 20,000 servers takes tens
    of megabytes for up to a minute of a slow machine."""
    growths: list[int] = []
    for _ in range(3 * times):
        wait_for("the sweep", lambda: daemon.status()["backlog"] == 0, 240)
        n_sweeps, before = daemon.status()["sweep"]["count"], daemon.memory_bytes
        act()
        growth, after = daemon.memory_bytes - before, daemon.status()
        if not after["backlog"] and after["sweep"]["count"] == n_sweeps:
            growths.append(growth)
        if len(growths) == times:
            return median(growths)
    raise AssertionError(f"a sweep fell into all but {len(growths)} of {3 * times} times")


def test_a_hundred_thousand_new_server_names_stop_at_the_limit_and_memory_stays_flat(
    daemon: InferenceDaemon,
) -> None:
    sent = received = rejected = 0
    reasons: list[str] = []

    def send() -> None:
        nonlocal sent, received, rejected
        first, sent = sent, sent + 5_000
        answer = _post(daemon, _fleet(first, 5_000)).json()
        received, rejected = received + answer["records_received"], rejected + answer["records_rejected"]
        reasons.extend(error["reason"] for error in answer.get("errors", ()))

    for _ in range(10):
        send()
    growth = _typical_growth(daemon, send, 10)

    assert received + rejected == sent >= 100_000
    assert 19_000 <= received <= 20_000
    assert "limit of 20000 servers" in reasons[-1]
    assert growth < 6e6


def test_memory_and_handles_stay_flat_under_more_of_it(daemon: InferenceDaemon) -> None:
    def storm() -> None:
        for case in BODIES:
            _post(daemon, case.data, **case.headers)
        for record in RECORDS:
            _post(daemon, body_of([record.json] * 50))

    storm()
    handles = daemon.n_files

    assert _typical_growth(daemon, storm, 5) < 10e6
    assert daemon.n_files - handles <= 5


def test_the_quarantine_of_rejected_records_stays_bounded(daemon: InferenceDaemon) -> None:
    kept = list((daemon.folder / "data_buffer").glob("quarantine.jsonl*"))

    assert kept
    assert sum(path.stat().st_size for path in kept) <= 5_000_000


def test_no_sender_can_forge_a_line_of_the_log(daemon: InferenceDaemon) -> None:
    log = (daemon.folder / "inference_daemon.log").read_text()

    for line in log.splitlines():
        assert re.match(r"\d{4}-\d\d-\d\dT[\d:.]+Z (DEBUG|INFO|WARNING|ERROR) [\w.]+: ", line), line
    assert "forged" not in {line.split(" ")[2].rstrip(":") for line in log.splitlines()}
    assert "\x1b" not in log


def test_no_server_name_can_forge_a_sample(daemon: InferenceDaemon) -> None:
    text = requests.get(f"{daemon.url}/metrics", timeout=20).text
    promtool = shutil.which("promtool")

    samples = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r'[a-z_]+(\{([a-z_]+="([^"\\]|\\.)*",?)*\})? \S+', line) for line in samples)
    assert all(line.startswith(("fleetcast_", "process_", "python_")) for line in samples)
    if promtool:
        done = subprocess.run(
            [promtool, "check", "metrics"], input=text, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_rejection_is_counted_under_the_name_of_a_rule(daemon: InferenceDaemon) -> None:
    text = requests.get(f"{daemon.url}/metrics", timeout=20).text

    reasons = set(re.findall(r'fleetcast_records_rejected_total\{reason="(\w+)"\}', text))
    assert {"time_format", "time_in_future", "time_too_old", "server_name", "not_finite"} <= reasons
    assert 'fleetcast_records_rejected_total{reason="other"} 0.0' in text, (
        "a refusal without a rule of its own"
    )


def test_generated_requests_never_make_the_interface_break_its_own_description(
    daemon: InferenceDaemon, tmp_path: Path
) -> None:
    """The daemon's OpenAPI, held against the daemon by schemathesis."""
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")), "run", f"{daemon.url}/openapi.json",
            "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,"
            "response_schema_conformance",
            "--exclude-path", "/api/v1/write",  # protobuf: benchmarks/ingest/fuzz_ingest.py
            "--max-examples", "25", "--seed", "7", "--workers", "1", "--no-color",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout[-4_000:] + done.stderr[-2_000:]


def test_after_all_of_this_an_honest_client_is_served(daemon: InferenceDaemon) -> None:
    answer: dict[str, Any] = _post(daemon, VALID).json()
    assert answer["records_received"] == 1

    started = time.monotonic()
    assert requests.get(f"{daemon.url}/predictions/current?fields=current", timeout=20).status_code == 200
    assert time.monotonic() - started < 10
