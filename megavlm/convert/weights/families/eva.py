"""EVA's ViT-g (Fang et al., arXiv 2211.07636), as ``Blip2VisionModel`` names its weights.

Keys have no bias in the pretrained model. Files hold zeros for it inside the bias of queries, keys
and values, and so do checkpoints: its gradient is zero, since softmax does not see it.
"""

from __future__ import annotations

from megavlm.config.schema import Vision
from megavlm.convert.weights.families import internvit
from megavlm.convert.weights.mapping import Row

NAMES = internvit.Names(
    patch_embedding="embeddings.patch_embedding",
    class_token="embeddings.class_embedding",
    positions="embeddings.position_embedding",
    layer="encoder.layers.{}.",
    norm_attention="layer_norm1",
    qkv=("self_attn.qkv",),
    query_norm="",
    key_norm="",
    projection="self_attn.projection",
    scale_attention="",
    norm_mlp="layer_norm2",
    scale_mlp="",
)


def rows(vision: Vision) -> list[Row]:
    """Build the table of the encoder, without the norm behind it, which is the connector's."""
    return internvit.rows(vision, NAMES)
