"""What the inference daemon says about itself: `/ready`, `/status`, the scraped states.

Owns: the shape of `/status` and the list of recent errors.
Does not know: HTTP; the parts it asks do not know it.
"""

import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from typing import Any, Protocol

from fleetcast import __version__
from fleetcast.clock import Clock, SystemClock, from_ms, iso_z, monotonic, parse_plain_utc
from fleetcast.errors import FleetcastError
from fleetcast.serving.history import BinHistory
from fleetcast.serving.ledger import Ledger
from fleetcast.serving.model_loader import ModelLoader
from fleetcast.serving.roster import Roster
from fleetcast.serving.sweep import Sweeper
from fleetcast.serving.telemetry import Snapshot
from fleetcast.settings import Settings

logger = logging.getLogger(__name__)

ERRORS_KEPT = 20
_REPEAT_S = 60.0  # the same error again is logged once a minute
_STATS_S = 1.0  # reading the statistics touches every day's footers


class StoreStats(Protocol):
    """The buffer, as far as the report reads it."""

    @property
    def pending_s(self) -> float: ...

    def get_stats(self) -> dict[str, Any]: ...


class RecentErrors:
    """The last errors the daemon lived through; safe from any thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._errors: deque[dict[str, str]] = deque(maxlen=ERRORS_KEPT)
        self._n_by_part: Counter[str] = Counter()
        self._newest_s: dict[str, float] = {}
        self._logged_at: dict[str, float] = {}

    def note(self, part: str, error: Exception) -> None:
        """Keep an error, and log it unless it has just been logged."""
        message = f"{part}: {error}"
        now = self._clock.now()
        with self._lock:
            self._n_by_part[part] += 1
            self._newest_s[part] = now.timestamp()
            self._errors.append({"time": iso_z(now), "part": part, "error": str(error)})
            is_news = monotonic() - self._logged_at.get(message, float("-inf")) >= _REPEAT_S
            if is_news:
                self._logged_at = {message: monotonic(), **dict(list(self._logged_at.items())[:ERRORS_KEPT])}
        if is_news:
            logger.error("part failed part=%s error=%s", part, error)

    def by_part(self) -> dict[str, int]:
        """Return how many there were since the start, those forgotten meanwhile included."""
        with self._lock:
            return dict(self._n_by_part)

    def newest_by_part(self) -> dict[str, float]:
        """Return when each part met its newest one, in seconds since 1970."""
        with self._lock:
            return dict(self._newest_s)

    def newest_first(self) -> list[dict[str, str]]:
        """Return what is kept."""
        with self._lock:
            return list(reversed(self._errors))


class StatusReport:
    """Answers for the daemon; safe from any thread."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        store: StoreStats,
        history: BinHistory,
        roster: Roster,
        ledger: Ledger,
        model: ModelLoader,
        sweeper: Sweeper,
        errors: RecentErrors,
        *,
        is_held: Callable[[], bool],
        is_training: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._store = store
        self._history = history
        self._roster = roster
        self._ledger = ledger
        self._model = model
        self._sweeper = sweeper
        self._errors = errors
        self._is_held = is_held
        self._is_training = is_training
        self._started_at = SystemClock().now()
        self._stats: dict[str, Any] = {}
        self._stats_at = float("-inf")
        self.not_ready = "the history is being restored"  # set by the daemon; "" = ready

    def is_held(self) -> bool:
        """Return whether records have to wait."""
        return self._is_held()

    def why_not_ready(self) -> str:
        """Return what keeps the daemon from serving, "" when nothing does."""
        return self.not_ready

    def backlog(self) -> int:
        """Return how many closed bins wait to be forecast."""
        return len(self._history.due(self._clock.now()))

    def status(self) -> dict[str, Any]:
        """Return the summary for `/status`."""
        counts = self._sweeper.counts
        taken_ms = self._history.taken_bin_ms
        return {
            "status": "not ready" if self.not_ready else "ready",
            "detail": self.not_ready,
            "program": __version__,
            "pid": os.getpid(),
            "started_at": iso_z(self._started_at),
            "clock": {"mode": self._settings.clock.mode, "now": iso_z(self._clock.now())},
            "newest_record_time": _time(self._history.newest_ms),
            "backlog": self.backlog(),
            "servers": len(self._roster.servers(self._clock.now()).server_names),
            "training": {"running": self._is_training()},
            "model": self._model.report(),
            "ledger": asdict(self._ledger.counts()),
            "bins": {
                "bin_s": self._settings.bins.bin_s,
                "newest_closed": _time(taken_ms),
                "skipped": counts.bins_skipped,
                "late_records": self._history.late_rows,
            },
            "sweep": {
                "count": counts.sweeps,
                "origin": _time(counts.last_origin_ms),
                "seconds": counts.last_seconds,
            },
            "buffer": self._buffer_stats(),
            "last_errors": self._errors.newest_first(),
        }

    def snapshot(self) -> Snapshot:
        """Return the states a scrape reads."""
        now = self._clock.now()
        present = self._roster.servers(now)
        stats = self._buffer_stats()
        model = self._model.report()
        shown = range(min(len(present.server_names), self._settings.server.max_server_labels))
        newest_ms = self._history.newest_ms
        return Snapshot(
            gauges={
                "newest_record_timestamp_seconds": None if newest_ms is None else newest_ms / 1000,
                "servers": len(present.server_names),
                "backlog_bins": self.backlog(),
                "open_forecasts": self._ledger.counts().open,
                "buffer_bytes": round(stats["disk_usage_mb"] * 1e6) if "disk_usage_mb" in stats else None,
                "buffer_day_files": stats.get("file_count"),
                "buffer_lag_seconds": self._store.pending_s,
                "model_age_seconds": _age_s(model["trained_at"]),
                "training_running": float(self._is_training()),
                "load_failures": self._model.n_failures,
                "late_records": self._history.late_rows,
            },
            model_version=model["version"],
            is_base_model=bool(model["base"]),
            errors_by_part=self._errors.by_part(),
            last_error_s=self._errors.newest_by_part(),
            server_last_seen_s={
                present.server_names[row]: float(present.last_seen_ms[row]) / 1000 for row in shown
            },
        )

    def _buffer_stats(self) -> dict[str, Any]:
        if monotonic() - self._stats_at >= _STATS_S:
            try:
                self._stats = self._store.get_stats()
            except (FleetcastError, OSError) as error:  # the rest of the report must not suffer
                self._errors.note("buffer statistics", error)
            self._stats_at = monotonic()
        return self._stats


def _time(milliseconds: int | None) -> str | None:
    return None if milliseconds is None else iso_z(from_ms(milliseconds))


def _age_s(made_at: str | None) -> float | None:
    if made_at is None:
        return None
    made: datetime = parse_plain_utc(made_at)
    return (SystemClock().now() - made).total_seconds()
