"""What arrives along the ring of a pipeline, and for which pass."""

from __future__ import annotations

from megavlm.parallel.p2p_interleaved import receiving_passes

# Two ranks with three chunks each, four packs.
PASSES = [
    (pack, chunk) for group in (range(2), range(2, 4)) for chunk in range(3) for pack in group
]


def test_a_rank_behind_another_gets_what_that_makes_for_the_same_chunk() -> None:
    assert receiving_passes(PASSES, 3, wraps=False) == PASSES


def test_the_first_rank_gets_what_the_last_one_makes_for_the_chunk_after() -> None:
    arriving = receiving_passes(PASSES, 3, wraps=True)
    assert arriving[:4] == [(0, 1), (1, 1), (0, 2), (1, 2)]
    assert sorted(arriving) == [(pack, chunk) for pack in range(4) for chunk in (1, 2)]
