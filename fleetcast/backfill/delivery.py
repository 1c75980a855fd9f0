"""Tables of records on their way to the daemon: in pieces, counted, with how far they came.

Owns: what became of the records, the bar on a terminal, and the state file of an import that can go on.
Does not know: where the records come from.

The state file `fleetcast_import_<8 hex>.json` (format 1) belongs to one import; its name is a digest of
what is imported from where to where. Keys: `format`, `what` (that, readable), `start` and `done_to` (ms since
1970: all of this stretch was accepted). It is replaced atomically after each piece that the daemon made
durable, so that after a kill at most one piece is sent twice, which changes nothing: same server and time,
same row.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fleetcast.clock import from_ms, iso_z, monotonic
from fleetcast.errors import UnknownFormat
from fleetcast.files import read_json, write_json
from fleetcast.loop import Stop
from fleetcast.sources.client import DaemonClient, FeedAnswer, RecordSender

if TYPE_CHECKING:
    import pyarrow as pa

TIME, SERVER = "timestamp", "server_name"
PIECE_ROWS, PIECE_VALUES = 50_000, 1_000_000  # of one request
_TOO_OLD = "timestamp: is older than"  # how the daemon's refusal of such a record begins
_REASONS = 5
_BAR_CELLS = 30
_BAR_S = 0.2
FORMAT = 1


@dataclass
class Tally:
    """What became of the records of one import."""

    sent: int = 0
    accepted: int = 0
    beyond_retention: int = 0
    refused: int = 0
    reasons: list[str] = field(default_factory=list)  # the first of other refusals and of fields left out
    servers: set[str] = field(default_factory=set)
    values: dict[str, int] = field(default_factory=dict)  # by metric

    def note(self, table: "pa.Table", answer: FeedAnswer) -> None:
        """Count one piece and what the daemon said of it."""
        import pyarrow.compute as pc

        self.sent += len(table)
        self.accepted += answer.received
        n_old = sum(error.startswith(_TOO_OLD) for error in answer.errors)
        if n_old == len(answer.errors) > 0:  # the answer holds the first reasons alone
            n_old = answer.rejected
        self.beyond_retention += n_old
        self.refused += answer.rejected - n_old
        said = (*(error for error in answer.errors if not error.startswith(_TOO_OLD)), *answer.fields)
        self.reasons += [reason for reason in said if reason not in self.reasons][
            : _REASONS - len(self.reasons)
        ]
        self.servers.update(pc.unique(table[SERVER]).to_pylist())
        for name in table.column_names:
            if name not in (TIME, SERVER):
                self.values[name] = self.values.get(name, 0) + len(table) - table[name].null_count


class Delivery:
    """Sends tables; the records of one import."""

    def __init__(self, client: DaemonClient, stop: Stop, *, give_up_s: float) -> None:
        self._sender = RecordSender(client, stop, give_up_s=give_up_s)
        self._began_s = monotonic()
        self.tally = Tally()

    def send(self, table: "pa.Table") -> bool:
        """Deliver a table in bounded requests; False when the stop was requested before all was taken.

        Raises:
            DaemonAway: the daemon does not take it, or not any more.
        """
        n_rows = max(1, min(PIECE_ROWS, PIECE_VALUES // max(1, table.num_columns - 2)))
        for start in range(0, len(table), n_rows):
            piece = table.slice(start, n_rows)
            answer = self._sender.send(piece)
            if answer is None:
                return False
            self.tally.note(piece, answer)
        return True

    @property
    def wall_s(self) -> float:
        """Return for how long this import has been running."""
        return monotonic() - self._began_s


class Bar:
    """How far an import came, on a terminal; nothing anywhere else."""

    def __init__(self) -> None:
        self._is_shown = sys.stderr.isatty()
        self._drawn_s = float("-inf")
        self._began_s = monotonic()

    def show(self, share: float, n_records: int) -> None:
        """Draw it again, a few times a second.

        Args:
            share: 0 to 1, of the work that was there at the start.
        """
        now_s = monotonic()
        if not self._is_shown or (now_s - self._drawn_s < _BAR_S and share < 1.0):
            return
        self._drawn_s = now_s
        print(f"\r\x1b[K{draw(share, n_records, now_s - self._began_s)}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self._is_shown and self._drawn_s > float("-inf"):
            print(file=sys.stderr)


def draw(share: float, n_records: int, spent_s: float) -> str:
    """Return the bar's line.

    >>> draw(0.5, 1200, 150.0)
    '[###############...............]  50 %  1,200 records, about 2 min left'
    """
    full = round(share * _BAR_CELLS)
    left_s = spent_s / share * (1 - share) if 0.02 < share < 1 else 0.0
    length = f"{left_s / 60:.0f} min" if left_s >= 120 else f"{left_s:.0f} s"
    left = f", about {length} left" if left_s else ""
    return f"[{'#' * full}{'.' * (_BAR_CELLS - full)}] {100 * share:3.0f} %  {n_records:,} records{left}"


@dataclass(frozen=True)
class State:
    """How far an import came; nothing of it is done where the two are equal."""

    path: Path
    what: Mapping[str, Any]
    start_ms: int = 0
    done_to_ms: int = 0

    @classmethod
    def read(cls, path: Path | None, what: Mapping[str, Any]) -> Self:
        """Return the state of this import, an empty one where none was written.

        Args:
            path: None is the file of this import in the working directory.
        Raises:
            CorruptFile, UnknownFormat: the file is not one of ours.
        """
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
        path = path or Path(f"fleetcast_import_{digest}.json")
        if not path.exists():
            return cls(path, what)
        found = read_json(path)
        if found.get("format") != FORMAT:
            raise UnknownFormat(path, f"format {found.get('format')!r}", hint="move it away to begin anew")
        if found.get("what") != dict(what):
            raise UnknownFormat(
                path, "it belongs to another import", hint="name another file, or move it away"
            )
        return cls(path, what, int(found["start"]), int(found["done_to"]))

    def rest_of(self, start_ms: int, end_ms: int) -> tuple[int, int]:
        """Return what is left to do of a stretch: from where on, and from where on all will be done then.

        >>> State(Path("x"), {}, 10, 50).rest_of(20, 90), State(Path("x"), {}, 10, 50).rest_of(5, 90)
        ((50, 10), (5, 5))
        """
        is_further = self.start_ms <= start_ms <= self.done_to_ms
        return (min(self.done_to_ms, end_ms), self.start_ms) if is_further else (start_ms, start_ms)

    def write(self, start_ms: int, done_to_ms: int) -> None:
        """Note what is done; raises StorageFull, StorageBroken."""
        readable = {"from": iso_z(from_ms(start_ms)), "to": iso_z(from_ms(done_to_ms))}
        numbers = {"start": start_ms, "done_to": done_to_ms}
        write_json(self.path, {"format": FORMAT, "what": dict(self.what), **numbers, **readable})
