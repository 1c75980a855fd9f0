"""The wheel, installed far from any checkout: the command, the base model, the whole loop with a training."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import free_port, wait_for
from test_tft_trainer import SMALL, fleet

from fleetcast import __version__
from fleetcast.errors import DaemonAway
from fleetcast.files import read_json
from fleetcast.sources.client import DaemonClient

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
INGREDIENTS = ("pyproject.toml", "README.md", "LICENSE", "fleetcast", "models", "samples")
LIMIT_S = 240.0
CONFIG = (
    SMALL.replace('[paths]\nmodels_dir = "no_models"\n', "")  # the base model is what is looked for
    + """
[clock]
mode = "data"
[decision]
host_load_per_core = 1000.0
host_min_available_gb = 0.0
[retraining]
training_epochs = 1
training_nice = 0
"""
)


def pip(*arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--isolated", "--quiet", *map(str, arguments)],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel in it; the packages are borrowed, nothing is downloaded."""
    folder = tmp_path_factory.mktemp("installed")
    source, wheels, made = folder / "source", folder / "wheels", folder / "venv"
    source.mkdir()
    for path in [*(ROOT / name for name in INGREDIENTS), *ROOT.glob("*.py")]:
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, source / path.name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(path, source)
    pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source)
    shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made)], check=True)
    packages = made / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    pip("--python", made / "bin" / "python", "install", "--no-index", "--no-deps", *wheels.glob("*.whl"))
    return made


class Installed:
    """The `fleetcast` command of the environment, in a folder of its own."""

    def __init__(self, environment: Path, folder: Path) -> None:
        self._command = environment / "bin" / "fleetcast"
        self._environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1"}
        self.folder = folder

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [str(self._command), *arguments], cwd=self.folder, env=self._environ, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *arguments: str) -> str:
        """Run it to its end and return what it printed; anything but success fails the test."""
        process = self.start(*arguments)
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
        assert process.returncode == 0, output
        return output


@pytest.fixture
def installed(environment: Path, tmp_path: Path) -> Installed:
    (tmp_path / "fleetcast.toml").write_text(CONFIG)
    return Installed(environment, tmp_path)


@pytest.fixture
def daemon(installed: Installed) -> Iterator[DaemonClient]:
    port = free_port()
    process = installed.start("infer", "--port", str(port))
    client = DaemonClient(f"http://127.0.0.1:{port}")

    def has_model() -> bool:
        assert process.poll() is None, process.communicate()[0]
        try:
            return client.status()["model"]["version"] is not None
        except DaemonAway:
            return False

    try:
        wait_for("a model in service", has_model)
        yield client
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output


def test_the_command_says_its_version_and_shows_the_help_of_a_program(installed: Installed) -> None:
    assert installed.run("version") == f"fleetcast {__version__}\n"
    assert json.loads(installed.run("version", "--json"))["version"] == __version__
    assert "--data-buffer-dir" in installed.run("infer", "--help")


def test_the_wheel_carries_the_shipped_model_and_the_sample_and_no_program_twice(environment: Path) -> None:
    (packages,) = environment.glob("lib/*/site-packages")
    shipped = {
        path.relative_to(packages / "fleetcast") for path in packages.glob("fleetcast/models/versions/*/*")
    }
    expected = {path.relative_to(ROOT) for path in ROOT.glob("models/versions/*/*")}
    assert shipped == expected
    assert (packages / "fleetcast" / "samples" / "smd_fleet.parquet").exists()
    page = {path.relative_to(packages) for path in (packages / "fleetcast" / "ui").rglob("*")}
    assert page == {path.relative_to(ROOT) for path in (ROOT / "fleetcast" / "ui").rglob("*")}
    names = {path.name for path in packages.iterdir() if not path.name.startswith("__")}
    programs = {path.name for path in ROOT.glob("*.py")}
    assert names == programs | {"fleetcast", f"fleetcast-{__version__}.dist-info", "borrowed.pth"}
    licences = {path.name for path in packages.glob("*.dist-info/licenses/**/LICENSE*")}
    assert licences == {"LICENSE", "LICENSE-smd.txt"}


def test_a_first_model_is_trained_far_from_the_checkout(installed: Installed) -> None:
    fleet(60).to_parquet(installed.folder / "data.parquet")
    installed.run("train", "--data", "data.parquet", "--epochs", "1")
    (attempt,) = (installed.folder / "checkpoints" / "attempts").glob("*.json")
    assert read_json(attempt)["exit_code"] == 0


def test_the_loop_closes_with_the_shipped_model_and_the_installed_trainer(
    installed: Installed, daemon: DaemonClient
) -> None:
    assert daemon.status()["model"]["base"] is True
    fleet(50).to_parquet(installed.folder / "data.parquet")
    installed.run("replay", "--data", "data.parquet", "--url", daemon.url)

    printed = installed.run("retrain", "--once", "--daemon-url", daemon.url)

    assert "Training " in printed
    (attempt,) = read_json(installed.folder / "retraining_state.json")["attempts"]
    assert attempt["rule"] == "initial"
    assert attempt["outcome"] in ("promoted", "rejected"), attempt
