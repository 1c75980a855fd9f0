"""The blocks of a temporal fusion transformer over given weights, with what can be fused fused.

Owns: gated residual networks, variable selection, norms, named as the library names its weights.
A part of `network.py`'s graph. Does not know: attention, LSTMs, files.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

_NORM_EPSILON = 1e-5


class GatedResidual:
    """A gated residual network whose input and output have one size."""

    def __init__(self, weights: Mapping[str, Tensor], name: str) -> None:
        self._weights, self._name = weights, name
        self._gate = _fused(weights, f"{name}.fc2", f"{name}.gate_norm.glu.fc")
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
        self._scale = _stacked(weights, [f"{name}.prescalers.{real}.weight" for real in reals])[..., 0]
        self._shift = _stacked(weights, [f"{name}.prescalers.{real}.bias" for real in reals])
        self._hidden = weights[f"{name}.single_variable_grns.{reals[0]}.resample_norm.mask"].shape[0]
        self._variables = [
            _Variable(weights, f"{name}.single_variable_grns.{real}", self._scale[index], self._shift[index])
            for index, real in enumerate(reals)
        ]
        self._weigher = f"{name}.flattened_grn"
        self._weigher_gate = _fused(weights, f"{self._weigher}.fc2", f"{self._weigher}.gate_norm.glu.fc")
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


class _Variable:
    """The gated residual network of one scalar variable, its scaler fused in."""

    def __init__(self, weights: Mapping[str, Tensor], name: str, scale: Tensor, shift: Tensor) -> None:
        self._weights, self._name = weights, name
        first = weights[f"{name}.fc1.weight"]
        self._slope, self._offset = first @ scale, first @ shift + weights[f"{name}.fc1.bias"]
        self._gate = _fused(weights, f"{name}.fc2", f"{name}.gate_norm.glu.fc")
        mask = weights[f"{name}.resample_norm.mask"]
        resample = _resampling(len(scale), len(mask)) * (2 * torch.sigmoid(mask))
        # the skipped vector is affine in the scalar, so the mean and the variance that its norm
        # divides by are known beforehand: the variance is a square polynomial of the scalar
        slope, offset = _centred(scale @ resample), _centred(shift @ resample)
        self._square, self._mixed, self._constant = (
            slope.square().mean(),
            2 * (slope * offset).mean(),
            offset.square().mean() + _NORM_EPSILON,
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
    return functional.layer_norm(x, weight.shape, weight, bias, _NORM_EPSILON)


def gate_add_norm(weights: Mapping[str, Tensor], name: str, x: Tensor, skip: Tensor) -> Tensor:
    """Gate a vector, add the skipped one, normalise."""
    return norm(weights, f"{name}.add_norm.norm", functional.glu(linear(weights, f"{name}.glu.fc", x)) + skip)


def _stacked(weights: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return torch.stack([weights[name] for name in names])


def joined_linear(weights: Mapping[str, Tensor], names: list[str]) -> tuple[Tensor, Tensor]:
    """Return several linear layers of one input as one."""
    return (
        torch.cat([weights[f"{name}.weight"] for name in names]),
        torch.cat([weights[f"{name}.bias"] for name in names]),
    )


def _fused(weights: Mapping[str, Tensor], first: str, second: str) -> tuple[Tensor, Tensor]:
    """Return two linear layers with nothing between them as one."""
    outer = weights[f"{second}.weight"]
    return outer @ weights[f"{first}.weight"], outer @ weights[f"{first}.bias"] + weights[f"{second}.bias"]


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(dim=-1, keepdim=True)


def _resampling(n_from: int, n_to: int) -> Tensor:
    """Return the matrix (from, to) of the library's linear interpolation between vector sizes."""
    unit = torch.eye(n_from)[:, None]
    return functional.interpolate(unit, n_to, mode="linear", align_corners=True)[:, 0]
