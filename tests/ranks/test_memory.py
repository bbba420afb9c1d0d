"""The bytes that ``planner/memory`` predicts against those of models that are built."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megavlm.config.lora import Lora, is_adapter
from megavlm.config.recipes.internvl import STAGES
from megavlm.config.schema import Architecture, Config
from megavlm.planner.flops import pieces
from megavlm.planner.layout import make_layout
from megavlm.planner.memory import Memory, memory_by_rank
from megavlm.planner.partition import PackSize
from tests.convert import llava_models, paligemma_models
from tests.convert.models import EXPERTS
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, build, config_for, make_packs

# As InternViT-6B: an odd number of heads, a norm over all of them. As Qwen3: heads of another
# width, normalised, and a tied head.
WIDE = Architecture(
    vision=dataclasses.replace(
        TINY.vision,
        hidden_size=36,
        num_attention_heads=3,
        normalization="RMSNorm",
        qkv_bias=False,
        qk_norm=True,
    ),
    language=dataclasses.replace(
        TINY.language, family="qwen3", qkv_bias=False, qk_norm=True, kv_channels=14, tied_head=True
    ),
)
LAYOUTS = {
    "alone": {},
    "tensor": dict(tensor_model_parallel_size=2, sequence_parallel=True),
    "whole vision layers": dict(
        tensor_model_parallel_size=2, sequence_parallel=True, vision="data"
    ),
    "context": dict(context_parallel_size=2),
    "context and tensor": dict(
        context_parallel_size=2, tensor_model_parallel_size=2, vision="data"
    ),
    "pipeline": dict(pipeline_model_parallel_size=2, layout="v*2|v,t*3"),
    "pipeline of tensor-parallel ranks": dict(
        pipeline_model_parallel_size=2, tensor_model_parallel_size=2, layout="v*3,t|t*2"
    ),
    "chunks that take turns": dict(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, layout="v*2|v,t|t|t"
    ),
    "data": dict(),
    "experts": dict(expert_model_parallel_size=2),
    "experts of tensor-parallel ranks": dict(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        layout="v*3,t|t*2",
        expert_model_parallel_size=2,
    ),
    "experts that two ranks share": dict(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=2,
    ),
}
WORLDS = {
    "experts that two ranks share": 4,
    "experts of tensor-parallel ranks": 4,
    "alone": 1,
    "tensor": 2,
    "whole vision layers": 2,
    "context and tensor": 4,
    "pipeline of tensor-parallel ranks": 4,
}


def held(config: Config) -> tuple[int, Memory]:
    """Pipeline rank, and bytes of weights, gradients and optimizer on this rank, after a step, for
    which moments are made.
    """
    import torch

    from megavlm.train.microbatches import Microbatches
    from megavlm.train.step import train_step

    job = build(config)
    packs = config.training.global_batch_size // job.groups.data_size
    batch = job.train.batch(0, 0, job.batch_options)
    train_step(
        job,
        Microbatches(iter([batch] * packs), packs, batch.weight_sum),
        1.0,
        job.backend,
    )
    parameters = [parameter for chunk in job.chunks for parameter in chunk.parameters()]
    states = [
        state
        for optimizer in job.optimizer.chained_optimizers
        for state in optimizer.optimizer.state.items()
    ]
    own = {parameter.data_ptr() for parameter in parameters}
    of_optimizer = 0
    for main, moments in states:
        tensors = [
            value
            for value in moments.values()
            # A zero that stands for a whole moment takes no memory.
            if isinstance(value, torch.Tensor) and value.ndim and value.stride() != (0,)
        ]
        is_copy = main.dtype == torch.float32 and config.training.precision == "bfloat16"
        of_optimizer += (
            sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            + 4 * main.numel() * is_copy
        )
    assert len(own) == len(parameters), "no tensor is counted twice"
    return job.groups.pipeline_rank, Memory(
        weights=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        gradients=sum(
            4 * parameter.main_grad.numel() for parameter in parameters if parameter.requires_grad
        ),
        optimizer=of_optimizer,
        activations=0,
    )


def assert_memory_is_held(ranks: Pool, config: Config, world: int) -> None:
    """Compare the bytes that a run holds on ``world`` ranks with those that are predicted."""
    copies = world // config.parallel.model_parallel_size
    layout = make_layout(config, PackSize(tokens=128.0, squared_lengths=4000.0, tiles=4.0))
    expected = memory_by_rank(config, layout, copies, capacity=128, tiles=4)
    found = ranks.run(held, world, config)
    for pipeline_rank, of_rank in found:
        assert (of_rank.weights, of_rank.gradients) == (
            expected[pipeline_rank].weights,
            expected[pipeline_rank].gradients,
        )
    for pipeline_rank, of_rank in enumerate(expected):
        rank_slices = [one.optimizer for rank, one in found if rank == pipeline_rank]
        assert sum(rank_slices) / len(rank_slices) == pytest.approx(of_rank.optimizer), (
            "shares are not equal, but are all there"
        )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=3, image_share=1.0, alignment=4)
    return folder


def adapted_parts(model: Architecture) -> list[str]:
    """Return the parts that have adapters."""
    return sorted({piece.part for piece in pieces(model) if is_adapter(piece.key)})


def _as_large_as_tiny(model: Architecture) -> Architecture:
    """Return a model with as many layers and features a tile as the packs are for."""
    vision = dataclasses.replace(model.vision, num_layers=3, patch_size=8)
    language = dataclasses.replace(model.language, num_layers=3, vocab_size=199)
    return dataclasses.replace(model, vision=vision, language=language)


ADAPTERS = Lora(rank=3, targets=("vision", "*.mlp"), dora=True)
ADAPTED = dataclasses.replace(WIDE, lora=ADAPTERS)
CASES = [(name, WIDE) for name in LAYOUTS if "experts" not in name]
CASES += [(name, TINY) for name in ("tensor", "pipeline")]
CASES += [("tensor", _as_large_as_tiny(llava_models.SMALL))]
CASES += [(name, _as_large_as_tiny(paligemma_models.SMALL)) for name in ("tensor", "pipeline")]
CASES += [("tensor", _as_large_as_tiny(paligemma_models.PALIGEMMA2))]
MIXTURE = dataclasses.replace(TINY, language=dataclasses.replace(TINY.language, **EXPERTS))
MIXTURE = dataclasses.replace(
    MIXTURE, language=dataclasses.replace(MIXTURE.language, num_experts=6)
)
CASES += [(name, MIXTURE) for name in LAYOUTS if "experts" in name]
LORA = Lora(rank=3, targets=("language.*.experts",))
CASES += [("experts of tensor-parallel ranks", dataclasses.replace(MIXTURE, lora=LORA))]
CASES += [(name, ADAPTED) for name in ("tensor", "pipeline of tensor-parallel ranks")]


@pytest.mark.parametrize(
    ("name", "architecture"),
    CASES,
    ids=[f"{name}-{number}" for number, (name, _) in enumerate(CASES)],
)
def test_memory_is_what_a_model_that_is_built_takes(
    ranks: Pool, dataset: Path, name: str, architecture: Architecture
):
    for stage in ("1", "2") if name in ("alone", "whole vision layers") else ("2",):
        world = WORLDS.get(name, 2)
        trainable = STAGES[stage].training.trainable
        if architecture.lora.rank:
            trainable = ("connector", *(f"{part}.*.lora" for part in adapted_parts(architecture)))
        settings = dict(
            trainable=trainable, precision="bfloat16", global_batch_size=2, **LAYOUTS[name]
        )
        config = dataclasses.replace(config_for(dataset, **settings), architecture=architecture)
        assert_memory_is_held(ranks, config, world)


@pytest.mark.parametrize(
    ("kind", "architecture", "name"), [("sgd", WIDE, "data"), ("muon", MIXTURE, "experts")]
)
def test_optimizers_with_one_moment_take_less(
    ranks: Pool, dataset: Path, kind: str, architecture: Architecture, name: str
) -> None:
    settings = dict(precision="bfloat16", global_batch_size=2, kind=kind, **LAYOUTS[name])
    config = dataclasses.replace(config_for(dataset, **settings), architecture=architecture)
    assert_memory_is_held(ranks, config, 2)
