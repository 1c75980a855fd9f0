"""One training attempt as a process: started once, followed, concluded.

Owns: `attempt.lock`, `checkpoints/runs/<id>.log|.json` (output and end of the process, written by
`supervisor`), what an end means. Does not know: when to train, or the state file. Its caller
(`trainings`) writes an attempt down before `spawn` and its outcome after `conclude`, and finds a
running one again after a restart (`Trainings.take_over`).

The lock is taken before anything starts, and the attempt's supervisor inherits it, no other process. As
long as it lives, no daemon starts another attempt; at its end it kills whatever its steps started.
"""

import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fleetcast import files, locks
from fleetcast.clock import monotonic
from fleetcast.errors import AlreadyRunning, BadCheckpoint, CannotStart, CorruptFile, ExitCode
from fleetcast.forecast.registry import (
    ATTEMPT_LOCK,
    RUNS_FOLDER,
    TRAINER_LOCK,
    Registry,
    lock_of,
    lock_paths,
)
from fleetcast.retraining import supervisor
from fleetcast.retraining.state import (
    BUSY,
    FAILED,
    HELD,
    INTERRUPTED,
    KEPT_ATTEMPTS,
    NOT_ENOUGH_DATA,
    PROMOTED,
    REJECTED,
    Attempt,
    Verdict,
    read_verdict,
)

logger = logging.getLogger(__name__)

ATTEMPT_ID_VARIABLE = "TFT_ATTEMPT_ID"  # tells the trainer under which name to leave its verdict
_PROGRAM_DIR = Path(__file__).parents[2]
_MAX_LOG_BYTES = 1_000_000
_READ_BYTES = 65_536
_STUCK_S = 60.0  # an attempt's processes may take this long to end
_COMPLAINT_S = 3600.0
_MAX_LINES_LOGGED = 2_000  # of one attempt; the rest stands in its own log


@dataclass(frozen=True, slots=True)
class Step:
    """One command of an attempt."""

    argv: Sequence[str]
    env: Mapping[str, str]


class Attempts:
    """Starts and follows at most one attempt at a time. Not thread safe."""

    def __init__(self, registry: Registry, *, timeout_s: float, nice: int) -> None:
        self._registry = registry
        self.folder = registry.folder
        self._timeout_s = timeout_s
        self._nice = nice
        self._lock = lock_of(self.folder, ATTEMPT_LOCK, "a training attempt")
        self._process: subprocess.Popen[bytes] | None = None
        self._log_offset = 0
        self._lines_logged = 0
        self._complained_at = float("-inf")
        self._suspect: int | None = None

    def why_not_free(self) -> str:
        """Return which process trains at the moment, or ""."""
        for name, what in ((ATTEMPT_LOCK, "a training attempt"), (TRAINER_LOCK, "a trainer")):
            paths = lock_paths(self.folder, name)
            if not (name == ATTEMPT_LOCK and self._lock.is_held) and locks.is_locked(*paths):
                return f"{what} is running ({self._name_holder(name, paths)})"
        return ""

    def _name_holder(self, name: str, paths: tuple[Path, Path]) -> str:
        """Name the process that holds a lock; where it holds it for no reason, log an error once an hour.

        The caller knows of no attempt that runs, so only the supervisor of another daemon's may have the
        attempt's lock; a trainer that a person started has as long as one of ours.
        """
        holders = locks.lock_holders(*paths)
        if not holders:
            return f"pid {locks.read_pid(paths[0])}"
        oldest = holders[0]
        rightful = [h for h in holders if name == TRAINER_LOCK or supervisor.__name__ in h.command]
        is_stuck = not any(holder.age_s <= self._timeout_s + _STUCK_S for holder in rightful)
        if is_stuck and self._suspect == oldest.pid and monotonic() - self._complained_at > _COMPLAINT_S:
            self._complained_at = monotonic()
            logger.error(
                "a lock is stuck, no training starts: end its process lock=%s pid=%d age_s=%.0f command=%r",
                *(paths[0], oldest.pid, oldest.age_s, oldest.command),
            )
        self._suspect = (
            oldest.pid
        )  # at the second look: a daemon has the lock for moments without a supervisor
        return str(oldest)

    def reserve(self) -> bool:
        """Take the lock for a new attempt; False if another process was faster."""
        try:
            self._lock.acquire()
        except AlreadyRunning:
            return False
        return True

    def release(self) -> None:
        """Give the lock up; a supervisor that inherited it keeps it."""
        self._lock.release()

    def spawn(self, attempt: Attempt, steps: Sequence[Step]) -> Attempt:
        """Start the reserved attempt's process; return the attempt with its pid.

        Raises:
            CannotStart: the process could not be made.
        """
        assert self._lock.is_held, "reserve first"
        runs = self.folder / RUNS_FOLDER
        runs.mkdir(parents=True, exist_ok=True)
        _drop_old(runs)
        cwd = str(Path.cwd())
        own = {ATTEMPT_ID_VARIABLE: attempt.id}
        job = supervisor.RunJob(
            steps=tuple({"argv": [*step.argv], "cwd": cwd, "env": {**step.env, **own}} for step in steps),
            timeout_s=self._timeout_s,
            nice=self._nice,
            log=str(self._log_path(attempt).absolute()),
            result=str(self._result_path(attempt).absolute()),
            max_log_bytes=_MAX_LOG_BYTES,
            lock_fds=self._lock.filenos(),
        )
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", supervisor.__name__, job.to_argument()],
                cwd=_PROGRAM_DIR,  # where -m finds the package
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=self._lock.filenos(),
                start_new_session=True,  # a stop of this daemon must not waste a running training
            )
        except OSError as error:
            raise CannotStart(f"cannot start a training: {error}") from error
        self._log_offset = self._lines_logged = 0
        return replace(attempt, pid=self._process.pid)

    def is_running(self, attempt: Attempt) -> bool:
        """Return whether a process of the attempt lives, of this daemon or of an earlier one."""
        if self._process is not None and self._process.pid == attempt.pid:
            return self._process.poll() is None
        if (
            self._lock.is_held or self._result_path(attempt).exists()
        ):  # the result is the supervisor's last act
            return False
        return locks.is_locked(*lock_paths(self.folder, ATTEMPT_LOCK))

    def follow(self, attempt: Attempt) -> None:
        """Copy new output of the attempt to the log, bounded."""
        try:
            with files.open_regular(self._log_path(attempt)) as stream:
                stream.seek(self._log_offset)
                data = stream.read(_READ_BYTES)
        except (OSError, CorruptFile):  # not begun yet, or no log: the result says what came of it
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._log_offset += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            self._lines_logged += 1
            if self._lines_logged <= _MAX_LINES_LOGGED:
                logger.info("training attempt=%s | %s", attempt.id, line)

    def conclude(self, attempt: Attempt) -> Attempt:
        """Return an attempt that has ended with its outcome."""
        self.follow(attempt)
        self._process = None
        self.release()
        result = _read_result(self._result_path(attempt))
        if result.get("orphans"):
            logger.warning(
                "killed processes that a training left behind attempt=%s n=%s", attempt.id, result["orphans"]
            )
        exit_code = result.get("exit_code")
        code = exit_code if isinstance(exit_code, int) else None
        verdict = read_verdict(self.folder, attempt.id)
        outcome, version, why = self._read_verdict(attempt, verdict) or self._explain_failure(
            attempt, result, code
        )
        return replace(attempt, outcome=outcome, exit_code=code, version=version, why=why)

    def _read_verdict(self, attempt: Attempt, verdict: Verdict | None) -> tuple[str, str | None, str] | None:
        """Return the outcome by the trainer's verdict, if it left one that is true."""
        if verdict is None:
            return self._find_promotion(attempt)
        if not verdict.promoted:
            return HELD if verdict.passed_gate else REJECTED, verdict.version, verdict.why
        try:
            self._registry.version(verdict.version).verify()
        except BadCheckpoint as error:
            return FAILED, verdict.version, f"promoted, but the version cannot be used: {error}"
        return PROMOTED, verdict.version, verdict.why

    def _find_promotion(self, attempt: Attempt) -> tuple[str, str | None, str] | None:
        """Catch a trainer killed between putting its version into service and saying so."""
        current = self._registry.current_id()
        if current is None or current == attempt.version_before:
            return None
        try:
            by = self._registry.version(current).manifest.get("attempt_id")
        except BadCheckpoint:
            return None
        if by != attempt.id:
            return None
        return PROMOTED, current, "the trainer ended before its verdict, with its version in service"

    def _explain_failure(
        self, attempt: Attempt, result: Mapping[str, Any], code: int | None
    ) -> tuple[str, str | None, str]:
        tail = result.get("tail")
        last = f": {tail[-1]}" if isinstance(tail, list) and tail else ""
        if code is None:
            if attempt.pid is None:
                return INTERRUPTED, None, "the daemon ended before the training began"
            return FAILED, None, "the training was killed together with the process that supervised it"
        if result.get("timed_out") is True:
            return FAILED, None, f"killed after {self._timeout_s:.0f} s"
        if code == ExitCode.NOT_ENOUGH_DATA:
            return NOT_ENOUGH_DATA, None, f"not enough data{last}"
        if code == ExitCode.ALREADY_RUNNING:
            return BUSY, None, f"another trainer was at work{last}"
        if code == ExitCode.OK:
            return FAILED, None, "exit 0 without a verdict"
        return FAILED, None, f"exit {code}{last}"

    def _log_path(self, attempt: Attempt) -> Path:
        return self.folder / RUNS_FOLDER / f"{attempt.id}.log"

    def _result_path(self, attempt: Attempt) -> Path:
        return self.folder / RUNS_FOLDER / f"{attempt.id}.json"


def _read_result(path: Path) -> dict[str, Any]:
    """Return a JSON object that the supervisor wrote; a damaged one counts as absent."""
    try:
        return files.read_json(path)
    except FileNotFoundError:
        return {}
    except (CorruptFile, OSError) as error:
        logger.warning("cannot read what an attempt left error=%s", error)
        return {}


def _drop_old(runs: Path) -> None:
    """Keep the newest attempts' files; the names sort by time."""
    kept = sorted({path.stem for path in runs.iterdir()})[-KEPT_ATTEMPTS + 1 :]
    for path in runs.iterdir():
        if path.stem not in kept and path.suffix in (".log", ".json"):
            files.remove_leftover(path)
