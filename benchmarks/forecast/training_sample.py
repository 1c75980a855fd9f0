"""A fleet too large to train on whole: what a training by sample costs, and what it forecasts worse.

    python -m benchmarks.forecast.training_sample --cost [--servers 2000 100000] [--days 3]

stores sealed days of one record per server and bin, then runs the two commands of a training (the export,
and the trainer with one epoch from the shipped base) for each size of fleet, with `trainer.max_cells` as
many as the first size has. Told are seconds, and the highest memory, of each command.

    python -m benchmarks.forecast.training_sample --data FLEET.parquet [--share 0.33] [--seeds 2]

trains the product's first model of a recorded fleet twice: on all servers, and on a sample. Both forecast
the days after of the servers that the sample left out. Told is their error relative to repeating the last
value (geometric mean over series), of the model alone and as clients get it, after the expert layer.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.forecast.large_fleet import store_days
from benchmarks.forecast.parts.training_rounds import write_export
from benchmarks.loop.loop_replay import BITBRAINS_MAPS
from benchmarks.loop.parts.fleet import DAY, HISTORY_DAYS, ReplayFleet, natural, recorded_grid
from benchmarks.loop.parts.record import forecast_stretch
from benchmarks.loop.parts.run import trained
from benchmarks.loop.parts.scores import errors
from benchmarks.loop.parts.served import SceneRules, serve
from benchmarks.results_file import ROOT, write_results
from fleetcast.forecast.predictor import Forecaster, set_threads
from fleetcast.forecast.registry import Registry
from fleetcast.training.grid import TrainingGrid

BASE = ROOT / "models" / "last.ckpt"
EXPORT = "training_data_incremental.parquet"
_METRICS, _BIN_S = 4, 300


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cost", action="store_true", help="measure what it costs, on made fleets")
    parser.add_argument("--servers", type=int, nargs="+", default=[2_000, 100_000])
    parser.add_argument("--days", type=int, default=3, help="stored days of a made fleet")
    parser.add_argument("--data", type=Path, help="measure the forecasts, on this recorded fleet")
    parser.add_argument("--map", nargs="+", default=list(BITBRAINS_MAPS))
    parser.add_argument("--share", type=float, default=0.33, help="of the servers that the sample holds")
    parser.add_argument("--test-days", type=int, default=7)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args(argv)
    if not options.cost and options.data is None:
        parser.error("--cost or --data FILE is needed")
    if options.cost:
        print(write_results("training_sample_cost", cost(options.servers, options.days)))
    if options.data is not None:
        set_threads(1)
        rows = accuracy(options)
        print(write_results(f"training_sample_{options.data.stem}", {"rows": rows}))
    return 0


def cost(sizes: Sequence[int], days: int) -> dict[str, Any]:
    """Return what the commands of a training take in fleets of several sizes."""
    cells = sizes[0] * _METRICS * (days * 86_400 // _BIN_S + 3)  # the open day's first ten minutes, too
    environ = {"FLEETCAST_TRAINER_MAX_CELLS": str(cells), "FLEETCAST_CLOCK_MODE": "data"}
    found: dict[str, Any] = {"days": days, "max_cells": cells, "fleets": []}
    for n_servers in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            stored = store_days(folder / "data_buffer", n_servers, days, _BIN_S)
            daemon, trainer = ROOT / "adaptive_retraining_daemon.py", ROOT / "tft_trainer.py"
            export = _run(folder, environ, daemon, "--export", EXPORT)
            training = _run(folder, environ, trainer, "--data", EXPORT, "--incremental", "--epochs", "1")
            fleet = {"servers": n_servers, "rows_a_day": stored["rows_a_day"], "export": export}
            fleet |= {"training": training, "export_mb": round((folder / EXPORT).stat().st_size / 1e6, 1)}
        print(json.dumps(fleet), flush=True)
        found["fleets"].append(fleet)
    return found


def _run(folder: Path, environ: Mapping[str, str], program: Path, *flags: str) -> dict[str, Any]:
    """Run a program in a folder to its end; return what that took."""
    settings = folder / "fleetcast.toml"
    settings.write_text("[trainer]\nbase_epochs = 1\n")
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(program), *flags], cwd=folder, env={**os.environ, **environ}
    )
    peak_kb = ended = 0
    while not ended:  # ru_maxrss would count what this process held when it started the child
        peak_kb = max(peak_kb, _peak_kb(process.pid))
        time.sleep(0.02)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{program.name} {' '.join(flags)} ended with {process.returncode}")
    return {
        "wall_s": round(time.monotonic() - began, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(peak_kb / 1024),
    }


def _peak_kb(pid: int) -> int:
    """Return the highest resident memory so far, 0 of a process that has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def accuracy(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the errors of both trainings, a row a seed."""
    grid = recorded_grid(options.data, options.map, slice(None), HISTORY_DAYS + options.test_days)
    begin, rows = HISTORY_DAYS * DAY, []
    history = replace(grid, values=grid.values[:, :, :begin])
    for seed in range(options.seeds):
        chosen = np.random.default_rng(seed).permutation(len(grid.server_names))
        n_chosen = round(len(chosen) * options.share)
        rest = _servers(grid, sorted(chosen[n_chosen:].tolist()))
        fleet = natural(rest, begin, None)
        rules = SceneRules.compute(fleet)
        row: dict[str, Any] = {"seed": seed, "trained_on": n_chosen, "of": len(chosen)}
        models = {
            "base": Forecaster.load(BASE.resolve()),
            "all": _model(history, seed),
            "sample": _model(_servers(history, sorted(chosen[:n_chosen].tolist())), seed),
        }
        for name, model in models.items():
            row[name] = _errors(fleet, rules, model)
            print(seed, name, row[name], flush=True)
        rows.append(row)
    return rows


def _servers(grid: TrainingGrid, places: Sequence[int]) -> TrainingGrid:
    names = tuple(grid.server_names[place] for place in places)
    return replace(grid, server_names=names, values=grid.values[list(places)])


def _model(grid: TrainingGrid, seed: int) -> Forecaster:
    """Return a fleet's first model, trained as the product does, whatever the gate says of it."""
    with tempfile.TemporaryDirectory() as name:
        folder, before = Path(name), Path.cwd()
        config = folder / "fleetcast.toml"
        metrics = ", ".join(f'"{metric}"' for metric in grid.metrics)
        config.write_text(
            f'[paths]\nmodels_dir = "{BASE.parent}"\n[bins]\nforecast_metrics = [{metrics}]\n'
            f"[trainer]\nseed = {7 + seed}\n"
        )
        write_export(folder / EXPORT, grid)
        os.chdir(folder)
        try:
            trained(folder / EXPORT, folder / "checkpoints", config)
        finally:
            os.chdir(before)
        registry = Registry(folder / "checkpoints")
        return Forecaster.load(registry.version(registry.version_ids()[-1]).model_path)


def _errors(fleet: ReplayFleet, rules: SceneRules, model: Forecaster) -> dict[str, float]:
    raw = forecast_stretch(model, fleet, fleet.begin, fleet.grid.n_bins)
    served = serve(fleet, rules, raw)
    return {
        "raw": errors(fleet, raw[..., 1])["all"]["mean"],
        "served": errors(fleet, served[..., 1])["all"]["mean"],
    }


if __name__ == "__main__":
    raise SystemExit(main())
