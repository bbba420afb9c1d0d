"""The recipe of PaliGemma (Beyer et al., arXiv 2407.07726): SigLIP, a linear layer and Gemma, all
trained from the start, at growing resolution. The tokens in front of an answer see each other, and
answers alone have a loss, which each sample has the mean of.

Stage 3 has the settings of the published transfers (batches of 256 samples, rate 1e-5, weight decay
a tenth of the rate, which is AdamW's 0.1, 5 % warm-up). Those of pre-training are not published:
stages 1, 2 and 2.5 have the same ones, at 224, 448 and 896 pixels. Their steps are a tenth of the
paper's billion, 50 million and 10 million samples. Batches here count packs, of about 16, 4 and 1
samples (``docs/recipes.md``).
"""

from __future__ import annotations

from dataclasses import replace

from megavlm.config.connectors import Connector
from megavlm.config.recipes.recipe import Recipe, Stage
from megavlm.config.schema import Architecture, Language, Optimizer, Training, Vision
from megavlm.config.vision import PIXELS

# SigLIP So400m/14 and Gemma 2B, with rows for <image>, 1024 places and 128 codes of shapes, filled
# up to a multiple of 64.
ARCHITECTURE = Architecture(
    vision=Vision(
        family="siglip",
        image_size=224,
        patch_size=14,
        num_layers=27,
        final_norm=True,
        hidden_size=1152,
        ffn_hidden_size=4304,
        num_attention_heads=16,
        activation="gelu_tanh",
        pixel_mean=PIXELS["siglip"][0],
        pixel_std=PIXELS["siglip"][1],
    ),
    connector=Connector(kind="linear", pixel_shuffle=1, norm=False),
    language=Language(
        family="gemma",
        num_layers=18,
        hidden_size=2048,
        ffn_hidden_size=16384,
        num_attention_heads=8,
        num_query_groups=1,
        kv_channels=256,
        vocab_size=257216,
        rotary_base=1e4,
        max_position_embeddings=8192,
        qkv_bias=False,
        tied_head=True,
        activation="geglu_tanh",
        zero_centered_norm=True,
        scaled_embedding=True,
    ),
    image_tokens="paligemma",
    prefix_lm=True,
)


def _paligemma2(layers: int, width: int, inner: int, heads: int, **sizes: int) -> Architecture:
    """Make a PaliGemma 2 (Steiner et al., arXiv 2412.03555) from the sizes of its Gemma 2."""
    language = replace(
        ARCHITECTURE.language,
        family="gemma2",
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=inner,
        num_attention_heads=heads,
        num_query_groups=heads // 2,
        window_size=4096,
        window_attn_skip_freq=2,
        attention_softcap=50.0,
        final_softcap=30.0,
        sandwich_norm=True,
        **sizes,
    )
    return replace(ARCHITECTURE, language=language)


# Gemma 2 of 2B, 9B and 27B.
MODELS: dict[str, Architecture] = {
    "paligemma2-3b": _paligemma2(26, 2304, 9216, 8, kv_channels=256, query_pre_attn_scalar=256),
    "paligemma2-10b": _paligemma2(42, 3584, 14336, 16, kv_channels=256, query_pre_attn_scalar=256),
    "paligemma2-28b": _paligemma2(46, 4608, 36864, 32, kv_channels=128, query_pre_attn_scalar=144),
}


def _stage(description: str, steps: int, batch: int, image_size: int | None) -> Stage:
    return Stage(
        description=description,
        loss_reduction="sample",
        image_size=image_size,
        optimizer=Optimizer(
            lr=1e-5, warmup_ratio=0.05, weight_decay=0.1, adam_beta2=0.999, clip_grad=1.0
        ),
        training=Training(
            trainable=("vision", "connector", "language"), steps=steps, global_batch_size=batch
        ),
    )


STAGES: dict[str, Stage] = {
    "1": _stage("everything, at 224 pixels: captions, text in images, questions", 390_625, 16, 224),
    "2": _stage("everything, at 448 pixels: what needs detail", 19_531, 64, 448),
    "2.5": _stage("everything, at 896 pixels: text in images", 3_906, 256, 896),
    "3": _stage("everything: one task, at the model's resolution", 5_000, 16, None),
}

RECIPE = Recipe(
    name="paligemma",
    description="PaliGemma: SigLIP, linear layer, Gemma; prefix-LM",
    stages=STAGES,
    architecture=ARCHITECTURE,
    template=("paligemma",),
    tiling="stretch",
    hub_format="paligemma",
)
