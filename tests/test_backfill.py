"""`fleetcast import` into a real service: history of a Prometheus and of files, resumed, counted, refused."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from house import ROOT
from stub_prometheus import StubPrometheus, load
from test_inference import World

from benchmarks.programs import wait_for
from fleetcast.backfill.promql import RuleQueries, parse_selector
from fleetcast.cli import main
from fleetcast.clock import FakeClock, SystemClock
from fleetcast.errors import ExitCode
from fleetcast.settings import RemoteWriteSettings
from fleetcast.sources.client import API_KEY_VARIABLE

STEP_S = 300
RULE = "cpu_pct = max(node_load1)"  # a metric that is forecast, of the stub's series
CLOSED_PORT = "http://127.0.0.1:9"


class Importer:
    """Runs imports into one daemon, in a folder of their own, and keeps what they printed."""

    def __init__(self, world: World, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.world, self.folder, self._capsys = world, folder, capsys
        self.url = str(world.client.base_url)
        self.errors = ""

    def run(self, *words: str, code: int = 0) -> dict[str, Any]:
        self._capsys.readouterr()
        found = main(["import", *words, "--daemon-url", self.url, "--give-up-s", "1", "--json"])
        said = self._capsys.readouterr()
        self.errors = said.err
        assert found == code, said
        told: dict[str, Any] = json.loads(said.out) if said.out else {}
        return told

    def stored(self) -> pd.DataFrame:
        self.world.service._buffer.flush()
        return self.world.service._buffer.get_training_window(days=61, include_today=True)

    def state(self) -> dict[str, Any]:
        (path,) = self.folder.glob("fleetcast_import_*.json")
        value: dict[str, Any] = json.loads(path.read_text())
        return value


@pytest.fixture
def importer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Importer]:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("fleetcast.backfill.command.configure_logging", lambda *_: None)
    monkeypatch.setattr("fleetcast.loop.Stop.install", lambda _self: None)
    world = World(tmp_path / "daemon", mode="system")
    world.clock = FakeClock(SystemClock().now())
    world.start()
    yield Importer(world, folder, capsys)
    world.end()


def expected(told: pd.DataFrame) -> pd.Series:
    """Return what the stub said of each row: a record stands in the middle of its step."""
    ends = told.timestamp.map(lambda at: int(at.timestamp()) + STEP_S // 2)
    servers = told.server_name.str.removeprefix("web-").astype(int)
    return pd.Series([load(*pair) for pair in zip(servers, ends, strict=True)], index=told.index)


# what is asked for


def test_a_rule_reads_in_promql_by_scrape_target_over_one_step() -> None:
    queries = RuleQueries(RemoteWriteSettings(), 300)
    told = {rule.metric: queries.query(rule) for rule in queries.rules}
    assert told["load_average"] == "max without (le, quantile) (avg_over_time(node_load1{}[300s]))"
    assert told["cpu_pct"] == (
        "clamp_max(clamp_min((100.0 * (1.0 - avg without (core, cpu, le, mode, package, quantile) "
        '(rate(node_cpu_seconds_total{mode="idle"}[300s])))), 0.0), 100.0)'
    )


def test_a_rule_of_an_unknown_exporter_is_grouped_by_its_server_and_a_selector_narrows_every_series() -> None:
    rule = r'latency_ms = 1000 * sum(rate(http_seconds_sum{path!~"/\\d"})) / sum(rate(http_seconds_count))'
    queries = RuleQueries(RemoteWriteSettings(server_label="host", rules=(rule,)), 60)
    told = next(
        queries.query(one, parse_selector('{env="a\\"b"}'))
        for one in queries.rules
        if one.metric == "latency_ms"
    )
    assert told == (
        '((1000.0 * sum by (host, instance) (rate(http_seconds_sum{path!~"/\\\\d",env="a\\"b"}[60s]))) / '
        'sum by (host, instance) (rate(http_seconds_count{env="a\\"b"}[60s])))'
    )


# a Prometheus


def test_every_step_of_every_server_is_stored_once_and_a_second_run_asks_for_what_is_new(
    importer: Importer,
) -> None:
    with StubPrometheus(3) as stub:
        told = importer.run("prometheus", "--url", stub.url, "--days", "2")
        assert (told["accepted"], told["servers"], told["refused"]) == (3 * 2 * 288, 3, 0)
        assert told["values"] == {"load_average": 3 * 2 * 288}
        n_asked = len(stub.asked)
        again = importer.run("prometheus", "--url", stub.url, "--days", "2")
        assert again["accepted"] <= 3
        assert len(stub.asked) - n_asked <= 7
        assert "it was imported before" in again["notes"][0]
        anew = importer.run("prometheus", "--url", stub.url, "--days", "1", "--anew")
        assert anew["accepted"] == 3 * 288
    kept = importer.stored()
    assert len(kept.drop_duplicates(["server_name", "timestamp"])) == len(kept) >= 3 * 2 * 288
    assert kept.load_average.tolist() == expected(kept).tolist()
    assert importer.state()["done_to"] % 300_000 == 0


def test_an_import_that_is_killed_goes_on_where_it_was_and_stores_nothing_twice(importer: Importer) -> None:
    command = [
        sys.executable,
        "-m",
        "fleetcast",
        "import",
        "prometheus",
        "--days",
        "3",
        "--daemon-url",
        importer.url,
    ]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with StubPrometheus(2, pause_s=0.2) as stub:
        command += ["--url", stub.url]
        process = subprocess.Popen(command, cwd=importer.folder, env=environ, stderr=subprocess.DEVNULL)
        wait_for("two pieces", lambda: sum("node_load1" in one["query"] for one in stub.asked) >= 3, 60)
        process.kill()
        process.wait()
        done_to, n_asked = importer.state()["done_to"], len(stub.asked)
        assert 0 < len(importer.stored()) < 2 * 3 * 288
        done = subprocess.run(command, cwd=importer.folder, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert float(stub.asked[n_asked]["start"]) * 1000 == done_to + 300_000
    kept = importer.stored()
    assert len(kept) in (2 * 3 * 288, 2 * (3 * 288 + 1))  # a step may have ended meanwhile
    assert len(kept.drop_duplicates(["server_name", "timestamp"])) == len(kept)
    assert kept.load_average.tolist() == expected(kept).tolist()


@pytest.mark.parametrize("point", [[60, "1"], ["soon", "1"], [60, "x"], [60], None, [1e400, "1"]], ids=str)
def test_an_answer_of_other_times_or_of_no_numbers_is_refused_in_words(
    importer: Importer, point: Any
) -> None:
    series = {"metric": {"instance": "web-1:9100"}, "values": [point]}
    with StubPrometheus() as stub:
        stub.refuse = lambda _: (
            200,
            {"status": "success", "data": {"resultType": "matrix", "result": [series]}},
        )
        told = importer.run("prometheus", "--url", stub.url, "--days", "1", code=ExitCode.FAILED)
    assert "its samples are not those that were asked for" in told["failure"]


def test_a_failure_half_way_says_where_and_how_to_go_on(importer: Importer) -> None:
    with StubPrometheus() as stub:
        stub.refuse = lambda _: (500, {"error": "disk on fire"}) if len(stub.asked) > 14 else None
        told = importer.run("prometheus", "--url", stub.url, "--days", "2", code=ExitCode.FAILED)
        assert "disk on fire" in told["failure"]
        assert "run the same command again to go on" in importer.errors
        stub.refuse = lambda _: None
        rest = importer.run("prometheus", "--url", stub.url, "--days", "2")
    assert told["accepted"] + rest["accepted"] >= 2 * 2 * 288
    assert len(importer.stored()) == told["accepted"] + rest["accepted"]


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (422, "query processing would load too many samples into memory"),
        (503, "query timed out in evaluation"),
    ],
)
def test_a_stretch_that_is_too_long_for_the_server_is_asked_for_in_shorter_ones(
    importer: Importer, status: int, says: str
) -> None:
    def refuse(form: dict[str, str]) -> Any:
        too_long = float(form["end"]) - float(form["start"]) > 20 * STEP_S
        return (status, {"status": "error", "error": says}) if too_long else None

    with StubPrometheus() as stub:
        stub.refuse = refuse
        assert importer.run("prometheus", "--url", stub.url, "--days", "0.5")["accepted"] == 2 * 144
        stub.refuse = lambda _: (status, {"error": says})
        told = importer.run("prometheus", "--url", stub.url, "--days", "1", "--anew", code=ExitCode.FAILED)
        assert says in told["failure"]
    kept = importer.stored()
    assert kept.load_average.tolist() == expected(kept).tolist()


def test_what_is_older_than_the_retention_is_not_asked_for(importer: Importer) -> None:
    with StubPrometheus(1) as stub:
        told = importer.run("prometheus", "--url", stub.url, "--days", "61")
        assert (told["refused"], told["beyond_retention"]) == (0, 0)
        assert told["accepted"] in (60 * 288 - 1, 60 * 288)
        assert "days before" in told["notes"][0]
        assert "buffer.retention_days" in told["notes"][0]


def test_a_past_that_comes_after_newer_bins_is_in_the_daemons_memory_too(
    importer: Importer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleetcast.serving.sweep._REFRESH_S", 0.0)
    monkeypatch.setenv("FLEETCAST_REMOTE_WRITE_RULES", RULE)
    world = importer.world
    now = {"timestamp": world.clock.now().isoformat(), "server_name": "web-01", "cpu_pct": 50.0}
    assert world.client.post("/feed/data", json={"records": [now]}).status_code == 200
    world.clock.advance(minutes=10)
    world.service.cycle()
    world.service.cycle()  # no more rows of the bin came meanwhile
    assert world.get("/status")["bins"]["newest_closed"] is not None
    with StubPrometheus(2) as stub:
        assert importer.run("prometheus", "--url", stub.url, "--days", "1")["accepted"] == 2 * 288
    late = world.get("/status")["bins"]["late_records"]
    assert late in (2 * 287, 2 * 288)
    world.service.cycle()
    past = world.get("/history?server=web-01&metric=cpu_pct")
    assert past["source"] == "memory"
    assert sum(value is not None for value in past["metrics"]["cpu_pct"]["actual"]) >= 287


def test_selectors_headers_and_a_password_reach_the_server_and_no_file(
    importer: Importer, tmp_path: Path
) -> None:
    (tmp_path / "headers").write_text("X-Scope-OrgID: team\nX-Other: b\n")
    with StubPrometheus() as stub:
        url = stub.url.replace("http://", "http://me:secret@")
        flags = [
            "--match",
            '{job="node"}',
            "--match",
            '{job="other"}',
            "--header",
            f"@{tmp_path / 'headers'}",
        ]
        importer.run("prometheus", "--url", url, "--days", "0.1", *flags)
        queries = [form["query"] for form in stub.asked]
        assert any('node_load1{job="node"}' in query for query in queries)
        assert any('node_load1{job="other"}' in query for query in queries)
        assert stub.headers[0]["X-Scope-OrgID"] == "team"
        assert stub.headers[0]["Authorization"].startswith("Basic ")
        stub.refuse = lambda _: (401, {"error": "no"})
        told = importer.run("prometheus", "--url", url, "--days", "0.2", "--anew", code=ExitCode.FAILED)
        assert "--header 'Authorization: Bearer ...'" in told["failure"]
    assert "secret" not in json.dumps([told, importer.state()])


def test_a_fleet_without_such_series_is_told_so(importer: Importer) -> None:
    with StubPrometheus(0) as stub:
        importer.run("prometheus", "--url", stub.url, "--days", "0.1", code=ExitCode.FAILED)
    assert "do the series have other names" in importer.errors
    told = importer.run("prometheus", "--url", CLOSED_PORT, code=ExitCode.FAILED)
    assert f"{CLOSED_PORT} does not answer" in told["failure"]


def test_a_state_file_of_another_import_or_of_none_is_refused(importer: Importer) -> None:
    flags = ["--state", "state.json", "--days", "0.1"]
    with StubPrometheus() as stub, StubPrometheus() as other:
        importer.run("prometheus", "--url", stub.url, *flags)
        importer.run("prometheus", "--url", other.url, *flags, code=ExitCode.FAILED)
        assert "it belongs to another import" in importer.errors
        (importer.folder / "state.json").write_text("{")
        importer.run("prometheus", "--url", stub.url, *flags, code=ExitCode.FAILED)
        assert "state.json" in importer.errors


# files


def records(n_rows: int = 6) -> pd.DataFrame:
    now = pd.Timestamp(SystemClock().now()).floor("s")
    return pd.DataFrame(
        {
            "timestamp": now - pd.to_timedelta(np.arange(n_rows)[::-1], "min"),
            "server_name": [f"web-{row % 2}" for row in range(n_rows)],
            "cpu_pct": np.arange(n_rows) + 0.5,
            "queue_depth": [None, *range(1, n_rows)],
            "rack": "r1",
        }
    )


def write(frame: pd.DataFrame, kind: str, folder: Path) -> str:
    path = folder / f"records.{kind}"
    frame.to_parquet(path) if kind == "parquet" else frame.to_csv(path, index=False)
    return str(path)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_file_of_records_is_stored_as_it_is_however_often(
    importer: Importer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleetcast.backfill.delivery.PIECE_ROWS", 4)
    frame = records()
    path = write(frame, kind, importer.folder)
    for _ in range(2):
        told = importer.run(kind, path)
        assert (told["accepted"], told["servers"]) == (6, 2)
        assert told["values"] == {"cpu_pct": 6, "queue_depth": 5}
    assert told["notes"] == ["columns left out, no numbers or no metric's name: rack"]
    kept = importer.stored().sort_values("timestamp", ignore_index=True)
    assert kept.cpu_pct.tolist() == frame.cpu_pct.tolist()
    assert kept.queue_depth.isna().tolist() == [True] + 5 * [False]
    assert (
        kept.timestamp.astype("int64") == frame.timestamp.astype(kept.timestamp.dtype).astype("int64")
    ).all()


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_columns_are_renamed_and_records_beyond_the_retention_are_counted(
    importer: Importer, kind: str
) -> None:
    frame = records().rename(columns={"server_name": "host", "cpu_pct": "CPU"})
    frame.loc[0, "timestamp"] -= pd.Timedelta(days=61)
    flags = ["--rename", "host=server_name", "--rename", "CPU=cpu_pct"]
    told = importer.run(kind, write(frame, kind, importer.folder), *flags)
    assert (told["accepted"], told["beyond_retention"], told["refused"]) == (5, 1, 0)
    frame.loc[1, "CPU"] = 7000.0
    told = importer.run(kind, write(frame, kind, importer.folder), *flags, code=ExitCode.FAILED)
    assert told["reasons"] == ["cpu_pct: must lie in -1..1000, got 7000"]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.drop(columns="timestamp"), "no column 'timestamp' (it has server_name, cpu_pct"),
        (lambda f: f.rename(columns={"server_name": "host"}), "--rename COLUMN=server_name"),
        (lambda f: f.assign(timestamp=1.7e9), "column timestamp must be"),
        (lambda f: f[["timestamp", "server_name", "rack"]], "no column of numbers with a metric's name"),
    ],
)
def test_a_file_of_other_columns_is_refused_with_what_would_be_right(
    importer: Importer, kind: str, change: Any, says: str
) -> None:
    importer.run(kind, write(change(records()), kind, importer.folder), code=ExitCode.FAILED)
    assert says in importer.errors


def test_a_file_that_is_none_is_refused(importer: Importer) -> None:
    importer.run("parquet", "nowhere.parquet", code=ExitCode.FAILED)
    assert "nowhere.parquet does not exist" in importer.errors
    path = write(records(), "csv", importer.folder)
    importer.run("parquet", path, code=ExitCode.FAILED)
    assert "records.csv cannot be read as parquet" in importer.errors
    (importer.folder / "bad.csv").write_text("timestamp,server_name,cpu_pct\n2026-01-01,a,1\n2026-01-01,a\n")
    importer.run("csv", "bad.csv", code=ExitCode.FAILED)
    assert "bad.csv cannot be read as csv" in importer.errors


HEAD = "timestamp,server_name,cpu_pct"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.csv", f"{HEAD}\n", "empty.csv holds no records"),
        ("twice.csv", f"{HEAD},cpu_pct\n2026-01-01,a,1,2\n", "the column 'cpu_pct' twice"),
        ("semi.csv", "timestamp;server_name;cpu_pct\n2026-01-01;a;1\n", "separated by commas"),
        ("tab.csv", "timestamp\tserver_name\tcpu_pct\n2026-01-01\ta\t1\n", "separated by commas"),
    ],
)
def test_a_csv_that_holds_no_records_says_why(importer: Importer, name: str, content: str, says: str) -> None:
    (importer.folder / name).write_text(content)
    importer.run("csv", name, code=ExitCode.FAILED)
    assert says in importer.errors
    assert "--match" not in importer.errors


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_pipe_is_refused_and_not_waited_for(importer: Importer, kind: str) -> None:
    os.mkfifo(importer.folder / "pipe")
    importer.run(kind, "pipe", code=ExitCode.FAILED)
    assert "pipe is not a regular file" in importer.errors


def test_a_folder_without_parquet_files_is_told_so(importer: Importer) -> None:
    (importer.folder / "none").mkdir()
    importer.run("parquet", "none", code=ExitCode.FAILED)
    assert "none holds no Parquet file" in importer.errors


def test_a_columns_name_cannot_steer_the_terminal(importer: Importer) -> None:
    at = importer.world.clock.now().isoformat()
    (importer.folder / "odd.csv").write_text(f"{HEAD},\x1b[31mred\n{at},a,1,2\n")
    importer.run("csv", "odd.csv")
    assert "\\x1b[31mred" in importer.errors
    assert "\x1b" not in importer.errors


def test_old_records_are_counted_as_such_beside_others_that_are_refused(importer: Importer) -> None:
    rows = ("1970-01-01T00:00:00Z,a,1", "2020-01-01T00:00:00Z,a,1", "2099-01-01T00:00:00Z,a,1")
    (importer.folder / "mixed.csv").write_text("\n".join((HEAD, *rows, "")))
    told = importer.run("csv", "mixed.csv", code=ExitCode.FAILED)
    assert (told["beyond_retention"], told["refused"]) == (2, 1)


def test_a_csv_whose_numbers_change_their_look_is_read_and_text_among_them_is_named(
    importer: Importer,
) -> None:
    frame = records(4).drop(columns="rack")
    path = importer.folder / "many.csv"
    rows = frame.to_csv(index=False).splitlines()
    path.write_text("\n".join([rows[0], *(f"{row}" for row in rows[1:])]) + "\n")
    assert importer.run("csv", str(path))["accepted"] == 4
    filler = [rows[1]] * 30_000  # past what the types are told from
    path.write_text("\n".join([rows[0], *filler, rows[2].replace("1.5", "idle")]) + "\n")
    importer.run("csv", str(path), code=ExitCode.FAILED)
    assert "idle" in importer.errors


# usage


def test_without_a_daemon_it_says_how_to_start_one(importer: Importer) -> None:
    importer.url = CLOSED_PORT
    importer.run("csv", write(records(), "csv", importer.folder), code=ExitCode.COULD_NOT_LOOK)
    assert "no inference daemon is running" in importer.errors
    assert "start it with fleetcast infer" in importer.errors


def test_the_key_is_sent_and_a_wrong_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, importer: Importer
) -> None:
    world = World(tmp_path / "locked", mode="system", api_key="0123456789abcdef0123456789abcdef")
    world.clock = FakeClock(SystemClock().now())
    world.start()
    try:
        importer.url, path = str(world.client.base_url), write(records(), "csv", importer.folder)
        importer.run("csv", path, code=ExitCode.COULD_NOT_LOOK)
        assert "refuses the key (set TFT_API_KEY" in importer.errors
        monkeypatch.setenv(API_KEY_VARIABLE, world.api_key)
        assert importer.run("csv", path)["accepted"] == 6
    finally:
        world.end()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["prometheus"], "import prometheus needs --url"),
        (["prometheus", "x.csv", "--url", "http://x"], "takes no PATH"),
        (["csv"], "import csv needs a PATH"),
        (["csv", "x.csv", "--url", "http://x", "--anew"], "--url is not for csv"),
        (["prometheus", "--url", "x"], "must look like http://127.0.0.1:9090"),
        (["prometheus", "--url", "http://x", "--match", 'x{job="a"}'], "begins with a name"),
        (["prometheus", "--url", "http://x", "--match", "{job=}"], "expected a quoted text"),
        (["prometheus", "--url", "http://x", "--match", "{}"], "selects nothing in particular"),
        (["prometheus", "--url", "http://x", "--step", "600"], "at most the daemon's bin of 300 s, got 600"),
        (["prometheus", "--url", "http://x", "--header", "X"], "--header must be 'NAME: VALUE'"),
        (["csv", "x.csv", "--rename", "host"], "--rename 'host': expected COLUMN=NAME"),
        (["csv", "x.csv", "--rename", "a=cpu_pct", "--rename", "b=cpu_pct"], "--rename gives cpu_pct twice"),
    ],
)
def test_wrong_usage_says_what_would_be_right(importer: Importer, words: list[str], says: str) -> None:
    importer.run(*words, code=ExitCode.BAD_SETTINGS)
    assert says in importer.errors
