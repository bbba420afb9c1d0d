"""How many packs a rank of the pipeline keeps, against megatron-core's own order of work."""

from __future__ import annotations

import numpy as np
import pytest

from megavlm.planner.schedule import bubble, in_flight, warm_up


def by_hand(pipeline: int, rank: int, virtual: int, packs: int) -> np.ndarray:
    """Count the same by walking through megatron-core's table, one pass after the other."""
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    chunks = (
        [chunk for _, chunk in get_schedule_table(packs, virtual, pipeline)]
        if virtual > 1
        else [0] * packs
    )
    first = warm_up(pipeline, rank, virtual, packs)
    now = np.zeros(virtual, int)
    seen = []
    for done, chunk in enumerate(chunks):
        if done > first:
            now[virtual - 1 - chunks[done - first - 1]] -= 1
        now[chunk] += 1
        seen.append(now.copy())
    return np.stack(seen)


@pytest.mark.parametrize("virtual", [1, 2, 3])
@pytest.mark.parametrize(("pipeline", "packs"), [(2, 2), (2, 8), (4, 4), (4, 16), (3, 12)])
def test_packs_under_way_are_those_of_megatron_core(
    pipeline: int, virtual: int, packs: int
) -> None:
    for rank in range(pipeline):
        expected = by_hand(pipeline, rank, virtual, packs)
        found = in_flight(pipeline, rank, virtual, packs)
        assert (found == expected[: len(found)]).all() and len(found) == virtual * min(
            packs, 3 * pipeline
        )
        assert found.sum(axis=1).max() == expected.sum(axis=1).max()
        assert (found @ np.arange(1, virtual + 1)).max() == (
            expected @ np.arange(1, virtual + 1)
        ).max(), "later ones repeat"


@pytest.mark.parametrize(
    ("virtual", "packs", "expected"),
    [
        (1, 8, [3, 2, 1, 0]),
        (1, 2, [2, 2, 1, 0]),
        (2, 8, [10, 8, 6, 4]),
        (2, 4, [8, 8, 6, 4]),  # all of them
        (3, 12, [14, 12, 10, 8]),
    ],
)
def test_the_warm_up_is_as_long_as_that_of_megatron_core(
    virtual: int, packs: int, expected: list[int]
) -> None:
    """As ``get_pp_rank_microbatches`` counts it, for groups of as many packs as ranks."""
    assert [warm_up(4, rank, virtual, packs) for rank in range(4)] == expected


def test_without_turns_the_first_rank_keeps_as_many_packs_as_there_are_ranks() -> None:
    assert [in_flight(4, rank, 1, 32).max() for rank in range(4)] == [4, 3, 2, 1]
    assert in_flight(4, 0, 1, 2).max() == 2, "there are no more"


def test_taking_turns_shortens_the_wait() -> None:
    assert bubble(4, 1, 16) == 3 / 16 and bubble(4, 3, 16) == 1 / 16 and bubble(1, 1, 5) == 0
