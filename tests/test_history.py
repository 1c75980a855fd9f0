"""Bins close, windows show what is closed, and the rolling array keeps every cell in its place."""

import itertools
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetcast.bins import bin_means
from fleetcast.clock import to_ms
from fleetcast.schema import Floats32, RecordBatch
from fleetcast.serving.history import BinGrid, BinHistory
from fleetcast.settings import BinSettings, ForecastSettings

START = datetime(2026, 1, 15, 10, 0, tzinfo=UTC)
T0 = to_ms(START)
BIN = 300_000
Row = tuple[str, float, float]  # server, seconds after START, cpu


def batch_of(*rows: Row) -> RecordBatch:
    names = tuple(dict.fromkeys(row[0] for row in rows))
    return RecordBatch(
        names,
        np.array([names.index(row[0]) for row in rows], dtype=np.int32),
        np.array([T0 + round(row[1] * 1000) for row in rows], dtype=np.int64),
        {"cpu_pct": np.array([row[2] for row in rows], dtype=np.float64)},
    )


def history(**kwargs: int) -> BinHistory:
    return BinHistory(BinSettings(forecast_metrics=("cpu_pct",)), ForecastSettings(), **kwargs)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def cells(bins: BinHistory) -> dict[tuple[str, int], float]:
    """The window as {(server, bin start): mean}, absent cells left out."""
    window = next(bins.parts(bins.taken_bin_ms or 0, 99))
    n_bins = window.values.shape[2]
    return {
        (name, window.end_bin_ms - (n_bins - 1 - column) * BIN): float(window.values[row, 0, column])
        for row, name in enumerate(window.server_names)
        for column in range(n_bins)
        if not np.isnan(window.values[row, 0, column])
    }


def close_all(bins: BinHistory, now: datetime) -> list[int]:
    taken = []
    while due := bins.due(now):
        bins.close(due[0])
        taken.append((due[0] - T0) // BIN)
    return taken


def test_a_record_of_the_next_bin_closes_no_bin_that_still_fills() -> None:
    """Given several senders of one server, one of which is ahead."""
    bins = history()
    bins.add(batch_of(("a", 10, 10.0), ("a", 301, 9.0)))
    assert bins.due(at(329)) == []
    bins.add(batch_of(("a", 20, 74.0)))
    assert bins.due(at(330)) == [T0]
    assert bins.close(T0).values.tolist() == [[42.0]]
    assert bins.late_rows == 0


def test_rows_that_come_soon_after_a_bin_closed_correct_it_and_later_ones_do_not() -> None:
    bins = history()
    rows: list[Row] = [("a", 10, 10.0), ("b", 10, 1.0)]
    bins.add(batch_of(*rows), at(10))
    close_all(bins, at(330))
    stored = [batch_of(*rows, ("a", 20, 74.0))]
    bins.add(batch_of(("a", 20, 74.0)), at(900))
    assert bins.awaits_correction
    (corrected,) = bins.refresh(lambda *_: stored, corrections_only=True)
    assert (corrected.server_names, corrected.values.tolist()) == (("a", "b"), [[42.0], [1.0]])
    assert not bins.awaits_refresh
    bins.add(batch_of(("a", 30, 74.0)), at(900.001))
    assert bins.awaits_refresh
    assert not bins.awaits_correction
    assert bins.refresh(lambda *_: stored) == []
    assert bins.late_rows == 2


def test_a_correction_survives_a_read_that_fails() -> None:
    bins = history()
    bins.add(batch_of(("a", 10, 10.0)), at(10))
    close_all(bins, at(330))
    bins.add(batch_of(("a", 20, 20.0)), at(400))

    def fail(*_: int) -> list[RecordBatch]:
        raise OSError("the disk is away")

    with pytest.raises(OSError, match="away"):
        bins.refresh(fail)
    assert [one.bin_ms for one in bins.refresh(lambda *_: [batch_of(("a", 10, 10.0), ("a", 20, 20.0))])] == [
        T0
    ]


def test_a_bin_closes_by_the_clock_thirty_seconds_after_its_end() -> None:
    bins = history()
    bins.add(batch_of(("a", 10, 1.0)))
    assert not bins.due(at(329))
    assert bins.due(at(330))


def test_a_server_silent_for_half_an_hour_holds_nobody_up() -> None:
    bins = history()
    bins.add(batch_of(("gone", 0, 1.0)))
    bins.add(batch_of(*(("a", 300.0 * i, 5.0) for i in range(9))))
    assert close_all(bins, at(300 * 8 + 30)) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_closed_bin_holds_the_mean_of_each_server_that_sent_something() -> None:
    bins = history()
    bins.add(batch_of(("a", 0, 1.0), ("a", 5, 2.0), ("b", 0, 7.0), ("a", 299.999, 6.0)))
    closed = bins.close(bins.due(at(400))[0])
    assert closed.server_names == ("a", "b")
    assert closed.values.tolist() == [[3.0], [7.0]]


def test_a_repeated_record_counts_once_with_its_last_value() -> None:
    bins = history()
    bins.add(batch_of(("a", 0, 1.0), ("a", 5, 2.0)))
    bins.add(batch_of(("a", 5, 4.0)))
    assert bins.close(T0).values.tolist() == [[2.5]]


def test_one_batch_over_several_bins_is_taken_oldest_first_and_sees_no_later_value() -> None:
    bins = history()
    bins.add(batch_of(*(("a", 300.0 * i, float(i)) for i in range(4))))
    due = bins.due(at(930))
    assert [(start - T0) // BIN for start in due] == [0, 1, 2]
    bins.close(due[0])
    assert cells(bins) == {("a", T0): 0.0}
    bins.close(due[1])
    assert cells(bins) == {("a", T0): 0.0, ("a", T0 + BIN): 1.0}


def test_a_gap_leaves_empty_columns_and_no_due_bins() -> None:
    bins = history()
    bins.add(batch_of(("a", 0, 1.0), ("a", 30 * 3600, 2.0)))
    assert close_all(bins, at(31 * 3600)) == [0, 360]
    window = next(bins.parts(T0 + 360 * BIN, 99))
    assert window.values.shape == (1, 1, 361)
    assert np.isnan(window.values[0, 0, 1:360]).all()


def test_a_gap_longer_than_the_memory_forgets_what_was_before() -> None:
    bins = history(keep_bins=10)
    bins.add(batch_of(("a", 0, 1.0)))
    close_all(bins, at(400))
    bins.add(batch_of(("a", 300 * 500, 2.0)))
    close_all(bins, at(300 * 502))
    assert cells(bins) == {("a", T0 + 500 * BIN): 2.0}


def test_a_server_unseen_for_a_day_leaves_the_window_and_returns_with_its_past() -> None:
    bins = history()
    bins.add(batch_of(("a", 0, 1.0), ("b", 0, 1.0)))
    bins.add(batch_of(("a", 24 * 3600, 1.0)))
    close_all(bins, at(24 * 3600 + 400))
    assert next(bins.parts(bins.taken_bin_ms or 0, 99)).server_names == ("a",)
    bins.add(batch_of(("a", 24 * 3600 + 600, 1.0), ("b", 24 * 3600 + 600, 3.0)))
    close_all(bins, at(25 * 3600))
    assert cells(bins)[("b", T0)] == 1.0


def test_late_rows_are_counted_and_reopen_nothing() -> None:
    bins = history()
    bins.add(batch_of(("a", 0, 1.0)))
    close_all(bins, at(400))
    bins.add(batch_of(("a", 5, 100.0), ("b", 5, 3.0)))
    assert bins.late_rows == 2
    assert bins.due(at(10_000)) == []
    assert cells(bins) == {("a", T0): 1.0}


def test_rows_too_late_for_the_window_are_counted_and_not_read_again() -> None:
    bins = history(keep_bins=10)
    bins.add(batch_of(("a", 300.0 * 100, 1.0)))
    close_all(bins, at(300 * 102))
    bins.add(batch_of(("a", 300.0 * 90, 1.0)))
    assert bins.late_rows == 1
    assert not bins.awaits_refresh


def test_refresh_reads_only_the_bins_of_late_rows_again() -> None:
    bins = history()
    rows: list[Row] = [("a", 300.0 * i, float(i)) for i in range(6)]
    bins.add(batch_of(*rows))
    close_all(bins, at(2000))
    late: list[Row] = [("a", 305.0, 3.0), ("b", 310.0, 8.0), ("b", 900.0, 2.0)]
    bins.add(batch_of(*late))
    asked = []

    def read(start_ms: int, end_ms: int) -> list[RecordBatch]:
        asked.append(((start_ms - T0) // BIN, (end_ms - T0) // BIN))
        inside = [row for row in rows + late if start_ms <= T0 + row[1] * 1000 < end_ms]
        return [batch_of(*inside)]

    assert bins.refresh(read) == []
    assert asked == [(1, 2), (3, 4)]
    assert not bins.awaits_refresh
    assert cells(bins)[("a", T0 + BIN)] == 2.0
    assert cells(bins)[("b", T0 + BIN)] == 8.0
    assert cells(bins)[("b", T0 + 3 * BIN)] == 2.0
    assert cells(bins)[("a", T0 + 2 * BIN)] == 2.0


def test_a_restored_history_goes_on_where_the_old_one_was_killed() -> None:
    rows: list[Row] = [(name, 60.0 * i, i * 0.1) for i in range(60) for name in ("a", "b")]
    old = history()
    old.add(batch_of(*rows))
    close_all(old, at(3360))
    new = history()
    new.restore([batch_of(*rows)], T0 + 4 * BIN)
    assert close_all(new, at(3360)) == [5, 6, 7, 8, 9, 10]
    assert cells(new) == cells(old)
    assert new.newest_ms == old.newest_ms


def test_servers_gone_for_the_whole_memory_are_forgotten_without_mixing_up_the_others() -> None:
    bins = history(keep_bins=10)
    bins.add(batch_of(*((f"old-{i}", 0.0, 1.0) for i in range(40)), ("keep", 1.0, 5.0)))
    close_all(bins, at(400))
    bins.add(batch_of(("new", 300.0 * 8, 7.0), ("keep", 300.0 * 8, 6.0)))
    close_all(bins, at(300 * 10))
    assert bins.n_servers == 42
    bins.add(batch_of(("late-comer", 300.0 * 13, 9.0), ("keep", 300.0 * 12, 8.0), ("keep", 300.0 * 13, 4.0)))
    close_all(bins, at(300 * 15))
    assert bins.n_servers == 3
    assert cells(bins) == {
        ("keep", T0 + 8 * BIN): 6.0,
        ("keep", T0 + 12 * BIN): 8.0,
        ("keep", T0 + 13 * BIN): 4.0,
        ("new", T0 + 8 * BIN): 7.0,
        ("late-comer", T0 + 13 * BIN): 9.0,
    }


def test_an_unknown_metric_is_no_column_and_a_missing_one_is_absent() -> None:
    bins = BinHistory(BinSettings(forecast_metrics=("cpu_pct", "mem_pct")), ForecastSettings())
    batch = batch_of(("a", 0, 1.0))
    bins.add(
        RecordBatch(
            batch.server_names,
            batch.server_codes,
            batch.timestamps_ms,
            {"cpu_pct": batch.metrics["cpu_pct"], "fans": batch.metrics["cpu_pct"]},
        )
    )
    closed = bins.close(T0)
    assert closed.metrics == ("cpu_pct", "mem_pct")
    assert closed.values[0, 0] == 1.0
    assert np.isnan(closed.values[0, 1])


def test_the_window_spans_the_memory_across_many_moves() -> None:
    bins = history(keep_bins=20)
    for i in range(700):
        bins.add(batch_of(("a", 300.0 * i, float(i))))
        close_all(bins, at(300.0 * i + 30))
    assert cells(bins) == {("a", T0 + i * BIN): float(i) for i in range(679, 699)}


row_strategy = st.tuples(
    st.sampled_from(["a", "b", "c"]),
    st.integers(0, 3600).map(float),
    st.floats(0, 100, allow_nan=False, width=16),
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(row_strategy, min_size=1, max_size=80), sizes=st.lists(st.integers(1, 9), min_size=1))
def test_however_records_are_cut_into_batches_the_means_are_those_of_bin_means(
    rows: list[Row], sizes: list[int]
) -> None:
    bins = history()
    rest, cut = list(rows), itertools.cycle(sizes)
    while rest:
        n = next(cut)
        bins.add(batch_of(*rest[:n]))
        rest = rest[n:]
    close_all(bins, at(10_000))
    whole = batch_of(*rows)
    codes, starts, means = bin_means(whole.server_codes, whole.timestamps_ms, whole.metrics["cpu_pct"], BIN)
    expected = {
        (whole.server_names[code], int(start)): float(np.float32(mean))
        for code, start, mean in zip(codes, starts, means, strict=True)
    }
    assert cells(bins) == pytest.approx(expected, abs=0.00251)


def put(grid: BinGrid, row: int, bin_number: int, value: float) -> None:
    grid.put(np.array([row], dtype=np.int32), np.array([bin_number * BIN]), np.array([[value]]))


def shown(grid: BinGrid, n_rows: int) -> Floats32:
    return grid.values(np.arange(n_rows))


def test_a_young_grid_shows_only_the_bins_it_has() -> None:
    grid = BinGrid(("cpu_pct",), BIN, keep_bins=10)
    assert shown(grid, 3).shape == (3, 1, 0)
    grid.advance(5 * BIN)
    put(grid, 0, 5, 1.0)
    grid.advance(7 * BIN)
    put(grid, 0, 7, 3.0)
    np.testing.assert_array_equal(shown(grid, 1)[0, 0], np.array([1.0, np.nan, 3.0], dtype=np.float32))


def test_it_never_shows_more_than_it_keeps() -> None:
    grid = BinGrid(("cpu_pct",), BIN, keep_bins=4)
    for number in range(990):
        grid.advance(number * BIN)
        put(grid, 0, number, float(number))
    assert shown(grid, 1)[0, 0].tolist() == [986.0, 987.0, 988.0, 989.0]


@pytest.mark.parametrize("jump", [1, 3, 95, 96, 97, 400])
def test_a_jump_keeps_what_is_young_enough(jump: int) -> None:
    grid = BinGrid(("cpu_pct",), BIN, keep_bins=300)
    for number in range(290):
        grid.advance(number * BIN)
        put(grid, 0, number, float(number))
    grid.advance((289 + jump) * BIN)
    put(grid, 0, 289 + jump, 7.0)
    row = shown(grid, 1)[0, 0]
    known = {289 + jump - (len(row) - 1 - i): v for i, v in enumerate(row.tolist()) if not np.isnan(v)}
    expected = {n: float(n) for n in range(290) if n > 289 + jump - 300} | {289 + jump: 7.0}
    assert known == expected


def test_cells_out_of_reach_are_dropped() -> None:
    grid = BinGrid(("cpu_pct",), BIN, keep_bins=3)
    grid.advance(10 * BIN)
    put(grid, 0, 11, 1.0)
    put(grid, 0, 7, 1.0)
    assert shown(grid, 1).size == 0
    put(grid, 0, 8, 2.0)
    assert shown(grid, 1)[0, 0, 0] == 2.0


def test_rows_are_made_as_needed_and_empty() -> None:
    grid = BinGrid(("cpu_pct",), BIN, keep_bins=3)
    grid.advance(0)
    put(grid, 500, 0, 5.0)
    assert np.isnan(shown(grid, 501)[:500]).all()
    assert shown(grid, 501)[500, 0, 0] == 5.0


def test_kept_rows_move_up_in_order() -> None:
    grid = BinGrid(("cpu_pct",), BIN, keep_bins=3)
    grid.advance(0)
    for row in range(5):
        put(grid, row, 0, float(row))
    grid.keep_rows(np.array([1, 4], dtype=np.int32))
    assert shown(grid, 2)[:, 0, 0].tolist() == [1.0, 4.0]
    assert np.isnan(shown(grid, 5)[2:]).all()


def test_of_many_rows_the_kept_ones_move_up_in_order() -> None:
    grid = BinGrid(("cpu_pct",), BIN, keep_bins=30)
    rows = np.arange(900, dtype=np.int32)
    for number in range(30):
        grid.advance(number * BIN)
        grid.put(rows, np.full(900, number * BIN), (rows[:, None] + number) % 100.0)
    before = shown(grid, 900)
    kept = rows[rows % 3 > 0]
    grid.keep_rows(kept)
    np.testing.assert_array_equal(shown(grid, 600), before[kept])


def test_the_newest_hour_is_kept_as_it_came_and_older_bins_within_their_bounds() -> None:
    bins = BinHistory(BinSettings(forecast_metrics=("cpu_pct", "latency_ms")), ForecastSettings())
    came = np.random.default_rng(5).uniform(0, 100, (40, 2))
    for number, (cpu, latency) in enumerate(came.tolist()):
        batch = batch_of(("a", 300.0 * number, cpu))
        bins.add(replace(batch, metrics={**batch.metrics, "latency_ms": np.array([latency])}))
        close_all(bins, at(300.0 * number + 330))
    window = next(bins.parts(bins.taken_bin_ms or 0, 1)).values[0]  # (metric, bin)
    past = bins.past("a", bins.taken_bin_ms or 0, 40)
    np.testing.assert_array_equal(window[:, -12:], came.T[:, -12:].astype(np.float32))
    np.testing.assert_allclose(window[0], came[:, 0], atol=0.00251, rtol=0)
    np.testing.assert_allclose(window[1], came[:, 1], rtol=0.001)
    assert (window[:, :-12] != came.T[:, :-12].astype(np.float32)).any(axis=1).all()
    np.testing.assert_array_equal(past, window)


@pytest.mark.parametrize("n_together", [1, 7, 60])
def test_a_restart_reads_back_the_same_values_however_they_are_cut(n_together: int) -> None:
    came = np.random.default_rng(6).normal(50, 20, 60).clip(0, 100).tolist()
    rows: list[Row] = [("a", 300.0 * number, value) for number, value in enumerate(came)]
    old = history()
    for row in rows:
        old.add(batch_of(row))
        close_all(old, at(row[1] + 330))
    new = history()
    cut = [rows[first : first + n_together] for first in range(0, len(rows), n_together)]
    new.restore([batch_of(*part) for part in reversed(cut)], old.taken_bin_ms or 0)
    assert cells(new) == cells(old)


def test_a_reader_waits_while_cells_move_and_records_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    bins = history(keep_bins=50)
    bins.add(batch_of(("a", 0.0, 1.0), ("b", 0.0, 2.0), ("b", 300.0, 3.0)))
    bins.close(T0)
    moves, may_go_on = threading.Event(), threading.Event()
    advance = BinGrid.advance

    def slow(grid: BinGrid, bin_ms: int) -> None:
        moves.set()
        assert may_go_on.wait(30.0)
        advance(grid, bin_ms)

    monkeypatch.setattr(BinGrid, "advance", slow)
    told: list[list[float]] = []

    def look() -> None:
        past = bins.past("b", T0 + BIN, 2)
        assert past is not None
        told.append(past[0].tolist())

    closer, reader = threading.Thread(target=bins.close, args=(T0 + BIN,)), threading.Thread(target=look)
    closer.start()
    assert moves.wait(30.0)
    reader.start()
    reader.join(0.2)
    is_waiting = reader.is_alive()
    bins.add(batch_of(("c", 600.0, 4.0)))  # does not wait for the one or the other
    may_go_on.set()
    closer.join()
    reader.join()
    assert (is_waiting, told) == (True, [[2.0, 3.0]])
    assert bins.past("nowhere", T0, 2) is None
    assert bins.oldest_kept_ms == T0 + BIN - 49 * BIN


def test_a_span_is_empty_where_memory_does_not_reach() -> None:
    grid = BinGrid(("cpu_pct",), BIN, keep_bins=3)
    assert np.isnan(grid.span(0, 0, 2)).all()
    for number in range(10):
        grid.advance(number * BIN)
        put(grid, 0, number, float(number))
    assert grid.span(0, 9 * BIN, 2).tolist() == [[8.0, 9.0]]
    beyond = grid.span(0, 10 * BIN, 5)[0]
    assert beyond[1:4].tolist() == [7.0, 8.0, 9.0]
    assert np.isnan(beyond[[0, 4]]).all()
    assert np.isnan(grid.span(5000, 9 * BIN, 2)).all()


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40), st.floats(0, 99)), min_size=1, max_size=40)
)
@settings(deadline=None)
def test_bins_that_close_together_are_what_each_would_be_alone(rows: list[Row]) -> None:
    one, other = history(keep_bins=8), history(keep_bins=8)
    for name, number, value in rows:
        for bins in (one, other):
            bins.add(batch_of((name, number * 300.0 + 7.0 * len(name), value)))
    due = one.due(at(1e6))
    alone = [one.close(bin_ms) for bin_ms in due]
    together = other.close_first(due)
    assert [(c.bin_ms, c.server_names, c.values.tolist()) for c in alone] == [
        (c.bin_ms, c.server_names, c.values.tolist()) for c in together
    ]
    assert other.due(at(1e6)) == [] and other.taken_bin_ms == due[-1]
    assert cells(one) == cells(other)


def test_bins_of_many_rows_do_not_close_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetcast.serving.history._CLOSE_ROWS", 3)
    bins = history()
    for number in range(4):
        bins.add(batch_of(("a", number * 300.0, 1.0), ("b", number * 300.0, 1.0)))
    assert [closed.bin_ms for closed in bins.close_first(bins.due(at(1e6)))] == [T0]
