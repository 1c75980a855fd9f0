"""`fleetcast servers`: the fleet's servers with their states, and which of them are left out.

    fleetcast servers list --state silent
    fleetcast servers exclude web-17 --reason "load tests until Friday"
    fleetcast servers include web-17

Owns: the flags and words of `list`, `exclude` and `include`. Does not know: what excluding does
(`exclusions.py`). `list` asks the running daemon; `exclude` and `include` write a file in the checkpoints'
folder, which works with both daemons down. `exclude` asks a running daemon whether it is this folder's and
knows the name.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fleetcast.clock import SystemClock, parse_plain_utc
from fleetcast.console.daemon import (
    STATES,
    WORDS,
    Daemon,
    add_flags,
    ago,
    connect,
    read_settings,
    table,
    whole,
)
from fleetcast.errors import BadOrder, CannotLook, ExitCode
from fleetcast.exclusions import exclude, include, read
from fleetcast.program import run_program, tell
from fleetcast.promotion.orders import this_user
from fleetcast.settings import Settings

LIST, EXCLUDE, INCLUDE = "list", "exclude", "include"
EXCLUDED = "excluded"
_PAGE = 200  # servers of one answer
_MAX_REASON = 500
_EFFECT = "records are kept, but nothing is forecast, judged for drift or trained on"
_SOON = "the inference daemon follows at its next cycle, the retraining daemon at its next check"


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run `fleetcast servers`; return the exit code."""
    options = _parser(prog).parse_args(argv)
    return run_program(prog or "fleetcast servers", lambda: int(_run(options)))


def _parser(prog: str | None) -> argparse.ArgumentParser:
    servers = argparse.ArgumentParser(
        prog=prog or "fleetcast servers",
        description="List the servers with their states; leave some out, or bring them back.",
        epilog="exit codes: 0 done; 1 the file cannot be written; 2 bad usage or an unknown name; "
        "4 another command writes it; 6 no daemon answers (list), or the key",
    )
    add_flags(servers)
    servers.add_argument(
        "action", choices=(LIST, EXCLUDE, INCLUDE), help="list them, leave out, or bring back"
    )
    servers.add_argument("names", nargs="*", metavar="NAME", help="to exclude or include")
    servers.add_argument("--reason", default="", metavar="TEXT", help="why: exclude needs a sentence")
    servers.add_argument("--state", choices=(*STATES, EXCLUDED), help="list only those in this state")
    servers.add_argument("--filter", metavar="TEXT", help="list only those with this in their name")
    servers.add_argument("--limit", type=whole, default=0, metavar="N", help="list at most N (default: all)")
    return servers


def _run(options: argparse.Namespace) -> int:
    if options.action == LIST:
        if options.names or options.reason:
            raise BadOrder("servers list takes no NAME and no --reason", hint="--filter TEXT narrows it")
        return _list(options)
    if options.state or options.filter or options.limit:
        raise BadOrder(f"--state, --filter and --limit are for servers list, not for {options.action}")
    if not options.names:
        raise BadOrder(f"servers {options.action} needs a NAME", hint="fleetcast servers list has them")
    settings = read_settings(options)
    folder = Path(settings.paths.checkpoint_dir)
    return _exclude(options, settings, folder) if options.action == EXCLUDE else _include(options, folder)


def _list(options: argparse.Namespace) -> int:
    with connect(options) as daemon:
        status = daemon.ask("/status")
        found = [] if options.state == EXCLUDED else list(_servers(daemon, options))
    left_out = status.get("excluded_servers", []) if options.state in (None, EXCLUDED) else []
    asked = [name for name in left_out if not options.filter or options.filter.lower() in name.lower()]
    room = len(asked) if not options.limit else max(0, options.limit - len(found))
    nothing: dict[str, Any] = {"seen": None, "source": None, "current": {}, "state": EXCLUDED, "stale": False}
    found += [{"server": name, **nothing} for name in asked[:room]]
    now = parse_plain_utc(status["clock"]["now"])
    rows = [
        (
            row["server"],
            row["state"],
            None if row["state"] == EXCLUDED else ago(row["seen"], now),
            row["source"],
        )
        for row in found
    ]
    tell(table(["server", "state", "last seen", "forecast by"], rows), found if options.json else None)
    return ExitCode.OK


def _servers(daemon: Daemon, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the servers asked for, in order of names."""
    state, offset, left = STATES.get(options.state, ""), 0, options.limit or None
    while left is None or left > 0:
        limit = _PAGE if left is None else min(_PAGE, left)
        asked = {"state": state, "filter": options.filter, "offset": offset, "limit": limit}
        rows = daemon.ask("/ui/api/fleet", **asked)["rows"]
        for row in rows:
            yield {
                **{name: row[name] for name in ("server", "seen", "source", "current")},
                "state": WORDS.get(row["state"], row["state"]),
                "stale": row["state"] == STATES["silent"],
            }
        offset, left = offset + len(rows), None if left is None else left - len(rows)
        if len(rows) < limit:
            return


def _exclude(options: argparse.Namespace, settings: Settings, folder: Path) -> int:
    reason = options.reason.strip()
    if not reason or len(reason) > _MAX_REASON or not reason.isprintable():
        limits = f"one printable line of at most {_MAX_REASON} characters"
        raise BadOrder(f"--reason is needed: {limits}, for those who wonder later")
    _check_names(options, settings, set(read(folder)))
    fresh = exclude(folder, options.names, {"by": this_user(), "reason": reason}, SystemClock().now())
    before = [name for name in options.names if name not in fresh]
    lines = [f"{', '.join(fresh)}: excluded; {_EFFECT}", _SOON] if fresh else []
    lines += [f"{', '.join(before)}: excluded before"] if before else []
    tell(lines, {"excluded": fresh, "before": before} if options.json else None)
    return ExitCode.OK


def _include(options: argparse.Namespace, folder: Path) -> int:
    excluded = read(folder)
    unknown = [name for name in options.names if name not in excluded]
    if unknown:
        have = ", ".join(sorted(excluded)[:20]) or "none is"
        raise BadOrder(f"{unknown[0]!r} is not excluded", hint=f"excluded: {have}")
    back = include(folder, options.names)
    lines = [f"{', '.join(back)}: included again, with all that was sent meanwhile", _SOON]
    tell(lines, {"included": back} if options.json else None)
    return ExitCode.OK


def _check_names(options: argparse.Namespace, settings: Settings, excluded: set[str]) -> None:
    """Refuse a name that a running daemon does not know, and a daemon of another folder.

    Raises:
        BadOrder: with what would be right.
    """
    try:
        with connect(options) as daemon:
            theirs = Path(daemon.ask("/status")["buffer"]["folder"])
            ours = Path(settings.paths.data_buffer_dir).resolve()
            if theirs.is_dir() and theirs != ours:
                hint = f"run this in {theirs.parent}, or name its settings with --config"
                raise BadOrder(f"the daemon at {daemon.url} works in {theirs}, not in {ours}", hint=hint)
            for name in options.names:
                rows = daemon.ask("/ui/api/fleet", filter=name[:128], limit=_PAGE)["rows"]
                if name not in excluded and name not in [row["server"] for row in rows]:
                    near = ", ".join(row["server"] for row in rows[:5])
                    hint = f"did you mean {near}?" if near else "fleetcast servers list has them"
                    raise BadOrder(f"the daemon knows no server {name!r}", hint=hint)
    except CannotLook:
        return


if __name__ == "__main__":
    raise SystemExit(main())
