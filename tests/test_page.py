"""The page over a real service: history, fleet, keys, headers, hostile names; its files stay local."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_inference import World

from fleetcast.api.page import HISTORY, POLICY, UI_FOLDER, read_files
from fleetcast.serving.journal import DECISIONS_FILE, DRIFT_FILE, STATE_FILE
from fleetcast.serving.overview import STATES

HOSTILE = ("<img src=x onerror=alert(1)>", "a/../b?c=d&e#f", "..", "x\"'`${y}", "n" * 128)
DATA_PATHS = (
    "/history?server=a", "/ui/api/pulse", "/ui/api/strip", "/ui/api/fleet", "/ui/api/server?name=a",
    "/ui/api/drift", "/ui/api/trainings", "/ui/api/health",
)  # fmt: skip
FILES = sorted(path for path in UI_FOLDER.rglob("*") if path.is_file())
OURS = [path for path in FILES if path.parent == UI_FOLDER]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.chdir(tmp_path)  # where the retraining daemon's files lie
    world = World(tmp_path).start()
    yield world
    world.end()


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
    assert "end must be ISO 8601" in refusal(world, "/history?server=a&end=0001-01-01T00:00:00Z", 422)
    assert "at most 31 days" in refusal(world, "/history?server=a&start=2019-01-01T00:00:00Z", 422)
    assert "no closed bin" in refusal(world, "/history?server=a&start=9999-01-01T00:00:00Z", 422)
    assert "unknown field" in refusal(world, "/history?server=a&from=2020-01-01", 422)
    assert "cannot sort by 'no_such'" in refusal(world, "/ui/api/fleet?sort=no_such", 422)
    assert "200" in refusal(world, "/ui/api/fleet?limit=201", 422)
    assert "unknown field" in refusal(world, "/ui/api/strip?limit=1", 422)


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
    assert names("state=high") == ["c"]
    assert names("offset=1&limit=2") == ["b", "c"]
    first = world.get("/ui/api/fleet?limit=1")
    assert (first["servers"], first["matching"], first["horizon_s"]) == (4, 4, 96 * 300)
    assert first["rows"][0]["current"]["cpu_pct"] == 30.0
    assert first["rows"][0]["peak"]["mem_pct"] is None


def test_the_strip_has_a_byte_for_each_server_in_order_of_names(world: World) -> None:
    world.post(("b", 0, 20.0), ("a", 0, 99.0))
    world.post(("b", 1, 20.0), ("new", 1, 99.0))
    world.service.cycle()
    strip = world.get("/ui/api/strip")
    states = [strip["states"][byte] for byte in base64.b64decode(strip["bytes"])]
    assert states == ["high", "ok", "warming_up"]
    assert strip["counts"] == {**dict.fromkeys(STATES, 0), "high": 1, "ok": 1, "warming_up": 1}


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
    assert told["state"] == "ok"


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
    (tmp_path / STATE_FILE).write_text(json.dumps({"attempts": [attempt], "total_trainings": 3}))
    drift = world.get("/ui/api/drift")
    assert drift["drifting"][0]["sentence"].endswith("usually 5, now 9.25")
    assert drift["calibrated"]["enough_days"]["says"] == "until about 2026-01-17 00:00Z"
    assert [point["per"] for point in drift["points"]] == [0.2]
    trainings = world.get("/ui/api/trainings")
    assert trainings["trainings"][0]["verdict"] == "Did not go into service: worse: 1.2 of the champion's."
    assert trainings["total_promoted"] == 3
    assert world.get("/ui/api/fleet")["rows"][0]["state"] == "drift"
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
    assert world.client.get("/").json() == {"detail": "Not Found"}
    assert world.client.get("/").status_code == 404
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
