"""What the inference daemon says about itself: `/ready`, `/status`, the scraped states.

Owns: the shape of `/status`, and when records have to wait (data clock).
Does not know: HTTP; the parts it asks do not know it.
"""

import os
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from fleetcast import __version__
from fleetcast.clock import SystemClock, from_ms, iso_z, monotonic, parse_plain_utc
from fleetcast.errors import FleetcastError
from fleetcast.files import free_bytes
from fleetcast.forecast.registry import ATTEMPT_LOCK, TRAINER_LOCK, lock_paths
from fleetcast.locks import is_locked
from fleetcast.serving.capacity import Capacity
from fleetcast.serving.fullness import Soonest
from fleetcast.serving.ledger import Ledger
from fleetcast.serving.model_loader import ModelLoader
from fleetcast.serving.roster import Fleet
from fleetcast.serving.sweep import Sweeper
from fleetcast.serving.telemetry import Snapshot, Telemetry
from fleetcast.settings import Settings
from fleetcast.storage.store import DataBuffer
from fleetcast.workers import Workers

_PROBE_S = 0.1  # asking takes the lock for an instant: not more often than needed
_LATE_BINS = 3  # bins that wait for their sweep
_FULL_SHARE = 0.9  # of a limit on names
_STATS_S = 1.0  # reading the statistics touches every day's footers
_STATS_REST = 20  # times as long as it took: a twentieth of a core at most
_STATS_WAIT_S = 1.0


class TrainingProbe:
    """Whether a training runs, on this host or in another container with the same folder."""

    def __init__(self, checkpoint_dir: Path) -> None:
        self._locks = (*lock_paths(checkpoint_dir, ATTEMPT_LOCK), *lock_paths(checkpoint_dir, TRAINER_LOCK))
        self._asked_at = float("-inf")
        self._is_running = False

    def __call__(self) -> bool:
        """Return whether the export, the trainer or its verdict is under way; safe from any thread."""
        if monotonic() - self._asked_at >= _PROBE_S:
            self._is_running = is_locked(*self._locks)
            self._asked_at = monotonic()
        return self._is_running


class StatusReport:
    """Answers for the daemon; safe from any thread."""

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        buffer: DataBuffer,
        ledger: Ledger,
        model: ModelLoader,
        sweeper: Sweeper,
        telemetry: Telemetry,
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._buffer = buffer
        self._ledger = ledger
        self._model = model
        self._sweeper = sweeper
        self._errors = telemetry.errors
        self._workers = telemetry.workers
        self._is_training = TrainingProbe(Path(settings.paths.checkpoint_dir))
        self._started_at = SystemClock().now()
        self._counts = FileCounts(
            lambda: self._buffer.get_stats(),
            telemetry.workers,
            partial(self._errors.note, "buffer statistics"),
        )
        self.phase = "the history is being restored"  # set by the daemon; "" = it is at work
        self.capacity: Capacity | None = None  # set by the daemon
        self.soonest: Soonest | None = None  # set by the daemon
        self.fleet_ahead: Callable[[], Mapping[str, Any] | None] = lambda: None  # set by the daemon
        self.weak_key = ""  # set by the daemon: what is wrong with its key
        self.being_forgotten: Callable[[], Collection[str]] = frozenset  # set by the daemon
        self.why_no_writes: Callable[[], str] = str  # set by the daemon, "" = the last ones were done

    @property
    def not_ready(self) -> str:
        """Return why the daemon cannot do its work now: start, stop, refused writes, a broken loader."""
        if self.phase:
            return self.phase
        if refusal := self.why_no_writes():
            return refusal
        if self._sweeper.waits_for_disk:
            return f"forecasts cannot be stored: {self._sweeper.waits_for_disk}"
        return self._model.why_broken

    def is_held(self) -> bool:
        """Return whether records have to wait, which only recorded time can (data clock).

        Records that arrived while a sweep is due would let the clock run past it. A training gets
        the time it would have had in life.
        """
        return self._fleet.is_data_clock and (
            self._sweeper.is_at_work or bool(self._fleet.due_bins()) or self._is_training()
        )

    @property
    def origin(self) -> str | None:
        """Return the bin that the newest forecasts start from, None before the first."""
        return _time(self._sweeper.counts.last_origin_ms)

    @property
    def backlog(self) -> int:
        """Return how many closed bins have no stored forecast yet."""
        return self._sweeper.backlog

    def status(self) -> dict[str, Any]:
        """Return the summary for `/status`."""
        not_ready = self.not_ready
        being_forgotten = set(self.being_forgotten())
        return {
            "status": "not ready" if not_ready else "ready",
            "detail": not_ready,
            "problems": [text for _severity, text in self.problems()],
            "workers": self._workers.failures(),
            "program": __version__,
            "pid": os.getpid(),
            "started_at": iso_z(self._started_at),
            "clock": {"mode": self._settings.clock.mode, "now": iso_z(self._fleet.clock.now())},
            "newest_record_time": _time(self._fleet.history.newest_ms),
            "backlog": self._sweeper.backlog,
            "servers": len(self._fleet.servers().server_names),
            "excluded_servers": sorted(set(self._fleet.left_out()) - being_forgotten),
            "servers_being_forgotten": sorted(being_forgotten),
            "limits": self._limits(),
            "training": {"running": self._is_training()},
            "model": self._model.report(),
            "ledger": asdict(self._ledger.counts()),
            **self._sweeps(),
            "buffer": {
                "folder": str(self._buffer.folder),
                "oldest_accepted": self._oldest_accepted(),
                **self._counts.newest(),
            },
            "last_errors": self._errors.newest_first(),
        }

    def _sweeps(self) -> dict[str, Any]:
        """Return what was forecast last, and what it says of the whole fleet."""
        counts, taken_ms = self._sweeper.counts, self._fleet.history.taken_bin_ms
        return {
            "bins": {
                "bin_s": self._settings.bins.bin_s,
                "newest_closed": _time(taken_ms),
                "skipped": counts.bins_skipped,
                "late_records": self._fleet.history.late_rows,
                "corrected_forecasts": counts.rows_corrected,
            },
            "sweep": {
                "count": counts.sweeps,
                "origin": _time(counts.last_origin_ms),
                "seconds": counts.last_seconds,
                "shards": self._sweeper.engine.report(),
            },
            "fleet_ahead": self.fleet_ahead(),
        }

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong with this daemon, each with `error` or `warning`."""
        found = []
        if reason := self.not_ready:
            found.append(("error", f"Not ready: {reason}."))
        if self.weak_key:
            found.append(("warning", f"The key is easy to guess: {self.weak_key}."))
        if notice := self._buffer.retention_notice:
            found.append(("warning", notice))
        if problem := self._sweeper.engine.problem:
            found.append(("warning", f"Not all shards forecast: {problem}."))
        n_late = self._sweeper.backlog
        if n_late > _LATE_BINS:
            found.append(("error", f"{n_late} closed bins wait for their forecast."))
        found += [("error", f"A part of the daemon failed: {text}") for text in self._workers.problems()]
        model = self._model.report()
        kept = "A model version was refused, another serves" if model["version"] else "No model serves"
        found += [("warning", f"{kept}: {text}") for text in model["problems"]]
        found += [("warning", f"In the newest forecast {text}") for text in self._sweeper.problems]
        for what, limit in self._limits().items():
            if limit["used"] > _FULL_SHARE * limit["limit"]:
                words = what.replace("_", " ")
                found.append(("warning", f"{limit['used']} of {limit['limit']} {words} are used."))
        return found

    def newest_errors(self) -> list[dict[str, str]]:
        """Return the last errors that the daemon survived, newest first."""
        return self._errors.newest_first()

    def _limits(self) -> dict[str, dict[str, int]]:
        """Return the shared limits that any client can use up, and how much of them is used."""
        server = self._settings.server
        return {
            "metric_names": {"used": self._fleet.roster.n_metrics, "limit": server.max_metric_names},
            "server_names": {"used": self._fleet.history.n_servers, "limit": server.max_server_names},
        }

    def _oldest_accepted(self) -> str | None:
        """Return the oldest time of a record that would be taken, None where none is too old."""
        if self._fleet.is_data_clock:
            return None
        days = timedelta(days=self._settings.buffer.retention_days)
        return iso_z(self._fleet.clock.now() - days)

    def snapshot(self) -> Snapshot:
        """Return the states a scrape reads."""
        present = self._fleet.servers()
        stats, limits = self._counts.newest(), self._limits()
        model, shards = self._model.report(), self._sweeper.engine.report()
        most_named = self._settings.server.max_server_labels
        shown = range(min(len(present.server_names), most_named))
        newest_ms = self._fleet.history.newest_ms
        return Snapshot(
            gauges={
                "newest_record_timestamp_seconds": None if newest_ms is None else newest_ms / 1000,
                "ready": float(not self.not_ready),
                "servers": len(present.server_names),
                "stale_servers": int(present.is_stale.sum()),
                "metric_names": limits["metric_names"]["used"],
                "metric_names_limit": limits["metric_names"]["limit"],
                "server_names": limits["server_names"]["used"],
                "server_names_limit": limits["server_names"]["limit"],
                "backlog_bins": self._sweeper.backlog,
                "open_forecasts": self._ledger.counts().open,
                "buffer_bytes": round(stats["disk_usage_mb"] * 1e6) if "disk_usage_mb" in stats else None,
                "buffer_day_files": stats.get("file_count"),
                "buffer_lag_seconds": self._buffer.pending_s,
                "model_age_seconds": _age_s(model["trained_at"]),
                "training_running": float(self._is_training()),
                "load_failures": self._model.n_failures,
                "shards_ready": shards["ready"],
                "shard_restarts": shards["restarts"],
                "shadow_seconds": self._sweeper.shadow_seconds,
                "late_records": self._fleet.history.late_rows,
            },
            model_version=model["version"],
            is_base_model=bool(model["base"]),
            capacity=self.capacity.gauges(most_named) if self.capacity else None,
            fullness=self.soonest.gauges(most_named) if self.soonest else None,
            free_disk_bytes={"data_buffer": free_bytes(self._buffer.folder)},
            server_last_seen_s={
                present.server_names[row]: float(present.last_seen_ms[row]) / 1000 for row in shown
            },
        )


class FileCounts:
    """What the buffer's files hold, counted by one thread at a time, and rarely where that takes long.

    Which rows of the log are no newer copies of sealed ones is a comparison of keys: of 100,000 servers it
    takes seconds, and nothing that asks for a status may wait for it or repeat it.
    """

    def __init__(
        self, count: Callable[[], dict[str, Any]], workers: Workers, on_error: Callable[[Exception], None]
    ) -> None:
        """Begin with nothing known.

        Args:
            count: returns the counts; may take long, and may raise FleetcastError and OSError.
            on_error: takes what it raised; the counts before stay.
        """
        self._count, self._on_error = count, on_error
        self._newest: dict[str, Any] = {}
        self._counted_at, self._took_s = float("-inf"), 0.0
        self._lock = threading.Lock()
        self._thread = workers.thread("file counts", self._run, once=True)

    def newest(self) -> dict[str, Any]:
        """Return the newest counts, {} if they never succeeded; waits a second at most, but for the first."""
        with self._lock:
            is_due = monotonic() - self._counted_at >= max(_STATS_S, _STATS_REST * self._took_s)
            if is_due and not self._thread.is_alive and not self._thread.worker.rest_s:
                self._thread.start()
        self._thread.join(_STATS_WAIT_S if self._newest else None)
        return self._newest

    def _run(self) -> None:
        started = monotonic()
        try:
            self._newest = self._count()
        except (FleetcastError, OSError) as error:  # the rest of the report must not suffer
            self._on_error(error)
        finally:
            self._counted_at = monotonic()
            self._took_s = self._counted_at - started


def _time(milliseconds: int | None) -> str | None:
    return None if milliseconds is None else iso_z(from_ms(milliseconds))


def _age_s(made_at: str | None) -> float | None:
    if made_at is None:
        return None
    made: datetime = parse_plain_utc(made_at)
    return (SystemClock().now() - made).total_seconds()
