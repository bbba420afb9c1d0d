"""Pools of pairs and their negatives do not depend on the layout."""

from __future__ import annotations

import pytest
import torch

from megavlm.model.objective.hard_negatives import draw_negatives
from megavlm.model.objective.pools import in_pack_order, pools_of_rank

# Pairs of each pack of a step, in the order of the packs.
COUNTS = (3, 1, 4, 2, 5, 2)


def over_ranks(ranks: int) -> list[list[int]]:
    return [list(COUNTS[rank::ranks]) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_gathered_pairs_come_in_the_order_of_the_packs(ranks: int) -> None:
    starts = [sum(COUNTS[:pack]) for pack in range(len(COUNTS))]
    names = [
        f"{pack}.{pair}"
        for rank in range(ranks)
        for pack in range(rank, len(COUNTS), ranks)
        for pair in range(COUNTS[pack])
    ]
    ordered = [names[row] for row in in_pack_order(over_ranks(ranks))]
    assert ordered == [f"{pack}.{pair}" for pack, n in enumerate(COUNTS) for pair in range(n)]
    for size in (0, 1, 2, 3, 4):
        for rank in range(ranks):
            pools = pools_of_rank(over_ranks(ranks), rank, size)
            for pack, pool in zip(range(rank, len(COUNTS), ranks), pools, strict=True):
                members = {name.split(".")[0] for name in ordered[pool.start : pool.stop]}
                first = pack // (size or 6) * (size or 6)
                assert members == {str(one) for one in range(first, min(first + (size or 6), 6))}
                assert pool.start + pool.first == starts[pack]


def test_negatives_are_drawn_by_similarity_and_never_the_own_partner() -> None:
    similarities = torch.tensor([0.0, 1.0, 30.0, 2.0, 0.5]).expand(20_000, 5)
    own = torch.full((20_000,), 2)
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    found = draw_negatives(similarities, own, draws).bincount(minlength=5) / 20_000
    expected = torch.tensor([0.0, 1.0, float("-inf"), 2.0, 0.5]).softmax(0)
    assert found[2] == 0
    assert found.tolist() == pytest.approx(expected.tolist(), abs=0.01)
    edges = draw_negatives(similarities[:2], own[:2], torch.tensor([0.0, 1 - 2**-24]))
    assert edges.tolist() == [0, 4]
