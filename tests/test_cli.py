"""Claims about `fleetcast`: which program a subcommand runs, and what a wrong word leads to."""

import ast
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from house import PROGRAMS

from fleetcast import __version__, cli

ROOT = Path(__file__).parents[1]
FIVE = {
    "infer": "tft_inference_daemon",
    "retrain": "adaptive_retraining_daemon",
    "train": "tft_trainer",
    "drift": "drift_monitor",
    "buffer": "data_buffer",
}


def test_each_of_the_five_programs_has_its_command() -> None:
    assert {name: module for name, (module, _) in cli.COMMANDS.items() if module in PROGRAMS} == FIVE
    assert sorted(FIVE.values()) == sorted(PROGRAMS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_rest_of_the_line_and_the_exit_code_are_the_programs(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sequence[str]] = []

    def run(argv: Sequence[str], *, prog: str) -> int:
        seen.append(argv)
        assert prog == f"fleetcast {command}"
        return 4

    monkeypatch.setitem(sys.modules, cli.COMMANDS[command][0], SimpleNamespace(main=run))  # type: ignore[arg-type]

    assert cli.main([command, "--port", "1", "--help"]) == 4
    assert seen == [["--port", "1", "--help"]]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_leads_to_a_main_that_takes_the_flags(command: str) -> None:
    module = cli.COMMANDS[command][0]
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert [argument.arg for argument in main.args.args] == ["argv"]


@pytest.mark.parametrize("command", FIVE)
def test_the_help_of_a_command_is_the_help_of_its_program_under_the_name_that_was_typed(command: str) -> None:
    def help_of(*program: str) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        usage, _, rest = done.stdout.partition("\n\n")
        return usage, rest

    usage, rest = help_of("-m", "fleetcast", command)
    program_usage, program_rest = help_of(f"{FIVE[command]}.py")
    assert usage.startswith(f"usage: fleetcast {command} ")
    assert program_usage.startswith(f"usage: {FIVE[command]}.py ")
    assert rest == program_rest
    assert "exit codes: 0" in rest


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert [name for name in (*cli.COMMANDS, "version") if f"\n  {name} " not in printed] == []


def test_without_a_command_the_help_is_shown_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("usage: fleetcast COMMAND")


@pytest.mark.parametrize(
    ("typed", "meant"), [("infre", "infer"), ("retain", "retrain"), ("vesion", "version")]
)
def test_an_unknown_command_is_answered_with_the_nearest(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([typed]) == 2
    assert f"unknown command {typed}, nearest is {meant}" in capsys.readouterr().err


def test_a_word_that_is_close_to_no_command_is_answered_without_a_guess(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["xyz"]) == 2
    assert "unknown command xyz (fleetcast --help lists them)" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_the_version_is_the_packages(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"fleetcast {__version__}\n"


def test_the_version_as_json_says_what_decides_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["version"] == __version__
    assert said["torch"].startswith("2.13.0")


def test_a_library_that_is_not_installed_has_no_release() -> None:
    assert cli.release("no-such-library") is None


def test_version_takes_no_other_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version", "--yaml"]) == 2
    assert "--yaml" in capsys.readouterr().err
