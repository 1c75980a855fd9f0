"""What the dates of full disks cost a large fleet: `GET /capacity/dates`, which each check of alerts asks.

    python -m benchmarks.forecast.capacity_dates [--servers 10000] [--days 60]

Makes the daily maxima of a fleet, of which half climb, and asks three times as the retraining daemon's alert
does: the first question judges every server, the others come at the next checks of the same day. Told are
CPU and wall seconds of each. No daemon runs: HTTP and the reading of the days are not in it.
"""

import argparse
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.results_file import write_results
from fleetcast.clock import DAY_MS, FakeClock, to_ms
from fleetcast.inference import build_fleet
from fleetcast.serving.fullness import FIRST_METRIC, DatesQuestion, Fullness, _Day
from fleetcast.settings import Settings
from fleetcast.storage.store import DataBuffer

NOON = datetime(2026, 1, 15, 12, tzinfo=UTC)
ROWS = 1000  # that the alert asks for
QUESTIONS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--servers", type=int, default=10_000)
    parser.add_argument("--days", type=int, default=60)
    options = parser.parse_args(argv)
    print(write_results("capacity_dates", measure(options.servers, options.days)))
    return 0


def measure(n_servers: int, n_days: int) -> dict[str, Any]:
    """Return what each question takes."""
    clock = FakeClock(NOON)
    with TemporaryDirectory() as folder:
        buffer = DataBuffer(Path(folder))
        fullness = Fullness(build_fleet(Settings(), clock), buffer)
        fullness._days = _make_days(n_servers, n_days, to_ms(NOON) // DAY_MS - 1)
        questions = []
        for _ in range(QUESTIONS):
            began, cpu = time.monotonic(), time.process_time()
            answer = fullness.answer(DatesQuestion(n_rows=ROWS))
            spent = {"cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - began}
            questions.append({name: round(value, 3) for name, value in spent.items()})
        buffer.close()
    return {
        "servers": n_servers,
        "days": n_days,
        "with_date": answer["with_date"],
        "comparisons": answer["comparisons"],
        "questions": questions,
    }


def _make_days(n_servers: int, n_days: int, newest: int) -> dict[int, _Day]:
    """Return daily maxima up to the newest day: half of the servers climb, all are noisy."""
    random = np.random.default_rng(1)
    climbs = np.where(random.random(n_servers) < 0.5, random.uniform(0.1, 0.8, n_servers), 0.0)
    first = random.uniform(10.0, 60.0, n_servers)
    names = tuple(f"web-{number:05d}" for number in range(n_servers))
    days = {}
    for number in range(n_days):
        values = np.clip(first + climbs * number + random.normal(0.0, 0.5, n_servers), 0.0, 100.0)
        days[newest - n_days + 1 + number] = _Day(names, (FIRST_METRIC,), values.astype(np.float32)[:, None])
    return days


if __name__ == "__main__":
    raise SystemExit(main())
