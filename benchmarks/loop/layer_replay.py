"""What the expert layer is worth beside one model, without trainings: a change of the layer in minutes.

    python -m benchmarks.loop.layer_replay --data FLEET.parquet [--groups 0 1] [--scene natural] [--model F]

The shipped base forecasts the scenes of `loop_replay` (a group is ten servers, 28 days of history, then
28 replayed days); the layer serves them. Told are the error relative to repeating the last value and
the pinball loss of p10, p50 and p90 relative to it (geometric means over series), the error of the model
alone (raw), and what share of actuals the 80 % band holds, percents and rates apart. What needs no
layer is kept in the folder.
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
from benchmarks.loop.parts.scores import NAMES, errors
from benchmarks.loop.parts.served import SceneRules, serve
from benchmarks.results_file import ROOT, write_results
from fleetcast.forecast.encoding import is_percent
from fleetcast.forecast.predictor import Forecaster, set_threads
from fleetcast.schema import QUANTILES, Floats32

FOLDER = ROOT / "bench_run" / "layer_replay"
BASE = ROOT / "models" / "last.ckpt"
_ROUNDING = 0.005  # recorded with two digits


def main(argv: Sequence[str] | None = None) -> int:
    """Replay, print a line a scene, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--map", nargs="+", default=list(BITBRAINS_MAPS))
    parser.add_argument("--groups", nargs="+", type=int, default=[0])
    parser.add_argument("--scene", nargs="+", choices=SCENES, default=[NATURAL])
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
    print(write_results("layer_replay", {"data": options.data.name, "rows": rows}))
    return 0


class _Group:
    """Ten servers: what the base and the rules say of each scene, computed once."""

    def __init__(self, options: argparse.Namespace, number: int, model: Forecaster) -> None:
        self._folder, self._model = options.folder / f"{options.data.stem}_group_{number}", model
        self._folder.mkdir(parents=True, exist_ok=True)
        servers = slice(number * SERVERS, (number + 1) * SERVERS)
        self._grid = recorded_grid(options.data, options.map, servers, HISTORY_DAYS + REPLAY_DAYS)
        self._begin = HISTORY_DAYS * DAY

    def figures(self, name: str) -> dict[str, Any]:
        """Serve a scene and score it."""
        fleet = self._fleet(name)
        raw = self._raw(name, fleet)
        quantiles = serve(fleet, self._rules(name, fleet), raw)
        found = {"error": errors(fleet, quantiles[..., 1]), "raw": errors(fleet, raw[..., 1])}
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
    levels, found = np.array(QUANTILES), {"pinball": {}, "inside_percents": {}, "inside_rates": {}}
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
    return found


def _line(row: dict[str, Any]) -> str:
    groups, raw = ({name: item["mean"] for name, item in row[key].items()} for key in ("error", "raw"))
    parts = [f"group {row['group']} {row['scene']}", f"error {groups} by horizon {row['error']['all']}"]
    parts += [f"raw {raw}"]
    parts += [f"{name} {row[name]}" for name in ("pinball", "inside_percents", "inside_rates")]
    return "; ".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
