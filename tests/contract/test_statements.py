"""The printed diagrams and rules that are no commands: each is a claim, and each is checked."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from spec_blocks import BLOCKS, ROOT, covers
from workplace import Workplace

from fleetcast.settings import Settings


@covers("architecture", "20c8678a")
def test_the_pipeline_as_drawn_is_the_default() -> None:
    settings, text = Settings(), BLOCKS["architecture"].text
    assert f"Port {settings.server.port}" in text
    assert f"every {settings.retraining.interval_s / 60:.0f} min" in text
    assert f"Adds {settings.retraining.training_epochs} epochs" in text
    assert f"last {settings.retraining.training_days} days" in text
    assert settings.retraining.training_script in text
    assert f"{Path(settings.paths.data_buffer_dir).name}/" in text
    for program in re.findall(r"\w+\.py", text):
        assert (ROOT / program).exists()


@covers("combined-drift-score", "975b7dc8")
def test_the_combined_score_is_the_printed_sum() -> None:
    from drift_monitor import DriftMonitor

    printed = [float(text) for text in re.findall(r"\u00d7 ([\d.]+)", BLOCKS["combined-drift-score"].text)]
    weights = DriftMonitor().weights
    assert [weights[f"{name}_weight"] for name in ("per", "dss", "fds", "anomaly")] == printed
    monitor = DriftMonitor(baseline={"cpu_pct": [float(value) for value in range(100)]})
    actuals = {"cpu_pct": [float(value) for value in range(40, 140)]}
    monitor.update({"cpu_pct": [value + 8 for value in actuals["cpu_pct"]]}, actuals)
    found = monitor.calculate_drift_metrics()
    parts = [found[name] for name in ("per", "dss", "fds", "anomaly_rate")]
    assert all(part > 0 for part in parts[:3])
    expected = sum(weight * part for weight, part in zip(printed, parts, strict=True))
    assert found["combined_score"] == pytest.approx(expected, abs=1e-9)


@covers("step-by-step-process", "fa842f22")
def test_the_monitor_looks_at_the_last_1000_predictions_by_default() -> None:
    from drift_monitor import DriftMonitor

    assert f"last {Settings().drift.window_size} predictions" in BLOCKS["step-by-step-process"].text
    monitor = DriftMonitor()
    monitor.update({"cpu_pct": [90.0] * 500}, {"cpu_pct": [30.0] * 500})
    monitor.update({"cpu_pct": [30.0] * 1000}, {"cpu_pct": [30.0] * 1000})
    assert monitor.calculate_drift_metrics()["per"] == 0.0, "the first 500 are out of the window"


@covers("step-by-step-process-2", "535d771d")
@pytest.mark.parametrize(
    ("has_drift", "is_quiet", "is_safe"), list(itertools.product([True, False], repeat=3))
)
def test_training_needs_drift_and_quiet_and_safeguards(
    *, has_drift: bool, is_quiet: bool, is_safe: bool
) -> None:
    from adaptive_retraining_daemon import RetrainingDecisionEngine

    engine = RetrainingDecisionEngine()
    if not is_safe:
        engine.record_training()
    drift = {
        "per": 0.5 if has_drift else 0.0,
        "dss": 0.0,
        "fds": 0.0,
        "anomaly_rate": 0.0,
        "combined_score": 0.2 if has_drift else 0.0,
        "needs_retraining": has_drift,
    }
    decision = engine.should_retrain(drift, is_quiet_period=is_quiet)
    assert decision["should_retrain"] is (has_drift and is_quiet and is_safe)
    assert decision["reason"]
    assert decision["safeguards"]


@pytest.mark.slow
@covers("step-by-step-process-4", "0e64ec9c")
def test_a_training_leaves_the_checkpoint_where_the_daemon_looks(trained: Workplace) -> None:
    name = re.findall(r"checkpoints/last\.ckpt", BLOCKS["step-by-step-process-4"].text)[0]
    code = (
        "import torch\n"
        f"state = torch.load({name!r}, weights_only=True, map_location='cpu')\n"
        "assert {'format', 'network', 'state_dict'} <= state.keys(), list(state)\n"
    )
    (trained.folder / "load.py").write_text(code)
    done = trained.run("python load.py")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@covers("step-by-step-process-5", "0bfd2f3a")
def test_monitoring_resumes_with_the_new_baseline_and_six_hours_to_wait(trained: Workplace) -> None:
    from adaptive_retraining_daemon import RetrainingDecisionEngine

    assert "Wait minimum 6 hours" in BLOCKS["step-by-step-process-5"].text
    assert RetrainingDecisionEngine().min_hours_between_training == 6
    report = trained.run("python drift_monitor.py")
    assert report.returncode == 0, report.stderr
    version = (trained.folder / "checkpoints" / "last.ckpt").readlink().parts[1]
    assert version in report.stdout


@covers("systemd-service-linux", "d52768b6")
def test_the_printed_unit_is_accepted_by_systemd(tmp_path: Path) -> None:
    text = BLOCKS["systemd-service-linux"].text
    here = text.replace("/opt/conda/envs/py310/bin/python", sys.executable)  # the tool wants a real file
    here = here.replace("WorkingDirectory=/opt/MonitoringPrediction", f"WorkingDirectory={tmp_path}")
    assert here.count(sys.executable) == 1
    (tmp_path / "adaptive-retraining.service").write_text(here)
    needed = ROOT / "deploy" / "systemd" / "tft-inference-daemon.service"
    (tmp_path / needed.name).write_text(
        f"[Service]\nExecStart={sys.executable}\n" if not needed.exists() else simplified(needed)
    )
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "adaptive-retraining.service")],
        capture_output=True,
        text=True,
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
    )
    complaints = [line for line in done.stderr.splitlines() if "adaptive-retraining.service" in line]
    assert done.returncode == 0, done.stderr
    assert complaints == []


def simplified(unit: Path) -> str:
    """Return our other unit with a program that exists here: this test is about the printed one."""
    return re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", unit.read_text(), flags=re.M)


@covers("systemd-service-linux-2", "21550db3")
def test_the_unit_that_is_enabled_is_one_we_ship() -> None:
    """`systemctl` needs root and a running systemd: exempt; the name it is given is not."""
    names = {command.split()[-1] for command in BLOCKS["systemd-service-linux-2"].commands()}
    assert names == {"adaptive-retraining"}
    assert (ROOT / "deploy" / "systemd" / "adaptive-retraining.service").exists()


@covers("docker-compose", "d4e880c2")
def test_the_printed_compose_service_is_one_our_compose_file_has() -> None:
    """Docker needs an engine: exempt; the file is read as Compose reads it."""
    printed = yaml.safe_load(BLOCKS["docker-compose"].text)["services"]["adaptive-retraining"]
    program, *flags = printed["command"].removeprefix("python ").split()
    assert (ROOT / program).exists()
    ours = yaml.safe_load((ROOT / "deploy" / "docker-compose.yml").read_text())["services"]
    assert set(printed["depends_on"]) <= ours.keys()
    command = " ".join(ours["adaptive-retraining"]["command"])
    assert program in command
    assert " ".join(flags) in command
    assert "TFT_API_KEY" in str(ours["adaptive-retraining"]["environment"])
