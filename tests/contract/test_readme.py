"""A newcomer's first minutes: every command of the README, as printed, in an empty folder.

The folder holds what a checkout holds and nothing else: no settings, no state. The requirements are
those of this run's environment. The examples of the other documents for a running daemon follow; those that
need a key, versions of a model or shards are in `test_documents.py`.
"""

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from datetime import UTC, datetime

import pandas as pd
import pytest
from alert_sink import Sink
from spec_blocks import ROOT, commands
from stub_prometheus import StubPrometheus
from workplace import Workplace, installed, is_free, until

from fleetcast.clock import SystemClock, iso_z

pytestmark = pytest.mark.slow

CHECKOUT = ("Makefile", "fleetcast", "models", "samples", "requirements.txt", "requirements-torch.txt")
NOT_RUN_HERE = {
    "make demo": "takes minutes; .ci/run runs it, and tests/test_demo.py reads its answers",
    "make test": "is this run",
}
GOES_ON = ("tft_inference_daemon.py", "adaptive_retraining_daemon.py --interval")
DOCUMENTS = {  # their examples for a running daemon; "" = every command
    "docs/ingest.md": "curl .*localhost:8000",
    "docs/operations.md": r"curl .*localhost:8000/\w+/|^(cat|tail) .*\| jq|^fleetcast servers list",
    "docs/page.md": "",
    "docs/capacity.md": "",
    "docs/alerts.md": "",
    "docs/import.md": "",
    "docs/coming-from.md": "",
}
COLUMNS = {"docs/import.md": "timestamp,host,CPU", "docs/coming-from.md": "ds,host,y"}  # of records.csv
MAY_SAY_SO = {"fleetcast alerts list": 1}  # exit code 1: something fires, as on a disk that is nearly full


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    taken = [port for port in (8000, 9090) if not is_free(port)]
    if taken:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"taken on this machine: ports {taken}")
    folder = tmp_path_factory.mktemp("newcomer")
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in CHECKOUT)]:
        (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)
    own = Workplace(folder)
    own.more_environment["MAKEFLAGS"] = "-o .venv/.requirements"  # the installation of this run will do
    with Sink() as slack:
        own.more_environment["FLEETCAST_ALERTS_SLACK_URL"] = slack.url
        yield own
    assert set(own.stop()) <= {0}, "a daemon did not end cleanly on SIGTERM"


@pytest.fixture(scope="module")
def printed(place: Workplace) -> dict[str, str]:
    """Run the README from its first command to its last; return what each command printed."""
    outputs: dict[str, str] = {}
    for command in commands(ROOT / "README.md"):
        if command in NOT_RUN_HERE:
            continue
        if command == "make run":
            outputs[command] = watched(place, command)
        elif any(program in command for program in GOES_ON):
            place.start(command)
            until(lambda: place.run("curl -sf localhost:8000/ready").returncode == 0, place)
            if "retraining" in command:  # it owns its folder by then, so `--once` cannot come before it
                until(lambda: (place.folder / "retraining_state.json").exists(), place)
        else:
            done = place.run(command)
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            outputs[command] = done.stdout
    return outputs


def watched(place: Workplace, command: str) -> str:
    """Look on until the first line of status, then press Ctrl+C."""
    process = place.start(command, new_session=True)
    output = place.folder / "stdout-0.txt"
    until(lambda: "drift: " in output.read_text(), place)
    os.killpg(process.pid, signal.SIGINT)
    code = process.wait(60)
    place.started.remove(process)
    assert code in (0, 130, -signal.SIGINT), output.read_text()
    return output.read_text()


def test_the_page_loads_and_the_first_alert_reaches_its_channel(
    printed: dict[str, str], place: Workplace
) -> None:
    page = place.run("curl -sfL localhost:8000/ui/")
    assert "fleetcast</title>" in page.stdout, page
    with Sink() as own, pytest.MonkeyPatch.context() as patch:
        patch.setitem(place.more_environment, "FLEETCAST_ALERTS_SLACK_URL", own.url)
        done = place.run(installed("fleetcast alerts test"))
        assert done.returncode == 0, (done.stdout, done.stderr)
        (told,) = own.bodies()
    assert "this is a test, nothing is wrong" in json.dumps(told)


def of(printed: dict[str, str], part: str) -> str:
    (found,) = (text for command, text in printed.items() if part in command)
    return found


def test_every_command_of_the_readme_is_run_or_says_why_not(printed: dict[str, str]) -> None:
    all_commands = commands(ROOT / "README.md")
    assert NOT_RUN_HERE.keys() <= set(all_commands)
    started = {command for command in all_commands if any(program in command for program in GOES_ON)}
    assert set(all_commands) == printed.keys() | NOT_RUN_HERE.keys() | started
    assert len(started) == 2


def test_the_readmes_record_is_taken(printed: dict[str, str]) -> None:
    answer = json.loads(of(printed, "/feed/data"))
    assert (answer["records_received"], answer["records_rejected"]) == (1, 0), answer
    predictions = json.loads(of(printed, "/predictions/current"))
    assert predictions["web-01"]["current"] == {"cpu_pct": 12.5, "mem_pct": 40.1}
    assert predictions["web-01"]["source"] == "warming_up"
    assert "1 rows" in of(printed, "data_buffer.py")


def test_make_run_ends_all_three_on_ctrl_c(printed: dict[str, str]) -> None:
    assert re.findall(r"ending (\w+): exit code (\d)", printed["make run"]) == [
        ("agent", "0"),
        ("retraining", "0"),
        ("inference", "0"),
    ]


@pytest.fixture(scope="module")
def months_of_history(place: Workplace) -> Iterator[None]:
    """A Prometheus at its usual port, and files to import; of the month asked for, an hour holds records."""
    now = SystemClock().now().timestamp()
    times = [iso_z(datetime.fromtimestamp(now - 60 * age, UTC)) for age in range(60, 0, -1)]
    frame = pd.DataFrame({"timestamp": pd.to_datetime(times), "server_name": "old-01", "cpu_pct": 12.5})
    frame.to_parquet(place.folder / "records.parquet")
    with StubPrometheus(first_s=int(now) - 3600, port=9090):
        yield


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_examples_of_the_other_documents_work_too(
    printed: dict[str, str], place: Workplace, months_of_history: None, name: str
) -> None:
    if name in COLUMNS:
        rows = [COLUMNS[name], *(f"{iso_z(SystemClock().now())},old-0{number},12.5" for number in (1, 2))]
        (place.folder / "records.csv").write_text("\n".join(rows))
        for state in place.folder.glob("fleetcast_import_*.json"):  # of the other document: it goes on there
            state.unlink()
    if name == "docs/alerts.md":  # written after the first check
        until(lambda: (place.folder / "alerts.json").exists(), place)
    examples = [command for command in commands(ROOT / name) if re.search(DOCUMENTS[name], command, re.S)]
    assert examples, "the examples moved"
    for command in examples:
        done = place.run(installed(command))
        assert done.returncode in (0, MAY_SAY_SO.get(command, 0)), (command, done.stdout, done.stderr)
        if "/feed/data" in command:
            assert json.loads(done.stdout)["records_rejected"] == 0, done.stdout
        if command.startswith("fleetcast import"):
            assert re.search(r"accepted=[1-9]\d* refused=0", done.stdout), (command, done.stdout)
