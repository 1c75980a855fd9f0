"""The scraped numbers (names, bounded labels, states read at the scrape) and the errors that are kept."""

import logging
import re
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from fleetcast.clock import FakeClock
from fleetcast.errors import StorageFull
from fleetcast.ingest.rules import rule_of
from fleetcast.serving import telemetry as telemetry_module
from fleetcast.serving.telemetry import (
    CLOSURES,
    ERRORS_KEPT,
    FEED_CODES,
    GAUGES,
    PARTS,
    WRITE_CODES,
    RecentErrors,
    Snapshot,
    Telemetry,
)

CLOCK = FakeClock()
NOTHING = Snapshot()


def samples(
    telemetry: Telemetry, snapshot: Snapshot = NOTHING
) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = telemetry.render(snapshot).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_rejections_are_counted_by_rule_and_never_by_the_senders_words() -> None:
    telemetry = Telemetry(CollectorRegistry(), CLOCK)
    reasons = ["must lie in -1..1000, got 1e+06", "must be 1-128 printable characters, got 'a'", "evil", "e"]
    telemetry.count_records(5, Counter(map(rule_of, reasons)), 3)
    found = samples(telemetry)
    by_rule = {
        labels: v for (name, labels), v in found.items() if name == "fleetcast_records_rejected_total" and v
    }
    assert by_rule == {
        (("reason", "out_of_range"),): 1.0,
        (("reason", "server_name"),): 1.0,
        (("reason", "other"),): 2.0,
    }
    assert found["fleetcast_records_received_total", ()] == 5.0
    assert found["fleetcast_fields_ignored_total", ()] == 3.0


def test_events_add_up() -> None:
    telemetry = Telemetry(CollectorRegistry(), CLOCK)
    telemetry.count_feed(200, 0.003)
    telemetry.count_feed(429, 1.0)
    telemetry.count_sweep(0.5, n_model=8, n_fallback=2, n_skipped=1)
    telemetry.count_outcomes(6, 2)
    telemetry.count_model_load(True)
    telemetry.count_model_load(False)
    found = samples(telemetry)
    assert found["fleetcast_feed_seconds_count", (("code", "200"),)] == 1.0
    assert found["fleetcast_feed_seconds_count", (("code", "429"),)] == 1.0
    assert found["fleetcast_sweep_seconds_sum", ()] == 0.5
    assert found["fleetcast_series_forecast_total", (("source", "model"),)] == 8.0
    assert found["fleetcast_series_forecast_total", (("source", "fallback"),)] == 2.0
    assert found["fleetcast_bins_skipped_total", ()] == 1.0
    assert found["fleetcast_forecasts_settled_total", ()] == 6.0
    assert found["fleetcast_forecasts_expired_total", ()] == 2.0
    assert found["fleetcast_model_loads_total", (("outcome", "ok"),)] == 1.0
    assert found["fleetcast_model_loads_total", (("outcome", "failed"),)] == 1.0


def test_states_are_read_when_scraped_and_unknown_ones_are_left_out() -> None:
    telemetry = Telemetry(CollectorRegistry(), CLOCK)
    first = samples(telemetry, Snapshot({"servers": 3.0, "buffer_bytes": None}, "v1", False, {"web-01": 1.5}))
    assert first["fleetcast_servers", ()] == 3.0
    assert ("fleetcast_buffer_bytes", ()) not in first
    assert first["fleetcast_model_info", (("base", "false"), ("version", "v1"))] == 1.0
    assert first["fleetcast_server_last_record_timestamp_seconds", (("server", "web-01"),)] == 1.5
    second = samples(telemetry, Snapshot(dict.fromkeys(GAUGES, 1.0)))
    assert all(second[f"fleetcast_{name}", ()] == 1.0 for name in GAUGES)
    assert second["fleetcast_model_info", (("base", "false"), ("version", ""))] == 1.0


def test_free_disk_is_told_by_folder_and_left_out_where_it_is_unknown() -> None:
    telemetry = Telemetry(CollectorRegistry(), CLOCK)
    found = samples(telemetry, Snapshot(free_disk_bytes={"data_buffer": 5_000_000_000, "gone": None}))
    assert found["fleetcast_free_disk_bytes", (("folder", "data_buffer"),)] == 5e9
    assert ("fleetcast_free_disk_bytes", (("folder", "gone"),)) not in found


def test_every_status_code_of_a_refusal_is_counted_from_the_start() -> None:
    sources = [path.read_text() for path in (Path(telemetry_module.__file__).parents[1] / "api").glob("*.py")]
    codes = {int(code) for text in sources for code in re.findall(r"Refusal\(\s*(\d{3})", text)}
    assert len(codes) >= 8, "the refusals moved"
    assert codes - {*FEED_CODES, *WRITE_CODES} == set()


def test_a_hostile_server_name_stays_a_label_value() -> None:
    name = 'a"} 1\nfleetcast_servers 99\\'
    found = samples(Telemetry(CollectorRegistry(), CLOCK), Snapshot(server_last_seen_s={name: 2.0}))
    assert found["fleetcast_server_last_record_timestamp_seconds", (("server", name),)] == 2.0
    assert ("fleetcast_servers", ()) not in found


def test_what_another_daemon_left_is_shown_at_the_end() -> None:
    telemetry = Telemetry(CollectorRegistry(), CLOCK, lambda: b"fleetcast_retraining_window_pairs 7\n")
    text = telemetry.render(NOTHING)
    assert text.endswith(b"\nfleetcast_retraining_window_pairs 7\n")


def test_errors_are_counted_by_part_and_the_process_by_itself() -> None:
    telemetry = Telemetry(CollectorRegistry(), CLOCK)
    for _ in range(2):
        telemetry.errors.note("buffer", StorageFull("no space"))
    found = samples(telemetry)
    assert found["fleetcast_last_error_timestamp_seconds", (("part", "buffer"),)] == CLOCK.now().timestamp()
    assert found["fleetcast_errors_total", (("part", "buffer"),)] == 2.0
    assert found["process_resident_memory_bytes", ()] > 0
    assert not any(name.endswith("_created") for name, _ in found)


def test_the_newest_errors_are_kept_newest_first() -> None:
    clock = FakeClock()
    errors = RecentErrors(clock)
    for number in range(ERRORS_KEPT + 5):
        clock.advance(seconds=1)
        errors.note("ledger", StorageFull(f"full {number}"))
    kept = errors.newest_first()
    assert len(kept) == ERRORS_KEPT
    assert kept[0] == {"time": "2026-01-15T10:00:25Z", "part": "ledger", "error": "full 24"}
    assert errors.newest_by_part() == {"ledger": clock.now().timestamp()}


def test_the_same_error_is_logged_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wall = iter([0.0, 0.0, 30.0, 61.0, 61.0])
    monkeypatch.setattr(telemetry_module, "monotonic", lambda: next(wall))
    errors = RecentErrors(FakeClock())
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            errors.note("buffer", StorageFull("no space"))
    assert [record.getMessage() for record in caplog.records] == [
        "part failed part=buffer error=no space"
    ] * 2


def test_every_counter_with_labels_is_there_before_its_first_event() -> None:
    telemetry = Telemetry(CollectorRegistry(), CLOCK)
    found = samples(telemetry)
    for name, label, values in (
        ("fleetcast_errors_total", "part", PARTS),
        ("fleetcast_records_rejected_total", "reason", ("time_format", "too_many_servers", "other")),
        ("fleetcast_feed_seconds_count", "code", ("200", "413", "503")),
        ("fleetcast_write_seconds_count", "code", ("204", "400", "503")),
        ("fleetcast_write_samples_total", "outcome", ("taken", "ignored")),
        ("fleetcast_series_forecast_total", "source", ("model", "fallback")),
        ("fleetcast_model_loads_total", "outcome", ("ok", "failed")),
        ("fleetcast_requests_refused_total", "reason", ("key", "host", "origin")),
        ("fleetcast_connections_ended_total", "reason", CLOSURES),
    ):
        for value in values:
            assert found[name, ((label, value),)] == 0.0


def test_refused_requests_are_logged_once_a_minute_with_peer_and_number(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(telemetry_module, "monotonic", lambda: now[0])
    telemetry = Telemetry(CollectorRegistry(), CLOCK)
    for second in range(120):
        now[0] = 1000.0 + second
        for number in range(3):
            telemetry.count_refusal("key", "192.0.2.7" if number else f"198.51.100.{second}")
        telemetry.unwelcome.log_when_due()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "count=180 peers=61" in said[1]
    assert "192.0.2.7 (key): 120" in said[1]
    assert samples(telemetry)["fleetcast_requests_refused_total", (("reason", "key"),)] == 360.0
