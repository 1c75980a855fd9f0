"""A trainer for tests of processes: takes the real one's flags and ends as it is told.

What it shall do stands in `stand_in.txt` in the working directory. It writes versions and
verdicts through the real Registry, in the real trainer's order; only the model is no model.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np

from fleetcast.clock import SystemClock, from_ms, iso_z, sleep
from fleetcast.drift.literal.baseline import Baseline
from fleetcast.errors import AlreadyRunning
from fleetcast.files import write_json
from fleetcast.forecast.registry import BASELINE_FILE, MODEL_FILE, TRAINER_LOCK, Registry, new_version_id
from fleetcast.locks import OwnerLock
from fleetcast.settings import BinSettings
from fleetcast.training.grid import TrainingGrid

GIGABYTE = 2**30


def main() -> int:
    """Do what `stand_in.txt` says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--incremental", action="store_true")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--checkpoint-dir", default="checkpoints")
    options = parser.parse_args()
    order = Path("stand_in.txt").read_text().strip()
    print(f"stand-in: {order}, data {Path(options.data).exists()}", flush=True)
    registry = Registry(Path(options.checkpoint_dir))
    attempt_id = os.environ["TFT_ATTEMPT_ID"]
    try:
        lock = OwnerLock(registry.folder / TRAINER_LOCK, "the trainer's lock").acquire()
    except AlreadyRunning as error:
        print(error)
        return int(error.exit_code)
    with lock:
        if order == "wait":
            while Path("stand_in.txt").read_text().strip() == "wait":
                sleep(0.05)
            order = Path("stand_in.txt").read_text().strip()
        return _end(order, registry, attempt_id, Path(options.data))


def _end(order: str, registry: Registry, attempt_id: str, data: Path) -> int:
    if order == "crash":
        raise RuntimeError("out of luck")
    if order == "hang":
        sleep(3600)
    if order == "gigabyte":
        block = (b"x" * 99 + b"\n") * 10_000
        for _ in range(GIGABYTE // len(block)):
            sys.stdout.buffer.write(block)
    if order == "not enough":
        print("data span 1.0 h of 48 h", flush=True)
        return 5
    if order in ("promoted", "rejected", "held", "promoted without a word", "promised"):
        _leave_version(order, registry, attempt_id, data)
    return 0


def _leave_version(order: str, registry: Registry, attempt_id: str, data: Path) -> None:
    now = SystemClock().now()
    version, promoted = new_version_id(now), order not in ("rejected", "held")
    if order != "promised":
        baseline, data_range = _baseline(data, version)
        contents = {MODEL_FILE: b"no model", BASELINE_FILE: baseline.to_bytes()}
        made = {"created_at": iso_z(now), "attempt_id": attempt_id, "promoted": promoted}
        made |= {"data_range": data_range}
        registry.add(version, contents, made)
        if promoted:
            registry.promote(version)
        registry.set_baseline(version)
    if order == "promoted without a word":
        os.kill(os.getpid(), 9)
    folder = registry.folder / "attempts"
    folder.mkdir(exist_ok=True)
    verdict = {"attempt_id": attempt_id, "promoted": promoted, "version": version, "why": "told so"}
    if order == "held":
        verdict["passed_gate"] = True
    write_json(folder / f"{attempt_id}.json", verdict)


def _baseline(data: Path, version: str) -> tuple[Baseline, dict[str, str]]:
    """Return a baseline of the newest 60 bins of the export, as after a change, and its range."""
    if not data.exists():
        flat = np.linspace(0, 100, 500, dtype=np.float32).reshape(1, 1, -1)
        return Baseline.from_grid(flat, 0, BinSettings().bin_s * 1000, ("a",), ("cpu_pct",), version), {}
    grid = TrainingGrid.read(data, BinSettings().forecast_metrics, BinSettings().bin_s * 1000)
    start_ms = grid.end_ms - 60 * grid.bin_ms
    newest = grid.values[:, :, -60:]
    made = Baseline.from_grid(newest, start_ms, grid.bin_ms, grid.server_names, grid.metrics, version)
    return made, {"start": iso_z(from_ms(grid.start_ms)), "end": iso_z(from_ms(grid.end_ms))}


if __name__ == "__main__":
    raise SystemExit(main())
