"""Is the loop worth it? Four weeks of a recorded fleet under six policies of retraining.

    python -m benchmarks.loop.loop_replay --data FLEET.parquet --regimes CHANGES.csv

28 days x 10 servers are replayed after 28 days of history and the training they give rise to:
forecasts from every bin where drift is watched and from every third elsewhere, a look every hour,
trainings as each policy wants them, on the data so far. The policies: never, a cron job weekly or
daily, the specification's literal rule, ours (calibrated, the default), and an oracle told what
changed and when. Two scenes: the data as recorded, and with new dynamics on six series at a
moment of each of the first three weeks.

Everything is chosen before running: seeds and times in `replay_fleet.py`, the figures'
definitions in `replay_scores.py`, the trainings' size here. One run of a policy is kept in the
folder and not repeated; `--scene`, `--policy` run one at a time.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from benchmarks.forecast.parts.training_rounds import write_export
from benchmarks.loop.parts.fleet import (
    DAY,
    HISTORY_DAYS,
    INJECTED,
    NATURAL,
    REPLAY_DAYS,
    SERVERS,
    ReplayFleet,
    injected,
    natural,
    recorded_grid,
)
from benchmarks.loop.parts.policies import NEVER, ORACLE, POLICIES
from benchmarks.loop.parts.run import ReplayRun, trained
from benchmarks.loop.parts.scores import errors, recovery_hours
from benchmarks.results_file import ROOT, write_results
from fleetcast.files import read_json, write_json
from fleetcast.schema import Floats32

FOLDER = ROOT / "bench_run" / "loop_replay"
BITBRAINS_MAPS = ("cpu_pct", "mem_pct", "disk_io_mb_s=disk_read_mb_s+disk_write_mb_s")
SCENES = (NATURAL, INJECTED)
STEPS_PER_EPOCH = 40  # so that a training takes about 15 CPU seconds; the first is the product's own


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for and not there yet; report all that is there."""
    options = _parser().parse_args(argv)
    fleets = _fleets(options)
    settings = _settings(fleets[NATURAL].grid.metrics)
    initial = options.folder / "initial" / "checkpoints"
    if not (initial / "last.ckpt").exists():
        _train_initial(fleets[NATURAL], initial, settings["initial"])
    for scene in options.scene:
        for policy in sorted(options.policy, key=lambda name: name != NEVER):
            if not _outcome(options.folder, scene, policy).with_suffix(".json").exists():
                _run(fleets[scene], policy, options.folder, initial, settings["replay"])
    figures: dict[str, Any] = {"asked": _asked(options, fleets[NATURAL])}
    for scene in SCENES:
        found = _scene_figures(fleets[scene], options.folder)
        print(_table(scene, found["policies"]))
        figures[scene] = found
    name = f"loop_replay_{options.data.stem}" + (f"_from_{options.skip}" if options.skip else "")
    print(write_results(name, figures).relative_to(ROOT))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare retraining policies on a recorded fleet.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--regimes", type=Path, help="known changes of the data, told to the oracle")
    parser.add_argument("--map", nargs="+", default=list(BITBRAINS_MAPS))
    parser.add_argument("--servers", type=int, default=SERVERS, help="how many, in the order of their names")
    parser.add_argument("--skip", type=int, default=0, help="servers to leave out before those")
    parser.add_argument("--history-days", type=int, default=HISTORY_DAYS)
    parser.add_argument("--days", type=int, default=REPLAY_DAYS)
    parser.add_argument("--scene", nargs="+", choices=SCENES, default=list(SCENES))
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    return parser


def _asked(options: argparse.Namespace, fleet: ReplayFleet) -> dict[str, Any]:
    return {
        "data": options.data.name,
        "servers": list(fleet.grid.server_names),
        "metrics": list(fleet.grid.metrics),
        "history_days": options.history_days,
        "days": options.days,
        "steps_per_epoch": STEPS_PER_EPOCH,
    }


def _fleets(options: argparse.Namespace) -> dict[str, ReplayFleet]:
    days = options.history_days + options.days
    chosen = slice(options.skip, options.skip + options.servers)
    grid = recorded_grid(options.data, options.map, chosen, days)
    begin = options.history_days * DAY
    return {NATURAL: natural(grid, begin, options.regimes), INJECTED: injected(grid, begin)}


def _settings(metrics: tuple[str, ...]) -> dict[str, str]:
    """Return the settings of the initial and of the other trainings, as TOML."""
    bins = f"[bins]\nforecast_metrics = {json.dumps(list(metrics))}\n"
    return {"initial": bins, "replay": f"{bins}[trainer]\nsteps_per_epoch = {STEPS_PER_EPOCH}\n"}


def _train_initial(fleet: ReplayFleet, checkpoints: Path, settings: str) -> None:
    checkpoints.parent.mkdir(parents=True, exist_ok=True)
    data = checkpoints.parent / "training_data_incremental.parquet"
    write_export(data, fleet.until(fleet.begin, HISTORY_DAYS))
    began_s = process_time()
    config = checkpoints.parent / "fleetcast.toml"
    config.write_text(settings, encoding="utf-8")
    verdict = trained(data, checkpoints, config)
    print(f"initial training: {process_time() - began_s:.0f} CPU s, {verdict.why}")


def _run(fleet: ReplayFleet, policy: str, folder: Path, initial: Path, settings: str) -> None:
    began_s = process_time()
    run = ReplayRun(fleet, policy, folder / fleet.name / policy, initial, settings)
    quantiles = run.run(_by_initial(folder, fleet.name, run.every))
    figures = run.figures() | {"cpu_s": round(process_time() - began_s, 1)}
    path = _outcome(folder, fleet.name, policy)
    np.savez_compressed(path.with_suffix(".npz"), quantiles=quantiles)
    write_json(path.with_suffix(".json"), figures)
    own = errors(fleet, quantiles[..., 1])["all"]
    print(f"{fleet.name} {policy}: {len(run.trainings)} trainings, {figures['cpu_s']:.0f} CPU s, error {own}")


def _by_initial(folder: Path, scene: str, every: int) -> Floats32 | None:
    """Return the forecasts of the initial model, where they were made as often as needed."""
    path = _outcome(folder, scene, NEVER)
    if (
        not path.with_suffix(".json").exists()
        or read_json(path.with_suffix(".json"))["forecast_every"] > every
    ):
        return None
    found: Floats32 = np.load(path.with_suffix(".npz"))["quantiles"]
    return found


def _outcome(folder: Path, scene: str, policy: str) -> Path:
    return folder / scene / f"outcome_{policy}"


def _scene_figures(fleet: ReplayFleet, folder: Path) -> dict[str, Any]:
    """Return the figures of the policies that were run so far; recovery needs never and the oracle."""
    p50s: dict[str, Floats32] = {}
    policies: dict[str, Any] = {}
    for policy in POLICIES:
        path = _outcome(folder, fleet.name, policy)
        if path.with_suffix(".json").exists():
            p50s[policy] = np.load(path.with_suffix(".npz"))["quantiles"][..., 1]
            policies[policy] = read_json(path.with_suffix(".json")) | {"error": errors(fleet, p50s[policy])}
    if NEVER in p50s and ORACLE in p50s:
        for policy, hours in recovery_hours(fleet, p50s, NEVER, ORACLE).items():
            policies[policy]["recovered_after_h"] = hours
    names = fleet.grid
    changes = [
        [f"{names.server_names[item.server]} {names.metrics[item.metric]}" for item in changed]
        for changed in fleet.changes
    ]
    return {
        "changes": changes,
        "changed_on_day": [(changed[0].since_bin - fleet.begin) / DAY for changed in fleet.changes],
        "policies": policies,
        "not_run": [policy for policy in POLICIES if policy not in policies],
    }


def _table(scene: str, policies: dict[str, Any]) -> str:
    """Return one scene as the rows of docs/performance.md."""
    lines = [
        f"| {scene} | trainings (promoted) | 5 min / 1 h / 8 h | mean | changed series | recovered, h |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in policies.items():
        error, changed = found["error"]["all"], found["error"]["changed"]["mean"]
        promoted = sum(item["promoted"] for item in found["trainings"])
        hours = ", ".join("-" if h is None else f"{h:.0f}" for h in found.get("recovered_after_h", []))
        each = " / ".join(f"{error[key]:.3f}" for key in ("5min", "1h", "8h"))
        lines.append(
            f"| {name} | {len(found['trainings'])} ({promoted}) | {each} | {error['mean']:.3f} | "
            f"{'' if changed is None else f'{changed:.3f}'} | {hours} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
