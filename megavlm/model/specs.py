"""Which modules the transformer layers are made of: Transformer Engine's where CUDA and the package are there, else megatron-core's own.

Both give a checkpoint the same keys: Transformer Engine folds a norm into the linear layer after it, and the key maps below let the
separate norms be saved under the same names.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megavlm.model.attention import PackedCausalAttention, TileAttention
from megavlm.model.norm import Norm
from megavlm.model.vision_layer import VisionLayer


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The classes that fill the slots of a layer.

    Args:
        norm: norm that stands alone (before the projector, after the last layer).
        layer_norm: norm in front of attention and MLP; nothing where the linear layer after it normalises.
        norm_linear: linear layer after that norm, its output split over the tensor-parallel ranks.
        column_linear: the same linear layer without a norm.
        row_linear: linear layer with its input split, its output summed.
        tile_attention: attention inside the tiles.
        packed_attention: causal attention inside the samples of a pack.
        fused_rotary: whether a fused kernel turns queries and keys.
    """

    norm: type
    layer_norm: type
    norm_linear: type
    column_linear: type
    row_linear: type
    tile_attention: type
    packed_attention: type
    fused_rotary: bool


def uses_transformer_engine() -> bool:
    """Whether Transformer Engine's layers are used."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def local_kernels() -> Kernels:
    """Layers that run anywhere."""
    return Kernels(
        norm=Norm,
        layer_norm=Norm,
        norm_linear=ColumnParallelLinear,
        column_linear=ColumnParallelLinear,
        row_linear=RowParallelLinear,
        tile_attention=TileAttention,
        packed_attention=PackedCausalAttention,
        fused_rotary=False,
    )


def transformer_engine_kernels() -> Kernels:
    """Transformer Engine's layers, which need a CUDA device to run."""
    from megatron.core.extensions import transformer_engine as engine

    return Kernels(
        norm=engine.TENorm,
        layer_norm=IdentityOp,
        norm_linear=engine.TELayerNormColumnParallelLinear,
        column_linear=engine.TEColumnParallelLinear,
        row_linear=engine.TERowParallelLinear,
        tile_attention=engine.TEDotProductAttention,
        packed_attention=engine.TEDotProductAttention,
        fused_rotary=True,
    )


def kernels() -> Kernels:
    """Layers for this machine."""
    return transformer_engine_kernels() if uses_transformer_engine() else local_kernels()


def _without_bias(linear: type) -> type:
    """``linear`` that has no bias, whatever it is asked for: megatron-core gives one to queries, keys and values when other layers have."""

    class WithoutBias(linear):
        def __init__(self, *args, bias: bool, **kwargs):
            super().__init__(*args, bias=False, **kwargs)

    return WithoutBias


def _attention(core: type, mask: AttnMaskType, qkv_bias: bool, chosen: Kernels) -> ModuleSpec:
    linear = chosen.norm_linear if qkv_bias else _without_bias(chosen.norm_linear)
    submodules = SelfAttentionSubmodules(linear_qkv=linear, core_attention=core, linear_proj=chosen.row_linear)
    return ModuleSpec(module=SelfAttention, params={"attn_mask_type": mask}, submodules=submodules)


def mlp_submodules(first: type, chosen: Kernels) -> MLPSubmodules:
    """Slots of an MLP whose first linear layer is ``first``."""
    return MLPSubmodules(linear_fc1=first, linear_fc2=chosen.row_linear)


def _layers(module: type, attention: ModuleSpec, count: int, chosen: Kernels) -> list[ModuleSpec]:
    submodules = TransformerLayerSubmodules(
        input_layernorm=chosen.layer_norm,
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=chosen.layer_norm,
        mlp=ModuleSpec(module=MLP, submodules=mlp_submodules(chosen.norm_linear, chosen)),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )
    return [ModuleSpec(module=module, submodules=submodules)] * count


def vision_spec(count: int, qkv_bias: bool, chosen: Kernels) -> TransformerBlockSubmodules:
    """A run of ``count`` InternViT layers, without a norm after the last."""
    attention = _attention(chosen.tile_attention, AttnMaskType.no_mask, qkv_bias, chosen)
    return TransformerBlockSubmodules(layer_specs=_layers(VisionLayer, attention, count, chosen), layer_norm=None)


def language_spec(count: int, qkv_bias: bool, chosen: Kernels) -> TransformerBlockSubmodules:
    """A run of ``count`` layers of the language model, with a norm after the last one of the model."""
    attention = _attention(chosen.packed_attention, AttnMaskType.causal, qkv_bias, chosen)
    return TransformerBlockSubmodules(layer_specs=_layers(TransformerLayer, attention, count, chosen), layer_norm=chosen.norm)
