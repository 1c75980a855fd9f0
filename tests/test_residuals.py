"""Residuals, code books and innovations: places in a reference that no unit can move."""

import numpy as np
import pytest

from fleetcast.drift.seasonal.season import (
    ABSENT,
    LEVEL_CAP,
    LEVEL_STEPS,
    N_CODES,
    N_EDGES,
    DayClock,
    Shape,
    autoregression,
    code_book,
    code_counts,
    innovations,
    traits,
)

CLOCK = DayClock(300_000)
BINS = np.arange(288)


def flat_shape(level: float = 10.0) -> Shape:
    """Two series that stand at `level`, the second with a Thursday of its own."""
    profiles = np.full((2, 96), level, np.float32)
    weekdays = np.full((1, 7, 96), level, np.float32)
    weekdays[0, 0] = 2 * level
    return Shape(
        profiles,
        np.array([-1, 0]),
        weekdays,
        np.full((2, 96), 2.0, np.float32),
        np.full(2, level, np.float32),
        np.full(2, 100.0, np.float32),
        np.zeros(2, np.float32),
        np.full(2, 20.0, np.float32),
        np.zeros((2, 288), np.int16),
    )


def test_a_series_with_a_weekly_profile_expects_its_own_weekday() -> None:
    usual = flat_shape().usual_values(CLOCK, np.array([0, 288]))  # a Thursday, a Friday

    assert usual.tolist() == [[10, 10], [20, 10]]


def test_rows_of_a_shape_keep_their_weekday_profiles() -> None:
    picked = flat_shape().rows(np.array([1, 1]))

    assert picked.weekly_rows.tolist() == [0, 1]
    assert picked.usual_values(CLOCK, np.array([0])).ravel().tolist() == [20, 20]


def test_traits_are_in_spreads_and_shares_of_the_range() -> None:
    values = np.array([[14, np.nan, 200], [20, 20, 20]], np.float32)

    seen = traits(flat_shape(), CLOCK, np.array([0, 1, 2]), values)

    assert seen.scores[0, 0] == 2 and np.isnan(seen.scores[0, 1])
    assert seen.level[0].tolist() == [round(0.04 * LEVEL_STEPS), 0, LEVEL_CAP * LEVEL_STEPS]
    assert seen.is_outside[0].tolist() == [False, False, True]
    assert (seen.scores[1] == 0).all() and (seen.level[1] == 0).all()


def test_a_code_says_below_at_or_between_edges() -> None:
    book = code_book(np.array([[0.0] * 60 + [1.0] * 40], np.float32))

    codes = book.codes(np.array([[-1, 0, 0.5, 1, 2, np.nan]], np.float32))[0]

    assert codes[0] == 0 and codes[4] == N_CODES - 1 and codes[5] == ABSENT
    assert codes[0] < codes[1] < codes[2] < codes[3] < codes[4]
    assert book.shares[0, codes[1]] == pytest.approx(0.6)
    assert book.shares[0, -1] == 1


def test_shares_match_the_reference_within_one_edge() -> None:
    values = np.random.default_rng(3).normal(size=(1, 5000)).astype(np.float32)
    book = code_book(values)

    for edge in range(N_EDGES):
        share = book.shares[0, 2 * edge + 1]
        assert share == pytest.approx(float((values <= book.edges[0, edge]).mean()), abs=1e-6)


def test_a_book_of_nothing_codes_nothing() -> None:
    book = code_book(np.full((1, 10), np.nan, np.float32))

    assert (book.codes(np.ones((1, 3), np.float32)) == ABSENT).all()


def test_counts_leave_out_what_is_absent() -> None:
    codes = np.array([[[0, 0, 5], [ABSENT, ABSENT, 2]]], np.uint8)

    counts = code_counts(codes)

    assert counts.shape == (1, 2, N_CODES)
    assert counts[0, 0, 0] == 2 and counts[0, 0, 5] == 1 and counts[0, 1].sum() == 1


def test_innovations_are_what_the_pull_of_the_last_bin_leaves() -> None:
    scores = np.array([[2.0, 1.5, np.nan, 3.0]], np.float32)

    moves = innovations(scores, np.array([4.0], np.float32), np.array([0.5], np.float32))[0]

    assert moves[0] == 0 and moves[1] == 0.5
    assert np.isnan(moves[2]) and np.isnan(moves[3])


def test_the_pull_is_found_and_bounded() -> None:
    generator = np.random.default_rng(4)
    values = np.zeros((1, 4000))
    for place in range(1, 4000):
        values[0, place] = 0.8 * values[0, place - 1] + generator.normal()

    assert autoregression(values.astype(np.float32))[0] == pytest.approx(0.8, abs=0.04)
    assert autoregression(np.array([[1, -1, 1, -1]], np.float32))[0] == 0
    assert autoregression(np.full((1, 5), np.nan, np.float32))[0] == 0
