"""Validated, durable records per second and core, by form of the body; latency with 1 and 64 clients.

    .venv/bin/python -m benchmarks.ingest.ingest [--seconds 5]

One real daemon; its clients send over loopback from this process. "per core" divides by the CPU
seconds of the whole daemon process: HTTP, decoding, checking, rounding, the log's fdatasync and
the bins. Two rows of each form: with the log alone, and with flushes into day files as they come
by default. `records_per_path_s` is the ingest path alone in this process (no HTTP), with the log.
On shared cores the rates are lower bounds and the latencies upper ones.
"""

import argparse
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.ingest.parts import bodies
from benchmarks.programs import InferenceDaemon
from benchmarks.results_file import write_results
from data_buffer import DataBuffer
from fleetcast.api.bodies import read_records
from fleetcast.clock import SystemClock, to_ms
from fleetcast.ingest.arrow import read_columns
from fleetcast.ingest.columns import RowsOf
from fleetcast.ingest.json_records import JsonRecords
from fleetcast.ingest.records import RecordRules, accept
from fleetcast.serving.intake import Receipt
from fleetcast.serving.writes import WriteIntake
from fleetcast.settings import BufferSettings, RemoteWriteSettings

N_BODIES = 60
WARM_UP_S = 1.0
LOADER_LIMIT_S, AT_REST_CPU_S = 60.0, 0.03  # per half a second
_COME_AGAIN_S = 0.05  # before a refused post is sent again
NO_FLUSH = {"FLEETCAST_BUFFER_PUBLISH_RECORDS": "1000000000", "FLEETCAST_BUFFER_PUBLISH_S": "60"}
WRITE_HEADERS = "Content-Type: application/x-protobuf\r\nContent-Encoding: snappy"
Bodies = Callable[[int, int, int], Iterator[bytes]]


@dataclass(frozen=True)
class Form:
    """One way to send."""

    name: str
    path: str
    headers: str
    bodies: Bodies
    n_per_post: int  # records, or samples of remote-write
    records_per_item: float = 1.0


FORMS = (
    Form("json", "/feed/data", "Content-Type: application/json", bodies.json_bodies, 20),
    Form("json", "/feed/data", "Content-Type: application/json", bodies.json_bodies, 2000),
    Form("arrow", "/feed/data", f"Content-Type: {bodies.ARROW}", bodies.arrow_bodies, 2000),
    Form(
        "remote_write",
        "/api/v1/write",
        WRITE_HEADERS,
        bodies.write_bodies,
        2000,
        1 / bodies.samples_per_record(),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every form, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement")
    options = parser.parse_args(argv)
    rows = [figure for form in FORMS for figure in measured(form, options.seconds)]
    paths = [path_alone(form) for form in FORMS]
    print(
        f"{'form':<14}{'per post':>9}{'clients':>8}{'flush':>6}{'records/s/core':>16}"
        f"{'p50 ms':>9}{'p99 ms':>9}"
    )
    for row in rows:
        print(
            f"{row['form']:<14}{row['per_post']:>9}{row['clients']:>8}{'yes' if row['flushes'] else 'no':>6}"
            f"{row['records_per_core_s']:>16,}{row['p50_ms']:>9}{row['p99_ms']:>9}"
        )
    for row in paths:
        print(
            f"{row['form']:<14}{row['per_post']:>9}    path alone "
            f"{row['records_per_path_s']:>13,} records/s/core"
        )
    print(write_results("ingest", {"daemon": rows, "path": paths}))
    return 0


def measured(form: Form, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the figures of one form: 1 and 64 clients, without and with flushes."""
    requests = _requests(form, N_BODIES)
    for flushes, counts in ((False, (1, 64)), (True, (64,))):
        for n_clients in counts:
            folder = Path(tempfile.mkdtemp(prefix="fleetcast-ingest-"))
            with InferenceDaemon(folder, environ=None if flushes else NO_FLUSH) as daemon:
                _send(daemon.port, requests, n_clients, WARM_UP_S)
                process = psutil.Process(daemon.process.pid)
                _wait_for_the_loader(process)
                before = process.cpu_times()
                latencies = sorted(_send(daemon.port, requests, n_clients, seconds))
                after = process.cpu_times()
            shutil.rmtree(folder)
            cpu_s = after.user + after.system - before.user - before.system
            n_records = len(latencies) * form.n_per_post * form.records_per_item
            yield {
                "form": form.name,
                "per_post": form.n_per_post,
                "clients": n_clients,
                "flushes": flushes,
                "records_per_core_s": round(n_records / cpu_s),
                "items_per_core_s": round(n_records / form.records_per_item / cpu_s),
                "posts": len(latencies),
                "p50_ms": round(1000 * latencies[len(latencies) // 2], 2),
                "p99_ms": round(1000 * latencies[int(len(latencies) * 0.99)], 2),
            }


def _wait_for_the_loader(process: psutil.Process) -> None:
    """Return when the daemon is at rest: loading a model takes seconds of CPU that no record costs."""
    deadline = time.monotonic() + LOADER_LIMIT_S
    while time.monotonic() < deadline:
        before = process.cpu_times()
        time.sleep(0.5)
        after = process.cpu_times()
        if after.user + after.system - before.user - before.system < AT_REST_CPU_S:
            return


def path_alone(form: Form) -> dict[str, Any]:
    """Return the rate of decoding, checking and appending durably, by CPU time of this process."""
    folder = Path(tempfile.mkdtemp(prefix="fleetcast-ingest-"))
    buffer = DataBuffer(folder, settings=BufferSettings(publish_records=10**9))
    take = _path_of(form, buffer)
    bodies = list(form.bodies(to_ms(SystemClock().now()) - 60_000, N_BODIES, form.n_per_post))
    for body in bodies[:10]:
        take(body)
    best_s = float("inf")
    for start in range(10, N_BODIES, 10):
        before = time.process_time()
        for body in bodies[start : start + 10]:
            take(body)
        best_s = min(best_s, (time.process_time() - before) / 10)
    buffer.close()
    shutil.rmtree(folder)
    rate = form.n_per_post * form.records_per_item / best_s
    return {"form": form.name, "per_post": form.n_per_post, "records_per_path_s": round(rate)}


def _path_of(form: Form, buffer: DataBuffer) -> Callable[[bytes], object]:
    rules = RecordRules.at(SystemClock().now(), BufferSettings())
    shapes = JsonRecords()

    def store(raw: Sequence[object]) -> Receipt:
        accepted = accept(raw, rules)
        buffer.append_batch(accepted.batch)
        return Receipt(len(accepted.batch), (), 0)

    def take_json(body: bytes) -> object:
        columns = shapes.read(body)
        if columns is not None:
            return store(columns)
        records = read_records(body)
        shapes.learn(body, records)
        return store(records)

    if form.name == "json":
        return take_json
    if form.name == "arrow":
        return lambda body: store(RowsOf(read_columns(body)))
    return WriteIntake(RemoteWriteSettings(), store, lambda: rules).take


def _requests(form: Form, n_bodies: int) -> list[bytes]:
    now_ms = to_ms(SystemClock().now())
    requests = []
    for body in form.bodies(now_ms, n_bodies, form.n_per_post):
        head = (
            f"POST {form.path} HTTP/1.1\r\nHost: localhost\r\n{form.headers}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        requests.append(head.encode() + body)
    return requests


def _send(port: int, requests: list[bytes], n_clients: int, seconds: float) -> list[float]:
    """Send from so many connections at once, each waiting for its answer; return the latencies.

    A client that is told to come again waits and does; of large posts the daemon takes 16 at a time.
    """
    latencies: list[float] = []
    deadline = time.monotonic() + seconds

    def client(number: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as wire:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            place = number
            while time.monotonic() < deadline:
                started = time.monotonic()
                wire.sendall(requests[place % len(requests)])
                if not read_answer(wire):
                    time.sleep(_COME_AGAIN_S)
                    continue
                latencies.append(time.monotonic() - started)
                place += n_clients

    threads = [threading.Thread(target=client, args=(number,)) for number in range(n_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies


def read_answer(wire: socket.socket) -> bool:
    """Read one answer to its end; return whether the records were taken, and not refused for now."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += wire.recv(65536)
    head, _, rest = answer.partition(b"\r\n\r\n")
    if not head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 204", b"HTTP/1.1 429", b"HTTP/1.1 503")):
        raise AssertionError(answer[:500])
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            n_missing = int(line.split(b":")[1]) - len(rest)
            while n_missing > 0:
                n_missing -= len(wire.recv(65536))
    return head.startswith(b"HTTP/1.1 2")


if __name__ == "__main__":
    raise SystemExit(main())
