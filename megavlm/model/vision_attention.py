"""Attention inside the tiles of InternViT, with heads that divide over any number of ranks, and the
norm of InternViT-6B.
"""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from torch import Tensor

from megavlm.config.schema import Vision
from megavlm.model.norm import QueryKeyNorm

_PADDED_COLUMNS = (".self_attention.linear_proj.weight", ".self_attention.linear_proj.lora.a")


def unpadded_shape(vision: Vision, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a whole tensor of the vision encoder, without heads that only pad."""
    if key.endswith((".linear_qkv.lora.a", ".linear_proj.lora.b")):
        return shape
    if ".self_attention.linear_qkv." in key and "layer_norm" not in key:
        return (3 * vision.hidden_size, *shape[1:])
    if ".self_attention.qk_norm." in key or key.endswith(_PADDED_COLUMNS):
        return (*shape[:-1], vision.hidden_size)
    return shape


class VisionAttention(SelfAttention):
    """megatron-core's attention, with a norm over all queries and all keys where the model has one.

    Heads that only pad are zero, and stay so: with a zero head all its gradients are zero, in the
    projection behind it too. How many there are depends on the layout, so checkpoints take tensors
    of other lengths here.

    Args:
        qk_norm: whether there is the norm.
        config, submodules, kwargs: as megatron-core gives them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        qk_norm: bool,
        **kwargs,
    ):
        super().__init__(config=config, submodules=submodules, **kwargs)
        local_width = self.num_attention_heads_per_partition * self.hidden_size_per_attention_head
        self.qk_norm = (
            QueryKeyNorm(config, config.hidden_size, local_width, self.pg_collection.tp)
            if qk_norm
            else None
        )

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project to query, key and value, all [tokens of a tile, I, heads of this rank, head
        size]; ``Attention.forward`` of megatron-core calls this.
        """
        query, key, value = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        if self.qk_norm is not None:
            query, key = self.qk_norm(query, key)
        return query, key, value

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Describe the weights of this rank; megatron-core calls this when it saves or loads a
        checkpoint.
        """
        entries = super().sharded_state_dict(*args, **kwargs)
        for entry in entries.values():
            if isinstance(entry, ShardedTensor):
                entry.allow_shape_mismatch = True
        return entries
