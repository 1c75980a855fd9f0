"""The seasonal detector beside a buffer: it follows the fleet with the reference in force.

Owns: which bins the detector has seen, starting it anew for another reference or version, and
keeping the fleet's ratios of the last day. Nothing here is saved: after a
restart, replaying the newest days gives the same scores. Does not know: thresholds, verdicts.

The detector takes a bin once a later bin is settled and no late row can correct it any more.
"""

from collections import deque
from collections.abc import Iterator

import numpy as np

from fleetcast.clock import DAY_MS, HOUR_MS
from fleetcast.drift.seasonal.detector import SeasonalDetector
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.drift.seasonal.renewal import ReferenceRenewal, quorum_rule
from fleetcast.drift.seasonal.settled import bins_at_once, settled_grid
from fleetcast.forecast.registry import Version
from fleetcast.schema import Floats32, ReadForecasts, SettledForecasts
from fleetcast.settings import DriftSettings

HISTORY_H = 24  # a replay begins a day before: it gives the same ratios after a restart


class SeasonalFollower:
    """Follows the fleet again and again, reading no more than is new. Not thread safe."""

    def __init__(
        self,
        read: ReadForecasts,
        renewal: ReferenceRenewal,
        settings: DriftSettings,
        bin_ms: int,
        correct_ms: int = 0,
    ) -> None:
        self._correct_ms = correct_ms
        self._read, self._renewal = read, renewal
        self._settings, self._bin_ms = settings, bin_ms
        self._key: tuple[str, str] | None = None  # version of the reference, version in service
        self.detector: SeasonalDetector | None = None
        self.missing = ""  # why there is no detector
        self.ratios: deque[Floats32] = deque(maxlen=max(2, HISTORY_H * HOUR_MS // bin_ms))
        self._next_ms: int | None = None
        self._last_seen: dict[str, int] = {}  # server -> newest settled bin
        self._metrics: set[str] = set()

    def follow(self, in_force: Version, served: str | None, newest_ms: int, *, may_renew: bool) -> None:
        """Take in what was settled since the last look.

        Args:
            in_force: the version whose reference holds.
            served: the version whose errors count.
            newest_ms: time of the newest record; nothing later is settled.
            may_renew: whether this process may write the renewed reference.
        """
        if self._key != (in_force.id, served or ""):
            self._key = (in_force.id, served or "")
            self._begin(self._renewal.load(in_force))
        self._feed(newest_ms, served)
        if may_renew and self._renew(in_force):
            self._feed(newest_ms, served)
        missing = f"{in_force.id} came without a reference; it is learned day by day"
        self.missing = "" if self.detector else missing

    def unknown_servers(self) -> tuple[str, ...]:
        """Return the servers that report but are not in the reference."""
        known = set(self.detector.reference.server_names) if self.detector else set()
        return tuple(sorted(self._live() - known))

    def _begin(self, reference: Reference | None) -> None:
        rule, min_days = quorum_rule(self._settings), self._settings.min_reference_days
        self.detector = SeasonalDetector(reference, rule, min_days) if reference else None
        self._next_ms = None
        self.ratios.clear()

    def _renew(self, in_force: Version) -> bool:
        if self._next_ms is None:
            return False
        reference, in_alarm = None, set[str]()
        if self.detector is not None:
            verdict = self.detector.check()
            if verdict.needs_retraining:
                return False
            reference, in_alarm = self.detector.reference, set(verdict.drifting_servers())
        newer = self._renewal.renew(in_force, reference, self._live(), self._metrics, self._next_ms, in_alarm)
        if newer is not None:
            self._begin(newer)
        return newer is not None

    def _live(self) -> set[str]:
        newest = max(self._last_seen.values(), default=0)
        return {name for name, seen_ms in self._last_seen.items() if seen_ms > newest - DAY_MS}

    def _feed(self, newest_ms: int, served: str | None) -> None:
        """Read on from the last bin taken and take every bin behind which another is settled."""
        bin_ms = self._bin_ms
        start_ms = self._first_ms(newest_ms) if self._next_ms is None else self._next_ms
        final_ms = (newest_ms - self._correct_ms) // bin_ms * bin_ms
        for rows in self._stretches(start_ms, final_ms + bin_ms):
            last_ms = int(rows.target_ms.max()) // bin_ms * bin_ms
            first_ms = (
                int(rows.target_ms.min()) // bin_ms * bin_ms if self._next_ms is None else self._next_ms
            )
            self._note(rows)
            self._take(rows, first_ms, last_ms, served)
            self._next_ms = last_ms

    def _first_ms(self, newest_ms: int) -> int:
        """Return where a replay starts: what the scores rest on, and a day of alarms before."""
        memory = self.detector.memory_bins if self.detector else 0
        return (newest_ms // self._bin_ms - memory) * self._bin_ms - DAY_MS

    def _stretches(self, start_ms: int, end_ms: int) -> Iterator[SettledForecasts]:
        """Yield the rows from the last bin taken on, so that each stretch moves on."""
        n_series = self.detector.reference.n_series if self.detector else len(self._last_seen) * 4
        least = bins_at_once(n_series) * self._bin_ms
        length = least
        while start_ms < end_ms:
            rows = self._read(start_ms, min(start_ms + length, end_ms))
            if len(rows) and int(rows.target_ms.max()) >= start_ms + self._bin_ms:
                yield rows
                start_ms, length = int(rows.target_ms.max()) // self._bin_ms * self._bin_ms, least
                if end_ms - start_ms <= self._bin_ms:
                    return
            elif start_ms + length >= end_ms:
                return
            else:
                length *= 2  # a gap: look past it before leaving it behind

    def _note(self, rows: SettledForecasts) -> None:
        self._metrics.update(rows.metric.tolist())
        newest = int(rows.target_ms.max())
        recent = rows.target_ms > newest - HOUR_MS
        for name in set(rows.server_name[recent].tolist()):
            self._last_seen[name] = newest

    def _take(self, rows: SettledForecasts, first_ms: int, last_ms: int, served: str | None) -> None:
        if self.detector is None or last_ms <= first_ms:
            return
        reference, span_ms = self.detector.reference, (first_ms, last_ms)
        grid = settled_grid(
            rows, reference.server_names, reference.metrics, span_ms, self._bin_ms, version=served or ""
        )
        for index in range(grid.values.shape[2]):
            values, errors = grid.values[:, :, index], grid.errors[:, :, index]
            self.detector.update(values, first_ms + index * self._bin_ms, errors)
            self.ratios.append(np.asarray(self.detector.fleet_ratios(), np.float32))
