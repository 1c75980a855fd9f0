"""The parts of the inference daemon: how they are wired, started and stopped, and how a restart recovers.

Owns: the order of start-up (take posts, serve, load a model in the background, restore) and of shutdown; from
where the buffer is read at a start, and at which bin sweeps go on. Does not know: flags, signals,
exit codes; how the buffer recovers its own log (it has, before a service is built).
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date, datetime
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from fleetcast.api.feed import Door, create_front
from fleetcast.api.listener import HttpListener
from fleetcast.bins import HISTORY_BINS
from fleetcast.clock import DAY_MS, Clock, DataClock, SystemClock, from_ms, iso_z, monotonic, to_ms
from fleetcast.errors import FleetcastError, OwnershipLost, StorageBroken, StorageFull
from fleetcast.exclusions import Exclusions
from fleetcast.forecast.registry import Registry
from fleetcast.ingest.rules import FUTURE_LIMIT
from fleetcast.loop import FreeMemory, Stop
from fleetcast.schema import RecordBatch
from fleetcast.serving.board import PredictionBoard
from fleetcast.serving.corrector import Corrector
from fleetcast.serving.forgetting import Forgetting
from fleetcast.serving.fullness import Fullness, Soonest
from fleetcast.serving.history import BinHistory
from fleetcast.serving.intake import Intake, RejectedRecords
from fleetcast.serving.ledger import Ledger
from fleetcast.serving.model_loader import ModelLoader, Predictor
from fleetcast.serving.roster import Fleet, Roster
from fleetcast.serving.shards import make_engine
from fleetcast.serving.status import StatusReport
from fleetcast.serving.sweep import Sweeper
from fleetcast.serving.telemetry import Telemetry
from fleetcast.serving.writes import WriteIntake
from fleetcast.setting import weak_key
from fleetcast.settings import Settings
from fleetcast.storage.store import DataBuffer
from fleetcast.workers import Worker, Workers

if TYPE_CHECKING:  # imported once posts are taken, since each import keeps the first of them waiting
    from fleetcast.api.page import Desk as PageDesk
    from fleetcast.prometheus.outgoing import Sender
    from fleetcast.promotion.desk import Desk
    from fleetcast.serving.export import Export
    from fleetcast.serving.past import Past
    from fleetcast.serving.shadow import Shadow

logger = logging.getLogger(__name__)

MAINTAIN_S = 1.0
_BEFORE_ALL_MS = -1  # in an account that began before the first record
DRAIN_S = 10.0  # for requests at work when a stop is asked for


class InferenceService:
    """The parts of one running daemon; `start`, `cycle` and `close` belong to the main thread."""

    _sender: "Sender | None" = None  # of forecasts, where they are sent by remote-write
    _page_desk: "PageDesk | None" = None  # once the page is served

    def __init__(
        self,
        settings: Settings,
        buffer: DataBuffer,
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
        self._settings, self._api_key, self._load_model = settings, api_key, load_model
        self._excluded = Exclusions(settings.paths.checkpoint_dir)
        self._buffer = buffer.leave_out(self._excluded)
        self._listener, self._stop = listener, stop
        self._maintained_at, self._memory = float("-inf"), FreeMemory()
        self._first_day: date | None = None
        wall_clock = wall_clock or SystemClock()
        folder = Path(settings.paths.data_buffer_dir)
        self._fleet = replace(build_fleet(settings, wall_clock), left_out=self._excluded)
        self._telemetry = Telemetry(CollectorRegistry(), wall_clock, _read_trainings)
        horizons, bin_ms = settings.forecast.settle_horizons, self._fleet.history.bin_ms
        self._ledger = Ledger(folder, horizons, bin_ms, settings.clock.mode)
        if self._fleet.is_data_clock:
            begin_account(buffer, self._ledger, self._fleet.history)
        self._registry = Registry(Path(settings.paths.checkpoint_dir), Path(settings.paths.models_dir))
        self._model = self._make_loader(load_model)
        is_fed_back = settings.forecast.feedback != "off"
        corrector = Corrector(folder, self._fleet.history, horizons) if is_fed_back else None
        most, metrics = settings.server.max_document_servers, self._fleet.history.metrics
        self._board = PredictionBoard(self._fleet.roster, self._fleet.clock, most, metrics)
        self._fullness = Fullness(self._fleet, buffer)
        self._soonest = Soonest(self._fullness, self._fleet.clock)
        self._sweeper = Sweeper(
            self._fleet, buffer, self._ledger, self._model, corrector, self._board, self._telemetry
        )
        self._report = StatusReport(
            settings, self._fleet, buffer, self._ledger, self._model, self._sweeper, self._telemetry
        )
        self._note_key(api_key)
        rejected = RejectedRecords(folder, settings.server.quarantine_max_bytes)
        intake = Intake(
            buffer, self._fleet, rejected, wall_clock, settings.server, settings.buffer, stop.wake
        )
        self._intake, self._report.why_no_writes = intake, lambda: intake.writes.problem
        self._writes = WriteIntake(settings.remote_write, intake.take, intake.rules)
        self._front = create_front(
            intake, self._report.is_held, self._telemetry, settings.server, api_key, self._writes
        )
        self._engine = self._sweeper.engine = make_engine(settings, lambda: stop.is_requested)
        self._steps = self._make_steps(self._telemetry.workers)

    def _note_key(self, api_key: str) -> None:
        self._report.weak_key = weak_key(api_key)
        if self._report.weak_key:
            logger.warning("the key is easy to guess: %s", self._report.weak_key)

    def _make_loader(self, load_model: Callable[[Path], Predictor]) -> ModelLoader:
        return ModelLoader(
            self._registry,
            load_model,
            bin_ms=self._fleet.history.bin_ms,
            horizon_bins=self._settings.forecast.horizon_bins,
            on_load=self._telemetry.count_model_load,
            workers=self._telemetry.workers,
        )

    def _make_steps(self, workers: Workers) -> list[tuple[Worker, Callable[[], None]]]:
        """Return what a cycle does, each step watched apart."""
        self._report.being_forgotten = self._excluded.being_forgotten
        self._intake.note_times = self._fullness.note
        forgetting = Forgetting(
            self._excluded, self._fleet, self._buffer, (self._sweeper.forget, self._intake.forget)
        )
        return [
            (workers.step("probe"), self._intake.probe),
            (workers.step("history"), self._follow_clock),
            (workers.step("exclusions"), self._follow_exclusions),
            (workers.step("forgetting"), forgetting.step),
            (workers.step("shards"), self._engine.look_after),
            (workers.step("sweep"), lambda: self._sweeper.cycle(lambda: self._stop.is_requested)),
            (workers.step("dates"), self._follow_dates),
            (workers.step("upkeep"), self._maintain),
        ]

    def _open_routes(self) -> None:
        """Serve what is not a post of records, too: the import of its framework would keep posts waiting."""
        from fleetcast.api.page import add_page
        from fleetcast.api.promotion import add_promotion
        from fleetcast.api.server import create_app
        from fleetcast.promotion.desk import Desk
        from fleetcast.serving.capacity import Capacity
        from fleetcast.serving.journal import Journal
        from fleetcast.serving.overview import Overview
        from fleetcast.serving.past import Past

        own, key, told = self._settings, self._api_key, self._telemetry
        capacity = Capacity(Path(own.paths.data_buffer_dir), self._fleet)
        self._sweeper.capacity = self._report.capacity = capacity
        self._report.fleet_ahead, self._report.soonest = lambda: self._board.outlook.fleet, self._soonest
        past = Past(self._fleet, self._buffer, own.forecast.settle_horizons)
        overview = Overview(self._fleet, self._board, past, self._report, Journal(), capacity)
        export = self._make_export(past)
        door, desk = Door(key, told), Desk(self._registry)
        self._sweeper.shadow = self._make_shadow(desk)
        app = create_app(self._board, self._report, told, own.server, key, self._writes.path)
        add_promotion(app, desk, own.promotion, door, key)
        self._page_desk = add_page(app, overview, past, capacity, self._fullness, door, export)
        self._front.open(app)

    def _make_shadow(self, desk: "Desk") -> "Shadow":
        from fleetcast.serving.shadow import Shadow

        return Shadow(
            desk,
            self._fleet.history,
            self._load_model,
            self._settings.promotion,
            self._settings.forecast.settle_horizons,
            self._telemetry.errors.note,
        )

    def _make_export(self, past: "Past") -> "Export | None":
        """Return what is scraped; what is sent by remote-write begins with `start`."""
        from fleetcast.serving.export import Export

        own, horizons = self._settings.export, self._settings.forecast.settle_horizons
        if own.enabled == "off" and not own.remote_write_url:
            return None
        export = self._sweeper.export = Export(own, self._fleet, horizons, past)
        if own.remote_write_url:
            from fleetcast.prometheus.outgoing import Receiver, Sender

            receiver, told = Receiver(own.remote_write_url, own.remote_write_token), self._telemetry
            self._sender = Sender(receiver, export.requests, told.count_forecast_write, told.workers)
            export.on_news = self._sender.wake
        return export if own.enabled == "on" else None

    def start(self) -> None:
        """Take posts at once, then answer the rest, load a model beside, bring back what a restart has to."""
        self._listener.start(
            self._front,
            DRAIN_S,
            max_answer_bytes=self._settings.server.max_answer_bytes,
            on_end=self._telemetry.count_connection_end,
            workers=self._telemetry.workers,
        )
        logger.info("listening url=%s clock=%s", self._listener.url, self._settings.clock.mode)
        self._open_routes()
        self._model.start()  # last: a model takes longer than all else
        self._engine.start()
        if self._sender:
            self._sender.start()
        self._restore()
        self._report.phase = ""

    def cycle(self) -> None:
        """Do what is due: sweeps first, then the buffer's upkeep; a step that fails costs no other.

        Raises:
            OwnershipLost: the buffer's folder is another's; only `close` may follow.
        """
        self._buffer.check_ownership()
        for worker, work in self._steps:
            worker.run(work)
        self._telemetry.workers.look_after()

    def _follow_dates(self) -> None:
        self._fullness.step()
        self._soonest.step()

    def _follow_clock(self) -> None:
        if not self._fleet.is_data_clock and self._is_ahead_of_the_clock():
            logger.warning("the system's clock stepped back: the history is read again")
            self._fleet.clear()
            self._restore()

    def _follow_exclusions(self) -> None:
        if self._excluded.look():
            logger.info("the history is read again without the excluded servers")
            self._fleet.clear()
            self._restore()
            self._fullness.clear()

    def _maintain(self) -> None:
        if monotonic() - self._maintained_at < MAINTAIN_S:
            return
        self._maintained_at = monotonic()
        self._telemetry.unwelcome.log_when_due()
        self._memory.give_back()
        try:
            self._buffer.maintain(self._fleet.clock.now())
        except OwnershipLost:
            raise
        except FleetcastError as error:  # a full disk passes; what is durable stays in the log
            self._telemetry.errors.note("buffer", error)
        self._free_metric_names()

    def close(self) -> None:
        """Stop in order: no new request, those at work answered, then everything into its day."""
        self._report.phase = "the daemon is stopping"
        if not self._listener.stop(DRAIN_S + 2.0):
            logger.warning("requests were still at work after %.0f s", DRAIN_S)
        if self._page_desk:
            self._page_desk.close()
        self._engine.stop()
        if self._sender:
            self._sender.stop()
        try:
            self._buffer.check_ownership()
            self._sweeper.keep_feedback(at_once=True)
        except OwnershipLost as error:
            logger.error("nothing more is written: %s", error)
        try:
            self._buffer.close()
        except (StorageFull, StorageBroken) as error:  # durable in the log: the next start moves it
            logger.error("the last records stay in the buffer's log: %s", error)

    def wait_for_loader(self, timeout_s: float) -> bool:
        """Wait for a model that is still being loaded; return whether none is."""
        return self._model.wait(timeout_s)

    def status_line(self) -> str:
        """Return one line for the service manager."""
        champion = self._model.champion
        version = champion.info.version if champion else "none (fallback)"
        return (
            f"{self._fleet.history.n_servers} servers, {self._sweeper.counts.sweeps} sweeps, model {version}"
        )

    def _free_metric_names(self) -> None:
        """Let a metric's place go with its last stored row: when days were dropped."""
        first_day = self._buffer.first_day()
        if first_day == self._first_day:
            return
        before = set(self._fleet.roster.metric_names())
        self._fleet.roster.forget_metrics(before.difference(self._buffer.metric_names()))
        self._first_day = first_day

    def _restore(self) -> None:
        self._fleet.roster.note_metrics(self._buffer.metric_names())  # a restart frees no place
        self._first_day = self._buffer.first_day()
        newest_bin = restore(self._buffer, self._fleet, self._ledger, lambda: self._stop.is_requested)
        if newest_bin is not None and not self._stop.is_requested:
            self._sweeper.forecast_again(newest_bin)

    def _is_ahead_of_the_clock(self) -> bool:
        """Whether bins were closed that, by the present clock, cannot have begun."""
        taken_ms = self._fleet.history.taken_bin_ms
        return taken_ms is not None and from_ms(taken_ms) > self._fleet.clock.now() + 2 * FUTURE_LIMIT


def _read_trainings() -> bytes:
    """Return what the retraining daemon of this folder last said of itself."""
    from fleetcast.retraining.telemetry import TEXTFILE, read_textfile

    return read_textfile(Path(TEXTFILE))


def build_fleet(settings: Settings, wall_clock: Clock) -> Fleet:
    """Return a fleet of which nothing is known yet; the data clock stands at its newest record."""
    history = BinHistory(settings.bins, settings.forecast)
    is_data_clock = settings.clock.mode == "data"
    clock = DataClock(history.newest_record_time) if is_data_clock else wall_clock
    return Fleet(history, Roster(settings.forecast), clock, settings.forecast, is_data_clock)


def begin_account(buffer: DataBuffer, ledger: Ledger, history: BinHistory) -> None:
    """Note, before the first post, which bins a new account works off: all that no record is stored of yet.

    However early the daemon ends, the next start goes on with the first of them.

    Raises:
        StorageFull, StorageBroken: the account cannot be written.
    """
    newest = buffer.newest_record_time()
    ledger.begin(_BEFORE_ALL_MS if newest is None else _bin(newest, history) - history.bin_ms)


def restore(
    buffer: DataBuffer, fleet: Fleet, ledger: Ledger, should_stop: Callable[[], bool] = lambda: False
) -> int | None:
    """Fill history and roster from stored records.

    Bins after the last one the ledger worked off are open again: the next sweeps take them. Rows of a
    time that is yet to come (the system's clock was ahead) wait until then.

    Args:
        should_stop: asked between batches; True ends the reading with what is there.
    Returns:
        the newest bin worked off, to be forecast again for readers; None for an empty buffer.
    """
    newest = buffer.newest_record_time()
    if newest is None:
        return None
    started = monotonic()
    history = fleet.history
    now = None if fleet.is_data_clock else fleet.clock.now()
    newest = newest if now is None else min(newest, now + FUTURE_LIMIT)
    newest_bin = _bin(newest, history)
    resume = ledger.resume_bin_ms
    if resume == _BEFORE_ALL_MS and (oldest := buffer.oldest_record_time()) is not None:
        resume = _bin(oldest, history) - history.bin_ms
    taken = _find_taken_bin(newest_bin, resume, now, history)
    batches = _read_batches(buffer, fleet, min(taken, newest_bin), newest_bin)
    history.restore(takewhile(lambda _: not should_stop(), batches), taken)
    logger.info(
        "history restored from the buffer servers=%d newest=%s resume=%s took_s=%.1f",
        history.n_servers, iso_z(newest), iso_z(from_ms(taken)), monotonic() - started,
    )  # fmt: skip
    return taken


def _find_taken_bin(newest_bin: int, resume: int | None, now: datetime | None, history: BinHistory) -> int:
    """Return the newest bin that counts as worked off."""
    taken = newest_bin - history.bin_ms if resume is None else resume
    is_ahead = now is not None and taken > newest_bin
    return _bin(now, history) - history.bin_ms if is_ahead and now else taken


def _bin(moment: datetime, history: BinHistory) -> int:
    return to_ms(moment) // history.bin_ms * history.bin_ms


def _read_batches(buffer: DataBuffer, fleet: Fleet, last_bin: int, newest_bin: int) -> Iterator[RecordBatch]:
    """Yield old bins' means with the forecast metrics only; the roster shows all metrics of newer ones.

    Bins after `last_bin` are open again, and come as records: more of them may follow.
    """
    history = fleet.history
    bin_ms = history.bin_ms
    gone_bins = int(fleet.settings.gone_after_s * 1000) // bin_ms
    first, open_ms, end_ms = last_bin - (HISTORY_BINS - 1) * bin_ms, last_bin + bin_ms, newest_bin + bin_ms
    recent = max(first, newest_bin - gone_bins * bin_ms)
    yield from buffer.iter_bins(first, min(recent, open_ms), bin_ms, history.metrics)
    yield from buffer.iter_by_bins(min(recent, open_ms), recent, bin_ms, history.metrics)
    for start, end in _days(recent, end_ms):
        newest = buffer.read_newest(start, end, bin_ms)
        if newest is not None and not (newest.timestamps_ms >= open_ms).any():
            fleet.roster.add(newest)
            history.note_newest(newest)
            yield from buffer.iter_bins(start, end, bin_ms, history.metrics)
            continue
        for batch in buffer.iter_by_bins(start, end, bin_ms):
            fleet.roster.add(batch)
            yield batch


def _days(start_ms: int, end_ms: int) -> Iterator[tuple[int, int]]:
    """Yield a span cut at midnights.

    >>> list(_days(86_400_000 - 1, 86_400_000 + 2))
    [(86399999, 86400000), (86400000, 86400002)]
    """
    while start_ms < end_ms:
        midnight = (start_ms // DAY_MS + 1) * DAY_MS
        yield start_ms, min(midnight, end_ms)
        start_ms = midnight
