"""When to retrain, and in what order: drift, quiet period, safeguards, then a child process.

    python adaptive_retraining_daemon.py [--interval 300] [--once] [--mode auto|advise]

Owns: the cycle, and the limits in force: safeguards and quiet period stand here as literals, to be
edited; a setting of the same name overrides one. Does not know: how drift is scored
(`drift_monitor`), how a model is trained (`tft_trainer.py`, run by path as a child). A stop leaves a
running training alone; the next start adopts it.
"""

import argparse
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from drift_monitor import METRICS_FILE, DriftMonitor
from fleetcast.alerts.engine import AlertEngine
from fleetcast.clock import Clock, DataClock, SystemClock, monotonic, to_ms
from fleetcast.drift.evidence import DriftEvidence, DriftSource
from fleetcast.drift.report import DriftReport
from fleetcast.drift.seasonal.detector import READY
from fleetcast.errors import AlreadyRunning, BadData, CannotLook, ExitCode, FleetcastError, SettingsError
from fleetcast.exclusions import Exclusions
from fleetcast.files import write_json
from fleetcast.forecast.registry import Registry
from fleetcast.locks import OwnerLock, read_pid
from fleetcast.loop import Stop, SystemdNotifier, configure_logging, run_every
from fleetcast.program import models_dir, require_ray, run_program
from fleetcast.promotion.audit import TRAINING
from fleetcast.promotion.bake import judge_bake, settle_bake
from fleetcast.promotion.desk import Desk
from fleetcast.promotion.orders import Order
from fleetcast.retraining import report as done
from fleetcast.retraining.ahead import QuietAhead
from fleetcast.retraining.attempts import Attempts
from fleetcast.retraining.decision import OrderedTraining, RetrainingDecisionEngine
from fleetcast.retraining.inquiry import Inquiry
from fleetcast.retraining.order import (
    Readiness,
    export_for_training,
    forget_servers,
    training_context,
    training_steps,
)
from fleetcast.retraining.quiet import HostProbe, quiet_verdict
from fleetcast.retraining.report import DriftLog, RetrainingCheck, alert_figures
from fleetcast.retraining.state import FAILED, STATE_FILE, VERDICTS, Attempt
from fleetcast.retraining.trainings import DECISIONS_FILE, DataSpan, Trainings, data_span
from fleetcast.schema import QuietVerdict
from fleetcast.setting import override
from fleetcast.settings import CALIBRATED, Settings, load_settings

__all__ = ["AdaptiveRetrainingDaemon", "RetrainingDecisionEngine"]

logger = logging.getLogger("adaptive_retraining_daemon")  # not "__main__": people read this

LOG_FILE = "retraining_daemon.log"
LOCK_FILE = ".retraining_daemon.lock"
WATCH_S = 0.5  # between looks at a running training
ORDERS_S = 1.0  # between looks at what people order
ALERTS_S = 60.0  # that `--once` waits for its alerts to be sent; a stop waits for a sixth of it
WATCHED_SHARE = 0.9  # of the interval: a training is followed until shortly before the next check


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the daemon, or one check, or one export; return the exit code."""
    options = _parser(prog).parse_args(argv)
    return run_program("adaptive_retraining_daemon", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    settings = _settings(options)
    if options.export:
        print(export_for_training(settings, options.export))
        return ExitCode.OK
    try:
        daemon = AdaptiveRetrainingDaemon(settings=settings, config=options.config)
    except BadData as error:
        raise SettingsError([f"retraining.daemon_url: {error}"]) from error
    if options.once:
        return daemon.run_once()
    daemon.own(strict=True)  # before the log file has two writers
    configure_logging(Path(LOG_FILE), settings.logging)
    return daemon.run()


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
        from fleetcast.storage.store import DataBuffer  # pyarrow: --help answers without it

        given = (daemon_url, check_interval, data_buffer_dir, training_script)
        self._settings = own = _with_arguments(settings or Settings(), *given)
        self._config = config
        self._newest: datetime | None = None  # time of the newest record, as of the last look
        is_data = own.clock.mode == "data"
        self._clock = clock or (DataClock(lambda: self._newest) if is_data else SystemClock())
        self._store = DataBuffer(own.paths.data_buffer_dir, settings=own.buffer, expire=False)
        self._excluded = Exclusions(own.paths.checkpoint_dir)
        self._store.leave_out(self._excluded)
        self._registry = Registry(Path(own.paths.checkpoint_dir), models_dir(own))
        self._source = DriftSource.of(own, self._store, self._registry)
        self._monitor = DriftMonitor(own.drift.window_size, settings=own.drift, clock=self._clock)
        self._drift_log = DriftLog()
        self._alerts = AlertEngine(own)
        self._readiness = Readiness(self._store, own)
        self._inquiry = Inquiry(own.retraining.daemon_url, own.retraining.request_timeout_s)
        self._host = HostProbe()
        self._ahead = QuietAhead(own.decision, Path(DECISIONS_FILE))
        self.quiet = QuietVerdict(is_quiet=False, reason="not measured yet")
        self.engine = self._make_engine()
        timeout_s, nice = own.retraining.training_timeout_s, own.retraining.training_nice
        attempts = Attempts(self._registry, timeout_s=timeout_s, nice=nice)
        self._desk = Desk(self._registry, bakes=own.promotion.bake == "on")
        self._trainings = Trainings(
            self.engine, attempts, Path(STATE_FILE), own.clock.mode, self._clock, self._audit_end
        )
        is_buffer = Path(own.paths.data_buffer_dir).resolve() == Path.cwd()  # the inference daemon's to lock
        folder = None if is_buffer else Path()
        self._lock = OwnerLock(Path(LOCK_FILE), "the retraining of this folder", folder)
        self._is_owner, self._may_write = False, True
        self._notifier, self.stop = SystemdNotifier(), Stop()

    def run(self) -> ExitCode:
        """Check at each interval until SIGTERM or SIGINT.

        Raises:
            AlreadyRunning: another retraining daemon works in this folder.
        """
        limits = self._settings.retraining
        self.stop = Stop()
        self.stop.install()
        with self.ownership(strict=True):
            self._alerts.load()
            logger.info("retraining daemon started interval_s=%g", limits.interval_s)
            self._notifier.ready()
            alive, most = self._notifier.alive, limits.max_failures
            has_stopped = run_every(self._tick, limits.interval_s, self.stop, max_failures=most, alive=alive)
            self._notifier.stopping()
            self._alerts.finish(ALERTS_S / 6)  # what was sent is noted down
        logger.info("retraining daemon stopped reason=%s", self.stop.reason or "too many failures")
        return ExitCode.OK if has_stopped else ExitCode.FAILED

    def _tick(self) -> None:
        """Check, then follow a training and what people order, so that both are dealt with at once."""
        until = monotonic() + WATCHED_SHARE * self._settings.retraining.interval_s
        with self._alerts.watch():
            self.run_check_cycle()
        while monotonic() < until and not self.stop.is_requested:
            self.wait_for_training(until)
            if self._has_order(until):
                self.run_check_cycle()

    def _has_order(self, until: float) -> bool:
        """Wait for a training that a person orders, and carry other orders out meanwhile."""
        while monotonic() < until and not self.stop.wait(min(ORDERS_S, max(0.0, until - monotonic()))):
            self._notifier.alive()
            try:
                self._look_after_models()
                if self._desk.training_order() is not None:
                    return True
            except FleetcastError as error:  # the next check tries again
                logger.error("orders wait: %s", error)
                self.stop.wait(max(0.0, until - monotonic()))
        return False

    def _look_after_models(self) -> None:
        """Carry out what people ordered, and what the comparison with the model before asks for."""
        self._desk.look_after()
        try:
            settle_bake(self._desk, self._settings.promotion, is_recorded=self._settings.clock.mode == "data")
        except AlreadyRunning:
            logger.debug("another process moves models just now")

    def run_once(self) -> ExitCode:
        """Check, print, and wait for a training that this check started.

        Raises:
            CannotLook: there is neither an inference daemon to ask nor a buffer to read.
        """
        self._require_sight()
        self._may_write = self._store.exists  # in another folder than the daemon's nothing is left behind
        is_owner = self._may_write and self.own(strict=False)
        configure_logging(Path(LOG_FILE) if is_owner else None, self._settings.logging)
        with self.ownership():
            self.stop.install()
            check = self.run_check_cycle()
            print(f"{self._looked_at()}\n{check.as_text()}", flush=True)
            self._alerts.finish(ALERTS_S)
            if check.action != done.STARTED:
                return ExitCode.OK
            ended = self.wait_for_training()
            goes_on = "This check stopped waiting: the training goes on, and the next start adopts it."
            print(f"Training {ended.id}: {ended.outcome}. {ended.why}" if ended else goes_on)
            return ExitCode.FAILED if ended and ended.outcome == FAILED else ExitCode.OK

    def run_check_cycle(self) -> RetrainingCheck:
        """Check once; start a training that is due and return without waiting for it.

        Beside a running retraining daemon nothing is started or written.

        Raises:
            OwnershipLost: another daemon works in this folder, since a person deleted the lock file.
        """
        with self.ownership() as is_owner:
            self._newest = self._store.newest_record_time()
            if self._excluded.look():  # evidence is no state: it is read again without them
                self._source = DriftSource.of(self._settings, self._store, self._registry)
            if is_owner:
                self._lock.check()
                self._look_after_models()  # first: a switch that a kill broke off is finished, then counted
                self._trainings.note()
                self._forget_servers()
            now = self._clock.now()
            # a rejected first candidate is no model either
            missing = self._readiness.why_not() if self._registry.current_id() is None else ""
            evidence, report = self._measure_drift(missing, may_renew=is_owner)
            order = self._find_order() if is_owner else None
            check = self._decide(report, missing, now, order)
            check = self._act(check, evidence, order, is_owner=is_owner)
            logger.info(
                "checked should_retrain=%s action=%s reason=%s",
                *(check.decision.should_retrain, check.action, check.decision.reason),
            )
            if is_owner:
                self._ahead.note(check.at, check.as_json())  # first: counts though no line can be written
                self._trainings.note_check(check)
                self._alerts.note(alert_figures(check, self.engine))
        return check

    def _forget_servers(self) -> None:
        try:
            forget_servers(self._excluded, is_training=self._trainings.running is not None)
        except FleetcastError as error:  # the next check tries again
            logger.error("servers cannot be forgotten yet: %s", error)

    def check_quiet_period(self) -> bool:
        """Measure the fleet and this host; return whether it is a quiet period (details: `quiet`)."""
        # Quiet period thresholds, in percent; a setting of the same name (`decision`) overrides one
        limits = override({"quiet_cpu_percent": 60.0, "quiet_mem_percent": 70.0}, self._settings.decision)
        fleet = self._inquiry.fleet(self.stop)
        avg_cpu, avg_mem = fleet.avg_cpu, fleet.avg_mem
        is_quiet = avg_cpu < limits["quiet_cpu_percent"] and avg_mem < limits["quiet_mem_percent"]
        host = self._host.measure((*self._inquiry.pids, *self._trainings.pids))
        verdict = quiet_verdict(fleet, host, limits, self._settings.decision, is_fleet_quiet=is_quiet)
        self.quiet = self._ahead.judge(verdict, self._clock.now())
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
        """Own the folder's state; yields False where another daemon owns it."""
        if self._is_owner:
            yield True
        elif not self._may_write or not self.own(strict=strict):
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

    def _measure_drift(self, missing: str, *, may_renew: bool) -> tuple[DriftEvidence, DriftReport]:
        self._inquiry.look(self.stop)
        served = self._inquiry.served_version
        evidence = self._source.evidence(served, may_renew=may_renew, first_training=missing)
        self._monitor.observe(evidence)
        report = self._monitor.report()
        self._drift_log.note(report)
        return evidence, report

    def _find_order(self) -> Order | None:
        """Return a training that a person orders; one that a kill broke off after its start is done."""
        order = self._desk.training_order()
        begun = self._trainings.attempt_of(order.id) if order else None
        if order is None or begun is None:
            return order
        self._desk.end_training_order(order, begun.id)
        return None

    def _decide(
        self, report: DriftReport, missing: str, now: datetime, order: Order | None
    ) -> RetrainingCheck:
        initial_due = self._registry.current_id() is None and not missing
        is_quiet = self.check_quiet_period() or (initial_due and self.quiet.is_host_quiet)
        hours = self._settings.decision.follow_up_hours if report.basis == CALIBRATED else 0.0
        learning = self._learning(report)
        decision = self.engine.decide(
            report.current_metrics(),
            is_quiet,
            initial_due=initial_due,
            collecting=report.status_reason,
            follow_up=self._trainings.follow_up(hours, self.engine.trainings_left()),
            learning=learning,
            ordered=OrderedTraining(f"{order.by} ordered it: {order.reason}", order.force) if order else None,
        )
        is_asked = report.basis == CALIBRATED and not self._trainings.running
        decision, ahead = self._ahead.ask(decision, now, self.quiet, self._inquiry.ahead, is_asked=is_asked)
        standing = self._desk.standing()
        standing = replace(standing, paused=standing.pause_at(self._desk.clock))
        check = RetrainingCheck(now, report, self.quiet, decision, missing, done.NOTHING)
        bake = judge_bake(self._desk, self._settings.promotion)
        check = replace(check, standing=standing, bake=bake, learning=learning)
        return replace(check, ahead=ahead, problems=self._inquiry.problems)

    def _learning(self, report: DriftReport) -> str:
        """Return why a training would pay although nothing drifted, or ""."""
        is_on = self._settings.decision.learning == "on" and report.basis == CALIBRATED
        oldest, newest = self._store.oldest_record_time(), self._newest
        if not is_on or report.status != READY or oldest is None or newest is None:
            return ""
        days = timedelta(days=self._settings.retraining.training_days)
        history = DataSpan(to_ms(max(oldest, newest - days)), to_ms(newest))
        return self._trainings.learning(data_span(self._source.last_trained), history)

    def _act(
        self, check: RetrainingCheck, evidence: DriftEvidence, order: Order | None, *, is_owner: bool
    ) -> RetrainingCheck:
        """Do what was decided, as far as it is ours to do."""
        if not self._may_write:
            return check.with_action(done.BESIDE, "no buffer here: only checked, nothing trained or written")
        if not is_owner:
            other = f"another retraining daemon (pid {read_pid(Path(LOCK_FILE))}) is running"
            return check.with_action(done.BESIDE, f"{other}: only checked, nothing trained or written")
        write_json(Path(METRICS_FILE), check.report.as_json(check.at))
        check = self._train(check, evidence, order)
        if order is not None and check.action == done.STARTED and check.attempt_id:
            self._desk.end_training_order(order, check.attempt_id)
        elif order is not None:
            self._desk.refuse_training(order, check.action_detail or check.decision.reason)
        return check

    def _train(self, check: RetrainingCheck, evidence: DriftEvidence, order: Order | None) -> RetrainingCheck:
        """Start the training that was decided on, if nothing else stands in its way."""
        paused = check.standing.paused
        if not check.decision.should_retrain:
            return check
        if self._settings.retraining.mode == "advise":
            return check.with_action(done.ADVISED, "advise mode: nothing is trained")
        if paused and not (order and order.force):
            return check.with_action(
                done.PAUSED, f"trainings are paused until {paused.until} by {paused.by}: {paused.why}"
            )
        busy = self._trainings.why_not_free()
        attempt = None if busy else self._start(check, evidence, order)
        if attempt is None:
            return check.with_action(done.TRAINING, busy or "a training is running")
        return check.with_action(done.STARTED, f"training {attempt.id} started", attempt.id)

    def _start(self, check: RetrainingCheck, evidence: DriftEvidence, order: Order | None) -> Attempt | None:
        steps = training_steps(self._settings, Path(__file__).resolve(), self._config)
        context = training_context(check, evidence, self._source)
        before = self._registry.current_id()
        if order is not None:
            self._desk.begin_training(order)  # before the act
        try:
            return self._trainings.start(check.decision, before, steps, context, order)
        except FleetcastError as error:
            if order is not None:
                self._desk.refuse_training(order, f"it could not be started: {error}")
            raise

    def _audit_end(self, ended: Attempt) -> None:
        """Write down how a training ended, unless its trainer did."""
        if ended.outcome not in VERDICTS and not self._desk.audit.knows_attempt(ended.id):
            why = f"{ended.outcome}: {ended.why}"
            self._desk.note(TRAINING, "the retraining daemon", why, attempt=ended.id)

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

    def _require_sight(self) -> None:
        if self._store.exists:
            return
        away = self._inquiry.why_away(self.stop)
        if away:
            hint = "name the buffer's folder with --data-buffer-dir, or start the inference daemon"
            raise CannotLook(f"nothing to look at: no buffer in {self._store.folder}, and {away}", hint=hint)

    def _looked_at(self) -> str:
        """Name what a check looked at, and say so where the daemon's buffer is another one."""
        theirs = self._inquiry.buffer_folder
        is_other = theirs not in ("", str(self._store.folder))
        other = f" (it keeps its buffer in {theirs}: see --data-buffer-dir)" if is_other else ""
        return f"Looked at {self._store.describe()} and {self._settings.retraining.daemon_url}{other}"


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Watch drift and retrain the model when it is due.",
        epilog="exit codes: 0 ended or checked, 1 failed, 2 bad settings, 3 cannot start, 4 already running, "
        "5 not enough data for the export, 6 nothing to look at",
    )
    parser.add_argument("--daemon-url", help="inference daemon (default: http://localhost:8000)")
    parser.add_argument("--interval", type=float, help="seconds between checks (default: 300)")
    parser.add_argument("--data-buffer-dir", help="folder of the buffer (default: ./data_buffer)")
    parser.add_argument("--checkpoint-dir", help="folder of the models (default: ./checkpoints)")
    parser.add_argument("--mode", choices=("auto", "advise"), help="advise: decide, but never train")
    parser.add_argument("--engine", choices=("local", "ray"), help="where trainings run (default: local)")
    parser.add_argument("--clock", choices=("system", "data"), help="what now means (default: system)")
    parser.add_argument("--config", type=Path, help="settings file (default: ./fleetcast.toml, if present)")
    action = parser.add_mutually_exclusive_group()
    once = "check once, print, wait for a training that the check starts"
    action.add_argument("--once", action="store_true", help=once)
    action.add_argument("--export", type=Path, metavar="FILE", help="write the training export and end")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    flags = {
        "retraining.daemon_url": options.daemon_url,
        "retraining.interval_s": options.interval,
        "retraining.mode": options.mode,
        "retraining.engine": options.engine,
        "paths.data_buffer_dir": options.data_buffer_dir,
        "paths.checkpoint_dir": options.checkpoint_dir,
        "clock.mode": options.clock,
    }
    settings = load_settings(options.config, flags)
    require_ray(settings.retraining.engine, "retraining.engine")
    return settings


def _with_arguments(
    settings: Settings,
    daemon_url: str | None,
    check_interval: float | None,
    data_buffer_dir: str | None,
    training_script: str | None,
) -> Settings:
    """Return the settings with the constructor's arguments in them; None leaves a setting as it is."""
    if check_interval is not None and not check_interval > 0:
        raise BadData(f"check_interval must be > 0 seconds, got {check_interval!r}")
    paths, own = settings.paths, settings.retraining
    url, script = daemon_url or own.daemon_url, training_script or own.training_script
    own = replace(own, daemon_url=url, training_script=script, interval_s=check_interval or own.interval_s)
    paths = replace(paths, data_buffer_dir=data_buffer_dir or paths.data_buffer_dir)
    return replace(settings, paths=paths, retraining=own)


if __name__ == "__main__":
    raise SystemExit(main())
