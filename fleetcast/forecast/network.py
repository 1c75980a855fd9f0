"""The temporal fusion transformer: the library's, to be trained, and a static graph of its weights.

Owns: how pytorch-forecasting's class is built for our variables (`build`), and the forward pass
that training and serving run (`StaticNetwork`): the same weights and the same answer within 1e-5,
with everything fused that can be, without lengths and interpretation. Weights keep the library's
names. Only `build` imports the library, so a serving process never pays for it. Does not know:
units, files, servers.
Source: Lim et al., Temporal Fusion Transformers (arXiv:1912.09363).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fleetcast.forecast.encoding import AHEAD_REALS, PAST_REALS, STATIC_REALS, GridShape, ModelArrays
from fleetcast.schema import QUANTILES, Longs

METRIC_SLOTS = 32  # slot 0: a metric never seen in training
WIDEST = 512  # `train.hidden_size` allows no more
_FIRST_WEIGHT, _FIRST_ANSWER = 0.3, (-0.2, 0.0, 0.2)
_SMALL = 8  # size of a scalar's vector before it is widened; always smaller than the network's width
NORM_EPSILON = 1e-5
_STATIC, _ENCODER, _DECODER = (f"{part}_variable_selection" for part in ("static", "encoder", "decoder"))
_CONTEXTS = ("variable_selection", "initial_hidden_lstm", "initial_cell_lstm", "enrichment")


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


@dataclass(frozen=True)
class NetworkConfig:
    """What the weights' shapes follow from; part of a checkpoint."""

    n_past: int
    n_knots: int
    hidden_size: int
    continuous_size: int
    n_heads: int = 4
    past_reals: tuple[str, ...] = PAST_REALS
    ahead_reals: tuple[str, ...] = AHEAD_REALS
    static_reals: tuple[str, ...] = STATIC_REALS

    @classmethod
    def for_grid(cls, grid: GridShape, hidden_size: int) -> "NetworkConfig":
        """Return the network of one width for one grid."""
        return cls(grid.n_past, grid.n_knots, hidden_size, min(_SMALL, hidden_size // 2))

    def as_config(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NetworkConfig":
        """Return the configuration a checkpoint was made with; KeyError and TypeError on junk."""
        numbers = ("n_past", "n_knots", "hidden_size", "n_heads", "continuous_size")
        names = ("past_reals", "ahead_reals", "static_reals")
        values: dict[str, Any] = {name: int(config[name]) for name in numbers}
        values |= {name: tuple(str(item) for item in config[name]) for name in names}
        made = cls(**values)
        is_wide = 4 <= made.hidden_size <= WIDEST and made.continuous_size == min(
            _SMALL, made.hidden_size // 2
        )
        if not is_wide or not 1 <= made.n_heads <= made.hidden_size:
            raise ValueError(
                f"{made.hidden_size} wide with {made.n_heads} heads is no network of this program"
            )
        return made

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight, by the library's names; `build` makes the same.

        >>> shapes = NetworkConfig(n_past=68, n_knots=26, hidden_size=8, continuous_size=4).weight_shapes()
        >>> len(shapes), shapes["output_layer.weight"]
        (470, (3, 8))
        """
        wide, small = self.hidden_size, self.continuous_size
        size = wide // self.n_heads
        heads = [f"{kind}_layers.{head}" for kind in "qk" for head in range(self.n_heads)]
        shapes: dict[str, tuple[int, ...]] = {
            "input_embeddings.embeddings.metric.weight": (METRIC_SLOTS, small),
            "multihead_attn.w_h.weight": (wide, size),
        }
        for prefix, reals in _scaled_reals(self):
            for real in reals:
                shapes |= _linear_shapes(f"{prefix}prescalers.{real}", 1, small)
        shapes |= _selection_shapes(self, _STATIC, self.static_reals, has_category=True)
        shapes |= _selection_shapes(self, _ENCODER, self.past_reals)
        shapes |= _selection_shapes(self, _DECODER, self.ahead_reals)
        for context in _CONTEXTS:
            shapes |= _gated_shapes(f"static_context_{context}", wide, wide)
        shapes |= _gated_shapes("static_enrichment", wide, wide) | _gated_shapes("pos_wise_ff", wide, wide)
        shapes["static_enrichment.context.weight"] = (wide, wide)
        for side in ("encoder", "decoder"):
            shapes |= _lstm_shapes(f"lstm_{side}", wide)
            shapes |= _linear_shapes(f"post_lstm_gate_{side}.fc", wide, 2 * wide)
            shapes |= _norm_shapes(f"post_lstm_add_norm_{side}.norm", wide)
        for gate in ("post_attn_gate_norm", "pre_output_gate_norm"):
            shapes |= _gate_shapes(gate, wide, wide)
        for layer in ("v_layer", *heads):
            shapes |= _linear_shapes(f"multihead_attn.{layer}", wide, size)
        return shapes | _linear_shapes("output_layer", wide, len(QUANTILES))


def _scaled_reals(config: NetworkConfig) -> list[tuple[str, tuple[str, ...]]]:
    """Return which scalars have a scaler under which prefix: the library lists them all once more."""
    return [
        ("", tuple(real_names(config))),
        (f"{_STATIC}.", config.static_reals),
        (f"{_ENCODER}.", config.past_reals),
        (f"{_DECODER}.", config.ahead_reals),
    ]


def _selection_shapes(
    config: NetworkConfig, name: str, reals: tuple[str, ...], *, has_category: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a variable selection; the static one has a category and no context."""
    wide, small = config.hidden_size, config.continuous_size
    n_variable = len(reals) + has_category
    inner = min(wide, n_variable)
    weigher = f"{name}.flattened_grn"
    shapes = _resample_shapes(f"{weigher}.resample_norm", n_variable)
    shapes |= _linear_shapes(f"{weigher}.fc1", n_variable * small, inner)
    shapes |= _linear_shapes(f"{weigher}.fc2", inner, inner)
    shapes |= _gate_shapes(f"{weigher}.gate_norm", inner, n_variable)
    if has_category:
        shapes |= _resample_shapes(f"{name}.single_variable_grns.metric", wide)
    else:
        shapes[f"{weigher}.context.weight"] = (inner, wide)
    for real in reals:
        variable = f"{name}.single_variable_grns.{real}"
        shapes |= _resample_shapes(f"{variable}.resample_norm", wide) | _gated_shapes(variable, small, wide)
    return shapes


def _gated_shapes(name: str, inner: int, out: int) -> dict[str, tuple[int, ...]]:
    layers = _linear_shapes(f"{name}.fc1", inner, inner) | _linear_shapes(f"{name}.fc2", inner, inner)
    return layers | _gate_shapes(f"{name}.gate_norm", inner, out)


def _gate_shapes(name: str, inner: int, out: int) -> dict[str, tuple[int, ...]]:
    return _linear_shapes(f"{name}.glu.fc", inner, 2 * out) | _norm_shapes(f"{name}.add_norm.norm", out)


def _resample_shapes(name: str, out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.mask": (out,), **_norm_shapes(f"{name}.norm", out)}


def _linear_shapes(name: str, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}


def _norm_shapes(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _lstm_shapes(name: str, wide: int) -> dict[str, tuple[int, ...]]:
    matrices = {f"{name}.weight_{kind}_l0": (4 * wide, wide) for kind in ("ih", "hh")}
    return matrices | {f"{name}.bias_{kind}_l0": (4 * wide,) for kind in ("ih", "hh")}


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


def real_names(config: NetworkConfig) -> list[str]:
    """Return the library's order of continuous variables."""
    return list(dict.fromkeys([*config.static_reals, *config.past_reals, *config.ahead_reals]))


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
        self._static = VariableSelection(weights, _STATIC, config.static_reals, "metric")
        self._past = VariableSelection(weights, _ENCODER, config.past_reals)
        self._ahead = VariableSelection(weights, _DECODER, config.ahead_reals)
        self._contexts = {name: GatedResidual(weights, f"static_context_{name}") for name in _CONTEXTS}
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
