"""A server that speaks the Prometheus query API as far as an import needs it, without a Prometheus."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs

Answer = tuple[int, dict[str, Any]]


def load(server: int, at_s: int) -> float:
    """Return the value of `node_load1` at the end of a step."""
    return server * 100 + at_s // 300 % 97


class StubPrometheus:
    """Answers range queries about `node_load1` for some servers, and nothing for other series."""

    def __init__(
        self,
        n_servers: int = 2,
        *,
        first_s: int = 0,
        max_points: int = 11_000,
        pause_s: float = 0.0,
        port: int = 0,
    ):
        self.asked: list[dict[str, str]] = []
        self.headers: list[Mapping[str, str]] = []
        self.refuse: Callable[[dict[str, str]], Answer | None] = lambda _form: None
        self.labels: list[dict[str, str]] = [
            {"instance": f"web-{number:02d}:9100", "job": "node"} for number in range(n_servers)
        ]
        self._first_s, self._max_points, self._pause_s = first_s, max_points, pause_s
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body are two writes

            def do_POST(self) -> None:
                form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                stub.headers.append(dict(self.headers))
                status, document = stub.answer({name: text for name, (text,) in form.items()})
                body = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, form: dict[str, str]) -> Answer:
        """Return status and document for one query."""
        self.asked.append(form)
        if refusal := self.refuse(form):
            return refusal
        first, last, step = float(form["start"]), float(form["end"]), int(form["step"])
        times = [int(first) + number * step for number in range(int((last - first) // step) + 1)]
        if len(times) > self._max_points:
            says = "exceeded maximum resolution of 11,000 points per timeseries"
            return 400, {"status": "error", "errorType": "bad_data", "error": says}
        found: list[dict[str, Any]] = []
        if "node_load1" in form["query"]:
            time.sleep(self._pause_s)
            for number, labels in enumerate(self.labels):
                values = [[at_s, repr(load(number, at_s))] for at_s in times if at_s > self._first_s]
                found += [{"metric": labels, "values": values}] if values else []
        return 200, {"status": "success", "data": {"resultType": "matrix", "result": found}}

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
