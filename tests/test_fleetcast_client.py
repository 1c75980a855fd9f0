"""`Fleetcast` against a real service: frames in, frames out, and what it says where something is wrong."""

import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scripted_daemon import Reply, ScriptedDaemon
from test_inference import START, World

from fleetcast.client import FeedAnswer, Fleetcast
from fleetcast.clock import FakeClock, SystemClock
from fleetcast.errors import BadData, DaemonAway
from fleetcast.sources.client import DaemonClient, RequestRefused

CLOSED_PORT = "http://127.0.0.1:9"
BIN = pd.Timedelta(minutes=5)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, api_key="0123456789abcdef0123456789abcdef").start()
    yield world
    world.end()


@pytest.fixture
def fleet(world: World) -> Iterator[Fleetcast]:
    with Fleetcast(str(world.client.base_url), api_key=world.api_key, give_up_s=5.0) as fleet:
        yield fleet


def frame(*servers: str, bins: int = 2, first: int = 0) -> pd.DataFrame:
    """Return a record a bin and server: cpu_pct is 10 + the number of the bin."""
    numbers = np.arange(first, first + bins)
    return pd.concat(
        pd.DataFrame(
            {"timestamp": START + numbers * BIN, "server_name": name, "cpu_pct": 10.0 + numbers, "mem_pct": 5}
        )
        for name in servers
    ).sort_values("timestamp", ignore_index=True)


def grow(world: World, fleet: Fleetcast, *servers: str, bins: int = 16) -> None:
    for number in range(bins + 1):
        assert fleet.feed(frame(*servers, bins=1, first=number)) == FeedAnswer(len(servers), 0)
        world.service.cycle()


def stored(world: World) -> pd.DataFrame:
    world.service._buffer.flush()
    return world.service._buffer.get_training_window(days=365 * 50, include_today=True)


def test_what_was_fed_is_stored_once_however_often_it_is_sent(world: World, fleet: Fleetcast) -> None:
    records = frame("a", "b", bins=1)
    for _ in range(2):
        assert fleet.feed(records) == FeedAnswer(2, 0)
    kept = stored(world).sort_values("server_name", ignore_index=True)
    assert kept.server_name.tolist() == ["a", "b"]
    assert kept.cpu_pct.tolist() == [10.0, 10.0]


def test_the_forecasts_of_the_fleet_are_those_of_each_server(
    world: World, fleet: Fleetcast, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fleet.forecasts().empty
    grow(world, fleet, "a", "b", "c")
    fleet.feed(frame("new", bins=1, first=17))
    monkeypatch.setattr("fleetcast.client._SHARE_SERVERS", 2)
    found = fleet.forecasts()
    assert sorted(found.server_name.unique()) == ["a", "b", "c"]
    for server in ("a", "b", "c"):
        own = fleet.forecast(server)
        of_fleet = found[found.server_name == server].drop(columns="server_name").reset_index(drop=True)
        of_fleet = of_fleet.astype({"metric": own.metric.dtype, "source": own.source.dtype})
        pd.testing.assert_frame_equal(of_fleet[own.columns], own, check_dtype=False, rtol=1e-4)


def test_an_answer_that_is_no_table_is_an_error_of_the_daemon() -> None:
    with (
        ScriptedDaemon() as daemon,
        DaemonClient(daemon.url) as client,
        pytest.raises(DaemonAway, match="not answer with an Arrow table"),
    ):
        client.table("/status")


@pytest.mark.parametrize("has_arrow", [True, False])
def test_nan_is_absent_and_a_refused_row_is_named_by_its_place_over_all_pieces(
    world: World, fleet: Fleetcast, monkeypatch: pytest.MonkeyPatch, has_arrow: bool
) -> None:
    monkeypatch.setattr("fleetcast.client._PIECE_ROWS", 3)
    monkeypatch.setattr("fleetcast.client._JSON_ROWS", 3)
    if not has_arrow:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    records = frame(*"abcdefgh", bins=1)
    records.loc[1, "cpu_pct"] = np.nan
    records.loc[5, "cpu_pct"] = 5000.0
    answer = fleet.feed(records)
    assert (answer.received, answer.rejected, answer.rows) == (7, 1, (5,))
    assert answer.errors == ("cpu_pct: must lie in -1..1000, got 5000",)
    monkeypatch.undo()
    kept = stored(world).set_index("server_name")
    assert np.isnan(kept.cpu_pct["b"])
    assert (kept.mem_pct == 5.0).all()


@pytest.mark.parametrize("has_arrow", [True, False])
def test_times_may_be_an_index_text_or_without_a_zone_and_text_columns_stay_here(
    world: World, fleet: Fleetcast, monkeypatch: pytest.MonkeyPatch, has_arrow: bool
) -> None:
    if not has_arrow:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    records = frame("a", bins=1)
    assert fleet.feed(records.set_index("timestamp")).received == 1
    assert fleet.feed(records.assign(timestamp=records.timestamp.dt.tz_localize(None))).received == 1
    text = records.timestamp.map(lambda at: at.isoformat())
    odd = records.assign(timestamp=text, server_name=pd.Categorical(["a"]), rack="r1", Rack=3)
    assert fleet.feed(odd) == FeedAnswer(1, 0)
    moments = pd.Series([START.to_pydatetime()], dtype=object)
    assert fleet.feed(records.assign(timestamp=moments)) == FeedAnswer(1, 0)
    monkeypatch.undo()
    assert len(stored(world)) == 1
    assert fleet.feed(records.iloc[:0]) == FeedAnswer(0, 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.rename(columns={"server_name": "host"}), "no column 'server_name' .it has .*host"),
        (lambda f: f.drop(columns="timestamp"), "no column 'timestamp'"),
        (lambda f: f.assign(timestamp=1.7e9), "timestamp must be times .*float64 .pd.to_datetime"),
        (lambda f: f.assign(server_name=7), "server_name must be text, got int64"),
        (lambda f: f.assign(up=True), "column 'up' must be numbers, it holds boolean"),
        (lambda f: f.assign(up=[1.0, "x"]), "column 'up' must be numbers, it holds mixed"),
        (lambda f: f[["timestamp", "server_name"]], "no column of numbers with a metric's name"),
        (lambda f: pd.concat([f, f[["cpu_pct"]]], axis=1), "column 'cpu_pct' twice"),
        (lambda f: f.to_dict("list"), "feed takes a DataFrame, got dict"),
    ],
)
def test_a_frame_that_cannot_be_records_is_refused_with_what_would_be_right(change: Any, says: str) -> None:
    with Fleetcast(CLOSED_PORT) as fleet, pytest.raises(BadData, match=says):
        fleet.feed(change(frame("a")))


def test_a_body_that_the_daemon_cannot_take_is_bad_data(world: World, fleet: Fleetcast) -> None:
    dates = frame("a").assign(timestamp=pd.Series([START.date()] * 2, dtype=object))
    with pytest.raises(BadData, match="timestamp must be an Arrow timestamp or ISO 8601 text, got date32"):
        fleet.feed(dates)


def test_a_forecast_is_a_row_for_each_metric_and_bin(world: World, fleet: Fleetcast) -> None:
    fleet.feed(frame("a", bins=1))
    assert fleet.forecast("a").empty  # its first bin is open
    fleet.feed(frame("a", bins=1, first=1))
    world.service.cycle()
    told = fleet.forecast("a")
    assert list(told.columns) == ["timestamp", "metric", "p10", "p50", "p90", "source"]
    cpu = told[told.metric == "cpu_pct"]
    assert cpu.p50.tolist() == [10.0] * 96
    assert (cpu.timestamp.iloc[0], set(cpu.source)) == (START + BIN, {"fallback"})
    assert cpu.timestamp.diff().dropna().eq(BIN).all()


def test_history_is_what_was_and_what_was_said_of_it_over_any_length(
    world: World, fleet: Fleetcast, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow(world, fleet, "a")
    past = fleet.history("a", "cpu_pct", START, "2020-01-01T01:20:00Z")
    assert past.index[0] == START
    assert past.actual.tolist() == [10.0 + number for number in range(16)]
    assert past["p50_1"].tolist()[1:] == past.actual.tolist()[:-1]  # the last value, repeated
    assert np.isnan(past["p50_1"].iloc[0])
    monkeypatch.setattr("fleetcast.client._MOST_BINS", 5)
    pd.testing.assert_frame_equal(
        fleet.history("a", "cpu_pct", START, datetime(2030, 1, 1, tzinfo=UTC)), past
    )
    assert fleet.history("a", "cpu_pct").actual.dropna().tolist() == past.actual.tolist()


def test_accuracy_is_a_row_for_each_metric_and_horizon_or_for_the_worst_series(
    world: World, fleet: Fleetcast
) -> None:
    grow(world, fleet, "a", "b")
    told = fleet.accuracy(metric="cpu_pct")
    assert told.iloc[0].to_dict() == {
        **{"server": None, "metric": "cpu_pct", "horizon": 1, "bins": 30, "error": 1.0},
        **{"last_value_error": 1.0, "ratio": 1.0, "inside": told.inside[0]},
    }
    assert set(fleet.accuracy("a", ["cpu_pct"]).server) == {"a"}
    worst = fleet.accuracy(metric="cpu_pct", worst=1)
    assert (len(worst), list(worst.columns)) == (1, list(told.columns))


def test_capacity_says_who_is_over_and_by_which_source(world: World, fleet: Fleetcast) -> None:
    for number in range(4):
        world.client.headers["X-API-Key"] = world.api_key
        assert world.post(("high", number, 93.0), ("low", number, 3.0)).status_code == 200
        world.service.cycle()
    told = fleet.capacity()
    assert (told.server.tolist(), told.state.tolist(), told.now.tolist()) == (["high"], ["over"], [93.0])
    assert (told.since[0], told.since_or_before[0]) == (START, True)
    assert told.by.tolist() == ["history"]
    assert np.isnan(told.brier[0])  # nothing has settled
    assert fleet.capacity("low").server.tolist() == ["low"]
    with pytest.raises(BadData, match="limit must be one of 70, 80, 90, 95"):
        fleet.capacity(limit=85)
    with pytest.raises(BadData, match="no day of 'disk_usage_pct' is known"):
        fleet.full_by()


def test_what_was_said_has_its_columns_before_anything_settled(world: World, fleet: Fleetcast) -> None:
    grow(world, fleet, "web-01", bins=2)
    past = fleet.history("web-01", "cpu_pct")
    said = [f"p{part}_{bins}" for bins in (1, 12, 96) for part in (10, 50, 90)]
    assert past.columns.tolist() == ["actual", *said]
    assert past[said[3:]].isna().all(axis=None)


def test_full_by_has_dates_as_times() -> None:
    row = {"server": "a", "now": 70.0, "per_day": 1.5, "basis_days": 20, "p_within": 0.9, "within_days": 30}
    rows = [
        {**row, "full_between": ["2026-01-20", "2026-02-01"], "why_no_date": None},
        {**row, "full_between": None, "why_no_date": "the slope may be zero"},
    ]

    class Stub(Fleetcast):
        def _ask(self, path: str, **fields: Any) -> dict[str, Any]:
            return {"rows": rows}

    with Stub(CLOSED_PORT) as fleet:
        told = fleet.full_by()
    assert told.full_to[0] == pd.Timestamp("2026-02-01")
    assert pd.isna(told.full_from[1])
    assert told.why_no_date.fillna("").tolist() == ["", "the slope may be zero"]


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda fleet: fleet.forecast("web-1"), "unknown server 'web-1' .it sent nothing yet"),
        (lambda fleet: fleet.history("web-1", "cpu_pct"), "unknown server 'web-1', nearest is web-01"),
        (lambda fleet: fleet.history("web-01", "fans", START), "no server sent a metric 'fans'"),
        (lambda fleet: fleet.history("web-01", "cpu_pct", "soon"), "start must be ISO 8601 .*got 'soon'"),
        (lambda fleet: fleet.history("web-01", "cpu_pct", "2031-01-01"), "no closed bin between"),
        (lambda fleet: fleet.accuracy(metric="fans"), "'fans' is not forecast"),
        (lambda fleet: fleet.accuracy(worst=-1), "^worst: Input should be greater than or equal to 0$"),
        (lambda fleet: fleet.forecast(""), "server must be a name, got ''"),
        (lambda fleet: fleet.forecast(None), "server must be a name, got None"),
        (lambda fleet: fleet.history("web-01", ""), "metric must be a name, got ''"),
    ],
)
def test_what_the_daemon_does_not_know_is_bad_data_with_what_would_be_right(
    world: World, fleet: Fleetcast, ask: Any, says: str
) -> None:
    grow(world, fleet, "web-01", bins=2)
    with pytest.raises(BadData, match=says):
        ask(fleet)


def test_a_wrong_key_and_a_wrong_address_are_told_at_once(world: World) -> None:
    with Fleetcast(str(world.client.base_url), api_key="no") as fleet:
        with pytest.raises(RequestRefused, match="set TFT_API_KEY"):
            fleet.forecast("a")
        with pytest.raises(RequestRefused, match="set TFT_API_KEY"):
            fleet.feed(frame("a"))
    for address in ("localhost:8000", "http://[::1", 5):
        with pytest.raises(BadData, match="must look like http"):
            Fleetcast(address)  # type: ignore[arg-type]


def test_the_example_of_the_documents_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    feeding, asking = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    world = World(tmp_path)
    world.clock = FakeClock(SystemClock().now())
    world.start()
    try:
        names: dict[str, Any] = {}
        exec(feeding.replace("http://localhost:8000", str(world.client.base_url)), names)
        assert names["answer"] == FeedAnswer(2880, 0)
        world.service.cycle()
        exec(asking, names)
    finally:
        world.end()
    assert (len(names["cpu"]), names["cpu"].index.tz) == (96, UTC)
    assert names["error_1h"] < 10
    assert "no day of 'disk_usage_pct' is known" in capsys.readouterr().out


def test_a_refusal_is_never_repeated_a_busy_daemon_is() -> None:
    for status in (400, 401, 404, 409):
        with ScriptedDaemon(Reply(status, "no")) as daemon, Fleetcast(daemon.url) as fleet:
            with pytest.raises(RequestRefused):
                fleet.feed(frame("a"))
            assert len(daemon.headers) == 1
    replies = (Reply(503, "busy", {"Retry-After": "0"}), Reply(429, "held", {"Retry-After": "0"}))
    with ScriptedDaemon(*replies) as daemon, Fleetcast(daemon.url) as fleet:
        assert fleet.feed(frame("a", bins=8)) == FeedAnswer(8, 0)
        assert len(daemon.headers) == 3


def test_an_error_names_the_path_that_was_asked_for(fleet: Fleetcast) -> None:
    for fields, path in (
        ({}, "/nothing"),
        ({"server": None, "metric": ()}, "/nothing"),
        ({"n": 0}, "/nothing?n=0"),
    ):
        with pytest.raises(DaemonAway, match=f"{re.escape(path)} answered 404"):
            fleet._ask("/nothing", **fields)


def test_a_daemon_that_is_away_is_given_up_after_the_stated_time() -> None:
    with Fleetcast(CLOSED_PORT, give_up_s=0.5) as fleet:
        with pytest.raises(DaemonAway, match=r"does not answer: .*refused"):
            fleet.forecast("a")
        with pytest.raises(DaemonAway, match=r"does not answer: .*refused"):
            fleet.feed(frame("a"))
