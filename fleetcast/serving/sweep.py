"""One sweep: close a bin, settle forecasts and store them, forecast the fleet, publish.

Owns: the order of these steps, and what happens to them when the disk is full. It runs in the
daemon's main thread; taking records in never waits for it (but see `StatusReport.is_held`).
Does not know: HTTP, how a model works, how rows are stored.

What fails costs itself only: a model that raises is left out of its sweep, expert layer and ledger that
raise cost one bin's learning or one bin's rows; each is noted with its traceback.

Rows that come soon after their bin has closed correct what was settled: the bin is settled again, and
rows of the same key replace the first ones. The expert layer keeps what it learned.

With the data clock every closed bin gets a forecast, oldest first; with the system clock a
sweep that overran takes the newest closed bin and counts the others as skipped. History that is brought in
gets no forecast while more of it comes (but for one a minute), nor one of which nothing is yet to come.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fleetcast.clock import DAY_MS, from_ms, iso_z, monotonic, to_ms
from fleetcast.errors import StorageBroken, StorageFull
from fleetcast.forecast.experts.rules import RuleForecasts
from fleetcast.forecast.naive import NaiveForecaster, widen_young
from fleetcast.schema import ClosedBin, FleetForecast, Floats32, HistoryWindow, SettledForecasts
from fleetcast.serving.board import PredictionBoard
from fleetcast.serving.capacity import Capacity
from fleetcast.serving.corrector import Corrector
from fleetcast.serving.ledger import Ledger
from fleetcast.serving.model_loader import Champion, ModelLoader
from fleetcast.serving.roster import Fleet
from fleetcast.serving.shard import PartForecast
from fleetcast.serving.shards import Engine, OneProcess
from fleetcast.serving.telemetry import Telemetry
from fleetcast.storage.store import DataBuffer

if TYPE_CHECKING:  # what they import keeps the first post waiting
    from fleetcast.serving.export import Export
    from fleetcast.serving.shadow import Shadow

logger = logging.getLogger(__name__)

_TOGETHER = 96  # bins closed at once where no forecast comes between them; a stop waits for them
CHUNK_SERVERS = 256  # one chunk keeps a core busy for well under a second
_MODEL_WAIT_S = 120.0  # data clock: recorded hours must not run past a model that is still loading
_MODEL_WAIT_STEP_S = 0.25  # between two looks at whether to stop
_REFRESH_S = 5.0
_RIPE_S = 7200.0  # of data: a model that forecasts none of such series is no use to the fleet
_GROWING_S = 60.0  # between two forecasts while history comes in: each would be outdated within a second
_RECENT_BINS = 12  # without a value in them a series is not forecast
Flags = NDArray[np.bool_]


@dataclass
class SweepCounts:
    """What the sweeps did since the start."""

    sweeps: int = 0
    bins_skipped: int = 0
    rows_corrected: int = 0
    last_seconds: float | None = None
    last_origin_ms: int | None = None


class Sweeper:
    """Works bins off; not thread safe, except for `is_at_work` and `counts`."""

    def __init__(
        self,
        fleet: Fleet,
        buffer: DataBuffer,
        ledger: Ledger,
        model: ModelLoader,
        corrector: Corrector | None,
        board: PredictionBoard,
        telemetry: Telemetry,
    ) -> None:
        self._fleet = fleet
        self._history = fleet.history
        self._buffer = buffer
        self._ledger = ledger
        self._model = model
        self._corrector = corrector
        self._board = board
        self._telemetry = telemetry
        self.capacity: Capacity | None = None  # set by the daemon
        self.shadow: Shadow | None = None  # the same
        self.export: Export | None = None  # the same
        self.engine: Engine = OneProcess(fleet.settings.horizon_bins)  # the same
        self._horizon_bins = fleet.settings.horizon_bins
        self._naive = NaiveForecaster(self._horizon_bins)
        self._unwritten: deque[ClosedBin | FleetForecast] = deque()  # in order; the disk refused the first
        self._refreshed_at = monotonic()
        self._now_ms = 0
        self._waits_for_disk = ""
        self._said: set[str] = set()
        self._newest_old = (0, 0)  # a bin of history that comes in, and how many rows it held
        self._grows_since: float | None = None  # when more of it came than in the cycle before, or a forecast
        self._settled: dict[int, ClosedBin] = {}  # what the newest bins were settled with
        self._newest_champion: Champion | None = None  # of the newest forecast
        self._model_failure = ""  # of the newest forecast
        self.problems: list[str] = []  # what kept the model in service out of the newest forecast
        self._working = threading.Event()
        self._in_hand: Sequence[int] = ()
        self.counts = SweepCounts()

    @property
    def is_at_work(self) -> bool:
        """Whether bins are being worked off at this moment."""
        return self._working.is_set()

    @property
    def backlog(self) -> int:
        """Return how many closed bins have no stored forecast yet, those in hand among them."""
        return len({*self._fleet.due_bins(), *self._in_hand})

    @property
    def shadow_seconds(self) -> float | None:
        """Return how long the newest comparison with the model before took, None where there is none."""
        return self.shadow.seconds if self.shadow and self.shadow.is_comparing else None

    @property
    def waits_for_disk(self) -> str:
        """Return why settled or new forecasts cannot be written, "" where they can."""
        return self._waits_for_disk

    def cycle(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Work off every due bin; between two bins a stop is obeyed."""
        if not self._fleet.is_data_clock or self._model.champion is None:
            self._model.notice()  # recorded time: only between two bins, or a replay would not repeat
        now = self._fleet.clock.now()  # read once: what came in meanwhile must not expire unsettled
        self._now_ms = to_ms(now)
        self._write_what_waits()
        due = self._without_growing(self._history.due(now))
        self._refresh(is_due=bool(due))
        if due:
            self._in_hand = due
            self._working.set()
            try:
                self._work_off(due, should_stop)
            finally:
                self._working.clear()
                self._in_hand = ()
        self._follow_swap()
        self._expire(now)
        self.keep_feedback()

    def _without_growing(self, due: list[int]) -> list[int]:
        """Leave the newest bin of history that is brought in open while rows still come into it.

        History comes in faster than life: a bin closed in the middle would have to be read again.
        """
        before, self._newest_old = self._newest_old, (0, 0)
        if due and not self._fleet.is_present(due[-1]):
            self._newest_old = due[-1], self._history.n_open_rows(due[-1])
        if before == self._newest_old or not self._newest_old[1]:
            self._grows_since = None
            return due
        self._grows_since = self._grows_since or monotonic()
        return due[:-1]

    def keep_feedback(self, *, at_once: bool = False) -> None:
        """Save what settled forecasts taught, when it is time; a full disk costs memory, no forecast."""
        if self._corrector:
            try:
                self._corrector.save(at_once=at_once)
                if self.shadow:
                    self.shadow.save(at_once=at_once)
            except Exception as error:  # nothing that a forecast needs
                self._telemetry.errors.note("feedback", error)

    def forget(self, servers: Collection[str]) -> bool:
        """Forget what was forecast of some servers, and what that taught; return False where it has to wait.

        Raises:
            StorageFull, StorageBroken: call it again.
        """
        if self._unwritten:  # may be about them
            return False
        self._ledger.forget(servers)
        if self._corrector:
            self._corrector.forget(servers)
        if self.shadow:
            self.shadow.forget(servers)
        return True

    def forecast_again(self, origin_ms: int) -> None:
        """Publish the newest closed bin's forecast after a restart; the ledger has it already."""
        self._forecast(origin_ms)

    def _follow_swap(self) -> None:
        """Forecast again where a model came into service since the newest forecast.

        Under recorded time only where no model served before: replays must repeat.
        """
        champion, origin_ms = self._model.champion, self.counts.last_origin_ms
        if champion is None or champion is self._newest_champion or origin_ms is None:
            return
        if origin_ms != self._history.taken_bin_ms:  # bins that were of no use were closed since then
            return
        if not self._fleet.is_data_clock or self._newest_champion is None:
            logger.info("forecast again, a model came into service version=%s", champion.info.version)
            self._forecast(origin_ms)

    def _work_off(self, due: list[int], should_stop: Callable[[], bool]) -> None:
        self._model.notice()
        every_bin = self._fleet.is_data_clock
        if every_bin:
            self._wait_for_model(should_stop)
        n_closed = 0
        while n_closed < len(due) and not should_stop():
            closed = self._history.close_first(due[n_closed : n_closed + (1 if every_bin else _TOGETHER)])
            n_closed += len(closed)
            self._unwritten.extend(closed)
            self._write_what_waits()
            if every_bin or n_closed == len(due):
                self._end_round(closed[-1].bin_ms, 0 if every_bin else len(due) - 1)
                self._in_hand = due[n_closed:]

    def _end_round(self, bin_ms: int, n_others: int) -> None:
        """Forecast from the newest closed bin, where that is of use; the others count as skipped."""
        is_early = self._grows_since is not None and monotonic() - self._grows_since < _GROWING_S
        if not is_early and self._fleet.is_of_use(bin_ms):
            self._grows_since = self._grows_since and monotonic()
            self._forecast(bin_ms, n_others)
            return
        self._ledger.pass_over(bin_ms)
        n_skipped = 1 + n_others
        self.counts = replace(self.counts, bins_skipped=self.counts.bins_skipped + n_skipped)
        self._telemetry.count_skipped(n_skipped)

    def _wait_for_model(self, should_stop: Callable[[], bool]) -> None:
        deadline = monotonic() + _MODEL_WAIT_S
        while not self._model.wait(_MODEL_WAIT_STEP_S) and not should_stop():
            if monotonic() > deadline:
                logger.warning("sweep goes on, the model still loads after %.0f s", _MODEL_WAIT_S)
                return

    def _forecast(self, origin_ms: int, n_skipped: int = 0) -> None:
        started = monotonic()
        champion = self._model.champion  # one reference for the whole sweep
        self._newest_champion = champion
        self.problems, self._model_failure = [], ""
        forecast = self._forecast_fleet(origin_ms, champion)
        self._unwritten.append(forecast)
        self._write_what_waits()
        self._board.publish(forecast, champion.info if champion else None)
        self._note_capacity(forecast)
        self._note_export(forecast)
        seconds = monotonic() - started
        if self.shadow:
            self.shadow.compare(origin_ms, self._model_failure)
        n_made = int(np.isfinite(forecast.quantiles[:, :, 0, 1]).sum())
        n_model = int(forecast.sources.sum())
        self.counts = replace(
            self.counts,
            sweeps=self.counts.sweeps + 1,
            bins_skipped=self.counts.bins_skipped + n_skipped,
            last_seconds=seconds,
            last_origin_ms=origin_ms,
        )
        self._telemetry.count_sweep(seconds, n_model, n_made - n_model, n_skipped)
        logger.debug(
            "sweep origin_ms=%d series=%d model=%d seconds=%.3f", origin_ms, n_made, n_model, seconds
        )

    def _forecast_fleet(self, origin_ms: int, champion: Champion | None) -> FleetForecast:
        """Forecast the fleet part by part; in each the model's own medians are kept, then mixed."""
        version = champion.info.version if champion else None
        self._follow_version(champion)
        names: list[str] = []
        has_ripe = False
        all_quantiles, all_sources, all_medians = self._make_room(self._history.n_servers)
        parts = self._history.parts(origin_ms, CHUNK_SERVERS)
        with_rules = self._corrector is not None
        for part, said in self.engine.forecasts(parts, champion, with_rules=with_rules):
            rows = slice(len(names), len(names) + len(part.server_names))
            quantiles, sources = all_quantiles[rows], all_sources[rows]
            quantiles[:], sources[:] = np.nan, False
            if champion:
                champion = self._fill_by_model(champion, said, quantiles, sources)
                has_ripe |= not sources.any() and self._has_ripe(part)
            self._fill_by_naive_rules(part, quantiles, sources)
            all_medians[rows] = quantiles[..., 1]
            self._correct(part, said, quantiles, sources)
            names += part.server_names
        made = slice(len(names))
        if champion and has_ripe and not all_sources[made].any():
            self._say_that_it_forecasts_none(champion)
        return FleetForecast(
            origin_ms, self._history.bin_ms, tuple(names), self._history.metrics,
            all_quantiles[made], all_sources[made], version, all_medians[made],
        )  # fmt: skip

    def _make_room(self, n_servers: int) -> tuple[Floats32, Flags, Floats32]:
        """Return quantiles, sources and medians that are filled part by part: joining would double them."""
        shape = (n_servers, len(self._history.metrics), self._horizon_bins, 3)
        return np.empty(shape, np.float32), np.empty(shape[:2], np.bool_), np.empty(shape[:3], np.float32)

    def _note_capacity(self, forecast: FleetForecast) -> None:
        """Say who passes a limit; where that fails, what was said before stands."""
        if self.capacity:
            try:
                self.capacity.note(forecast, self._history.parts(forecast.origin_ms, CHUNK_SERVERS))
            except Exception as error:  # nothing that a forecast needs
                self._telemetry.errors.note("capacity", error)

    def _note_export(self, made: FleetForecast | SettledForecasts) -> None:
        """Hand over what Prometheus may scrape; where that fails, what was exported before stands."""
        if self.export:
            try:
                if isinstance(made, FleetForecast):
                    self.export.note(made)
                else:
                    self.export.note_settled(made)
            except Exception as error:  # nothing that a forecast needs
                self._telemetry.errors.note("export", error)

    def _has_ripe(self, part: HistoryWindow) -> bool:
        """Whether a series has enough data, also by the settings, for any model to forecast it."""
        day = np.isfinite(part.values[..., -max(1, DAY_MS // part.bin_ms) :])
        wanted_s = min(max(_RIPE_S, self._fleet.settings.model_min_history_s), DAY_MS / 1000)
        is_long = day.sum(axis=2) >= wanted_s * 1000 // part.bin_ms
        return bool((is_long & day[..., -_RECENT_BINS:].any(axis=2)).any())

    def _say_that_it_forecasts_none(self, champion: Champion) -> None:
        known = ", ".join(champion.predictor.metrics)
        text = (
            f"the model {champion.info.version} forecast no series, though some have enough data: it knows "
            f"{known}, and forecast.model_min_history_s is {self._fleet.settings.model_min_history_s:g}"
        )
        if text not in self._said:
            logger.warning("%s", text)
        self._said = {text}
        self.problems.append(text)

    def _follow_version(self, champion: Champion | None) -> None:
        """Let the layer, and what goes on beside it, know which model forecasts now."""
        if self.shadow:
            self.shadow.follow(champion, self._corrector, self._model.why_not_loaded)
        if self._corrector:
            self._corrector.note_version(champion.info.version if champion else None)
            if self.shadow:
                self.shadow.return_evidence(self._corrector)

    def _correct(self, part: HistoryWindow, said: PartForecast, quantiles: Floats32, sources: Flags) -> None:
        """Make forecasts what clients get; the model's own stay known where another is compared with it."""
        raw = None
        if self.shadow and self.shadow.is_comparing:
            raw = np.where(sources[..., None, None], quantiles, np.float32(np.nan))
        experts = self._mix(part, said, quantiles)
        if self.shadow and raw is not None:
            self.shadow.collect(part, raw, quantiles, experts)
        widen_young(part, quantiles)

    def _mix(self, part: HistoryWindow, said: PartForecast, quantiles: Floats32) -> RuleForecasts | None:
        """Let the expert layer mix its forecasts in; where it fails, the uncorrected ones go out."""
        if not self._corrector:
            return None
        uncorrected = quantiles.copy()
        try:
            if said.rules is None:
                raise said.rules_failure or RuntimeError("no rules")
            self._corrector.mix(part, quantiles, said.rules)
            return said.rules
        except Exception as error:  # the boundary of what may be left out
            quantiles[:] = uncorrected
            self._note_failure("feedback", "the expert layer", error)
            return None

    def _note_failure(self, part: str, what: str, error: Exception) -> None:
        self._telemetry.errors.note(part, error)
        text = f"{what} failed, forecasts go out without it: {error or type(error).__name__}"
        self.problems = list(dict.fromkeys([*self.problems, text]))

    def _fill_by_naive_rules(self, part: HistoryWindow, quantiles: Floats32, sources: Flags) -> None:
        """Fill in what the model did not forecast."""
        without = np.flatnonzero(~sources.all(axis=1))
        if len(without):
            naive = self._naive.predict(part.of(without))
            is_naive = ~sources[without]
            block = quantiles[without]
            block[is_naive] = naive[is_naive]
            quantiles[without] = block

    def _fill_by_model(
        self, champion: Champion, said: PartForecast, quantiles: Floats32, sources: Flags
    ) -> Champion | None:
        """Fill in what the model forecasts; a model that fails is left out of this sweep."""
        if said.model is None:
            error = said.model_failure or RuntimeError("it was not asked")
            self._note_failure("model", f"the model {champion.info.version}", error)
            self._model_failure = str(error) or type(error).__name__
            return None
        is_made = np.isfinite(said.model).all(axis=(2, 3))
        quantiles[is_made] = said.model[is_made]
        sources[:] = is_made
        return champion

    def _write_what_waits(self) -> None:
        """Settle and open in order; on a full disk the rest waits for the next cycle."""
        while self._unwritten:
            item = self._unwritten[0]
            try:
                if isinstance(item, ClosedBin):
                    self._settle(item)
                else:
                    self._ledger.open(item)
            except (StorageFull, StorageBroken, OSError) as error:
                self._waits_for_disk = str(error)
                self._telemetry.errors.note("ledger", error)
                return
            except Exception as error:  # it would stand before all others for ever
                self._telemetry.errors.note("ledger", error)
            self._unwritten.popleft()
        self._waits_for_disk = ""

    def _settle(self, closed: ClosedBin) -> None:
        """Settle a bin that has closed, or again one that late rows changed."""
        before = self._ledger.counts()
        done = self._ledger.settle(closed)
        first = self._settled.get(closed.bin_ms)
        rows = done.rows if first is None else done.rows.where(_is_changed(done.rows, first, closed))
        if len(rows):
            self._buffer.append_predictions(rows)
            if first is None:
                self._note_export(rows)
        self._learn(closed)
        self._ledger.mark_settled(done, self._final_before_ms)
        if first is not None and len(rows):
            self.counts = replace(self.counts, rows_corrected=self.counts.rows_corrected + len(rows))
            logger.info(
                "settled forecasts corrected bin=%s rows=%d", iso_z(from_ms(closed.bin_ms)), len(rows)
            )
        self._settled = {start: one for start, one in self._settled.items() if start >= self._final_before_ms}
        self._settled[closed.bin_ms] = closed
        after = self._ledger.counts()
        self._telemetry.count_outcomes(after.settled - before.settled, after.expired - before.expired)

    def _learn(self, closed: ClosedBin) -> None:
        if self._corrector:
            try:
                self._corrector.learn(closed)
            except Exception as error:  # what forecasts teach must not keep them from being settled
                self._telemetry.errors.note("feedback", error)
        if self.shadow:
            self.shadow.settle(closed)

    @property
    def _final_before_ms(self) -> int:
        """Return the bin before which nothing is corrected any more: a bin later than the setting says,
        for rows that are on their way through the daemon at this moment.
        """
        return self._now_ms - self._history.correct_ms - 2 * self._history.bin_ms

    def _expire(self, now: datetime) -> None:
        """Give up the forecasts of a fleet that fell silent."""
        before = to_ms(now - timedelta(seconds=self._fleet.settings.gone_after_s))
        try:
            n_expired = self._ledger.expire(before)
        except (StorageFull, StorageBroken) as error:
            self._telemetry.errors.note("ledger", error)
            return
        if n_expired:
            self._telemetry.count_outcomes(0, n_expired)

    def _refresh(self, *, is_due: bool) -> None:
        """Read the bins of late records again, not more often than every few seconds.

        Corrections come before the next bin closes: it ends the time in which an older one waits for them.
        """
        is_time = self._history.awaits_refresh and monotonic() - self._refreshed_at >= _REFRESH_S
        if not is_time and not (is_due and self._history.awaits_correction):
            return
        read = partial(self._buffer.iter_bins, bin_ms=self._history.bin_ms, metrics=self._history.metrics)
        self._unwritten.extend(self._history.refresh(read, corrections_only=not is_time))
        if is_time:
            self._refreshed_at = monotonic()
        self._write_what_waits()


def _is_changed(rows: SettledForecasts, first: ClosedBin, closed: ClosedBin) -> Flags:
    """Return which rows belong to a server whose values are not what they were at first."""
    before = dict(zip(first.server_names, first.values, strict=True))
    changed = {
        name
        for name, values in zip(closed.server_names, closed.values, strict=True)
        if name not in before or not np.array_equal(before[name], values, equal_nan=True)
    }
    return np.fromiter((name in changed for name in rows.server_name), np.bool_, len(rows))
