"""The vision encoders of Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL
(arXiv 2511.21631), as ``transformers`` names their weights. Qwen3-VL alone has a table of
positions; none has a class token, or a norm behind the layers.

Shape letters: D hidden size, M hidden size of the MLP, p pixels along a patch, f frames of a patch.
"""

from __future__ import annotations

from megavlm.config.schema import Vision
from megavlm.convert.weights.mapping import Row, layers, linear, norm
from megavlm.convert.weights.transforms import Fused, GroupedQKV, Padded, Reshaped, Stacked


def rows(vision: Vision) -> list[Row]:
    """Build the table, with keys and names as in a folder of the vision encoder alone."""
    side = vision.patch_size
    width = vision.hidden_size
    patch = (width, 3, vision.temporal_patch_size, side, side)
    return [
        *linear("patch_embedding", ("patch_embed.proj",), patch, bias=vision.has_patch_bias),
        *_positions(vision),
        *layers(_layer(vision), "encoder.layers.{}.", "blocks.{}.", vision.num_layers),
    ]


def _positions(vision: Vision) -> list[Row]:
    """List the table of positions, if there is one."""
    if not vision.has_learned_positions:
        return []
    table = (vision.position_rows, vision.hidden_size)
    whole = (1, *table)
    names = ("pos_embed.weight",)
    return [Row("position_embedding", names, whole, Reshaped(table, whole))]


def _layer(vision: Vision) -> list[Row]:
    """List the weights of a layer, without prefixes."""
    width = vision.hidden_size
    heads = vision.num_attention_heads
    kind = vision.normalization
    qkv = Fused(GroupedQKV(heads, heads, width // heads), (width, width, width))
    # Heads may be padded so that they divide over ranks.
    padded = Padded(3 * width, inner=qkv)
    return [
        *norm("self_attention.linear_qkv.layer_norm_", "norm1", width, kind),
        *linear("self_attention.linear_qkv", ("attn.qkv",), (3 * width, width), padded),
        Row(
            "self_attention.linear_proj.weight",
            ("attn.proj.weight",),
            (width, width),
            Padded(width, axis=1),
        ),
        Row("self_attention.linear_proj.bias", ("attn.proj.bias",), (width,)),
        *norm("mlp.linear_fc1.layer_norm_", "norm2", width, kind),
        *_mlp(vision),
    ]


def _mlp(vision: Vision) -> list[Row]:
    """List the weights of a layer's MLP."""
    width = vision.hidden_size
    inner = vision.ffn_hidden_size
    if not vision.is_gated:
        stem = "mlp.linear_" if vision.family == "qwen3_vl" else "mlp."
        return [
            *linear("mlp.linear_fc1", (f"{stem}fc1",), (inner, width)),
            *linear("mlp.linear_fc2", (f"{stem}fc2",), (width, inner)),
        ]
    first = ("mlp.gate_proj", "mlp.up_proj")
    return [
        *linear("mlp.linear_fc1", first, (2 * inner, width), Stacked(2)),
        *linear("mlp.linear_fc2", ("mlp.down_proj",), (width, inner)),
    ]
