"""Searching for a layout: every one that can run, what it is expected to need and take, and what
each option changes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from megavlm.config.checks.rank_slices import capacity_problems
from megavlm.config.checks.rules import layout_problems
from megavlm.config.options import shown_value
from megavlm.config.schema import LAYER_PARTS, Config, Loss, Optimizer, Parallel
from megavlm.planner.estimate import (
    USABLE,
    Estimate,
    Hardware,
    Packs,
    estimate,
    estimate_memory,
)

_MOST_TENSOR = 8
_MOST_CONTEXT = 8
_VIRTUAL = (1, 2, 3, 4, 6, 8)
RECOMPUTE = ("none", "selective", "full")


def find_layouts(config: Config, gpus: int, packs: Packs, hardware: Hardware) -> list[Estimate]:
    """Find every layout that can run and fits into the memory, the fastest first.

    Args:
        config: the run; its layout is not looked at.
        gpus: ranks.
        packs: what it trains on.
        hardware: the GPUs.

    Raises:
        ValueError: none can run, or none fits; says which flags to change, and how little memory
            would be enough.
    """
    candidates = [
        (candidate, estimate_memory(candidate, gpus, packs))
        for candidate in _candidates(config, gpus, packs.capacity)
    ]
    if not candidates:
        plain = layout_problems(dataclasses.replace(config, parallel=Parallel()), gpus)
        raise ValueError(
            f"no layout can run on --gpus {gpus}: "
            + "; ".join(plain or ["none of the sizes divides them"])
        )
    fitting = [candidate for candidate, needed in candidates if hardware.holds(needed)]
    if not fitting:
        least, _ = min(candidates, key=lambda each: each[1].total)
        raise ValueError(_why_nothing_fits(estimate(least, gpus, packs, hardware), hardware))
    estimates = (estimate(candidate, gpus, packs, hardware) for candidate in fitting)
    return sorted(estimates, key=_by_speed)


def _by_speed(layout: Estimate) -> tuple[float, ...]:
    """Return what layouts are sorted by: time, then how much is recomputed, then how much is split;
    recomputation costs nothing by the estimate if all of the model's layers are frozen.
    """
    parallel = layout.parallel
    return (
        layout.step_ms,
        RECOMPUTE.index(parallel.recompute),
        parallel.virtual_pipeline_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
        parallel.tensor_model_parallel_size,
        parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size,
        layout.memory.total,
    )


def without_recompute_variants(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Keep the first of the layouts that differ only in what is recomputed, in their order."""
    first: dict[Parallel, Estimate] = {}
    for each in estimates:
        first.setdefault(dataclasses.replace(each.parallel, recompute="none", layout=""), each)
    return list(first.values())


def _why_nothing_fits(least: Estimate, hardware: Hardware) -> str:
    """Explain why no layout fits, and what would, by the layout that needs least."""
    enough = math.ceil(least.memory_gib / USABLE)
    return (
        f"no layout fits into nine tenths of --memory_gib {hardware.memory_gib:g}: the least,"
        f" {describe(least)}, needs {least.memory_gib:.1f} GiB, for which --memory_gib {enough}"
        " would do; else try more --gpus, packs of a smaller --capacity, or --moments bfloat16"
    )


def describe(layout: Estimate) -> str:
    """Describe a layout in a few words."""
    parallel = layout.parallel
    words = [
        f"TP {parallel.tensor_model_parallel_size}",
        f"PP {parallel.pipeline_model_parallel_size}",
    ]
    if parallel.virtual_pipeline_model_parallel_size > 1:
        words.append(f"x {parallel.virtual_pipeline_model_parallel_size}")
    if parallel.context_parallel_size > 1:
        words.append(f"CP {parallel.context_parallel_size}")
    if parallel.expert_model_parallel_size > 1:
        words.append(f"EP {parallel.expert_model_parallel_size}")
    if parallel.expert_tensor_parallel_size > 1:
        words.append(f"ETP {parallel.expert_tensor_parallel_size}")
    words.append(f"DP {layout.data_ranks}")
    if parallel.vision == "data":
        words.append("vision data")
    return f"{' '.join(words)}, recompute {parallel.recompute}"


def estimate_changes(
    config: Config, layout: Estimate, gpus: int, packs: Packs, hardware: Hardware
) -> dict[str, Estimate]:
    """Estimate a layout with one option changed at a time, keyed by the change; arguments as for
    ``find_layouts``.
    """
    unchanged = dataclasses.replace(layout.parallel, layout="auto")
    changes: dict[str, dict] = {
        f"--parallel.recompute {name}": {"recompute": name} for name in RECOMPUTE
    }
    for part in LAYER_PARTS:
        changes[f"--parallel.recompute full --parallel.recompute_parts {part}"] = {
            "recompute": "full",
            "recompute_parts": (part,),
        }
    changes["--parallel.overlap_grad_reduce false"] = {"overlap_grad_reduce": False}
    changes["--parallel.overlap_param_gather false"] = {"overlap_param_gather": False}
    if unchanged.tensor_model_parallel_size > 1:
        other = "tensor" if unchanged.vision == "data" else "data"
        changes[f"--parallel.vision {other}"] = {"vision": other}
        changes["--parallel.sequence_parallel false"] = {"sequence_parallel": False}
    runs = {
        name: dataclasses.replace(config, parallel=dataclasses.replace(unchanged, **change))
        for name, change in changes.items()
    }
    optimizer = config.optimizer
    if (
        optimizer.moments == "float32"
        and optimizer.is_adam
        and config.training.precision == "bfloat16"
    ):
        smaller: Optimizer = dataclasses.replace(optimizer, moments="bfloat16")
        runs["--optimizer.moments bfloat16"] = dataclasses.replace(
            config, parallel=unchanged, optimizer=smaller
        )
    if config.architecture.needs.has_vocabulary_head and not config.loss.is_by_block:
        runs["--loss.vocabulary_block 8192"] = dataclasses.replace(
            config, parallel=unchanged, loss=Loss(vocabulary_block=8192)
        )
    return {
        name: estimate(run, gpus, packs, hardware)
        for name, run in runs.items()
        if not layout_problems(run, gpus)
    }


def to_flags(layout: Estimate) -> str:
    """Write the command-line options that ask for a layout."""
    usual = vars(Parallel())
    asked = dict(vars(layout.parallel))
    chunks = asked.pop("layout")
    flags = [
        f"--parallel.{name} {shown_value(value)}"
        for name, value in asked.items()
        if value != usual[name]
    ]
    if layout.parallel.pipeline_model_parallel_size > 1:
        flags.append(f"--parallel.layout '{chunks}'")
    return " ".join(flags)


def _candidates(config: Config, gpus: int, capacity: int) -> Iterator[Config]:
    """Yield the run with each layout that can run, and with each way to recompute."""
    for parallel in _parallel_sizes(config, gpus):
        candidate = dataclasses.replace(config, parallel=parallel)
        if not layout_problems(candidate, gpus) and not any(
            capacity_problems(parallel, "", capacity)
        ):
            recomputing = [
                dataclasses.replace(
                    candidate, parallel=dataclasses.replace(parallel, recompute=name)
                )
                for name in RECOMPUTE[1:]
            ]
            yield candidate
            yield from (each for each in recomputing if not layout_problems(each, gpus))


def _parallel_sizes(config: Config, gpus: int) -> Iterator[Parallel]:
    """Yield every combination of sizes whose product divides the GPUs."""
    layers = config.architecture.vision.num_layers + config.architecture.language.num_layers
    has_sequences = not config.architecture.needs.is_of_pairs
    for tensor in _divisors(gpus, _MOST_TENSOR):
        for context in _divisors(gpus // tensor, _MOST_CONTEXT):
            for pipeline in _divisors(gpus // (tensor * context), layers):
                for virtual in _VIRTUAL if pipeline > 1 else (1,):
                    for vision in ("tensor", "data") if tensor > 1 else ("tensor",):
                        parallel = Parallel(
                            tensor_model_parallel_size=tensor,
                            pipeline_model_parallel_size=pipeline,
                            virtual_pipeline_model_parallel_size=virtual,
                            context_parallel_size=context,
                            sequence_parallel=tensor > 1 and has_sequences,
                            vision=vision,
                        )
                        yield from _with_expert_sizes(config, parallel, gpus // pipeline)


def _with_expert_sizes(config: Config, parallel: Parallel, ranks: int) -> Iterator[Parallel]:
    """Yield a layout with each expert-parallel size that ``ranks`` of a pipeline stage can have,
    with experts that are whole, and with experts that the tensor-parallel ranks share.
    """
    experts = config.architecture.language.num_experts
    tensor = parallel.tensor_model_parallel_size if experts else 1
    for size in _divisors(ranks, max(experts, 1)):
        for shared in sorted({1, tensor}):
            if size * shared <= ranks:
                yield dataclasses.replace(
                    parallel, expert_model_parallel_size=size, expert_tensor_parallel_size=shared
                )


def _divisors(number: int, most: int) -> list[int]:
    """Return the divisors of a number that are at most ``most``."""
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]
