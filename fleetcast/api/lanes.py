"""The lanes that posts of records go through: those that wait together are done together.

Owns: the worker threads, which posts form a group, handing the answers back to the event loop.
Does not know: HTTP codes, records.

A post of 20 records costs several times more alone than as one of ten in a group: one check in
columns, one write and one fdatasync serve them all. A lane takes whatever waits when it becomes free,
so a lone sender waits for nobody and groups grow with the load.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

GROUP_MAX_BYTES = 2**20  # bodies of one group: larger ones gain nothing, and make the first one wait
_N_LANES = 2  # one works while the other waits for the disk; more would only make the groups smaller


@dataclass(slots=True, eq=False)
class Post:
    """One body on its way; `answer` is set by whoever does the work."""

    body: bytes
    is_arrow: bool
    done: "asyncio.Future[bytes]"
    answer: bytes | Exception | None = field(default=None)


class Lanes:
    """Threads that do `work` on groups of posts; it sets each post's answer and may raise for all."""

    def __init__(self, work: Callable[[Sequence[Post]], None]) -> None:
        self._work = work
        self._posts: queue.SimpleQueue[Post | None] = queue.SimpleQueue()  # bounded by its caller
        self._threads = [
            threading.Thread(target=self._run, name=f"lane-{number}", daemon=True)
            for number in range(_N_LANES)
        ]
        for thread in self._threads:
            thread.start()

    async def take(self, body: bytes, *, is_arrow: bool) -> bytes:
        """Return the answer to one body, from the event loop; raises what the work raised for it."""
        post = Post(body, is_arrow, asyncio.get_running_loop().create_future())
        self._posts.put(post)
        return await post.done

    def close(self) -> None:
        """Finish what waits and end the threads."""
        for _ in self._threads:
            self._posts.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (post := self._posts.get()) is not None:
            group = self._group(post)
            try:
                self._work(group)
            except Exception as error:
                self._work_alone([post for post in group if post.answer is None], error)
            group[0].done.get_loop().call_soon_threadsafe(_hand_back, group)

    def _work_alone(self, posts: Sequence[Post], error: Exception) -> None:
        """After a fault of ours: only the post that brings it about shall pay for it."""
        for post in posts:
            post.answer = error
            if len(posts) > 1:
                try:
                    post.answer = None
                    self._work([post])
                except Exception as own:
                    post.answer = own

    def _group(self, first: Post) -> list[Post]:
        group = [first]
        n_bytes = len(first.body)
        while n_bytes < GROUP_MAX_BYTES:
            try:
                post = self._posts.get_nowait()
            except queue.Empty:
                break
            if post is None:  # the end is meant for every lane, and comes after all posts
                self._posts.put(None)
                break
            group.append(post)
            n_bytes += len(post.body)
        return group


def _hand_back(group: Sequence[Post]) -> None:
    """Answer on the event loop; a sender that went away has cancelled its future."""
    for post in group:
        if post.done.done():
            continue
        if isinstance(post.answer, bytes):
            post.done.set_result(post.answer)
        else:
            post.done.set_exception(post.answer or RuntimeError("a post was left without an answer"))
