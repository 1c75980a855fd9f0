"""`make cluster-demo`: a daemon with shards on two Ray nodes of this machine; one node is killed; an account.

    python -m benchmarks.loop.cluster_demo [--copies 80] [--hours 5]

The bundled sample's eight machines, each under many names, are fed bin by bin under the data clock. Half-way
a whole node is killed, a new one joins later. At the end the same feed goes to a daemon without shards.
Exit 0 only if both say the same: every record stored, every forecast that was due settled once, and no
forecast different by more than 1e-3; and if the shard of the killed node was lost and came back.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.programs import InferenceDaemon, wait_for
from benchmarks.results_file import ROOT
from data_buffer import DataBuffer
from fleetcast.clock import iso_z, monotonic

SAMPLE = ROOT / "samples" / "smd_fleet.parquet"
NODE_MEMORY = 150 * 2**20
MOST_DIFFERENT = 1e-3
Account = dict[tuple[Any, ...], tuple[float, float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Play it; return 0 if everything is true that should be."""
    parser = argparse.ArgumentParser(prog="cluster_demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--copies", type=int, default=80, help="names of each machine: a part holds 256")
    parser.add_argument("--hours", type=float, default=5.0, help="recorded hours that are fed")
    options = parser.parse_args(argv)
    try:
        from ray.cluster_utils import Cluster
    except ImportError:
        print("Ray is not installed: pip install --no-deps --require-hashes -r requirements-cluster.txt")
        return 2
    bins = list(_bins(options.copies, round(options.hours * 12)))
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / kind for kind in ("ray", "local")]
        for folder in folders:
            folder.mkdir()
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": NODE_MEMORY}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            found = _play(folders[0], bins, cluster)
        finally:
            cluster.shutdown()
        _say("the same feed to a daemon without shards")
        expected = _play(folders[1], bins, None)
        claims = _claims(found, expected, [_settled(folder) for folder in folders], len(bins))
    for text, is_true in claims:
        print(f"{'yes' if is_true else 'NO ':4s}{text}")
    return 0 if all(is_true for _, is_true in claims) else 1


def _bins(copies: int, n_bins: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the records of one bin after the other: each machine's mean of it, under all its names."""
    frame = pd.read_parquet(SAMPLE)
    frame = frame.assign(cpu_pct=frame.cpu_r_norm01 * 100, mem_pct=frame.mem_u_norm01 * 100)
    frame["bin"] = frame.timestamp.dt.floor("5min")
    means = frame.groupby(["bin", "server_name"])[["cpu_pct", "mem_pct"]].mean().round(3)
    for start in means.index.levels[0][:n_bins]:
        yield [
            {"timestamp": iso_z(start.to_pydatetime()), "server_name": f"{server}-{copy:02}", **row}
            for server, row in means.loc[start].to_dict("index").items()
            for copy in range(copies)
        ]


def _play(folder: Path, bins: list[list[dict[str, Any]]], cluster: Any) -> dict[str, Any]:
    """Feed a daemon; kill a node of the cluster half-way. Return its last status."""
    flags = ["--clock", "data"]
    environ = {}
    nodes: list[Any] = []
    if cluster is not None:
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=NODE_MEMORY) for _ in range(2)]
        flags += ["--engine", "ray", "--shards", "2"]
        environ = {"FLEETCAST_FORECAST_RAY_ADDRESS": cluster.address}
    with InferenceDaemon(folder, *flags, environ=environ) as daemon:
        wait_for("the model", lambda: daemon.status()["model"]["version"] is not None)
        if cluster is not None:
            wait_for("two shards", partial(_has_shards, daemon, 2), 120)
            _say("two shards are ready, each on a node of its own")
        for number, records in enumerate(bins):
            wait_for("the records to be taken", partial(daemon.takes, records), 120)
            if cluster is not None and number == len(bins) // 2:
                cluster.remove_node(nodes.pop(), allow_graceful=False)
                _say(f"a node is killed after {number + 1} bins")
            if cluster is not None and number == 3 * len(bins) // 4:
                nodes.append(cluster.add_node(num_cpus=1, object_store_memory=NODE_MEMORY))
                _say(f"another node joins after {number + 1} bins")
        wait_for("the sweeps", lambda: daemon.status()["backlog"] == 0, 120)
        if cluster is not None:
            wait_for("the second shard", partial(_has_shards, daemon, 2), 120)
        status = daemon.status()
        assert daemon.stop() == 0, daemon.output
    return status


def _has_shards(daemon: InferenceDaemon, n: int) -> bool:
    return bool(daemon.status()["sweep"]["shards"]["ready"] == n)


def _settled(folder: Path) -> Account:
    """Return what was forecast and what came, by origin, horizon, server and metric; each once."""
    rows = DataBuffer(folder / "data_buffer", expire=False).read_predictions(0, 2**45)
    keys = zip(rows.origin_ms, rows.horizon, rows.server_name, rows.metric, strict=True)
    found = dict(zip(keys, zip(rows.p50, rows.actual, strict=True), strict=True))
    return found if len(found) == len(rows) else {}


def _claims(
    found: dict[str, Any], expected: dict[str, Any], settled: list[Account], n_bins: int
) -> list[tuple[str, bool]]:
    ours, theirs = settled
    common = [key for key in theirs if key in ours]
    values = np.array([(ours[key], theirs[key]) for key in common]).reshape(-1, 2, 2)
    most = float(np.nanmax(np.abs(values[:, 0] - values[:, 1]), initial=0.0))
    n_sweeps = [status["sweep"]["count"] for status in (found, expected)]
    stored = [status["buffer"]["total_records"] for status in (found, expected)]
    shards = found["sweep"]["shards"]
    return [
        (f"{stored[0]:,} records are stored, without shards {stored[1]:,}", stored[0] == stored[1] > 0),
        (f"{len(ours):,} forecasts are settled, each once, as without shards", ours.keys() == theirs.keys()),
        (f"the accounts are equal: {found['ledger']}", found["ledger"] == expected["ledger"]),
        (f"forecasts differ by {most:.1g} at most", bool(ours) and most <= MOST_DIFFERENT),
        (f"{n_sweeps[0]} sweeps of {n_bins} bins, without shards {n_sweeps[1]}", n_sweeps[0] == n_sweeps[1]),
        (f"shards of the killed node came back: {shards}", shards["restarts"] >= 1 and shards["ready"] == 2),
    ]


_BEGAN = monotonic()


def _say(text: str) -> None:
    print(f"[{monotonic() - _BEGAN:4.0f} s] {text}", file=sys.stdout, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
