"""The network's forward pass as a sweep runs it: many windows of one origin, no gradients.

Owns: `SweepNetwork`, the graph of `StaticNetwork` over the same weights; its answer is equal within
1e-5 of the library's. Statics are computed for all windows at once, the sequences for a few windows
at a time, so that their tensors stay in a core's cache. Does not know: units, servers.

Where the time went and what helped (ns per step of one window, one EPYC core):
- torch's softmax over 6 variables takes 111, its layer norm over 6 takes 45. Products with small
  constant matrices replace both (10 each). The values are normed, so their exponentials cannot
  overflow.
- torch's elu takes 43: relu(x) + exp(min(x, 0)), the -1 moved into the next bias, takes 20.
- The weigher and the skipped vectors are affine in the scalars: the widened vectors of all
  variables are never made.
- The gated residual network of one scalar is a curve: 131 per variable. It is tabulated once, at
  `POINTS_PER_UNIT` points per unit, and read with linear interpolation; one embedding bag weighs
  and adds the curves of all variables: 60 for six. The scalars have bounds (`encoding`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from fleetcast.forecast.encoding import INPUT_LIMIT
from fleetcast.forecast.network import (
    NORM_EPSILON,
    Batch,
    GatedResidual,
    NetworkConfig,
    StaticNetwork,
    Variable,
    VariableSelection,
    linear,
)

_BLOCK = 128  # windows whose sequences are computed together
POINTS_PER_UNIT = 400  # answers differ by 2e-6 from the exact ones, at 200 by 6e-6
_TABLE_ERROR = 2e-5  # a curve with a sharper bend (narrow networks have them) is computed exactly
_PROBES = 100  # points on either side of the bend
_LIMITS = {"hour_sin": 1.0, "hour_cos": 1.0, "seen": 1.0, "log_horizon": 4.0}  # of scalars; else INPUT_LIMIT


class SweepSelection(VariableSelection):
    """Variable selection over scalars of many windows, for inference only."""

    def __init__(self, weights: Mapping[str, Tensor], name: str, reals: tuple[str, ...]) -> None:
        super().__init__(weights, name, reals)
        n_real, weigher = len(reals), self._weigher
        spread = torch.zeros(*self._scale.shape, n_real)  # (variable, size, variable)
        spread[range(n_real), :, range(n_real)] = self._scale
        spread = spread.flatten(0, 1)
        shift = self._shift.flatten()
        first = weights[f"{weigher}.fc1.weight"]
        mask = 2 * torch.sigmoid(weights[f"{weigher}.resample_norm.mask"])
        centre = torch.eye(n_real) - 1 / n_real
        skip = centre @ (self._flat_resampling * mask).T
        self._inner = _column(first @ shift + weights[f"{weigher}.fc1.bias"]), first @ spread
        self._skipped = _column(skip @ shift), skip @ spread
        gate, bias = _without_one(*self._weigher_gate)
        self._gate = gate, _column(bias)
        self._context = weights[f"{weigher}.context.weight"].T
        self._centre, self._mean = centre, torch.full((n_real, n_real), 1 / n_real)
        self._sum = torch.ones(n_real, n_real)
        norms = f"{weigher}.resample_norm.norm", f"{weigher}.gate_norm.add_norm.norm"
        self._skip_norm, self._out_norm = (
            tuple(_column(part) for part in _norm_of(weights, name)) for name in norms
        )
        self._tabulate(reals)

    def _tabulate(self, reals: tuple[str, ...]) -> None:
        limits = [_LIMITS.get(real, INPUT_LIMIT) for real in reals]
        reach = [round(limit * POINTS_PER_UNIT) for limit in limits]  # points on either side of 0
        scalars = [torch.arange(-side, side + 1) / POINTS_PER_UNIT for side in reach]
        curves = [SweepVariable(variable) for variable in self._variables]
        self._curves = torch.cat([curve(points) for curve, points in zip(curves, scalars, strict=True)])
        self._sharp = {
            index: curve
            for index, (curve, limit) in enumerate(zip(curves, limits, strict=True))
            if curve.table_error(limit) > _TABLE_ERROR
        }
        sides = torch.tensor(reach)
        starts = torch.tensor([0, *(2 * side + 1 for side in reach[:-1])]).cumsum(0)
        self._zeros = _column(starts + sides).to(torch.int32)  # row of each curve's value at 0
        self._low, self._high = _column(-sides).float(), _column(sides - 1).float()

    def select(self, x: Tensor, context: Tensor) -> Tensor:
        """Return the selected variables (window, step, hidden) of scalars (window, step, variable)."""
        scalars = x.reshape(-1, x.shape[-1]).T.contiguous()  # (variable, row): long inner loops
        shares = self._shares(scalars, context, x.shape[1])
        sharp_scalars = {index: scalars[index].clone() for index in self._sharp}
        sharp_shares = {index: shares[index].clone() for index in self._sharp}
        for index in self._sharp:
            shares[index] = 0
        place = scalars.mul_(POINTS_PER_UNIT)
        below = torch.minimum(torch.maximum(place.floor(), self._low), self._high)
        upper = place.sub_(below).mul_(shares)
        point = below.to(torch.int32).add_(self._zeros)
        points = torch.cat([point, point + 1]).T.contiguous()  # (row, 2 x variable)
        weights = torch.cat([shares.sub_(upper), upper]).T.contiguous()
        selected = functional.embedding_bag(points, self._curves, mode="sum", per_sample_weights=weights)
        for index, curve in self._sharp.items():
            selected.addcmul_(sharp_shares[index][:, None], curve(sharp_scalars[index]))
        return selected.view(*x.shape[:2], -1)

    def _shares(self, scalars: Tensor, context: Tensor, n_step: int) -> Tensor:
        """Return the softmax weight of every variable (variable, row)."""
        inner = torch.addmm(self._inner[0], self._inner[1], scalars)
        inner.view(len(inner), -1, n_step).add_((context @ self._context).T[..., None])
        gated, gate = torch.addmm(self._gate[1], self._gate[0], elu_plus_one_(inner)).chunk(2)
        gated = gated.mul_(gate.sigmoid_())
        skipped = torch.addmm(self._skipped[0], self._skipped[1], scalars)
        gated += self._normalise(skipped, *self._skip_norm)
        weights = self._normalise(self._centre @ gated, *self._out_norm).exp_()
        return weights.div_(self._sum @ weights)

    def _normalise(self, centred: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        """Return the layer norm of columns whose mean is 0."""
        inverse = (self._mean @ centred.square()).add_(NORM_EPSILON).rsqrt_()
        return torch.addcmul(shift, centred.mul_(inverse), gain)


class SweepVariable:
    """The vector of one variable as a curve over its scalar."""

    def __init__(self, variable: Variable) -> None:
        self._variable = variable
        self._gate = _without_one(*variable._gate)
        self._skip = torch.stack([variable._skip_slope, variable._skip_offset])
        self._norm = _norm_of(variable._weights, f"{variable._name}.gate_norm.add_norm.norm")

    def __call__(self, scalar: Tensor) -> Tensor:
        """Return the vectors (row, hidden) of scalars (row,)."""
        own = self._variable
        inner = elu_plus_one_(torch.addcmul(own._offset, scalar[:, None], own._slope))
        gated = functional.glu(functional.linear(inner, *self._gate))
        inverse = torch.rsqrt((scalar * own._square + own._mixed) * scalar + own._constant)
        gated.addmm_(torch.stack([scalar * inverse, inverse], dim=1), self._skip).add_(own._skip_shift)
        return functional.layer_norm(gated, gated.shape[1:], *self._norm, NORM_EPSILON)

    def table_error(self, limit: float) -> float:
        """Return how far interpolation is off where it is worst: around the norm's turn, or anywhere."""
        own = self._variable
        turn = float((-own._mixed / (2 * own._square.clamp_min(1e-12))).clamp(-limit, limit))
        near = torch.arange(-_PROBES, _PROBES) + round(turn * POINTS_PER_UNIT)
        spread = torch.linspace(-limit, limit, 2 * _PROBES).mul(POINTS_PER_UNIT).round()
        below = torch.cat([near, spread])
        ends = self(torch.cat([below, below + 1]) / POINTS_PER_UNIT).view(2, len(below), -1)
        middle = self((below + 0.5) / POINTS_PER_UNIT)
        return float((ends.mean(dim=0) - middle).abs().max())


class SweepResidual:
    """A gated residual network of inputs (window, step, size), for inference only."""

    def __init__(self, weights: Mapping[str, Tensor], name: str) -> None:
        fused = GatedResidual(weights, name)
        self._first = (weights[f"{name}.fc1.weight"], weights[f"{name}.fc1.bias"])
        self._gate = _without_one(*fused._gate)
        self._context = fused._context
        self._norm = _norm_of(weights, f"{name}.gate_norm.add_norm.norm")

    def __call__(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the same shape; `context` (window, size) holds at every step."""
        inner = functional.linear(x, *self._first)
        if context is not None and self._context is not None:
            inner += functional.linear(context, self._context)[:, None]
        gated = functional.glu(functional.linear(elu_plus_one_(inner), *self._gate))
        return functional.layer_norm(gated.add_(x), x.shape[-1:], *self._norm, NORM_EPSILON)


def elu_plus_one_(x: Tensor) -> Tensor:
    """Return elu(x) + 1, destroying x."""
    return torch.clamp_max(x, 0).exp_().add_(x.clamp_min_(0))


def _without_one(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return a linear layer whose input comes with 1 added to every element."""
    return weight, bias - weight.sum(dim=1)


def _column(vector: Tensor) -> Tensor:
    return vector[:, None]


def _norm_of(weights: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


class SweepNetwork(StaticNetwork):
    """The same answer as `StaticNetwork`, in less than half the time; weights must not change."""

    def __init__(self, weights: Mapping[str, Tensor], config: NetworkConfig) -> None:
        super().__init__(weights, config)
        self._sweep_past = SweepSelection(weights, "encoder_variable_selection", config.past_reals)
        self._sweep_ahead = SweepSelection(weights, "decoder_variable_selection", config.ahead_reals)
        self._sweep_enrichment = SweepResidual(weights, "static_enrichment")
        self._sweep_feed_forward = SweepResidual(weights, "pos_wise_ff")
        size = self._queries[1].shape[0] // config.n_heads
        self._scaled_queries = tuple(part / size**0.5 for part in self._queries)
        self._hidden_scores = torch.zeros(self._is_hidden.shape).masked_fill(self._is_hidden, -1e9)
        self._mean_output = weights["multihead_attn.w_h.weight"] / config.n_heads

    def __call__(self, batch: Batch) -> Tensor:
        """Return the answer (window, knot, quantile)."""
        static = self._static(batch.static, embedded=self._metric[batch.metric])
        contexts = {name: network(static) for name, network in self._contexts.items()}
        blocks = [
            self._sequences(batch.past[rows], batch.ahead[rows], {k: v[rows] for k, v in contexts.items()})
            for rows in (slice(start, start + _BLOCK) for start in range(0, len(static), _BLOCK))
        ]
        return torch.cat(blocks)

    def _sequences(self, past: Tensor, ahead: Tensor, contexts: Mapping[str, Tensor]) -> Tensor:
        selection = contexts["variable_selection"]
        n_past = past.shape[1]
        local = torch.cat(
            [self._sweep_past.select(past, selection), self._sweep_ahead.select(ahead, selection)], dim=1
        )
        state = (contexts["initial_hidden_lstm"][None], contexts["initial_cell_lstm"][None])
        past_output, state = self._lstm("lstm_encoder", local[:, :n_past], state)
        ahead_output, _ = self._lstm("lstm_decoder", local[:, n_past:], state)
        output = torch.cat([past_output, ahead_output], dim=1)
        local = self._gate_add_norm("post_lstm_gate_encoder", "post_lstm_add_norm_encoder", output, local)
        enriched = self._sweep_enrichment(local, contexts["enrichment"])
        knots = enriched[:, n_past:]
        attended = self._gate_add_norm("post_attn_gate_norm.glu", "post_attn_gate_norm.add_norm",
                               self._attention(knots, enriched), knots)  # fmt: skip
        output = self._sweep_feed_forward(attended)
        output = self._gate_add_norm("pre_output_gate_norm.glu", "pre_output_gate_norm.add_norm",
                             output, local[:, n_past:])  # fmt: skip
        return linear(self._weights, "output_layer", output)

    def _gate_add_norm(self, gate: str, norm: str, x: Tensor, skip: Tensor) -> Tensor:
        gated = functional.glu(linear(self._weights, f"{gate}.fc", x)).add_(skip)
        weight, bias = self._weights[f"{norm}.norm.weight"], self._weights[f"{norm}.norm.bias"]
        return functional.layer_norm(gated, gated.shape[-1:], weight, bias)

    def _attention(self, knots: Tensor, steps: Tensor) -> Tensor:
        """Return interpretable multi-head attention: the heads share their values."""
        size = self._queries[1].shape[0] // self._n_heads

        def by_head(vectors: Tensor) -> Tensor:  # (window, head, step, size)
            return vectors.view(*vectors.shape[:2], self._n_heads, size).transpose(1, 2)

        queries = by_head(functional.linear(knots, *self._scaled_queries))
        keys = by_head(functional.linear(steps, *self._keys))
        scores = torch.matmul(queries, keys.transpose(2, 3)).add_(self._hidden_scores)
        attention = torch.softmax(scores, dim=-1).sum(dim=1)
        values = linear(self._weights, "multihead_attn.v_layer", steps)
        return functional.linear(torch.bmm(attention, values), self._mean_output)
