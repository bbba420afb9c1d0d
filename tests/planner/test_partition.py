"""The stage boundaries of the pipeline."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megavlm.config.models import architecture
from megavlm.config.recipes.internvl import STAGES
from megavlm.config.schema import Config, Parallel, Training
from megavlm.planner.flops import training_cost
from megavlm.planner.layout import make_layout
from megavlm.planner.partition import PackSize, balance, layer_costs

SIZE = PackSize(tokens=16000.0, squared_lengths=4e7, tiles=52.0)


def chunk_costs(costs: list[float], counts: tuple[int, ...]) -> list[float]:
    ends = list(itertools.accumulate(counts))
    return [sum(costs[end - count : end]) for count, end in zip(counts, ends, strict=True)]


@pytest.mark.parametrize("chunks", [1, 2, 3, 5, 9])
def test_no_other_borders_are_better(chunks: int) -> None:
    rng = np.random.default_rng(chunks)
    costs = rng.integers(1, 30, 9).astype(float).tolist()
    found = balance(costs, chunks)
    every = [
        tuple(np.diff((0, *borders, len(costs))).tolist())
        for borders in itertools.combinations(range(1, len(costs)), chunks - 1)
    ]
    assert len(found) == chunks and sum(found) == len(costs)
    assert max(chunk_costs(costs, found)) == min(
        max(chunk_costs(costs, counts)) for counts in every
    )


def test_among_equals_the_load_is_spread() -> None:
    assert balance([9.0, 1.0, 1.0, 1.0, 1.0], 3) == (1, 2, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_layers_cost_what_the_model_costs(stage: str) -> None:
    arch = architecture("internvl2_5-2b")
    trainable = STAGES[stage].training.trainable
    costs = layer_costs(arch, trainable, SIZE)
    whole = training_cost(arch, trainable).total(
        tokens=SIZE.tokens, squared_lengths=SIZE.squared_lengths, tiles=SIZE.tiles
    )
    assert len(costs) == arch.vision.num_layers + arch.language.num_layers
    assert sum(costs) == pytest.approx(whole, rel=1e-12)


def test_frozen_vision_moves_the_borders() -> None:
    """Stage 1 trains the connector alone: the vision encoder costs a third of what it costs in
    stage 2, so a chunk holds more of it.
    """
    arch = architecture("internvl2_5-2b")
    layers = {}
    for stage in ("1", "2"):
        parallel = Parallel(pipeline_model_parallel_size=4)
        training = Training(trainable=STAGES[stage].training.trainable)
        layout = make_layout(
            Config(stage=stage, model="", architecture=arch, parallel=parallel, training=training),
            SIZE,
        )
        layers[stage] = layout.chunks[0].vision_layers.stop
    assert layers["1"] > layers["2"]


def test_the_head_has_its_weight() -> None:
    arch = architecture("internvl2_5-1b")  # a vocabulary that costs as much as seven layers
    costs = layer_costs(arch, STAGES["2"].training.trainable, SIZE)
    assert costs[-1] > 5 * costs[-2]
    assert balance(costs, 4)[-1] < balance([*costs[:-1], costs[-2]], 4)[-1]


def test_recomputed_layers_weigh_more_and_a_head_does_not() -> None:
    arch = architecture("internvl2_5-1b")
    none, selective, full = (
        layer_costs(arch, STAGES["2"].training.trainable, SIZE, name)
        for name in ("none", "selective", "full")
    )
    assert full[5] == pytest.approx(none[5] * 4 / 3) and none[5] < selective[5] < full[5]
    assert full[-1] / none[-1] < 1.06, "the layer that the head goes with"
    of_vision = layer_costs(arch, STAGES["2"].training.trainable, SIZE, "full", ("vision",))
    assert of_vision == full[: arch.vision.num_layers] + none[arch.vision.num_layers :]
    frozen = layer_costs(arch, STAGES["1"].training.trainable, SIZE, "full")
    assert frozen[5] == layer_costs(arch, (), SIZE)[5], (
        "what has no backward pass is not computed again"
    )


def test_no_layout_has_more_chunks_than_layers() -> None:
    with pytest.raises(ValueError, match="4 chunks for 3 layers"):
        balance([1.0, 1.0, 1.0], 4)
