"""One setting: how it is declared, where its value is read from, and how it is checked.

Owns: the metadata of a field (help, unit, bounds, choices), what a valid value is, reading the TOML
file and the environment, how long a key has to be, the nearest name to an unknown one, how a setting
overrides a literal of a program, and the layout of docs/settings.md. Does not know: which settings
there are (`settings`).
"""

import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fleetcast.errors import CorruptFile
from fleetcast.files import read_regular

ENV_PREFIX = "FLEETCAST_"
DEFAULT_CONFIG = Path("fleetcast.toml")
KEY_MIN_CHARACTERS = 16
CONFIG_MAX_BYTES = 2**20
_CLOSE = (
    0.75  # share of equal letters from which a name is suggested: server.prot is close, server.zzz is not
)

PAGE_HEAD = f"""# Settings

Made by `python -m fleetcast.settings > docs/settings.md`; do not edit (a test compares them).

Order: default, then the TOML file (`--config FILE`, else `./fleetcast.toml` if there is one), then the
environment (`{ENV_PREFIX}<PART>_<NAME>`, for example `{ENV_PREFIX}SERVER_PORT=8001`; lists are comma
separated), then flags. An unknown name or a value out of bounds ends a program with exit code 2 and
every problem in one message.

```toml
# fleetcast.toml
[server]
port = 8001

[bins]
forecast_metrics = ["cpu_pct", "mem_pct", "net_in_mb_s"]
```

The API key is no setting: it comes from the environment variable `TFT_API_KEY` only, so that it
stands in no file.
"""

Number = TypeVar("Number", int, float)


def setting(
    default: Any,
    help_text: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    is_secret: bool = False,
) -> Any:
    """Declare one field: its default, help, unit and bounds (inclusive).

    A secret's value is in no message, no `repr` and no answer of `fleetcast settings show`.
    """
    meta = {"help": help_text, "unit": unit, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata={**meta, "is_secret": is_secret}, repr=not is_secret)


def override(literals: Mapping[str, Number], part: object) -> dict[str, Number]:
    """Return the literals of a program, each replaced by the setting of its name where that is given.

    >>> from fleetcast.settings import DriftSettings
    >>> override({"per_threshold": 0.10, "dss_threshold": 0.20}, DriftSettings(dss_threshold=0.3))
    {'per_threshold': 0.1, 'dss_threshold': 0.3}
    """
    chosen = {name: getattr(part, name) for name in literals}
    return {name: literal if chosen[name] is None else chosen[name] for name, literal in literals.items()}


@dataclass(frozen=True)
class SettingInfo:
    """One setting as documents and messages name it."""

    part: str
    name: str
    kind: Any
    default: Any
    meta: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Return the TOML key, `part.name`."""
        return f"{self.part}.{self.name}"

    def say(self, value: object) -> str:
        """Return a value as a message may show it."""
        return f"a secret of type {type(value).__name__}" if self.meta["is_secret"] else repr(value)

    @property
    def environment(self) -> str:
        """Return the name of the environment variable."""
        return f"{ENV_PREFIX}{self.part}_{self.name}".upper()


def parse(kind: Any, text: str) -> Any:
    """Return environment text as the kind of value a TOML file would hold."""
    kind = _plain_kind(kind)
    if typing.get_origin(kind) is tuple:
        return [parse(typing.get_args(kind)[0], item.strip()) for item in text.split(",") if item.strip()]
    for number in (int, float):
        if kind is number:
            try:
                return number(text)
            except ValueError:
                return text
    return text


def _plain_kind(kind: Any) -> Any:
    """Return T of `T | None`."""
    if isinstance(kind, types.UnionType):
        return next(arg for arg in typing.get_args(kind) if arg is not types.NoneType)
    return kind


def check(info: SettingInfo, value: Any) -> Any:
    """Return the value as the program uses it, or raise a ValueError that says what would be right."""
    kind = _plain_kind(info.kind)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)) or (not value and info.default):
            raise ValueError(f"must be a non-empty list, got {info.say(value)}")
        return tuple(_check_item(info, kind, value, place) for place in range(len(value)))
    return _check_scalar(info, kind, value)


def _check_item(info: SettingInfo, kind: Any, value: Sequence[Any], place: int) -> Any:
    try:
        return _check_scalar(info, typing.get_args(kind)[0], value[place])
    except ValueError as error:
        raise ValueError(f"(element {place + 1} of {len(value)}) {error}") from error


def _check_scalar(info: SettingInfo, kind: Any, value: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    choices = info.meta["choices"]
    if choices and (type(value) is not kind or value not in choices):
        raise ValueError(f"must be one of {', '.join(map(str, choices))}, got {info.say(value)}")
    if type(value) is not kind:
        raise ValueError(f"must be {kind.__name__}, got {info.say(value)}")
    if kind is str and "\0" in value:
        raise ValueError(f"must hold no NUL, got {info.say(value)}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"must be finite, got {info.say(value)}")
    low, high = info.meta["low"], info.meta["high"]
    if low is not None and value < low:
        raise ValueError(f"must be >= {low}, got {info.say(value)}")
    if high is not None and value > high:
        raise ValueError(f"must be <= {high}, got {info.say(value)}")
    return value


def weak_key(key: str) -> str:
    """Return what is wrong with a key for the HTTP interface, "" for none and for a good one.

    >>> weak_key("secret"), weak_key(""), weak_key("0123456789abcdef")
    ('TFT_API_KEY has 6 characters, at least 16 are safe (openssl rand -hex 32)', '', '')
    """
    if not key or len(key) >= KEY_MIN_CHARACTERS:
        return ""
    needed = f"at least {KEY_MIN_CHARACTERS} are safe (openssl rand -hex 32)"
    return f"TFT_API_KEY has {len(key)} characters, {needed}"


def from_file(
    config: Path | None, known: Mapping[str, SettingInfo], problems: list[str]
) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, value, where it stands) for a TOML file; add what is wrong with it to `problems`."""
    path = config or DEFAULT_CONFIG
    try:
        tables = tomllib.loads(read_regular(path, CONFIG_MAX_BYTES).decode("utf-8-sig"))
    except FileNotFoundError:
        if path.is_symlink():  # its settings are meant
            problems.append(f"{path} is a link that leads nowhere")
        elif config is not None:
            problems.append(f"{path} does not exist")
        return
    except (OSError, ValueError, CorruptFile) as error:
        why = error.why if isinstance(error, CorruptFile) else error
        problems.append(f"{path} cannot be read: {why}")
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
                problems.append(f"unknown setting {key}{nearest(key, list(known))} ({path})")


def from_environment(
    environ: Mapping[str, str], known: Mapping[str, SettingInfo], problems: list[str]
) -> Iterator[tuple[str, Any, str]]:
    """Yield the same for the environment, where every variable of our prefix must be a setting."""
    names = {info.environment: key for key, info in known.items()}
    for name, value in environ.items():
        if not name.startswith(ENV_PREFIX):
            continue
        if name in names:
            yield names[name], parse(known[names[name]].kind, value), name
        else:
            problems.append(f"unknown variable {name}{nearest(name, list(names))}")


def nearest(name: str, valid: list[str]) -> str:
    """Return the valid name that was probably meant, as the end of a message; "" where none is close.

    >>> nearest("retain", ["infer", "retrain"]), nearest("xyz", ["infer", "retrain"])
    (', nearest is retrain', '')
    """
    shared = len(ENV_PREFIX) if name.startswith(ENV_PREFIX) else 0  # says nothing about the name meant
    tails = {text[shared:]: text for text in valid}
    close = difflib.get_close_matches(name[shared:], list(tails), n=1, cutoff=_CLOSE)
    return f", nearest is {tails[close[0]]}" if close else ""


def table(part: str, intro: str, settings: Sequence[SettingInfo]) -> list[str]:
    """Return the lines of one part in docs/settings.md."""
    head = [f"## [{part}]", "", intro, "", "| name | default | bounds | what |", "|---|---|---|---|"]
    return [*head, *map(_row, settings), ""]


def _row(info: SettingInfo) -> str:
    unit = f" ({info.meta['unit']})" if info.meta["unit"] else ""
    cells = (f"`{info.name}`", _shown(info.default), "; ".join(_bounds(info)), info.meta["help"] + unit)
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _shown(value: object) -> str:
    if value is None:
        return "as printed in the program"
    if isinstance(value, tuple) and value:
        return ", ".join(f"`{item}`" for item in value)
    return f"`{value}`" if value not in ("", ()) else "empty"


def _bounds(info: SettingInfo) -> Iterator[str]:
    if info.meta["low"] is not None:
        yield f"≥ {info.meta['low']}"
    if info.meta["high"] is not None:
        yield f"≤ {info.meta['high']}"
    if info.meta["choices"]:
        yield " or ".join(f"`{choice}`" for choice in info.meta["choices"])
