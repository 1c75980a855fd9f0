"""`fleetcast doctor`: what is wrong here, and what would be right.

    fleetcast doctor             on the daemon's host, in its folder: everything is looked at
    fleetcast doctor --json      the same for programs

Owns: the checks, in the order in which one fault causes the next, and what each one advises. It changes
nothing. Does not know: how the daemon finds its own problems; it is asked for them. Exit codes: 0 nothing
is wrong; 1 something is; 2 bad usage.
"""

import argparse
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fleetcast import __version__
from fleetcast.clock import SystemClock, parse_plain_utc
from fleetcast.console.daemon import (
    SILENT,
    Daemon,
    add_flags,
    find_setting_problems,
    length,
    part,
    read_settings,
    some,
)
from fleetcast.errors import CannotLook, CorruptFile, ExitCode, SettingsError
from fleetcast.files import read_json
from fleetcast.outbound import LOOPBACK
from fleetcast.program import run_program, tell
from fleetcast.setting import weak_key
from fleetcast.settings import Settings
from fleetcast.sources.client import API_KEY_VARIABLE

OK, BAD, UNKNOWN = "ok", "bad", "not looked"
_SKEW_S = 5.0
_SILENT_S = 120.0  # agents send every few seconds
_ALERTS_FILE = "alerts.json"  # of the retraining daemon, in its folder
_FREE_GB = 5.0  # a training's export, and days of records
_NAMED = 5
# how a problem of the daemon begins: what would be right
_ADVICE = {
    "Not ready": "read the daemon's log; it names the disk, the folder or the loader",
    "The key is easy": "openssl rand -hex 32 makes a good one; restart the daemon with it",
    "A smaller retention": "wait until it holds, or put buffer.retention_days back",
    "A part of the daemon failed": "read the traceback in the daemon's log, restart it, and report it",
    "A model version was refused": "train again, or put a good version into service: fleetcast rollback",
    "No model serves": "wait for the first training, or let the programs find models/ (paths.models_dir)",
    "In the newest forecast": "send one of these metrics, or train a model on what the fleet sends",
    "No drift check was made yet": "start adaptive_retraining_daemon.py in the daemon's working directory",
    "The newest drift check": "restart the retraining daemon, and read its log",
    "The last training failed": "fleetcast history, and jq '.attempts[0]' retraining_state.json, say why",
    "Data quality": "look at the sensor or the exporter of that host",
}
_BIN_ADVICE = "give the daemon more CPU, or fewer metrics in bins.forecast_metrics"
_NAMES_ADVICE = "stop the client that makes names up, or raise the limit in [server]"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    state: str
    says: str
    right: str = ""  # what would be right, "" where it is


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Look at everything; return 1 if something is wrong."""
    options = _parser(prog).parse_args(argv)
    return run_program(prog or "fleetcast doctor", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    findings = list(examine(options))
    document = {"findings": [asdict(finding) for finding in findings]}
    tell(_lines(findings), document if options.json else None)
    return ExitCode.FAILED if any(finding.state == BAD for finding in findings) else ExitCode.OK


def _lines(findings: Sequence[Finding]) -> Iterator[str]:
    for finding in findings:
        yield f"{finding.state:<10}  {finding.check:<9} {finding.says}"
        if finding.right:
            yield f"{'':<22}-> {finding.right}"


def examine(options: argparse.Namespace) -> Iterator[Finding]:
    """Yield what was found, the causes first."""
    right = "fleetcast settings check after the change"
    try:
        settings = read_settings(options)
    except SettingsError as error:
        yield from (Finding("settings", BAD, text, right) for text in error.problems)
        return
    problems = find_setting_problems(settings)
    yield from (Finding("settings", BAD, text, right) for text in problems)
    if not problems:
        yield Finding("settings", OK, "every value is within its bounds")
    key = os.environ.get(API_KEY_VARIABLE, "")
    url = settings.retraining.daemon_url
    try:
        with Daemon(url) as daemon:
            before = SystemClock().now()
            health = daemon.ask("/ui/api/health")
            after = SystemClock().now()
            silent = daemon.ask("/ui/api/fleet", state=SILENT, limit=_NAMED)
    except CannotLook as error:
        yield _cannot_look(error, key)
        yield from _local_disk(settings)
        return
    status = health["status"]
    yield _daemon(status, url)
    yield _key(key, url)
    if status["clock"]["mode"] == "system":
        yield _clock(parse_plain_utc(status["clock"]["now"]), before, after)
    yield _agents(status)
    yield _silent_servers(silent)
    yield from _folders(settings, status)
    yield from (_problem(problem) for problem in health["problems"] if not _is_about_silence(problem))
    yield from _alert_channels(Path(_ALERTS_FILE))


def _cannot_look(error: CannotLook, key: str) -> Finding:
    says = str(error).removesuffix(f" ({error.hint})")
    if says.endswith(" key"):
        right = f"export {API_KEY_VARIABLE}=...: the units read it from /etc/fleetcast/env"
        return Finding("key", BAD, says, f"{right}{'; the one given here is another' if key else ''}")
    right = (
        "systemctl status tft-inference-daemon, or python tft_inference_daemon.py; --url for another place"
    )
    return Finding("daemon", BAD, says, right)


def _daemon(status: Mapping[str, Any], url: str) -> Finding:
    says = f"{status['program']} answers at {url} (pid {status['pid']})"
    if status["program"] != __version__:
        right = f"this is {__version__}: restart the daemon after an upgrade, or run its own fleetcast"
        return Finding("daemon", BAD, says, right)
    return Finding("daemon", OK, says)


def _key(key: str, url: str) -> Finding:
    is_local = urlsplit(url).hostname in LOOPBACK
    if why := weak_key(key):
        return Finding("key", BAD, why, "restart the daemons and the agents with a longer one")
    if not key and not is_local:
        right = f"start the daemon with {API_KEY_VARIABLE}: anyone who reaches its port can write and read"
        return Finding("key", BAD, f"{url} answers without a key", right)
    return Finding("key", OK, "accepted" if key else "none, on this host alone")


def _clock(theirs: datetime, before: datetime, after: datetime) -> Finding:
    skew_s = max((before - theirs).total_seconds(), (theirs - after).total_seconds(), 0.0)
    if skew_s > _SKEW_S:
        says = f"the daemon's clock and this host's are {length(skew_s)} apart"
        return Finding("clock", BAD, says, "let both hosts follow a time server (timedatectl set-ntp true)")
    return Finding("clock", OK, "the daemon's and this host's agree")


def _agents(status: Mapping[str, Any]) -> Finding:
    newest = status["newest_record_time"]
    right = "journalctl -u fleetcast-agent says why; 401 is the key, no answer the --url"
    if newest is None:
        return Finding("agents", BAD, "no record ever came", right)
    age_s = (parse_plain_utc(status["clock"]["now"]) - parse_plain_utc(newest)).total_seconds()
    if age_s > _SILENT_S:
        return Finding("agents", BAD, f"the newest record is {length(age_s)} old", right)
    if age_s < -_SKEW_S:
        says = f"the newest record is {length(-age_s)} in the future"
        return Finding("agents", BAD, says, "set the clock of the host that sends it")
    return Finding("agents", OK, f"the newest record is {length(max(0.0, age_s))} old")


def _silent_servers(silent: Mapping[str, Any]) -> Finding:
    n_silent, n_servers = silent["matching"], silent["servers"]
    if not n_silent:
        return Finding("servers", OK, f"none of {some(n_servers, 'server')} is silent")
    names = ", ".join(row["server"] for row in silent["rows"])
    more = f" and {n_silent - _NAMED} more" if n_silent > _NAMED else ""
    right = (
        "start the agent there; a server that is gone for good leaves the list after forecast.gone_after_s"
    )
    return Finding("servers", BAD, f"{n_silent} of {n_servers} are silent: {names}{more}", right)


def _folders(settings: Settings, status: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield whether the daemon works in the folder that these settings name, and how full its disk is."""
    theirs, ours = (
        Path(part(status, "buffer", "folder") or ""),
        Path(settings.paths.data_buffer_dir).resolve(),
    )
    if not theirs.is_dir():
        yield Finding("folder", UNKNOWN, f"the daemon's folder {theirs} is not on this host")
        return
    if ours == theirs:
        yield Finding("folder", OK, f"{theirs}")
    elif ours.is_dir():
        right = f"run these programs in {theirs.parent}, or set paths.data_buffer_dir"
        yield Finding("folder", BAD, f"the daemon's is {theirs}, the settings here name {ours}", right)
    else:
        yield Finding("folder", UNKNOWN, f"the daemon's is {theirs}; there is none at {ours}")
    yield _disk(theirs)


def _local_disk(settings: Settings) -> Iterator[Finding]:
    ours = Path(settings.paths.data_buffer_dir).resolve()
    if ours.is_dir():
        yield _disk(ours)


def _disk(folder: Path) -> Finding:
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < _FREE_GB:
        right = f"free {_FREE_GB:g} GB, or set buffer.retention_days or buffer.retention_max_mb lower"
        return Finding("disk", BAD, f"{free_gb:.1f} GB are free in {folder}", right)
    return Finding("disk", OK, f"{free_gb:.0f} GB are free")


def _alert_channels(path: Path) -> Iterator[Finding]:
    """Yield what the retraining daemon wrote down of each channel that it sends alerts to."""
    try:
        channels = read_json(path)["channels"]
        failures = {name: (int(item["failures"]), str(item["last_error"])) for name, item in channels.items()}
    except FileNotFoundError:  # none is set, or this is another folder
        return
    except (CorruptFile, KeyError, TypeError, ValueError, AttributeError) as error:
        yield Finding("alerts", BAD, f"{path} cannot be read: {error}", "restart the retraining daemon")
        return
    for name, (n_failures, why) in failures.items():
        if n_failures:
            says = f"nothing reaches {name}, {n_failures} times in a row: {why}"
            yield Finding("alerts", BAD, says, f"correct its settings, then fleetcast alerts test {name}")
        else:
            yield Finding("alerts", OK, f"{name} takes them")


def _is_about_silence(problem: Mapping[str, str]) -> bool:
    return " sent nothing for " in problem["text"]  # told with names before


def _problem(problem: Mapping[str, str]) -> Finding:
    text = problem["text"]
    right = next((advice for begin, advice in _ADVICE.items() if text.startswith(begin)), "")
    if not right:
        right = _BIN_ADVICE if "wait for their forecast" in text else ""
        right = right or (_NAMES_ADVICE if text.endswith("are used.") else "read the daemon's log")
    check = "model" if "model" in text else "problem"
    return Finding(check, BAD, text, right)


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog or "fleetcast doctor",
        description="Look for what is wrong, and say what would be right.",
        epilog="exit codes: 0 nothing is wrong; 1 something is; 2 bad usage",
    )
    add_flags(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
