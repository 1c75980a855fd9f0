"""The page over a real service: history, fleet, keys, headers, hostile names; its files stay local."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from test_inference import World

from benchmarks.programs import wait_for
from fleetcast.api.page import HISTORY, POLICY, UI_FOLDER, read_files
from fleetcast.console.daemon import STATES as CONSOLE_STATES
from fleetcast.serving.capacity import Nearness
from fleetcast.serving.journal import DECISIONS_FILE, DRIFT_FILE, STATE_FILE
from fleetcast.serving.overview import STATES

HOSTILE = ("<img src=x onerror=alert(1)>", "a/../b?c=d&e#f", "..", "x\"'`${y}", "n" * 128)
DATA_PATHS = (
    "/history?server=a", "/ui/api/pulse", "/ui/api/strip", "/ui/api/fleet", "/ui/api/server?name=a",
    "/ui/api/drift", "/ui/api/trainings", "/ui/api/health",
)  # fmt: skip
FILES = sorted(path for path in UI_FOLDER.rglob("*") if path.is_file())
OURS = [path for path in FILES if path.parent == UI_FOLDER]


def run(world: World, *names: str, bins: int = 4) -> None:
    """Let servers send one value a bin; the last bin stays open."""
    for number in range(bins + 1):
        assert world.post(*((name, number, 10.0 + number) for name in names)).status_code == 200
        world.service.cycle()


def refusal(world: World, path: str, code: int) -> str:
    answer = world.client.get(path)
    assert answer.status_code == code, answer.text
    detail = answer.json()["detail"]
    return detail if isinstance(detail, str) else json.dumps(detail)


def test_the_past_of_a_server_has_its_bins_and_what_was_said_of_them(world: World) -> None:
    run(world, "a", "b")
    told = world.get("/history?server=a&metric=cpu_pct&start=2020-01-01T00:00:00Z")
    assert told.keys() == set(HISTORY["required"])
    assert (told["server"], told["bin_s"], told["source"]) == ("a", 300, "memory")
    assert (told["start"], told["end"]) == ("2020-01-01T00:00:00Z", "2020-01-01T00:20:00Z")
    cpu = told["metrics"]["cpu_pct"]
    assert cpu["actual"] == [10.0, 11.0, 12.0, 13.0]
    assert cpu["said"]["1"]["p50"][:2] == [None, 10.0]  # the naive forecast repeats the last value
    accuracy = cpu["accuracy"]["1"]
    assert (accuracy["bins"], accuracy["last_value_error"]) == (3, 1.0)
    assert accuracy["ratio"] == pytest.approx(accuracy["error"])


def test_without_a_start_the_past_is_two_days_of_every_forecast_metric(world: World) -> None:
    run(world, "a", bins=1)
    told = world.get("/history?server=a")
    assert (told["start"], told["end"]) == ("2019-12-30T00:05:00Z", "2020-01-01T00:05:00Z")
    assert list(told["metrics"]) == ["cpu_pct", "mem_pct", "disk_io_mb_s", "latency_ms"]
    assert told["metrics"]["cpu_pct"]["actual"][-2:] == [None, 10.0]
    assert set(told["metrics"]["mem_pct"]["actual"]) == {None}


def test_a_metric_that_is_not_forecast_comes_from_the_buffer(world: World) -> None:
    for number in range(3):
        records = [
            {"timestamp": f"2020-01-01T00:{5 * number:02}:0{second}Z", "server_name": "a", "fans": second}
            for second in (1, 2)
        ]
        world.client.post("/feed/data", json={"records": records})
        world.service.cycle()
    told = world.get("/history?server=a&metric=fans&start=2020-01-01T00:00:00Z")
    assert told["source"] == "buffer"
    assert told["metrics"]["fans"] == {"actual": [1.5, 1.5], "said": {}, "accuracy": {}}


def test_what_cannot_be_answered_is_refused_with_what_would_be_right(world: World) -> None:
    run(world, "a", bins=1)
    assert "unknown server 'nowhere'" in refusal(world, "/history?server=nowhere", 404)
    assert "unknown server 'nowhere'" in refusal(world, "/ui/api/server?name=nowhere", 404)
    assert "no server sent a metric 'fans'" in refusal(world, "/history?server=a&metric=fans", 422)
    assert "start must be ISO 8601" in refusal(world, "/history?server=a&start=yesterday", 422)
    assert "end must be ISO 8601" in refusal(world, "/history?server=a&end=2020-13-01T00:00:00Z", 422)
    for start, end in (("2020-01-01T00:00:10Z", "2020-01-01"), ("2020-01-01", "2020-01-01T00:00Z")):
        told = refusal(world, f"/history?server=a&start={start}&end={end}", 422)
        assert f"end must be after start, got end '{end}' and start '{start}'" in told
    assert "at most 31 days" in refusal(world, "/history?server=a&start=2019-01-01T00:00:00Z", 422)
    assert "no closed bin" in refusal(world, "/history?server=a&start=9999-01-01T00:00:00Z", 422)
    assert "unknown field" in refusal(world, "/history?server=a&from=2020-01-01", 422)
    assert "cannot sort by 'no_such'" in refusal(world, "/ui/api/fleet?sort=no_such", 422)
    assert "200" in refusal(world, "/ui/api/fleet?limit=201", 422)
    assert "unknown field" in refusal(world, "/ui/api/strip?limit=1", 422)
    assert "no name of a metric" in refusal(world, f"/ui/api/capacity/dates?metric={'x' * 5000}", 422)


@pytest.mark.parametrize(
    "stretch",
    [
        "start=2019-12-30&end=2020-01-01T00:00:00Z",
        "end=0001-01-01T00:00:00Z",
        "start=1013-02-03&end=1013-02-04",
        "start=1969-12-31&end=1970-01-01",
    ],
)
def test_before_the_oldest_record_no_server_is_known(world: World, stretch: str) -> None:
    run(world, "a", bins=1)
    told = refusal(world, f"/history?server=a&metric=cpu_pct&{stretch}", 404)
    assert "'a' sent nothing between start and end" in told
    assert "the oldest record of any server is of 2020-01-01T00:00:00Z" in told


def test_a_known_server_that_paused_has_a_past_of_nulls(world: World) -> None:
    run(world, "a", bins=1)
    run(world, "b", bins=4)
    told = world.get("/history?server=a&metric=cpu_pct&start=2020-01-01T00:10Z&end=2020-01-01T00:20Z")
    assert told["metrics"]["cpu_pct"]["actual"] == [None, None]


def test_no_refusal_of_a_question_repeats_more_than_the_start_of_a_long_one(world: World) -> None:
    run(world, "web-01", bins=2)
    long = "x" * 5000
    paths = world.client.get("/openapi.json").json()["paths"]
    asked = [
        path.replace(f"{{{parameter['name']}}}", long)
        + ("" if parameter["in"] == "path" else f"?{parameter['name']}={long}")
        for path, ways in paths.items()
        for parameter in [{"in": "query", "name": long}, *ways.get("get", {}).get("parameters", ())]
        if "get" in ways and parameter["in"] in ("query", "path")
    ]
    asked.append(f"/history?server={long}&metric=cpu_pct")
    of_page = {
        "capacity": ("server", "metric"),
        "capacity/dates": ("server", "metric"),
        "server": ("name",),
        "fleet": ("sort", "order", "filter", "state", "offset", "limit"),
        "drift": ("days",),
    }
    asked += [f"/ui/api/{path}?{name}={long}" for path, names in of_page.items() for name in names]
    assert len(asked) > 30
    for path in asked:
        answer = world.client.get(path)
        assert "x" * 129 not in answer.text, (path[:60], answer.status_code, answer.text[:300])


def test_too_many_values_at_once_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetcast.serving.past.MOST_VALUES", 1000)
    run(world, "a", bins=1)
    assert "over the limit of 1000 values" in refusal(world, "/history?server=a", 422)
    assert world.client.get("/history?server=a&metric=cpu_pct").status_code == 200


def test_an_offset_whose_plus_was_not_encoded_is_understood(world: World) -> None:
    run(world, "a")
    told = world.get("/history?server=a&metric=cpu_pct&start=2020-01-01T01:05:00+01:00")
    assert told["start"] == "2020-01-01T00:05:00Z"


def test_the_fleet_is_sorted_filtered_and_paged_by_the_daemon(world: World) -> None:
    world.post(("b", 0, 20.0), ("a", 0, 30.0), ("c", 0, 99.0), ("web", 0, 1.0))
    world.post(("b", 1, 20.0), ("a", 1, 30.0), ("c", 1, 99.0))
    world.service.cycle()

    def names(query: str) -> list[str]:
        return [row["server"] for row in world.get(f"/ui/api/fleet?{query}")["rows"]]

    assert names("") == ["a", "b", "c", "web"]
    assert names("order=desc") == ["web", "c", "b", "a"]
    assert names("sort=cpu_pct&order=desc") == ["c", "a", "b", "web"]
    assert names("sort=cpu_pct.peak&order=asc") == ["web", "b", "a", "c"]
    assert names("sort=mem_pct") == ["a", "b", "c", "web"]  # unknown values: by name
    assert names("filter=WE") == ["web"]
    assert names("state=is-high") == ["c"]
    assert names("offset=1&limit=2") == ["b", "c"]
    first = world.get("/ui/api/fleet?limit=1")
    assert (first["servers"], first["matching"], first["horizon_s"]) == (4, 4, 96 * 300)
    assert first["rows"][0]["current"]["cpu_pct"] == 30.0
    assert first["rows"][0]["peak"]["mem_pct"] is None


def test_the_strip_has_a_byte_for_each_server_in_order_of_names(world: World) -> None:
    world.post(("b", 0, 20.0), ("a", 0, 99.0))
    world.post(("b", 1, 20.0), ("new", 1, 9.0))
    world.service.cycle()
    strip = world.get("/ui/api/strip")
    states = [strip["states"][byte] for byte in base64.b64decode(strip["bytes"])]
    assert states == ["is-high", "calm", "warming-up"]
    assert strip["counts"] == {**dict.fromkeys(STATES, 0), "is-high": 1, "calm": 1, "warming-up": 1}


def test_who_is_over_the_limit_already_does_not_get_high(world: World) -> None:
    world.post(("was", 0, 97.0), ("is", 0, 97.0), ("calm", 0, 5.0), ("gone", 0, 97.0))
    world.post(("was", 1, 40.0), ("is", 1, 97.0), ("calm", 1, 5.0))  # the bin is open: p90 still repeats 97
    world.service.cycle()
    states = {row["server"]: row["state"] for row in world.get("/ui/api/fleet")["rows"]}
    assert states == {"was": "gets-high", "is": "is-high", "calm": "calm", "gone": "is-high"}
    rows = {row["server"]: row["limit"] for row in world.get("/ui/api/fleet")["rows"]}
    assert [rows[name]["is_over"] for name in ("was", "is", "calm")] == [False, True, False]


def test_a_server_that_probably_passes_gets_high_and_stands_above_a_less_likely_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given: the p90 of a alone reaches 90, and b is the likeliest to pass it
    world.post(("a", 0, 97.0), ("b", 0, 5.0), ("c", 0, 5.0))
    world.post(("a", 1, 40.0), ("b", 1, 5.0), ("c", 1, 5.0))
    world.service.cycle()
    near = Nearness(np.array([0.15, 0.86, 0.49]), np.zeros(3, np.int64))
    monkeypatch.setattr("fleetcast.serving.capacity.Capacity.nearness", lambda *_: near)
    # When: the table is sorted by need
    rows = world.get("/ui/api/fleet?sort=state&order=desc")["rows"]
    # Then: b is not called calm, and comes first
    assert [(row["server"], row["state"]) for row in rows] == [
        ("b", "gets-high"), ("a", "gets-high"), ("c", "calm"),
    ]  # fmt: skip
    assert world.get("/ui/api/strip")["counts"]["gets-high"] == 2


def test_a_server_that_sends_no_forecast_metric_never_warms_up(world: World) -> None:
    for number in range(4):
        stamp = f"2020-01-01T00:{5 * number:02}:01Z"
        fans = {"timestamp": stamp, "server_name": "fans", "fans": 3.0}
        assert world.client.post("/feed/data", json={"records": [fans]}).status_code == 200
        world.service.cycle()  # before a first sweep, too
        assert world.get("/predictions/current")["predictions"]["fans"]["source"] == "not_forecast"
        run(world, "a", bins=number)
    assert world.post(("new", 5, 1.0)).status_code == 200
    for path in ("", "?fields=current", "?server=fans&server=a&server=new"):
        told = world.get(f"/predictions/current{path}")["predictions"]
        sources = {name: entry["source"] for name, entry in told.items()}
        assert sources == {"fans": "not_forecast", "a": "fallback", "new": "warming_up"}, path
    answer = world.client.get(
        "/predictions/current", headers={"accept": "application/vnd.apache.arrow.stream"}
    )
    table = pa.ipc.open_stream(answer.content).read_all()
    assert dict(zip(table["server_name"].to_pylist(), table["source"].to_pylist(), strict=True)) == sources
    states = {row["server"]: row["state"] for row in world.get("/ui/api/fleet")["rows"]}
    assert (states["fans"], states["new"]) == ("not-forecast", "warming-up")
    page = world.get("/ui/api/server?name=fans")
    assert (page["source"], page["values"], next(iter(page["past"]["metrics"]))) == (
        "not_forecast", {"fans": 3.0}, "cpu_pct",
    )  # fmt: skip


def test_what_no_sweep_took_yet_is_told_with_the_values(world: World) -> None:
    run(world, "a")
    assert world.get("/ui/api/fleet")["bins_waiting"] == world.get("/ui/api/capacity")["bins_waiting"] == 0
    assert world.post(("a", 6, 99.0)).status_code == 200  # closes bins that no cycle took yet
    for path in ("/ui/api/fleet", "/ui/api/capacity", "/capacity", "/ui/api/pulse"):
        assert world.get(path)["bins_waiting"] == 1, path


def test_page_console_and_daemon_call_a_state_by_one_name() -> None:
    words = re.findall(r'^  "?([a-z-]+)"?: \{ shape: "."', (UI_FOLDER / "text.js").read_text(), re.M)
    assert tuple(words) == CONSOLE_STATES == STATES[::-1]
    documented = re.findall(
        r"^\| ([a-z ]+) \| .* \|$", (UI_FOLDER.parents[1] / "docs" / "page.md").read_text(), re.M
    )
    start = documented.index("silent")
    assert [word.replace(" ", "-") for word in documented[start : start + len(STATES)]] == list(STATES[::-1])


def test_of_servers_over_the_limit_the_highest_comes_first(world: World) -> None:
    world.post(("a", 0, 91.0), ("b", 0, 99.0), ("c", 0, 95.0), ("d", 0, 300.0))
    rows = world.get("/ui/api/fleet?sort=state&order=desc")["rows"]
    assert [row["server"] for row in rows] == ["d", "b", "c", "a"]


def test_servers_that_need_attention_come_first_then_the_others_by_name(world: World) -> None:
    for number in range(8):  # half an hour in which b says nothing
        rows = [("a", number, 10.0), ("d", number, 95.0), ("c", number, 5.0)]
        assert world.post(*rows, *([("b", 0, 50.0)] if not number else [])).status_code == 200
        world.service.cycle()
    told = world.get("/ui/api/fleet?sort=state&order=desc")
    assert [(row["server"], row["state"]) for row in told["rows"]] == [
        ("b", "silent"), ("d", "is-high"), ("a", "calm"), ("c", "calm"),
    ]  # fmt: skip
    assert (told["limit"], told["unsent"]) == (90.0, ["mem_pct", "disk_io_mb_s", "latency_ms"])
    assert told["rows"][0]["limit"] == {"is_over": False, "p": None, "at": None}


def test_the_fleet_is_sorted_by_who_passes_the_limit_and_by_the_error(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(world, "a", "b", "c", bins=2)
    near = Nearness(np.array([0.2, 0.7, 0.7]), np.array([0, 1_577_840_400_000, 1_577_836_800_000]))
    monkeypatch.setattr("fleetcast.serving.capacity.Capacity.nearness", lambda *_: near)
    ratios = np.array([np.nan, 0.5, 1.5])
    monkeypatch.setattr("fleetcast.serving.past.Past.ratios", lambda *_: ratios)
    likely = world.get("/ui/api/fleet?sort=limit&order=desc")["rows"]
    assert [row["server"] for row in likely] == ["c", "b", "a"]  # of the same probability, the sooner one
    assert likely[0]["limit"] == {"is_over": False, "p": 0.7, "at": "2020-01-01T00:00:00Z"}
    worse = world.get("/ui/api/fleet?sort=error&order=desc")["rows"]
    assert [(row["server"], row["error"]) for row in worse] == [("c", 1.5), ("b", 0.5), ("a", None)]


@pytest.mark.parametrize("rows_at_once", [300_000, 0], ids=["in the answer", "beside it"])
def test_the_table_says_how_good_a_day_of_forecasts_was(
    world: World, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr("fleetcast.serving.past._ROWS_AT_ONCE", rows_at_once)
    run(world, "a", bins=16)
    assert world.post(("new", 17, 1.0)).status_code == 200
    world.get("/ui/api/fleet")
    wait_for("the count", lambda: world.get("/ui/api/fleet")["rows"][0]["error"] is not None)
    told = {row["server"]: row["error"] for row in world.get("/ui/api/fleet")["rows"]}
    accuracy = world.get("/accuracy?server=a&metric=cpu_pct")["metrics"]["cpu_pct"]
    assert told["a"] == pytest.approx(accuracy["1"]["ratio"], abs=1e-3)
    assert told["new"] is None


def test_a_silent_server_is_told_as_such_where_its_values_are(world: World, tmp_path: Path) -> None:
    for number in range(8):
        rows = [("a", number, 10.0), *([("b", 0, 95.0)] if not number else [])]
        assert world.post(*rows).status_code == 200
        world.service.cycle()
    check = {"status": "ready", "top_drifting": [{"server": "b", "metric": "cpu_pct", "is_drifting": True}]}
    (tmp_path / DRIFT_FILE).write_text(json.dumps(check))
    assert world.get("/ui/api/server?name=b")["state"] == "silent"
    (drifting,) = world.get("/ui/api/drift")["drifting"]
    rows = {row["server"]: row["silent_since"] for row in world.get("/ui/api/capacity?min_p=0")["rows"]}
    assert drifting["silent_since"] == world.get("/ui/api/server?name=b")["seen"]
    assert rows == {"a": None, "b": drifting["silent_since"]}
    told = world.get("/capacity?min_p=0")
    assert [(row["server"], row["silent_since"]) for row in told["rows"]] == list(rows.items()), "silent last"
    assert (told["matching"], told["silent"]) == (2, 1)
    assert 'fleetcast_capacity_over{metric="cpu_pct"} 0.0' in world.client.get("/metrics").text


def test_ten_thousand_servers_fit_in_small_answers(world: World) -> None:
    names = [f"server-{number:05}.example.net" for number in range(10_000)]
    for start in range(0, len(names), 5000):
        assert world.post(*((name, 0, 50.0) for name in names[start : start + 5000])).status_code == 200
    assert len(world.client.get("/ui/api/strip").content) < 20_000
    assert len(world.client.get("/ui/api/fleet?limit=200&sort=cpu_pct&order=desc").content) < 100_000


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_only_ever_a_value(world: World, name: str) -> None:
    run(world, name)
    query = {"name": name}
    told = world.client.get("/ui/api/server", params=query).json()
    assert told["server"] == name
    assert told["past"]["server"] == name
    assert world.client.get("/history", params={"server": name}).json()["server"] == name
    assert [row["server"] for row in world.get("/ui/api/fleet")["rows"]] == [name]


@pytest.mark.parametrize(
    "path",
    [
        "/history",
        "/accuracy",
        "/capacity",
        "/ui/api/server",
        "/predictions/current",
        "/ui/api/capacity/dates",
    ],
)
def test_blanks_around_a_name_mean_the_same_server_in_every_question(world: World, path: str) -> None:
    run(world, "  lead")  # as records say it: a name has no blanks around it
    field = "name" if path == "/ui/api/server" else "server"
    asked = {field: "  lead\t"}
    answer = world.client.get(path, params=asked)
    assert answer.status_code == 200, answer.text
    assert "  lead" not in answer.text
    if path != "/ui/api/capacity/dates":  # before a whole day, no server is named there
        assert '"lead"' in answer.text


def test_a_server_has_its_fan_its_past_and_every_value(world: World) -> None:
    run(world, "a")
    world.client.post(
        "/feed/data",
        json={"records": [{"timestamp": "2020-01-01T00:20:01Z", "server_name": "a", "fans": 3.0}]},
    )
    told = world.get("/ui/api/server?name=a&hours=1")
    assert len(told["forecast"]["cpu_pct"]["p90"]) == len(told["timestamps"]) == 96
    assert len(told["past"]["metrics"]["cpu_pct"]["actual"]) == 12
    assert told["values"] == {"cpu_pct": 14.0, "fans": 3.0}
    assert told["state"] == "calm"


def test_the_pulse_costs_nothing_while_nothing_changes(world: World) -> None:
    run(world, "a")
    first = world.client.get("/ui/api/pulse")
    again = world.client.get("/ui/api/pulse", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    world.post(("a", 6, 1.0))
    world.service.cycle()
    changed = world.client.get("/ui/api/pulse", headers={"if-none-match": first.headers["etag"]})
    assert changed.status_code == 200


def test_problems_are_told_in_words(world: World) -> None:
    no_model, no_check = [item["text"] for item in world.get("/ui/api/health")["problems"]]
    assert no_model.startswith("No model serves: there is no model version in ")
    assert no_check == "No drift check was made yet: is the retraining daemon running in this folder?"
    world.post(("a", 0, 1.0), ("b", 0, 1.0))
    world.post(("b", 12, 1.0))
    texts = [item["text"] for item in world.get("/ui/api/health")["problems"]]
    assert "1 server has sent nothing for 30 minutes." in texts


def test_drift_and_trainings_are_what_the_retraining_daemon_left(world: World, tmp_path: Path) -> None:
    run(world, "a")
    drifting = {"server": "a", "metric": "cpu_pct", "is_drifting": True, "usual": 5.0, "actual": 9.25}
    check = {
        "made_at": "2020-01-01T00:21:00Z", "status": "ready", "recommendation": "RETRAIN NOW",
        "current_metrics": {"per": 0.2}, "thresholds": {"per": 0.1}, "top_drifting": [drifting],
        "calibrated": {"enough_days": {"series": 2, "says": "until about 2026-01-17 00:00Z"}},
    }  # fmt: skip
    (tmp_path / DRIFT_FILE).write_text(json.dumps(check))
    line = {"at": "2020-01-01T00:21:00Z", "drift": {"per": 0.2, "needs_retraining": True}}
    (tmp_path / DECISIONS_FILE).write_text(f'{json.dumps(line)}\n{{"torn')
    attempt = {"id": "x", "rule": "drift", "outcome": "rejected", "why": "worse: 1.2 of the champion's"}
    decision = {"reason": "not a quiet period; drift", "not_quiet": "the host is busy"}
    kept = {"attempts": [attempt], "total_trainings": 3, "last_decision": decision}
    (tmp_path / STATE_FILE).write_text(json.dumps(kept))
    drift = world.get("/ui/api/drift")
    assert drift["drifting"][0]["sentence"].endswith("usually 5, now 9.25")
    assert drift["calibrated"]["enough_days"]["says"] == "until about 2026-01-17 00:00Z"
    assert [point["per"] for point in drift["points"]] == [0.2]
    trainings = world.get("/ui/api/trainings")
    assert trainings["trainings"][0]["verdict"] == "Did not go into service: worse: 1.2 of the champion's."
    assert trainings["total_promoted"] == 3
    assert trainings["decision"]["not_quiet"] == "the host is busy"
    assert world.get("/ui/api/fleet")["rows"][0]["state"] == "drifts"
    assert world.get("/ui/api/server?name=a")["drifting"][0]["metric"] == "cpu_pct"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"attempts": 7, "top_drifting": "x", "calibrated": [1]}',
        '{"backoff": 7, "made_at": 7, "at": "x"}',
    ],
)
def test_damaged_files_of_the_retraining_daemon_break_nothing(
    world: World, tmp_path: Path, text: str
) -> None:
    for name in (DRIFT_FILE, STATE_FILE, DECISIONS_FILE):
        (tmp_path / name).write_text(text)
    run(world, "a", bins=1)
    for path in DATA_PATHS:
        assert world.client.get(path).status_code == 200, path


def test_every_answer_with_data_needs_the_key_and_no_file_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path, api_key="right").start()
    try:
        for path in DATA_PATHS:
            for headers in ({}, {"x-api-key": "wrong"}):
                assert world.client.get(path, headers=headers).status_code == 401, path
            assert world.client.get(path, headers={"x-api-key": "right"}).status_code in (200, 404), path
        for name in read_files().keys() - {"docs.html"}:
            assert world.client.get(f"/ui/{name}").status_code == 200, name
    finally:
        world.end()


def test_too_many_questions_at_once_are_503(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetcast.api.page.MAX_WAITING", 0)
    answer = world.client.get("/ui/api/strip")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_the_root_leads_browsers_to_the_page_and_nothing_else(world: World) -> None:
    browser = world.client.get("/", headers={"accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert (browser.status_code, browser.headers["location"]) == (307, "ui/")
    for accept in (
        {},
        {"accept": ""},
        {"accept": "*/*"},
        {"accept": "Text/HTML"},
        {"accept": "text/*;q=0.1"},
    ):
        head = world.client.head("/", headers=accept)  # as `curl -I` and monitors ask
        assert (head.status_code, head.headers.get("location"), head.content) == (307, "ui/", b""), accept
    for accept in ("application/json", "text/html;q=0, */*", "application/json;note=text/html"):
        other = world.client.get("/", headers={"accept": accept})
        assert (other.status_code, other.json()) == (404, {"detail": "Not Found"}), accept
    slashless = world.client.get("/ui")
    assert (slashless.status_code, slashless.headers["location"]) == (307, "ui/")


def test_files_come_with_a_policy_that_lets_nothing_else_in(world: World) -> None:
    page = world.client.get("/ui/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"] == POLICY
    assert "'unsafe" not in POLICY
    assert "default-src 'none'" in POLICY
    assert page.headers["x-content-type-options"] == "nosniff"
    again = world.client.get("/ui/", headers={"if-none-match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    head = world.client.head("/ui/")
    assert (head.status_code, head.content) == (200, b"")
    assert world.client.head("/history?server=a").status_code == 404


@pytest.mark.parametrize(
    "path",
    ["/ui/nothing.js", "/ui/../inference.py", "/ui/%2e%2e/api/page.py", "/ui/api/nothing", "/ui//etc/passwd"],
)
def test_only_the_page_s_own_files_are_served(world: World, path: str) -> None:
    assert world.client.get(path).status_code == 404


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_a_file_names_no_other_address_and_holds_no_script_or_style_in_its_text(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"\b(?:https?|wss?):|[\"'(]//", text)
    for forbidden in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
    ):
        assert forbidden not in text
    if path.suffix == ".html":
        assert re.findall(r"<script(?![^>]* src=)", text) == []
        assert re.findall(r"\son\w+=|\sstyle=|<style", text) == []


def test_the_files_refer_only_to_each_other() -> None:
    names = {path.relative_to(UI_FOLDER).as_posix() for path in FILES}
    linked = set(re.findall(r'(?:src|href)="(?!#)([^"]+)"', (UI_FOLDER / "index.html").read_text()))
    docs = set(re.findall(r'(?:src|href)="([^"]+)"', (UI_FOLDER / "docs.html").read_text()))
    linked |= {name.removeprefix("ui/") for name in docs - {"openapi.json"}}
    for path in OURS:
        if path.suffix == ".js":
            linked |= {name.removeprefix("./") for name in re.findall(r'from "([^"]+)"', path.read_text())}
        if path.suffix == ".css":
            linked |= set(re.findall(r'url\("([^"]+)"\)', path.read_text()))
    assert linked <= names
    assert {name for name in names - linked if "LICENSE" not in name and "NOTICE" not in name} == {
        *("index.html", "docs.html", "vendor/vendor.json"),
    }


def test_what_is_vendored_is_byte_for_byte_what_was_released() -> None:
    vendor: list[dict[str, Any]] = json.loads((UI_FOLDER / "vendor" / "vendor.json").read_text())
    sums = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (UI_FOLDER / "vendor").iterdir()
        if path.name != "vendor.json"
    }
    assert sums == {name: told for package in vendor for name, told in package["sha256"].items()}
    chart = next(package for package in vendor if package["name"] == "uplot")
    assert f"v{chart['version']}" in (UI_FOLDER / "vendor" / "uPlot.iife.min.js").read_text()[:100]
    assert "MIT" in (UI_FOLDER / "vendor" / "LICENSE-uPlot").read_text()
    assert "Apache License" in (UI_FOLDER / "vendor" / "LICENSE-swagger-ui").read_text()


def test_the_interface_is_described_without_a_request_to_others(world: World) -> None:
    docs = world.client.get("/docs")
    assert (docs.status_code, docs.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert docs.headers["content-security-policy"] == POLICY
    for name in re.findall(r'(?:src|href)="([^"]+)"', docs.text):
        assert "//" not in name
        assert world.client.get(f"/{name}").status_code == 200, name
    assert 'validatorUrl: "none"' in world.client.get("/ui/docs.js").text
    other = world.client.get("/redoc")
    assert (other.status_code, other.headers["location"]) == (307, "docs")
    assert (world.client.head("/docs").status_code, world.client.head("/docs").content) == (200, b"")


def test_history_is_described(world: World) -> None:
    paths = world.get("/openapi.json")["paths"]
    assert set(paths["/history"]) == {"get"}
    assert not any(path.startswith("/ui") for path in paths)


@pytest.mark.parametrize(("key", "n_problems"), [("short", 1), ("0123456789abcdef", 0), ("", 0)])
def test_a_short_key_is_a_problem_in_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, n_problems: int
) -> None:
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path, api_key=key).start()
    problems = world.client.get("/status", headers={"x-api-key": key}).json()["problems"]
    world.end()
    assert len([text for text in problems if "easy to guess" in text]) == n_problems
