"""A receiver of alerts: it keeps every request, and answers, refuses or hangs as a test says."""

import json
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Sink:
    """Listens on a free port of this host."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.status = 200
        self.delay_s = 0.0
        self.answer = b"ok"
        self.headers: dict[str, str] = {}
        self.go_on = threading.Event()  # cleared: requests are kept, and answered once it is set
        self.go_on.set()
        sink = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                sink.requests.append(Request(self.command, self.path, dict(self.headers), body))
                time.sleep(sink.delay_s)
                sink.go_on.wait(60)
                self.send_response(sink.status)
                for name, value in {**sink.headers, "Content-Length": str(len(sink.answer))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(sink.answer)

            do_GET = do_POST

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a sender that was killed
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def bodies(self) -> list[Any]:
        """Return what was posted so far, and forget it."""
        found = [request.json for request in self.requests]
        self.requests.clear()
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()
