"""The door of the hot routes: POSTs of records are answered here, before any routing.

Owns: which requests these are, and their key. Does not know: what they hold, any other route.
A web framework's routing, dependencies and exit stacks cost a post of 20 records as much as all the
rest of the event loop's work; the routes are still declared to it, for the interface description.
"""

from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fleetcast.api.bodies import encoded

KEY_HEADER = "x-api-key"
WRONG_KEY = "X-API-Key is missing or wrong"


class FeedDoor:
    """ASGI middleware: answers POSTs to its own paths, hands every other request on."""

    def __init__(
        self,
        app: ASGIApp,
        answers: Mapping[str, Callable[[Request], Awaitable[Response]]],
        is_welcome: Callable[[str | None], bool],
    ) -> None:
        """Take who answers, by path, and the test of a request's key (None = it has none)."""
        self._app = app
        self._answers = answers
        self._is_welcome = is_welcome

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event of ASGI."""
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        answer = self._answers.get(scope["path"]) if is_post else None
        if answer is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        if self._is_welcome(request.headers.get(KEY_HEADER)):
            response = await answer(request)
        else:
            response = Response(encoded({"detail": WRONG_KEY}), 401, media_type="application/json")
        await response(scope, receive, send)
