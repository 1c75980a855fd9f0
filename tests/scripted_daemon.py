"""A small HTTP server that answers as it is told: what a daemon may say, without a daemon."""

import json
import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

import pyarrow as pa


@dataclass
class Reply:
    """One answer; a body of None accepts every record that came."""

    status: int = 200
    body: dict[str, Any] | str | None = None
    headers: dict[str, str] = field(default_factory=dict)


class ScriptedDaemon:
    """Answers POSTs from a list, then accepts everything; remembers what came."""

    def __init__(self, *replies: Reply, max_records: int | None = None, port: int = 0) -> None:
        self.replies = deque(replies)
        self.training_answers: deque[bool] = deque()
        self.posts: list[list[dict[str, Any]]] = []
        self.taken: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.max_records = max_records
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, records: list[dict[str, Any]]) -> Reply:
        """Return the next answer to a POST."""
        self.posts.append(records)
        if self.max_records is not None and len(records) > self.max_records:
            return Reply(413, "too large")
        reply = self.replies.popleft() if self.replies else Reply()
        if reply.status == 200 and reply.body is None:
            self.taken += records
            reply.body = {
                "status": "ok",
                "records_received": len(records),
                "records_rejected": 0,
                "errors": [],
            }
        return reply

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        daemon = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                daemon.headers.append(dict(self.headers))
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self._reply(daemon.answer(_records(body, self.headers["Content-Type"])))

            def do_GET(self) -> None:
                is_training = daemon.training_answers.popleft() if daemon.training_answers else False
                self._reply(Reply(200, {"training": {"running": is_training}}))

            def _reply(self, reply: Reply) -> None:
                body = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *args: object) -> None:
                pass

        return Handler


def _records(body: bytes, kind: str) -> list[dict[str, Any]]:
    if kind == "application/json":
        records: list[dict[str, Any]] = json.loads(body)["records"]
        return records
    with pa.ipc.open_stream(body) as stream:
        return list(stream.read_all().to_pylist())
