"""The clients of HTTP interfaces that answer in JSON: the inference daemon's, and a Prometheus's.

Owns: requests (the library), the `X-API-Key` header, how records become a body, what each status code
means to a sender, and when to try again. Does not know: where records come from.
Sending a record twice is harmless (the daemon keeps one row per server and time), so every
failure that can pass is tried again, timeouts included.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias, TypeVar
from urllib.parse import unquote, urlencode, urlsplit

import requests

from fleetcast.clock import monotonic
from fleetcast.errors import BadData, DaemonAway, quote
from fleetcast.loop import Stop
from fleetcast.outbound import LOOPBACK, TimeLimit

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

JSON, ARROW = "application/json", "application/vnd.apache.arrow.stream"
API_KEY_VARIABLE = "TFT_API_KEY"
FIRST_WAIT_S = 0.2
SHORTEST_WAIT_S = 0.02  # a Retry-After of 0 must not become a busy loop
LONGEST_WAIT_S = 5.0
WHOLE = 2.0  # times the limit of a read: for all of a request, also where the answer drips
MOST_BYTES = 256 << 20  # of an answer; 10,000 servers x 5 metrics x 96 bins x 3 numbers of 6 bytes are 86 MB
_MOST_REFUSAL_BYTES = 64 << 10
_PIECE_BYTES = 64 << 10
_TOO_LARGE = 413
_UNKNOWN_SERVER = "unknown server"  # how a 404 about a name begins; any other is about the address
HINTS = {
    401: f"set {API_KEY_VARIABLE} to the daemon's key",
    404: "is this the inference daemon's address?",
    507: "the daemon's disk is full",
}
Records: TypeAlias = (
    "Sequence[Mapping[str, Any]] | pa.Table"  # as in `POST /feed/data`, or the same in columns
)
T = TypeVar("T")


@dataclass(frozen=True)
class FeedAnswer:
    """What the daemon said about records that were sent."""

    received: int
    rejected: int
    errors: tuple[str, ...] = ()  # the first reasons, readable
    rows: tuple[int, ...] = ()  # the records that these are about, as places in what was sent
    fields: tuple[str, ...] = ()  # left out of records that were received, with the reason

    def then(self, other: "FeedAnswer", n_before: int) -> "FeedAnswer":
        """Return both answers as one; `n_before` records were sent before the other's."""
        return FeedAnswer(
            self.received + other.received,
            self.rejected + other.rejected,
            self.errors + other.errors,
            self.rows + tuple(n_before + row for row in other.rows),
            tuple(dict.fromkeys(self.fields + other.fields)),
        )


class RequestRefused(DaemonAway):
    """Raised when the daemon answered a request with an error status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        detail: str = "",
        retry_after_s: float | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=HINTS.get(status, "") if hint is None else hint)
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

    @property
    def is_about_the_question(self) -> bool:
        """Whether the request named something that the daemon does not know or take."""
        return self.status == 422 or self.detail.startswith(_UNKNOWN_SERVER)


class JsonClient:
    """One connection to one server. Not thread safe.

    A server on this host is asked directly, whatever proxy the environment names. A connection and each read
    may take `timeout_s`, a whole request `WHOLE` times that, and an answer `most_bytes`.
    """

    hints: ClassVar[Mapping[int, str]] = {}  # what to do about a status
    most_bytes: ClassVar[int] = MOST_BYTES

    def __init__(
        self, url: str, *, whose: str, example: str, headers: Mapping[str, str], timeout_s: float
    ) -> None:
        if not _is_address(url):
            raise BadData(f"{whose} address must look like {example}, got {quote(url)}")
        parts = urlsplit(url)
        is_open = parts.username is None  # no password in messages and files
        netloc = parts.netloc if is_open else parts.netloc.rpartition("@")[2]
        self.url = parts._replace(netloc=netloc).geturl().rstrip("/")
        self._timeout_s = timeout_s
        self._limit = TimeLimit(WHOLE * timeout_s)
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, self._limit.adapter)
        if not is_open:
            self._session.auth = (unquote(parts.username or ""), unquote(parts.password or ""))
        self._session.trust_env = parts.hostname not in LOOPBACK
        self._session.headers.update(headers)

    def get(self, path: str, **fields: object) -> dict[str, Any]:
        """Return the JSON object at `path`, asked with the fields that say something; raises as `request`."""
        given = [(name, value) for name, value in fields.items() if value not in ("", None, ())]
        return self.request("GET", f"{path}?{urlencode(given, doseq=True)}" if given else path, None)

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

    def request(self, method: str, path: str, body: bytes | None, kind: str = JSON) -> dict[str, Any]:
        """Return the JSON object that a request is answered with.

        Raises:
            RequestRefused: the server answered with an error status.
            DaemonAway: it did not answer in time, or not with a JSON object of at most `most_bytes`.
        """
        try:
            value = json.loads(self._ask(method, path, body, {} if body is None else {"Content-Type": kind}))
        except (ValueError, RecursionError) as error:
            raise DaemonAway(f"{self.url}{path} did not answer with JSON") from error
        if not isinstance(value, dict):
            raise DaemonAway(f"{self.url}{path} did not answer with a JSON object")
        return value

    def _ask(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> bytes:
        """Return the content of an answer; raises as `request` does."""
        answer, content = self._exchange(method, path, body, headers)
        if answer.status_code != 200:
            detail = _detail(content)
            raise RequestRefused(
                answer.status_code,
                f"{method} {path} answered {answer.status_code}: {detail}",
                detail=detail,
                retry_after_s=_seconds(answer.headers.get("Retry-After")),
                hint=self.hints.get(answer.status_code, ""),
            )
        return content

    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[requests.Response, bytes]:
        """Return the head of an answer, and its content; of a refusal, how it begins."""
        late = f"{self.url}{path} was not answered whole within {WHOLE * self._timeout_s:g} s"
        try:
            with (
                self._limit,
                self._session.request(
                    method,
                    self.url + path,
                    data=body,
                    headers=dict(headers),
                    timeout=self._timeout_s,
                    allow_redirects=False,
                    stream=True,
                ) as answer,
            ):
                content = self._read(answer)
        except (requests.RequestException, ValueError) as error:  # ValueError: of a head that was cut off
            reason = late if self._limit.is_over else f"{self.url} does not answer: {_short(error)}"
            raise DaemonAway(reason) from error
        if self._limit.is_over:  # what was cut off may look whole
            raise DaemonAway(late)
        return answer, content

    def _read(self, answer: requests.Response) -> bytes:
        is_refusal = answer.status_code != 200
        most = _MOST_REFUSAL_BYTES if is_refusal else self.most_bytes
        content = bytearray()
        for piece in answer.iter_content(_PIECE_BYTES):
            content += piece
            if len(content) > most and is_refusal:
                break
            if len(content) > most:
                raise DaemonAway(f"{self.url} gave an answer of more than {most:,} bytes: it was not read on")
        return bytes(content)


class DaemonClient(JsonClient):
    """One connection to one daemon. Not thread safe. The key comes from `TFT_API_KEY` unless given."""

    hints: ClassVar[Mapping[int, str]] = HINTS

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 30.0) -> None:
        key = os.environ.get(API_KEY_VARIABLE, "") if api_key is None else api_key
        headers = {"X-API-Key": key} if key else {}
        whose, example = "the daemon's", "http://127.0.0.1:8000"
        super().__init__(url, whose=whose, example=example, headers=headers, timeout_s=timeout_s)

    def post_records(self, records: Records) -> FeedAnswer:
        """Send records once; a table goes as Arrow.

        Raises:
            RequestRefused: the daemon answered with an error status.
            DaemonAway: it did not answer.
        """
        body, kind = _encode(records)
        answer = self.request("POST", "/feed/data", body, kind)
        try:
            return FeedAnswer(
                received=int(answer["records_received"]),
                rejected=int(answer["records_rejected"]),
                errors=tuple(map(_say, answer["errors"])),
                rows=tuple(int(error.get("index", 0)) for error in answer["errors"]),
                fields=tuple(map(_say, answer.get("fields_refused", []))),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DaemonAway(f"{self.url}/feed/data gave an answer of another shape: {answer}") from error

    def status(self) -> dict[str, Any]:
        """Return the daemon's `/status`."""
        return self.get("/status")

    def table(self, path: str) -> "pa.Table":
        """Return the Arrow table at `path`; raises as `request` does."""
        import pyarrow as pa

        content = self._ask("GET", path, None, {"Accept": ARROW})
        try:
            return pa.ipc.open_stream(content).read_all()
        except (pa.ArrowException, OSError) as error:
            raise DaemonAway(f"{self.url}{path} did not answer with an Arrow table") from error


def _encode(records: Records) -> tuple[bytes, str]:
    """Return the body of a post and its type."""
    if isinstance(records, Sequence):
        return json.dumps({"records": records}, allow_nan=False, separators=(",", ":")).encode(), JSON
    import pyarrow as pa  # here: a sender of JSON does without

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, records.schema) as writer:
        writer.write_table(records)
    return sink.getvalue().to_pybytes(), ARROW


def _say(fault: Mapping[str, Any]) -> str:
    return f"{fault.get('field')}: {fault.get('reason')}"


def _is_address(url: object) -> bool:
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        return parts is not None and parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:  # half an address of IPv6
        return False


def _detail(content: bytes) -> str:
    """Return what a refusal says, without the JSON around it where it is one of the daemon's."""
    text = content.decode("utf-8", "replace")
    try:
        document = json.loads(content)
        detail = document["error"] if "error" in document else document["detail"]  # Prometheus's, ours
        if isinstance(detail, list):  # a field of the question that has no sense
            detail = "; ".join(f"{fault['loc'][-1]}: {fault['msg']}" for fault in detail)
    except (ValueError, LookupError, TypeError, RecursionError):
        detail = text
    return (detail if isinstance(detail, str) else text)[:300]


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


class Patience:
    """Repeats a request until it is answered, or until a daemon failed for `give_up_s`.

    Only what can pass is repeated: no answer, 5xx, and 429, by which a daemon holds its feeders.
    """

    def __init__(self, stop: Stop, give_up_s: float, *, waits_while_busy: bool) -> None:
        self._stop = stop
        self._give_up_s = give_up_s
        self._waits_while_busy = waits_while_busy
        self.requests = 0
        self.retries = 0

    def ask(self, request: Callable[[], T]) -> T | None:
        """Return the answer; None when the stop was requested before there was one.

        Raises:
            DaemonAway: the daemon does not answer, or refuses for good; the hint says what to do.
        """
        give_up_at = monotonic() + self._give_up_s
        wait_s = FIRST_WAIT_S
        while not self._stop.is_requested:
            self.requests += 1
            try:
                return request()
            except RequestRefused as error:
                if not error.can_pass:
                    raise
                if error.is_busy and self._waits_while_busy:
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


class RecordSender:
    """Delivers records through a client until the daemon took them or the sender gives up.

    The sender waits for a busy daemon (429, 503) as long as it stays busy: under the data clock the
    daemon holds its feeders through a whole training. It gives up a daemon that fails or does not
    answer for `give_up_s`. It sends a body that is too large in halves.
    """

    def __init__(self, client: DaemonClient, stop: Stop, *, give_up_s: float = 120.0) -> None:
        self._client = client
        self._patience = Patience(stop, give_up_s, waits_while_busy=True)

    @property
    def requests(self) -> int:
        """Return how many requests were sent."""
        return self._patience.requests

    @property
    def retries(self) -> int:
        """Return how many of them repeated one before."""
        return self._patience.retries

    def send(self, records: Records) -> FeedAnswer | None:
        """Deliver records; None when the stop was requested before the daemon took them.

        Raises:
            DaemonAway: the daemon does not answer, or refuses for good; the hint says what to do.
        """
        try:
            return self._patience.ask(lambda: self._client.post_records(records))
        except RequestRefused as error:
            if error.status != _TOO_LARGE or len(records) < 2:
                raise
        middle = len(records) // 2
        first = self.send(records[:middle])
        second = self.send(records[middle:]) if first else None
        return first.then(second, middle) if first and second else None
