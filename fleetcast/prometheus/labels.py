"""A series by the bytes of its labels: parsed once, known from then on.

Owns: which labels are usable, and the bounded memory of label bytes. Does not know: where in a request
labels stand (`wire`, `symbols`), what a series means (`series`). Not thread safe.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from fleetcast.errors import BadData
from fleetcast.prometheus.series import NAMELESS, REFUSED, roomy
from fleetcast.schema import Codes

LABELS_MAX = 256  # of one series; senders' own limits are about 30
LABELS_BYTES_MAX = 4096  # of one series
UNKNOWN = -100  # instead of a slot or a number: these label bytes were not seen before
_KNOWN_BYTES_MAX = 128 * 2**20  # what remembered label bytes may take
_LABELS_EXTRA_BYTES = 120  # of a bytes object and its place in a dict
_NAME_MAX_CHARS = 100


class KnownSeries:
    """Series' numbers by the bytes of their labels; a slot is the place of such bytes.

    Memory is bounded: remembered bytes are dropped when they take too much.
    """

    def __init__(self, number: Callable[[Mapping[str, str]], int], on_move: Callable[[], None]) -> None:
        """Remember nothing yet.

        Args:
            number: numbers a series by its labels; a negative number is not wanted.
            on_move: called when slots stand for other bytes than before.
        """
        self._number = number
        self._on_move = on_move
        self._slots: dict[bytes, int] = {}
        self.numbers: Codes = np.empty(0, dtype=np.int32)  # (slot,)
        self._n_bytes = 0

    def slots(self, heads: Iterable[bytes], n_heads: int) -> Codes:
        """Return the slot of each, UNKNOWN for bytes not seen before."""
        return np.fromiter(map(self._slots.get, heads, repeat(UNKNOWN)), dtype=np.int32, count=n_heads)

    def slot(self, head: bytes) -> int:
        """Return the slot of one."""
        return self._slots.get(head, UNKNOWN)

    def learn(self, pairs: Sequence[tuple[bytes, bytes]], head: bytes) -> int:
        """Return the number of a series by its labels; remember it by `head`, where that is their bytes.

        Raises:
            BadData: the labels are not usable; says which one, or that they name no server.
        """
        labels = labels_of(pairs)
        number = self._number(labels)
        if number == NAMELESS:
            right = "1-128 printable characters, at least one of them visible"
            where = "in the label remote_write.server_label"
            raise BadData(f"{_say(labels)} names no server: {right}, {where}")
        if head and number != REFUSED:
            self._keep(head, number)
        return number

    def renumber(self, new_numbers: NDArray[np.int64]) -> None:
        """Follow a renumbering; labels of series that were forgotten or refused are forgotten."""
        renumbered = [
            (head, int(new_numbers[number]) if number >= 0 else number) for head, number in self._pairs()
        ]
        self._begin([(head, number) for head, number in renumbered if number != REFUSED])

    def bound_memory(self) -> None:
        """Forget what takes too much."""
        if self._n_bytes <= _KNOWN_BYTES_MAX:
            return
        self._begin([(head, number) for head, number in self._pairs() if number >= 0])
        if self._n_bytes > _KNOWN_BYTES_MAX // 2:
            self._begin([])

    def _keep(self, head: bytes, number: int) -> None:
        slot = self._slots.setdefault(head, len(self._slots))
        if slot + 1 == len(self._slots):
            self._n_bytes += len(head) + _LABELS_EXTRA_BYTES
        self.numbers = roomy(self.numbers, slot)
        self.numbers[slot] = number

    def _pairs(self) -> Iterable[tuple[bytes, int]]:
        return zip(self._slots, self.numbers.tolist(), strict=False)  # slots are in the dict's order

    def _begin(self, pairs: Sequence[tuple[bytes, int]]) -> None:
        self._slots, self._n_bytes = {}, 0
        self._on_move()
        for head, number in pairs:
            self._keep(head, number)


def labels_of(found: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return the labels of a series.

    Raises:
        BadData: a label is there twice, has no name, or is not UTF-8, or they are too many; says which one.
    """
    pairs = found[:LABELS_MAX]
    labels = {_shown(name): _shown(value) for name, value in pairs}
    series = _say(labels)
    if len(found) > LABELS_MAX:
        raise BadData(f"{series} has over {LABELS_MAX} labels")
    if sum(len(name) + len(value) for name, value in pairs) > LABELS_BYTES_MAX:
        raise BadData(f"{series} has over {LABELS_BYTES_MAX} bytes of labels")
    seen = set()
    for name, value in pairs:
        if not name:
            raise BadData(f"{series} has a label without a name")
        if name in seen:
            raise BadData(f"{series} has the label {_shown(name)!r} twice")
        seen.add(name)
        try:
            name.decode(), value.decode()
        except UnicodeDecodeError:
            raise BadData(f"{series} has the label {_shown(name)!r}, which is not UTF-8") from None
    return {name.decode(): value.decode() for name, value in pairs}


def _say(labels: Mapping[str, str]) -> str:
    """Return a series as a message shows it."""
    own = ", ".join(
        f"{name}={labels[name][:_NAME_MAX_CHARS]!r}" for name in ("instance", "job") if name in labels
    )
    return f"{labels.get('__name__', '')[:_NAME_MAX_CHARS]}{{{own}}}"


def _shown(text: bytes) -> str:
    return text[:_NAME_MAX_CHARS].decode("utf-8", "replace")
