"""What waits together is done together, and each post gets its own answer."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from fleetcast.api.lanes import GROUP_MAX_BYTES, Lanes, Post
from fleetcast.workers import Workers


class Work:
    """Answers a body with itself; the first call of each lane waits until it may go on."""

    def __init__(self) -> None:
        self.groups: list[list[bytes]] = []
        self.may_go_on = threading.Event()
        self.has_begun = threading.Semaphore(0)

    def __call__(self, group: Sequence[Post]) -> None:
        self.groups.append([post.body for post in group])
        self.has_begun.release()
        assert self.may_go_on.wait(30)
        if any(post.body == b"poison" for post in group):
            raise ZeroDivisionError("ours")
        for post in group:
            post.answer = post.body


async def all_answers(lanes: Lanes, work: Work, bodies: Sequence[bytes]) -> list[object]:
    """Return the answers to `bodies`, sent while every lane is busy."""
    loop = asyncio.get_running_loop()
    busy = []
    for number in range(2):
        busy.append(asyncio.create_task(lanes.take(b"busy %d" % number, is_arrow=False)))
        await asyncio.sleep(0)
        await loop.run_in_executor(None, work.has_begun.acquire)
    tasks = [asyncio.create_task(lanes.take(body, is_arrow=False)) for body in bodies]
    await asyncio.sleep(0)
    work.may_go_on.set()
    await asyncio.gather(*busy)
    return await asyncio.gather(*tasks, return_exceptions=True)


def answers(bodies: Sequence[bytes]) -> tuple[list[object], list[list[bytes]]]:
    work = Work()
    lanes = Lanes(work)
    try:
        return asyncio.run(all_answers(lanes, work, bodies)), work.groups[2:]
    finally:
        lanes.close()


def test_posts_that_wait_are_one_group_and_each_gets_its_answer() -> None:
    bodies = [b"%d" % number for number in range(20)]
    got, groups = answers(bodies)
    assert got == bodies
    assert groups == [bodies]


def test_a_group_is_bounded_by_its_bytes() -> None:
    large = b"x" * (GROUP_MAX_BYTES // 2)
    got, groups = answers([large] * 5)
    assert got == [large] * 5
    assert sorted(map(len, groups)) == [1, 2, 2]


def test_a_post_that_breaks_our_work_costs_no_other() -> None:
    got, groups = answers([b"a", b"poison", b"b"])
    assert [got[0], got[2]] == [b"a", b"b"]
    assert isinstance(got[1], ZeroDivisionError)
    assert groups == [[b"a", b"poison", b"b"], [b"a"], [b"poison"], [b"b"]]


def test_whatever_ends_a_lane_its_posts_are_answered_and_it_begins_again() -> None:
    def end_the_thread(group: Sequence[Post]) -> None:
        if group[0].body == b"poison":
            raise SystemExit
        for post in group:
            post.answer = post.body

    async def ask() -> list[object]:
        bad = [await asyncio.gather(lanes.take(b"poison", is_arrow=False), return_exceptions=True)]
        good = [await lanes.take(b"%d" % number, is_arrow=False) for number in range(5)]
        return [*bad[0], *good]

    workers = Workers()
    lanes = Lanes(end_the_thread, workers)
    try:
        bad, *good = asyncio.run(ask())
    finally:
        lanes.close()
    assert isinstance(bad, RuntimeError)
    assert good == [b"%d" % number for number in range(5)]
    assert workers.failures() == {"lane": 1}


def test_closing_finishes_what_waits() -> None:
    work = Work()
    work.may_go_on.set()

    async def take_and_close() -> object:
        lanes = Lanes(work)
        tasks = [asyncio.create_task(lanes.take(b"%d" % n, is_arrow=False)) for n in range(5)]
        await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, lanes.close)
        return await asyncio.gather(*tasks)

    assert asyncio.run(take_and_close()) == [b"0", b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("count", [1, 2])
def test_work_that_leaves_a_post_without_an_answer_is_an_error(count: int) -> None:
    async def take() -> list[object]:
        lanes = Lanes(lambda _group: None)
        tasks = [asyncio.create_task(lanes.take(b"", is_arrow=False)) for _ in range(count)]
        try:
            return await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            lanes.close()

    assert all(isinstance(answer, RuntimeError) for answer in asyncio.run(take()))
