"""A process that feeds a buffer as fast as it can, to be killed: what it says on stdout is durable.

    python benchmarks/buffer/parts/crash_writer.py FOLDER FIRST_BATCH [FIRST_BATCH ...]

One thread per number given; thread t appends batch n, n + 1, ... of its own servers and prints
`t n` when `append_batch` has returned. `rows_of_batch` is deterministic, so a reader knows what
must be there. Flushing, compaction, sealing and taking means run all the time beside it, at a pace
that makes a crash hit them.
"""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import numpy as np

from fleetcast.clock import from_ms
from fleetcast.schema import RecordBatch
from fleetcast.settings import BufferSettings
from fleetcast.storage.store import DataBuffer
from fleetcast.storage.upkeep import UpkeepPace

START_MS = 1_768_435_200_000  # 2026-01-15
STEP_MS = 1_800_000  # 48 batches are a day
SERVERS = 5
BIN_MS = 2 * STEP_MS
PACE = UpkeepPace(compact_parts=4, seal_quiet_s=0.0, reseal_quiet_s=0.2, bin_ms=BIN_MS)
SETTINGS = BufferSettings(publish_records=40, publish_s=0.1)

Row = tuple[str, int, str, float]  # server, time, metric, value


def rows_of_batch(thread: int, number: int) -> Iterator[Row]:
    """Yield what a batch holds: its own time, sometimes the last one again, sometimes rows a day late."""
    for server in range(SERVERS):
        name = f"t{thread}-s{server}"
        now_ms = START_MS + number * STEP_MS
        yield name, now_ms, "cpu_pct", float(number % 100)
        if number % 3 == 0:
            yield name, now_ms, "late_ms", float(number)
        if number % 5 == 4:
            yield name, now_ms - STEP_MS, "cpu_pct", float(number % 100) + 0.5
        if number % 11 == 10 and server == 0:
            yield name, now_ms - 86_400_000 + 1, "cpu_pct", float(number % 7)


def record_batch(thread: int, number: int) -> RecordBatch:
    """Return the batch in columns; a value of the same key that comes later stands later."""
    rows = list(rows_of_batch(thread, number))
    names = list(dict.fromkeys(name for name, *_ in rows))
    metrics = list(dict.fromkeys(metric for _, _, metric, _ in rows))
    return RecordBatch(
        server_names=tuple(names),
        server_codes=np.array([names.index(name) for name, *_ in rows], dtype=np.int32),
        timestamps_ms=np.array([time for _, time, _, _ in rows], dtype=np.int64),
        metrics={
            wanted: np.array([value if metric == wanted else np.nan for *_, metric, value in rows])
            for wanted in metrics
        },
    )


def write(owner: DataBuffer, thread: int, first: int) -> None:
    """Append without end."""
    number = first
    while True:
        owner.append_batch(record_batch(thread, number))
        os.write(1, b"%d %d\n" % (thread, number))
        number += 1


def main() -> None:
    """Write until killed."""
    if "--help" in sys.argv:
        print(__doc__)
        return
    owner = DataBuffer(Path(sys.argv[1]), settings=SETTINGS, expire=False, pace=PACE).open()
    for thread, first in enumerate(sys.argv[2:]):
        threading.Thread(target=write, args=(owner, thread, int(first)), daemon=True).start()
    pause = threading.Event()
    while True:
        owner.maintain(owner.newest_record_time() or from_ms(START_MS))
        pause.wait(0.003)


if __name__ == "__main__":
    main()
