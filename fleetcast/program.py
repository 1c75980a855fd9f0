"""How a program of this project runs: its errors become exit codes; where its shipped files are.

Owns: how an answer is printed, the lines on stderr when a program ends badly, which folder a program
reads as the buffer, in whose folder root leaves no file, where `models/` and `samples/` lie in a
checkout and in an installed package, and where a child finds the package. Does not know: what the
programs do.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from fleetcast.errors import CannotLook, CannotStart, FleetcastError, SettingsError, printable
from fleetcast.settings import Settings

_PACKAGE = Path(__file__).resolve().parent


def run_program(name: str, work: Callable[[], int]) -> int:
    """Do the work of a program and return its exit code; print an error of ours without a traceback.

    Args:
        name: what the lines on stderr begin with.
        work: returns the exit code.
    """
    os.umask(os.umask(0o027) | 0o027)  # what a program writes is for its user and its group
    try:
        return int(work())
    except FleetcastError as error:
        problems = error.problems if isinstance(error, SettingsError) else (str(error),)
        for problem in problems:
            print(f"{name}: {_safe(problem)}", file=sys.stderr)
        if isinstance(error, SettingsError) and error.hint:
            print(f"{name}: {_safe(error.hint)}", file=sys.stderr)
        return int(error.exit_code)


def child_environment() -> dict[str, str]:
    """Return the environment of a child that runs a module of this package, wherever the package lies."""
    paths = [str(_PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def require_ray(engine: str, key: str) -> None:
    """Refuse `ray` where Ray is not installed; nothing is imported.

    Args:
        key: of the setting.
    Raises:
        SettingsError: with what to type.
    """
    if engine == "ray" and find_spec("ray") is None:
        hint = "pip install --no-deps --require-hashes -r requirements-cluster.txt"
        raise SettingsError([f"{key} is ray, and Ray is not installed"], hint=hint)


def tell(lines: Iterable[str], document: object = None) -> None:
    """Print the lines, or a document as JSON where there is one; a reader such as `head` may leave early."""
    try:
        print("\n".join(lines) if document is None else json.dumps(document, indent=2), flush=True)
    except BrokenPipeError:  # the interpreter flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _safe(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def require_own_folder(folder: Path) -> None:
    """Refuse to leave files of root in a daemon's folder, which the daemon could not write any more.

    Raises:
        CannotStart: with what to type instead.
    """
    place = folder if folder.exists() else folder.parent
    owner = place.stat().st_uid if place.exists() else os.geteuid()
    if os.geteuid() == 0 and owner != 0:
        hint = f"sudo -u '#{owner}' fleetcast ..."
        raise CannotStart(f"{folder} belongs to uid {owner}: run this command as that user", hint=hint)


def shipped_folder(name: str) -> Path:
    """Return a folder that is shipped with the program: package data, else beside the package."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def buffer_folder(settings: Settings) -> Path:
    """Return the folder of the buffer, for a program that only reads.

    Raises:
        CannotLook: there is no such folder; an empty one is a buffer without records.
    """
    folder = Path(settings.paths.data_buffer_dir)
    if not folder.is_dir():
        hint = "name the buffer's folder with --data-buffer-dir, or start the inference daemon"
        raise CannotLook(f"{folder} is no folder of a buffer", hint=hint)
    return folder


def models_dir(settings: Settings) -> Path:
    """Return the folder of the shipped base model."""
    return Path(settings.paths.models_dir or shipped_folder("models"))


def with_models_dir(settings: Settings) -> Settings:
    """Return the settings with the folder of the shipped base model in them."""
    return replace(settings, paths=replace(settings.paths, models_dir=str(models_dir(settings))))
