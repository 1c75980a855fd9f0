"""The expert layer: each forecast a client gets is put together here: median, then trend, interval, bounds.

    experts = layer.experts(history, day_bins)        once for every model that is set beside them
    quantiles = layer.serve(rows, origin, experts, model_quantiles)
    layer.settle(bin_number, rows, actual)            when a bin closes

Owns: the order of mixing (median, trend, interval, bounds), and what was said from the origins that are
not settled yet. One implementation: serving feeds it live, the gate and the benchmarks replay it.
numpy only. Does not know: names of servers, files, clocks, how a model works. Not thread safe.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast.forecast.experts.mixture import (
    EXPERTS,
    FAR_FROM,
    LAST,
    SPARE_SHARE,
    USUAL,
    Mixture,
    MixtureRates,
)
from fleetcast.forecast.experts.rules import NORMAL_90, RuleForecasts, from_scale, rule_forecasts, to_scale
from fleetcast.forecast.experts.trend import REACHES
from fleetcast.schema import Floats, Floats32, Longs

SPARSE_EVERY = 3  # origins: forecasts for the far horizons are remembered from every third only
_LEAST_SHARE = 0.1  # of the model's half of an interval: the analogues' may not make it smaller
_MOST_OFFSET = 6e4  # of half precision
# places in what is remembered, after the experts: where the trend ends, the interval served, the mixture
# alone, and 1 above the last value where the series had moved
_TREND, _LOW, _MEDIAN, _HIGH, _MIXED, _MOVED, _N_KEPT = (len(EXPERTS) + place for place in range(7))
Flags = NDArray[np.bool_]


class ExpertLayer:
    """Mixes forecasts of one fleet; rows are servers, in the caller's numbering."""

    def __init__(
        self, is_percent: Flags, horizons: Sequence[int] = (1, 12, 96), rates: MixtureRates | None = None
    ) -> None:
        """Begin without evidence.

        Args:
            is_percent: (metric,)
            horizons: the bins ahead that are settled, rising.
        """
        self.mixture = Mixture(is_percent, horizons, rates)
        self._is_percent = is_percent
        self._steps = [SPARSE_EVERY if horizon >= FAR_FROM else 1 for horizon in self.mixture.horizons]
        self._pending = [
            _Pending(-(-horizon // step), len(is_percent))
            for horizon, step in zip(self.mixture.horizons, self._steps, strict=True)
        ]

    def experts(self, history: Floats32, day_bins: int, n_horizon: int) -> RuleForecasts:
        """Return what the rules say.

        Args:
            history: (row, metric, bin) native units, NaN = no record; the last column is the origin.
        """
        flags = np.tile(self._is_percent, len(history))
        return rule_forecasts(history.reshape(-1, history.shape[2]), flags, day_bins, n_horizon)

    def serve(
        self, rows: Longs, origin: int, experts: RuleForecasts, model: Floats32, leads: Longs | None = None
    ) -> Floats32:
        """Mix one origin's forecasts, and remember them until they are settled.

        Args:
            rows: (row,) distinct.
            origin: number of the origin bin.
            experts: of these rows, as `experts` returned them.
            model: (row, metric, horizon, quantile) native units, NaN = the model does not forecast.
            leads: (horizon,) bins ahead that `experts` and `model` are of; None = 1, 2, 3 and so on. A
                replay needs the settled horizons only.
        Returns:
            what clients get, (row, metric, horizon, quantile) native units, non-decreasing on the last axis.
        """
        n_row, n_metric, n_horizon, _ = model.shape
        leads = np.arange(1, n_horizon + 1) if leads is None else leads
        self.mixture.reserve(int(rows.max(initial=-1)) + 1)
        flags = np.tile(self._is_percent, n_row)
        shape = (n_row, n_metric, n_horizon)
        z = to_scale(model.reshape(-1, n_horizon, 3), flags).reshape(*shape, 3)
        has_model: Flags = np.asarray(np.isfinite(z).all(axis=(2, 3)))
        has_moved = self.mixture.has_moved(rows)
        mixed = self.mixture.shares(rows, has_model, has_moved)  # (row, metric, knot, expert)
        shares = self._retreat(rows, mixed)
        between = self.mixture.interpolation(leads)
        said = np.concatenate([z[None, ..., 1], experts.median.reshape(-1, *shape)])  # (expert, ...)
        filled = np.where(np.isfinite(said), said, said[LAST])
        median = np.einsum("rmke,kh,ermh->rmh", shares, between, filled, optimize=True)
        halves = self._halves(z, experts, shape, has_model)
        below, above = self._temper(halves, experts, self.mixture.own_halves(rows, has_moved), between)
        factors = np.einsum("rmkc,kh->crmh", self.mixture.factors(rows, has_moved), between)
        scaled = np.stack([median - below * factors[0], median, median + above * factors[1]], axis=-1)
        self._bound(scaled, z, experts, shape)
        native = from_scale(scaled.reshape(-1, n_horizon, 3), flags).reshape(*shape, 3)
        moves = self._follow_trend(rows, experts, native, leads)
        self._remember(rows, origin, said, native, (moves, mixed, has_moved), leads)
        return native

    def settle(self, number: int, rows: Longs, actual: Floats32) -> None:
        """Learn from a closed bin.

        Args:
            number: of the bin.
            rows: (row,) distinct.
            actual: (row, metric) native units, NaN = no record.
        """
        for knot, horizon in enumerate(self.mixture.horizons):
            pending, origin = self._pending[knot], number - horizon
            if origin % self._steps[knot] or not pending.holds(origin // self._steps[knot]):
                continue
            known = rows < pending.n_rows
            own, came = rows[known], actual[known]
            said = pending.recall(origin // self._steps[knot], own)  # (row, metric, kept) mixing scale
            flags = np.tile(self._is_percent, len(own))
            ends = from_scale(said[..., (_TREND, LAST)].reshape(-1, 2), flags)
            trend, last = np.moveaxis(ends.reshape(*came.shape, 2), -1, 0)
            scaled = to_scale(came.reshape(-1, 1), flags).reshape(came.shape)
            had_moved = said[..., _MOVED] - said[..., LAST] > 0.5
            self.mixture.learn(knot, own, np.moveaxis(said[..., : len(EXPERTS)], -1, 0), came, had_moved)
            self.mixture.learn_widths(knot, own, said[..., _LOW : _HIGH + 1], scaled, had_moved)
            self.mixture.learn_trend(knot, own, trend - last, came - last)
            mixed = from_scale(said[..., _MIXED].reshape(-1, 1), flags).reshape(came.shape)
            self.mixture.learn_lately(knot, own, mixed, last, came)
            if knot == 0:
                self.mixture.learn_apart(own, said[..., USUAL], scaled)

    def copy_of(self, rows: Longs) -> "ExpertLayer":
        """Return a layer that knows of `rows`, in this order, what this one does."""
        self.mixture.reserve(int(rows.max(initial=-1)) + 1)
        copy = ExpertLayer(self._is_percent, self.mixture.horizons, self.mixture.rates)
        for name in Mixture.ROW_ARRAYS:
            setattr(copy.mixture, name, getattr(self.mixture, name)[rows])
        copy.mixture.fleet_widen = self.mixture.fleet_widen.copy()
        for own, other in zip(copy._pending, self._pending, strict=True):
            own.copy_from(other, rows)
        return copy

    def take_model_evidence(self, rows: Longs, other: "ExpertLayer", other_rows: Longs) -> None:
        """Know of the model what another layer learned of it: it comes back into service."""
        self.mixture.reserve(int(rows.max(initial=-1)) + 1)
        self.mixture.take_model_evidence(rows, other.mixture, other_rows)

    def keep_rows(self, rows: Longs) -> None:
        """Forget every row but `rows`, which move up in this order."""
        self.mixture.keep_rows(rows)
        for pending in self._pending:
            pending.keep_rows(rows)

    def pending_arrays(self) -> dict[str, NDArray[Any]]:
        """Return what is not settled yet, by name: to be kept over a restart."""
        arrays: dict[str, NDArray[Any]] = {}
        for horizon, pending in zip(self.mixture.horizons, self._pending, strict=True):
            arrays |= {f"pending_{horizon}_{name}": getattr(pending, name) for name in _Pending.ARRAYS}
        return arrays

    def restore_pending(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take up what `pending_arrays` returned; what is missing or of another shape is left out."""
        for horizon, pending in zip(self.mixture.horizons, self._pending, strict=True):
            found = {name: arrays.get(f"pending_{horizon}_{name}") for name in _Pending.ARRAYS}
            pending.restore(found)

    def _retreat(self, rows: Longs, mixed: Floats32) -> Floats32:
        """Return shares (row, metric, knot, expert) with the last value where the mixture fails lately."""
        retreat = self.mixture.retreat(rows)[..., None]
        shares = mixed * (1 - retreat)
        shares[..., LAST : LAST + 1] += retreat
        return shares

    def _halves(
        self, z: Floats32, experts: RuleForecasts, shape: tuple[int, int, int], has_model: Flags
    ) -> tuple[Floats32, Floats32]:
        """Return how far the interval reaches below and above: the model's and the analogues' mean."""
        halves = []
        for model, analogue in (
            (z[..., 1] - z[..., 0], experts.below),
            (z[..., 2] - z[..., 1], experts.above),
        ):
            other = analogue.reshape(shape)
            both = np.sqrt(np.maximum(model, 0) * np.maximum(other, _LEAST_SHARE * model))
            alone = np.where(has_model[..., None], model, other)
            half = np.where(np.isfinite(both), both, np.nan_to_num(alone))
            halves.append(np.maximum(half, experts.least_half.reshape(shape)).astype(np.float32))
        return halves[0], halves[1]

    def _temper(
        self,
        halves: tuple[Floats32, Floats32],
        experts: RuleForecasts,
        own: tuple[Floats32, Floats32],
        between: Floats32,
    ) -> list[Floats32]:
        """Return halves nearer to what the series' own misses ask for."""
        asked, say = own  # (row, metric, knot, side), (row, metric, knot)
        weight, found = say @ between, []  # (row, metric, horizon)
        least = experts.least_half.reshape(weight.shape)
        for side, half in enumerate(halves):
            wanted = np.maximum(asked[..., side] @ between, least)
            found.append(np.asarray(half * (wanted / half) ** weight, np.float32))
        return found

    def _bound(
        self, scaled: Floats32, z: Floats32, experts: RuleForecasts, shape: tuple[int, int, int]
    ) -> None:
        """Keep the interval in the known range and a margin.

        Where the median itself leaves the range, as on a series that grows, the band goes as far past the
        median as that goes past the range, and the margin: what was seen does not bound what is new.
        """
        n_row, n_metric, _ = shape
        lowest, highest = (
            values.reshape(n_row, n_metric, 1, 1) for values in (experts.lowest, experts.highest)
        )
        margin, median = 0.1 * (highest - lowest) + 1e-3, scaled[..., 1:2]
        below, above = median - scaled[..., :1], scaled[..., 2:] - median
        floor = np.minimum(lowest - margin, median - np.minimum(below, margin + lowest - median))
        floor = np.where(lowest >= 0, np.maximum(floor, 0), floor)
        ceiling = np.maximum(highest + margin, median + np.minimum(above, margin + median - highest))
        is_capped = self._is_percent[None, :, None, None] & (highest <= 100)
        ceiling = np.where(is_capped, np.minimum(ceiling, 100), ceiling)
        floor = np.minimum(np.nan_to_num(floor, nan=-np.inf), median)
        ceiling = np.maximum(np.nan_to_num(ceiling, nan=np.inf), median)
        np.clip(scaled, floor, ceiling, out=scaled)

    def _follow_trend(self, rows: Longs, experts: RuleForecasts, native: Floats32, leads: Longs) -> Floats32:
        """Move forecasts onto a clear trend, in place; return what each trend says, clear or not.

        Returns:
            (row, metric, knot) native units from now, 0 where nothing looks like a trend.
        """
        n_row, n_metric, n_horizon, _ = native.shape
        trend, horizons = experts.trend, self.mixture.horizons
        moves = np.stack([trend.move(horizon) for horizon in horizons], axis=-1)
        loose = np.where(trend.is_loose[:, None], moves, 0.0).reshape(n_row, n_metric, -1)
        clear = np.flatnonzero(trend.is_clear)
        if len(clear):
            belief = self.mixture.belief(rows, loose).reshape(n_row * n_metric, -1)[clear]
            belief = belief @ self.mixture.interpolation(leads)  # (series, horizon)
            line = trend.of(clear)
            ends = [[line.move(lead, reach) for lead in leads.tolist()] for reach in REACHES]
            goes = np.array(ends) * np.stack([belief.T, belief.T, np.ones_like(belief.T)])
            goes = np.sort(goes, axis=0).transpose(2, 1, 0)  # (series, horizon, quantile)
            spread = NORMAL_90 * np.stack([line.spread(lead) for lead in leads.tolist()], axis=-1)
            rise = line.level[:, None, None] + goes
            rise += spread[..., None] * np.array([-1.0, 0.0, 1.0])
            flat = native.reshape(n_row * n_metric, n_horizon, 3)
            own = flat[clear]
            trusted = np.asarray(own + belief[..., None] * (rise - own), np.float32)
            least = NORMAL_90 * trend.scatter[clear, None]
            flat[clear] = self._possible(trusted, clear % n_metric, own, least)
        return np.asarray(loose, np.float32)

    def _possible(self, line: Floats32, metrics: Longs, own: Floats32, least: Floats) -> Floats32:
        """Keep a line below 100 of a percent and above 0, or as far as the forecast without it went.

        Where it meets its bound, the interval reaches back by `least`, (series, 1): as far as its noise does.
        """
        ceiling = np.where(self._is_percent[metrics], 100.0, np.inf)[:, None, None]
        floor = np.minimum(own.min(axis=(1, 2), keepdims=True), 0.0)
        ceiling = np.maximum(ceiling, own.max(axis=(1, 2), keepdims=True))
        kept = np.clip(line, floor, ceiling)
        kept[..., 0] = np.minimum(kept[..., 0], kept[..., 1] - least)
        kept[..., 2] = np.maximum(kept[..., 2], kept[..., 1] + least)
        return np.clip(kept, floor, ceiling)

    def _remember(
        self,
        rows: Longs,
        origin: int,
        said: Floats32,
        native: Floats32,
        state: tuple[Floats32, Floats32, Flags],
        leads: Longs,
    ) -> None:
        moves, mixed, has_moved = state
        n_row, n_metric = native.shape[:2]
        flags = np.tile(self._is_percent, n_row)
        last = from_scale(said[LAST, :, :, :1].reshape(-1, 1), flags).reshape(n_row, n_metric)
        for knot, horizon in enumerate(self.mixture.horizons):
            if origin % self._steps[knot] or horizon > leads[-1]:
                continue
            place = int(np.searchsorted(leads, horizon))
            kept = np.empty((n_row, n_metric, _N_KEPT), np.float32)
            kept[..., : len(EXPERTS)] = np.moveaxis(said[..., place], 0, -1)
            kept[..., _TREND] = last + moves[..., knot]
            kept[..., _LOW : _HIGH + 1] = native[:, :, place]
            sides = to_scale(kept[..., _TREND:_MIXED].reshape(-1, _MIXED - _TREND), flags)
            kept[..., _TREND:_MIXED] = sides.reshape(n_row, n_metric, -1)
            filled = np.where(np.isfinite(said[..., place]), said[..., place], said[LAST, ..., place])
            kept[..., _MIXED] = np.einsum("rme,erm->rm", mixed[:, :, knot], filled)
            kept[..., _MOVED] = kept[..., LAST] + has_moved
            self._pending[knot].put(origin // self._steps[knot], rows, kept)


class _Pending:
    """What was said at one horizon from the newest origins, a ring; offsets from the last value are small."""

    ARRAYS = ("origins", "last", "offsets")

    def __init__(self, n_slot: int, n_metric: int) -> None:
        self.origins: Longs = np.full(n_slot, -1, np.int64)
        self.last: Floats32 = np.full((n_slot, 0, n_metric), np.nan, np.float32)  # mixing scale
        self.offsets: NDArray[np.float16] = np.full((n_slot, 0, n_metric, _N_KEPT), np.nan, np.float16)

    @property
    def n_rows(self) -> int:
        return int(self.last.shape[1])

    def holds(self, number: int) -> bool:
        """Whether forecasts of this origin are remembered."""
        return bool(self.origins[number % len(self.origins)] == number)

    def put(self, number: int, rows: Longs, kept: Floats32) -> None:
        """Remember (row, metric, kept) of an origin; an older one in its place is forgotten."""
        self._reserve(int(rows.max(initial=-1)) + 1)
        slot = number % len(self.origins)
        if self.origins[slot] != number:
            self.last[slot], self.offsets[slot] = np.nan, np.nan
            self.origins[slot] = number
        last = kept[..., LAST]
        self.last[slot, rows] = last
        self.offsets[slot, rows] = np.clip(kept - last[..., None], -_MOST_OFFSET, _MOST_OFFSET)

    def recall(self, number: int, rows: Longs) -> Floats32:
        """Return (row, metric, kept) of an origin."""
        slot = number % len(self.origins)
        return np.asarray(self.offsets[slot, rows].astype(np.float32) + self.last[slot, rows][..., None])

    def keep_rows(self, rows: Longs) -> None:
        """Forget every row but `rows`, which move up in this order."""
        self._reserve(int(rows.max(initial=-1)) + 1)
        self.last, self.offsets = self.last[:, rows], self.offsets[:, rows]

    def copy_from(self, other: "_Pending", rows: Longs) -> None:
        """Remember of `rows`, in this order, what another one does."""
        other._reserve(int(rows.max(initial=-1)) + 1)
        self.origins = other.origins.copy()
        self.last, self.offsets = other.last[:, rows], other.offsets[:, rows]

    def restore(self, arrays: Mapping[str, NDArray[Any] | None]) -> None:
        """Take up arrays of an earlier run, if they fit in shape and kind."""
        origins, last, offsets = (arrays[name] for name in self.ARRAYS)
        if origins is None or last is None or offsets is None or origins.shape != self.origins.shape:
            return
        n_rows = last.shape[1] if last.ndim == 3 else 0
        if last.shape != (len(origins), n_rows, self.last.shape[2]) or offsets.shape != (
            *last.shape,
            _N_KEPT,
        ):
            return
        kinds = origins.dtype, last.dtype, offsets.dtype
        if kinds != (self.origins.dtype, self.last.dtype, self.offsets.dtype):
            return
        self.origins, self.last, self.offsets = origins.copy(), last.copy(), offsets.copy()

    def _reserve(self, n_rows: int) -> None:
        missing = n_rows - self.n_rows
        if missing > 0:
            n_slot, n_metric = len(self.origins), self.last.shape[2]
            more = np.full((n_slot, max(missing, self.n_rows // SPARE_SHARE), n_metric), np.nan, np.float32)
            self.last = np.concatenate([self.last, more], axis=1)
            offsets = np.full((*more.shape, _N_KEPT), np.nan, np.float16)
            self.offsets = np.concatenate([self.offsets, offsets], axis=1)
