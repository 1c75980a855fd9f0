"""The commands of docs/promotion.md and docs/scaling.md, as printed: a key, versions of a model, shards.

`test_readme.py` has those of the other documents.
"""

import json
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from desk_folder import add
from spec_blocks import ROOT, commands
from workplace import Workplace, installed, is_free, until

from fleetcast.clock import SystemClock
from fleetcast.forecast.registry import Registry
from fleetcast.promotion.desk import Desk

pytestmark = pytest.mark.slow

FIRST, WAITS = "20260115T100005Z-3f2a", "20260122T100005Z-77aa"  # as docs/promotion.md names them
SERVED = (FIRST, "20260116T100005Z-0002", "20260117T100005Z-0003")
SHARDS, INSTALL, *RAY = commands(ROOT / "docs/scaling.md")
RAY_START, ENGINE, RETRAIN = RAY[:2], RAY[2], RAY[3]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A daemon with a key and shards, started as docs/scaling.md prints it."""
    if not is_free(8000):
        (pytest.fail if os.environ.get("CI") else pytest.skip)("port 8000 is taken on this machine")
    folder = tmp_path_factory.mktemp("documents")
    for path in (*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt"), ROOT / "fleetcast", ROOT / "models"):
        (folder / path.name).symlink_to(path)
    own = Workplace(folder)
    own.more_environment["TFT_API_KEY"] = "a key of thirty-two characters.."
    own.start(SHARDS)
    try:
        until(lambda: own.run("curl -sf localhost:8000/ready").returncode == 0, own)
        yield own
    finally:
        codes = own.stop()
    assert set(codes) <= {0}, "a daemon did not end cleanly on SIGTERM"


def test_four_shards_are_started(place: Workplace) -> None:
    """That they forecast is claimed in `tests/integration/test_shards_of_a_daemon.py`: it takes longer."""
    status = place.run('curl -s localhost:8000/status -H "X-API-Key: $TFT_API_KEY"').stdout
    assert json.loads(status)["sweep"]["shards"]["wanted"] == 4


def test_the_orders_of_a_person_are_carried_out(place: Workplace) -> None:
    desk = _desk_with_versions(place.folder / "checkpoints")
    said = {}
    for command in commands(ROOT / "docs/promotion.md"):
        if command.startswith("fleetcast approve"):  # a training ended while models are held back
            with desk.lock():
                desk.keep_waiting(WAITS, "the trainer", "a person holds")
        done = place.run(installed(command))
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        said[" ".join(command.split()[:2])] = done.stdout
    assert said["fleetcast models"].count("2026") >= len(SERVED) + 1
    assert f"rolled back from {SERVED[1]} to {FIRST}" in said["fleetcast rollback"]
    assert f"put {WAITS} into service" in said["fleetcast approve"]
    assert json.loads(said["curl -s"])["order"]


def _desk_with_versions(folder: Path) -> Desk:
    desk = Desk(Registry(folder), SystemClock())
    for version_id in (*SERVED, WAITS):
        at = datetime.strptime(version_id[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        add(desk.registry, version_id, passed_gate=True, created_at=at.isoformat())
    for version_id in SERVED:
        with desk.lock():
            desk.promote(version_id, "ann", "better")
    return desk


def test_the_cluster_is_installed_and_its_commands_have_the_flags_that_are_printed(place: Workplace) -> None:
    place.more_environment |= {"PIP_DRY_RUN": "1", "PIP_NO_INDEX": "1"}  # what is there stays as it is
    done = place.run(INSTALL)
    assert done.returncode == 0, done.stderr
    flags = place.run("ray start --help").stdout
    for command in RAY_START:  # tests/integration/test_ray_shards.py starts a cluster
        words = command.split(" #")[0].split()
        assert words[:2] == ["ray", "start"]
        assert all(word.split("=")[0] in flags for word in words[2:]), command
    for command, flag in ((f"{ENGINE} --port 65536", "port"), (f"{RETRAIN} --interval 0", "interval")):
        refused = place.run(command)  # one refusal is left: it starts nothing
        assert refused.returncode == 2, refused
        assert refused.stderr.count("must be") == 1, refused.stderr
        assert flag in refused.stderr, sys.executable
