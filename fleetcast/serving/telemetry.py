"""What the parts of the daemon report while they work, and how Prometheus reads it (`GET /metrics`).

Owns: the errors the daemon survived; metric names, labels and their bounds; the text format
(prometheus_client). Does not know: where the numbers come from. Parts report events here; a state
(backlog, model, ledger) comes in a `Snapshot` at each scrape.
"""

import logging
import threading
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fleetcast.clock import Clock, iso_z, monotonic
from fleetcast.errors import FleetcastError
from fleetcast.ingest.rules import OTHER_RULE, RULES
from fleetcast.serving.capacity import CapacityGauges
from fleetcast.serving.fullness import FullnessGauges
from fleetcast.workers import Workers

logger = logging.getLogger(__name__)

ERRORS_KEPT = 20
_REPEAT_S = 60.0  # the same error again is logged once a minute
_LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_SWEEP_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
# that report errors they survived; the second line's are the daemon's workers
PARTS = (
    *("buffer", "buffer statistics", "capacity", "export", "feedback", "ledger", "model", "shadow"),
    *("dates", "http", "history", "lane", "model loader", "probe", "sweep", "upkeep"),
)
FEED_CODES = (200, 400, 408, 413, 415, 422, 429, 503, 507)
WRITE_CODES = (204, 400, 404, 413, 415, 503, 507)
OUTCOMES = (
    *("taken", "repeated", "incomplete", "out_of_order"),
    *("out_of_bounds", "ignored", "refused", "invalid"),
)
# why a connection was ended
HEAD_TIMEOUT, TOO_LARGE, UNREAD_ANSWER, CROWDED = "head_timeout", "too_large", "unread_answer", "crowded"
CLOSURES = (HEAD_TIMEOUT, TOO_LARGE, UNREAD_ANSWER, CROWDED)
REFUSALS = ("key", "host", "origin")
_PEERS_KEPT = 100
_PEERS_SHOWN = 5
GAUGES = {
    "ready": "1 while GET /ready answers 200",
    "newest_record_timestamp_seconds": "time of the newest record",
    "servers": "servers seen within gone_after_s",
    "stale_servers": "those of them that sent nothing for stale_after_s",
    "metric_names": "different metrics of the stored records",
    "metric_names_limit": "most of them (server.max_metric_names)",
    "server_names": "servers of the last 8 days, which the daemon remembers",
    "server_names_limit": "most of them (server.max_server_names)",
    "backlog_bins": "closed bins that wait for their sweep",
    "open_forecasts": "forecasts that wait for their actual",
    "buffer_bytes": "bytes of the data buffer on disk",
    "buffer_day_files": "days in the data buffer",
    "buffer_lag_seconds": "how long the oldest record outside its day file has waited",
    "model_age_seconds": "wall time since the model in service was made",
    "training_running": "1 while a training runs",
    "late_records": "records since the start that came after their bin closed",
    "shards_ready": "processes that forecast now; 1 where the daemon does it itself",
    "shard_restarts": "shards that ended since the start, and were started again",
    "shadow_seconds": "how long the model before took in the newest sweep; only while it is compared",
    "load_failures": "model versions that should serve and cannot be loaded, as of the newest try",
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """States at the moment of a scrape."""

    gauges: Mapping[str, float | None] = field(default_factory=dict)  # by name below, None = unknown
    model_version: str | None = None
    is_base_model: bool = False
    server_last_seen_s: Mapping[str, float] = field(default_factory=dict)  # already limited
    capacity: CapacityGauges | None = None
    fullness: FullnessGauges | None = None
    free_disk_bytes: Mapping[str, int | None] = field(default_factory=dict)  # by folder


class RecentErrors:
    """The last errors the daemon survived; safe from any thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._errors: deque[dict[str, str]] = deque(maxlen=ERRORS_KEPT)
        self._n_by_part: Tally[str] = Tally(dict.fromkeys(PARTS, 0))
        self._newest_s: dict[str, float] = {}
        self._logged_at: dict[str, float] = {}

    def note(self, part: str, error: Exception) -> None:
        """Keep an error, and log it unless it has just been logged; one of ours with its traceback."""
        self.keep(part, error)
        message = f"{part}: {error}"
        with self._lock:
            is_news = monotonic() - self._logged_at.get(message, float("-inf")) >= _REPEAT_S
            if is_news:
                self._logged_at = {message: monotonic(), **dict(list(self._logged_at.items())[:ERRORS_KEPT])}
        if is_news:
            trace = None if isinstance(error, (FleetcastError, OSError)) else error
            logger.error("part failed part=%s error=%s", part, error, exc_info=trace)

    def keep(self, part: str, error: BaseException) -> None:
        """Keep an error that is logged elsewhere."""
        now = self._clock.now()
        text = str(error) or type(error).__name__
        with self._lock:
            self._n_by_part[part] += 1
            self._newest_s[part] = now.timestamp()
            self._errors.append({"time": iso_z(now), "part": part, "error": text})

    def by_part(self) -> dict[str, int]:
        """Return how many there were since the start, also those no longer kept."""
        with self._lock:
            return dict(self._n_by_part)

    def newest_by_part(self) -> dict[str, float]:
        """Return the time of each part's newest error, in seconds since 1970."""
        with self._lock:
            return dict(self._newest_s)

    def newest_first(self) -> list[dict[str, str]]:
        """Return the errors that are kept."""
        with self._lock:
            return list(reversed(self._errors))


class Unwelcome:
    """Requests refused at the door: who sent how many since the log last said so; safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_by_peer: Tally[str] = Tally()
        self._logged_at = float("-inf")

    def note(self, reason: str, peer: str) -> None:
        """Take one into account; past some peers, those that come are counted together."""
        with self._lock:
            is_known = peer in self._n_by_peer or len(self._n_by_peer) < _PEERS_KEPT
            self._n_by_peer[f"{peer} ({reason})" if is_known else "others"] += 1

    def log_when_due(self) -> None:
        """Log them once a minute; called about every second."""
        with self._lock:
            if not self._n_by_peer or monotonic() - self._logged_at < _REPEAT_S:
                return
            found, self._n_by_peer = self._n_by_peer, Tally()
            self._logged_at = monotonic()
        shown = ", ".join(f"{peer}: {n}" for peer, n in found.most_common(_PEERS_SHOWN))
        logger.warning("requests refused count=%d peers=%d most=%s", found.total(), len(found), shown)


class Telemetry:
    """Counts events; every method is safe from any thread."""

    def __init__(
        self,
        registry: CollectorRegistry,
        wall_clock: Clock,
        read_appendix: Callable[[], bytes] = bytes,
    ) -> None:
        """Register everything.

        Args:
            read_appendix: returns samples in the text format that another daemon owns.
        """
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a sample more per counter, of no use
        ProcessCollector(registry=registry)
        self._registry = registry
        self._read_appendix = read_appendix
        self.errors = RecentErrors(wall_clock)
        self.workers = Workers(self.errors.keep)
        self._received = Counter(
            "fleetcast_records_received", "records accepted and durable", registry=registry
        )
        self._rejected = Counter(
            "fleetcast_records_rejected", "records refused, by rule", ["reason"], registry=registry
        )
        self._ignored, self._fields_refused = _register_fields(registry)
        self._feed = Histogram(
            "fleetcast_feed_seconds",
            "time from request to answer of POST /feed/data",
            ["code"],
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._write, self._samples = _register_remote_write(registry)
        self._sweep = Histogram(
            "fleetcast_sweep_seconds", "time of one sweep", buckets=_SWEEP_BUCKETS_S, registry=registry
        )
        self._series = Counter(
            "fleetcast_series_forecast", "series forecast, by source", ["source"], registry=registry
        )
        self._skipped = Counter(
            "fleetcast_bins_skipped", "closed bins that got no sweep of their own", registry=registry
        )
        self._settled = Counter("fleetcast_forecasts_settled", "forecasts settled", registry=registry)
        self._expired = Counter("fleetcast_forecasts_expired", "forecasts expired", registry=registry)
        self._reloads = Counter(
            "fleetcast_model_loads", "attempts to put a model into service", ["outcome"], registry=registry
        )
        self._refused, self._ended = _register_door(registry)
        self._forecast_writes = _register_forecast_writes(registry)
        self.unwelcome = Unwelcome()
        self._begin()

    def _begin(self) -> None:
        """Let every counter exist from the start: `increase()` does not see a first sample appear."""
        starts: tuple[tuple[Counter | Histogram, Iterable[object]], ...] = (
            (self._rejected, (*dict.fromkeys(RULES.values()), OTHER_RULE)),
            (self._feed, FEED_CODES),
            (self._write, WRITE_CODES),
            (self._samples, OUTCOMES),
            (self._series, ("model", "fallback")),
            (self._reloads, ("ok", "failed")),
            (self._refused, REFUSALS),
            (self._ended, CLOSURES),
            (self._forecast_writes, ("ok", "failed")),
        )
        for metric, values in starts:
            for value in values:
                metric.labels(str(value))

    def count_refusal(self, reason: str, peer: str) -> None:
        """Note one request refused at the door, by the address it came from."""
        self._refused.labels(reason).inc()
        self.unwelcome.note(reason, peer)

    def count_connection_end(self, reason: str) -> None:
        """Note one connection that was ended by us."""
        self._ended.labels(reason).inc()

    def count_feed(self, code: int, seconds: float) -> None:
        """Note one answer of POST /feed/data."""
        self._feed.labels(str(code)).observe(seconds)

    def count_write(self, code: int, seconds: float) -> None:
        """Note one answer to remote-write."""
        self._write.labels(str(code)).observe(seconds)

    def count_samples(self, n_by_outcome: Mapping[str, int]) -> None:
        """Note what became of one remote-write request's samples."""
        for outcome, n_samples in n_by_outcome.items():
            self._samples.labels(outcome).inc(n_samples)

    def count_records(
        self, n_received: int, faults: Mapping[str, int], n_ignored: int, n_fields_refused: int = 0
    ) -> None:
        """Note what became of one request's records; `faults` are those refused, by rule."""
        self._received.inc(n_received)
        self._ignored.inc(n_ignored)
        self._fields_refused.inc(n_fields_refused)
        for rule, n_records in faults.items():
            self._rejected.labels(rule).inc(n_records)

    def count_sweep(self, seconds: float, n_model: int, n_fallback: int, n_skipped: int) -> None:
        """Note one sweep."""
        self._sweep.observe(seconds)
        self._series.labels("model").inc(n_model)
        self._series.labels("fallback").inc(n_fallback)
        self.count_skipped(n_skipped)

    def count_skipped(self, n_bins: int) -> None:
        """Note closed bins that got no sweep of their own."""
        self._skipped.inc(n_bins)

    def count_outcomes(self, n_settled: int, n_expired: int) -> None:
        """Note what became of forecasts that were due."""
        self._settled.inc(n_settled)
        self._expired.inc(n_expired)

    def count_model_load(self, succeeded: bool) -> None:
        """Note an attempt to load a version."""
        self._reloads.labels("ok" if succeeded else "failed").inc()

    def count_forecast_write(self, error: Exception | None) -> None:
        """Note how a round of forecasts that were sent ended."""
        self._forecast_writes.labels("failed" if error else "ok").inc()
        if error:
            self.errors.note("export", error)

    def render(self, snapshot: Snapshot) -> bytes:
        """Return events and states in Prometheus's text format."""
        states = CollectorRegistry()
        states.register(_States(snapshot, self.errors))
        return generate_latest(self._registry) + generate_latest(states) + self._read_appendix()


def _register_remote_write(registry: CollectorRegistry) -> tuple[Histogram, Counter]:
    seconds = Histogram(
        "fleetcast_write_seconds",
        "time from request to answer of remote-write",
        ["code"],
        buckets=_LATENCY_BUCKETS_S,
        registry=registry,
    )
    samples = Counter(
        "fleetcast_write_samples",
        "samples of remote-write, by outcome; those of a scrape that is not whole yet are in none",
        ["outcome"],
        registry=registry,
    )
    return seconds, samples


def _register_forecast_writes(registry: CollectorRegistry) -> Counter:
    text = "rounds of forecasts sent by remote-write, by outcome"
    return Counter("fleetcast_forecast_writes", text, ["outcome"], registry=registry)


def _register_fields(registry: CollectorRegistry) -> tuple[Counter, Counter]:
    ignored = Counter("fleetcast_fields_ignored", "text fields that are no metric", registry=registry)
    refused = Counter(
        "fleetcast_fields_refused", "fields left out of records, one metric too many", registry=registry
    )
    return ignored, refused


def _register_door(registry: CollectorRegistry) -> tuple[Counter, Counter]:
    refused = Counter(
        "fleetcast_requests_refused",
        "requests refused at the door, by reason",
        ["reason"],
        registry=registry,
    )
    ended = Counter(
        "fleetcast_connections_ended",
        "connections the daemon ended, by reason",
        ["reason"],
        registry=registry,
    )
    return refused, ended


class _States(Collector):
    """Turns the states of one scrape into samples."""

    def __init__(self, snapshot: Snapshot, errors: RecentErrors) -> None:
        self._snapshot = snapshot
        self._errors = errors

    def collect(self) -> Iterable[Metric]:
        """Yield the present states; unknown ones are left out."""
        snapshot = self._snapshot
        for name, text in GAUGES.items():
            value = snapshot.gauges.get(name)
            if value is not None:
                yield GaugeMetricFamily(f"fleetcast_{name}", text, value=float(value))
        yield from self._error_families()
        yield _by_label(
            "fleetcast_free_disk_bytes",
            "bytes that the disk of a folder has left",
            "folder",
            snapshot.free_disk_bytes,
        )
        info = GaugeMetricFamily(
            "fleetcast_model_info",
            "the model in service (empty version: fallback)",
            labels=["version", "base"],
        )
        info.add_metric([snapshot.model_version or "", str(snapshot.is_base_model).lower()], 1.0)
        yield info
        yield _by_label(
            "fleetcast_server_last_record_timestamp_seconds",
            "time of a server's newest record, for the first servers up to server.max_server_labels",
            "server",
            snapshot.server_last_seen_s,
        )
        if snapshot.capacity is not None:
            yield from _capacity_families(snapshot.capacity)
        if snapshot.fullness is not None:
            yield from _fullness_families(snapshot.fullness)

    def _error_families(self) -> Iterable[Metric]:
        errors = CounterMetricFamily("fleetcast_errors", "errors lived through, by part", labels=["part"])
        for part, n_errors in self._errors.by_part().items():
            errors.add_metric([part], n_errors)
        yield errors
        yield _by_label(
            "fleetcast_last_error_timestamp_seconds",
            "time of a part's newest error",
            "part",
            self._errors.newest_by_part(),
        )


def _by_label(name: str, text: str, label: str, values: Mapping[str, float | None]) -> Metric:
    """Return a gauge with a sample for each known value."""
    return _by_labels(name, text, (label,), (((key,), value) for key, value in values.items()))


def _by_labels(
    name: str, text: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float | None]]
) -> Metric:
    """Return a gauge of several labels with a sample for each known value."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values:
        if value is not None:
            family.add_metric(key, float(value))
    return family


def _capacity_families(gauges: CapacityGauges) -> Iterable[Metric]:
    """Yield who passes 90 % within the horizon, and how good such answers were."""
    expected = {metric: gauges.expected[metric] for metric in gauges.over if metric in gauges.expected}
    yield _by_label(
        "fleetcast_capacity_expected_crossings",
        "sum of the probabilities of servers below 90 % to reach it within the horizon",
        "metric",
        expected,
    )
    yield _by_label(
        "fleetcast_capacity_likely_crossings",
        "servers below 90 % that reach it within the horizon with a probability of 0.5 or more",
        "metric",
        {metric: gauges.likely[metric] for metric in gauges.over},
    )
    yield _by_label("fleetcast_capacity_over", "servers at 90 % or more now", "metric", gauges.over)
    yield _by_labels(
        "fleetcast_capacity_brier_score",
        "mean squared error of settled probabilities for 90 %, of two weeks",
        ("metric", "source"),
        gauges.brier.items(),
    )
    yield _by_labels(
        "fleetcast_capacity_probability",
        "probability to reach 90 % within the horizon, for the first servers up to server.max_server_labels",
        ("server", "metric"),
        gauges.probability.items(),
    )


def _fullness_families(gauges: FullnessGauges) -> Iterable[Metric]:
    """Yield how many servers are full soon, and when those that are first."""
    yield _by_labels(
        "fleetcast_capacity_full_within",
        "servers that reach 95 % in less than so many days, at the earliest; those at it are in none",
        ("metric", "within_days"),
        (((metric, str(days)), n_servers) for (metric, days), n_servers in gauges.within.items()),
    )
    full = "servers that were at 95 % or more on the newest whole day"
    first = "earliest day on which any server may reach 95 %"
    yield _by_label("fleetcast_capacity_full", full, "metric", gauges.full)
    yield _by_label("fleetcast_capacity_earliest_full_timestamp_seconds", first, "metric", gauges.earliest)
    yield _by_labels(
        "fleetcast_capacity_full_early_timestamp_seconds",
        "first day on which a server may reach 95 %, of the soonest (server.max_server_labels, at most 100)",
        ("server", "metric"),
        gauges.early.items(),
    )
    yield _by_labels(
        "fleetcast_capacity_full_late_timestamp_seconds",
        "last day on which the same server will have reached 95 %",
        ("server", "metric"),
        gauges.late.items(),
    )
