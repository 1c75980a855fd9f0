"""Keeps web pages of others away from a daemon that asks for no key.

Without a key the daemon listens on loopback, but a browser on the same host is on loopback, too.
A page may point a name of its own at 127.0.0.1 (DNS rebinding) and read the answers, or post
across origins without reading. The first shows in `Host`, the second in `Origin`.

Owns: which of the two are refused. Does not know: routes. With a key it is not needed: a page
does not know the key.
"""

import ipaddress
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final

Message = MutableMapping[str, Any]  # of the ASGI specification, as are the next two
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_JSON: Final = (b"content-type", b"application/json")


class BrowserGuard:
    """Middleware that answers 421 for a foreign `Host` and 403 for a foreign `Origin`."""

    def __init__(self, app: App, allowed_hosts: Iterable[str]) -> None:
        self._app = app
        self._allowed = {name.lower() for name in allowed_hosts}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            status, why = self.refusal(dict(scope["headers"]))
            if status:
                await _answer(send, status, why)
                return
        await self._app(scope, receive, send)

    def refusal(self, headers: dict[bytes, bytes]) -> tuple[int, str]:
        """Return the status and the reason, (0, "") for a request that may pass.

        >>> guard = BrowserGuard(lambda *_: None, ["forecasts.example"])
        >>> guard.refusal({b"host": b"127.0.0.1:8000"})
        (0, '')
        >>> guard.refusal({b"host": b"evil.example"})[0]
        421
        """
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._is_ours(host):
            return (
                421,
                f"this daemon is not known as {host[:80]!r}: set server.allowed_hosts or a TFT_API_KEY",
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.partition("://")[2].lower() != host.lower():
            return 403, f"a page of {origin[:80]!r} may not ask without a TFT_API_KEY"
        return 0, ""

    def _is_ours(self, host: str) -> bool:
        name = _without_port(host).lower()
        if name in self._allowed or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)  # an address is no name that somebody else could point here
        except ValueError:
            return False
        return True


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


async def _answer(send: Send, status: int, why: str) -> None:
    body = json.dumps({"detail": why}).encode()
    headers = [_JSON, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
