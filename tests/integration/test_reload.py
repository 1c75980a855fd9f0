"""A model into service while the daemon works: no request fails, a bad one changes nothing."""

import os
import pickle
import threading
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.programs import InferenceDaemon, wait_for
from fleetcast.clock import iso_z
from fleetcast.forecast.registry import Registry
from fleetcast.sources.client import DaemonClient

pytestmark = pytest.mark.slow
START = datetime(2020, 1, 1, tzinfo=UTC)
_BASE = Registry(Path("no checkpoints"), Path(__file__).parents[2] / "models").base()
SHIPPED = _BASE.id if _BASE else None


def untrained_model(version: str, seed: int) -> bytes:
    """Return a checkpoint of the real network with random weights."""
    import torch

    from fleetcast.forecast.checkpoint import ModelDescription
    from fleetcast.forecast.encoding import GridShape
    from fleetcast.forecast.network import NetworkConfig
    from fleetcast.forecast.predictor import Forecaster
    from fleetcast.training.network import as_arrays, build

    torch.manual_seed(seed)
    grid = GridShape(bin_ms=300_000, horizon_bins=96)
    config = NetworkConfig.for_grid(grid, 16)
    description = ModelDescription(version, iso_z(datetime.now(UTC)), ("cpu_pct",), grid, config)
    return Forecaster(description, as_arrays(build(config).state_dict())).to_bytes()


def promote(folder: Path, version: str, content: bytes) -> None:
    registry = Registry(folder / "checkpoints")
    manifest = {"created_at": iso_z(datetime.now(UTC)), "parent": None, "promoted": True}
    registry.add(version, {"model.ckpt": content, "baseline.npz": b""}, manifest)
    registry.promote(version)


def feed(client: DaemonClient, first_bin: int, n_bins: int) -> None:
    """Send five-minute records of two servers, each as soon as it is taken."""
    for number in range(first_bin, first_bin + n_bins):
        moment = iso_z(START + timedelta(minutes=5 * number))
        records = [
            {"timestamp": moment, "server_name": name, "cpu_pct": 40.0 + number % 7} for name in ("a", "b")
        ]
        wait_for("the POST to be taken", partial(_taken, client, records))


def _taken(client: DaemonClient, records: list[dict[str, Any]]) -> bool:
    from fleetcast.sources.client import RequestRefused

    try:
        return client.post_records(records).received == 2
    except RequestRefused as error:
        assert error.status == 429, error
        return False


def version_of(client: DaemonClient) -> str | None:
    model = client.get("/predictions/current")["model"]
    return None if model is None else str(model["version"])


def test_a_fresh_install_forecasts_unknown_servers_from_their_first_hour(tmp_path: Path) -> None:
    with InferenceDaemon(tmp_path, "--clock", "data") as daemon:
        wait_for("the shipped base", lambda: daemon.status()["model"]["version"] is not None)
        feed(daemon.client, 0, 8)
        wait_for("the sweeps", lambda: daemon.status()["backlog"] == 0)
        young = daemon.client.get("/predictions/current")
        feed(daemon.client, 8, 7)  # the 13th bin closes with a record of 30 s after its end
        wait_for("the sweeps", lambda: daemon.status()["backlog"] == 0)
        shown = daemon.client.get("/predictions/current")
    assert young["predictions"]["a"]["source"] == "fallback"
    assert (shown["model"]["version"], shown["model"]["base"]) == (SHIPPED, True)
    for server in ("a", "b"):
        assert shown["predictions"][server]["source"] == "model"
        middle = shown["predictions"][server]["forecast"]["cpu_pct"]["p50"]
        assert len(middle) == 96
        assert 35 < min(middle) <= max(middle) < 52  # they send 40 to 46
    # and it is read, not written: the initial training stays due
    assert Registry(tmp_path / "checkpoints").current_id() is None


def test_models_come_into_service_beside_running_requests(tmp_path: Path) -> None:
    with InferenceDaemon(tmp_path, "--clock", "data") as daemon:
        feed(daemon.client, 0, 20)
        assert version_of(daemon.client) in (None, SHIPPED)  # loaded beside: it may not be there yet
        failures: list[Exception] = []
        is_over = threading.Event()

        def watch() -> None:
            client = DaemonClient(daemon.url)
            while not is_over.is_set():
                try:
                    client.get("/predictions/current")
                    client.status()
                except Exception as error:  # whatever it is, the test shows it
                    failures.append(error)

        watcher = threading.Thread(target=watch)
        watcher.start()
        seen = []
        for number, version in enumerate(("20260115T100000Z-0001", "20260115T110000Z-0002")):
            promote(tmp_path, version, untrained_model(version, number))
            feed(daemon.client, 20 + 3 * number, 3)
            wait_for("the sweeps", lambda: daemon.status()["backlog"] == 0)
            seen.append(version_of(daemon.client))
        is_over.set()
        watcher.join()
        shown = daemon.client.get("/predictions/current")["predictions"]["a"]
    assert failures == []
    assert seen == ["20260115T100000Z-0001", "20260115T110000Z-0002"]
    assert shown["source"] == "model"
    assert len(shown["forecast"]["cpu_pct"]["p50"]) == 96


class WritesAFile:
    """What a malicious checkpoint would hold."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_bad_checkpoint_leaves_the_old_model_and_runs_no_code(tmp_path: Path) -> None:
    good, bad = "20260115T100000Z-0001", "20260115T110000Z-0002"
    trap = tmp_path / "trap"
    promote(tmp_path, good, untrained_model(good, 0))
    with InferenceDaemon(tmp_path, "--clock", "data") as daemon:
        wait_for("the model", lambda: daemon.status()["model"]["version"] == good)
        feed(daemon.client, 0, 16)
        for number, content in enumerate((pickle.dumps(WritesAFile(trap)), b"", os.urandom(5000))):
            promote(tmp_path, f"{bad}{number}", content)
            feed(daemon.client, 16 + 3 * number, 3)
            wait_for("the sweeps", lambda: daemon.status()["backlog"] == 0)
            assert version_of(daemon.client) == good
            assert f"{bad}{number}" in daemon.status()["model"]["problems"][0]
    assert not trap.exists()
    restarted = InferenceDaemon(tmp_path, "--clock", "data")
    with restarted:
        wait_for("the newest valid version", lambda: restarted.status()["model"]["version"] == good)
    assert not trap.exists()
