"""This machine's real metrics, sent to the inference daemon every few seconds.

    python -m fleetcast.sources.agent --url http://127.0.0.1:8000 --interval 5

Owns: psutil, how its counters become rates, and the records that wait for a daemon that is away.
Does not know: what the daemon does with them. Runs alone on any host; the key comes from
`TFT_API_KEY`.

Waiting records are kept in memory (a day of them by default), oldest first, and sent again until
the daemon takes them; a restart of the agent loses them. Unlike `RecordSender`, which blocks its
caller, a delivery never delays the next reading and gives nothing up but the oldest records. A
record leaves the backlog only after the daemon answered for it. Sending one twice is harmless: the
daemon keeps one row per (server, timestamp).
"""

import argparse
import logging
import math
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from fleetcast.clock import Clock, SystemClock, iso_z, monotonic
from fleetcast.errors import BadData, DaemonAway, ExitCode, SettingsError, is_visible, quote
from fleetcast.loop import Stop, SystemdNotifier, configure_logging, run_every
from fleetcast.program import run_program
from fleetcast.schema import VIRTUAL_DISKS, VIRTUAL_NICS, increase
from fleetcast.settings import LoggingSettings
from fleetcast.sources.client import DaemonClient, FeedAnswer, RequestRefused
from fleetcast.workers import Workers

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
BYTES_PER_MB = 1e6
BACKLOG_RECORDS = 17_280  # a day at 5 s
BATCH_RECORDS = 500  # a day of one host at 5 s is delivered in 35 requests
DELIVERY_TICK_S = 0.5
FIRST_SPAN_S = 1.0  # a rate over a few milliseconds would be noise
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0
REQUEST_TIMEOUT_S = 10.0
SHUTDOWN_S = 10.0
TOO_LARGE = 413


class Backlog:
    """At most `limit` records; a new one displaces the oldest. Safe between threads."""

    def __init__(self, limit: int) -> None:
        self._records: deque[tuple[int, Record]] = deque()
        self._limit = limit
        self._lock = threading.Lock()
        self._added = 0
        self.displaced = 0  # records given up because the daemon was away too long

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: Record) -> None:
        """Keep `record` until it is delivered or displaced."""
        with self._lock:
            self._added += 1
            self._records.append((self._added, record))
            if len(self._records) > self._limit:
                self._records.popleft()
                self.displaced += 1

    def oldest(self, count: int) -> tuple[list[Record], int]:
        """Return up to `count` records, and the mark up to which `forget` forgets them."""
        with self._lock:
            chosen = [self._records[i] for i in range(min(count, len(self._records)))]
        return [record for _, record in chosen], chosen[-1][0] if chosen else 0

    def forget(self, mark: int) -> None:
        """Forget the records up to `mark`; ones displaced meanwhile are not counted again."""
        with self._lock:
            while self._records and self._records[0][0] <= mark:
                self._records.popleft()


class Delivery:
    """Empties a backlog into `post`, backing off while that fails. Not thread safe."""

    def __init__(
        self,
        backlog: Backlog,
        post: Callable[[Sequence[Record]], FeedAnswer],
        wall_s: Callable[[], float] = monotonic,
    ) -> None:
        self._backlog = backlog
        self._post = post
        self._wall_s = wall_s
        self._next_try_s = 0.0
        self._wait_s = FIRST_WAIT_S
        self._batch = BATCH_RECORDS
        self._away_since_s: float | None = None
        self.received = 0
        self.rejected = 0

    @property
    def is_away(self) -> bool:
        """Whether the last try failed."""
        return self._away_since_s is not None

    def run_due(self) -> None:
        """Deliver everything that waits, unless the pause after a failed try is not over."""
        while self._wall_s() >= self._next_try_s:
            records, mark = self._backlog.oldest(self._batch)
            if not records:
                return
            try:
                answer = self._post(records)
            except DaemonAway as error:
                self._note_failure(error, len(records))
                continue
            self._backlog.forget(mark)
            self._note_success(answer)

    def _note_failure(self, error: DaemonAway, n_records: int) -> None:
        refusal = error if isinstance(error, RequestRefused) else None
        if refusal and refusal.status == TOO_LARGE and n_records > 1:
            self._batch = n_records // 2  # the daemon's limit is a setting: find one that fits
            return
        now_s = self._wall_s()
        if self._away_since_s is None:
            self._away_since_s = now_s
            logger.warning("delivery failed, records wait error=%s waiting=%d", error, len(self._backlog))
        asked_s = (refusal.retry_after_s if refusal else None) or 0.0
        self._next_try_s = now_s + min(max(asked_s, self._wait_s), LONGEST_WAIT_S)
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)

    def _note_success(self, answer: FeedAnswer) -> None:
        self.received += answer.received
        self.rejected += answer.rejected
        self._wait_s = FIRST_WAIT_S
        if answer.rejected:
            logger.warning("daemon rejected records=%d first=%s", answer.rejected, answer.errors[:1])
        if self._away_since_s is not None:
            away_s = self._wall_s() - self._away_since_s
            self._away_since_s = None
            logger.info("delivery works again after_s=%.0f waiting=%d", away_s, len(self._backlog))


class CounterRate:
    """Bytes per second out of growing counters, one per device.

    A counter that fell to near zero began again there. One that fell otherwise (another disk under the
    name, a reading that went back) has no known rate this time, so the sum over all devices has none
    either; a device that is new is left out. With no counter left the rate is None, not 0.

    >>> rate = CounterRate()
    >>> rate.update({"vda": 1_000}, at_s=10.0) is None
    True
    >>> rate.update({"vda": 6_000, "vdb": 9}, at_s=15.0)
    1000.0
    """

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._at_s = 0.0

    def update(self, counts: Mapping[str, int], at_s: float) -> float | None:
        """Take new counts, return the rate since the last ones."""
        grown = [increase(self._last[name], n) for name, n in counts.items() if name in self._last]
        elapsed_s = at_s - self._at_s
        self._last, self._at_s = dict(counts), at_s
        if not grown or elapsed_s <= 0 or not math.isfinite(sum(grown)):
            return None
        return sum(grown) / elapsed_s


class HostMeter:
    """Reads one host. A metric that the host does not have (no disk in a container) is absent."""

    def __init__(self, disk_path: Path = Path("/"), wall_s: Callable[[], float] = monotonic) -> None:
        self._disk_path = disk_path
        self._wall_s = wall_s
        self._disk, self._net_in, self._net_out = CounterRate(), CounterRate(), CounterRate()
        self.read()  # the first reading of a counter has no rate

    def read(self) -> dict[str, float]:
        """Return the metrics of the time since the last call."""
        at_s = self._wall_s()
        nics = {
            name: nic
            for name, nic in psutil.net_io_counters(pernic=True, nowrap=False).items()
            if not name.startswith(VIRTUAL_NICS)
        }
        readings: dict[str, float | None] = {
            "cpu_pct": psutil.cpu_percent(),
            "mem_pct": psutil.virtual_memory().percent,
            "disk_io_mb_s": _in_mb(self._disk.update(_disk_bytes(), at_s)),
            "net_in_mb_s": _in_mb(self._net_in.update({n: nic.bytes_recv for n, nic in nics.items()}, at_s)),
            "net_out_mb_s": _in_mb(
                self._net_out.update({n: nic.bytes_sent for n, nic in nics.items()}, at_s)
            ),
            "load_average": os.getloadavg()[0],
            "disk_usage_pct": _disk_usage_percent(self._disk_path),
        }
        return {name: value for name, value in readings.items() if value is not None}


def _disk_bytes() -> dict[str, int]:
    """Return bytes read and written per whole, physical disk."""
    whole = {path.name for path in Path("/sys/block").glob("*")}
    return {
        name: disk.read_bytes + disk.write_bytes
        for name, disk in psutil.disk_io_counters(perdisk=True, nowrap=False).items()
        if (not whole or name in whole) and not name.startswith(VIRTUAL_DISKS)
    }


def _disk_usage_percent(path: Path) -> float | None:
    try:
        return psutil.disk_usage(str(path)).percent
    except OSError:  # unmounted for the moment: absent, the other metrics still count
        return None


def _in_mb(bytes_per_s: float | None) -> float | None:
    return None if bytes_per_s is None else bytes_per_s / BYTES_PER_MB


class LocalAgent:
    """Samples in the caller's thread and delivers in one of its own.

    A daemon that hangs holds up a delivery, never a reading.
    """

    def __init__(
        self,
        server_name: str,
        meter: HostMeter,
        client: DaemonClient,
        *,
        backlog_records: int = BACKLOG_RECORDS,
        clock: Clock | None = None,
    ) -> None:
        self._server_name = server_name
        self._meter = meter
        self._clock = clock or SystemClock()
        self._backlog = Backlog(backlog_records)
        self._delivery = Delivery(self._backlog, client.post_records)
        self._notifier = SystemdNotifier()
        self._ending = threading.Event()
        self._workers = Workers()

    def cycle(self) -> None:
        """Take one reading."""
        reading = self._meter.read()
        record = {"timestamp": iso_z(self._clock.now()), "server_name": self._server_name, **reading}
        self._backlog.add(record)
        self._workers.look_after()
        self._notifier.alive(self.summary())

    def run(self, interval_s: float, stop: Stop) -> bool:
        """Sample every `interval_s` until the stop; then give the last records a bounded chance."""
        sender = self._workers.thread("delivery", self._deliver)
        sender.start()
        self._notifier.ready()
        stop.wait(min(FIRST_SPAN_S, interval_s))
        is_fine = run_every(self.cycle, interval_s, stop)
        self._notifier.stopping(stop.reason)
        self._ending.set()
        sender.stop()
        sender.join(SHUTDOWN_S)
        logger.info("agent ends %s", self.summary())
        return is_fine

    def summary(self) -> str:
        """Return one line for people."""
        state = "away" if self._delivery.is_away else "ok"
        return (
            f"daemon={state} received={self._delivery.received} rejected={self._delivery.rejected} "
            f"waiting={len(self._backlog)} displaced={self._backlog.displaced}"
            + "".join(f" problem={text}" for text in self._workers.problems())
        )

    def _deliver(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._ending.wait(DELIVERY_TICK_S)
            self._delivery.run_due()


def _parser(prog: str | None) -> argparse.ArgumentParser:
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(
        prog=prog or "python -m fleetcast.sources.agent", description=description
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the inference daemon (%(default)s)")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between readings (%(default)s)")
    parser.add_argument("--server-name", default=socket.gethostname(), help="name of this host (%(default)s)")
    parser.add_argument(
        "--disk-path", type=Path, default=Path("/"), help="file system of disk_usage_pct (%(default)s)"
    )
    parser.add_argument(
        "--backlog",
        type=int,
        default=BACKLOG_RECORDS,
        help="records kept while the daemon is away (%(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the agent until SIGTERM or SIGINT; return the exit code."""
    options = _parser(prog).parse_args(argv)
    return run_program("agent", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    client = _client(options)
    configure_logging(None, LoggingSettings())
    stop = Stop()
    stop.install()
    meter = HostMeter(options.disk_path)
    agent = LocalAgent(options.server_name, meter, client, backlog_records=options.backlog)
    logger.info(
        "agent starts url=%s server_name=%s interval_s=%g",
        *(options.url, options.server_name, options.interval),
    )
    return ExitCode.OK if agent.run(options.interval, stop) else ExitCode.FAILED


def _client(options: argparse.Namespace) -> DaemonClient:
    """Return a client of the daemon.

    Raises:
        SettingsError: names every flag that makes no sense.
    """
    problems = []
    if not 0.1 <= options.interval <= 3600:
        problems.append(f"--interval must be in 0.1..3600 seconds, got {options.interval:g}")
    if options.backlog < 1:
        problems.append(f"--backlog must be at least 1, got {options.backlog}")
    name = options.server_name
    if not 1 <= len(name) <= 128 or not name.isprintable() or not is_visible(name):
        limits = "1 to 128 printable characters, at least one of them visible"
        problems.append(f"--server-name must be {limits}, got {quote(name)}")
    try:
        client = DaemonClient(options.url, timeout_s=REQUEST_TIMEOUT_S)
    except BadData as error:
        problems.append(str(error))
    if problems:
        raise SettingsError(problems)
    return client


if __name__ == "__main__":
    raise SystemExit(main())
