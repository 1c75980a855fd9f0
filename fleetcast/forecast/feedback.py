"""What settled forecasts teach the next ones: a blend with naive forecasts, and interval widths.

Owns: per (server, metric, settled horizon) how well the model, the last value and the same time
yesterday did lately, and how often an actual fell outside the interval that was given. numpy
only, causal: `learn` is its one source. Does not know: names, files, how a model works.

Two corrections, both learned one settled forecast at a time and discounted:

1. The median is a mixture of the model's, the last value and the same time yesterday. A handful
   of mixtures compete; each is weighted by exp(-sharpness * its loss relative to the model's). A series with
   little evidence borrows the fleet's; without any the model's forecast stays as it is.
2. Each half of the interval is stretched by a factor of its own, moved up by a miss and down by a
   hit so that one in ten is missed on either side (adaptive conformal inference, Gibbs and Candes,
   arXiv:2106.00170, on the logarithm of the factor): a part common to the fleet's metric, which
   learns from every server at once, and a part of the series.

Between the settled horizons both are interpolated over the logarithm of the horizon.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetcast.schema import QUANTILES, Floats32, Longs

# (mixture, [model, last value, same time yesterday]); the first is the model alone
MIXTURES: Floats32 = np.array(
    [
        *((1, 0, 0), (0.75, 0.25, 0), (0.5, 0.5, 0), (0.25, 0.75, 0), (0, 1, 0)),
        *((0.75, 0, 0.25), (0.5, 0, 0.5), (0, 0, 1), (0.5, 0.25, 0.25)),
    ],
    dtype=np.float32,
)
_FLEET_DOUBT = 10.0  # the fleet's evidence needs this many times the settled forecasts of a series
_MISS = QUANTILES[0]  # share of actuals that should lie outside on either side
_WORST = 10.0  # a loss beyond this many times the model's says no more
_WIDEN_LIMIT = 1.5  # logarithm: a half of an interval changes by a factor of 4.5 at most
_LOG_MARGIN = 1.0  # logarithm of a rate: how far beyond the model's own a stretched bound may go


@dataclass(frozen=True)
class FeedbackRates:
    """How fast feedback learns; chosen on days before the test days (docs/decisions/settled-feedback.md)."""

    half_life: tuple[float, float] = (200.0, 400.0)  # settled forecasts: at 1 bin, at 96 bins ahead
    sharpness: float = 50.0  # how decidedly the better mixture is preferred
    doubt: float = 60.0  # settled forecasts after which evidence has half its say
    least: float = 12.0  # settled forecasts before which the model stays as it is
    widen_step: tuple[float, float] = (0.05, 0.01)  # of the series' factor: at 1 bin, at 96
    fleet_step: tuple[float, float] = (0.1, 0.05)  # of the fleet's factor
    new_model_share: float = 0.1  # evidence kept when another model comes into service


class Feedback:
    """Learns from settled forecasts and corrects new ones; rows are servers, in the caller's order.

    Guarantee: corrected quantiles are finite where the model's are, never cross, and pass zero (or
    100 of a percent) only where the model's own interval does. Not thread safe.

    Example: a model that is always 10 too high loses most of its say to the last value.

    >>> feedback = Feedback(is_percent=np.array([True]), horizons=(1,))
    >>> made = np.array([[[[55.0, 60.0, 65.0]]]], dtype=np.float32)
    >>> last, yesterday = np.array([[50.0]]), np.array([[[np.nan]]])
    >>> for _ in range(300):
    ...     feedback.learn(0, np.array([0]), made[:, :, 0], made[:, :, 0, 1], last, last * np.nan, last)
    >>> bool(feedback.apply(np.array([0]), made, last, yesterday)[0, 0, 0, 1] < 53)
    True
    """

    def __init__(
        self,
        is_percent: NDArray[np.bool_],
        horizons: Sequence[int] = (1, 12, 96),
        rates: FeedbackRates | None = None,
    ) -> None:
        """Begin without evidence.

        Args:
            is_percent: (metric,) whether it is measured in points of a hundred.
            horizons: the bins ahead that are settled, rising.
        """
        self.is_percent = is_percent
        self.horizons = tuple(horizons)
        self.rates = rates or FeedbackRates()
        n_metric, n_knot = len(is_percent), len(self.horizons)
        self.losses: Floats32 = np.zeros((0, n_metric, n_knot, len(MIXTURES)), np.float32)
        self.counts: Floats32 = np.zeros((0, n_metric, n_knot), np.float32)
        self.widen: Floats32 = np.zeros((0, n_metric, n_knot, 2), np.float32)  # [below, above], logarithms
        self.fleet_widen: Floats32 = np.zeros((n_metric, n_knot, 2), np.float32)
        self._pooled: tuple[Floats32, Floats32] | None = None  # of all rows, until they change

    def reserve(self, n_rows: int) -> None:
        """Make room for rows without evidence."""
        missing = n_rows - len(self.counts)
        if missing > 0:
            for name in ("losses", "counts", "widen"):
                have = getattr(self, name)
                more = np.zeros((max(missing, len(have) // 2), *have.shape[1:]), np.float32)
                setattr(self, name, np.concatenate([have, more]))

    def keep_rows(self, rows: Longs) -> None:
        """Forget every row but `rows`, which move up in this order."""
        self.losses, self.counts, self.widen = self.losses[rows], self.counts[rows], self.widen[rows]
        self._pooled = None

    def doubt_model(self) -> None:
        """Keep little of the evidence: another model is in service."""
        self.losses *= self.rates.new_model_share
        self.counts *= self.rates.new_model_share
        self._pooled = None

    def learn(
        self,
        knot: int,
        rows: Longs,
        given: Floats32,
        model: Floats32,
        last: Floats32,
        yesterday: Floats32,
        actual: Floats32,
    ) -> None:
        """Take in the forecasts of one horizon that one bin settled.

        Args:
            knot: index into `horizons`.
            rows: (server,) distinct.
            given: (server, metric, quantile) as clients got them.
            model: (server, metric) the model's own median, NaN where another rule forecast.
            last, yesterday: (server, metric) forecasts of the naive rules; NaN = unknown.
            actual: (server, metric) NaN = unsettled.
        """
        self._pooled = None
        self.reserve(int(rows.max(initial=-1)) + 1)
        known = np.isfinite(model) & np.isfinite(actual) & np.isfinite(given).all(axis=-1)
        errors = np.abs(self._mix(model, last, yesterday) - actual[..., None])  # (server, metric, mixture)
        keep = np.where(known, np.float32(0.5 ** (1 / self._rate("half_life", knot))), np.float32(1))
        self.losses[rows, :, knot] *= keep[..., None]
        self.losses[rows, :, knot] += np.where(known[..., None], errors, np.float32(0))
        self.counts[rows, :, knot] = self.counts[rows, :, knot] * keep + known
        missed = np.stack([actual < given[..., 0], actual > given[..., 2]], axis=-1)
        excess = np.where(known[..., None], missed - np.float32(_MISS), np.float32(0))
        self.widen[rows, :, knot] = np.clip(
            self.widen[rows, :, knot] + self._rate("widen_step", knot) * excess, -_WIDEN_LIMIT, _WIDEN_LIMIT
        )
        mean = excess.sum(axis=0) / np.maximum(known.sum(axis=0), 1)[:, None]
        self.fleet_widen[:, knot] = np.clip(
            self.fleet_widen[:, knot] + self._rate("fleet_step", knot) * mean, -_WIDEN_LIMIT, _WIDEN_LIMIT
        )

    def apply(
        self,
        rows: Longs,
        quantiles: Floats32,
        last: Floats32,
        yesterday: Floats32,
    ) -> Floats32:
        """Correct a model's forecasts.

        Args:
            rows: (server,)
            quantiles: (server, metric, horizon, quantile), non-decreasing; NaN = none.
            last: (server, metric) newest known value, NaN = unknown.
            yesterday: (server, metric, horizon) value a whole number of days before, NaN = unknown.
        Returns:
            the same shape and units.
        """
        self.reserve(int(rows.max(initial=-1)) + 1)
        between = self._interpolation(quantiles.shape[2])  # (knot, horizon)
        quantiles, last, yesterday = self._scale(quantiles, last, yesterday)
        shares = np.einsum("smkc,kh->csmh", self.shares(rows), between)  # [model, last, yesterday]
        widen = np.clip(self.widen[rows] + self.fleet_widen, -_WIDEN_LIMIT, _WIDEN_LIMIT)
        factors = np.exp(np.einsum("smkc,kh->csmh", widen, between))
        low, middle, high = np.moveaxis(quantiles, -1, 0)
        blend = shares[0] * middle
        blend += shares[1] * _or(last[..., None], middle)
        blend += shares[2] * _or(yesterday, middle)
        corrected = np.stack(
            [blend - (middle - low) * factors[0], blend, blend + (high - middle) * factors[1]], axis=-1
        )
        self._bound(corrected, low, high)
        return self._native(corrected)

    def shares(self, rows: Longs) -> Floats32:
        """Return the shares (server, metric, knot, [model, last value, yesterday]); they sum to 1."""
        relative, say = self._relative_losses(self.losses[rows], self.counts[rows])
        trust = say[..., None]
        fleet_relative, fleet_say = self._fleet_evidence()
        relative = trust * relative + (1 - trust) * fleet_relative
        scores = -np.float32(self.rates.sharpness) * relative
        scores -= scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores)
        weights /= weights.sum(axis=-1, keepdims=True)
        believed = np.maximum(trust, fleet_say[..., None])
        mixed = believed * (weights @ MIXTURES) + (1 - believed) * MIXTURES[0]
        return np.asarray(mixed, np.float32)

    def _relative_losses(self, losses: Floats32, counts: Floats32) -> tuple[Floats32, Floats32]:
        """Return losses over the model's, minus 1, and how much of a say the evidence has, 0 to 1."""
        own = np.maximum(losses[..., :1], 1e-6 * np.maximum(counts[..., None], 1))
        relative = np.minimum(losses / own, np.float32(_WORST)) - 1
        relative[counts <= 0] = 0
        beyond = np.maximum(counts - self.rates.least, 0)
        return relative, beyond / (beyond + self.rates.doubt)

    def _fleet_evidence(self) -> tuple[Floats32, Floats32]:
        """Return the same for the mean of all servers, (metric, knot, mixture) and (metric, knot)."""
        if self._pooled is None:
            relative, say = self._relative_losses(self.losses, self.counts)
            total = np.maximum(say.sum(axis=0), 1e-6)[..., None]
            beyond = np.maximum(self.counts - self.rates.least, 0).sum(axis=0)
            self._pooled = (
                (relative * say[..., None]).sum(axis=0) / total,
                beyond / (beyond + _FLEET_DOUBT * self.rates.doubt),
            )
        return self._pooled

    def _mix(self, model: Floats32, last: Floats32, yesterday: Floats32) -> Floats32:
        scaled = self._scale(model, _or(last, model), _or(yesterday, model))
        return self._native(np.stack(scaled, axis=-1) @ MIXTURES.T)

    def _scale(self, *arrays: Floats32) -> list[Floats32]:
        """Return values (server, metric, ...) on the scale they are mixed on: rates by their logarithm.

        In native units a hundredth of yesterday's burst would outweigh all of a quiet rate.
        """
        scaled = [np.array(array, np.float32) for array in arrays]
        for values in scaled:
            rates = values[:, ~self.is_percent]
            values[:, ~self.is_percent] = np.copysign(np.log1p(np.float32(100) * np.abs(rates)), rates)
        return scaled

    def _native(self, scaled: Floats32) -> Floats32:
        """Undo `_scale`, in place."""
        logs = scaled[:, ~self.is_percent]
        scaled[:, ~self.is_percent] = np.copysign(np.expm1(np.abs(logs)) / np.float32(100), logs)
        return scaled

    def _rate(self, name: str, knot: int) -> float:
        """Return a rate at a settled horizon, interpolated over the logarithm of the horizon."""
        near, far = getattr(self.rates, name)
        return float(np.exp(np.interp(np.log(self.horizons[knot]), np.log([1, 96]), np.log([near, far]))))

    def _interpolation(self, n_horizon: int) -> Floats32:
        steps = np.log(np.arange(1, n_horizon + 1))
        knots = np.log(self.horizons)
        return np.stack([np.interp(steps, knots, unit) for unit in np.eye(len(knots))]).astype(np.float32)

    def _bound(self, corrected: Floats32, low: Floats32, high: Floats32) -> None:
        """Widen past zero, or past 100 of a percent, only where the model's own interval does."""
        floor = np.minimum(low, np.float32(0))
        limit = np.where(self.is_percent[:, None], np.float32(100), high + np.float32(_LOG_MARGIN))
        np.maximum(corrected, floor[..., None], out=corrected)
        np.minimum(
            corrected, np.maximum(np.maximum(high, limit), corrected[..., 1])[..., None], out=corrected
        )


def _or(values: Floats32, otherwise: Floats32) -> Floats32:
    return np.asarray(np.where(np.isfinite(values), values, otherwise), np.float32)
