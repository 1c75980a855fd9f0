"""The inference service: all parts of one running daemon, their start, their cycle, their stop.

Owns: the wiring, and the order of start-up (serve, load a model in the background, restore) and
of shutdown. Does not know: flags, signals, where the buffer or a model's code come from: it is
given them.

What a restart brings back: history, roster and the bins that were not worked off.

Owns: from where the buffer is read at start, and where sweeps go on.
Does not know: how the buffer recovers its own log (it has, before this is called).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import CollectorRegistry

from fleetcast.api.listener import HttpListener
from fleetcast.api.server import create_app
from fleetcast.bins import HISTORY_BINS
from fleetcast.clock import Clock, DataClock, SystemClock, from_ms, iso_z, monotonic, to_ms
from fleetcast.errors import CannotStart, FleetcastError, StorageBroken, StorageFull
from fleetcast.forecast.registry import Registry
from fleetcast.ingest.rules import FUTURE_LIMIT
from fleetcast.loop import Stop
from fleetcast.retraining.telemetry import TEXTFILE, read_textfile
from fleetcast.schema import RecordBatch
from fleetcast.serving.board import PredictionBoard
from fleetcast.serving.corrector import Corrector
from fleetcast.serving.history import BinHistory
from fleetcast.serving.intake import Durable, Intake, RejectedRecords
from fleetcast.serving.ledger import Ledger
from fleetcast.serving.model_loader import ModelLoader, Predictor
from fleetcast.serving.roster import Roster
from fleetcast.serving.status import RecentErrors, StatusReport, StoreStats
from fleetcast.serving.sweep import DataHold, Store, Sweeper, TrainingProbe
from fleetcast.serving.telemetry import Telemetry
from fleetcast.serving.writes import WriteIntake
from fleetcast.settings import Settings

logger = logging.getLogger(__name__)


class StoredRecords(Protocol):
    """The buffer, as far as a restart reads it."""

    def newest_record_time(self) -> datetime | None: ...

    def iter_batches(
        self, start_ms: int, end_ms: int, metrics: Sequence[str] | None = None
    ) -> Iterator[RecordBatch]: ...


def restore(
    stored: StoredRecords,
    history: BinHistory,
    roster: Roster,
    ledger: Ledger,
    gone_after_s: float,
    should_stop: Callable[[], bool] = lambda: False,
    now: datetime | None = None,
) -> int | None:
    """Fill history and roster from stored records.

    Bins after the last one the ledger worked off are open again: the next sweeps take them.

    Args:
        should_stop: asked between batches; what was read by then is all there is.
        now: the system's clock; what was stored by one that was ahead of it is left for its time.
    Returns:
        the newest bin worked off, to be forecast again for readers; None for an empty buffer.
    """
    newest = stored.newest_record_time()
    if newest is None:
        return None
    started = monotonic()
    newest = newest if now is None else min(newest, now + FUTURE_LIMIT)
    newest_bin = _bin(newest, history)
    resume = ledger.resume_bin_ms
    taken = newest_bin - history.bin_ms if resume is None else resume
    if now is not None and taken > newest_bin:
        taken = _bin(now, history) - history.bin_ms
    first = min(taken, newest_bin) - (HISTORY_BINS - 1) * history.bin_ms
    recent = max(first, newest_bin - int(gone_after_s * 1000) // history.bin_ms * history.bin_ms)
    batches = _batches(stored, history, roster, first, recent, newest_bin + history.bin_ms)
    history.restore(takewhile(lambda _: not should_stop(), batches), taken)
    logger.info(
        "history restored from the buffer servers=%d newest=%s resume=%s took_s=%.1f",
        history.n_servers, iso_z(newest), iso_z(from_ms(taken)), monotonic() - started,
    )  # fmt: skip
    return taken


def _bin(moment: datetime, history: BinHistory) -> int:
    return to_ms(moment) // history.bin_ms * history.bin_ms


def _batches(
    stored: StoredRecords, history: BinHistory, roster: Roster, first: int, recent: int, end: int
) -> Iterator[RecordBatch]:
    """Yield old records with the forecast metrics only, newer ones whole: the roster shows all metrics."""
    yield from stored.iter_batches(first, recent, history.metrics)
    for batch in stored.iter_batches(recent, end):
        roster.add(batch)
        yield batch


MAINTAIN_S = 1.0
DRAIN_S = 10.0  # for requests at work when a stop is asked for


class Buffer(Durable, Store, StoredRecords, StoreStats, Protocol):
    """The DataBuffer, as the service uses it."""

    def maintain(self, now: Any) -> None: ...

    def close(self) -> None: ...


class InferenceService:
    """One running daemon; `start`, `cycle` and `close` belong to the main thread."""

    def __init__(
        self,
        settings: Settings,
        buffer: Buffer,
        listener: HttpListener,
        load_model: Callable[[Path], Predictor],
        api_key: str,
        stop: Stop,
        *,
        wall_clock: Clock | None = None,
    ) -> None:
        """Build the parts; nothing is served yet.

        Raises:
            SettingsError: the folder was kept with the other clock.
            StorageFull, StorageBroken: the folder cannot be written.
        """
        self._settings = settings
        self._buffer = buffer
        self._listener = listener
        self._stop = stop
        self._wall_clock = wall_clock or SystemClock()
        self._maintained_at = float("-inf")
        self._is_data_clock = settings.clock.mode == "data"
        folder = Path(settings.paths.data_buffer_dir)
        self._history = BinHistory(settings.bins, settings.forecast)
        self._clock: Clock = DataClock(self._newest_record_time) if self._is_data_clock else self._wall_clock
        self._roster = Roster(settings.forecast)
        self._errors = RecentErrors(self._wall_clock)
        self._ledger = Ledger(
            folder, settings.forecast.settle_horizons, self._history.bin_ms, settings.clock.mode
        )
        self._telemetry = Telemetry(
            CollectorRegistry(), lambda: self._report.snapshot(), lambda: read_textfile(Path(TEXTFILE))
        )
        self._board = PredictionBoard(self._roster, self._clock)
        self._model = self._serving_model(load_model)
        self._sweeper = self._build_sweeper(every_bin=self._is_data_clock)
        self._report = self._build_report()
        intake = self._build_intake(RejectedRecords(folder, settings.server.quarantine_max_bytes))
        writes = WriteIntake(settings.remote_write, intake.take, intake.rules)
        self._app = create_app(
            intake, self._board, self._report, self._telemetry, settings.server, api_key, writes
        )

    def start(self) -> None:
        """Serve at once, load a model beside, then bring back what a restart has to."""
        self._listener.start(self._app, DRAIN_S)
        logger.info("listening url=%s clock=%s", self._listener.url, self._settings.clock.mode)
        self._model.start()
        self._restore()
        self._report.not_ready = ""

    def cycle(self) -> None:
        """Do what is due: sweeps first, then the buffer's upkeep."""
        if not self._listener.is_alive:
            raise CannotStart("the HTTP server's thread ended; see the log")
        if not self._is_data_clock and self._is_ahead_of_the_clock():
            logger.warning("the system's clock stepped back: the history is read again")
            self._history.clear()
            self._roster.clear()
            self._restore()
        self._sweeper.cycle(lambda: self._stop.is_requested)
        if monotonic() - self._maintained_at >= MAINTAIN_S:
            self._maintained_at = monotonic()
            try:
                self._buffer.maintain(self._clock.now())
            except FleetcastError as error:  # a full disk passes; what is durable stays in the log
                self._errors.note("buffer", error)

    def _restore(self) -> None:
        newest_bin = restore(
            self._buffer,
            self._history,
            self._roster,
            self._ledger,
            self._settings.forecast.gone_after_s,
            lambda: self._stop.is_requested,
            None if self._is_data_clock else self._clock.now(),
        )
        if newest_bin is not None and not self._stop.is_requested:
            self._sweeper.forecast_again(newest_bin)

    def _is_ahead_of_the_clock(self) -> bool:
        """Whether bins were closed that, by the present clock, cannot have begun."""
        taken_ms = self._history.taken_bin_ms
        return taken_ms is not None and from_ms(taken_ms) > self._clock.now() + 2 * FUTURE_LIMIT

    def close(self) -> None:
        """Stop in order: no new request, those at work answered, then everything into its day."""
        self._report.not_ready = "the daemon is stopping"
        if not self._listener.stop(DRAIN_S + 2.0):
            logger.warning("requests were still at work after %.0f s", DRAIN_S)
        self._sweeper.keep_feedback(at_once=True)
        try:
            self._buffer.close()
        except (StorageFull, StorageBroken) as error:  # durable in the log: the next start moves it
            logger.error("the last records stay in the buffer's log: %s", error)

    def wait_for_loader(self, timeout_s: float) -> bool:
        """Wait for a model that is still being loaded; return whether none is."""
        return self._model.wait(timeout_s)

    def status_line(self) -> str:
        """Return one line for the service manager."""
        counts = self._sweeper.counts
        return f"{self._history.n_servers} servers, {counts.sweeps} sweeps, model {self._model_name()}"

    def _model_name(self) -> str:
        serving = self._model.champion
        return serving.info.version if serving else "none (fallback)"

    def _newest_record_time(self) -> Any:
        newest_ms = self._history.newest_ms
        return None if newest_ms is None else from_ms(newest_ms)

    def _serving_model(self, load_model: Callable[[Path], Predictor]) -> ModelLoader:
        paths = self._settings.paths
        return ModelLoader(
            Registry(Path(paths.checkpoint_dir), Path(paths.models_dir)),
            load_model,
            bin_ms=self._history.bin_ms,
            horizon_bins=self._settings.forecast.horizon_bins,
            on_load=lambda succeeded: self._telemetry.count_model_load(succeeded=succeeded),
        )

    def _build_sweeper(self, *, every_bin: bool) -> Sweeper:
        return Sweeper(
            self._history,
            self._ledger,
            self._buffer,
            self._board,
            self._model,
            self._telemetry,
            self._settings.forecast,
            self._clock,
            every_bin=every_bin,
            corrector=self._corrector(),
            on_error=self._errors.note,
        )

    def _corrector(self) -> Corrector | None:
        forecast = self._settings.forecast
        if forecast.feedback == "off":
            return None
        folder = Path(self._settings.paths.data_buffer_dir)
        return Corrector(folder, self._history, forecast.settle_horizons)

    def _build_report(self) -> StatusReport:
        is_training = TrainingProbe(Path(self._settings.paths.checkpoint_dir))
        hold = DataHold(self._history, self._clock, lambda: self._sweeper.is_at_work, is_training)
        return StatusReport(
            self._settings,
            self._clock,
            self._buffer,
            self._history,
            self._roster,
            self._ledger,
            self._model,
            self._sweeper,
            self._errors,
            is_held=hold if self._is_data_clock else lambda: False,
            is_training=is_training,
        )

    def _build_intake(self, rejected: RejectedRecords) -> Intake:
        def wake_if_due() -> None:
            if self._history.has_due(self._clock.now()):
                self._stop.wake()

        return Intake(
            self._buffer,
            self._history,
            self._roster,
            rejected,
            self._wall_clock,
            self._settings.server,
            self._settings.buffer,
            expires=not self._is_data_clock,
            on_taken=wake_if_due,
        )
