"""The calibrated detector beside a buffer: its reference in force, fed with what is settled.

Owns: which bins the detector has seen, starting it anew for another reference or version, and
keeping the fleet's scores of the last hours for their trend. It is no state: after a restart the
newest days are replayed and give the same scores. Does not know: thresholds, verdicts on them.

A bin is taken once a later one is settled: then nobody adds to it any more.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from fleetcast.clock import DAY_MS, HOUR_MS
from fleetcast.drift.seasonal.detector import SeasonalDetector
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.drift.seasonal.renewal import ReferenceRenewal, quorum_rule
from fleetcast.drift.seasonal.settled import ReadForecasts, bins_at_once, settled_grid
from fleetcast.forecast.registry import Version
from fleetcast.schema import Floats32, SettledForecasts
from fleetcast.settings import DriftSettings

TREND_H = 6  # the newer half is compared with the older


@dataclass(frozen=True, slots=True, eq=False)
class SeasonalEvidence:
    """The detector as of the newest settled bin; None and why, where there is none."""

    drift: SeasonalDetector | None = None
    missing: str = ""
    version: str | None = None  # whose reference it is
    ratios: tuple[Floats32, ...] = field(default=())  # (family,) of the fleet, of the last hours
    unknown_servers: tuple[str, ...] = ()  # seen lately, not in the reference


class SeasonalFollower:
    """Follows the fleet again and again, reading no more than is new. Not thread safe."""

    def __init__(
        self, read: ReadForecasts, renewal: ReferenceRenewal, settings: DriftSettings, bin_ms: int
    ) -> None:
        self._read, self._renewal = read, renewal
        self._settings, self._bin_ms = settings, bin_ms
        self._key: tuple[str, str] | None = None  # version of the reference, version in service
        self._reference: Reference | None = None
        self._drift: SeasonalDetector | None = None
        self._next_ms: int | None = None
        self._ratios: deque[Floats32] = deque(maxlen=max(2, TREND_H * HOUR_MS // bin_ms))
        self._last_seen: dict[str, int] = {}  # server -> newest settled bin
        self._metrics: set[str] = set()

    def refresh(
        self, in_force: Version | None, served: str | None, newest_ms: int | None, *, may_renew: bool
    ) -> SeasonalEvidence:
        """Take in what was settled since the last look.

        Args:
            in_force: the version whose reference holds.
            served: the version whose errors count.
            newest_ms: time of the newest record; nothing later is settled.
            may_renew: whether this process may write the renewed reference.
        """
        if in_force is None or newest_ms is None:
            return SeasonalEvidence(missing="no reference of the fleet yet: no training ran to a verdict")
        if self._key != (in_force.id, served or ""):
            self._key = (in_force.id, served or "")
            self._begin(self._renewal.saved(in_force))
        self._feed(newest_ms, served)
        if may_renew and self._renew(in_force):
            self._feed(newest_ms, served)
        missing = "" if self._drift else f"{in_force.id} came without a reference; it is learned day by day"
        return SeasonalEvidence(
            self._drift, missing, in_force.id, tuple(self._ratios), self._unknown_servers()
        )

    def _begin(self, reference: Reference | None) -> None:
        self._reference = reference
        self._drift = SeasonalDetector(reference, quorum_rule(self._settings)) if reference else None
        self._next_ms = None
        self._ratios.clear()

    def _renew(self, in_force: Version) -> bool:
        if self._next_ms is None:
            return False
        in_alarm: set[str] = set()
        if self._drift is not None:
            verdict = self._drift.check()
            if verdict.needs_retraining:
                return False
            in_alarm = set(verdict.drifting_servers())
        live = self._live()
        renewed = self._renewal.renew(in_force, self._reference, live, self._metrics, self._next_ms, in_alarm)
        if renewed is not None:
            self._begin(renewed)
        return renewed is not None

    def _live(self) -> set[str]:
        newest = max(self._last_seen.values(), default=0)
        return {name for name, seen_ms in self._last_seen.items() if seen_ms > newest - DAY_MS}

    def _unknown_servers(self) -> tuple[str, ...]:
        known = set(self._reference.server_names) if self._reference else set()
        return tuple(sorted(self._live() - known))

    def _feed(self, newest_ms: int, served: str | None) -> None:
        """Read on from the last bin taken and take every bin behind which another is settled."""
        bin_ms = self._bin_ms
        start_ms = self._first_ms(newest_ms) if self._next_ms is None else self._next_ms
        for rows in self._stretches(start_ms, newest_ms // bin_ms * bin_ms + bin_ms):
            last_ms = int(rows.target_ms.max()) // bin_ms * bin_ms
            first_ms = (
                int(rows.target_ms.min()) // bin_ms * bin_ms if self._next_ms is None else self._next_ms
            )
            self._note(rows)
            self._take(rows, first_ms, last_ms, served)
            self._next_ms = last_ms

    def _first_ms(self, newest_ms: int) -> int:
        """Return where a replay starts: what the scores rest on, and a day of alarms before."""
        memory = self._drift.memory_bins if self._drift else 0
        return (newest_ms // self._bin_ms - memory) * self._bin_ms - DAY_MS

    def _stretches(self, start_ms: int, end_ms: int) -> Iterator[SettledForecasts]:
        """Yield the rows from the last bin taken on, so that each stretch moves on."""
        n_series = self._reference.n_series if self._reference else len(self._last_seen) * 4
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
        if self._drift is None or self._reference is None or last_ms <= first_ms:
            return
        reference = self._reference
        grid = settled_grid(
            rows,
            reference.server_names,
            reference.metrics,
            (first_ms, last_ms),
            self._bin_ms,
            version=served or "",
        )
        for index in range(grid.values.shape[2]):
            values, errors = grid.values[:, :, index], grid.errors[:, :, index]
            self._drift.update(values, first_ms + index * self._bin_ms, errors)
            self._ratios.append(np.asarray(self._drift.fleet_ratios(), np.float32))
