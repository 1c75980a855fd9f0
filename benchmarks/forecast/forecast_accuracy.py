"""Does the forecaster beat a ruler, and its peers? On servers seen and unseen in training.

    python -m benchmarks.forecast.forecast_accuracy --data F --servers 40 --train-days 32 --test-days 20

Trains on the first days of some servers, tests on the days after, and on other servers that no
training saw. The training is the product's own (`fleetcast.training.fit`) with the default settings,
all epochs of it; nothing is tuned here. `--model FILE` tests a checkpoint as it is, without a training,
and `--rename odd_{}` under names that no training saw.
"better" is, per server, metric and horizon, the better of last value and same time yesterday on
the training days: the baseline to beat. "ours_feedback" is ours after the corrections that
settled forecasts make in the daemon. Peers: LightGBM where it is installed, the stock recipe with
`--stock-steps N`, statsforecast's MSTL with `--mstl` and neuralforecast's NHITS with `--nhits-steps N`
where `parts/nixtla.py` finds them (it tells how to install them); a column of n/a otherwise. Prints
tables, writes benchmarks/results/.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from benchmarks.forecast.parts import nixtla
from benchmarks.forecast.parts.lightgbm import LightGbm, available
from benchmarks.forecast.parts.nixtla import MSTL, NHITS, Mstl, Nhits, Timed
from benchmarks.forecast.parts.rounds import HORIZONS, OURS, OURS_FED, Forecasts, Walk, measured
from benchmarks.forecast.parts.stock import StockRecipe
from benchmarks.results_file import write_results
from fleetcast.forecast.checkpoint import ModelDescription
from fleetcast.forecast.encoding import GridShape
from fleetcast.forecast.network import NetworkConfig
from fleetcast.forecast.predictor import Forecaster
from fleetcast.settings import TrainerSettings
from fleetcast.training.fit import Fit, Resumable, StateFile, fit
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.sampler import WindowMix, WindowSampler

BIN_MS, DAY_BINS, HORIZON = 300_000, 288, 96
WARMUP_STEPS = 50
PREFERRED = (
    *("cpu_pct", "mem_pct", "disk_write_mb_s", "net_in_mb_s"),  # Bitbrains
    *("cpu_r_norm01", "mem_u_norm01", "disk_wb_norm01", "eth1_fi_norm01"),  # SMD
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; return 0."""
    options = _parser().parse_args(argv)
    metrics = tuple(options.metrics.split(",")) if options.metrics else PREFERRED
    grid = TrainingGrid.read(Path(options.data), metrics, BIN_MS)
    grid = replace(grid, metrics=tuple(options.rename.format(metric) for metric in grid.metrics))
    split = (options.skip_days + options.train_days) * DAY_BINS
    train = _part(grid, slice(options.servers), options.skip_days * DAY_BINS, split)
    stop = min(split + options.test_days * DAY_BINS, grid.n_bins)
    walk = Walk(split, stop, options.every, options.scored_every)
    files = {
        name: Path(path).name for name in ("data", "model", "save", "state") if (path := vars(options)[name])
    }
    asked = vars(options) | files
    report: dict[str, Any] = {"options": asked, "metrics": list(grid.metrics), "seeds": []}
    for seed in range(options.seeds):
        trainer = TrainerSettings(seed=TrainerSettings.seed + seed)
        cost: dict[str, float] = {}
        model = _ours(train, trainer, options, cost)
        peers = {} if options.without_peers else _peers(train, trainer.seed, options, cost)
        tables = {
            name: measured(_part(grid, servers, 0, grid.n_bins), model, peers, walk, split)
            for name, servers in _groups(options.servers).items()
            if len(grid.server_names[servers]) and options.only in (name, None)
        }
        costs = {"training_cpu_s": cost, "forecasts": _forecast_costs(peers)}
        report["seeds"].append({"seed": trainer.seed, **costs, **tables})
        for name, table in tables.items():
            _print(f"{name} servers, seed {trainer.seed}", table)
        print(f"training, CPU seconds: {cost}; of forecasts: {costs['forecasts']}")
    path = write_results(f"{options.name}_{Path(options.data).stem}", report)
    print(f"written: {path}")
    return 0


def _groups(n_server: int) -> dict[str, slice]:
    return {"seen": slice(n_server), "unseen": slice(n_server, None)}


def _part(grid: TrainingGrid, servers: slice, start: int, stop: int) -> TrainingGrid:
    names, values = grid.server_names[servers], grid.values[servers, :, start:stop]
    return replace(grid, server_names=names, values=values, start_ms=grid.start_ms + start * grid.bin_ms)


def _ours(
    grid: TrainingGrid, trainer: TrainerSettings, options: argparse.Namespace, cost: dict[str, float]
) -> Forecaster:
    if options.model:
        return Forecaster.load(Path(options.model), bin_ms=BIN_MS, horizon_bins=HORIZON)
    shape = GridShape(BIN_MS, HORIZON)
    network = NetworkConfig.for_grid(shape, trainer.hidden_size)
    description = ModelDescription("benchmark", "", grid.metrics, shape, network)
    held_from = np.full(grid.values.shape[:2], grid.n_bins, np.int64)
    sampler = WindowSampler(grid, shape, held_from, WindowMix(), trainer.seed)
    slots = [description.slot(metric) for metric in grid.metrics]
    plan = Fit(
        *(options.epochs, trainer.steps_per_epoch, trainer.learning_rate, WARMUP_STEPS),
        *(trainer.threads, trainer.seed, sys.stderr.isatty()),
    )
    began = process_time()
    weights = fit(
        network,
        shape,
        None,
        lambda: sampler.batch(trainer.batch_size, slots),
        plan,
        state=Resumable(StateFile(Path(options.state), repr((options.data, plan))), sampler)
        if options.state
        else None,
    )
    cost[OURS] = round(process_time() - began, 1)
    model = Forecaster(description, weights)
    if options.save:
        Path(options.save).write_bytes(model.to_bytes())
    return model


def _peers(
    train: TrainingGrid, seed: int, options: argparse.Namespace, cost: dict[str, float]
) -> Mapping[str, Forecasts]:
    peers: dict[str, Forecasts] = {}
    began = process_time()
    if available():
        peers["lightgbm"] = LightGbm(train, options.lightgbm_windows, seed)
        cost["lightgbm"], began = round(process_time() - began, 1), process_time()
    if options.stock_steps:
        metrics = tuple(options.stock_metrics.split(",")) if options.stock_metrics else train.metrics
        peers["stock"] = StockRecipe(train, metrics, options.stock_steps, seed)
        cost["stock"], began = round(process_time() - began, 1), process_time()
    if options.nhits_steps and nixtla.available(NHITS):
        peers[NHITS] = Timed(Nhits(train, options.nhits_steps, seed))
        cost[NHITS] = round(process_time() - began, 1)
    if options.mstl and nixtla.available(MSTL):
        peers[MSTL] = Timed(Mstl())
    return peers


def _forecast_costs(peers: Mapping[str, Forecasts]) -> dict[str, dict[str, float]]:
    """Return the CPU seconds of all forecasts of the peers that are timed, and of how many series."""
    timed = {name: peer for name, peer in peers.items() if isinstance(peer, Timed)}
    return {name: {"cpu_s": round(peer.cpu_s, 1), "n_series": peer.n_series} for name, peer in timed.items()}


def _print(title: str, table: dict[str, Any]) -> None:
    print(f"\n{title}: MAE relative to last value | WAPE, 80 % coverage of ours with feedback")
    names = list(table)
    print(f"{'metric':18s}{'horizon':9s}" + "".join(f"{name:>14s}" for name in names) + "     WAPE    cov")
    for metric in table[OURS]:
        for horizon in HORIZONS:
            cells = [table[name][metric] and table[name][metric][horizon]["relative_mae"] for name in names]
            fed = table[OURS_FED][metric][horizon]
            row = "".join(f"{'n/a' if cell is None else format(cell, '.3f'):>14s}" for cell in cells)
            print(f"{metric:18s}{horizon:9s}{row}{fed['wape'] or 0:9.3f}{fed['coverage'] or 0:7.3f}")
    missing = [name for name in ("lightgbm", "stock", NHITS, MSTL) if name not in names]
    if missing:
        print(f"{', '.join(missing)}: n/a")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="forecast_accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="F", help="parquet: timestamp, server_name, metrics")
    parser.add_argument("--metrics", help="comma separated; default: the usual ones, if present")
    parser.add_argument("--rename", default="{}", metavar="F", help="of metrics, such as {}_odd")
    parser.add_argument(
        "--servers", type=int, default=40, metavar="N", help="trained on; the others are unseen"
    )
    parser.add_argument("--skip-days", type=int, default=0, metavar="S", help="days before the training days")
    parser.add_argument("--train-days", type=int, default=30, metavar="A")
    parser.add_argument("--test-days", type=int, default=20, metavar="B")
    parser.add_argument("--seeds", type=int, default=1, metavar="K")
    parser.add_argument("--epochs", type=int, default=TrainerSettings.base_epochs)
    parser.add_argument("--model", metavar="FILE", help="a checkpoint to test instead of training one")
    parser.add_argument("--name", default="forecast_accuracy", help="of the results, before the data's")
    parser.add_argument("--save", metavar="FILE", help="keep the trained checkpoint")
    parser.add_argument("--state", metavar="FILE", help="note each epoch here; a stopped training goes on")
    parser.add_argument("--every", type=int, default=4, help="bins between two origins of a server")
    parser.add_argument("--scored-every", type=int, default=5, help="of those, every how many-th is scored")
    parser.add_argument("--without-peers", action="store_true", help="ours and the naive forecasts only")
    parser.add_argument("--lightgbm-windows", type=int, default=10_000)
    parser.add_argument("--stock-steps", type=int, default=0, help="steps of the stock recipe; 0: n/a")
    parser.add_argument("--nhits-steps", type=int, default=0, help="steps of NHITS; 0: n/a")
    parser.add_argument("--mstl", action="store_true", help="fit MSTL at every scored origin")
    parser.add_argument("--only", choices=sorted(_groups(0)), help="score these servers alone")
    parser.add_argument("--stock-metrics", help="what it is trained for, comma separated; default: all")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
