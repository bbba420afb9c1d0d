"""A layer of InternViT: a transformer layer with layer scale and drop path on both residual branches."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn


def drop_path_rate(highest: float, layer: int, layers: int) -> float:
    """Rate of layer ``layer`` (from 0): 0 for the first, ``highest`` for the last, linear between (Huang et al., arXiv 1603.09382)."""
    return highest * layer / max(layers - 1, 1)


class VisionLayer(TransformerLayer):
    """``x + path(scale * attention(norm(x)))``, then the same with the MLP (Touvron et al., arXiv 2103.17239, for the layer scale)."""

    def __init__(self, config: TransformerConfig, submodules: TransformerLayerSubmodules, **kwargs):
        super().__init__(config=config, submodules=submodules, **kwargs)
        self.attention_scale = nn.Parameter(torch.ones(config.hidden_size, dtype=config.params_dtype))
        self.mlp_scale = nn.Parameter(torch.ones(config.hidden_size, dtype=config.params_dtype))

    def forward(self, hidden_states: Tensor, context: Tensor | None = None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """One layer.

        Args:
            hidden_states: [tokens of a tile, I, D].
            context: whether each tile keeps each branch, divided by the share that does [2 * layers, I]; none: all are kept. It takes
                the place of cross-attention's context, the one tensor that megatron-core's block hands to every layer, recomputed or not.
        """
        attended, bias = self.self_attention(self.input_layernorm(hidden_states), attention_mask=None)
        hidden_states = hidden_states + self._branch(attended + bias, self.attention_scale, context, 0)
        transformed, bias = self.mlp(self.pre_mlp_layernorm(hidden_states))
        return hidden_states + self._branch(transformed + bias, self.mlp_scale, context, 1), context

    def _branch(self, branch: Tensor, scale: Tensor, keep: Tensor | None, number: int) -> Tensor:
        branch = branch * scale
        if keep is None:
            return branch
        return branch * keep[2 * (self.layer_number - 1) + number, :, None].to(branch.dtype)
