"""Attacks on the inference daemon's port, each as a client that means harm.

    .venv/bin/python -m benchmarks.faults.parts.attacks NAME PORT

Owns: the bytes an attacker sends and for how long. A process of its own, so that the attacker's work
does not slow the clock that measures the daemon. Does not know: what the daemon should answer.
"""

import argparse
import contextlib
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from fleetcast.clock import iso_z, monotonic, sleep

SECONDS = 15.0  # how long an endless attack goes on
POST = b"POST /feed/data HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
N_SERVERS = 1000  # of the fleet that is asked for


def server_name(number: int) -> str:
    """Return the name of a server of the fleet under attack."""
    return f"attacked-{number:04d}"


def connect(port: int, receive_bytes: int = 0) -> socket.socket:
    """Return a connection, with a small receive buffer where its client means to read slowly."""
    wire = socket.socket()
    if receive_bytes:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    wire.settimeout(60)
    wire.connect(("127.0.0.1", port))
    return wire


def pour(port: int, head: bytes, piece: bytes, seconds: float = SECONDS) -> None:
    """Send `head`, then `piece` again and again; connect anew when the daemon ends it."""
    end = monotonic() + seconds
    while monotonic() < end:
        with contextlib.suppress(OSError), connect(port) as wire:
            wire.settimeout(2)
            wire.sendall(head)
            while monotonic() < end:
                wire.sendall(piece)
        sleep(0.005)


def at_once(n_threads: int, work: Callable[[], None]) -> None:
    """Run `work` in several threads and wait for all."""
    threads = [threading.Thread(target=work) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def send(port: int, body: bytes, head: bytes = POST) -> bytes:
    """Send one request and return the beginning of its answer."""
    with contextlib.suppress(OSError), connect(port) as wire:
        wire.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body))
        with contextlib.suppress(OSError):
            wire.sendall(body)
        return wire.recv(65_536)
    return b""


def trailers(port: int) -> None:
    """Fields after the last chunk, without end."""
    pour(port, CHUNKED + b"2\r\n{}\r\n0\r\n", b"x-trailer: " + b"t" * 200 + b"\r\n" + b"a:b\r\n" * 10_000)


def chunk_extensions(port: int) -> None:
    """An extension of a chunk that never ends, and small chunks with long ones."""
    pour(port, CHUNKED + b"5;name=", b"e" * 60_000, SECONDS / 2)
    pour(port, CHUNKED, (b"1;" + b"e" * 50_000 + b"\r\n{\r\n") * 2, SECONDS / 2)


def headers(port: int) -> None:
    """Request lines and headers without end, many small ones or one long one."""
    pour(port, b"GET /", b"u" * 60_000, SECONDS / 3)
    pour(port, POST + b"X: ", b"h" * 60_000, SECONDS / 3)
    pour(port, POST, b"a:b\r\n" * 12_000, SECONDS / 3)


def pipelines(port: int) -> None:
    """Requests one behind the other, no answer read."""
    pour(port, b"", b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5_000, SECONDS / 2)
    pour(port, CHUNKED + b"2\r\n{}\r\n", b"\r\n", 2.0)
    pour(port, b"", b"\r\n" * 30_000, SECONDS / 2)


def half_heads(port: int) -> None:
    """Fifteen hundred heads of 60 KB that never end."""
    wires = [connect(port) for _ in range(1500)]
    for wire in wires:
        with contextlib.suppress(OSError):
            wire.sendall(POST + b"X: " + b"h" * 60_000)
    sleep(SECONDS)
    for wire in wires:
        wire.close()


def zeros(port: int) -> None:
    """Bodies of 16.8 million zeros, then of other tiny items."""
    size = 32 * 2**20 - 20
    for item in (b"0,", b"{},", b"[],", b'"",', b"NaN,"):
        body = b'{"records":[' + item * (size // len(item)) + b"0]}"
        send(port, body)
        send(port, body[: len(body) // 16].rpartition(b",")[0] + b"]}")


def wide_records(port: int) -> None:
    """Records that make a wide table of few numbers, and records with ever new fields."""
    now = iso_z(datetime.now(UTC))
    head = f'{{"timestamp":"{now}","server_name":"wide",'
    for _ in range(3):
        cells = ",".join(f'{head}"m{number % 500}":1}}' for number in range(250_000))
        send(port, f'{{"records":[{cells}]}}'.encode())
        fields = ",".join(f'"F{number}":0' for number in range(2_000_000))
        send(port, f'{{"records":[{head}{fields}}}]}}'.encode())


def arrow_rows(port: int) -> None:
    """Arrow streams of as many bad rows as fit, and of dictionaries and nulls that are tiny on the wire."""
    head = POST.replace(b"json", b"vnd.apache.arrow.stream")
    n_rows = 2**18
    times = pa.array(np.full(n_rows, 1)).cast(pa.timestamp("ms"))
    names = pa.array(["x"] * n_rows).dictionary_encode()
    for columns in (
        {f"m{number}": pa.nulls(n_rows) for number in range(500)},
        {f"m{number}": pa.array(np.zeros(n_rows, np.int8)) for number in range(30)},
    ):
        sink = pa.BufferOutputStream()
        table = pa.table({"timestamp": times, "server_name": names, **columns})
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        for _ in range(3):
            send(port, bytes(sink.getvalue()), head)


def snappy_bombs(port: int) -> None:
    """Remote-write bodies of 764 KB that unpack to millions of empty series, several at once."""
    head = b"POST /api/v1/write HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-protobuf\r\n"
    head += b"Content-Encoding: snappy\r\n"
    series = b"\x0a\x00"
    labels = b"\x0a\x00" * (8 * 2**20 - 64)
    samples = b"\x12\x00" * (8 * 2**20 - 64)
    unpacked = (
        series * (8 * 2**20 - 8),
        b"\x0a" + _varint(len(labels)) + labels,
        b"\x0a" + _varint(len(samples)) + samples,
    )
    for content in unpacked:
        body = bytes(pa.compress(content, codec="snappy", asbytes=True))
        at_once(8, lambda body=body: send(port, body, head))  # type: ignore[misc]


def _varint(number: int) -> bytes:
    digits = []
    while number >= 0x80:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*digits, number])


def narrow_query(n_servers: int = N_SERVERS) -> bytes:
    """Return a GET of the forecasts of many servers by name: 21 KB asked, 16 MB answered."""
    names = "&".join(f"server={server_name(number)}" for number in range(n_servers))
    return f"GET /predictions/current?{names} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def slow_readers(port: int, queries: Iterable[bytes] = ()) -> None:
    """A hundred and fifty clients ask for much and read a byte a second."""
    asked = list(queries) or [
        narrow_query(),
        narrow_query(450),
        b"GET /predictions/current HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ]
    wires = [connect(port, 4096) for _ in range(150)]
    for number, wire in enumerate(wires):
        wire.sendall(asked[number % len(asked)])
    end = monotonic() + SECONDS
    while monotonic() < end:
        for wire in wires:
            with contextlib.suppress(OSError):
                wire.setblocking(False)
                wire.recv(1)
        sleep(1)
    for wire in wires:
        wire.close()


def abandoned_reads(port: int) -> None:
    """A hundred clients ask for much and go away."""
    for n_servers in (N_SERVERS, 450):
        query = narrow_query(n_servers)
        wires = [connect(port, 4096) for _ in range(100)]
        for wire in wires:
            wire.sendall(query)
        sleep(2)
        for wire in wires:
            wire.close()


def idle_connections(port: int) -> None:
    """Eleven hundred connections that say nothing, or one request and then nothing."""
    wires = []
    for number in range(1100):
        with contextlib.suppress(OSError):
            wire = connect(port)
            wires.append(wire)
            if number % 2:
                wire.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    sleep(SECONDS)
    for wire in wires:
        wire.close()


def slow_bodies(port: int) -> None:
    """Large bodies that arrive up to their last byte."""
    size = 32 * 2**20 - 1
    wires = [connect(port) for _ in range(12)]

    def fill(wire: socket.socket) -> None:
        with contextlib.suppress(OSError):
            wire.sendall(POST + b"Content-Length: %d\r\n\r\n" % size + b" " * (size - 1))

    threads = [threading.Thread(target=fill, args=(wire,)) for wire in wires]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sleep(SECONDS)
    for wire in wires:
        wire.close()


def wrong_keys(port: int) -> None:
    """Posts with a wrong key, as fast as one client can."""
    body = json.dumps({"records": []}).encode()
    end = monotonic() + SECONDS
    while monotonic() < end:
        with contextlib.suppress(OSError), connect(port) as wire:
            for _ in range(1000):
                wire.sendall(POST + b"X-API-Key: wrong\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                wire.recv(65_536)


ATTACKS: dict[str, Callable[[int], None]] = {
    attack.__name__: attack
    for attack in (
        trailers, chunk_extensions, headers, half_heads, pipelines, zeros, wide_records, arrow_rows,
        snappy_bombs, slow_bodies, slow_readers, abandoned_reads, idle_connections, wrong_keys,
    )
}  # fmt: skip


def main() -> int:
    """Carry out one attack."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="benchmarks.faults.parts.attacks", description=about)
    parser.add_argument("name", choices=list(ATTACKS))
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    ATTACKS[options.name](options.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
