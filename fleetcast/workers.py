"""Work that must go on for as long as a program lives: its threads, and the steps of its loop.

Owns: what becomes of one that fails or ends unasked. It is logged with the traceback, counted, told to
`on_failure`, said in `problems`, and begun again after a pause that grows with each failure in a row.
Does not know: what the work is, how a program says its problems.
"""

import logging
import threading
from collections.abc import Callable

from fleetcast.clock import monotonic
from fleetcast.errors import FleetcastError, OwnershipLost

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, MOST_PAUSE_S = 1.0, 60.0
CALM_S = 120.0  # without a failure: the next one counts as the first, and nothing is said any more
_MOST_CHARS = 300  # of an error in a problem


class GrowingPause:
    """A wait that doubles each time it begins; not thread safe."""

    def __init__(self, first_s: float = FIRST_PAUSE_S, most_s: float = MOST_PAUSE_S) -> None:
        self._first_s, self._most_s = first_s, most_s
        self._next_s = first_s
        self._until = float("-inf")

    @property
    def left_s(self) -> float:
        """How long it still lasts, 0.0 if it is over."""
        return max(0.0, self._until - monotonic())

    def begin(self) -> float:
        """Begin the next one; return its length."""
        length_s = self._next_s
        self._until = monotonic() + length_s
        self._next_s = min(2 * length_s, self._most_s)
        return length_s

    def reset(self) -> None:
        """End it, and let the next one be short again."""
        self._next_s, self._until = self._first_s, float("-inf")


class Worker:
    """What is known of one piece of work; may be read from any thread."""

    def __init__(self, name: str, on_failure: Callable[[str, BaseException], None]) -> None:
        self.name = name
        self.n_failures = 0  # since the start
        self._on_failure = on_failure
        self._pause = GrowingPause()
        self._in_a_row = 0
        self._failed_at = float("-inf")
        self._newest_error = ""

    @property
    def rest_s(self) -> float:
        """How long it still pauses after a failure."""
        return self._pause.left_s

    @property
    def problem(self) -> str:
        """Return what people should know about it, "" while it is well."""
        if not self._in_a_row or monotonic() - self._failed_at > CALM_S + MOST_PAUSE_S:
            return ""
        times = "once" if self._in_a_row == 1 else f"{self._in_a_row} times in a row"
        begins = f"it begins again in {self.rest_s:.0f} s" if self.rest_s else "it was begun again"
        return f"{self.name} failed {times}, {begins}: {self._newest_error}"

    def run(self, work: Callable[[], None]) -> bool:
        """Do the work unless it pauses; return whether it was done. A failure is noted and goes no further.

        Raises:
            OwnershipLost: nothing more may be written; the program has to end.
        """
        if self.rest_s:
            return False
        try:
            work()
        except OwnershipLost:
            raise
        except Exception as error:  # the loop boundary: the other steps go on
            self.note_failure(error)
            return False
        self.note_success()
        return True

    def note_failure(self, error: BaseException) -> None:
        """Take a failure into account; the pause before the next try begins."""
        if monotonic() - self._failed_at > CALM_S + MOST_PAUSE_S:
            self._in_a_row = 0
            self._pause.reset()
        self._failed_at = monotonic()
        self.n_failures += 1
        self._newest_error = (str(error) or type(error).__name__)[:_MOST_CHARS]
        pause_s = self._pause.begin()
        self._in_a_row += 1
        trace = None if isinstance(error, FleetcastError) else error
        logger.error(
            "worker failed worker=%s failures=%d pause_s=%g error=%r",
            *(self.name, self._in_a_row, pause_s, error),
            exc_info=trace,
        )
        self._on_failure(self.name, error)

    def note_success(self) -> None:
        """Take into account that the work was done to its end."""
        if self._in_a_row:
            logger.info("worker is well again worker=%s", self.name)
            self._in_a_row = 0
            self._pause.reset()


class WorkerThread:
    """A thread that begins its work again when it fails; a return means that the work is done."""

    def __init__(self, worker: Worker, work: Callable[[], None], *, once: bool = False) -> None:
        """Prepare it.

        Args:
            once: a failure ends the thread, too; the owner looks at `worker.rest_s` and starts it again.
        """
        self.worker = worker
        self._work = work
        self._once = once
        self._ending = threading.Event()
        self._starting = threading.Lock()  # until it is alive, it looks as if it were gone
        self._is_wanted = False
        self._thread: threading.Thread | None = None

    @property
    def is_alive(self) -> bool:
        """Whether it works, or pauses before it works again."""
        with self._starting:
            return self._is_there()

    def start(self) -> None:
        """Begin; daemon threads, since a stop does not wait for them without a limit."""
        with self._starting:
            self._begin()

    def stop(self) -> None:
        """End a pause, and begin nothing again after the next failure; the work has to be told itself."""
        self._ending.set()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; return whether it came."""
        with self._starting:
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return not self.is_alive

    def look_after(self) -> None:
        """Start it again if it is gone without having come to its end."""
        with self._starting:
            is_gone = self._is_wanted and not self._is_there() and not self._ending.is_set()
            if is_gone and not self.worker.rest_s:
                self.worker.note_failure(RuntimeError("its thread was gone"))
                self._begin()

    def _is_there(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _begin(self) -> None:
        """Start the thread; caller holds the lock."""
        self._is_wanted = True
        thread = threading.Thread(target=self._run, name=self.worker.name, daemon=True)
        thread.start()
        self._thread = thread

    def _run(self) -> None:
        while True:
            try:
                self._work()
            except (Exception, SystemExit, KeyboardInterrupt) as error:  # would end it without a word
                self.worker.note_failure(error)
            else:
                self._is_wanted = False
                if self._once:
                    self.worker.note_success()
                return
            if self._once or self._ending.is_set():
                self._is_wanted = False
                return
            self._ending.wait(self.worker.rest_s)


class Workers:
    """The workers of one program."""

    def __init__(self, on_failure: Callable[[str, BaseException], None] = lambda _name, _error: None) -> None:
        """Begin without any.

        Args:
            on_failure: told the name and the error, on the thread that failed.
        """
        self._on_failure = on_failure
        self._workers: list[Worker] = []
        self._threads: list[WorkerThread] = []

    def step(self, name: str) -> Worker:
        """Return a new worker for a step of a loop."""
        worker = Worker(name, self._on_failure)
        self._workers.append(worker)
        return worker

    def thread(self, name: str, work: Callable[[], None], *, once: bool = False) -> WorkerThread:
        """Return a new thread, not started yet; see `WorkerThread`."""
        thread = WorkerThread(self.step(name), work, once=once)
        self._threads.append(thread)
        return thread

    def look_after(self) -> None:
        """Start threads again that are gone; called from a loop."""
        for thread in self._threads:
            thread.look_after()

    def problems(self) -> list[str]:
        """Return what is wrong now, and what was until a few minutes ago."""
        return list(dict.fromkeys(worker.problem for worker in self._workers if worker.problem))

    def failures(self) -> dict[str, int]:
        """Return how often those of each name failed since the start."""
        found = dict.fromkeys((worker.name for worker in self._workers), 0)
        for worker in self._workers:
            found[worker.name] += worker.n_failures
        return found
