"""Where values of settings stand: a TOML file, the environment.

Owns: reading both, and naming the nearest setting when a name is unknown.
Does not know: what a valid value is (`setting.py`).
"""

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fleetcast.setting import ENV_PREFIX, SettingInfo, parsed

DEFAULT_CONFIG = Path("fleetcast.toml")


def from_file(
    config: Path | None, known: Mapping[str, SettingInfo], problems: list[str]
) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, value, where it stands) of a TOML file; what is wrong with it joins `problems`."""
    path = config or DEFAULT_CONFIG
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if config is not None:
            problems.append(f"{path} does not exist")
        return
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read: {error}")
        return
    for part, table in tables.items():
        if not isinstance(table, dict):
            problems.append(f"{part} must be a table like [server] ({path})")
            continue
        for name, value in table.items():
            key = f"{part}.{name}"
            if key in known:
                yield key, value, str(path)
            else:
                problems.append(f"unknown setting {key}{_nearest(key, list(known))} ({path})")


def from_environment(
    environ: Mapping[str, str], known: Mapping[str, SettingInfo], problems: list[str]
) -> Iterator[tuple[str, Any, str]]:
    """Yield the same of the environment: every variable of our prefix must be a setting."""
    names = {info.environment: key for key, info in known.items()}
    for name, value in environ.items():
        if not name.startswith(ENV_PREFIX):
            continue
        if name in names:
            yield names[name], parsed(known[names[name]].kind, value), name
        else:
            problems.append(f"unknown variable {name}{_nearest(name, list(names))}")


def _nearest(name: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)
    return f", nearest is {close[0]}" if close else ""
