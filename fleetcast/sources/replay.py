"""Sends a recorded fleet to the inference daemon, at any speed.

    python -m fleetcast.sources.replay --data samples/smd_fleet.parquet \
        --url http://127.0.0.1:8000 --speed max --map cpu_pct=cpu_r_norm01*100

Owns: the command line, the order and pace of sending, and the waiting while a training runs.
Does not know: how a recording is read (`recording`), HTTP (`client`).
Exit codes: 0 the daemon accepted everything (or Ctrl+C ended the replay), 1 the daemon rejected a
record or stopped answering, 2 wrong usage.
"""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from fleetcast.clock import Clock, SystemClock, from_ms, iso_z, monotonic, parse_plain_utc
from fleetcast.errors import BadData, DaemonAway, ExitCode, SettingsError, quote
from fleetcast.loop import Stop, configure_logging
from fleetcast.program import run_program
from fleetcast.settings import BinSettings, LoggingSettings
from fleetcast.sources.client import DaemonClient, RecordSender
from fleetcast.sources.recording import Cut, Formula, Recording, check_distinct, load_recording, parse_formula

logger = logging.getLogger(__name__)

MAX_RECORDS_PER_POST = 5_000  # about 1 MB of JSON, far below the daemon's body limit
STATUS_POLL_S = 1.0
PROGRESS_S = 10.0
SHOWN_ERRORS = 5


@dataclass
class Tally:
    """What a replay has done so far, for its summary."""

    sent: int = 0
    accepted: int = 0
    rejected: int = 0
    errors: list[str] = field(default_factory=list)
    held_s: float = 0.0


class Pace:
    """Turns data time into wall time at `speed` data seconds per second; infinity never waits."""

    def __init__(self, speed: float, first_ms: int, started_s: float) -> None:
        self._speed = speed
        self._first_ms = first_ms
        self._started_s = started_s

    def wait_s(self, data_ms: int, now_s: float) -> float:
        """Return how long to wait before a record of `data_ms` is due.

        >>> Pace(60.0, 0, started_s=100.0).wait_s(300_000, now_s=101.0)
        4.0
        """
        if math.isinf(self._speed):
            return 0.0
        return max(0.0, self._started_s + (data_ms - self._first_ms) / 1000 / self._speed - now_s)

    def pause(self, seconds: float) -> None:
        """Leave out time in which data time stood still."""
        self._started_s += seconds


class Player:
    """One run through a recording. Not thread safe."""

    def __init__(
        self,
        recording: Recording,
        client: DaemonClient,
        *,
        speed: float,
        batch_s: float,
        stop: Stop,
        give_up_s: float = 120.0,
    ) -> None:
        self._recording = recording
        self._client = client
        self._stop = stop
        self._batch_s = batch_s
        self._speed = speed
        self._polled_s = -math.inf
        self._logged_s = monotonic()
        self.sender = RecordSender(client, stop, give_up_s=give_up_s)
        self.tally = Tally()

    def run(self) -> None:
        """Send everything, or up to the requested stop.

        Raises:
            DaemonAway: the daemon did not take a batch; the tally says how far the replay came.
        """
        recording = self._recording
        pace = Pace(self._speed, int(recording.timestamps_ms[0]), monotonic())
        for rows in recording.batches(self._batch_s, MAX_RECORDS_PER_POST):
            last_ms = int(recording.timestamps_ms[rows.stop - 1])
            if self._stop.wait(pace.wait_s(last_ms, monotonic())):
                return
            pace.pause(self._hold())
            if not self._send(rows):
                return
            self._log_progress(last_ms)

    def _send(self, rows: slice) -> bool:
        records = self._recording.records(rows)
        answer = self.sender.send(records)
        if answer is None:
            return False
        tally = self.tally
        tally.sent += len(records)
        tally.accepted += answer.received
        tally.rejected += answer.rejected
        tally.errors += answer.errors[: SHOWN_ERRORS - len(tally.errors)]
        return True

    def _hold(self) -> float:
        """Wait while a training runs; return how long."""
        began_s = monotonic()
        if began_s - self._polled_s < STATUS_POLL_S:
            return 0.0
        is_training = self._training_runs()
        if is_training:
            logger.info("replay waits while a training runs")
        while is_training and not self._stop.wait(STATUS_POLL_S / 4):
            is_training = self._training_runs()
        self._polled_s = monotonic()
        held_s = self._polled_s - began_s
        self.tally.held_s += held_s
        return held_s

    def _training_runs(self) -> bool:
        try:
            training = self._client.status().get("training")
        except DaemonAway as error:
            logger.debug("status not read error=%s", error)  # the next POST deals with it
            return False
        return isinstance(training, dict) and training.get("running") is True

    def _log_progress(self, data_ms: int) -> None:
        now_s = monotonic()
        if now_s - self._logged_s >= PROGRESS_S:
            self._logged_s = now_s
            share = 100 * self.tally.sent / len(self._recording)
            logger.info(
                "replay at=%s records=%d done_percent=%.0f", iso_z(from_ms(data_ms)), self.tally.sent, share
            )


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Replay from the command line; return the exit code."""
    options = _parser(prog).parse_args(argv)
    return run_program("replay", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    configure_logging(None, LoggingSettings())
    stop = Stop()
    stop.install()
    speed = _speed(options.speed)
    batch_s = _positive("--batch-s", options.batch_s)
    try:
        recording = _prepare(options, speed, SystemClock())
        client = DaemonClient(options.url)
    except BadData as error:  # of what the flags name
        raise SettingsError([str(error)]) from error
    _warn_of_foreign_names(recording)
    with client:
        player = Player(
            recording, client, speed=speed, batch_s=batch_s, stop=stop, give_up_s=options.give_up_s
        )
        return _play(player, recording, stop)


def _warn_of_foreign_names(recording: Recording) -> None:
    """Say so where the daemon would store every metric and, by its default settings, forecast none."""
    forecast = BinSettings().forecast_metrics
    if not set(recording.metrics) & set(forecast):
        logger.warning(
            "no metric of this recording is forecast by default: sent=%s forecast=%s; map a column, "
            "for example --map %s=%s, or name the metrics in the daemon's bins.forecast_metrics",
            *(",".join(recording.metrics), ",".join(forecast), forecast[0], next(iter(recording.metrics))),
        )


def _play(player: Player, recording: Recording, stop: Stop) -> int:
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


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog or "python -m fleetcast.sources.replay",
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
        help="metrics to send: cpu_pct=cpu_r*100, io=read+write, or a column's own name; default: all",
    )
    parser.add_argument("--servers", help="send only these, comma separated")
    parser.add_argument("--start", type=_moment, help="leave out older records (ISO 8601, UTC)")
    parser.add_argument("--days", type=float, help="leave out records from this many days after the start on")
    parser.add_argument(
        "--shift-to",
        help="move all times by one step: to ISO for the first record, or to now for the last one "
        "(up to --speed 1: the first one)",
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
            f"expected ISO 8601 like 2026-01-15T10:00:00, got {quote(text)}"
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
        raise SettingsError([f"--speed must be a number or max, got {quote(text)}"]) from None


def _prepare(options: argparse.Namespace, speed: float, clock: Clock) -> Recording:
    formulas: list[Formula] = [parse_formula(text) for text in options.map]
    check_distinct(formulas)
    if options.days is not None:
        _positive("--days", options.days)
    servers = frozenset(options.servers.split(",")) if options.servers else None
    recording = load_recording(options.data, formulas, Cut(servers, options.start, options.days))
    if not options.shift_to:
        return recording
    if options.shift_to != "now":
        return recording.shift(_shift_target(options.shift_to) - recording.first)
    anchor = recording.first if speed <= 1 else recording.last
    return recording.shift(clock.now().astimezone(UTC) - anchor)


def _shift_target(text: str) -> datetime:
    try:
        return parse_plain_utc(text)
    except ValueError:
        raise SettingsError([f"--shift-to must be now or ISO 8601, got {quote(text)}"]) from None


if __name__ == "__main__":
    raise SystemExit(main())
