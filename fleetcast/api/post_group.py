"""What a lane does with a group of posts: read each, take those of one layout together, answer each.

Owns: which decoder reads a body, the answer's words. Does not know: threads, sockets.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

from fleetcast.api.bodies import Refusal, encoded, records_in
from fleetcast.api.lanes import Post
from fleetcast.errors import BadData, StorageBroken, StorageFull
from fleetcast.ingest.arrow import read_columns
from fleetcast.ingest.columns import layout_of
from fleetcast.ingest.json_records import JsonRecords
from fleetcast.ingest.record_columns import RowsOf
from fleetcast.serving.intake import Receipt

MAX_ERRORS_SHOWN = 20


class Intake(Protocol):
    """Takes records; raises StorageFull or StorageBroken when none was kept."""

    def take_together(self, parts: Sequence[Sequence[object]]) -> list[Receipt]: ...


class PostGroups:
    """Does groups of posts; safe from any thread."""

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
        columns = self._json.read(post.body)
        if columns is not None:
            return columns
        records = records_in(post.body)
        self._json.learn(post.body, records)
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
    """Return the answer for a disk that does not take records; such a request can be repeated."""
    if isinstance(error, StorageFull):
        return Refusal(507, str(error))
    return Refusal(503, str(error), retry_after_s=5)


def _answer(receipt: Receipt) -> bytes:
    return encoded(
        {
            "status": "ok",
            "records_received": receipt.n_received,
            "records_rejected": len(receipt.rejections),
            "errors": [rejection.as_dict() for rejection in receipt.rejections[:MAX_ERRORS_SHOWN]],
        }
    )
