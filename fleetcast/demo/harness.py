"""The whole loop as a user runs it: both daemons and a replay as real processes in one folder.

Owns: starting, watching, stopping, and reading what they left behind. Used by `demo.py` and
`closed_loop.py`; nothing here takes part in the loop itself.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from fleetcast.clock import monotonic, sleep
from fleetcast.errors import DaemonAway
from fleetcast.files import read_json, read_json_lines
from fleetcast.sources.client import DaemonClient
from fleetcast.workers import Workers

ROOT = Path(__file__).resolve().parents[2]
LINKED = (
    "adaptive_retraining_daemon.py",
    "data_buffer.py",
    "drift_monitor.py",
    "tft_inference_daemon.py",
    "tft_trainer.py",
    "fleetcast",
)
POLL_S = 0.25


class LoopFailed(Exception):
    """Raised when a process ended or a wait took too long; the message says where to look."""


@dataclass(frozen=True)
class Reload:
    """A model version seen for the first time in `/predictions/current`."""

    version: str
    data_time: datetime
    wall_s: float


@dataclass
class Seen:
    """What a client of the inference daemon saw while the loop ran."""

    requests: int = 0
    failed: int = 0
    reloads: list[Reload] = field(default_factory=list)
    training_s: float = 0.0
    newest: datetime | None = None
    status: dict[str, Any] = field(default_factory=dict)


class Watcher:
    """Asks for predictions and status all the time, as a dashboard would."""

    def __init__(self, url: str) -> None:
        self._thread = Workers().thread("watcher", self._poll)
        self.seen = Seen()
        self._client = DaemonClient(url)
        self._began_s = monotonic()
        self._is_over = threading.Event()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def _poll(self) -> None:
        while not self._is_over.wait(POLL_S):
            began_s = monotonic()
            self.seen.requests += 2
            try:
                current = self._client.get("/predictions/current?fields=current")
                self.seen.status = self._client.status()
            except DaemonAway:
                self.seen.failed += 1
                continue
            self._note(current)
            if self.seen.status.get("training", {}).get("running"):
                self.seen.training_s += monotonic() - began_s + POLL_S

    def end(self) -> Seen:
        """Stop polling and return what was seen."""
        self._is_over.set()
        self._thread.stop()
        self._thread.join(10)
        return self.seen

    def _note(self, current: Mapping[str, Any]) -> None:
        newest = self.seen.status.get("newest_record_time")
        self.seen.newest = datetime.fromisoformat(newest) if newest else None
        model = current.get("model")
        known = {reload.version for reload in self.seen.reloads}
        if model and model["version"] not in known and self.seen.newest:
            self.seen.reloads.append(Reload(model["version"], self.seen.newest, monotonic() - self._began_s))


class Loop:
    """Both daemons in `folder`, which is emptied first."""

    def __init__(self, folder: Path, config: str) -> None:
        self.folder = folder
        self.url = f"http://127.0.0.1:{free_port()}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in LINKED:  # so that the printed commands work in this folder too
            (folder / name).symlink_to(ROOT / name)
        (folder / "fleetcast.toml").write_text(config, encoding="utf-8")

    def __enter__(self) -> Self:
        port = self.url.rsplit(":", 1)[1]
        self._start("inference", ["tft_inference_daemon.py", "--port", port])
        try:
            self._until_ready()
            self._start("retraining", ["adaptive_retraining_daemon.py", "--daemon-url", self.url])
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def replay(
        self, data: Path, maps: Sequence[str], *cut: str, name: str = "replay"
    ) -> subprocess.Popen[bytes]:
        """Start a replay of `data` as fast as the daemon takes it; `name` tells it from others."""
        module = ["-m", "fleetcast.sources.replay", "--data", str(data.resolve()), "--url", self.url]
        return self._start(name, [*module, *cut, "--map", *maps])

    def attempts(self) -> list[dict[str, Any]]:
        """Return the trainings the retraining daemon has noted so far, oldest first."""
        try:
            return list(reversed(read_json(self.folder / "retraining_state.json")["attempts"]))
        except FileNotFoundError:
            return []

    def check(self) -> None:
        """Raise if a daemon ended."""
        for name, process in self._processes.items():
            if process.poll() not in (None, 0):
                raise LoopFailed(f"{name} ended with {process.returncode}; see {self.folder / name}.out")

    def stop(self) -> dict[str, int]:
        """End what runs, the newest first; return the exit codes by name."""
        codes = {}
        for name, process in reversed(self._processes.items()):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                codes[name] = process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                codes[name] = process.wait()
        self._end_training()
        return codes

    def _end_training(self) -> None:
        """End a training that was under way: it outlives its daemon, and no daemon follows to adopt it."""
        for attempt in self.attempts():
            if attempt["outcome"] == "running" and attempt["pid"]:
                with suppress(ProcessLookupError):
                    os.kill(attempt["pid"], signal.SIGTERM)

    def _start(self, name: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("FLEETCAST_", "TFT_"))}
        with (self.folder / f"{name}.out").open("wb") as output:
            self._processes[name] = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return self._processes[name]

    def _until_ready(self) -> None:
        with DaemonClient(self.url) as client:
            end_s = monotonic() + 60
            while monotonic() < end_s:
                self.check()
                try:
                    client.get("/ready")
                except DaemonAway:
                    sleep(POLL_S)
                else:
                    return
        raise LoopFailed(f"the inference daemon is not ready; see {self.folder / 'inference.out'}")


def free_port() -> int:
    """Return a free port of this host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def summary(text: str) -> dict[str, str]:
    """Return the figures of the line a replay ends with."""
    line = next((line for line in text.splitlines() if line.startswith("replay: records=")), "")
    return dict(pair.split("=", 1) for pair in line.split() if "=" in pair)


def decisions(folder: Path) -> list[dict[str, Any]]:
    """Return the retraining daemon's decisions that are still kept, oldest first."""
    lines = [line for path in folder.glob("decisions.jsonl*") for line in read_json_lines(path)]
    return sorted(lines, key=lambda line: str(line["at"]))


def ledger_counts(folder: Path) -> dict[str, int]:
    """Return the forecast account a stopped inference daemon left behind."""
    raw = read_json(folder / "data_buffer" / "ledger.json")
    waiting = sum(count for origin in raw["waiting"].values() for count in origin.values())
    counts = {name: int(raw[name]) for name in ("opened", "settled", "expired")}
    return counts | {"open": waiting, "due": counts["opened"] - waiting}
