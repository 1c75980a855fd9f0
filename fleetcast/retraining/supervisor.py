"""A process that runs commands one after another, bounded in time and output, and notes the end.

    python -m fleetcast.retraining.supervisor '{"steps": [{"argv": [...], "cwd": "...", "env": {}}], ...}'

`attempts` starts it in a session of its own, so that a training survives the daemon, and a process
is left that enforces the time limit, drains the output and knows the exit code. Owns: the child's
priority, time, output, end. Does not know: what the commands do.

Leaves two files: `log` (the newest output lines, at most `max_log_bytes`; later lines are
counted, not kept) and, last and atomically, `result`: {"exit_code", "step", "timed_out",
"seconds", "lines", "dropped_lines", "tail", "orphans"}. No `result` means this process was killed; its
child is killed with it (PR_SET_PDEATHSIG). What a command leaves running is killed at its end, daemons
of a session of their own too: they become children of this process (PR_SET_CHILD_SUBREAPER).
"""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from fleetcast.clock import monotonic, sleep
from fleetcast.errors import ExitCode
from fleetcast.files import open_append, write_json

LINE_BYTES = 500
TAIL_LINES = 20
READ_BYTES = 65_536
_PR_SET_PDEATHSIG = 1
_OOM_SCORE = "500"  # short of memory, the kernel should kill a training, not a daemon
_KILL_GRACE_S = 10.0
_POLL_S = 0.1
_ORPHAN_POLL_S = 0.01
_PR_SET_CHILD_SUBREAPER = 36
_PIPE_BYTES = 2**20  # the most a pipe holds
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class RunJob:
    """What to run and within which bounds."""

    steps: tuple[Mapping[str, Any], ...]  # each {"argv", "cwd", "env"}
    timeout_s: float  # all steps together
    nice: int
    log: str
    result: str
    max_log_bytes: int
    lock_fds: tuple[int, ...]  # held by this process, by no step: a step may leave processes behind

    def to_argument(self) -> str:
        """Return the one argument of the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_argument(cls, text: str) -> "RunJob":
        """Read what `to_argument` wrote."""
        raw = json.loads(text)
        return cls(**{**raw, "steps": tuple(raw["steps"]), "lock_fds": tuple(raw["lock_fds"])})


class OutputLines:
    """Splits a stream of bytes into bounded lines and keeps a bounded number of them."""

    def __init__(self, stream: BinaryIO, max_bytes: int) -> None:
        self._stream = stream
        self._room = max_bytes
        self._open = b""
        self._skipping = False  # within a line that was cut
        self.lines = 0
        self.dropped = 0
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)

    def feed(self, data: bytes) -> None:
        """Take output as it comes; a progress bar's carriage returns end lines, too."""
        pieces = (self._open + data).replace(b"\r", b"\n").split(b"\n")
        self._open = pieces.pop()
        if self._skipping and pieces:
            del pieces[0]
            self._skipping = False
        self._take(pieces)
        if len(self._open) > LINE_BYTES:
            if not self._skipping:
                self._take([self._open])
            self._open, self._skipping = b"", True

    def close(self) -> None:
        """Take what is left as the last line."""
        if not self._skipping:
            self._take([self._open])
        self._open = b""

    def _take(self, lines: list[bytes]) -> None:
        """Keep the lines there is room for, and the last ones; count the others."""
        present = [line[:LINE_BYTES] for line in lines if line]
        self.lines += len(present)
        self.tail.extend(line.decode("utf-8", "replace") for line in present[-TAIL_LINES:])
        for number, line in enumerate(present):
            if not self._keep(line):
                self._room = 0
                self.dropped += len(present) - number
                return

    def _keep(self, line: bytes) -> bool:
        if len(line) >= self._room:
            return False
        try:
            self._stream.write(line + b"\n")
            self._stream.flush()
        except OSError:  # a full disk must not end a training here: its own writes fail
            return False
        self._room -= len(line) + 1
        return True


def _open_log(path: Path) -> BinaryIO:
    """Open the attempt's log; a training goes on without one."""
    try:
        return open_append(path)
    except OSError:
        return open_append(Path(os.devnull))


def run_job(job: RunJob) -> dict[str, Any]:
    """Run the steps until one fails or the time is up; return the content of `result`."""
    started = monotonic()
    deadline = started + job.timeout_s
    exit_code, timed_out, n_begun = 0, False, 0
    with _open_log(Path(job.log)) as stream:
        output = OutputLines(stream, job.max_log_bytes)
        while n_begun < len(job.steps) and exit_code == 0 and not timed_out:
            exit_code, timed_out = _run_step(job.steps[n_begun], deadline, output)
            n_begun += 1
    return {
        "exit_code": exit_code,
        "step": n_begun - 1,
        "timed_out": timed_out,
        "seconds": monotonic() - started,
        "lines": output.lines,
        "dropped_lines": output.dropped,
        "tail": list(output.tail),
    }


def _run_step(step: Mapping[str, Any], deadline: float, output: OutputLines) -> tuple[int, bool]:
    try:
        child = subprocess.Popen(
            step["argv"],
            cwd=step["cwd"],
            env={**os.environ, **step["env"]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,  # one signal reaches all that it starts
            preexec_fn=partial(_die_with_parent, os.getpid()),
        )
    except OSError as error:
        output.feed(f"cannot start {step['argv'][:2]}: {error}\n".encode())
        return int(ExitCode.CANNOT_START), False
    assert child.stdout is not None
    os.set_blocking(child.stdout.fileno(), False)
    has_ended = _drain(child, deadline, output)
    os.killpg(child.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
    _read_rest(child.stdout.fileno(), output)
    child.stdout.close()
    output.close()
    if not has_ended:
        output.feed(b"killed: the time limit is over\n")
    return child.wait(timeout=_KILL_GRACE_S), not has_ended


def _end_orphans() -> int:
    """Kill what the steps left behind outside their process groups; return how many processes that were.

    Orphans become children of this process (PR_SET_CHILD_SUBREAPER), and with each that ends its own do.
    """
    deadline = monotonic() + _KILL_GRACE_S
    killed: set[int] = set()
    while monotonic() < deadline and (children := _children()):
        for pid in children:
            killed.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue
        sleep(_ORPHAN_POLL_S)
    return len(killed)


def _children() -> list[int]:
    """Return the pids of this process's children: proc(5), field 4 of `stat` is the parent."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if int((process / "stat").read_text().rsplit(")", 1)[1].split()[1]) == os.getpid():
                found.append(int(process.name))
    return found


def _drain(child: subprocess.Popen[bytes], deadline: float, output: OutputLines) -> bool:
    """Read the output until the child ends; return False if the deadline came first."""
    assert child.stdout is not None
    descriptor = child.stdout.fileno()
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while monotonic() < deadline:
            if _has_ended(child.pid):
                return True
            if not selector.get_map():
                sleep(_POLL_S)
            elif selector.select(_POLL_S):
                data = os.read(descriptor, READ_BYTES)
                output.feed(data)
                if not data:  # it closed its output and goes on working
                    selector.unregister(descriptor)
    return False


def _has_ended(pid: int) -> bool:
    """Whether the child has ended; it is left unreaped."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _read_rest(descriptor: int, output: OutputLines) -> None:
    """Take what is left in the pipe of a dead group, without waiting for a process that left the group."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(_PIPE_BYTES // READ_BYTES):
            data = os.read(descriptor, READ_BYTES)
            output.feed(data)
            if not data:
                return


def _die_with_parent(parent: int) -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _lower_priority(nice: int) -> None:
    os.nice(nice)
    with contextlib.suppress(OSError):  # not every container lets a process volunteer
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, encoding="ascii")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job; its own exit code says only whether the result was noted."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # for the steps, too: `systemctl kill -s HUP` reaches all
    arguments = sys.argv[1:] if argv is None else list(argv)
    job = RunJob.from_argument(arguments[0])
    for descriptor in job.lock_fds:
        os.set_inheritable(descriptor, False)
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _lower_priority(job.nice)
    Path(job.result).parent.mkdir(parents=True, exist_ok=True)  # a person may have deleted it meanwhile
    write_json(Path(job.result), {**run_job(job), "orphans": _end_orphans()})
    return int(ExitCode.OK)


if __name__ == "__main__":
    raise SystemExit(main())
