"""Which models a run may go on with, and which weights it may take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megavlm.config.recipes import qwen2_5_vl, qwen2_vl
from megavlm.config.schema import Architecture
from megavlm.train.architecture_differences import architecture_differences


def with_rate(model: Architecture, tokens_per_second: int) -> Architecture:
    return replace(model, vision=replace(model.vision, tokens_per_second=tokens_per_second))


@pytest.mark.parametrize(
    ("recipe", "before", "now", "goes_on"),
    [
        (qwen2_5_vl, 0, 2, True),  # a checkpoint from before videos
        (qwen2_5_vl, 2, 2, True),
        (qwen2_5_vl, 2, 4, False),
        (qwen2_5_vl, 2, 0, False),
        (qwen2_vl, 0, 2, False),
    ],
)
def test_a_run_goes_on_with_the_positions_of_videos_that_it_had(
    recipe, before: int, now: int, goes_on: bool
) -> None:
    old = with_rate(recipe.ARCHITECTURE, before)
    new = with_rate(recipe.ARCHITECTURE, now)
    told = f"--architecture.vision.tokens_per_second: {before} in the checkpoint, {now} asked for"
    assert architecture_differences(old, new) == ([] if goes_on else [told])
    assert architecture_differences(old, new, takes_weights=True) == []


def test_other_weights_are_told() -> None:
    old = qwen2_5_vl.ARCHITECTURE
    new = replace(old, vision=replace(old.vision, num_layers=31))
    for takes_weights in (False, True):
        assert architecture_differences(old, new, takes_weights=takes_weights) == [
            "--architecture.vision.num_layers: 32 in the checkpoint, 31 asked for"
        ]
