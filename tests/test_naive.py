"""The naive forecast: exact answers on series whose right answer is known by hand."""

import numpy as np
import pytest

from fleetcast.forecast.naive import NaiveForecaster
from fleetcast.schema import HistoryWindow

BIN_MS = 300_000
DAY = 288


def window_of(*series: np.ndarray, metrics: tuple[str, ...] = ("cpu_pct",)) -> HistoryWindow:
    values = np.stack(series).astype(np.float32).reshape(-1, len(metrics), len(series[0]))
    names = tuple(f"server-{i}" for i in range(len(values)))
    return HistoryWindow(names, metrics, values, 0, BIN_MS)


def daily_wave(n_bins: int) -> np.ndarray:
    return 50 + 30 * np.sin(2 * np.pi * np.arange(n_bins) / DAY)


def test_one_bin_is_repeated_without_spread() -> None:
    quantiles = NaiveForecaster(96).predict(window_of(np.array([12.5])))
    assert quantiles.shape == (1, 1, 96, 3)
    assert (quantiles == 12.5).all()


def test_before_a_day_the_last_value_is_the_median() -> None:
    history = np.array([10.0, 20.0, 30.0, 20.0] * 30)
    median = NaiveForecaster(96).predict(window_of(history))[0, 0, :, 1]
    assert (median == 20.0).all()


def test_a_daily_rhythm_is_continued_at_long_horizons() -> None:
    wave = daily_wave(3 * DAY + 96)
    median = NaiveForecaster(96).predict(window_of(wave[: 3 * DAY]))[0, 0, :, 1]
    np.testing.assert_allclose(median, wave[3 * DAY :], atol=1e-4)


def test_a_random_walk_is_forecast_by_its_last_value() -> None:
    walk = 500 + np.cumsum(np.random.default_rng(1).normal(size=3 * DAY))
    median = NaiveForecaster(12).predict(window_of(walk, metrics=("latency_ms",)))[0, 0, :, 1]
    assert (median == np.float32(walk[-1])).all()


def test_the_spread_is_that_of_past_steps() -> None:
    steps = np.random.default_rng(2).normal(size=3 * DAY)
    walk = 500 + np.cumsum(steps)
    quantiles = NaiveForecaster(96).predict(window_of(walk, metrics=("latency_ms",)))[0, 0]
    width = quantiles[:, 2] - quantiles[:, 0]
    assert width[0] == pytest.approx(2 * 1.2816, rel=0.25)  # 80 % of a unit normal step
    assert width[11] > 2 * width[0]


def test_a_gap_repeats_the_last_known_value() -> None:
    history = np.full(300, 40.0)
    history[-20:] = np.nan
    assert (NaiveForecaster(4).predict(window_of(history))[..., 1] == 40.0).all()


def test_a_hole_yesterday_falls_back_to_the_last_value_there() -> None:
    wave = daily_wave(3 * DAY)
    wave[2 * DAY + 50] = np.nan
    median = NaiveForecaster(96).predict(window_of(wave))[0, 0, :, 1]
    assert median[50] == np.float32(wave[-1])
    assert median[60] == pytest.approx(wave[2 * DAY + 60], abs=1e-4)


def test_a_series_without_values_has_no_forecast_and_disturbs_no_other() -> None:
    quantiles = NaiveForecaster(4).predict(window_of(np.full(30, np.nan), np.full(30, 7.0)))
    assert np.isnan(quantiles[0]).all()
    assert (quantiles[1] == 7.0).all()


@pytest.mark.parametrize(("n_servers", "n_bins"), [(0, 10), (3, 0)])
def test_an_empty_window_gives_an_empty_answer(n_servers: int, n_bins: int) -> None:
    values = np.empty((n_servers, 1, n_bins), dtype=np.float32)
    window = HistoryWindow(tuple("abc"[:n_servers]), ("cpu_pct",), values, 0, BIN_MS)
    quantiles = NaiveForecaster(5).predict(window)
    assert quantiles.shape == (n_servers, 1, 5, 3)
    assert np.isnan(quantiles).all()


def test_quantiles_never_cross_and_stay_in_bounds_on_wild_series() -> None:
    rng = np.random.default_rng(3)
    wild = np.exp(rng.normal(0, 4, size=(40, 900)))
    wild[rng.random(wild.shape) < 0.3] = np.nan
    percents = np.clip(rng.normal(50, 60, size=(40, 900)), 0, 100)
    both = np.stack([wild, percents], axis=1).astype(np.float32)
    window = HistoryWindow(tuple(map(str, range(40))), ("disk_io_mb_s", "cpu_pct"), both, 0, BIN_MS)
    quantiles = NaiveForecaster(96).predict(window)
    assert np.isfinite(quantiles).all()
    assert (np.diff(quantiles, axis=-1) >= 0).all()
    assert quantiles.min() >= 0
    assert quantiles[:, 1].max() <= 100


def test_values_over_a_hundred_percent_may_stay_over_it() -> None:
    assert (NaiveForecaster(2).predict(window_of(np.full(10, 350.0))) == 350.0).all()


def test_the_window_is_left_as_it_was() -> None:
    window = window_of(daily_wave(600))
    before = window.values.copy()
    NaiveForecaster(96).predict(window)
    np.testing.assert_array_equal(window.values, before)


def test_a_horizon_beyond_a_day_uses_the_newest_known_day() -> None:
    wave = daily_wave(3 * DAY)
    median = NaiveForecaster(2 * DAY).predict(window_of(wave))[0, 0, :, 1]
    np.testing.assert_allclose(median[DAY:], wave[2 * DAY :], atol=1e-4)
