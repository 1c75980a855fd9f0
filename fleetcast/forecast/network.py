"""The temporal fusion transformer of this program: its sizes, its weights, and its answers in numpy.

Owns: the name and shape of every weight (`NetworkConfig`), which are the library's, and `SweepNetwork`, the
forward pass of many windows of one origin, without gradients. A training runs the same weights in torch
(`training.network`); both are equal within 1e-5. A daemon that forecasts so needs no torch, which would
take more memory than all else that an idle daemon holds. Does not know: units, files, servers.
Source: Lim et al., Temporal Fusion Transformers (arXiv:1912.09363).

Arrays of sequences are (step, size, window): numpy's inner loops run over windows, norms and gates over
full rows. Statics are computed for all windows at once, sequences for a few windows and a few steps
at a time, so that their arrays stay in a core's cache.

What helped:
- exp is the one transcendental function that numpy vectorises well: every sigmoid and tanh is made of
  it. Where an exponential overflows, its quotient is 0, as it should be.
- Input, state and a one for the bias stand in one column, so an LSTM's step is one product.
- All heads weigh the same values, so one product serves them, and a column of ones in it gives the
  sums that softmax divides by.
- The selection of variables reads tabulated curves (`selection`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fleetcast.forecast.encoding import AHEAD_REALS, PAST_REALS, STATIC_REALS, GridShape
from fleetcast.forecast.selection import (
    CONTEXTS,
    DECODER,
    ENCODER,
    EPSILON,
    STATIC,
    STEPS,
    Selection,
    Statics,
    Weights,
    column,
    elu_plus_one,
    fuse,
    layer_of,
    negative_half,
    one_and_exp,
    without_one,
)
from fleetcast.schema import QUANTILES, Floats32, Longs

METRIC_SLOTS = 32  # slot 0: a metric never seen in training
WIDEST = 512  # `train.hidden_size` allows no more
_SMALL = 8  # size of a scalar's vector before it is widened; always smaller than the network's width
_BLOCK = 128  # windows whose sequences are computed together
_ATTENDING = 8  # windows whose attention is computed together
_ONE, _TWO = np.float32(1), np.float32(2)


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
        shapes |= _selection_shapes(self, STATIC, self.static_reals, has_category=True)
        shapes |= _selection_shapes(self, ENCODER, self.past_reals)
        shapes |= _selection_shapes(self, DECODER, self.ahead_reals)
        for context in CONTEXTS:
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
        (f"{STATIC}.", config.static_reals),
        (f"{ENCODER}.", config.past_reals),
        (f"{DECODER}.", config.ahead_reals),
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


def real_names(config: NetworkConfig) -> list[str]:
    """Return the library's order of continuous variables."""
    return list(dict.fromkeys([*config.static_reals, *config.past_reals, *config.ahead_reals]))


class _Gate:
    """A gated linear unit, added to what skips it and normed; on (step, size, window), in place."""

    def __init__(self, weights: Weights, layer: tuple[Floats32, Floats32], norm: str) -> None:
        self._weight, self._bias = negative_half(layer[0]), negative_half(column(layer[1]))
        self._gain, self._shift = (column(part) for part in layer_of(weights, norm))
        self._share = np.float32(1 / len(self._gain))

    def __call__(self, x: Floats32, skip: Floats32) -> None:
        """Turn `skip` into norm(skip + glu(layer(x)))."""
        both = np.matmul(self._weight, x)
        both += self._bias
        gated, gate = both[:, : skip.shape[1]], both[:, skip.shape[1] :]
        gated /= one_and_exp(gate)
        skip += gated
        skip -= np.add.reduce(skip, axis=1, keepdims=True) * self._share
        squares = np.square(skip, out=gated)
        skip /= np.sqrt(np.add.reduce(squares, axis=1, keepdims=True) * self._share + EPSILON)
        skip *= self._gain
        skip += self._shift


class _Residual:
    """A gated residual network on (step, size, window), in place."""

    def __init__(self, weights: Weights, name: str) -> None:
        self._first, self._bias = weights[f"{name}.fc1.weight"], column(weights[f"{name}.fc1.bias"])
        self._context = weights.get(f"{name}.context.weight")
        layer = without_one(*fuse(weights, f"{name}.fc2", f"{name}.gate_norm.glu.fc"))
        self._gate = _Gate(weights, layer, f"{name}.gate_norm.add_norm.norm")

    def shift(self, context: Floats32) -> Floats32:
        """Return what a context (size, window) adds at every step, the bias included."""
        assert self._context is not None, "this network has no context"
        return self._context @ context + self._bias

    def __call__(self, x: Floats32, shift: Floats32 | None = None) -> None:
        """Turn `x` into the network's answer."""
        inner = np.matmul(self._first, x)
        inner += self._bias if shift is None else shift
        elu_plus_one(inner)
        self._gate(inner, x)


class SweepNetwork:
    """The network's answers; safe from any thread. The weights must not change.

    Weights that no training gives may answer NaN, without a warning: who loads a model tries it once.
    """

    @np.errstate(all="ignore")
    def __init__(self, weights: Weights, config: NetworkConfig) -> None:
        self._config = config
        self._statics = Statics(weights, config.static_reals, config.hidden_size)
        self._past = Selection(weights, ENCODER, config.past_reals)
        self._ahead = Selection(weights, DECODER, config.ahead_reals)
        self._lstms = _lstm_weights(weights, "lstm_encoder"), _lstm_weights(weights, "lstm_decoder")
        gates = (
            ("post_lstm_gate_encoder.fc", "post_lstm_add_norm_encoder.norm"),
            ("post_attn_gate_norm.glu.fc", "post_attn_gate_norm.add_norm.norm"),
            ("pre_output_gate_norm.glu.fc", "pre_output_gate_norm.add_norm.norm"),
        )
        self._after_lstm, self._after_attention, self._last = (
            _Gate(weights, layer_of(weights, layer), norm) for layer, norm in gates
        )
        self._enrichment, self._feed_forward = (
            _Residual(weights, name) for name in ("static_enrichment", "pos_wise_ff")
        )
        self._attention = _Attention(weights, config)
        weight, bias = layer_of(weights, "output_layer")
        self._output = weight, column(bias)

    @np.errstate(all="ignore")
    def __call__(self, past: Floats32, ahead: Floats32, static: Floats32, metric: Longs) -> Floats32:
        """Return the answer (window, knot, quantile).

        Args:
            past: (window, past step, variable); ahead: (window, knot, variable).
            static: (window, variable); metric: (window,) slots.
        """
        answer = np.empty((len(past), self._config.n_knots, len(self._output[0])), np.float32)
        contexts = self._statics.contexts(static, metric)
        for start in range(0, len(past), _BLOCK):
            rows = slice(start, start + _BLOCK)
            columns = {name: np.ascontiguousarray(own[rows].T) for name, own in contexts.items()}
            answer[rows] = self._sequences(past[rows], ahead[rows], columns)
        return answer

    def _sequences(self, past: Floats32, ahead: Floats32, contexts: Mapping[str, Floats32]) -> Floats32:
        """Return the answer of a block, contexts given as (hidden, window)."""
        n_window, n_past = past.shape[:2]
        local = np.empty((n_past + ahead.shape[1], self._config.hidden_size, n_window), np.float32)
        self._past.select(past, contexts["variable_selection"], local[:n_past])
        self._ahead.select(ahead, contexts["variable_selection"], local[n_past:])
        output = self._run_lstms(local, n_past, contexts)
        shift = self._enrichment.shift(contexts["enrichment"])
        enriched = np.empty((n_window, *local.shape[:2]), np.float32)  # (window, step, hidden)
        for start in range(0, len(local), STEPS):
            steps = slice(start, start + STEPS)
            self._after_lstm(output[steps], local[steps])
            vectors = np.positive(local[steps])
            self._enrichment(vectors, shift)
            enriched[:, steps] = vectors.transpose(2, 0, 1)
        attended = self._attention(enriched, output[n_past:])
        answer = np.empty((n_window, len(attended), len(self._output[0])), np.float32)
        for start in range(0, len(attended), STEPS):
            steps = slice(start, start + STEPS)
            own = np.ascontiguousarray(enriched[:, n_past:][:, steps].transpose(1, 2, 0))
            skipped = local[n_past:][steps]
            self._after_attention(attended[steps], own)
            self._feed_forward(own)
            self._last(own, skipped)
            answer[:, steps] = (self._output[0] @ skipped + self._output[1]).transpose(2, 0, 1)
        return answer

    def _run_lstms(self, local: Floats32, n_past: int, contexts: Mapping[str, Floats32]) -> Floats32:
        """Return the outputs (step, hidden, window) of the one over the past and the one after it."""
        _, size, n_window = local.shape
        stacked = np.empty((2 * size + 1, n_window), np.float32)  # input, state and the bias' one
        stacked[2 * size] = 1
        entry, state = stacked[:size], stacked[size : 2 * size]
        state[...] = contexts["initial_hidden_lstm"]
        cell = contexts["initial_cell_lstm"].copy()
        gates = np.empty((4 * size, n_window), np.float32)
        admitted, kept, shown, new = gates.reshape(4, size, n_window)
        squashed, output = np.empty_like(cell), np.empty_like(local)
        for step, vectors in enumerate(local):
            np.positive(vectors, out=entry)  # a ufunc: here numpy's copy takes five times as long
            np.matmul(self._lstms[step >= n_past], stacked, out=gates)
            one_and_exp(gates)
            cell /= kept
            _tanh_of(new)
            new /= admitted
            cell += new
            np.multiply(cell, -_TWO, out=squashed)
            _tanh_of(one_and_exp(squashed))
            np.divide(squashed, shown, out=state)
            np.positive(state, out=output[step])
        return output


class _Attention:
    """Interpretable multi-head attention of the knots: the heads share their values."""

    def __init__(self, weights: Weights, config: NetworkConfig) -> None:
        self._n_past, self._n_heads = config.n_past, config.n_heads
        self._size = config.hidden_size // config.n_heads
        heads = [_heads(weights, kind, config.n_heads) for kind in "qk"]
        scale = np.float32(self._size**-0.5)
        self._queries = heads[0][0].T * scale, heads[0][1] * scale
        value, bias = layer_of(weights, "multihead_attn.v_layer")
        self._rest = np.concatenate([heads[1][0], value]).T, np.concatenate([heads[1][1], bias])
        self._mean_output = weights["multihead_attn.w_h.weight"].T / np.float32(config.n_heads)
        knot = np.arange(config.n_knots)  # a knot attends to the past and to knots before it
        self._hidden = np.where(knot >= knot[:, None], np.float32(-1e9), np.float32(0))

    def __call__(self, steps: Floats32, attended: Floats32) -> Floats32:
        """Return `attended` (knot, hidden, window), filled from all steps (window, step, hidden)."""
        for start in range(0, len(steps), _ATTENDING):
            some = slice(start, start + _ATTENDING)
            attended[..., some] = self._attend(steps[some]).transpose(1, 2, 0)
        return attended

    def _attend(self, steps: Floats32) -> Floats32:
        n_window, n_step, _ = steps.shape
        n_knot, wide = n_step - self._n_past, self._n_heads * self._size
        queries = steps[:, self._n_past :] @ self._queries[0] + self._queries[1]
        rest = steps @ self._rest[0] + self._rest[1]
        queries = queries.reshape(n_window, n_knot, self._n_heads, self._size).transpose(0, 2, 1, 3)
        keys = rest[..., :wide].reshape(n_window, n_step, self._n_heads, self._size).transpose(0, 2, 3, 1)
        scores = np.matmul(queries, keys)  # (window, head, knot, step)
        scores[..., self._n_past :] += self._hidden
        scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        values = np.ones((n_window, n_step, self._size + 1), np.float32)
        values[..., :-1] = rest[..., wide:]
        sums = np.matmul(scores.reshape(n_window, -1, n_step), values)
        of_head = (sums[..., :-1] / sums[..., -1:]).reshape(n_window, self._n_heads, n_knot, self._size)
        return np.asarray(np.add.reduce(of_head, axis=1) @ self._mean_output, np.float32)


def _heads(weights: Weights, kind: str, n_heads: int) -> tuple[Floats32, Floats32]:
    """Return the layers of all heads as one."""
    layers = [layer_of(weights, f"multihead_attn.{kind}_layers.{head}") for head in range(n_heads)]
    return np.concatenate([layer[0] for layer in layers]), np.concatenate([layer[1] for layer in layers])


def _lstm_weights(weights: Weights, name: str) -> Floats32:
    """Return the weights of input, state and bias side by side, as the exponents that the gates are made of.

    The gates come in the order in which they stand here: what is admitted, kept, shown, and what is new.
    """
    kinds = [weights[f"{name}.{kind}_l0"] for kind in ("weight_ih", "weight_hh")]
    bias = weights[f"{name}.bias_ih_l0"] + weights[f"{name}.bias_hh_l0"]
    admitted, kept, new, shown = np.split(np.concatenate([*kinds, bias[:, None]], axis=1), 4)
    return np.concatenate([-admitted, -kept, -shown, -2 * new])


def _tanh_of(x: Floats32) -> None:
    """Turn 1 + exp(-2 y) into tanh(y)."""
    np.divide(_TWO, x, out=x)
    x -= _ONE
