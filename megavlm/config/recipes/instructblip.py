"""The recipe of InstructBLIP (Dai et al., arXiv 2305.06500): BLIP-2, whose Q-Former reads the
instruction too.

The model is EVA's ViT-g/14, without its last layer, with Vicuna 7B. Learning rates, warm-up and
weight decay are those of the authors' configuration files, steps and batch those of the paper. Its
batches are samples; batches here count packs, of at most 8 (``docs/recipes.md``).
"""

from __future__ import annotations

from dataclasses import replace

from megavlm.config.connectors import Connector
from megavlm.config.qformer import QFormer
from megavlm.config.recipes import blip2, llava
from megavlm.config.recipes.recipe import Recipe, Stage
from megavlm.config.schema import Optimizer, Training

ARCHITECTURE = replace(
    blip2.ARCHITECTURE,
    connector=Connector(kind="qformer", qformer=QFormer(text=True, instruction_tokens=128)),
    # Vicuna 7B with a row for <image>.
    language=replace(
        llava.ARCHITECTURE.language, layernorm_epsilon=1e-6, max_position_embeddings=2048
    ),
)

STAGES: dict[str, Stage] = {
    "1": Stage(
        description="Q-Former only: answers to instructions, by a frozen language model",
        loss_reduction="token",
        sampling="sqrt",
        optimizer=Optimizer(
            lr=1e-5,
            min_lr=0.0,
            warmup_steps=1000,
            warmup_ratio=0.0,
            weight_decay=0.05,
            decay="matrices",
            clip_grad=0.0,
        ),
        training=Training(trainable=("connector",), steps=60_000, global_batch_size=16),
    ),
}

RECIPE = Recipe(
    name="instructblip",
    description="InstructBLIP: frozen ViT, Q-Former that reads instructions, frozen language model",
    stages=STAGES,
    architecture=ARCHITECTURE,
    template=("instructblip",),
    tiling="stretch",
    hub_format="instructblip",
)
