"""How a daemon repeats, stops, tells systemd, and logs.

Owns: `Stop` and the signals behind it, the tick (`run_every`), the notify protocol of systemd
(`SystemdNotifier`), log handlers and the line format. Does not know: what a cycle does.
Learned from: huey `consumer.py` (skipped ticks), uvicorn `server.py` (second signal).
"""

import ctypes
import logging
import logging.handlers
import os
import queue
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Any

from fleetcast.clock import monotonic, utc_struct_time
from fleetcast.errors import CannotStart, FleetcastError, OwnershipLost
from fleetcast.files import open_append
from fleetcast.settings import LoggingSettings

logger = logging.getLogger(__name__)

_M_ARENA_MAX, _ARENAS = -8, 2  # mallopt(3); more arenas hold more and make nothing faster under the GIL
_TRIM_S = 5.0
_TRIM_FROM_BYTES = 32 * 2**20  # trimming costs milliseconds
_HANGUP = "signal SIGHUP"
ALIVE_S = 60.0  # between two signs of life to systemd
_FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s"
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


class Stop:
    """A request to end, noted by a signal handler and awaited by the loop.

    `SimpleQueue.put` is reentrant, so the handler cannot deadlock in the main thread's own
    wait as `threading.Event.set` can. The second signal ends the process at once (128 + n).
    """

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._signalled = False
        self._is_woken = False
        self.reason = ""

    @property
    def is_requested(self) -> bool:
        """Whether the loop should end."""
        self._note(block=False, timeout_s=0.0)
        return bool(self.reason)

    def install(self) -> None:
        """Let SIGTERM and SIGINT request the stop; SIGHUP (logrotate's) ends nothing and is logged."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        signal.signal(signal.SIGHUP, lambda *_: self._requests.put(_HANGUP))  # a handler must not log

    def request(self, reason: str) -> None:
        """Ask the loop to end; safe from any thread and from a signal handler."""
        self._requests.put(reason)

    def wake(self) -> None:
        """Let `wait` return early with no stop requested: there is work; safe from any thread."""
        self._requests.put("")

    def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s`, or until `wake`; return whether the stop was requested."""
        until = monotonic() + timeout_s
        while not self.is_requested and not self._is_woken and timeout_s > 0:
            self._note(block=True, timeout_s=timeout_s)
            timeout_s = until - monotonic()
        self._is_woken = False
        return bool(self.reason)

    def _note(self, *, block: bool, timeout_s: float) -> None:
        if self.reason:
            return
        try:
            self._take(self._requests.get(block=block, timeout=timeout_s if block else None))
            while not self.reason:  # many calls of `wake` are one
                self._take(self._requests.get_nowait())
        except queue.Empty:
            return

    def _take(self, request: str) -> None:
        if request == _HANGUP:
            logger.info("signal SIGHUP ends nothing: a log that was moved is begun anew by itself")
        elif request:
            self.reason = request
        else:
            self._is_woken = True

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._signalled:
            os._exit(128 + number)
        self._signalled = True
        self.request(f"signal {signal.Signals(number).name}")


def run_every(
    cycle: Callable[[], None],
    interval_s: float,
    stop: Stop,
    *,
    max_failures: int = 10,
    alive: Callable[[], None] = lambda: None,
) -> bool:
    """Call `cycle` every `interval_s` of wall time, and at each `stop.wake`, until the stop is requested.

    Missed ticks are skipped, not replayed. A failing cycle is logged and the next tick tries
    again; after `max_failures` in a row the loop gives up, for the supervisor to restart.
    `alive` is called before each cycle and every `ALIVE_S` of a longer wait, so that a watchdog
    bounds a cycle and not the interval.

    Returns:
        True after a requested stop, False after too many failures.
    Raises:
        OwnershipLost: the cycle found that this process may write no more.
    """
    failures = 0
    due = monotonic()
    while not _wait_until(due, stop, alive):
        try:
            cycle()
            failures = 0
        except OwnershipLost as error:  # another cycle would write where another process may
            logger.error("the program ends error=%s", error)
            raise
        except FleetcastError as error:
            failures += 1
            logger.error("cycle failed error=%s failures=%d", error, failures)
        except Exception:  # the loop boundary: the daemon must live on
            failures += 1
            logger.exception("cycle failed failures=%d", failures)
        if failures >= max_failures:
            return False
        late_s = monotonic() - due
        if late_s >= 0:  # not a cycle that `wake` slipped in before its tick
            missed = int(late_s // interval_s) if interval_s > 0 else 0
            due += (missed + 1) * interval_s
    return True


def _wait_until(due: float, stop: Stop, alive: Callable[[], None]) -> bool:
    """Wait for `due`, or for `wake`; return whether the stop was requested."""
    while True:
        alive()
        until = min(due, monotonic() + ALIVE_S)
        has_stopped = stop.wait(max(0.0, until - monotonic()))
        if has_stopped or until >= due or monotonic() < until:  # stopped, due, or woken early
            return has_stopped


class FreeMemory:
    """Gives memory that is free but held by glibc's allocator back to the system.

    Each thread that allocates gets an arena, and what large requests leave in many arenas stays there
    for good: ten bursts of abandoned reads left 4 GB. Elsewhere than on glibc nothing happens.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self._trim: Any = getattr(libc, "malloc_trim", None)
        if self._trim is not None:
            libc.mallopt(_M_ARENA_MAX, _ARENAS)
        self._kept_bytes = _resident_bytes()
        self._trimmed_at = monotonic()

    def give_back(self) -> None:
        """Do it where the process has grown since the last time; called about every second."""
        if self._trim is None or monotonic() - self._trimmed_at < _TRIM_S:
            return
        self._trimmed_at = monotonic()
        if _resident_bytes() - self._kept_bytes > _TRIM_FROM_BYTES:
            self._trim(0)
            self._kept_bytes = _resident_bytes()
        else:
            self._kept_bytes = min(self._kept_bytes, _resident_bytes())


def _resident_bytes() -> int:
    """Return the resident memory, 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


class SystemdNotifier:
    """Sends sd_notify(3) datagrams to the socket named in `NOTIFY_SOCKET`; a lost one is no error.

    A daemon that systemd did not start has no such socket: every call does nothing, so that callers
    need no condition. Call `alive()` from the working loop only: a thread of its own would vouch for
    a loop that hangs.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        address = (os.environ if environ is None else environ).get("NOTIFY_SOCKET", "")
        # a leading @ stands for the NUL of Linux's abstract socket names
        self._address = f"\0{address[1:]}" if address.startswith("@") else address

    def ready(self, status: str = "") -> None:
        """Say that start-up is done and the service does what it is for."""
        self._send("READY=1", status)

    def alive(self, status: str = "") -> None:
        """Say that the working loop has come round; systemd kills a unit that stops saying so."""
        self._send("WATCHDOG=1", status)

    def stopping(self, status: str = "") -> None:
        """Say that the service is ending in good order."""
        self._send("STOPPING=1", status)

    def extend_timeout(self, seconds: float) -> None:
        """Ask for `seconds` more before start-up (a long log replay) counts as failed."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}", "")

    def _send(self, state: str, status: str) -> None:
        if not self._address:
            return
        message = state + (f"\nSTATUS={status.replace(chr(10), ' ')}" if status else "")
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as link:
                link.settimeout(1.0)  # a stuck supervisor must not stall the loop
                link.sendto(message.encode(), self._address)
        except OSError as error:
            logger.warning("cannot notify systemd state=%s error=%s", state, error)


class _OneLineFormatter(logging.Formatter):
    """UTC times; a message is one line, and a traceback follows on lines of its own.

    Control characters are escaped, so that no record sent by a client can forge a log line.
    """

    def format(self, record: logging.LogRecord) -> str:
        record.message = record.getMessage().translate(_ESCAPES)
        record.asctime = self.formatTime(record, self.datefmt)
        line = self.formatMessage(record)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _LogFile(logging.handlers.RotatingFileHandler):
    """Follows its name: once logrotate has moved the file, the next line begins a new one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record to the file that has the name now."""
        try:
            if self.stream is not None and not os.path.samestat(
                os.fstat(self.stream.fileno()), Path(self.baseFilename).stat()
            ):
                self._reopen()
        except OSError:  # moved away, or its folder is
            self._reopen()
        super().emit(record)

    def _open(self) -> TextIOWrapper:
        return TextIOWrapper(open_append(Path(self.baseFilename)), encoding=self.encoding)

    def _reopen(self) -> None:
        if self.stream is not None:
            self.stream.close()
        try:
            self.stream = self._open()
        except OSError:  # the next line tries again
            self.stream = None


def _is_of_use(record: logging.LogRecord) -> bool:
    """Whether a record is of use and holds no key.

    torch logs figures about itself as it ends; urllib3 and apprise log addresses, and that of a webhook is
    a key.
    """
    is_quiet = record.name.startswith("torch") and record.levelno < logging.WARNING
    return not is_quiet and not record.name.startswith(("urllib3", "apprise"))


def configure_logging(path: Path | None, settings: LoggingSettings) -> None:
    """Send the log to stderr and, where `path` is given, to a rotating file.

    Raises:
        CannotStart: the log file cannot be opened.
    """
    formatter = _OneLineFormatter(_FORMAT, datefmt="%Y-%m-%dT%H:%M:%S")
    formatter.converter = utc_struct_time
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if path is not None:
        try:
            handlers.append(
                _LogFile(
                    path,
                    maxBytes=settings.file_max_bytes,
                    backupCount=settings.file_count - 1,
                    encoding="utf-8",
                )
            )
        except OSError as error:
            raise CannotStart(f"cannot open the log file {path}: {error.strerror}") from error
    root = logging.getLogger()
    root.handlers[:] = handlers
    for handler in handlers:
        handler.setFormatter(formatter)
        handler.addFilter(_is_of_use)
    root.setLevel(settings.level)
    logging.captureWarnings(capture=True)
