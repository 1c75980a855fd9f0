"""Two models beside each other: what both said for the same bins, settled on the same actuals, hour by hour.

Owns: the open forecasts of both sides, the loss of a pair, and when an hour is whole enough to count as a
`Block`. Pure numpy, causal. Does not know: where forecasts come from, what a block is evidence of.

The loss of a series is the mean pinball loss over p10, p50 and p90, in units of the series' own moves within
an hour, cut off at `MOST_LOSS`, so that no single server decides. A pair counts where both sides are
finite, the actual came, and the two models differ: what both forecast alike says nothing about either. A
restart loses the open forecasts of both sides alike, which does not look at the losses. An hour with a
missing bin, or with less than half the pairs that hours have had, is void; one with fewer than `min_pairs`
is too small.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fleetcast.clock import from_ms, iso_z
from fleetcast.promotion.evidence import BLOCK_BINS_MS, Block, Evidence
from fleetcast.schema import QUANTILES, ClosedBin, Floats, Floats32, Longs

NEW, OLD = 0, 1  # sides
SERVED, RAW = 0, 1  # kinds
MOST_LOSS = 10.0
FAR_EVERY = 3  # bins: forecasts further ahead than a block are remembered of every third origin
_LEAST_MOVE = (0.5, 0.05, 1e-3)  # of a percent; of another metric a share of its usual size, and a bit
Flags = NDArray[np.bool_]


@dataclass
class _Hour:
    """The hour of target bins that goes on."""

    number: int
    bins: set[int] = field(default_factory=set)
    pairs: int = 0
    sums: Floats = field(default_factory=lambda: np.zeros((2, 2)))  # (side, kind)
    far_pairs: int = 0
    far: Floats = field(default_factory=lambda: np.zeros(2))  # (side,) served


class Race:
    """Compares two models on the same servers; not thread safe."""

    def __init__(
        self,
        evidence: Evidence,
        server_names: Sequence[str],
        metrics: Sequence[str],
        horizons: Sequence[int],
        bin_ms: int,
        min_pairs: int,
    ) -> None:
        """Go on from what was measured before.

        Args:
            horizons: bins ahead that are settled, rising.
        """
        self.evidence = evidence
        self.rows = {name: row for row, name in enumerate(server_names)}
        self.metrics = tuple(metrics)
        self.horizons = tuple(horizons)
        self._bin_ms, self._min_pairs = bin_ms, min_pairs
        self._block_bins = max(1, BLOCK_BINS_MS // bin_ms)
        self._near = [h for h in horizons if h <= self._block_bins] or [horizons[0]]
        self._open: dict[int, dict[int, Floats32]] = {horizon: {} for horizon in horizons}  # by target bin
        self._scales: Floats = np.full((len(self.rows), len(self.metrics)), np.nan)
        self._hour: _Hour | None = None

    @property
    def n_open(self) -> int:
        """How many origins wait for their bin, over all horizons."""
        return sum(map(len, self._open.values()))

    def note_moves(self, rows: Longs, history: Floats32, is_percent: Flags) -> None:
        """Take in how far series move within an hour, once for each; nothing is compared before.

        Args:
            history: (row, metric, bin) native units, NaN = no record.
        """
        new = np.isnan(self._scales[rows]).any(axis=1)
        if not new.any():
            return
        values = history[new][..., -7 * 24 * self._block_bins :].astype(np.float64)
        moves = np.abs(values[..., self._block_bins :] - values[..., : -self._block_bins])
        is_known = np.isfinite(moves)
        n_known = is_known.sum(axis=-1)
        move = np.where(is_known, moves, 0.0).sum(axis=-1) / np.maximum(n_known, 1)
        size = np.abs(np.nan_to_num(values)).sum(axis=-1) / np.maximum(np.isfinite(values).sum(axis=-1), 1)
        percent, share, bit = _LEAST_MOVE
        scale = np.maximum(move, np.where(is_percent, percent, share * size + bit))
        scale[n_known < 24 * self._block_bins // 2] = np.nan  # young: half a day of moves shows little
        self._scales[rows[new]] = scale

    def open(self, origin: int, said: Floats32) -> None:
        """Remember what both models said from an origin.

        Args:
            origin: number of the bin.
            said: (side, kind, row, metric, horizon, quantile) native units, NaN = no forecast.
        """
        for place, horizon in enumerate(self.horizons):
            kept = said[:, :, :, :, place]
            if horizon > self._block_bins:
                if origin % FAR_EVERY:
                    continue
                kept = kept[:, :1]
            self._open[horizon][origin + horizon] = kept.astype(np.float32)

    def settle(self, closed: ClosedBin) -> bool:
        """Take in a closed bin; return whether an hour ended.

        A bin that closes again finds nothing open any more.
        """
        number = closed.bin_ms // self._bin_ms
        hour, has_ended = number // self._block_bins, False
        if self._hour is not None and hour != self._hour.number:
            self._finish(self._hour)
            self._hour, has_ended = None, True
        if self._hour is None:
            self._hour = _Hour(hour)
        self._hour.bins.add(number)
        actual = self._actual(closed)
        for horizon in self.horizons:
            said = self._open[horizon].pop(number, None)
            if said is not None:
                self._add(self._hour, horizon, said, actual)
            overdue = [target for target in self._open[horizon] if target <= number]
            for target in overdue:
                del self._open[horizon][target]
        return has_ended

    def void(self) -> None:
        """Let the present hour not count."""
        if self._hour is not None:
            self._hour.bins.clear()
            self._hour.bins.add(-1)

    def note_failing(self, why: str) -> bool:
        """Take in why the new model forecast nothing in a sweep, "" = it did; return whether that is news."""
        n_failing = self.evidence.failing + 1 if why else 0
        if not why and not self.evidence.failing:
            return False
        self.evidence = replace(self.evidence, failing=n_failing, why_failing=why)
        return True

    def _actual(self, closed: ClosedBin) -> Floats32:
        """Return (row, metric) what came, NaN = nothing."""
        actual = np.full((len(self.rows), len(self.metrics)), np.nan, np.float32)
        places = [(row, self.rows[name]) for row, name in enumerate(closed.server_names) if name in self.rows]
        columns = [(column, self.metrics.index(name)) for column, name in enumerate(closed.metrics)
                   if name in self.metrics]  # fmt: skip
        if places and columns:
            theirs, ours = np.array(places).T
            their_columns, our_columns = np.array(columns).T
            actual[np.ix_(ours, our_columns)] = closed.values[np.ix_(theirs, their_columns)]
        return actual

    def _add(self, hour: _Hour, horizon: int, said: Floats32, actual: Floats32) -> None:
        losses = np.minimum(_pinball(said, actual) / self._scales, MOST_LOSS)  # (side, kind, row, metric)
        differs = (said[NEW, -1] != said[OLD, -1]).any(axis=-1)
        counts = np.isfinite(losses).all(axis=(0, 1)) & differs
        sums = np.where(counts, losses, 0.0).sum(axis=(2, 3))
        n_pair = int(counts.sum())
        if horizon in self._near:
            hour.pairs += n_pair
            hour.sums += sums
        elif horizon == self.horizons[-1]:
            hour.far_pairs += n_pair
            hour.far += sums[:, SERVED]

    def _finish(self, hour: _Hour) -> None:
        known = self.evidence
        usual = max((block.pairs for block in known.blocks), default=0)
        first = hour.number * self._block_bins
        if hour.bins != set(range(first, first + self._block_bins)) or 2 * hour.pairs < usual:
            self.evidence = replace(known, void=known.void + 1)
        elif hour.pairs < self._min_pairs:
            self.evidence = replace(known, small=known.small + 1)
        else:
            sums = [(float(hour.sums[NEW, kind]), float(hour.sums[OLD, kind])) for kind in (SERVED, RAW)]
            far = (float(hour.far[NEW]), float(hour.far[OLD])) if hour.far_pairs >= self._min_pairs else None
            start = iso_z(from_ms(first * self._bin_ms))
            block = Block(start, hour.pairs, sums[SERVED], sums[RAW], far)
            self.evidence = replace(known, blocks=(*known.blocks, block))


def _pinball(said: Floats32, actual: Floats32) -> Floats:
    """Return the mean pinball loss over the quantiles, (side, kind, row, metric)."""
    error = actual[..., None].astype(np.float64) - said
    shares = np.array(QUANTILES)
    return np.asarray(np.maximum(shares * error, (shares - 1) * error).mean(axis=-1))
