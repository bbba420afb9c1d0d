"""The FLOPs that ``parallel/cost`` counts against those that torch counts while the model runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megavlm.config.lora import Lora, stacked
from megavlm.config.recipes.internvl import STAGES
from megavlm.config.schema import Architecture, Checkpoint, Logging
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.order import Plan
from megavlm.planner.flops import pieces, training_cost, with_gradients
from tests.convert.models import GEMMA, PERSIMMON
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, build, config_for, make_packs
from tests.ranks.test_resume import run_job

# As many words as rows of the padded vocabulary, since padding is computed but does not count.
ARCHITECTURE = dataclasses.replace(
    TINY, language=dataclasses.replace(TINY.language, vocab_size=256)
)
MASKS = {
    **{f"stage {name}": stage.training.trainable for name, stage in STAGES.items()},
    "late layers": ("vision.encoder.layers.2*", "language.decoder.layers.1.mlp*"),
    # With its norm: megatron-core's linear layer makes the gradient of its input, needed or not, as
    # soon as its weight is trained.
    "head": ("language.decoder.final_layernorm", "language.output_layer"),
}


# InternViT-6B's and Qwen3's norms, heads of another width than hidden size / heads, a tied head.
OTHER = dataclasses.replace(
    ARCHITECTURE,
    vision=dataclasses.replace(TINY.vision, normalization="RMSNorm", qkv_bias=False, qk_norm=True),
    language=dataclasses.replace(
        ARCHITECTURE.language,
        family="qwen3",
        qkv_bias=False,
        qk_norm=True,
        kv_channels=14,
        tied_head=True,
    ),
)


GEMMA_MODEL = dataclasses.replace(
    ARCHITECTURE,
    language=dataclasses.replace(
        ARCHITECTURE.language, **GEMMA, kv_channels=14, num_query_groups=1, tied_head=True
    ),
)


PERSIMMON_MODEL = dataclasses.replace(
    ARCHITECTURE,
    language=dataclasses.replace(ARCHITECTURE.language, **PERSIMMON, num_query_groups=4),
)


def counted_by_torch(
    dataset: Path, trainable: tuple[str, ...], architecture: Architecture = ARCHITECTURE
) -> tuple[int, dict[str, int], set[str]]:
    """FLOPs of forward and backward pass of one pack, the pack's size, and the keys of the
    weights.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from megavlm.model.weights import named_weights
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.step import run_packs

    job = build(
        dataclasses.replace(config_for(dataset, trainable=trainable), architecture=architecture)
    )
    batch = job.train.batch(0, 0, job.batch_options)
    # The plain kernel keeps the probabilities; fused ones compute them again in the backward pass,
    # which torch counts, unlike us.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run_packs(job.ddp_chunks, Microbatches(iter([batch]), 1, batch.weight_sum), job.backend)
    lengths = batch.sample_ends.diff().to(torch.float64)
    patches = architecture.vision.grid**2
    of_images = [length // patches for length in batch.images.lengths] if batch.images else []
    size = {
        "tokens": len(batch.tokens),
        "squared_lengths": int((lengths**2).sum()),
        "tiles": len(batch.tiles),
        "squared_tiles": sum(tiles**2 for tiles in of_images),
        "supervised": len(batch.loss_positions),
    }
    return counter.get_total_flops(), size, set(named_weights(job.chunks[0]))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=3, image_share=1.0)
    return folder


@pytest.mark.parametrize("mask", MASKS)
def test_the_cost_is_what_torch_counts(ranks: Pool, dataset: Path, mask: str):
    [(counted, size, _)] = ranks.run(counted_by_torch, 1, dataset, MASKS[mask])
    cost = training_cost(ARCHITECTURE, MASKS[mask])
    # torch counts all pairs of tokens, the cost only those that a causal mask lets see each other:
    # half.
    size["squared_lengths"] *= 2
    assert cost.total(**size) == counted


@pytest.mark.parametrize(
    ("mask", "model"),
    [
        ("stage 2", OTHER),
        ("late layers", OTHER),
        ("stage 2", GEMMA_MODEL),
        ("stage 2", PERSIMMON_MODEL),
    ],
    ids=["all", "late layers", "gemma", "persimmon"],
)
def test_the_cost_of_what_only_some_models_have_is_what_torch_counts(
    ranks: Pool, dataset: Path, mask: str, model: Architecture
):
    [(counted, size, keys)] = ranks.run(counted_by_torch, 1, dataset, MASKS[mask], model)
    size["squared_lengths"] *= 2
    assert training_cost(model, MASKS[mask]).total(**size) == counted
    assert {piece.key for piece in pieces(model)} - {""} == keys


def cost_of_zeros(model: Architecture, mask: tuple[str, ...], size: dict[str, int]) -> float:
    """Count the products with zeros of adapters with several A's, which the model does not ask for:
    each row of B meets all of them.
    """
    of_b = (
        (piece, passes)
        for piece, passes in with_gradients(pieces(model), mask)
        if piece.key.endswith(".lora.b")
    )
    return sum(
        (stacked(model, piece.key.replace(".lora.b", ".weight")) - 1)
        * (piece.forward * passes * size[f"{piece.unit}s"])
        for piece, passes in of_b
    )


def test_the_cost_of_adapters_is_what_torch_counts(ranks: Pool, dataset: Path):
    lora = Lora(rank=3, targets=("vision.*.self_attention", "language"))
    adapted = dataclasses.replace(OTHER, lora=lora)
    for mask in (("vision.*.lora", "language.*.lora"), ("connector", "language.*.lora")):
        [(counted, size, keys)] = ranks.run(counted_by_torch, 1, dataset, mask, adapted)
        size["squared_lengths"] *= 2
        zeros = cost_of_zeros(adapted, mask, size)
        assert training_cost(adapted, mask).total(**size) + zeros == counted
        assert {piece.key for piece in pieces(adapted)} - {""} == keys


def test_every_weight_of_the_model_is_listed(ranks: Pool, dataset: Path):
    [(_, _, keys)] = ranks.run(counted_by_torch, 1, dataset, ("connector",))
    assert {piece.key for piece in pieces(ARCHITECTURE)} - {""} == keys


def test_a_run_tells_its_flops_for_each_rank(ranks: Pool, dataset: Path, tmp_path: Path):
    config = config_for(dataset, steps=3, global_batch_size=2, trainable=("connector",))
    config = dataclasses.replace(
        config, checkpoint=Checkpoint(save=str(tmp_path)), logging=Logging(interval=1)
    )
    ranks.run(run_job, 2, config)
    told = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = [record for record in told if "loss" in record]
    packs = PackedDataset(dataset)
    cost = training_cost(TINY, ("connector",))
    order = {"group": config.group, "strata": config.strata}
    plan = Plan(num_packs=len(packs), seed=config.training.seed, **order)
    for step, record in enumerate(told):
        size = {
            name: float(packs.index[plan.pack_ids(2 * step, 2)][name].sum())
            for name in ("tokens", "squared_lengths", "tiles", "squared_tiles", "supervised")
        }
        seconds = size["tokens"] / record["tokens_per_s"]
        assert 2 * record["tflops"] * 1e12 * seconds == pytest.approx(cost.total(**size)), (
            "two ranks"
        )
    assert len(told) == 3
