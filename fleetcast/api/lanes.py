"""The lanes that posts of records go through: those that wait together are done together.

Owns: the worker threads, which posts form a group, which decoder reads a body, the words of the
answer, and its way back to the event loop. Does not know: sockets, routes, what a record is.

A post of 20 records costs several times more alone than as one of ten in a group: one check in
columns, one write and one fdatasync serve them all. A lane takes whatever waits when it becomes free,
so a lone sender waits for no other and groups grow with the load.
"""

import asyncio
import codecs
import contextlib
import queue
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fleetcast.api.bodies import LIGHT_BYTES, Refusal, check_items, encode, read_records
from fleetcast.errors import BadData, StorageBroken, StorageFull
from fleetcast.ingest.arrow import read_columns
from fleetcast.ingest.columns import RowsOf, layout_of
from fleetcast.ingest.json_records import JsonRecords
from fleetcast.ingest.rules import METRIC_NAME_MAX_CHARS, is_metric_name
from fleetcast.serving.intake import Intake, Receipt
from fleetcast.workers import Workers

MAX_ERRORS_SHOWN = 20
GROUP_MAX_BYTES = 2**20  # bodies of one group: larger ones gain nothing, and make the first one wait
_N_LANES = (
    2  # of each kind: one works while the other waits for the disk; more would only make the groups smaller
)


@dataclass(slots=True, eq=False)
class Post:
    """One body on its way; the work sets its `answer`."""

    body: bytes
    is_arrow: bool
    done: "asyncio.Future[bytes]"
    answer: bytes | Exception | None = field(default=None)


WORKER = "lane"
Posts = queue.SimpleQueue["Post | None"]


class Lanes:
    """Threads that do `work` on groups of posts; it sets each post's answer and may raise for all.

    Large bodies have lanes of their own: a small post never waits for one of them. Whatever ends a
    lane, each post gets an answer, and the lane begins again.
    """

    def __init__(self, work: Callable[[Sequence[Post]], None], workers: Workers | None = None) -> None:
        self._work = work
        self._light: Posts = queue.SimpleQueue()  # bounded by its caller
        self._heavy: Posts = queue.SimpleQueue()
        workers = workers or Workers()
        self._threads = [
            workers.thread(WORKER, partial(self._run, posts))
            for posts in (self._light, self._heavy)
            for _ in range(_N_LANES)
        ]
        for thread in self._threads:
            thread.start()

    async def take(self, body: bytes, *, is_arrow: bool) -> bytes:
        """Return the answer to one body, from the event loop; raises what the work raised for it."""
        post = Post(body, is_arrow, asyncio.get_running_loop().create_future())
        (self._light if len(body) <= LIGHT_BYTES else self._heavy).put(post)
        return await post.done

    def close(self) -> None:
        """Finish what waits and end the threads."""
        for _ in range(_N_LANES):
            self._light.put(None)
            self._heavy.put(None)
        for thread in self._threads:
            thread.stop()
        for thread in self._threads:
            thread.join()

    def _run(self, posts: Posts) -> None:
        while (post := posts.get()) is not None:
            group = [post]
            try:
                self._fill(group, posts)
                self._work(group)
            except Exception as error:
                self._work_alone([post for post in group if post.answer is None], error)
            finally:  # also before an error that ends the lane
                _return(group)

    def _work_alone(self, posts: Sequence[Post], error: Exception) -> None:
        """After an internal error, retry the posts one by one so that only the faulty one fails."""
        for post in posts:
            post.answer = error
            if len(posts) > 1:
                try:
                    post.answer = None
                    self._work([post])
                except Exception as own:
                    post.answer = own

    def _fill(self, group: list[Post], posts: Posts) -> None:
        """Add what waits to the group."""
        n_bytes = len(group[0].body)
        while n_bytes < GROUP_MAX_BYTES:
            try:
                post = posts.get_nowait()
            except queue.Empty:
                break
            if post is None:  # the end is for every lane, and comes after all posts
                posts.put(None)
                break
            group.append(post)
            n_bytes += len(post.body)


def _return(group: Sequence[Post]) -> None:
    """Take the answers to the event loops that wait for them; a server begun again has another."""
    posts_of: dict[asyncio.AbstractEventLoop, list[Post]] = defaultdict(list)
    for post in group:
        posts_of[post.done.get_loop()].append(post)
    for loop, posts in posts_of.items():
        with contextlib.suppress(RuntimeError):  # that server ended, and its clients are gone
            loop.call_soon_threadsafe(_hand_back, posts)


def _hand_back(group: Sequence[Post]) -> None:
    """Answer on the event loop; a sender that went away has cancelled its future."""
    for post in group:
        if post.done.done():
            continue
        if isinstance(post.answer, bytes):
            post.done.set_result(post.answer)
        else:
            post.done.set_exception(post.answer or RuntimeError("a post was left without an answer"))


class PostGroups:
    """Reads each post of a group, takes those of one layout together, answers each; safe from any thread."""

    def __init__(self, intake: Intake, on_receipt: Callable[[Receipt], None]) -> None:
        self._intake = intake
        self._on_receipt = on_receipt
        self._json = JsonRecords()

    def work(self, group: Sequence[Post]) -> None:
        """Answer every post of the group; one that cannot be read costs no other."""
        together: dict[Hashable, list[tuple[Post, Sequence[Any]]]] = defaultdict(list)
        for post in group:
            try:
                raw = self._read(post)
            except Refusal as refusal:
                post.answer = refusal
            else:
                together[layout_of(raw)].append((post, raw))
        for pairs in together.values():
            self._take([post for post, _raw in pairs], [raw for _post, raw in pairs])

    def _read(self, post: Post) -> Sequence[Any]:
        if post.is_arrow:
            try:
                return RowsOf(read_columns(post.body))
            except BadData as error:
                raise Refusal(422, str(error)) from error
        body = post.body.removeprefix(codecs.BOM_UTF8)  # as Windows' tools begin a file
        check_items(body)
        columns = self._json.read(body)
        if columns is not None:
            return columns
        records = read_records(body)
        self._json.learn(body, records)
        return records

    def _take(self, posts: Sequence[Post], parts: Sequence[Sequence[Any]]) -> None:
        try:
            receipts = self._intake.take_together(parts)
        except (StorageFull, StorageBroken) as error:
            for post in posts:
                post.answer = storage_refusal(error)
            return
        for post, receipt in zip(posts, receipts, strict=True):
            self._on_receipt(receipt)
            post.answer = _answer(receipt)


def storage_refusal(error: StorageFull | StorageBroken) -> Refusal:
    """Return the answer for a disk that does not take records; the sender can repeat such a request."""
    if isinstance(error, StorageFull):
        return Refusal(507, str(error))
    return Refusal(503, str(error), retry_after_s=5)


def _answer(receipt: Receipt) -> bytes:
    answer: dict[str, Any] = {
        "status": "ok",
        "records_received": receipt.n_received,
        "records_rejected": receipt.n_rejected,
        "errors": [rejection.as_dict() for rejection in receipt.rejections[:MAX_ERRORS_SHOWN]],
    }
    if receipt.refused_fields:
        answer["fields_refused"] = [one.as_dict() for one in receipt.refused_fields[:MAX_ERRORS_SHOWN]]
    if receipt.useless_fields:
        answer["fields_ignored"] = [_useless_field(name) for name in receipt.useless_fields]
    return encode(answer)


def _useless_field(name: str) -> dict[str, str]:
    """Say why a field of a record without any metric was of no use."""
    form = f"a metric's name is [a-z][a-z0-9_]* of up to {METRIC_NAME_MAX_CHARS} characters"
    return {"field": name, "reason": "is text, not a number" if is_metric_name(name) else form}
