"""Gated cross-attention before layers of the language model (Flamingo, arXiv 2204.14198, section
3.1.2), in the form of IDEFICS.

Shape letters: T tokens of the pack, t those of this rank (fewer than T under sequence parallelism),
R tokens that read an image, I tiles, F features of a tile, D hidden size, M width of the features,
H heads of this rank, d width of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megavlm.config.cross_attention import CrossAttention
from megavlm.data.loading.batch import Media
from megavlm.model.attention import PackedSamples
from megavlm.model.cached_attention import attend_to_cached
from megavlm.model.key_value_cache import Decode
from megavlm.model.norm import scaled_rms_norm


@dataclass(frozen=True, kw_only=True)
class CrossModules:
    """The classes that a block is made of, those of the layers around it.

    Args:
        norm: stands alone.
        column_linear: its output is split over the tensor-parallel ranks.
        row_linear: its input is, and its output summed.
        attention: between the tokens of a segment and the features of its tile.
        mlp: slots of the MLP.
        checkpoint: calls a function on tensors, of which it keeps the inputs only; a group of
            tensor-parallel ranks stands between the two.
    """

    norm: type
    column_linear: type
    row_linear: type
    attention: type
    mlp: MLPSubmodules
    checkpoint: Callable


class _HeadNorm(nn.Module):
    """RMSNorm of each head; tensor-parallel ranks have heads of their own, so that each knows a
    part of the gradient.
    """

    def __init__(self, config: TransformerConfig, size: int, group: ProcessGroup):
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.group = group
        self.is_zero_centered = config.layernorm_zero_centered_gamma
        self.weight = nn.Parameter(torch.ones(size, dtype=config.params_dtype))

    def forward(self, heads: Tensor) -> Tensor:
        """[..., d] -> [..., d]"""
        weight = copy_to_tensor_model_parallel_region(self.weight, self.group)
        return scaled_rms_norm(heads, weight, self.eps, self.is_zero_centered)


class GatedCrossAttention(MegatronModule):
    """``y + tanh(gate) * attention(norm(y), features)``, then the same with an MLP. Tokens that
    read no image get nothing from the first half; the second is for all tokens.

    Args:
        config: megatron-core's configuration of the language model.
        settings: ours.
        memory_size: width of the features M.
        features: of a tile F.
        modules: what it is made of.
        layer_number: of the layer behind it, from 1.
        groups: process groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        settings: CrossAttention,
        memory_size: int,
        features: int,
        modules: CrossModules,
        layer_number: int,
        groups: ProcessGroupCollection,
    ):
        super().__init__(config)
        self.features = features
        self.layer_number = layer_number
        self.group = groups.tp
        self.checkpoint = modules.checkpoint
        size = config.kv_channels
        width = config.hidden_size
        self.head_size = size
        heads = config.num_attention_heads * size
        # Every rank has the features of all tiles, and all heads have keys of their own.
        whole = copy.copy(config)
        whole.sequence_parallel = False
        whole.context_parallel_size = 1
        whole.num_query_groups = config.num_attention_heads
        linear = dict(
            init_method=config.init_method, bias=False, skip_bias_add=False, is_expert=False
        )
        column = dict(linear, gather_output=False, tp_group=groups.tp)
        eps = config.layernorm_epsilon
        self.norm = modules.norm(config=config, hidden_size=width, eps=eps)
        self.linear_q = modules.column_linear(width, heads, config=config, **column)
        self.linear_k = modules.column_linear(memory_size, heads, config=whole, **column)
        self.linear_v = modules.column_linear(memory_size, heads, config=whole, **column)
        self.query_norm = self.key_norm = None
        if settings.qk_norm:
            self.query_norm = _HeadNorm(config, size, groups.tp)
            self.key_norm = _HeadNorm(config, size, groups.tp)
        self.attention = modules.attention(
            config=whole,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.no_mask,
            attention_type="cross",
        )
        self.linear_proj = modules.row_linear(
            heads, width, config=config, input_is_parallel=True, tp_group=groups.tp, **linear
        )
        self.attention_gate = self._gate(settings)
        self.mlp_norm = modules.norm(config=config, hidden_size=width, eps=eps)
        self.mlp = MLP(config=config, submodules=modules.mlp, tp_group=groups.tp)
        self.mlp_gate = self._gate(settings)

    def _gate(self, settings: CrossAttention) -> nn.Parameter:
        size = self.config.hidden_size if settings.gate == "vector" else 1
        gate = nn.Parameter(torch.zeros(size, dtype=self.config.params_dtype))
        # Read by megatron-core's ``finalize_model_grads``: a rank sees its own tokens only.
        gate.sequence_parallel = self.config.sequence_parallel
        return gate

    def forward(
        self, hidden: Tensor, memory: Tensor | None, samples: PackedSamples, recompute: bool
    ) -> Tensor:
        """Let tokens read images.

        Args:
            hidden: [t, 1, D].
            memory: features of all tiles [I * F, 1, M]; none if what is cached is read.
            samples: which tokens read which tile, and what is cached.
            recompute: whether the MLP is computed again in the backward pass.

        Returns:
            [t, 1, D]
        """
        read = self._attend(hidden, memory, samples)
        hidden = hidden + torch.tanh(self.attention_gate) * read
        normed = self.mlp_norm(hidden)
        if recompute and torch.is_grad_enabled():
            transformed, _ = self.checkpoint(self.mlp, self.group, normed)
        else:
            transformed, _ = self.mlp(normed)
        return hidden + torch.tanh(self.mlp_gate) * transformed

    def _attend(self, hidden: Tensor, memory: Tensor | None, samples: PackedSamples) -> Tensor:
        query = self._heads(self.linear_q(self.norm(hidden))[0])
        if self.query_norm is not None:
            query = self.query_norm(query)
        if isinstance(samples.cached, Decode):
            found = attend_to_cached(query, samples.cached.tiles(self))
            return self.linear_proj(found[:, None])[0]
        key = self._heads(self.linear_k(memory)[0])
        value = self._heads(self.linear_v(memory)[0])
        if self.key_norm is not None:
            key = self.key_norm(key)
        if samples.cached is not None:
            samples.cached.record_tiles(self, self._by_tile(key), self._by_tile(value))
        media = samples.media
        asking = query.index_select(0, media.rows)
        key, value = (self._of_segments(one, media) for one in (key, value))
        segments = PackedSamples(
            qkv_format="thd",
            cu_seqlens_q=media.ends,
            cu_seqlens_kv=media.image_ends * self.features,
            max_seqlen_q=max(media.lengths),
            max_seqlen_kv=self.features,
            query_lengths=media.lengths,
            key_lengths=(self.features,) * len(media.lengths),
        )
        found = self.attention(
            asking,
            key,
            value,
            None,
            attn_mask_type=AttnMaskType.no_mask,
            packed_seq_params=segments,
        ).view(len(media.rows), -1)
        if not media.is_real:
            found = found * 0
        spread = found.new_zeros(len(query), found.shape[1]).index_copy(0, media.rows, found)
        return self.linear_proj(spread[:, None])[0]

    def _heads(self, states: Tensor) -> Tensor:
        """[rows, 1, H * d] -> [rows, H, d]"""
        return states.view(len(states), -1, self.head_size)

    def _of_segments(self, states: Tensor, media: Media) -> Tensor:
        """Choose the features that segments read: [I * F, H, d] -> [segments * F, H, d]."""
        return self._by_tile(states).index_select(0, media.images).flatten(0, 1)

    def _by_tile(self, states: Tensor) -> Tensor:
        """[I * F, H, d] -> [I, F, H, d]"""
        return states.view(-1, self.features, *states.shape[1:])


class GatedLayer(TransformerLayer):
    """A transformer layer with a block of cross-attention in front of it.

    Args:
        config: megatron-core's configuration of the language model.
        submodules: what fills the slots of the layer.
        cross: makes the block, of the configuration, the number of the layer and the groups.
    """

    def __init__(self, config: TransformerConfig, submodules, *, cross: Callable, **kwargs):
        super().__init__(config=config, submodules=submodules, **kwargs)
        self.cross = cross(config, layer_number=self.layer_number, groups=kwargs["pg_collection"])

    def forward(
        self,
        hidden_states: Tensor,
        *args,
        context: Tensor | None,
        packed_seq_params: PackedSamples,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """Run block and layer; ``TransformerBlock.forward`` of megatron-core calls this, and its
        ``context``, the features of all tiles, is what it recomputes gradients for.
        """
        hidden_states = self.cross(hidden_states, context, packed_seq_params, self.recompute_mlp)
        return super().forward(
            hidden_states, *args, context=context, packed_seq_params=packed_seq_params, **kwargs
        )
