"""When to retrain, and in what order: drift, quiet period, safeguards, then a child process.

    python adaptive_retraining_daemon.py [--interval 300] [--once] [--mode auto|advise]

Owns: the cycle, and the limits in force: safeguards and quiet period stand here as literals, to
be edited (settings override them). Does not know: how drift is scored (`drift_monitor`), how a
model is trained (`tft_trainer.py`, run by path as a child). A stop leaves a running training
alone; the next start adopts it.
"""

import argparse
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from drift_monitor import METRICS_FILE, DriftMonitor
from fleetcast.clock import Clock, DataClock, SystemClock, monotonic
from fleetcast.drift.evidence import DriftEvidence, DriftSource
from fleetcast.errors import AlreadyRunning, BadData, ExitCode, SettingsError
from fleetcast.files import OwnerLock, read_pid, write_json
from fleetcast.forecast.registry import Registry
from fleetcast.loop import Stop, SystemdNotifier, configure_logging, run_every
from fleetcast.program import models_dir, run_program
from fleetcast.retraining.attempts import Attempts
from fleetcast.retraining.decision import RetrainingDecisionEngine
from fleetcast.retraining.inquiry import Inquiry
from fleetcast.retraining.options import parser, settings_of, with_arguments
from fleetcast.retraining.order import training_context, training_steps
from fleetcast.retraining.quiet import FleetMean, HostProbe, QuietWeek, quiet_verdict
from fleetcast.retraining.readiness import Readiness
from fleetcast.retraining.report import ADVISED, BESIDE, NOTHING, STARTED, TRAINING, DriftLog, RetrainingCheck
from fleetcast.retraining.state import FAILED, STATE_FILE, Attempt
from fleetcast.retraining.trainings import DECISIONS_FILE, Trainings
from fleetcast.schema import QuietVerdict
from fleetcast.settings import CALIBRATED, Settings

__all__ = ["AdaptiveRetrainingDaemon", "RetrainingDecisionEngine"]

logger = logging.getLogger(__name__)

LOG_FILE = "retraining_daemon.log"
LOCK_FILE = ".retraining_daemon.lock"
WATCH_S = 0.5  # between looks at a running training


class AdaptiveRetrainingDaemon:
    """Checks drift every `check_interval` seconds and starts the trainings that are due.

    An argument left out is taken from the settings. Works in the current directory; only the
    holder of its lock writes there. Not thread safe.
    """

    def __init__(
        self,
        daemon_url: str | None = None,
        check_interval: float | None = None,
        data_buffer_dir: str | None = None,
        training_script: str | None = None,
        *,
        settings: Settings | None = None,
        config: Path | None = None,
        clock: Clock | None = None,
    ) -> None:
        from fleetcast.storage.store import DataBuffer  # --help shall not wait for pyarrow

        given = (daemon_url, check_interval, data_buffer_dir, training_script)
        self._settings = with_arguments(settings or Settings(), *given)
        self._config = config
        paths, drift, bins = self._settings.paths, self._settings.drift, self._settings.bins
        training, limits = self._settings.retraining, self._settings.decision
        self._newest: datetime | None = None
        is_data = self._settings.clock.mode == "data"
        self._clock = clock or (DataClock(lambda: self._newest) if is_data else SystemClock())
        self._store = DataBuffer(paths.data_buffer_dir, settings=self._settings.buffer, expire=False)
        self._registry = Registry(Path(paths.checkpoint_dir), models_dir(self._settings))
        self._source = DriftSource(self._store, self._registry, drift, bins.bin_s * 1000)
        self._monitor = DriftMonitor(drift.window_size, settings=drift, clock=self._clock)
        horizon_bins = self._settings.forecast.horizon_bins
        self._readiness = Readiness(self._store, bins, horizon_bins, training.training_days, limits)
        self._inquiry, self._host = Inquiry(training.daemon_url, training.request_timeout_s), HostProbe()
        self._attempts = Attempts(
            self._registry, timeout_s=training.training_timeout_s, nice=training.training_nice
        )
        self.engine = self._make_engine()
        self._trainings = Trainings(
            self.engine, self._attempts, Path(STATE_FILE), self._settings.clock.mode, self._clock
        )
        self._drift_log = DriftLog()
        self._quiet_week = QuietWeek(limits, Path(DECISIONS_FILE))
        self._lock = OwnerLock(Path(LOCK_FILE), "the retraining of this folder")
        self._is_owner = False
        self._notifier, self.stop = SystemdNotifier(), Stop()
        self.quiet = QuietVerdict(is_quiet=False, reason="not measured yet")

    def run(self) -> ExitCode:
        """Check at each interval until SIGTERM or SIGINT.

        Raises:
            AlreadyRunning: another retraining daemon works in this folder.
        """
        self.stop = Stop()
        self.stop.install()
        limits = self._settings.retraining
        with self.ownership(strict=True):
            logger.info("retraining daemon started interval_s=%g", limits.interval_s)
            self._notifier.ready()

            def cycle() -> None:
                until = monotonic() + 0.9 * limits.interval_s
                self.run_check_cycle()
                self.wait_for_training(until)  # its verdict is noted at once

            alive, most = self._notifier.alive, limits.max_failures
            has_stopped = run_every(cycle, limits.interval_s, self.stop, max_failures=most, alive=alive)
            self._notifier.stopping()
        logger.info("retraining daemon stopped reason=%s", self.stop.reason or "too many failures")
        return ExitCode.OK if has_stopped else ExitCode.FAILED

    def run_check_cycle(self) -> RetrainingCheck:
        """Check once; start a training that is due and return without waiting for it.

        Beside a running retraining daemon nothing is started or written.
        """
        with self.ownership() as is_owner:
            self._newest = self._store.newest_record_time()
            if is_owner:
                self._trainings.note()
            evidence, check = self._measured(self._clock.now(), is_owner=is_owner)
            check = self._acted(check, evidence, is_owner=is_owner)
            logger.info(
                "checked should_retrain=%s action=%s reason=%s",
                *(check.decision.should_retrain, check.action, check.decision.reason),
            )
            if is_owner:
                self._trainings.note_check(check)
        return check

    def check_quiet_period(self) -> bool:
        """Measure the fleet and this host; return whether it is a quiet period (details: `quiet`)."""
        limits = self._settings.decision
        fleet = self._inquiry.fleet(self.stop)
        avg_cpu = FleetMean.of(fleet.cpu_percent, limits.quiet_cpu_percent)
        avg_mem = FleetMean.of(fleet.mem_percent, limits.quiet_mem_percent)
        # Quiet period thresholds
        is_quiet = avg_cpu < 60.0 and avg_mem < 70.0
        own_pids = (*self._inquiry.pids, *self._attempts.pids(self._trainings.running))
        means, host = {"cpu": avg_cpu, "mem": avg_mem}, self._host.measure(own_pids)
        verdict = quiet_verdict(fleet, means, host, is_fleet_quiet=is_quiet, settings=limits)
        self.quiet = self._quiet_week.judge(verdict, self._clock.now())
        return self.quiet.is_quiet

    def own(self, *, strict: bool) -> bool:
        """Take the lock of the folder; return False where another daemon has it.

        Raises:
            AlreadyRunning: another daemon has it, and `strict` was asked for.
        """
        try:
            self._lock.acquire()
        except AlreadyRunning:
            if strict:
                raise
            return False
        return True

    @contextmanager
    def ownership(self, *, strict: bool = False) -> Iterator[bool]:
        """Be the owner of the folder's state; yields False where another daemon is."""
        if self._is_owner:
            yield True
        elif not self.own(strict=strict):
            self._trainings.look()
            yield False
        else:
            try:
                self._newest = self._store.newest_record_time()
                self._trainings.take_over()
                self._is_owner = True
                yield True
            finally:
                self._is_owner = False
                self._lock.release()

    def wait_for_training(self, until: float = math.inf) -> Attempt | None:
        """Follow the training that runs; None if there is none, or a stop or `until` came first."""
        while self._trainings.running and monotonic() < until and not self.stop.wait(WATCH_S):
            self._notifier.alive()
            ended = self._trainings.note()
            if ended is not None:
                return ended
        return None

    def _measured(self, now: datetime, *, is_owner: bool) -> tuple[DriftEvidence, RetrainingCheck]:
        """Measure drift and quiet, and decide."""
        self._inquiry.look(self.stop)
        evidence = self._source.evidence(self._inquiry.served_version, may_renew=is_owner)
        self._monitor.observe(evidence)
        report = self._monitor.report()
        self._drift_log.note(report)
        has_model = self._registry.current_id() is not None  # a rejected first candidate is none either
        missing = "" if has_model else self._readiness.why_not()
        initial_due = not has_model and not missing
        is_quiet = self.check_quiet_period() or (initial_due and self.quiet.is_host_quiet)
        hours = self._settings.decision.follow_up_hours if report.basis == CALIBRATED else 0.0
        decision = self.engine.decide(
            report.current_metrics(),
            is_quiet,
            initial_due=initial_due,
            collecting=report.status_reason,
            follow_up=self._trainings.follow_up(hours, self.engine.trainings_left()),
        )
        self._quiet_week.note(now, self.quiet, reason=decision.reason)
        return evidence, RetrainingCheck(now, report, self.quiet, decision, missing, NOTHING)

    def _acted(self, check: RetrainingCheck, evidence: DriftEvidence, *, is_owner: bool) -> RetrainingCheck:
        """Do what was decided, as far as it is ours to do."""
        if not is_owner:
            other = f"another retraining daemon (pid {read_pid(Path(LOCK_FILE))}) is running"
            return check.with_action(BESIDE, f"{other}: only checked, nothing trained or written")
        write_json(Path(METRICS_FILE), check.report.as_json(check.at))
        if not check.decision.should_retrain:
            return check
        if self._settings.retraining.mode == "advise":
            return check.with_action(ADVISED, "advise mode: nothing is trained")
        busy = self._trainings.why_not_free()
        attempt = None if busy else self._start(check, evidence)
        if attempt is None:
            return check.with_action(TRAINING, busy or "a training is running")
        return check.with_action(STARTED, f"training {attempt.id} started", attempt.id)

    def _start(self, check: RetrainingCheck, evidence: DriftEvidence) -> Attempt | None:
        steps = training_steps(self._settings, Path(__file__).resolve(), self._config)
        context = training_context(check, evidence, self._source)
        return self._trainings.start(check.decision, self._registry.current_id(), steps, context)

    def _make_engine(self) -> RetrainingDecisionEngine:
        # fmt: off
        engine = RetrainingDecisionEngine(
            min_hours_between_training=6,   # Minimum time between trainings
            max_days_without_training=30,   # Force retrain after N days
            max_trainings_per_week=3        # Weekly limit
        )
        # fmt: on
        engine.override(self._settings.decision)
        engine.use_clock(self._clock)
        return engine


def _once(daemon: AdaptiveRetrainingDaemon, settings: Settings) -> ExitCode:
    """Check, print and wait for a training this check started."""
    is_owner = daemon.own(strict=False)
    configure_logging(Path(LOG_FILE) if is_owner else None, settings.logging)
    with daemon.ownership():
        daemon.stop.install()
        check = daemon.run_check_cycle()
        print(check.as_text(), flush=True)
        if check.action != STARTED:
            return ExitCode.OK
        ended = daemon.wait_for_training()
        goes_on = "Not waited for: the training goes on, the next start adopts it."
        print(f"Training {ended.id}: {ended.outcome}. {ended.why}" if ended else goes_on)
        return ExitCode.FAILED if ended and ended.outcome == FAILED else ExitCode.OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon, or one check, or one export; return the exit code."""
    options = parser().parse_args(argv)
    return run_program("adaptive_retraining_daemon", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    settings = settings_of(options)
    if options.export:
        from fleetcast.retraining.order import export_for_training

        print(export_for_training(settings, options.export))
        return ExitCode.OK
    try:
        daemon = AdaptiveRetrainingDaemon(settings=settings, config=options.config)
    except BadData as error:
        raise SettingsError([f"retraining.daemon_url: {error}"]) from error
    if options.once:
        return _once(daemon, settings)
    daemon.own(strict=True)  # before the log file has two writers
    configure_logging(Path(LOG_FILE), settings.logging)
    return daemon.run()


if __name__ == "__main__":
    raise SystemExit(main())
