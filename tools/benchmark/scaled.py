"""A model with the proportions of InternVL2.5-78B, small enough for a CPU, and packs with the
proportions of its data.

InternViT-6B (45 layers, 3,200 wide) stands before 80 layers of 8,192. Depths are divided by 9,
widths by 25, and the vocabulary is such that the head has the same share of a step; images are
three quarters of a pack. A test holds the shares of all parts against the large model's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megavlm.config.recipes.internvl import STAGES
from megavlm.config.schema import Architecture, Config, Data, Language, Parallel, Training, Vision
from tools.benchmark.cases import ALL, CONNECTOR, VISION
from tools.benchmark.packs import PackSizes

STAGE_NAMES = (CONNECTOR, VISION, ALL)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is.

    Args:
        architecture: the model.
        packs: what it trains on.
        packs_per_step: microbatches of an update.
        rounds: how often everything is measured, taking turns.
    """

    architecture: Architecture
    packs: PackSizes
    packs_per_step: int
    rounds: int


_MODEL = Architecture(
    vision=Vision(
        image_size=32,
        patch_size=4,
        num_layers=5,
        hidden_size=128,
        ffn_hidden_size=512,
        num_attention_heads=4,
        normalization="RMSNorm",
        qkv_bias=False,
        qk_norm=True,
    ),
    language=Language(
        num_layers=9,
        hidden_size=320,
        ffn_hidden_size=1184,
        num_attention_heads=10,
        num_query_groups=2,
        vocab_size=704,
        rotary_base=1e4,
        max_position_embeddings=2048,
    ),
)
_PACKS = PackSizes(capacity=384, packs=4, max_tiles=6, tile_cap=19, least_side=32, most_side=128)

FULL = Scale(architecture=_MODEL, packs=_PACKS, packs_per_step=4, rounds=5)
# For trying the benchmark itself.
SMOKE = Scale(
    architecture=replace(
        _MODEL,
        vision=replace(_MODEL.vision, num_layers=2, hidden_size=32, ffn_hidden_size=64),
        language=replace(
            _MODEL.language, num_layers=3, hidden_size=40, ffn_hidden_size=64, vocab_size=512
        ),
    ),
    packs=replace(_PACKS, capacity=256, packs=2, tile_cap=None),
    packs_per_step=2,
    rounds=2,
)


def config(
    scale: Scale, stage: str, train: Path, *, chunks: int = 1, layout: str = "auto"
) -> Config:
    """Configure the run of a stage: float32 and no drop path, so that stages differ only in what
    they train.

    Args:
        scale: sizes.
        stage: name in the table of stages.
        train: folder of the packs.
        chunks: of the pipeline.
        layout: as ``parallel.layout`` takes it.
    """
    row = STAGES[stage]
    return Config(
        stage=stage,
        model="scaled",
        architecture=scale.architecture,
        data=Data(train=str(train), loss_reduction=row.loss_reduction, workers=0),
        parallel=Parallel(pipeline_model_parallel_size=chunks, layout=layout),
        optimizer=row.optimizer,
        training=Training(
            precision="float32",
            trainable=row.training.trainable,
            global_batch_size=scale.packs_per_step,
        ),
    )
