"""Sends a recorded fleet to the inference daemon, at any speed.

    python -m fleetcast.sources.replay --data samples/smd_fleet.parquet \\
        --url http://127.0.0.1:8000 --speed max --map cpu_pct=cpu_r_norm01*100

Owns: the command line. Does not know: how a recording is read (`recording.py`) or paced
(`player.py`).
Exit codes: 0 everything was accepted (or Ctrl+C ended it cleanly), 1 something was rejected
or the daemon gave up on us, 2 wrong usage.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fleetcast.clock import Clock, SystemClock, iso_z, monotonic, parse_plain_utc
from fleetcast.errors import BadData, DaemonAway, ExitCode, FleetcastError, SettingsError
from fleetcast.logs import configure_logging
from fleetcast.loop import Stop
from fleetcast.settings import LoggingSettings
from fleetcast.sources.client import DaemonClient
from fleetcast.sources.mapping import Formula, check_distinct, parse_formula
from fleetcast.sources.player import Player
from fleetcast.sources.recording import Cut, Recording, load_recording


def main(argv: Sequence[str] | None = None) -> int:
    """Replay from the command line; return the exit code."""
    options = _parser().parse_args(argv)
    configure_logging(None, LoggingSettings())
    stop = Stop()
    stop.install()
    try:
        speed = _speed(options.speed)
        recording = _prepared(options, speed, SystemClock())
        with DaemonClient(options.url) as client:
            player = Player(
                recording,
                client,
                speed=speed,
                batch_s=_positive("--batch-s", options.batch_s),
                stop=stop,
                give_up_s=options.give_up_s,
            )
            return _run(player, recording, stop)
    except (SettingsError, BadData) as error:
        print(f"replay: {error}", file=sys.stderr)
        return ExitCode.BAD_SETTINGS
    except FleetcastError as error:
        print(f"replay: {error}", file=sys.stderr)
        return error.exit_code


def _run(player: Player, recording: Recording, stop: Stop) -> int:
    began_s = monotonic()
    failure = ""
    try:
        player.run()
    except DaemonAway as error:
        failure = str(error)
    tally = player.tally
    print(
        f"replay: records={len(recording)} sent={tally.sent} accepted={tally.accepted} "
        f"rejected={tally.rejected} requests={player.sender.requests} retries={player.sender.retries} "
        f"held_s={tally.held_s:.1f} wall_s={monotonic() - began_s:.1f} "
        f"first={iso_z(recording.first)} last={iso_z(recording.last)}"
    )
    for reason in tally.errors:
        print(f"replay: rejected: {reason}", file=sys.stderr)
    if failure:
        print(f"replay: stopped at record {tally.sent}: {failure}", file=sys.stderr)
    elif stop.is_requested:
        print(f"replay: stopped by {stop.reason} before the end", file=sys.stderr)
    return ExitCode.FAILED if failure or tally.rejected else ExitCode.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fleetcast.sources.replay",
        description="Send a recorded fleet (Parquet: timestamp, server_name, metrics) to the daemon.",
        epilog="TFT_API_KEY is sent as X-API-Key.",
    )
    parser.add_argument("--data", type=Path, required=True, help="Parquet file or folder")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the inference daemon")
    parser.add_argument("--speed", default="max", help="data seconds per second, or max (default)")
    parser.add_argument(
        "--map",
        nargs="+",
        action="extend",
        default=[],
        metavar="METRIC=COLUMN*FACTOR+...",
        help="what is sent: cpu_pct=cpu_r*100, io=read+write, or a column's own name; default: all",
    )
    parser.add_argument("--servers", help="only these, comma separated")
    parser.add_argument("--start", type=_moment, help="leave out what is older (ISO 8601, UTC)")
    parser.add_argument("--days", type=float, help="leave out what is this many days after the start")
    parser.add_argument(
        "--shift-to",
        help="move all times by one step: ISO = the first record falls there; now = the last one "
        "(up to --speed 1: the first one) does",
    )
    parser.add_argument("--batch-s", type=float, default=300.0, help="data seconds per request (300)")
    parser.add_argument(
        "--give-up-s", type=float, default=120.0, help="end after this long without an answer (120)"
    )
    return parser


def _moment(text: str) -> datetime:
    try:
        return parse_plain_utc(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected ISO 8601 like 2026-01-15T10:00:00, got {text!r}"
        ) from None


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise SettingsError([f"{name} must be > 0, got {value}"])
    return value


def _speed(text: str) -> float:
    if text == "max":
        return math.inf
    try:
        return _positive("--speed", float(text))
    except ValueError:
        raise SettingsError([f"--speed must be a number or max, got {text!r}"]) from None


def _prepared(options: argparse.Namespace, speed: float, clock: Clock) -> Recording:
    formulas: list[Formula] = [parse_formula(text) for text in options.map]
    check_distinct(formulas)
    if options.days is not None:
        _positive("--days", options.days)
    servers = frozenset(options.servers.split(",")) if options.servers else None
    recording = load_recording(options.data, formulas, Cut(servers, options.start, options.days))
    if not options.shift_to:
        return recording
    if options.shift_to != "now":
        return recording.shifted(_shift_target(options.shift_to) - recording.first)
    anchor = recording.first if speed <= 1 else recording.last
    return recording.shifted(clock.now().astimezone(UTC) - anchor)


def _shift_target(text: str) -> datetime:
    try:
        return parse_plain_utc(text)
    except ValueError:
        raise SettingsError([f"--shift-to must be now or ISO 8601, got {text!r}"]) from None


if __name__ == "__main__":
    raise SystemExit(main())
