"""The sketched statistic: scipy's answer within a step, atoms and all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetcast.drift.literal.scores import sketched_ks

POINTS = 1001


def sketch(values: np.ndarray) -> np.ndarray:
    return np.quantile(values, np.linspace(0, 1, POINTS), method="inverted_cdf")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    shift=st.floats(-3, 3),
    scale=st.sampled_from([0.3, 1.0, 4.0]),
    grain=st.sampled_from([0.0, 0.5, 2.0]),
    rows=st.integers(20, 3000),
)
def test_it_is_scipys_statistic_within_one_step(
    seed: int, shift: float, scale: float, grain: float, rows: int
) -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(seed)
    reference, window = generator.normal(size=20_000), shift + scale * generator.normal(size=rows)
    if grain:  # rounded values: atoms in both
        reference, window = np.round(reference / grain) * grain, np.round(window / grain) * grain

    expected = stats.ks_2samp(window, reference).statistic

    assert sketched_ks(window, sketch(reference)) == pytest.approx(expected, abs=2.5 / (POINTS - 1))


def test_the_same_values_have_no_distance_and_others_all_of_it() -> None:
    values = np.random.default_rng(1).gamma(2, size=5000)

    assert sketched_ks(values, sketch(values)) < 0.002
    assert sketched_ks(values + 1e3, sketch(values)) == 1
    assert sketched_ks(values - 1e3, sketch(values)) == 1


def test_a_constant_equals_itself_and_nothing_else() -> None:
    assert sketched_ks(np.full(50, 3.0), np.full(POINTS, 3.0)) == 0
    assert sketched_ks(np.full(50, 3.1), np.full(POINTS, 3.0)) == 1


def test_nothing_has_no_distance() -> None:
    assert sketched_ks(np.empty(0), np.linspace(0, 1, POINTS)) == 0
    assert sketched_ks(np.ones(3), np.empty(0)) == 0
