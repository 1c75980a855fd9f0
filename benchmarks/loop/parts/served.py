"""What clients would have got: the expert layer replayed over a scene, beside any model or none.

Owns: the rules' forecasts of a scene, computed once for all policies (they need no model), and when
another model comes. Scenes share what their recorded bins share. The replay is the gate's
(`fleetcast/training/served.py`). Does not know: policies, how a model is trained, scores.

A fleet's layer has WARM_UP_DAYS of evidence about the rules when the first model comes, and none about
the model: what a model says of the days that it was trained on is no evidence.
"""

from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any, Self

import numpy as np

from benchmarks.loop.parts.fleet import DAY, ReplayFleet
from benchmarks.loop.parts.record import HORIZONS
from fleetcast.forecast.encoding import is_percent
from fleetcast.forecast.experts.rules import RULES, RuleForecasts, from_scale, rule_forecasts
from fleetcast.forecast.experts.trend import Trend
from fleetcast.schema import QUANTILES, Floats32, Longs
from fleetcast.training.served import LayerReplay

WARM_UP_DAYS = 7
HISTORY_BINS = 8 * DAY
LEADS: Longs = np.array(HORIZONS)
_ORIGINS_AT_ONCE = 8
_TREND = ("slope", "level", "scatter", "age_bins", "is_clear", "is_loose")
# how many numbers of each kind are kept of a series and origin, in this order
_WIDTHS = (len(RULES) * len(HORIZONS), *[len(HORIZONS)] * 3, 1, 1, *[1] * len(_TREND))


@dataclass(frozen=True, eq=False)
class SceneRules:
    """What the rules say of every series from every origin of a scene, the warm-up included."""

    first: int  # origin bin
    values: Floats32  # (origin, series, number); see `_WIDTHS`
    cpu_s: float

    @classmethod
    def compute(cls, fleet: ReplayFleet, shared: "SceneRules | None" = None) -> Self:
        """Ask the rules.

        Args:
            shared: of the recorded scene: what has not changed in this one is taken from there.
        """
        began_s = process_time()
        grid, first = fleet.grid, max(HISTORY_BINS, fleet.begin - WARM_UP_DAYS * DAY)
        n_series = grid.values.shape[0] * grid.values.shape[1]
        series = grid.values.reshape(n_series, grid.n_bins)
        values = np.empty((grid.n_bins - first, n_series, sum(_WIDTHS)), np.float32)
        since = np.full(n_series, first)
        if shared is not None:
            values[:] = shared.values
            since = fleet.changed_since().ravel()
        flags = np.tile([is_percent(name) for name in grid.metrics], len(grid.server_names))
        for begin in range(first, grid.n_bins, _ORIGINS_AT_ONCE):
            origins = np.arange(begin, min(begin + _ORIGINS_AT_ONCE, grid.n_bins))
            rows = np.flatnonzero(since < origins[-1] + 1)
            if len(rows):
                history = np.stack([series[rows, end - HISTORY_BINS + 1 : end + 1] for end in origins])
                said = rule_forecasts(
                    history.reshape(-1, HISTORY_BINS), np.tile(flags[rows], len(origins)), DAY, HORIZONS[-1]
                )
                values[origins[0] - first : origins[-1] + 1 - first, rows] = _pack(said).reshape(
                    len(origins), len(rows), -1
                )
        return cls(first, values, process_time() - began_s)

    def at(self, origin: int) -> RuleForecasts:
        """Return the rules' forecasts from an origin, at HORIZONS."""
        parts = np.split(self.values[origin - self.first], np.cumsum(_WIDTHS)[:-1], axis=1)
        median, below, above, least, lowest, highest, *trend = parts
        lines: dict[str, Any] = {name: part[:, 0] for name, part in zip(_TREND, trend, strict=True)}
        lines |= {name: lines[name] > 0 for name in _TREND if name.startswith("is_")}
        cube = median.reshape(len(median), len(RULES), len(HORIZONS)).transpose(1, 0, 2)
        return RuleForecasts(cube, below, above, lowest[:, 0], highest[:, 0], least, Trend(**lines))

    def medians(self, fleet: ReplayFleet) -> dict[str, Floats32]:
        """Return what each rule says from the replay on, (server, metric, origin, horizon), native units."""
        grid = fleet.grid
        n_server, n_metric, _ = grid.values.shape
        flags = np.tile([is_percent(name) for name in grid.metrics], n_server)
        parts = self.values[fleet.begin - self.first :, :, : _WIDTHS[0]].transpose(1, 0, 2)
        native = from_scale(parts, flags).reshape(n_server, n_metric, -1, len(RULES), len(HORIZONS))
        return {name: native[:, :, :, place] for place, name in enumerate(RULES)}

    def write(self, path: Path) -> None:
        """Keep them; `read` brings them back."""
        np.savez(path, first=self.first, values=self.values, cpu_s=self.cpu_s)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return what `write` kept."""
        with np.load(path) as found:
            return cls(int(found["first"]), found["values"], float(found["cpu_s"]))


def _pack(said: RuleForecasts) -> Floats32:
    """Return (series, number) at HORIZONS."""
    at = LEADS - 1
    trend = np.stack([getattr(said.trend, name) for name in _TREND], axis=1)
    median = said.median[..., at].transpose(1, 0, 2).reshape(len(said.below), -1)
    halves = [part[:, at] for part in (said.below, said.above, said.least_half)]
    columns = [median, *halves, said.lowest[:, None], said.highest[:, None], trend]
    return np.concatenate(columns, axis=1, dtype=np.float32, casting="unsafe")


def serve(fleet: ReplayFleet, rules: SceneRules, quantiles: Floats32 | None) -> Floats32:
    """Replay the layer over a scene.

    Args:
        quantiles: (server, metric, origin from the replay's first, horizon, quantile) of the models that
            a policy had in service; None = no network at all.
    Returns:
        what clients get, shaped like `quantiles`.
    """
    grid, begin = fleet.grid, fleet.begin
    n_server, n_metric, n_bins = grid.values.shape
    replay = LayerReplay(grid.values, grid.metrics, HORIZONS)
    shape = (n_server, n_metric, len(HORIZONS), len(QUANTILES))
    none = np.full(shape, np.nan, np.float32)
    served = np.empty((n_server, n_metric, n_bins - begin, *shape[2:]), np.float32)
    for origin in range(rules.first, n_bins):
        replay.settle(origin)
        has_model = quantiles is not None and origin >= begin
        model = quantiles[:, :, origin - begin] if quantiles is not None and has_model else none
        answer = replay.serve(origin, rules.at(origin), model, LEADS)
        if origin >= begin:
            served[:, :, origin - begin] = answer
    return served
