"""Claims about what the network sees of a window, and how its answer is read."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetcast.forecast.encoding import (
    AHEAD_REALS,
    PAST_REALS,
    STATIC_REALS,
    GridShape,
    ModelArrays,
    decode,
    encode,
)

SHAPE = GridShape(300_000, 96)
MIDNIGHT = 1_700_006_400_000 // 86_400_000 * 86_400_000


def arrays_of(
    history: np.ndarray, *, percent: bool = True, end_ms: int = MIDNIGHT, shape: GridShape = SHAPE
) -> ModelArrays:
    rows = np.atleast_2d(np.asarray(history, np.float32))
    return encode(rows, np.full(len(rows), end_ms), np.full(len(rows), percent), shape)


def past(arrays: ModelArrays, name: str) -> np.ndarray:
    return arrays.past[..., PAST_REALS.index(name)]


def ahead(arrays: ModelArrays, name: str) -> np.ndarray:
    return arrays.ahead[..., AHEAD_REALS.index(name)]


def static(arrays: ModelArrays, name: str) -> np.ndarray:
    return arrays.static[..., STATIC_REALS.index(name)]


def days(n_bin: int) -> np.ndarray:
    """Return a series that repeats every day: 10 .. 50 over the day."""
    return 30 + 20 * np.sin(2 * np.pi * np.arange(n_bin) / 288)


def test_values_are_spreads_away_from_the_last_one() -> None:
    history = np.tile([40.0, 60.0], 1152)  # std 10, last 60
    arrays = arrays_of(history)
    assert past(arrays, "value")[0, -2:].tolist() == [-2.0, 0.0]
    assert past(arrays, "value")[0, 0] == -1.0  # the mean of six bins


def test_a_day_that_repeats_is_known_a_day_ahead() -> None:
    series = days(2304 + 96)
    arrays = arrays_of(series[:2304])
    future = (series[2304:] - series[2303]) / arrays.scale.spread[0]
    for name in ("day_ago", "week_ago", "profile"):
        np.testing.assert_allclose(ahead(arrays, name)[0, :12], future[:12], atol=1e-4)
        np.testing.assert_allclose(ahead(arrays, name)[0, 12], future[12:18].mean(), atol=1e-4)
    np.testing.assert_allclose(past(arrays, "day_ago")[0], past(arrays, "value")[0], atol=1e-4)
    assert static(arrays, "season_error")[0] == pytest.approx(0.0, abs=1e-4)


def test_the_smoothed_day_ago_is_centred_on_its_bin() -> None:
    # Given a straight line, whose running mean is itself
    series = np.arange(2304.0) / 100
    arrays = arrays_of(series)
    apart = ahead(arrays, "day_ago_smooth")[0, :12] - ahead(arrays, "day_ago")[0, :12]
    assert np.abs(apart * arrays.scale.spread[0]).max() <= 0.0051  # half a bin


def test_the_hour_is_the_hour_of_the_bin_ahead() -> None:
    arrays = arrays_of(days(2304), end_ms=MIDNIGHT - 300_000)
    assert ahead(arrays, "hour_cos")[0, 0] == pytest.approx(1.0)  # one bin on, it is midnight
    assert past(arrays, "hour_cos")[0, -1] < 1.0


def test_a_young_series_has_no_lags_and_says_so() -> None:
    arrays = arrays_of(days(2304)[-60:])
    assert static(arrays, "day_ago_share")[0] == 0.0
    assert static(arrays, "week_ago_share")[0] == 0.0
    assert (ahead(arrays, "day_ago") == 0).all()  # the last value stands in
    assert arrays.scale.is_usable[0]


def test_two_days_of_history_give_the_day_s_lag_but_not_the_week_s() -> None:
    arrays = arrays_of(days(2304)[-2 * 288 :])
    assert static(arrays, "day_ago_share")[0] == 1.0
    assert static(arrays, "week_ago_share")[0] == 0.0
    assert np.abs(ahead(arrays, "week_ago") - ahead(arrays, "profile")).max() == 0.0


def test_an_hour_of_values_is_enough_and_less_is_not() -> None:
    enough, less = np.full(2304, np.nan), np.full(2304, np.nan)
    enough[-12:], less[-11:] = 5.0, 5.0
    assert arrays_of(np.stack([enough, less])).scale.is_usable.tolist() == [True, False]


def test_an_hour_of_silence_makes_a_series_unusable() -> None:
    silent, late = days(2304), days(2304)
    silent[-12:], late[-11:] = np.nan, np.nan
    assert arrays_of(np.stack([silent, late])).scale.is_usable.tolist() == [False, True]


def test_a_gap_at_the_end_takes_the_last_known_value_as_origin() -> None:
    history = days(2304)
    history[-3:] = np.nan
    arrays = arrays_of(history)
    assert arrays.scale.origin[0] == pytest.approx(history[-4], rel=1e-6)
    assert past(arrays, "seen")[0, -4:].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert past(arrays, "value")[0, -1] == pytest.approx(0.0)


def test_an_answer_of_zero_is_the_last_value_whatever_the_scale() -> None:
    rows = np.stack([days(2304), days(2304) * 1000, days(2304) - 30])
    arrays = encode(rows.astype(np.float32), np.full(3, MIDNIGHT), np.array([True, False, False]), SHAPE)
    assert arrays.scale.is_log.tolist() == [False, True, False]  # below zero there is no logarithm
    quantiles = decode(np.zeros((3, SHAPE.n_knots, 3), np.float32), arrays.scale, SHAPE)
    np.testing.assert_allclose(quantiles, np.broadcast_to(rows[:, -1, None, None], (3, 96, 3)), rtol=2e-4)


def test_targets_and_answers_are_each_other_s_inverse() -> None:
    series = 5 + days(2304 + 96)
    for percent in (True, False):
        arrays = arrays_of(series[:2304], percent=percent)
        targets = arrays.scale.targets(series[None, 2304:].astype(np.float32))
        back = arrays.scale.native(np.repeat(targets[..., None], 3, axis=2))
        np.testing.assert_allclose(back[0, :, 1], series[2304:], rtol=1e-4)


def test_crossing_quantiles_are_put_in_order() -> None:
    arrays = arrays_of(days(2304))
    answer = np.tile(np.array([1.0, 0.0, -1.0], np.float32), (1, SHAPE.n_knots, 1))
    quantiles = decode(answer, arrays.scale, SHAPE)
    assert (np.diff(quantiles, axis=-1) >= 0).all()


def test_an_absurd_answer_stays_within_what_the_last_days_make_plausible() -> None:
    arrays = arrays_of(np.stack([days(2304), np.zeros(2304)]), percent=False)
    answer = np.full((2, SHAPE.n_knots, 3), 1e30, np.float32)
    answer[:, :, 0] = np.nan
    answer[:, ::2] = np.inf
    quantiles = decode(answer, arrays.scale, SHAPE)
    assert np.isfinite(quantiles).all()
    assert quantiles[0].max() < 50 * 5
    assert quantiles[1].max() < 0.01  # a rate that never was does not explode


def test_a_percent_that_stayed_under_a_hundred_is_forecast_under_a_hundred() -> None:
    over = days(2304)
    over[5] = 180.0  # multi-core tools report more
    arrays = arrays_of(np.stack([days(2304), over]))
    quantiles = decode(np.full((2, SHAPE.n_knots, 3), 1e6, np.float32), arrays.scale, SHAPE)
    assert quantiles[0].max() <= 100.0 < quantiles[1].max()
    lowest = decode(np.full((2, SHAPE.n_knots, 3), -1e6, np.float32), arrays.scale, SHAPE)
    assert lowest.min() >= 0.0


@pytest.mark.parametrize(
    ("bin_ms", "horizon"), [(1_000, 96), (60_000, 480), (3_600_000, 48), (300_000, 2016)]
)
def test_any_bin_length_and_horizon_has_arrays(bin_ms: int, horizon: int) -> None:
    shape = GridShape(bin_ms, horizon)
    arrays = arrays_of(days(2304), shape=shape)
    assert arrays.ahead.shape == (1, shape.n_knots, len(AHEAD_REALS))
    assert np.isfinite(arrays.ahead).all()
    assert static(arrays, "day_ago_share")[0] == (0.0 if shape.season_bins > 2304 else 1.0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(st.floats(width=32), st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1e38, -1e38, 1e-40])),
        min_size=0,
        max_size=400,
    ),
    st.booleans(),
)
def test_no_history_makes_an_input_or_an_answer_that_is_no_number(values: list[float], percent: bool) -> None:
    arrays = arrays_of(np.array([values], np.float32).reshape(1, -1), percent=percent)
    for name in ("past", "ahead", "static"):
        assert np.isfinite(getattr(arrays, name)).all()
    assert (arrays.scale.spread > 0).all()
    quantiles = decode(np.full((1, SHAPE.n_knots, 3), 3.0, np.float32), arrays.scale, SHAPE)
    assert np.isfinite(quantiles).all()


def test_a_window_does_not_depend_on_its_neighbours() -> None:
    random = np.random.default_rng(1)
    rows = random.gamma(2, 20, (5, 2304)).astype(np.float32)
    together, alone = arrays_of(rows), arrays_of(rows[3])
    np.testing.assert_array_equal(together.past[3], alone.past[0])
    np.testing.assert_array_equal(together.ahead[3], alone.ahead[0])
    np.testing.assert_array_equal(together.static[3], alone.static[0])
