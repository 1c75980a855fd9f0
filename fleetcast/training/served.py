"""What clients would have got: the expert layer replayed over recorded bins, beside any model or none.

Owns: the order of a replay (bins settle, an origin is served), and the served losses
of several sides on the held-out tails. The layer is the product's own; the gate and
`benchmarks/loop/` replay it here. Does not know: the rule (`gate`), how a mixture is made.

The gate's replay. The rules (experts that need no model) are asked once per origin, for all sides. For
two days before the tail they are asked every hour, so that the layer knows what they are worth. About
the models it knows nothing when the tail begins: what a model says of the days that it was trained on
is no evidence. So a side is given to the layer, and judged, from its series' own tail on. From then on
each side's layer learns what that side's forecasts came to, as it would in service.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fleetcast.clock import DAY_MS
from fleetcast.forecast.encoding import is_percent
from fleetcast.forecast.experts.layer import ExpertLayer
from fleetcast.forecast.experts.rules import RuleForecasts
from fleetcast.schema import QUANTILES, Floats32, Longs
from fleetcast.training.holdout import HoldOut, Losses

WARM_UP_DAYS = 2
_WARM_UP_ORIGINS = 48  # about one an hour


class LayerReplay:
    """One expert layer over recorded bins: each bin settles once, any origin can be served.

    Not thread safe; origins only go forward.
    """

    def __init__(
        self, values: Floats32, metrics: Sequence[str], horizons: Sequence[int], first_number: int = 0
    ) -> None:
        """Begin without evidence.

        Args:
            values: (row, metric, bin) native units, NaN = no record.
            horizons: the bins ahead that are settled, rising.
            first_number: of the first bin, counted from 1970, as in service.
        """
        percents = np.array([is_percent(name) for name in metrics], np.bool_)
        self.layer = ExpertLayer(percents, tuple(horizons))
        self._values, self._first_number = values, first_number
        self._rows: Longs = np.arange(len(values))
        self._newest: int | None = None

    def settle(self, origin: int) -> None:
        """Let the layer learn from every bin up to and with `origin`, each once."""
        oldest = origin if self._newest is None else self._newest + 1
        for number in range(oldest, origin + 1):
            self.layer.settle(self._first_number + number, self._rows, self._values[:, :, number])
        self._newest = origin

    def serve(
        self,
        origin: int,
        experts: RuleForecasts,
        model: Floats32,
        leads: Longs | None = None,
        rows: Longs | None = None,
    ) -> Floats32:
        """Return what clients get from an origin, after its bin has settled.

        Args:
            experts: what the rules say of these rows.
            model: (row, metric, horizon, quantile), NaN = the model does not forecast.
            leads: as `ExpertLayer.serve` takes them.
            rows: None = all.
        """
        self.settle(origin)
        chosen = self._rows if rows is None else rows
        number = self._first_number + origin
        return self.layer.serve(chosen, number, experts, model, leads)


def served_losses(hold_out: HoldOut, sides: Mapping[str, Losses]) -> dict[str, Losses]:
    """Return what each side's forecasts cost once the expert layer has mixed them.

    Args:
        sides: as `HoldOut.losses` returns them.
    Returns:
        NaN where a series is not replayed, or its own tail has not begun.
    """
    replay = _SidesReplay(hold_out, sides)
    for origin, rows in replay.warm_up():
        replay.serve(origin, rows, place=None)
    for place, origin in enumerate(hold_out.origins.tolist()):
        rows = np.flatnonzero(np.isin(hold_out.replayed, hold_out.rows_at(origin)))
        if len(rows):
            replay.serve(origin, rows, place)
    return replay.losses


class _SidesReplay:
    """The replay of all sides, origin by origin. Its rows are those of `HoldOut.replayed`."""

    def __init__(self, hold_out: HoldOut, sides: Mapping[str, Losses]) -> None:
        self._hold_out, self._sides = hold_out, sides
        grid, servers = hold_out.grid, hold_out.servers[hold_out.replayed]
        self._day_bins = max(1, DAY_MS // grid.bin_ms)
        first_number = grid.start_ms // grid.bin_ms
        values, horizons = grid.values[servers], sorted(set(hold_out.horizons))
        self._layers = {name: LayerReplay(values, grid.metrics, horizons, first_number) for name in sides}
        self._first_held = hold_out.first_held[hold_out.replayed]  # (row, metric)
        self.losses = {name: _unknown(losses) for name, losses in sides.items()}

    def warm_up(self) -> Iterator[tuple[int, Longs]]:
        """Yield the origins before the tail that teach the layer what the rules are worth."""
        tail = int(self._hold_out.origins[0])
        start = max(self._day_bins, tail - WARM_UP_DAYS * self._day_bins)
        if start < tail:
            rows = np.arange(len(self._first_held))
            for origin in self._hold_out.spread(start, tail, _WARM_UP_ORIGINS).tolist():
                yield origin, rows

    def serve(self, origin: int, rows: Longs, place: int | None) -> None:
        """Serve one origin to every side.

        Args:
            rows: that are served.
            place: of the origin in the losses; None = no model forecasts and nothing is judged.
        """
        hold_out = self._hold_out
        window = hold_out.window(origin, hold_out.replayed[rows])
        for number, (name, replay) in enumerate(self._layers.items()):
            if number == 0:  # once for all sides
                experts = replay.layer.experts(window.values, self._day_bins, hold_out.horizon_bins)
            model = self._model(name, origin, rows, place)
            quantiles = replay.serve(origin, experts, model, rows=rows)
            if place is not None:
                self._judge(name, origin, rows, place, np.where(np.isfinite(quantiles), quantiles, model))

    def _model(self, name: str, origin: int, rows: Longs, place: int | None) -> Floats32:
        """Return a side's own forecasts (row, metric, horizon, quantile), NaN before the series' own tail."""
        n_metric, n_horizon = self._first_held.shape[1], self._hold_out.horizon_bins
        said = self._sides[name].quantiles
        if place is None or said is None:
            return np.full((len(rows), n_metric, n_horizon, len(QUANTILES)), np.nan, np.float32)
        is_own = self._is_own(origin, rows)
        return np.where(is_own[..., None, None], said[place, rows], np.float32(np.nan))

    def _is_own(self, origin: int, rows: Longs) -> NDArray[np.bool_]:
        """Return where every bin after an origin is held out, (row, metric)."""
        return np.asarray(origin + 1 >= self._first_held[rows])

    def _judge(self, name: str, origin: int, rows: Longs, place: int, quantiles: Floats32) -> None:
        among = self._hold_out.replayed[rows]
        pinball, errors = self._hold_out.window_losses(quantiles, origin, among)
        is_own = self._is_own(origin, rows)
        losses = self.losses[name]
        losses.pinball[place, among] = np.where(is_own, pinball, np.nan)
        losses.errors[place, among] = np.where(is_own[..., None], errors, np.nan)


def _unknown(losses: Losses) -> Losses:
    """Return losses of the same windows of which nothing is known yet."""
    pinball, errors = (np.full_like(values, np.nan) for values in (losses.pinball, losses.errors))
    return replace(losses, pinball=pinball, errors=errors, quantiles=None)
