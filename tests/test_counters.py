import struct

import numpy as np
import pytest

from fleetcast.prometheus.series import CounterMemory, Samples

STALE = struct.unpack("<d", struct.pack("<Q", 0x7FF0000000000002))[0]
NAN = float("nan")
Row = tuple[int, int, float]


def samples(*rows: Row) -> Samples:
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    return Samples(
        np.array(columns[0], np.int32), np.array(columns[1], np.int64), np.array(columns[2], float)
    )


@pytest.fixture
def memory() -> CounterMemory:
    return CounterMemory(max_gap_s=300.0)


def rates(memory: CounterMemory, *rows: Row) -> list[tuple[int, int, float]]:
    news, found = memory.take(samples(*rows))
    return list(zip(news.series.tolist(), news.timestamps_ms.tolist(), found.tolist(), strict=True))


def same(got: list[Row], want: list[Row]) -> None:
    np.testing.assert_array_equal(np.array(got), np.array(want))


def test_the_first_sample_has_no_rate_the_second_one_has(memory: CounterMemory) -> None:
    same(rates(memory, (0, 1_000, 50.0)), [(0, 1_000, NAN)])
    same(rates(memory, (0, 11_000, 80.0)), [(0, 11_000, 3.0)])


def test_a_missed_scrape_makes_the_rate_an_average_over_the_longer_time(memory: CounterMemory) -> None:
    same(
        rates(memory, (0, 0, 0.0), (0, 15_000, 15.0), (0, 45_000, 75.0)),
        [(0, 0, NAN), (0, 15_000, 1.0), (0, 45_000, 2.0)],
    )


def test_a_counter_that_fell_began_again_at_zero(memory: CounterMemory) -> None:
    same(rates(memory, (0, 0, 1e9), (0, 10_000, 40.0)), [(0, 0, NAN), (0, 10_000, 4.0)])


def test_silence_beyond_the_longest_gap_begins_anew(memory: CounterMemory) -> None:
    rates(memory, (0, 0, 0.0))
    same(
        rates(memory, (0, 300_000, 300.0), (0, 600_001, 600.0), (0, 610_001, 610.0)),
        [(0, 300_000, 1.0), (0, 600_001, NAN), (0, 610_001, 1.0)],
    )


def test_repeated_and_late_samples_are_left_out(memory: CounterMemory) -> None:
    rates(memory, (0, 0, 0.0), (0, 10_000, 10.0))
    same(rates(memory, (0, 10_000, 10.0), (0, 5_000, 5.0), (0, 20_000, 30.0)), [(0, 20_000, 2.0)])


def test_series_do_not_mix_and_their_order_does_not_matter(memory: CounterMemory) -> None:
    rates(memory, (1, 0, 0.0), (0, 0, 100.0))
    got = rates(memory, (1, 20_000, 40.0), (0, 10_000, 110.0), (1, 10_000, 10.0))
    same(got, [(0, 10_000, 1.0), (1, 10_000, 1.0), (1, 20_000, 3.0)])


def test_no_rate_comes_from_what_is_no_number(memory: CounterMemory) -> None:
    rates(memory, (0, 0, 0.0))
    got = rates(
        memory, (0, 10_000, STALE), (0, 20_000, 5.0), (0, 30_000, NAN), (0, 40_000, 6.0), (0, 50_000, -1.0)
    )
    assert [np.isnan(rate) for _, _, rate in got] == [True] * 5
    same(rates(memory, (0, 60_000, 0.0), (0, 70_000, 10.0)), [(0, 60_000, 0.1), (0, 70_000, 1.0)])


def test_only_prometheus_own_mark_means_that_a_series_ended() -> None:
    marks = samples((0, 0, STALE), (0, 1, NAN), (0, 2, 0.0), (0, 3, float("inf"))).are_stale_marks
    assert marks.tolist() == [True, False, False, False]


def test_memory_grows_and_follows_a_renumbering(memory: CounterMemory) -> None:
    memory.ensure(1000)
    rates(memory, (999, 0, 0.0), (5, 0, 70.0))
    memory.keep(np.array([5, 999]))
    same(rates(memory, (0, 10_000, 80.0), (1, 10_000, 20.0)), [(0, 10_000, 1.0), (1, 10_000, 2.0)])


def test_nothing_in_is_nothing_out(memory: CounterMemory) -> None:
    assert rates(memory) == []
