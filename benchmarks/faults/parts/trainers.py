"""Trainers that hang, eat memory, print a gigabyte, or claim success: the daemon outlives them all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.parts import bad_trainer
from benchmarks.faults.parts.feed import Fleet, Tally
from benchmarks.faults.parts.trainings import SMALL, RetrainingDaemon, prepare, training_processes
from benchmarks.programs import wait_for
from fleetcast.clock import monotonic
from fleetcast.files import read_json

HANG_TIMEOUT_S = 20.0  # the setting; a trainer that hangs is killed then
TIMEOUT_S = 120.0
TRAINER_MEMORY_BYTES = 900 * 2**20  # for the daemon, the supervisor, the export and the trainer
LOG_GROWTH_LIMIT = 5_000_000
DAEMON_GROWTH_LIMIT = 60e6


def misbehaving_trainer(folder: Path, misdeed: str) -> Tally:
    """Let the initial training be one that misbehaves; count what the daemon got wrong about it."""
    work = prepare(folder / misdeed.replace(" ", "-"), Fleet(n_servers=3))
    script = Path(bad_trainer.__file__)
    timeout_s = HANG_TIMEOUT_S if misdeed == "hangs" else TIMEOUT_S
    extra = f'training_timeout_s = {timeout_s}\ntraining_script = "{script}"\n'
    (work / "fleetcast.toml").write_text(SMALL + extra)
    (work / "bad_trainer.txt").write_text(misdeed)
    tally = Tally()
    if misdeed == "eats memory" and not can_limit_memory():
        return tally  # on this host the kernel would look for a victim elsewhere
    with memory_limit(TRAINER_MEMORY_BYTES) as group, RetrainingDaemon(work) as daemon:
        join(group, daemon.process.pid)
        wait_for("a training", lambda: bool(daemon.attempts()))
        memory_bytes, began_s = daemon.memory_bytes, monotonic()
        wait_for(f"its end\n{daemon.output}", daemon.is_idle, timeout_s + 60)
        tally.recovered_s.append(monotonic() - began_s)
        state = daemon.state()
        (attempt,) = state["attempts"]
        tally.wrong += attempt["outcome"] != "failed"
        tally.wrong += not attempt["why"].startswith(bad_trainer.MISDEEDS[misdeed][1])
        tally.lost += state["backoff"]["failures"] != 1  # a failure that would be tried again at once
        tally.wrong += bool(state["trainings"]) or state["total_trainings"] != 0
        tally.wrong += daemon.memory_bytes - memory_bytes > DAEMON_GROWTH_LIMIT
        tally.wrong += bool(training_processes(work))
        assert daemon.stop() == 0, daemon.output
    logs = [path for path in work.rglob("*") if path.suffix in (".log", ".console")]
    tally.wrong += sum(path.stat().st_size for path in logs) > LOG_GROWTH_LIMIT
    tally.wrong += (work / "checkpoints" / "last.ckpt").exists()
    tally.acknowledged += isinstance(read_json(work / "drift_metrics.json"), dict)
    shutil.rmtree(work)
    return tally


@contextlib.contextmanager
def memory_limit(size_bytes: int) -> Iterator[Path | None]:
    """Give a control group of at most this memory; None where this process cannot make one.

    The kernel then kills as it does on a machine that is out of memory.
    """
    group = _own_memory_group()
    if group is None:
        yield None
        return
    limit = group / ("memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes")
    limit.write_text(str(size_bytes))
    try:
        yield group
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def can_limit_memory() -> bool:
    """Whether this process may make a control group with a memory limit."""
    with memory_limit(TRAINER_MEMORY_BYTES) as group:
        return group is not None


def _own_memory_group() -> Path | None:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("memory", ""):
            continue
        base = Path("/sys/fs/cgroup") / controllers / path.lstrip("/")
        group = base / f"fleetcast-faults-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            if (group / "memory.limit_in_bytes").exists() or (group / "memory.max").exists():
                return group
            group.rmdir()
    return None


def join(group: Path | None, pid: int) -> None:
    """Move a process, and what it will start, into a group."""
    if group is not None:
        (group / "cgroup.procs").write_text(str(pid))


def every_misdeed() -> tuple[str, ...]:
    """Return the names `misbehaving_trainer` knows."""
    return tuple(bad_trainer.MISDEEDS)
