"""How a daemon stops and how it repeats: `Stop` and `run_every`.

Owns: signal handling and the tick. Does not know: what a cycle does.
Learned from: huey `consumer.py` (skipped ticks), uvicorn `server.py` (second signal).
"""

import logging
import os
import queue
import signal
from collections.abc import Callable
from types import FrameType

from fleetcast.clock import monotonic
from fleetcast.errors import FleetcastError

logger = logging.getLogger(__name__)

ALIVE_S = 60.0


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
        """Let SIGTERM and SIGINT request the stop."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def request(self, reason: str) -> None:
        """Ask the loop to end; safe from any thread and from a signal handler."""
        self._requests.put(reason)

    def wake(self) -> None:
        """Let `wait` return early with no stop requested: there is work; safe from any thread."""
        self._requests.put("")

    def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s`, or until `wake`; return whether the stop was requested."""
        if not self.is_requested and not self._is_woken and timeout_s > 0:
            self._note(block=True, timeout_s=timeout_s)
        self._is_woken = False
        return bool(self.reason)

    def _note(self, *, block: bool, timeout_s: float) -> None:
        if self.reason:
            return
        try:
            self.reason = self._requests.get(block=block, timeout=timeout_s if block else None)
            while not self.reason:  # many calls of `wake` are one
                self._is_woken = True
                self.reason = self._requests.get_nowait()
        except queue.Empty:
            return

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
    """
    failures = 0
    due = monotonic()
    while not _wait_until(due, stop, alive):
        try:
            cycle()
            failures = 0
        except FleetcastError as error:
            failures += 1
            logger.error("cycle failed error=%s failures=%d", error, failures)
        except Exception:  # the loop boundary: whatever it was, the daemon must live on
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
