"""What an operator gets at a terminal, of a real service: answers, odd names, keys, a daemon that is down."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_inference import World

from fleetcast.capacity.crossing import HARDLY_PASSED
from fleetcast.capacity.dates import OVER
from fleetcast.cli import COMMANDS, main
from fleetcast.console.command import _capacity_lines, _say_record
from fleetcast.errors import ExitCode
from fleetcast.sources.client import API_KEY_VARIABLE

KEY = "0123456789abcdef0123456789abcdef"
ODD = ("<img src=x>", "a/../b?c=d&e#f", "..", "x\"'`${y}", "n" * 128)
QUESTIONS = (["status"], ["servers", "list"], ["accuracy"], ["capacity"])


class Terminal:
    """Runs commands against one daemon and keeps what they printed."""

    def __init__(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.url = url
        self._capsys = capsys

    def run(self, *words: str, code: int = 0) -> str:
        flags = () if words[0] in ("settings", "completion") else ("--url", self.url)
        self._capsys.readouterr()
        found = main([*words, *flags])
        said = self._capsys.readouterr()
        assert found == code, said
        return said.out if code in (0, 1) else said.err

    def json(self, *words: str, code: int = 0) -> Any:
        return json.loads(self.run(*words, "--json", code=code))


def grow(world: World, *names: str, bins: int = 16) -> None:
    for number in range(bins + 1):
        rows = ((name, number, 10.0 + number * (place + 1)) for place, name in enumerate(names))
        assert world.post(*rows).status_code == 200
        world.service.cycle()


def test_one_screen_says_what_the_fleet_the_model_and_the_trainings_do(
    world: World, terminal: Terminal
) -> None:
    grow(world, "a", "b", bins=2)
    screen = terminal.run("status")
    assert "fleet     2 servers: 2 calm; newest record 0 s ago" in screen
    assert "model     none: the fallback forecasts" in screen
    assert "forecast  of the bin 2020-01-01T00:05:00Z" in screen
    assert "training  none yet" in screen
    assert "No drift check was made yet" in screen
    told = terminal.json("status")
    assert told["servers"]["calm"] == 2
    assert {problem["severity"] for problem in told["problems"]} == {"warning"}


def test_a_silence_of_a_server_that_is_not_known_stands_with_a_warning(
    world: World, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grow(world, "web-01", bins=2)
    monkeypatch.setenv("FLEETCAST_RETRAINING_DAEMON_URL", terminal.url)

    def said(server: str) -> str:
        words = ("alerts", "silence", "LimitLikely", "--hours", "2", "--reason", "x", "--server", server)
        assert main([*words]) == 0
        told = capsys.readouterr()
        assert f"LimitLikely of {server} is silent until" in told.out
        return told.err

    warned = said("web-1")
    assert "unknown server 'web-1', nearest is web-01" in warned
    assert "the silence waits for a server of this name" in warned
    assert "unknown" not in said("web-01")
    monkeypatch.setenv("FLEETCAST_RETRAINING_DAEMON_URL", "http://127.0.0.1:9")
    assert "unknown" not in said("web-1"), "with no daemon to ask"


def test_an_error_of_the_daemon_is_exit_code_1(world: World, terminal: Terminal) -> None:
    world.service._report.phase = "the history is being restored"
    assert "not ready: the history is being restored" in terminal.run("status", code=ExitCode.FAILED)


def test_the_servers_are_listed_with_state_and_last_seen(
    world: World, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleetcast.console.servers._PAGE", 2)
    grow(world, "a", "b", "c", bins=1)
    world.post(("new", 12, 1.0))
    found = {row["server"]: row for row in terminal.json("servers", "list")}
    assert sorted(found) == ["a", "b", "c", "new"]
    assert (found["a"]["stale"], found["a"]["state"], found["new"]["state"]) == (True, "silent", "warming-up")
    assert [
        row["server"] for row in terminal.json("servers", "list", "--state", "silent", "--limit", "2")
    ] == [
        "a",
        "b",
    ]
    line = next(line for line in terminal.run("servers", "list").splitlines() if line.startswith("a "))
    assert line.split() == ["a", "silent", "55", "min", "ago", "fallback"]


def test_accuracy_is_that_of_the_history_and_names_the_worst(world: World, terminal: Terminal) -> None:
    grow(world, "a", "b")
    told = terminal.json("accuracy", "--worst", "5", "--metric", "cpu_pct")
    one = world.get("/history?server=a&metric=cpu_pct")["metrics"]["cpu_pct"]["accuracy"]["1"]
    other = world.get("/history?server=b&metric=cpu_pct")["metrics"]["cpu_pct"]["accuracy"]["1"]
    both = told["metrics"]["cpu_pct"]["1"]
    assert both["bins"] == one["bins"] + other["bins"] == 30
    assert both["error"] == pytest.approx(np.mean([one["error"], other["error"]]))
    assert both["last_value_error"] == pytest.approx(1.5)  # one climbs by 1 a bin, the other by 2
    ratios = {(item["server"], item["horizon"]): item["ratio"] for item in told["worst"]}
    assert ratios == {("a", 1): one["ratio"], ("b", 1): other["ratio"]}
    alone = terminal.json("accuracy", "--server", "a")
    assert alone["metrics"]["cpu_pct"]["1"] == one
    assert alone["metrics"]["mem_pct"] == {}
    assert "cpu_pct  5 min" in terminal.run("accuracy")


def test_capacity_marks_silent_servers_and_says_what_it_is_of(world: World, terminal: Terminal) -> None:
    for number in range(8):
        assert (
            world.post(("live", number, 95.0), *([("gone", 0, 95.0)] if not number else [])).status_code
            == 200
        )
        world.service.cycle()
    screen = terminal.run("capacity")
    assert (
        "2 series of 2 servers, 1 of them of servers that are silent; as of the bin 2020-01-01T00:30"
        in screen
    )
    lines = [line.split() for line in screen.splitlines() if line.startswith(("live", "gone"))]
    assert [(line[0], line[-1]) for line in lines] == [("live", "-"), ("gone", "2020-01-01T00:00:00Z")]
    assert world.post(("live", 9, 95.0)).status_code == 200  # closes a bin that no sweep took yet
    assert "1 newer bin not forecast from yet" in terminal.run("capacity")


def test_capacity_tells_who_is_over_and_why_there_is_no_date(world: World, terminal: Terminal) -> None:
    for number in range(4):
        world.post(("high", number, 93.0), ("low", number, 3.0))
        world.service.cycle()
    screen = terminal.run("capacity")
    assert "90 % within 8 hours: 1 series of 2 servers" in screen
    assert "cpu_pct: by the history; no answer has settled yet, so none was checked" in screen
    assert "mem_pct:" not in screen, "no server sends it"
    assert "  no server sends mem_pct\n" in screen
    line = next(line for line in screen.splitlines() if line.startswith("high"))
    assert line.split()[:7] == ["high", "cpu_pct", "over", "93.0", "-", "-", "-"], "no time ahead: it is over"
    assert line.split()[7:] == ["2020-01-01T00:00:00Z", "or", "before", "-"]
    assert "by when: no day of 'disk_usage_pct' is known" in screen
    told = terminal.json("capacity", "--server", "low", "--limit", "80")
    assert (told["within"]["limit"], [row["server"] for row in told["within"]["rows"]]) == (80.0, ["low"])
    assert "limit must be one of" in terminal.run("capacity", "--limit", "85", code=ExitCode.BAD_SETTINGS)
    assert "nearest is low" in terminal.run("capacity", "--server", "lo", code=ExitCode.BAD_SETTINGS)


def test_a_large_fleet_is_judged_over_a_shorter_time_and_says_so(
    world: World, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleetcast.serving.past.MOST_ROWS", 2 * 4 * 3 * 6)
    grow(world, "a", "b")
    told = terminal.json("accuracy")
    assert (told["start"], told["end"]) == ("2020-01-01T00:50:00Z", "2020-01-01T01:20:00Z")
    assert told["metrics"]["cpu_pct"]["1"]["bins"] == 2 * 6


def test_what_the_daemon_does_not_know_is_exit_code_2_with_the_nearest(
    world: World, terminal: Terminal
) -> None:
    grow(world, "web-01", bins=1)
    said = terminal.run("accuracy", "--server", "web-1", code=ExitCode.BAD_SETTINGS)
    assert "unknown server 'web-1', nearest is web-01" in said
    said = terminal.run("accuracy", "--metric", "fans", code=ExitCode.BAD_SETTINGS)
    assert "'fans' is not forecast (one of cpu_pct, mem_pct" in said
    terminal.url = "here"
    assert "must look like http://" in terminal.run("status", code=ExitCode.BAD_SETTINGS)


@pytest.mark.parametrize("name", ODD)
def test_an_odd_name_is_only_ever_a_name(world: World, terminal: Terminal, name: str) -> None:
    grow(world, name, bins=2)
    assert [row["server"] for row in terminal.json("servers", "list", "--filter", name)] == [name]
    assert terminal.json("accuracy", "--server", name)["server"] == name
    assert name in terminal.run("servers", "list")


@pytest.mark.parametrize("words", QUESTIONS, ids=" ".join)
def test_a_daemon_that_is_down_or_refuses_the_key_is_exit_code_6(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = World(tmp_path, api_key=KEY).start()
    terminal = Terminal(str(guarded.client.base_url), capsys)
    try:
        says = terminal.run(*words, code=ExitCode.COULD_NOT_LOOK)
        assert f"asks for a key (set {API_KEY_VARIABLE} to the daemon's key)" in says
        monkeypatch.setenv(API_KEY_VARIABLE, "another")
        assert "refuses the key" in terminal.run(*words, code=ExitCode.COULD_NOT_LOOK)
        monkeypatch.setenv(API_KEY_VARIABLE, KEY)
        terminal.run(*words)
    finally:
        guarded.end()
    says = terminal.run(*words, code=ExitCode.COULD_NOT_LOOK)
    assert "does not answer: " in says
    assert "is it running?" in says


def findings(terminal: Terminal, code: int = 1) -> dict[str, dict[str, str]]:
    return {item["check"]: item for item in terminal.json("doctor", code=code)["findings"]}


def test_the_doctor_says_what_would_be_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path, api_key=KEY).start()
    terminal = Terminal(str(world.client.base_url), capsys)
    assert findings(terminal)["key"]["right"].startswith(f"export {API_KEY_VARIABLE}=")
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    world.client.headers["X-API-Key"] = KEY
    found = findings(terminal)
    assert (found["key"]["state"], found["agents"]["says"]) == ("ok", "no record ever came")
    assert found["folder"]["state"] == "not looked"  # there is none by the name in the settings
    assert found["problem"]["right"].startswith("start adaptive_retraining_daemon.py")
    assert found["model"]["right"].startswith("wait for the first training")
    (tmp_path / "data_buffer").mkdir()
    assert f"run these programs in {tmp_path}" in findings(terminal)["folder"]["right"]
    monkeypatch.setenv("FLEETCAST_PATHS_DATA_BUFFER_DIR", str(tmp_path / "data"))
    world.post(("a", 0, 1.0), ("b", 12, 1.0))
    found = findings(terminal)
    assert (found["folder"]["state"], found["servers"]["says"]) == ("ok", "1 of 2 are silent: a")
    monkeypatch.setattr("fleetcast.console.doctor._FREE_GB", 1e9)
    assert findings(terminal)["disk"]["state"] == "bad"
    world.end()
    assert findings(terminal)["daemon"]["right"].startswith("systemctl status")
    monkeypatch.setenv("FLEETCAST_SERVER_PORT", "0")
    assert "server.port must be >= 1" in findings(terminal)["settings"]["says"]


def test_the_doctor_sees_a_clock_that_is_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(tmp_path, mode="system").start()  # by a clock of the year 2020
    found = findings(Terminal(str(world.client.base_url), capsys))
    world.end()
    assert (found["clock"]["state"], "days apart" in found["clock"]["says"]) == ("bad", True)


def test_settings_show_where_each_value_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fleetcast.toml").write_text("[server]\nport = 8001\nhold_s = 2.0\n")
    monkeypatch.setenv("FLEETCAST_SERVER_PORT", "8002")
    terminal = Terminal("", capsys)
    shown = terminal.json("settings", "show")
    assert shown["server.port"] == {"value": 8002, "from": "FLEETCAST_SERVER_PORT"}
    assert shown["server.hold_s"] == {"value": 2.0, "from": "fleetcast.toml"}
    assert shown["server.host"]["from"] == "default"
    assert "good: 2 of " in terminal.run("settings", "check")
    monkeypatch.setenv("FLEETCAST_ALERTS_SLACK_URL", "https://example.com/topsecret")
    assert "topsecret" not in terminal.run("settings", "show")
    assert terminal.json("settings", "show")["alerts.slack_url"]["value"] == "(set, not shown)"
    monkeypatch.setenv("FLEETCAST_SERVER_PROT", "1")
    says = terminal.run("settings", "check", code=ExitCode.BAD_SETTINGS)
    assert "nearest is FLEETCAST_SERVER_PORT" in says


def test_settings_check_reads_what_the_daemons_would_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fleetcast.toml").write_text("""
[remote_write]
server_pattern = ".*"
rules = ["x_pct = sum(", "y = 1"]
[alerts]
rules = ["X: drift_score > nan critical"]
slack_url = "ftp://secret"
""")
    terminal = Terminal("", capsys)
    says = terminal.run("settings", "check", code=ExitCode.BAD_SETTINGS)
    for wrong in (
        "server_pattern needs a group",
        "'x_pct = sum('",
        "'y = 1'",
        "alerts.slack_url",
        "must look like",
    ):
        assert wrong in says
    assert "secret" not in says


def test_bash_completes_commands_and_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = Terminal("", capsys).run("completion", "bash")
    fake = tmp_path / "fleetcast"
    fake.write_text(
        '#!/bin/sh\n[ "$1" = --help ] && { echo "  servers    list"; echo "  status     show"; }\n'
        '[ "$1" = servers ] && echo "usage: [--json] {list}"\n'
    )
    fake.chmod(0o755)
    asked = """
complete_words() { COMP_WORDS=(fleetcast "$@"); COMP_CWORD=$#; _fleetcast; echo "${COMPREPLY[*]}"; }
complete_words s; complete_words servers ''; complete_words servers --
"""
    done = subprocess.run(
        ["bash", "-c", script + asked],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["servers status", "--json list", "--json"]


def test_a_reader_that_leaves_early_is_no_failure(world: World) -> None:
    grow(world, *(f"server-{number}" for number in range(50)), bins=1)
    line = f"{{ fleetcast servers list --url {world.client.base_url} || echo failed >&2; }} | true"
    python = Path(__file__).parents[1]
    function = f'fleetcast() {{ PYTHONPATH={python} {python}/.venv/bin/python -m fleetcast "$@"; }}\n'
    done = subprocess.run(["bash", "-c", function + line], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_every_answer_for_operators_has_a_json_form() -> None:
    ours = [name for name, (module, _) in COMMANDS.items() if ".console." in module]
    told = ["status", "servers", "accuracy", "capacity", "alerts", "doctor", "settings", "completion"]
    assert ours == told


def test_what_the_newest_whole_day_was_is_not_called_now() -> None:
    soon = {"limit": 90.0, "horizon_s": 28800, "matching": 0, "servers": 1, "origin": None}
    row = {"server": "a", "now": 96.0, "per_day": 1.0, "full_between": None, "why_no_date": OVER}
    dates = {"metric": "disk_usage_pct", "limit": 95.0, "days": 9, "with_date": 0, "matching": 1}
    lines = [
        *_capacity_lines(
            {**soon, "metrics": {}, "rows": []}, {**dates, "newest_day": "2026-01-13", "rows": [row]}
        )
    ]
    assert lines[-2].split()[:3] == ["server", "newest", "day"]
    assert "it was over the limit" in lines[-1]


def test_capacity_says_why_its_source_answers() -> None:
    scores = {"forecast": 0.02, "history": 0.0}
    record = {"by": "forecast", "why": HARDLY_PASSED, "windows": 1200, "brier": scores}
    assert f"by the forecast ({HARDLY_PASSED}); Brier score of 1,200" in _say_record(record)
