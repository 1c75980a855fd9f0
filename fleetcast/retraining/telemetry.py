"""The retraining daemon's numbers for Prometheus: `retraining_metrics.prom`.

Owns: names and labels of these metrics, and the file, which every check rewrites. Does not know: how
anything in it was measured or decided.

It is a textfile and not a port of its own: there is no second port to guard, the numbers outlive the
daemon (their age is one of them), node_exporter's textfile collector reads it unchanged, and the
inference daemon shows it at the end of its own `/metrics`
(docs/decisions/retraining-metrics-textfile.md).
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fleetcast.clock import Clock, SystemClock, parse_plain_utc
from fleetcast.drift.report import DriftReport
from fleetcast.drift.seasonal.detector import READY
from fleetcast.errors import CorruptFile, FleetcastError
from fleetcast.files import free_bytes, read_regular, write_atomic
from fleetcast.retraining.decision import WEEK_S, TrainingLog
from fleetcast.retraining.report import RetrainingCheck
from fleetcast.retraining.state import OUTCOMES, RetrainingState

logger = logging.getLogger(__name__)

TEXTFILE = "retraining_metrics.prom"
PREFIX = "fleetcast_retraining_"
MAX_BYTES = 65_536  # what the daemon writes is below 10,000


class RetrainingTelemetry:
    """Writes the textfile; its counters stand in the state, so that no restart makes one fall."""

    def __init__(self, path: Path, checkpoint_dir: Path, clock: Clock | None = None) -> None:
        self._path = path
        self._folders = {"checkpoints": checkpoint_dir, "state": path.parent}
        self._clock = clock or SystemClock()

    def write(self, check: RetrainingCheck, state: RetrainingState) -> None:
        """Replace the file; a failed write costs these numbers, never the check."""
        wall_s = self._clock.now().timestamp()
        free = {name: free_bytes(folder) for name, folder in self._folders.items()}
        families = [
            *_of_check(check, wall_s),
            *_of_drift(check.report),
            *_of_state(state),
            *_of_trainings(state.log, check.at),
            _label("free_disk_bytes", "bytes free where a folder is, at the newest check", "folder", free),
        ]
        registry = CollectorRegistry()
        registry.register(_Families(families))
        try:
            write_atomic(self._path, generate_latest(registry))
        except FleetcastError as error:
            logger.warning("metrics not written error=%s", error)


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Yield what was given."""
        return self._families


def _gauge(name: str, text: str, value: float | None) -> Iterator[Metric]:
    if value is not None:
        yield GaugeMetricFamily(PREFIX + name, text, value=float(value))


def _label(name: str, text: str, label: str, values: Mapping[str, float | None]) -> Metric:
    """Return a family; what is not known yet (None) has no sample."""
    family = GaugeMetricFamily(PREFIX + name, text, labels=[label])
    for key, value in values.items():
        if value is not None:
            family.add_metric([key], float(value))
    return family


def _of_check(check: RetrainingCheck, wall_s: float) -> Iterator[Metric]:
    yield from _gauge("last_check_timestamp_seconds", "wall time of the newest check", wall_s)
    yield from _gauge(
        "should_retrain", "1 when the newest decision was to train", check.decision.should_retrain
    )
    yield from _gauge("quiet_period", "1 when it was quiet at the newest check", check.quiet.is_quiet)
    is_waiting = check.ahead.until_s is not None
    yield from _gauge(
        "waits_for_quieter_hour", "1 while a training waits for an hour that is forecast", is_waiting
    )
    passed = {item.name: float(item.passed) for item in check.decision.safeguards}
    yield from _gauge("held", "1 while a person holds new models back", check.standing.held is not None)
    yield from _gauge("paused", "1 while a person pauses trainings", check.standing.paused is not None)
    yield _label("safeguard_passed", "1 when a safeguard lets a training pass", "safeguard", passed)
    yield from _gauge("baking", "1 while a new model is compared with the one before", bool(check.bake))
    if check.bake:
        figures = check.bake.figures
        log_e = {"found": figures["log10_e_worse"], "needed": figures["log10_e_needed"]}
        yield from _gauge("bake_hours", "whole hours that both models were compared", figures["hours"])
        yield _label("bake_log10_e_worse", "evidence that the new model is worse", "kind", log_e)
    taken_back = [parse_plain_utc(at).timestamp() for at in check.standing.taken_back]
    recent = sum(at > wall_s - WEEK_S for at in taken_back)
    yield from _gauge("rollbacks_7d", "models taken back within 7 days that no person took back", recent)


def _of_drift(report: DriftReport) -> Iterator[Metric]:
    yield from _gauge("drift_ready", "1 with a verdict, 0 while data are collected", report.status == READY)
    yield from _gauge(
        "needs_retraining", "1 when the drift scores ask for a training", report.needs_retraining
    )
    yield _label("drift_score", "drift of the window against the baseline", "score", report.metrics)
    yield _label("drift_threshold", "score at which a training is asked for", "score", report.thresholds)
    yield _label("drift_basis_info", "what the scores are taken on", "basis", {report.basis: 1})
    by_horizon = {str(horizon): per for horizon, per in report.per_by_horizon.items()}
    yield _label(
        "prediction_error_ratio", "PER of the version in service, by bins ahead", "horizon_bins", by_horizon
    )
    relative = report.served_error.as_json()
    sides = {"served": relative["fleet"], "model": relative["model"]["fleet"]}
    known = {side: error for side, error in sides.items() if error is not None}
    yield _label("error_of_last_value_ratio", "error one bin ahead over the last value's", "side", known)
    yield from _of_calibration(report)
    yield from _gauge("window_pairs", "(server, bin) pairs in the drift window", report.n_pairs)


def _of_calibration(report: DriftReport) -> Iterator[Metric]:
    verdict = report.verdict
    if verdict is None:
        return
    yield _label("drift_literal_score", "the literal metrics, reported only", "score", report.literal)
    yield from _gauge("drift_series_in_alarm", "series over their calibrated limit", len(verdict.drifting))
    yield from _gauge("drift_series_compared", "series that are judged", verdict.n_compared)
    yield from _gauge("data_quality_events", "outages, restarts and frozen sensors", len(verdict.events))
    fleet = verdict.reference.fleet
    rates = {"target": fleet.false_alarms_per_month, "shown": fleet.shown_per_month}
    yield _label("drift_false_alarms_per_month", "meant, and on days left out", "kind", rates)


def _of_trainings(log: TrainingLog, now: datetime) -> Iterator[Metric]:
    last = log.last
    yield from _gauge(
        "last_training_timestamp_seconds",
        "time of the last training that ran to a verdict, by the daemon's clock",
        last.at.timestamp() if last else None,
    )
    yield from _gauge(
        "trainings_7d",
        "trainings of the last 7 days that ran to a verdict, by the daemon's clock",
        sum(stamp.age_s(now, None) < WEEK_S for stamp in log.stamps),
    )
    promoted = CounterMetricFamily(PREFIX + "promotions", "trainings whose model went into service")
    promoted.add_metric([], float(log.total_promoted))
    yield promoted


def _of_state(state: RetrainingState) -> Iterator[Metric]:
    attempts = CounterMetricFamily(PREFIX + "attempts", "attempts that ended, by outcome", labels=["outcome"])
    for outcome in OUTCOMES:
        attempts.add_metric([outcome], float(state.n_ended.get(outcome, 0)))
    yield attempts
    yield from _gauge("attempt_running", "1 while a training runs", state.running is not None)
    yield from _gauge("failures_in_a_row", "failed attempts the back-off counts", state.backoff.failures)


def read_textfile(path: Path) -> bytes:
    """Return the lines of a textfile that are ours; b"" where there is no file, or a foreign one."""
    try:
        data = read_regular(path, MAX_BYTES)
    except (OSError, CorruptFile):
        return b""
    if not data.isascii():
        return b""
    own = (PREFIX, f"# HELP {PREFIX}", f"# TYPE {PREFIX}")
    return b"".join(line + b"\n" for line in data.splitlines() if line.decode().startswith(own))
