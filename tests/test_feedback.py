"""Feedback from settled forecasts: known answers, its guarantees on any input, nothing foreseen."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetcast.forecast.feedback import Feedback
from fleetcast.schema import Floats32

HORIZONS = (1, 12, 96)
ROW = np.array([0])
PERCENT, RATE = np.array([True]), np.array([False])
UNKNOWN = np.array([[np.nan]])


def made(low: float, middle: float, high: float) -> Floats32:
    """One series' forecast, the same at every horizon."""
    forecast: Floats32 = np.tile(np.array([low, middle, high], np.float32), (1, 1, 96, 1))
    return forecast


def told(value: float) -> Floats32:
    return np.array([[value]], np.float32)


def corrected(feedback: Feedback, forecast: Floats32, last: float, yesterday: float = np.nan) -> Floats32:
    answer = feedback.apply(ROW, forecast, told(last), np.full((1, 1, 96), yesterday, np.float32))
    return np.asarray(answer[0, 0])


def test_without_evidence_the_models_forecast_stays_as_it_is() -> None:
    forecast = made(20.0, 30.0, 45.0)
    for is_percent in (PERCENT, RATE):
        answer = corrected(Feedback(is_percent), forecast, last=90.0, yesterday=3.0)
        np.testing.assert_allclose(answer, forecast[0, 0], rtol=1e-5)


@pytest.mark.parametrize("is_percent", [PERCENT, RATE])
def test_the_rule_that_was_right_lately_takes_over_at_its_horizon_only(
    is_percent: "np.ndarray[tuple[int], np.dtype[np.bool_]]",
) -> None:
    feedback = Feedback(is_percent)
    for _ in range(400):  # at 1 bin the last value is right, at 96 bins the same time yesterday
        feedback.learn(0, ROW, made(40, 60, 80)[:, :, 0], told(60), told(50), told(70), told(50))
        feedback.learn(2, ROW, made(40, 60, 80)[:, :, 0], told(60), told(50), told(70), told(70))
    median = corrected(feedback, made(40.0, 60.0, 80.0), last=50.0, yesterday=70.0)[:, 1]
    assert median[0] == pytest.approx(50, abs=2.5)
    assert median[11] == pytest.approx(60, abs=0.01)
    assert median[95] == pytest.approx(70, abs=2.5)
    assert (np.diff(median) > -1e-3).all()  # and steadily from one to the other between


def test_a_perfect_model_keeps_its_say() -> None:
    feedback = Feedback(PERCENT)
    for _ in range(400):
        feedback.learn(0, ROW, made(40, 60, 80)[:, :, 0], told(60), told(50), told(70), told(60))
    assert corrected(feedback, made(40, 60, 80), last=50.0, yesterday=70.0)[0, 1] == pytest.approx(
        60, abs=0.1
    )


def test_a_new_server_borrows_what_the_fleet_learned() -> None:
    feedback = Feedback(PERCENT)
    rows = np.arange(50)
    shape = np.ones((50, 1), np.float32)
    served = np.tile(made(40, 60, 80)[:, :, 0], (50, 1, 1))
    for _ in range(100):
        feedback.learn(0, rows, served, 60 * shape, 50 * shape, np.nan * shape, 50 * shape)
    answer = feedback.apply(np.array([50]), made(40, 60, 80), told(50), np.full((1, 1, 96), np.nan))
    assert answer[0, 0, 0, 1] == pytest.approx(50, abs=2.5)


@pytest.mark.parametrize("truth", [0.3, 1.0, 3.0])
def test_80_percent_intervals_come_to_cover_80_percent(truth: float) -> None:
    """The model's interval is that of a standard normal; the actual's spread is another."""
    feedback, rng = Feedback(PERCENT), np.random.default_rng(5)
    forecast = made(50 - 1.2816, 50, 50 + 1.2816)
    covered = []
    for step in range(3000):
        given_ = corrected(feedback, forecast, last=50.0)[0]
        actual = 50 + truth * rng.standard_normal()
        covered.append(given_[0] <= actual <= given_[2])
        feedback.learn(0, ROW, given_[None, None], told(50), told(50), UNKNOWN, told(actual))
        assert step < 1000 or given_[0] < given_[2]
    assert 0.77 < np.mean(covered[1000:]) < 0.83


def test_unsettled_forecasts_and_those_of_other_rules_teach_nothing() -> None:
    feedback = Feedback(PERCENT)
    for _ in range(300):
        feedback.learn(0, ROW, made(40, 60, 80)[:, :, 0], UNKNOWN, told(50), told(70), told(50))
        feedback.learn(0, ROW, made(40, 60, 80)[:, :, 0], told(60), told(50), told(70), UNKNOWN)
    assert not feedback.counts.any() and not feedback.widen.any() and not feedback.fleet_widen.any()


def test_another_model_starts_with_a_tenth_of_the_evidence_and_the_same_widths() -> None:
    feedback = Feedback(PERCENT)
    for _ in range(100):
        feedback.learn(0, ROW, made(55, 60, 65)[:, :, 0], told(60), told(50), UNKNOWN, told(50))
    before, widths = feedback.counts.copy(), feedback.widen.copy()
    feedback.doubt_model()
    np.testing.assert_allclose(feedback.counts, 0.1 * before)
    np.testing.assert_array_equal(feedback.widen, widths)
    assert corrected(feedback, made(55, 60, 65), last=50.0)[0, 1] == pytest.approx(60, abs=0.01)


def test_rows_that_are_kept_take_their_evidence_along() -> None:
    feedback = Feedback(PERCENT)
    rows = np.array([0, 1])
    twice = np.ones((2, 1), np.float32)
    for _ in range(20):
        feedback.learn(
            1, rows, made(4, 6, 8)[[0, 0], :, 0], 6 * twice, 5 * twice, twice, np.array([[np.nan], [5.0]])
        )
    feedback.keep_rows(np.array([1]))
    assert feedback.counts[:, 0].tolist() == [[0.0, pytest.approx(19.0, abs=1), 0.0]]


values = st.floats(-1e4, 1e6, width=32)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(values, values, values, st.integers(0, 2)), min_size=1, max_size=30),
    forecast=st.tuples(values, values, values).map(sorted),
    last=values,
    yesterday=st.one_of(values, st.just(float("nan"))),
    is_percent=st.booleans(),
)
def test_whatever_was_learned_quantiles_are_finite_and_never_cross(
    steps: list[tuple[float, float, float, int]],
    forecast: list[float],
    last: float,
    yesterday: float,
    is_percent: bool,
) -> None:
    feedback = Feedback(np.array([is_percent]))
    for model, actual, naive, knot in steps:
        served = np.array([[[model - 1, model, model + 1]]], np.float32)
        for _ in range(20):
            feedback.learn(knot, ROW, served, told(model), told(naive), UNKNOWN, told(actual))
    answer = corrected(feedback, made(*forecast), last, yesterday)
    assert np.isfinite(answer).all()
    assert (np.diff(answer, axis=-1) >= 0).all()
    if min(forecast[0], last, np.nan_to_num(yesterday)) >= 0:
        assert (answer >= 0).all()
