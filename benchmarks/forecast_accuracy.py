"""Does the forecaster beat a ruler? Ours against naive forecasts, on servers seen and unseen.

    python -m benchmarks.forecast_accuracy --data F --servers 40 --train-days 32 --test-days 20 --seeds 1

Trains on the first days of some servers, tests on the days after, and on other servers that no
training saw. The training is the product's own (`fleetcast.model.training`); nothing is tuned here.
"better" is, per server, metric and horizon, the better of last value and same time yesterday on
the training days: the baseline to beat. Prints a table, writes benchmarks/results/.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.forecast_scores import HORIZONS, Sums, scores
from benchmarks.results_file import write_results
from fleetcast.clock import monotonic
from fleetcast.model.forecaster import Forecaster, ModelDescription
from fleetcast.model.gridshape import GridShape
from fleetcast.model.network import NetworkConfig
from fleetcast.model.sampler import WindowMix, WindowSampler
from fleetcast.model.traingrid import TrainingGrid
from fleetcast.model.training import Fit, fit
from fleetcast.schema import Floats32, HistoryWindow
from fleetcast.serving.fallback import NaiveForecaster
from fleetcast.settings import TrainerSettings

BIN_MS, DAY_BINS, HORIZON = 300_000, 288, 96
PEERS_NOT_INSTALLED = ("lightgbm", "stock_tft")  # columns of n/a: they are not among our requirements
PREFERRED = (
    *("cpu_pct", "mem_pct", "disk_write_mb_s", "net_in_mb_s"),  # Bitbrains
    *("cpu_r_norm01", "mem_u_norm01", "disk_wb_norm01", "eth1_fi_norm01"),  # SMD
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; return 0."""
    options = _parser().parse_args(argv)
    metrics = tuple(options.metrics.split(",")) if options.metrics else PREFERRED
    grid = TrainingGrid.read(Path(options.data), metrics, BIN_MS)
    split = (options.skip_days + options.train_days) * DAY_BINS
    train = _part(grid, slice(options.servers), options.skip_days * DAY_BINS, split)
    stop = min(split + options.test_days * DAY_BINS, grid.n_bins)
    origins = np.linspace(split, stop - HORIZON - 1, options.origins).round().astype(int)
    groups = {"seen": slice(options.servers), "unseen": slice(options.servers, None)}
    asked = vars(options) | {"data": Path(options.data).name}
    report: dict[str, Any] = {"options": asked, "metrics": list(grid.metrics), "seeds": []}
    for seed in range(options.seeds):
        trainer = TrainerSettings(seed=TrainerSettings.seed + seed)
        started = monotonic()
        model = _trained(train, trainer, options.epochs)
        took = round(monotonic() - started, 1)
        measured = {
            name: _measured(_part(grid, servers, 0, grid.n_bins), model, origins, split)
            for name, servers in groups.items()
            if len(grid.server_names[servers])
        }
        report["seeds"].append({"seed": trainer.seed, "training_wall_s": took, **measured})
        for name, table in measured.items():
            _print(f"{name} servers, seed {trainer.seed}, trained in {took} s", table)
    path = write_results(f"forecast_accuracy_{Path(options.data).stem}", report)
    print(f"written: {path}")
    return 0


def _part(grid: TrainingGrid, servers: slice, start: int, stop: int) -> TrainingGrid:
    names, values = grid.server_names[servers], grid.values[servers, :, start:stop]
    return replace(grid, server_names=names, values=values, start_ms=grid.start_ms + start * grid.bin_ms)


def _trained(grid: TrainingGrid, trainer: TrainerSettings, epochs: int) -> Forecaster:
    shape = GridShape(BIN_MS, HORIZON)
    network = NetworkConfig.for_grid(shape, trainer.hidden_size)
    description = ModelDescription("benchmark", "", grid.metrics, shape, network)
    held_from = np.full(grid.values.shape[:2], grid.n_bins, np.int64)
    sampler = WindowSampler(grid, shape, held_from, WindowMix(), trainer.seed)
    slots = [description.slot(metric) for metric in grid.metrics]
    steps, rate = trainer.steps_per_epoch, trainer.learning_rate
    plan = Fit(epochs, steps, rate, 50, trainer.threads, trainer.seed, sys.stderr.isatty())
    return Forecaster(
        description, fit(network, shape, None, lambda: sampler.batch(trainer.batch_size, slots), plan)
    )


def _measured(grid: TrainingGrid, model: Forecaster, origins: NDArray[Any], split: int) -> dict[str, Any]:
    """Return the scores of every forecaster on one group of servers."""
    shape = (*grid.values.shape[:2], HORIZON)
    prefers_yesterday = _prefers_yesterday(grid.values[:, :, :split])
    sums = {name: Sums.empty(shape) for name in ("last", "yesterday", "better", "fallback", "ours")}
    counts, sizes = np.zeros(shape), np.zeros(shape)
    naive = NaiveForecaster(HORIZON)
    for origin in origins:
        window = HistoryWindow(
            grid.server_names,
            grid.metrics,
            grid.values[:, :, max(0, origin - 2303) : origin + 1],
            grid.start_ms + int(origin) * BIN_MS,
            BIN_MS,
        )
        actual = grid.values[:, :, origin + 1 : origin + 1 + HORIZON]
        last = np.repeat(grid.values[:, :, origin, None], HORIZON, axis=2)
        yesterday = grid.values[:, :, origin + 1 - DAY_BINS : origin + 1 - DAY_BINS + HORIZON]
        forecasts: dict[str, Floats32] = {
            "last": last[..., None],
            "yesterday": yesterday[..., None],
            "better": np.where(prefers_yesterday, yesterday, last)[..., None],
            "fallback": naive.predict(window),
            "ours": model.predict(window),
        }
        known = np.isfinite(actual)
        for forecast in forecasts.values():  # the same windows for everybody
            known &= np.isfinite(forecast).all(axis=-1)
        counts += known
        sizes += np.where(known, np.abs(actual), 0.0)
        for name, forecast in forecasts.items():
            sums[name].add(forecast, actual, known)
    steps = np.nan_to_num(_mean(np.abs(np.diff(grid.values[:, :, :split], axis=2))))
    table: dict[str, Any] = dict(scores(sums, counts, sizes, steps, grid.metrics))
    return table | dict.fromkeys(PEERS_NOT_INSTALLED, "n/a")


def _prefers_yesterday(past: Floats32) -> NDArray[np.bool_]:
    """Return where same time yesterday beat the last value on the training days."""
    better = np.zeros((*past.shape[:2], HORIZON), np.bool_)
    for horizon in range(1, HORIZON + 1):
        actual = past[:, :, DAY_BINS:]
        by_yesterday = _mean(np.abs(actual - past[:, :, :-DAY_BINS]))
        by_last = _mean(np.abs(actual - past[:, :, DAY_BINS - horizon : -horizon]))
        better[..., horizon - 1] = by_yesterday < by_last
    return better


def _mean(values: Floats32) -> NDArray[np.float64]:
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis=-1, dtype=np.float64)
    return np.asarray(total / np.maximum(known.sum(axis=-1), 1))


def _print(title: str, table: dict[str, Any]) -> None:
    print(f"\n{title}: MAE relative to last value | WAPE | 80 % coverage")
    names = [name for name, rows in table.items() if rows != "n/a"]
    print(
        f"{'metric':18s}{'horizon':9s}"
        + "".join(f"{name:>12s}" for name in names)
        + f"{'WAPE':>9s}{'cov':>7s}"
    )
    for metric in table["ours"]:
        for horizon in HORIZONS:
            cells = [table[name][metric][horizon]["relative_mae"] for name in names]
            ours = table["ours"][metric][horizon]
            row = "".join(f"{'n/a' if cell is None else format(cell, '.3f'):>12s}" for cell in cells)
            print(f"{metric:18s}{horizon:9s}{row}{ours['wape'] or 0:9.3f}{ours['coverage'] or 0:7.3f}")
    print(f"{', '.join(PEERS_NOT_INSTALLED)}: n/a")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="forecast_accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="F", help="parquet: timestamp, server_name, metrics")
    parser.add_argument("--metrics", help="comma separated; default: the usual ones, if present")
    parser.add_argument(
        "--servers", type=int, default=40, metavar="N", help="trained on; the others are unseen"
    )
    parser.add_argument("--skip-days", type=int, default=0, metavar="S", help="days before the training days")
    parser.add_argument("--train-days", type=int, default=30, metavar="A")
    parser.add_argument("--test-days", type=int, default=20, metavar="B")
    parser.add_argument("--seeds", type=int, default=1, metavar="K")
    parser.add_argument("--epochs", type=int, default=TrainerSettings.base_epochs)
    parser.add_argument("--origins", type=int, default=86, help="forecasts made per server in the test days")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
