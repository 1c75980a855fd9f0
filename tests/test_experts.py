"""The expert layer: known answers, what it must never do, and that nothing is foreseen."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetcast.forecast.experts.analogues import LOOK_BACK, NEIGHBOURS, analogue_forecast
from fleetcast.forecast.experts.layer import ExpertLayer
from fleetcast.forecast.experts.mixture import EXPERTS, Mixture
from fleetcast.forecast.experts.rules import carry_forward, rule_forecasts, usual_day
from fleetcast.forecast.experts.trend import find_trend
from fleetcast.schema import Floats32

DAY = 288
PERCENT = np.array([True])
ROW = np.array([0])
HOME = np.zeros((1, 1), np.bool_)  # no series has moved


def sawtooth(n_bins: int, period: int, height: float = 40.0) -> Floats32:
    return np.asarray(20 + height * (np.arange(n_bins) % period) / period, np.float32)


def leak(age_bins: int, per_hour: float, noise: float, n_bins: int = 3 * DAY) -> Floats32:
    """A series that is level and then climbs for `age_bins`."""
    random = np.random.default_rng(1)
    climb = per_hour / 12 * np.maximum(0, np.arange(n_bins) - (n_bins - 1 - age_bins))
    values = 30 + climb + noise * random.standard_normal(n_bins)
    return np.asarray(np.round(values, 2), np.float32)


# analogues


def test_a_rhythm_of_its_own_is_forecast_exactly() -> None:
    series = sawtooth(2304 + 96, 50)
    answer = analogue_forecast(series[None, :2304], np.array([2304]), 96)
    np.testing.assert_allclose(answer.median[:, 0], np.tile(series[2304:], (2, 1)), atol=0.01)
    np.testing.assert_allclose(answer.low, answer.high, atol=0.02)


def test_the_same_series_at_another_level_moves_alike() -> None:
    series = np.stack([sawtooth(2304, 50), sawtooth(2304, 50) + 35])
    answer = analogue_forecast(series, np.array([2304, 2304]), 96)
    np.testing.assert_allclose(answer.median[:, 1] - answer.median[:, 0], 35, atol=0.01)


def test_a_young_series_has_no_analogues_until_there_are_enough_moments() -> None:
    series = sawtooth(400, 50)[None]
    young = analogue_forecast(series, np.array([LOOK_BACK + NEIGHBOURS]), 96)
    assert np.isnan(young.median).all()
    old = analogue_forecast(series, np.array([400]), 96)
    assert np.isfinite(old.median).all()


def test_moments_before_the_first_value_are_no_analogues() -> None:
    series = sawtooth(800, 20)
    before = np.concatenate([np.full(400, 77.0, np.float32), series[400:]])[None]
    answer = analogue_forecast(before, np.array([400]), 12)
    np.testing.assert_allclose(answer.median[0, 0], 20 + 40 * ((800 + np.arange(12)) % 20) / 20, atol=0.01)


# trend


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("age_h", [4, 10, 30])
def test_a_steady_leak_is_followed(noise: float, age_h: int) -> None:
    trend = find_trend(leak(age_h * 12, 2.0, noise)[None], np.ones(1, np.float32))
    assert trend.is_clear[0]
    truth = 30 + 2.0 * (age_h + min(age_h, 5))  # followed for as long as it lasts
    assert trend.level[0] + trend.move(60)[0] == pytest.approx(
        truth, abs=(0.4 if noise == 2.0 else 0.15) * 10
    )


@pytest.mark.parametrize(
    "values",
    [
        np.full(3 * DAY, 40.0),
        40 + np.random.default_rng(2).standard_normal(3 * DAY),
        40 + 20 * np.sin(2 * np.pi * np.arange(3 * DAY) / DAY),  # a day, at its steepest
        np.where(np.arange(3 * DAY) < 3 * DAY - 40, 30.0, 60.0),  # a step 3.3 hours ago
        np.cumsum(np.random.default_rng(3).standard_normal(3 * DAY)) + 40,  # a random walk
        np.repeat([100.0, 85.0, 70.0, 57.0, 43.0, 29.0, 15.0, 0.5], 3 * DAY // 8),  # a queue that drains
    ],
    ids=["flat", "noise", "sine", "step", "random walk", "draining queue"],
)
def test_what_is_no_straight_line_is_no_trend(values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> None:
    assert not find_trend(np.asarray(values[None], np.float32), np.ones(1, np.float32)).is_clear[0]


def test_a_leak_that_is_freed_begins_anew() -> None:
    climbing = leak(6 * 12, 3.0, 0.3)
    freed = np.concatenate([climbing, climbing[-72:] - 18.0])
    assert not find_trend(np.concatenate([climbing, climbing[:12]])[None], np.ones(1, np.float32)).is_clear[0]
    again = find_trend(freed[None], np.ones(1, np.float32))
    assert again.age_bins[0] <= 80


def test_a_climb_that_ended_is_not_followed() -> None:
    climbing = leak(10 * 12, 2.0, 0.2)
    plateau = climbing[-1] + 0.2 * np.random.default_rng(4).standard_normal(18)
    assert not find_trend(np.concatenate([climbing, plateau])[None].astype(np.float32), np.ones(1)).is_clear[
        0
    ]


# rules


def test_the_usual_day_is_the_median_of_the_days_before() -> None:
    values = np.tile(np.arange(DAY, dtype=np.float32), 8)[None]
    values[0, 2 * DAY : 3 * DAY] = 9999.0  # one day unlike the others
    np.testing.assert_allclose(usual_day(values, DAY, 96)[0], np.arange(96), atol=1e-4)


def test_gaps_are_filled_with_what_was_before() -> None:
    history = np.array([[np.nan, 1.0, np.nan, np.nan], [np.nan] * 4], np.float32)
    filled, known = carry_forward(history)
    np.testing.assert_array_equal(filled[0], [np.nan, 1, 1, 1])
    assert known.tolist() == [3, 0]


def test_a_rule_without_an_answer_says_the_last_value() -> None:
    forecasts = rule_forecasts(np.array([[50.0, 60.0]], np.float32), PERCENT, DAY, 4)
    assert forecasts.median[:, 0].tolist() == [[60.0] * 4] * 5


# mixture


def told(**values: float) -> Floats32:
    """What each expert said of one series; those not named say 97."""
    said = [values.get(name, 97.0) for name in EXPERTS]
    return np.array(said, np.float32).reshape(len(EXPERTS), 1, 1)


def test_the_expert_that_was_right_takes_over_at_its_horizon_only() -> None:
    mixture = Mixture(PERCENT)
    for _ in range(60):
        mixture.learn(0, ROW, told(near=70.0, last=50.0), np.array([[70.0]], np.float32), HOME)
    shares = mixture.shares(ROW, np.array([[True]]), HOME)[0, 0]
    assert shares[0, EXPERTS.index("near")] > 0.95
    assert shares[2].tolist() == [1, 0, 0, 0, 0, 0], "without evidence the model stays as it is"


def test_a_model_that_comes_later_is_compared_on_its_own_occasions() -> None:
    mixture = Mixture(PERCENT)
    for _ in range(200):  # hard times, without a model
        mixture.learn(0, ROW, told(model=np.nan, last=40.0, near=30.0), np.array([[50.0]], np.float32), HOME)
    for _ in range(40):  # easy ones: the model is half as wrong as the last value
        mixture.learn(0, ROW, told(model=50.5, last=51.0, near=52.0), np.array([[50.0]], np.float32), HOME)
    shares = mixture.shares(ROW, np.array([[True]]), HOME)[0, 0, 0]
    assert shares[EXPERTS.index("model")] > 0.9


def test_the_model_has_no_share_where_it_does_not_forecast() -> None:
    mixture = Mixture(PERCENT)
    for _ in range(60):
        mixture.learn(0, ROW, told(model=70.0, last=50.0), np.array([[70.0]], np.float32), HOME)
    assert mixture.shares(ROW, np.array([[False]]), HOME)[0, 0, :, 0].max() == 0


def test_a_young_series_borrows_what_the_fleet_learned() -> None:
    mixture = Mixture(PERCENT)
    for _ in range(60):
        mixture.learn(0, ROW, told(far=70.0, last=50.0), np.array([[70.0]], np.float32), HOME)
    mixture.reserve(2)
    shares = mixture.shares(np.array([1]), np.array([[True]]), HOME)[0, 0, 0]
    assert shares[EXPERTS.index("far")] > 0.9


def test_a_mixture_takes_over_what_another_one_knows_of_the_model_and_nothing_else() -> None:
    mixture, other = Mixture(PERCENT), Mixture(PERCENT)
    for _ in range(60):
        mixture.learn(0, ROW, told(near=70.0, last=50.0), np.array([[70.0]], np.float32), HOME)
        other.learn(0, ROW, told(model=70.0, near=60.0, last=50.0), np.array([[70.0]], np.float32), HOME)
    mixture.take_model_evidence(ROW, other, ROW)
    shares = mixture.shares(ROW, np.array([[True]]), HOME)[0, 0, 0]
    assert shares[EXPERTS.index("model")] > 0.3
    assert shares[EXPERTS.index("near")] > 0.3


def test_a_trend_is_believed_until_such_moves_did_not_come_true() -> None:
    mixture = Mixture(PERCENT)
    mixture.reserve(1)
    move = np.full((1, 1, 3), 8.0)
    assert mixture.belief(ROW, move)[0, 0, 2] == pytest.approx(1.0)
    for _ in range(100):
        mixture.learn_trend(2, ROW, np.array([[8.0]], np.float32), np.array([[0.0]], np.float32))
    assert mixture.belief(ROW, move)[0, 0, 2] < 0.25


# the layer


def play(series: Floats32, n_origins: int, layer: ExpertLayer | None = None) -> tuple[ExpertLayer, Floats32]:
    """Run the layer over the newest origins of one series, without a model."""
    layer = layer or ExpertLayer(PERCENT)
    nothing = np.full((1, 1, 96, 3), np.nan, np.float32)
    quantiles = nothing
    for origin in range(len(series) - n_origins, len(series)):
        history = np.ascontiguousarray(series[None, None, max(0, origin - 2303) : origin + 1])
        layer.settle(origin, ROW, series[origin].reshape(1, 1))
        quantiles = layer.serve(ROW, origin, layer.experts(history, DAY, 96), nothing)
    return layer, quantiles[0, 0]


def test_new_dynamics_are_forecast_within_hours() -> None:
    random = np.random.default_rng(5)
    quiet = 30 + random.standard_normal(6 * DAY).astype(np.float32)
    series = np.concatenate([quiet, sawtooth(DAY, 30)])
    _, quantiles = play(series, DAY // 2)
    truth = 20 + 40 * ((DAY + np.arange(24)) % 30) / 30
    error = np.abs(quantiles[:24, 1] - truth).mean()
    assert error < 0.25 * np.abs(series[-1] - truth).mean()


@pytest.mark.parametrize("step", [40.0, -25.0])
def test_a_series_that_moved_hours_ago_is_not_expected_back(step: float) -> None:
    random = np.random.default_rng(6)
    series = (50 + random.standard_normal(6 * DAY)).astype(np.float32)
    series[-3 * 12 :] += step  # three hours ago; no forecast of 8 hours made since is due yet
    _, quantiles = play(series, 4 * DAY)
    np.testing.assert_allclose(quantiles[[11, 95], 1], 50 + step, atol=3)


@pytest.mark.parametrize(("start", "pace"), [(70.0, 3.0), (30.0, -3.0)], ids=["up", "down"])
def test_a_trend_that_meets_its_bound_keeps_an_interval_of_some_width(start: float, pace: float) -> None:
    random = np.random.default_rng(9)
    hours = np.arange(2 * DAY) / 12
    series = start + pace * np.maximum(0, hours - hours[-1] + 8) + 0.5 * random.standard_normal(len(hours))
    _, quantiles = play(np.clip(series, 0, 100).astype(np.float32), DAY)
    low, median, high = quantiles[-1]
    assert median > 99 if pace > 0 else median < 1, "it meets the bound within 8 hours"
    assert high - low > 0.3
    assert 0 <= low <= median <= high <= 100


def test_a_burst_that_always_ends_is_expected_to_end() -> None:
    random = np.random.default_rng(7)
    series = (30 + random.standard_normal(7 * DAY)).astype(np.float32)
    for start in (0.3, 1.2, 2.6, 3.1, 4.7, 5.5):  # of 3 hours each, at no time of day
        series[int(start * DAY) : int(start * DAY) + 36] += 30
    series[-12:] += 30
    _, quantiles = play(series, 6 * DAY)
    assert quantiles[95, 1] < 45


def test_what_a_series_does_apart_from_usual_teaches_nothing_about_it_at_home() -> None:
    mixture = Mixture(PERCENT)
    for has_moved, truth in ((HOME, 30.0), (~HOME, 70.0)):
        for _ in range(60):
            said = told(usual=30.0, last=70.0)
            mixture.learn(0, ROW, said, np.array([[truth]], np.float32), has_moved)
    for has_moved, right in ((HOME, "usual"), (~HOME, "last")):
        assert mixture.shares(ROW, np.array([[True]]), has_moved)[0, 0, 0, EXPERTS.index(right)] > 0.9


def test_a_mixture_that_fails_lately_gives_way_to_the_last_value_until_it_is_right_again() -> None:
    mixture = Mixture(PERCENT)
    mixture.reserve(1)

    def settle(n_bins: int, *, said: float, last: float, actual: float) -> float:
        for _ in range(n_bins):
            mixture.learn_lately(1, ROW, *(np.array([[value]], np.float32) for value in (said, last, actual)))
        return float(mixture.retreat(ROW)[0, 0, 1])

    assert settle(500, said=52, last=45, actual=50) < 0.01, "it usually knows more than the last value"
    assert settle(3, said=52, last=50, actual=50) < 0.01, "a quarter of an hour is no evidence"
    assert settle(24, said=57, last=50, actual=50) > 0.95, "two hours are"
    assert settle(24, said=50, last=45, actual=50) < 0.05, "and so is what comes after"
    assert settle(1, said=99, last=50, actual=50) < 0.05, "one burst decides nothing"
    assert not mixture.retreat(ROW)[0, 0, [0, 2]].any(), "other horizons have seen nothing of it"


def test_far_ahead_the_last_hours_are_one_sample_and_decide_nothing() -> None:
    mixture, near, far = Mixture(PERCENT), 1, 2
    mixture.reserve(1)
    for _ in range(500):
        for knot in (near, far):
            mixture.learn_lately(knot, ROW, *(np.array([[value]], np.float32) for value in (57, 50, 50)))
    assert mixture.retreat(ROW)[0, 0, near] > 0.95
    assert mixture.retreat(ROW)[0, 0, far] == 0


@pytest.mark.parametrize("pace", [2.0, -2.0])
def test_a_trend_may_end_after_a_ninth_of_its_age_or_go_on_for_nine_times_it(pace: float) -> None:
    random = np.random.default_rng(11)
    hours = np.arange(3 * DAY) / 12
    series = 50 + pace * np.maximum(0, hours - hours[-1] + 4.5) + 0.2 * random.standard_normal(len(hours))
    _, quantiles = play(series.astype(np.float32), 12)
    moves = np.sort((quantiles[-1] - series[-1]) / pace)  # hours of the trend, 8 hours ahead
    np.testing.assert_allclose(moves, [0.5, 4.5, 8], atol=0.8)


def test_intervals_follow_what_the_series_itself_was_missed_by() -> None:
    mixture = Mixture(PERCENT)
    mixture.reserve(1)
    random = np.random.default_rng(8)
    served = np.array([[[20.0, 50.0, 80.0]]], np.float32)
    for error in 2 * random.standard_normal(400):
        mixture.learn_widths(0, ROW, served, np.array([[50 + error]], np.float32), HOME)
    halves, say = mixture.own_halves(ROW, HOME)
    np.testing.assert_allclose(halves[0, 0, 0], 1.28 * 2, rtol=0.2)  # of a normal distribution
    assert 0.3 < say[0, 0, 0] <= mixture.rates.width_say[0]


@pytest.mark.parametrize("wrong_by", [0.4, 3.0])
def test_series_that_never_move_do_not_narrow_the_intervals_of_others(wrong_by: float) -> None:
    # Given one noisy series among nine that are always as forecast, and a model whose widths are wrong
    layer, rows, random = ExpertLayer(PERCENT, (1,)), np.arange(10), np.random.default_rng(5)
    layer.mixture.reserve(10)
    home, inside = np.zeros((10, 1), np.bool_), []
    for number in range(3 * DAY):
        actual = np.full((10, 1), 50, np.float32)
        actual[0] += 2 * random.standard_normal()
        half = wrong_by * 2.56 * layer.mixture.factors(rows, home)[:, :, 0]  # (row, metric, side)
        served = 50 + np.stack([-half[..., 0], 0 * half[..., 0], half[..., 1]], axis=-1)
        if number >= 2 * DAY:
            inside.append(served[0, 0, 0] <= actual[0, 0] <= served[0, 0, 2])
        # When they settle
        layer.mixture.learn_widths(0, rows, served, actual, home)
    # Then eight in ten of the noisy one's were inside in the end: the fleet's mean is not made right instead
    assert 0.74 < np.mean(inside) < 0.86


def test_a_factor_is_the_same_where_a_series_takes_its_share_of_the_fleet_over() -> None:
    mixture = Mixture(PERCENT)
    mixture.reserve(2)
    mixture.fleet_widen[:] = -0.6
    mixture.widen[1], mixture.misses[1, ..., 2] = 0.4, 500
    mixture.take_over_fleet_part()
    factors = mixture.factors(np.array([0, 1]), np.zeros((2, 1), np.bool_))
    np.testing.assert_allclose(np.log(factors[0]), -0.6, atol=1e-6)
    np.testing.assert_allclose(np.log(factors[1]), -0.2, atol=1e-6)


def test_a_leak_reaches_further_than_the_last_value_and_stays_a_percent() -> None:
    series = np.minimum(leak(8 * 12, 3.0, 0.5, 4 * DAY) + 30, 100)
    _, quantiles = play(series, 60)
    assert quantiles[-1, 1] > series[-1] + 10
    assert quantiles.max() <= 100


@pytest.mark.parametrize("sign", [1, -1], ids=["grows", "falls"])
def test_a_median_that_leaves_the_known_range_keeps_both_halves_of_its_interval(sign: int) -> None:
    random = np.random.default_rng(3)
    walk = np.cumsum(random.standard_normal(144))  # half a day of it: no straight line
    series = (50 + sign * (walk * np.sign(walk[-1]) + random.standard_normal(144))).astype(np.float32)
    model = series[-1] + sign * 0.25 * np.arange(1, 97)[:, None] + np.array([-6.0, 0.0, 6.0])
    layer = ExpertLayer(PERCENT)
    history = series[None, None]
    quantiles = layer.serve(ROW, 0, layer.experts(history, DAY, 96), model[None, None].astype(np.float32))
    low, median, high = quantiles[0, 0, -1]
    beyond = median - series.max() if sign > 0 else series.min() - median
    assert beyond > 0.1 * np.ptp(series), "it is past the range and its margin"
    assert min(high - median, median - low) > 0.5 * min(6, beyond)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 100, width=32) | st.just(float("nan")), min_size=2, max_size=60))
def test_quantiles_are_ordered_and_finite_whatever_came_before(values: list[float]) -> None:
    layer = ExpertLayer(PERCENT)
    history = np.array(values, np.float32)[None, None]
    model = np.full((1, 1, 96, 3), np.nan, np.float32)
    if np.isfinite(history).any():
        quantiles = layer.serve(ROW, 0, layer.experts(history, DAY, 96), model)
        assert np.isfinite(quantiles).all()
        assert (np.diff(quantiles, axis=-1) >= -1e-4).all()


def test_rows_may_come_and_go() -> None:
    layer, _ = play(sawtooth(600, 40), 60)
    layer.settle(600, np.array([3]), np.array([[50.0]], np.float32))  # a server that never was forecast
    layer.keep_rows(np.array([0]))
    layer, quantiles = play(sawtooth(700, 40), 20, layer)
    assert np.isfinite(quantiles).all()
