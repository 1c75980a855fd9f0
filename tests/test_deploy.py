"""deploy/: the shipped units, image and compose file, checked by the tools an operator would use."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fleetcast.errors import ExitCode
from fleetcast.loop import ALIVE_S

ROOT = Path(__file__).resolve().parents[1]
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
DAEMON_UNITS = [unit for unit in UNITS if unit.stem != "fleetcast-agent"]
INSTALLED_PYTHON = "/opt/MonitoringPrediction/.venv/bin/python"
COMPOSE = ROOT / "deploy" / "docker-compose.yml"
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


class _Unit(configparser.RawConfigParser):
    """A unit file: keys may repeat; the values of one key are joined by newlines."""

    optionxform = staticmethod(str)  # type: ignore[assignment]

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, interpolation=None)
        lines: dict[str, dict[str, list[str]]] = {}
        section = ""
        for line in path.read_text().splitlines():
            if line.startswith("["):
                section = line.strip("[]")
            elif "=" in line and not line.startswith("#"):
                key, value = line.split("=", 1)
                lines.setdefault(section, {}).setdefault(key, []).append(value)
        self.read_dict({name: {k: "\n".join(v) for k, v in keys.items()} for name, keys in lines.items()})


def _command(unit: Path) -> list[str]:
    return _Unit(unit)["Service"]["ExecStart"].split()


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail(f"{name} is missing: .ci/run installs it")
        pytest.skip(f"{name} is not installed")
    return path


def test_there_are_units_for_both_daemons_and_the_agent() -> None:
    assert [unit.name for unit in UNITS] == [
        "adaptive-retraining.service",
        "fleetcast-agent.service",
        "tft-inference-daemon.service",
    ]


def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    # systemd-analyze insists on a program that exists; nothing else is changed
    copies = [tmp_path / unit.name for unit in UNITS]
    for unit, copy in zip(UNITS, copies, strict=True):
        copy.write_text(unit.read_text().replace(INSTALLED_PYTHON, sys.executable))

    done = subprocess.run(
        [_tool("systemd-analyze"), "verify", "--man=no", *map(str, copies)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_the_exposure_systemd_computes_is_at_most_3(unit: Path) -> None:
    done = subprocess.run(
        [_tool("systemd-analyze"), "security", "--offline=true", "--threshold=30", "--no-pager", str(unit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, [*done.stdout.splitlines()[-1:], done.stderr]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_never_runs_as_root_and_tells_systemd_how_it_is(unit: Path) -> None:
    service = _Unit(unit)["Service"]

    assert service.get("User") == "tft" or service.get("DynamicUser") == "yes"
    assert service["Type"] == "notify"
    assert int(service["WatchdogSec"]) > 0
    assert service["Restart"] == "always"
    assert service["RestartSec"] == "10"


def test_the_retraining_unit_is_ordered_as_the_specification_prints_it() -> None:
    printed = re.search(r"```ini\n(.*?)```", (ROOT / "docs" / "spec.md").read_text(), re.DOTALL)
    assert printed is not None
    unit = _Unit(ROOT / "deploy" / "systemd" / "adaptive-retraining.service")

    for line in printed[1].splitlines():
        key, _, value = line.partition("=")
        if key in ("Description", "After", "Requires"):
            assert unit["Unit"][key] == value
        elif key in ("User", "Restart", "RestartSec"):
            assert unit["Service"][key] == value
    assert unit["Service"]["ExecStart"].endswith("adaptive_retraining_daemon.py --interval 300")
    assert "multi-user.target" in unit["Install"]["WantedBy"].split()


def test_a_restart_of_the_inference_daemon_leaves_a_trainer_alone_and_brings_retraining_back() -> None:
    unit = _Unit(ROOT / "deploy" / "systemd" / "adaptive-retraining.service")

    assert unit["Service"]["KillMode"] == "process"
    assert unit["Service"]["OOMPolicy"] == "continue"
    assert "tft-inference-daemon.service" in unit["Install"]["WantedBy"].split()


def test_the_watchdog_of_the_retraining_daemon_outlasts_its_feeding_whatever_the_interval() -> None:
    unit = ROOT / "deploy" / "systemd" / "adaptive-retraining.service"

    assert int(_Unit(unit)["Service"]["WatchdogSec"]) > 3 * ALIVE_S


def test_units_and_containers_bound_memory_and_leave_room_for_every_connection() -> None:
    for unit in UNITS:
        text = unit.read_text()
        assert "\nLimitNOFILE=8192\n" in text
        assert "\nMemoryMax=" in text
    assert "\nMemoryHigh=" in (ROOT / "deploy" / "systemd" / "tft-inference-daemon.service").read_text()
    compose = COMPOSE.read_text()
    assert "mem_limit:" in compose
    assert "nofile: { soft: 8192, hard: 8192 }" in compose


def test_restarting_is_pointless_exactly_for_bad_settings_and_a_second_start() -> None:
    for unit in DAEMON_UNITS:
        codes = {int(code) for code in _Unit(unit)["Service"]["RestartPreventExitStatus"].split()}
        assert codes == {ExitCode.BAD_SETTINGS, ExitCode.ALREADY_RUNNING}


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_the_command_of_a_unit_starts_a_program_of_this_repository(unit: Path) -> None:
    python, *arguments = _command(unit)
    installed = "/opt/MonitoringPrediction/"
    known = [item.replace(installed, f"{ROOT}/") for item in arguments if not item.startswith("$")]

    done = subprocess.run(
        [sys.executable, *known, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert python == INSTALLED_PYTHON
    assert done.returncode == 0, done.stderr


# Linux's PR_SET_MDWE is what MemoryDenyWriteExecute= stands for; None of the daemons may claim it
# while this fails, and the day it passes the units should.
_UNDER_MDWE = """
import ctypes, mmap
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):
    raise SystemExit("kernel without PR_SET_MDWE")
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC)
    raise SystemExit("not in force")
except OSError:
    pass
"""
_A_FORECAST = """
import sys
from pathlib import Path
from fleetcast.forecast.predictor import Forecaster, set_threads
set_threads(1)
Forecaster.load(Path("models/last.ckpt"))  # tries it once
assert "torch" not in sys.modules
print("forecast")
"""
_AN_LSTM = """
import torch
torch.set_num_threads(1)
with torch.inference_mode():
    torch.nn.LSTM(8, 32, batch_first=True)(torch.randn(4, 20, 8))
print("forecast")
"""


def _run_confined(program: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [sys.executable, "-c", _UNDER_MDWE + program], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if "kernel without PR_SET_MDWE" in done.stderr:
        pytest.skip("this kernel has no PR_SET_MDWE (Linux 6.3)")
    assert "not in force" not in done.stderr
    return done


@pytest.mark.slow
def test_torch_fails_without_writable_executable_memory_so_no_unit_with_torch_denies_it() -> None:
    done = _run_confined(_AN_LSTM)

    assert "could not create a primitive" in done.stderr
    retraining, inference = (_Unit(unit)["Service"] for unit in DAEMON_UNITS)
    assert "MemoryDenyWriteExecute" not in retraining
    assert inference["MemoryDenyWriteExecute"] == "yes"


def test_a_model_is_loaded_and_forecasts_under_the_memory_rule_its_unit_claims() -> None:
    assert "forecast" in _run_confined(_A_FORECAST).stdout


def test_the_agent_reads_its_metrics_under_the_memory_rule_its_unit_claims() -> None:
    done = _run_confined(
        "from fleetcast.sources.agent import HostMeter; import json\nprint(json.dumps(HostMeter().read()))"
    )

    assert "cpu_pct" in json.loads(done.stdout)
    agent = _Unit(ROOT / "deploy" / "systemd" / "fleetcast-agent.service")
    assert agent["Service"]["MemoryDenyWriteExecute"] == "yes"


def _compose() -> dict[str, Any]:
    value = yaml.safe_load(COMPOSE.read_text())
    assert isinstance(value, dict)
    return value


def test_the_compose_file_is_accepted_by_compose_and_only_with_a_key() -> None:
    docker_compose = _tool("docker-compose")
    command = [docker_compose, "-f", str(COMPOSE), "config"]
    environment = {"PATH": os.environ["PATH"]}

    without = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment | {"TFT_API_KEY": "k"}
    )

    assert without.returncode != 0
    assert "set TFT_API_KEY" in without.stderr
    assert done.returncode == 0, done.stderr
    assert "http://inference-daemon:8000" in done.stdout


def test_both_services_share_buffer_checkpoints_and_state() -> None:
    compose = _compose()
    services = compose["services"]

    assert set(services) == {"inference-daemon", "adaptive-retraining"}
    targets = {
        volume.split(":")[0]: volume.split(":")[1] for volume in services["inference-daemon"]["volumes"]
    }
    assert services["adaptive-retraining"]["volumes"] == services["inference-daemon"]["volumes"]
    assert set(targets) == set(compose["volumes"]) == {"data_buffer", "checkpoints", "state"}
    text = DOCKERFILE.read_text()
    for folder in targets.values():
        assert f'"{folder}"' in text  # the image gives each volume its owner


@pytest.mark.parametrize("service", ["inference-daemon", "adaptive-retraining"])
def test_a_composed_command_is_one_the_programs_understand(service: str) -> None:
    command = _compose()["services"][service]["command"]
    program = command[1].replace("/app/", f"{ROOT}/")

    done = subprocess.run(
        [sys.executable, program, *command[2:], "--help"], capture_output=True, text=True, check=False
    )

    assert command[0] == "python"
    assert done.returncode == 0, done.stderr


def test_the_image_runs_an_unprivileged_user_and_can_be_stopped_and_asked() -> None:
    text = DOCKERFILE.read_text()

    assert re.search(r"^USER tft$", text, re.MULTILINE)
    assert re.search(r"^STOPSIGNAL SIGTERM$", text, re.MULTILINE)
    assert re.search(r'^CMD \["python", "/app/tft_inference_daemon.py"\]$', text, re.MULTILINE)
    assert "HEALTHCHECK" in text
    assert not re.search(r"^(CMD|ENTRYPOINT) [^\[]", text, re.MULTILINE)  # shell form eats signals


def test_the_settings_the_image_presets_exist() -> None:
    from fleetcast.settings import load_settings

    preset = dict(re.findall(r"(FLEETCAST_\w+)=(\S+)", DOCKERFILE.read_text()))

    settings = load_settings(environ=preset)

    assert settings.paths.data_buffer_dir == "/app/data_buffer"
    assert settings.retraining.training_script == "/app/tft_trainer.py"


def test_the_build_context_lets_in_code_and_nothing_an_operator_would_not_publish() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]

    assert rules[0] == "**"
    assert all(not re.search(r"env|state|buffer|checkpoint", rule) for rule in rules)


def _image(folder: Path) -> Path:
    """Do what the second stage's COPY lines do, with what the build context lets in."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    admitted = {rule[1:].split("/")[0] for rule in rules}
    for line in re.findall(r"^COPY (?!--from|requirements)(.*)$", DOCKERFILE.read_text(), re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            assert source in admitted, f"{source} is copied, but .dockerignore keeps it out"
            for path in ROOT.glob(source):
                place = folder / target
                if path.is_dir():
                    shutil.copytree(path, place, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy2(path, place)
    return folder


def test_what_the_image_copies_is_all_that_the_programs_need(tmp_path: Path) -> None:
    app = tmp_path / "app"
    (app / "state").mkdir(parents=True)
    _image(app)
    preset = dict(re.findall(r"(FLEETCAST_\w+)=(\S+)", DOCKERFILE.read_text()))
    environ = {name: value.replace("/app", str(app)) for name, value in preset.items()}
    scripts = ("tft_inference_daemon.py", "adaptive_retraining_daemon.py", "tft_trainer.py")
    commands = [[str(app / script), "--help"] for script in scripts]
    base = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "import tft_inference_daemon, adaptive_retraining_daemon, tft_trainer\n"
        "from fleetcast.forecast.registry import Registry\n"
        "print(Registry(Path('checkpoints'), Path(sys.argv[1], 'models')).base().id)"
    )
    commands.append(["-c", base, str(app)])

    for command in commands:
        done = subprocess.run(
            [sys.executable, *command], cwd=app / "state", capture_output=True, text=True, check=False,
            env={"PATH": os.environ["PATH"], **environ},
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stderr)
    assert re.match(r"\w", done.stdout)
