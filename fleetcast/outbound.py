"""One request to an address of the settings: bounded in time, and telling no one the address or its keys.

Owns: how such a request is made (requests), and what may be said of one that failed. Does not know: what
is sent, and when it is tried again.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import requests

from fleetcast.errors import NotDelivered

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_DETAIL_BYTES = 200


def request(
    method: str,
    url: str,
    timeout_s: float,
    *,
    data: bytes | None = None,
    headers: dict[str, str] | None = None,
    hidden: Sequence[str] = (),
) -> str:
    """Make one request; return the status. It follows no redirect: those would take the key elsewhere.

    Args:
        hidden: what a message must not repeat, besides the parts of the address.
    Raises:
        NotDelivered: with the status or the cause, never with the address.
    """
    try:
        with requests.Session() as session:
            session.trust_env = urlsplit(url).hostname not in LOOPBACK
            answer = session.request(
                method,
                url,
                data=data,
                headers=headers,
                timeout=timeout_s,
                allow_redirects=False,
                stream=True,  # what it says at length is not read
            )
            with answer:
                if 200 <= answer.status_code < 300:
                    return f"HTTP {answer.status_code}"
                detail = next(answer.iter_content(_DETAIL_BYTES), b"").decode("utf-8", "replace")
    except (requests.RequestException, ValueError) as error:
        raise NotDelivered(f"no answer: {cause(error)}") from None  # the error's text holds the address
    raise NotDelivered(
        f"HTTP {answer.status_code}: {_without(url, hidden, detail)}", retry_after_s=_seconds(answer.headers)
    )


def cause(error: BaseException) -> str:
    """Return the innermost cause by its name and the system's words, without any address."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    words = error.strerror if isinstance(error, OSError) else None
    words = words.decode("utf-8", "replace") if isinstance(words, bytes) else words  # smtplib's
    return f"{type(error).__name__}{f': {words}' if words else ''}"


def _without(url: str, hidden: Sequence[str], detail: str) -> str:
    """Return what a refusal says, unless it repeats a key, or a part of the address that may be one."""
    parts = urlsplit(url)
    long = [part for part in (*parts.path.split("/"), parts.query, parts.password or "") if len(part) > 6]
    is_told = any(secret in detail for secret in (*long, *filter(None, hidden)))
    return "(not shown)" if is_told else " ".join(detail.split())


def _seconds(headers: Any) -> float:
    try:
        return max(0.0, float(headers.get("Retry-After", 0)))
    except ValueError:
        return 0.0
