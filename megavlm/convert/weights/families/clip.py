"""CLIP (Radford et al., arXiv 2103.00020) and SigLIP (Zhai et al., arXiv 2303.15343), as
``transformers`` names what sees images in them.

Shape letters: D hidden size, M hidden size of the MLP, p pixels along a patch, N tokens of a tile.
"""

from __future__ import annotations

from dataclasses import replace

from megavlm.config.schema import Language, Vision
from megavlm.convert.weights.mapping import Row, layers, linear, norm
from megavlm.convert.weights.transforms import GroupedQKV, Padded, Reshaped


def rows(vision: Vision) -> list[Row]:
    """Build the table of the layers that exist, with keys and names as in a folder of the vision
    encoder alone.
    """
    width = vision.hidden_size
    side = vision.patch_size
    tokens = vision.tokens
    positions = Reshaped((tokens, width), (1, tokens, width))
    token = [
        Row(
            "class_token",
            ("embeddings.class_embedding",),
            (1, 1, width),
            Reshaped((width,), (1, 1, width)),
        )
    ]
    return [
        *linear(
            "patch_embedding",
            ("embeddings.patch_embedding",),
            (width, 3, side, side),
            bias=vision.has_patch_bias,
        ),
        *(token if vision.has_class_token else []),
        Row(
            "position_embedding",
            ("embeddings.position_embedding.weight",),
            (1, tokens, width),
            positions,
        ),
        *(
            norm("embedding_norm.", "pre_layrnorm", width, "LayerNorm")
            if vision.has_embedding_norm
            else []
        ),
        *layers(layer(vision), "encoder.layers.{}.", "encoder.layers.{}.", vision.num_layers),
        *(norm("final_norm.", "post_layernorm", width, "LayerNorm") if vision.final_norm else []),
    ]


def unused_rows(vision: Vision) -> list[Row]:
    """Build the table of the layers behind those that exist, of the norm behind all of them, and of
    the head behind it, as the files have them; they are tensors of no model here. If the norm is
    used, all layers are.
    """
    if vision.final_norm:
        return []
    everything = replace(vision, num_layers=vision.num_layers + vision.unused_layers)
    used = {name for row in rows(vision) for name in row.names}
    table = [
        *rows(everything),
        *norm("final_norm.", "post_layernorm", vision.hidden_size, "LayerNorm"),
        *(attention_pool(vision) if vision.unused_head else []),
    ]
    return [
        Row(name, (name,), shape)
        for row in table
        for name, shape in zip(row.names, row.part_shapes, strict=True)
        if name not in used
    ]


def attention_pool(vision: Vision) -> list[Row]:
    """Build the table of the head of a SigLIP, which makes one embedding of a tile."""
    width = vision.hidden_size
    inner = vision.ffn_hidden_size
    return [
        Row("query", ("head.probe",), (1, 1, width)),
        Row("in_proj_weight", ("head.attention.in_proj_weight",), (3 * width, width)),
        Row("in_proj_bias", ("head.attention.in_proj_bias",), (3 * width,)),
        *linear("out_proj", ("head.attention.out_proj",), (width, width)),
        *norm("mlp_norm.", "head.layernorm", width, "LayerNorm"),
        *linear("up", ("head.mlp.fc1",), (inner, width)),
        *linear("down", ("head.mlp.fc2",), (width, inner)),
    ]


def layer(encoder: Vision | Language) -> list[Row]:
    """List the weights of a layer, which encoders of images and of texts have alike."""
    width = encoder.hidden_size
    inner = encoder.ffn_hidden_size
    heads = encoder.num_attention_heads
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    # Heads may be padded so that they divide over ranks.
    qkv = Padded(3 * width, inner=GroupedQKV(heads, heads, width // heads))
    return [
        *norm("self_attention.linear_qkv.layer_norm_", "layer_norm1", width, "LayerNorm"),
        *linear("self_attention.linear_qkv", projections, (3 * width, width), qkv),
        Row(
            "self_attention.linear_proj.weight",
            ("self_attn.out_proj.weight",),
            (width, width),
            Padded(width, axis=1),
        ),
        Row("self_attention.linear_proj.bias", ("self_attn.out_proj.bias",), (width,)),
        *norm("mlp.linear_fc1.layer_norm_", "layer_norm2", width, "LayerNorm"),
        *linear("mlp.linear_fc1", ("mlp.fc1",), (inner, width)),
        *linear("mlp.linear_fc2", ("mlp.fc2",), (width, inner)),
    ]
