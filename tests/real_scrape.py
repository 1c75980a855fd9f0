"""All that a Prometheus can scrape of both daemons, for tests of rules and dashboards."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from test_forecast_series import export_of, forecast, settled
from test_retraining_telemetry import CHECK, NOW
from test_seasonal_monitor import changed_grid, report_of

from fleetcast.clock import FakeClock
from fleetcast.errors import StorageFull
from fleetcast.retraining.decision import TrainingLog, TrainingStamp
from fleetcast.retraining.state import RetrainingState
from fleetcast.retraining.telemetry import TEXTFILE, RetrainingTelemetry, read_textfile
from fleetcast.serving.capacity import CapacityGauges
from fleetcast.serving.fullness import FullnessGauges
from fleetcast.serving.telemetry import GAUGES, Snapshot, Telemetry

JOB = {"job": "fleetcast"}  # as the documented configuration names it
Labels = Mapping[str, str]
_METRIC = re.compile(r"\b(fleetcast_\w+|process_\w+|up)\b(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"')


def write_retraining_numbers(folder: Path) -> list[bytes]:
    """Write `retraining_metrics.prom` with everything known; return it, and what the literal scores give."""
    path = folder / TEXTFILE
    state = RetrainingState(log=TrainingLog((TrainingStamp(NOW, promoted=True),)))
    texts = []
    for check in (CHECK, replace(CHECK, report=report_of(folder, changed_grid()))):
        RetrainingTelemetry(path, folder, FakeClock(NOW)).write(check, state)
        texts.append(read_textfile(path))
    return texts


def whole_scrape(folder: Path) -> dict[str, list[Labels]]:
    """Return the labels of every sample by its name, with everything known."""
    telemetry = Telemetry(CollectorRegistry(), FakeClock(NOW))
    telemetry.errors.keep("buffer", StorageFull("no space"))
    capacity = CapacityGauges(
        *({"cpu_pct": 1.0}, {"cpu_pct": 1}, {"cpu_pct": 1}),
        {("cpu_pct", "forecast"): 0.1},
        {("web-01", "cpu_pct"): 0.5},
    )
    disk = "disk_usage_pct"
    dates = {("web-01", disk): 1.8e9}
    fullness = FullnessGauges({(disk, 7): 1, (disk, 30): 1}, {disk: 0}, {disk: 1.8e9}, dates, dates)
    seen = {"web-01": 1.0}
    told = Snapshot(dict.fromkeys(GAUGES, 1.0), "v1", False, seen, capacity, fullness, {"data_buffer": 1})
    texts = [*write_retraining_numbers(folder), telemetry.render(told)]
    export = export_of()
    export.note_settled(settled("web-01", 1, 41.0, 44.0))
    export.note(forecast("web-01"))
    texts.append(b"".join(export.pieces()))
    found: dict[str, list[Labels]] = {"up": [JOB], "ALERTS": [{"alertname": ""}]}
    for text in texts:
        for family in text_string_to_metric_families(text.decode()):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(sample.labels)
    return found


def problems(expr: str, known: Mapping[str, Sequence[Labels]]) -> Iterator[str]:
    """Yield what an expression asks for that no scrape holds: a metric, a label, a label's value."""
    for match in _METRIC.finditer(expr):
        name, selector = match.groups()
        samples = known.get(name)
        if samples is None:
            yield match[0]
            continue
        for label, operator, value in _MATCHER.findall(selector or ""):
            if label == "instance":  # Prometheus's own
                continue
            is_exact = operator == "=" and not value.startswith("$")  # a dashboard's variable
            labelled = [*samples, JOB]
            if not any(label in one and (not is_exact or one[label] == value) for one in labelled):
                yield match[0]
