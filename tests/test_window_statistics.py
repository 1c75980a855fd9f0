"""The statistics over windows: known answers, and their kinship with Kolmogorov-Smirnov."""

from dataclasses import fields, replace

import numpy as np
import pytest
from rhythm_fleet import DAY, usual_reference

from fleetcast.drift.seasonal.quorum import THRESHOLDS
from fleetcast.drift.seasonal.season import ABSENT, LAGS_H, N_CODES, CodeBook, Traits, code_book, moves
from fleetcast.drift.seasonal.statistics import (
    CAPS,
    FLOORS,
    INDEX,
    STATISTICS,
    BinCodes,
    RunningSums,
    order,
    pair_sums,
    statistics,
    sums_over,
    surprise,
    tail_codes,
)

SHORT = DAY // 8


def coded(values: np.ndarray, book: CodeBook) -> BinCodes:
    """Codes of values with every other trait at rest."""
    codes = book.codes(values.astype(np.float32))
    rest = np.zeros(values.shape, np.int16)
    for_lags = np.zeros((len(LAGS_H), *values.shape), np.int16)
    no = np.zeros(values.shape, np.bool_)
    seen = Traits(values.astype(np.float32), rest, rest, rest, no, rest, for_lags)
    absent = np.full(codes.shape, ABSENT, np.uint8)
    moved = np.zeros((2, *values.shape), np.int16)
    return BinCodes(codes, absent, absent, seen, moved, np.arange(values.shape[1]) % DAY)


def test_every_statistic_belongs_to_one_of_the_four_metrics() -> None:
    assert {item.family for item in STATISTICS} == set(THRESHOLDS)
    assert len(INDEX) == len(STATISTICS)
    assert (FLOORS > 0).all() and (CAPS > FLOORS).all()


def test_surprise_grows_without_end_but_stays_finite() -> None:
    found = surprise(np.array([0.0, 0.5, 0.97, 1.0], np.float32))

    assert found[0] == 0 and found[1] == pytest.approx(np.log(2))
    assert found[2] == found[3] and np.isfinite(found).all()


def test_the_shape_is_the_kolmogorov_smirnov_distance_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(6)
    reference = generator.normal(size=(1, 20 * DAY)).astype(np.float32)
    window = generator.normal(0.5, 1.3, size=(1, DAY)).astype(np.float32)
    book = code_book(reference)
    books = usual_reference().books.rows(np.array([0]))
    own = type(books)(
        book,
        books.innovations,
        books.errors,
        tail_codes(book),
        books.log_size,
        books.rhythm_power,
        books.rhythm_noise,
        books.log_moves,
        books.order,
        books.distances,
    )

    found = statistics(sums_over(coded(window, book), 1, SHORT, DAY), own, SHORT, DAY)[:, 0, 0]

    exact = stats.ks_2samp(window[0], reference[0]).statistic
    assert 1 - np.exp(-found[INDEX["shape_24h"]]) == pytest.approx(exact, abs=1 / 24)
    newest = stats.ks_2samp(window[0, -SHORT:], reference[0]).statistic
    assert 1 - np.exp(-found[INDEX["shape_3h"]]) == pytest.approx(newest, abs=1 / 24)


def test_a_window_that_is_too_thin_is_not_judged() -> None:
    reference = usual_reference()
    books = reference.books.rows(np.array([0]))
    values = np.zeros((1, DAY), np.float32)
    values[0, : DAY // 2] = np.nan  # half a day is missing, the newest hours are there

    found = statistics(sums_over(coded(values, books.values), 1, SHORT, DAY), books, SHORT, DAY)[:, 0, 0]

    assert np.isnan(found[INDEX["shape_24h"]]) and np.isnan(found[INDEX["higher_24h"]])
    assert np.isfinite(found[INDEX["shape_3h"]])
    assert np.isnan(found[INDEX["error_3h"]])


def test_windows_summed_in_steps_end_where_windows_summed_bin_by_bin_end() -> None:
    books = usual_reference().books.rows(np.array([3]))
    values = np.random.default_rng(8).normal(size=(1, 2 * DAY)).astype(np.float32)
    codes = coded(values, books.values)

    every = statistics(sums_over(codes, 1, SHORT, DAY), books, SHORT, DAY)
    sixth = statistics(sums_over(codes, 6, SHORT, DAY), books, SHORT, DAY)

    assert np.array_equal(every[:, :, ::6], sixth, equal_nan=True)


def test_pairs_are_those_with_both_ends_in_the_window_bin_by_bin_and_at_once() -> None:
    # Given two days of two series, some bins of which are absent
    generator = np.random.default_rng(9)
    book = code_book(generator.normal(size=(2, 10 * DAY)).astype(np.float32))
    values = generator.normal(size=(2, 2 * DAY)).astype(np.float32)
    values[0, DAY + 40 : DAY + 60] = np.nan
    codes = coded(values, book)

    # When they are taken in bin by bin, and summed at once
    running = RunningSums(np.zeros((2, DAY), np.int16), SHORT, DAY)
    for place in range(2 * DAY):
        running.add(bin_of(codes, place))
    newest, at_once = running.window_sums(), sums_over(codes, 1, SHORT, DAY)

    # Then the sums are the same, and those of a day are those of its own bins alone
    assert np.array_equal(newest.short_pairs, at_once.short_pairs[..., -1:])
    assert np.array_equal(newest.long_pairs, at_once.long_pairs[..., -1:])
    alone = pair_sums(codes.values[:, DAY:], np.array([DAY]), DAY)
    assert np.array_equal(alone, newest.long_pairs)
    assert alone[0, 1].ravel().tolist() == [DAY - 1 - 21, DAY - 1]


def bin_of(codes: BinCodes, place: int) -> BinCodes:
    """One bin of a stretch."""
    part = slice(place, place + 1)
    own = {item.name: getattr(codes.traits, item.name)[..., part] for item in fields(Traits)}
    return BinCodes(
        *(getattr(codes, name)[:, part] for name in ("values", "innovations", "errors")),
        Traits(**own),
        codes.moved[..., part],
        codes.day_bins[part],
    )


def test_the_order_of_values_is_told_by_their_ranks() -> None:
    # Given a straight line, noise, and values that turn at each bin
    generator = np.random.default_rng(2)
    line, noise = np.arange(48), generator.integers(0, 49, 4000)
    turns = np.tile([0, 48], 24)

    found = [
        order(pair_sums(v.astype(np.uint8)[None], np.array([len(v)]), len(v))) for v in (line, noise, turns)
    ]

    assert found[0].item() == pytest.approx(np.log(2 / 3))  # 1 and 2 codes, and one more each
    assert found[1].item() == pytest.approx(0, abs=0.03)
    assert found[2].item() == pytest.approx(np.log(49))
    unknown = np.full((1, 48), ABSENT, np.uint8)
    assert np.isnan(order(pair_sums(unknown, np.array([48]), 48))).all()


def test_a_saw_tooth_of_a_spiky_series_is_smoother_though_its_values_are_as_usual() -> None:
    # Given a series of rare large spikes over noise; then the same values of a day in order, hour by hour
    generator = np.random.default_rng(5)
    reference = generator.lognormal(0, 2, (1, 20 * DAY)).astype(np.float32)
    book, usual = code_book(reference), usual_reference().books.rows(np.array([0]))
    own = replace(usual, values=book, order=np.zeros(1, np.float32))
    day = generator.lognormal(0, 2, (1, DAY)).astype(np.float32)
    saw = np.sort(day.reshape(12, 24), axis=1).reshape(1, DAY)

    def smoother(values: np.ndarray) -> float:
        sums = sums_over(coded(values, book), 1, SHORT, DAY)
        return float(statistics(sums, own, SHORT, DAY)[INDEX["smoother_24h"], 0, 0])

    assert smoother(saw) > 2 * FLOORS[INDEX["smoother_24h"]]
    assert smoother(day) < FLOORS[INDEX["smoother_24h"]]
    # And once the newest three hours are in no order again, the day is not counted as smoother any more
    over = np.concatenate([saw[:, SHORT:], day[:, :SHORT]], axis=1)
    assert smoother(over) < FLOORS[INDEX["smoother_24h"]]


def test_a_tail_is_never_the_last_code() -> None:
    book = code_book(np.array([[0.0] * 95 + [1.0] * 5, [7.0] * 100], np.float32))

    tails = tail_codes(book)

    assert (tails <= N_CODES - 2).all() and (tails >= 0).all()


@pytest.mark.parametrize(
    ("kind", "name"), [("noise", "rougher_24h"), ("slow", "smoother_24h"), ("louder", "restless_24h")]
)
def test_new_dynamics_show_in_moves_over_one_and_two_bins(kind: str, name: str) -> None:
    # Given a reference of a wandering value; then a day of white noise, of a slow wave, of twice the moves
    reference = usual_reference()
    books = reference.books.rows(np.array([0]))
    generator = np.random.default_rng(4)
    wander = np.zeros(DAY)
    for place in range(1, DAY):
        wander[place] = 0.7 * wander[place - 1] + generator.normal(0, 0.8)
    day = {
        "noise": generator.normal(0, 1, DAY),
        "slow": 1.5 * np.sin(np.arange(DAY) / 6),
        "louder": 2.2 * wander,
    }
    scores = day[kind].astype(np.float32)[None]
    unknown = np.full((1, 2), np.nan, np.float32)
    codes = coded(scores, books.values)
    kept = replace(codes, moved=moves(scores, unknown))

    found = statistics(sums_over(kept, 1, SHORT, DAY), books, SHORT, DAY)[:, 0, 0]

    changed = {other: found[INDEX[other]] for other in ("rougher_24h", "smoother_24h", "restless_24h")}
    assert changed[name] > FLOORS[INDEX[name]], changed


def test_a_series_without_memory_cannot_get_rougher() -> None:
    # Given moves over one bin as large as over two, in the reference and, alternating, even larger
    books = usual_reference().books.rows(np.array([0]))
    white = replace(books, log_moves=np.zeros((1, 2), np.float32))
    scores = np.tile(np.array([2.0, -2.0], np.float32), DAY // 2)[None]
    kept = replace(coded(scores, books.values), moved=moves(scores, np.full((1, 2), np.nan, np.float32)))

    found = statistics(sums_over(kept, 1, SHORT, DAY), white, SHORT, DAY)[:, 0, 0]

    assert found[INDEX["rougher_24h"]] == 0


def test_moves_are_unknown_where_either_end_is() -> None:
    scores = np.array([[1.0, np.nan, 3.0, 4.0]], np.float32)

    found = moves(scores, np.array([[np.nan, 0.5]], np.float32))

    assert found[:, 0].tolist() == [[500, -1, -1, 1000], [-1, -1, 2000, -1]]
