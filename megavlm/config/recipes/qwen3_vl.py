"""The recipe of Qwen3-VL (arXiv 2511.21631): a vision encoder that reads images of any size, with
features of three of its layers beside the last one's (DeepStack), connectors that merge squares of
four patches, a Qwen3 whose tokens know frames, rows and columns.
"""

from __future__ import annotations

from dataclasses import replace

from megavlm.config.connectors import Connector
from megavlm.config.recipes import qwen2_5_vl
from megavlm.config.recipes.recipe import Recipe, Stage
from megavlm.config.schema import Architecture, Language, Vision
from megavlm.config.vision import PIXELS

# Qwen3-VL-8B.
ARCHITECTURE = Architecture(
    vision=Vision(
        family="qwen3_vl",
        image_size=32,
        patch_size=16,
        temporal_patch_size=2,
        num_layers=27,
        hidden_size=1152,
        ffn_hidden_size=4304,
        num_attention_heads=16,
        activation="gelu_tanh",
        position_side=48,
        deepstack_layers=(8, 16, 24),
        pixel_mean=PIXELS["siglip"][0],
        pixel_std=PIXELS["siglip"][1],
    ),
    connector=Connector(kind="merger"),
    language=Language(
        family="qwen3",
        num_layers=36,
        hidden_size=4096,
        ffn_hidden_size=12288,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=151936,
        rotary_base=5e6,
        rotary_sections=(24, 20, 20),
        rotary_interleaved=True,
        layernorm_epsilon=1e-6,
        max_position_embeddings=262144,
        qkv_bias=False,
        qk_norm=True,
    ),
    image_tokens="qwen2_vl",
)

STAGES: dict[str, Stage] = {
    "1": replace(
        qwen2_5_vl.PRETRAIN_VISION,
        description="connector: captions, knowledge and texts in images",
        training=replace(qwen2_5_vl.PRETRAIN_VISION.training, trainable=("connector",)),
    ),
    "2": qwen2_5_vl.PRETRAIN,
    "sft": qwen2_5_vl.INSTRUCT,
    "finetune": qwen2_5_vl.FINETUNE,
}

RECIPE = Recipe(
    name="qwen3_vl",
    description="Qwen3-VL: vision encoder with DeepStack, mergers, Qwen3; images of any size",
    stages=STAGES,
    architecture=ARCHITECTURE,
    template=("qwen3_vl",),
    tiling="native",
    hub_format="qwen3_vl",
)
