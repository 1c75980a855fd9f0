"""A newcomer's first minutes: every command of the README, as printed, in an empty folder.

The folder holds what a checkout holds and nothing else: no settings, no state. The requirements are
those of this run's environment. The examples of the other documents for a running daemon follow.
"""

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alert_sink import Sink
from spec_blocks import FENCE, ROOT, Block
from workplace import Workplace, is_free, until

pytestmark = pytest.mark.slow

CHECKOUT = ("Makefile", "fleetcast", "models", "samples", "requirements.txt", "requirements-torch.txt")
NOT_RUN_HERE = {
    "make demo": "takes minutes; .ci/run runs it, and tests/test_demo.py reads its answers",
    "make test": "is this run",
}
GOES_ON = ("tft_inference_daemon.py", "adaptive_retraining_daemon.py --interval")
DOCUMENTS = (
    "docs/ingest.md",
    "docs/operations.md",
    "docs/page.md",
    "docs/capacity.md",
)  # whose examples speak to a running daemon
EXAMPLE = re.compile(r"curl .*localhost:8000|^(cat|tail) .*\| jq|^fleetcast (capacity|servers list)", re.S)


def commands(document: Path) -> list[str]:
    """Return the commands of a document's shell blocks, as printed, in order."""
    blocks = [Block("", *match.groups()) for match in FENCE.finditer(document.read_text(encoding="utf-8"))]
    return [command for block in blocks if block.language == "bash" for command in block.commands()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    if not is_free(8000):
        (pytest.fail if os.environ.get("CI") else pytest.skip)("port 8000 is taken on this machine")
    folder = tmp_path_factory.mktemp("newcomer")
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in CHECKOUT)]:
        (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)
    own = Workplace(folder)
    own.more_environment["MAKEFLAGS"] = "-o .venv/.requirements"  # the installation of this run will do
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


def installed(command: str) -> str:
    """Return a command of the installed package as a checkout has it."""
    return re.sub(r"^fleetcast ", "python -m fleetcast ", command)


def test_the_page_loads_and_the_first_alert_reaches_its_channel(
    printed: dict[str, str], place: Workplace
) -> None:
    page = place.run("curl -sfL localhost:8000/ui/")
    assert "fleetcast</title>" in page.stdout, page
    with Sink() as slack:
        place.more_environment["FLEETCAST_ALERTS_SLACK_URL"] = slack.url
        done = place.run(installed("fleetcast alerts test"))
        del place.more_environment["FLEETCAST_ALERTS_SLACK_URL"]
        assert done.returncode == 0, (done.stdout, done.stderr)
        (told,) = slack.bodies()
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


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_examples_of_the_other_documents_work_too(
    printed: dict[str, str], place: Workplace, name: str
) -> None:
    examples = [command for command in commands(ROOT / name) if EXAMPLE.search(command)]
    assert examples, "the examples moved"
    for command in examples:
        done = place.run(installed(command))
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        if "/feed/data" in command:
            assert json.loads(done.stdout)["records_rejected"] == 0, done.stdout
