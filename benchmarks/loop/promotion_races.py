"""Bakes and races on recorded fleets: is a bad model taken back, is a better one found, and how soon?

    python -m benchmarks.loop.promotion_races --data FLEET.parquet [--map ...] [--groups 2 3] [--days 8]
    python -m benchmarks.loop.promotion_races --races --days 14 --data FLEET.parquet ...

A group is ten servers. Two first trainings of different seeds learn its first days; after them a bake
starts every 12 hours, in data time. Each runs the product's own parts: the block sums
(`fleetcast/promotion/race.py`), the test (`evidence.py`) and the expert layer, forked for the older model
at the switch. The cases:

    another seed       the same training with another seed, both ways: a rollback is a false one
    shipped base       the trained model is followed by the shipped base; and the other way round
    moved by 20, 5 %   every forecast of the same model, moved up by a share of the series' mean
    bad after 6 hours  the same model, whose forecasts then are off by three usual moves of an hour

Told are how many bakes end in a rollback, after how many hours of the bake (median, latest), and what
clients lost meanwhile: the loss of what they got over what the older model would have given them.

With `--races` a race starts once a day, as in the mode `auto`, and goes on for up to 168 whole hours; so they
overlap. The challenger is the model of the first seed (in two cases that must not switch: another one). The
champion is the model of the other seed, the shipped base, the same training cut off after 100 steps, or the
challenger itself with every forecast moved up by 20 or 5 % of the series' mean. Told are how many races end
in a switch, after how many whole hours, how many find the challenger worse, and what clients would have
gained by it meanwhile.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

import tft_trainer
from benchmarks.forecast.parts.training_rounds import write_export
from benchmarks.loop.loop_replay import BITBRAINS_MAPS
from benchmarks.loop.parts.fleet import DAY, SERVERS, natural, recorded_grid
from benchmarks.loop.parts.record import HORIZONS, forecast_stretch
from benchmarks.loop.parts.served import LEADS, SceneRules
from benchmarks.results_file import ROOT, write_results
from fleetcast.forecast.encoding import is_percent
from fleetcast.forecast.predictor import Forecaster, set_threads
from fleetcast.forecast.registry import Registry
from fleetcast.promotion.evidence import BETTER, GOES_ON, WORSE, Evidence, Limits, Verdict, judge, judge_race
from fleetcast.promotion.race import NEW, OLD, Race
from fleetcast.schema import ClosedBin, Floats32
from fleetcast.settings import PromotionSettings
from fleetcast.training.served import LayerReplay

FOLDER = ROOT / "bench_run" / "promotion_races"
BASE = ROOT / "models" / "last.ckpt"
LIMITS = Limits()
START_EVERY = DAY // 2
BAKE_BINS = (LIMITS.bake_hours + 2) * 12  # with the hours that it begins and ends in
RACE_EVERY = DAY
RACE_BINS = (LIMITS.max_hours + 2) * 12
SHORT = "100 steps"
MOVES = {"moved by 20 %": 0.2, "moved by 5 %": 0.05}
RACES = {  # challenger over champion
    "another seed": ("seed 2", "seed 1"),
    "over base": ("seed 1", "base"),
    "over base, other way": ("base", "seed 1"),
    f"over {SHORT}": ("seed 1", SHORT),
    "over moved by 20 %": ("seed 1", "moved by 20 %"),
    "over moved by 5 %": ("seed 1", "moved by 5 %"),
}
CASES = (
    *("another seed", "another seed, other way", "shipped base", "trained after base"),
    *("moved by 20 %", "moved by 5 %", "bad after 6 hours"),
)


@dataclass
class Tally:
    """What the bakes of one case came to."""

    started: int = 0
    hours: list[float] = field(default_factory=list)  # to a rollback
    lost: list[float] = field(default_factory=list)  # served loss over the older model's, during the bake

    def as_json(self) -> dict[str, Any]:
        """Return the figures of the case."""
        return {
            "started": self.started,
            "taken_back": len(self.hours),
            **_when(self.hours),
            "clients_lost_pct": round(100 * (float(np.mean(self.lost)) - 1), 2) if self.lost else None,
        }


@dataclass
class RaceTally:
    """What the races of one case came to."""

    started: int = 0
    hours: list[int] = field(default_factory=list)  # whole, to a switch
    found_worse: int = 0
    gains: list[float] = field(default_factory=list)  # served loss over the champion's, until the race ended

    def as_json(self) -> dict[str, Any]:
        """Return the figures of the case."""
        return {
            "started": self.started,
            "switched": len(self.hours),
            **_when(self.hours),
            "found_worse": self.found_worse,
            "clients_would_have_gained_pct": (
                round(100 * (1 - float(np.mean(self.gains))), 2) if self.gains else None
            ),
        }


def _when(hours: Sequence[float]) -> dict[str, float | None]:
    return {
        "median_hours": float(np.median(hours)) if hours else None,
        "latest_hours": max(hours, default=None),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bakes or the races, print a line a case, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--map", nargs="+", default=list(BITBRAINS_MAPS))
    parser.add_argument("--groups", nargs="+", type=int, default=[2])
    parser.add_argument("--servers", type=int, default=SERVERS, help="in a group")
    parser.add_argument("--history-days", type=int, default=14)
    parser.add_argument("--days", type=int, default=8)
    parser.add_argument("--races", action="store_true", help="races of up to a week instead of bakes")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *RACES], help="only these (default: all)")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args(argv)
    set_threads(1)
    began_s = process_time()
    kind = RaceTally if options.races else Tally
    chosen = [
        case for case in (RACES if options.races else CASES) if case in (options.cases or (*CASES, *RACES))
    ]
    if not chosen:
        parser.error("--cases: bakes and races have cases of their own")
    tallies: dict[str, Any] = {case: kind() for case in chosen}
    name = "races_auto" if options.races else "promotion_races"
    figures = {"data": options.data.name, "groups": options.groups, "servers": options.servers}
    for number in options.groups:
        group = Group(options, number)
        for case, tally in tallies.items():
            (group.race if options.races else group.run)(case, tally)
            print(f"group {number}: {case}: {tally.as_json()}", flush=True)
            rows = {case: tally.as_json() for case, tally in tallies.items() if tally.started}
            so_far = {"days": options.days, "cpu_s": round(process_time() - began_s), "cases": rows}
            path = write_results(f"{name}_{options.data.stem}", figures | so_far)
    print(path)
    return 0


class Group:
    """Some servers: their models, what these say of the days after, and the bakes."""

    def __init__(self, options: argparse.Namespace, number: int) -> None:
        servers = slice(number * options.servers, (number + 1) * options.servers)
        days = options.history_days + options.days
        grid = recorded_grid(options.data, options.map, servers, days)
        self._fleet = natural(grid, options.history_days * DAY, None)
        self._folder = options.folder / f"{options.data.stem}_group_{number}_of_{options.servers}_{days}_days"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._rules = self._compute_rules()
        self._forecasts: dict[str, Floats32] = {}

    def race(self, case: str, tally: RaceTally) -> None:
        """Start a race every day, with the champion in service."""
        new, old = map(self._said, RACES[case])
        for start, layer in self._starts(old, RACE_EVERY, RACE_BINS):
            verdict, _ = self._compare((start, start + RACE_BINS), layer, old, new, judge_race)
            tally.started += 1
            tally.found_worse += verdict.kind == WORSE
            if verdict.kind == BETTER:
                tally.hours.append(verdict.figures["hours"])
            if verdict.figures["loss_ratio_served"]:
                tally.gains.append(verdict.figures["loss_ratio_served"])

    def run(self, case: str, tally: Tally) -> None:
        """Start a bake every 12 hours."""
        old, new = self._sides(case)
        for start, layer in self._starts(old, START_EVERY, BAKE_BINS):
            said = new
            if case == "bad after 6 hours":
                said = new.copy()
                self._spoil(said, start - self._fleet.begin + 72)
            verdict, hours = self._compare((start, start + BAKE_BINS), layer, old, said, judge)
            tally.started += 1
            if verdict.kind == WORSE:
                tally.hours.append(hours)
            if verdict.figures["loss_ratio_served"]:
                tally.lost.append(verdict.figures["loss_ratio_served"])

    def _sides(self, case: str) -> tuple[Floats32, Floats32]:
        """Return what the older and the new model say, (server, metric, origin, horizon, quantile)."""
        one, two, base = map(self._said, ("seed 1", "seed 2", "base"))
        sides = {
            "another seed": (one, two),
            "another seed, other way": (two, one),
            "shipped base": (one, base),
            "trained after base": (base, one),
            **{name: (one, self._said(name)) for name in MOVES},
        }
        return sides.get(case, (one, one))

    def _spoil(self, said: Floats32, since: int) -> None:
        """Move forecasts by three usual moves of an hour, up or down by chance, from an origin on."""
        values = self._fleet.grid.values
        moves = np.nan_to_num(np.nanmean(np.abs(values[:, :, 12:] - values[:, :, :-12]), axis=2))
        signs = np.random.default_rng(since).choice([-3.0, 3.0], said[:, :, since:, :, 0].shape)
        said[:, :, since:] += (signs * moves[:, :, None, None])[..., None].astype(np.float32)

    def _starts(self, old: Floats32, every: int, n_bins: int) -> Iterator[tuple[int, LayerReplay]]:
        """Yield origins at which a comparison starts, with the layer as it stands after serving `old`."""
        fleet, replay = self._fleet, LayerReplay(self._fleet.grid.values, self._fleet.grid.metrics, HORIZONS)
        first = fleet.begin + DAY
        last = fleet.grid.n_bins - n_bins
        for origin in range(self._rules.first, last):
            if origin >= first and (origin - first) % every == 0:
                yield origin, replay
            replay.settle(origin)
            replay.serve(origin, self._rules.at(origin), self._model_at(old, origin), LEADS)

    def _model_at(self, said: Floats32, origin: int) -> Floats32:
        place = origin - self._fleet.begin
        return said[:, :, place] if place >= 0 else np.full_like(said[:, :, 0], np.nan)

    def _compare(
        self,
        span: tuple[int, int],
        layer: LayerReplay,
        old: Floats32,
        new: Floats32,
        judge_by: Callable[[Evidence, Limits], Verdict],
    ) -> tuple[Verdict, float]:
        """Return the verdict of two models side by side, and how many hours it took."""
        grid, (start, end) = self._fleet.grid, span
        sides = {OLD: copy.deepcopy(layer), NEW: copy.deepcopy(layer)}
        names, rows = grid.server_names, np.arange(len(grid.server_names))
        min_pairs = PromotionSettings().min_pairs
        race = Race(Evidence("1", "new", "old"), names, grid.metrics, HORIZONS, grid.bin_ms, min_pairs)
        percents = np.array([is_percent(name) for name in grid.metrics])
        race.note_moves(rows, grid.values[:, :, start - 8 * DAY : start], percents)
        shape = (2, 2, *grid.values.shape[:2], len(HORIZONS), 3)
        for origin in range(start, end):
            number = grid.start_ms // grid.bin_ms + origin
            closed = ClosedBin(number * grid.bin_ms, names, grid.metrics, grid.values[:, :, origin])
            if race.settle(closed) and judge_by(race.evidence, LIMITS).kind != GOES_ON:
                break
            said = np.empty(shape, np.float32)
            for side, model in ((NEW, new), (OLD, old)):
                own = self._model_at(model, origin)
                said[side, 1] = own
                said[side, 0] = sides[side].serve(origin, self._rules.at(origin), own, LEADS)
            race.open(number, said)
        return judge_by(race.evidence, LIMITS), round((origin - start) / 12, 1)

    def _said(self, name: str) -> Floats32:
        """Return what a model says of the days after the history; it is trained when first asked for."""
        if name in MOVES:
            level = np.nan_to_num(np.nanmean(self._fleet.grid.values, axis=2))[:, :, None, None, None]
            return (self._said("seed 1") + MOVES[name] * level).astype(np.float32)
        if name not in self._forecasts:
            model = Forecaster.load(BASE.resolve()) if name == "base" else self._train(name)
            self._forecasts[name] = self._forecast(model)
        return self._forecasts[name]

    def _train(self, name: str) -> Forecaster:
        """Train on the history, or read what an earlier run trained."""
        folder = self._folder / name.replace(" ", "_")
        seed, trainer = (1, "base_epochs = 1\n") if name == SHORT else (int(name.split()[1]), "")
        registry = Registry(folder)
        if not registry.version_ids():
            folder.mkdir(parents=True, exist_ok=True)
            data, config = folder / "history.parquet", folder / "fleetcast.toml"
            write_export(data, self._fleet.until(self._fleet.begin, 30))
            metrics = json.dumps(list(self._fleet.grid.metrics))
            lines = f"[bins]\nforecast_metrics = {metrics}\n[trainer]\nseed = {seed}\n{trainer}"
            config.write_text(lines, "utf-8")
            flags = ["--incremental", "--data", str(data), "--checkpoint-dir", str(folder)]
            code = tft_trainer.main([*flags, "--config", str(config)])
            if code:
                raise RuntimeError(f"tft_trainer exited {code}")
        return Forecaster.load(registry.version(registry.version_ids()[-1]).model_path)

    def _forecast(self, model: Forecaster) -> Floats32:
        path = self._folder / f"said_{model.version}.npy"
        if not path.exists():
            fleet = self._fleet
            np.save(path, forecast_stretch(model, fleet, fleet.begin, fleet.grid.n_bins))
        found: Floats32 = np.load(path)
        return found

    def _compute_rules(self) -> SceneRules:
        path = self._folder / "rules.npz"
        if not path.exists():
            SceneRules.compute(self._fleet).write(path)
        return SceneRules.read(path)


if __name__ == "__main__":
    raise SystemExit(main())
