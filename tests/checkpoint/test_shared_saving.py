"""Which of the ranks that hold the same weights writes which of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

from megavlm.checkpoint.shared_loading import Replicas
from megavlm.checkpoint.shared_saving import share


def group(rank: int, size: int) -> Any:
    """Make a stand-in for a process group."""
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


def written(rank: int, sizes: dict[str, int], first: tuple[int, int] = (0, 0)) -> dict[str, int]:
    """Return what one of four ranks writes, of which pairs hold the same experts; bytes by key."""
    weights = {
        key: ShardedTensor.from_rank_offsets(
            f"model.{key}", torch.zeros(size), replica_id=(*first, rank)
        )
        for key, size in sizes.items()
    }
    replicas = Replicas(dense=group(rank, 4), experts=group(rank // 2, 2))
    shared = share(weights, replicas)
    assert list(shared) == list(weights)
    return {
        key: entry.data.nbytes for key, entry in shared.items() if is_main_replica(entry.replica_id)
    }


SIZES = {"large": 3000, "a": 1000, "b": 1000, "c": 900, "d": 1000, "e": 1000, "f": 1000}


def test_each_weight_is_written_by_one_replica_and_all_write_as_many_bytes() -> None:
    found = [written(rank, SIZES) for rank in range(4)]
    assert sorted(key for keys in found for key in keys) == sorted(SIZES)
    assert max(sum(sizes.values()) for sizes in found) == 4 * 3000
    assert min(sum(sizes.values()) for sizes in found) == 4 * 1900


def test_experts_are_written_by_one_of_those_that_hold_them() -> None:
    experts = {f"layers.0.mlp.experts.{number}.linear_fc1.weight": 10 for number in range(4)}
    found = [written(rank, experts) for rank in range(4)]
    # Ranks 0 and 2 hold one half of the experts, 1 and 3 the other, under the same names here.
    for pair in ((0, 2), (1, 3)):
        keys = [key for rank in pair for key in found[rank]]
        assert sorted(keys) == sorted(experts)
        assert all(len(found[rank]) == 2 for rank in pair)


def test_what_another_rank_of_the_model_writes_is_written_by_no_replica() -> None:
    assert not any(written(rank, SIZES, (0, 1)) for rank in range(4))
