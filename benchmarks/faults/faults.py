"""Every fault of docs/reliability.md, made on purpose and many times: `make faults`.

    .venv/bin/python -m benchmarks.faults.faults [--only WORD] [--times N] [--keep]

Prints the table, writes `results/faults_DATE.json` and the table of docs/reliability.md. The
tests run the same scenarios a few times each (`tests/faults/test_faults.py`).
"""

import argparse
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.faults.parts import checkpoints, clocks, disk, kills, trainers, trainings
from benchmarks.faults.parts.feed import Tally
from benchmarks.faults.reliability_tables import Result, table, write_document
from benchmarks.results_file import write_results
from fleetcast.clock import monotonic

Run = Callable[[Path, int], Tally]


@dataclass(frozen=True)
class Scenario:
    """One fault: what an operator calls it, how to make it, how often."""

    fault: str
    run: Run
    times: int
    short_times: int  # in CI; 0 = only in the long form
    needs_root: bool = False


def repeated(once: Callable[[Path], Tally]) -> Run:
    """Return a run that does `once` in a fresh folder, `times` times."""

    def run(folder: Path, times: int) -> Tally:
        total = Tally()
        for number in range(times):
            place = folder / f"{number:03d}"
            place.mkdir()
            found = once(place)
            total.lost += found.lost
            total.doubled += found.doubled
            total.wrong += found.wrong
            total.recovered_s += found.recovered_s
        return total

    return run


def _around_training(target: str) -> Run:
    return lambda folder, times: trainings.kill_around_training(folder, target, times)


def _misdeed(name: str) -> Run:
    return repeated(lambda folder: trainers.misbehaving_trainer(folder, name))


SHORT_MISDEEDS = ("eats memory", "exits 0 without a model")
SHORT_STOP_S, LONG_STOP_S = 3.0, 60.0


def _stopped(once: Callable[[Path, float], Tally]) -> Run:
    """Stop for a minute in the long form, for seconds when it is tried once only."""
    return lambda folder, times: repeated(
        lambda place: once(place, LONG_STOP_S if times > 1 else SHORT_STOP_S)
    )(folder, times)


def _clock_jumps(folder: Path, times: int) -> Tally:
    jumps = clocks.JUMPS_S * times if times > 1 else clocks.JUMPS_S[2:6]
    return clocks.clock_jumps(folder, jumps)


SCENARIOS = (
    Scenario("kill -9 of the inference daemon during a replay", kills.kill_inference_daemon, 50, 4),
    Scenario("SIGTERM of the inference daemon during a replay", kills.stop_inference_daemon, 20, 2),
    Scenario("kill -9 of the trainer", _around_training(trainings.TRAINER), 20, 1),
    Scenario("kill -9 of the retraining daemon during a training", _around_training(trainings.DAEMON), 20, 1),
    Scenario(
        "kill -9 of both daemons and the trainer during a replay",
        _around_training(trainings.EVERYTHING),
        20,
        1,
    ),
    Scenario("corrupt, truncated, foreign or malicious `last.ckpt`", checkpoints.bad_checkpoints, 15, 2),
    Scenario("disk full under the inference daemon (tmpfs)", disk.full_disk, 5, 1, needs_root=True),
    Scenario("file size limit reached (RLIMIT_FSIZE)", repeated(disk.file_size_limit), 3, 1),
    Scenario(
        "disk full under the retraining daemon (tmpfs)",
        repeated(disk.full_disk_under_retraining),
        3,
        1,
        needs_root=True,
    ),
    Scenario("working directory not writable", repeated(disk.read_only_folder), 2, 1),
    Scenario("clock set by +1 h, -1 h, +1 day, -1 day, and back", _clock_jumps, 2, 1),
    Scenario("trainings recorded in the future", repeated(clocks.history_in_the_future), 2, 1),
    Scenario("SIGSTOP of the inference daemon, 60 s", _stopped(clocks.stopped_process), 2, 1),
    Scenario("SIGSTOP of the retraining daemon, 60 s", _stopped(clocks.stopped_retraining), 2, 1),
    Scenario(
        "inference daemon away for 12 checks (an hour)",
        repeated(lambda folder: clocks.inference_daemon_away(folder, 12)),
        3,
        1,
    ),
    *(
        Scenario(f"trainer {name}", _misdeed(name), 2, int(name in SHORT_MISDEEDS))
        for name in trainers.every_misdeed()
    ),
)


def try_out(scenario: Scenario, folder: Path, times: int) -> Result:
    """Run one scenario; a failure of any kind is a result, too."""
    began_s = monotonic()
    if scenario.needs_root and not disk.can_mount():
        return Result(scenario.fault, 0, why="needs root")
    try:
        tally = scenario.run(folder, times)
    except Exception as error:  # the loop boundary: the other faults are still to be tried
        traceback.print_exc()
        why = (str(error) or repr(error)).splitlines()[0]
        return Result(scenario.fault, times, why=why[:80])
    return Result(
        scenario.fault,
        times,
        tally.lost,
        tally.doubled,
        tally.wrong,
        tally.recovered_s,
        monotonic() - began_s,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Try every fault; exit 1 if any of them cost something."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="benchmarks.faults.faults", description=about)
    parser.add_argument("--only", default="", help="only faults whose name holds this word")
    parser.add_argument("--times", type=int, help="how often each is tried (default: its own number)")
    parser.add_argument("--keep", action="store_true", help="leave docs/reliability.md as it is")
    options = parser.parse_args(argv)
    results = []
    for scenario in SCENARIOS:
        if options.only not in scenario.fault:
            continue
        with tempfile.TemporaryDirectory(prefix="fleetcast-fault-") as folder:
            results.append(try_out(scenario, Path(folder), options.times or scenario.times))
        print(results[-1].as_row(), f"{results[-1].seconds:.0f} s", flush=True)
    print(f"\n{table(results)}")
    if not options.keep and not options.only:
        write_results("faults", {"faults": [asdict(result) for result in results]})
        write_document()
    return 0 if all(result.is_clean for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
