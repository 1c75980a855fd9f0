"""What people type about models: `fleetcast models`, `history`, and the orders.

    fleetcast models                                      which versions there are, and their roles
    fleetcast rollback --reason "nights are wrong"        the version before goes back into service
    fleetcast hold --reason "release week"                no training puts a model into service until resume
    fleetcast history                                     what happened, in words

Owns: flags, the words of the answers. Does not know: how an order is carried out (`desk`). An order is
written down first and carried out at once, whichever daemon is down; only a training needs the retraining
daemon. docs/promotion.md says more. Exit codes: 0 done, or written down for the retraining daemon; 1
refused, or the disk is full; 2 bad usage; 3 no permission; 6 no such folder.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fleetcast.clock import SystemClock
from fleetcast.errors import CannotLook, ExitCode
from fleetcast.forecast.registry import Registry
from fleetcast.program import models_dir, require_own_folder, run_program, tell
from fleetcast.promotion import audit, orders
from fleetcast.promotion.audit import Entry, sentence
from fleetcast.promotion.bake import report
from fleetcast.promotion.bake import sentence as tell_bake
from fleetcast.promotion.desk import Desk
from fleetcast.settings import Settings, load_settings

MODELS, HISTORY = "models", "history"
_NAME_IT = "name the daemons' folder with --checkpoint-dir (after make run: run/checkpoints)"
PURPOSES = {
    audit.PROMOTE: "put a version into service; --force: whatever the gate, a veto or a rollback said",
    audit.APPROVE: "put the version into service that waits",
    audit.VETO: "let a version never go into service by itself",
    audit.HOLD: "let no training put a model into service until resume; a new version waits",
    audit.RESUME: "end a hold, a pause, a cooldown; a version that waits then serves (or veto it before)",
    audit.ROLLBACK: "put the version before, or --to VERSION, back into service",
    audit.PAUSE: "start no training until a time, or until resume",
    audit.TRAIN_NOW: "train now, if the safeguards allow it; --force: also if they do not, and uncounted",
}


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run one of the commands; return the exit code."""
    named = [prog.split()[-1]] if prog else []
    given = list(argv) if argv is not None else None
    options = _parser().parse_args([*named, *given] if given is not None else None)
    return run_program(f"fleetcast {options.command}", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    settings = load_settings(
        Path(options.config) if options.config else None, {"paths.checkpoint_dir": options.checkpoint_dir}
    )
    registry = Registry(Path(settings.paths.checkpoint_dir), models_dir(settings))
    desk = Desk(registry, bakes=settings.promotion.bake == "on")
    if options.command == MODELS:
        standing = report(desk, settings.promotion, 0)
        names = ("held", "paused", "waiting", "bake", "race", "cooldown")
        shown = {**desk.models(), **{name: standing[name] for name in names}}
        tell(_table(shown), shown if options.json else None)
        _warn_of_absence(desk.folder, options, settings)
        return ExitCode.OK
    if options.command == HISTORY:
        code = _tell_history(desk, options)
        _warn_of_absence(desk.folder, options, settings)
        return code
    return _order(desk, options, settings)


def _order(desk: Desk, options: argparse.Namespace, settings: Settings) -> int:
    more = {name: getattr(options, name, None) for name in ("version", "until")}
    given = {name: value for name, value in more.items() if value is not None}
    force = bool(getattr(options, "force", False))
    now, user = SystemClock().now(), orders.this_user()
    order = orders.new_order(options.command, options.reason, user, now, force=force, **given)
    require_own_folder(desk.folder)
    if not (desk.folder.is_dir() or _is_fresh(options, settings)):  # no daemon would ever see the order
        raise CannotLook(f"{desk.folder} is no folder of models", hint=_NAME_IT)
    ended = desk.give(order)
    shown = {"order": order.id, "ended": ended.as_json() if ended else None}
    said = sentence(ended) if ended else f"written down as order {order.id}; {_who_takes(order.kind)}"
    tell([said], shown if options.json else None)
    return ExitCode.FAILED if ended and ended.phase == audit.REFUSED else ExitCode.OK


def _who_takes(kind: str) -> str:
    if kind == audit.TRAIN_NOW:
        return "the retraining daemon takes it up within seconds, or when it starts (fleetcast history says)"
    return "a trainer moves models just now: it, or the retraining daemon, carries it out next"


def _is_fresh(options: argparse.Namespace, settings: Settings) -> bool:
    """Return whether a daemon works here that has trained nothing yet: it serves the shipped model."""
    return options.checkpoint_dir is None and Path(settings.paths.data_buffer_dir).is_dir()


def _warn_of_absence(folder: Path, options: argparse.Namespace, settings: Settings) -> None:
    if not (folder.is_dir() or _is_fresh(options, settings)):
        print(f"{folder} is no folder of models yet: {_NAME_IT}", file=sys.stderr)


def _tell_history(desk: Desk, options: argparse.Namespace) -> int:
    ended = {entry.id for entry in desk.audit.entries() if entry.phase != audit.INTENT}
    told = [e for e in desk.audit.entries() if e.phase != audit.INTENT or e.id not in ended]
    shown: list[Entry] = told[-options.limit :]
    given = (order for _, order in orders.waiting(desk.folder) if isinstance(order, orders.Order))
    lines = [sentence(entry) for entry in shown] or [f"nothing has happened yet in {desk.folder}"]
    lines += [f"waiting: {order.kind} by {order.by}: {order.reason}" for order in given]
    tell(lines, [entry.as_json() for entry in shown] if options.json else None)
    return ExitCode.OK


def _table(shown: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of `fleetcast models`."""
    versions = shown["versions"]
    if not versions:
        yield "no model yet: the fallback forecasts, and a training follows when there is data enough"
    else:
        yield f"{'version':<24} {'role':<10} {'in service since':<20} {'verdict':<8} why"
    for version in versions:
        roles = ",".join(version["roles"]) or _mark(version)
        gate = version["gate"]
        verdict = "passed" if gate["passed"] else "failed"
        since, why = version["since"] or "-", gate["why"] or "-"
        yield f"{version['id']:<24} {roles:<10} {since:<20} {verdict:<8} {why}"
    for name, words in (("held", "no model goes into service by training"), ("paused", "no training starts")):
        mark = shown[name]
        if mark:
            until = f" until {mark['until']}" if mark["until"] else ""
            yield f"{name} by {mark['by']} since {mark['since']}{until}: {mark['why']} ({words})"
    for name in ("bake", "race"):
        if shown[name]:
            yield f"{name}: {tell_bake(shown[name])}"
    if shown["cooldown"]:
        until = shown["cooldown"]["until"]
        yield f"cooldown until {until}: a version that passes the gate waits (fleetcast resume ends it)"
    if shown["waiting"]:
        waiting = shown["waiting"]["version"]
        yield f"waiting: {waiting} (fleetcast approve {waiting}, or fleetcast veto {waiting})"


def _mark(version: Mapping[str, Any]) -> str:
    return "rolled back" if version["rolled_back"] else "vetoed" if version["vetoed"] else "-"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fleetcast", description="Which model is in service, and why.")
    commands = parser.add_subparsers(dest="command", required=True)
    codes = "exit codes: 0 done, or written down for the daemon; 1 refused; 2 bad usage; 3 no permission; "
    codes += "6 no such folder"
    shown = {MODELS: "list the versions, their roles and verdicts", HISTORY: "print the audit in words"}
    for name, purpose in {**shown, **PURPOSES}.items():
        command = commands.add_parser(name, description=purpose.capitalize() + ".", epilog=codes)
        command.add_argument("--json", action="store_true", help="answer as JSON")
        command.add_argument("--checkpoint-dir", metavar="DIR", help="model versions (default ./checkpoints)")
        command.add_argument(
            "--config", metavar="FILE", help="settings (default ./fleetcast.toml if present)"
        )
        if name == HISTORY:
            command.add_argument(
                "--limit", type=_positive, default=50, help="newest lines shown (default 50)"
            )
        if name in PURPOSES:
            _add_order_flags(command, name)
    return parser


def _add_order_flags(command: argparse.ArgumentParser, kind: str) -> None:
    command.add_argument("--reason", required=True, help="a sentence for those who read the audit later")
    if kind in orders.NEED_VERSION:
        command.add_argument("version", metavar="VERSION", help="as fleetcast models lists it")
    if kind == audit.ROLLBACK:
        command.add_argument("--to", dest="version", metavar="VERSION", help="which (default: the previous)")
    if kind == audit.PAUSE:
        command.add_argument("--until", required=True, metavar="TIME", help="as 2026-01-15T18:00Z")
    if kind in orders.MAY_FORCE:
        command.add_argument("--force", action="store_true", help="do it all the same; the audit says so")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {value}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
