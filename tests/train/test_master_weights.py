"""Which master weights are compared with which weights, and what counts as a difference."""

from __future__ import annotations

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megavlm.train.master_weights import differences, masters


def shard(key: str, data: torch.Tensor, *, index: int = 0) -> ShardedTensor:
    """Make one of the two shards of a tensor."""
    return ShardedTensor.from_rank_offsets(key, data, (0, index, 2))


def factory(key: str, data: torch.Tensor) -> ShardedTensorFactory:
    """Make a tensor that is split when it is written."""
    return ShardedTensorFactory(key, data, lambda *_: [], lambda found: found)


def test_each_part_of_a_chain_is_compared_by_key_and_offset() -> None:
    upper = torch.randn(4, 3, dtype=torch.bfloat16)
    lower = upper + 1  # different in every element
    fused = torch.randn(6, dtype=torch.float32)
    frozen = torch.randn(2)
    weights = {
        "0 a": shard("model.a", upper, index=0),
        "1 a": shard("model.a", lower, index=1),
        "0 b": factory("model.b", fused),
        "0 c": factory("model.c", frozen),
    }
    parts = [
        {"param_state": {0: {"param": shard("optimizer.state.param.model.a", upper.float())}}},
        {
            "param_state": {
                0: {"param": factory("chained_1.optimizer.state.param.model.b", fused.clone())},
                1: {
                    "param": shard(
                        "chained_1.optimizer.state.param.model.a", lower.float(), index=1
                    )
                },
                2: {"exp_avg": None},
            }
        },
    ]
    found = masters(weights, parts)
    assert [(master.key, master.part) for master in found] == [
        ("model.a", 0),
        ("model.b", 1),
        ("model.a", 1),
    ]
    assert differences(found, parts, lambda key: None) == {}
    # The upper part's master weights where the lower part's belong.
    parts[1]["param_state"][1]["param"].data.copy_(upper)
    parts[1]["param_state"][0]["param"].data[2] += 1
    assert differences(found, parts, lambda key: None) == {"model.a": 12, "model.b": 1}


@pytest.mark.parametrize(
    ("written", "held", "is_same"),
    [
        (torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.bfloat16, True),
        (torch.float32, torch.float32, False),
    ],
)
def test_master_weights_are_rounded_as_the_weights_were(
    written: torch.dtype, held: torch.dtype, is_same: bool
) -> None:
    exact = torch.randn(1000)
    # Weights that were saved in one dtype and loaded in another.
    weight = exact.to(torch.bfloat16 if is_same else torch.float32).to(held)
    master = exact if is_same else exact + 1e-3
    weights = {"a": factory("model.a", weight)}
    parts = [{"param_state": {0: {"param": factory("optimizer.state.param.model.a", master)}}}]
    found = masters(weights, parts)
    assert (differences(found, parts, lambda key: written) == {}) == is_same
