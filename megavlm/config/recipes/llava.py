"""The recipe of LLaVA 1.5 (arXiv 2310.03744): CLIP's features from before its last layer (or
SigLIP's, with ``--init.vision``), a small connector, a language model; the connector alone is
trained first, then it and the language model.

Learning rates, schedule and AdamW's settings are those of the scripts of its authors, which clip no
gradients. Their batches of 256 and 128 are samples; batches here count packs, of about eight and
four samples (``docs/recipes.md``). The steps are one epoch of 558,128 and 665,298 records.
"""

from __future__ import annotations

from megavlm.config.connectors import LLAVA
from megavlm.config.recipes.recipe import Recipe, Stage
from megavlm.config.schema import Architecture, Language, Optimizer, Training, Vision
from megavlm.config.vision import PIXELS

# CLIP-L/14 of 336 pixels, and Vicuna 7B 1.5 with a row for <image>.
ARCHITECTURE = Architecture(
    vision=Vision(
        family="clip",
        image_size=336,
        patch_size=14,
        num_layers=23,
        unused_layers=1,
        hidden_size=1024,
        ffn_hidden_size=4096,
        num_attention_heads=16,
        layernorm_epsilon=1e-5,
        activation="quick_gelu",
        pixel_mean=PIXELS["clip"][0],
        pixel_std=PIXELS["clip"][1],
    ),
    connector=LLAVA,
    language=Language(
        family="llama",
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
        num_query_groups=32,
        vocab_size=32001,
        rotary_base=1e4,
        layernorm_epsilon=1e-5,
        max_position_embeddings=4096,
        qkv_bias=False,
    ),
    image_tokens="llava",
)


def _optimizer(lr: float) -> Optimizer:
    return Optimizer(lr=lr, warmup_ratio=0.03, weight_decay=0.0, clip_grad=0.0)


STAGES: dict[str, Stage] = {
    "1": Stage(
        description="connector only: captions, without questions",
        loss_reduction="token",
        template=("llava_plain",),
        tiling="crop",
        optimizer=_optimizer(1e-3),
        training=Training(trainable=("connector",), steps=2181, global_batch_size=32),
    ),
    "2": Stage(
        description="connector and language model: instruction tuning",
        loss_reduction="token",
        template=("llava_v1", "llava_chatml"),
        tiling="pad",
        optimizer=_optimizer(2e-5),
        training=Training(trainable=("connector", "language"), steps=5198, global_batch_size=32),
    ),
}

RECIPE = Recipe(
    name="llava",
    description="LLaVA 1.0 and 1.5: CLIP or SigLIP, linear layer or MLP, language model",
    stages=STAGES,
    architecture=ARCHITECTURE,
    hub_format="llava",
)
