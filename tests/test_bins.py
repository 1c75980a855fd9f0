"""Claims about bins and trainable windows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from fleetcast.bins import (
    NO_MEAN,
    BinCodes,
    bin_means,
    count_trainable,
    enough_to_train,
    most_servers,
    sample_servers,
)
from fleetcast.settings import DecisionSettings, TrainerSettings

BIN_MS = 300_000


def codes(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def times(*seconds: int) -> np.ndarray:
    return np.array(seconds, np.int64) * 1000


def test_a_bin_holds_the_mean_of_its_rows_and_starts_on_the_grid() -> None:
    code, start, mean = bin_means(codes(0, 0, 0), times(10, 299, 300), np.array([1.0, 3.0, 9.0]), BIN_MS)
    assert code.tolist() == [0, 0]
    assert start.tolist() == [0, 300_000]
    assert mean.tolist() == [2.0, 9.0]


def test_servers_are_binned_apart_and_come_out_sorted() -> None:
    code, start, mean = bin_means(codes(1, 0, 1), times(0, 0, 400), np.array([5.0, 7.0, 6.0]), BIN_MS)
    assert list(zip(code.tolist(), start.tolist(), mean.tolist(), strict=True)) == [
        (0, 0, 7.0),
        (1, 0, 5.0),
        (1, 300_000, 6.0),
    ]


def test_a_row_sent_again_counts_once_and_its_last_present_value_wins() -> None:
    # Given the same key three times, the last without its second metric
    values = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, np.nan]])
    _, _, mean = bin_means(codes(0, 0, 0), times(5, 5, 5), values, BIN_MS)
    assert mean.tolist() == [[3.0, 20.0]]


def test_an_absent_metric_does_not_touch_the_mean_of_the_others() -> None:
    values = np.array([[1.0, np.nan], [3.0, np.nan]])
    _, _, mean = bin_means(codes(0, 0), times(0, 5), values, BIN_MS)
    assert mean[0, 0] == 2.0
    assert np.isnan(mean[0, 1])


def test_no_rows_give_no_bins() -> None:
    code, start, mean = bin_means(codes(), times(), np.empty((0, 3)), BIN_MS)
    assert (len(code), len(start), mean.shape) == (0, 0, (0, 3))


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 2000), st.floats(-1e6, 1e6)), min_size=1, max_size=60
    ),
    st.randoms(use_true_random=False),
)
def test_means_depend_neither_on_row_order_nor_on_other_columns(
    rows: list[tuple[int, int, float]], random: object
) -> None:
    # Given unique keys
    unique = list({(code, second): (code, second, value) for code, second, value in rows}.values())
    shuffled = list(unique)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    def binned(items: list[tuple[int, int, float]], extra: int) -> np.ndarray:
        code, second, value = (list(column) for column in zip(*items, strict=True))
        values = np.column_stack([np.array(value), *[np.arange(len(value)) * 1.5] * extra])
        return bin_means(codes(*code), times(*second), values, BIN_MS)[2][:, 0]

    # Then the answer is the same to the last bit
    assert_array_equal(binned(unique, 0), binned(shuffled, 2))


def test_a_window_is_trainable_when_it_has_an_hour_behind_and_half_the_horizon_ahead() -> None:
    # Given 20 bins of values and a horizon of 8: origins need 12 bins behind, 4 ahead
    values = np.ones((1, 20), np.float32)
    assert count_trainable(values, horizon_bins=8) == len(range(12, 17))


def test_gaps_are_not_trainable() -> None:
    values = np.full((1, 40), np.nan, np.float32)
    assert count_trainable(values, horizon_bins=8) == 0


def test_too_little_data_says_how_much_is_needed() -> None:
    settings = DecisionSettings()
    assert "47.0 h of 48 h" in enough_to_train(47 * 3600, 10_000, settings)
    assert "199 of 200" in enough_to_train(49 * 3600, 199, settings)
    assert enough_to_train(48 * 3600, 200, settings) == ""


FLEET = [f"web-{number:04}" for number in range(1000)]


def test_a_fleet_that_fits_is_trained_on_whole() -> None:
    assert sample_servers(FLEET, FLEET[:3], 1000, 20_000) == set(FLEET)
    assert sample_servers([], [], 2, -1) == set()


def test_a_sample_has_the_wanted_first_and_is_the_same_all_day() -> None:
    wanted = ["web-0007", "gone", "web-0007", "web-0900"]
    sample = sample_servers(FLEET, wanted, 100, 20_000)
    assert len(sample) == 100
    assert {"web-0007", "web-0900"} <= sample < set(FLEET)
    assert sample == sample_servers(FLEET[::-1], wanted, 100, 20_000)
    assert sample_servers(sample, wanted, 60, 20_000) < sample  # a smaller one is a part of it


def test_many_wanted_leave_half_of_the_sample_to_the_others() -> None:
    sample = sample_servers(FLEET, FLEET[:500], 100, 20_000)
    assert set(FLEET[:50]) <= sample
    assert len(sample) == 100
    assert len(sample.intersection(FLEET[500:])) >= 15  # drawn evenly from the 950 others


def test_over_some_days_the_whole_fleet_is_seen() -> None:
    seen = frozenset().union(*(sample_servers(FLEET, [], 200, day) for day in range(20_000, 20_030)))
    assert len(seen) > 990


def test_how_many_servers_fit_follows_the_cells() -> None:
    default = TrainerSettings().max_cells
    assert 2000 <= most_servers(default, 4, 30 * 288 + 1) < 2100
    assert most_servers(default, 8, 30 * 288 + 1) >= 1000
    assert most_servers(10, 4, 8640) == 2
    assert most_servers(default, 0, 0) == default


def kept(values: list[float], *, is_percent: bool) -> np.ndarray:
    coder = BinCodes(is_percent=is_percent)
    return coder.decode(coder.encode(np.array(values, np.float64))).astype(np.float64)


@given(st.lists(st.floats(-1, 1000), min_size=1))
def test_a_percent_is_kept_to_a_quarter_of_its_second_decimal_and_beyond_100_to_one(
    values: list[float],
) -> None:
    apart = np.abs(kept(values, is_percent=True) - values)
    assert (apart <= np.where(np.array(values) <= 100, 0.00251, 0.01005)).all()


@given(st.integers(-100, 10_000))
def test_a_percent_of_two_decimals_is_exact(hundredths: int) -> None:
    assert kept([hundredths / 100], is_percent=True)[0] == np.float32(hundredths / 100)


@given(st.lists(st.one_of(st.floats(1e-5, 7e14), st.floats(-7e14, -1e-5)), min_size=1))
def test_a_rate_of_either_sign_is_kept_to_a_thousandth(values: list[float]) -> None:
    assert (np.abs(kept(values, is_percent=False) / values - 1) <= 0.001).all()


@given(st.lists(st.floats(-3.4e38, 3.4e38), min_size=1), st.booleans())
def test_any_value_has_a_finite_code_and_larger_ones_never_have_smaller_codes(
    values: list[float], is_percent: bool
) -> None:
    values.sort()
    found = kept(values, is_percent=is_percent)
    assert np.isfinite(found).all()
    assert (np.diff(found) >= 0).all()
    if not is_percent:
        assert (np.abs(found - values) <= 0.0101 * np.abs(values) + 1e-8).all()


@pytest.mark.parametrize("is_percent", [True, False])
def test_every_code_stands_for_the_value_that_gets_it(is_percent: bool) -> None:
    coder, every = BinCodes(is_percent=is_percent), np.arange(NO_MEAN + 1).astype(np.uint16)
    values = coder.decode(every)
    again = coder.decode(coder.encode(values.astype(np.float64)))
    assert_array_equal(again, values)
    assert np.isnan(values[NO_MEAN])
    assert np.isfinite(values[:NO_MEAN]).all()
    assert kept([0.0, np.nan], is_percent=is_percent)[0] == 0.0
    assert coder.encode(np.array([np.nan]))[0] == NO_MEAN
