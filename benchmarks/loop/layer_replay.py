"""What the expert layer is worth beside one model, without trainings: a change of the layer in minutes.

    python -m benchmarks.loop.layer_replay --data FLEET.parquet [--groups 0 1] [--scene natural] [--model F]

The shipped base forecasts the scenes of `loop_replay` (a group is ten servers, 28 days of history, then
28 replayed days, or `--days`); the layer serves them. Told are the error relative to repeating the last
value and the pinball loss of p10, p50 and p90 relative to it (geometric means over series), the error of
the model alone (raw), what share of actuals the 80 % band holds, percents and rates apart, the same of
the series at the first, fifth and ninth tenth, and for each
metric and horizon how what is served compares with each expert alone: the answer is yes where it is at
most 1 % worse than the best of them (in hindsight). What needs no layer is kept in the folder.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loop.loop_replay import BITBRAINS_MAPS, SCENES, experts_key
from benchmarks.loop.parts.fleet import (
    DAY,
    HISTORY_DAYS,
    NATURAL,
    REPLAY_DAYS,
    SERVERS,
    ReplayFleet,
    recorded_grid,
)
from benchmarks.loop.parts.lasting import scene_fleet
from benchmarks.loop.parts.record import HORIZONS, forecast_stretch, last_values
from benchmarks.loop.parts.scores import NAMES, error_pair, errors, relative
from benchmarks.loop.parts.served import SceneRules, serve
from benchmarks.results_file import ROOT, write_results
from fleetcast.forecast.encoding import is_percent
from fleetcast.forecast.experts.mixture import EXPERTS, MODEL
from fleetcast.forecast.predictor import Forecaster, set_threads
from fleetcast.schema import QUANTILES, Floats32

FOLDER = ROOT / "bench_run" / "layer_replay"
BASE = ROOT / "models" / "last.ckpt"
MOST_OVER_BEST = 1.01  # of the error of the best expert alone
_ROUNDING = 0.005  # recorded with two digits


def main(argv: Sequence[str] | None = None) -> int:
    """Replay, print a line a scene, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--map", nargs="+", default=list(BITBRAINS_MAPS))
    parser.add_argument("--groups", nargs="+", type=int, default=[0])
    parser.add_argument("--scene", nargs="+", choices=SCENES, default=[NATURAL])
    parser.add_argument("--days", type=int, default=REPLAY_DAYS, help="replayed days")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--model", type=Path, default=BASE)
    options = parser.parse_args(argv)
    set_threads(1)
    model, rows = Forecaster.load(options.model.resolve()), []
    for group in options.groups:
        replay = _Group(options, group, model)
        for name in options.scene:
            rows.append({"group": group, "scene": name, **replay.figures(name)})
            print(_line(rows[-1]), flush=True)
            for cell in rows[-1]["alone"]:
                print(_line_alone(cell), flush=True)
    print(write_results("layer_replay", {"data": options.data.name, "rows": rows}))
    return 0


class _Group:
    """Ten servers: what the base and the rules say of each scene, computed once."""

    def __init__(self, options: argparse.Namespace, number: int, model: Forecaster) -> None:
        self._folder, self._model = (
            options.folder / f"{options.data.stem}_group_{number}_{options.days}d",
            model,
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        servers = slice(number * SERVERS, (number + 1) * SERVERS)
        self._grid = recorded_grid(options.data, options.map, servers, HISTORY_DAYS + options.days)
        self._begin = HISTORY_DAYS * DAY

    def figures(self, name: str) -> dict[str, Any]:
        """Serve a scene and score it."""
        fleet = self._fleet(name)
        rules, raw = self._rules(name, fleet), self._raw(name, fleet)
        quantiles = serve(fleet, rules, raw)
        alone = _alone(fleet, quantiles[..., 1], {EXPERTS[MODEL]: raw[..., 1], **rules.medians(fleet)})
        found = {"error": errors(fleet, quantiles[..., 1]), "raw": errors(fleet, raw[..., 1]), "alone": alone}
        return {**found, **_bands(fleet, quantiles)}

    def _fleet(self, name: str) -> ReplayFleet:
        return scene_fleet(name, self._grid, self._begin)

    def _rules(self, name: str, fleet: ReplayFleet) -> SceneRules:
        path = self._folder / f"rules_{name}_{experts_key('rules', 'analogues', 'trend')}.npz"
        if not path.exists():
            shared = None if name == NATURAL else self._rules(NATURAL, self._fleet(NATURAL))
            SceneRules.compute(fleet, shared).write(path)
        return SceneRules.read(path)

    def _raw(self, name: str, fleet: ReplayFleet) -> Floats32:
        """Return what the base says; series that a scene leaves as recorded are shared with it."""
        path = self._folder / f"raw_{name}_{self._model.description.version}.npy"
        if not path.exists():
            if name == NATURAL:
                raw = forecast_stretch(self._model, fleet, self._begin, fleet.grid.n_bins)
            else:
                raw = self._raw(NATURAL, self._fleet(NATURAL)).copy()
                rows = np.flatnonzero((fleet.changed_since() < fleet.grid.n_bins).any(axis=1))
                names = tuple(fleet.grid.server_names[row] for row in rows)
                part = replace(fleet.grid, values=fleet.grid.values[rows], server_names=names)
                changed = replace(fleet, grid=part, changes=())
                raw[rows] = forecast_stretch(self._model, changed, self._begin, part.n_bins)
            np.save(path, raw)
        found: Floats32 = np.load(path)
        return found


def _bands(fleet: ReplayFleet, quantiles: Floats32) -> dict[str, Any]:
    """Return the pinball loss by horizon, and what the band holds, by horizon and kind of metric."""
    values, percents = fleet.grid.values, np.array([is_percent(name) for name in fleet.grid.metrics])
    kinds = ("pinball", "inside_percents", "inside_rates", "inside_series")
    levels, found = np.array(QUANTILES), {name: {} for name in kinds}
    for place, horizon in enumerate(HORIZONS):
        origins = np.arange(fleet.begin, fleet.grid.n_bins - horizon)
        actual, said = values[:, :, origins + horizon], quantiles[:, :, : len(origins), place]
        is_known = np.isfinite(actual) & np.isfinite(said).all(axis=-1)
        miss = actual[..., None] - said
        loss = np.maximum(levels * miss, (levels - 1) * miss).mean(axis=-1)
        naive = np.abs(last_values(values)[:, :, origins] - actual)
        ours, others = (np.nansum(np.where(is_known, part, np.nan), axis=-1) for part in (loss, naive))
        ratios = np.maximum(ours[others > 0] / others[others > 0], 1e-3)
        found["pinball"][NAMES[horizon]] = round(float(np.exp(np.log(ratios).mean())), 4)
        inside = (actual >= said[..., 0] - _ROUNDING) & (actual <= said[..., 2] + _ROUNDING)
        for kind, chosen in (("inside_percents", percents), ("inside_rates", ~percents)):
            share = inside[:, chosen][is_known[:, chosen]]
            found[kind][NAMES[horizon]] = round(float(share.mean()), 3) if len(share) else None
        by_series = np.where(is_known, inside, np.nan).reshape(-1, len(origins))
        shares = np.nanmean(by_series[is_known.reshape(by_series.shape).any(axis=1)], axis=1)
        found["inside_series"][NAMES[horizon]] = np.quantile(shares, (0.1, 0.5, 0.9)).round(2).tolist()
    return found


def _alone(fleet: ReplayFleet, served: Floats32, experts: dict[str, Floats32]) -> list[dict[str, Any]]:
    """Return for each metric and horizon the error of what was served and of each expert alone.

    Args:
        served: (server, metric, origin, horizon), as each of `experts`.
    """
    cells = []
    for number, metric in enumerate(fleet.grid.metrics):
        chosen = np.zeros(fleet.grid.values.shape[:2], np.bool_)
        chosen[:, number] = True
        for place, horizon in enumerate(HORIZONS):
            found = {}
            for name, said in {"served": served, **experts}.items():
                found[name] = relative(*error_pair(fleet, said[..., place], horizon), chosen)
            best = min(value for name, value in found.items() if name != "served" and value is not None)
            is_met = found["served"] is not None and found["served"] <= MOST_OVER_BEST * best
            cells.append({"metric": metric, "horizon": NAMES[horizon], "is_met": is_met, "error": found})
    return cells


def _line_alone(cell: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {value}" for name, value in cell["error"].items())
    return f"  {cell['metric']} {cell['horizon']}: {'yes' if cell['is_met'] else 'NO '} {parts}"


def _line(row: dict[str, Any]) -> str:
    groups, raw = ({name: item["mean"] for name, item in row[key].items()} for key in ("error", "raw"))
    parts = [f"group {row['group']} {row['scene']}", f"error {groups} by horizon {row['error']['all']}"]
    parts += [f"raw {raw}"]
    parts += [
        f"{name} {row[name]}" for name in ("pinball", "inside_percents", "inside_rates", "inside_series")
    ]
    return "; ".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
