"""Which layouts the search tries, and their order."""

from __future__ import annotations

import pytest

from megavlm.config.cli import parse
from megavlm.config.schema import Parallel
from megavlm.planner.estimate import Hardware, Packs
from megavlm.planner.partition import PackSize
from megavlm.planner.search import find_layouts

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
