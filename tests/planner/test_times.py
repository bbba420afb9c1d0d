"""How long a step takes, put together by hand from FLOPs, bytes and rates."""

from __future__ import annotations

import dataclasses

import pytest

from megavlm.config.models import MODELS
from megavlm.config.padding import padded_heads
from megavlm.config.schema import Config
from megavlm.planner.communication import communication_per_microbatch, communication_per_step
from megavlm.planner.estimate import Estimate, Hardware, estimate
from megavlm.planner.flops import training_cost
from megavlm.planner.layout import make_layout
from megavlm.planner.partition import layer_costs
from tests.planner.test_estimate import CAPACITY, PACKS, SIZE, run

HARDWARE = Hardware(tflops=100.0, efficiency=0.4, node_gb_per_s=100.0, network_gb_per_s=10.0)
FLOPS_MS = 1e3 / (100e12 * 0.4)
NODE_MS = 1e3 / 100e9
NETWORK_MS = 1e3 / 10e9


def estimated(config: Config, gpus: int, hardware: Hardware = HARDWARE) -> Estimate:
    return estimate(config, gpus, PACKS, hardware)


def of_batch(config: Config, packs: int) -> Config:
    training = dataclasses.replace(config.training, global_batch_size=packs)
    return dataclasses.replace(config, training=training)


def test_one_gpu_computes_what_the_model_costs_and_blank_tiles() -> None:
    config = of_batch(run(), 3)
    by_part = training_cost(config.architecture, config.training.trainable).by_part(
        tokens=SIZE.tokens, squared_lengths=SIZE.squared_lengths, tiles=SIZE.tiles
    )
    # The tiles of a pack are filled up to a multiple of 4, by one and a half on average; the
    # connector counts with the language model.
    of_pack = by_part["vision"] * 51.5 / 50
    of_pack += by_part["connector"] + by_part["language"] + by_part["head"]
    found = estimated(config, 1)
    assert found.chunk_ms == (pytest.approx(of_pack * FLOPS_MS),)
    assert (found.packs, found.bubble, found.exposed_ms) == (3, 0.0, 0.0)
    assert found.step_ms == pytest.approx(3 * of_pack * FLOPS_MS)
    assert found.tokens_per_s == pytest.approx(3 * SIZE.tokens / found.step_ms * 1e3)


def test_heads_that_only_fill_up_are_computed() -> None:
    """InternViT-6B has 25 heads, of which 8 ranks compute 32: products of queries and keys, and
    what makes and reads them.
    """
    config = run(tensor_model_parallel_size=8, sequence_parallel=True)
    config = dataclasses.replace(config, architecture=MODELS["internvl2_5-26b"])
    vision = config.architecture.vision
    rows = vision.tokens
    attention = rows * 8 * vision.hidden_size**2 + 4 * rows**2 * vision.hidden_size
    whole = attention + rows * 4 * vision.hidden_size * vision.ffn_hidden_size
    assert padded_heads(25, 8) == 32
    share = 1 + attention / whole * (32 / 25 - 1)
    heads = []
    for number in (25, 32):
        arch = config.architecture
        arch = dataclasses.replace(
            arch, vision=dataclasses.replace(vision, num_attention_heads=number)
        )
        heads.append(estimated(dataclasses.replace(config, architecture=arch), 8).chunk_ms[0])
    costs = layer_costs(config.architecture, config.training.trainable, SIZE)
    of_vision = sum(costs[: vision.num_layers]) * 51.5 / 50 * FLOPS_MS / 8
    assert heads[0] - heads[1] == pytest.approx(of_vision * (share - 1))


@pytest.mark.parametrize(
    ("kind", "sizes", "reach"),
    [
        ("tensor", dict(tensor_model_parallel_size=4), 4),
        ("context", dict(tensor_model_parallel_size=2, context_parallel_size=2), 4),
        ("pipeline", dict(pipeline_model_parallel_size=2), 16),
        ("expert", dict(expert_model_parallel_size=4), 4),
        (
            "expert",
            dict(
                tensor_model_parallel_size=2,
                sequence_parallel=True,
                expert_model_parallel_size=2,
                expert_tensor_parallel_size=2,
            ),
            4,
        ),
    ],
)
def test_ranks_that_share_a_node_talk_over_it(kind: str, sizes: dict, reach: int) -> None:
    config = run(layout="even", **sizes)
    if kind == "expert":
        config = dataclasses.replace(config, architecture=MODELS["internvl3_5-30b-a3b"])
    layout = make_layout(config, SIZE)
    for number in range(len(layout.chunks)):
        times = [
            estimated(config, 16, dataclasses.replace(HARDWARE, gpus_per_node=size)).chunk_ms[
                number
            ]
            for size in (reach, reach - 1)
        ]
        sent = communication_per_microbatch(config, layout, number, CAPACITY, SIZE.tiles)
        others = [name for name, size in vars(sent).items() if size and name != kind]
        assert set(others) <= {"tensor"}, "which stay on the node"
        expected = vars(sent)[kind] * (NETWORK_MS - NODE_MS)
        assert times[1] - times[0] == pytest.approx(expected) and expected > 0


def test_all_data_ranks_of_a_stage_reach_as_far_as_the_stage() -> None:
    config = run(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, overlap_grad_reduce=False
    )
    times = [
        estimated(config, 16, dataclasses.replace(HARDWARE, gpus_per_node=size)).exposed_ms
        for size in (8, 7)
    ]
    layout = make_layout(config, SIZE)
    sent = [communication_per_step(config, layout, rank, 4).data * 4 / 6 for rank in range(2)]
    assert times[1] == pytest.approx(max(sent) * NETWORK_MS)
    assert times[0] == pytest.approx(max(sent) * NODE_MS)


def test_what_is_overlapped_hides_behind_one_pass() -> None:
    """Gradients behind the last backward pass, weights behind the first forward pass."""
    config = run()
    slow = dataclasses.replace(HARDWARE, network_gb_per_s=0.01)
    found = estimated(config, 16, slow)
    arch = config.architecture
    passes = []
    for mask in ((), config.training.trainable):
        cost = training_cost(arch, mask)
        by_part = cost.by_part(
            tokens=SIZE.tokens, squared_lengths=SIZE.squared_lengths, tiles=SIZE.tiles
        )
        by_part["vision"] *= 51.5 / 50  # blank tiles
        passes.append(sum(by_part.values()) * FLOPS_MS)
    sent = communication_per_step(config, make_layout(config, SIZE), 0, 16).data * 1e3 / 0.01e9
    assert found.exposed_ms == pytest.approx(sent - passes[1])
    # Without overlap of one of both, the other still hides.
    weights_hide = estimated(run(overlap_grad_reduce=False), 16, slow).exposed_ms
    assert weights_hide == pytest.approx(sent - passes[0])


def test_a_step_is_as_slow_as_the_slowest_chunk_of_each_round() -> None:
    config = run(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        layout="v*24|t*4|t*12|t*8",
    )
    found = estimated(config, 2)
    first, second, third, fourth = found.chunk_ms
    assert (found.packs, found.bubble) == (512, 1 / 1024)
    rounds = max(first, second) + max(third, fourth)
    assert found.step_ms == pytest.approx(512 * rounds * (1 + 1 / 1024))
    assert first > second and third != fourth


def test_of_each_kind_the_most_that_a_gpu_sends_is_told() -> None:
    config = run(pipeline_model_parallel_size=2, layout="v*24,c,t*20|t*4,h")
    layout = make_layout(config, SIZE)
    found = estimated(config, 8).communication
    steps = [communication_per_step(config, layout, rank, 4) for rank in range(2)]
    per_pack = [
        communication_per_microbatch(config, layout, rank, CAPACITY, SIZE.tiles)
        for rank in range(2)
    ]
    assert found.data == max(step.data for step in steps) == steps[0].data
    assert found.pipeline == 128 * per_pack[0].pipeline == 128 * per_pack[1].pipeline > 0
