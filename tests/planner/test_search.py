"""Which layouts the search tries, and their order."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

from megavlm.config.checks.rank_slices import capacity_problems
from megavlm.config.checks.rules import layout_problems
from megavlm.config.cli import parse
from megavlm.config.schema import Config, Parallel
from megavlm.planner.estimate import Estimate, Hardware, Packs, estimate
from megavlm.planner.partition import PackSize
from megavlm.planner.search import (
    RECOMPUTE,
    _by_speed,
    describe,
    estimate_changes,
    find_layouts,
    to_flags,
)
from tests.convert.models import EXPERTS
from tests.ranks.runs import TINY, config_for

_SIZE = PackSize(tokens=16384, squared_lengths=3e7, tiles=50)


def _seen(gpus: int, capacity: int) -> dict[str, set]:
    """Return the values that each setting has in the layouts of some GPUs."""
    config = parse(["--stage", "2", "--model", "internvl2_5-2b"])
    found = find_layouts(
        config, gpus, Packs(size=_SIZE, capacity=capacity), Hardware(memory_gib=1000)
    )
    return {name: {vars(one.parallel)[name] for one in found} for name in vars(Parallel())}


@pytest.mark.parametrize(("gpus", "shared"), [(6, {1, 2}), (12, {1, 2, 4})])
def test_sizes_need_be_no_powers_of_two(gpus: int, shared: set[int]):
    seen = _seen(gpus, 16384)
    pipelines = seen["pipeline_model_parallel_size"]
    assert 3 in pipelines and all(gpus % size == 0 for size in pipelines)
    for name in ("tensor_model_parallel_size", "context_parallel_size"):
        assert seen[name] == shared, "3 does not divide 16,384 tokens"
    assert 3 in _seen(gpus, 16386)["context_parallel_size"]


def test_of_equal_times_the_layout_that_recomputes_least_comes_first() -> None:
    config = parse(["--recipe", "blip2", "--stage", "1"])  # nothing but the Q-Former is trained
    layouts = find_layouts(config, 1, Packs(size=_SIZE, capacity=16384), Hardware(memory_gib=80))
    assert len({one.step_ms for one in layouts}) == 1
    assert [one.parallel.recompute for one in layouts] == ["none", "selective", "full"]


def _small(gpus: int, **settings: Any) -> tuple[Config, list[Estimate]]:
    """Return a run of a tiny model with experts, and all layouts that are found for it."""
    language = dataclasses.replace(TINY.language, **EXPERTS | dict(num_experts=4))
    config = dataclasses.replace(
        config_for(Path(), global_batch_size=24, **settings),
        architecture=dataclasses.replace(TINY, language=language),
    )
    packs = Packs(size=PackSize(tokens=100.0, squared_lengths=4e3, tiles=8.0), capacity=144)
    return config, find_layouts(config, gpus, packs, Hardware())


@pytest.mark.parametrize("gpus", [4, 6])
def test_every_layout_that_can_run_is_tried(gpus: int) -> None:
    config, found = _small(gpus)
    sizes = range(1, gpus + 1)
    expected = set()
    for tensor, context, pipeline, experts, virtual, vision, recompute in itertools.product(
        sizes, sizes, sizes, sizes, (1, 2, 3, 4, 6, 8), ("tensor", "data"), RECOMPUTE
    ):
        for shared in {1, tensor}:
            parallel = Parallel(
                tensor_model_parallel_size=tensor,
                context_parallel_size=context,
                pipeline_model_parallel_size=pipeline,
                expert_model_parallel_size=experts,
                expert_tensor_parallel_size=shared,
                virtual_pipeline_model_parallel_size=virtual,
                sequence_parallel=tensor > 1,
                vision=vision,
                recompute=recompute,
            )
            run = dataclasses.replace(config, parallel=parallel)
            is_idle = (virtual > 1 and pipeline == 1) or (vision == "data" and tensor == 1)
            if (
                gpus % (tensor * context * pipeline) == 0
                and not is_idle
                and not layout_problems(run, gpus)
                and not any(capacity_problems(parallel, "", 144))
            ):
                expected.add(parallel)
    assert {dataclasses.replace(one.parallel, layout="auto") for one in found} == expected
    assert len(found) == len(expected)
    experts = {one.parallel.expert_model_parallel_size for one in found}
    assert experts == ({1, 2, 4} if gpus == 4 else {1, 2})


def test_layouts_of_the_same_time_come_in_the_order_of_how_much_they_split() -> None:
    _, found = _small(2)
    frozen = dataclasses.replace(found[0], step_ms=1.0)
    fields = [
        dict(recompute="selective"),
        dict(virtual_pipeline_model_parallel_size=2),
        dict(pipeline_model_parallel_size=2),
        dict(context_parallel_size=2),
        dict(tensor_model_parallel_size=2),
        dict(expert_tensor_parallel_size=2),
        {},
    ]
    plain = Parallel()
    layouts = [
        dataclasses.replace(frozen, parallel=dataclasses.replace(plain, **one)) for one in fields
    ]
    assert sorted(layouts, key=_by_speed) == layouts[::-1]
    larger = dataclasses.replace(frozen.memory, weights=2 * frozen.memory.weights)
    more = dataclasses.replace(layouts[-1], memory=larger)
    assert _by_speed(more) > _by_speed(layouts[-1])
    faster = dataclasses.replace(layouts[0], step_ms=0.5)
    assert _by_speed(faster) < _by_speed(layouts[-1])


def test_a_layout_is_described_by_what_it_splits() -> None:
    _, found = _small(2)
    sizes = dict(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=3,
        context_parallel_size=5,
        expert_model_parallel_size=6,
        expert_tensor_parallel_size=7,
        vision="data",
        recompute="full",
    )
    split = dataclasses.replace(found[0], parallel=Parallel(**sizes), data_ranks=8)
    assert describe(split) == "TP 2 PP 4 x 3 CP 5 EP 6 ETP 7 DP 8 vision data, recompute full"
    plain = dataclasses.replace(found[0], parallel=Parallel(), data_ranks=2)
    assert describe(plain) == "TP 1 PP 1 DP 2, recompute none"
    assert to_flags(plain) == "", "one chunk needs no layout"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("", {"--optimizer.moments bfloat16", "--loss.vocabulary_block 8192"}),
        ("--optimizer.kind sgd --loss.vocabulary_block 512", set()),
        ("--optimizer.moments bfloat16", {"--loss.vocabulary_block 8192"}),
        ("--training.precision float32", {"--loss.vocabulary_block 8192"}),
    ],
)
def test_options_are_offered_that_a_run_does_not_have(words: str, offered: set[str]) -> None:
    config = parse(["--stage", "2", "--model", "internvl2_5-2b", *words.split()])
    packs = Packs(size=_SIZE, capacity=16384)
    found = estimate(config, 8, packs, Hardware())
    changes = estimate_changes(config, found, 8, packs, Hardware())
    names = {name for name in changes if not name.startswith("--parallel.")}
    assert names == offered
    if "--loss.vocabulary_block 8192" in offered:
        by_block = changes["--loss.vocabulary_block 8192"]
        assert by_block.memory.activations < found.memory.activations
        # The backward pass computes the logits again.
        language = config.architecture.language
        flops = 2 * language.hidden_size * language.vocab_size * _SIZE.tokens
        more = by_block.chunk_ms[0] - found.chunk_ms[0]
        assert more == pytest.approx(flops / (989e12 * 0.5) * 1e3)
    assert not {name for name in changes if "vision" in name and "recompute" not in name}
    parallel = dataclasses.replace(
        config.parallel, tensor_model_parallel_size=2, sequence_parallel=True, vision="data"
    )
    shared = estimate(dataclasses.replace(config, parallel=parallel), 8, packs, Hardware())
    assert "--parallel.vision tensor" in estimate_changes(config, shared, 8, packs, Hardware())
