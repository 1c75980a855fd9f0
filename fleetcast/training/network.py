"""The network in torch: the library's, to be trained, and a static graph of its weights.

Owns: how pytorch-forecasting's class is built for our variables (`build`), and the forward pass that a
training runs (`StaticNetwork`): the same weights and the same answer within 1e-5, with everything fused that
can be, without lengths and interpretation. Only `build` imports the library. What forecasts runs the same
weights in numpy (`forecast.network`). Does not know: units, files, servers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fleetcast.forecast.encoding import ModelArrays
from fleetcast.forecast.network import METRIC_SLOTS, NetworkConfig, real_names
from fleetcast.forecast.selection import CONTEXTS, DECODER, ENCODER, NORM_EPSILON, STATIC
from fleetcast.schema import QUANTILES, Floats32, Longs

_FIRST_WEIGHT, _FIRST_ANSWER = 0.3, (-0.2, 0.0, 0.2)


class GatedResidual:
    """A gated residual network whose input and output have one size."""

    def __init__(self, weights: Mapping[str, Tensor], name: str) -> None:
        self._weights, self._name = weights, name
        self._gate = _fuse(weights, f"{name}.fc2", f"{name}.gate_norm.glu.fc")
        self._context = weights.get(f"{name}.context.weight")

    def __call__(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        inner = linear(self._weights, f"{self._name}.fc1", x)
        if context is not None and self._context is not None:
            inner = inner + functional.linear(context, self._context)[:, None]  # the same at every step
        gated = functional.glu(functional.linear(functional.elu(inner), *self._gate))
        return norm(self._weights, f"{self._name}.gate_norm.add_norm.norm", gated + x)


class VariableSelection:
    """A variable selection network over scalars, and at most one embedded category before them."""

    def __init__(
        self, weights: Mapping[str, Tensor], name: str, reals: tuple[str, ...], embedded: str = ""
    ) -> None:
        self._weights, self._name, self._embedded = weights, name, embedded
        self._scale = _stack(weights, [f"{name}.prescalers.{real}.weight" for real in reals])[..., 0]
        self._shift = _stack(weights, [f"{name}.prescalers.{real}.bias" for real in reals])
        self._hidden = weights[f"{name}.single_variable_grns.{reals[0]}.resample_norm.mask"].shape[0]
        self._variables = [
            Variable(weights, f"{name}.single_variable_grns.{real}", self._scale[index], self._shift[index])
            for index, real in enumerate(reals)
        ]
        self._weigher = f"{name}.flattened_grn"
        self._weigher_gate = _fuse(weights, f"{self._weigher}.fc2", f"{self._weigher}.gate_norm.glu.fc")
        n_flat = weights[f"{self._weigher}.fc1.weight"].shape[1]
        self._flat_resampling = _resampling(n_flat, weights[f"{self._weigher}.resample_norm.mask"].shape[0])

    def __call__(self, x: Tensor, *, context: Tensor | None = None, embedded: Tensor | None = None) -> Tensor:
        """Return the selected variables (window, [step,] hidden) of scalars (window, [step,] variable)."""
        flat = x.reshape(-1, x.shape[-1])  # (row, variable)
        scalars = flat.T.contiguous()[..., None]  # (variable, row, 1)
        weigher_input = (flat[..., None] * self._scale + self._shift).flatten(1)
        if embedded is not None:
            weigher_input = torch.cat([embedded, weigher_input], dim=1)
        n_step = x.shape[1] if x.dim() == 3 else 1
        weights = self._weigh(weigher_input, context, n_step).T.contiguous()[..., None]  # (variable, row, 1)
        vectors = [] if embedded is None else [self._category(embedded)]
        vectors += [variable(scalars[index]) for index, variable in enumerate(self._variables)]
        selected = weights[0] * vectors[0]
        for weight, vector in zip(weights[1:], vectors[1:], strict=True):
            selected = torch.addcmul(selected, weight, vector)
        return selected.view(*x.shape[:-1], -1)

    def _category(self, embedded: Tensor) -> Tensor:
        name = f"{self._name}.single_variable_grns.{self._embedded}"
        resampled = embedded @ _resampling(embedded.shape[1], self._hidden)
        masked = resampled * 2 * torch.sigmoid(self._weights[f"{name}.mask"])
        return norm(self._weights, f"{name}.norm", masked)

    def _weigh(self, flat: Tensor, context: Tensor | None, n_step: int) -> Tensor:
        """Return the softmax weight of every variable (row, variable)."""
        name = self._weigher
        skip = (flat @ self._flat_resampling) * 2 * torch.sigmoid(self._weights[f"{name}.resample_norm.mask"])
        skip = norm(self._weights, f"{name}.resample_norm.norm", skip)
        inner = linear(self._weights, f"{name}.fc1", flat)
        if context is not None:
            shared = functional.linear(context, self._weights[f"{name}.context.weight"])
            inner = inner + shared.repeat_interleave(n_step, dim=0)
        gated = functional.glu(functional.linear(functional.elu(inner), *self._weigher_gate))
        return torch.softmax(norm(self._weights, f"{name}.gate_norm.add_norm.norm", gated + skip), dim=-1)


class Variable:
    """The gated residual network of one scalar variable, its scaler fused in."""

    def __init__(self, weights: Mapping[str, Tensor], name: str, scale: Tensor, shift: Tensor) -> None:
        self._weights, self._name = weights, name
        first = weights[f"{name}.fc1.weight"]
        self._slope, self._offset = first @ scale, first @ shift + weights[f"{name}.fc1.bias"]
        self._gate = _fuse(weights, f"{name}.fc2", f"{name}.gate_norm.glu.fc")
        mask = weights[f"{name}.resample_norm.mask"]
        resample = _resampling(len(scale), len(mask)) * (2 * torch.sigmoid(mask))
        # the skipped vector is affine in the scalar, so the mean and the variance that its norm
        # divides by are known beforehand: the variance is a square polynomial of the scalar
        slope, offset = _centre(scale @ resample), _centre(shift @ resample)
        self._square, self._mixed, self._constant = (
            slope.square().mean(),
            2 * (slope * offset).mean(),
            offset.square().mean() + NORM_EPSILON,
        )
        gain = weights[f"{name}.resample_norm.norm.weight"]
        self._skip_slope, self._skip_offset = slope * gain, offset * gain
        self._skip_shift = weights[f"{name}.resample_norm.norm.bias"]

    def __call__(self, scalar: Tensor) -> Tensor:
        """Return the variable's vector (row, hidden) of its scalar (row, 1)."""
        inner = functional.elu(torch.addcmul(self._offset, scalar, self._slope))
        gated = functional.glu(functional.linear(inner, *self._gate))
        inverse = torch.rsqrt((scalar * self._square + self._mixed) * scalar + self._constant)
        skip = torch.addcmul(
            torch.addcmul(self._skip_shift, scalar * inverse, self._skip_slope), inverse, self._skip_offset
        )
        return norm(self._weights, f"{self._name}.gate_norm.add_norm.norm", gated + skip)


def linear(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Apply a linear layer."""
    return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def norm(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Apply a layer norm."""
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return functional.layer_norm(x, weight.shape, weight, bias, NORM_EPSILON)


def gate_add_norm(weights: Mapping[str, Tensor], name: str, x: Tensor, skip: Tensor) -> Tensor:
    """Gate a vector, add the skipped one, normalise."""
    return norm(weights, f"{name}.add_norm.norm", functional.glu(linear(weights, f"{name}.glu.fc", x)) + skip)


def _stack(weights: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return torch.stack([weights[name] for name in names])


def join_linear(weights: Mapping[str, Tensor], names: list[str]) -> tuple[Tensor, Tensor]:
    """Return several linear layers of one input as one."""
    return (
        torch.cat([weights[f"{name}.weight"] for name in names]),
        torch.cat([weights[f"{name}.bias"] for name in names]),
    )


def _fuse(weights: Mapping[str, Tensor], first: str, second: str) -> tuple[Tensor, Tensor]:
    """Return two linear layers with nothing between them as one."""
    outer = weights[f"{second}.weight"]
    return outer @ weights[f"{first}.weight"], outer @ weights[f"{first}.bias"] + weights[f"{second}.bias"]


def _centre(rows: Tensor) -> Tensor:
    return rows - rows.mean(dim=-1, keepdim=True)


def _resampling(n_from: int, n_to: int) -> Tensor:
    """Return the matrix (from, to) of the library's linear interpolation between vector sizes."""
    unit = torch.eye(n_from)[:, None]
    return functional.interpolate(unit, n_to, mode="linear", align_corners=True)[:, 0]


def build(config: NetworkConfig) -> nn.Module:
    """Return the library's network with fresh weights, to be trained."""
    from pytorch_forecasting.data.encoders import TorchNormalizer  # seconds: only a training pays
    from pytorch_forecasting.metrics import QuantileLoss
    from pytorch_forecasting.models.temporal_fusion_transformer import TemporalFusionTransformer

    network: nn.Module = TemporalFusionTransformer(
        hidden_size=config.hidden_size,
        lstm_layers=1,
        dropout=0.0,  # windows are drawn afresh at every step: there is little to overfit
        output_size=len(QUANTILES),
        loss=QuantileLoss(list(QUANTILES)),
        attention_head_size=config.n_heads,
        max_encoder_length=config.n_past,
        static_categoricals=["metric"],
        static_reals=list(config.static_reals),
        time_varying_reals_encoder=list(config.past_reals),
        time_varying_reals_decoder=list(config.ahead_reals),
        x_reals=real_names(config),
        x_categoricals=["metric"],
        hidden_continuous_size=config.continuous_size,
        embedding_sizes={"metric": (METRIC_SLOTS, config.continuous_size)},
        output_transformer=TorchNormalizer("identity"),
        logging_metrics=nn.ModuleList([]),
    )
    _start_at_last_value(network)
    return network


def _start_at_last_value(network: nn.Module) -> None:
    """Let fresh weights answer "as now, give or take": a forecast that is hard to beat is the start."""
    layer = network.get_submodule("output_layer")
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.mul_(_FIRST_WEIGHT)
        layer.bias.copy_(torch.tensor(_FIRST_ANSWER))


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Model arrays as tensors."""

    past: Tensor  # (window, past step, variable)
    ahead: Tensor  # (window, knot, variable)
    static: Tensor  # (window, variable)
    metric: Tensor  # (window,) slot of the metric


class StaticNetwork:
    """The network's forward pass over given weights.

    Fused once: a variable's scalar goes through a linear scaler and a linear layer (one affine
    map), and between its two last layers there is nothing non-linear (one matrix). Gradients
    pass through the fusion, so a training runs the same code: half the cost of the library's.
    """

    def __init__(self, weights: Mapping[str, Tensor], config: NetworkConfig) -> None:
        self._weights = weights
        self._metric = weights["input_embeddings.embeddings.metric.weight"]
        self._static = VariableSelection(weights, STATIC, config.static_reals, "metric")
        self._past = VariableSelection(weights, ENCODER, config.past_reals)
        self._ahead = VariableSelection(weights, DECODER, config.ahead_reals)
        self._contexts = {name: GatedResidual(weights, f"static_context_{name}") for name in CONTEXTS}
        self._enrichment = GatedResidual(weights, "static_enrichment")
        self._feed_forward = GatedResidual(weights, "pos_wise_ff")
        self._n_heads = config.n_heads
        attention = "multihead_attn"
        heads = range(config.n_heads)
        self._queries = join_linear(weights, [f"{attention}.q_layers.{head}" for head in heads])
        self._keys = join_linear(weights, [f"{attention}.k_layers.{head}" for head in heads])
        knot = torch.arange(config.n_knots)
        self._is_hidden = torch.cat(  # a knot attends to the past and to knots before it
            [torch.zeros(config.n_knots, config.n_past, dtype=torch.bool), knot[None] >= knot[:, None]], dim=1
        )

    def __call__(self, batch: Batch) -> Tensor:
        """Return the answer (window, knot, quantile)."""
        static = self._static(batch.static, embedded=self._metric[batch.metric])
        selection = self._contexts["variable_selection"](static)
        past = self._past(batch.past, context=selection)
        ahead = self._ahead(batch.ahead, context=selection)
        local = self._local(past, ahead, static)
        enriched = self._enrichment(local, context=self._contexts["enrichment"](static))
        knots = slice(past.shape[1], None)
        attended = self._attend(enriched[:, knots], enriched)
        attended = gate_add_norm(self._weights, "post_attn_gate_norm", attended, enriched[:, knots])
        output = self._feed_forward(attended)
        output = gate_add_norm(self._weights, "pre_output_gate_norm", output, local[:, knots])
        return linear(self._weights, "output_layer", output)

    def _local(self, past: Tensor, ahead: Tensor, static: Tensor) -> Tensor:
        """Run the two LSTMs and their skip connection; past and knots on one time axis."""
        hidden = self._contexts["initial_hidden_lstm"](static)[None]
        cell = self._contexts["initial_cell_lstm"](static)[None]
        past_output, state = self._lstm("lstm_encoder", past, (hidden, cell))
        ahead_output, _ = self._lstm("lstm_decoder", ahead, state)
        output, skipped = torch.cat([past_output, ahead_output], dim=1), torch.cat([past, ahead], dim=1)
        gated = functional.glu(linear(self._weights, "post_lstm_gate_encoder.fc", output))
        return norm(self._weights, "post_lstm_add_norm_encoder.norm", gated + skipped)

    def _lstm(
        self, name: str, steps: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        kinds = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        tensors = [self._weights[f"{name}.{kind}"] for kind in kinds]
        output, hidden, cell = torch.lstm(steps, state, tensors, True, 1, 0.0, False, False, True)
        return output, (hidden, cell)

    def _attend(self, knots: Tensor, steps: Tensor) -> Tensor:
        """Return interpretable multi-head attention: the heads share their values."""
        size = self._queries[1].shape[0] // self._n_heads

        def by_head(vectors: Tensor) -> Tensor:  # (window, head, step, size)
            return vectors.view(*vectors.shape[:2], self._n_heads, size).transpose(1, 2)

        queries = by_head(functional.linear(knots, *self._queries))
        keys = by_head(functional.linear(steps, *self._keys))
        scores = torch.matmul(queries, keys.transpose(2, 3)) / size**0.5
        attention = torch.softmax(scores.masked_fill(self._is_hidden, -1e9), dim=-1).mean(dim=1)
        values = linear(self._weights, "multihead_attn.v_layer", steps)
        return functional.linear(torch.matmul(attention, values), self._weights["multihead_attn.w_h.weight"])


def as_batch(arrays: ModelArrays, slots: Longs) -> Batch:
    """Return model arrays as tensors, without a copy."""
    return Batch(
        past=torch.from_numpy(arrays.past),
        ahead=torch.from_numpy(arrays.ahead),
        static=torch.from_numpy(arrays.static),
        metric=torch.from_numpy(slots),
    )


def as_tensors(weights: Mapping[str, Floats32]) -> dict[str, Tensor]:
    """Return weights as tensors of their own, to be trained on."""
    return {name: torch.from_numpy(array.copy()) for name, array in weights.items()}


def as_arrays(weights: Mapping[str, Tensor]) -> dict[str, Floats32]:
    """Return trained weights as arrays, which share no memory with the tensors."""
    return {name: tensor.detach().numpy().copy() for name, tensor in weights.items()}
