import math
import struct
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetcast.prometheus.rules import parse_rules
from fleetcast.prometheus.series import ExporterSeries, LivingSeries, Samples
from fleetcast.schema import increase, increases
from fleetcast.settings import RemoteWriteSettings

STALE = struct.unpack("<d", struct.pack("<Q", 0x7FF0000000000002))[0]
NAN = float("nan")
Row = tuple[int, int, float]


def samples(*rows: Row) -> Samples:
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    return Samples(
        np.array(columns[0], np.int32), np.array(columns[1], np.int64), np.array(columns[2], float)
    )


class Counters:
    """Series 0, 1, 2 ... of one target, and their life."""

    def __init__(self, n_series: int = 2) -> None:
        rules = parse_rules(("io = sum(rate(node_disk_read_bytes_total))",))
        self.series = ExporterSeries(rules[0].terms, RemoteWriteSettings())
        self.living = LivingSeries(self.series, 1, max_gap_s=300.0)
        for number in range(n_series):
            assert self.series.number(self.labels(number)) == number
        self.living.ensure()

    @staticmethod
    def labels(number: int) -> Mapping[str, str]:
        return {"__name__": "node_disk_read_bytes_total", "instance": "web-01", "device": f"sd{number}"}

    def rates(self, *rows: Row) -> list[Row]:
        news = samples(*sorted(rows, key=lambda row: row[:2]))
        found = self.living.rates(news)
        self.living.note(news, np.ones(len(news), np.bool_), 0.0)
        return list(zip(news.series.tolist(), news.timestamps_ms.tolist(), found.tolist(), strict=True))


@pytest.fixture
def counters() -> Counters:
    return Counters()


def same(got: list[Row], want: list[Row]) -> None:
    np.testing.assert_array_equal(np.array(got), np.array(want))


def test_the_first_sample_has_no_rate_the_second_one_has(counters: Counters) -> None:
    same(counters.rates((0, 1_000, 50.0)), [(0, 1_000, NAN)])
    same(counters.rates((0, 11_000, 80.0)), [(0, 11_000, 3.0)])


def test_a_missed_scrape_makes_the_rate_an_average_over_the_longer_time(counters: Counters) -> None:
    same(
        counters.rates((0, 0, 0.0), (0, 15_000, 15.0), (0, 45_000, 75.0)),
        [(0, 0, NAN), (0, 15_000, 1.0), (0, 45_000, 2.0)],
    )


@pytest.mark.parametrize(
    ("before", "after", "want"),
    [
        (1e9, 1e9, 0.0),
        (1e9, 1e9 + 5, 5.0),
        (1e9, 0.0, 0.0),
        (1e9, 1e7, 1e7),
        (1e9, 1.01e7, NAN),
        (5e12, 5e12 - 512, NAN),
        (0.0, 0.0, 0.0),
        (10.0, -1.0, NAN),
        (NAN, 1.0, NAN),
        (1.0, NAN, NAN),
        (1.0, math.inf, NAN),
        (math.inf, 1.0, NAN),
        (-1e308, 1.7e308, NAN),
    ],
)
def test_a_fall_to_near_zero_is_a_reset_and_any_other_is_unknown(
    before: float, after: float, want: float
) -> None:
    np.testing.assert_equal(increases(np.array([before]), np.array([after])), [want])
    np.testing.assert_equal(increase(before, after), want)


@given(st.floats(), st.floats())
def test_one_pair_and_many_are_judged_alike(before: float, after: float) -> None:
    np.testing.assert_equal(increases(np.array([before]), np.array([after]))[0], increase(before, after))


def test_a_counter_that_fell_to_near_zero_began_again(counters: Counters) -> None:
    same(counters.rates((0, 0, 1e9), (0, 10_000, 40.0)), [(0, 0, NAN), (0, 10_000, 4.0)])


def test_after_a_fall_in_between_the_next_rate_is_known_again(counters: Counters) -> None:
    got = counters.rates((0, 0, 1e9), (0, 10_000, 1e9 - 512), (0, 20_000, 1e9 - 412))
    same(got, [(0, 0, NAN), (0, 10_000, NAN), (0, 20_000, 10.0)])


def test_silence_beyond_the_longest_gap_begins_anew(counters: Counters) -> None:
    counters.rates((0, 0, 0.0))
    same(
        counters.rates((0, 300_000, 300.0), (0, 600_001, 600.0), (0, 610_001, 610.0)),
        [(0, 300_000, 1.0), (0, 600_001, NAN), (0, 610_001, 1.0)],
    )


def test_series_do_not_mix(counters: Counters) -> None:
    counters.rates((1, 0, 0.0), (0, 0, 100.0))
    got = counters.rates((1, 20_000, 40.0), (0, 10_000, 110.0), (1, 10_000, 10.0))
    same(got, [(0, 10_000, 1.0), (1, 10_000, 1.0), (1, 20_000, 3.0)])


def test_no_rate_comes_from_what_is_no_number(counters: Counters) -> None:
    counters.rates((0, 0, 0.0))
    got = counters.rates(
        (0, 10_000, STALE), (0, 20_000, 5.0), (0, 30_000, NAN), (0, 40_000, 6.0), (0, 50_000, -1.0)
    )
    assert [np.isnan(rate) for _, _, rate in got] == [True] * 5
    same(counters.rates((0, 60_000, 0.0), (0, 70_000, 10.0)), [(0, 60_000, 0.1), (0, 70_000, 1.0)])


def test_only_prometheus_own_mark_means_that_a_series_ended() -> None:
    marks = samples((0, 0, STALE), (0, 1, NAN), (0, 2, 0.0), (0, 3, float("inf"))).are_stale_marks
    assert marks.tolist() == [True, False, False, False]


def test_memory_grows_and_follows_a_renumbering() -> None:
    counters = Counters(1000)
    counters.rates((999, 0, 0.0), (5, 0, 70.0))
    kept = np.array([5, 999])
    counters.living.keep(kept, np.array([0]))
    counters.series.keep(kept)
    same(
        counters.rates((0, 10_000, 80.0), (1, 10_000, 20.0)),
        [(0, 10_000, 1.0), (1, 10_000, 2.0)],
    )


def test_nothing_in_is_nothing_out(counters: Counters) -> None:
    assert counters.rates() == []
