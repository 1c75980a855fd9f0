"""Variable selection of the network in numpy: which scalars count, by window and step.

Owns: the contexts that depend on a window's statics alone (`Statics`), and the selection over scalars
of many windows and steps (`Selection`). Does not know: sequences, attention, units.

- The weigher and the skipped vectors of a variable are affine in the scalars: the widened vectors of
  all variables are never made.
- The gated residual network of one scalar is a curve. It is tabulated once, at `POINTS_PER_UNIT` points
  per unit, and read with linear interpolation. The scalars have bounds (`encoding`).
"""

from collections.abc import Mapping

import numpy as np

from fleetcast.forecast.encoding import INPUT_LIMIT
from fleetcast.schema import Floats, Floats32, Longs

NORM_EPSILON = 1e-5
STATIC, ENCODER, DECODER = (f"{part}_variable_selection" for part in ("static", "encoder", "decoder"))
CONTEXTS = ("variable_selection", "initial_hidden_lstm", "initial_cell_lstm", "enrichment")
POINTS_PER_UNIT = 400  # answers differ by 2e-6 from the exact ones, at 200 by 6e-6
STEPS = 8  # steps that pass a layer together: their arrays stay in a core's cache
EPSILON = np.float32(NORM_EPSILON)
_TABLE_ERROR = 2e-5  # a curve with a sharper bend (narrow networks have them) is computed exactly
_PROBES = 100  # points on either side of the bend
_LIMITS = {"hour_sin": 1.0, "hour_cos": 1.0, "seen": 1.0, "log_horizon": 4.0}  # of scalars; else INPUT_LIMIT
_ONE = np.float32(1)

Weights = Mapping[str, Floats32]


def fuse(weights: Weights, first: str, second: str) -> tuple[Floats32, Floats32]:
    """Return two linear layers with nothing between them as one."""
    outer = weights[f"{second}.weight"]
    return outer @ weights[f"{first}.weight"], outer @ weights[f"{first}.bias"] + weights[f"{second}.bias"]


def resampling(n_from: int, n_to: int) -> Floats32:
    """Return the matrix (from, to) of the library's linear interpolation between vector sizes.

    >>> resampling(2, 3)
    array([[1. , 0.5, 0. ],
           [0. , 0.5, 1. ]], dtype=float32)
    """
    places = np.linspace(0, n_from - 1, n_to)
    shares = np.maximum(0, 1 - np.abs(places - np.arange(n_from)[:, None]))
    return np.asarray(shares, np.float32)


class _Curve:
    """The gated residual network of one scalar variable, its scaler fused in."""

    def __init__(self, weights: Weights, name: str, scale: Floats32, shift: Floats32) -> None:
        first = weights[f"{name}.fc1.weight"]
        self._slope, self._offset = first @ scale, first @ shift + weights[f"{name}.fc1.bias"]
        self._gate = fuse(weights, f"{name}.fc2", f"{name}.gate_norm.glu.fc")
        mask = weights[f"{name}.resample_norm.mask"]
        resample = resampling(len(scale), len(mask)) * (2 * _sigmoid(mask))
        # the skipped vector is affine in the scalar, so the mean and the variance that its norm
        # divides by are known beforehand: the variance is a square polynomial of the scalar
        slope, offset = _centre(scale @ resample), _centre(shift @ resample)
        self._square, self._mixed = np.square(slope).mean(), 2 * (slope * offset).mean()
        self._constant = np.square(offset).mean() + EPSILON
        gain = weights[f"{name}.resample_norm.norm.weight"]
        self._skip = slope * gain, offset * gain, weights[f"{name}.resample_norm.norm.bias"]
        self._norm = layer_of(weights, f"{name}.gate_norm.add_norm.norm")

    def __call__(self, scalar: Floats | Floats32) -> Floats32:
        """Return the vectors (row, hidden) of scalars (row,)."""
        x = np.asarray(scalar, np.float32)[:, None]
        inner = _elu(x * self._slope + self._offset)
        inverse = 1 / np.sqrt((x * self._square + self._mixed) * x + self._constant)
        slope, offset, shift = self._skip
        skip = x * inverse * slope + inverse * offset + shift
        return _norm(_glu(inner @ self._gate[0].T + self._gate[1]) + skip, *self._norm)

    def table_error(self, limit: float) -> float:
        """Return how far interpolation is off where it is worst: around the norm's turn, or anywhere."""
        turn = float(np.clip(-self._mixed / (2 * max(self._square, 1e-12)), -limit, limit))
        near = np.arange(-_PROBES, _PROBES) + round(turn * POINTS_PER_UNIT)
        spread = np.round(np.linspace(-limit, limit, 2 * _PROBES) * POINTS_PER_UNIT)
        below = np.concatenate([near, spread])
        ends = (self(below / POINTS_PER_UNIT) + self((below + 1) / POINTS_PER_UNIT)) / 2
        return float(np.abs(ends - self((below + 0.5) / POINTS_PER_UNIT)).max())


class Statics:
    """What depends on a window's statics alone, a row each: the contexts of its sequences."""

    def __init__(self, weights: Weights, reals: tuple[str, ...], hidden_size: int) -> None:
        self._weights = weights
        self._scale, self._shift = _scalers(weights, STATIC, reals)
        self._curves = _curves(weights, STATIC, reals)
        self._metric = weights["input_embeddings.embeddings.metric.weight"]
        self._weigher = f"{STATIC}.flattened_grn"
        self._gate = fuse(weights, f"{self._weigher}.fc2", f"{self._weigher}.gate_norm.glu.fc")
        n_flat, n_variable = weights[f"{self._weigher}.fc1.weight"].shape[1], len(reals) + 1
        self._resampling = _masked_resampling(
            weights, f"{self._weigher}.resample_norm.mask", n_flat, n_variable
        )
        self._category = f"{STATIC}.single_variable_grns.metric"
        self._of_category = _masked_resampling(
            weights, f"{self._category}.mask", self._metric.shape[1], hidden_size
        )
        gates = ((name, f"static_context_{name}") for name in CONTEXTS)
        self._contexts = {
            name: (own, fuse(weights, f"{own}.fc2", f"{own}.gate_norm.glu.fc")) for name, own in gates
        }

    def contexts(self, static: Floats32, metric: Longs) -> dict[str, Floats32]:
        """Return the contexts (window, hidden) by name."""
        selected = self._select(static, self._metric[metric])
        return {name: self._residual(selected, own, gate) for name, (own, gate) in self._contexts.items()}

    def _select(self, static: Floats32, embedded: Floats32) -> Floats32:
        weights, own = self._weights, self._weigher
        scaled = (static[..., None] * self._scale + self._shift).reshape(len(static), -1)
        flat = np.concatenate([embedded, scaled], axis=1)
        skip = _norm(flat @ self._resampling, *layer_of(weights, f"{own}.resample_norm.norm"))
        inner = _elu(flat @ weights[f"{own}.fc1.weight"].T + weights[f"{own}.fc1.bias"])
        gated = _glu(inner @ self._gate[0].T + self._gate[1]) + skip
        shares = np.exp(_norm(gated, *layer_of(weights, f"{own}.gate_norm.add_norm.norm")))
        shares /= shares.sum(axis=1, keepdims=True)
        selected = _norm(embedded @ self._of_category, *layer_of(weights, f"{self._category}.norm"))
        selected *= shares[:, :1]
        for index, curve in enumerate(self._curves):
            selected += shares[:, index + 1, None] * curve(static[:, index])
        return selected

    def _residual(self, x: Floats32, name: str, gate: tuple[Floats32, Floats32]) -> Floats32:
        inner = _elu(x @ self._weights[f"{name}.fc1.weight"].T + self._weights[f"{name}.fc1.bias"])
        gated = _glu(inner @ gate[0].T + gate[1]) + x
        return _norm(gated, *layer_of(self._weights, f"{name}.gate_norm.add_norm.norm"))


class Selection:
    """Variable selection over scalars of many windows."""

    def __init__(self, weights: Weights, name: str, reals: tuple[str, ...]) -> None:
        scale, shift = _scalers(weights, name, reals)
        n_real, weigher = len(reals), f"{name}.flattened_grn"
        spread = np.zeros((*scale.shape, n_real), np.float32)  # (variable, size, variable)
        spread[range(n_real), :, range(n_real)] = scale
        spread = spread.reshape(-1, n_real)
        first = weights[f"{weigher}.fc1.weight"]
        centre: Floats32 = np.asarray(np.eye(n_real) - 1 / n_real, np.float32)
        mask = f"{weigher}.resample_norm.mask"
        skip: Floats32 = centre @ _masked_resampling(weights, mask, first.shape[1], n_real).T
        self._inner = column(first @ shift.ravel() + weights[f"{weigher}.fc1.bias"]), first @ spread
        self._skipped = column(skip @ shift.ravel()), skip @ spread
        gate, bias = without_one(*fuse(weights, f"{weigher}.fc2", f"{weigher}.gate_norm.glu.fc"))
        self._gate = negative_half(gate), negative_half(column(bias))
        self._context = weights[f"{weigher}.context.weight"]
        self._centre, self._share = centre, np.float32(1 / n_real)
        norms = f"{weigher}.resample_norm.norm", f"{weigher}.gate_norm.add_norm.norm"
        self._skip_norm, self._out_norm = (
            tuple(column(part) for part in layer_of(weights, one)) for one in norms
        )
        self._tabulate(_curves(weights, name, reals), [_LIMITS.get(real, INPUT_LIMIT) for real in reals])

    def _tabulate(self, curves: list[_Curve], limits: list[float]) -> None:
        reach = np.array([round(limit * POINTS_PER_UNIT) for limit in limits])  # points on either side of 0
        scalars = [np.arange(-side, side + 1) / POINTS_PER_UNIT for side in reach]
        self._table = np.concatenate([curve(points) for curve, points in zip(curves, scalars, strict=True)])
        self._sharp = {
            index: curve
            for index, (curve, limit) in enumerate(zip(curves, limits, strict=True))
            if curve.table_error(limit) > _TABLE_ERROR
        }
        self._zeros: Longs = (np.cumsum(2 * reach + 1) - reach - 1)[:, None]  # row of each curve's value at 0
        self._low, self._high = column(-reach).astype(np.float32), column(reach - 1).astype(np.float32)

    def select(self, x: Floats32, context: Floats32, selected: Floats32) -> None:
        """Fill `selected` (step, hidden, window) from scalars (window, step, variable)."""
        n_window, n_step, n_real = x.shape
        scalars = np.ascontiguousarray(x.transpose(2, 1, 0)).reshape(n_real, -1)  # (variable, row)
        shares = self._shares(scalars, context, n_step)
        sharp = {
            index: shares[index, :, None] * curve(scalars[index]) for index, curve in self._sharp.items()
        }
        for index in sharp:
            shares[index] = 0
        scalars *= np.float32(POINTS_PER_UNIT)
        below = np.floor(scalars)
        np.minimum(np.maximum(below, self._low, out=below), self._high, out=below)
        scalars -= below
        scalars *= shares  # the share of the point above
        shares -= scalars
        points: Longs = below.astype(np.int64)
        points += self._zeros
        total, read = np.empty((2, STEPS * n_window, selected.shape[1]), np.float32)
        for start in range(0, n_step, STEPS):
            stop = min(start + STEPS, n_step)
            rows = slice(start * n_window, stop * n_window)
            some, other = total[: rows.stop - rows.start], read[: rows.stop - rows.start]
            some[...] = 0
            for point, lower, upper in zip(points[:, rows], shares[:, rows], scalars[:, rows], strict=True):
                for table, share in ((self._table, lower), (self._table[1:], upper)):
                    table.take(point, axis=0, out=other, mode="clip")
                    other *= share[:, None]
                    some += other
            for vectors in sharp.values():
                some += vectors[rows]
            selected[start:stop] = some.reshape(stop - start, n_window, -1).transpose(0, 2, 1)

    def _shares(self, scalars: Floats32, context: Floats32, n_step: int) -> Floats32:
        """Return the softmax weight of every variable (variable, row)."""
        inner = self._inner[1] @ scalars
        inner += self._inner[0]
        inner.reshape(len(inner), n_step, -1)[...] += (self._context @ context)[:, None]
        elu_plus_one(inner)
        gates = self._gate[0] @ inner
        gates += self._gate[1]
        gated, gate = np.split(gates, 2)
        gated /= one_and_exp(gate)
        skipped = self._skipped[1] @ scalars
        skipped += self._skipped[0]
        gated += self._normalise(skipped, *self._skip_norm)
        shares = self._normalise(self._centre @ gated, *self._out_norm)
        np.exp(shares, out=shares)  # normed values: they cannot overflow
        shares /= np.add.reduce(shares, axis=0)
        return shares

    def _normalise(self, centred: Floats32, gain: Floats32, shift: Floats32) -> Floats32:
        """Return the layer norm of columns whose mean is 0, destroying them."""
        spread = np.add.reduce(np.square(centred), axis=0)
        centred /= np.sqrt(spread * self._share + EPSILON)
        centred *= gain
        centred += shift
        return centred


def elu_plus_one(x: Floats32) -> None:
    """Turn x into elu(x) + 1; the next layer's bias takes the 1 back (`without_one`)."""
    below = np.minimum(x, 0)
    np.exp(below, out=below)
    np.maximum(x, 0, out=x)
    x += below


def one_and_exp(x: Floats32) -> Floats32:
    """Turn x into 1 + exp(x): what a sigmoid of -x divides by."""
    np.exp(x, out=x)
    x += _ONE
    return x


def without_one(weight: Floats32, bias: Floats32) -> tuple[Floats32, Floats32]:
    """Return a linear layer whose input comes with 1 added to every element."""
    return weight, bias - weight.sum(axis=1)


def negative_half(rows: Floats32) -> Floats32:
    """Return rows whose second half, the gate's, has its sign changed, as its exponential needs it."""
    half = len(rows) // 2
    return np.concatenate([rows[:half], -rows[half:]])


def layer_of(weights: Weights, name: str) -> tuple[Floats32, Floats32]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def _scalers(weights: Weights, name: str, reals: tuple[str, ...]) -> tuple[Floats32, Floats32]:
    scales = [weights[f"{name}.prescalers.{real}.weight"][:, 0] for real in reals]
    return np.stack(scales), np.stack([weights[f"{name}.prescalers.{real}.bias"] for real in reals])


def _curves(weights: Weights, name: str, reals: tuple[str, ...]) -> list[_Curve]:
    parts = zip(reals, *_scalers(weights, name, reals), strict=True)
    return [
        _Curve(weights, f"{name}.single_variable_grns.{real}", scale, shift) for real, scale, shift in parts
    ]


def _masked_resampling(weights: Weights, mask: str, n_from: int, n_to: int) -> Floats32:
    return np.asarray(resampling(n_from, n_to) * (2 * _sigmoid(weights[mask])), np.float32)


def column(vector: Floats32) -> Floats32:
    return np.ascontiguousarray(vector[:, None])


def _centre(row: Floats32) -> Floats32:
    return np.asarray(row - row.mean(), np.float32)


def _sigmoid(x: Floats32) -> Floats32:
    return np.asarray(1 / (1 + np.exp(-x)), np.float32)


def _elu(x: Floats32) -> Floats32:
    return np.asarray(np.where(x > 0, x, np.expm1(np.minimum(x, 0))), np.float32)


def _glu(x: Floats32) -> Floats32:
    gated, gate = np.split(x, 2, axis=-1)
    return gated * _sigmoid(gate)


def _norm(x: Floats32, gain: Floats32, shift: Floats32) -> Floats32:
    """Return the layer norm of rows."""
    centred = x - x.mean(axis=-1, keepdims=True)
    spread = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + EPSILON)
    return np.asarray(centred / spread * gain + shift, np.float32)
