"""Mutated bodies against every decoder of the ingest path: no crash, no hang, nothing misread.

    .venv/bin/python -m benchmarks.ingest.fuzz_ingest [--inputs 1000000] [--target NAME] [--seed 1]

Each target runs in a child process of its own with bounded memory and a time limit per input, so
that a crash of a library is a finding like any other. A finding names the input; the same seed
finds it again. The targets and what they compare are in `fuzz_targets.py`.
"""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.ingest.parts.fuzz_targets import TARGETS, mutated
from benchmarks.results_file import write_results

ROOT = Path(__file__).resolve().parents[2]
MEMORY_BYTES = 4 * 2**30
INPUT_LIMIT_S = 50.0  # of wall time, on a machine that may be busy
FINDINGS_SHOWN = 5
ROUND = 10_000  # inputs per generator, so that a finding is found again quickly


def main(argv: Sequence[str] | None = None) -> int:
    """Run the targets one after the other; 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1_000_000, help="per target")
    parser.add_argument("--target", choices=tuple(TARGETS), action="append")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        return child(options.target[0], options.seed, options.inputs)
    rows = [run(name, options.seed, options.inputs) for name in options.target or TARGETS]
    print(f"{'target':<14}{'inputs':>10}{'taken':>10}{'per s':>8}{'longest ms':>12}{'findings':>10}")
    for row in rows:
        print(
            f"{row['target']:<14}{row['inputs']:>10,}{row['taken']:>10,}{row['inputs'] / row['cpu_s']:>8,.0f}"
            f"{row['longest_ms']:>12.1f}{row['n_findings']:>10}"
        )
        for finding in row["findings"]:
            print(f"  {finding}")
    print(write_results("fuzz_ingest", {"seed": options.seed, "targets": rows}))
    return int(any(row["n_findings"] for row in rows))


def run(name: str, seed: int, n_inputs: int) -> dict[str, Any]:
    """Run one target in a child; its death is a finding."""
    command = [sys.executable, "-X", "faulthandler", "-m", "benchmarks.ingest.fuzz_ingest", "--child"]
    command += ["--target", name, "--seed", str(seed), "--inputs", str(n_inputs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    row: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    if done.returncode != 0:
        row = {"target": name, "inputs": 0, "taken": 0, "cpu_s": 1.0, "longest_ms": 0.0, **row}
        died = f"the process ended with {done.returncode}: {done.stderr[-2000:]}"
        row["findings"] = [*row.get("findings", []), died]
        row["n_findings"] = row.get("n_findings", 0) + 1
    return row


def child(name: str, seed: int, n_inputs: int) -> int:
    """Hit one target; the last line printed is the row so far."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    os.nice(10)
    signal.signal(signal.SIGALRM, _hang)
    target = TARGETS[name]()
    row: dict[str, Any] = {"target": name, "inputs": 0, "taken": 0, "findings": [], "n_findings": 0}
    longest_s = 0.0
    started = time.process_time()
    for number in range(n_inputs):
        if number % ROUND == 0:
            rng = random.Random(f"{name} {seed} {number}")
        body = mutated(rng, target.seeds)
        before = time.process_time()
        signal.setitimer(signal.ITIMER_REAL, INPUT_LIMIT_S)
        try:
            row["taken"] += target.hit(body)
        except Exception as error:  # whatever it is, it is what we are looking for
            row["n_findings"] += 1
            if len(row["findings"]) < FINDINGS_SHOWN:
                row["findings"].append(f"{type(error).__name__}: {str(error)[:200]} input={body.hex()}")
        longest_s = max(longest_s, time.process_time() - before)
        row["inputs"] = number + 1
        if number % ROUND == ROUND - 1 or number == n_inputs - 1:
            row["cpu_s"] = round(time.process_time() - started, 3)
            row["longest_ms"] = round(longest_s * 1000, 2)
            print(json.dumps(row), flush=True)
    return 0


def _hang(_number: int, _frame: FrameType | None) -> None:
    raise TimeoutError(f"no answer within {INPUT_LIMIT_S:.0f} s")


if __name__ == "__main__":
    raise SystemExit(main())
