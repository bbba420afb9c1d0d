"""Which modules the transformer layers are made of: Transformer Engine's where CUDA and the package
are there, else megatron-core's own.

Both give a checkpoint the same keys: Transformer Engine folds a norm into the linear layer after
it, and the key maps below let the separate norms be saved under the same names.

Shape letters: T tokens of the pack, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.distributed import ProcessGroup

from megavlm.config.schema import Architecture, Config, Experts, Vision
from megavlm.model.attention import PackedAttention, TileAttention, attend_with_prefixes
from megavlm.model.cross_attention import CrossModules, GatedCrossAttention, GatedLayer
from megavlm.model.experts import (
    ExpertRowLinear,
    grouped_experts,
    mixture_spec,
    sequential_experts,
)
from megavlm.model.norm import Norm
from megavlm.model.precision import uses_transformer_engine
from megavlm.model.residual_branch import add_branch, add_branch_by_kernels
from megavlm.model.router import PackRouter
from megavlm.model.sink_attention import SinkAttention
from megavlm.model.swiglu import Swiglu
from megavlm.model.vision_attention import VisionAttention
from megavlm.model.vision_layer import VisionLayer


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The classes that fill the slots of a layer, and the functions between them.

    Args:
        norm: norm that stands alone (before the connector, after the last layer).
        layer_norm: norm in front of attention and MLP; nothing where the linear layer after it
            normalises.
        norm_linear: linear layer after that norm, its output split over the tensor-parallel ranks.
        column_linear: the same linear layer without a norm.
        row_linear: linear layer with its input split, its output summed.
        tile_attention: attention inside the tiles.
        packed_attention: attention, causal or not, inside the samples of a pack.
        experts: the experts of a layer that this rank holds.
        swiglu: gate of an MLP; none: megatron-core's.
        is_fused: whether megatron-core's fused kernels turn queries and keys, gate the MLP and add
            residuals with biases.
        pointwise: makes one kernel of a function that works element by element.
        add_branch: adds a residual branch of the vision encoder.
        checkpoint: calls a function on tensors, of which it keeps the inputs only, and calls it
            again in the backward pass; a group of tensor-parallel ranks stands between the two.
        cross_entropy: losses of the tokens [T, 1] from a rank's share of the logits [T, 1, V /
            tensor-parallel ranks], which it may overwrite, and the labels [T, 1].
    """

    norm: type
    layer_norm: type
    norm_linear: type
    column_linear: type
    row_linear: type
    tile_attention: type
    packed_attention: type
    experts: type
    swiglu: type | None
    is_fused: bool
    pointwise: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
    add_branch: Callable[..., Tensor]
    checkpoint: Callable
    cross_entropy: Callable[[Tensor, Tensor, ProcessGroup], Tensor]


def local_kernels() -> Kernels:
    """Layers that run anywhere."""
    return Kernels(
        norm=Norm,
        layer_norm=Norm,
        norm_linear=ColumnParallelLinear,
        column_linear=ColumnParallelLinear,
        row_linear=RowParallelLinear,
        tile_attention=TileAttention,
        packed_attention=PackedAttention,
        experts=sequential_experts(
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=ExpertRowLinear)
        ),
        swiglu=None,
        is_fused=False,
        pointwise=lambda function: function,
        add_branch=add_branch,
        checkpoint=lambda function, group, *tensors: tensor_parallel.checkpoint(
            function, False, *tensors
        ),
        cross_entropy=lambda logits, labels, group: tensor_parallel.vocab_parallel_cross_entropy(
            logits, labels
        ),
    )


def transformer_engine_kernels() -> Kernels:
    """Return Transformer Engine's layers, which need a CUDA device to run."""
    from megatron.core.extensions import transformer_engine as engine
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    _split_without_copies()

    def cross_entropy(logits: Tensor, labels: Tensor, group: ProcessGroup) -> Tensor:
        # What must be fit for CUDA graphs does not look at the gradient's value, which would make
        # the host wait for the device.
        return engine.te_parallel_cross_entropy(logits, labels, group, True)

    def checkpoint(function: Callable, group: ProcessGroup, *tensors: Tensor):
        # Transformer Engine's own also keeps the scales of FP8 from changing when the function is
        # called again.
        return engine.te_checkpoint(function, False, get_cuda_rng_tracker, group, *tensors)

    return Kernels(
        norm=engine.TENorm,
        layer_norm=IdentityOp,
        norm_linear=_accumulating(engine.TELayerNormColumnParallelLinear),
        column_linear=_accumulating(engine.TEColumnParallelLinear),
        row_linear=_accumulating(engine.TERowParallelLinear),
        tile_attention=_without_draws(engine.TEDotProductAttention),
        packed_attention=of_packs(_without_draws(engine.TEDotProductAttention)),
        experts=grouped_experts(
            TEGroupedMLP,
            MLPSubmodules(
                linear_fc1=_accumulating(engine.TEColumnParallelGroupedLinear),
                linear_fc2=_accumulating(engine.TERowParallelGroupedLinear),
            ),
        ),
        swiglu=Swiglu,
        is_fused=True,
        pointwise=_compiled,
        add_branch=add_branch_by_kernels,
        checkpoint=checkpoint,
        cross_entropy=cross_entropy,
    )


def choose_kernels(config: Config) -> Kernels:
    """Return the layers that the configuration asks for, or the best that this device runs."""
    if not uses_transformer_engine(config):
        return local_kernels()
    kernels = transformer_engine_kernels()
    if config.architecture.lora.rank:
        # An adapter reads what the norm gives, which a linear layer that normalises does not show.
        kernels = replace(kernels, layer_norm=kernels.norm, norm_linear=kernels.column_linear)
    return kernels


def _split_without_copies() -> None:
    """Give megatron-core Transformer Engine's split of queries, keys and values, whose backward
    pass copies nothing if the gradients stand side by side. ``Attention`` of megatron-core takes
    torch's otherwise: it looks for the name in a module that has lost it.
    """
    from megatron.core.transformer import attention

    with contextlib.suppress(ImportError):
        from transformer_engine.pytorch.utils import SplitAlongDim

        attention.SplitAlongDim = SplitAlongDim.apply


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One kernel for any number of tiles; compiled at the first call."""
    return torch.compile(function, dynamic=True)


def _accumulating(linear: type) -> type:
    """``linear`` of Transformer Engine, whose weight gradient is added to the float32 sum inside
    the matrix product.

    megatron-core's own layers (embedding, head) can do so with Apex only, so the switch is set for
    each layer, not for the whole model.
    """

    class Accumulating(linear):
        def __init__(self, *args, config, **kwargs):
            config = copy.copy(config)
            config.gradient_accumulation_fusion = True
            super().__init__(*args, config=config, **kwargs)

    return Accumulating


def _without_draws(attention: type) -> type:
    """Keep ``attention`` of Transformer Engine from exchanging the random state around every call,
    which it does for its dropout. That is 0.
    """

    class WithoutDraws(attention):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for kernel in (self.flash_attention, self.fused_attention, self.unfused_attention):
                kernel.attention_dropout_ctx = contextlib.nullcontext

    return WithoutDraws


class _BottomRight(enum.Enum):
    """A mask that megatron-core has no name for; it hands the name on to Transformer Engine."""

    padding_causal_bottom_right = 1


def of_packs(attention: type) -> type:
    """Tell ``attention`` of Transformer Engine whether padding stands between samples, and attend
    twice if samples have prefixes.

    megatron-core's ``TEDotProductAttention.forward`` hands the named fields of the packed samples
    on; 0.16.1 does not name the one of the padding.
    """

    class OfPacks(attention):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.kept_packed_seq_params.add("pad_between_seqs")

        def forward(self, query, key, value, *args, packed_seq_params, **kwargs):
            """Attend; ``Attention.forward`` of megatron-core calls this."""
            call = super().forward
            if packed_seq_params.prefixes is None:
                found = packed_seq_params
                return call(query, key, value, *args, packed_seq_params=found, **kwargs)

            def attend(query, key, value, samples, is_causal):
                mask = _BottomRight.padding_causal_bottom_right
                mask = mask if is_causal else AttnMaskType.no_mask
                return call(query, key, value, None, mask, packed_seq_params=samples)

            return attend_with_prefixes(attend, query, key, value, packed_seq_params)

    return OfPacks


def _without_bias(linear: type) -> type:
    """``linear`` that has no bias, whatever it is asked for: megatron-core gives one to queries,
    keys and values when other layers have.
    """

    class WithoutBias(linear):
        def __init__(self, *args, bias: bool, **kwargs):
            super().__init__(*args, bias=False, **kwargs)

    return WithoutBias


def _adding_bias(linear: type) -> type:
    """``linear`` that adds its bias itself, in the matrix product where it can, instead of leaving
    it to the MLP around it.
    """

    class AddingBias(linear):
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
    """Slots of an MLP whose first linear layer is ``first``."""
    return MLPSubmodules(
        linear_fc1=_adding_bias(first),
        linear_fc2=kernels.row_linear,
        activation_func=kernels.swiglu,  # taken if the configuration says so
    )


def _layers(
    module: type, attention: ModuleSpec, count: int, kernels: Kernels, **params: Callable | bool
) -> list[ModuleSpec]:
    submodules = TransformerLayerSubmodules(
        input_layernorm=kernels.layer_norm,
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=kernels.layer_norm,
        mlp=ModuleSpec(module=MLP, submodules=mlp_submodules(kernels.norm_linear, kernels)),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )
    return [ModuleSpec(module=module, params=params, submodules=submodules)] * count


def _with_experts(layers: list[ModuleSpec], kernels: Kernels, router: Callable) -> list[ModuleSpec]:
    """Put experts in the place of the MLPs; a norm of its own stands before router and experts."""
    mixture = mixture_spec(kernels.experts, kernels.column_linear, kernels.row_linear, router)
    keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    return [
        replace(
            layer,
            submodules=replace(
                layer.submodules,
                pre_mlp_layernorm=kernels.norm,
                mlp=mixture,
                sharded_state_dict_keys_map=keys,
            ),
        )
        for layer in layers
    ]


def vision_spec(count: int, vision: Vision, kernels: Kernels) -> TransformerBlockSubmodules:
    """Describe ``count`` consecutive layers of the vision encoder, without a norm after the
    last.
    """
    params = {"attn_mask_type": AttnMaskType.no_mask, "qk_norm": vision.qk_norm}
    inside = _attention(kernels.tile_attention, vision.qkv_bias, kernels)
    attention = ModuleSpec(module=VisionAttention, params=params, submodules=inside)
    settings = dict(
        layer_scale=vision.has_layer_scale,
        add_branch=kernels.add_branch,
        checkpoint=kernels.checkpoint,
    )
    layers = _layers(VisionLayer, attention, count, kernels, **settings)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=None)


def language_spec(
    layers: Sequence[int], architecture: Architecture, kernels: Kernels, experts: Experts
) -> TransformerBlockSubmodules:
    """Describe consecutive layers of the language model, counted from 0, with a norm after the
    model's last layer.
    """
    language = architecture.language
    crosses = architecture.cross_attention
    inside = _attention(
        SinkAttention if language.attention_sinks else kernels.packed_attention,
        language.qkv_bias,
        kernels,
        kernels.norm if language.qk_norm else None,
    )
    mask = AttnMaskType.causal if language.is_causal else AttnMaskType.no_mask
    attention = ModuleSpec(module=SelfAttention, params={"attn_mask_type": mask}, submodules=inside)
    [plain] = _layers(TransformerLayer, attention, 1, kernels)
    gated = plain
    if crosses.every:
        [gated] = _layers(GatedLayer, attention, 1, kernels, cross=_cross(architecture, kernels))
    found = [gated if crosses.stands_before(layer) else plain for layer in layers]
    if language.num_experts:
        router = functools.partial(PackRouter, language=language, experts=experts)
        found = _with_experts(found, kernels, router)
    return TransformerBlockSubmodules(layer_specs=found, layer_norm=kernels.norm)


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
