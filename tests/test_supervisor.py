"""The supervisor of a training: its bounds hold whatever the child does."""

import json
import os
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetcast.locks import OwnerLock, is_locked
from fleetcast.retraining import supervisor
from fleetcast.retraining.supervisor import LINE_BYTES, OutputLines, RunJob, run_job

ROOT = Path(__file__).parents[1]


def job(folder: Path, *codes: str, timeout_s: float = 30.0, lock_fds: tuple[int, ...] = ()) -> RunJob:
    steps = tuple({"argv": [sys.executable, "-c", code], "cwd": str(folder), "env": {}} for code in codes)
    log, result = str(folder / "run.log"), str(folder / "run.json")
    return RunJob(steps, timeout_s, 5, log, result, 10_000, lock_fds)


def test_the_end_and_the_last_lines_are_noted(tmp_path: Path) -> None:
    result = run_job(job(tmp_path, "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)"))
    assert (result["exit_code"], result["timed_out"], result["step"]) == (3, False, 0)
    assert sorted(result["tail"]) == ["one", "two"]
    assert sorted((tmp_path / "run.log").read_text().splitlines()) == ["one", "two"]


def test_a_step_that_fails_is_the_last(tmp_path: Path) -> None:
    result = run_job(job(tmp_path, "print(1)", "raise SystemExit(7)", "print(3)"))
    assert (result["exit_code"], result["step"]) == (7, 1)
    assert (tmp_path / "run.log").read_text() == "1\n"


def test_steps_see_their_own_environment_and_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    code = "import os; print(os.environ['OWN'], os.getcwd())"
    step = {"argv": [sys.executable, "-c", code], "cwd": str(tmp_path / "sub"), "env": {"OWN": "yes"}}
    run_job(RunJob((step,), 30, 0, str(tmp_path / "log"), str(tmp_path / "r"), 1000, ()))
    assert (tmp_path / "log").read_text().strip() == f"yes {tmp_path / 'sub'}"


def test_a_child_that_hangs_is_killed_with_all_it_started(tmp_path: Path) -> None:
    code = (
        "import os, time\nif os.fork() == 0: open('grandchild', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    )
    result = run_job(job(tmp_path, code, timeout_s=2.0))
    assert (result["exit_code"], result["timed_out"]) == (-signal.SIGKILL, True)
    assert result["tail"][-1] == "killed: the time limit is over"
    until(lambda: not is_alive(int((tmp_path / "grandchild").read_text())))


def test_a_grandchild_that_keeps_printing_does_not_keep_a_step_alive(tmp_path: Path) -> None:
    code = "import os\nif os.fork() == 0:\n    while True: print('spam')\nprint('end')"
    result = run_job(job(tmp_path, code))
    assert (result["exit_code"], result["timed_out"]) == (0, False)


def test_a_child_that_closes_its_output_is_still_waited_for(tmp_path: Path) -> None:
    result = run_job(job(tmp_path, "import os, time; os.close(1); os.close(2); time.sleep(0.5); os._exit(4)"))
    assert result["exit_code"] == 4


def test_a_command_that_does_not_exist_is_an_end_like_others(tmp_path: Path) -> None:
    step = {"argv": ["/no/such/program"], "cwd": str(tmp_path), "env": {}}
    result = run_job(RunJob((step,), 5, 0, str(tmp_path / "log"), str(tmp_path / "r"), 1000, ()))
    assert result["exit_code"] == 3
    assert "cannot start ['/no/such/program']" in result["tail"][0]


def test_much_output_fills_neither_log_nor_memory(tmp_path: Path) -> None:
    code = "import sys\nfor _ in range(300): sys.stdout.write(('y' * 999 + '\\n') * 100)"
    result = run_job(job(tmp_path, code))
    assert result["exit_code"] == 0
    assert result["lines"] == 30_000
    assert (tmp_path / "run.log").stat().st_size <= 10_000
    assert result["dropped_lines"] == result["lines"] - len((tmp_path / "run.log").read_text().splitlines())
    assert all(len(line) <= LINE_BYTES for line in result["tail"])


@settings(deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=20))
def test_lines_do_not_depend_on_how_the_output_is_cut(pieces: list[bytes]) -> None:
    def lines(parts: list[bytes]) -> tuple[bytes, int]:
        stream = BytesIO()
        output = OutputLines(stream, 10_000)
        for part in parts:
            output.feed(part)
        output.close()
        return stream.getvalue(), output.lines

    whole = b"".join(pieces)
    assert lines(pieces) == lines([whole]) == lines([whole[i : i + 1] for i in range(len(whole))])


def test_a_line_without_end_is_cut_once() -> None:
    stream = BytesIO()
    output = OutputLines(stream, 10_000)
    for _ in range(50):
        output.feed(b"z" * 1000)
    output.feed(b"\nnext\n")
    assert [len(line) for line in stream.getvalue().splitlines()] == [LINE_BYTES, 4]
    assert output.lines == 2


def test_a_full_disk_does_not_end_a_training(tmp_path: Path) -> None:
    class Full(BytesIO):
        def write(self, _data: Any) -> int:
            raise OSError(28, "No space left on device")

    output = OutputLines(Full(), 10_000)
    output.feed(b"one\ntwo\n")
    assert (output.lines, output.dropped, list(output.tail)) == (2, 2, ["one", "two"])


def test_the_result_is_written_last_and_the_child_has_low_priority(tmp_path: Path) -> None:
    code = "import os, pathlib; print(os.nice(0), pathlib.Path('run.json').exists())"
    started = os.nice(0)
    done = subprocess.run(
        [sys.executable, "-m", supervisor.__name__, job(tmp_path, code).to_argument()], cwd=ROOT, timeout=60
    )
    assert done.returncode == 0
    assert json.loads((tmp_path / "run.json").read_text())["tail"] == [f"{started + 5} False"]


def test_a_supervisor_killed_takes_its_child_along_and_frees_the_lock(tmp_path: Path) -> None:
    lock = OwnerLock(tmp_path / "attempt.lock", "a test").acquire()
    code = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            supervisor.__name__,
            job(tmp_path, code, lock_fds=lock.filenos()).to_argument(),
        ],
        cwd=ROOT,
        pass_fds=lock.filenos(),
    )
    lock.release()
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    assert is_locked(tmp_path / "attempt.lock"), "held by the processes of the attempt alone"
    process.kill()
    process.wait()
    until(lambda: not is_alive(int((tmp_path / "pid").read_text())))
    until(lambda: not is_locked(tmp_path / "attempt.lock"))
    assert not (tmp_path / "run.json").exists()


def test_a_hangup_for_the_whole_unit_ends_no_training(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getppid(), signal.SIGHUP); os.kill(os.getpid(), signal.SIGHUP)"
    command = ["-m", supervisor.__name__, job(tmp_path, f"{code}; print('goes on')").to_argument()]

    done = subprocess.run([sys.executable, *command], cwd=ROOT, timeout=60, check=False)

    assert done.returncode == 0
    assert json.loads((tmp_path / "run.json").read_text())["tail"] == ["goes on"]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def until(is_true: Any, timeout_s: float = 20.0) -> None:
    """Wait for another process; fails when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            pytest.fail("it did not happen in time")
        time.sleep(0.02)
