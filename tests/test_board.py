"""The predictions document: exact JSON, encoded while it is read, fresh where that is cheap."""

import gc
import json
import os
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fleetcast.clock import FakeClock, iso_z, to_ms
from fleetcast.ingest.rules import to_significant
from fleetcast.schema import FleetForecast, Floats, RecordBatch
from fleetcast.serving import board as board_module
from fleetcast.serving.board import (
    ModelInfo,
    PredictionBoard,
    TooManyServers,
    UnknownServer,
    fleet_means,
)
from fleetcast.serving.roster import BadShare, Roster, share_of
from fleetcast.settings import ForecastSettings

BIN = 300_000
MODEL = ModelInfo("20260115T100005Z-3f2a", "2026-01-15T10:00:05Z", is_base=False)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def roster(clock: FakeClock) -> Roster:
    roster = Roster(ForecastSettings())
    add(roster, clock, "web-01", 12.5)
    add(roster, clock, "web-02", 30.0)
    return roster


def add(roster: Roster, clock: FakeClock, name: str, cpu: float) -> None:
    times = np.array([to_ms(clock.now())])
    roster.add(RecordBatch((name,), np.zeros(1, dtype=np.int32), times, {"cpu_pct": np.array([cpu])}))


def forecast(clock: FakeClock, names: tuple[str, ...] = ("web-01", "web-02")) -> FleetForecast:
    quantiles = np.full((len(names), 2, 3, 3), np.nan, dtype=np.float32)
    quantiles[:, 0] = np.array([10.123456, 20.0, 30.0], dtype=np.float32)
    sources = np.zeros((len(names), 2), dtype=bool)
    sources[0, 0] = True
    return FleetForecast(
        to_ms(clock.now()), BIN, names, ("cpu_pct", "mem_pct"), quantiles, sources, MODEL.version
    )


def document(board: PredictionBoard, *servers: str, **kwargs: bool) -> dict[str, Any]:
    value = json.loads(b"".join(board.document(servers, **kwargs)))
    assert isinstance(value, dict)
    return value


def test_before_any_record_the_document_is_valid_and_empty(clock: FakeClock) -> None:
    board = PredictionBoard(Roster(ForecastSettings()), clock)
    assert b"".join(board.document()) == b'{"timestamp":"2026-01-15T10:00:00Z","model":null,"predictions":{}}'


def test_before_a_sweep_servers_are_warming_up(clock: FakeClock, roster: Roster) -> None:
    assert document(PredictionBoard(roster, clock))["predictions"]["web-01"] == {
        "current": {"cpu_pct": 12.5},
        "forecast": None,
        "timestamps": [],
        "source": "warming_up",
        "sources": {},
        "stale": False,
    }


def test_after_a_sweep_each_server_has_its_forecast(clock: FakeClock, roster: Roster) -> None:
    board = PredictionBoard(roster, clock)
    board.publish(forecast(clock), MODEL)
    answer = document(board)
    assert answer["model"] == {
        "version": "20260115T100005Z-3f2a", "trained_at": "2026-01-15T10:00:05Z", "base": False,
    }  # fmt: skip
    assert answer["predictions"]["web-01"] == {
        "current": {"cpu_pct": 12.5},
        "forecast": {"cpu_pct": {"p10": [10.123] * 3, "p50": [20.0] * 3, "p90": [30.0] * 3}},
        "timestamps": ["2026-01-15T10:05:00Z", "2026-01-15T10:10:00Z", "2026-01-15T10:15:00Z"],
        "source": "model",
        "sources": {"cpu_pct": "model"},
        "stale": False,
    }
    assert answer["predictions"]["web-02"]["source"] == "fallback"
    assert answer["predictions"]["web-02"]["sources"] == {"cpu_pct": "fallback"}


def test_a_document_costs_by_what_servers_sent_and_not_by_what_the_fleet_knows(clock: FakeClock) -> None:
    roster = Roster(ForecastSettings())
    names = tuple(f"s{number}" for number in range(1_000))
    times = np.full(len(names), to_ms(clock.now()))
    codes = np.arange(len(names), dtype=np.int32)
    metrics = {f"m{number}": np.where(codes == number, 1.5, np.nan) for number in range(512)}
    roster.add(RecordBatch(names, codes, times, metrics))
    board = PredictionBoard(roster, clock)
    board.document()
    tracemalloc.start()

    found = json.loads(b"".join(board._join((), only_current=True)))

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found["predictions"]["s7"]["current"] == {"m7": 1.5}
    assert peak < 8e6, "the numbers of all servers and metrics as objects are over 16 MB"


def test_the_source_is_told_per_metric_where_a_model_knows_some_metrics_only(
    clock: FakeClock, roster: Roster
) -> None:
    board = PredictionBoard(roster, clock)
    swept = forecast(clock)
    swept.quantiles[:, 1] = 50.0  # mem_pct, for which no server has a model

    board.publish(swept, MODEL)

    told = document(board)["predictions"]
    assert told["web-01"]["source"] == "model"
    assert told["web-01"]["sources"] == {"cpu_pct": "model", "mem_pct": "fallback"}
    assert told["web-02"]["sources"] == {"cpu_pct": "fallback", "mem_pct": "fallback"}


def test_server_narrows_the_document(clock: FakeClock, roster: Roster) -> None:
    board = PredictionBoard(roster, clock)
    board.publish(forecast(clock), None)
    assert list(document(board, "web-02")["predictions"]) == ["web-02"]
    assert list(document(board, "web-02", "web-01", "web-02")["predictions"]) == ["web-02", "web-01"]


def test_current_leaves_the_forecasts_out(clock: FakeClock, roster: Roster) -> None:
    board = PredictionBoard(roster, clock)
    board.publish(forecast(clock), MODEL)
    assert document(board, only_current=True)["predictions"]["web-01"] == {
        "current": {"cpu_pct": 12.5}, "source": "model", "stale": False,
    }  # fmt: skip


def test_an_unknown_server_is_named(clock: FakeClock, roster: Roster) -> None:
    with pytest.raises(UnknownServer, match="'web-03'"):
        PredictionBoard(roster, clock).document(["web-01", "web-03"])


def test_shares_of_a_fleet_are_equal_and_together_the_whole(clock: FakeClock) -> None:
    roster = Roster(ForecastSettings())
    for number in range(200):
        add(roster, clock, f"web-{number:03}", 1.0)
    board = PredictionBoard(roster, clock, 60)
    with pytest.raises(TooManyServers, match=r"200 servers .* at most 60 \(ask for shares, \?shard=0/8"):
        board.document()
    assert len(json.loads(b"".join(board.document(only_current=True)))["predictions"]) == 200
    shares = [
        list(json.loads(b"".join(board.document(share=(which, 8))))["predictions"]) for which in range(8)
    ]
    assert sorted(name for share in shares for name in share) == [f"web-{number:03}" for number in range(200)]
    assert max(map(len, shares)) < 45
    with pytest.raises(TooManyServers):
        board.document(share=(0, 1))


@pytest.mark.parametrize(
    "text", ["", "1", "1/1", "2/1", "0/0", "-1/2", "1/2/3", "\u0661/\u0662", "1/2 ", "0x1/2", "a/b"]
)
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(BadShare, match="K from 0 to N - 1"):
        share_of(text)


def test_a_share_of_named_servers_is_refused() -> None:
    assert share_of(None, ["a"]) is None
    with pytest.raises(BadShare, match="exclude each other"):
        share_of("0/2", ["a"])


def test_new_values_show_between_sweeps(clock: FakeClock, roster: Roster) -> None:
    board = PredictionBoard(roster, clock)
    board.publish(forecast(clock), MODEL)
    document(board)
    add(roster, clock, "web-01", 99.0)
    assert document(board)["predictions"]["web-01"]["current"] == {"cpu_pct": 99.0}


def test_an_unchanged_document_is_not_encoded_again(clock: FakeClock, roster: Roster) -> None:
    board = PredictionBoard(roster, clock)
    assert board.document() is board.document()
    assert board.document(only_current=True) is board.document(only_current=True)


def test_a_costly_document_may_be_some_of_its_joining_times_old(
    clock: FakeClock, roster: Roster, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall = iter(
        [0.0, 1.0, 1.0, 10.0, 21.5, 30.0, 31.0, 31.0]
    )  # started, made, cost; asked; asked, started ...
    monkeypatch.setattr(board_module, "monotonic", lambda: next(wall))
    board = PredictionBoard(roster, clock)
    first = board.document()
    add(roster, clock, "web-01", 99.0)
    assert board.document() is first
    assert board.document() is not first


def test_stale_and_gone_come_with_time(clock: FakeClock, roster: Roster) -> None:
    board = PredictionBoard(roster, clock)
    board.publish(forecast(clock), MODEL)
    clock.advance(minutes=31)
    assert document(board, "web-01")["predictions"]["web-01"]["stale"] is True
    clock.advance(days=1)
    with pytest.raises(UnknownServer):
        document(board, "web-01")


def test_names_that_need_escaping_stay_whole(clock: FakeClock) -> None:
    roster = Roster(ForecastSettings())
    name = 'we"b\\01 é日'
    add(roster, clock, name, 1.0)
    board = PredictionBoard(roster, clock)
    board.publish(forecast(clock, (name,)), None)
    assert list(document(board)["predictions"]) == [name]


def test_a_forecast_that_is_not_finite_is_left_out(clock: FakeClock, roster: Roster) -> None:
    board = PredictionBoard(roster, clock)
    made = forecast(clock)
    made.quantiles[1, 0, 1, 2] = np.inf
    made.quantiles[1, 1] = 5.0
    board.publish(made, MODEL)
    assert list(document(board)["predictions"]["web-02"]["forecast"]) == ["mem_pct"]


def test_the_whole_fleet_may_be_silent_and_is_still_told(clock: FakeClock, roster: Roster) -> None:
    board = PredictionBoard(roster, clock)
    clock.time += timedelta(hours=2)
    assert all(item["stale"] for item in document(board)["predictions"].values())


def test_the_means_of_the_fleets_hours_leave_silent_servers_and_broken_series_out() -> None:
    quantiles = np.zeros((3, 3, 26, 3), np.float32)  # 26 bins: two hours and a rest
    quantiles[:, 1, :12, 1], quantiles[:, 1, 12:, 1] = [[10], [30], [99]], [[20], [41], [99]]
    quantiles[:, 2, :, 1] = 50.0
    quantiles[1, 2, 25, 1] = np.nan  # in the rest that counts for nothing
    quantiles[0, 2, 3, 1] = np.nan
    names, metrics = ("a", "b", "silent"), ("net", "cpu_pct", "mem_pct")
    made = FleetForecast(0, BIN, names, metrics, quantiles, np.ones((3, 3), np.bool_), None)
    assert fleet_means(made, {"silent"}) == {
        "start": "1970-01-01T00:05:00Z",
        "step_s": 3600.0,
        "cpu_pct": [20.0, 30.5],
        "mem_pct": [50.0, 50.0],
    }
    assert fleet_means(made, set(names)) is None
    assert fleet_means(replace(made, metrics=("net", "in", "out"))) is None
    hourly = replace(made, bin_ms=7_200_000)
    assert fleet_means(hourly, {"silent"})["step_s"] == 7200.0  # type: ignore[index]
    short = replace(made, quantiles=quantiles[:, :, :11])
    assert fleet_means(short) is None, "not even an hour"


def test_a_server_that_fell_silent_is_not_in_the_fleets_hours(clock: FakeClock, roster: Roster) -> None:
    board = PredictionBoard(roster, clock)
    assert board.outlook.fleet is None
    quantiles = np.full((2, 2, 12, 3), 20.0, np.float32)
    quantiles[1] = 40.0
    made = replace(forecast(clock), quantiles=quantiles)
    for is_silent, mean in ((False, 30.0), (True, 40.0)):
        if is_silent:
            clock.advance(hours=1)
            add(roster, clock, "web-02", 30.0)
        board.publish(made, MODEL)
        assert board.outlook.fleet is not None
        assert board.outlook.fleet["cpu_pct"] == [mean]


def fleet_of(clock: FakeClock, n_servers: int) -> tuple[Roster, FleetForecast]:
    """Servers with a day of four metrics each: 3 KB of numbers, 7 KB of JSON."""
    names = tuple(f"web-{number:04}" for number in range(n_servers))
    roster = Roster(ForecastSettings())
    codes, times = np.arange(n_servers, dtype=np.int32), np.full(n_servers, to_ms(clock.now()))
    roster.add(RecordBatch(names, codes, times, {"cpu_pct": np.full(n_servers, 12.5)}))
    quantiles = np.random.default_rng(1).uniform(10, 90, (n_servers, 4, 96, 3)).astype(np.float32)
    sources = np.ones((n_servers, 4), np.bool_)
    made = FleetForecast(to_ms(clock.now()), BIN, names, ("a", "b", "c", "d"), quantiles, sources, "v")
    return roster, made


def test_neither_a_sweep_nor_a_reader_keeps_the_json_of_a_large_fleet(clock: FakeClock) -> None:
    roster, made = fleet_of(clock, 2000)
    board = PredictionBoard(roster, clock)
    tracemalloc.start()
    board.publish(made, MODEL)
    published, _ = tracemalloc.get_traced_memory()
    n_bytes = sum(len(piece) for piece in board.document())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n_bytes > 14e6
    assert published < 1.5e6, "names, sources and the highest values"
    assert peak < published + 6e6, "the newest 512 servers"


def test_readers_at_one_time_share_what_is_encoded(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []

    def count(values: Floats, digits: int) -> Floats:
        encoded.append(1)
        return to_significant(values, digits)

    monkeypatch.setattr(board_module, "to_significant", count)
    roster, made = fleet_of(clock, 300)
    board = PredictionBoard(roster, clock)
    board.publish(made, MODEL)
    documents = [
        b"".join(pieces) for pieces in (board.document(), board.document(), board.document(["web-0007"]))
    ]
    assert documents[0] == documents[1]
    assert json.loads(documents[2])["predictions"].keys() == {"web-0007"}
    assert len(encoded) == 300


def test_two_readers_of_one_document_each_get_it_whole(clock: FakeClock) -> None:
    roster, made = fleet_of(clock, 10)
    board = PredictionBoard(roster, clock)
    board.publish(made, MODEL)
    first, second = iter(board.document()), iter(board.document())
    together = list(zip(first, second, strict=True))
    assert all(one == other for one, other in together)
    json.loads(b"".join(one for one, _ in together))


def test_a_sweep_is_freed_when_the_next_one_is_published_and_its_last_reader_is_done(
    clock: FakeClock,
) -> None:
    roster, made = fleet_of(clock, 10)
    board = PredictionBoard(roster, clock)
    board.publish(made, MODEL)
    reader = iter(board.document())
    next(reader)
    freed = weakref.ref(made.quantiles)
    _, made = fleet_of(clock, 10)
    gc.disable()
    try:
        board.publish(made, MODEL)
        assert freed() is not None
        assert b"".join(reader).endswith(b"}}"), "it reads on"
        del reader
        assert freed() is None, "without the collector of cycles, which may come late"
    finally:
        gc.enable()


def read_table(pieces: Iterable[bytes]) -> pa.Table:
    return pa.ipc.open_stream(b"".join(pieces)).read_all()


def test_the_table_says_what_the_document_says(clock: FakeClock, roster: Roster) -> None:
    board = PredictionBoard(roster, clock)
    add(roster, clock, "new", 5.0)
    board.publish(forecast(clock), MODEL)
    told = json.loads(b"".join(board.document()))
    table = read_table(board.table())
    rows = {(row["server_name"], row["metric"]): row for row in table.to_pylist()}
    assert [name for name, _ in rows] == list(told["predictions"])
    for (name, metric), row in rows.items():
        said = told["predictions"][name]
        assert row["current"] == said["current"][metric]
        assert row["stale"] == said["stale"]
        if said["forecast"] is None:
            assert (row["source"], row["p10"], row["start"]) == ("warming_up", None, None)
            continue
        assert row["source"] == said["sources"][metric]
        for quantile in ("p10", "p50", "p90"):
            assert row[quantile] == pytest.approx(said["forecast"][metric][quantile], rel=1e-4)
        assert iso_z(row["start"]) == said["timestamps"][0]
        assert row["step_s"] == 300.0
    assert json.loads(table.schema.metadata[b"model"]) == told["model"]
    assert json.loads(table.schema.metadata[b"timestamp"]) == told["timestamp"]


def test_a_table_takes_a_fleet_of_any_size_in_batches_and_a_share_of_it(
    clock: FakeClock, roster: Roster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board_module, "_BATCH_SERVERS", 2)
    board = PredictionBoard(roster, clock, max_servers=1)
    for number in range(3):
        add(roster, clock, f"db-{number}", 1.0)
    names = ("web-01", "db-0", "web-02", "db-2")
    board.publish(forecast(clock, names), MODEL)
    with pytest.raises(TooManyServers, match="Arrow"):
        board.document()
    table = read_table(board.table())
    assert table.column("server_name").to_pylist() == ["web-01", "web-02", "db-0", "db-1", "db-2"]
    assert [row is None for row in table.column("p50").to_pylist()] == [False, False, False, True, False]
    shares = [read_table(board.table(share=(which, 2))).column("server_name").to_pylist() for which in (0, 1)]
    assert sorted(shares[0] + shares[1]) == sorted(table.column("server_name").to_pylist())
    assert read_table(board.table(["db-2"])).column("server_name").to_pylist() == ["db-2"]
    with pytest.raises(UnknownServer):
        board.table(["gone"])


def test_a_table_of_current_values_has_no_forecasts_and_an_empty_one_has_its_columns(
    clock: FakeClock, roster: Roster
) -> None:
    board = PredictionBoard(roster, clock)
    only_current = read_table(board.table(only_current=True))
    assert only_current.column_names == ["server_name", "metric", "current", "source", "stale"]
    assert only_current.column("source").to_pylist() == ["warming_up", "warming_up"]
    assert read_table(board.table()).column("p50").null_count == 2
    empty = read_table(PredictionBoard(Roster(ForecastSettings()), clock).table())
    assert empty.num_rows == 0
    assert empty.column_names[-3:] == ["p10", "p50", "p90"]


def test_a_metric_without_a_whole_forecast_is_null_in_the_table(clock: FakeClock, roster: Roster) -> None:
    board = PredictionBoard(roster, clock)
    times = np.array([to_ms(clock.now())])
    roster.add(RecordBatch(("web-01",), np.zeros(1, np.int32), times, {"mem_pct": np.array([7.0])}))
    board.publish(forecast(clock), MODEL)
    row = next(row for row in read_table(board.table()).to_pylist() if row["metric"] == "mem_pct")
    assert (row["current"], row["source"], row["p50"], row["start"]) == (7.0, None, None, None)


def test_a_table_loads_no_pandas_into_the_daemon() -> None:
    code = """if True:
        import sys
        from test_board import *
        clock, roster = FakeClock(), Roster(ForecastSettings())
        add(roster, clock, "web-01", 1.0)
        board = PredictionBoard(roster, clock)
        early = b"".join(board.table())
        board.publish(forecast(clock), MODEL)
        assert len(b"".join(board.table())) > len(early)
        assert "pandas" not in sys.modules
    """
    here = Path(__file__).parent
    path = {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=here, env=path, timeout=60)
