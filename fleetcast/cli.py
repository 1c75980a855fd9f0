"""`fleetcast`: one command for everything that is installed; each subcommand is a program of its own.

    fleetcast infer --port 8000       what `python tft_inference_daemon.py --port 8000` does
    fleetcast version --json          which release this is, and what it runs on

Owns: the names of the subcommands and which module each one runs. The rest of the line, `--help`
included, belongs to that module's `main`, and so does the exit code. Does not know: flags, settings,
what the programs do: a module is imported only when it is run, so that `fleetcast --help` stays light.
"""

import importlib
import json
import platform
import sys
from collections.abc import Sequence
from importlib import metadata

from fleetcast import __version__
from fleetcast.errors import ExitCode
from fleetcast.setting import nearest

_PROMOTION = "fleetcast.promotion.command"
_CONSOLE = "fleetcast.console.command"
# subcommand: the module whose main(argv) runs it, and what it is for
COMMANDS = {
    "infer": ("tft_inference_daemon", "take metrics in, forecast them, answer on port 8000"),
    "retrain": ("adaptive_retraining_daemon", "watch for drift and retrain; --once looks once"),
    "train": ("tft_trainer", "train a model and let the gate decide whether it serves"),
    "drift": ("drift_monitor", "print the drift report of the present state"),
    "buffer": ("data_buffer", "print what the data buffer holds"),
    "agent": ("fleetcast.sources.agent", "send this host's metrics every few seconds"),
    "replay": ("fleetcast.sources.replay", "send recorded metrics, in their own time or faster"),
    "import": ("fleetcast.backfill.command", "bring history in: from a Prometheus, Parquet or CSV"),
    "live": ("fleetcast.live", "both daemons and the agent on this machine until Ctrl+C"),
    "demo": ("fleetcast.demo.play", "the whole loop on bundled real data, in minutes"),
    "status": (_CONSOLE, "show fleet, model, drift, trainings and problems on one screen"),
    "servers": (
        "fleetcast.console.servers",
        "list the servers and their states, leave some out, bring them back",
    ),
    "accuracy": (_CONSOLE, "show forecast errors beside those of repeating the last value"),
    "capacity": (_CONSOLE, "show who passes a limit within hours, and which disks are full by when"),
    "alerts": ("fleetcast.console.alerts", "list what fires, test a channel, silence a rule"),
    "doctor": ("fleetcast.console.doctor", "say what is wrong, and what would be right"),
    "settings": (_CONSOLE, "check the settings; show where each value comes from"),
    "completion": (_CONSOLE, "print the completion of this command's words for bash"),
    "models": (_PROMOTION, "list the versions, which one serves, and their verdicts"),
    "history": (_PROMOTION, "print in words what put models into service, and who"),
    "rollback": (_PROMOTION, "put the version before, or another one, back into service"),
    "promote": (_PROMOTION, "put a version into service"),
    "approve": (_PROMOTION, "put the version into service that waits"),
    "veto": (_PROMOTION, "let a version never go into service by itself"),
    "hold": (_PROMOTION, "let no training put a model into service until resume"),
    "resume": (_PROMOTION, "end a hold, a pause and a cooldown"),
    "pause": (_PROMOTION, "start no training until a time"),
    "train-now": (_PROMOTION, "order a training"),
}
VERSION = "version"
LIBRARIES = (
    "torch",
    "lightning",
    "pytorch-forecasting",
    "numpy",
    "pandas",
    "pyarrow",
)  # what decides the numbers


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in COMMANDS:
        program = importlib.import_module(COMMANDS[command][0])
        return int(program.main(rest, prog=f"fleetcast {command}"))
    if command in (VERSION, "--version"):
        return _tell_version(rest)
    if command in ("-h", "--help"):
        print(_usage())
        return int(ExitCode.OK)
    print(_refusal(command) if command else _usage(), file=sys.stderr)
    return int(ExitCode.BAD_SETTINGS)


def _usage() -> str:
    lines = [f"  {name:<10} {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fleetcast COMMAND [flags]",
            "",
            "Forecast the metrics of a server fleet, find drift, and retrain the model.",
            "",
            "commands:",
            *lines,
            f"  {VERSION:<10} print the release; --json adds what it runs on",
            "",
            "fleetcast COMMAND --help shows the flags of one command.",
        ]
    )


def _refusal(command: str) -> str:
    return (
        f"fleetcast: unknown command {command}{nearest(command, [*COMMANDS, VERSION])} "
        "(fleetcast --help lists them)"
    )


def _tell_version(flags: Sequence[str]) -> int:
    if flags == ["--json"]:
        runs_on = {"python": platform.python_version(), **{name: release(name) for name in LIBRARIES}}
        print(json.dumps({"version": __version__, **runs_on}))
    elif not flags:
        print(f"fleetcast {__version__}")
    else:
        print(f"fleetcast version: unknown {' '.join(flags)}, --json is all it takes", file=sys.stderr)
        return int(ExitCode.BAD_SETTINGS)
    return int(ExitCode.OK)


def release(library: str) -> str | None:
    """Return the installed release of a library, which this does not import; None where there is none."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
