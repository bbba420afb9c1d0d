"""Which layers stand in which chunk."""

from __future__ import annotations

import pytest

from megavlm.config.layout_text import write_layout
from megavlm.config.schema import Config, Parallel
from megavlm.planner.layout import make_layout, split_evenly
from tests.ranks.runs import TINY


def _layout(*split: int, chunks: int | None = None, virtual: int = 1):
    layout = write_layout(split, TINY.vision.num_layers) if split else "even"
    size = (chunks or len(split)) // virtual
    parallel = Parallel(
        pipeline_model_parallel_size=size,
        virtual_pipeline_model_parallel_size=virtual,
        layout=layout,
    )
    return make_layout(Config(stage="2", model="tiny", architecture=TINY, parallel=parallel))


@pytest.mark.parametrize("split", [(6,), (3, 3), (2, 4), (5, 1), (1, 1, 1, 1, 1, 1), (1, 2, 1, 2)])
def test_every_layer_stands_in_one_chunk(split: tuple[int, ...]) -> None:
    layout = _layout(*split)
    assert [layer for chunk in layout.chunks for layer in chunk.vision_layers] == [0, 1, 2]
    assert [layer for chunk in layout.chunks for layer in chunk.language_layers] == [0, 1, 2]
    for what in ("has_patch_embedding", "has_connector", "has_head"):
        assert sum(getattr(chunk, what) for chunk in layout.chunks) == 1, what
    assert layout.chunks[0].has_patch_embedding and layout.chunks[-1].has_head
    assert (
        tuple(map(sum, zip(layout.vision_counts(), layout.language_counts(), strict=True))) == split
    )


def test_a_layout_is_told_as_it_is_given() -> None:
    assert str(_layout(2, 4)) == "v*2|v,c,t*3,h" and str(_layout(6)) == "v*3,c,t*3,h"


def test_the_connector_goes_with_the_first_language_layer() -> None:
    assert [chunk.has_connector for chunk in _layout(3, 3).chunks] == [False, True]
    assert [chunk.has_connector for chunk in _layout(2, 4).chunks] == [False, True]
    assert [chunk.has_connector for chunk in _layout(4, 2).chunks] == [True, False]


def test_layers_are_split_evenly_where_nothing_else_is_asked() -> None:
    assert split_evenly(10, 4) == (2, 2, 3, 3)
    assert _layout(chunks=4).vision_counts() == (1, 1, 1, 0)


@pytest.mark.parametrize("split", [(), (1, 2, 1, 2)])
def test_what_stands_in_a_chunk_does_not_depend_on_how_many_ranks_share_out_the_chunks(
    split: tuple[int, ...],
) -> None:
    assert _layout(*split, chunks=4, virtual=2) == _layout(*split, chunks=4)


def test_the_layout_that_balances_cuts_as_many_chunks_as_all_ranks_hold() -> None:
    parallel = Parallel(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3)
    assert (
        len(
            make_layout(
                Config(stage="2", model="tiny", architecture=TINY, parallel=parallel)
            ).chunks
        )
        == 6
    )
