"""The naive forecast: exact answers on series whose right answer is known by hand."""

import numpy as np
import pytest

from fleetcast.forecast.naive import NaiveForecaster, widen_young
from fleetcast.schema import HistoryWindow

BIN_MS = 300_000
DAY = 288


def window_of(*series: np.ndarray, metrics: tuple[str, ...] = ("cpu_pct",)) -> HistoryWindow:
    values = np.stack(series).astype(np.float32).reshape(-1, len(metrics), len(series[0]))
    names = tuple(f"server-{i}" for i in range(len(values)))
    return HistoryWindow(names, metrics, values, 0, BIN_MS)


def daily_wave(n_bins: int) -> np.ndarray:
    return 50 + 30 * np.sin(2 * np.pi * np.arange(n_bins) / DAY)


def test_one_bin_is_repeated_with_the_spread_of_usual_servers() -> None:
    quantiles = NaiveForecaster(96).predict(window_of(np.array([42.5])))
    assert quantiles.shape == (1, 1, 96, 3)
    assert (quantiles[..., 1] == 42.5).all()
    widths = quantiles[0, 0, :, 2] - quantiles[0, 0, :, 0]
    assert widths[0] == pytest.approx(3.6) and widths[-1] == pytest.approx(28.1, abs=0.1)
    assert (np.diff(widths) > 0).all()


@pytest.mark.parametrize("metric", ["cpu_pct", "latency_ms"])
@pytest.mark.parametrize("value", [0.0, 3.0, 100.0])
@pytest.mark.parametrize("n_bins", [1, 2, 8, 9, 12])
def test_no_interval_is_without_width_while_fewer_than_eight_errors_are_known(
    n_bins: int, value: float, metric: str
) -> None:
    window = window_of(np.full(n_bins, value), metrics=(metric,))
    quantiles = NaiveForecaster(96).predict(window)[0, 0]
    widths = quantiles[:, 2] - quantiles[:, 0]
    leads = np.arange(1, 97)
    assert (widths[n_bins - leads < 8] > 0).all()
    assert (widths[n_bins - leads >= 8] == 0).all()  # eight errors of nothing are known
    assert (quantiles >= 0).all()
    assert metric != "cpu_pct" or (quantiles <= 100).all()


def test_a_young_series_takes_the_spread_of_its_fleet_and_then_its_own() -> None:
    rng = np.random.default_rng(3)
    one = np.array([50.0, 50.5, 50.0])
    wild = [np.array([20.0, 60.0, 20.0]) + rng.normal(0, 5, 3) for _ in range(8)]
    calm = [np.array([30.0, 30.2, 30.1]) for _ in range(8)]
    width = {}
    for name, others in (("wild", wild), ("calm", calm), ("none", [])):
        quantiles = NaiveForecaster(12).predict(window_of(one, *others))[0, 0]
        width[name] = float(quantiles[0, 2] - quantiles[0, 0])
    assert width["calm"] < width["none"] < width["wild"]
    busy = NaiveForecaster(12).predict(window_of(np.array([50.0, 60.0, 48.0]), *calm))[0, 0]
    assert busy[0, 2] - busy[0, 0] > 3 * width["calm"]


def test_a_young_series_of_a_long_window_is_measured_by_its_own_errors() -> None:
    """Targets are thinned over three days; of 20 bins every sixth would be three."""
    history = np.full(2304, np.nan)
    history[-20:] = 50 + 5 * (-1.0) ** np.arange(20)
    quantiles = NaiveForecaster(96).predict(window_of(history))[0, 0, 0]
    assert quantiles.tolist() == [35.0, 45.0, 55.0]


def test_intervals_of_any_forecast_are_widened_and_never_narrowed() -> None:
    window = window_of(np.array([50.0, 50.0]), np.full(200, 50.0)[-2:])
    quantiles = np.tile(np.array([50.0, 50.0, 50.0], np.float32), (2, 1, 96, 1))
    quantiles[1, ..., 0], quantiles[1, ..., 2] = 5.0, 95.0
    wide = quantiles[1].copy()
    widen_young(window, quantiles)
    assert (quantiles[0, 0, :, 2] - quantiles[0, 0, :, 0] > 2).all()
    assert (quantiles[1] == wide).all()
    quantiles[:] = np.nan
    widen_young(window, quantiles)
    assert np.isnan(quantiles).all()


def young_fleet(*groups: tuple[int, np.ndarray]) -> HistoryWindow:
    """Return one window of groups of series, each (bins known, (series, bin)); the newest bins are known."""
    blocks = []
    for n_known, values in groups:
        block = np.full((len(values), 2 * DAY), np.nan)
        block[:, -n_known:] = values[:, -n_known:]
        blocks.append(block)
    return window_of(*np.concatenate(blocks))


def honest_bands(window: HistoryWindow, n_rows: int) -> np.ndarray:
    """Return (row, horizon, quantile) of the last rows, widened from no width around the middle of them."""
    middle = np.nanmedian(window.values[:, 0], axis=1).astype(np.float32)
    quantiles = np.tile(middle[:, None, None, None], (1, 1, 96, 3))
    widen_young(window, quantiles)
    return quantiles[-n_rows:, 0]


@pytest.mark.parametrize("n_bins", [13, 24, 36, 60, 84])
def test_a_noisy_group_does_not_widen_the_bands_of_a_quiet_newcomer(n_bins: int) -> None:
    """150 servers of noise gave one of a constant 35 a band of 6 to 64, five hours after it had come."""
    rng = np.random.default_rng(4)
    old = (2 * DAY, 40 + np.cumsum(rng.normal(0, 0.3, (20, 2 * DAY)), axis=1))
    noisy = (150, rng.uniform(0, 50, (45, 150)))
    quiet = (n_bins, np.stack([np.full(n_bins, 35.0), 35 + rng.normal(0, 0.3, n_bins)]))
    alone = honest_bands(young_fleet(old, quiet), 2)
    beside = honest_bands(young_fleet(old, noisy, quiet), 2)
    assert (np.abs(beside - 35) < 5).all()
    assert (np.abs(beside - alone) < 2.5).all()


@pytest.mark.parametrize("n_others", [0, 40])
@pytest.mark.parametrize("n_bins", [6, 13, 36, 60, 84])
def test_noise_gets_no_band_that_its_past_does_not_support(n_bins: int, n_others: int) -> None:
    """Noise in 0..50 had bands of 0 to 100: its steps were taken for those of a walk."""
    rng = np.random.default_rng(5)
    old = (2 * DAY, 40 + np.cumsum(rng.normal(0, 0.3, (20, 2 * DAY)), axis=1))
    noise = (n_bins, rng.uniform(0, 50, (10 + n_others, n_bins)))
    bands = honest_bands(young_fleet(old, noise), 10)
    assert bands[..., 2].max() < 80
    assert (np.diff(bands[:, -1, ::2])[:, 0] > 20).all()  # of 40 that hold four in five of its values


def test_a_walk_still_gets_a_band_that_grows_with_time() -> None:
    walks = 50 + np.cumsum(np.random.default_rng(6).normal(0, 0.5, (10, 60)), axis=1)
    bands = honest_bands(young_fleet((60, walks)), 10)
    halves = (bands[..., 2] - bands[..., 0]).mean(axis=0) / 2
    assert halves[-1] > 3  # of 6.3: half of 80 % after 96 steps of half a point
    assert halves[-1] > 1.15 * halves[59]


def test_each_series_of_a_fleet_counts_once() -> None:
    """A few that were known for long were most of the steps that stood in for a newcomer's."""
    rng = np.random.default_rng(7)
    wild = (2 * DAY, rng.uniform(0, 100, (3, 2 * DAY)))
    calm = (9, 30 + rng.normal(0, 0.1, (17, 9)))
    bands = honest_bands(young_fleet(wild, calm, (1, np.full((1, 1), 35.0))), 1)[0]
    assert bands[0, 2] - bands[0, 0] < 3
    assert bands[-1, 2] - bands[-1, 0] < 15


@pytest.mark.parametrize("n_bins", [20, 48, 80])
def test_the_fallback_does_not_take_young_noise_for_a_walk(n_bins: int) -> None:
    noise = np.random.default_rng(8).uniform(0, 50, (20, n_bins))
    quantiles = NaiveForecaster(96).predict(young_fleet((n_bins, noise)))[:, 0]
    assert np.median(quantiles[:, -1, 2]) < 75


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
