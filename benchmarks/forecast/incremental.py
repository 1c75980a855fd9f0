"""Does an incremental training learn a change, and leave the rest as it was?

    python -m benchmarks.forecast.incremental --data F [--changes F.csv] [--servers 40] [--work FOLDER]

A base is trained on the first days. Then, each time with the real program and its defaults:

- injected: new dynamics begin on some series (`new_dynamics.py`), three days later a training runs on
  the last 30 days (0.75 % of its windows show the change); the days after are forecast by the model
  before, the model after and by one trained from scratch on the same days for as many steps.
- real: the same at the moments after which most changes of `--changes` lie (server_name, metric,
  change_time_refined_utc or change_time_utc), as they were recorded.

Errors are relative to repeating the last value, a geometric mean over the series that changed and
over all others. The gate's verdict is reported, not obeyed. Training days and test days never
overlap. `--variant "changed_share=0.5"` measures other settings of the trainer.
"""

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.forecast.parts.new_dynamics import BIN_MS, DAY, Scene, scenes
from benchmarks.forecast.parts.training_rounds import (
    HORIZONS,
    MEASURED_FILE,
    TestDays,
    Training,
    copy_service,
    part,
    relative,
    train,
    write_context,
    write_export,
)
from benchmarks.results_file import write_results
from fleetcast.forecast.predictor import Forecaster
from fleetcast.forecast.registry import Registry
from fleetcast.schema import Floats
from fleetcast.settings import TrainerSettings
from fleetcast.training.grid import TrainingGrid

PREFERRED = (
    *("cpu_pct", "mem_pct", "disk_write_mb_s", "net_in_mb_s"),  # Bitbrains
    *("cpu_r_norm01", "mem_u_norm01", "disk_wb_norm01", "eth1_fi_norm01"),  # SMD
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; return 0."""
    options = _parser().parse_args(argv)
    metrics = tuple(options.metrics.split(",")) if options.metrics else PREFERRED
    grid = TrainingGrid.read(Path(options.data), metrics, BIN_MS)
    grid = replace(
        grid, server_names=grid.server_names[: options.servers], values=grid.values[: options.servers]
    )
    report: dict[str, Any] = {"options": vars(options) | {"data": Path(options.data).name}, "scenes": []}
    report["options"] |= {"changes": options.changes and Path(options.changes).name, "work": None}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(options.work or scratch).resolve()
        base, cost = _base(work / "base", grid, options)
        report["base"] = {"version": base.version, "cpu_s": cost}
        for scene in scenes(grid, options):
            report["scenes"].append(_measured(scene, base, work, options))
    path = write_results(f"incremental_{options.name or Path(options.data).stem}", report)
    print(f"written: {path}")
    return 0


def _base(folder: Path, grid: TrainingGrid, options: argparse.Namespace) -> tuple[Forecaster, float]:
    """Return the base model and its CPU seconds."""
    first = options.skip_days * DAY
    _prepare(folder, part(grid, first, first + options.train_days * DAY))
    made = train(folder, folder / "data.parquet", grid.metrics, [], {})
    if not made.verdict["promoted"]:
        raise RuntimeError(f"the base does not beat the fallback: {made.verdict['why']}")
    version = Registry(folder / "checkpoints").version(made.version)
    return Forecaster.load(version.model_path), made.cpu_s


def _prepare(folder: Path, data: TrainingGrid) -> None:
    """Make a folder to train in, unless it holds a finished training."""
    if (folder / MEASURED_FILE).exists():
        return
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_export(folder / "data.parquet", data)


def _measured(scene: Scene, base: Forecaster, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train every variant of one scene and return the errors of each."""
    first = max(0, scene.now_bin - 30 * DAY)
    data = part(scene.grid, first, scene.now_bin)
    changed = tuple(replace(item, since_bin=item.since_bin - first) for item in scene.changed)
    days = TestDays.after(scene.grid, scene.now_bin, options.test_days, options.origins)
    tables = {"last value": days.errors(None), "before": days.errors(base)}
    runs: dict[str, Training] = {}
    print(f"\n{scene.name}: {len(scene.changed)} changed series; MAE relative to last value")
    print(f"{'':34s}{'changed 1h':>11s}{'8h mean':>9s}{'others 1h':>11s}{'8h mean':>9s}{'CPU s':>8s}  gate")
    _print("before", _groups(tables["before"], tables, scene), None)
    for name, settings, flags in _variants(options):
        place = work / _as_path(scene.name) / _as_path(name)
        _prepare(place, data)
        if name != "without context":
            write_context(place / "training_context.json", data, changed)
        if "--incremental" in flags and not (place / "checkpoints").exists():
            copy_service(work / "base" / "checkpoints", place)
        runs[name] = train(place, place / "data.parquet", data.metrics, flags, settings)
        version = Registry(place / "checkpoints").version(runs[name].version)
        tables[name] = days.errors(Forecaster.load(version.model_path))
        _print(name, _groups(tables[name], tables, scene), runs[name])
    return {
        "scene": scene.name,
        "changed": [
            {
                "server": scene.grid.server_names[item.server],
                "metric": scene.grid.metrics[item.metric],
                "kind": kind,
                "hours_before": round((scene.now_bin - item.since_bin) / 12, 1),
            }
            for item, kind in zip(scene.changed, scene.kinds, strict=True)
        ],
        "test_origins": len(days.origins),
        "relative_to_last_value": {name: _groups(table, tables, scene) for name, table in tables.items()},
        "trainings": {
            name: {
                "cpu_s": run.cpu_s,
                **{key: run.verdict.get(key) for key in ("promoted", "why", "figures")},
            }
            for name, run in runs.items()
        },
    }


def _as_path(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=]+", "_", name)


def _variants(options: argparse.Namespace) -> list[tuple[str, dict[str, str], list[str]]]:
    """Return what is trained: name, settings, flags."""
    trainer = TrainerSettings()
    epochs = ["--epochs", str(trainer.epochs)]
    # a training from scratch takes the steps and batches of an incremental one, and its own rate
    budget = {"batch_size": str(trainer.incremental_batch_size)}
    known: list[tuple[str, dict[str, str], list[str]]] = [
        ("after", {}, ["--incremental", *epochs]),
        ("without context", {}, ["--incremental", *epochs]),
        ("from scratch", budget, epochs),
    ]
    asked = options.only.split(",") if options.only else [name for name, _, _ in known]
    chosen = [item for item in known if item[0] in asked]
    for text in options.variant:
        settings = dict(pair.split("=", 1) for pair in text.split(","))
        chosen.append((text, settings, ["--incremental", *epochs]))
    return chosen


def _groups(table: dict[str, Floats], tables: dict[str, dict[str, Floats]], scene: Scene) -> dict[str, Any]:
    """Return the relative error by horizon, on the changed series (all, by kind) and on the others."""
    is_changed = np.zeros(scene.grid.values.shape[:2], np.bool_)
    groups = {}
    for kind in dict.fromkeys(scene.kinds):
        mask = np.zeros_like(is_changed)
        for item, its_kind in zip(scene.changed, scene.kinds, strict=True):
            mask[item.server, item.metric] |= its_kind == kind
        groups[kind] = mask
        is_changed |= mask
    named = {"changed": is_changed, "others": ~is_changed} | (groups if len(groups) > 1 else {})
    for column, metric in enumerate(scene.grid.metrics):
        named[f"others, {metric}"] = ~is_changed & (np.arange(is_changed.shape[1]) == column)
    return {
        group: {name: relative(table[name], tables["last value"][name], mask) for name in HORIZONS}
        for group, mask in named.items()
    }


def _print(name: str, groups: dict[str, Any], run: Training | None) -> None:
    cells = [groups[group][horizon] for group in ("changed", "others") for horizon in ("1h", "mean_8h")]
    row = "".join(
        f"{'n/a' if cell is None else format(cell, '.3f'):>{width}s}"
        for cell, width in zip(cells, (11, 9, 11, 9), strict=True)
    )
    cost, why = (run.cpu_s, run.verdict.get("why")) if run else ("", "")
    print(f"{name:34.34s}{row}{cost:>8}  {why}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="incremental", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="F", help="parquet: timestamp, server_name, metrics")
    parser.add_argument("--changes", metavar="F", help="csv of real changes")
    parser.add_argument("--metrics", help="comma separated; default: the usual ones, if present")
    parser.add_argument("--servers", type=int, default=40, metavar="N")
    parser.add_argument("--skip-days", type=int, default=8, metavar="S", help="days before the base's")
    parser.add_argument("--train-days", type=int, default=30, metavar="A", help="days the base learns from")
    parser.add_argument("--test-days", type=float, default=5, metavar="B", help="days after a training")
    parser.add_argument("--after-hours", type=float, default=72, help="from a change to the training")
    parser.add_argument("--per-kind", type=int, default=4, help="series injected per kind of dynamics")
    parser.add_argument("--own-periods", action="store_true", help="no two injected series share a period")
    parser.add_argument("--rounds", type=int, default=2, help="moments of recorded changes")
    parser.add_argument("--origins", type=int, default=60, help="forecasts made per server in the test days")
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="injections; 0: none")
    parser.add_argument("--seed", type=int, default=1, help="the first injection's seed")
    parser.add_argument("--work", metavar="FOLDER", help="keeps every training; a second run goes on there")
    parser.add_argument("--only", help="of: after, without context, from scratch")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=VALUE,...")
    parser.add_argument("--name", help="of the results file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
