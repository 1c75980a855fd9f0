"""Sums kept bin by bin: equal to sums made at once, at every moment."""

import numpy as np

from fleetcast.drift.seasonal.season import ABSENT, ABSENT_PLACE, N_CODES, Traits, evidence
from fleetcast.drift.seasonal.statistics import BinCodes, RunningSums, sums_over

SHORT, LONG = 4, 12
TEMPLATE = np.random.default_rng(3).integers(-2000, 2000, (3, 48)).astype(np.int16)  # 48 bins a day


def random_codes(n_bins: int, seed: int = 2) -> BinCodes:
    generator = np.random.default_rng(seed)
    size = (3, n_bins)

    def codes() -> np.ndarray:
        drawn = generator.integers(0, N_CODES, size).astype(np.uint8)
        drawn[generator.random(size) < 0.2] = ABSENT
        return drawn

    def shorts() -> np.ndarray:
        return generator.integers(-500, 500, size).astype(np.int16)

    place, day_bins = shorts(), np.arange(7, 7 + n_bins) % TEMPLATE.shape[1]
    place[generator.random(size) < 0.2] = ABSENT_PLACE
    outside = generator.random(size) < 0.3
    for_lags = evidence(TEMPLATE, place, day_bins)
    scores = np.zeros(size, np.float32)
    traits = Traits(scores, shorts(), np.abs(shorts()), shorts(), outside, place, for_lags)
    moved = generator.integers(-1, 6000, (2, *size)).astype(np.int16)
    moved[generator.random((2, *size)) < 0.2] = -1
    return BinCodes(codes(), codes(), codes(), traits, moved, day_bins)


def one_bin(codes: BinCodes, place: int) -> BinCodes:
    part = slice(place, place + 1)
    own = codes.traits
    traits = Traits(
        own.scores[:, part],
        own.level[:, part],
        own.size[:, part],
        own.rhythm[:, part],
        own.is_outside[:, part],
        own.place[:, part],
        own.evidence[:, :, part],
    )
    return BinCodes(
        codes.values[:, part],
        codes.innovations[:, part],
        codes.errors[:, part],
        traits,
        codes.moved[:, :, part],
        codes.day_bins[part],
    )


def test_every_sum_equals_the_sum_of_its_window_made_at_once() -> None:
    codes = random_codes(50)
    at_once = sums_over(codes, 1, SHORT, LONG)
    running = RunningSums(TEMPLATE, SHORT, LONG)

    for place in range(50):
        running.add(one_bin(codes, place))
        if place + 1 < LONG:
            continue
        now = running.window_sums()
        for name in vars(at_once):
            whole, newest = getattr(at_once, name), getattr(now, name)
            axis = whole.shape.index(50 - LONG + 1)  # time
            expected = whole.take(place + 1 - LONG, axis)
            assert np.array_equal(newest.take(0, axis), expected), (name, place)


def test_the_newest_bins_of_a_ring_come_oldest_first() -> None:
    codes = random_codes(20)
    running = RunningSums(TEMPLATE, SHORT, LONG)
    for place in range(20):
        running.add(one_bin(codes, place))

    assert np.array_equal(running.newest(running.values, 5), codes.values[:, 15:].T)
    assert running.newest(running.values, 99).shape == (LONG, 3)


def test_the_memory_is_that_of_a_day_whatever_was_seen() -> None:
    running = RunningSums(TEMPLATE, SHORT, LONG)
    codes = random_codes(50)
    size = sum(array.nbytes for array in vars(running).values() if isinstance(array, np.ndarray))
    for place in range(50):
        running.add(one_bin(codes, place))

    assert size == sum(array.nbytes for array in vars(running).values() if isinstance(array, np.ndarray))
