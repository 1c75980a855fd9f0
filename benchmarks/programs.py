"""The programs as an operator runs them: real processes in a folder, real HTTP, real signals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from fleetcast.demo.harness import free_port
from fleetcast.errors import DaemonAway
from fleetcast.sources.client import DaemonClient, RequestRefused

__all__ = ["InferenceDaemon", "Program", "free_port", "wait_for"]

ROOT = Path(__file__).resolve().parents[1]
START_LIMIT_S = 60.0


def wait_for(what: str, is_true: Callable[[], bool], limit_s: float = START_LIMIT_S) -> None:
    """Return when `is_true`; fail naming `what` after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not is_true():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {limit_s:.0f} s in vain for: {what}")
        time.sleep(0.02)


class Program:
    """One program of this repository, run in `folder` and never left behind."""

    def __init__(
        self,
        script: str,
        folder: Path,
        *flags: str,
        environ: Mapping[str, str] | None = None,
        preexec: Callable[[], None] | None = None,
    ) -> None:
        self.folder = folder
        self._command = [sys.executable, str(ROOT / script), *flags]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TFT_", "FLEETCAST_"))}
        self._environ = inherited | {"OMP_NUM_THREADS": "1", **(environ or {})}
        self._preexec = preexec
        self._process: subprocess.Popen[bytes] | None = None
        self.console = folder / f"{Path(script).stem}.console"

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        """The running (or ended) process."""
        assert self._process is not None, "not started"
        return self._process

    def start(self) -> Self:
        """Start the process; its output goes to a file beside its state."""
        with self.console.open("ab") as console:
            self._process = subprocess.Popen(
                self._command,
                cwd=self.folder,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                preexec_fn=self._preexec,
            )
        return self

    def launch(self) -> Self:
        """Start the process and do not wait for anything."""
        return Program.start(self)

    def run(self, limit_s: float = START_LIMIT_S) -> int:
        """Start it and wait for its end; return the exit code."""
        return self.start().process.wait(limit_s)

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed."""
        self.process.kill()
        self.process.wait()

    def stop(self, number: int = signal.SIGTERM, limit_s: float = 30.0) -> int:
        """Ask it to end and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(limit_s)

    @property
    def output(self) -> str:
        """What it wrote to the terminal."""
        return self.console.read_text(errors="replace")

    @property
    def memory_bytes(self) -> int:
        """Resident memory."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    @property
    def n_files(self) -> int:
        """Open file handles, sockets included."""
        return int(psutil.Process(self.process.pid).num_fds())

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.kill()


class InferenceDaemon(Program):
    """The inference daemon on a port of its own."""

    def __init__(
        self,
        folder: Path,
        *flags: str,
        port: int | None = None,
        environ: Mapping[str, str] | None = None,
        preexec: Callable[[], None] | None = None,
    ) -> None:
        self.port = port or free_port()
        super().__init__(
            "tft_inference_daemon.py",
            folder,
            "--port",
            str(self.port),
            *flags,
            environ=environ,
            preexec=preexec,
        )
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = DaemonClient(self.url, api_key=(environ or {}).get("TFT_API_KEY", ""), timeout_s=20)

    def start(self) -> Self:
        """Start it and wait until it serves."""
        super().start()
        wait_for(f"the inference daemon\n{self.output}", self._is_ready_or_dead)
        assert self.process.poll() is None, self.output
        return self

    def _is_ready_or_dead(self) -> bool:
        if self.process.poll() is not None:
            return True
        try:
            return bool(self.client.get("/ready"))
        except DaemonAway:
            return False

    def takes(self, records: list[dict[str, Any]]) -> bool:
        """Post records; return whether they were taken, or have to wait for a sweep (data clock)."""
        try:
            return self.client.post_records(records).received == len(records)
        except RequestRefused as error:
            assert error.status == 429, error
            return False

    def status(self) -> dict[str, Any]:
        """Return `/status`."""
        return self.client.status()
