"""How many acknowledged records kill -9 costs: none, in any number of kills.

python -m benchmarks.buffer_crash --kills 25
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

from benchmarks.crash_round import CrashRounds
from benchmarks.results_file import write_results


def main() -> int:
    """Kill, compare, print and write the tally; 1 if anything was lost, doubled or unreadable."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2, help="appending threads of the writer")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        tally = CrashRounds(Path(place) / "buffer", options.threads, options.seed).run(options.kills)
    for name, value in dataclasses.asdict(tally).items():
        print(f"{name:<14} {value}")
    print(write_results("buffer_crash", {"options": vars(options), "tally": dataclasses.asdict(tally)}))
    return 0 if tally.is_clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
