"""Does the daemon's memory stay flat when 2,000 servers are fed to it faster than life?

    .venv/bin/python -m benchmarks.ingest.ingest_soak [--minutes 10]

One connection sends Arrow streams of one tick each. Nothing may be refused for good: any answer but
200 and 429 ends the run.
"""

import argparse
import http.client
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ingest.parts import bodies
from benchmarks.programs import InferenceDaemon
from benchmarks.results_file import write_results
from fleetcast.clock import SystemClock, to_ms

SERVERS = 2000
STEP_MS = 5_000
LOOK_S = 10.0
BIN_MS, DAY_MS = 300_000, 86_400_000


def main(argv: Sequence[str] | None = None) -> int:
    """Feed, print what was seen, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    figures = soak(parser.parse_args(argv).minutes)
    print(figures)
    print(write_results("ingest_soak", figures))
    return 0


def soak(minutes: float) -> dict[str, Any]:
    """Feed ticks of 2,000 servers, 5 s apart by their own time, as fast as the daemon takes them.

    Under the data clock, so that bins close, are forecast and settle at that pace, too; a 429
    (a sweep goes first) is sent again.
    """
    folder = Path(tempfile.mkdtemp(prefix="fleetcast-soak-"))
    sizes: list[int] = []
    n_ticks = n_held = 0
    start_ms = to_ms(SystemClock().now()) - 60 * DAY_MS
    with InferenceDaemon(folder, "--clock", "data") as daemon:
        link = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=60)
        began = measured_at = time.monotonic()
        while time.monotonic() < began + minutes * 60:
            at_ms = start_ms + n_ticks * STEP_MS
            body = next(bodies.arrow_bodies(at_ms, 1, SERVERS, n_servers=SERVERS))
            link.request("POST", "/feed/data", body, {"Content-Type": bodies.ARROW})
            answer = link.getresponse()
            answer.read()
            if answer.status == 200:
                n_ticks += 1
            elif answer.status == 429:
                n_held += 1
            else:
                raise AssertionError(f"the daemon answered {answer.status}")
            if time.monotonic() - measured_at >= LOOK_S:
                measured_at = time.monotonic()
                sizes.append(daemon.memory_bytes // 2**20)
    shutil.rmtree(folder)
    return {
        "minutes": minutes,
        "servers": SERVERS,
        "records": n_ticks * SERVERS,
        "times_faster_than_life": round(n_ticks * STEP_MS / 1000 / (minutes * 60), 1),
        "bins_closed": n_ticks * STEP_MS // BIN_MS,
        "answers_429": n_held,
        "memory_mb_every_10_s": sizes,
    }


if __name__ == "__main__":
    raise SystemExit(main())
