"""The running daemon as a terminal asks it, and how its answers are written there.

Owns: which address and key are used, what a daemon that is down or refuses means for the exit code,
and how tables and lengths of time are written. Does not know: which questions there are (`command`).
"""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from fleetcast.alerts.channels import find_problems
from fleetcast.clock import parse_plain_utc
from fleetcast.errors import BadData, BadOrder, CannotLook, DaemonAway, SettingsError, printable
from fleetcast.prometheus.rules import parse_rules
from fleetcast.prometheus.series import ExporterSeries
from fleetcast.settings import Settings, load_settings
from fleetcast.sources.client import API_KEY_VARIABLE, DaemonClient, RequestRefused

TIMEOUT_S = 30.0
SILENT = "silent"
# of a server, worst first, as the daemon and the page name them
STATES = (SILENT, "is-high", "drifts", "gets-high", "warming-up", "not-forecast", "calm")
_NO_KEY = 401
_NONE = "-"


class Daemon:
    """Asks one daemon; what it refuses becomes an error with the exit code that scripts look at."""

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S) -> None:
        """Remember where it answers.

        Raises:
            BadOrder: that is no address.
        """
        try:
            self._client = DaemonClient(url, timeout_s=timeout_s)
        except BadData as error:
            raise BadOrder(str(error)) from error
        self.url = self._client.url

    def ask(self, path: str, **fields: object) -> dict[str, Any]:
        """Return the answer to a question.

        Raises:
            BadOrder: it is about something that the daemon does not know; the message names the nearest.
            CannotLook: no daemon answers, or it refuses the key.
        """
        try:
            return self._client.get(path, **fields)
        except RequestRefused as error:
            if error.is_about_the_question:
                raise BadOrder(error.detail) from error
            if error.status == _NO_KEY:
                says = "refuses the key" if os.environ.get(API_KEY_VARIABLE) else "asks for a key"
                hint = f"set {API_KEY_VARIABLE} to the daemon's key"
                raise CannotLook(f"the daemon at {self.url} {says}", hint=hint) from error
            raise CannotLook(str(error)) from error
        except DaemonAway as error:
            hint = "is it running? fleetcast doctor looks closer, --url names another address"
            raise CannotLook(str(error), hint=hint) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()


def add_flags(command: argparse.ArgumentParser) -> None:
    """Add the flags that every question to the daemon has."""
    command.add_argument("--json", action="store_true", help="answer as JSON")
    command.add_argument("--url", help="the inference daemon (default: the setting retraining.daemon_url)")
    command.add_argument("--config", metavar="FILE", help="settings (default ./fleetcast.toml if present)")


def whole(text: str) -> int:
    """Return the number, at least 0, that a flag gives."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be >= 0, got {value}")
    return value


def read_settings(options: argparse.Namespace) -> Settings:
    """Return the settings that these flags lead to; raises as `load_settings` does."""
    return load_settings(
        Path(options.config) if options.config else None, {"retraining.daemon_url": options.url}
    )


def find_setting_problems(settings: Settings) -> list[str]:
    """Return what the daemons would find wrong with rules, addresses and templates at their start."""
    problems = find_problems(settings.alerts)
    own = settings.remote_write
    for check in (lambda: parse_rules(own.rules), lambda: ExporterSeries((), own)):
        try:
            check()
        except SettingsError as error:
            problems += error.problems
    return problems


def connect(options: argparse.Namespace) -> Daemon:
    """Return the daemon that these flags lead to."""
    return Daemon(read_settings(options).retraining.daemon_url)


def some(number: int, noun: str) -> str:
    """Return a count with its noun.

    >>> some(1, "server"), some(2, "server")
    ('1 server', '2 servers')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """Yield the lines of a table; numbers stand to the right.

    >>> list(table(["server", "p"], [["a", 0.5], ["bb", None]]))
    ['server    p', 'a       0.5', 'bb        -']
    """
    cells = [[_NONE if value is None else printable(str(value)) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    are_numbers = [
        all(isinstance(row[place], int | float | None) for row in rows) and bool(rows)
        for place in range(len(head))
    ]
    for line in [list(head), *cells]:
        parts = [
            text.rjust(width) if is_number else text.ljust(width)
            for text, width, is_number in zip(line, widths, are_numbers, strict=True)
        ]
        yield "  ".join(parts).rstrip()


def length(seconds: float) -> str:
    """Return a length of time as people say it.

    >>> length(42.0), length(7200.0), length(200_000.0)
    ('42 s', '2 hours', '2 days')
    """
    for unit, name in ((86_400.0, "days"), (3600.0, "hours"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def ago(moment: str | None, now: datetime) -> str:
    """Return how long before `now` a time of the daemon's was; "never" for none."""
    if moment is None:
        return "never"
    seconds = (now - parse_plain_utc(moment)).total_seconds()
    return f"{length(seconds)} ago" if seconds >= 0 else f"in {length(-seconds)}"


def part(document: Mapping[str, Any], *names: str) -> Any:
    """Return what stands below these names of an answer, None where a daemon of another release has none."""
    found: Any = document
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
