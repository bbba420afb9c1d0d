"""Runs the real step of the recipes' stages, at published widths with few layers, on a CUDA device
that is not there, and prints what would go wrong, as ``fake_step`` does for InternVL.
``test_fake_recipes`` starts it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.te import fake_cuda, fake_experts
from tests.te.fake_step import PACKS, prepare, watch

LAYERS = 2
FP8 = ("--fp8.language", "tensorwise", "--fp8.vision", "tensorwise")
SHARED = (
    *("--architecture.language.shared_expert_ffn_hidden_size", "1536"),
    *("--architecture.language.shared_expert_gate", "true"),
    *("--architecture.language.family", "qwen2_moe"),
    *("--architecture.language.qk_norm", "false", "--architecture.language.qkv_bias", "true"),
)
LOCAL = ("--training.kernels", "local")
ADAPTERS = (
    *("--architecture.lora.rank", "8", "--architecture.lora.targets", "vision,language"),
    *("--training.trainable", "connector,vision.*.lora,language.*.lora"),
)
SP = (*("--parallel.tensor_model_parallel_size", "2"), *("--parallel.sequence_parallel", "true"))
CP2 = ("--parallel.context_parallel_size", "2")
DROPOUT = ("--architecture.lora.dropout", "0.05", "--parallel.recompute", "selective")
NF4 = ("--architecture.lora.nf4", "vision,language")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of a recipe.

    Args:
        recipe, stage: names of the tables.
        model: of the table of models; empty: the recipe's own.
        options: further ones of the command line.
        ranks: of the run.
    """

    recipe: str
    stage: str
    model: str = ""
    options: tuple[str, ...] = ()
    ranks: int = 1


CASES: dict[str, Case] = {
    "InternVL, preferences": Case(recipe="internvl", stage="mpo", model="internvl2_5-2b"),
    "LLaVA, stage 1": Case(recipe="llava", stage="1"),
    "LLaVA, stage 2": Case(recipe="llava", stage="2"),
    "LLaVA-NeXT": Case(recipe="llava_next", stage="2"),
    "LLaVA-OneVision": Case(recipe="llava_onevision", stage="2"),
    "LLaVA, adapters": Case(recipe="llava", stage="2", options=ADAPTERS),
    "LLaVA, adapters with dropout": Case(recipe="llava", stage="2", options=ADAPTERS + DROPOUT),
    "LLaVA, adapters on 4 bits": Case(recipe="llava", stage="2", options=ADAPTERS + NF4),
    "LLaVA, Muon": Case(recipe="llava", stage="2", options=("--optimizer.kind", "muon")),
    "PaliGemma": Case(recipe="paligemma", stage="1"),
    "PaliGemma 2": Case(recipe="paligemma", stage="1", model="paligemma2-3b"),
    "PaliGemma 2, local": Case(recipe="paligemma", stage="1", model="paligemma2-3b", options=LOCAL),
    "PaliGemma 2, FP8": Case(recipe="paligemma", stage="1", model="paligemma2-3b", options=FP8),
    "Fuyu": Case(recipe="fuyu", stage="1"),
    "Qwen2-VL": Case(recipe="qwen2_vl", stage="2"),
    "Qwen2.5-VL": Case(recipe="qwen2_5_vl", stage="2"),
    "Qwen3-VL": Case(recipe="qwen3_vl", stage="2"),
    "Qwen3-VL, experts": Case(recipe="qwen3_vl", stage="2", model="qwen3-vl-30b-a3b"),
    "Qwen2-VL, FP8": Case(recipe="qwen2_vl", stage="2", options=FP8),
    "Qwen2.5-VL, local": Case(recipe="qwen2_5_vl", stage="2", options=LOCAL),
    "BLIP-2, stage 1": Case(recipe="blip2", stage="1"),
    "BLIP-2, stage 2": Case(recipe="blip2", stage="2"),
    "InstructBLIP": Case(recipe="instructblip", stage="1"),
    "Flamingo": Case(recipe="flamingo", stage="1"),
    "CLIP": Case(recipe="clip", stage="1"),
    "SigLIP": Case(recipe="siglip", stage="1"),
    "InternVL-C, stage 1": Case(recipe="internvl_c", stage="1"),
    "InternVL-C, stage 3": Case(recipe="internvl_c", stage="3"),
    "experts": Case(recipe="internvl", stage="2", model="internvl3_5-30b-a3b"),
    "experts beside a shared one, FP8": Case(
        recipe="internvl", stage="2", model="internvl3_5-30b-a3b", options=SHARED + FP8
    ),
    "GPT-OSS": Case(recipe="internvl", stage="2", model="internvl3_5-gpt-oss-20b"),
    "GPT-OSS, FP8": Case(
        recipe="internvl", stage="2", model="internvl3_5-gpt-oss-20b", options=FP8
    ),
    "GPT-OSS, local": Case(
        recipe="internvl", stage="2", model="internvl3_5-gpt-oss-20b", options=LOCAL
    ),
    "InternVL, preferences, CP2": Case(
        recipe="internvl", stage="mpo", model="internvl2_5-2b", options=CP2, ranks=2
    ),
    "LLaVA-NeXT, TP2 with SP": Case(recipe="llava_next", stage="2", options=SP, ranks=2),
    "LLaVA-OneVision, CP2": Case(recipe="llava_onevision", stage="2", options=CP2, ranks=2),
    "PaliGemma, TP2 with SP": Case(recipe="paligemma", stage="1", options=SP, ranks=2),
    "Fuyu, CP2": Case(recipe="fuyu", stage="1", options=CP2, ranks=2),
    "Qwen2.5-VL, TP2 with SP": Case(recipe="qwen2_5_vl", stage="2", options=SP, ranks=2),
    "Qwen2.5-VL, CP2": Case(recipe="qwen2_5_vl", stage="2", options=CP2, ranks=2),
    "Qwen3-VL, CP2": Case(recipe="qwen3_vl", stage="2", options=CP2, ranks=2),
    "BLIP-2, stage 1, DP2": Case(recipe="blip2", stage="1", ranks=2),
    "InstructBLIP, TP2 with SP": Case(recipe="instructblip", stage="1", options=SP, ranks=2),
    "Flamingo, TP2 with SP": Case(recipe="flamingo", stage="1", options=SP, ranks=2),
    "GPT-OSS, CP2": Case(
        recipe="internvl", stage="2", model="internvl3_5-gpt-oss-20b", options=CP2, ranks=2
    ),
    "Flamingo, CP2": Case(recipe="flamingo", stage="1", options=CP2, ranks=2),
    "CLIP, DP2": Case(recipe="clip", stage="1", ranks=2),
    "SigLIP, ring of DP2": Case(
        recipe="siglip",
        stage="1",
        options=("--architecture.contrastive.exchange", "ring"),
        ranks=2,
    ),
    "InternVL-C, DP2": Case(recipe="internvl_c", stage="3", ranks=2),
}


def configure(case: Case, folder: Path) -> Any:
    """Return the run of a case, as the command line gives it, with few layers, and make its packs
    in ``folder``.
    """
    from megavlm.config.cli import parse

    words = ["--recipe", case.recipe, "--stage", case.stage, "--data.train", str(folder)]
    words += ["--checkpoint.save", f"{folder}.run"]
    words += ["--model", case.model] if case.model else []
    words += ["--training.kernels", "transformer_engine", *case.options]
    config = parse(words)
    model = config.architecture
    # A layer with cross-attention among them, if there are any.
    counts = {"vision": LAYERS, "language": max(LAYERS, model.cross_attention.every)}
    parts = {
        name: dataclasses.replace(part, num_layers=counts[name])
        for name, part in {"vision": model.vision, "language": model.language}.items()
        if part.exists
    }
    if model.vision.deepstack_layers:
        parts["vision"] = dataclasses.replace(parts["vision"], deepstack_layers=(0, LAYERS - 1))
    config = dataclasses.replace(config, architecture=dataclasses.replace(model, **parts))
    make_packs(config, folder)
    return config


def make_packs(config: Any, folder: Path) -> None:
    """Write packs of random samples that the model of a run can read."""
    from megavlm.data.images.anyres import USUAL_GRIDS
    from tests.convert.llava_next_models import make_anyres_sample, write_anyres
    from tests.data.native_packs import Clip, write_native
    from tests.data.preference_packs import make_pairs, make_reference
    from tests.data.samples import make_dataset, write_packs

    model = config.architecture
    reader = model.connector.qformer
    has_words = model.language.exists
    facts = dict(
        vocab_size=model.language.vocab_size if has_words else reader.vocab_size,
        context_token_id=7,
        tile_size=model.vision.image_size,
        features_per_tile=model.placeholders_per_tile,
    )
    mode = config.data.tiling
    if mode in USUAL_GRIDS:
        rng = np.random.default_rng(0)
        # Of a grid of LLaVA-OneVision as large as this, the features are made fewer.
        size = (4 * model.vision.image_size, 3 * model.vision.image_size)
        packs = [
            [make_anyres_sample(rng, [size], mode=mode, text_tokens=30, line=line, **facts)]
            for line in range(1, PACKS + 1)
        ]
        write_anyres(folder, packs, mode, capacity=12288, alignment=8, **facts)
        return
    if mode == "native":
        # Whole windows of the published size, some that the edges cut, and frames of videos.
        shown = [[(640, 480), (230, 360), Clip(size=(120, 90), frames=5)]] * PACKS
        del facts["features_per_tile"]
        write_native(folder, shown, per_pack=1, capacity=4096, alignment=8, **facts)
        return
    if model.needs.is_of_preferences:
        pairs = make_pairs(PACKS, 2, **facts)
        write_packs(folder, pairs, capacity=4096, alignment=8, **facts)
        make_reference(Path(config.reference), folder)
        return
    is_pair = model.objective != "next_token"
    make_dataset(
        folder,
        packs=PACKS,
        samples_per_pack=4,
        image_share=1.0,
        grids=((1, 1),),
        capacity=4096,
        alignment=8,
        text_tokens=(8, 16) if is_pair else (30, 120),
        instruction_length=reader.instruction_tokens if has_words else 0,
        **facts,
    )


def main() -> None:
    """Run every case and print what was found."""
    root = Path(tempfile.mkdtemp())
    configs = {
        name: configure(CASES[name], root / str(number))
        for number, name in enumerate(sys.argv[2:] or CASES)
    }
    waits = prepare()
    fake_experts.install(fake_experts.GroupedProducts())
    found: dict[str, list[dict[str, Any]]] = {}
    for name, config in configs.items():
        language = config.architecture.language
        waits.experts = (language.num_experts, language.experts_per_token)
        found[name] = []
        for rank in range(CASES[name].ranks):
            fake_cuda.join(rank, CASES[name].ranks)
            told = watch(config, waits)
            found[name].append(told | {"exchanges": list(fake_cuda.exchanges.lines)})
    json.dump(found, os.fdopen(int(sys.argv[1]), "w"))


if __name__ == "__main__":
    main()
