"""Plays a recording to a daemon: the order, the pace, and the waiting while a training runs.

Owns: pacing and holding. Does not know: files, the command line, or HTTP (`client.py`).
"""

import logging
import math
from dataclasses import dataclass, field

from fleetcast.clock import from_ms, iso_z, monotonic
from fleetcast.errors import DaemonAway
from fleetcast.loop import Stop
from fleetcast.sources.client import DaemonClient, RecordSender
from fleetcast.sources.recording import Recording

logger = logging.getLogger(__name__)

MAX_RECORDS_PER_POST = 5_000  # about 1 MB of JSON, far below the daemon's body limit
STATUS_POLL_S = 1.0
PROGRESS_S = 10.0
SHOWN_ERRORS = 5


@dataclass
class Tally:
    """What a replay did, for its summary."""

    sent: int = 0
    accepted: int = 0
    rejected: int = 0
    errors: list[str] = field(default_factory=list)
    held_s: float = 0.0


class Pace:
    """Turns data time into wall time at `speed` data seconds per second; infinity never waits."""

    def __init__(self, speed: float, first_ms: int, started_s: float) -> None:
        self._speed = speed
        self._first_ms = first_ms
        self._started_s = started_s

    def wait_s(self, data_ms: int, now_s: float) -> float:
        """Return how long to wait before a record of `data_ms` is due.

        >>> Pace(60.0, 0, started_s=100.0).wait_s(300_000, now_s=101.0)
        4.0
        """
        if math.isinf(self._speed):
            return 0.0
        return max(0.0, self._started_s + (data_ms - self._first_ms) / 1000 / self._speed - now_s)

    def pause(self, seconds: float) -> None:
        """Leave out time in which data time stood still."""
        self._started_s += seconds


class Player:
    """One run through a recording. Not thread safe."""

    def __init__(
        self,
        recording: Recording,
        client: DaemonClient,
        *,
        speed: float,
        batch_s: float,
        stop: Stop,
        give_up_s: float = 120.0,
    ) -> None:
        self._recording = recording
        self._client = client
        self._stop = stop
        self._batch_s = batch_s
        self._speed = speed
        self._polled_s = -math.inf
        self._told_s = monotonic()
        self.sender = RecordSender(client, stop, give_up_s=give_up_s)
        self.tally = Tally()

    def run(self) -> None:
        """Send everything, or up to the requested stop.

        Raises:
            DaemonAway: the daemon did not take a batch; the tally says how far we came.
        """
        recording = self._recording
        pace = Pace(self._speed, int(recording.timestamps_ms[0]), monotonic())
        for rows in recording.batches(self._batch_s, MAX_RECORDS_PER_POST):
            last_ms = int(recording.timestamps_ms[rows.stop - 1])
            if self._stop.wait(pace.wait_s(last_ms, monotonic())):
                return
            pace.pause(self._hold())
            if not self._send(rows):
                return
            self._tell(last_ms)

    def _send(self, rows: slice) -> bool:
        records = self._recording.records(rows)
        answer = self.sender.send(records)
        if answer is None:
            return False
        tally = self.tally
        tally.sent += len(records)
        tally.accepted += answer.received
        tally.rejected += answer.rejected
        tally.errors += answer.errors[: SHOWN_ERRORS - len(tally.errors)]
        return True

    def _hold(self) -> float:
        """Wait while a training runs; return how long."""
        began_s = monotonic()
        if began_s - self._polled_s < STATUS_POLL_S:
            return 0.0
        is_training = self._training_runs()
        if is_training:
            logger.info("a training runs, replay waits")
        while is_training and not self._stop.wait(STATUS_POLL_S / 4):
            is_training = self._training_runs()
        self._polled_s = monotonic()
        held_s = self._polled_s - began_s
        self.tally.held_s += held_s
        return held_s

    def _training_runs(self) -> bool:
        try:
            training = self._client.status().get("training")
        except DaemonAway as error:
            logger.debug("status not read error=%s", error)  # the next POST deals with it
            return False
        return isinstance(training, dict) and training.get("running") is True

    def _tell(self, data_ms: int) -> None:
        now_s = monotonic()
        if now_s - self._told_s >= PROGRESS_S:
            self._told_s = now_s
            share = 100 * self.tally.sent / len(self._recording)
            logger.info(
                "replay at=%s records=%d done_percent=%.0f", iso_z(from_ms(data_ms)), self.tally.sent, share
            )
