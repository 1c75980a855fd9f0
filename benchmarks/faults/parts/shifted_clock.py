"""Run a program of this repository on a clock that is wrong by what a file says.

    python -m benchmarks.faults.parts.shifted_clock OFFSET_FILE PROGRAM [flags]

The file holds seconds and is read at every look at the clock, so that a test can step it while
the program runs. Only `fleetcast.clock.SystemClock` is shifted, the one place where our code
asks for the time of day; intervals run on, as they do when a real clock is set.
"""

import runpy
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fleetcast import clock


def shift_system_clock(offset: Path) -> None:
    """Let `SystemClock.now` add the seconds in `offset`."""

    def now(_self: clock.SystemClock) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=float(offset.read_text()))

    clock.SystemClock.now = now  # type: ignore[method-assign]


if __name__ == "__main__":
    if len(sys.argv) < 3:  # --help after a program belongs to the program
        print(__doc__)
        raise SystemExit(0)
    offset_file, program = Path(sys.argv[1]), Path(sys.argv[2]).resolve()
    shift_system_clock(offset_file.resolve())
    sys.argv = sys.argv[2:]
    sys.path[0] = str(program.parent)
    runpy.run_path(str(program), run_name="__main__")
