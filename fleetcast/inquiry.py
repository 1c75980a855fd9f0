"""Questions to the inference daemon that a stop can interrupt.

Owns: asking in a thread, so that a daemon that hangs does not make this one hang at a stop.
Does not know: what the answers mean; HTTP (`sources.client`).
"""

import queue
import threading
from typing import Any

from fleetcast.errors import DaemonAway, FleetcastError
from fleetcast.loop import Stop
from fleetcast.sources.client import DaemonClient

_LOOK_S = 0.05

_Answer = dict[str, Any] | FleetcastError


class Inquiry:
    """Asks one daemon; each question is one bounded request."""

    def __init__(self, url: str, timeout_s: float) -> None:
        DaemonClient(url, timeout_s=timeout_s).close()  # a wrong address is told now, not at each check
        self._url = url
        self._timeout_s = timeout_s

    def ask(self, path: str, stop: Stop) -> dict[str, Any]:
        """Return the JSON object at `path`.

        Raises:
            DaemonAway: no answer, another answer than asked for, or the stop came first.
        """
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
