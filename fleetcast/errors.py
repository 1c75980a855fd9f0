"""The error tree and the exit codes of every program.

Owns: which failures exist and which exit code each one means.
Does not know: who raises them.
"""

import unicodedata
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

_QUOTED_MAX_CHARS = 80
# Letters and symbols to Unicode that show nothing: Hangul's fillers, Braille's blank, a note without a head.
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u2800\U0001d159")


class ExitCode(IntEnum):
    """Exit status of the programs; 128 + n means a second signal n ended it."""

    OK = 0
    FAILED = 1
    BAD_SETTINGS = 2
    CANNOT_START = 3
    ALREADY_RUNNING = 4
    NOT_ENOUGH_DATA = 5
    COULD_NOT_LOOK = 6


def printable(text: str) -> str:
    """Return a text that others chose with its control characters written out: none steers a terminal.

    >>> printable("caf\u00e9 \x1b[31mred")
    'caf\u00e9 \\\\x1b[31mred'
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def quote(text: object) -> str:
    """Return what others sent, in quotes, as a message repeats it: on one line, and no more than its start.

    >>> quote("web-01"), quote("x" * 5000) == "'" + "x" * 80 + "...'"
    ("'web-01'", True)
    """
    sent = text if isinstance(text, str) else repr(text)
    if len(sent) > _QUOTED_MAX_CHARS:
        sent = f"{sent[:_QUOTED_MAX_CHARS]}..."
    return repr(sent) if isinstance(text, str) else sent


def is_visible(text: str) -> bool:
    """Whether a text shows anything: not only blanks and marks that want a character before them.

    >>> is_visible("caf\u00e9"), is_visible("\u0301"), is_visible("\u200b"), is_visible("\u3164 ")
    (True, False, False, False)
    """
    return any(unicodedata.category(char)[0] in "LNPS" and char not in _BLANK for char in text)


class FleetcastError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code = ExitCode.FAILED

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.hint = hint


class SettingsError(FleetcastError):
    """Raised when settings are wrong; carries every problem found, not only the first."""

    exit_code = ExitCode.BAD_SETTINGS

    def __init__(self, problems: Sequence[str], *, hint: str = "") -> None:
        super().__init__("; ".join(problems), hint=hint)
        self.problems = tuple(problems)


class CannotStart(FleetcastError):
    """Raised when a program cannot begin its work: port taken, no permission, no folder."""

    exit_code = ExitCode.CANNOT_START


class AlreadyRunning(FleetcastError):
    """Raised when another process owns what this one needs to own."""

    exit_code = ExitCode.ALREADY_RUNNING

    def __init__(self, what: str, pid: int | None, *, hint: str = "") -> None:
        holder = f"pid {pid}" if pid else "another process"
        super().__init__(f"{what} is already held by {holder}", hint=hint)
        self.pid = pid


class NotEnoughData(FleetcastError):
    """Raised when the data cannot carry a training."""

    exit_code = ExitCode.NOT_ENOUGH_DATA


class BadData(FleetcastError):
    """Raised when input handed to a Python interface is not of the documented shape."""


class StorageFull(FleetcastError):
    """Raised when the disk refuses bytes; nothing of the refused write is kept."""


class StorageBroken(FleetcastError):
    """Raised when a write could not be made durable for another reason than a full disk."""


class OwnershipLost(StorageBroken):
    """Raised when this process is no longer the one writer of its folder: the program ends at once."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what} is lost: {why}", hint="nothing more was written; move it back, or restart")


class CorruptFile(FleetcastError):
    """Raised when bytes on disk are not what was written there."""

    def __init__(self, path: Path, why: str, *, hint: str = "") -> None:
        super().__init__(f"{path}: {why}", hint=hint)
        self.path, self.why = path, why


class UnknownFormat(CorruptFile):
    """Raised when a file carries a format version this program does not read."""


class BadCheckpoint(CorruptFile):
    """Raised when a model version cannot be served: missing, damaged, foreign or unsafe."""


class OtherBins(BadCheckpoint):
    """Raised when an intact model was made for other bins or horizons than those in service."""


class BadOrder(FleetcastError):
    """Raised when what a person orders is not of the documented form; nothing was written."""

    exit_code = ExitCode.BAD_SETTINGS


class OrderRefused(FleetcastError):
    """Raised when an order cannot be carried out as things stand; the audit says why."""


class ClusterAway(FleetcastError):
    """Raised when no other machine can carry a training out; the caller does it itself."""


class TrainingLost(FleetcastError):
    """Raised when a training failed on another machine, as it would on this one."""


class DaemonAway(FleetcastError):
    """Raised when the inference daemon cannot be asked, or answers with an error."""


class CannotLook(FleetcastError):
    """Raised when a program finds nothing to look at: no buffer in the folder and no daemon to ask."""

    exit_code = ExitCode.COULD_NOT_LOOK


class NotDelivered(FleetcastError):
    """Raised when a channel did not take a message; says nothing of its address, which may hold a key."""

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
