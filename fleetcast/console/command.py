"""What an operator asks at a terminal: `fleetcast status`, `accuracy`, `capacity`, `settings`.

    fleetcast status                              one screen: fleet, model, drift, trainings, problems
    fleetcast accuracy --worst 10                 errors against repeating the last value
    fleetcast capacity                            which pass 90 % within 8 h, which disks are full by when
    fleetcast settings show                       every value, and where it comes from

Owns: flags, the words of the answers, the exit codes. Does not know: how anything is measured; the
running daemon is asked over HTTP, and `settings` asks no daemon. Exit codes: 0 answered, and no error
among the problems; 1 `status` found one; 2 bad usage, or a name that the daemon does not know; 6 no
daemon answers, or it refuses the key.
"""

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fleetcast.clock import SystemClock, parse_plain_utc
from fleetcast.console.daemon import (
    add_flags,
    ago,
    connect,
    find_setting_problems,
    length,
    part,
    some,
    table,
    whole,
)
from fleetcast.errors import BadOrder, ExitCode, SettingsError
from fleetcast.program import run_program, tell
from fleetcast.setting import SettingInfo, from_environment, from_file
from fleetcast.settings import Settings, every_setting, load_settings

STATUS, ACCURACY, CAPACITY = "status", "accuracy", "capacity"
SETTINGS, COMPLETION = "settings", "completion"
PURPOSES = {
    STATUS: "show the fleet, the model in service, drift, trainings and problems on one screen",
    ACCURACY: "show the errors of settled forecasts beside those of repeating the last value",
    CAPACITY: "show which servers pass a limit within the horizon, and which disks are full by when",
    SETTINGS: "check the settings, or show every value and where it comes from",
    COMPLETION: "print a script that completes this command's words in bash",
}
_CODES = (
    "exit codes: 0 answered; 1 a problem; 2 bad usage or an unknown name; 6 no daemon answers, or the key"
)
_DEFAULT, _FLAG = "default", "flag"


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run one of the commands; return the exit code."""
    named = [prog.split()[-1]] if prog else []
    given = list(argv) if argv is not None else None
    options = _parser().parse_args([*named, *given] if given is not None else None)
    return run_program(f"fleetcast {options.command}", lambda: int(_RUN[options.command](options)))


def _tell_status(options: argparse.Namespace) -> int:
    with connect(options) as daemon:
        health, strip = daemon.ask("/ui/api/health"), daemon.ask("/ui/api/strip")
        drift, trainings = daemon.ask("/ui/api/drift", days=1), daemon.ask("/ui/api/trainings")
    problems = part(health, "problems") or []
    shown = {
        "url": daemon.url,
        "problems": problems,
        "servers": strip["counts"],
        "status": health["status"],
        "drift": {name: value for name, value in drift.items() if name != "points"},
        "training": {**trainings, "trainings": trainings["trainings"][:1]},
    }
    tell(_screen(shown), shown if options.json else None)
    is_bad = any(problem["severity"] == "error" for problem in problems)
    return ExitCode.FAILED if is_bad else ExitCode.OK


def _screen(shown: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of `fleetcast status`."""
    status = shown["status"]
    now = parse_plain_utc(status["clock"]["now"])
    up_s = (SystemClock().now() - parse_plain_utc(status["started_at"])).total_seconds()
    state = status["status"] + (f": {status['detail']}" if status["detail"] else "")
    yield f"fleetcast {status['program']} at {shown['url']}, up {length(up_s)}, {state}"
    counts = ", ".join(f"{count} {word}" for word, count in reversed(shown["servers"].items()) if count)
    newest = ago(status["newest_record_time"], now)
    n_servers = sum(shown["servers"].values())
    yield f"fleet     {some(n_servers, 'server')}{f': {counts}' if counts else ''}; newest record {newest}"
    yield f"model     {_model_line(status['model'], SystemClock().now())}"
    yield f"forecast  {_forecast_line(status, now)}"
    yield from _drift_lines(shown["drift"], now)
    yield from _training_lines(shown["training"], now)
    problems = shown["problems"]
    yield f"problems  {len(problems) or 'none'}"
    for problem in problems:
        yield f"  {problem['severity']:<8}{problem['text']}"


def _model_line(model: Mapping[str, Any], now: datetime) -> str:
    if not model["version"]:
        return "none: the fallback forecasts"
    return f"{model['version']}{' (base)' if model['base'] else ''}, trained {ago(model['trained_at'], now)}"


def _forecast_line(status: Mapping[str, Any], now: datetime) -> str:
    origin = part(status, "sweep", "origin")
    made = f"of the bin {origin} ({ago(origin, now)})" if origin else "none yet"
    return f"{made}; {status['ledger']['settled']} settled, {status['backlog']} closed bins wait"


def _drift_lines(drift: Mapping[str, Any], now: datetime) -> Iterator[str]:
    if not drift.get("status"):
        yield "drift     no check yet: is the retraining daemon running in the daemon's folder?"
        return
    score, limit = (
        part(drift, "current_metrics", "combined_score"),
        part(drift, "thresholds", "combined_score"),
    )
    combined = "no score yet" if score is None else f"combined {score:.3f} of {limit}"
    says = drift.get("recommendation") or drift.get("status_reason") or drift["status"]
    yield f"drift     {says}: {combined}, checked {ago(drift['made_at'], now)}"
    for item in drift["drifting"][:5]:
        yield f"          {item['server']} {item['metric']}: {item['sentence']}"


def _training_lines(training: Mapping[str, Any], now: datetime) -> Iterator[str]:
    newest, decision = (training["trainings"] or [None])[0], training["decision"]
    if newest is None:
        yield "training  none yet"
    else:
        yield f"training  {newest['verdict']} ({newest['cause']}, began {ago(newest['started_at'], now)})"
    if decision is not None:
        asks = "asks for a training" if decision["should_retrain"] else "asks for none"
        yield f"          the newest check {asks}: {decision['reason']}"
        if decision.get("not_quiet"):
            yield f"          why it is not quiet: {decision['not_quiet']}"


def _tell_accuracy(options: argparse.Namespace) -> int:
    asked = {
        "server": options.server,
        "metric": options.metric,
        "hours": options.hours,
        "worst": options.worst,
    }
    with connect(options) as daemon:
        found = daemon.ask("/accuracy", **asked)
    tell(_accuracy_lines(found), found if options.json else None)
    return ExitCode.OK


def _accuracy_lines(found: Mapping[str, Any]) -> Iterator[str]:
    whose = found["server"] or some(found["servers"], "server")
    yield f"{whose}, {found['start']} to {found['end']}; ratio: error / that of repeating the last value"
    columns = ("bins", "error", "last_value_error", "ratio", "inside")
    head = ["metric", "ahead", "forecasts", "error", "of last value", "ratio", "p10 to p90"]

    def cells(means: Mapping[str, Any]) -> list[object]:
        return [means[name] for name in columns]

    rows = [
        (metric, length(int(horizon) * found["bin_s"]), *cells(means))
        for metric, by_horizon in found["metrics"].items()
        for horizon, means in by_horizon.items()
    ]
    if not rows:
        yield "no forecast has settled in this time"
        return
    yield from table(head, rows)
    if found["worst"]:
        yield ""
        yield "the highest ratios:"
        worst = [
            (item["server"], item["metric"], length(item["horizon"] * found["bin_s"]), *cells(item))
            for item in found["worst"]
        ]
        yield from table(["server", *head], worst)


def _tell_capacity(options: argparse.Namespace) -> int:
    asked = {"server": options.server, "rows": options.rows}
    with connect(options) as daemon:
        soon = daemon.ask(
            "/capacity", **asked, metric=options.metric, limit=options.limit, min_p=options.min_p
        )
        try:
            dates = daemon.ask("/capacity/dates", **asked, metric=options.disk_metric)
        except BadOrder as error:  # the first day is not over, or this fleet sends no such metric
            dates = {"why_none": str(error)}
    tell(_capacity_lines(soon, dates), {"within": soon, "dates": dates} if options.json else None)
    return ExitCode.OK


def _capacity_lines(soon: Mapping[str, Any], dates: Mapping[str, Any]) -> Iterator[str]:
    n_silent = soon.get("silent", 0)  # a daemon before 1.0.0 does not tell, nor what waits or is not sent
    silent = f", {n_silent} of them of servers that are silent" if n_silent else ""
    yield (
        f"{soon['limit']:g} % within {length(soon['horizon_s'])}: {soon['matching']} series of "
        f"{some(soon['servers'], 'server')}{silent}; as of the bin {soon['origin'] or '- (no forecast yet)'}"
    )
    if waiting := soon.get("bins_waiting"):
        yield f"  {some(waiting, 'newer bin')} not forecast from yet"
    not_sent = soon.get("not_sent", [])
    for metric, record in soon["metrics"].items():
        if metric not in not_sent:
            yield f"  {metric}: {_say_record(record)}"
    if not_sent:
        yield f"  no server sends {', '.join(not_sent)}"
    if soon["rows"]:
        yield from _say_rows(soon["rows"])
    yield ""
    if "why_none" in dates:
        yield f"by when: {dates['why_none']}"
        return
    days, found = some(dates["days"], "day"), f"{dates['with_date']} of {dates['matching']} have a date"
    yield f"{dates['metric']} at {dates['limit']:g} %, of {days} up to {dates['newest_day'][:10]}: {found}"
    named = ("server", "now", "per_day", "between", "p_within", "within_days", "why_no_date", "silent_since")
    told = [
        {**row, "between": " to ".join(row["full_between"]) if row["full_between"] else None}
        for row in dates["rows"]
    ]
    head = [
        "server",
        "newest day",
        "a day",
        "full between",
        "P",
        "within days",
        "why no date",
        "silent since",
    ]
    yield from table(head, [[row.get(name) for name in named] for row in told])


def _say_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the table of who passes a limit within the horizon."""
    columns = ("server", "metric", "state", "now", "p", "first_possible", "likely", "since", "silent_since")
    head = ["server", "metric", "state", "now", "P", "possible from", "likely", "over since", "silent since"]
    told = [
        {**row, "since": f"{row['since']} or before"} if row.get("since_or_before") else row for row in rows
    ]
    yield from table(head, [[row.get(name) for name in columns] for row in told])


def _say_record(record: Mapping[str, Any]) -> str:
    """Return which source answers, and how good it was, as a clause."""
    if record["brier"] is None:
        return f"by the {record['by']}; no answer has settled yet, so none was checked"
    scores = ", ".join(f"{name} {score:.4f}" for name, score in record["brier"].items())
    why = f" ({record['why']})" if "why" in record else ""  # a daemon before 1.0.0 does not tell
    return f"by the {record['by']}{why}; Brier score of {record['windows']:,} settled windows: {scores}"


def _tell_settings(options: argparse.Namespace) -> int:
    config = Path(options.config) if options.config else None
    settings = load_settings(config)
    if options.action == "check" and (problems := find_setting_problems(settings)):
        raise SettingsError(problems)
    known: dict[str, SettingInfo] = {info.key: info for info in every_setting()}
    given = [*from_file(config, known, []), *from_environment(os.environ, known, [])]
    sources = {key: source for key, _, source in given}  # the environment goes before the file
    shown = {
        key: {"value": _value(settings, info), "from": sources.get(key, _DEFAULT)}
        for key, info in known.items()
    }
    if options.action == "check":
        changed = [key for key, found in shown.items() if found["from"] != _DEFAULT]
        words = f"good: {len(changed)} of {len(shown)} settings are not the default"
        tell([words], {"problems": [], "changed": changed} if options.json else None)
    else:
        rows = [(key, found["from"], json.dumps(found["value"])) for key, found in shown.items()]
        tell(table(["setting", "from", "value"], rows), shown if options.json else None)
    return ExitCode.OK


def _value(settings: Settings, info: SettingInfo) -> Any:
    """Return a setting's value; of a secret, only whether there is one."""
    value = getattr(getattr(settings, info.part), info.name)
    return "(set, not shown)" if value and info.meta["is_secret"] else value


def _tell_completion(options: argparse.Namespace) -> int:
    tell([_BASH.strip("\n")])
    return ExitCode.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fleetcast", description="What the running daemon says.")
    commands = parser.add_subparsers(dest="command", required=True)
    made = {
        name: commands.add_parser(name, description=purpose.capitalize() + ".", epilog=_CODES)
        for name, purpose in PURPOSES.items()
    }
    for name in (STATUS, ACCURACY, CAPACITY):
        add_flags(made[name])
    _add_capacity_flags(made[CAPACITY])
    accuracy, settings = made[ACCURACY], made[SETTINGS]
    accuracy.add_argument("--server", metavar="NAME", help="one server (default: the fleet)")
    accuracy.add_argument(
        "--metric", action="append", metavar="NAME", help="only this metric; may come several times"
    )
    accuracy.add_argument("--hours", type=whole, default=24, metavar="N", help="how far back (default 24)")
    accuracy.add_argument("--worst", type=whole, default=0, metavar="N", help="name the N highest ratios")
    settings.add_argument(
        "action", choices=("check", "show"), help="check them, or show each with its source"
    )
    settings.add_argument("--json", action="store_true", help="answer as JSON")
    settings.add_argument("--config", metavar="FILE", help="settings (default ./fleetcast.toml if present)")
    made[COMPLETION].add_argument("shell", choices=("bash",), help="the shell")
    return parser


def _add_capacity_flags(capacity: argparse.ArgumentParser) -> None:
    capacity.add_argument("--server", metavar="NAME", help="one server (default: the fleet)")
    capacity.add_argument("--metric", action="append", metavar="NAME", help="only this metric, within hours")
    capacity.add_argument("--limit", type=float, default=90.0, help="70, 80, 90 or 95 percent (default 90)")
    capacity.add_argument("--min-p", type=float, default=0.1, metavar="P", help="from P on (default 0.1)")
    capacity.add_argument(
        "--disk-metric", default="disk_usage_pct", metavar="NAME", help="of days and weeks (%(default)s)"
    )
    capacity.add_argument("--rows", type=whole, default=20, metavar="N", help="most rows (default 20)")


_RUN = {
    STATUS: _tell_status,
    ACCURACY: _tell_accuracy,
    CAPACITY: _tell_capacity,
    SETTINGS: _tell_settings,
    COMPLETION: _tell_completion,
}
# A command's flags are read from its help, once a shell: a list here would grow old.
_BASH = r"""
# fleetcast completion bash > /etc/bash_completion.d/fleetcast
declare -gA _fleetcast_words
_fleetcast() {
    local word=${COMP_WORDS[COMP_CWORD]} command=${COMP_WORDS[1]} help
    if [ "$COMP_CWORD" -eq 1 ]; then
        command=""
    fi
    if [ -z "${_fleetcast_words[-$command]}" ]; then
        help=$(fleetcast $command --help 2>/dev/null)
        if [ -z "$command" ]; then
            _fleetcast_words[-]=$(sed -nE 's/^  ([a-z][a-z-]*) .*/\1/p' <<< "$help")
        else
            help=$(grep -oE -- '--[a-z][a-z-]+|\{[a-z,-]+\}' <<< "$help" | tr '{},' '\n' | sort -u)
            _fleetcast_words[-$command]=$help
        fi
    fi
    COMPREPLY=($(compgen -W "${_fleetcast_words[-$command]}" -- "$word"))
}
complete -o default -F _fleetcast fleetcast
"""


if __name__ == "__main__":
    raise SystemExit(main())
