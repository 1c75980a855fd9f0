"""Requires= and a running training: a restart of the inference daemon must not waste it."""

import re
from collections.abc import Iterator

import pytest
from nested import INSTALLED, STATE, TREE, NestedSystemd, why_not_here

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or "-")]

INFERENCE, RETRAINING = "tft-inference-daemon", "adaptive-retraining"
PREPARE = f"""
from pathlib import Path
from benchmarks.faults.parts.feed import Fleet
from benchmarks.faults.parts.trainings import prepare
place = prepare(Path("{STATE}/new"), Fleet(n_servers=3))
(place / "bad_trainer.txt").write_text("hangs")
for item in place.iterdir():
    item.rename(place.parent / item.name)
place.rmdir()
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NestedSystemd]:
    """A machine with both daemons enabled, 52 h of data, and a trainer that takes for ever."""
    with NestedSystemd(tmp_path_factory.mktemp("nested")) as systemd:
        # what `systemctl enable` makes of the second WantedBy=
        wants = systemd.units / f"{INFERENCE}.service.wants"
        wants.mkdir()
        (wants / f"{RETRAINING}.service").symlink_to(systemd.units / f"{RETRAINING}.service")
        systemd.run("systemctl", "daemon-reload")
        systemd.write("/tmp/prepare.py", PREPARE)
        script = f"{TREE}/benchmarks/faults/parts/bad_trainer.py"
        systemd.write(
            "/etc/fleetcast/env",
            f"FLEETCAST_CLOCK_MODE=data\nFLEETCAST_RETRAINING_TRAINING_SCRIPT={script}\n",
        )
        for step in (
            f"mkdir -p {STATE}",
            f"env PYTHONPATH={TREE} {INSTALLED}/.venv/bin/python /tmp/prepare.py",
            f"chown -R tft:tft {STATE}",
            f"systemctl start {INFERENCE}",
        ):
            code, output = systemd.run("sh", "-c", step)
            assert code == 0, f"{step}: {output}"
        systemd.wait_for("a trainer", lambda: bool(trainer(systemd)))
        yield systemd


def trainer(machine: NestedSystemd) -> str:
    """Return the trainer's pid, "" when there is none."""
    _, output = machine.run("ps", "-eww", "-o", "pid=,args=")
    found = [
        line.split()[0]
        for line in output.splitlines()
        if "bad_trainer.py" in line and "retraining.supervisor" not in line
    ]
    return found[-1] if found else ""


def is_active(machine: NestedSystemd, unit: str) -> bool:
    return machine.run("systemctl", "is-active", unit)[0] == 0


def test_starting_the_inference_daemon_brings_the_retraining_daemon_with_it(machine: NestedSystemd) -> None:
    assert is_active(machine, RETRAINING)


def test_a_restart_of_the_inference_daemon_leaves_the_trainer_running_and_adopted(
    machine: NestedSystemd,
) -> None:
    before, daemon = trainer(machine), machine.show(RETRAINING, "MainPID")["MainPID"]

    code, output = machine.run("systemctl", "restart", INFERENCE)

    assert code == 0, output
    machine.wait_for(
        "a new daemon", lambda: machine.show(RETRAINING, "MainPID")["MainPID"] not in (daemon, "0")
    )
    machine.wait_for("the adoption", lambda: "is_running=True" in _log(machine))
    assert trainer(machine) == before


def test_stop_and_start_bring_the_retraining_daemon_back(machine: NestedSystemd) -> None:
    before = trainer(machine)

    machine.run("systemctl", "stop", INFERENCE)
    assert not is_active(machine, RETRAINING)
    assert trainer(machine) == before

    machine.run("systemctl", "start", INFERENCE)
    machine.wait_for("the retraining daemon", lambda: is_active(machine, RETRAINING))
    assert trainer(machine) == before


def test_an_operator_can_end_a_training_as_well(machine: NestedSystemd) -> None:
    machine.run("systemctl", "stop", RETRAINING)

    machine.run("systemctl", "kill", "--kill-whom=all", "--signal=KILL", RETRAINING)

    machine.wait_for("the end of the trainer", lambda: not trainer(machine), 20)


def _log(machine: NestedSystemd) -> str:
    _, text = machine.run("cat", f"{STATE}/retraining_daemon.log")
    return "\n".join(re.findall(r"^.*training found.*$", text, re.MULTILINE))
