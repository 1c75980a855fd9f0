"""The literal four metrics: known answers, and scipy as the reference where it has one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from fleetcast.drift.literal import scores as ds
from fleetcast.drift.literal.baseline import Baseline
from fleetcast.settings import DriftSettings

SETTINGS = DriftSettings()
RNG = np.random.default_rng(3)
numbers = st.lists(st.integers(-20, 20).map(float), min_size=2, max_size=60)


@settings(deadline=None)
@given(numbers, numbers)
def test_ks_is_scipys_two_sample_statistic_ties_included(window: list[float], reference: list[float]) -> None:
    found = ds.ks_statistic(np.array(window), np.sort(np.array(reference)))
    assert found == pytest.approx(float(ks_2samp(window, reference, method="asymp").statistic), abs=1e-12)


@settings(deadline=None)
@given(numbers)
def test_identical_data_never_drift(values: list[float]) -> None:
    column = {"cpu_pct": np.array(values * 50)}
    references = {"cpu_pct": ds.baseline_of(column["cpu_pct"])}
    scores = ds.score_window(column, column, column, references, SETTINGS)
    assert (scores.per, scores.dss, scores.fds) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("factor", [1000.0, 0.001])
def test_the_scores_of_a_rate_do_not_depend_on_its_unit(factor: float) -> None:
    base, window = RNG.gamma(2.0, 3.0, 500), RNG.gamma(2.0, 4.0, 200)
    forecast = window * RNG.normal(1.0, 0.1, 200)

    def scores(scale: float) -> ds.MetricScores:
        references = {"disk_io_mb_s": ds.baseline_of(base * scale)}
        columns = {"disk_io_mb_s": window * scale}
        return ds.score_window({"disk_io_mb_s": forecast * scale}, columns, columns, references, SETTINGS)

    assert list(scores(factor).by_name().values()) == pytest.approx(list(scores(1.0).by_name().values()))


def test_per_divides_by_the_actual_but_never_by_less_than_the_floor() -> None:
    actual, p50 = np.array([50.0, 100.0, 0.0]), np.array([55.0, 90.0, 2.0])
    errors = ds.relative_errors(p50, actual, ds.error_floor("cpu_pct", 90.0, SETTINGS))
    assert errors.tolist() == [0.1, 0.1, 0.1]


def test_one_stray_value_does_not_decide_per() -> None:
    actual = np.full(1000, 50.0)
    p50 = actual * 1.05
    p50[7] = 1.8e19  # a counter that wrapped, and a forecast that followed it

    found = ds.error_rate({"load": p50}, {"load": actual}, {}, SETTINGS)

    assert found == pytest.approx(0.06, abs=0.001)


def test_the_floor_of_a_rate_is_a_fifth_of_the_baselines_95th_percentile() -> None:
    assert ds.error_floor("latency_ms", 40.0, SETTINGS) == 8.0
    assert ds.error_floor("latency_ms", 0.0, SETTINGS) > 0


def test_per_without_a_baseline_takes_the_floor_from_the_window() -> None:
    actual = np.full(10, 100.0)
    found = ds.error_rate({"latency_ms": actual * 1.5}, {"latency_ms": actual}, {}, SETTINGS)
    assert found == 0.5


def test_fds_is_full_at_three_standard_deviations() -> None:
    reference = ds.MetricBaseline(np.array([0.0, 1.0]), 100, 50.0, 10.0, 70.0)
    shifts = [ds.mean_shift(np.array([value]), reference, 0.5) for value in (50.0, 65.0, 80.0, 500.0)]
    assert shifts == [0.0, 0.5, 1.0, 1.0]


def test_a_metric_that_stood_still_has_a_floor_for_its_spread() -> None:
    still = ds.baseline_of(np.full(100, 7.0))
    assert ds.count_anomalies(np.array([7.0, 8.4, 8.6]), still, ds.std_floor("cpu_pct", still.p95)) == 1


def test_the_anomaly_rate_pools_the_values_of_all_metrics() -> None:
    baseline = {name: ds.baseline_of(RNG.normal(50, 5, 500)) for name in ("cpu_pct", "mem_pct")}
    columns = {"cpu_pct": np.full(60, 50.0), "mem_pct": np.array([50.0] * 50 + [99.0] * 10)}
    assert ds.score_window({}, {}, columns, baseline, SETTINGS).anomaly_rate == 10 / 120


@pytest.mark.parametrize(
    ("n_window", "n_baseline", "reason"),
    [
        (49, 100, "49 values in the window, 50 needed"),
        (100, 49, "49 values in the baseline, 50 needed"),
        (100, 0, "0 values in the baseline, 50 needed"),
    ],
)
def test_a_metric_with_few_values_is_not_compared(n_window: int, n_baseline: int, reason: str) -> None:
    references = {"cpu_pct": ds.baseline_of(np.full(n_baseline, 5.0))}
    columns = {"cpu_pct": np.full(n_window, 90.0)}
    scores = ds.score_window({"cpu_pct": np.zeros(n_window)}, columns, columns, references, SETTINGS)
    assert scores.not_compared == {"cpu_pct": reason}
    assert list(scores.by_name().values()) == [None] * 4


def test_a_metric_the_baseline_does_not_know_is_named() -> None:
    columns = {"net_in_mb_s": np.ones(100)}
    references = {"cpu_pct": ds.baseline_of(np.ones(100))}
    scores = ds.score_window(columns, columns, columns, references, SETTINGS)
    assert scores.not_compared == {"net_in_mb_s": "not in the baseline"}


def test_absent_values_do_not_count() -> None:
    values = np.full(120, 10.0)
    values[::2] = np.nan
    references = {"cpu_pct": ds.baseline_of(np.full(60, 10.0))}
    scores = ds.score_window(
        {"cpu_pct": values}, {"cpu_pct": values}, {"cpu_pct": values}, references, SETTINGS
    )
    assert scores.compared == ("cpu_pct",)
    assert scores.dss == 0.0


def test_a_saved_baselines_sketch_stands_for_its_values() -> None:
    values = RNG.normal(40, 8, (3, 1, 2000)).astype(np.float32)
    baseline = Baseline.from_grid(values, 0, 300_000, ("a", "b", "c"), ("cpu_pct",), "v1")
    sketch, exact = ds.baselines_from(baseline)["cpu_pct"], ds.baseline_of(values.reshape(-1).astype(float))
    window = RNG.normal(45, 8, 400)
    assert ds.ks_statistic(window, sketch.sorted_values) == pytest.approx(
        ds.ks_statistic(window, exact.sorted_values), abs=2e-3
    )
    assert (sketch.n, sketch.mean, sketch.std) == (
        exact.n,
        pytest.approx(exact.mean),
        pytest.approx(exact.std),
    )
