"""The recipe of InternVL: what each of its stages trains, and with which settings.

Stages 1, 1.5 and 2 are those of InternVL 2.5 (arXiv 2412.05271), with the values that its 8B model
was trained with; the 1B, 2B and 4B models differ in a weight decay of 0.01 and in more steps of
stage 2. In all three every trained weight decays, norms and biases included, and a sample of n
supervised tokens weighs the square root of n. Batch sizes count packs of 16384 tokens.
"""

from __future__ import annotations

from megavlm.config.recipes.recipe import Recipe, Stage
from megavlm.config.schema import ANY, Optimizer, Training

_EVERYTHING = ("vision", "connector", "language")

STAGES: dict[str, Stage] = {
    # Not a stage of InternVL, which starts from finished language models: what is usual for
    # pre-training one (Llama 2, arXiv 2307.09288). Text has no answers of unlike length to balance,
    # so each token weighs the same; a second moment with a shorter memory and a longer warm-up keep
    # training from scratch stable; norms and biases do not decay.
    "0": Stage(
        description="language model only, on packs without images",
        loss_reduction="token",
        template=(ANY,),
        optimizer=Optimizer(
            lr=3e-4,
            min_lr=3e-5,
            warmup_steps=2000,
            warmup_ratio=0.0,
            weight_decay=0.1,
            decay="matrices",
            adam_beta2=0.95,
        ),
        training=Training(trainable=("language",), steps=100_000, global_batch_size=256),
    ),
    "1": Stage(
        description="connector only: align vision features with the language model",
        loss_reduction="square",
        optimizer=Optimizer(lr=2e-4, warmup_steps=100, warmup_ratio=0.0, weight_decay=0.05),
        training=Training(trainable=("connector",), steps=100_000, global_batch_size=512),
    ),
    "1.5": Stage(
        description="vision encoder and connector: domains that the encoder was not trained on",
        loss_reduction="square",
        optimizer=Optimizer(lr=1e-5, warmup_steps=100, warmup_ratio=0.0, weight_decay=0.05),
        training=Training(
            trainable=("vision", "connector"), steps=100_000, global_batch_size=1024, drop_path=0.1
        ),
    ),
    "2": Stage(
        description="all parts: instruction tuning",
        loss_reduction="square",
        optimizer=Optimizer(lr=4e-5, warmup_ratio=0.03, weight_decay=0.05),
        training=Training(trainable=_EVERYTHING, steps=5500, global_batch_size=512, drop_path=0.1),
    ),
    # Mixed preference optimization (arXiv 2411.10442), with the settings of InternVL2.5-MPO's 1B to
    # 8B models, whose batches are of 256 pairs: 64 packs, if a pack of 16384 tokens has four of
    # them. Its authors train on about 400,000 of MMPR's 3 million pairs.
    "mpo": Stage(
        description="all parts: preferred answers against rejected ones",
        loss_reduction="sample",
        objective="preference",
        optimizer=Optimizer(lr=1e-6, warmup_ratio=0.03, weight_decay=0.05),
        training=Training(trainable=_EVERYTHING, steps=1600, global_batch_size=64, drop_path=0.1),
    ),
}

RECIPE = Recipe(
    name="internvl",
    description="InternVL 2.5 to 3.5: vision encoder, MLP, language model",
    stages=STAGES,
    template=(
        "internvl2_5",
        "Hermes-2",
        "internlm2-chat",
        "phi3-chat",
        "vicuna",
        "internvl3_5_gpt_oss",
    ),
    hub_format="native",
)
