"""`fleetcast servers`: the fleet's servers with their states, which are left out, and which are forgotten.

    fleetcast servers list --state silent
    fleetcast servers exclude web-17 --reason "load tests until Friday"
    fleetcast servers include web-17
    fleetcast servers forget web-17 --reason "taken down"

Owns: the flags and words of `list`, `exclude`, `include` and `forget`. Does not know: what these do
(`exclusions.py`). `list` asks the running daemon; the others write a file in the checkpoints' folder, which
works with both daemons down. `exclude` and `forget` ask a running daemon whether it is this folder's and
knows the name; `forget` looks into the buffer, too: a server that is silent for a day is in no daemon.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fleetcast.clock import SystemClock, parse_plain_utc
from fleetcast.console.daemon import (
    SILENT,
    STATES,
    Daemon,
    add_flags,
    ago,
    connect,
    read_settings,
    table,
    whole,
)
from fleetcast.errors import BadOrder, CannotLook, ExitCode, is_visible, quote
from fleetcast.exclusions import Forgotten, exclude, forget, include, read, read_forgotten
from fleetcast.program import run_program, tell
from fleetcast.promotion.orders import this_user
from fleetcast.settings import Settings

LIST, EXCLUDE, INCLUDE, FORGET = "list", "exclude", "include", "forget"
EXCLUDED, FORGOTTEN = "excluded", "forgotten"
_PAGE = 200  # servers of one answer
_MAX_REASON = 500
_EFFECT = "records are kept, but nothing is forecast, judged for drift or trained on"
_GOES = "all records and forecasts of it are removed, from every stored day; this cannot be undone"
_SAYS = (
    "fleetcast servers list --state forgotten says when that is done; what it still sends is a new server's"
)
_SOON = "the inference daemon follows at its next cycle, the retraining daemon at its next check"


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run `fleetcast servers`; return the exit code."""
    options = _parser(prog).parse_intermixed_args(argv)  # names may come behind the flags, too
    return run_program(prog or "fleetcast servers", lambda: int(_run(options)))


def _parser(prog: str | None) -> argparse.ArgumentParser:
    servers = argparse.ArgumentParser(
        prog=prog or "fleetcast servers",
        description="List the servers with their states; leave some out, bring them back, or forget them.",
        epilog="exit codes: 0 done; 1 the file cannot be written; 2 bad usage or an unknown name; "
        "4 another command writes it; 6 no daemon answers (list), or the key",
    )
    add_flags(servers)
    servers.add_argument(
        "action",
        choices=(LIST, EXCLUDE, INCLUDE, FORGET),
        help="list them, leave out, bring back, or remove everything known of them",
    )
    servers.add_argument("names", nargs="*", metavar="NAME", help="to exclude, include or forget")
    servers.add_argument(
        "--reason", default="", metavar="TEXT", help="why: exclude and forget need a sentence"
    )
    states = (*STATES, EXCLUDED, FORGOTTEN)
    servers.add_argument("--state", choices=states, help="list only those in this state")
    servers.add_argument("--filter", metavar="TEXT", help="list only those with this in their name")
    servers.add_argument("--limit", type=whole, default=0, metavar="N", help="list at most N (default: all)")
    return servers


def _run(options: argparse.Namespace) -> int:
    if options.action == LIST:
        if options.names or options.reason:
            raise BadOrder("servers list takes no NAME and no --reason", hint="--filter TEXT narrows it")
        return _list_forgotten(options) if options.state == FORGOTTEN else _list(options)
    if options.state or options.filter or options.limit:
        raise BadOrder(f"--state, --filter and --limit are for servers list, not for {options.action}")
    if not options.names:
        raise BadOrder(f"servers {options.action} needs a NAME", hint="fleetcast servers list has them")
    settings = read_settings(options)
    folder = Path(settings.paths.checkpoint_dir)
    if options.action == INCLUDE:
        return _include(options, folder)
    entry = {"by": this_user(), "reason": _reason(options)}
    work = _exclude if options.action == EXCLUDE else _forget
    return work(options, settings, folder, entry)


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
    offset, left = 0, options.limit or None
    while left is None or left > 0:
        limit = _PAGE if left is None else min(_PAGE, left)
        asked = {"state": options.state, "filter": options.filter, "offset": offset, "limit": limit}
        rows = daemon.ask("/ui/api/fleet", **asked)["rows"]
        for row in rows:
            yield {
                **{name: row[name] for name in ("server", "seen", "source", "current", "state")},
                "stale": row["state"] == SILENT,
            }
        offset, left = offset + len(rows), None if left is None else left - len(rows)
        if len(rows) < limit:
            return


def _list_forgotten(options: argparse.Namespace) -> int:
    """List what people wanted forgotten, newest first: an answer out of the folder, with no daemon asked."""
    known = read_forgotten(Path(read_settings(options).paths.checkpoint_dir))
    names = [
        name for name in reversed(known) if options.filter is None or options.filter.lower() in name.lower()
    ]
    names = names[: options.limit or None]
    rows = [
        (name, known[name].at, known[name].by, known[name].reason, _how_far(known[name])) for name in names
    ]
    found = [{"server": name, **asdict(known[name])} for name in names]
    tell(
        table(["server", "ordered", "by", "reason", "state"], rows) if rows else ["no server was forgotten"],
        found if options.json else None,
    )
    return ExitCode.OK


def _how_far(one: Forgotten) -> str:
    if not one.records_gone:
        return "records are being removed" if one.before else "waits for the inference daemon"
    drift = (
        f"of drift {one.drift_gone}" if one.drift_gone else "of drift at the retraining daemon's next check"
    )
    return f"gone: records {one.records_gone}, {drift}"


def _reason(options: argparse.Namespace) -> str:
    reason = str(options.reason).strip()
    if not is_visible(reason) or len(reason) > _MAX_REASON or not reason.isprintable():
        limits = f"one printable line of at most {_MAX_REASON} characters"
        raise BadOrder(f"--reason is needed: {limits}, for those who wonder later")
    return reason


def _exclude(options: argparse.Namespace, settings: Settings, folder: Path, entry: Mapping[str, str]) -> int:
    _check_names(options, settings, set(read(folder)))
    fresh = exclude(folder, options.names, entry, SystemClock().now())
    before = [name for name in options.names if name not in fresh]
    lines = [f"{', '.join(fresh)}: excluded; {_EFFECT}", _SOON] if fresh else []
    lines += [f"{', '.join(before)}: excluded before"] if before else []
    tell(lines, {"excluded": fresh, "before": before} if options.json else None)
    return ExitCode.OK


def _forget(options: argparse.Namespace, settings: Settings, folder: Path, entry: Mapping[str, str]) -> int:
    waiting = {name for name, one in read_forgotten(folder).items() if not one.records_gone}
    stored = Stored(settings)
    known = {name for name in options.names if name in stored}
    _check_names(options, settings, known | waiting | set(read(folder)), stored)
    orders = forget(folder, options.names, entry, SystemClock().now())
    before = [name for name in orders if name in waiting]
    fresh = [name for name in orders if name not in waiting]
    lines = [f"{', '.join(fresh)}: to be forgotten; {_GOES}", _SAYS] if fresh else []
    lines += [
        f"{name}: {_how_far(orders[name])}, ordered {orders[name].at} by {orders[name].by}" for name in before
    ]
    tell(lines, {"forgotten": fresh, "before": before} if options.json else None)
    return ExitCode.OK


class Stored:
    """The servers of a buffer's folder, as its files have them: also those that no daemon knows any more."""

    def __init__(self, settings: Settings) -> None:
        """Read nothing yet."""
        from fleetcast.storage.store import DataBuffer  # pyarrow: --help answers without it

        self._buffer = DataBuffer(settings.paths.data_buffer_dir, settings=settings.buffer, expire=False)

    def __contains__(self, name: str) -> bool:
        return self._buffer.has_server(name)

    def near(self, name: str) -> list[str]:
        """Return up to five names of the newest stored day that look like it, nearest first."""
        return get_close_matches(name[:128], self._buffer.newest_names(), 5)


def _include(options: argparse.Namespace, folder: Path) -> int:
    excluded = read(folder)
    unknown = [name for name in options.names if name not in excluded]
    if unknown:
        have = ", ".join(sorted(excluded)[:20]) or "none is"
        raise BadOrder(f"{quote(unknown[0])} is not excluded", hint=f"excluded: {have}")
    back = include(folder, options.names)
    lines = [f"{', '.join(back)}: included again, with all that was sent meanwhile", _SOON]
    tell(lines, {"included": back} if options.json else None)
    return ExitCode.OK


def _check_names(
    options: argparse.Namespace, settings: Settings, known: set[str], stored: "Stored | None" = None
) -> None:
    """Refuse a name that neither `known` has nor a running daemon knows, and a daemon of another folder.

    Args:
        stored: the buffer's own names, where they count, too; then no daemon has to run.
    Raises:
        BadOrder: with what would be right.
    """
    unknown = [name for name in options.names if name not in known]
    try:
        with connect(options) as daemon:
            theirs = Path(daemon.ask("/status")["buffer"]["folder"])
            ours = Path(settings.paths.data_buffer_dir).resolve()
            if theirs.is_dir() and theirs != ours:
                hint = f"run this in {theirs.parent}, or name its settings with --config"
                raise BadOrder(f"the daemon at {daemon.url} works in {theirs}, not in {ours}", hint=hint)
            for name in unknown:
                rows = daemon.ask("/ui/api/fleet", filter=name[:128], limit=_PAGE)["rows"]
                found = [row["server"] for row in rows]
                if name not in found:
                    near = found[:5] or (stored.near(name) if stored else [])
                    raise _unknown(f"the daemon knows no server {quote(name)}", near)
    except CannotLook:
        if unknown and stored:
            what = f"no record of a server {quote(unknown[0])} is stored in {settings.paths.data_buffer_dir}"
            raise _unknown(what, stored.near(unknown[0])) from None


def _unknown(what: str, near: Sequence[str]) -> BadOrder:
    hint = f"did you mean {', '.join(near)}?" if near else "fleetcast servers list has them"
    return BadOrder(what, hint=hint)


if __name__ == "__main__":
    raise SystemExit(main())
