"""The recipe of LLaVA-OneVision (Li et al., 2024, arXiv 2408.03326): LLaVA-NeXT with SigLIP, Qwen2,
grids of up to six by six tiles, of which the features are made fewer, and samples of several
images; the connector alone is trained first, then everything, in three stages.

Sizes are those of transformers' published folders, whose tables have 64 rows for ``<image>``,
``<video>`` and nothing. Rates, schedule and tilings are those of its authors' scripts
(https://github.com/LLaVA-VL/LLaVA-NeXT, scripts/train). The steps are one epoch of the paper's
558,128, 4, 3.2 and 1.6 million records, behind stage 1 in batches of 256 samples, as the scripts
advise for 7B; batches here count packs.
"""

from __future__ import annotations

from dataclasses import replace

from megavlm.config.architecture import Architecture
from megavlm.config.recipes import llava, llava_next, paligemma
from megavlm.config.recipes.recipe import Recipe, Stage
from megavlm.config.schema import Language

# SigLIP So400m/14 of 384 pixels without its last layer, as transformers' folders hold it.
_SIGLIP = replace(paligemma.ARCHITECTURE.vision, image_size=384, num_layers=26, final_norm=False)
QWEN2_7B = Architecture(
    vision=_SIGLIP,
    connector=llava_next.VICUNA_7B.connector,
    language=Language(
        family="qwen2",
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_query_groups=4,
        vocab_size=152128,
        rotary_base=1e6,
        layernorm_epsilon=1e-6,
        max_position_embeddings=32768,
    ),
    image_tokens="llava",
)
QWEN2_500M = replace(
    QWEN2_7B,
    language=replace(
        QWEN2_7B.language,
        num_layers=24,
        hidden_size=896,
        ffn_hidden_size=4864,
        num_attention_heads=14,
        num_query_groups=2,
        vocab_size=152000,
        tied_head=True,
    ),
)
QWEN2_72B = replace(
    QWEN2_7B,
    language=replace(
        QWEN2_7B.language,
        num_layers=80,
        hidden_size=8192,
        ffn_hidden_size=29568,
        num_attention_heads=64,
        num_query_groups=8,
    ),
)
MODELS: dict[str, Architecture] = {
    "llava-onevision-qwen2-0.5b": QWEN2_500M,
    "llava-onevision-qwen2-7b": QWEN2_7B,
    "llava-onevision-qwen2-72b": QWEN2_72B,
}


def _everything(description: str, steps: int) -> Stage:
    """Return a stage that trains everything: LLaVA-NeXT's second, with other data."""
    stage = llava_next.STAGES["2"]
    return replace(
        stage,
        description=f"everything: {description}",
        template=("llava_chatml", "llava_v1", "llava_mistral"),
        tiling="anyres_max_9",
        training=replace(stage.training, steps=steps, global_batch_size=64),
    )


STAGES: dict[str, Stage] = {
    "1": replace(llava.STAGES["1"], tiling="stretch"),
    "1.5": _everything("knowledge, as captions and texts in images", 15625),
    "2": _everything("instruction tuning, one image a sample", 12500),
    "3": _everything("instruction tuning, several images a sample too", 6250),
}

RECIPE = Recipe(
    name="llava_onevision",
    description="LLaVA-OneVision: SigLIP, Qwen2, larger grids of tiles, and several images",
    stages=STAGES,
    architecture=QWEN2_7B,
    hub_format="llava_onevision",
)
