"""Make the base model that ships in models/: what a fresh install forecasts with before its own training.

    python -m benchmarks.forecast.base_model --data smd_1min.parquet

Half of the windows are recorded: the Server Machine Dataset in long form (MIT, models/LICENSE-smd.txt),
all machines and days: columns `timestamp`, `server_name` and the authors' metrics scaled to 0..1 per
machine. What they were before is unknown, and a fleet's own units are unknown as well, so each machine
is shown several times at sizes drawn at random: percents as 20 to 100 times the share, rates over three
powers of ten. The other half is drawn by seed (`parts/synthetic.py`): trends, leaks, saw-teeth, jobs,
regimes, walks. Recorded fleets hardly show them, and a model that never saw a trend forecasts its end.
The training is the product's, with the default settings but for its length; the result replaces what is
in models/.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.forecast.parts.synthetic import synthetic_fleet
from benchmarks.results_file import ROOT, machine, revision
from fleetcast.bins import DAY_BINS
from fleetcast.clock import SystemClock, from_ms, iso_z, monotonic
from fleetcast.forecast.checkpoint import ModelDescription
from fleetcast.forecast.encoding import GridShape, is_percent
from fleetcast.forecast.network import NetworkConfig
from fleetcast.forecast.predictor import Forecaster
from fleetcast.forecast.registry import MODEL_FILE, VERSIONS_FOLDER, Registry, new_version_id
from fleetcast.settings import TrainerSettings
from fleetcast.training.fit import Fit, fit
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.sampler import TrainingBatch, WindowMix, WindowSampler

BIN_MS, HORIZON, WARMUP_STEPS = 300_000, 96, 50
# metric of a fleet: the columns that behave like it, taken in turn
SOURCES = {
    "cpu_pct": ("cpu_r_norm01", "cpu_r_norm01", "load_1_norm01", "cpu_r_norm01"),
    "mem_pct": ("mem_u_norm01",),
    "disk_io_mb_s": ("disk_wb_norm01", "disk_rb_norm01"),
    "latency_ms": ("disk_svc_norm01",),
    "disk_read_mb_s": ("disk_rb_norm01",),
    "disk_write_mb_s": ("disk_wb_norm01",),
    "net_in_mb_s": ("eth1_fi_norm01",),
    "net_out_mb_s": ("eth1_fo_norm01",),
}
SIZES = 4  # times each machine is shown
PERCENTS, RATES = (
    (20.0, 100.0),
    (0.1, 100.0),
)  # what a share of 1 becomes, drawn evenly / evenly in its logarithm
EPOCHS = 36  # half of it recorded windows: 18 epochs of them, where a fleet's own first training has 16
SYNTHETIC_SHARE, SYNTHETIC_SERVERS, SYNTHETIC_DAYS = 0.5, 400, 12
# a server's series: percents as often as rates
SYNTHETIC_METRICS = (*("cpu_pct", "mem_pct") * 3, *(name for name in SOURCES if not is_percent(name)))


def main(argv: Sequence[str] | None = None) -> int:
    """Train and write models/; return 0."""
    options = _parser().parse_args(argv)
    trainer = TrainerSettings()
    columns = tuple(dict.fromkeys(column for sources in SOURCES.values() for column in sources))
    fleet = resized(TrainingGrid.read(Path(options.data), columns, BIN_MS), trainer.seed)
    now, started = SystemClock().now(), monotonic()
    shape = GridShape(BIN_MS, HORIZON)
    network = NetworkConfig.for_grid(shape, trainer.hidden_size)
    description = ModelDescription(new_version_id(now), iso_z(now), fleet.metrics, shape, network)
    plan = Fit(
        *(options.epochs, trainer.steps_per_epoch, trainer.learning_rate, WARMUP_STEPS),
        *(trainer.threads, trainer.seed, sys.stderr.isatty()),
    )
    model = Forecaster(description, _weights(fleet, description, plan, trainer.batch_size))
    manifest = {
        "created_at": iso_z(now),
        "parent": None,
        "kind": "base",
        "promoted": True,
        "data": f"{Path(options.data).name}: Server Machine Dataset (NetManAIOps), MIT; synthetic processes",
        "command": f"python -m benchmarks.forecast.base_model --data {Path(options.data).name}",
        "revision": revision(),
        "machine": machine(),
        "data_range": {"start": iso_z(from_ms(fleet.start_ms)), "end": iso_z(from_ms(fleet.end_ms))},
        "servers": len(fleet.server_names) // SIZES,
        "metrics": list(fleet.metrics),
        "training": {**asdict(plan), "took_s": round(monotonic() - started, 1)},
        "schema": {"grid": shape.as_config(), "network": network.as_config()},
    }
    folder = Path(options.models_dir)
    shutil.rmtree(folder / VERSIONS_FOLDER, ignore_errors=True)
    registry = Registry(folder)
    registry.add(description.version, {MODEL_FILE: model.to_bytes()}, manifest)
    registry.promote(description.version)
    print(f"written: {folder / VERSIONS_FOLDER / description.version}")
    return 0


def resized(shares: TrainingGrid, seed: int) -> TrainingGrid:
    """Return every machine at several sizes, as the metrics of a fleet.

    Args:
        shares: metrics are the columns of `SOURCES`, 0..1.
    """
    random = np.random.default_rng(seed)
    n_server, _, n_bins = shares.values.shape
    values = np.empty((SIZES, n_server, len(SOURCES), n_bins), np.float32)
    for row, (metric, sources) in enumerate(SOURCES.items()):
        low, high = PERCENTS if is_percent(metric) else RATES
        drawn = random.random((SIZES, n_server, 1))
        sizes = low + (high - low) * drawn if is_percent(metric) else low * (high / low) ** drawn
        for turn in range(SIZES):
            column = shares.metrics.index(sources[turn % len(sources)])
            values[turn, :, row] = shares.values[:, column] * sizes[turn]
    names = tuple(f"{name}-{turn}" for turn in range(SIZES) for name in shares.server_names)
    whole = values.reshape(SIZES * n_server, len(SOURCES), n_bins)
    return replace(shares, server_names=names, metrics=tuple(SOURCES), values=whole)


def joined(batches: Sequence[TrainingBatch]) -> TrainingBatch:
    """Return the windows of several batches as one."""
    return cast(TrainingBatch, _join(batches))


def _join(items: Sequence[Any]) -> Any:
    first = items[0]
    if isinstance(first, np.ndarray):
        return np.concatenate(items)
    names = [field.name for field in fields(first)]
    return type(first)(**{name: _join([getattr(item, name) for item in items]) for name in names})


def _weights(
    fleet: TrainingGrid, description: ModelDescription, plan: Fit, batch_size: int
) -> dict[str, Any]:
    n_drawn = round(batch_size * SYNTHETIC_SHARE)
    n_bins = SYNTHETIC_DAYS * DAY_BINS
    drawn = synthetic_fleet(SYNTHETIC_METRICS, SYNTHETIC_SERVERS, n_bins, plan.seed)
    recorded, synthetic = _batches(fleet, description, plan.seed), _batches(drawn, description, plan.seed + 1)

    def draw() -> TrainingBatch:
        return joined([recorded(batch_size - n_drawn), synthetic(n_drawn)])

    return fit(description.network, description.grid, None, draw, plan)


def _batches(grid: TrainingGrid, description: ModelDescription, seed: int) -> Callable[[int], TrainingBatch]:
    """Return what draws so many windows of the whole grid."""
    held_from = np.full(grid.values.shape[:2], grid.n_bins, np.int64)
    sampler = WindowSampler(grid, description.grid, held_from, WindowMix(), seed)
    slots = [description.slot(metric) for metric in grid.metrics]
    return lambda size: sampler.batch(size, slots)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="base_model", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="F", help="the Server Machine Dataset in long form")
    parser.add_argument("--models-dir", default=str(ROOT / "models"), metavar="DIR")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
