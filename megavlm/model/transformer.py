"""megatron-core's configuration of each part, from ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn.functional import gelu

from megavlm.config.freeze_mask import trains
from megavlm.config.padding import padded_heads
from megavlm.config.schema import Config, Language
from megavlm.model.kernels import Kernels
from megavlm.model.precision import dtype_of, fp8_settings
from megavlm.model.yarn import product_scale
from megavlm.planner.layout import Layout


def _quick_gelu(hidden: Tensor) -> Tensor:
    """Apply the approximation of GELU that OpenAI trained CLIP with."""
    return hidden * torch.sigmoid(1.702 * hidden)


def _squared_relu(hidden: Tensor) -> Tensor:
    """Apply the square of ReLU (So et al., arXiv 2109.08668)."""
    return torch.nn.functional.relu(hidden).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": torch.nn.functional.silu,
    "geglu_tanh": partial(gelu, approximate="tanh"),
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "relu": torch.nn.functional.relu,
    "relu2": _squared_relu,
    "clamped_quick_geglu": _quick_gelu,
}
# What some gates are beside an activation of one half times the other half.
_GATE_SETTINGS: dict[str, dict[str, float]] = {
    "clamped_quick_geglu": {"activation_func_clamp_value": 7.0, "glu_linear_offset": 1.0},
}
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def _common(
    config: Config,
    counts: tuple[int, ...],
    kernels: Kernels,
    tensor_size: int,
    recompute: str = "none",
) -> dict[str, Any]:
    """Return the settings that the parts share.

    Args:
        config: the run.
        counts: layers of this part in each pipeline chunk.
        kernels: of the layers.
        tensor_size: ranks that share each layer of this part.
        recompute: what is computed again of its layers.
    """
    dtype = dtype_of(config)
    stages = [["decoder"] * count for count in counts]
    layout = (
        [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]
        if len(stages) > 1
        else None
    )
    is_interleaved = config.parallel.virtual_pipeline_model_parallel_size > 1
    return dict(
        tensor_model_parallel_size=tensor_size,
        pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
        pipeline_model_parallel_layout=layout,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,  # the kernels that can do it do
        masked_softmax_fusion=False,
        bias_activation_fusion=False,  # megatron-core's fused GELU is an approximation
        bias_dropout_fusion=False,
        apply_rope_fusion=kernels.is_fused,
        persist_layer_norm=False,
        deterministic_mode=config.training.deterministic,
        # gradients are summed: the loss is divided by the whole step's weight before backward
        calculate_per_token_loss=True,
        # a key for each layer, so that some layers of a stack may be frozen
        hetereogenous_dist_checkpoint=True,
        # a wait for the device at every border, against a fault of PyTorch's of long ago
        batch_p2p_sync=False,
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        # Weights that are to be in 4 bits are never whole on the device.
        use_cpu_initialization=bool(config.architecture.lora.nf4),
        perform_initialization=not config.architecture.lora.nf4,
        **_RECOMPUTE[recompute],
    )


def vision_config(config: Config, layout: Layout, kernels: Kernels) -> TransformerConfig:
    """Configure the vision encoder; its tiles are too short for sequence parallelism."""
    vision = config.architecture.vision
    parallel = config.parallel
    # Of a frozen vision encoder nothing is kept, and nothing would be computed again.
    recompute = (
        parallel.recompute_of("vision") if trains("vision", config.training.trainable) else "none"
    )
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=padded_heads(vision.num_attention_heads, parallel.vision_tensor_size),
        kv_channels=vision.head_size,
        normalization=vision.normalization,
        layernorm_epsilon=vision.layernorm_epsilon,
        add_bias_linear=True,
        add_qkv_bias=vision.qkv_bias,
        gated_linear_unit=vision.is_gated,
        activation_func=ACTIVATIONS[vision.activation],
        use_te_activation_func=vision.is_gated and kernels.gate is not None,
        **fp8_settings(config, "vision"),
        **_common(config, layout.vision_counts(), kernels, parallel.vision_tensor_size, recompute),
    )


def connector_config(config: Config, kernels: Kernels) -> TransformerConfig:
    """Configure the connector: LayerNorm, linear, GELU, linear, without a pipeline of its own."""
    arch = config.architecture
    width = arch.needs.connector_output(arch) or arch.vision.hidden_size
    common = _common(config, (1,), kernels, config.parallel.vision_tensor_size) | {
        "pipeline_model_parallel_size": 1
    }
    return TransformerConfig(
        num_layers=1,
        hidden_size=width,
        ffn_hidden_size=width,
        # it has none, but the number must divide over ranks
        num_attention_heads=config.parallel.vision_tensor_size,
        normalization="LayerNorm",
        layernorm_epsilon=1e-5,
        add_bias_linear=arch.connector.bias,
        activation_func=gelu,
        **common,
    )


def _window_settings(language: Language) -> dict[str, Any]:
    """Configure sliding windows; nothing if a language model has none."""
    if not language.window_size:
        return {}
    # megatron-core counts the tokens before the own one.
    return dict(
        window_size=(language.window_size - 1, 0),
        window_attn_skip_freq=language.window_attn_skip_freq or None,
    )


def _expert_settings(config: Config, kernels: Kernels) -> dict[str, Any]:
    """Configure the experts of a language model; nothing if it has none."""
    language = config.architecture.language
    if not language.num_experts:
        return {}
    packs = config.training.global_batch_size
    settings: dict[str, Any] = dict(
        num_moe_experts=language.num_experts,
        moe_router_topk=language.experts_per_token,
        moe_ffn_hidden_size=language.expert_ffn_hidden_size,
        moe_router_pre_softmax=not language.norm_topk_prob,
        moe_router_dtype="fp32",
        moe_shared_expert_intermediate_size=language.shared_expert_ffn_hidden_size or None,
        moe_shared_expert_gate=language.shared_expert_gate,
        # ``PackRouter`` adds the losses of one pack: its share of the mean over a step's packs.
        moe_aux_loss_coeff=config.experts.balance_loss / packs,
        moe_z_loss_coeff=config.experts.router_z_loss / packs,
        moe_token_dispatcher_type=config.experts.dispatcher,
        moe_grouped_gemm=kernels.is_fused,
        moe_permute_fusion=kernels.is_fused,
        expert_model_parallel_size=config.parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=config.parallel.expert_tensor_parallel_size,
    )
    if config.parallel.recompute_of("language") == "selective":
        settings["recompute_modules"] = ["moe"]
    return settings


def _has_kernel(language: Language) -> bool:
    """Return whether ``gate.Gate`` computes the gate. In experts SwiGLU is megatron-core's fused
    kernel, which multiplies by the weight of the expert too.
    """
    if language.activation == "swiglu":
        return not language.num_experts
    return language.activation in _GATE_SETTINGS


def _activation(language: Language, fuses_gate: bool, has_gate: bool) -> Callable[[Tensor], Tensor]:
    """Return what megatron-core is told of the activation."""
    if has_gate:  # It refuses other functions than this beside a gate of Transformer Engine.
        return torch.nn.functional.silu
    # Its fused kernel of a gate computes the approximation if it is told GELU.
    if fuses_gate and language.activation == "geglu_tanh":
        return gelu
    return ACTIVATIONS[language.activation]


def language_config(config: Config, layout: Layout, kernels: Kernels) -> TransformerConfig:
    """Configure the language model: RMSNorm, rotary positions, grouped-query attention, a gated
    MLP; or a text encoder or an OPT.
    """
    language = config.architecture.language
    parallel = config.parallel
    has_gate = kernels.gate is not None and _has_kernel(language)
    fuses_gate = kernels.is_fused and language.is_gated and not has_gate
    # megatron-core has no other fused gate of experts that is used here.
    fuses_gate = fuses_gate and (language.activation == "swiglu" or not language.num_experts)
    return TransformerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.ffn_hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_query_groups,
        kv_channels=language.head_size,
        qk_layernorm=language.qk_norm,
        normalization="LayerNorm" if language.has_layer_norm else "RMSNorm",
        layernorm_epsilon=language.layernorm_epsilon,
        add_bias_linear=language.has_bias,
        add_qkv_bias=language.qkv_bias,
        layernorm_zero_centered_gamma=language.zero_centered_norm,
        gated_linear_unit=language.is_gated,
        activation_func=_activation(language, fuses_gate, has_gate),
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        **_GATE_SETTINGS.get(language.activation, {}),
        **_window_settings(language),
        softmax_scale=product_scale(language),
        **fp8_settings(config, "language"),
        **_common(
            config,
            layout.language_counts(),
            kernels,
            parallel.tensor_model_parallel_size,
            parallel.recompute_of("language"),
        )
        | {
            "bias_activation_fusion": fuses_gate,
            "use_te_activation_func": has_gate,
            # Without a bias it is one addition, and calling what torch compiled takes longer.
            "bias_dropout_fusion": kernels.is_fused and language.has_layer_norm,
        }
        | _expert_settings(config, kernels),
    )
