"""DriftMonitor alone, fed from a window, and as a program."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from settled_rows import BIN_MS, START_MS, RowStore, settled

import drift_monitor
from drift_monitor import DriftMonitor
from fleetcast.clock import FakeClock
from fleetcast.drift.evidence import DriftEvidence
from fleetcast.drift.literal.baseline import Baseline
from fleetcast.drift.literal.window import DriftWindow, PairWindow
from fleetcast.drift.seasonal.quorum import COMBINED_THRESHOLD, THRESHOLDS, WEIGHTS
from fleetcast.errors import BadData
from fleetcast.settings import DriftSettings

RNG = np.random.default_rng(5)
KEYS = {"per", "dss", "fds", "anomaly_rate", "combined_score", "needs_retraining"}


def normal(mean: float, n: int = 400) -> dict[str, np.ndarray]:
    return {"cpu_pct": np.random.default_rng(1).normal(mean, 5, n)}


def test_without_data_everything_is_zero_and_nothing_is_needed() -> None:
    assert DriftMonitor().calculate_drift_metrics() == {
        "per": 0.0,
        "dss": 0.0,
        "fds": 0.0,
        "anomaly_rate": 0.0,
        "combined_score": 0.0,
        "needs_retraining": False,
    }


def test_without_a_baseline_per_is_measured_but_never_decides() -> None:
    monitor = DriftMonitor()
    monitor.update({"cpu_pct": [90.0] * 100}, {"cpu_pct": [30.0] * 100})
    metrics = monitor.calculate_drift_metrics()
    assert metrics["per"] == 2.0
    assert (metrics["dss"], metrics["fds"], metrics["anomaly_rate"]) == (0.0, 0.0, 0.0)
    assert metrics["needs_retraining"] is False
    assert monitor.report().status == "collecting"


def test_each_metric_over_its_threshold_is_enough() -> None:
    reference = {"cpu_pct": np.linspace(40, 60, 400)}
    for predicted, actual, name in (
        (54.0, np.linspace(40, 60, 400), "per"),
        (None, np.linspace(47, 60, 400), "dss"),
        (None, np.linspace(40, 60, 400) + 4, "fds"),
        (None, np.concatenate((np.linspace(40, 60, 370), np.full(30, 90.0))), "anomaly_rate"),
    ):
        monitor = DriftMonitor(baseline=reference)
        forecasts = {"cpu_pct": actual if predicted is None else np.full(400, predicted)}
        monitor.update(forecasts, {"cpu_pct": actual})
        assert name in monitor.report().exceeded
        assert monitor.calculate_drift_metrics()["needs_retraining"] is True


def test_the_combined_score_alone_is_enough() -> None:
    monitor = DriftMonitor(baseline={"cpu_pct": np.linspace(40, 60, 400)})
    actual = np.linspace(40, 60, 400)
    monitor.update({"cpu_pct": actual * 1.09}, {"cpu_pct": actual})
    assert not monitor.calculate_drift_metrics()["needs_retraining"]
    monitor.combined_threshold = 0.03
    assert monitor.report().exceeded == ("combined_score",)


def test_the_actuals_stand_in_for_features_that_are_not_given() -> None:
    with_features, without = DriftMonitor(baseline=normal(50)), DriftMonitor(baseline=normal(50))
    actual = normal(58, 200)
    with_features.update(actual, actual, actual)
    without.update(actual, actual)
    assert with_features.calculate_drift_metrics() == without.calculate_drift_metrics()


def test_rows_without_actuals_leave_per_untouched() -> None:
    monitor = DriftMonitor(baseline=normal(50))
    monitor.update({"cpu_pct": np.full(100, 55.0)}, {"cpu_pct": np.full(100, 50.0)})
    per = monitor.calculate_drift_metrics()["per"]
    monitor.update({"cpu_pct": np.full(100, 99.0)}, None, normal(50, 100))
    assert monitor.calculate_drift_metrics()["per"] == per == pytest.approx(0.1)


def test_numbers_arrays_and_frames_give_the_same_metrics() -> None:
    actual = normal(57, 60)["cpu_pct"]
    one, many, frame = (DriftMonitor(baseline=normal(50)) for _ in range(3))
    for value in actual:
        one.update({"cpu_pct": value + 1}, {"cpu_pct": value})
    many.update({"cpu_pct": actual + 1}, {"cpu_pct": actual})
    frame.update(pd.DataFrame({"cpu_pct": actual + 1, "server_name": "a"}), pd.DataFrame({"cpu_pct": actual}))
    assert one.calculate_drift_metrics() == many.calculate_drift_metrics() == frame.calculate_drift_metrics()


def test_a_bad_update_leaves_the_window_as_it_was() -> None:
    monitor = DriftMonitor(baseline=normal(50))
    monitor.update(normal(50), normal(50))
    before = monitor.calculate_drift_metrics()
    with pytest.raises(BadData, match="must have one length"):
        monitor.update({"cpu_pct": [1.0]}, {"cpu_pct": [1.0, 2.0]})
    assert monitor.calculate_drift_metrics() == before


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "1000"])
def test_a_window_of_no_rows_is_refused(size: object) -> None:
    with pytest.raises(BadData, match="window_size must be a whole number >= 1"):
        DriftMonitor(window_size=size)  # type: ignore[arg-type]


def test_thresholds_with_a_missing_key_are_told() -> None:
    monitor = DriftMonitor()
    monitor.thresholds = {"per_threshold": 0.2}
    with pytest.raises(BadData, match="dss_threshold is missing, got only per_threshold"):
        monitor.calculate_drift_metrics()


def test_settings_override_the_literals() -> None:
    monitor = DriftMonitor(settings=DriftSettings(dss_threshold=0.5, per_weight=1.0, combined_threshold=0.9))
    assert monitor.thresholds["dss_threshold"] == 0.5
    assert monitor.weights["per_weight"] == 1.0
    assert (monitor.combined_threshold, monitor.thresholds["per_threshold"]) == (0.9, 0.10)


def test_trends_compare_the_halves_of_the_window() -> None:
    monitor = DriftMonitor(baseline=normal(50))
    monitor.update(normal(50, 400), normal(50, 400))
    monitor.update({"cpu_pct": normal(80, 400)["cpu_pct"] + 30}, normal(80, 400))
    assert set(monitor.report().trends.values()) == {"increasing"}
    for _ in range(3):
        monitor.update(normal(50, 400), normal(50, 400))
    assert set(monitor.report().trends.values()) <= {"stable", "decreasing"}


# beside a buffer


def wave(server: str, metric: str, number: int) -> float:
    return 50 + 10 * np.sin(number / 5 + ord(server[0]))


def higher(server: str, metric: str, number: int) -> float:
    return wave(server, metric, number) + 35


def grid_baseline() -> Baseline:
    values = np.array([[[wave(s, "cpu_pct", n) for n in range(600)]] for s in "ab"], np.float32)
    made = Baseline.from_grid(values, START_MS - 600 * BIN_MS, BIN_MS, ("a", "b"), ("cpu_pct",), "v1")
    return dataclasses.replace(made, series_error_mae=np.full((2, 1), 1.0, np.float32))


def observed(n_bins: int, value: object = higher, settings: DriftSettings | None = None) -> DriftMonitor:
    settings = settings or DriftSettings()
    store = RowStore(settled(["a", "b"], range(n_bins), value, wave))  # type: ignore[arg-type]
    window = DriftWindow(store.read_predictions, settings, BIN_MS)
    monitor = DriftMonitor(settings.window_size, settings=settings, clock=FakeClock())
    pairs = window.refresh("v1", 0, int(store.rows.target_ms.max()))
    monitor.observe(DriftEvidence(pairs, "v1", grid_baseline()))
    return monitor


@pytest.mark.parametrize(
    ("n_bins", "settings", "reason"),
    [
        (149, DriftSettings(), "298 of 300 (server, bin) pairs of the model in service, about 0.1 h more"),
        (23, DriftSettings(min_pairs=10), "1.9 of 2 h of the model in service"),
        (20, DriftSettings(window_size=30, min_span_s=0), ""),
        (150, DriftSettings(), ""),
    ],
)
def test_no_verdict_before_there_is_enough_of_the_model_in_service(
    n_bins: int, settings: DriftSettings, reason: str
) -> None:
    report = observed(n_bins, settings=settings).report()
    if n_bins == 20:  # a window smaller than the minimum can be full: 40 pairs offered, 30 kept
        assert report.status_reason == "no metric has enough values in both window and baseline"
        return
    assert report.status_reason == reason
    assert report.status == ("collecting" if reason else "ready")
    assert report.needs_retraining is (not reason)


def test_a_window_smaller_than_the_minimum_is_enough_once_it_is_full() -> None:
    settings = DriftSettings(window_size=60, min_span_s=0)
    assert observed(60, settings=settings).report().status == "ready"


def test_without_a_model_nothing_is_judged() -> None:
    monitor = DriftMonitor()
    monitor.observe(DriftEvidence(PairWindow(size=1000), None, grid_baseline()))
    assert monitor.report().status_reason == "no model in service yet"


def test_the_scale_of_the_seasonal_scores_is_what_the_literals_say_as_printed() -> None:
    printed = DriftMonitor()
    assert list(printed.thresholds.values()) == list(THRESHOLDS.values())
    assert list(printed.weights.values()) == list(WEIGHTS.values())
    assert printed.combined_threshold == COMBINED_THRESHOLD


def test_the_file_names_what_the_contract_names(tmp_path: Path) -> None:
    monitor = observed(200)
    monitor.save_metrics(tmp_path / "drift_metrics.json")
    found = json.loads((tmp_path / "drift_metrics.json").read_text())
    assert found["current_metrics"] == monitor.calculate_drift_metrics()
    assert found["current_metrics"].keys() == KEYS
    assert found["trends"].keys() == {"per", "dss", "fds", "anomaly_rate"}
    assert (found["status"], found["recommendation"]) == ("ready", "RETRAIN NOW")
    assert found["literal_metrics"].keys() == KEYS - {"needs_retraining"}
    assert found["per_by_horizon"].keys() == {"1"}
    assert found["served_error"]["fleet"] == found["served_error"]["model"]["fleet"] > 1  # no feedback here
    assert found["served_error"]["in_alarm"] is not None
    assert (found["window"]["window_size"], found["window"]["size"], found["window"]["pairs"]) == (
        1000,
        1000,
        400,
    )
    assert found["window"]["start"] == "2026-01-15T08:00:00Z"
    assert found["baseline"]["version"] == found["model_version"] == "v1"
    assert found["made_at"] == "2026-01-15T10:00:00Z"
    worst = found["top_drifting"][0]
    assert {"server", "metric", "score", "is_drifting", "error_ratio"} <= worst.keys()
    assert worst["is_drifting"] is True


def test_what_was_not_looked_at_yet_is_no_zero_and_no_ok(tmp_path: Path) -> None:
    missing = "the first training makes the drift reference: data span 0.1 h of 48 h"
    monitor = DriftMonitor(clock=FakeClock())
    monitor.observe(DriftEvidence(PairWindow(size=1000), "v1", missing=missing))
    monitor.save_metrics(tmp_path / "drift_metrics.json")
    found = json.loads((tmp_path / "drift_metrics.json").read_text())
    assert found["current_metrics"] == {**dict.fromkeys(KEYS), "needs_retraining": False}
    assert set(found["literal_metrics"].values()) == {None}
    assert set(found["trends"].values()) == {None}
    assert (found["recommendation"], found["status"], found["status_reason"]) == (None, "collecting", missing)
    text = monitor.generate_report()
    assert text.count("not yet") == 9
    assert f"Recommendation: none yet ({missing})" in text
    assert "OK" not in text
    assert " ok" not in text
    assert "0.0%  limit" not in text.replace("20.0%", "").replace("15.0%", "").replace("10.0%", "")


def test_the_report_names_the_worst_series_and_the_recommendation() -> None:
    report = observed(200).generate_report()
    for text in (
        "Status: ready",
        "400 of 1000 pairs",
        "a cpu_pct: drifts",
        "RETRAIN NOW",
        "Model: v1",
        "clients get",
    ):
        assert text in report


def test_update_after_observe_starts_from_that_window() -> None:
    monitor = observed(200)
    monitor.update({"cpu_pct": 50.0}, {"cpu_pct": 50.0})
    assert monitor.report().n_pairs == 401


# as a program


def test_the_program_reports_on_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_buffer").mkdir()
    assert drift_monitor.main([]) == 0
    assert "collecting" in capsys.readouterr().out
    assert list(tmp_path.rglob("*")) == [tmp_path / "data_buffer"], "reading creates nothing"


def test_the_program_takes_its_folders_as_flags_and_refuses_one_that_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ["--data-buffer-dir", str(tmp_path / "b"), "--checkpoint-dir", str(tmp_path / "c")]
    assert drift_monitor.main(folders) == 6
    assert f"{tmp_path / 'b'} is no folder of a buffer" in capsys.readouterr().err
    (tmp_path / "b").mkdir()
    assert drift_monitor.main(folders) == 0


def test_bad_settings_are_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.toml").write_text("[drift]\nwindow = 3\n")
    assert drift_monitor.main(["--config", "own.toml"]) == 2
    assert "nearest is drift.window_size" in capsys.readouterr().err
