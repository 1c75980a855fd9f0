"""What people order: one file each in `checkpoints/orders/`, kept until it is carried out or refused.

Owns: what an order may say, its file, which orders wait, who gave one. Does not know: how an order is
carried out (`desk`), commands (`command`), HTTP (`api/promotion`).

A file appears in one rename and goes only after the audit says how the order ended: after any kill the
next look finds it again. Its id makes it once: what the audit has ended is never carried out again.
"""

import getpass
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fleetcast import files
from fleetcast.clock import iso_z, parse_plain_utc
from fleetcast.errors import BadOrder, CorruptFile, StorageBroken, is_visible
from fleetcast.forecast.registry import ORDERS_FOLDER
from fleetcast.promotion.audit import APPROVE, HOLD, PAUSE, PROMOTE, RESUME, ROLLBACK, TRAIN_NOW, VETO

FORMAT = 1
KINDS = (PROMOTE, APPROVE, VETO, HOLD, RESUME, ROLLBACK, PAUSE, TRAIN_NOW)
NEED_VERSION = (PROMOTE, APPROVE, VETO)
MAY_FORCE = (PROMOTE, TRAIN_NOW)
TAKE_VERSION = (*NEED_VERSION, ROLLBACK)
MAX_REASON = 500
MAX_NAME = 64
MAX_WAITING = 100
MAX_BYTES = 16_384
LONGEST_PAUSE = timedelta(days=90)
_ID = re.compile(r"\d{8}T\d{12}Z-[0-9a-f]{8}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


@dataclass(frozen=True, slots=True)
class Order:
    """One order; every instance is of the documented form."""

    id: str
    kind: str
    at: str
    by: str
    reason: str
    version: str | None = None  # promote, approve, veto: which; rollback: back to which, None = the previous
    champion: str | None = None  # the version that the person saw in service; None: not asked
    until: str | None = None  # of a pause
    force: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BadOrder(f"an order is one of {', '.join(KINDS)}, got {_shown(self.kind)}")
        if not isinstance(self.id, str) or not _ID.fullmatch(self.id):
            raise BadOrder(f"not an order's id: {_shown(self.id)}")
        _check_text("reason", self.reason, MAX_REASON)
        _check_text("by", self.by, MAX_NAME)
        _check_version("version", self.version)
        _check_version("champion", self.champion)
        self._check_fields()
        moment(self.at)

    def _check_fields(self) -> None:
        if self.kind in NEED_VERSION and self.version is None:
            raise BadOrder(f"{self.kind} needs a version")
        if self.kind not in TAKE_VERSION and self.version is not None:
            raise BadOrder(f"{self.kind} takes no version")
        if not isinstance(self.force, bool) or (self.force and self.kind not in MAY_FORCE):
            raise BadOrder(f"force is true or false, for {' and '.join(MAY_FORCE)} only")
        if self.kind == PAUSE:
            self._check_end()
        elif self.until is not None:
            raise BadOrder(f"{self.kind} takes no until")

    def _check_end(self) -> None:
        given, end = moment(self.at), moment(self.until)
        if not given < end <= given + LONGEST_PAUSE:
            days = LONGEST_PAUSE.days
            raise BadOrder(f"until must be in the future, at most {days} days, got {_shown(self.until)}")

    def age(self, now: datetime) -> timedelta:
        """Return how long ago it was given."""
        return now - moment(self.at)


def new_order(kind: str, reason: str, by: str, now: datetime, **more: Any) -> Order:
    """Return an order that is given now.

    Raises:
        BadOrder: it says what is wrong and what would be right.
    """
    until = more.pop("until", None)
    order_id = f"{now:%Y%m%dT%H%M%S%fZ}-{secrets.token_hex(4)}"
    end = None if until is None else iso_z(moment(until))
    text = reason.strip() if isinstance(reason, str) else reason
    return Order(order_id, kind, iso_z(now), by, text, until=end, **more)


def moment(text: object) -> datetime:
    """Return the time that a text names; without an offset it is UTC.

    Raises:
        BadOrder: it names none.
    """
    try:
        if isinstance(text, str) and len(text) <= MAX_NAME:
            return parse_plain_utc(text)
    except (ValueError, OverflowError):
        pass
    raise BadOrder(f"a time looks like 2026-01-15T18:00Z, got {_shown(text)}")


def this_user() -> str:
    """Return who runs this program, for the audit."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = f"uid {os.getuid()}"
    behind = os.environ.get("SUDO_USER")
    named = f"{behind} as {user}" if behind and behind != user else user
    return "".join(char for char in named if char.isprintable())[:MAX_NAME] or f"uid {os.getuid()}"


def submit(checkpoint_dir: Path, order: Order) -> None:
    """Write an order down durably; from here on it is not lost.

    Raises:
        BadOrder: too many orders wait already.
        StorageFull, StorageBroken: it is not written.
    """
    folder = checkpoint_dir / ORDERS_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        hint = "move it away, then give the order again"
        raise StorageBroken(f"{folder} is no folder, so no order can be written down", hint=hint) from error
    except OSError as error:
        raise files.storage_error(folder, error) from error
    if len(_names(folder)) >= MAX_WAITING:
        raise BadOrder(f"{MAX_WAITING} orders wait already", hint="is the retraining daemon running?")
    files.write_json(folder / f"{order.id}.json", {"format": FORMAT, **asdict(order)})


def waiting(checkpoint_dir: Path) -> Iterator[tuple[Path, Order | BadOrder]]:
    """Yield every order that waits, oldest first, or what is wrong with its file."""
    folder = checkpoint_dir / ORDERS_FOLDER
    for name in _names(folder):
        path = folder / name
        try:
            yield path, _read(path)
        except FileNotFoundError:  # carried out by another process meanwhile
            continue
        except (BadOrder, CorruptFile, OSError, TypeError) as error:
            yield path, error if isinstance(error, BadOrder) else BadOrder(f"not an order: {error}")


def any_waiting(checkpoint_dir: Path) -> bool:
    """Return whether an order waits; cheap."""
    return bool(_names(checkpoint_dir / ORDERS_FOLDER))


def _names(folder: Path) -> list[str]:
    try:
        found = [entry.name for entry in os.scandir(folder) if not entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return sorted(name for name in found if name.endswith(".json") and not name.startswith("."))


def _read(path: Path) -> Order:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
        raise BadOrder(f"not an order: no regular file of at most {MAX_BYTES} bytes")
    raw: Mapping[str, Any] = files.read_json(path)
    if raw.get("format") != FORMAT:
        raise BadOrder(f"order format {_shown(raw.get('format'))}", hint=f"this program reads {FORMAT}")
    order = Order(**{name: value for name, value in raw.items() if name != "format"})
    if path.stem != order.id:
        raise BadOrder("not an order: its file has another name")
    return order


def _check_text(name: str, text: object, longest: int) -> None:
    """Refuse what would not print as one line; a reason is for people to read."""
    if not isinstance(text, str) or not is_visible(text):
        raise BadOrder(f"{name} is needed: a sentence for the people who read the audit later")
    if len(text) > longest:
        raise BadOrder(f"{name} has {len(text)} characters, at most {longest}")
    odd = next((char for char in text if not char.isprintable()), None)
    if odd is not None:
        raise BadOrder(f"{name} must be one printable line, it has {_shown(odd)}")


def _check_version(name: str, text: object) -> None:
    if text is not None and not (isinstance(text, str) and _VERSION.fullmatch(text)):
        raise BadOrder(f"{name} must be an id like 20260115T100005Z-3f2a, got {_shown(text)}")


def _shown(value: object) -> str:
    return ascii(value)[:80]
