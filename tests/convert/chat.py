"""Folders as OpenGVLab publishes them, made from native ones.

Names, layouts and settings are written down here once more, from the original code's point of view,
so that a mistake in the tables shows.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megavlm.config.schema import Architecture, Language
from megavlm.convert.weights.families import FAMILIES
from tests.convert.models import load_all

_VISION = (
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("encoder.layer.", "encoder.layers."),
    ("attention.projection_layer", "attn.proj"),
    ("attention.q_norm", "attn.q_norm"),
    ("attention.k_norm", "attn.k_norm"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("lambda_1", "ls1"),
    ("lambda_2", "ls2"),
)
_CONNECTOR = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}
_INTERNLM2 = (
    ("model.embed_tokens", "model.tok_embeddings"),
    ("self_attn.o_proj", "attention.wo"),
    ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.up_proj", "feed_forward.w3"),
    ("mlp.down_proj", "feed_forward.w2"),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("lm_head", "output"),
)


def chat_tensors(native: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Rename the weights of a native folder as ``InternVLChatModel`` calls them."""
    found = {}
    for name, tensor in native.items():
        part, _, inner = name.partition(".")
        if part == "vision_tower":
            found |= _vision_tensor(inner, tensor, native)
        elif part == "multi_modal_projector":
            layer, _, kind = inner.partition(".")
            found[f"mlp1.{_CONNECTOR[layer]}.{kind}"] = tensor
        elif architecture.language.family == "internlm2":
            found |= _internlm2_tensor(inner, tensor, native, architecture)
        else:
            found[name] = tensor
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _vision_tensor(inner: str, tensor: Tensor, native: dict[str, Tensor]) -> dict[str, Tensor]:
    projection = re.fullmatch(r"(encoder\.layer\.\d+\.attention)\.([qkv])_proj\.(\w+)", inner)
    if projection and projection[2] != "q":
        return {}
    if projection:
        thirds = [
            native[f"vision_tower.{projection[1]}.{which}_proj.{projection[3]}"] for which in "qkv"
        ]
        tensor = torch.cat(thirds)
        inner = f"{projection[1].replace('attention', 'attn')}.qkv.{projection[3]}"
    for old, new in _VISION:
        inner = inner.replace(old, new)
    return {f"vision_model.{inner}": tensor}


def _internlm2_tensor(
    inner: str, tensor: Tensor, native: dict[str, Tensor], architecture: Architecture
) -> dict[str, Tensor]:
    layer = re.fullmatch(r"(model\.layers\.\d+)\.self_attn\.([qkv])_proj\.weight", inner)
    if layer and layer[2] != "q":
        return {}
    if layer:
        size = architecture.language.head_size
        groups = architecture.language.num_query_groups
        per_group = architecture.language.num_attention_heads // groups
        query, key, value = (
            native[f"language_model.{layer[1]}.self_attn.{which}_proj.weight"] for which in "qkv"
        )
        rows = []
        for group in range(groups):
            for head in range(per_group):
                start = (group * per_group + head) * size
                rows.append(query[start : start + size])
            rows += [
                key[group * size : (group + 1) * size],
                value[group * size : (group + 1) * size],
            ]
        return {f"language_model.{layer[1]}.attention.wqkv.weight": torch.cat(rows)}
    for old, new in _INTERNLM2:
        inner = re.sub(rf"\b{re.escape(old)}\b", new, inner)
    return {f"language_model.{inner}": tensor}


def _language_settings(architecture: Architecture) -> dict:
    language = architecture.language
    classes = {
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "qwen3_moe": "Qwen3Moe",
        "llama": "Llama",
        "phi3": "Phi3",
        "internlm2": "InternLM2",
        "internlm3": "InternLM3",
        "mistral": "Mistral",
        "gpt_oss": "GptOss",
    }
    scaling = (
        {"type": "dynamic", "factor": language.rotary_dynamic_factor}
        if language.rotary_dynamic_factor > 1
        else None
    )
    return {
        "architectures": [f"{classes[language.family]}ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_hidden_size,
        "max_position_embeddings": language.max_position_embeddings,
        "model_type": language.family,
        "num_attention_heads": language.num_attention_heads,
        "num_hidden_layers": language.num_layers,
        "num_key_value_heads": language.num_query_groups,
        "rms_norm_eps": language.layernorm_epsilon,
        "rope_scaling": scaling,
        "rope_theta": language.rotary_base,
        "tie_word_embeddings": language.tied_head,
        "vocab_size": language.vocab_size,
        **({"head_dim": language.head_size} if FAMILIES[language.family].has_head_dim else {}),
        **({"bias": False} if language.family == "internlm2" else {}),
        **({"sliding_window": None} if language.family == "mistral" else {}),
        **(_expert_settings(language) if language.num_experts else {}),
    }


def _expert_settings(language: Language) -> dict:
    if language.family == "gpt_oss":
        return {
            "attention_bias": True,
            "initial_context_length": 4096,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_experts_per_tok": language.experts_per_token,
            "num_local_experts": language.num_experts,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": language.rotary_yarn_factor,
                "original_max_position_embeddings": language.rotary_yarn_positions,
                "rope_type": "yarn",
                "truncate": False,
            },
            "sliding_window": language.window_size,
            "swiglu_limit": 7.0,
        }
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": language.expert_ffn_hidden_size,
        "norm_topk_prob": language.norm_topk_prob,
        "num_experts": language.num_experts,
        "num_experts_per_tok": language.experts_per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def chat_settings(architecture: Architecture) -> dict:
    """config.json as OpenGVLab writes it, with some of the entries that mean nothing here."""
    vision = architecture.vision
    language = architecture.language
    return {
        "_commit_hash": None,
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 1 / architecture.connector.pixel_shuffle,
        "dynamic_image_size": True,
        "force_image_size": vision.image_size,
        "llm_config": _language_settings(architecture),
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "tie_word_embeddings": language.tied_head,
        "torch_dtype": "bfloat16",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "hidden_act": "gelu",
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size,
            "initializer_factor": vision.layer_scale,
            "intermediate_size": vision.ffn_hidden_size,
            "layer_norm_eps": vision.layernorm_epsilon,
            "model_type": "intern_vit_6b",
            "norm_type": {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm"}[vision.normalization],
            "num_attention_heads": vision.num_attention_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_layers,
            "patch_size": vision.patch_size,
            "qk_normalization": vision.qk_norm,
            "qkv_bias": vision.qkv_bias,
        },
    }


def make_chat(native: Path, folder: Path, architecture: Architecture) -> Path:
    """Write the model of a native folder as OpenGVLab would, with the tokenizer that is there."""
    folder.mkdir()
    save_file(
        chat_tensors(load_all(native), architecture),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(chat_settings(architecture)))
    for path in native.glob("token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def with_head(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a folder with a tied head as the tensor that an export adds."""
    found = load_all(folder)
    embedding = "language_model.model.embed_tokens.weight"
    return {"language_model.lm_head.weight": found[embedding]} | found


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two folders hold the same names with the same bits."""
    first = load_all(one)
    second = load_all(other)
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name])
        for name, tensor in first.items()
    )
