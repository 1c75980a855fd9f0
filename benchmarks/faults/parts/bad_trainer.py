"""A trainer that misbehaves as `bad_trainer.txt` in the working directory says.

Takes the real trainer's flags. Used by `fault_trainers.py` only, and run by path: it imports
nothing of ours.
"""

import contextlib
import signal
import sys
import time
from pathlib import Path

LINE = b"epoch 1 loss 0.5 " + b"x" * 83 + b"\n"
GIGABYTE = 10**9
BLOCK_BYTES = 64 * 2**20


def hang() -> int:
    """Do nothing for an hour, and do not listen to SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(3600)
    return 0


def eat_memory() -> int:
    """Take memory until the kernel or the supervisor ends this process."""
    taken = []
    while True:
        taken.append(bytearray(b"\1") * BLOCK_BYTES)


def print_gigabyte() -> int:
    """Print 10^9 bytes."""
    block = LINE * 10_000
    for _ in range(GIGABYTE // len(block)):
        sys.stdout.buffer.write(block)
    return 0


def print_one_line() -> int:
    """Print 10^8 bytes without an end of line."""
    with contextlib.suppress(BrokenPipeError):
        for _ in range(100):
            sys.stdout.buffer.write(b"y" * 10**6)
    return 0


def end_without_model() -> int:
    """Claim success and leave nothing."""
    return 0


def end_without_word() -> int:
    """Die as a crash in native code does."""
    signal.raise_signal(signal.SIGSEGV)
    return 0


# by name: what to do, and how the daemon has to describe the end of it
MISDEEDS = {
    "hangs": (hang, "killed after 20 s"),
    "eats memory": (eat_memory, "exit -9"),
    "prints 1 GB": (print_gigabyte, "exit 0 without a verdict"),
    "prints 100 MB in one line": (print_one_line, "exit 0 without a verdict"),
    "exits 0 without a model": (end_without_model, "exit 0 without a verdict"),
    "dies of a segmentation fault": (end_without_word, "exit -11"),
}

if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        raise SystemExit(0)
    raise SystemExit(MISDEEDS[Path("bad_trainer.txt").read_text().strip()][0]())
