"""The recipe of Qwen2.5-VL (arXiv 2502.13923): a vision encoder that reads images of any size and
sees windows of them in most layers, a connector that merges squares of four patches, a Qwen2.5
whose tokens know frames, rows and columns.
"""

from __future__ import annotations

from megavlm.config.connectors import Connector
from megavlm.config.recipes.recipe import Recipe, Stage
from megavlm.config.schema import Architecture, Language, Optimizer, Training, Vision
from megavlm.config.vision import PIXELS

# Qwen2.5-VL-7B.
ARCHITECTURE = Architecture(
    vision=Vision(
        family="qwen2_5_vl",
        image_size=28,
        patch_size=14,
        temporal_patch_size=2,
        num_layers=32,
        hidden_size=1280,
        ffn_hidden_size=3420,
        num_attention_heads=16,
        normalization="RMSNorm",
        activation="swiglu",
        window_size=112,
        full_attention_layers=(7, 15, 23, 31),
        pixel_mean=PIXELS["clip"][0],
        pixel_std=PIXELS["clip"][1],
    ),
    connector=Connector(kind="merger"),
    language=Language(
        family="qwen2",
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_query_groups=4,
        vocab_size=152064,
        rotary_base=1e6,
        rotary_sections=(16, 24, 24),
        layernorm_epsilon=1e-6,
        max_position_embeddings=128000,
    ),
    image_tokens="qwen2_vl",
)

STAGES: dict[str, Stage] = {
    "2": Stage(
        description="everything: instruction tuning",
        loss_reduction="token",
        optimizer=Optimizer(lr=1e-5, warmup_ratio=0.03, weight_decay=0.0),
        training=Training(
            trainable=("vision", "connector", "language"), steps=5000, global_batch_size=128
        ),
    ),
}

RECIPE = Recipe(
    name="qwen2_5_vl",
    description="Qwen2.5-VL: vision encoder with windows, merger, Qwen2.5; images of any size",
    stages=STAGES,
    architecture=ARCHITECTURE,
    template=("qwen2_vl",),
    tiling="native",
    hub_format="qwen2_5_vl",
)
