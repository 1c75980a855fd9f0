"""What the log says about drift: each series and each broken sensor once, when it begins and ends.

Owns: which of them were told already. A restart tells them again. Does not know: scores.
"""

import logging

from fleetcast.drift.report import DriftReading

logger = logging.getLogger(__name__)

MOST_LINES = 20  # a check


class DriftLog:
    """Compares each reading with the one before."""

    def __init__(self) -> None:
        self._drifting: set[tuple[str, str]] = set()
        self._events: set[tuple[str, str, str | None]] = set()

    def note(self, reading: DriftReading) -> None:
        """Log what began and what ended."""
        if reading.calibrated is None or reading.calibrated.verdict is None:
            return
        verdict = reading.calibrated.verdict
        drifting = {(item.server_name, item.metric): item.sentence() for item in verdict.drifting}
        begun = [sentence for key, sentence in drifting.items() if key not in self._drifting]
        for sentence in begun[:MOST_LINES]:
            logger.info("series in alarm: %s", sentence)
        ended = len(self._drifting - drifting.keys())
        if len(begun) > MOST_LINES or ended:
            logger.info(
                "series in alarm=%d begun=%d ended=%d of compared=%d",
                *(len(drifting), len(begun), ended, verdict.n_compared),
            )
        events = {(item.kind, item.server_name, item.metric) for item in verdict.events}
        for kind, server, metric in sorted(events - self._events, key=str)[:MOST_LINES]:
            logger.warning(
                "data quality, not drift: kind=%s server=%s metric=%s", kind, server, metric or "all"
            )
        self._drifting, self._events = set(drifting), events
