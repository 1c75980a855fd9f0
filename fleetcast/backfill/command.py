"""`fleetcast import`: a fleet's history in, from a Prometheus or from files, through the running daemon.

    fleetcast import prometheus --url http://127.0.0.1:9090 --days 30
    fleetcast import parquet records.parquet
    fleetcast import csv records.csv --rename host=server_name --rename CPU=cpu_pct

Owns: flags, which daemon is fed, the summary, exit codes. Does not know: how history is read (`promql`,
`recorded`), how it is delivered and counted (`delivery`). An import may be sent again, wholly or in part: the
daemon keeps one row for a server and a time. Exit codes: 0 all records were accepted, or are older than the
retention; 1 one was refused, nothing was found, or it ended before the end; 2 wrong usage; 6 no daemon.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetcast.backfill.delivery import Bar, Delivery, State, Tally
from fleetcast.backfill.promql import Prometheus, PrometheusHistory, RuleQueries, parse_selector
from fleetcast.backfill.recorded import CSV, PARQUET, RecordedFile, parse_renames
from fleetcast.clock import DAY_MS, SystemClock, from_ms, iso_z, parse_plain_utc, to_ms
from fleetcast.errors import BadData, CannotLook, DaemonAway, ExitCode, SettingsError, printable
from fleetcast.loop import Stop, configure_logging
from fleetcast.program import run_program
from fleetcast.settings import LoggingSettings, Settings, load_settings
from fleetcast.sources.client import API_KEY_VARIABLE, DaemonClient, RequestRefused

PROMETHEUS = "prometheus"
_START_IT = (
    "start it with fleetcast infer, or systemctl start tft-inference-daemon; --daemon-url names another"
)
_WRONG_KEY = 401


@dataclass
class Import:
    """One run: where to, and what became of it."""

    delivery: Delivery
    bar: Bar
    stop: Stop
    notes: list[str]  # what the summary adds

    @property
    def tally(self) -> Tally:
        """Return what became of the records."""
        return self.delivery.tally


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Import from the command line; return the exit code."""
    options = _parser(prog).parse_args(argv)
    return run_program("import", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    configure_logging(None, LoggingSettings())
    _check_usage(options)
    overrides = {"retraining.daemon_url": options.daemon_url}
    settings = load_settings(Path(options.config) if options.config else None, overrides)
    stop = Stop()
    stop.install()
    try:
        client = DaemonClient(settings.retraining.daemon_url)
    except BadData as error:
        raise SettingsError([str(error)]) from error
    with client:
        status = _ask_status(client)
        run = Import(Delivery(client, stop, give_up_s=options.give_up_s), Bar(), stop, [])
        failure = ""
        try:
            if options.source == PROMETHEUS:
                _from_prometheus(options, settings, status, run)
            else:
                _from_file(options, run)
        except DaemonAway as error:
            failure = str(error)
        finally:
            run.bar.end()
    return _tell(options, run, failure)


def _ask_status(client: DaemonClient) -> dict[str, Any]:
    """Return the running daemon's status.

    Raises:
        CannotLook: there is none, or it refuses the key.
    """
    try:
        return client.status()
    except RequestRefused as error:
        if error.status == _WRONG_KEY:
            hint = f"set {API_KEY_VARIABLE} to the daemon's key"
            raise CannotLook(f"the daemon at {client.url} refuses the key", hint=hint) from error
        raise CannotLook(f"no inference daemon at {client.url}: {error}", hint=_START_IT) from error
    except DaemonAway as error:
        raise CannotLook(f"no inference daemon is running: {error}", hint=_START_IT) from error


def _from_prometheus(
    options: argparse.Namespace, settings: Settings, status: dict[str, Any], run: Import
) -> None:
    """Deliver what a Prometheus holds.

    Raises:
        SettingsError: a flag or a rule cannot be used.
        DaemonAway: Prometheus or the daemon failed; the state file says how far it came.
    """
    bin_s = int(status["bins"]["bin_s"])
    step_s = options.step or bin_s
    if step_s > bin_s:
        raise SettingsError([f"--step must be at most the daemon's bin of {bin_s} s, got {step_s}"])
    queries = RuleQueries(settings.remote_write, step_s)
    selectors = [parse_selector(text) for text in options.match]
    try:
        server = Prometheus(options.url, _headers(options.header), run.stop, options.give_up_s)
    except BadData as error:
        raise SettingsError([str(error)]) from error
    what = {
        "prometheus": server.url,
        "daemon": settings.retraining.daemon_url,
        "queries": [queries.query(rule) for rule in queries.rules],
        "match": sorted(options.match),
        "step_s": step_s,
    }
    state = State.read(options.state, what)
    start_ms, end_ms = _stretch(options.days, step_s, status, run)
    asked_ms = start_ms
    if not options.anew:
        start_ms, asked_ms = state.rest_of(start_ms, end_ms)
    if start_ms > asked_ms:
        there = iso_z(from_ms(start_ms))
        run.notes.append(f"up to {there} it was imported before ({state.path}; --anew begins again)")
    with server:
        history = PrometheusHistory(server, queries, selectors, step_s)
        run.bar.show(0.0, 0)
        for piece in history.pieces(start_ms, end_ms):
            if piece.table is not None and not run.delivery.send(piece.table):
                return
            state.write(asked_ms, piece.done_to_ms)
            run.bar.show((piece.done_to_ms - start_ms) / (end_ms - start_ms), run.tally.sent)
    _note_absent(queries, step_s, run)


def _stretch(days: float, step_s: int, status: dict[str, Any], run: Import) -> tuple[int, int]:
    """Return which time to import, on whole steps; what the daemon would refuse as too old is left out."""
    step_ms = step_s * 1000
    end_ms = to_ms(SystemClock().now()) // step_ms * step_ms
    start_ms = (end_ms - round(days * DAY_MS)) // step_ms * step_ms
    oldest = status["buffer"].get("oldest_accepted")
    if oldest is None:
        return start_ms, end_ms
    oldest_ms = (to_ms(parse_plain_utc(oldest)) // step_ms + 1) * step_ms
    if oldest_ms > start_ms:
        n_days = (oldest_ms - start_ms) / DAY_MS
        reason = "the daemon keeps none so old (buffer.retention_days)"
        run.notes.append(f"{n_days:.1f} days before {iso_z(from_ms(oldest_ms))} were not asked for: {reason}")
    return max(start_ms, oldest_ms), end_ms


def _note_absent(queries: RuleQueries, step_s: int, run: Import) -> None:
    """Say which rules found nothing, and why that may be."""
    absent = [rule for rule in queries.rules if not run.tally.values.get(rule.metric)]
    if not run.tally.sent or not absent or run.stop.is_requested:
        return
    hint = ""
    if all(term.is_rate for rule in absent for term in rule.terms):
        hint = f": a rate needs two scrapes in {step_s} s (--step)"
    run.notes.append(f"no values of {', '.join(rule.metric for rule in absent)}{hint}")


def _from_file(options: argparse.Namespace, run: Import) -> None:
    recorded = RecordedFile(options.path, options.source, parse_renames(options.rename))
    for table, share in recorded.tables():
        if not run.delivery.send(table):
            return
        run.bar.show(share, run.tally.sent)
    if recorded.left_out:
        run.notes.append(f"columns left out, no numbers or no metric's name: {', '.join(recorded.left_out)}")


def _headers(texts: Sequence[str]) -> dict[str, str]:
    """Return the headers of `--header`; `@FILE` holds one a line, so that no process list shows them.

    Raises:
        SettingsError: one is no header, or a file cannot be read.
    """
    lines: list[str] = []
    for text in texts:
        try:
            lines += Path(text[1:]).read_text("utf-8").splitlines() if text.startswith("@") else [text]
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError([f"--header {text}: {error}"]) from error
    headers = {}
    for line in filter(str.strip, lines):
        name, sign, value = line.partition(":")
        if not sign or not name.strip():
            raise SettingsError(["--header must be 'NAME: VALUE', or @FILE with one a line"])
        headers[name.strip()] = value.strip()
    return headers


def _tell(options: argparse.Namespace, run: Import, failure: str) -> int:
    """Print what became of it; return the exit code."""
    tally, is_stopped = run.tally, run.stop.is_requested
    found = {
        "records": tally.sent,
        "accepted": tally.accepted,
        "refused": tally.refused,
        "beyond_retention": tally.beyond_retention,
        "servers": len(tally.servers),
        "wall_s": round(run.delivery.wall_s, 1),
    }
    if options.json:
        more = {"values": tally.values, "reasons": tally.reasons, "notes": run.notes, "failure": failure}
        print(json.dumps({**found, **more, "stopped": is_stopped}, indent=2))
    else:
        print(f"import: {' '.join(f'{name}={value}' for name, value in found.items())}")
        if tally.values:
            print(f"import: values {' '.join(f'{name}={count}' for name, count in tally.values.items())}")
    for line in _remarks(run, failure):
        print(f"import: {printable(line)}", file=sys.stderr)
    is_nothing = not tally.sent and not any(" imported before" in note for note in run.notes)
    return ExitCode.FAILED if failure or is_stopped or tally.refused or is_nothing else ExitCode.OK


def _remarks(run: Import, failure: str) -> Iterator[str]:
    yield from run.notes
    yield from (f"the daemon refused: {reason}" for reason in run.tally.reasons)
    if failure:
        yield f"ended before the end: {failure}"
    elif run.stop.is_requested:
        yield f"ended by {run.stop.reason}"
    elif not run.tally.sent and not run.notes:
        yield "found nothing: do the series have other names (remote_write.rules), or another --match?"
    if failure or run.stop.is_requested:
        yield "run the same command again to go on; what is sent twice is stored once"


def _check_usage(options: argparse.Namespace) -> None:
    """Refuse flags that belong to another source.

    Raises:
        SettingsError: names each.
    """
    is_prometheus = options.source == PROMETHEUS
    problems = []
    if is_prometheus and not options.url:
        problems.append("import prometheus needs --url, such as http://127.0.0.1:9090")
    if is_prometheus and options.path:
        problems.append(f"import prometheus takes no PATH, got {options.path}")
    if not is_prometheus and not options.path:
        problems.append(f"import {options.source} needs a PATH")
    others = ("rename",) if is_prometheus else ("url", "match", "header", "step", "state", "anew")
    given = [name for name in others if getattr(options, name)]
    problems += [f"--{name} is not for {options.source}" for name in given]
    if problems:
        raise SettingsError(problems)


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog or "fleetcast import",
        description="Bring a fleet's history in through the running daemon.",
        epilog=f"{API_KEY_VARIABLE} is sent as X-API-Key. Exit codes: 0 all accepted or older than the "
        "retention; 1 some were not, or it ended early; 2 wrong usage; 6 no daemon answers, or the key.",
    )
    parser.add_argument("source", choices=(PROMETHEUS, PARQUET, CSV), help="where the history is")
    parser.add_argument(
        "path", nargs="?", type=Path, metavar="PATH", help="of parquet (file or folder) or csv"
    )
    parser.add_argument("--daemon-url", help="the inference daemon (default: retraining.daemon_url)")
    parser.add_argument("--config", metavar="FILE", help="settings (default ./fleetcast.toml if present)")
    parser.add_argument("--give-up-s", type=_positive, default=120.0, help="without an answer (120)")
    parser.add_argument("--json", action="store_true", help="answer as JSON")
    _add_prometheus_flags(parser.add_argument_group("prometheus"))
    files = parser.add_argument_group("parquet and csv")
    files.add_argument(
        "--rename", action="append", default=[], metavar="COLUMN=NAME", help="for example host=server_name"
    )
    return parser


def _add_prometheus_flags(asked: argparse._ArgumentGroup) -> None:
    asked.add_argument("--url", help="of Prometheus, Thanos, Mimir or VictoriaMetrics")
    asked.add_argument("--days", type=_positive, default=30.0, metavar="N", help="how far back (30)")
    asked.add_argument(
        "--match",
        action="append",
        default=[],
        metavar="SELECTOR",
        help='only series like {job="node"}; several: any',
    )
    asked.add_argument(
        "--step", type=_whole, metavar="SECONDS", help="one record for so long (default: a bin)"
    )
    asked.add_argument(
        "--header",
        action="append",
        default=[],
        metavar="TEXT",
        help="'NAME: VALUE', or @FILE with one a line",
    )
    asked.add_argument("--state", type=Path, metavar="FILE", help="how far it came (fleetcast_import_*.json)")
    asked.add_argument("--anew", action="store_true", help="begin again, whatever the state file says")


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be > 0, got {text}")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {text}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
