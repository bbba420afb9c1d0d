"""A layer of the vision encoder: a transformer layer with layer scale (InternViT's) and drop path
on both residual branches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn


def drop_path_rate(highest: float, layer: int, layers: int) -> float:
    """Rate of layer ``layer`` (from 0): 0 for the first, ``highest`` for the last, linear between
    (Huang et al., arXiv 1603.09382).
    """
    return highest * layer / max(layers - 1, 1)


class VisionLayer(TransformerLayer):
    """``x + path(scale * attention(norm(x)))``, then the same with the MLP (Touvron et al., arXiv
    2103.17239, for the layer scale).

    Args:
        config: megatron-core's configuration of the encoder.
        submodules: what fills the slots of the layer.
        layer_scale: whether there are learned factors on both residual branches.
        add_branch: see ``megavlm.model.residual_branch.add_branch``.
        checkpoint: calls a function on tensors, of which it keeps the inputs only.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *,
        layer_scale: bool,
        add_branch: Callable[..., Tensor],
        checkpoint: Callable,
        **kwargs,
    ):
        super().__init__(config=config, submodules=submodules, **kwargs)
        self.attention_scale = self.mlp_scale = None
        if layer_scale:
            self.attention_scale = nn.Parameter(
                torch.ones(config.hidden_size, dtype=config.params_dtype)
            )
            self.mlp_scale = nn.Parameter(torch.ones(config.hidden_size, dtype=config.params_dtype))
        self.checkpoint = checkpoint
        self.add_branch = add_branch

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """One layer.

        Args:
            hidden_states: [tokens of a tile, I, D], or [I * tokens of a tile, 1, D].
            context: whether each tile keeps each branch, divided by the share that does [2 *
                layers, I]; none: all are kept. It takes the place of cross-attention's context, the
                one tensor that megatron-core's block hands to every layer, recomputed or not.
            rotary_pos_emb: angles of hidden states of the second shape; none: of the first.
            packed_seq_params: where their images end; likewise.
        """
        normed = self.input_layernorm(hidden_states)
        attended, bias = self.self_attention(
            normed,
            attention_mask=None,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
        )
        hidden_states = self._add(hidden_states, attended, bias, self.attention_scale, context, 0)
        normed = self.pre_mlp_layernorm(hidden_states)
        # Without a backward pass Transformer Engine would wait for ever for the second call, and
        # keep what it needs for it.
        recompute = self.recompute_mlp and torch.is_grad_enabled()
        transformed = (
            self.checkpoint(self._transform, self.tp_group, normed)
            if recompute
            else self._transform(normed)
        )
        return self._add(
            hidden_states, transformed, self.mlp.linear_fc2.bias, self.mlp_scale, context, 1
        ), context

    def _transform(self, hidden: Tensor) -> Tensor:
        # Without its bias: a parameter that a recomputed function returns is cut off from the
        # parameters that are trained.
        return self.mlp(hidden)[0]

    def _add(
        self,
        hidden: Tensor,
        branch: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        keep: Tensor | None,
        number: int,
    ) -> Tensor:
        if keep is not None:
            keep = keep[2 * (self.layer_number - 1) + number]
        return self.add_branch(hidden, branch, bias, scale, keep)
