"""The drift window: which pairs are in it, and that it depends on the stored rows alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from settled_rows import BIN_MS, START_MS, RowStore, columns_equal, joined, settled

from fleetcast.drift.literal.window import DriftWindow, PairWindow
from fleetcast.settings import DriftSettings

SMALL = DriftSettings(window_size=10, window_bins_per_server=3, min_span_s=1800)


def by_bin(server: str, metric: str, number: int) -> float:
    return float(number)


def window_of(store: RowStore, settings: DriftSettings = SMALL, floor_ms: int = 0) -> PairWindow:
    return fresh(store, settings).refresh("v1", floor_ms, newest_ms(store))


def fresh(store: RowStore, settings: DriftSettings = SMALL) -> DriftWindow:
    return DriftWindow(store.read_predictions, settings, BIN_MS)


def newest_ms(store: RowStore) -> int | None:
    return int(store.rows.target_ms.max()) + BIN_MS - 1 if len(store.rows) else None


def same(first: PairWindow, second: PairWindow) -> bool:
    names = [[w.server_names[code] for code in w.servers] for w in (first, second)]
    return (
        names[0] == names[1]
        and np.array_equal(first.target_ms, second.target_ms)
        and columns_equal(first.actuals, second.actuals)
        and first.forecasts.keys() == second.forecasts.keys()
        and all(columns_equal(first.forecasts[h], second.forecasts[h]) for h in first.forecasts)
        and all(columns_equal(first.served[h], second.served[h]) for h in first.forecasts)
        and (first.size, first.span_ms) == (second.size, second.span_ms)
    )


def test_the_window_holds_the_newest_pairs_oldest_first() -> None:
    window = window_of(RowStore(settled(["b", "a"], range(20), by_bin)))
    assert len(window) == window.size == 10
    assert window.actuals["cpu_pct"].tolist() == [15, 15, 16, 16, 17, 17, 18, 18, 19, 19]
    assert [window.server_names[code] for code in window.servers[:2]] == ["a", "b"]


def test_a_large_fleet_is_seen_for_some_bins_each() -> None:
    servers = [f"s{number:02d}" for number in range(8)]
    window = window_of(RowStore(settled(servers, range(20), by_bin)))
    assert window.size == len(window) == 3 * 8
    assert window.n_servers == 8


def test_a_server_that_is_gone_does_not_make_the_window_larger() -> None:
    old = settled([f"s{number}" for number in range(8)], range(10), by_bin)
    window = window_of(RowStore(joined(old, settled(["s0"], range(10, 20), by_bin))))
    assert window.size == 10


def test_every_metric_and_horizon_stands_beside_its_pair() -> None:
    def forecast(server: str, metric: str, number: int) -> float:
        return number + (0.5 if metric == "mem_pct" else 0.25)

    rows = settled(["a"], range(10), by_bin, forecast, metrics=("cpu_pct", "mem_pct"), horizons=(1, 12))
    window = window_of(RowStore(rows))
    assert window.forecasts.keys() == {1, 12}
    assert window.one_ahead["cpu_pct"].tolist() == [number + 0.25 for number in range(10)]
    assert window.forecasts[12]["mem_pct"].tolist() == [number + 0.5 for number in range(10)]


def test_a_pair_without_a_metric_has_it_absent() -> None:
    rows = joined(settled(["a"], range(12), by_bin), settled(["a"], range(5), by_bin, metrics=("mem_pct",)))
    assert np.isnan(window_of(RowStore(rows)).actuals["mem_pct"]).tolist() == [False] * 3 + [True] * 7


def test_forecasts_of_the_fallback_and_of_other_versions_do_not_count() -> None:
    rows = joined(
        settled(["a"], range(5), by_bin, version="v0"),
        settled(["a"], range(5, 9), by_bin, version="v1"),
        settled(["b"], range(9), by_bin, version=None),
    )
    window = window_of(RowStore(rows))
    assert window.actuals["cpu_pct"].tolist() == [5, 6, 7, 8]
    assert window.server_names == ("a",)


def test_the_window_restarts_where_the_baseline_ends() -> None:
    store = RowStore(settled(["a"], range(20), by_bin))
    window = window_of(store, floor_ms=START_MS + 16 * BIN_MS)
    assert window.actuals["cpu_pct"].tolist() == [16, 17, 18, 19]


@pytest.mark.parametrize("version", [None, "v9"])
def test_without_rows_of_the_version_the_window_is_empty(version: str | None) -> None:
    store = RowStore(settled(["a"], range(20), by_bin))
    window = fresh(store).refresh(version, 0, newest_ms(store))
    assert (len(window), window.size, window.span_ms) == (0, 10, 0)


def test_an_empty_buffer_has_an_empty_window() -> None:
    assert len(window_of(RowStore(settled([], [], by_bin)))) == 0


def test_the_span_goes_back_further_than_a_full_window() -> None:
    """A window of 3 bins can be full before the version has served for the 30 minutes asked for."""
    servers = [f"s{number}" for number in range(8)]
    spans = [
        window_of(RowStore(settled(servers, range(served), by_bin))).span_ms / 60_000
        for served in (3, 5, 6, 7, 50)
    ]
    assert spans == [15, 25, 30, 35, 35], "the window never reaches beyond the asked 30 minutes"


def test_a_gap_is_bridged_until_the_window_is_full() -> None:
    rows = joined(settled(["a"], range(8), by_bin), settled(["a"], range(400, 405), by_bin))
    window = window_of(RowStore(rows))
    assert window.actuals["cpu_pct"].tolist() == [3, 4, 5, 6, 7, 400, 401, 402, 403, 404]


def test_a_later_look_reads_from_the_cursor_only() -> None:
    store = RowStore(settled(["a"], range(2000), by_bin))
    window = fresh(store)
    window.refresh("v1", 0, newest_ms(store))
    store.add(settled(["a"], [2000], by_bin))
    store.reads.clear()
    window.refresh("v1", 0, newest_ms(store))
    ((start_ms, _),) = store.reads
    assert start_ms >= START_MS + 1980 * BIN_MS


steps = st.lists(
    st.tuples(
        st.integers(1, 4),  # bins that pass
        st.sets(st.sampled_from("abcdefgh"), max_size=8),  # servers that were forecast in them
        st.sampled_from(["v1", "v1", "v1", "v2", None]),
    ),
    min_size=1,
    max_size=25,
)


@settings(deadline=None, max_examples=60)
@given(steps, st.integers(0, 40))
def test_a_restart_between_any_two_looks_changes_nothing(
    history: list[tuple[int, set[str], str | None]], floor_bin: int
) -> None:
    store = RowStore(settled([], [], by_bin))
    floor_ms = START_MS + floor_bin * BIN_MS
    running, number = fresh(store), 0
    for passed, servers, version in history:
        store.add(settled(sorted(servers), range(number, number + passed), by_bin, version=version))
        number += passed
        found = running.refresh("v1", floor_ms, newest_ms(store))
        assert same(found, window_of(store, floor_ms=floor_ms))


def test_late_rows_of_an_older_bin_are_seen_by_both() -> None:
    store = RowStore(settled(["a"], range(30), by_bin))
    running = fresh(store)
    running.refresh("v1", 0, newest_ms(store))
    store.add(settled(["b"], [26, 27], by_bin))
    assert same(running.refresh("v1", 0, newest_ms(store)), window_of(store))
