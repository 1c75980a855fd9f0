"""The scraped numbers: names, bounded labels, states read at the scrape."""

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from fleetcast.serving.telemetry import GAUGES, Snapshot, Telemetry


def samples(telemetry: Telemetry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = telemetry.render().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_rejections_are_counted_by_rule_and_never_by_the_senders_words() -> None:
    telemetry = Telemetry(CollectorRegistry())
    reasons = ["must lie in -1..1000, got 1e+06", "must be 1-128 printable characters, got 'a'", "evil", "e"]
    telemetry.count_records(5, reasons, 3)
    found = samples(telemetry)
    by_rule = {labels: v for (name, labels), v in found.items() if name == "fleetcast_records_rejected_total"}
    assert by_rule == {
        (("reason", "out_of_range"),): 1.0,
        (("reason", "server_name"),): 1.0,
        (("reason", "other"),): 2.0,
    }
    assert found["fleetcast_records_received_total", ()] == 5.0
    assert found["fleetcast_fields_ignored_total", ()] == 3.0


def test_events_add_up() -> None:
    telemetry = Telemetry(CollectorRegistry())
    telemetry.count_feed(200, 0.003)
    telemetry.count_feed(429, 1.0)
    telemetry.count_sweep(0.5, n_model=8, n_fallback=2, n_skipped=1)
    telemetry.count_outcomes(6, 2)
    telemetry.count_model_load(succeeded=True)
    telemetry.count_model_load(succeeded=False)
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
    states = [Snapshot({"servers": 3.0, "buffer_bytes": None}, "v1", False, {"web-01": 1.5})]
    telemetry = Telemetry(CollectorRegistry(), lambda: states[-1])
    first = samples(telemetry)
    assert first["fleetcast_servers", ()] == 3.0
    assert ("fleetcast_buffer_bytes", ()) not in first
    assert first["fleetcast_model_info", (("base", "false"), ("version", "v1"))] == 1.0
    assert first["fleetcast_server_last_record_timestamp_seconds", (("server", "web-01"),)] == 1.5
    states.append(Snapshot(dict.fromkeys(GAUGES, 1.0)))
    second = samples(telemetry)
    assert all(second[f"fleetcast_{name}", ()] == 1.0 for name in GAUGES)
    assert second["fleetcast_model_info", (("base", "false"), ("version", ""))] == 1.0


def test_a_hostile_server_name_stays_a_label_value() -> None:
    name = 'a"} 1\nfleetcast_servers 99\\'
    telemetry = Telemetry(CollectorRegistry(), lambda: Snapshot(server_last_seen_s={name: 2.0}))
    found = samples(telemetry)
    assert found["fleetcast_server_last_record_timestamp_seconds", (("server", name),)] == 2.0
    assert ("fleetcast_servers", ()) not in found


def test_what_another_daemon_left_is_shown_at_the_end() -> None:
    text = Telemetry(CollectorRegistry(), appended=lambda: b"fleetcast_retraining_window_pairs 7\n").render()
    assert text.endswith(b"\nfleetcast_retraining_window_pairs 7\n")


def test_errors_are_counted_by_part_and_the_process_by_itself() -> None:
    telemetry = Telemetry(
        CollectorRegistry(), lambda: Snapshot(errors_by_part={"buffer": 2}, last_error_s={"buffer": 1.5})
    )
    found = samples(telemetry)
    assert found["fleetcast_last_error_timestamp_seconds", (("part", "buffer"),)] == 1.5
    assert found["fleetcast_errors_total", (("part", "buffer"),)] == 2.0
    assert found["process_resident_memory_bytes", ()] > 0
    assert not any(name.endswith("_created") for name, _ in found)
