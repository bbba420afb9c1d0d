"""InternViT (Chen et al., arXiv 2312.14238), of 300M and of 6B, as ``transformers`` and as
OpenGVLab name its weights; other encoders of the same table name theirs.

Shape letters: D hidden size, H heads, M hidden size of the MLP, p pixels along a patch.
"""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.config.schema import Vision
from megavlm.convert.weights.mapping import Row, layers, linear, norm
from megavlm.convert.weights.transforms import Fused, GroupedQKV, Operation, Padded


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a dialect calls the weights of InternViT, in the order of the forward pass."""

    patch_embedding: str
    class_token: str
    positions: str
    layer: str
    norm_attention: str
    qkv: tuple[str, ...]
    query_norm: str
    key_norm: str
    projection: str
    scale_attention: str
    norm_mlp: str
    scale_mlp: str


NATIVE = Names(
    patch_embedding="embeddings.patch_embeddings.projection",
    class_token="embeddings.cls_token",
    positions="embeddings.position_embeddings",
    layer="encoder.layer.{}.",
    norm_attention="layernorm_before",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    query_norm="attention.q_norm.weight",
    key_norm="attention.k_norm.weight",
    projection="attention.projection_layer",
    scale_attention="lambda_1",
    norm_mlp="layernorm_after",
    scale_mlp="lambda_2",
)
CHAT = Names(
    patch_embedding="embeddings.patch_embedding",
    class_token="embeddings.class_embedding",
    positions="embeddings.position_embedding",
    layer="encoder.layers.{}.",
    norm_attention="norm1",
    qkv=("attn.qkv",),
    query_norm="attn.q_norm.weight",
    key_norm="attn.k_norm.weight",
    projection="attn.proj",
    scale_attention="ls1",
    norm_mlp="norm2",
    scale_mlp="ls2",
)


def rows(vision: Vision, names: Names) -> list[Row]:
    """Build the table of InternViT, with keys and names as in a folder of the vision encoder
    alone.
    """
    width = vision.hidden_size
    side = vision.patch_size
    return [
        *linear("patch_embedding", (names.patch_embedding,), (width, 3, side, side)),
        Row("class_token", (names.class_token,), (1, 1, width)),
        Row("position_embedding", (names.positions,), (1, vision.tokens, width)),
        *layers(_layer(vision, names), "encoder.layers.{}.", names.layer, vision.num_layers),
    ]


def _layer(vision: Vision, names: Names) -> list[Row]:
    width = vision.hidden_size
    inner = vision.ffn_hidden_size
    heads = vision.num_attention_heads
    kind = vision.normalization
    has_scale = vision.has_layer_scale
    qkv: Operation = GroupedQKV(heads, heads, width // heads)
    if len(names.qkv) == 1:
        qkv = Fused(qkv, (width, width, width))
    # Heads may be padded so that they divide over ranks.
    heads_of = Padded(width)
    norms = [
        Row("self_attention.qk_norm.query", (names.query_norm,), (width,), heads_of),
        Row("self_attention.qk_norm.key", (names.key_norm,), (width,), heads_of),
    ]
    return [
        *norm("self_attention.linear_qkv.layer_norm_", names.norm_attention, width, kind),
        *linear(
            "self_attention.linear_qkv",
            names.qkv,
            (3 * width, width),
            Padded(3 * width, inner=qkv),
            bias=vision.qkv_bias,
        ),
        *(norms if vision.qk_norm else []),
        Row(
            "self_attention.linear_proj.weight",
            (f"{names.projection}.weight",),
            (width, width),
            Padded(width, axis=1),
        ),
        Row("self_attention.linear_proj.bias", (f"{names.projection}.bias",), (width,)),
        *([Row("attention_scale", (names.scale_attention,), (width,))] if has_scale else []),
        *norm("mlp.linear_fc1.layer_norm_", names.norm_mlp, width, kind),
        *linear("mlp.linear_fc1", ("mlp.fc1",), (inner, width)),
        *linear("mlp.linear_fc2", ("mlp.fc2",), (width, inner)),
        *([Row("mlp_scale", (names.scale_mlp,), (width,))] if has_scale else []),
    ]
