"""What the inference daemon says: its status and its fleet's load, without ever hanging on it.

Owns: asking in a thread, so that a daemon that hangs does not make this one hang at a stop.
Does not know: HTTP (`sources.client`), limits.
"""

import logging
import queue
import threading
from typing import Any
from urllib.parse import urlsplit

from fleetcast.errors import DaemonAway, FleetcastError
from fleetcast.loop import Stop
from fleetcast.retraining.quiet import FleetLoad, fleet_load
from fleetcast.sources.client import LOOPBACK, DaemonClient

logger = logging.getLogger(__name__)

_LOOK_S = 0.05

_Answer = dict[str, Any] | FleetcastError


class Inquiry:
    """Asks one daemon; each question is one bounded request. Not thread safe."""

    def __init__(self, url: str, timeout_s: float) -> None:
        DaemonClient(url, timeout_s=timeout_s).close()  # a wrong address is told now, not at each check
        self._url = url
        self._timeout_s = timeout_s
        self._is_on_this_host = urlsplit(url).hostname in LOOPBACK
        self.served_version: str | None = None  # None: not known
        self.pids: tuple[int, ...] = ()  # of the daemon, where it runs on this host

    def look(self, stop: Stop) -> None:
        """Learn which version is served and as which process; away leaves both unknown."""
        self.served_version, self.pids = None, ()
        try:
            status = self._ask("/status", stop)
        except DaemonAway as error:
            logger.warning("inference daemon away error=%s", error)
            return
        model, pid = status.get("model"), status.get("pid")
        version = model.get("version") if isinstance(model, dict) else None
        self.served_version = version if isinstance(version, str) else None
        if self._is_on_this_host and isinstance(pid, int) and not isinstance(pid, bool) and pid > 0:
            self.pids = (pid,)

    def fleet(self, stop: Stop) -> FleetLoad:
        """Return the load of the live servers, or why it cannot be told."""
        try:
            return fleet_load(self._ask("/predictions/current?fields=current", stop))
        except DaemonAway as error:
            return FleetLoad(away=str(error))

    def _ask(self, path: str, stop: Stop) -> dict[str, Any]:
        answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        threading.Thread(target=self._get, args=(path, answers), name="inquiry", daemon=True).start()
        while True:
            try:
                answer = answers.get(timeout=_LOOK_S)
            except queue.Empty:
                if stop.is_requested:
                    raise DaemonAway(f"{self._url}{path} was not waited for: {stop.reason}") from None
                continue
            if isinstance(answer, FleetcastError):
                raise answer
            return answer

    def _get(self, path: str, answers: "queue.SimpleQueue[_Answer]") -> None:
        try:
            with DaemonClient(self._url, timeout_s=self._timeout_s) as client:
                answers.put(client.get(path))
        except FleetcastError as error:
            answers.put(error)
        except Exception as error:  # the thread's boundary: silence would leave the asker waiting
            answers.put(DaemonAway(f"{self._url}{path} could not be asked: {error!r}"))
