"""The recipe of Qwen2-VL (arXiv 2409.12191): a vision encoder that reads images of any size, a
connector that merges squares of four patches, a Qwen2 whose tokens know frames, rows and columns.

Published are what each stage trains, and on how many tokens (section 2.2): 1, the vision encoder on
600 billion tokens; 2, everything on 800 billion; then instruction tuning of the language model
alone (sft). The rest is as in ``qwen2_5_vl``, whose authors' code for tuning is for these models
too.
"""

from __future__ import annotations

from dataclasses import replace

from megavlm.config.recipes import qwen2_5_vl
from megavlm.config.recipes.recipe import Stage
from megavlm.config.schema import Architecture, Vision
from megavlm.config.vision import PIXELS


def _for_steps(stage: Stage, steps: int) -> Stage:
    """Return a stage that takes so many steps."""
    return replace(stage, training=replace(stage.training, steps=steps))


# Qwen2-VL-7B: Qwen2.5-VL-7B with another vision encoder.
ARCHITECTURE = replace(
    qwen2_5_vl.ARCHITECTURE,
    vision=Vision(
        family="qwen2_vl",
        image_size=28,
        patch_size=14,
        temporal_patch_size=2,
        num_layers=32,
        hidden_size=1280,
        ffn_hidden_size=5120,
        num_attention_heads=16,
        activation="quick_gelu",
        pixel_mean=PIXELS["clip"][0],
        pixel_std=PIXELS["clip"][1],
    ),
    language=replace(qwen2_5_vl.ARCHITECTURE.language, max_position_embeddings=32768),
)

MODELS: dict[str, Architecture] = {
    "qwen2-vl-2b": qwen2_5_vl.sized(
        ARCHITECTURE, 28, 1536, 8960, 12, 2, vocab_size=151936, tied_head=True
    ),
    "qwen2-vl-7b": ARCHITECTURE,
    "qwen2-vl-72b": qwen2_5_vl.sized(ARCHITECTURE, 80, 8192, 29568, 64, 8),
}

STAGES: dict[str, Stage] = {
    "1": _for_steps(qwen2_5_vl.PRETRAIN_VISION, 143_000),
    "2": _for_steps(qwen2_5_vl.PRETRAIN, 191_000),
    "sft": replace(
        qwen2_5_vl.INSTRUCT,
        description="language model: instruction tuning",
        training=replace(qwen2_5_vl.INSTRUCT.training, trainable=("language",)),
    ),
    "finetune": qwen2_5_vl.FINETUNE,
}

RECIPE = replace(
    qwen2_5_vl.RECIPE,
    name="qwen2_vl",
    description="Qwen2-VL: vision encoder, merger, Qwen2; images of any size",
    stages=STAGES,
    architecture=ARCHITECTURE,
    hub_format="qwen2_vl",
)
