"""The client of the inference daemon's HTTP interface.

Owns: requests (the library), the `X-API-Key` header, what each status code means to a sender,
and when to try again. Does not know: where records come from.
Sending a record twice is harmless (the daemon keeps one row per server and time), so every
failure that can pass is tried again, timeouts included.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import requests

from fleetcast.clock import monotonic
from fleetcast.errors import BadData, DaemonAway
from fleetcast.loop import Stop

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "TFT_API_KEY"
FIRST_WAIT_S = 0.2
SHORTEST_WAIT_S = 0.02  # a Retry-After of 0 must not become a busy loop
LONGEST_WAIT_S = 5.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HINTS = {
    401: f"set {API_KEY_VARIABLE} to the daemon's key",
    404: "is this the inference daemon's address?",
    507: "the daemon's disk is full",
}


@dataclass(frozen=True)
class FeedAnswer:
    """What the daemon said about one POST."""

    received: int
    rejected: int
    errors: tuple[str, ...] = ()  # the first reasons, readable


class RequestRefused(DaemonAway):
    """Raised when the daemon answered a request with an error status."""

    def __init__(
        self, status: int, message: str, *, detail: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, hint=HINTS.get(status, ""))
        self.status = status
        self.detail = detail or message  # what the daemon itself said
        self.retry_after_s = retry_after_s

    @property
    def is_busy(self) -> bool:
        """Whether the daemon asks for patience: it works, but not on this request."""
        return self.status in (429, 503)

    @property
    def can_pass(self) -> bool:
        """Whether the same request can succeed later."""
        return self.is_busy or self.status >= 500


class DaemonClient:
    """One connection to one daemon. Not thread safe.

    The key comes from `TFT_API_KEY` unless given. A daemon on this host is asked directly,
    whatever proxy the environment names.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 30.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadData(f"the daemon's address must look like http://127.0.0.1:8000, got {url!r}")
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._session = requests.Session()
        self._session.trust_env = parts.hostname not in LOOPBACK
        key = os.environ.get(API_KEY_VARIABLE, "") if api_key is None else api_key
        if key:
            self._session.headers["X-API-Key"] = key

    def post_records(self, records: Sequence[Mapping[str, Any]]) -> FeedAnswer:
        """Send records once.

        Raises:
            RequestRefused: the daemon answered with an error status.
            DaemonAway: it did not answer.
        """
        body = json.dumps({"records": records}, allow_nan=False, separators=(",", ":"))
        answer = self._request("POST", "/feed/data", body.encode())
        try:
            return FeedAnswer(
                received=int(answer["records_received"]),
                rejected=int(answer["records_rejected"]),
                errors=tuple(f"{e.get('field')}: {e.get('reason')}" for e in answer["errors"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DaemonAway(f"{self.url}/feed/data gave an answer of another shape: {answer}") from error

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON object at `path`; raises as `post_records` does."""
        return self._request("GET", path, None)

    def status(self) -> dict[str, Any]:
        """Return the daemon's `/status`."""
        return self.get("/status")

    def close(self) -> None:
        """Close the connection."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _request(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"} if body is not None else None
        try:
            answer = self._session.request(
                method,
                self.url + path,
                data=body,
                headers=headers,
                timeout=self._timeout_s,
                allow_redirects=False,
            )
        except requests.RequestException as error:
            raise DaemonAway(f"{self.url} does not answer: {_short(error)}") from error
        if answer.status_code != 200:
            detail = _detail(answer)
            raise RequestRefused(
                answer.status_code,
                f"{method} {path} answered {answer.status_code}: {detail}",
                detail=detail,
                retry_after_s=_seconds(answer.headers.get("Retry-After")),
            )
        try:
            value = answer.json()
        except ValueError as error:
            raise DaemonAway(f"{self.url}{path} did not answer with JSON") from error
        if not isinstance(value, dict):
            raise DaemonAway(f"{self.url}{path} did not answer with a JSON object")
        return value


def _detail(answer: requests.Response) -> str:
    """Return what a refusal says, without the JSON around it where it is one of the daemon's."""
    try:
        detail = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = answer.text
    return (detail if isinstance(detail, str) else answer.text)[:300]


def _short(error: Exception) -> str:
    """Return the innermost cause: urllib3 wraps "connection refused" in four lines."""
    cause: BaseException = error
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__ or cause
    return str(cause) or type(cause).__name__


def _seconds(text: str | None) -> float | None:
    """Return a Retry-After header in seconds; a date or junk counts as absent."""
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None


class RecordSender:
    """Delivers records through a client until the daemon took them or the sender gives up.

    The sender waits for a busy daemon (429, 503) as long as it stays busy: under the data clock the
    daemon holds its feeders through a whole training. It gives up a daemon that fails or does not
    answer for `give_up_s`. It sends a body that is too large in halves.
    """

    def __init__(self, client: DaemonClient, stop: Stop, *, give_up_s: float = 120.0) -> None:
        self._client = client
        self._stop = stop
        self._give_up_s = give_up_s
        self.requests = 0
        self.retries = 0

    def send(self, records: Sequence[Mapping[str, Any]]) -> FeedAnswer | None:
        """Deliver records; None when the stop was requested before the daemon took them.

        Raises:
            DaemonAway: the daemon does not answer, or refuses for good; the hint says what to do.
        """
        give_up_at = monotonic() + self._give_up_s
        wait_s = FIRST_WAIT_S
        while not self._stop.is_requested:
            self.requests += 1
            try:
                return self._client.post_records(records)
            except RequestRefused as error:
                if error.status == 413 and len(records) > 1:
                    return self._in_halves(records)
                if not error.can_pass:
                    raise
                if error.is_busy:
                    give_up_at = monotonic() + self._give_up_s
                pause_s = wait_s if error.retry_after_s is None else max(SHORTEST_WAIT_S, error.retry_after_s)
                last: DaemonAway = error
            except DaemonAway as error:
                pause_s = wait_s
                last = error
            if monotonic() + pause_s > give_up_at:
                raise last
            self.retries += 1
            logger.debug("trying again in_s=%.1f error=%s", pause_s, last)
            self._stop.wait(pause_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        return None

    def _in_halves(self, records: Sequence[Mapping[str, Any]]) -> FeedAnswer | None:
        middle = len(records) // 2
        first = self.send(records[:middle])
        second = self.send(records[middle:]) if first else None
        if first is None or second is None:
            return None
        return FeedAnswer(
            first.received + second.received,
            first.rejected + second.rejected,
            first.errors + second.errors,
        )
