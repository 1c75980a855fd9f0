"""What people type about alerts: `fleetcast alerts list`, `test` and `silence`.

    fleetcast alerts list                                     what fires, what each channel was told
    fleetcast alerts test slack                               sends a test message, prints the answer
    fleetcast alerts silence DriftHigh --hours 4 --reason "release"

Owns: flags, the words of the answers, the exit codes. Does not know: when an alert fires. It works in the
retraining daemon's folder, beside a running daemon or without one. Exit codes: 0 done, and nothing fires;
1 something fires that is not silent (`list`), or a channel did not take the test; 2 bad usage, or a
rule or channel that is not set; 3 no permission; 6 no daemon with a channel has checked in this folder.
"""

import argparse
import math
import queue
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fleetcast.alerts.channels import (
    AlertmanagerChannel,
    Channel,
    HeartbeatChannel,
    find_problems,
    make_channels,
    make_sender,
    message_channels,
)
from fleetcast.alerts.messages import end, trial_notice
from fleetcast.alerts.rules import parse_rules
from fleetcast.alerts.state import (
    ALERTS_FILE,
    SILENCES_FILE,
    Silence,
    add_silence,
    load_state,
    read_silences,
    report,
)
from fleetcast.clock import SystemClock, iso_z
from fleetcast.console.daemon import Daemon, ago, table
from fleetcast.errors import BadOrder, CannotLook, ExitCode, NotDelivered, SettingsError, printable, quote
from fleetcast.outbound import cause
from fleetcast.program import require_own_folder, run_program, tell
from fleetcast.promotion.orders import this_user
from fleetcast.setting import nearest
from fleetcast.settings import AlertSettings, Settings, load_settings
from fleetcast.workers import Workers

_SLACK_S = 1.0  # beyond the limits of a channel, for what it does itself
LIST, TEST, SILENCE = "list", "test", "silence"
_CODES = (
    "exit codes: 0 done, and nothing fires; 1 something fires, or a channel did not take the test; "
    "2 bad usage, or a rule or channel that is not set; 3 no permission; "
    "6 no daemon with a channel has checked here"
)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run one of the commands; return the exit code."""
    parser = _parser(prog)
    options = parser.parse_args(argv)
    is_silence = options.action == SILENCE
    if is_silence and (not options.name or options.hours is None or not options.reason):
        parser.error("silence needs a rule, --hours and --reason")
    if not is_silence and (options.hours is not None or options.reason or options.server):
        parser.error(f"{options.action} takes no --hours, --reason or --server")
    return run_program(f"fleetcast alerts {options.action}", lambda: int(_RUN[options.action](options)))


def _settings(options: argparse.Namespace) -> Settings:
    return load_settings(Path(options.config) if options.config else None)


def _tell_list(options: argparse.Namespace) -> int:
    own = _settings(options).alerts
    now, path = SystemClock().now(), Path(ALERTS_FILE)
    silences = read_silences(Path(SILENCES_FILE), now)
    if not path.exists():
        hint = "run it in the retraining daemon's folder; alerts are off while no channel is set"
        raise CannotLook(f"no {ALERTS_FILE} here", hint=hint)
    state = load_state(path)
    shown = {**report(state, silences, now), "rules": [rule.name for rule in parse_rules(own.rules)]}
    tell(_screen(shown, now), shown if options.json else None)
    return ExitCode.FAILED if any(not item["silent"] for item in shown["firing"]) else ExitCode.OK


def _screen(shown: dict[str, Any], now: datetime) -> Iterator[str]:
    if not shown["firing"]:
        yield f"nothing fires; {len(shown['rules'])} rules"
    else:
        head = ["rule", "severity", "about", "since", "silent", "what"]
        names = ("rule", "severity", "about", "since", "silent", "sentence")
        rows = [[item[name] for name in names] for item in shown["firing"]]
        for row in rows:
            row[3], row[4] = ago(row[3], now), "yes" if row[4] else "no"
        yield from table(head, rows)
    yield ""
    rows = [
        [name, ago(item["last_ok"], now), item["failures"], item["told"], item["last_error"] or "-"]
        for name, item in shown["channels"].items()
    ]
    yield from table(["channel", "took a message", "failures", "told of", "last error"], rows)
    for item in shown["silences"]:
        of = f" of {item['server']}" if item["server"] else ""
        yield f"silent: {item['rule']}{of} until {item['until']} by {item['by']}: {item['why']}"


def _test(options: argparse.Namespace) -> int:
    own = _settings(options)
    if problems := find_problems(own.alerts):
        raise SettingsError(problems)
    channels = {channel.name: channel for channel in _every_channel(own)}
    if not channels:
        raise BadOrder("no channel is set", hint="docs/alerts.md shows the settings of each")
    if options.name and options.name not in channels:
        known = ", ".join(channels)
        raise BadOrder(
            f"no channel {options.name} is set{nearest(options.name, list(channels))}; set: {known}"
        )
    wanted = [channels[options.name]] if options.name else list(channels.values())
    answers = {channel.name: _try(channel, own.alerts.timeout_s) for channel in wanted}
    told = {name: {"taken": is_taken, "answer": says} for name, (is_taken, says) in answers.items()}
    rows = [[name, "taken" if is_taken else "not taken", says] for name, (is_taken, says) in answers.items()]
    tell(table(["channel", "test", "answer"], rows), told if options.json else None)
    return ExitCode.OK if all(is_taken for is_taken, _ in answers.values()) else ExitCode.FAILED


def _every_channel(settings: Settings) -> list[Channel]:
    """Return all that are set, also those that get nothing beside an Alertmanager."""
    own: AlertSettings = settings.alerts
    clock = SystemClock()
    made = make_channels(own, settings.retraining.interval_s, clock)
    if not own.alertmanager_urls:
        return list(made)
    return [*made, *message_channels(own, make_sender(own), clock)]


def _try(channel: Channel, timeout_s: float) -> tuple[bool, str]:
    """Send a test, and to a channel that keeps incidents its end; return whether it was taken, and why.

    What a channel does inside a library of others may take for ever, so it is waited for no longer than the
    daemon does.
    """
    answers: queue.SimpleQueue[tuple[bool, str]] = queue.SimpleQueue()
    Workers().thread("test", lambda: answers.put(_answer(channel)), once=True).start()
    n_messages = 1 if getattr(channel, "can_sum_up", True) else 2
    try:
        return answers.get(timeout=n_messages * timeout_s + _SLACK_S)
    except queue.Empty:
        return False, f"no answer within {timeout_s:g} s"


def _answer(channel: Channel) -> tuple[bool, str]:
    try:
        return True, _send_test(channel)
    except NotDelivered as error:
        return False, str(error)
    except Exception as error:  # the boundary, as in the daemon: its text may hold an address
        return False, f"failed: {cause(error)}"


def _send_test(channel: Channel) -> str:
    now = SystemClock().now()
    notice = trial_notice(now)
    if isinstance(channel, HeartbeatChannel):
        return channel.beat()
    if isinstance(channel, AlertmanagerChannel):
        return channel.send_all(notice.fired, (), now)
    says = channel.send(notice)
    if not channel.can_sum_up:
        channel.send(end(notice))
    return says


def _silence(options: argparse.Namespace) -> int:
    names = [rule.name for rule in parse_rules(_settings(options).alerts.rules)]
    if options.name not in names:
        raise BadOrder(f"no rule {options.name}{nearest(options.name, names)}; rules: {', '.join(names)}")
    require_own_folder(Path.cwd())
    now = SystemClock().now().replace(microsecond=0)
    until = now + timedelta(hours=options.hours)
    silence = Silence(options.name, until, options.reason, this_user(), now, options.server)
    add_silence(Path(SILENCES_FILE), silence)
    of = f" of {options.server}" if options.server else ""
    says = (
        f"{options.name}{of} is silent until {iso_z(until)}"
        if options.hours
        else f"{options.name}{of} is heard again"
    )
    tell(
        [says],
        {"rule": options.name, "server": options.server, "until": iso_z(until)} if options.json else None,
    )
    if not Path(ALERTS_FILE).exists():
        print(f"no {ALERTS_FILE} here: is this the retraining daemon's folder?", file=sys.stderr)
    if options.server and options.hours:
        _warn_of_unknown(options.server, _settings(options).retraining.daemon_url)
    return ExitCode.OK


def _warn_of_unknown(server: str, url: str) -> None:
    """Say that no such server is known; the silence stands, for a host that is yet to come."""
    try:
        with Daemon(url) as daemon:
            daemon.ask("/accuracy", server=server, hours=1)  # it names the nearest
    except BadOrder as error:
        print(f"{printable(str(error))}; the silence waits for a server of this name", file=sys.stderr)
    except CannotLook:
        return


_RUN: dict[str, Callable[[argparse.Namespace], int]] = {LIST: _tell_list, TEST: _test, SILENCE: _silence}


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog or "fleetcast alerts",
        description="List what fires, test a channel, or silence a rule.",
        epilog=_CODES,
    )
    parser.add_argument("action", choices=tuple(_RUN), help="what to do")
    parser.add_argument("name", nargs="?", default="", help="test: a channel (default: all); silence: a rule")
    parser.add_argument("--hours", type=_hours, metavar="H", help="silence: how long; 0 ends it")
    parser.add_argument("--reason", default="", metavar="TEXT", help="silence: a sentence for the others")
    parser.add_argument("--server", default="", metavar="NAME", help="silence: this server alone")
    parser.add_argument("--json", action="store_true", help="answer as JSON")
    parser.add_argument("--config", metavar="FILE", help="settings (default ./fleetcast.toml if present)")
    return parser


def _hours(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 24 * 365:
        raise argparse.ArgumentTypeError(f"must be hours, from 0 to 8760, got {quote(text)}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
