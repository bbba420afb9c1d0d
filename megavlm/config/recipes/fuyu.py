"""The recipe of Fuyu (Adept, 2023; a blog post, no paper): no vision encoder, patches of the pixels
of an image of any size through one linear layer, a token behind each row of them, and Persimmon.

Adept published weights, and neither training code, data nor settings: the one stage here trains
everything on answers, with the rate and batch size that are usual for a language model of 8 billion
parameters.
"""

from __future__ import annotations

from megavlm.config.connectors import Connector
from megavlm.config.recipes.recipe import Recipe, Stage
from megavlm.config.schema import Architecture, Language, Optimizer, Training, Vision
from megavlm.config.vision import PIXELS

# Fuyu-8B: patches of 30 pixels, each a tile of its own.
ARCHITECTURE = Architecture(
    vision=Vision(
        num_layers=0,
        image_size=30,
        patch_size=30,
        pixel_mean=PIXELS["siglip"][0],
        pixel_std=PIXELS["siglip"][1],
    ),
    connector=Connector(kind="linear", pixel_shuffle=1, norm=False),
    language=Language(
        family="persimmon",
        num_layers=36,
        hidden_size=4096,
        ffn_hidden_size=16384,
        num_attention_heads=64,
        num_query_groups=64,
        vocab_size=262144,
        rotary_base=25000.0,
        rotary_percent=0.5,
        layernorm_epsilon=1e-5,
        max_position_embeddings=16384,
        qkv_bias=True,
        qk_norm=True,
        activation="relu2",
    ),
    image_tokens="fuyu",
)

STAGES: dict[str, Stage] = {
    "1": Stage(
        description="everything: questions about images of any size",
        loss_reduction="token",
        optimizer=Optimizer(
            lr=1e-5, warmup_ratio=0.03, weight_decay=0.1, adam_beta2=0.95, clip_grad=1.0
        ),
        training=Training(trainable=("connector", "language"), steps=5000, global_batch_size=32),
    ),
}

RECIPE = Recipe(
    name="fuyu",
    description="Fuyu: pixels of patches, linear layer, Persimmon; images of any size",
    stages=STAGES,
    architecture=ARCHITECTURE,
    template=("fuyu",),
    tiling="patches",
    hub_format="fuyu",
)
