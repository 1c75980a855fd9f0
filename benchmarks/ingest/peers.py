"""What does a sample cost here, and in the receivers that a user would pick instead?

    .venv/bin/python -m benchmarks.ingest.peers [--data FOLDER] [--days 7] [--posts 300]

Every receiver takes the same bodies, one receiver after the other in one run: node_exporter's series and
recorded fleets by remote-write at 2,000 samples a post, and rows at 20 a post (ours as JSON, others as
line protocol, a Prometheus the same values by remote-write). CPU is of the whole process per million
samples, while it is fed and until it is at rest again; bytes are what its folder takes after it has
stopped; memory is resident at rest. Ours and InfluxDB's rows are durable before the answer, the others'
are not. Of node_exporter's 20 series a server, ours keeps the 7 metrics that its rules make. The recorded
fleets (`--data`: Parquet files of `timestamp`, `server_name` and metrics) end at this moment and go in at
full speed: a backfill. On a machine with other work only the ratios of one run mean something. "n/a" is a
program that is not installed.
"""

import argparse
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.ingest.ingest import read_answer
from benchmarks.ingest.parts import bodies
from benchmarks.ingest.parts.receivers import OURS, RECEIVERS, WRITE_HEADERS, Receiver, folder_bytes, run
from benchmarks.results_file import write_results
from fleetcast.clock import SystemClock, to_ms

PER_POST, ROWS_PER_POST = 2000, 20
RECORDED = ("smd_1min", "bitbrains_5min")
WARM_UP_POSTS = 48  # whole rounds of the clients: each sends its servers in order
FIGURES = ("cpu_s_fed", "cpu_s_in_all", "p50_ms", "p99_ms", "bytes_a_sample", "memory_mb")


@dataclass(frozen=True)
class Load:
    """Bodies for every kind of receiver; each post holds `n_samples`."""

    name: str
    make: Callable[[Receiver], Iterator[bytes] | None]
    n_samples: int
    n_clients: int = 1
    rules: Sequence[str] = ()
    are_rows: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every receiver under every load, print the ratios, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, help="folder of the recorded fleets; without it they are left out"
    )
    parser.add_argument("--days", type=float, default=7.0, help="of each recorded fleet")
    parser.add_argument("--posts", type=int, default=300, help="of each made load")
    parser.add_argument("--only", action="append", help="name of a receiver; without it, all of them")
    options = parser.parse_args(argv)
    rows = []
    for load in loads(options.data, options.days, options.posts):
        ours: Mapping[str, Any] = {}
        for receiver in [one for one in RECEIVERS if one.name in (options.only or [one.name])]:
            row = measure(load, receiver)
            ours = row if receiver is OURS else ours
            rows.append(row)
            print(_line(row, ours), flush=True)
    print(write_results("ingest_peers", {"days": options.days, "posts": options.posts, "rows": rows}))
    return 0


def loads(data: Path | None, days: float, n_posts: int) -> Iterator[Load]:
    """Yield what is sent."""
    now_ms = to_ms(SystemClock().now()) - 60_000
    made = partial(bodies.write_bodies, now_ms, n_posts, PER_POST)
    yield Load("remote-write, node_exporter", lambda _: made(), PER_POST)
    for name in RECORDED if data else ():
        assert data is not None
        recorded = bodies.Recorded(data / f"{name}.parquet", days, to_ms(SystemClock().now()))
        yield Load(
            f"remote-write, backfill of {name}",
            lambda _, one=recorded: one.write_bodies(PER_POST),  # type: ignore[misc]
            PER_POST,
            rules=recorded.rules(),
        )
    for n_clients in (1, 16):
        rows = partial(_rows, now_ms, n_posts * (4 if n_clients == 1 else 16), n_clients)
        n_samples = ROWS_PER_POST * len(bodies.METRICS)
        yield Load(f"{ROWS_PER_POST} rows a post", rows, n_samples, n_clients, are_rows=True)


def _rows(first_ms: int, n_posts: int, n_clients: int, receiver: Receiver) -> Iterator[bytes]:
    """Yield the same rows in the form that a receiver takes."""
    form = receiver.rows_form if receiver.rows_path else "write"
    return bodies.small_bodies(form, first_ms, n_posts, ROWS_PER_POST, n_clients)


def measure(load: Load, receiver: Receiver) -> dict[str, Any]:
    """Return the figures of one receiver under one load; without them it is n/a."""
    row: dict[str, Any] = {"load": load.name, "clients": load.n_clients, "receiver": receiver.name}
    made = load.make(receiver) if receiver.is_installed else None
    if made is None:
        return row
    requests = _requests(load, receiver, made)
    warm_up, timed = requests[:WARM_UP_POSTS], requests[WARM_UP_POSTS:]
    n_samples = load.n_samples * len(timed)
    folder = Path(tempfile.mkdtemp(prefix="fleetcast-peers-"))
    with run(receiver, folder, load.rules) as running:
        _send(running.port, warm_up, 1)
        before_s = running.cpu_s
        latencies = sorted(_send(running.port, timed, load.n_clients))
        fed_s = running.cpu_s - before_s
        running.settle()
        in_all_s = running.cpu_s - before_s
        memory_mb = running.memory_mb
    row |= {
        "samples": n_samples,
        "cpu_s_fed": round(fed_s / n_samples * 1e6, 3),
        "cpu_s_in_all": round(in_all_s / n_samples * 1e6, 3),
        "p50_ms": round(1000 * latencies[len(latencies) // 2], 2),
        "p99_ms": round(1000 * latencies[int(len(latencies) * 0.99)], 2),
        "bytes_a_sample": round(folder_bytes(folder) / (load.n_samples * len(requests)), 2),
        "memory_mb": round(memory_mb),
    }
    shutil.rmtree(folder)
    return row


def _requests(load: Load, receiver: Receiver, made: Iterator[bytes]) -> list[bytes]:
    takes_rows = load.are_rows and receiver.rows_path
    path = receiver.rows_path if takes_rows else receiver.write_path
    headers = WRITE_HEADERS if not takes_rows else "Content-Type: application/json"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\nContent-Length: "
    return [f"{head}{len(body)}\r\n\r\n".encode() + body for body in made]


def _send(port: int, requests: Sequence[bytes], n_clients: int) -> list[float]:
    """Send every request once, from so many connections; return the latencies."""

    def client(number: int) -> list[float]:
        latencies = []
        with socket.create_connection(("127.0.0.1", port)) as wire:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for request in requests[number::n_clients]:
                started = time.monotonic()
                wire.sendall(request)
                assert read_answer(wire), "refused for now: its cost would be counted, and its rows would not"
                latencies.append(time.monotonic() - started)
        return latencies

    with ThreadPoolExecutor(n_clients) as clients:
        return [one for some in clients.map(client, range(n_clients)) for one in some]


def _line(row: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    head = f"{row['load']:<44}{row['clients']:>3}  {row['receiver']:<18}"
    if "samples" not in row:
        return head + "n/a"
    cells = [f"{name} {row[name]:>7}{_ratio(row[name], ours.get(name))}" for name in FIGURES]
    return head + "  ".join(cells)


def _ratio(figure: float, ours: float | None) -> str:
    return f" ({figure / ours:.2f})" if ours else ""


if __name__ == "__main__":
    raise SystemExit(main())
