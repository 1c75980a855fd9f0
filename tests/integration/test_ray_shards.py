"""Shards as Ray actors, on a cluster of three nodes on this machine: nodes and processes are killed."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_shards import HORIZON, assert_same, champion, parts, wait_until_ready

from fleetcast.serving.model_loader import Champion
from fleetcast.serving.shards import OneProcess, Shards, make_engine
from fleetcast.settings import Settings

cluster_utils = pytest.importorskip("ray.cluster_utils", reason="requirements-cluster.txt is not installed")
pytestmark = pytest.mark.slow
MEMORY = 100 * 2**20  # of a node's object store
__all__ = ["champion"]  # the fixture


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Start a head without a CPU, which the daemon's machine is, and two nodes with one each."""
    made = cluster_utils.Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": MEMORY},
    )
    nodes = [made.add_node(num_cpus=1, object_store_memory=MEMORY) for _ in range(2)]
    yield made, nodes
    made.shutdown()


def started(address: str) -> Shards:
    own = Settings()
    forecast = replace(own.forecast, shards=2, engine="ray", ray_address=address)
    shards = make_engine(replace(own, forecast=forecast))
    assert isinstance(shards, Shards)
    shards.start()
    return shards


def test_forecasts_are_the_same_whatever_is_killed(cluster: Any, champion: Champion) -> None:
    made, nodes = cluster
    shards, alone = started(made.address), OneProcess(HORIZON)
    try:
        wait_until_ready(shards, 2)
        expected = list(alone.forecasts(iter(parts()), champion, with_rules=True))
        assert_same(list(shards.forecasts(iter(parts()), champion, with_rules=True)), expected)
        # a whole node is killed in a sweep
        answers = shards.forecasts(iter(parts(n_parts=20)), champion, with_rules=True)
        found = [next(answers)]
        made.remove_node(nodes.pop(), allow_graceful=False)
        began = time.monotonic()
        found += answers
        assert time.monotonic() - began < 60
        assert_same(found, list(alone.forecasts(iter(parts(n_parts=20)), champion, with_rules=True)))
        # another one comes, and gets the lost shard
        nodes.append(made.add_node(num_cpus=1, object_store_memory=MEMORY))
        wait_until_ready(shards, 2)
        assert shards.report() == {"wanted": 2, "ready": 2, "restarts": 1}
        # the process that speaks to the cluster is killed
        (bridge,) = {shard.pid for shard in shards._shards}
        os.kill(bridge, signal.SIGKILL)
        assert_same(list(shards.forecasts(iter(parts()), champion, with_rules=True)), expected)
        wait_until_ready(shards, 2)
        assert_same(list(shards.forecasts(iter(parts()), champion, with_rules=True)), expected)
        # the cluster itself is gone: the daemon forecasts by itself
        made.shutdown()
        assert_same(list(shards.forecasts(iter(parts()), champion, with_rules=True)), expected)
        (bridge, *_) = {shard.pid for shard in shards._shards} or {0}
    finally:
        shards.stop()
    assert not bridge or not psutil.pid_exists(bridge)


def test_where_there_is_no_cluster_the_daemon_forecasts_itself(champion: Champion, tmp_path: Path) -> None:
    shards = started("127.0.0.1:9")
    try:
        expected = list(OneProcess(HORIZON).forecasts(iter(parts()), champion, with_rules=True))
        assert_same(list(shards.forecasts(iter(parts()), champion, with_rules=True)), expected)
        assert shards.report()["ready"] == 0
    finally:
        shards.stop()
