"""Which layers stand in which chunk."""

from __future__ import annotations

import pytest

from megavlm.config.pipeline import write_layout
from megavlm.config.schema import Config, Parallel
from megavlm.parallel.layout import make_layout, split_evenly
from tests.ranks.runs import TINY


def _layout(*split: int, chunks: int | None = None):
    layout = write_layout(split, TINY.vision.num_layers) if split else "even"
    parallel = Parallel(pipeline_model_parallel_size=chunks or len(split), layout=layout)
    return make_layout(Config(stage="2", model="tiny", architecture=TINY, parallel=parallel))


@pytest.mark.parametrize("split", [(6,), (3, 3), (2, 4), (5, 1), (1, 1, 1, 1, 1, 1), (1, 2, 1, 2)])
def test_every_layer_stands_in_one_chunk(split: tuple[int, ...]) -> None:
    layout = _layout(*split)
    assert [layer for chunk in layout.chunks for layer in chunk.vision_layers] == [0, 1, 2]
    assert [layer for chunk in layout.chunks for layer in chunk.language_layers] == [0, 1, 2]
    for what in ("has_patch_embedding", "has_projector", "has_head"):
        assert sum(getattr(chunk, what) for chunk in layout.chunks) == 1, what
    assert layout.chunks[0].has_patch_embedding and layout.chunks[-1].has_head
    assert tuple(map(sum, zip(layout.vision_counts(), layout.language_counts(), strict=True))) == split


def test_a_layout_is_told_as_it_is_given() -> None:
    assert str(_layout(2, 4)) == "v*2|v,p,t*3,h" and str(_layout(6)) == "v*3,p,t*3,h"


def test_the_projector_goes_with_the_first_language_layer() -> None:
    assert [chunk.has_projector for chunk in _layout(3, 3).chunks] == [False, True]
    assert [chunk.has_projector for chunk in _layout(2, 4).chunks] == [False, True]
    assert [chunk.has_projector for chunk in _layout(4, 2).chunks] == [True, False]


def test_layers_are_split_evenly_where_nothing_else_is_asked() -> None:
    assert split_evenly(10, 4) == (2, 2, 3, 3)
    assert _layout(chunks=4).vision_counts() == (1, 1, 1, 0)
