"""A disk that is full (a small tmpfs, or RLIMIT_FSIZE), and folders that cannot be written."""

import contextlib
import ctypes
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from benchmarks.faults.parts.feed import Fleet, Tally, count_records
from benchmarks.faults.parts.trainings import RetrainingDaemon
from benchmarks.programs import InferenceDaemon, Program, wait_for
from fleetcast.clock import monotonic
from fleetcast.errors import DaemonAway, ExitCode
from fleetcast.files import read_json
from fleetcast.sources.client import RequestRefused

FULL = 507
SMALL_DISK = "2m"
SMALL_FILE_BYTES = 120_000
_PR_CAPBSET_DROP = 24
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a tmpfs of `SMALL_DISK` at `folder`; needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def can_mount() -> bool:
    """Whether this process may mount."""
    return os.geteuid() == 0


def full_disk(folder: Path, rounds: int = 1) -> Tally:
    """Fill a real small disk under both daemons, free it again, and account for every record."""
    tally = Tally()
    fleet = Fleet(n_servers=40)
    step = 0
    with small_disk(folder), InferenceDaemon(folder, "--clock", "data") as daemon:
        ballast = folder / "ballast"
        for _ in range(rounds):
            step = _feed_until_full(daemon, fleet, step, tally, lambda: _fill(ballast))
            _check_alive_while_full(daemon, fleet, step)
            began_s = monotonic()
            ballast.unlink()
            wait_for("records to be taken again", lambda: _is_taken(daemon, fleet, step))  # noqa: B023
            tally.recovered_s.append(monotonic() - began_s)
            tally.acknowledged += fleet.n_servers
            step += 1
        assert daemon.stop() == 0, daemon.output
        count_records(folder, fleet, step, tally)
    return tally


def _fill(ballast: Path) -> None:
    """Write until not one more byte fits."""
    size = 65_536
    with ballast.open("ab", buffering=0) as stream:
        while size:
            try:
                stream.write(b"x" * size)
            except OSError:
                size //= 2


def _feed_until_full(
    daemon: InferenceDaemon, fleet: Fleet, step: int, tally: Tally, fill: Callable[[], None]
) -> int:
    """Send steps, then fill the disk; return the first step that was refused for want of space."""
    n_before = 30
    last = step + 4_000
    while step < last:
        if n_before == 0:
            fill()
        n_before -= 1
        try:
            daemon.client.post_records(fleet.records(step))
        except RequestRefused as error:
            if error.status == FULL:
                return step
            assert error.is_busy, error
            continue
        tally.acknowledged += fleet.n_servers
        step += 1
    raise AssertionError("the disk never filled")


def _check_alive_while_full(daemon: InferenceDaemon, fleet: Fleet, step: int) -> None:
    """While nothing fits, questions are answered and records refused, again and again."""
    for _ in range(20):
        try:
            daemon.client.post_records(fleet.records(step))
        except RequestRefused as error:
            assert error.status in (FULL, 429, 503), error
        assert len(daemon.client.get("/predictions/current")["predictions"]) == fleet.n_servers
        assert daemon.client.get("/health") == {"status": "alive"}
    daemon.status()


def _is_taken(daemon: InferenceDaemon, fleet: Fleet, step: int) -> bool:
    try:
        return daemon.client.post_records(fleet.records(step)).received == fleet.n_servers
    except DaemonAway:
        return False


def file_size_limit(folder: Path) -> Tally:
    """The same where every file hits a limit: RLIMIT_FSIZE stands for a quota; lifted, all goes on."""
    tally = Tally()
    fleet = Fleet(n_servers=40)
    limit = SMALL_FILE_BYTES

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    with InferenceDaemon(folder, "--clock", "data", preexec=limited) as daemon:
        step = _feed_until_full(daemon, fleet, 0, tally, lambda: None)
        _check_alive_while_full(daemon, fleet, step)
        began_s = monotonic()
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        psutil.Process(daemon.process.pid).rlimit(psutil.RLIMIT_FSIZE, unlimited)
        wait_for("records to be taken again", lambda: _is_taken(daemon, fleet, step))
        tally.recovered_s.append(monotonic() - began_s)
        assert daemon.stop() == 0, daemon.output
    count_records(folder, fleet, step + 1, tally)
    return tally


def full_disk_under_retraining(folder: Path) -> Tally:
    """The retraining daemon on a full disk: its state stays valid, and it checks again afterwards."""
    tally = Tally()
    with small_disk(folder):
        daemon = RetrainingDaemon(folder)
        with daemon:
            for name in ("drift_metrics.json", "retraining_state.json"):  # written in this order
                wait_for("the first check", (folder / name).exists)
            _fill(folder / "ballast")
            wait_for("failing checks", lambda: "no space to write" in daemon.output)
            tally.wrong += not isinstance(read_json(folder / "retraining_state.json"), dict)
            tally.wrong += not isinstance(read_json(folder / "drift_metrics.json"), dict)
            (folder / "ballast").unlink()
            began_s = monotonic()
            if daemon.process.poll() is not None:  # ten failures in a row: the supervisor's turn
                daemon.start()
            before = (folder / "drift_metrics.json").stat().st_mtime_ns
            wait_for(
                "a check after that", lambda: (folder / "drift_metrics.json").stat().st_mtime_ns > before
            )
            tally.recovered_s.append(monotonic() - began_s)
            assert daemon.stop() == 0, daemon.output
    return tally


def without_root_rights() -> None:
    """Let permission bits count for root, too (run in the child before exec)."""
    libc = ctypes.CDLL(None)
    for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)


def read_only_folder(folder: Path) -> Tally:
    """Both daemons in a folder they may not write: exit 3, a sentence, no traceback."""
    tally = Tally()
    folder.mkdir(parents=True, exist_ok=True)
    for script in ("tft_inference_daemon.py", "adaptive_retraining_daemon.py"):
        place = folder / Path(script).stem
        place.mkdir()
        console = Program(script, place, preexec=without_root_rights)
        console.console = folder / f"{place.name}.console"
        place.chmod(0o555)
        tally.wrong += console.run() != ExitCode.CANNOT_START
        tally.wrong += "Traceback" in console.output or "ermission denied" not in console.output
        tally.wrong += bool(list(place.iterdir()))
        place.chmod(0o755)
    return tally
