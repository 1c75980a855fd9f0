"""How much quieter are the hours in which trainings start, where they may wait for one that is forecast?

    python -m benchmarks.loop.quiet_hours --data FLEET.parquet [--map ...] [--groups 1 2] [--days 28]

A group is ten servers. Every 15 minutes of data time the shipped base and the expert layer forecast it, the
product's own function takes the means of its hours (`serving/board.py`), and its own rule
(`retraining/ahead.py`) is told what was measured and what is expected. Every three hours a training is
asked for that drift, safeguards and the quiet period would let start as soon as the fleet is quiet. Told is
the mean CPU of the hour after it starts, with the look ahead and without, and of the quietest hour that could
have been picked with all knowledge. The first ten days only teach.
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from benchmarks.loop.loop_replay import BITBRAINS_MAPS
from benchmarks.loop.parts.fleet import BIN_MS, DAY, SERVERS, recorded_grid
from benchmarks.loop.parts.policies import fleet_verdict
from benchmarks.loop.parts.record import HORIZONS
from benchmarks.results_file import ROOT, write_results
from fleetcast.clock import from_ms
from fleetcast.forecast.encoding import is_percent
from fleetcast.forecast.experts.rules import rule_forecasts
from fleetcast.forecast.predictor import Forecaster, set_threads
from fleetcast.retraining.ahead import LOOK_S, QuietAhead
from fleetcast.retraining.decision import DRIFT, NONE
from fleetcast.retraining.inquiry import CPU, FLEET_AHEAD, FleetAhead, fleet_ahead
from fleetcast.schema import FleetForecast, HistoryWindow
from fleetcast.serving.board import fleet_means
from fleetcast.settings import DecisionSettings
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.served import LayerReplay

BASE = ROOT / "models" / "last.ckpt"
HISTORY, TAUGHT = 8 * DAY, 10 * DAY  # bins before the first forecast, before the first training
CHECK, HOUR, ASK_EVERY = 3, 12, 36  # bins
LOOK = round(LOOK_S * 1000) // BIN_MS


@dataclass
class Starts:
    """Trainings that started: the mean CPU of the hour after it, in percent."""

    without: list[float] = field(default_factory=list)
    ahead: list[float] = field(default_factory=list)
    best: list[float] = field(default_factory=list)  # of any hour up to the look ahead's end
    waited_h: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the figures."""
        without, ahead, best = (np.array(item) for item in (self.without, self.ahead, self.best))
        waited_h = np.array(self.waited_h)
        waited, gain = waited_h > 0, without - ahead
        return {
            "trainings": len(without),
            "cpu_pct_without": _rounded(without.mean()),
            "cpu_pct_with": _rounded(ahead.mean()),
            "cpu_pct_with_all_knowledge": _rounded(best.mean()),
            "waited": int(waited.sum()),
            "waited_h_mean": _rounded(waited_h[waited].mean()) if waited.any() else None,
            "waited_h_longest": _rounded(waited_h.max()),
            "of_those_cpu_pct_without": _rounded(without[waited].mean()) if waited.any() else None,
            "of_those_cpu_pct_with": _rounded(ahead[waited].mean()) if waited.any() else None,
            "of_those_busier": int((gain[waited] < 0).sum()),
            "of_those_busier_by_2_points": int((gain[waited] < -2).sum()),
            "worst_points": _rounded(gain.min()),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Replay the groups, print a line each, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--map", nargs="+", default=list(BITBRAINS_MAPS[:2]), help="cpu_pct and mem_pct")
    parser.add_argument("--groups", nargs="+", type=int, default=[1])
    parser.add_argument("--servers", type=int, default=SERVERS, help="in a group")
    parser.add_argument("--days", type=int, default=28)
    options = parser.parse_args(argv)
    set_threads(1)
    began_s, found = process_time(), {}
    model = Forecaster.load(BASE.resolve())
    for number in options.groups:
        servers = slice(number * options.servers, (number + 1) * options.servers)
        grid = recorded_grid(options.data, options.map, servers, options.days)
        found[str(number)] = replay(grid, forecast_hours(grid, model)).as_json()
        print(f"group {number}: {found[str(number)]}", flush=True)
    figures = {"data": options.data.name, "servers": options.servers, "days": options.days, "groups": found}
    figures |= {"cpu_s": round(process_time() - began_s)}
    print(write_results(f"quiet_hours_{options.data.stem}", figures))
    return 0


def forecast_hours(grid: TrainingGrid, model: Forecaster) -> dict[int, FleetAhead]:
    """Return what is expected of the fleet from every few origins, as `/status` says it."""
    layer = LayerReplay(grid.values, grid.metrics, HORIZONS)
    flags = np.tile([is_percent(name) for name in grid.metrics], len(grid.server_names))
    found = {}
    for origin in range(HISTORY, grid.n_bins, CHECK):
        values, end_ms = grid.values[:, :, origin - HISTORY + 1 : origin + 1], grid.start_ms + origin * BIN_MS
        own = model.predict(HistoryWindow(grid.server_names, grid.metrics, values, end_ms, BIN_MS))
        rules = rule_forecasts(values.reshape(len(flags), HISTORY), flags, DAY, HORIZONS[-1])
        got = layer.serve(origin, rules, own)
        sources = np.isfinite(own).all(axis=(2, 3))
        made = FleetForecast(end_ms, BIN_MS, grid.server_names, grid.metrics, got, sources, "base")
        found[origin] = fleet_ahead({FLEET_AHEAD: fleet_means(made)})
    return found


def replay(grid: TrainingGrid, said: dict[int, FleetAhead]) -> Starts:
    """Ask for a training every few hours, each as if it were the only one."""
    settings, starts = DecisionSettings(), Starts()
    known = QuietAhead(settings, Path("no decisions"))
    last = grid.n_bins - LOOK - HOUR - round(settings.quiet_deadline_hours * HOUR)
    for origin in sorted(said):
        if TAUGHT <= origin < last and origin % ASK_EVERY == 0:
            _ask(grid, said, copy.deepcopy(known), origin, starts)
        _check(grid, said, known, origin, is_asked=False)
    return starts


def _ask(
    grid: TrainingGrid, said: dict[int, FleetAhead], own: QuietAhead, asked: int, starts: Starts
) -> None:
    """Note when one training starts, with the look ahead and without."""
    checks = range(asked, max(said) + 1, CHECK)
    quiet = next((at for at in checks if fleet_verdict(grid, at + 1).is_quiet), None)
    if quiet is None:
        return
    begun = next(at for at in checks if not _check(grid, said, own, at, is_asked=True))
    cpu = grid.values[:, grid.metrics.index(CPU)]
    hours = [_mean(cpu[:, at + 1 : at + 1 + HOUR]) for at in (quiet, begun)]
    best = min(_mean(cpu[:, at + 1 : at + 1 + HOUR]) for at in range(quiet, quiet + LOOK + 1, CHECK))
    if not np.isfinite([*hours, best]).all():
        return  # nothing was recorded then
    starts.without.append(hours[0])
    starts.ahead.append(hours[1])
    starts.best.append(best)
    starts.waited_h.append((begun - quiet) / HOUR)


def _check(
    grid: TrainingGrid, said: dict[int, FleetAhead], own: QuietAhead, at: int, *, is_asked: bool
) -> bool:
    """Check once, as the daemon does; return whether a training that is asked for waits."""
    now = from_ms(grid.start_ms + (at + 1) * BIN_MS)
    quiet = own.judge(fleet_verdict(grid, at + 1), now)
    found = own.look(now, quiet, said[at]) if is_asked and quiet.is_quiet else None
    line = {"quiet": {"measured": quiet.measured}, "ahead": {FLEET_AHEAD: said[at].as_json()}}
    if found:
        line["ahead"] = found.as_json()
    own.note(now, {**line, "rule": DRIFT if is_asked else NONE})
    return is_asked and (not quiet.is_quiet or (found is not None and found.until_s is not None))


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _rounded(value: float) -> float:
    return round(float(value), 2)


if __name__ == "__main__":
    raise SystemExit(main())
