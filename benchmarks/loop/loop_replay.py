"""Is the loop worth it? Four weeks of a recorded fleet under six policies of retraining.

    python -m benchmarks.loop.loop_replay --data FLEET.parquet --groups 0 1 2 --seeds 0 1 2 [--regimes CSV]

28 days x 10 servers are replayed after 28 days of history and the training they give rise to: forecasts
from every bin, a look every hour, trainings as each policy wants them, on the data so far. The policies:
never, a cron job weekly or daily, the specification's literal rule, ours (calibrated, the default), and
an oracle told what changed and when. Each is scored twice: what its models say (raw), and what clients
get (served, with the expert layer). A row `no network` is the layer alone. Asked for by name,
`ours_unspecialised` shows what specialists are worth: it is ours without them.

Scenes: the data as recorded, new dynamics that repeat (`injected`), and those that do not
(`parts/lasting.py`). A group is ten servers in the order of their names, a seed a draw of changes.

Everything is chosen before running: seeds and times in `parts/fleet.py` and `parts/lasting.py`, the
figures' definitions in `parts/scores.py`, the trainings' size here. One run of a policy is kept in the
folder and not repeated; it is scored and served again, without training, when the experts change.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from benchmarks.forecast.parts.training_rounds import write_export
from benchmarks.loop.parts.figure import draw_errors
from benchmarks.loop.parts.fleet import (
    DAY,
    HISTORY_DAYS,
    INJECTED,
    NATURAL,
    REPLAY_DAYS,
    SEED,
    SERVERS,
    ReplayFleet,
    recorded_grid,
)
from benchmarks.loop.parts.lasting import LASTING, scene_fleet
from benchmarks.loop.parts.policies import ALL_POLICIES, NEVER, POLICIES
from benchmarks.loop.parts.run import ReplayRun, trained
from benchmarks.loop.parts.scores import daily_errors, errors, mean_with_interval, recovery_hours
from benchmarks.loop.parts.served import SceneRules, serve
from benchmarks.results_file import ROOT, write_results
from fleetcast.files import read_json, write_json
from fleetcast.forecast.registry import ATTEMPTS_FOLDER
from fleetcast.schema import Floats32
from fleetcast.training.grid import TrainingGrid

FOLDER = ROOT / "bench_run" / "loop_replay"
BITBRAINS_MAPS = ("cpu_pct", "mem_pct", "disk_io_mb_s=disk_read_mb_s+disk_write_mb_s")
SCENES = (NATURAL, INJECTED, *LASTING)
STEPS_PER_EPOCH = 40  # so that a training takes about 15 CPU seconds; the first is the product's own
NO_NETWORK = "no network"
RAW, SERVED = "raw", "served"
EXPERTS_FOLDER = ROOT / "fleetcast" / "forecast" / "experts"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for and not there yet; report all that is there."""
    options = _parser().parse_args(argv)
    began_s, runs = process_time(), []
    for number in options.groups:
        group = _Group(options, number)
        for scene in options.scene:
            for seed in options.seeds if scene != NATURAL else options.seeds[:1]:
                runs.append(group.scene(scene, seed))
                print(_table([runs[-1]]), flush=True)
    by_scene = {name: [run for run in runs if run["scene"] == name] for name in options.scene}
    summary = {name: _summary(found) for name, found in by_scene.items() if found}
    for found in by_scene.values():
        print(_table(found))
    cpu_s = {"kept": round(sum(run["cpu_s"] for run in runs)), "this_call": round(process_time() - began_s)}
    print(f"CPU seconds: {cpu_s['kept']} of all that is reported, {cpu_s['this_call']} of them in this call")
    figures = {"asked": _asked(options), "cpu_s": cpu_s, "summary": summary, "runs": runs}
    print(write_results(f"loop_replay_{options.data.stem}", figures).relative_to(ROOT))
    if options.plot:
        draw_errors(by_scene, options.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare retraining policies on a recorded fleet.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--regimes", type=Path, help="known changes of the data, told to the oracle")
    parser.add_argument("--map", nargs="+", default=list(BITBRAINS_MAPS))
    parser.add_argument("--servers", type=int, default=SERVERS, help="in a group")
    parser.add_argument("--groups", nargs="+", type=int, default=[0], help="which, in the order of names")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="which draws of changes")
    parser.add_argument("--history-days", type=int, default=HISTORY_DAYS)
    parser.add_argument("--days", type=int, default=REPLAY_DAYS)
    parser.add_argument("--scene", nargs="+", choices=SCENES, default=list(SCENES))
    parser.add_argument("--policy", nargs="+", choices=ALL_POLICIES, default=list(POLICIES))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--plot", type=Path, help="draw error over time per policy (needs matplotlib)")
    return parser


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    names = ("servers", "groups", "seeds", "history_days", "days", "scene", "policy")
    asked = {name: getattr(options, name) for name in names}
    return {"data": options.data.name, **asked, "steps_per_epoch": STEPS_PER_EPOCH}


class _Group:
    """Some servers of the data: one history, one first training, all scenes on top."""

    def __init__(self, options: argparse.Namespace, number: int) -> None:
        self.number, self._options = number, options
        self._folder = options.folder / f"{options.data.stem}_group_{number}"
        days = options.history_days + options.days
        first = number * options.servers
        self._grid = recorded_grid(options.data, options.map, slice(first, first + options.servers), days)
        self._begin = options.history_days * DAY
        self._initial = self._folder / "initial" / "checkpoints"
        bins = f"[bins]\nforecast_metrics = {json.dumps(list(self._grid.metrics))}\n"
        self._settings = f"{bins}[trainer]\nsteps_per_epoch = {STEPS_PER_EPOCH}\n"
        if not any((self._initial / ATTEMPTS_FOLDER).glob("*.json")):
            _train_initial(self._fleet(NATURAL, 0), self._initial, bins)

    def scene(self, name: str, seed: int) -> dict[str, Any]:
        """Run what is missing of a scene and return its figures."""
        run = _Scene(self._fleet(name, seed), self._folder / f"{name}_{seed}", self._shared(name))
        for policy in sorted(self._options.policy, key=lambda policy: policy != NEVER):
            if not run.outcome(policy).exists():
                run.replay(policy, self._initial, self._settings)
        return {"group": self.number, "seed": seed, **run.figures(self._grid)}

    def _fleet(self, name: str, seed: int) -> ReplayFleet:
        return scene_fleet(name, self._grid, self._begin, SEED + 100 * seed, self._options.regimes)

    def _shared(self, name: str) -> "_Scene | None":
        """Return the recorded scene, whose rules' forecasts the others share where nothing changed."""
        if name == NATURAL:
            return None
        return _Scene(self._fleet(NATURAL, 0), self._folder / f"{NATURAL}_0", None)


@dataclass(eq=False)
class _Scene:
    """One scene of one group and seed, and what is kept of it in its folder."""

    fleet: ReplayFleet
    folder: Path
    recorded: "_Scene | None"

    def outcome(self, policy: str) -> Path:
        return self.folder / f"outcome_{policy}.json"

    def replay(self, policy: str, initial: Path, settings: str) -> None:
        """Run a policy and keep its forecasts and trainings."""
        began_s, kept = process_time(), self.outcome(NEVER)
        self.folder.mkdir(parents=True, exist_ok=True)
        run = ReplayRun(self.fleet, policy, self.folder / policy, initial, settings)
        quantiles = run.run(self._quantiles(NEVER) if kept.exists() else None)
        figures = run.figures() | {"cpu_s": round(process_time() - began_s, 1)}
        np.savez_compressed(self.outcome(policy).with_suffix(".npz"), quantiles=quantiles)
        write_json(self.outcome(policy), figures)
        print(f"{self.fleet.name} {policy}: {len(run.trainings)} trainings, {figures['cpu_s']:.0f} CPU s")

    def figures(self, recorded: TrainingGrid) -> dict[str, Any]:
        """Score the policies that were run so far."""
        policies: dict[str, Any] = {NO_NETWORK: {"trainings": [], SERVED: self._score(self._serve(None))}}
        for policy in (policy for policy in ALL_POLICIES if self.outcome(policy).exists()):
            found = {RAW: self._score(self._quantiles(policy)), SERVED: self._score(self._serve(policy))}
            policies[policy] = read_json(self.outcome(policy)) | found
        rules = self.rules()
        cpu_s = rules.cpu_s + sum(found.get("cpu_s", 0.0) for found in policies.values())
        days = [(changed[0].since_bin - self.fleet.begin) / DAY for changed in self.fleet.changes]
        names = [
            [f"{recorded.server_names[item.server]} {recorded.metrics[item.metric]}" for item in changed]
            for changed in self.fleet.changes
        ]
        head = {"scene": self.fleet.name, "servers": list(recorded.server_names), "cpu_s": round(cpu_s)}
        return head | {"changed_on_day": days, "changes": names, "policies": policies}

    def rules(self) -> SceneRules:
        """Return the rules' forecasts, computed where they are not kept yet."""
        path = self.folder / f"rules_{experts_key('rules', 'analogues', 'trend')}.npz"
        if path.exists():
            return SceneRules.read(path)
        rules = SceneRules.compute(self.fleet, self.recorded.rules() if self.recorded else None)
        self.folder.mkdir(parents=True, exist_ok=True)
        rules.write(path)
        return rules

    def _serve(self, policy: str | None) -> Floats32:
        key = experts_key("rules", "analogues", "trend", "layer", "mixture")
        path = self.folder / f"served_{policy or 'none'}_{key}.npz"
        if path.exists():
            found: Floats32 = np.load(path)["quantiles"]
            return found
        model = self._quantiles(policy) if policy else None
        quantiles = serve(self.fleet, self.rules(), model)
        np.savez_compressed(path, quantiles=quantiles)
        return quantiles

    def _quantiles(self, policy: str) -> Floats32:
        found: Floats32 = np.load(self.outcome(policy).with_suffix(".npz"))["quantiles"]
        return found

    def _score(self, quantiles: Floats32) -> dict[str, Any]:
        p50 = quantiles[..., 1]
        hours = recovery_hours(self.fleet, p50)
        return {
            "error": errors(self.fleet, p50),
            "recovered_after_h": hours,
            "daily": daily_errors(self.fleet, p50),
        }


def experts_key(*chapters: str) -> str:
    """Return a short name of the experts' code: what it computed is computed anew when it changes."""
    digest = hashlib.sha256()
    for chapter in chapters:
        digest.update((EXPERTS_FOLDER / f"{chapter}.py").read_bytes())
    return digest.hexdigest()[:8]


def _train_initial(fleet: ReplayFleet, checkpoints: Path, settings: str) -> None:
    checkpoints.parent.mkdir(parents=True, exist_ok=True)
    data = checkpoints.parent / "training_data_incremental.parquet"
    write_export(data, fleet.until(fleet.begin, HISTORY_DAYS))
    began_s = process_time()
    config = checkpoints.parent / "fleetcast.toml"
    config.write_text(settings, encoding="utf-8")
    verdict = trained(data, checkpoints, config)
    print(f"initial training: {process_time() - began_s:.0f} CPU s, {verdict.why}")


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return per policy the mean error over groups and seeds, with its interval."""
    found: dict[str, Any] = {}
    for policy in (NO_NETWORK, *ALL_POLICIES):
        own = [run["policies"][policy] for run in runs if policy in run["policies"]]
        if not own:
            continue
        found[policy] = {
            "runs": len(own),
            "trainings": float(np.mean([len(item["trainings"]) for item in own])),
        }
        for side in (side for side in (RAW, SERVED) if side in own[0]):
            tables = [item[side]["error"] for item in own]
            found[policy][side] = {
                group: mean_with_interval([table[group]["mean"] for table in tables])
                for group in ("all", "changed", "others")
            }
            hours = [hour for item in own for hour in item[side]["recovered_after_h"]]
            known = [hour for hour in hours if hour is not None]
            median = float(np.median(known)) if known else None
            found[policy][side]["recovered_after_h"] = [median, f"{len(known)} of {len(hours)}"]
    return found


def _table(runs: Sequence[dict[str, Any]]) -> str:
    """Return one scene as the rows of docs/performance.md."""
    over = ", ".join(f"group {run['group']} seed {run['seed']}" for run in runs)
    lines = [
        f"| {runs[0]['scene']} ({over}) | trainings | raw | served | raw, changed | served, changed "
        "| recovered, h |",
        "|---|---|---|---|---|---|---|",
    ]
    for policy, found in _summary(runs).items():
        cells = [
            _cell(found[side][group]) if side in found else ""
            for group in ("all", "changed")
            for side in (RAW, SERVED)
        ]
        median, share = found[SERVED]["recovered_after_h"]
        hours = f"{'-' if median is None else f'{median:.0f}'} ({share})"
        lines.append(f"| {policy} | {found['trainings']:.1f} | {' | '.join(cells)} | {hours} |")
    return "\n".join(lines)


def _cell(found: tuple[float | None, float | None]) -> str:
    mean, half = found
    return "" if mean is None else f"{mean:.3f}" + ("" if half is None else f" ± {half:.3f}")


if __name__ == "__main__":
    raise SystemExit(main())
