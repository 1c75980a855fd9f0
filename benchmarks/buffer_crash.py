"""How many acknowledged records kill -9 costs: none, in any number of kills.

    python -m benchmarks.buffer_crash --kills 1000 [--kills-per-folder 50] [--add]

Every folder begins empty, so that comparing all its rows after each kill stays cheap. The tally is
written after every folder; `--add` counts on from that of the day, so that a long run can be cut.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

from benchmarks.crash_round import CrashRounds, Tally
from benchmarks.results_file import todays_results, write_results


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
