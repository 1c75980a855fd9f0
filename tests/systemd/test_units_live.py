"""The shipped units, started by a real systemd under every line of hardening they claim."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from nested import INSTALLED, ROOT, STATE, NestedSystemd, why_not_here

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or "-")]

INFERENCE, RETRAINING, AGENT = "tft-inference-daemon", "adaptive-retraining", "fleetcast-agent"
# what the one daemon does, which forecasts, and the other one's child, which trains
AT_LOW_PRIORITY = """
import os
os.nice(10)
print("nice is", os.nice(0))
"""
SEALING_AT_WORK = """
import os, subprocess, sys
sys.path.insert(0, "/opt/MonitoringPrediction")
from data_buffer import DataBuffer
buffer = DataBuffer("sealed", expire=False)
buffer.append([{"timestamp": "2026-01-05T00:00:00Z", "server_name": "a", "cpu_pct": 1.0}])
buffer.close()
command = ["metrics", "2026-01-05", "sealed/day.parquet", str(os.getpid()), "{}"]
subprocess.run([sys.executable, "-m", "fleetcast.storage.upkeep", "sealed", *command], check=True,
               env={**os.environ, "PYTHONPATH": "/opt/MonitoringPrediction"})
print("sealed", os.path.getsize("sealed/day.parquet") > 0)
"""
FORECAST_AT_WORK = """
import sys
from pathlib import Path
sys.path.insert(0, "/opt/MonitoringPrediction")
from fleetcast.forecast.predictor import Forecaster, set_threads
set_threads(1)
Forecaster.load(Path("/opt/MonitoringPrediction/models/last.ckpt"))  # it tries the model once
print("it forecasts")
"""
TORCH_AT_WORK = """
import torch
net = torch.nn.LSTM(8, 32, batch_first=True)
attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
encoded, _ = net(torch.randn(64, 50, 8))
attended, _ = attention(encoded, encoded, encoded)
attended.mean().backward()
torch.optim.AdamW(net.parameters()).step()
torch.save(net.state_dict(), "probe.ckpt")
torch.load("probe.ckpt", weights_only=True)
print("torch works")
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NestedSystemd]:
    with NestedSystemd(tmp_path_factory.mktemp("nested")) as systemd:
        yield systemd


def _ask(machine: NestedSystemd, path: str) -> dict[str, Any]:
    code, output = machine.run("curl", "-sf", f"http://127.0.0.1:8000{path}")
    value = json.loads(output) if code == 0 else {}
    assert isinstance(value, dict)
    return value


def test_the_inference_daemon_is_started_once_it_serves(machine: NestedSystemd) -> None:
    code, output = machine.run("systemctl", "start", INFERENCE)  # returns at READY=1

    assert code == 0, output
    assert _ask(machine, "/ready") == {"status": "ready"}
    state = machine.show(INFERENCE, "ActiveState", "SubState", "StatusText", "User")
    assert (state["ActiveState"], state["SubState"], state["User"]) == ("active", "running", "tft")
    assert "servers" in state["StatusText"]


def test_its_state_lies_in_the_state_folder_readable_by_its_group_only(machine: NestedSystemd) -> None:
    _, listing = machine.run("find", STATE, "-printf", "%M %u %P\n")

    assert re.search(r"^-rw-r----- tft inference_daemon.log$", listing, re.MULTILINE)
    assert not re.search(r"^\S+r..\s", listing, re.MULTILINE)


def test_the_agent_delivers_this_machines_metrics_as_a_user_that_exists_only_now(
    machine: NestedSystemd,
) -> None:
    code, output = machine.run("systemctl", "start", AGENT)
    assert code == 0, output

    machine.wait_for("records of the agent", lambda: bool(_ask(machine, "/status")["newest_record_time"]))

    (server,) = _ask(machine, "/predictions/current")["predictions"].values()
    assert {"cpu_pct", "mem_pct", "load_average", "disk_usage_pct"} <= set(server["current"])
    assert "daemon=ok" in machine.show(AGENT, "StatusText")["StatusText"]


def test_a_stop_is_clean_and_what_was_acknowledged_is_there_afterwards(machine: NestedSystemd) -> None:
    machine.wait_for("records", lambda: _ask(machine, "/status")["buffer"]["total_records"] > 0)
    before = _ask(machine, "/status")["buffer"]["total_records"]

    machine.run("systemctl", "restart", INFERENCE)

    assert machine.show(INFERENCE, "Result", "NRestarts") == {"Result": "success", "NRestarts": "0"}
    assert _ask(machine, "/status")["buffer"]["total_records"] >= before


def test_a_working_loop_that_hangs_is_killed_and_started_again(machine: NestedSystemd) -> None:
    drop_in = machine.units / f"{INFERENCE}.service.d"
    drop_in.mkdir()
    (drop_in / "fast.conf").write_text("[Service]\nWatchdogSec=2\nRestartSec=0\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", INFERENCE)
    pid = machine.show(INFERENCE, "MainPID")["MainPID"]

    machine.run("kill", "-STOP", pid)

    machine.wait_for("a restart", lambda: machine.show(INFERENCE, "MainPID")["MainPID"] not in (pid, "0"))
    machine.wait_for("serving again", lambda: bool(_ask(machine, "/ready")))


def test_an_exit_that_no_restart_mends_is_not_restarted(machine: NestedSystemd) -> None:
    machine.run("systemctl", "stop", INFERENCE)
    machine.run("sh", "-c", "echo FLEETCAST_SERVER_PORTT=1 > /etc/fleetcast/env")

    machine.run("systemctl", "start", INFERENCE)

    state = machine.show(INFERENCE, "ActiveState", "ExecMainStatus")
    assert state == {"ExecMainStatus": "2", "ActiveState": "failed"}
    machine.run("rm", "/etc/fleetcast/env")
    machine.run("systemctl", "reset-failed", INFERENCE)


def _run_under(machine: NestedSystemd, unit: str, program: str) -> str:
    """Run a program in the place of the daemon, with all else of the unit; return what it said."""
    text = (ROOT / "deploy" / "systemd" / f"{unit}.service").read_text()
    python = f"ExecStart={INSTALLED}/.venv/bin/python probe.py"
    text = re.sub(r"^ExecStart=.*", python, text, flags=re.MULTILINE)
    text = re.sub(r"^(Requires|After|Restart|WatchdogSec)=.*\n", "", text, flags=re.MULTILINE)
    text = text.replace("Type=notify", f"Type=oneshot\nStandardOutput=file:{STATE}/probe.out")
    (machine.units / f"probe-{unit}.service").write_text(text)
    machine.write(f"{STATE}/probe.py", program)
    machine.run("systemctl", "daemon-reload")
    code, output = machine.run("systemctl", "start", f"probe-{unit}")
    _, said = machine.run("cat", f"{STATE}/probe.out")
    assert code == 0, output + said
    return said


@pytest.mark.parametrize(
    ("unit", "work", "done"),
    [(INFERENCE, FORECAST_AT_WORK, "it forecasts"), (RETRAINING, TORCH_AT_WORK, "torch works")],
)
def test_its_work_is_done_under_everything_a_unit_denies_at_a_lower_priority(
    machine: NestedSystemd, unit: str, work: str, done: str
) -> None:
    said = _run_under(machine, unit, AT_LOW_PRIORITY + work)

    assert "nice is 10" in said
    assert done in said


def test_the_child_that_seals_a_day_works_under_everything_its_unit_denies(machine: NestedSystemd) -> None:
    assert "sealed True" in _run_under(machine, INFERENCE, SEALING_AT_WORK)
