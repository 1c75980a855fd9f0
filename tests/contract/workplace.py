"""A working directory as a user has one: the five programs in it, and a shell that finds `python`."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from spec_blocks import ROOT

PROGRAMS = (
    "adaptive_retraining_daemon.py",
    "data_buffer.py",
    "drift_monitor.py",
    "tft_inference_daemon.py",
    "tft_trainer.py",
)
SAMPLE = ROOT / "samples" / "smd_fleet.parquet"
FLEET = ("1-2", "1-3", "1-6", "1-7", "1-8", "2-1", "2-7", "2-8")
MAPPING = ("cpu_pct=cpu_r_norm01*100", "mem_pct=mem_u_norm01*100")
# A training of seconds that still beats the fallback, and no minute of waiting for the first day
# file, no shipped base (it knows this sample, nothing would beat it); everything else is the default.
IN_A_HURRY = """\
[paths]
models_dir = "no_models"
[trainer]
steps_per_epoch = 25
batch_size = 64
hidden_size = 16
[buffer]
publish_s = 2.0
"""


@dataclass
class Workplace:
    """A folder with the five programs in it, and a shell that finds `python`."""

    folder: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)
    more_environment: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("FLEETCAST_", "TFT_"))}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return kept | {"PATH": path, "COLUMNS": "120"} | self.more_environment

    def run(self, command: str, *, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
        """Run a command line as a user's shell does; any failing part of a pipe fails it."""
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
        )

    def start(self, command: str, *, new_session: bool = False) -> subprocess.Popen[str]:
        """Start a command line that goes on; `stop` ends it."""
        with (self.folder / f"stdout-{len(self.started)}.txt").open("w") as output:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=new_session,
            )
        self.started.append(process)
        return process

    def stop(self) -> list[int]:
        """End what was started, the newest first; return the exit codes in that order."""
        codes = []
        for process in reversed(self.started):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                codes.append(process.wait(30))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(process.wait())
        self.started.clear()
        return codes

    def feed(self, minutes: int, *flags: str) -> subprocess.CompletedProcess[str]:
        """Replay the newest minutes of the sample's fleet to the daemon, shifted to now."""
        servers = ",".join(f"smd-machine-{name}" for name in FLEET)
        return self.run(
            f"python -m fleetcast.sources.replay --data {SAMPLE} --servers {servers} --days {minutes / 1440} "
            f"--map {' '.join(MAPPING)} --shift-to now --url http://localhost:8000 {' '.join(flags)}"
        )


def installed(command: str) -> str:
    """Return a command of the installed package as a checkout has it."""
    return re.sub(r"^fleetcast ", "python -m fleetcast ", command)


def is_free(port: int) -> bool:
    """Return whether a port of this host is free."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def until(is_true: Callable[[], bool], place: Workplace, *, timeout_s: float = 240.0) -> None:
    """Wait for a running program; fail with what the programs said when it takes too long."""
    end = time.monotonic() + timeout_s
    while not is_true():
        dead = [process.args for process in place.started if process.poll() not in (None, 0)]
        if dead or time.monotonic() > end:
            logs = "\n".join(path.read_text()[-3000:] for path in sorted(place.folder.glob("stdout-*.txt")))
            pytest.fail(f"waited in vain; ended: {dead}\n{logs}")
        time.sleep(0.2)
