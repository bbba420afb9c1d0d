"""What ranks send of a mixture of experts, counted by hand."""

from __future__ import annotations

import dataclasses

import pytest

from megavlm.config.cli import parse
from megavlm.planner.communication import CommunicationVolume, communication_per_microbatch
from megavlm.planner.layout import make_layout
from megavlm.planner.partition import PackSize

LAYERS = 48
TOKENS = 16384
HIDDEN = 2048
SIZE = PackSize(tokens=TOKENS, squared_lengths=3e7, tiles=50)


def sent(*options: str, **parallel: object) -> CommunicationVolume:
    config = parse(["--stage", "2", "--model", "internvl3_5-30b-a3b", *options])
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **parallel))
    return communication_per_microbatch(config, make_layout(config, SIZE), 0, TOKENS, SIZE.tiles)


def test_all_to_all_sends_each_token_to_its_experts_and_back() -> None:
    found = sent(expert_model_parallel_size=8, recompute="none").expert
    # Two bytes of the hidden states there and back, four of the weight, and so the gradients.
    token = 2 * 2 * HIDDEN + 4
    assert found == pytest.approx(2 * LAYERS * TOKENS * 8 * 7 / 8 * token)


def test_all_gather_sums_over_ranks_in_float32() -> None:
    allgather = ("--experts.dispatcher", "allgather")
    found = sent(*allgather, expert_model_parallel_size=8, recompute="none").expert
    token = (2 + 4) * HIDDEN + 4 * 128
    assert found == pytest.approx(2 * LAYERS * TOKENS * 7 * token)
    again = sent(*allgather, expert_model_parallel_size=8, recompute="selective").expert
    assert again == pytest.approx(1.5 * found)


def test_experts_that_are_computed_again_send_nothing_to_tensor_parallel_ranks() -> None:
    split = dict(
        tensor_model_parallel_size=2, sequence_parallel=True, recompute_parts=("language",)
    )
    plain, selective, full = (
        sent(**split, recompute=kind).tensor for kind in ("none", "selective", "full")
    )
    assert plain == selective
    # The forward pass of attention: twice (2 - 1) / 2 of the hidden states, of two bytes.
    assert full - plain == pytest.approx(2 * LAYERS * TOKENS * HIDDEN)
