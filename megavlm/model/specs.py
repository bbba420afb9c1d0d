"""What the layers of a model chunk are made of, in megatron-core's words: a ``ModuleSpec`` names a
class and what fills its slots, and ``TransformerBlock._build_layers`` builds a stack of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megavlm.config.schema import Architecture, Experts, Language, Vision
from megavlm.model.block_attention import BlockAttention
from megavlm.model.cached_attention import caching
from megavlm.model.cross_attention import CrossModules, GatedCrossAttention, GatedLayer
from megavlm.model.deepstack import DeepLayer, TappedVisionLayer
from megavlm.model.experts import mixture_spec
from megavlm.model.kernels import Kernels
from megavlm.model.named_after import named_after
from megavlm.model.native_attention import NativeVisionAttention
from megavlm.model.rotary import turning
from megavlm.model.router import PackRouter
from megavlm.model.sandwich_layer import SandwichLayer
from megavlm.model.sink_attention import SinkAttention
from megavlm.model.vision_attention import VisionAttention
from megavlm.model.vision_layer import VisionLayer


def _without_bias(linear: type) -> type:
    """Keep ``linear`` from having a bias, whatever it is asked for: ``SelfAttention`` of
    megatron-core asks for one of queries, keys and values if other layers have one.
    """

    @named_after(linear)
    class WithoutBias(linear):
        """A linear layer without a bias."""

        def __init__(self, *args, bias: bool, **kwargs):
            super().__init__(*args, bias=False, **kwargs)

    return WithoutBias


def _adding_bias(linear: type) -> type:
    """Let ``linear`` add its bias itself, in the matrix product where it can. ``MLP`` of
    megatron-core asks its first layer to leave it to ``MLP.forward``, and its second to leave it
    to the layer.
    """

    @named_after(linear)
    class AddingBias(linear):
        """A linear layer that adds its bias."""

        def __init__(self, *args, skip_bias_add: bool, **kwargs):
            super().__init__(*args, skip_bias_add=False, **kwargs)

    return AddingBias


def _attention(
    core: type, qkv_bias: bool, kernels: Kernels, head_norm: type | None = None
) -> SelfAttentionSubmodules:
    linear = kernels.norm_linear if qkv_bias else _without_bias(kernels.norm_linear)
    return SelfAttentionSubmodules(
        linear_qkv=linear,
        core_attention=core,
        linear_proj=kernels.row_linear,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )


def mlp_submodules(first: type, kernels: Kernels) -> MLPSubmodules:
    """Slots of an MLP whose first linear layer is ``first``. The second adds its bias, too: the MLP
    may be computed again in the backward pass, and a bias that it returned would then be cut off
    from the parameter that is trained.
    """
    return MLPSubmodules(
        linear_fc1=_adding_bias(first),
        linear_fc2=_adding_bias(kernels.row_linear),
        activation_func=kernels.gate,  # ``MLP`` builds it if ``use_te_activation_func``
    )


def _layer(
    module: type,
    attention: ModuleSpec,
    mlp: MLPSubmodules,
    kernels: Kernels,
    **params: Callable | bool,
) -> ModuleSpec:
    # ``TransformerLayer`` builds each slot, and its ``sharded_state_dict`` renames keys by the map.
    submodules = TransformerLayerSubmodules(
        input_layernorm=kernels.layer_norm,
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=kernels.layer_norm,
        mlp=ModuleSpec(module=MLP, submodules=mlp),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )
    return ModuleSpec(module=module, params=params, submodules=submodules)


def _with_experts(layer: ModuleSpec, kernels: Kernels, router: Callable) -> ModuleSpec:
    """Put experts in the place of the MLP; a norm of its own stands before router and experts."""
    shared = MLPSubmodules(
        linear_fc1=kernels.column_linear,
        linear_fc2=kernels.row_linear,
        activation_func=kernels.gate,
    )
    submodules = replace(
        layer.submodules,
        pre_mlp_layernorm=kernels.norm,
        mlp=mixture_spec(kernels.experts, shared, router),
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    )
    return replace(layer, submodules=submodules)


def vision_spec(
    layers: Sequence[int], vision: Vision, kernels: Kernels
) -> TransformerBlockSubmodules:
    """Describe consecutive layers of the vision encoder, counted from 0, without a norm after the
    last.
    """
    # ``VisionLayer`` hands the bias of the second linear layer to what adds the branch.
    mlp = replace(mlp_submodules(kernels.norm_linear, kernels), linear_fc2=kernels.row_linear)
    kind = TappedVisionLayer if vision.deepstack_layers else VisionLayer
    specs = [
        _layer(
            kind,
            _vision_attention(layer, vision, kernels),
            mlp,
            kernels,
            layer_scale=vision.has_layer_scale,
            add_branch=kernels.add_branch,
            checkpoint=kernels.checkpoint,
            **_taps(layer, layers, vision),
        )
        for layer in layers
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=None)


def _taps(layer: int, layers: Sequence[int], vision: Vision) -> dict[str, bool]:
    """Return what a layer for DeepStack is told; nothing if there is none."""
    if not vision.deepstack_layers:
        return {}
    return {"is_tapped": layer in vision.deepstack_layers, "is_last": layer == layers[-1]}


def _vision_attention(layer: int, vision: Vision, kernels: Kernels) -> ModuleSpec:
    """Describe the attention of a layer: inside tiles, or inside images or windows of any size."""
    params = {"attn_mask_type": AttnMaskType.no_mask, "qk_norm": vision.qk_norm}
    if not vision.spans_tiles:
        inside = _attention(kernels.tile_attention, vision.qkv_bias, kernels)
        return ModuleSpec(module=VisionAttention, params=params, submodules=inside)
    params["has_window"] = vision.has_window(layer)
    inside = _attention(kernels.packed_attention, vision.qkv_bias, kernels)
    return ModuleSpec(module=NativeVisionAttention, params=params, submodules=inside)


def language_spec(
    layers: Sequence[int], architecture: Architecture, kernels: Kernels, experts: Experts
) -> TransformerBlockSubmodules:
    """Describe consecutive layers of the language model, counted from 0, with a norm after the
    model's last layer.
    """
    language = architecture.language
    crosses = architecture.cross_attention
    head_norm = kernels.norm if language.qk_norm else None
    inside = _attention(_core(language, kernels), language.qkv_bias, kernels, head_norm)
    mask = AttnMaskType.causal if language.is_causal else AttnMaskType.no_mask
    kind = turning(SelfAttention) if language.rotary_sections else SelfAttention
    attention = ModuleSpec(module=kind, params={"attn_mask_type": mask}, submodules=inside)
    mlp = mlp_submodules(kernels.norm_linear, kernels)
    if language.sandwich_norm:
        plain = _layer(SandwichLayer, attention, mlp, kernels, norm=kernels.norm)
    else:
        plain = _layer(TransformerLayer, attention, mlp, kernels)
    gated = plain
    if crosses.every:
        cross = _cross(architecture, kernels)
        gated = _layer(GatedLayer, attention, mlp, kernels, cross=cross)
    specs = [gated if crosses.stands_before(layer) else plain for layer in layers]
    for level in range(architecture.vision.levels_from(layers[0]) if layers else 0):
        if level < len(layers):
            specs[level] = _layer(DeepLayer, attention, mlp, kernels, level=level)
    if language.num_experts:
        router = functools.partial(PackRouter, language=language, experts=experts)
        specs = [_with_experts(layer, kernels, router) for layer in specs]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=kernels.norm)


def _core(language: Language, kernels: Kernels) -> type:
    """Return the attention between queries and keys of a language model."""
    if not language.attends_in_blocks:
        return caching(kernels.packed_attention)
    sinks = language.attention_sinks
    kind = SinkAttention if sinks else BlockAttention
    return caching(kind, has_sinks=sinks, softcap=language.attention_softcap)


def _cross(architecture: Architecture, kernels: Kernels) -> Callable:
    """Return what makes the cross-attention in front of a layer."""
    modules = CrossModules(
        norm=kernels.norm,
        column_linear=kernels.column_linear,
        row_linear=kernels.row_linear,
        attention=kernels.packed_attention,
        mlp=mlp_submodules(kernels.column_linear, kernels),
        checkpoint=kernels.checkpoint,
    )
    return functools.partial(
        GatedCrossAttention,
        settings=architecture.cross_attention,
        memory_size=architecture.memory_size,
        features=architecture.features_per_tile,
        modules=modules,
    )
