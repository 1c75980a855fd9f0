"""One cycle of the inference daemon: close bins, settle, forecast, publish.

Owns: the order of these steps, and what happens to them when the disk is full. It runs in the
daemon's main thread; taking records in never waits for it (but see `hold`).
Does not know: HTTP, how a model works, how rows are stored.

With the data clock every closed bin gets a forecast, oldest first; with the system clock a
sweep that overran takes the newest closed bin and counts the others as skipped.

When recorded time has to stand still: only with the data clock.

Owns: the answer to "may more records come in now?". Records that arrived while a sweep is due
would let the clock run past it; a training is given the time it would have had in life.
Does not know: how long a request waits before it is told to come back (`server`).
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fleetcast.clock import Clock, monotonic, to_ms
from fleetcast.errors import FleetcastError, StorageBroken, StorageFull
from fleetcast.files import is_locked
from fleetcast.forecast.naive import NaiveForecaster
from fleetcast.forecast.registry import ATTEMPT_LOCK, TRAINER_LOCK
from fleetcast.schema import ClosedBin, FleetForecast, Floats32, HistoryWindow, RecordBatch, SettledForecasts
from fleetcast.serving.board import PredictionBoard
from fleetcast.serving.corrector import Corrector
from fleetcast.serving.history import BinHistory
from fleetcast.serving.ledger import Ledger
from fleetcast.serving.model_loader import Champion, ModelLoader
from fleetcast.serving.telemetry import Telemetry
from fleetcast.settings import ForecastSettings

_PROBE_S = 0.1  # asking takes the lock for an instant: not more often than needed


class TrainingProbe:
    """Whether a training runs, on this host or in another container with the same folder."""

    def __init__(self, checkpoint_dir: Path) -> None:
        self._locks = tuple(checkpoint_dir / name for name in (ATTEMPT_LOCK, TRAINER_LOCK))
        self._asked_at = float("-inf")
        self._is_running = False

    def __call__(self) -> bool:
        """Return whether the export, the trainer or its verdict is under way; safe from any thread."""
        if monotonic() - self._asked_at >= _PROBE_S:
            self._is_running = any(is_locked(path) for path in self._locks)
            self._asked_at = monotonic()
        return self._is_running


class DataHold:
    """Holds records back while bins are due, are worked off, or a training runs."""

    def __init__(
        self,
        history: BinHistory,
        clock: Clock,
        is_sweeping: Callable[[], bool],
        is_training: Callable[[], bool],
    ) -> None:
        self._history = history
        self._clock = clock
        self._is_sweeping = is_sweeping
        self._is_training = is_training

    def __call__(self) -> bool:
        """Return whether records have to wait."""
        return self._is_sweeping() or self._history.has_due(self._clock.now()) or self._is_training()


logger = logging.getLogger(__name__)

CHUNK_SERVERS = 256  # one chunk keeps a core busy for well under a second
_MODEL_WAIT_S = 120.0  # data clock: recorded hours must not run past a model that is still loading
_MODEL_WAIT_STEP_S = 0.25  # between two looks at whether to stop
_REFRESH_S = 5.0
Flags = NDArray[np.bool_]


class Store(Protocol):
    """Where settled forecasts go and late records are read from."""

    def append_predictions(self, rows: SettledForecasts) -> None:
        """Return once the rows are durable."""

    def iter_batches(
        self, start_ms: int, end_ms: int, metrics: Sequence[str] | None = None
    ) -> Iterator[RecordBatch]:
        """Yield stored records, whole bins at a time."""


@dataclass
class SweepCounts:
    """What the sweeps did since the start."""

    sweeps: int = 0
    bins_skipped: int = 0
    last_seconds: float | None = None
    last_origin_ms: int | None = None


class Sweeper:
    """Works bins off; not thread safe, except for `is_at_work` and `counts`."""

    def __init__(
        self,
        history: BinHistory,
        ledger: Ledger,
        store: Store,
        board: PredictionBoard,
        model: ModelLoader,
        telemetry: Telemetry,
        settings: ForecastSettings,
        clock: Clock,
        *,
        every_bin: bool,
        corrector: Corrector | None = None,
        on_error: Callable[[str, Exception], None] = lambda _part, _error: None,
    ) -> None:
        self._history = history
        self._ledger = ledger
        self._store = store
        self._board = board
        self._model = model
        self._telemetry = telemetry
        self._settings = settings
        self._clock = clock
        self._every_bin = every_bin
        self._corrector = corrector
        self._on_error = on_error
        self._naive = NaiveForecaster(settings.horizon_bins)
        self._unwritten: deque[ClosedBin | FleetForecast] = deque()  # in order; the disk refused the first
        self._refreshed_at = monotonic()
        self._working = threading.Event()
        self.counts = SweepCounts()

    @property
    def is_at_work(self) -> bool:
        """Whether bins are being worked off at this moment."""
        return self._working.is_set()

    def cycle(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Work off every due bin; between two bins a stop is obeyed."""
        self._write_what_waits()
        self._refresh()
        now = self._clock.now()
        due = self._history.due(now)
        if due:
            self._working.set()
            try:
                self._work_off(due, should_stop)
            finally:
                self._working.clear()
        self._expire(now)
        self.keep_feedback()

    def keep_feedback(self, *, at_once: bool = False) -> None:
        """Save what settled forecasts taught, when it is time; a full disk costs memory, no forecast."""
        if self._corrector:
            try:
                self._corrector.save(at_once=at_once)
            except (StorageFull, StorageBroken) as error:
                self._on_error("feedback", error)

    def forecast_again(self, origin_ms: int) -> None:
        """Publish the newest closed bin's forecast after a restart; the ledger has it already."""
        self._forecast(origin_ms)

    def _work_off(self, due: list[int], should_stop: Callable[[], bool]) -> None:
        self._model.notice()
        if self._every_bin:
            self._wait_for_model(should_stop)
        for bin_ms in due:
            if should_stop():
                return
            self._unwritten.append(self._history.close(bin_ms))
            self._write_what_waits()
            if self._every_bin or bin_ms == due[-1]:
                self._forecast(bin_ms, n_skipped=0 if self._every_bin else len(due) - 1)

    def _wait_for_model(self, should_stop: Callable[[], bool]) -> None:
        deadline = monotonic() + _MODEL_WAIT_S
        while not self._model.wait(_MODEL_WAIT_STEP_S) and not should_stop():
            if monotonic() > deadline:
                logger.warning("sweep goes on, the model still loads after %.0f s", _MODEL_WAIT_S)
                return

    def _forecast(self, origin_ms: int, n_skipped: int = 0) -> None:
        started = monotonic()
        serving = self._model.champion  # one reference for the whole sweep
        forecast = self._forecast_of(origin_ms, serving)
        self._unwritten.append(forecast)
        self._write_what_waits()
        self._board.publish(forecast, serving.info if serving else None)
        seconds = monotonic() - started
        n_made = int(np.isfinite(forecast.quantiles[:, :, 0, 1]).sum())
        n_model = int(forecast.sources.sum())
        self.counts = SweepCounts(
            self.counts.sweeps + 1, self.counts.bins_skipped + n_skipped, seconds, origin_ms
        )
        self._telemetry.count_sweep(seconds, n_model, n_made - n_model, n_skipped)
        logger.debug(
            "sweep origin_ms=%d series=%d model=%d seconds=%.3f", origin_ms, n_made, n_model, seconds
        )

    def _forecast_of(self, origin_ms: int, serving: Champion | None) -> FleetForecast:
        """Forecast the fleet part by part; in each the model's own medians are kept, then corrected."""
        version = serving.info.version if serving else None
        if serving and self._corrector:
            self._corrector.note_version(serving.info.version)
        names: list[str] = []
        made: list[tuple[Floats32, Flags, Floats32]] = []  # quantiles, sources, medians of each part
        for part in self._history.parts(origin_ms, CHUNK_SERVERS):
            shape = (*part.values.shape[:2], self._settings.horizon_bins, 3)
            quantiles = np.full(shape, np.nan, dtype=np.float32)
            sources = np.zeros(shape[:2], dtype=np.bool_)
            if serving:
                serving = self._by_model(serving, part, quantiles, sources)
            self._by_naive_rules(part, quantiles, sources)
            medians = quantiles[..., 1].copy()
            if self._corrector and sources.any():
                self._corrector.correct(part, quantiles, sources)
            names += part.server_names
            made.append((quantiles, sources, medians))
        quantiles, sources, medians = (
            [np.concatenate(column) for column in zip(*made, strict=True)] if made else self._nothing()
        )
        return FleetForecast(
            origin_ms, self._history.bin_ms, tuple(names), self._history.metrics,
            quantiles, sources, version, medians,
        )  # fmt: skip

    def _nothing(self) -> tuple[Floats32, Flags, Floats32]:
        shape = (0, len(self._history.metrics), self._settings.horizon_bins, 3)
        return np.empty(shape, np.float32), np.empty(shape[:2], np.bool_), np.empty(shape[:3], np.float32)

    def _by_naive_rules(self, part: HistoryWindow, quantiles: Floats32, sources: Flags) -> None:
        """Fill in what the model did not forecast."""
        without = np.flatnonzero(~sources.all(axis=1))
        if len(without):
            naive = self._naive.predict(_servers(part, without))
            is_naive = ~sources[without]
            block = quantiles[without]
            block[is_naive] = naive[is_naive]
            quantiles[without] = block

    def _by_model(
        self, serving: Champion, part: HistoryWindow, quantiles: Floats32, sources: Flags
    ) -> Champion | None:
        """Fill in what the model forecasts; a model that fails is left out of this sweep."""
        try:
            made = serving.predictor.predict(part)
        except (FleetcastError, RuntimeError, ValueError, MemoryError) as error:
            logger.exception("the model failed, the fallback serves version=%s", serving.info.version)
            self._on_error("model", error)
            return None
        is_made = np.isfinite(made).all(axis=(2, 3))
        quantiles[is_made] = made[is_made]
        sources[:] = is_made
        return serving

    def _write_what_waits(self) -> None:
        """Settle and open in order; on a full disk the rest waits for the next cycle."""
        while self._unwritten:
            item = self._unwritten[0]
            try:
                if isinstance(item, ClosedBin):
                    self._settle(item)
                else:
                    self._ledger.open(item)
            except (StorageFull, StorageBroken) as error:
                self._on_error("ledger", error)
                return
            self._unwritten.popleft()

    def _settle(self, closed: ClosedBin) -> None:
        before = self._ledger.counts()
        rows = self._ledger.settle(closed)
        if len(rows):
            self._store.append_predictions(rows)
            if self._corrector:
                self._corrector.learn(rows)
        self._ledger.mark_settled(closed.bin_ms, len(rows))
        after = self._ledger.counts()
        self._telemetry.count_outcomes(after.settled - before.settled, after.expired - before.expired)

    def _expire(self, now: datetime) -> None:
        """Give up forecasts of a fleet that fell silent."""
        before = to_ms(now - timedelta(seconds=self._settings.gone_after_s))
        try:
            n_expired = self._ledger.expire(before)
        except (StorageFull, StorageBroken) as error:
            self._on_error("ledger", error)
            return
        if n_expired:
            self._telemetry.count_outcomes(0, n_expired)

    def _refresh(self) -> None:
        """Read bins again that late records belong to, not more often than every few seconds."""
        if self._history.awaits_refresh and monotonic() - self._refreshed_at >= _REFRESH_S:
            self._history.refresh(partial(self._store.iter_batches, metrics=self._history.metrics))
            self._refreshed_at = monotonic()


def _servers(window: HistoryWindow, rows: "np.ndarray[tuple[int], np.dtype[np.intp]]") -> HistoryWindow:
    """Return the window of some of its servers."""
    names = tuple(window.server_names[row] for row in rows)
    return HistoryWindow(names, window.metrics, window.values[rows], window.end_bin_ms, window.bin_ms)
