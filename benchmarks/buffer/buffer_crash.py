"""How many acknowledged records kill -9 costs: none, in any number of kills.

    python -m benchmarks.buffer.buffer_crash --kills 1000 [--kills-per-folder 50] [--add]

Every folder begins empty, so that comparing all its rows after each kill stays cheap. The tally is
written after every folder; `--add` counts on from that of the day, so that a long run can be cut.

Rounds of kill -9 against `crash_writer.py`, and what must be found after each.

Owns: starting, killing, and comparing the buffer with what was acknowledged. The test and the
benchmark both use it. Does not know: how the buffer works; it reads as any process may.
"""

import argparse
import dataclasses
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.buffer.parts import crash_writer
from benchmarks.results_file import todays_results, write_results
from data_buffer import DataBuffer

Key = tuple[str, int]
Rows = dict[Key, dict[str, float]]


@dataclass
class Tally:
    """What all rounds found together."""

    kills: int = 0
    acknowledged: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    unreadable: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing went wrong at all."""
        return not (self.lost or self.doubled or self.wrong or self.unreadable)


class CrashRounds:
    """Kills a writer again and again over one folder."""

    def __init__(self, folder: Path, n_threads: int, seed: int) -> None:
        self.folder = folder
        self.tally = Tally()
        self._next = [0] * n_threads  # first batch not known to be acknowledged
        self._expected: list[Rows] = [{} for _ in range(n_threads)]
        self._random = random.Random(seed)

    def run(self, kills: int) -> Tally:
        """Run that many rounds, then let the last owner finish its work and look again."""
        for _ in range(kills):
            self._acknowledge(self._killed_writer())
            self.tally.kills += 1
            self._compare("after a kill")
        owner = DataBuffer(self.folder, expire=False)
        owner.open()
        owner.flush()
        self._compare("after the last flush")
        owner.close()
        self._read_by_pandas()
        return self.tally

    def _killed_writer(self) -> list[str]:
        """Start a writer, kill it a random time after its first acknowledgement, return what it said."""
        script = Path(__file__).parent / "parts" / "crash_writer.py"
        command = [sys.executable, str(script), str(self.folder), *map(str, self._next)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            if not first:
                raise RuntimeError(f"the writer ended by itself with {process.wait()}")
            is_long = self.tally.kills % 12 == 11  # long enough for days to be sealed
            time.sleep(self._random.uniform(2.0, 4.0) if is_long else self._random.uniform(0.0, 0.5))
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read()
        return [line for line in (first + rest).split("\n")[:-1] if line]

    def _acknowledge(self, lines: list[str]) -> None:
        for line in lines:
            thread, number = map(int, line.split())
            while self._next[thread] <= number:
                self._apply(self._expected[thread], thread, self._next[thread])
                self._next[thread] += 1
                self.tally.acknowledged += 1

    def _compare(self, when: str) -> None:
        found = self._read()
        for thread, expected in enumerate(self._expected):
            prefix = f"t{thread}-"
            own = {key: values for key, values in found.items() if key[0].startswith(prefix)}
            with_last = {key: dict(values) for key, values in expected.items()}
            self._apply(with_last, thread, self._next[thread])
            if own == expected:
                continue
            if own == with_last:  # durable, but killed before it could say so
                self._acknowledge([f"{thread} {self._next[thread]}"])
                continue
            lost = expected.keys() - own.keys()
            self.tally.lost += len(lost)
            self.tally.wrong += sum(own[key] != expected[key] for key in expected.keys() & own.keys())
            self.tally.notes.append(f"{when} {self.tally.kills}: thread {thread}, lost {sorted(lost)[:3]}")

    @staticmethod
    def _apply(rows: Rows, thread: int, number: int) -> None:
        for name, time_ms, metric, value in crash_writer.rows_of_batch(thread, number):
            rows.setdefault((name, time_ms), {})[metric] = value

    def _read(self) -> Rows:
        found: Rows = {}
        try:
            buffer = DataBuffer(self.folder)
            for batch in buffer.iter_batches(0, 2**45):
                for place in range(len(batch)):
                    key = (batch.server_names[batch.server_codes[place]], int(batch.timestamps_ms[place]))
                    self.tally.doubled += key in found
                    cells = {name: float(column[place]) for name, column in batch.metrics.items()}
                    found[key] = {name: value for name, value in cells.items() if value == value}
            self._compare_means(buffer, found)
        except Exception as error:  # whatever it is, a reader that fails is the finding
            self.tally.unreadable += 1
            self.tally.notes.append(f"reading after kill {self.tally.kills}: {error!r}")
        return found

    def _compare_means(self, buffer: DataBuffer, rows: Rows) -> None:
        """Compare the means of bins, kept or not, with those of the rows (the sums are exact)."""
        values: dict[tuple[str, int, str], list[float]] = {}
        for (name, time_ms), cells in rows.items():
            for metric, value in cells.items():
                start_ms = time_ms // crash_writer.BIN_MS * crash_writer.BIN_MS
                values.setdefault((name, start_ms, metric), []).append(value)
        expected = {key: sum(some) / len(some) for key, some in values.items()}
        found: dict[tuple[str, int, str], float] = {}
        for batch in buffer.iter_bins(0, 2**45, crash_writer.BIN_MS):
            for metric, column in batch.metrics.items():
                for code, start_ms, mean in zip(batch.server_codes, batch.timestamps_ms, column, strict=True):
                    if mean == mean:
                        found[batch.server_names[code], int(start_ms), metric] = float(mean)
        if found != expected:
            self.tally.wrong += 1
            self.tally.notes.append(f"the means after kill {self.tally.kills} are not those of the rows")

    def _read_by_pandas(self) -> None:
        import pandas as pd

        total = 0
        for path in self.folder.glob("metrics_*.parquet"):
            frame = pd.read_parquet(path)
            total += len(frame)
            self.tally.doubled += int(frame.duplicated(["server_name", "timestamp"]).sum())
        if total != sum(map(len, self._expected)):
            self.tally.notes.append(f"pandas finds {total} rows, not {sum(map(len, self._expected))}")
            self.tally.lost += 1


def total(first: Tally, second: Tally) -> Tally:
    """Return what both found together."""
    fields = [field.name for field in dataclasses.fields(Tally)]
    return Tally(**{name: getattr(first, name) + getattr(second, name) for name in fields})


def main() -> int:
    """Kill, compare, print and write the tally; 1 if anything was lost, doubled or unreadable."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=25, help="kills of this run")
    parser.add_argument("--kills-per-folder", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2, help="appending threads of the writer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--add", action="store_true", help="count on from today's tally")
    options = parser.parse_args()
    tally = Tally(**todays_results("buffer_crash").get("tally", {})) if options.add else Tally()
    end = tally.kills + options.kills
    while tally.kills < end:
        kills = min(options.kills_per_folder, end - tally.kills)
        with tempfile.TemporaryDirectory() as place:
            rounds = CrashRounds(Path(place) / "buffer", options.threads, options.seed + tally.kills)
            tally = total(tally, rounds.run(kills))
        figures = {"options": vars(options), "tally": dataclasses.asdict(tally)}
        print(write_results("buffer_crash", figures), dataclasses.asdict(tally), flush=True)
    return 0 if tally.is_clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
