"""Rounding keeps the digits it says, once and for all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetcast.ingest.rules import round_rows, to_significant

finite = st.floats(allow_nan=False, allow_infinity=False)


def one(name: str, value: float, decimals: int = 2, digits: int = 4) -> float:
    return float(round_rows([name], np.array([[value]]), decimals, digits)[0, 0])


@pytest.mark.parametrize(
    ("value", "kept"),
    [(12.3456, 12.35), (99.999, 100.0), (0.004, 0.0), (1000.0, 1000.0), (-0.004, 0.0), (-0.96, -0.96)],
)
def test_a_percent_keeps_its_decimals(value: float, kept: float) -> None:
    assert one("cpu_pct", value) == kept


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (12.3456, 12.35),
        (123_456.0, 123_500.0),
        (0.00123456, 0.001235),
        (9999.9, 10_000.0),
        (0.0, 0.0),
        (-7.77777, -7.778),
        (1.23456e-30, 1.235e-30),
        (1.23456e30, 1.235e30),
        (5e-324, 5e-324),
        (1.7976931348623157e308, 1.7976931348623157e308),  # rounded up it would be infinite
    ],
)
def test_another_metric_keeps_its_significant_digits(value: float, kept: float) -> None:
    assert one("latency_ms", value) == kept


def test_negative_zero_is_zero() -> None:
    assert str(one("cpu_pct", -0.0)) == str(one("load", -0.0)) == "0.0"


def test_absent_stays_absent() -> None:
    values = np.array([np.nan, 1.23456])
    assert np.isnan(round_rows(["cpu_pct"], values[None], 2, 4)[0, 0])
    assert np.isnan(round_rows(["load"], values[None], 2, 4)[0, 0])


def test_seventeen_digits_change_nothing() -> None:
    assert one("load", 0.1 + 0.2, digits=17) == 0.1 + 0.2


@given(finite, st.integers(1, 15))
def test_the_result_is_what_printing_that_many_digits_gives(value: float, digits: int) -> None:
    got = float(to_significant(np.array([value]), digits)[0])
    nearest = float(f"{value:.{digits - 1}e}")
    # at a tie of decimals the two may fall to different sides: one unit of the last digit at most
    unit = abs(value) * 10.0 ** (1 - digits)
    if np.isinf(nearest):
        assert got == value, "the largest doubles stay as they are"
    else:
        assert got == nearest or abs(got - nearest) <= unit * 1.05


@given(finite, st.integers(1, 15))
def test_rounding_again_changes_nothing(value: float, digits: int) -> None:
    once = to_significant(np.array([value]), digits)
    assert np.isfinite(once).all()
    assert to_significant(once, digits).tolist() == once.tolist()


@given(st.floats(-1, 1000))
def test_rounding_a_percent_again_changes_nothing(value: float) -> None:
    once = one("cpu_pct", value)
    assert one("cpu_pct", once) == once
