"""Series for a Prometheus: as the text it scrapes, or as remote-write requests that are sent to it.

Owns: the text format, remote-write 1.0 as a sender writes it, and the thread that sends. What is sent is
always the newest: a forecast is worth nothing an hour later, so nothing waits in a queue, and a receiver
that is away gets what is new when it is back. Does not know: what the series are, where a failure is told.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fleetcast.errors import NotDelivered
from fleetcast.outbound import request
from fleetcast.prometheus.wire import TimeSeriesMessage, WriteRequestMessage
from fleetcast.workers import Workers

INTERVAL_S = 60.0  # Prometheus forgets a series after five minutes without a sample
TIMEOUT_S = 10.0
SERIES_A_REQUEST = 2000  # as Prometheus's own senders make them
WORKER = "export"
HEADERS = {
    "Content-Type": "application/x-protobuf",
    "Content-Encoding": "snappy",
    "X-Prometheus-Remote-Write-Version": "0.1.0",
    "User-Agent": "fleetcast",
}
Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """Gauges of one name: rows (such as servers) by cells (such as metrics and leads)."""

    name: str
    text: str
    rows: Sequence[Labels]
    cells: Sequence[Labels]
    values: NDArray[Any]  # (row, cell); what is not finite is no sample
    digits: int | None = None  # significant ones in the text; None = all

    def pieces(self) -> Iterator[bytes]:
        """Yield the text: the head, then a piece for each row."""
        yield f"# HELP {self.name} {self.text}\n# TYPE {self.name} gauge\n".encode()
        of_cells = [_label_text(labels) for labels in self.cells]
        write = repr if self.digits is None else f"{{:.{self.digits}g}}".format
        for labels, values, is_told in self._by_row():
            start = _label_text(labels)
            lines = [
                f"{self.name}{_in_braces(start, cell)} {write(value)}\n"
                for cell, value, told in zip(of_cells, values, is_told, strict=True)
                if told
            ]
            yield "".join(lines).encode("utf-8", "replace")

    def series(self) -> Iterator[tuple[Labels, float]]:
        """Yield each sample with all of its labels, in the order that remote-write wants."""
        name = (("__name__", self.name),)
        for labels, values, is_told in self._by_row():
            for cell, value, told in zip(self.cells, values, is_told, strict=True):
                if told:
                    yield tuple(sorted(name + labels + cell)), value

    def _by_row(self) -> Iterator[tuple[Labels, list[float], list[bool]]]:
        values = self.values.reshape(len(self.rows), len(self.cells))
        yield from zip(self.rows, values.tolist(), np.isfinite(values).tolist(), strict=True)


def escape(value: str) -> str:
    r"""Return a label's value as the text format wants it.

    >>> print(escape('a"b\\c'), escape("two\nlines"))
    a\"b\\c two\nlines
    """
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _label_text(labels: Labels) -> str:
    return ",".join(f'{name}="{escape(value)}"' for name, value in labels)


def _in_braces(*parts: str) -> str:
    inner = ",".join(filter(None, parts))
    return f"{{{inner}}}" if inner else ""


def write_requests(families: Iterable[Family], time_ms: int, more: Labels = ()) -> Iterator[bytes]:
    """Yield the bodies of remote-write requests with every sample at one time.

    Args:
        more: labels that every series gets besides its own.
    """
    waiting: list[bytes] = []
    for family in families:
        for labels, value in family.series():
            series = TimeSeriesMessage(
                labels=[
                    {"name": name.encode(), "value": text.encode("utf-8", "replace")}
                    for name, text in sorted(labels + more)
                ],
                samples=[{"value": value, "timestamp": time_ms}],
            )
            waiting.append(series.SerializeToString())
            if len(waiting) == SERIES_A_REQUEST:
                yield _pack(waiting)
                waiting = []
    if waiting:
        yield _pack(waiting)


def _pack(series: Sequence[bytes]) -> bytes:
    content = WriteRequestMessage(timeseries=series).SerializeToString()
    return bytes(pa.compress(content, codec="snappy", asbytes=True))


@dataclass(frozen=True)
class Receiver:
    """Who takes remote-write; neither the address nor the token is in a log line or an error."""

    url: str
    token: str = ""  # "" = none is asked for

    def __repr__(self) -> str:
        return "Receiver(...)"

    def take(self, body: bytes) -> None:
        """Send one request.

        Raises:
            NotDelivered: with the status or the cause.
        """
        key = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        hidden = (self.token,) if self.token else ()
        request("POST", self.url, TIMEOUT_S, data=body, headers={**HEADERS, **key}, hidden=hidden)


class Sender:
    """Sends the newest series when there are new ones, and again each minute; one failure ends a round."""

    def __init__(
        self,
        receiver: Receiver,
        make_requests: Callable[[], Iterable[bytes]],
        on_end: Callable[[NotDelivered | None], None],
        workers: Workers,
    ) -> None:
        """Prepare it.

        Args:
            make_requests: returns the bodies of now.
            on_end: told how each round ended; None = all was taken.
        """
        self._receiver = receiver
        self._make_requests = make_requests
        self._on_end = on_end
        self._wake = threading.Event()
        self._is_stopped = False
        self._thread = workers.thread(WORKER, self._work)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """Say that there are new series; safe from any thread, and it never waits."""
        self._wake.set()

    def stop(self) -> None:
        """Send nothing more; a request at work is left to its time limit."""
        self._is_stopped = True
        self._thread.stop()
        self._wake.set()

    def send(self) -> None:
        """Send what is newest."""
        try:
            for body in self._make_requests():
                if self._is_stopped:
                    return
                self._receiver.take(body)
        except NotDelivered as error:
            self._on_end(error)
        else:
            self._on_end(None)

    def _work(self) -> None:
        while not self._is_stopped:
            self._wake.wait(INTERVAL_S)
            self._wake.clear()
            if not self._is_stopped:
                self.send()
