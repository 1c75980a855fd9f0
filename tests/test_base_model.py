"""Claims about the base model that ships, and about how it was made."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.forecast.base_model import (
    PERCENTS,
    RATES,
    SIZES,
    SOURCES,
    SYNTHETIC_METRICS,
    joined,
    resized,
)
from benchmarks.forecast.parts.synthetic import synthetic_fleet
from fleetcast.forecast.encoding import GridShape
from fleetcast.forecast.predictor import Forecaster
from fleetcast.forecast.registry import Registry
from fleetcast.schema import HistoryWindow
from fleetcast.serving.history import BinGrid
from fleetcast.settings import BinSettings, ForecastSettings
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.sampler import WindowMix, WindowSampler

ROOT = Path(__file__).parents[1]
BIN_MS = 300_000


@pytest.fixture(scope="module")
def shipped() -> Forecaster:
    version = Registry(Path("no checkpoints"), ROOT / "models").base()
    assert version is not None, "models/ holds no intact version"
    assert version.is_base
    return Forecaster.load(version.model_path, bin_ms=BIN_MS, horizon_bins=ForecastSettings.horizon_bins)


def window(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]], metric: str) -> HistoryWindow:
    return HistoryWindow(("never-seen",), (metric,), values[None, None], 1_700_000_100_000, BIN_MS)


def test_the_shipped_base_is_small_licensed_and_says_where_it_comes_from() -> None:
    files = [path for path in (ROOT / "models").rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) <= 1_000_000
    assert (ROOT / "models" / "LICENSE-smd.txt").read_text().startswith("MIT License")
    (manifest,) = [json.loads(path.read_text()) for path in files if path.name == "manifest.json"]
    assert "MIT" in manifest["data"]
    assert manifest["command"].startswith("python -m benchmarks.forecast.base_model")
    assert "synthetic" in manifest["data"]


def test_the_shipped_base_knows_every_metric_that_is_forecast_by_default(shipped: Forecaster) -> None:
    assert set(BinSettings().forecast_metrics) <= set(shipped.metrics)


def test_an_unknown_server_is_forecast_from_its_first_hour_and_not_before(shipped: Forecaster) -> None:
    noisy = (40 + 5 * np.random.default_rng(0).normal(size=12)).astype(np.float32)
    first_hour = shipped.predict(window(noisy, "cpu_pct"))[0, 0]
    assert np.isfinite(first_hour).all()
    assert (np.diff(first_hour, axis=-1) >= 0).all()
    assert (np.abs(first_hour[:, 1] - 40) < 15).all()
    assert np.isnan(shipped.predict(window(noisy[:11], "cpu_pct"))).all()


@pytest.mark.parametrize(
    ("metric", "size"),
    [
        ("disk_io_mb_s", 0.05),
        ("latency_ms", 2000.0),
        ("mem_pct", 1.0),
        ("queue_depth", 40.0),
        ("disk_usage_pct", 2.0),
    ],
)
def test_a_daily_rhythm_of_any_size_is_forecast_better_than_by_now(
    metric: str, size: float, shipped: Forecaster
) -> None:
    rhythm = (2 + np.sin(2 * np.pi * np.arange(8 * 288 + 96) / 288)) * size * 10
    past, ahead = rhythm[:-96].astype(np.float32), rhythm[-96:]
    middle = shipped.predict(window(past, metric))[0, 0, :, 1]
    assert np.abs(middle - ahead).mean() < 0.5 * np.abs(past[-1] - ahead).mean()


def test_resizing_keeps_the_shape_of_a_series_and_draws_sizes_in_bounds() -> None:
    columns = tuple(dict.fromkeys(column for sources in SOURCES.values() for column in sources))
    shares = np.linspace(0, 1, 5, dtype=np.float32) * np.ones((2, len(columns), 1), np.float32)
    grid = TrainingGrid(("a", "b"), columns, shares, 0, BIN_MS)
    fleet = resized(grid, seed=1)
    assert fleet.values.shape == (2 * SIZES, len(SOURCES), 5)
    assert len(set(fleet.server_names)) == 2 * SIZES
    largest = fleet.values[..., -1]
    np.testing.assert_allclose(fleet.values[..., 2], largest / 2, rtol=1e-6)
    for column, metric in enumerate(fleet.metrics):
        low, high = PERCENTS if metric.endswith("_pct") else RATES
        assert ((largest[:, column] >= low) & (largest[:, column] <= high)).all()
    again = resized(replace(grid), seed=1)
    np.testing.assert_array_equal(again.values, fleet.values)


@pytest.mark.parametrize("pace", [1.0, 2.0])
def test_a_leak_is_forecast_to_go_on(pace: float, shipped: Forecaster) -> None:
    # Given memory at rest for a week, then rising for a day by `pace` points an hour, now 80
    noise = 0.3 * np.random.default_rng(1).normal(size=8 * 288)
    rising = np.maximum(0.0, np.arange(8 * 288) - 7 * 288) * pace / 12
    past = (80 + rising - rising[-1] + noise).astype(np.float32)
    low, middle, high = shipped.predict(window(past, "mem_pct"))[0, 0].T
    # Then it is higher in 1 and in 8 hours, and that it goes on as before is not ruled out
    assert 80 < middle[11] < middle[95] and middle[95] > 80 + 2 * pace
    assert low[11] > 77
    assert high[95] > 80 + 7 * pace


def test_windows_of_two_fleets_are_one_batch() -> None:
    shape = GridShape(BIN_MS, 96)
    batches = []
    for seed in (1, 2):
        fleet = synthetic_fleet(SYNTHETIC_METRICS, 2, 4 * 288, seed)
        held_from = np.full(fleet.values.shape[:2], fleet.n_bins, np.int64)
        batches.append(
            WindowSampler(fleet, shape, held_from, WindowMix(), seed).batch(5, range(len(fleet.metrics)))
        )
    both = joined(batches)
    assert len(both.arrays) == 10
    for first, last in ((slice(5), batches[0]), (slice(5, 10), batches[1])):
        np.testing.assert_array_equal(both.targets[first], last.targets)
        np.testing.assert_array_equal(both.arrays.past[first], last.arrays.past)
        np.testing.assert_array_equal(both.arrays.scale.origin[first], last.arrays.scale.origin)
        np.testing.assert_array_equal(both.metric_slots[first], last.metric_slots)


def test_no_forecast_moves_by_a_hundredth_of_a_point_because_a_mean_is_kept_in_sixteen_bits(
    shipped: Forecaster,
) -> None:
    # Given means of many records, which fall between two codes
    metrics = ("cpu_pct", "mem_pct", "disk_io_mb_s", "latency_ms")
    rng = np.random.default_rng(11)
    drawn = rng.normal(0, 1, (24, len(metrics), 2304)) * rng.uniform(0.01, 3, (24, len(metrics), 1))
    rhythm = 8 * np.sin(np.arange(2304) * (2 * np.pi / 288))
    exact = (rng.uniform(20, 80, (24, len(metrics), 1)) + rhythm + drawn).clip(0, 100)
    names = tuple(f"server-{number}" for number in range(24))
    grid = BinGrid(metrics, BIN_MS, 2304)
    for number in range(2304):
        grid.advance(number * BIN_MS)
        grid.put(np.arange(24, dtype=np.int32), np.full(24, number * BIN_MS), exact[:, :, number])
    kept = grid.values(np.arange(24))
    # When both are forecast
    first, second = (
        shipped.predict(HistoryWindow(names, metrics, values, 1_700_000_100_000, BIN_MS))
        for values in (exact.astype(np.float32), kept)
    )
    # Then percents move by less than 0.01 points, rates by less than 0.2 %
    assert (kept != exact.astype(np.float32)).mean() > 0.9
    assert np.abs(second - first)[:, :2].max() < 0.01
    assert np.abs(second / first - 1)[:, 2:].max() < 0.002
