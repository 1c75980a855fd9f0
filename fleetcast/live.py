"""Both daemons and this machine's agent in one terminal, until Ctrl+C (`make run`).

    python -m fleetcast.live [--folder run] [--port 8000]

Owns: starting and ending the three processes in order, and the line of status. Does not know:
what they do; it asks the daemon over HTTP as any client would.
State lies in `run/`, with a `fleetcast.toml` of its own: the bins are the usual 5 minutes, which the shipped
base model was made for, and it forecasts from the first closed bin on (docs/decisions/make-run.md).
"""

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fleetcast.clock import SystemClock, from_ms, iso_z, monotonic, to_ms
from fleetcast.errors import CannotStart, CorruptFile, DaemonAway, ExitCode
from fleetcast.files import open_append, open_regular, read_json, write_atomic
from fleetcast.locks import OwnerLock
from fleetcast.loop import Stop, configure_logging
from fleetcast.program import run_program
from fleetcast.schema import SOURCE_WARMING_UP
from fleetcast.settings import LoggingSettings
from fleetcast.sources.client import DaemonClient

ROOT = Path(__file__).resolve().parents[1]
OWN_SETTINGS = """\
# Made by `make run`: the base model forecasts from the first closed bin on, at most 5 minutes after the
# start. Without this file it waits for an hour of data, as in production.
[bins]
close_grace_s = 2.0

[forecast]
model_min_history_s = 300.0
"""
START_LIMIT_S = 60.0
STOP_LIMIT_S = 30.0
LAST_LINES = 15
LAST_BYTES = 65_536
LOCK_FILE = "live.lock"
_PR_SET_PDEATHSIG = 1


class Child:
    """One process, whose output goes to `<name>.console`; it keeps the folder's lock for its life."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, lock: OwnerLock) -> None:
        self.name = name
        self._console = folder / f"{name}.console"
        write_atomic(self._console, b"")  # whatever had the name
        with open_append(self._console) as console:
            # a session of its own: Ctrl+C reaches only us, and we end the three in order
            self._process = subprocess.Popen(
                [sys.executable, *command],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
                preexec_fn=_end_with_parent,
                pass_fds=lock.filenos(),
            )
        self.pid = self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def end(self) -> int:
        """Ask the process to end, wait for it in bounds, and return its exit code."""
        if not self.has_ended:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def last_words(self) -> str:
        """Return the exit code and the last lines it printed."""
        try:
            with open_regular(self._console) as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - LAST_BYTES))
                lines = stream.read(LAST_BYTES).decode(errors="replace").splitlines()[-LAST_LINES:]
        except (OSError, CorruptFile) as error:
            lines = [f"(no output to show: {error})"]
        return "\n".join([f"{self.name} ended with exit code {self._process.returncode}:", *lines])


def say(text: str, stop: Stop) -> None:
    """Print a line; ask for the end where that fails, as in a terminal that was closed."""
    try:
        print(text, flush=True)
    except OSError as error:
        stop.request(f"the output is gone: {error.strerror}")
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # for what is still in the buffer


def _end_with_parent() -> None:
    """Let the kernel send SIGTERM to this child when the terminal's process is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class LiveLoop:
    """The three processes; `with` ends the ones that were started, last one first.

    Ending in this order, the agent delivers its last readings, the retraining daemon takes no
    decision about a fleet that only seems to be gone, and the buffer is closed last.
    """

    def __init__(
        self, folder: Path, port: int, stop: Stop, lock: OwnerLock, *, status_interval_s: float
    ) -> None:
        self._folder = folder
        self._lock = lock
        self._url = f"http://127.0.0.1:{port}"
        self._port = port
        self._stop = stop
        self._status_interval_s = status_interval_s
        self._children: list[Child] = []
        self._server_name = socket.gethostname()
        self._client = DaemonClient(self._url, timeout_s=5.0)

    def start(self) -> None:
        """Start the three; the second and third once the first one serves.

        Raises:
            CannotStart: the port is taken, or one of them ended; the message holds its last words.
        """
        self._check_port()
        port = str(self._port)
        self._add("inference", "tft_inference_daemon.py", "--port", port)
        self._await_ready()
        self._add("retraining", "adaptive_retraining_daemon.py", "--daemon-url", self._url)
        agent = ["-m", "fleetcast.sources.agent", "--url", self._url, "--server-name", self._server_name]
        self._children.append(Child("agent", agent, self._folder, self._lock))

    def run(self) -> None:
        """Print a line of status now and then until the stop.

        Raises:
            CannotStart: one of the three ended by itself.
        """
        while not self._stop.wait(self._status_interval_s):
            self._check_children()
            say(f"{iso_z(SystemClock().now())[:19]}  {self.summary()}", self._stop)

    def end(self) -> None:
        """End all, last one first."""
        while self._children:
            child = self._children.pop()
            say(f"ending {child.name}: exit code {child.end()}", self._stop)

    def summary(self) -> str:
        """Return the state of the loop in one line."""
        try:
            status = self._client.status()
            current = self._client.get("/predictions/current")
        except DaemonAway as error:
            return f"no answer: {error}"
        parts = [_fleet(status), self._forecast(current, status), self._drift()]
        return " | ".join([*parts, *(f"problem: {text}" for text in status.get("problems", [])[:1])])

    def _forecast(self, current: dict[str, Any], status: dict[str, Any]) -> str:
        mine = current["predictions"].get(self._server_name)
        if mine is None:
            return f"{self._server_name}: no record yet"
        cpu_now = mine["current"].get("cpu_pct")
        text = f"{self._server_name}: cpu {cpu_now} %, {mine['source']}"
        if mine["forecast"] and "cpu_pct" in mine["forecast"]:
            ahead = mine["forecast"]["cpu_pct"]
            text += f", until {mine['timestamps'][-1][11:16]}Z {ahead['p50'][-1]:.1f} %"
            text += f" (80 %: {ahead['p10'][-1]:.1f} to {ahead['p90'][-1]:.1f})"
        elif mine["source"] == SOURCE_WARMING_UP:
            text += f", the first forecast comes soon after {_bin_end(status['bins']['bin_s'])}"
        return text

    def _drift(self) -> str:
        try:
            drift = read_json(self._folder / "drift_metrics.json")
        except (OSError, CorruptFile):
            return "drift: not checked yet"
        is_ready = drift.get("status") == "ready"
        return f"drift: {drift['recommendation'] if is_ready else drift.get('status_reason')}"

    def _add(self, name: str, script: str, *flags: str) -> None:
        self._children.append(Child(name, [str(ROOT / script), *flags], self._folder, self._lock))

    def _check_port(self) -> None:
        """Make sure that the port is free."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self._port))
                return
            except OSError as error:
                reason = error.strerror
        raise CannotStart(
            f"port {self._port} cannot be used: {reason}; {self._tenant()}", hint="choose another with --port"
        )

    def _tenant(self) -> str:
        """Return what is known about who answers on our port."""
        try:
            status = self._client.status()
            return f"a fleetcast daemon has it: pid {status['pid']}, buffer {status['buffer']['folder']}"
        except (DaemonAway, KeyError, TypeError):
            return "another program has it"

    def _await_ready(self) -> None:
        """Wait until our own daemon serves; the answer of another one does not count."""
        deadline_s = monotonic() + START_LIMIT_S
        while monotonic() < deadline_s and not self._stop.wait(0.2):
            self._check_children()
            try:
                status = self._client.status()
            except DaemonAway:
                continue
            if status.get("pid") == self._children[0].pid and status.get("status") == "ready":
                return
        if not self._stop.is_requested:
            raise CannotStart(f"the inference daemon was not ready within {START_LIMIT_S:.0f} s")

    def _check_children(self) -> None:
        for child in self._children:
            if child.has_ended:
                raise CannotStart(child.last_words())


def _bin_end(bin_s: int) -> str:
    """Return when the present bin ends."""
    now_ms = to_ms(SystemClock().now())
    return iso_z(from_ms((now_ms // (bin_s * 1000) + 1) * bin_s * 1000))[11:19] + "Z"


def _fleet(status: dict[str, Any]) -> str:
    return f"newest record {str(status.get('newest_record_time'))[11:19]}, backlog {status.get('backlog')}"


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the loop on this machine until Ctrl+C; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=prog or "python -m fleetcast.live", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--folder", type=Path, default=Path("run"), help="where state lies (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port of the inference daemon (%(default)s)")
    parser.add_argument("--status", type=float, default=10.0, help="seconds between lines (%(default)s)")
    options = parser.parse_args(argv)
    return run_program("live", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    folder: Path = options.folder
    configure_logging(None, LoggingSettings())
    lock = OwnerLock(folder / LOCK_FILE, f"the live loop of {folder.resolve()}")
    with lock:  # before anything is written: the files are those of the loop that runs
        config = folder / "fleetcast.toml"
        if not config.exists():
            write_atomic(config, OWN_SETTINGS.encode())  # over a link that leads nowhere, too
        stop = Stop()
        stop.install()
        loop = LiveLoop(folder, options.port, stop, lock, status_interval_s=options.status)
        try:
            loop.start()
            url = f"http://127.0.0.1:{options.port}/docs"
            say(f"live on {url}, state in {folder}/, Ctrl+C ends it", stop)
            loop.run()
        finally:
            loop.end()
    return ExitCode.OK


if __name__ == "__main__":
    raise SystemExit(main())
