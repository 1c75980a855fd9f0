"""The network's forward pass as a sweep runs it: many windows of one origin, no gradients.

Owns: `SweepNetwork`, the graph of `StaticNetwork` over the same weights, its answer equal within
1e-5 of the library's. Statics are worked out for all windows at once, the sequences for a few
windows at a time, so that their tensors stay in a core's cache. Does not know: units, servers.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from fleetcast.forecast.network import Batch, NetworkConfig, StaticNetwork
from fleetcast.forecast.networkblocks import linear
from fleetcast.forecast.sweepblocks import SweepResidual, SweepSelection

_BLOCK = 128  # windows whose sequences are worked out together


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
        local = self._gated("post_lstm_gate_encoder", "post_lstm_add_norm_encoder", output, local)
        enriched = self._sweep_enrichment(local, contexts["enrichment"])
        knots = enriched[:, n_past:]
        attended = self._gated("post_attn_gate_norm.glu", "post_attn_gate_norm.add_norm",
                               self._attention(knots, enriched), knots)  # fmt: skip
        output = self._sweep_feed_forward(attended)
        output = self._gated("pre_output_gate_norm.glu", "pre_output_gate_norm.add_norm",
                             output, local[:, n_past:])  # fmt: skip
        return linear(self._weights, "output_layer", output)

    def _gated(self, gate: str, norm: str, x: Tensor, skip: Tensor) -> Tensor:
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
