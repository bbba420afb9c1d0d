"""The recipe of Flamingo (Alayrac et al., arXiv 2204.14198) in the form of IDEFICS (Laurencon et
al., arXiv 2306.16527): a frozen vision encoder, a Perceiver resampler, and a frozen language model
with gated cross-attention before every fourth layer.

The model is IDEFICS 9B: OpenCLIP's ViT-H/14, whose features come from its last layer without the
norm behind it, and Llama 7B with two added tokens. Rate, warm-up, steps and weight decay (none in
the resampler) are Flamingo's, AdamW's settings OpenFlamingo's (arXiv 2308.01390). Neither states
what a batch is here: it counts packs, 640 of 2,048 tokens, which make the 1.31 million tokens of
IDEFICS 9B.
"""

from __future__ import annotations

from megavlm.config.connectors import Connector
from megavlm.config.cross_attention import CrossAttention
from megavlm.config.recipes.recipe import Recipe, Stage
from megavlm.config.schema import Architecture, Language, Optimizer, Training, Vision
from megavlm.config.vision import PIXELS

ARCHITECTURE = Architecture(
    vision=Vision(
        family="clip",
        image_size=224,
        patch_size=14,
        num_layers=32,
        hidden_size=1280,
        ffn_hidden_size=5120,
        num_attention_heads=16,
        layernorm_epsilon=1e-5,
        pixel_mean=PIXELS["clip"][0],
        pixel_std=PIXELS["clip"][1],
    ),
    connector=Connector(kind="resampler"),
    language=Language(
        family="llama",
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
        num_query_groups=32,
        vocab_size=32002,
        rotary_base=1e4,
        max_position_embeddings=2048,
        qkv_bias=False,
    ),
    cross_attention=CrossAttention(every=4),
    added_tokens=2,
    image_tokens="idefics",
)

STAGES: dict[str, Stage] = {
    "1": Stage(
        description="resampler, cross-attention and added tokens: interleaved documents and pairs",
        loss_reduction="token",
        optimizer=Optimizer(
            lr=1e-4,
            schedule="constant",
            warmup_steps=5000,
            warmup_ratio=0.0,
            weight_decay=0.1,
            decay="matrices",
            no_decay=("connector", "language.added_*"),
        ),
        training=Training(
            trainable=("connector", "language.decoder.layers.*.cross", "language.added_*"),
            steps=500_000,
            global_batch_size=640,
        ),
    ),
}

RECIPE = Recipe(
    name="flamingo",
    description="Flamingo (IDEFICS): frozen ViT, resampler, frozen language model with"
    " cross-attention",
    stages=STAGES,
    architecture=ARCHITECTURE,
    template=("flamingo_plain", "flamingo", "flamingo_chunks_plain", "flamingo_chunks"),
    tiling="stretch",
    hub_format="idefics",
)
