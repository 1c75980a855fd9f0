"""What was learned from settled forecasts: each expert's weight, how wide intervals are, trust in trends.

Owns: per (row, metric, settled horizon) how well each mixture of experts did lately, the shares that
follow, how wide the interval has to be, and how far to believe a trend. numpy only, causal: it knows
what `learn` was given and nothing else. Does not know: names, files, how an expert works.

1. The median is a mixture of experts: the model and the rules of `rules.RULES`. All pairs, half and
   half, compete with the single experts; each is weighted by exp(-sharpness * its loss over the best
   one's). Losses are relative to the last value's on the same occasions, so a mixture with a model that
   has just come is compared fairly with one that needs none. A series with little evidence borrows the
   fleet's.
2. A half of the interval is drawn towards what the series' own misses ask for, and then stretched by
   a factor, moved up by a miss and down by a hit so that one in ten is missed on either side (adaptive
   conformal inference, Gibbs and Candes, arXiv:2106.00170, on the logarithm of the factor): a part
   common to the fleet's metric, which learns from every series at once, and a part of the series,
   which takes over as its own forecasts settle: one in ten is to be missed of each series.
3. The belief in a trend is the slope of what happened on what the trend said, through the origin.
4. A series that has been apart from its usual day for an hour, by far more than it ever is, has moved:
   another service runs there, a neighbour failed over. What was learned while it was at home says
   nothing about it, so evidence and widths are kept for both states apart, and what is known about a
   series that has just moved is what the fleet's moved ones showed, and before there are any, that the
   experts that begin at the present value are to be preferred.
5. Evidence of weeks is slow to forget. So beside it stands what came of the last hours: where the last
   value beats the mixture most of the time, and by more than a tenth, it takes the mixture's place until
   the mixture beats it again. A loss counts as twice a usual one at most, or one burst would decide. Far
   ahead, the last hours are nearly one forecast, and decide nothing.

Between the settled horizons all of it is interpolated over the logarithm of the horizon.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from fleetcast.forecast.experts.rules import RULES, from_scale
from fleetcast.schema import QUANTILES, Floats, Floats32, Longs

EXPERTS = ("model", *RULES)
MODEL, LAST = 0, 1
USUAL = EXPERTS.index("usual")
AT_HOME, MOVED = 0, 1  # states of a series
_UNIT = np.eye(len(EXPERTS), dtype=np.float32)
# (mixture, expert): each alone, then all pairs
MIXTURES: Floats32 = np.array([*_UNIT, *((a + b) / 2 for a, b in combinations(_UNIT, 2))], np.float32)
NEEDS_MODEL = MIXTURES[:, MODEL] > 0
_MISS = QUANTILES[0]  # share of actuals that should lie outside on either side
_WIDEN_LIMIT = 1.5  # logarithm: a half of an interval changes by a factor of 4.5 at most
_LEAST_LOSS = 1e-6
_WORST = 10.0  # a loss beyond this many times the best one's says no more
# experts that know where a moved series usually is, and not that it is no longer there
_STAYS_BEHIND = (MIXTURES[:, [EXPERTS.index("yesterday"), USUAL]].sum(axis=1) > 0) | NEEDS_MODEL
_HALF_OF_MISS = 3.21  # of a normal distribution: its 90 % quantile over its mean miss on one side
LEAST_APART = (0.5, 0.05)  # of a percent, of a rate's logarithm: what to be apart means at least
FAR_FROM = 24  # bins ahead: forecasts of one hour are nearly one sample there
_LATELY_LEAST, _LATELY_MOST = 24, 2.0  # settled forecasts that tell what is usual; times that, a loss counts
SPARE_SHARE = 8  # rows are added by an eighth: a large fleet's spare ones would take tens of MB
DAY_SEEN = 288  # bins that show how far from usual a series usually is
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class MixtureRates:
    """How fast the mixture learns; chosen on other servers (docs/decisions/expert-layer.md)."""

    half_life: tuple[float, float] = (400.0, 800.0)  # settled forecasts: at 1 bin, at 96 bins ahead
    sharpness: float = 100.0  # how decidedly the better mixture is preferred
    doubt: tuple[float, float] = (
        3.0,
        30.0,
    )  # settled forecasts after which a series' own evidence has half its say
    least: float = 12.0  # settled forecasts of the fleet's metric before which nothing is mixed
    width_say: tuple[float, float] = (
        0.4,
        0.6,
    )  # of a series' own misses in how wide its intervals are, at most
    width_doubt: tuple[float, float] = (24.0, 48.0)  # settled forecasts after which it is half of that
    widen_step: tuple[float, float] = (0.05, 0.01)  # of the series' factor: at 1 bin, at 96
    fleet_step: tuple[float, float] = (0.1, 0.05)  # of the fleet's factor
    fleet_doubt: float = 4.0  # times `doubt`: settled forecasts after which the fleet's factor counts half
    trend_half_life: float = 576.0  # bins: two days
    trend_prior: float = 24.0  # how many bins of the present trend its prior belief is worth
    apart_half_life: tuple[float, float] = (
        8.0,
        864.0,
    )  # bins: of how far from usual, of how far it usually is
    borrow: float = 0.7  # power of how a series differs from the fleet at a nearer horizon
    apart_ratio: float = 2.5  # times how far it usually is: the series has moved
    moved_prior: tuple[float, float] = (1.3, 20.0)  # loss of experts that stay behind, worth so many series
    lately_half_life: tuple[float, float] = (12.0, 4.0)  # settled forecasts: what `lately` is
    lately_prior: float = 0.67  # share of what is usual in what is held against the mixture
    lately_margin: float = 1.1  # how much worse than the last value it may be
    lately_balance: float = 0.35  # how much more often the last value has to be nearer than not
    lately_sharpness: float = 30.0


class Mixture:
    """Learns from settled forecasts and says how to mix new ones; not thread safe."""

    def __init__(
        self,
        is_percent: Flags,
        horizons: Sequence[int] = (1, 12, 96),
        rates: MixtureRates | None = None,
    ) -> None:
        """Begin without evidence.

        Args:
            is_percent: (metric,) whether it is measured in points of a hundred.
            horizons: the bins ahead that are settled, rising.
        """
        self.is_percent = is_percent
        self.horizons = tuple(horizons)
        self.rates = rates or MixtureRates()
        n_metric, n_knot, n_mixture = len(is_percent), len(self.horizons), len(MIXTURES)
        # (row, metric, state, knot, ...)
        self.losses: Floats32 = np.zeros((0, n_metric, 2, n_knot, n_mixture), np.float32)
        # [all, with the model]: how many forecasts the losses are of, and the last value's losses on them
        self.counts: Floats32 = np.zeros((0, n_metric, 2, n_knot, 2), np.float32)
        self.last_losses: Floats32 = np.zeros((0, n_metric, 2, n_knot, 2), np.float32)
        self.widen: Floats32 = np.zeros((0, n_metric, 2, n_knot, 2), np.float32)  # [below, above], logarithms
        # [mean miss below, above, forecasts seen] of what was served, mixing scale
        self.misses: Floats32 = np.zeros((0, n_metric, 2, n_knot, 3), np.float32)
        self.fleet_widen: Floats32 = np.zeros((n_metric, 2, n_knot, 2), np.float32)
        self.trend_sums: Floats32 = np.zeros((0, n_metric, n_knot, 2), np.float32)  # [said * came, said^2]
        # [how far from usual lately, how far usually, bins seen], mixing scale
        self.apart: Floats32 = np.zeros((0, n_metric, 3), np.float32)
        # [mixture's loss, last value's loss] lately and usually, how much more often the last value was
        # nearer lately (-1 to 1), forecasts seen
        self.lately: Floats32 = np.zeros((0, n_metric, n_knot, 6), np.float32)
        self._pooled: tuple[Floats32, Floats32] | None = None  # of all rows, until they change

    ROW_ARRAYS = ("losses", "counts", "last_losses", "widen", "misses", "trend_sums", "apart", "lately")

    def reserve(self, n_rows: int) -> None:
        """Make room for rows without evidence."""
        missing = n_rows - len(self.counts)
        if missing > 0:
            for name in self.ROW_ARRAYS:
                have = getattr(self, name)
                more = np.zeros((max(missing, len(have) // SPARE_SHARE), *have.shape[1:]), np.float32)
                setattr(self, name, np.concatenate([have, more]))

    def keep_rows(self, rows: Longs) -> None:
        """Forget every row but `rows`, which move up in this order."""
        for name in self.ROW_ARRAYS:
            setattr(self, name, getattr(self, name)[rows])
        self._pooled = None

    def take_model_evidence(self, rows: Longs, other: "Mixture", other_rows: Longs) -> None:
        """Replace what is known about the model in some rows by what another mixture knows in its own."""
        losses = self.losses[rows]
        losses[..., NEEDS_MODEL] = other.losses[other_rows][..., NEEDS_MODEL]
        self.losses[rows] = losses
        self.counts[rows, ..., 1] = other.counts[other_rows, ..., 1]
        self.last_losses[rows, ..., 1] = other.last_losses[other_rows, ..., 1]
        self._pooled = None

    def learn(self, knot: int, rows: Longs, said: Floats32, actual: Floats32, has_moved: Flags) -> None:
        """Take in what one bin settled at one horizon.

        Args:
            knot: index into `horizons`.
            rows: (row,) distinct.
            said: (expert, row, metric) on the mixing scale; the model NaN where there was none, all NaN
                where nothing was forecast.
            actual: (row, metric) native units, NaN = unsettled.
            has_moved: (row, metric) at the origin.
        """
        self._pooled = None
        self.reserve(int(rows.max(initial=-1)) + 1)
        has_model = np.isfinite(said[MODEL])
        is_known = np.isfinite(said[LAST]) & np.isfinite(actual)
        filled = np.where(np.isfinite(said), said, said[LAST])
        mixed = self._native(np.einsum("xe,erm->mrx", MIXTURES, filled)).transpose(1, 0, 2)
        errors = np.abs(mixed - actual[..., None])  # (row, metric, mixture)
        flags = np.stack([is_known, is_known & has_model], axis=-1)  # (row, metric, [all, with the model])
        keep = np.where(flags, np.float32(0.5 ** (1 / self._rate("half_life", knot))), np.float32(1))
        last, place = errors[..., LAST : LAST + 1], (*self._place(rows, has_moved), knot)
        for sums, new in ((self.counts, flags.astype(np.float32)), (self.last_losses, last)):
            sums[place] = sums[place] * keep + np.where(flags, new, np.float32(0))
        which = NEEDS_MODEL.astype(np.int64)  # (mixture,) whose occasions count
        self.losses[place] = self.losses[place] * keep[..., which] + np.where(
            flags[..., which], errors, np.float32(0)
        )

    def learn_lately(self, knot: int, rows: Longs, mixed: Floats32, last: Floats32, actual: Floats32) -> None:
        """Take in what the mixture and the last value said, all (row, metric) native units."""
        errors = np.abs(np.stack([mixed, last], axis=-1) - actual[..., None])
        old = self.lately[rows, :, knot]
        near, usual, balance, seen = old[..., :2], old[..., 2:4], old[..., 4:5], old[..., 5:]
        lives = self._rate("lately_half_life", knot), self._rate("half_life", knot)
        fast, slow = (np.maximum(1 - 0.5 ** (1 / life), 1 / (seen + 1)) for life in lives)
        most = np.where(seen < _LATELY_LEAST, np.inf, _LATELY_MOST * usual.mean(axis=-1, keepdims=True))
        wins = np.sign(errors[..., :1] - errors[..., 1:])
        parts = [
            near + fast * (np.minimum(errors, most) - near),
            usual + slow * (errors - usual),
            balance + fast * (wins - balance),
            seen + 1,
        ]
        is_known = np.isfinite(errors).all(axis=-1, keepdims=True)
        self.lately[rows, :, knot] = np.where(is_known, np.concatenate(parts, axis=-1), old)

    def retreat(self, rows: Longs) -> Floats32:
        """Return (row, metric, knot) how far the last value takes the mixture's place, 0 to 1."""
        found = self.lately[rows]
        prior = self.rates.lately_prior
        mixed, last = (found[..., side] + prior * found[..., 2 + side] + _LEAST_LOSS for side in (0, 1))
        worse = np.minimum(mixed / (self.rates.lately_margin * last), 2) - 1
        share = 1 / (1 + np.exp(-self.rates.lately_sharpness * worse))
        is_told = (found[..., 4] > self.rates.lately_balance) & (found[..., 5] >= self.rates.least)
        is_told &= np.array(self.horizons) < FAR_FROM
        return np.asarray(np.where(is_told, share, 0), np.float32)

    def learn_apart(self, rows: Longs, usual: Floats32, actual: Floats32) -> None:
        """Take in how far actuals were from the usual day, both (row, metric) on the mixing scale."""
        error, (fast, slow) = actual - usual, (0.5 ** (1 / life) for life in self.rates.apart_half_life)
        is_known = np.isfinite(error)
        lately, usually, seen = np.moveaxis(self.apart[rows], -1, 0)
        moved = fast * lately + (1 - fast) * np.where(is_known, error, 0)
        size = np.where(seen < DAY_SEEN, np.abs(moved), np.minimum(np.abs(moved), 2 * usually))
        share = np.maximum(1 - slow, 1 / (seen + 1))  # a plain mean at first
        new = np.stack([moved, usually + share * (size - usually), seen + 1], axis=-1)
        self.apart[rows] = np.where(is_known[..., None], new, self.apart[rows])

    def has_moved(self, rows: Longs) -> Flags:
        """Return (row, metric) whether a series is far from its usual day, and has been for an hour."""
        lately, usually, seen = np.moveaxis(self.apart[rows], -1, 0)
        least = np.where(self.is_percent, *LEAST_APART)
        return np.asarray((np.abs(lately) > self.rates.apart_ratio * usually + least) & (seen >= DAY_SEEN))

    def learn_widths(
        self, knot: int, rows: Longs, served: Floats32, actual: Floats32, has_moved: Flags
    ) -> None:
        """Take in whether actuals (row, metric) lay within what was served, (row, metric, quantile).

        All on the mixing scale.
        """
        is_known = np.isfinite(actual) & np.isfinite(served).all(axis=-1)
        missed = np.stack([actual < served[..., 0], actual > served[..., 2]], axis=-1)
        excess = np.where(is_known[..., None], missed - np.float32(_MISS), np.float32(0))
        place = (*self._place(rows, has_moved), knot)
        self._learn_misses(place, knot, np.where(is_known, actual - served[..., 1], np.float32(np.nan)))
        self._widen(place, knot, excess, (is_known & ~has_moved, is_known & has_moved))

    def _widen(
        self, place: tuple[Longs, Longs, Longs, int], knot: int, excess: Floats32, known: tuple[Flags, Flags]
    ) -> None:
        """Move the factors by excess (row, metric, side) of misses; `known` is (row, metric) by state.

        A factor at its limit cannot answer, so its series has no say in the fleet's: one that never moves
        would narrow the intervals of all others for ever.
        """
        fleet = self._fleet_part(place[:3])[:, :, knot]
        total = self.widen[place] + fleet
        step = self._rate("widen_step", knot)
        has_say = (np.abs(total) < _WIDEN_LIMIT - step) | (np.sign(total) != np.sign(excess))
        moved = self.widen[place] + step * excess
        self.widen[place] = np.clip(moved, -_WIDEN_LIMIT - fleet, _WIDEN_LIMIT - fleet)
        for state, is_there in enumerate(known):
            counts = is_there[..., None] & has_say
            mean = np.where(counts, excess, np.float32(0)).sum(axis=0) / np.maximum(counts.sum(axis=0), 1)
            changed = self.fleet_widen[:, state, knot] + self._rate("fleet_step", knot) * mean
            self.fleet_widen[:, state, knot] = np.clip(changed, -_WIDEN_LIMIT, _WIDEN_LIMIT)

    def take_over_fleet_part(self) -> None:
        """Give each series, as its own, what would no longer count of the fleet's factor: nothing jumps."""
        own = self.widen + self.fleet_widen * (1 - self._fleet_share(self.misses))
        self.widen = np.asarray(np.clip(own, -_WIDEN_LIMIT, _WIDEN_LIMIT), np.float32)

    def _fleet_part(self, place: tuple[Longs, Longs, Longs]) -> Floats32:
        """Return (row, metric, knot, side) the fleet's part of factors, which own settled forecasts end.

        Otherwise the fleet's mean would be right, and each series wrong: those that are easy to forecast
        would narrow the intervals of all others.
        """
        share = self._fleet_share(self.misses[place])
        return np.asarray(self.fleet_widen[place[1:]] * share, np.float32)

    def _fleet_share(self, misses: Floats32) -> Floats32:
        """Return (..., knot, 1) how far the fleet's factor counts beside such evidence, 0 to 1."""
        doubt = self.rates.fleet_doubt * self._by_knot("doubt")[:, None]
        return np.asarray(doubt / (misses[..., 2:] + doubt), np.float32)

    def _learn_misses(self, place: tuple[Longs, Longs, Longs, int], knot: int, miss: Floats32) -> None:
        """Take in actual minus median, (row, metric), NaN = unknown."""
        old = self.misses[place]
        share = np.maximum(1 - 0.5 ** (1 / self._rate("half_life", knot)), 1 / (old[..., 2] + 1))
        sides = np.stack([np.maximum(-miss, 0), np.maximum(miss, 0)], axis=-1)
        new = old[..., :2] + share[..., None] * (sides - old[..., :2])
        is_known = np.isfinite(miss)[..., None]
        self.misses[place] = np.where(is_known, np.concatenate([new, old[..., 2:] + 1], axis=-1), old)

    def learn_trend(self, knot: int, rows: Longs, said: Floats32, came: Floats32) -> None:
        """Take in what a trend said, (row, metric) units moved, 0 = no trend, and what came."""
        is_known = np.isfinite(said) & np.isfinite(came)
        said, came = np.where(is_known, said, 0), np.where(is_known, came, 0)
        came = np.clip(came, -1.5 * np.abs(said), 1.5 * np.abs(said))
        keep = np.float32(0.5 ** (1 / self.rates.trend_half_life))
        sums = np.stack([said * came, said * said], axis=-1)
        self.trend_sums[rows, :, knot] = self.trend_sums[rows, :, knot] * keep + sums

    def belief(self, rows: Longs, move: Floats) -> Floats32:
        """Return (row, metric, knot) the share of a trend's move to follow, 0 to 1.

        Args:
            move: (row, metric, knot) how far the present trend says the series will go.
        """
        prior = self.rates.trend_prior * np.square(move) + 1e-9
        sums = self.trend_sums[rows]
        return np.asarray(np.clip((sums[..., 0] + prior) / (sums[..., 1] + prior), 0, 1), np.float32)

    def shares(self, rows: Longs, has_model: Flags, has_moved: Flags) -> Floats32:
        """Return the shares (row, metric, knot, expert); they sum to 1.

        Args:
            has_model: (row, metric) whether the model forecasts now.
            has_moved: (row, metric) as `has_moved` says.
        """
        place = self._place(rows, has_moved)
        relative, say = self._relative(self.losses[place], self.counts[place], self.last_losses[place])
        fleet, fleet_count = self._of_fleet()
        relative = self._borrow(relative, say, fleet[place[1:]])
        relative = np.where(has_model[..., None, None] | ~NEEDS_MODEL, relative, np.float32(np.inf))
        relative = np.maximum(relative, np.float32(_LEAST_LOSS))
        over_best = np.minimum(relative / relative.min(axis=-1, keepdims=True), np.float32(_WORST))
        weights = np.exp(-np.float32(self.rates.sharpness) * (over_best - 1))
        weights[~np.isfinite(relative)] = 0
        weights /= weights.sum(axis=-1, keepdims=True)
        alone = np.where(has_model[..., None], _UNIT[MODEL], _UNIT[LAST])[:, :, None]
        count = np.maximum(self.counts[rows][:, :, AT_HOME, :, 0], fleet_count)
        is_known = (count >= self.rates.least)[..., None]
        return np.asarray(np.where(is_known, weights @ MIXTURES, alone), np.float32)

    def factors(self, rows: Longs, has_moved: Flags) -> Floats32:
        """Return (row, metric, knot, [below, above]) by how much to stretch the halves of an interval."""
        place = self._place(rows, has_moved)
        widen = np.clip(self.widen[place] + self._fleet_part(place), -_WIDEN_LIMIT, _WIDEN_LIMIT)
        return np.asarray(np.exp(widen), np.float32)

    def own_halves(self, rows: Longs, has_moved: Flags) -> tuple[Floats32, Floats32]:
        """Return halves that misses so far ask for, (row, metric, knot, [below, above]), and their say."""
        found = self.misses[self._place(rows, has_moved)]
        most, doubt = self._by_knot("width_say"), self._by_knot("width_doubt")
        say = most * found[..., 2] / (found[..., 2] + doubt)
        return np.asarray(_HALF_OF_MISS * found[..., :2], np.float32), np.asarray(say, np.float32)

    def interpolation(self, leads: Longs) -> Floats32:
        """Return (knot, lead) the weights of the settled horizons at other bins ahead."""
        steps, knots = np.log(leads), np.log(self.horizons)
        return np.stack([np.interp(steps, knots, unit) for unit in np.eye(len(knots))]).astype(np.float32)

    def _relative(self, losses: Floats32, counts: Floats32, last: Floats32) -> tuple[Floats32, Floats32]:
        """Return losses over the last value's, and how much of a say they have, 0 to 1."""
        which = NEEDS_MODEL.astype(np.int64)
        own = np.maximum(last, _LEAST_LOSS * np.maximum(counts, 1))[..., which]
        counts = counts[..., which]
        relative = np.where(counts > 0, losses / own, np.float32(1))
        doubt = self._by_knot("doubt")[:, None]
        return np.minimum(relative, np.float32(_WORST)), counts / (counts + doubt)

    def _place(self, rows: Longs, has_moved: Flags) -> tuple[Longs, Longs, Longs]:
        """Return the index of (row, metric) in arrays of rows, metrics and states."""
        return rows[:, None], np.arange(len(self.is_percent))[None], has_moved.astype(np.int64)

    def _borrow(self, own: Floats32, say: Floats32, fleet: Floats32) -> Floats32:
        """Return relative losses, (row, metric, knot, mixture): a series' own as far as they have a say.

        The rest is the fleet's, times what the series differs from the fleet at the next nearer horizon: a
        mixture that fails an hour ahead is not trusted eight hours ahead before its first forecast is due.
        """
        found: Floats32 = np.empty_like(own)
        nearer: Floats32 = np.ones_like(own[:, :, 0])
        for knot in range(own.shape[2]):
            expected = fleet[:, :, knot] * nearer ** np.float32(self.rates.borrow)
            found[:, :, knot] = say[:, :, knot] * own[:, :, knot] + (1 - say[:, :, knot]) * expected
            ratio = np.maximum(found, _LEAST_LOSS)[:, :, knot] / np.maximum(fleet, _LEAST_LOSS)[:, :, knot]
            nearer = np.asarray(ratio, np.float32)
        return found

    def _of_fleet(self) -> tuple[Floats32, Floats32]:
        """Return the fleet's mean relative losses (metric, state, knot, mixture), counts (metric, knot)."""
        if self._pooled is None:
            relative, say = self._relative(self.losses, self.counts, self.last_losses)
            total: Floats = say.sum(axis=0, dtype=np.float64)
            sums: Floats = (relative * say).sum(axis=0, dtype=np.float64)
            behind, worth = self.rates.moved_prior
            sums[:, MOVED] += worth * np.where(_STAYS_BEHIND, behind, 1.0)
            total[:, MOVED] += worth
            mean = np.where(total > 0, sums / np.maximum(total, 1e-6), 1)
            self._pooled = np.asarray(mean, np.float32), self.counts[:, :, AT_HOME, :, 0].sum(axis=0)
        return self._pooled

    def _native(self, scaled: Floats32) -> Floats32:
        """Return (metric, ...) in native units."""
        return from_scale(scaled, self.is_percent)

    def _rate(self, name: str, knot: int) -> float:
        """Return a rate at a settled horizon, interpolated over the logarithm of the horizon."""
        near, far = getattr(self.rates, name)
        return float(np.exp(np.interp(np.log(self.horizons[knot]), np.log([1, 96]), np.log([near, far]))))

    def _by_knot(self, name: str) -> Floats32:
        """Return (knot,) a rate at every settled horizon."""
        return np.array([self._rate(name, knot) for knot in range(len(self.horizons))], np.float32)
