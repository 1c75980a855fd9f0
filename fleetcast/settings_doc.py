"""Prints docs/settings.md from the dataclasses in settings.py.

    python -m fleetcast.settings_doc > docs/settings.md

Owns: the layout of that page. Does not know: any setting by name.
"""

import typing
from collections.abc import Iterator

from fleetcast.setting import ENV_PREFIX, SettingInfo
from fleetcast.settings import Settings, every_setting

HEAD = f"""# Settings

Made by `python -m fleetcast.settings_doc > docs/settings.md`; do not edit (a test compares them).

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


def page() -> str:
    """Return the whole page."""
    lines = [HEAD]
    for part, part_class in typing.get_type_hints(Settings).items():
        intro = " ".join((part_class.__doc__ or "").split())
        lines += [f"## [{part}]", "", intro, "", "| name | default | bounds | what |", "|---|---|---|---|"]
        lines += [_row(info) for info in every_setting() if info.part == part]
        lines.append("")
    return "\n".join(lines)


def _row(info: SettingInfo) -> str:
    unit = f" ({info.meta['unit']})" if info.meta["unit"] else ""
    cells = (f"`{info.name}`", _shown(info.default), "; ".join(_bounds(info)), info.meta["help"] + unit)
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _shown(value: object) -> str:
    if value is None:
        return "as printed in the program"
    if isinstance(value, tuple):
        return ", ".join(f"`{item}`" for item in value)
    return f"`{value}`" if value != "" else "empty"


def _bounds(info: SettingInfo) -> Iterator[str]:
    if info.meta["low"] is not None:
        yield f"≥ {info.meta['low']}"
    if info.meta["high"] is not None:
        yield f"≤ {info.meta['high']}"
    if info.meta["choices"]:
        yield " or ".join(f"`{choice}`" for choice in info.meta["choices"])


if __name__ == "__main__":
    print(page(), end="")
