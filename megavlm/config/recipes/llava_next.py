"""The recipe of LLaVA-NeXT, or LLaVA 1.6 (Liu et al., 2024; a blog post, no paper): LLaVA 1.5's
parts, images as the whole and a grid of tiles (AnyRes), and a learned embedding behind each row of
their features; the connector alone is trained first, then everything.

Sizes are those of transformers' published folders, whose tables have 64 rows for ``<image>``,
padding and nothing. Rates, schedule, tilings and grids are those of its authors' scripts
(https://github.com/LLaVA-VL/LLaVA-NeXT, scripts/train). Stage 1 is LLaVA 1.5's. The steps of stage
2 are one epoch of 760,000 records in batches of about 128 samples; batches here count packs.
"""

from __future__ import annotations

from dataclasses import replace

from megavlm.config.architecture import Architecture
from megavlm.config.recipes import llava
from megavlm.config.recipes.recipe import Recipe, Stage
from megavlm.config.schema import Optimizer, Training

_VOCABULARY = 32064
VICUNA_7B = replace(
    llava.ARCHITECTURE,
    connector=replace(llava.ARCHITECTURE.connector, newline=True),
    language=replace(llava.ARCHITECTURE.language, vocab_size=_VOCABULARY),
)
VICUNA_13B = replace(
    VICUNA_7B,
    language=replace(
        VICUNA_7B.language,
        num_layers=40,
        hidden_size=5120,
        ffn_hidden_size=13824,
        num_attention_heads=40,
        num_query_groups=40,
    ),
)
# Mistral-7B-Instruct-v0.2.
MISTRAL_7B = replace(
    VICUNA_7B,
    language=replace(
        VICUNA_7B.language,
        family="mistral",
        ffn_hidden_size=14336,
        num_query_groups=8,
        rotary_base=1e6,
        max_position_embeddings=32768,
    ),
)
MODELS: dict[str, Architecture] = {
    "llava-v1.6-vicuna-7b": VICUNA_7B,
    "llava-v1.6-vicuna-13b": VICUNA_13B,
    "llava-v1.6-mistral-7b": MISTRAL_7B,
}

STAGES: dict[str, Stage] = {
    "1": llava.STAGES["1"],
    "2": Stage(
        description="everything: instruction tuning, images as a grid of tiles",
        loss_reduction="token",
        template=("llava_v1", "llava_mistral", "llava_chatml"),
        tiling="anyres",
        optimizer=Optimizer(
            lr=1e-5,
            lr_multipliers=("vision=0.2",),
            warmup_ratio=0.03,
            weight_decay=0.0,
            clip_grad=0.0,
        ),
        training=Training(
            trainable=("vision", "connector", "language"), steps=5938, global_batch_size=48
        ),
    ),
}

RECIPE = Recipe(
    name="llava_next",
    description="LLaVA-NeXT (1.6): LLaVA 1.5 with images as grids of tiles (AnyRes)",
    stages=STAGES,
    architecture=VICUNA_7B,
    hub_format="llava_next",
)
