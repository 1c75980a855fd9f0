"""A real systemd as process 1 of namespaces of its own (see nested_systemd.sh)."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
DEBIAN_PYTHON = Path("/usr/bin/python3")
SYSTEMD = Path("/lib/systemd/systemd")
TARGETS = ("sysinit", "basic", "network", "shutdown", "multi-user", "nested")
INSTALLED = "/opt/MonitoringPrediction"
STATE = "/var/lib/fleetcast"
TREE = "/opt/tree"  # this repository inside: units hide home folders and /tmp, where it may lie


def why_not_here() -> str:
    """Return what keeps this machine from nesting a systemd, "" when nothing does."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [name for name in ("unshare", "nsenter", "ip", "systemctl") if shutil.which(name) is None]
    if missing or not SYSTEMD.exists():
        return f"needs {', '.join(missing) or SYSTEMD}"
    probe = ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--fork", "true"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"cannot make namespaces: {done.stderr.strip()}" if done.returncode else ""


class NestedSystemd:
    """Boots at `with`, with the shipped units installed, or with what an installation begins from."""

    def __init__(self, folder: Path, *, is_installed: bool = True) -> None:
        self._folder = folder
        self._is_installed = is_installed
        self.units = folder / "units"
        self._shell: subprocess.Popen[bytes] | None = None
        self._pid = 0

    def __enter__(self) -> Self:
        self.units.mkdir(parents=True)
        for name in TARGETS:
            text = f"[Unit]\nDescription={name}\nDefaultDependencies=no\n"
            (self.units / f"{name}.target").write_text(text)
        if self._is_installed:
            for unit in (ROOT / "deploy" / "systemd").glob("*.service"):
                shutil.copy(unit, self.units)
        with (self._folder / "systemd.log").open("wb") as log:
            script = Path(__file__).with_name("nested_systemd.sh")
            self._shell = subprocess.Popen([script, self._folder], stdout=log, stderr=log)
        self.wait_for("process 1", lambda: (self._folder / "pid").exists(), 20)
        self._pid = int((self._folder / "pid").read_text())
        self.wait_for("systemd", lambda: self.run("systemctl", "is-active", "nested.target")[0] == 0, 20)
        self._prepare()
        if self._is_installed:
            self._install()
        return self

    def _prepare(self) -> None:
        """Show this tree inside, and make the virtual environment that nothing inside could download.

        The interpreter is Debian's: the one of a developer may lie in a home folder, which
        ProtectHome= hides. It borrows this environment's packages.
        """
        version = next((ROOT / ".venv" / "lib").glob("python3.*")).name
        packages = f"lib/{version}/site-packages"
        stamps = " ".join(f"{INSTALLED}/.venv/{name}" for name in (".made", ".requirements"))
        self._do(
            f"mkdir -p {INSTALLED} {TREE}",
            f"mount --bind {ROOT} {TREE}",
            f"{DEBIAN_PYTHON} -m venv --without-pip {INSTALLED}/.venv",
            f"echo {TREE}/.venv/{packages} > {INSTALLED}/.venv/{packages}/borrowed.pth",
            f"touch --date=tomorrow {stamps}",  # what `make install` leaves when it is done
        )

    def _install(self) -> None:
        """Do what docs/operations.md says, short of starting anything."""
        self._do(
            f"useradd --system --home-dir {STATE} --shell /usr/sbin/nologin tft",
            "mkdir -p /etc/fleetcast",
            f"cp -r {TREE}/*.py {TREE}/fleetcast {TREE}/models {INSTALLED}",
            "systemctl daemon-reload",
        )

    def _do(self, *steps: str) -> None:
        for step in steps:
            code, output = self.run("sh", "-c", f"umask 022; {step}")
            assert code == 0, f"{step}: {output}"

    def run(self, *command: str) -> tuple[int, str]:
        """Run a command inside; return its exit code and what it printed."""
        done = subprocess.run(
            [*self._inside(), *command], capture_output=True, text=True, check=False, timeout=150, cwd="/"
        )
        return done.returncode, done.stdout + done.stderr

    def _inside(self) -> list[str]:
        return ["nsenter", "--target", str(self._pid), "-m", "-u", "-i", "-n", "-p", "-C"]

    def write(self, path: str, text: str) -> None:
        """Write a file inside."""
        done = subprocess.run(
            [*self._inside(), "sh", "-c", f"umask 022; cat > {path}"],
            input=text,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def show(self, unit: str, *names: str) -> dict[str, str]:
        """Return properties of a unit."""
        _, output = self.run("systemctl", "show", unit, *(f"--property={name}" for name in names))
        return dict(line.split("=", 1) for line in output.splitlines() if "=" in line)

    def wait_for(self, what: str, is_true: Callable[[], bool], limit_s: float = 60.0) -> None:
        """Return when `is_true`; fail naming `what` after `limit_s`."""
        deadline = time.monotonic() + limit_s
        while not is_true():
            if time.monotonic() > deadline:
                log = (self._folder / "systemd.log").read_text(errors="replace")
                raise AssertionError(f"waited {limit_s:.0f} s in vain for: {what}\n{log[-3000:]}")
            time.sleep(0.1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
        if self._shell:
            self._shell.wait(30)
